"""The loops of a rollout: who takes part in the next call of the model, and what each is to do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dllm_kernels import noise
from dllm_kernels.model.kept import Kept
from dllm_kernels.model.layouts import Cached
from dllm_kernels.rollouts.denoising import FIRST_ACCEPTED, Ask, Denoiser, OnStep
from dllm_kernels.rollouts.schedules import chances, counts_of_block, schedule, transfer_shares


def run(denoiser: Denoiser, on_step: OnStep | None) -> None:
    """Run all steps; ranks that share the model make the same calls, some of them idle."""
    if denoiser.decoding.static:
        _run_static(denoiser, on_step)
    else:
        _Queue(denoiser).run(on_step)
    denoiser.finish()


def _run_static(state: Denoiser, on_step: OnStep | None) -> None:
    """All sequences have the same number of masked tokens left, so finding them needs no host sync."""
    d = state.decoding
    assert d.steps is not None
    block, left, who_A = 0, d.length, state.everyone

    def after_block() -> Tensor:
        """The unfinished sequences: a host sync with `eos_id`."""
        if d.eos_id is None:
            return state.everyone
        state.ended(state.everyone, block)
        return (~state.finished_B).nonzero()[:, 0]

    state.canvas.enter(block)
    for step in schedule(d.sampler, state.completion_BL.shape[1], d.steps, d.block_length):
        if step.block != block:
            who_A, block = after_block(), step.block
            state.canvas.enter(block)
        if len(who_A) == 0:
            if state.most(0) == 0:
                return
            state.idle()
            continue
        state.most(len(who_A))
        place_AR = _first_places(state.masked_BL[who_A] & (state.block_BL[who_A] == block), step.remaining)
        all_places_AM = _first_places(state.masked_BL[who_A], left) if d.greedy else None
        state.step(Ask(who_A, place_AR, None, [step.number], step.commit, all_places_AM=all_places_AM))
        left -= step.commit
        if on_step is not None:
            on_step(step.number, state.completion_BL[:, : d.length])
    after_block()


class _Queue:
    """Sequences at steps of their own: as one finishes, the next one enters the batch.

    Layouts that keep keys and values are at one block at a time, in which their sequences wait for each other.
    """

    def __init__(self, state: Denoiser):
        self.state, self.d = state, state.decoding
        B = len(state.everyone)
        self.block, self.inner, self.done = [0] * B, [0] * B, [False] * B
        self.in_step = isinstance(state.canvas, (Cached, Kept))
        last_BL = torch.where(state.there_BL, state.block_BL, 0)
        self.last = last_BL.amax(-1).tolist() if last_BL.shape[1] else self.block
        d = self.d
        self.shares = transfer_shares(d.steps, d.sampler.options["eps"]).tolist() if self._by_time and d.steps else []
        self.chances = chances(d.sampler.options, d.steps) if d.sampler.take_back == "chance" and d.steps else []
        self._sizes: list[list[int]] = []
        if d.sampler.blocks != "sequence":
            blocks = torch.arange(max(self.last, default=0) + 1, device=last_BL.device)
            self._sizes = (state.there_BL[:, None] & (state.block_BL[:, None] == blocks[:, None])).sum(-1).tolist()

    @property
    def _by_time(self) -> bool:
        return self.d.sampler.commit == "chance" and self.d.sampler.take_back is None

    def run(self, on_step: OnStep | None) -> None:
        waiting, seats, calls, entered = iter(range(len(self.done))), list[int](), 0, -1
        while True:
            seats = [b for b in seats if not self.done[b]]
            while len(seats) < self.d.slots and (b := next(waiting, None)) is not None:
                seats.append(b)
            if not seats:
                if self.state.most(0) == 0:
                    return
                self.state.idle()
                continue
            active = seats
            if self.in_step:
                first = min(self.block[b] for b in seats)
                active = [b for b in seats if self.block[b] == first]
                if first != entered:
                    self.state.canvas.enter(first)
                    entered = first
            ask = self._next(active)
            if ask is None:  # some went on to where there is something to do, or finished
                continue
            self.state.most(1)
            self.state.step(ask)
            for b in ask.who_A.tolist():
                self.inner[b] += 1
            if self.d.eos_id is not None and self.d.sampler.blocks is None:
                self._end(ask.who_A.tolist())
            calls += 1
            if on_step is not None:
                on_step(calls - 1, self.state.completion_BL[:, : self.d.length])

    def _counts(self, b: int) -> list[int] | None:
        """Tokens per step of the block that a sequence is in."""
        size = self._sizes[b][self.block[b]] if self._sizes else self.d.block_length
        return counts_of_block(self.d.sampler, size, self.d.steps_of_block, self.d.block_length)

    def _next(self, active: list[int]) -> Ask | None:
        """The next step of these sequences; None where some had nothing to do and moved on."""
        state, sampler = self.state, self.d.sampler
        who_A = torch.tensor(active, device=state.everyone.device)
        block_A = torch.tensor([self.block[b] for b in active], device=who_A.device)
        masked_AL = state.masked_BL[who_A] & (state.block_BL[who_A] == block_A[:, None])
        if sampler.take_back == "trust":  # earlier blocks too
            masked_AL = state.masked_BL[who_A] & (state.block_BL[who_A] <= block_A[:, None])
        live_AL, back_AL = masked_AL, None
        if sampler.edits is not None:
            here_AL = state.there_BL[who_A] & (state.block_BL[who_A] == block_A[:, None])
            live_AL = here_AL & (state.post_B[who_A] < sampler.post_steps)[:, None]
        elif sampler.commit == "chance":
            live_AL, back_AL = self._drawn(active, who_A, masked_AL)
        elif sampler.opening:
            place_L = torch.arange(live_AL.shape[1], device=who_A.device)
            opening_A1 = torch.tensor([self.inner[b] == 0 for b in active], device=who_A.device)[:, None]
            live_AL = live_AL & (~opening_A1 | (place_L == block_A[:, None] * self.d.block_length))
        plans = [self._counts(b) for b in active]
        asked = [
            1 if plan is None else plan[self.inner[b]] if self.inner[b] < len(plan) else 0
            for b, plan in zip(active, plans, strict=True)
        ]
        back_A = torch.zeros_like(who_A) if back_AL is None else back_AL.sum(-1)
        counts = torch.stack([live_AL.sum(-1), masked_AL.sum(-1), back_A]).tolist()  # the host sync of a step
        quota = [0] * len(active)
        if sampler.most == "schedule":  # what was put off is asked for again, for as long as it takes
            for n, (b, plan) in enumerate(zip(active, plans, strict=True)):
                assert plan is not None
                quota[n] = sum(plan[: self.inner[b] + 1]) - (sum(plan) - counts[1][n])
            asked = quota
        ready = [n for n in range(len(active)) if (counts[0][n] and asked[n]) or counts[2][n]]
        if len(ready) < len(active):
            stuck = [n for n in range(len(active)) if n not in set(ready)]
            self._move([(active[n], plans[n], counts[1][n]) for n in stuck])
            return None
        valid_AL = live_AL
        place_AR = _first_places(valid_AL, max(1, *counts[0]))
        last_A = None
        if sampler.take_back == "trust":
            left = [sum(plan[self.inner[b] + 1 :]) for b, plan in zip(active, plans, strict=True) if plan is not None]
            last_A = torch.tensor(left, device=who_A.device)
        most_A = torch.tensor(quota, device=who_A.device) if sampler.most == "schedule" else None
        if sampler.most == "share":  # WINO: at most 0.7 of the masks, but 5 to 20
            most_A = (torch.tensor(counts[0], device=who_A.device) * 0.7).long().clamp(5, 20)
        everything = sampler.commit == "chance" or sampler.take_back == "trust"
        one = sampler.least == "one"
        least = live_AL.shape[1] if everything else 1 if one else torch.tensor(asked, device=who_A.device)
        return Ask(
            who_A,
            place_AR,
            valid_AL.gather(1, place_AR),
            [self.d.number(self.block[b], self.inner[b]) for b in active],
            least,
            most_A,
            self._every_place(who_A),
            last_A,
            back_AL,
            block_A,
            greedy=[self.inner[b] == len(self.chances) for b in active] if self.chances else (),
        )

    def _every_place(self, who_A: Tensor) -> Tensor | None:
        if not self.d.greedy:
            return None
        return _first_places(self.state.masked_BL[who_A], int(self.state.masked_BL[who_A].sum(-1).max()))

    def _drawn(self, active: list[int], who_A: Tensor, masked_AL: Tensor) -> tuple[Tensor, Tensor | None]:
        """bool `[A, L]` twice: masked tokens that are decided, and decided ones that are taken back, by their own noise."""
        state, key_AL = self.state, self.state.chance_BL[who_A]
        live_AL, back_AL = torch.zeros_like(masked_AL), torch.zeros_like(masked_AL)
        decided_AL = state.there_BL[who_A] & ~state.masked_BL[who_A]
        for inner in sorted({self.inner[b] for b in active}):
            here_A = torch.tensor([self.inner[b] == inner for b in active], device=who_A.device)[:, None]
            if inner >= len(self.chances or self.shares):  # ReMDM's last step
                live_AL |= here_A & masked_AL
                continue
            high_N, low_N = (noise.element_bits(key_AL.reshape(-1), 1, step=inner, tag=tag)[:, 0] for tag in (0, 1))
            bits_AL = (high_N << 32 | low_N).view(key_AL.shape)
            reveal, back = self.chances[inner] if self.chances else (self.shares[inner], 0.0)
            live_AL |= here_A & masked_AL & noise.bernoulli(bits_AL, min(1.0, max(0.0, reveal)))
            if back:
                back_AL |= here_A & decided_AL & noise.bernoulli(bits_AL, self._of_each(back, who_A, decided_AL))
        return live_AL, back_AL if self.chances else None

    def _of_each(self, back: float, who_A: Tensor, decided_AL: Tensor) -> float | Tensor:
        """ReMDM's probability of each token; by confidence, its share of the largest."""
        if self.d.sampler.options["strategy"] != "conf":
            return back
        doubt_AL = torch.where(decided_AL, -self.state.trust_BL[who_A].double(), -torch.inf)
        return doubt_AL.softmax(-1).nan_to_num() * back

    def _move(self, stuck: Sequence[tuple[int, list[int] | None, int]]) -> None:
        """On to the next step of the block where there is one, else to the next block."""
        over = []
        for b, plan, masks in stuck:
            more = self.inner[b] + 1 < len(plan) if plan is not None else False
            steps_left = more and (masks > 0 or self.d.sampler.take_back is not None)
            if steps_left or (masks > 0 and self.d.sampler.most == "schedule"):
                self.inner[b] += 1
            else:
                over.append(b)
        if not over:
            return
        if self.d.eos_id is not None:
            self._end(over)
        self.state.post_B[over], self.state.accepted_B[over] = 0, FIRST_ACCEPTED
        for b in over:
            self.inner[b] = 0
            self.block[b] += 1
            self.done[b] |= self.block[b] > self.last[b]

    def _end(self, members: list[int]) -> None:
        """With `eos_id`, those that hold an EOS so far are done."""
        who_A = torch.tensor(members, device=self.state.everyone.device)
        block_A = torch.tensor([self.block[b] for b in members], device=who_A.device)
        for b, ended in zip(members, self.state.ended(who_A, block_A).tolist(), strict=True):
            self.done[b] |= ended


def _first_places(live_AL: Tensor, count: int) -> Tensor:
    return live_AL.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :count]
