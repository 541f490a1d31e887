"""UniGRPO: GRPO on mean log-probs of masked tokens at structured mask ratios (MMaDA, arXiv 2505.15809).

UNVERIFIED: no RL code is public (Gen-Verse/MMaDA at 3cdb870 has none), and the paper's equations were recollected from notes,
not checked. What is known: the prompt stays clean, a mask ratio t ~ U[0, 1] per response, uniformly spaced in the following
inner iterations; only masked tokens are scored and a sequence's log-likelihood is their mean; PPO's clip plus a KL. That the
KL is k3, and that the ratio is taken of the mean, are our choice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_kernels.accumulation.objective import Batch, Objective
from dllm_kernels.masks.plan import MaskPlan
from dllm_kernels.objectives.recipe import Clip, Recipe
from dllm_kernels.objectives.surrogates import check_policy, check_values, clipped_ratio_term, k3
from dllm_kernels.objectives.tokens import check_ratio_options, check_reference

__all__ = ["unigrpo", "unigrpo_objective"]


def unigrpo(
    mean_logp_BK: Tensor,
    old_mean_logp_BK: Tensor,
    ref_mean_logp_BK: Tensor | None,
    advantages_B: Tensor,
    *,
    epsilon: float = 0.2,
    beta: float = 0.01,
) -> Tensor:
    """`mean_bk (-min(rho A_b, clip(rho, 1 +- epsilon) A_b) + beta k3(s, ref))`, `rho = e^(s - old)`. Unverified, see above.

    Args:
        mean_logp_BK: s, the mean log-prob of the masked tokens of each sample `[B, K]`, float32 or float64, differentiable; 0
            for a sample that masks none.
        old_mean_logp_BK: the same of the policy that generated, with the same masks; `mean_logp_BK.detach()` on-policy.
        ref_mean_logp_BK: the same of the reference; None is allowed where beta is 0.
        advantages_B: `[B]`.

    Everything but mean_logp_BK is detached. The gradient of the surrogate is exactly 0 where it is strictly clipped, and -A at
    rho = 1 also with epsilon = 0. Raises TypeError or ValueError naming the argument.

    Example:
        >>> scores = torch.tensor([[-1.0, -2.0]], requires_grad=True)
        >>> unigrpo(scores, scores, scores, torch.tensor([2.0])).item()
        -2.0
    """
    sizes = check_policy("mean_logp_BK", mean_logp_BK, 2)
    check_ratio_options(epsilon, beta)
    check_values("old_mean_logp_BK", old_mean_logp_BK, sizes, mean_logp_BK)
    check_reference("ref_mean_logp_BK", ref_mean_logp_BK, sizes, mean_logp_BK, beta)
    check_values("advantages_B", advantages_B, sizes[:1], mean_logp_BK)
    return _terms(mean_logp_BK, old_mean_logp_BK, ref_mean_logp_BK, advantages_B, epsilon, beta).mean()


def _terms(mean_BK: Tensor, old_BK: Tensor, ref_BK: Tensor | None, advantages_B: Tensor, epsilon: float, beta: float) -> Tensor:
    terms_BK = -clipped_ratio_term(mean_BK - old_BK.detach(), advantages_B[:, None], epsilon, epsilon)
    if beta > 0:
        assert ref_BK is not None
        terms_BK = terms_BK + beta * k3(mean_BK - ref_BK.detach())
    return terms_BK


def unigrpo_objective(*, epsilon: float = 0.2, beta: float = 0.01) -> Objective:
    """UniGRPO for the engine, on plans of independent masks such as `bernoulli` with weight="L/count".

    Entries: "advantages" `[B]`; "old_sample_elbo" `[B, K]`, absent on-policy; "ref_sample_elbo" `[B, K]` where beta is above
    0. They are scores under the plan's own weights; the means of masked tokens are made here.
    """
    check_ratio_options(epsilon, beta)

    def contributions(logp_N: Tensor, plan: MaskPlan, batch: Batch) -> Tensor:
        elbo_BK = plan.elbo(logp_N)
        # an ELBO is the weighted sum over the masked tokens, so this many times their (weighted) mean
        times_BK = plan.elbo(torch.ones_like(logp_N)).detach()

        def means(scores_BK: Tensor) -> Tensor:
            return torch.where(times_BK > 0, scores_BK, 0.0) / torch.where(times_BK > 0, times_BK, 1.0)

        old_BK = batch.per_sample.get("old_sample_elbo", elbo_BK)
        ref_BK = batch.per_sample.get("ref_sample_elbo")
        ref_means_BK = None if ref_BK is None else means(ref_BK)
        terms_BK = _terms(means(elbo_BK), means(old_BK), ref_means_BK, batch.per_sequence["advantages"], epsilon, beta)
        return terms_BK.sum() / plan.samples

    return Objective(
        name="unigrpo",
        contributions=contributions,
        coupling="sample",
        on_policy_coupling="sample" if beta > 0 else "none",
        denominator="sequences",
        old_scores="old_sample_elbo",
        per_sequence=("advantages",),
        per_sample=("old_sample_elbo", "ref_sample_elbo") if beta > 0 else ("old_sample_elbo",),
        scale=None if beta > 0 else "advantages",
    )


RECIPE = Recipe(
    name="unigrpo",
    title="MMaDA: Multimodal Large Diffusion Language Models",
    arxiv="2505.15809",
    status="unverified",
    objective=unigrpo_objective,
    law="bernoulli",
    law_options={"weight": "L/count"},
    samples=1,
    advantage="std",
    needs_old=True,
    needs_reference=True,
    inner_iterations=1,
    clip=lambda options: Clip(options.epsilon, options.epsilon),
    window="completion",
    notes="No RL code is public and the paper's equations were not checked: form of the KL, advantages, hyper-parameters and the "
    "number of inner iterations are guesses. Mask ratios after the first inner iteration are uniformly spaced: give the "
    "law's t. dLLM-RL's random_masking is the closest form that runs.",
)
