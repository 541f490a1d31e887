"""The state of a rollout, and its step: one call of the model, the head on the rows that may be committed, what is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from dllm_kernels import noise
from dllm_kernels.head.sampling import Samples, sample
from dllm_kernels.head.scoring import score
from dllm_kernels.model.kept import Kept
from dllm_kernels.model.layouts import Cached, Lengths, Packed, Padded, Shadowed
from dllm_kernels.noise import Stream
from dllm_kernels.rollouts.samplers import TRUSTED_LAST, Sampler, committed

OnStep = Callable[[int, Tensor], None]
FIRST_ACCEPTED = 30  # WINO's: as if so many had been decided before the first step of a block


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
    static: bool  # all sequences commit as many tokens a step, known beforehand
    slots: int  # sequences in a call of the model
    steps_of_block: int | None  # steps, of each block where they are shared out

    def number(self, block: int, inner: int) -> int:
        """Of a step's noise, the same however a rollout is run."""
        if self.sampler.blocks is None:
            return inner
        per_block = self.steps_of_block if self.sampler.blocks == "completion" and self.sampler.commit == "schedule" else None
        return block * (per_block or self.block_length) + inner


@dataclass(frozen=True)
class Ask:
    """What a step is to do for the sequences `[A]` that take part."""

    who_A: Tensor
    place_AR: Tensor  # where a token is drawn
    valid_AR: Tensor | None  # None: everywhere
    numbers: Sequence[int]  # of the noise, one for all or one each
    least: int | Tensor  # int64 [A]
    most_A: Tensor | None = None
    all_places_AM: Tensor | None = None  # masked places, for the greedy completion
    left_A: Tensor | None = None  # how many tokens the take-back leaves masked
    back_AL: Tensor | None = None  # decided tokens that are taken back, where that is drawn beforehand
    block_A: Tensor | None = None
    greedy: Sequence[bool] = ()  # who draws the likeliest token, whatever the temperature


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
        self.everyone = torch.arange(B, device=device)
        self.completion_BL = torch.full((B, L), d.mask_id, dtype=torch.int64, device=device)
        self.masked_BL = (place_L < lengths.lengths_B[:, None]).expand(B, L).clone()
        self._last_B1 = (lengths.lengths_B - 1)[:, None]
        self.commit_step_BL = torch.full((B, L), -1, dtype=torch.int32, device=device)
        self.commit_logp_BL = torch.zeros(B, L, dtype=torch.float32, device=device)
        self.commit_entropy_BL = torch.zeros_like(self.commit_logp_BL)
        self.steps_B = torch.zeros(B, dtype=torch.int64, device=device)
        self.failed_B = torch.zeros(B, dtype=torch.bool, device=device)
        self.finished_B = torch.zeros_like(self.failed_B)
        self.there_BL = self.masked_BL.clone()
        self.post_B = torch.zeros_like(self.steps_B)  # steps of the block without a mask; the most where it is settled
        self.old_BL = torch.full_like(self.completion_BL, d.mask_id)  # what the last event of each token replaced
        self.superseded: list[tuple[Tensor, ...]] = []  # earlier events of edited tokens, see `_keep_superseded`
        scheduled = (d.steps or 0) + d.sampler.post_steps * (-(-L // d.block_length) + 1)
        most = min(L, d.steps or L) if d.static else L + scheduled + 1
        self.masked_entropy_BT = torch.full((B, most), torch.nan, dtype=torch.float32, device=device)
        self.kept_age_BT: Tensor | None = None
        if isinstance(canvas, Kept):
            self.kept_age_BT = torch.full((B, most), -1, dtype=torch.int32, device=device)
        self.greedy_BTL = torch.full((B, most, L), d.mask_id, dtype=torch.int32, device=device) if d.greedy else None
        zero = torch.zeros((), dtype=torch.int64, device=device)
        self._key_BL = noise.row_bits(d.seed, Stream.TOKEN, sequence_ids_B[:, None], zero, place_L)
        if d.sampler.stochastic:
            self.chance_BL = noise.row_bits(d.seed, Stream.REMASK, sequence_ids_B[:, None], zero, place_L)
        origin_B1 = prompt_lengths_B[:, None] % d.block_length if d.sampler.blocks == "sequence" else zero
        self.block_BL = ((origin_B1 + place_L) // d.block_length).expand(B, L)
        # ranks are in step under a static schedule without early stop, unless one has no sequences
        self._may_idle = not d.static or d.eos_id is not None or d.uneven
        self.trust_BL = torch.zeros_like(self.commit_logp_BL)  # of decided tokens, where they may be taken back
        self.accepted_B = torch.full_like(self.steps_B, FIRST_ACCEPTED)  # WINO's: tokens of the last step of the block
        self._late = torch.tensor(d.commit_last, device=device)

    def finish(self) -> None:
        """After the last step."""
        taken = self.masked_entropy_BT.shape[1] if self.decoding.static else max(self.steps_B.tolist(), default=0)
        self.masked_entropy_BT = self.masked_entropy_BT[:, :taken]
        if self.kept_age_BT is not None:
            self.kept_age_BT = self.kept_age_BT[:, :taken]
        if self.greedy_BTL is not None:
            self.greedy_BTL = self.greedy_BTL[:, :taken]
        self.completion_BL.masked_fill_(self.failed_B[:, None], self.decoding.mask_id)
        self.commit_step_BL.masked_fill_(self.failed_B[:, None], -1)

    def most(self, count: int) -> int:
        """The maximum over the ranks that share the model."""
        shards = self.canvas.body.shards
        return count if shards is None or not self._may_idle else shards.most(count)

    def idle(self) -> None:
        self.canvas.body.idle(self.canvas.ids.shape[-1], {})

    def _hidden(self, who_A: Tensor) -> tuple[Tensor, bool]:
        """The model's result, and whether it holds the rows of all sequences, not of these alone."""
        d, all_of_them = self.decoding, len(who_A) == len(self.everyone)
        in_step = isinstance(self.canvas, Cached) or (d.deterministic and (d.static or isinstance(self.canvas, Kept)))
        if in_step or (all_of_them and not (d.deterministic and len(who_A) < d.slots)):
            return self.canvas.hidden(None), True
        if d.deterministic and len(who_A) < d.slots:  # calls of one shape, filled up with copies that nobody reads
            who_A = torch.cat([who_A, who_A[:1].expand(d.slots - len(who_A))])
        return self.canvas.hidden(who_A), False

    def step(self, ask: Ask) -> None:
        """Call the model, draw at the (valid) places, commit the most trusted tokens, take back others."""
        sampler, who_A, place_AR, valid_AR = self.decoding.sampler, ask.who_A, ask.place_AR, ask.valid_AR
        if isinstance(self.canvas, Shadowed) and ask.block_A is not None:
            self.canvas.block_B[who_A] = ask.block_A
        hidden, whole = self._hidden(who_A)
        picked_NH = self._pick(hidden, self.canvas.rows(who_A, place_AR, whole=whole), who_A, place_AR, valid_AR)
        drawn = self._sample(picked_NH, ask)
        if ask.all_places_AM is not None:
            self._keep_greedy(hidden, who_A, ask.all_places_AM, whole=whole)
        entropy_AR = _spread(drawn.entropy.float(), place_AR, valid_AR)
        masked_AR = valid_AR if sampler.edits is None else self._still_masked(who_A, place_AR, valid_AR)
        tried_A = place_AR.shape[1] if masked_AR is None else masked_AR.sum(-1)
        candidates_AR = entropy_AR if masked_AR is None else torch.where(masked_AR, entropy_AR, 0.0)
        self.masked_entropy_BT[who_A, self.steps_B[who_A]] = candidates_AR.sum(-1) / tried_A
        if self.kept_age_BT is not None and isinstance(self.canvas, Kept):
            self.kept_age_BT[who_A, self.steps_B[who_A]] = self.canvas.age

        rank_AR = self._rank(drawn, picked_NH, ask)
        edit_AR = self._edits(drawn, who_A, place_AR, valid_AR, masked_AR)
        if edit_AR is not None and masked_AR is not None:
            rank_AR = rank_AR.masked_fill(~masked_AR, torch.finfo(rank_AR.dtype).min)
        order_AR = rank_AR.argsort(dim=1, descending=True, stable=True)
        if valid_AR is None and sampler.commit == "schedule" and isinstance(ask.least, int):  # the same number in every row
            order_AR = order_AR[:, : ask.least]
        sorted_AR, entropy_AR = rank_AR.gather(1, order_AR), entropy_AR.gather(1, order_AR)
        drawn_entropy_AR = -sorted_AR if sampler.rank == "drawn_entropy" else entropy_AR
        count_A = None if masked_AR is None else masked_AR.sum(-1)
        commit_AR = committed(sampler, sorted_AR, drawn_entropy_AR, ask.least, ask.most_A, count_A)
        if masked_AR is not None:
            commit_AR = commit_AR & masked_AR.gather(1, order_AR)
        places_AR = place_AR.gather(1, order_AR)
        index = who_A[:, None], places_AR
        back_AL = self._back(ask, drawn, rank_AR, commit_AR, hidden, whole=whole)
        if back_AL is not None:
            commit_AR = commit_AR & ~back_AL.gather(1, places_AR)
            self._take_back(who_A, back_AL & ~self.masked_BL[who_A])
        if edit_AR is not None:
            edit_AR = edit_AR.gather(1, order_AR)
            commit_AR = commit_AR | edit_AR
            self._keep_superseded(who_A[:, None].expand_as(edit_AR)[edit_AR], places_AR[edit_AR])
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

    def _sample(self, picked_NH: Tensor, ask: Ask) -> Samples:
        """Draws of the rows; those of sequences in different steps are of different noise."""
        d, sampler = self.decoding, self.decoding.sampler
        wanted = "drawn_logp" if sampler.take_back == "chance" and sampler.options["strategy"] == "conf" else sampler.rank
        key_N = _among(self._key_BL[ask.who_A].gather(1, ask.place_AR), ask.valid_AR)
        of_row_AR = torch.arange(len(ask.who_A), device=key_N.device)[:, None].expand(ask.place_AR.shape)
        of_row_N = _among(of_row_AR, ask.valid_AR)
        temperature_A = torch.tensor(ask.greedy, device=key_N.device).logical_not() * d.temperature if any(ask.greedy) else None

        def draw(rows_NH: Tensor, key_N: Tensor, number: int, of_row_N: Tensor) -> Samples:
            return sample(
                rows_NH,
                self.canvas.body.weight,
                key_N,
                None,
                self._head,
                step=number,
                temperature=d.temperature if temperature_A is None else temperature_A[of_row_N],
                top_k=d.top_k,
                top_p=d.top_p,
                top_p_first=sampler.top_p_first,
                want=(wanted,) if wanted in ("drawn_logp", "drawn_entropy", "margin") else (),
            )

        numbers = ask.numbers if d.temperature else ask.numbers[:1]
        if len(set(numbers)) == 1:
            return draw(picked_NH, key_N, numbers[0], of_row_N)
        number_N = torch.tensor(numbers, device=key_N.device)[of_row_N]
        found: dict[str, Tensor] = {}
        for number in sorted(set(numbers)):
            here_N = number_N == number
            part = draw(picked_NH[here_N], key_N[here_N], number, of_row_N[here_N])
            for f in fields(part):
                if (value := getattr(part, f.name)) is not None:
                    found.setdefault(f.name, value.new_zeros(len(key_N)))[here_N] = value
        return Samples(**found)

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
        self.post_B[who_A] = torch.where(settled_A, most, self.post_B[who_A] + done_A)
        return edit_AR

    def _back(
        self, ask: Ask, drawn: Samples, rank_AR: Tensor, commit_AR: Tensor, hidden: Tensor, *, whole: bool
    ) -> Tensor | None:
        """bool `[A, L]`: what is masked again, or not written after all; None where the sampler takes nothing back."""
        sampler, who_A = self.decoding.sampler, ask.who_A
        if sampler.take_back is None:
            return None
        if sampler.take_back == "chance":
            if drawn.drawn_logp is not None and ask.valid_AR is not None:
                index = who_A[:, None], ask.place_AR
                new_AR = _spread(drawn.drawn_logp.float().exp(), ask.place_AR, ask.valid_AR)
                self.trust_BL[index] = torch.where(ask.valid_AR, new_AR, self.trust_BL[index])
            return ask.back_AL
        if sampler.take_back == "trust":
            assert ask.valid_AR is not None
            assert ask.left_A is not None
            valid_AL = torch.zeros_like(self.masked_BL[who_A]).scatter(1, ask.place_AR, ask.valid_AR)
            new_AR = torch.where(ask.valid_AR, rank_AR.float(), self.trust_BL[who_A].gather(1, ask.place_AR))
            self.trust_BL[who_A[:, None], ask.place_AR] = new_AR
            eligible_AL = valid_AL | (self.there_BL & ~self.masked_BL)[who_A]
            return lowest(self.trust_BL[who_A], eligible_AL, ask.left_A)
        assert isinstance(self.canvas, Shadowed)
        assert ask.block_A is not None
        L, size = self.completion_BL.shape[1], self.decoding.block_length
        place_AQ = ask.block_A[:, None] * size + torch.arange(size, device=who_A.device)
        inside_AQ, place_AQ = place_AQ < L, place_AQ.clamp(max=L - 1)
        decided_AQ = inside_AQ & (self.there_BL & ~self.masked_BL)[who_A].gather(1, place_AQ)
        rows_AQ = self.canvas.shadow_rows(who_A, whole=whole)
        seen_NH = self._pick(hidden, rows_AQ, who_A, place_AQ, decided_AQ)
        target_N = self.completion_BL[who_A].gather(1, place_AQ)[decided_AQ]
        logp_N = score(seen_NH, self.canvas.body.weight, target_N, None, self._head).logp
        assert logp_N is not None
        trust_AQ = _spread(logp_N.float().exp(), place_AQ, decided_AQ)
        accepted_A = commit_AR.sum(-1)
        doubted_AQ = decided_AQ & (trust_AQ < sampler.options["threshold_back"]) & (accepted_A > 1)[:, None]
        allowed_A = torch.minimum(doubted_AQ.sum(-1), self.accepted_B[who_A] - 1)
        self.accepted_B[who_A] = accepted_A
        back_AQ = lowest(trust_AQ, doubted_AQ, allowed_A)
        into_AL = torch.zeros_like(self.masked_BL[who_A]).long()
        return into_AL.scatter_add(1, place_AQ, back_AQ.long()) > 0

    def _take_back(self, who_A: Tensor, back_AL: Tensor) -> None:
        """Decided tokens become masks again: an event without a log-prob."""
        who_E, place_E = back_AL.nonzero(as_tuple=True)
        at = who_A[who_E], place_E
        self._keep_superseded(*at)
        none_E, mask_E = torch.zeros_like(self.commit_logp_BL[at]), torch.full_like(place_E, self.decoding.mask_id)
        self.superseded.append((at[0], self.steps_B[at[0]], place_E, self.old_BL[at], mask_E, none_E, none_E))
        self.masked_BL[at], self.commit_step_BL[at] = True, -1
        self.completion_BL[at] = self.old_BL[at] = mask_E
        self.commit_logp_BL[at] = self.commit_entropy_BL[at] = none_E
        self.canvas.write(*at, mask_E)

    def _keep_superseded(self, who_E: Tensor, place_E: Tensor) -> None:
        """Set aside the last events of tokens that are about to be edited."""
        at = who_E, place_E
        new_E = self.completion_BL[at]
        logp_E, entropy_E = self.commit_logp_BL[at], self.commit_entropy_BL[at]
        self.superseded.append((who_E, self.commit_step_BL[at].long(), place_E, self.old_BL[at], new_E, logp_E, entropy_E))
        self.old_BL[at] = new_E

    def _pick(self, hidden: Tensor, row_AR: Tensor, who_A: Tensor, place_AR: Tensor, valid_AR: Tensor | None) -> Tensor:
        """Hidden states of the (valid) rows; those that are not finite become 0 and mark their sequence failed."""
        picked_NH = self.canvas.pick(hidden, _among(row_AR, valid_AR))
        finite_N = picked_NH.isfinite().all(-1)
        self.failed_B[who_A] |= (~_spread(finite_N, place_AR, valid_AR, fill=True)).any(-1)
        return torch.where(finite_N[:, None], picked_NH, 0.0)

    def _rank(self, drawn: Samples, picked_NH: Tensor, ask: Ask) -> Tensor:
        """The rank `[A, R]` by which tokens are committed, largest first; invalid places come last."""
        d, sampler, place_AR, valid_AR = self.decoding, self.decoding.sampler, ask.place_AR, ask.valid_AR
        if sampler.rank == "random":
            rank_AR = self.chance_BL[ask.who_A].gather(1, place_AR)
            return rank_AR if valid_AR is None else rank_AR.masked_fill(~valid_AR, torch.iinfo(torch.int64).min)
        if sampler.rank == "position":
            rank_AR = -place_AR.float()
        else:
            value_N = getattr(drawn, sampler.rank)
            if d.commit_last and sampler.options.get("renormalise"):
                value_N = self._renormalised(drawn, picked_NH)
            value_N = -value_N if sampler.rank == "drawn_entropy" else value_N
            rank_AR = _spread(value_N, place_AR, valid_AR)
        if alg_temp := sampler.options.get("alg_temp"):
            confidence_AR = rank_AR.exp() if sampler.rank == "drawn_logp" else rank_AR
            key_AR, gumbel_AR = self.chance_BL[ask.who_A].gather(1, place_AR), torch.zeros_like(rank_AR, dtype=torch.float64)
            numbers_A = torch.tensor(ask.numbers, device=key_AR.device).expand(len(key_AR))
            for number in sorted(set(ask.numbers)):
                here_A = numbers_A == number
                drawn_N = noise.gumbel(key_AR[here_A].reshape(-1), 1, step=number)
                gumbel_AR[here_A] = drawn_N.view(-1, key_AR.shape[1]).double()
            rank_AR = confidence_AR.double() / alg_temp + gumbel_AR
        lowest_rank = torch.finfo(rank_AR.dtype).min
        if d.commit_last:
            late_AR = _spread(torch.isin(drawn.token, self._late), place_AR, valid_AR)
            rank_AR = rank_AR.masked_fill(late_AR, TRUSTED_LAST)
        return rank_AR if valid_AR is None else rank_AR.masked_fill(~valid_AR, lowest_rank)

    def _renormalised(self, drawn: Samples, picked_NH: Tensor) -> Tensor:
        """LLaDA's `confidence_eos_eot_inf`: the probability of each token among the ids that are not committed last."""
        late_N = torch.isin(drawn.token, self._late)
        left = replace(self._head, suppress=(*self._head.suppress, *self.decoding.commit_last))
        some_id = next(token for token in range(len(left.suppress) + 1) if token not in left.suppress)
        target_N = torch.where(late_N, some_id, drawn.token)
        logp_N = score(picked_NH, self.canvas.body.weight, target_N, None, left).logp
        assert logp_N is not None
        return torch.where(late_N, 0.0, logp_N.exp())

    def _keep_greedy(self, hidden: Tensor, who_A: Tensor, place_AM: Tensor, *, whole: bool) -> None:
        """EGSPO-SA's one-step completion: the likeliest token at every masked place, from the same pass."""
        assert self.greedy_BTL is not None
        masked_AM = None if self.decoding.static else self.masked_BL[who_A].gather(1, place_AM)
        picked_NH = self._pick(hidden, self.canvas.rows(who_A, place_AM, whole=whole), who_A, place_AM, masked_AM)
        key_N = torch.zeros(len(picked_NH), dtype=torch.int64, device=picked_NH.device)
        best = sample(picked_NH, self.canvas.body.weight, key_N, None, self._head, temperature=0.0)
        ids_AL = self.completion_BL[who_A]
        best_AM = _spread(best.token, place_AM, masked_AM)
        if masked_AM is not None:
            best_AM = torch.where(masked_AM, best_AM, ids_AL.gather(1, place_AM))
        self.greedy_BTL[who_A, self.steps_B[who_A]] = ids_AL.scatter(1, place_AM, best_AM).int()

    def ended(self, who_A: Tensor, block_A: Tensor | int) -> Tensor:
        """bool `[A]`: sequences with an EOS so far, which are finished and filled with it. Needs `eos_id`.

        That is in the blocks up to these; without blocks, an EOS before which nothing is undecided.
        """
        d = self.decoding
        assert d.eos_id is not None
        end_AL = (self.completion_BL[who_A] == d.eos_id) & ~self.masked_BL[who_A]
        if d.sampler.blocks is None:
            end_AL = end_AL & (self.masked_BL[who_A].cumsum(-1) == 0)
        else:
            end_AL = end_AL & (self.block_BL[who_A] <= (block_A[:, None] if isinstance(block_A, Tensor) else block_A))
        ended_A = end_AL.any(-1)
        rest_AL = ended_A[:, None] & self.masked_BL[who_A]
        self.completion_BL[who_A] = self.completion_BL[who_A].masked_fill(rest_AL, d.eos_id)
        self.masked_BL[who_A] = self.masked_BL[who_A] & ~rest_AL
        self.finished_B[who_A] = self.finished_B[who_A] | ended_A
        return ended_A


def lowest(value_AL: Tensor, among_AL: Tensor, count_A: Tensor) -> Tensor:
    """bool `[A, L]`: so many of the smallest values; of equal ones the first."""
    order_AL = torch.where(among_AL, value_AL, torch.inf).argsort(dim=-1, stable=True)
    rank_AL = torch.empty_like(order_AL).scatter_(
        1, order_AL, torch.arange(order_AL.shape[1], device=order_AL.device).expand_as(order_AL)
    )
    return among_AL & (rank_AL < count_A[:, None])


def _among(values_AR: Tensor, valid_AR: Tensor | None) -> Tensor:
    return values_AR.reshape(-1) if valid_AR is None else values_AR[valid_AR]


def _spread(values_N: Tensor, like_AR: Tensor, valid_AR: Tensor | None, *, fill: bool = False) -> Tensor:
    """Values of the valid places as `[A, R]`, 0 (or `fill`) elsewhere."""
    if valid_AR is None:
        return values_N.view(like_AR.shape)
    spread_AR = torch.full(like_AR.shape, fill, dtype=values_N.dtype, device=values_N.device)
    return spread_AR.masked_scatter(valid_AR, values_N)
