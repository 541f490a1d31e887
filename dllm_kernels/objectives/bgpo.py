"""BGPO: Boundary-guided policy optimization (arXiv 2510.11683, ACL 2026).

The ELBO-ratio objective `A exp(mean_j d_j)` couples all Monte-Carlo samples. BGPO maximises a lower bound of it that is a
sum over samples, so backward can run sample by sample at constant memory.

Verified against the paper's text; `lengths`, `clip`, `dual_clip` and `tokens` are what the public port (yjyddq/DARE)
adds.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from dllm_kernels import checks
from dllm_kernels.accumulation.objective import Batch, Objective
from dllm_kernels.losses import bgpo_terms
from dllm_kernels.masks.plan import MaskPlan
from dllm_kernels.objectives.recipe import Recipe
from dllm_kernels.objectives.surrogates import check_clip

__all__ = ["BGPO", "bgpo", "bgpo_objective"]


def bgpo(
    sample_elbo_BK: Tensor,
    old_sample_elbo_BK: Tensor,
    advantages_B: Tensor,
    *,
    lengths: Tensor | None = None,
    clip: tuple[float, float] | None = None,
    dual_clip: float | None = None,
    tokens: Tensor | None = None,
) -> Tensor:
    """`-mean_b sum_j g_bj`, `g_bj = (A_b / K)(1 + d_bj)` if A_b >= 0 else `(A_b / K) e^{d_bj}`, `d = elbo - old_elbo`.

    Args:
        sample_elbo_BK: per-sample ELBOs `[B, K]` (nats), differentiable.
        old_sample_elbo_BK: the same under the old policy with the same masks; detached.
        advantages_B: `[B]`; detached.
        lengths: `[B]`, above 0: divides d (the port's form). None: the paper's.
        clip: (low, high): PPO's clip of the ratio `1 + d` or `e^d` to [1 - low, 1 + high]. None: the paper's, no clip.
        dual_clip: > 1: bounds the ratio from above for A < 0. None: off.
        tokens: `[B]`, of each completion up to its EOS: the mean over sequences becomes one over tokens, each sequence weighed
            by its number, as the port runs it (core_algos.py:385). None: the paper's mean over sequences.

    Gradients of the ratio: A >= 0 constant A/K, A < 0 `A e^d / K`, zero exactly where clipped (A > 0 and ratio > 1 + high, or
    A < 0 and ratio < 1 - low, or A < 0 and ratio > dual_clip). Raises ValueError naming the argument.

    Example:
        >>> elbo = torch.tensor([[-3.0, -4.0]], requires_grad=True)
        >>> bgpo(elbo, elbo.detach(), torch.tensor([2.0]))
        tensor(-2., grad_fn=<DivBackward0>)
    """
    checks.shape("sample_elbo_BK", sample_elbo_BK, [None, None])
    B, K = sample_elbo_BK.shape
    if B == 0 or K == 0:
        raise ValueError(f"sample_elbo_BK must hold at least one sequence and one sample, got shape {[B, K]}")
    checks.shape("old_sample_elbo_BK", old_sample_elbo_BK, [B, K])
    checks.shape("advantages_B", advantages_B, [B])
    if tokens is None:
        return _total(sample_elbo_BK, old_sample_elbo_BK, advantages_B, K, lengths, clip, dual_clip) / B
    checks.shape("tokens", tokens, [B])
    if checks.may_read(tokens) and not bool((tokens >= 0).all()):
        raise ValueError(f"tokens must be at least 0, got {float(tokens.min())}")
    total = _total(sample_elbo_BK, old_sample_elbo_BK, advantages_B, K, lengths, clip, dual_clip, tokens)
    return total / tokens.detach().sum().clamp(min=1)


def _total(
    elbo_BK: Tensor,
    old_elbo_BK: Tensor,
    advantages_B: Tensor,
    samples: int,
    lengths: Tensor | None,
    clip: tuple[float, float] | None,
    dual_clip: float | None,
    tokens_B: Tensor | None = None,
) -> Tensor:
    A_B1, old_BK = advantages_B.detach()[:, None], old_elbo_BK.detach()
    if lengths is not None:
        checks.shape("lengths", lengths, [len(elbo_BK)])
        if checks.may_read(lengths) and not bool((lengths > 0).all()):
            raise ValueError(f"lengths must be above 0, got {float(lengths.min())}")
        elbo_BK, old_BK = elbo_BK / lengths[:, None], old_BK / lengths[:, None]
    if dual_clip is not None:
        if not dual_clip > 1:
            raise ValueError(f"dual_clip must be above 1, got {dual_clip}")
        # on d, not on e^d: the gradient of an overflowing exp is NaN even where it is not taken
        bound_BK = old_BK + math.log(dual_clip)
        elbo_BK = torch.where((A_B1 < 0) & (elbo_BK > bound_BK), bound_BK, elbo_BK)
    terms_BK = bgpo_terms(elbo_BK, old_BK, A_B1)
    if clip is not None:
        low, high = clip
        if not 0 <= low < 1 or not high >= 0:
            raise ValueError(f"clip must be (low in [0, 1), high >= 0), got {clip}")
        bound_B1 = torch.where(A_B1 >= 0, A_B1 * (1 + high), A_B1 * (1 - low))
        # only strictly clipped terms are constants: at the bound the gradient stays whole, as PPO's with epsilon = 0
        terms_BK = torch.where(terms_BK > bound_B1, bound_B1, terms_BK)
    if tokens_B is not None:
        terms_BK = terms_BK * tokens_B.detach().to(terms_BK.dtype)[:, None]
    return -terms_BK.sum() / samples


def _objective(
    window: int | None, clip: tuple[float, float] | None, dual_clip: float | None, aggregate: Literal["tokens", "sequences"]
) -> Objective:
    def contributions(logp_N: Tensor, plan: MaskPlan, batch: Batch) -> Tensor:
        elbo_BK = plan.elbo(logp_N)
        old_elbo_BK = batch.per_sample.get("old_sample_elbo", elbo_BK.detach())
        lengths_B = None if window is None else torch.full_like(plan.lengths_B, window)
        tokens_B = plan.lengths_B if aggregate == "tokens" else None
        advantages_B = batch.per_sequence["advantages"]
        return _total(elbo_BK, old_elbo_BK, advantages_B, plan.samples, lengths_B, clip, dual_clip, tokens_B)

    return Objective(
        name="bgpo",
        contributions=contributions,
        coupling="sample",
        on_policy_coupling="none",
        denominator=aggregate,
        old_scores="old_sample_elbo",
        per_sequence=("advantages",),
        per_sample=("old_sample_elbo",),
        scale="advantages",
    )


BGPO = _objective(None, None, None, "sequences")


def bgpo_objective(
    *,
    window: int | None = None,
    clip_low: float | None = None,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    aggregate: str = "sequences",
) -> Objective:
    """BGPO for the engine: by default in the paper's form; the others are what the public port adds, which runs them all.

    Args:
        window: divides ELBOs, the port's length of the response window. None: by nothing.
        clip_low, clip_high: both or neither: PPO's clip of the ratio. dual_clip: > 1, bounds it for A < 0.
        aggregate: "sequences", or "tokens": each sequence weighs by its scored tokens.

    Entries: "advantages" `[B]`; "old_sample_elbo" `[B, K]`, absent on-policy. Raises ValueError or TypeError naming the option.
    """
    checks.choice("aggregate", aggregate, ("sequences", "tokens"))
    if window is not None:
        checks.count("window", window)
    if (clip_low is None) != (clip_high is None):
        raise ValueError(f"clip_low and clip_high must be given both or neither, got {clip_low} and {clip_high}")
    clip = None
    if clip_low is not None and clip_high is not None:
        check_clip(clip_low, clip_high, ("clip_low", "clip_high"))
        clip = (clip_low, clip_high)
    if dual_clip is not None and checks.number("dual_clip", dual_clip) <= 1:
        raise ValueError(f"dual_clip must be above 1, got {dual_clip}")
    if (window, clip, dual_clip, aggregate) == (None, None, None, "sequences"):
        return BGPO
    return _objective(window, clip, dual_clip, "tokens" if aggregate == "tokens" else "sequences")


RECIPE = Recipe(
    name="bgpo",
    title="BGPO: boundary-guided policy optimization for memory-efficient RL of diffusion LLMs",
    arxiv="2510.11683",
    status="verified against the paper",
    objective=bgpo_objective,
    law="exact",
    law_options={},
    samples=16,
    advantage="std",
    needs_old=True,
    needs_reference=False,
    inner_iterations=1,
    window="eos",
    tail="removed",
    notes="The paper's text was read in full, and two ports; its own repository is not reachable. Exact counts, stratified, are "
    "the port's, t ~ U[0, 1] the paper's. Groups of 8, 16 prompts, learning rate 5e-7, full fine-tuning, 32 samples for Sudoku.",
)
