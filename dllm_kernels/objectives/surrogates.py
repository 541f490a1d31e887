"""The pieces that several objectives share: clipped ratios, KL estimators, sums under a mask, statistics by group, checks.

Nothing here overflows or turns a padded row into NaN: ratios are clipped in the log domain, and what a mask leaves out is
replaced before it is exponentiated, because the gradient of an infinite value is NaN even where the value is not taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dllm_kernels import checks
from dllm_kernels.masks.plan import MaskPlan

SCORES = (torch.float32, torch.float64)  # no importance ratio survives scores of 16 bit


def clipped_ratio_term(delta: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """`min(rho A, clip(rho, 1 - low, 1 + high) A)` with `rho = e^delta`: what PPO maximises, elementwise.

    delta and advantages broadcast; advantages are detached. The gradient in delta is exactly `A rho`, and 0 where it is
    strictly clipped: A > 0 and rho > 1 + high, or A < 0 and rho < 1 - low. So rho = 1 with low = high = 0 keeps A. For
    A < 0 the minimum has no bound; beyond the square root of the dtype's range (e^44 in fp32) rho continues along its
    tangent, finite in value and gradient. A NaN stays one.
    """
    advantages = advantages.detach()
    upper, lower = math.log1p(high), math.log1p(-low) if low < 1 else -math.inf
    above, below = (advantages >= 0) & (delta > upper), (advantages < 0) & (delta < lower)
    return advantages * torch.where(above, 1.0 + high, torch.where(below, 1.0 - low, _exponential(delta)))


def k1(delta: Tensor) -> Tensor:
    """`delta = logp - ref_logp`: unbiased for KL(policy || reference) in value, under samples of the policy."""
    return delta


def k2(delta: Tensor) -> Tensor:
    """`delta^2 / 2`, `delta = logp - ref_logp`: its gradient is unbiased for that of the KL, on-policy."""
    return delta.square() / 2


def k3(delta: Tensor) -> Tensor:
    """`e^-delta - 1 + delta`, `delta = logp - ref_logp`: unbiased in value and never negative.

    Where e^-delta leaves the square root of the dtype's range it continues along its tangent, as the ratio does.
    """
    limit = _limit(delta.dtype)
    beyond = -delta > limit
    excess = torch.where(beyond, -delta - limit, 0.0)
    return torch.expm1(torch.where(beyond, limit, -delta)) + math.exp(limit) * excess + delta


def _exponential(delta: Tensor) -> Tensor:
    """`e^delta` with a finite derivative everywhere, so that no branch of a `torch.where` over it poisons another."""
    limit = _limit(delta.dtype)
    beyond = delta > limit
    return torch.exp(torch.where(beyond, limit, delta)) + math.exp(limit) * torch.where(beyond, delta - limit, 0.0)


def _limit(dtype: torch.dtype) -> float:
    return math.log(torch.finfo(dtype).max) / 2


def masked_difference(logp: Tensor, other: Tensor, mask: Tensor) -> Tensor:
    """`logp - other` where mask, 0 elsewhere, in value and gradient, whatever stands there; other is detached."""
    return torch.where(mask, logp, 0.0) - torch.where(mask, other.detach(), 0.0)


def masked_sum(values: Tensor, mask: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """Sum where mask. What is exponentiated must be masked before, see `masked_difference`."""
    return torch.where(mask, values, 0.0).sum(dim)


def dense_logp(logp_N: Tensor, plan: MaskPlan) -> Tensor:
    """A plan's row log-probs as `[K, B, S]`, 0 where nothing is scored; differentiable, every row at its own place."""
    checks.shape("logp_N", logp_N, [len(plan.rows.index)])
    return plan.dense(logp_N)


def mean_logp(logp_N: Tensor, plan: MaskPlan) -> Tensor:
    """Mean log-probs `[B, K]` of the scored tokens of each sample, 0 where there is none; differentiable.

    Of a plan of blocks: the means of the blocks, weighed by their lengths.
    """
    if plan.block_BS is None:
        return dense_logp(logp_N, plan).sum(-1).t() / plan.counts.t().clamp(min=1)
    units = plan.units
    shares_KU = units.lengths_U / units.collect(plan.scored).clamp(min=1)
    share_KBS = torch.where(plan.scored, units.at_tokens(shares_KU), 0.0).to(logp_N.dtype)
    return (dense_logp(logp_N, plan) * share_KBS).sum(-1).t() / plan.lengths_B[:, None].clamp(min=1)


def sequence_scores(logp_N: Tensor, plan: MaskPlan) -> Tensor:
    """`plan.score` as a function: linear in logp, and the scores of cuts along the samples add up."""
    return plan.score(logp_N)


def group_softmax(logits_B: Tensor, group_ids_B: Tensor) -> Tensor:
    """Softmax over the sequences of equal id; detached; exactly 1 / G each where the logits are equal.

    No loop and no host sync: a dense `[B, B]` membership.
    """
    logits_B = logits_B.detach()
    largest_B = torch.where(_members(group_ids_B), logits_B[None, :], -math.inf).amax(1)
    shares_B = torch.exp(logits_B - largest_B)
    return shares_B / group_sum(shares_B, group_ids_B)


def group_sum(values_B: Tensor, group_ids_B: Tensor) -> Tensor:
    """Per sequence the sum over its group, itself included; differentiable."""
    return torch.where(_members(group_ids_B), values_B[None, :], 0.0).sum(1)


def group_mean(values_B: Tensor, group_ids_B: Tensor) -> Tensor:
    """Per sequence the mean over its group, itself included; differentiable."""
    return group_sum(values_B, group_ids_B) / _members(group_ids_B).sum(1)


def _members(group_ids_B: Tensor) -> Tensor:
    return group_ids_B[:, None] == group_ids_B[None, :]


# --- checks -----------------------------------------------------------------------------------------------------------


def check_policy(name: str, tensor: Tensor, dimensions: int) -> list[int]:
    """The scores that carry the gradient: their sizes. Raises TypeError or ValueError for another dtype, rank, or none."""
    checks.dtype(name, tensor, SCORES)
    checks.shape(name, tensor, [None] * dimensions)
    if tensor.numel() == 0:
        raise ValueError(f"{name} must hold at least one value, got shape {list(tensor.shape)}")
    return list(tensor.shape)


def check_values(name: str, tensor: Tensor, sizes: Sequence[int], policy: Tensor, *, where: Tensor | None = None) -> None:
    """Real numbers of these sizes on the policy's device, finite (`where` a mask says they count); see `checks.may_read`."""
    checks.shape(name, tensor, sizes)
    if tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{name} must hold real numbers, got {tensor.dtype}")
    checks.same_device(name, tensor, "the policy's scores", policy)
    checks.finite(name, tensor if where is None else torch.where(where, tensor, 0))


def check_mask(name: str, mask: Tensor, sizes: Sequence[int], policy: Tensor) -> None:
    checks.dtype(name, mask, [torch.bool])
    checks.shape(name, mask, sizes)
    checks.same_device(name, mask, "the policy's scores", policy)


def check_group_ids(group_ids_B: Tensor, sizes: Sequence[int], policy: Tensor) -> None:
    checks.dtype("group_ids_B", group_ids_B, [torch.int64])
    checks.shape("group_ids_B", group_ids_B, sizes)
    checks.same_device("group_ids_B", group_ids_B, "the policy's scores", policy)


def check_clip(low: float, high: float, names: tuple[str, str] = ("epsilon", "epsilon")) -> None:
    """low in [0, 1], high at least 0; `names` are the arguments to blame."""
    if not checks.number(names[0], low, least=0) <= 1:
        raise ValueError(f"{names[0]} must be in [0, 1], got {low}")
    checks.number(names[1], high, least=0)


def divisors(name: str, lengths_B: Tensor, sizes: Sequence[int], policy: Tensor) -> Tensor:
    """Lengths to divide by, in the policy's dtype: 0 becomes 1, since a completion without tokens has scores of 0."""
    check_values(name, lengths_B, sizes, policy)
    if checks.may_read(lengths_B) and bool((lengths_B < 0).any()):
        raise ValueError(f"{name} must be at least 0, got {float(lengths_B.min())}")
    return lengths_B.detach().to(policy.dtype).clamp(min=1.0)
