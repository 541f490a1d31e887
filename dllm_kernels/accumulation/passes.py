"""The passes over a model that `accumulate` makes for one block of sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from dllm_kernels.accumulation import ranks
from dllm_kernels.accumulation.micro_batches import Cut, Cuts, Selection, in_step
from dllm_kernels.accumulation.objective import Objective
from dllm_kernels.accumulation.report import Meter
from dllm_kernels.backends.contract import HeadOptions
from dllm_kernels.head import plans
from dllm_kernels.head.scoring import Scores, score
from dllm_kernels.head.unit_vectors import UnitVectors, unit_vectors
from dllm_kernels.head.weight_sum import WeightSum
from dllm_kernels.model.headless import Body
from dllm_kernels.model.wrappers import Wrapper

Vectors = dict[tuple[int, int], UnitVectors]  # by the keys of cuts


def statistics_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


class Passes:
    """A headless model, an objective, and the passes over the cuts of a plan."""

    def __init__(self, body: Body, objective: Objective, denominator: float, head_options: HeadOptions) -> None:
        self.body, self.objective, self.denominator, self.head_options = body, objective, denominator, head_options
        self.meter = Meter(body)
        self.last = False  # whether the next pass with gradients is the last one
        self.dtype = statistics_dtype(body.parameter)
        self.weight_sum = _weight_sum(body)

    # --- one pass, or two -----------------------------------------------------------------------------------

    def once(self, cuts: Cuts, coupling: str) -> tuple[Tensor, Tensor]:
        """(loss, per-sample ELBOs `[B, K]`) where one pass suffices to know the coefficients."""
        elbo_BK = self._elbos(cuts)
        loss = elbo_BK.new_zeros(())
        # on-policy, coefficients of a ratio come from data alone, but its value needs all the samples that it
        # couples
        whole_loss = coupling == "none" and self.objective.coupling in ("sequence", "batch")
        logps: dict[tuple[int, int], Tensor] = {}

        def runs(cut: Cut) -> bool:
            if coupling == "none":
                return self._any_row(cut, lambda: self._data_coefficients(cut) != 0)
            return self._any_row(cut, lambda: self._weighed(cut))

        for cut in self._learning(cuts, runs):
            if len(cut.plan.rows) == 0:
                if not whole_loss:
                    loss = loss + self._contributions(elbo_BK.new_zeros(0), cut).detach()
                continue
            if coupling == "none":
                logp_N, ran_N = self._learn(cut, self._data_coefficients(cut))
                if whole_loss:
                    logps[cut.key] = logp_N
                else:
                    loss = loss + self._contributions(logp_N, cut).detach()
            else:
                cut_loss, logp_N, ran_N = self._learn_late(cut)
                loss = loss + cut_loss
            elbo_BK[cut.sequences, cut.samples] = _elbo(cut, logp_N, ran_N)
        if whole_loss and len(elbo_BK):
            with torch.no_grad():
                loss = self._contributions(_dense(cuts, logps, self.dtype)[cuts.plan.scored], cuts)
        return loss, elbo_BK

    def twice(self, cuts: Cuts) -> tuple[Tensor, Tensor]:
        """The same where coefficients depend on all rows, whose log-probs are kept between two passes."""
        elbo_BK = self._elbos(cuts)
        logps, vectors = {}, self._vectors(cuts)
        for cut in in_step(cuts, self.body, _has_rows):
            if len(cut.plan.rows):
                logps[cut.key] = logp_N = self._score(cut, vectors)
                elbo_BK[cut.sequences, cut.samples] = cut.plan.elbo(logp_N)
        dense_KBS = _dense(cuts, logps, self.dtype)
        loss, gradient_N = elbo_BK.new_zeros(()), elbo_BK.new_zeros(0)
        if len(elbo_BK):
            with torch.enable_grad():
                leaf_N = dense_KBS[cuts.plan.scored].double().requires_grad_(True)
                loss = self._contributions(leaf_N, cuts)
                (gradient_N,) = torch.autograd.grad(loss, leaf_N)
        gradient_KBS = torch.zeros_like(dense_KBS).masked_scatter_(cuts.plan.scored, gradient_N.to(self.dtype))

        def coefficients(cut: Cut) -> Tensor:
            return gradient_KBS[cut.samples, cut.sequences][cut.plan.scored]

        for cut in self._learning(cuts, lambda cut: self._any_row(cut, lambda: coefficients(cut) != 0)):
            if cut.key in logps:
                self._learn(cut, coefficients(cut), vectors)
        return loss.detach(), elbo_BK

    def by_numbers(self, cuts: Cuts, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
        """The same where one number per sequence determines the coefficients, all that ranks exchange."""
        elbo_BK, reduce, vectors = self._elbos(cuts), self.objective.reduce, self._vectors(cuts)
        assert reduce is not None
        numbers_B = torch.zeros(len(elbo_BK), dtype=torch.float64, device=elbo_BK.device)
        for cut in in_step(cuts, self.body, _has_rows):
            if len(cut.plan.rows):
                logp_N = self._score(cut, vectors)
                elbo_BK[cut.sequences, cut.samples] = cut.plan.elbo(logp_N)
                numbers_B[cut.sequences] += reduce(logp_N.double(), cut.plan)
        loss, gradient_B = ranks.couple(self.objective, numbers_B, cuts.plan, cuts.batch, group)
        gradient_B = gradient_B / self.denominator

        def coefficients(cut: Cut) -> Tensor:
            with torch.enable_grad():
                leaf_N = numbers_B.new_zeros(len(cut.plan.rows)).requires_grad_(True)
                weighted = (reduce(leaf_N, cut.plan) * gradient_B[cut.sequences]).sum()
                return torch.autograd.grad(weighted, leaf_N)[0]

        for cut in self._learning(cuts, lambda cut: self._any_row(cut, lambda: coefficients(cut) != 0)):
            if len(cut.plan.rows):
                self._learn(cut, coefficients(cut), vectors)
        return loss / self.denominator, elbo_BK

    # --- ranks in step --------------------------------------------------------------------------------------

    def _learning(self, cuts: Cuts, runs: Callable[[Cut], bool]) -> Iterator[Cut]:
        """The cuts of a pass with gradients; `runs` tells which of them will call the model."""
        yield from in_step(cuts, self.body, runs, backward=True, last=self.last)

    def _any_row(self, cut: Cut, chosen_N: Callable[[], Tensor]) -> bool:
        """Whether any row of a cut has to run; `chosen_N` is True for rows with a coefficient."""
        return _has_rows(cut) and bool(chosen_N().any())

    # --- one cut --------------------------------------------------------------------------------------------

    def _vectors(self, cuts: Cuts) -> Vectors | None:
        """Where the first of two passes keeps the vectors that coefficients multiply in the second, whose head has nothing left
        to do then; None where something of the head trains, or they take more than a stored operand may.
        """
        plan, parameter = cuts.plan, self.body.parameter
        trains = any(p is not None and p.requires_grad for p in self.body.whole.parameters.values())
        size = int(plan.counts.sum()) * parameter.shape[1] * parameter.element_size()
        kept = not trains and plan.block_BS is None and self.head_options.low_rank is None and size <= plans.KEEP_BYTES
        return {} if kept else None

    def _score(self, cut: Cut, vectors: Vectors | None) -> Tensor:
        """Log-probs of a cut's rows without a gradient."""
        with torch.no_grad():
            chosen = cut.select()
            hidden = chosen.hidden(self.body)
            if vectors is not None:
                found = unit_vectors(hidden, self.body.weight, chosen.target_M, chosen.index_M, self.head_options)
                vectors[cut.key] = found
                self.meter.ran(chosen.ids.numel(), len(chosen.index_M), "unit", backward=False)
                return found.logp
            scores = score(hidden, self.body.weight, chosen.target_M, chosen.index_M, self.head_options)
        self.meter.ran(chosen.ids.numel(), len(chosen.index_M), "forward", backward=False)
        assert scores.logp is not None
        return chosen.spread(scores.logp)

    def _learn(self, cut: Cut, coef_N: Tensor, vectors: Vectors | None = None) -> tuple[Tensor, Tensor]:
        """Add the gradient for given coefficients: (log-probs, 0 for skipped rows; which rows ran)."""
        keep_N = coef_N != 0
        if not bool(keep_N.any()):
            return torch.zeros_like(coef_N, dtype=self.dtype), keep_N
        chosen = cut.select(keep_N)
        hidden = chosen.hidden(self.body)
        if vectors is not None:
            known = vectors[cut.key]
            hidden.backward(known.gradient(coef_N, keep_N, chosen.index_M, hidden.shape))
            self.meter.ran(chosen.ids.numel(), 0, "unit", backward=True)
            return known.logp, keep_N
        coef_M = chosen.merged(coef_N[keep_N].to(statistics_dtype(hidden)))
        scores = self._scored(hidden, chosen, coef=coef_M)
        assert scores.weighted_sum is not None
        assert scores.logp is not None
        scores.weighted_sum.backward()
        self.meter.ran(chosen.ids.numel(), len(coef_M), "coef", backward=True)
        return _spread(chosen.spread(scores.logp), keep_N), keep_N

    def _learn_late(self, cut: Cut) -> tuple[Tensor, Tensor, Tensor]:
        """Add the gradient of a cut's own contributions: (its loss, log-probs, which rows ran)."""
        keep_N = self._weighed(cut)
        if not bool(keep_N.any()):
            logp_N = torch.zeros(len(keep_N), dtype=self.dtype, device=keep_N.device)
            return self._contributions(logp_N, cut).detach(), logp_N, keep_N
        chosen = cut.select(keep_N)
        hidden = chosen.hidden(self.body)
        scores = self._scored(hidden, chosen)
        assert scores.logp is not None
        logp_N = _spread(chosen.spread(scores.logp), keep_N)
        loss = self._contributions(logp_N, cut)
        loss.backward()
        self.meter.ran(chosen.ids.numel(), len(chosen.index_M), scores.plan, backward=True)
        return loss.detach(), logp_N.detach(), keep_N

    def _scored(self, hidden: Tensor, chosen: Selection, coef: Tensor | None = None) -> Scores:
        """The rows with a gradient; that of a sharded head's weight is added up where the head is gathered."""
        body = self.body
        rows, taker = (chosen.target_M, chosen.index_M), self.weight_sum or body.take_dweight
        return score(hidden, body.weight, *rows, self.head_options, coef=coef, take_dweight=taker)

    def _weighed(self, cut: Cut) -> Tensor:
        """bool `[N]`: rows of samples with a nonzero weight, all where samples are coupled, as the others depend on them;
        sequences without a weight were left out before.
        """
        rows, scale = cut.plan.rows, self.objective.scale
        if scale is None or scale not in cut.batch.per_sample or self.objective.coupling in ("sequence", "batch"):
            return torch.ones_like(rows.index, dtype=torch.bool)
        weighed_BK = (cut.batch.per_sample[scale] != 0).unsqueeze(-1).flatten(2).any(-1)
        return weighed_BK[rows.sequence, rows.sample]

    def _data_coefficients(self, cut: Cut) -> Tensor:
        """`d loss / d logp` where it does not depend on logp, so it can be taken at 0."""
        with torch.enable_grad():
            zeros = torch.zeros(len(cut.plan.rows), dtype=torch.float64, device=cut.plan.input_ids_BS.device)
            logp_N = zeros.requires_grad_(True)
            return torch.autograd.grad(self._contributions(logp_N, cut), logp_N)[0]

    def _contributions(self, logp_N: Tensor, cut: Cut | Cuts) -> Tensor:
        """In float64, as every sum of an objective over rows: see `MaskPlan.elbo`."""
        return self.objective.contributions(logp_N.double(), cut.plan, cut.batch) / self.denominator

    def _elbos(self, cuts: Cuts) -> Tensor:
        K, B, _ = cuts.plan.shape
        return torch.zeros(B, K, dtype=torch.float64, device=cuts.plan.input_ids_BS.device)


def _weight_sum(body: Body) -> WeightSum | None:
    """Of the head's weight; None where it does not train, or somebody else looks at what autograd delivers."""
    parameter = body.parameter
    plain = type(body.wrapper) is Wrapper and parameter.is_leaf and not parameter._backward_hooks
    return WeightSum(parameter) if plain and parameter.requires_grad else None


def _has_rows(cut: Cut) -> bool:
    return len(cut.plan.rows) > 0


def _spread(logp_N: Tensor, keep_N: Tensor) -> Tensor:
    """Scatter the log-probs of the rows that ran among all rows, 0 elsewhere; differentiable."""
    if len(logp_N) == len(keep_N):
        return logp_N
    return logp_N.new_zeros(len(keep_N)).masked_scatter(keep_N, logp_N)


def _elbo(cut: Cut, logp_N: Tensor, ran_N: Tensor) -> Tensor:
    """Per-sample ELBOs `[B, K]` of a cut; NaN where rows were skipped."""
    return cut.plan.elbo(torch.where(ran_N, logp_N.detach(), torch.nan))


def _dense(cuts: Cuts, logps: dict[tuple[int, int], Tensor], dtype: torch.dtype) -> Tensor:
    """Log-probs of all cuts as `[K, B, S]`, 0 where nothing is scored."""
    dense_KBS = torch.zeros(cuts.plan.shape, dtype=dtype, device=cuts.plan.input_ids_BS.device)
    for cut in cuts:
        if cut.key in logps:
            dense_KBS[cut.samples, cut.sequences].masked_scatter_(cut.plan.scored, logps[cut.key])
    return dense_KBS
