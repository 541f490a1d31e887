"""EBPO: ELBO-based block-level policy optimization of LLaDA2.1 (arXiv 2602.08676, eq. 4 and 5).

One ratio per sequence, of composite ELBOs: within a sample (a timestep) the contributions of all blocks are summed, each
given the clean blocks before it, and samples are averaged. The ratio is clipped in the log domain, so it cannot overflow.

The model's own code is closed. Verified against DARE's port (yjyddq/DARE at 83ae8a3, verl/trainer/ppo/dllm_core_algos.py,
lines 153-226 and 802-860). Plans with `causal_block` make the ELBOs composite; without blocks it is a sequence ratio of
any-order ELBOs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dllm_kernels.accumulation.objective import Batch, Objective
from dllm_kernels.masks.plan import MaskPlan
from dllm_kernels.objectives import surrogates
from dllm_kernels.objectives.recipe import Clip, Recipe

__all__ = ["ebpo", "ebpo_objective"]


def ebpo(
    sample_elbo_BK: Tensor,
    old_sample_elbo_BK: Tensor,
    advantages_B: Tensor,
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    weights_K: Tensor | None = None,
    valid_B: Tensor | None = None,
) -> Tensor:
    """`-mean over valid b of A_b e^{d'_b}`, `d' = min(d, log(1 + epsilon_high))` for A >= 0, else `max(d, log(1 - epsilon_low))`.

    `d_b = sum_k w_k (sample_elbo_bk - old_sample_elbo_bk)`.

    Args:
        sample_elbo_BK: `[B, K]` (nats), the sum over blocks of each sample's weighted log-probs, differentiable, fp32 or fp64.
        old_sample_elbo_BK: the same under the old policy with the same masks; detached.
        advantages_B: `[B]`; detached.
        epsilon_low, epsilon_high: the clip; low in [0, 1), high at least 0.
        weights_K: `[K]` or `[B, K]`, of the samples; None: the mean, 1/K each. Detached.
        valid_B: bool `[B]`, sequences with a scored token; the others count nowhere. None: all.

    Returns the scalar loss; gradient of a term `-A e^d`, 0 where it is strictly clipped, -A at d = 0. Raises TypeError or
    ValueError naming the argument.

    Example:
        >>> elbo = torch.tensor([[-8.0, -6.0], [-4.0, -4.0]], requires_grad=True)
        >>> ebpo(elbo, elbo, torch.tensor([1.0, -1.0])).backward()
        >>> elbo.grad
        tensor([[-0.2500, -0.2500],
                [ 0.2500,  0.2500]])
    """
    B, K = surrogates.check_policy("sample_elbo_BK", sample_elbo_BK, 2)
    surrogates.check_values("old_sample_elbo_BK", old_sample_elbo_BK, [B, K], sample_elbo_BK)
    surrogates.check_values("advantages_B", advantages_B, [B], sample_elbo_BK)
    _check_clip(epsilon_low, epsilon_high)
    if weights_K is None:
        weights_K = sample_elbo_BK.new_full((K,), 1.0 / K)
    surrogates.check_values("weights_K", weights_K, [B, K] if weights_K.dim() == 2 else [K], sample_elbo_BK)
    if valid_B is None:
        valid_B = torch.ones(B, dtype=torch.bool, device=sample_elbo_BK.device)
    surrogates.check_mask("valid_B", valid_B, [B], sample_elbo_BK)
    delta_B = ((sample_elbo_BK - old_sample_elbo_BK.detach()) * weights_K.detach()).sum(1)
    return _terms(delta_B, advantages_B, valid_B, epsilon_low, epsilon_high).sum() / valid_B.sum().clamp(min=1)


def _check_clip(low: float, high: float) -> None:
    surrogates.check_clip(low, high, ("epsilon_low", "epsilon_high"))
    if low == 1:
        raise ValueError(f"epsilon_low must be in [0, 1), got {low}")


def _terms(delta_B: Tensor, advantages_B: Tensor, valid_B: Tensor, low: float, high: float) -> Tensor:
    advantages_B = advantages_B.detach()
    delta_B = torch.where(valid_B, delta_B, 0.0)  # before it is exponentiated
    clipped_B = torch.where(advantages_B >= 0, delta_B.clamp(max=math.log1p(high)), delta_B.clamp(min=math.log1p(-low)))
    return torch.where(valid_B, -advantages_B * torch.exp(clipped_B), 0.0)


def ebpo_objective(*, epsilon_low: float = 0.2, epsilon_high: float = 0.2) -> Objective:
    """`ebpo` for the engine, with the shares of the plan's law as weights, 1/K each for most; summed over the sequences.

    Entries: "advantages" `[B]`; "old_elbo" `[B]`, absent on-policy. Sequences without a scored token contribute nothing.
    """
    _check_clip(epsilon_low, epsilon_high)

    def contributions(logp_N: Tensor, plan: MaskPlan, batch: Batch) -> Tensor:
        elbo_B, entries = plan.score(logp_N), batch.per_sequence
        delta_B = elbo_B - entries.get("old_elbo", elbo_B).detach()
        return _terms(delta_B, entries["advantages"], plan.lengths_B > 0, epsilon_low, epsilon_high).sum()

    return Objective(
        name="ebpo",
        contributions=contributions,
        coupling="sequence",
        on_policy_coupling="none",
        denominator="sequences",
        old_scores="old_elbo",
        per_sequence=("advantages", "old_elbo"),
        scale="advantages",
    )


RECIPE = Recipe(
    name="ebpo",
    title="LLaDA2.1: Speeding Up Text Diffusion via Token Editing",
    arxiv="2602.08676",
    status="verified against the code",
    objective=ebpo_objective,
    law="exact",
    law_options={},
    samples=16,
    advantage="std",
    needs_old=True,
    needs_reference=False,
    inner_iterations=1,
    clip=lambda options: Clip(options.epsilon_low, options.epsilon_high),
    window="eos",
    tail="removed",
    notes="The report's own code is closed; DARE's port was read, whose KL to a reference is off by default and left out. Its "
    "SDAR recipes: 16 timesteps, blocks of 4, learning rate 5e-7, temperature 1. It stratifies the levels over blocks and "
    "timesteps, ours over timesteps.",
)
