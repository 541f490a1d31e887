"""The loop of a rollout: per step one call of the model, and the head on the rows that may be committed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dllm_kernels import noise
from dllm_kernels.head.sampling import Samples, sample
from dllm_kernels.model.kept import Kept
from dllm_kernels.model.layouts import Cached, Lengths, Packed, Padded
from dllm_kernels.noise import Stream
from dllm_kernels.rollouts.samplers import TRUSTED_LAST, Sampler, commits_per_step, committed, schedule, transfer_shares

OnStep = Callable[[int, Tensor], None]


@dataclass(frozen=True)
class Decoding:
    """The settings of a rollout, checked by `generate`."""

    sampler: Sampler
    length: int
    steps: int | None
    block_length: int
    mask_id: int
    seed: int
    temperature: float
    top_k: int | None
    top_p: float | None
    suppress: tuple[int, ...]
    commit_last: tuple[int, ...]
    eos_id: int | None
    deterministic: bool
    greedy: bool
    uneven: bool  # ranks that share the model have different numbers of micro-batches


class Denoiser:
    """The state of a micro-batch; after `run`, its tensors are the rollout's."""

    def __init__(
        self,
        canvas: Padded | Packed | Cached,
        sequence_ids_B: Tensor,
        prompt_lengths_B: Tensor,
        lengths: Lengths,
        decoding: Decoding,
    ) -> None:
        self.canvas, self.decoding = canvas, decoding
        body, d = canvas.body, decoding
        self._head = replace(body.options, suppress=d.suppress)
        B, L, device = len(sequence_ids_B), lengths.widest, sequence_ids_B.device
        place_L = torch.arange(L, device=device)
        self._everyone = torch.arange(B, device=device)
        self.completion_BL = torch.full((B, L), d.mask_id, dtype=torch.int64, device=device)
        self.masked_BL = (place_L < lengths.lengths_B[:, None]).expand(B, L).clone()
        self._last_B1 = (lengths.lengths_B - 1)[:, None]
        self.commit_step_BL = torch.full((B, L), -1, dtype=torch.int32, device=device)
        self.commit_logp_BL = torch.zeros(B, L, dtype=torch.float32, device=device)
        self.commit_entropy_BL = torch.zeros_like(self.commit_logp_BL)
        self.steps_B = torch.zeros(B, dtype=torch.int64, device=device)
        self.failed_B = torch.zeros(B, dtype=torch.bool, device=device)
        self._finished_B = torch.zeros_like(self.failed_B)
        self._schedule = schedule(d.sampler, L, d.steps, d.block_length) if d.sampler.static and d.steps is not None else []
        self._there_BL = self.masked_BL.clone()
        self._post_B = torch.zeros_like(self.steps_B)  # steps of the block without a mask; the most where it is settled
        self.old_BL = torch.full_like(self.completion_BL, d.mask_id)  # what the last event of each token replaced
        self.superseded: list[tuple[Tensor, ...]] = []  # earlier events of edited tokens, see `_keep_superseded`
        most = len(self._schedule) if d.sampler.static else L + d.sampler.post_steps * (-(-L // d.block_length) + 1)
        self.masked_entropy_BT = torch.full((B, most), torch.nan, dtype=torch.float32, device=device)
        self.kept_age_BT: Tensor | None = None
        if isinstance(canvas, Kept):
            self.kept_age_BT = torch.full((B, most), -1, dtype=torch.int32, device=device)
        self.greedy_BTL = torch.full((B, most, L), d.mask_id, dtype=torch.int32, device=device) if d.greedy else None
        zero = torch.zeros((), dtype=torch.int64, device=device)
        self._key_BL = noise.row_bits(d.seed, Stream.TOKEN, sequence_ids_B[:, None], zero, place_L)
        if d.sampler.stochastic:
            self._chance_BL = noise.row_bits(d.seed, Stream.REMASK, sequence_ids_B[:, None], zero, place_L)
        origin_B1 = prompt_lengths_B[:, None] % d.block_length if d.sampler.blocks == "sequence" else zero
        self._block_BL = ((origin_B1 + place_L) // d.block_length).expand(B, L)
        # ranks are in step under a static schedule without early stop, unless one has no sequences
        self._may_idle = not d.sampler.static or d.eos_id is not None or d.uneven
        self._late = torch.tensor(d.commit_last, device=device)

    def run(self, on_step: OnStep | None = None) -> None:
        """Run all steps; ranks that share the model make the same calls, some of them idle."""
        if self.decoding.sampler.static:
            self._run_static(on_step)
        else:
            self._run_dynamic(on_step)
        taken = self.masked_entropy_BT.shape[1] if self.decoding.sampler.static else max(self.steps_B.tolist(), default=0)
        self.masked_entropy_BT = self.masked_entropy_BT[:, :taken]
        if self.kept_age_BT is not None:
            self.kept_age_BT = self.kept_age_BT[:, :taken]
        if self.greedy_BTL is not None:
            self.greedy_BTL = self.greedy_BTL[:, :taken]
        self.completion_BL.masked_fill_(self.failed_B[:, None], self.decoding.mask_id)
        self.commit_step_BL.masked_fill_(self.failed_B[:, None], -1)

    def _run_static(self, on_step: OnStep | None) -> None:
        """All sequences have the same number of masked tokens left, so finding them needs no host sync."""
        block, left, who_A = 0, self.decoding.length, self._everyone
        self.canvas.enter(block)
        for step in self._schedule:
            if step.block != block:
                who_A, block = self._after_block(block), step.block
                self.canvas.enter(block)
            if len(who_A) == 0:
                if self._most(0) == 0:
                    return
                self._idle()
                continue
            self._most(len(who_A))
            place_AR = self._first_places(self.masked_BL[who_A] & (self._block_BL[who_A] == block), step.remaining)
            all_places_AM = self._first_places(self.masked_BL[who_A], left) if self.decoding.greedy else None
            self._step(who_A, place_AR, None, step.number, step.commit, all_places_AM)
            left -= step.commit
            if on_step is not None:
                on_step(step.number, self.completion_BL[:, : self.decoding.length])
        self._after_block(block)

    def _run_dynamic(self, on_step: OnStep | None) -> None:
        """The masked tokens left are known only after a step: one small host read before each step."""
        d = self.decoding
        by_chance = d.sampler.commit == "chance"
        assert d.steps is not None or d.sampler.least == "one"
        shares = transfer_shares(d.steps, d.sampler.options["eps"]).tolist() if by_chance and d.steps else []
        per_step = commits_per_step(d.block_length, d.steps) if d.steps and not by_chance else []
        # the most tokens of a prompt that the first block may hold
        first = d.block_length - 1 if d.sampler.blocks == "sequence" else 0
        for block in range(-(-(first + self.masked_BL.shape[1]) // d.block_length)):
            self.canvas.enter(block)
            self._post_B.zero_()
            for inner in range(len(shares) or d.block_length + d.sampler.post_steps):
                live_BL = (self._block_BL == block) & ~self._finished_B[:, None]
                live_BL &= self.masked_BL if d.sampler.edits is None else self._unsettled_BL(block)
                number = block * d.block_length + inner
                if by_chance:
                    live_BL &= self._chosen(number, shares[inner])
                counts = live_BL.sum(-1).tolist()
                if max(counts, default=0) > 0:
                    self._most(1)
                    who_A = torch.tensor([b for b, count in enumerate(counts) if count], device=live_BL.device)
                    place_AR = self._first_places(live_BL[who_A], max(counts))
                    valid_AR = live_BL[who_A].gather(1, place_AR)
                    least = self.masked_BL.shape[1] if by_chance else per_step[inner] if per_step else 1
                    self._step(who_A, place_AR, valid_AR, number, least, self._every_place(who_A))
                    if on_step is not None:
                        on_step(number, self.completion_BL[:, : d.length])
                elif self._most(0) > 0:
                    self._idle()
                elif not by_chance:
                    break
            self._after_block(block)

    def _unsettled_BL(self, block: int) -> Tensor:
        """The places that may be written or edited: all of a block, until a step without a mask has edited nothing."""
        return self._there_BL & (self._post_B < self.decoding.sampler.post_steps)[:, None]

    def _most(self, count: int) -> int:
        """The maximum over the ranks that share the model."""
        shards = self.canvas.body.shards
        return count if shards is None or not self._may_idle else shards.most(count)

    def _idle(self) -> None:
        self.canvas.body.idle(self.canvas.ids.shape[-1], {})

    def _first_places(self, live_AL: Tensor, count: int) -> Tensor:
        return live_AL.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :count]

    def _every_place(self, who_A: Tensor) -> Tensor | None:
        if not self.decoding.greedy:
            return None
        return self._first_places(self.masked_BL[who_A], int(self.masked_BL[who_A].sum(-1).max()))

    def _chosen(self, step: int, share: float) -> Tensor:
        """bool `[B, L]`: each token with probability `share`, by its own noise for this step."""
        high_N = noise.element_bits(self._chance_BL.reshape(-1), 1, step=step, tag=0)[:, 0]
        low_N = noise.element_bits(self._chance_BL.reshape(-1), 1, step=step, tag=1)[:, 0]
        return noise.bernoulli(high_N << 32 | low_N, share).view(self._chance_BL.shape)

    def _step(
        self,
        who_A: Tensor,
        place_AR: Tensor,
        valid_AR: Tensor | None,
        number: int,
        least: int,
        all_places_AM: Tensor | None,
    ) -> None:
        """Call the model on these sequences, draw at their (valid) places, commit the most trusted tokens."""
        d, sampler = self.decoding, self.decoding.sampler
        whole = d.deterministic or len(who_A) == len(self._everyone) or isinstance(self.canvas, Cached)
        hidden = self.canvas.hidden(None if whole else who_A)
        picked_NH = self._pick(hidden, who_A, place_AR, valid_AR, whole=whole)
        drawn = sample(
            picked_NH,
            self.canvas.body.weight,
            _among(self._key_BL[who_A].gather(1, place_AR), valid_AR),
            None,
            self._head,
            step=number,
            temperature=d.temperature,
            top_k=d.top_k,
            top_p=d.top_p,
            top_p_first=sampler.top_p_first,
            want=(sampler.rank,) if sampler.rank in ("drawn_logp", "drawn_entropy", "margin") else (),
        )
        if all_places_AM is not None:
            self._keep_greedy(hidden, who_A, all_places_AM, whole=whole)
        entropy_AR = _spread(drawn.entropy.float(), place_AR, valid_AR)
        masked_AR = valid_AR if sampler.edits is None else self._still_masked(who_A, place_AR, valid_AR)
        tried_A = place_AR.shape[1] if masked_AR is None else masked_AR.sum(-1)
        candidates_AR = entropy_AR if masked_AR is None else torch.where(masked_AR, entropy_AR, 0.0)
        self.masked_entropy_BT[who_A, self.steps_B[who_A]] = candidates_AR.sum(-1) / tried_A
        if self.kept_age_BT is not None and isinstance(self.canvas, Kept):
            self.kept_age_BT[who_A, self.steps_B[who_A]] = self.canvas.age

        rank_AR = self._rank(drawn, who_A, place_AR, valid_AR, number)
        edit_AR = self._edits(drawn, who_A, place_AR, valid_AR, masked_AR)
        if edit_AR is not None and masked_AR is not None:
            rank_AR = rank_AR.masked_fill(~masked_AR, torch.finfo(rank_AR.dtype).min)
        order_AR = rank_AR.argsort(dim=1, descending=True, stable=True)
        if valid_AR is None and sampler.commit == "schedule":  # the same number in every row
            order_AR = order_AR[:, :least]
        sorted_AR, entropy_AR = rank_AR.gather(1, order_AR), entropy_AR.gather(1, order_AR)
        drawn_entropy_AR = -sorted_AR if sampler.rank == "drawn_entropy" else entropy_AR
        commit_AR = committed(sampler, sorted_AR, drawn_entropy_AR, least)
        if masked_AR is not None:
            commit_AR = commit_AR & masked_AR.gather(1, order_AR)
        index = who_A[:, None], place_AR.gather(1, order_AR)
        if edit_AR is not None:
            edit_AR = edit_AR.gather(1, order_AR)
            commit_AR = commit_AR | edit_AR
            self._keep_superseded(index, edit_AR)
        for into_BL, value_AR in (
            (self.completion_BL, _spread(drawn.token, place_AR, valid_AR).gather(1, order_AR)),
            (self.masked_BL, torch.zeros_like(commit_AR)),
            (self.commit_step_BL, self.steps_B[who_A][:, None].expand_as(order_AR).int()),
            (self.commit_logp_BL, _spread(drawn.logp.float(), place_AR, valid_AR).gather(1, order_AR)),
            (self.commit_entropy_BL, entropy_AR),
        ):
            into_BL[index] = torch.where(commit_AR, value_AR, into_BL[index])
        # a place that a shorter sequence lacks has no column of its own: its last one is written twice, with the same token
        there = index[0], torch.minimum(index[1], self._last_B1[who_A])
        self.canvas.write(*there, self.completion_BL[there])
        self.steps_B[who_A] += 1

    def _still_masked(self, who_A: Tensor, place_AR: Tensor, valid_AR: Tensor | None) -> Tensor:
        masked_AR = self.masked_BL[who_A].gather(1, place_AR)
        return masked_AR if valid_AR is None else masked_AR & valid_AR

    def _edits(
        self, drawn: Samples, who_A: Tensor, place_AR: Tensor, valid_AR: Tensor | None, masked_AR: Tensor | None
    ) -> Tensor | None:
        """bool `[A, R]`: decided tokens whose likelier successor replaces them; None where the sampler edits nothing."""
        bound = self.decoding.sampler.edits
        if bound is None or valid_AR is None or masked_AR is None:
            return None
        assert drawn.drawn_logp is not None
        sure_AR = _spread(drawn.drawn_logp.exp() > bound, place_AR, valid_AR)
        other_AR = _spread(drawn.token, place_AR, valid_AR) != self.completion_BL[who_A].gather(1, place_AR)
        edit_AR = sure_AR & other_AR & valid_AR & ~masked_AR
        done_A, most = ~masked_AR.any(-1), self.decoding.sampler.post_steps
        settled_A = done_A & ~edit_AR.any(-1)
        self._post_B[who_A] = torch.where(settled_A, most, self._post_B[who_A] + done_A)
        return edit_AR

    def _keep_superseded(self, index: tuple[Tensor, Tensor], edit_AR: Tensor) -> None:
        """Set aside the last events of tokens that are about to be edited."""
        who_E, place_E = index[0].expand_as(edit_AR)[edit_AR], index[1][edit_AR]
        at = who_E, place_E
        new_E = self.completion_BL[at]
        logp_E, entropy_E = self.commit_logp_BL[at], self.commit_entropy_BL[at]
        self.superseded.append((who_E, self.commit_step_BL[at].long(), place_E, self.old_BL[at], new_E, logp_E, entropy_E))
        self.old_BL[at] = new_E

    def _pick(self, hidden: Tensor, who_A: Tensor, place_AR: Tensor, valid_AR: Tensor | None, *, whole: bool) -> Tensor:
        """Hidden states of the rows to draw at; rows that are not finite become 0 and mark their sequence
        failed.
        """
        picked_NH = self.canvas.pick(hidden, _among(self.canvas.rows(who_A, place_AR, whole=whole), valid_AR))
        finite_N = picked_NH.isfinite().all(-1)
        self.failed_B[who_A] |= (~_spread(finite_N, place_AR, valid_AR, fill=True)).any(-1)
        return torch.where(finite_N[:, None], picked_NH, 0.0)

    def _rank(self, drawn: Samples, who_A: Tensor, place_AR: Tensor, valid_AR: Tensor | None, number: int) -> Tensor:
        """The rank `[A, R]` by which tokens are committed, largest first; invalid places come last."""
        d, sampler = self.decoding, self.decoding.sampler
        if sampler.rank == "random":
            rank_AR = self._chance_BL[who_A].gather(1, place_AR)
            return rank_AR if valid_AR is None else rank_AR.masked_fill(~valid_AR, torch.iinfo(torch.int64).min)
        if sampler.rank == "position":
            rank_AR = -place_AR.float()
        else:
            value_N = getattr(drawn, sampler.rank)
            value_N = -value_N if sampler.rank == "drawn_entropy" else value_N
            rank_AR = _spread(value_N, place_AR, valid_AR)
        if alg_temp := sampler.options.get("alg_temp"):
            confidence_AR = rank_AR.exp() if sampler.rank == "drawn_logp" else rank_AR
            gumbel_AR = noise.gumbel(self._chance_BL[who_A].gather(1, place_AR).reshape(-1), 1, step=number).view_as(rank_AR)
            rank_AR = confidence_AR.double() / alg_temp + gumbel_AR
        lowest = torch.finfo(rank_AR.dtype).min
        if d.commit_last:
            late_AR = _spread(torch.isin(drawn.token, self._late), place_AR, valid_AR)
            rank_AR = rank_AR.masked_fill(late_AR, TRUSTED_LAST)
        return rank_AR if valid_AR is None else rank_AR.masked_fill(~valid_AR, lowest)

    def _keep_greedy(self, hidden: Tensor, who_A: Tensor, place_AM: Tensor, *, whole: bool) -> None:
        """EGSPO-SA's one-step completion: the likeliest token at every masked place, from the same pass."""
        assert self.greedy_BTL is not None
        masked_AM = None if self.decoding.sampler.static else self.masked_BL[who_A].gather(1, place_AM)
        picked_NH = self._pick(hidden, who_A, place_AM, masked_AM, whole=whole)
        key_N = torch.zeros(len(picked_NH), dtype=torch.int64, device=picked_NH.device)
        best = sample(picked_NH, self.canvas.body.weight, key_N, None, self._head, temperature=0.0)
        ids_AL = self.completion_BL[who_A]
        best_AM = _spread(best.token, place_AM, masked_AM)
        if masked_AM is not None:
            best_AM = torch.where(masked_AM, best_AM, ids_AL.gather(1, place_AM))
        self.greedy_BTL[who_A, self.steps_B[who_A]] = ids_AL.scatter(1, place_AM, best_AM).int()

    def _after_block(self, block: int) -> Tensor:
        """The unfinished sequences. With `eos_id`, finish and fill those with an EOS so far: a host sync."""
        eos = self.decoding.eos_id
        if eos is None:
            return self._everyone
        ended_B = ((self.completion_BL == eos) & ~self.masked_BL & (self._block_BL <= block)).any(-1)
        rest_BL = ended_B[:, None] & self.masked_BL
        self.completion_BL.masked_fill_(rest_BL, eos)
        self.masked_BL &= ~rest_BL
        self._finished_B |= ended_B
        return (~self._finished_B).nonzero()[:, 0]


def _among(values_AR: Tensor, valid_AR: Tensor | None) -> Tensor:
    return values_AR.reshape(-1) if valid_AR is None else values_AR[valid_AR]


def _spread(values_N: Tensor, like_AR: Tensor, valid_AR: Tensor | None, *, fill: bool = False) -> Tensor:
    """Values of the valid places as `[A, R]`, 0 (or `fill`) elsewhere."""
    if valid_AR is None:
        return values_N.view(like_AR.shape)
    spread_AR = torch.full(like_AR.shape, fill, dtype=values_N.dtype, device=values_N.device)
    return spread_AR.masked_scatter(valid_AR, values_N)
