"""Scores of mask plans without gradients: of the policy, the old policy and the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dllm_kernels.accumulation.micro_batches import Cut, in_step, make_cuts
from dllm_kernels.accumulation.objective import Batch
from dllm_kernels.accumulation.passes import statistics_dtype
from dllm_kernels.head.scoring import score
from dllm_kernels.masks.plan import MaskPlan
from dllm_kernels.model.headless import dropout_names, headless
from dllm_kernels.model.layouts import check_blocks
from dllm_kernels.model.wrappers import unwrapped


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
    """Per-sample ELBOs `[B, K]` of a plan in nats, float64, without a gradient: old or reference scores.

    With `per_token`, unweighted log-probs `[B, K, S]` instead, as the head has them (fp32, or fp64 of an fp64 model), 0 where
    nothing is scored: the "old_logp" and "ref_logp" of objectives with a ratio per token. Memory is that of one micro-batch
    and the result; samples without a scored token cost no forward. `after_cut` is called with the plan of each micro-batch.

    `model`, `suppress`, `model_kwargs` and the micro-batch as in `accumulate`. Raises ValueError naming the argument, and for
    active dropout.

    Example:
        >>> from dllm_kernels import make_mask_plan
        >>> from transformers import EuroBertConfig, EuroBertForMaskedLM
        >>> model = EuroBertForMaskedLM(EuroBertConfig(vocab_size=11, hidden_size=8, intermediate_size=16,
        ...     num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, pad_token_id=0))
        >>> ids = torch.randint(10, (2, 6))
        >>> plan = make_mask_plan(ids, torch.ones_like(ids, dtype=torch.bool), law="exact", samples=4, seed=0,
        ...                       sequence_ids=torch.tensor([1, 2]), mask_id=10)
        >>> score_samples(model, plan).shape
        torch.Size([2, 4])
    """
    options: dict[str, Any] = {"suppress": suppress, "model_kwargs": model_kwargs, "after_cut": after_cut}
    options |= {"samples_per_pass": samples_per_pass, "sequences_per_pass": sequences_per_pass}
    if per_token:
        return token_scores(model, plan, **options)["logp"]
    K, B, _ = plan.shape
    found_BK = torch.zeros(B, K, dtype=torch.float64, device=plan.input_ids_BS.device)

    def take(cut: Cut, scores: dict[str, Tensor]) -> None:
        found_BK[cut.sequences, cut.samples] = cut.plan.elbo(scores["logp"])

    _each_cut(model, plan, take, **options)
    return found_BK


def token_scores(
    model: nn.Module, plan: MaskPlan, *, want: Sequence[str] = ("logp",), temperature: float = 1.0, **options: Any
) -> dict[str, Tensor]:
    """Statistics of a plan's scored tokens, `[B, K, S]` each, 0 elsewhere, of logits over a temperature.

    `want` of "logp" and "entropy"; options as in `score_samples`.
    """
    K, B, S = plan.shape
    found: dict[str, Tensor] = {}

    def take(cut: Cut, scores: dict[str, Tensor]) -> None:
        for name, value_N in scores.items():
            into_BKS = found.setdefault(name, value_N.new_zeros(B, K, S))
            dense_KBS = value_N.new_zeros(cut.plan.shape).masked_scatter_(cut.plan.scored, value_N)
            into_BKS[cut.sequences, cut.samples] = dense_KBS.transpose(0, 1)

    dtype = _each_cut(model, plan, take, want=want, temperature=temperature, **options)
    return {name: found.get(name, torch.zeros(B, K, S, dtype=dtype, device=plan.input_ids_BS.device)) for name in want}


def _each_cut(
    model: nn.Module,
    plan: MaskPlan,
    take: Callable[[Cut, dict[str, Tensor]], None],
    *,
    want: Sequence[str] = ("logp",),
    temperature: float = 1.0,
    samples_per_pass: int = 1,
    sequences_per_pass: int | None = None,
    suppress: tuple[int, ...] = (),
    model_kwargs: dict[str, Tensor] | None = None,
    after_cut: Callable[[MaskPlan], None] | None = None,
) -> torch.dtype:
    """Hand each micro-batch that scores something to `take`, with its statistics `[N]`, whose dtype is returned."""
    refuse_dropout(model)
    check_blocks(model, plan, model_kwargs or {})
    cuts = make_cuts(plan, Batch(), model_kwargs, samples_per_pass, sequences_per_pass)
    with torch.no_grad(), headless(model) as body:
        options = replace(body.options, suppress=suppress, temperature=body.options.temperature * temperature)
        for cut in in_step(cuts, body, lambda cut: len(cut.plan.rows) > 0):
            if len(cut.plan.rows):
                selected = cut.select()
                scores = score(selected.hidden(body), body.weight, selected.target_M, selected.index_M, options, want=want)
                take(cut, {name: selected.spread(getattr(scores, name)) for name in want})
            if after_cut is not None:
                after_cut(cut.plan)
        return statistics_dtype(body.parameter)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within the context, a model with LoRA adapters is its own frozen reference, without a second copy.

    Calls peft's `disable_adapter()`, which any module may offer. Raises ValueError where the model has none.

    Example: `with adapters_off(model): reference = score_samples(model, plan)`
    """
    disable = getattr(unwrapped(model), "disable_adapter", None)
    if not callable(disable):
        raise ValueError(
            f"model must have adapters to switch off (disable_adapter(), as peft's), {type(model).__name__} has none"
        )
    with disable():
        yield


def refuse_dropout(model: nn.Module) -> None:
    if active := dropout_names(model):
        raise ValueError(
            f"model must be deterministic where two passes have to agree, but dropout is active: {', '.join(active[:3])}"
        )
