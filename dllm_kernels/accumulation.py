"""Exact gradients of any objective, one Monte-Carlo sample at a time: memory does not grow with their number.

What an objective's coefficients `d loss / d logp_row` depend on decides the passes over the model:

    none                    data only: one pass, coefficients known before the head runs
    token, sample           rows of one sample of one sequence: one pass, coefficients arrive in backward
    sequence                its K samples: one pass if a cut holds them all, else two
    batch                   everything: two passes

Two passes score all rows without a gradient, take the coefficients by autograd on these small vectors, then go through the
model again sample by sample. They need a deterministic forward, so active dropout is refused.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dllm_kernels import checks
from dllm_kernels.heads import Body, dropout_names, headless
from dllm_kernels.masks import MaskPlan
from dllm_kernels.objective import Batch, Objective
from dllm_kernels.scoring import score_tokens


@dataclass(frozen=True)
class Report:
    """What `accumulate` did. Tensors are detached; nothing here was read back from the device."""

    loss: Tensor  # scalar: this call's share of the step's loss
    sample_elbo_BK: Tensor  # per-sample ELBOs under the policy, nats
    passes: int
    forwards: int
    backwards: int
    rows: int  # rows through the head, both passes
    seconds: float


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
) -> Report:
    """Add the objective's exact gradient to the `.grad` of the model's parameters.

    Args:
        model: a Hugging Face masked language model, or one under `headless` already.
        plan: the masks, shared by every policy. batch: advantages, old scores and so on, see `Batch`.
        objective: what to minimise, for example `objectives.BGPO`.
        denominator: what the sum of contributions is divided by; give the count of the whole optimizer step and all ranks
            when this call sees only a part. Default: B of the plan, for objectives whose denominator is "sequences".
        samples_per_pass, sequences_per_pass: the cut that one forward and backward holds; memory grows with it, the result
            does not depend on it.
        head_plan: forces the head's plan for late coefficients ("unit", "keep", "recompute").
        suppress: ids with probability 0, such as the mask id.
        model_kwargs: `[B, S]` tensors for every model call, such as `attention_mask`; cut along B.

    Raises ValueError naming the argument: a batch that does not fit the plan, a missing denominator, dropout where two
    passes must agree. A cut without a masked token is skipped.

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
    if denominator is None:
        if objective.denominator != "sequences":
            raise ValueError(
                f"denominator must be given: {objective.name} counts {objective.denominator}, which a cut cannot know"
            )
        denominator = float(B)
    if not denominator > 0:
        raise ValueError(f"denominator must be above 0, got {denominator}")
    checks.count("samples_per_pass", samples_per_pass)
    sequences_per_pass = B if sequences_per_pass is None else checks.count("sequences_per_pass", sequences_per_pass)
    model_kwargs = model_kwargs or {}
    _check_kwargs(model_kwargs, plan)
    started = time.perf_counter()
    coupling = objective.on_policy_coupling if objective.is_on_policy(batch) else objective.coupling
    two_passes = coupling == "batch" or (coupling == "sequence" and samples_per_pass < K)
    if two_passes or (objective.old_scores is not None and not objective.is_on_policy(batch)):
        _refuse_dropout(model)

    cuts = _Cuts(plan, batch, model_kwargs, samples_per_pass, sequences_per_pass)
    forwards = backwards = rows = 0
    with headless(model) as body:
        elbo_BK = torch.zeros(B, K, dtype=_statistics_dtype(body.weight), device=plan.input_ids_BS.device)
        loss = elbo_BK.new_zeros(())
        options = {**body.options, "suppress": suppress}
        coefficients: dict[tuple[int, int], Tensor] = {}
        logps: dict[tuple[int, int], Tensor] = {}
        # on-policy the coefficients of a ratio come from data, but its value still needs the samples that it couples
        whole_loss = not two_passes and coupling == "none" and objective.coupling in ("sequence", "batch")
        if two_passes:
            with torch.no_grad():
                for cut in cuts:
                    hidden = cut.hidden(body)
                    logps[cut.key] = _logp(hidden, body, cut.plan, options, None)
                    forwards, rows = forwards + 1, rows + len(cut.plan.rows)
            loss, coefficients = _coefficients(objective, plan, batch, cuts, logps, denominator)
        for cut in cuts:
            cut_rows = cut.plan.rows
            if len(cut_rows) == 0:
                if not two_passes and not whole_loss:
                    loss = loss + objective.contributions(loss.new_zeros(0), cut.plan, cut.batch).detach() / denominator
                continue
            hidden = cut.hidden(body)
            forwards, backwards, rows = forwards + 1, backwards + 1, rows + len(cut_rows)
            if two_passes or coupling == "none":
                coef_N = coefficients[cut.key] if two_passes else _data_coefficients(objective, cut, denominator)
                scores = score_tokens(
                    hidden,
                    body.weight,
                    cut_rows.target,
                    rows=cut_rows.index,
                    coef=coef_N.to(_statistics_dtype(hidden)),
                    **options,
                )
                assert scores.weighted_sum is not None
                assert scores.logp is not None
                logp_N = scores.logp
                scores.weighted_sum.backward()
                if whole_loss:
                    logps[cut.key] = logp_N
                elif not two_passes:
                    loss = loss + objective.contributions(logp_N, cut.plan, cut.batch).detach() / denominator
            else:
                logp_N = _logp(hidden, body, cut.plan, options, head_plan)
                cut_loss = objective.contributions(logp_N, cut.plan, cut.batch) / denominator
                cut_loss.backward()
                loss = loss + cut_loss.detach()
            elbo_BK[cut.sequences, cut.samples] = cut.plan.elbo(logp_N.detach())
        if whole_loss:
            with torch.no_grad():
                dense_KBS = elbo_BK.new_zeros(plan.shape)
                for cut in cuts:
                    if cut.key in logps:
                        dense_KBS[cut.samples, cut.sequences].masked_scatter_(cut.plan.scored, logps[cut.key])
                loss = objective.contributions(dense_KBS[plan.scored], plan, batch) / denominator
    return Report(loss, elbo_BK, 2 if two_passes else 1, forwards, backwards, rows, time.perf_counter() - started)


def score_samples(
    model: nn.Module,
    plan: MaskPlan,
    *,
    samples_per_pass: int = 1,
    sequences_per_pass: int | None = None,
    suppress: tuple[int, ...] = (),
    model_kwargs: dict[str, Tensor] | None = None,
    after_cut: Callable[[MaskPlan], None] | None = None,
) -> Tensor:
    """Per-sample ELBOs `[B, K]` of a plan without a gradient, in nats: the scores of an old or a reference policy.

    Memory is that of one cut; a cut without a scored token costs no forward. `after_cut` is called with each cut's plan.
    """
    K, B, _ = plan.shape
    _refuse_dropout(model)
    _check_kwargs(model_kwargs or {}, plan)
    checks.count("samples_per_pass", samples_per_pass)
    sequences_per_pass = B if sequences_per_pass is None else checks.count("sequences_per_pass", sequences_per_pass)
    cuts = _Cuts(plan, Batch(), model_kwargs or {}, samples_per_pass, sequences_per_pass)
    with torch.no_grad(), headless(model) as body:
        elbo_BK = torch.zeros(B, K, dtype=_statistics_dtype(body.weight), device=plan.input_ids_BS.device)
        for cut in cuts:
            if len(cut.plan.rows):
                logp_N = _logp(cut.hidden(body), body, cut.plan, {**body.options, "suppress": suppress}, None)
                elbo_BK[cut.sequences, cut.samples] = cut.plan.elbo(logp_N)
            if after_cut is not None:
                after_cut(cut.plan)
    return elbo_BK


def _check_kwargs(model_kwargs: dict[str, Tensor], plan: MaskPlan) -> None:
    for name, tensor in model_kwargs.items():
        checks.require_tensor(name, tensor)
        checks.shape(name, tensor, [plan.shape[1], *([None] * (tensor.dim() - 1))])
        checks.same_device(name, tensor, "the plan", plan.input_ids_BS)


def _refuse_dropout(model: nn.Module) -> None:
    if active := dropout_names(model):
        raise ValueError(
            f"model must be deterministic where two passes have to agree, but dropout is active: {', '.join(active[:3])}"
        )


@dataclass(frozen=True)
class _Cut:
    samples: slice
    sequences: slice
    plan: MaskPlan
    batch: Batch
    model_kwargs: dict[str, Tensor]

    @property
    def key(self) -> tuple[int, int]:
        return self.samples.start, self.sequences.start

    def hidden(self, body: Body) -> Tensor:
        K, B, S = self.plan.shape
        expanded = {
            name: tensor[None].expand(K, *tensor.shape).reshape(K * B, *tensor.shape[1:])
            for name, tensor in self.model_kwargs.items()
        }
        return body(self.plan.noisy_ids.view(K * B, S), **expanded)


@dataclass(frozen=True)
class _Cuts:
    """The micro-batches of a plan: samples outermost, so that one sample of every sequence is done before the next."""

    plan: MaskPlan
    batch: Batch
    model_kwargs: dict[str, Tensor]
    samples_per_pass: int
    sequences_per_pass: int

    def __iter__(self) -> Iterator[_Cut]:
        K, B, _ = self.plan.shape
        for k in range(0, K, self.samples_per_pass):
            for b in range(0, B, self.sequences_per_pass):
                samples = slice(k, min(k + self.samples_per_pass, K))
                sequences = slice(b, min(b + self.sequences_per_pass, B))
                yield _Cut(
                    samples,
                    sequences,
                    self.plan.cut(samples=samples, sequences=sequences),
                    self.batch.cut(samples=samples, sequences=sequences),
                    {name: tensor[sequences] for name, tensor in self.model_kwargs.items()},
                )


def _statistics_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _logp(hidden: Tensor, body: Body, plan: MaskPlan, options: dict[str, Any], head_plan: str | None) -> Tensor:
    logp_N = score_tokens(hidden, body.weight, plan.rows.target, rows=plan.rows.index, plan=head_plan, **options).logp
    assert logp_N is not None
    return logp_N


def _data_coefficients(objective: Objective, cut: _Cut, denominator: float) -> Tensor:
    """`d loss / d logp` where it does not depend on logp: the gradient at any point, taken at 0."""
    with torch.enable_grad():
        logp_N = torch.zeros(len(cut.plan.rows), dtype=torch.float64, device=cut.plan.input_ids_BS.device, requires_grad=True)
        total = objective.contributions(logp_N, cut.plan, cut.batch) / denominator
        return torch.autograd.grad(total, logp_N)[0]


def _coefficients(
    objective: Objective,
    plan: MaskPlan,
    batch: Batch,
    cuts: _Cuts,
    logps: dict[tuple[int, int], Tensor],
    denominator: float,
) -> tuple[Tensor, dict[tuple[int, int], Tensor]]:
    """Loss of the whole plan, and its gradient at every row, by autograd on the small vectors of the first pass."""
    K, B, S = plan.shape
    dtype = next(iter(logps.values())).dtype
    dense_KBS = torch.zeros(K, B, S, dtype=dtype, device=plan.input_ids_BS.device)
    masks = {cut.key: (cut.samples, cut.sequences, cut.plan.scored) for cut in cuts}
    for key, (samples, sequences, scored) in masks.items():
        dense_KBS[samples, sequences].masked_scatter_(scored, logps[key])
    with torch.enable_grad():
        leaf_N = dense_KBS[plan.scored].requires_grad_(True)
        loss = objective.contributions(leaf_N, plan, batch) / denominator
        (gradient_N,) = torch.autograd.grad(loss, leaf_N)
    gradient_KBS = torch.zeros_like(dense_KBS).masked_scatter_(plan.scored, gradient_N)
    return loss.detach(), {key: gradient_KBS[samples, sequences][scored] for key, (samples, sequences, scored) in masks.items()}
