"""GDSD: the log-ratio per token is drawn onto the advantage by regression (arXiv 2605.29398).

Verified against the code (GaryBall/GDSD at 3fb6780, gdsd/trainers/gdsd_trainer_batchll.py); of its two trainers this is the
one that `rl_loss_type: gdsd` names, the other (`gdsd_tlc`) is left out. The paper's text was not read.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dllm_kernels import checks
from dllm_kernels.accumulation.objective import Batch, Objective
from dllm_kernels.masks.plan import MaskPlan
from dllm_kernels.objectives import surrogates
from dllm_kernels.objectives.recipe import Recipe
from dllm_kernels.objectives.tokens import check_reference, old_and_reference

__all__ = ["gdsd", "gdsd_objective"]


def gdsd(
    score_BM: Tensor,
    old_score_BM: Tensor,
    ref_score_BM: Tensor | None,
    advantages_B: Tensor,
    lengths_B: Tensor,
    *,
    psi: float = 1.0,
    epsilon_low: float = 0.0004,
    epsilon_high: float = 0.0004,
    beta: float = 0.001,
) -> Tensor:
    """`mean_b [sum_m (clamp(d_bm, log(1 - epsilon_low), log(1 + epsilon_high)) / L_b - psi A_b)^2 + (beta / L_b) mean_m k2_bm]`.

    `d = score - old_score`, `k2 = (score - ref_score)^2 / 2` (lines 190-198 of the code). A score is half the sum of the
    log-probs of all tokens, each under the one mask of a complementary pair that hides it, with no weight.

    Args:
        score_BM: scores `[B, M]` (nats) of M pairs of masks, float32 or float64, differentiable.
        old_score_BM: the same of the policy that generated; `score_BM.detach()` on-policy.
        ref_score_BM: the same of the reference; None is allowed where beta is 0.
        advantages_B: `[B]`; the code's are leave-one-out.
        lengths_B: `[B]`, L, in the code the whole window; where 0, 1 is used.
        psi: how far the log-ratio per token follows the advantage. epsilon_low in [0, 1), epsilon_high: bounds of d, beyond
            which the regression has no gradient. beta: of the KL.

    Everything but score_BM is detached. Raises TypeError or ValueError naming the argument.

    Example:
        >>> score = torch.tensor([[-4.0]], requires_grad=True)
        >>> gdsd(score, score, score, torch.tensor([0.5]), torch.tensor([4])).backward()
        >>> score.grad
        tensor([[-0.2500]])
    """
    sizes = surrogates.check_policy("score_BM", score_BM, 2)
    surrogates.check_values("old_score_BM", old_score_BM, sizes, score_BM)
    surrogates.check_values("advantages_B", advantages_B, sizes[:1], score_BM)
    divisor_B = surrogates.divisors("lengths_B", lengths_B, sizes[:1], score_BM)
    _check_options(psi, epsilon_low, epsilon_high, beta)
    check_reference("ref_score_BM", ref_score_BM, sizes, score_BM, beta)
    total = _total(score_BM, old_score_BM, ref_score_BM, advantages_B, divisor_B, psi, epsilon_low, epsilon_high, beta)
    return total / sizes[0]


def _check_options(psi: float, epsilon_low: float, epsilon_high: float, beta: float) -> None:
    checks.number("psi", psi)
    surrogates.check_clip(epsilon_low, epsilon_high, ("epsilon_low", "epsilon_high"))
    if epsilon_low >= 1:
        raise ValueError(f"epsilon_low must be below 1, whose logarithm bounds the ratio's, got {epsilon_low}")
    checks.number("beta", beta, least=0)


def _total(
    score_BM: Tensor,
    old_BM: Tensor,
    ref_BM: Tensor | None,
    advantages_B: Tensor,
    divisor_B: Tensor,
    psi: float,
    epsilon_low: float,
    epsilon_high: float,
    beta: float,
) -> Tensor:
    divisor_B1 = divisor_B[:, None]
    delta_BM = (score_BM - old_BM.detach()).clamp(math.log1p(-epsilon_low), math.log1p(epsilon_high))
    loss_B = (delta_BM / divisor_B1 - psi * advantages_B.detach()[:, None]).square().sum(-1)
    if beta > 0 and ref_BM is not None:
        loss_B = loss_B + beta * (surrogates.k2(score_BM - ref_BM.detach()) / divisor_B1).mean(-1)
    return loss_B.sum()


def gdsd_objective(
    *, psi: float = 1.0, epsilon_low: float = 0.0004, epsilon_high: float = 0.0004, beta: float = 0.001
) -> Objective:
    """`gdsd` for the engine, on plans of complementary pairs, whose weights it does not take.

    Entries: "advantages" `[B]`; "old_logp" `[B, K, S]`, absent on-policy; "ref_logp" `[B, K, S]` where beta is above 0. A
    sequence without a token contributes its constant. Raises ValueError for plans without pairs.
    """
    _check_options(psi, epsilon_low, epsilon_high, beta)

    def contributions(logp_N: Tensor, plan: MaskPlan, batch: Batch) -> Tensor:
        if plan.rule.pairs_from != 0 or plan.shape[0] != plan.samples:
            raise ValueError(
                f"plan must hold all samples of a law of pairs such as 'antithetic' for gdsd, got {plan.shape[0]} of "
                f"{plan.samples} of {plan.law!r}"
            )
        logp_KBS = surrogates.dense_logp(logp_N, plan)
        old_KBS, ref_KBS = old_and_reference(batch, logp_KBS)

        def scores(dense_KBS: Tensor) -> Tensor:
            sums_BK = torch.where(plan.scored, dense_KBS.double(), 0.0).sum(-1).t()[:, torch.argsort(plan.sample_K)]
            return sums_BK.unflatten(1, (-1, 2)).sum(-1) / 2

        ref_BM = None if ref_KBS is None else scores(ref_KBS)
        divisor_B = plan.lengths_B.to(logp_KBS.dtype).clamp(min=1.0)
        advantages_B = batch.per_sequence["advantages"]
        current_BM, old_BM = scores(logp_KBS), scores(old_KBS)
        return _total(current_BM, old_BM, ref_BM, advantages_B, divisor_B, psi, epsilon_low, epsilon_high, beta)

    return Objective(
        name="gdsd",
        contributions=contributions,
        coupling="sequence",
        on_policy_coupling="sequence",
        denominator="sequences",
        old_scores="old_logp",
        per_sequence=("advantages",),
        per_token=("old_logp", "ref_logp") if beta > 0 else ("old_logp",),
        scale=None,  # without an advantage the ratio is still drawn to 1
    )


RECIPE = Recipe(
    name="gdsd",
    title="GDSD: regression of the diffusion model's log-ratio onto the advantage",
    arxiv="2605.29398",
    status="verified against the code",
    objective=gdsd_objective,
    law="antithetic",
    law_options={"weight": "espo"},
    samples=2,
    advantage="loo",
    needs_old=True,
    needs_reference=True,
    inner_iterations=8,
    window="completion",
    notes="The code was read, of the paper nothing. Counts of 0..L, stratified over the code's batch, here over a sequence's "
    "pairs. One pair a sequence, 6 completions a prompt, learning rate 3e-6; psi 1 and epsilon 0.0004 on Sudoku.",
)
