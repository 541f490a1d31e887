"""BGPO: Boundary-guided policy optimization (arXiv 2510.11683, ACL 2026).

The ELBO-ratio objective `A exp(mean_j d_j)` couples all Monte-Carlo samples. BGPO maximises a lower bound of it that is a
sum over samples, so backward can run sample by sample at constant memory.

Verified against the paper's text; `lengths`, `clip` and `dual_clip` are what the public port (yjyddq/DARE) adds.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dllm_kernels import checks
from dllm_kernels.accumulation.objective import Batch, Objective
from dllm_kernels.losses import bgpo_terms
from dllm_kernels.masks.plan import MaskPlan
from dllm_kernels.objectives.recipe import Recipe

__all__ = ["BGPO", "bgpo", "bgpo_objective"]


def bgpo(
    sample_elbo_BK: Tensor,
    old_sample_elbo_BK: Tensor,
    advantages_B: Tensor,
    *,
    lengths: Tensor | None = None,
    clip: tuple[float, float] | None = None,
    dual_clip: float | None = None,
) -> Tensor:
    """`-mean_b sum_j g_bj`, `g_bj = (A_b / K)(1 + d_bj)` if A_b >= 0 else `(A_b / K) e^{d_bj}`, `d = elbo - old_elbo`.

    Args:
        sample_elbo_BK: per-sample ELBOs `[B, K]` (nats), differentiable.
        old_sample_elbo_BK: the same under the old policy with the same masks; detached.
        advantages_B: `[B]`; detached.
        lengths: `[B]`, above 0: divides d (the port's form). None: the paper's.
        clip: (low, high): PPO's clip of the ratio `1 + d` or `e^d` to [1 - low, 1 + high]. None: the paper's, no clip.
        dual_clip: > 1: bounds the ratio from above for A < 0. None: off.

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
    return _total(sample_elbo_BK, old_sample_elbo_BK, advantages_B, K, lengths, clip, dual_clip) / B


def _total(
    elbo_BK: Tensor,
    old_elbo_BK: Tensor,
    advantages_B: Tensor,
    samples: int,
    lengths: Tensor | None,
    clip: tuple[float, float] | None,
    dual_clip: float | None,
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
    return -terms_BK.sum() / samples


def _contributions(logp_N: Tensor, plan: MaskPlan, batch: Batch) -> Tensor:
    elbo_BK = plan.elbo(logp_N)
    old_elbo_BK = batch.per_sample.get("old_sample_elbo", elbo_BK.detach())
    return _total(elbo_BK, old_elbo_BK, batch.per_sequence["advantages"], plan.samples, None, None, None)


BGPO = Objective(
    name="bgpo",
    contributions=_contributions,
    coupling="sample",
    on_policy_coupling="none",
    denominator="sequences",
    old_scores="old_sample_elbo",
    per_sequence=("advantages",),
    per_sample=("old_sample_elbo",),
    scale="advantages",
)


def bgpo_objective() -> Objective:
    """BGPO in the paper's form for the engine. Entries: "advantages" `[B]`; "old_sample_elbo" `[B, K]`, absent on-policy."""
    return BGPO


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
