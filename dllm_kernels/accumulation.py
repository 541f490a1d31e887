"""Exact gradients of any objective, one Monte-Carlo sample at a time: memory does not grow with their number.

What an objective's coefficients `d loss / d logp_row` depend on decides the passes over the model:

    none                    data only: one pass, coefficients known before the head runs
    token, sample           rows of one sample of one sequence: one pass, coefficients arrive in backward
    sequence                its K samples: one pass if a cut holds them all, else two, a block of sequences at a time
    batch                   everything, on all ranks: two passes

Two passes score all rows without a gradient, take the coefficients by autograd on these small vectors, then go through the
model again sample by sample. They need a deterministic forward, so active dropout is refused. What is known to have no
gradient never reaches the model: see `keep_zeros`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dllm_kernels import ranks
from dllm_kernels.cuts import Cut, Cuts, make_cuts
from dllm_kernels.engine_report import Meter, Report
from dllm_kernels.heads import Body, dropout_names, headless
from dllm_kernels.masks import MaskPlan
from dllm_kernels.objective import Batch, Objective
from dllm_kernels.scoring import score_tokens

__all__ = ["Report", "accumulate", "adapters_off", "score_samples"]


def accumulate(
    model: nn.Module,
    plan: MaskPlan,
    objective: Objective,
    batch: Batch,
    *,
    denominator: float | None = None,
    samples_per_pass: int = 1,
    sequences_per_pass: int | None = None,
    head_plan: str | None = None,
    suppress: tuple[int, ...] = (),
    model_kwargs: dict[str, Tensor] | None = None,
    keep_zeros: bool = False,
    group: dist.ProcessGroup | None = None,
    count_flops: bool = False,
    measure_memory: bool = False,
) -> Report:
    """Add the objective's exact gradient to the `.grad` of the model's parameters.

    Args:
        model: a Hugging Face masked language model, or one under `headless` already.
        plan: the masks, shared by every policy. batch: advantages, old scores and so on, see `Batch`.
        objective: what to minimise, for example `objectives.BGPO`.
        denominator: what the sum of contributions is divided by; give the count of the whole optimizer step and all ranks
            when this call sees only a part. Default: what the plan and the batch hold of the objective's "sequences",
            "tokens" (those that may be scored), "groups" (different "group_ids", which must be given), "pairs" or "steps"
            (states with a token), at least 1; of all ranks where `group` is given.
        samples_per_pass, sequences_per_pass: the cut that one forward and backward holds; memory grows with it, the result
            does not depend on it.
        head_plan: forces the head's plan for late coefficients ("unit", "keep", "recompute").
        suppress: ids with probability 0, such as the mask id.
        model_kwargs: `[B, S]` tensors for every model call, such as `attention_mask`; cut along B.
        keep_zeros: run what is known to have no gradient too (for benchmarks). Else sequences whose `scale` is 0, samples
            without a scored token, and rows whose coefficient is 0 are dropped before the model or its head runs; loss and
            gradient are the same, their ELBOs are NaN. A cut without a scored token is always skipped.
        group: ranks whose batches make up the optimizer step. Objectives of `batch` coupling then share their scores with
            them; each rank adds the gradient of its own sequences, and its loss is an equal share of the total.
        count_flops, measure_memory: fill `counted_flops` (slower) and `peak_memory` of the report.

    Raises ValueError naming the argument: a batch that does not fit the plan, a missing denominator, dropout where two
    passes must agree, a sequence that two ranks hold.

    Example:
        >>> from dllm_kernels import make_mask_plan
        >>> from dllm_kernels.objectives import BGPO
        >>> from transformers import EuroBertConfig, EuroBertForMaskedLM
        >>> model = EuroBertForMaskedLM(EuroBertConfig(vocab_size=11, hidden_size=8, intermediate_size=16,
        ...     num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, pad_token_id=0))
        >>> ids = torch.randint(10, (2, 6))
        >>> plan = make_mask_plan(ids, torch.ones_like(ids, dtype=torch.bool), law="exact", samples=4, seed=0,
        ...                       sequence_ids=torch.tensor([1, 2]), mask_id=10)
        >>> report = accumulate(model, plan, BGPO, Batch({"advantages": torch.tensor([1.0, -1.0])}))
        >>> report.passes, report.backwards
        (1, 4)
    """
    if not isinstance(plan, MaskPlan) or not isinstance(batch, Batch):
        raise TypeError(f"plan must be a MaskPlan and batch a Batch, got {type(plan).__name__} and {type(batch).__name__}")
    objective.check(batch, plan)
    K, B, _ = plan.shape
    if K == 0 or B == 0:
        raise ValueError(f"plan must hold at least one sample and one sequence, got K={K}, B={B}")
    if not torch.is_grad_enabled():
        raise ValueError("accumulate computes gradients: call it outside torch.no_grad()")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("model must have a parameter that requires a gradient, got a fully frozen one")
    if denominator is not None and not denominator > 0:
        raise ValueError(f"denominator must be above 0, got {denominator}")
    cuts = make_cuts(plan, batch, model_kwargs, samples_per_pass, sequences_per_pass)
    coupling = objective.on_policy_coupling if objective.is_on_policy(batch) else objective.coupling
    two_passes = coupling == "batch" or (coupling == "sequence" and samples_per_pass < K)
    if two_passes or (objective.old_scores is not None and not objective.is_on_policy(batch)):
        _refuse_dropout(model)
    if coupling == "batch" and group is not None and objective.couple is None:
        raise ValueError(f"group must be None for {objective.name}, which does not say what its ranks would share")
    if denominator is None:
        denominator = ranks.denominator(objective, plan, batch, group)

    with headless(model) as body:
        engine = _Engine(body, objective, denominator, {**body.options, "suppress": suppress}, head_plan, keep_zeros)
        elbo_BK = torch.zeros(B, K, dtype=_statistics_dtype(body.weight), device=plan.input_ids_BS.device)
        loss = elbo_BK.new_zeros(())
        with engine.meter.running(count_flops=count_flops, measure_memory=measure_memory):
            for block, place in _blocks(cuts, objective, coupling, keep_zeros, elbo_BK):
                if two_passes and coupling == "batch" and objective.couple is not None:
                    block_loss, block_elbo_BK = engine.by_numbers(block, group)
                elif two_passes:
                    block_loss, block_elbo_BK = engine.twice(block)
                else:
                    block_loss, block_elbo_BK = engine.once(block, coupling)
                loss = loss + block_loss
                elbo_BK[place] = block_elbo_BK
    meter = engine.meter
    counts = meter.forwards, meter.backwards, meter.rows, meter.seconds, meter.flops, meter.counted_flops, meter.peak_memory
    return Report(loss, elbo_BK, 2 if two_passes else 1, *counts)


def score_samples(
    model: nn.Module,
    plan: MaskPlan,
    *,
    samples_per_pass: int = 1,
    sequences_per_pass: int | None = None,
    suppress: tuple[int, ...] = (),
    model_kwargs: dict[str, Tensor] | None = None,
    after_cut: Callable[[MaskPlan], None] | None = None,
    per_token: bool = False,
) -> Tensor:
    """Per-sample ELBOs `[B, K]` of a plan without a gradient, in nats: the scores of an old or a reference policy.

    With `per_token`, log-probs `[B, K, S]` instead, unweighted, at the tokens that are scored and 0 elsewhere: what the
    objectives with a ratio per token take as "old_logp" and "ref_logp". Memory is that of one cut and the result; a
    sample without a scored token costs no forward. `after_cut` is called with each cut's plan.
    """
    K, B, S = plan.shape
    _refuse_dropout(model)
    cuts = make_cuts(plan, Batch(), model_kwargs, samples_per_pass, sequences_per_pass)
    with torch.no_grad(), headless(model) as body:
        options = {**body.options, "suppress": suppress}
        sizes = (B, K, S) if per_token else (B, K)
        found = torch.zeros(sizes, dtype=_statistics_dtype(body.weight), device=plan.input_ids_BS.device)
        for cut in cuts:
            if len(cut.plan.rows):
                selected = cut.select(torch.ones_like(cut.plan.rows.index, dtype=torch.bool))
                target_N, index_N = selected.target_N, selected.index_N
                logp_N = score_tokens(selected.hidden(body), body.weight, target_N, rows=index_N, **options).logp
                assert logp_N is not None
                if per_token:
                    dense_KBS = found.new_zeros(cut.plan.shape).masked_scatter_(cut.plan.scored, logp_N)
                    found[cut.sequences, cut.samples] = dense_KBS.transpose(0, 1)
                else:
                    found[cut.sequences, cut.samples] = cut.plan.elbo(logp_N)
            if after_cut is not None:
                after_cut(cut.plan)
    return found


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within the context, a model with LoRA adapters is its own frozen reference: no second copy of the weights.

    It is peft's `disable_adapter()`, which any module may offer. Raises ValueError where the model has none.

    Example: `with adapters_off(model): reference = score_samples(model, plan)`
    """
    disable = getattr(model, "disable_adapter", None)
    if not callable(disable):
        raise ValueError(
            f"model must have adapters to switch off (disable_adapter(), as peft's), {type(model).__name__} has none"
        )
    with disable():
        yield


def _refuse_dropout(model: nn.Module) -> None:
    if active := dropout_names(model):
        raise ValueError(
            f"model must be deterministic where two passes have to agree, but dropout is active: {', '.join(active[:3])}"
        )


def _statistics_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _blocks(
    cuts: Cuts, objective: Objective, coupling: str, keep_zeros: bool, elbo_BK: Tensor
) -> Iterator[tuple[Cuts, slice | Tensor]]:
    """What is done one after the other, and where it stands in the batch; sequences of no weight are left out.

    A block of an objective that couples a sequence's samples has `sequences_per_pass` sequences, so that what lies between
    two passes does not grow with the batch.
    """
    B = cuts.plan.shape[1]
    live_B: Tensor | None = None
    if objective.scale is not None and not keep_zeros and coupling != "batch":
        scale = {**cuts.batch.per_sequence, **cuts.batch.per_sample}[objective.scale]
        live_B = (scale != 0).reshape(B, -1).any(1)
        elbo_BK[~live_B & (cuts.plan.lengths_B > 0)] = torch.nan
    places = torch.arange(B, device=elbo_BK.device) if live_B is None else live_B.nonzero()[:, 0]
    if len(places) == 0:
        return
    if len(places) < B:
        cuts = cuts.of(places)
    step = cuts.sequences_per_pass if objective.coupling == "sequence" and coupling in ("sequence", "none") else len(places)
    if step >= len(places):
        yield cuts, slice(None) if len(places) == B else places
        return
    for start in range(0, len(places), step):
        yield cuts.of(slice(start, start + step)), places[start : start + step]


class _Engine:
    """The model without its head, an objective, and the passes over both."""

    def __init__(
        self,
        body: Body,
        objective: Objective,
        denominator: float,
        options: dict[str, Any],
        head_plan: str | None,
        keep_zeros: bool,
    ) -> None:
        self.body, self.objective, self.denominator = body, objective, denominator
        self.options, self.head_plan, self.keep_zeros = options, head_plan, keep_zeros
        self.meter = Meter(body)
        self.dtype = _statistics_dtype(body.weight)

    # --- one pass, or two ---------------------------------------------------------------------------------------------

    def once(self, cuts: Cuts, coupling: str) -> tuple[Tensor, Tensor]:
        """(loss, per-sample ELBOs `[B, K]`) of cuts whose coefficients need no pass of their own."""
        elbo_BK = self._elbos(cuts)
        loss = elbo_BK.new_zeros(())
        # on-policy the coefficients of a ratio come from data, but its value still needs the samples that it couples
        whole_loss = coupling == "none" and self.objective.coupling in ("sequence", "batch")
        logps: dict[tuple[int, int], Tensor] = {}
        for cut in cuts:
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
        if whole_loss:
            with torch.no_grad():
                loss = self._whole(_dense(cuts, logps, self.dtype)[cuts.plan.scored], cuts)
        return loss, elbo_BK

    def twice(self, cuts: Cuts) -> tuple[Tensor, Tensor]:
        """The same where coefficients depend on all rows of the cuts: their log-probs lie between the passes."""
        elbo_BK = self._elbos(cuts)
        logps = {}
        for cut in cuts:
            if len(cut.plan.rows):
                logps[cut.key] = logp_N = self._score(cut)
                elbo_BK[cut.sequences, cut.samples] = cut.plan.elbo(logp_N)
        dense_KBS = _dense(cuts, logps, self.dtype)
        with torch.enable_grad():
            leaf_N = dense_KBS[cuts.plan.scored].requires_grad_(True)
            loss = self._whole(leaf_N, cuts)
            (gradient_N,) = torch.autograd.grad(loss, leaf_N)
        gradient_KBS = torch.zeros_like(dense_KBS).masked_scatter_(cuts.plan.scored, gradient_N)
        for cut in cuts:
            if cut.key in logps:
                self._learn(cut, gradient_KBS[cut.samples, cut.sequences][cut.plan.scored])
        return loss.detach(), elbo_BK

    def by_numbers(self, cuts: Cuts, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
        """The same where one number per sequence says it all: no more than these lie between the passes, or go over ranks."""
        elbo_BK, reduce = self._elbos(cuts), self.objective.reduce
        assert reduce is not None
        numbers_B = torch.zeros(len(elbo_BK), dtype=torch.float64, device=elbo_BK.device)
        for cut in cuts:
            if len(cut.plan.rows):
                logp_N = self._score(cut)
                elbo_BK[cut.sequences, cut.samples] = cut.plan.elbo(logp_N)
                numbers_B[cut.sequences] += reduce(logp_N.double(), cut.plan)
        loss, gradient_B = ranks.couple(self.objective, numbers_B, cuts.plan, cuts.batch, group)
        gradient_B = gradient_B / self.denominator
        for cut in cuts:
            if len(cut.plan.rows):
                with torch.enable_grad():
                    leaf_N = numbers_B.new_zeros(len(cut.plan.rows)).requires_grad_(True)
                    weighted = (reduce(leaf_N, cut.plan) * gradient_B[cut.sequences]).sum()
                    (coef_N,) = torch.autograd.grad(weighted, leaf_N)
                self._learn(cut, coef_N)
        return (loss / self.denominator).to(self.dtype), elbo_BK

    # --- one cut ------------------------------------------------------------------------------------------------------

    def _score(self, cut: Cut) -> Tensor:
        """Log-probs of a cut's rows without a gradient."""
        rows = cut.plan.rows
        with torch.no_grad():
            chosen = cut.select(None if self.keep_zeros else torch.ones_like(rows.index, dtype=torch.bool))
            hidden = chosen.hidden(self.body)
            scores = score_tokens(hidden, self.body.weight, chosen.target_N, rows=chosen.index_N, **self.options)
        self.meter.ran(chosen.ids.numel(), len(rows), "forward", backward=False)
        assert scores.logp is not None
        return scores.logp

    def _learn(self, cut: Cut, coef_N: Tensor) -> tuple[Tensor, Tensor | None]:
        """Adds the gradient of the coefficients: (log-probs, 0 where not run; which rows ran, None for all)."""
        keep_N = None if self.keep_zeros else coef_N != 0
        if keep_N is not None and not bool(keep_N.any()):
            return torch.zeros_like(coef_N, dtype=self.dtype), keep_N
        chosen = cut.select(keep_N)
        hidden = chosen.hidden(self.body)
        coef_N = (coef_N if keep_N is None else coef_N[keep_N]).to(_statistics_dtype(hidden))
        scores = score_tokens(hidden, self.body.weight, chosen.target_N, rows=chosen.index_N, coef=coef_N, **self.options)
        assert scores.weighted_sum is not None
        assert scores.logp is not None
        scores.weighted_sum.backward()
        self.meter.ran(chosen.ids.numel(), len(coef_N), "coef", backward=True)
        return _spread(scores.logp, keep_N), keep_N

    def _learn_late(self, cut: Cut) -> tuple[Tensor, Tensor, Tensor | None]:
        """Adds the gradient of a cut's own contributions: (its loss, log-probs, which rows ran)."""
        rows, scale = cut.plan.rows, self.objective.scale
        keep_N = None if self.keep_zeros else torch.ones_like(rows.index, dtype=torch.bool)
        if keep_N is not None and scale is not None and scale in cut.batch.per_sample:
            keep_N = cut.batch.per_sample[scale][rows.sequence, rows.sample] != 0
            if not bool(keep_N.any()):
                logp_N = torch.zeros(len(rows), dtype=self.dtype, device=rows.index.device)
                return self._contributions(logp_N, cut).detach(), logp_N, keep_N
        chosen = cut.select(keep_N)
        hidden = chosen.hidden(self.body)
        head = {"rows": chosen.index_N, "plan": self.head_plan, **self.options}
        scores = score_tokens(hidden, self.body.weight, chosen.target_N, **head)
        assert scores.logp is not None
        logp_N = _spread(scores.logp, keep_N)
        loss = self._contributions(logp_N, cut)
        loss.backward()
        self.meter.ran(chosen.ids.numel(), len(chosen.index_N), scores.plan, backward=True)
        return loss.detach(), logp_N.detach(), keep_N

    def _data_coefficients(self, cut: Cut) -> Tensor:
        """`d loss / d logp` where it does not depend on logp: the gradient at any point, taken at 0."""
        with torch.enable_grad():
            zeros = torch.zeros(len(cut.plan.rows), dtype=torch.float64, device=cut.plan.input_ids_BS.device)
            logp_N = zeros.requires_grad_(True)
            return torch.autograd.grad(self._contributions(logp_N, cut), logp_N)[0]

    def _contributions(self, logp_N: Tensor, cut: Cut) -> Tensor:
        return self.objective.contributions(logp_N, cut.plan, cut.batch) / self.denominator

    def _whole(self, logp_N: Tensor, cuts: Cuts) -> Tensor:
        return self.objective.contributions(logp_N, cuts.plan, cuts.batch) / self.denominator

    def _elbos(self, cuts: Cuts) -> Tensor:
        K, B, _ = cuts.plan.shape
        return torch.zeros(B, K, dtype=self.dtype, device=cuts.plan.input_ids_BS.device)


def _spread(logp_N: Tensor, keep_N: Tensor | None) -> Tensor:
    """Log-probs of the rows that ran at their places among all, 0 elsewhere; differentiable."""
    if keep_N is None or len(logp_N) == len(keep_N):
        return logp_N
    return logp_N.new_zeros(len(keep_N)).masked_scatter(keep_N, logp_N)


def _elbo(cut: Cut, logp_N: Tensor, ran_N: Tensor | None) -> Tensor:
    """Per-sample ELBOs `[B, K]` of a cut; NaN where not all rows ran."""
    logp_N = logp_N.detach()
    return cut.plan.elbo(logp_N if ran_N is None else torch.where(ran_N, logp_N, torch.nan))


def _dense(cuts: Cuts, logps: dict[tuple[int, int], Tensor], dtype: torch.dtype) -> Tensor:
    """Log-probs of all cuts as `[K, B, S]`, 0 where nothing is scored."""
    dense_KBS = torch.zeros(cuts.plan.shape, dtype=dtype, device=cuts.plan.input_ids_BS.device)
    for cut in cuts:
        if cut.key in logps:
            dense_KBS[cut.samples, cut.sequences].masked_scatter_(cut.plan.scored, logps[cut.key])
    return dense_KBS
