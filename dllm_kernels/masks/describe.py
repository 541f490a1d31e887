"""A mask plan in words: its law, the rows that it will score, and what they cost."""

from __future__ import annotations

from typing import Any

import torch

from dllm_kernels import checks

_ROW_BYTES = 4 * 8 + 4  # index, target, sequence, sample; weight


def expected_rows(plan: Any) -> float:
    """Expected number of scored tokens of a `MaskPlan`; the actual number where it is not random, and for `block`."""
    rule, options, lengths_B = plan.rule, plan.options, plan.units.lengths_U.double()
    if rule.level in ("all", "nodes", "steps", "block"):
        return float(plan.counts.sum())
    if rule.level == "t":
        low, high = (options["t_low"], options["t_high"]) if rule.reduction == "coupled" else (options["t_min"], 1.0)
        first = lengths_B.sum() * ((low + high) / 2 if options.get("t") is None else options["t"])
    else:
        first = ((lengths_B + (rule.level == "count from 1")) / 2 * (lengths_B > 0)).sum()
    if rule.pairs_from is None:
        return float(plan.shape[0] * first)
    whole = int((plan.sample_K < rule.pairs_from).sum())
    seconds = int(plan.level.second_K1.sum())
    firsts = plan.shape[0] - whole - seconds
    return float(firsts * first + seconds * (lengths_B.sum() - first) + whole * lengths_B.sum())


def describe(plan: Any, hidden_size: int | None, vocabulary: int | None, dtype: torch.dtype) -> str:
    """See `MaskPlan.describe`."""
    rule, (K, B, S) = plan.rule, plan.shape
    N = expected_rows(plan)
    options = ", ".join(f"{name}={value}" for name, value in plan.options.items() if value is not None) or "none"
    draws = (
        "given" if rule.level == "steps" else f"{rule.pairing}{', in complementary pairs' if rule.pairs_from is not None else ''}"
    )
    plan_bytes = sum(tensor.nbytes for tensor in plan.tensors().values())
    lines = [
        f"law         {rule.name} ({rule.source}); options {options}",
        f"            level {rule.level}, samples {draws}, weight {rule.weight}, "
        + ("unbiased for the ELBO" if rule.unbiased else "no unbiased estimate of the ELBO"),
        f"size        {K} samples x {B} sequences x {S} tokens, {int(plan.lengths_B.sum())} of them scored; "
        f"seed {plan.seed}, iteration {plan.iteration}, prompt noise {plan.prompt_noise:g}, shift {plan.shift}",
        f"rows        {N:,.0f} expected, {N / max(1, K * B * S):.1%} of the positions",
        f"memory      plan {_size(plan_bytes)}, noisy ids {_size(K * B * S * plan.input_ids_BS.element_size())}, "
        f"masks {_size(K * B * S)}, rows {_size(N * _ROW_BYTES)}",
    ]
    if hidden_size is None or vocabulary is None:
        lines.append(f"head        2 N H V = {2 * N:,.0f} H V FLOPs forward; hidden_size and vocabulary make it a number")
    else:
        H, V = checks.count("hidden_size", hidden_size), checks.count("vocabulary", vocabulary)
        flops = 2.0 * N * H * V
        lines.append(
            f"head        {flops:.3g} FLOPs forward (2 N H V; H={H}, V={V}), {2.0 * K * B * S * H * V:.3g} for every position"
        )
        lines.append(
            f"            logits that are never built, {dtype}: {_size(N * V * dtype.itemsize)} for the rows, "
            f"{_size(K * B * S * V * dtype.itemsize)} for every position"
        )
    return "\n".join(lines)


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"
