"""coupled-GRPO: token-level GRPO on scores of a full mask and of complementary masks (DiffuCoder, arXiv 2506.20639).

Verified against the public code (apple/ml-diffucoder at f735e01, src/open_r1/coupled_grpo.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_kernels import checks
from dllm_kernels.accumulation.objective import Batch, Objective
from dllm_kernels.masks.plan import MaskPlan
from dllm_kernels.objectives.recipe import Recipe
from dllm_kernels.objectives.surrogates import check_mask, check_policy, check_values, dense_logp
from dllm_kernels.objectives.tokens import check_ratio_options, mean_token_loss, old_and_reference, shares_K11, token_terms

__all__ = ["coupled_grpo", "coupled_grpo_objective", "coupled_scores"]


def coupled_scores(logp_full_BL: Tensor, logp_pair_BL: Tensor, first_mask_BL: Tensor, t: float | Tensor) -> Tensor:
    """`s_l = (logp_l with everything hidden + w_l logp_l under the mask that hides l) / 2`, `[B, L]`.

    Of a mask drawn with probability t and its complement, each token is hidden by one: `w_l = 1/t` where the first hides it,
    `1/(1 - t)` where the complement does (lines 59-131 of the code). Not a log-prob: about 1.5 of one at t = 0.5.

    Args:
        logp_full_BL: log-probs with the whole completion hidden, float32 or float64, differentiable.
        logp_pair_BL: log-probs under the mask of the pair that hides the token; differentiable.
        first_mask_BL: bool, where that is the first mask of the pair.
        t: in (0, 1): a number, or a tensor of one value or of `[B]`; the code draws one for the whole batch.

    Raises TypeError or ValueError naming the argument.

    Example:
        >>> logp = torch.tensor([[-1.0, -2.0]])
        >>> coupled_scores(logp, logp, torch.tensor([[True, False]]), 0.25)
        tensor([[-2.5000, -2.3333]])
    """
    sizes = check_policy("logp_full_BL", logp_full_BL, 2)
    check_policy("logp_pair_BL", logp_pair_BL, 2)
    checks.shape("logp_pair_BL", logp_pair_BL, sizes)
    checks.same_device("logp_pair_BL", logp_pair_BL, "the policy's scores", logp_full_BL)
    check_mask("first_mask_BL", first_mask_BL, sizes, logp_full_BL)
    if isinstance(t, Tensor):
        check_values("t", t, sizes[:1] if t.dim() else [], logp_full_BL)
        if checks.may_read(t) and not bool(((t > 0) & (t < 1)).all()):
            raise ValueError(f"t must be in (0, 1), got values from {float(t.min())} to {float(t.max())}")
        first_weight = 1.0 / t.detach().to(logp_full_BL.dtype).reshape(-1, 1)
        second_weight = 1.0 / (1.0 - t.detach().to(logp_full_BL.dtype).reshape(-1, 1))
    else:
        if checks.number("t", t, above=0) >= 1:
            raise ValueError(f"t must be in (0, 1), got {t}")
        # tensors: torch.where makes float32 of two numbers
        first_weight, second_weight = logp_full_BL.new_tensor(1.0 / t), logp_full_BL.new_tensor(1.0 / (1.0 - t))
    return 0.5 * (logp_full_BL + torch.where(first_mask_BL, first_weight, second_weight) * logp_pair_BL)


def coupled_grpo(
    score_BL: Tensor,
    old_score_BL: Tensor,
    ref_score_BL: Tensor | None,
    advantages_B: Tensor,
    completion_mask_BL: Tensor,
    *,
    epsilon: float = 0.5,
    beta: float = 0.01,
) -> Tensor:
    """`sum_bl c_bl (-min(rho A_b, clip(rho, 1 +- epsilon) A_b) + beta k3(s, ref)) / sum_bl c_bl`, `rho = e^(s - old)`.

    diffu-GRPO's loss with `coupled_scores` in the place of log-probs (lines 182-252 of the code).

    Args:
        score_BL: `coupled_scores` of the policy `[B, L]`, float32 or float64, differentiable.
        old_score_BL: of the policy that generated, with the same masks; `score_BL.detach()` on-policy.
        ref_score_BL: of the reference; None is allowed where beta is 0.
        advantages_B: `[B]`; the code's are leave-one-out, without std.
        completion_mask_BL: bool `[B, L]`, True up to and including the first EOS. The rest may hold anything.

    Everything but score_BL is detached. The gradient of a score is `-A rho`, exactly 0 where it is strictly clipped, and -A at
    rho = 1 also with epsilon = 0. No token at all: 0. Raises TypeError or ValueError naming the argument.

    Example:
        >>> score = torch.tensor([[-1.0, -2.0]], requires_grad=True)
        >>> coupled_grpo(score, score, score, torch.tensor([2.0]), torch.tensor([[True, True]])).item()
        -2.0
    """
    return mean_token_loss(
        ("score_BL", "old_score_BL", "ref_score_BL"),
        score_BL,
        old_score_BL,
        ref_score_BL,
        advantages_B,
        completion_mask_BL,
        completion_mask_BL,
        epsilon=epsilon,
        beta=beta,
    )


def coupled_grpo_objective(*, epsilon: float = 0.5, beta: float = 0.01) -> Objective:
    """coupled-GRPO for the engine, on plans of law `coupled`: K = 3, or 1 + 2 pairs, whose halves are averaged.

    Entries: "advantages" `[B]`; "old_logp" `[B, K, S]`, absent on-policy; "ref_logp" `[B, K, S]` where beta is above 0. They
    are log-probs of rows; the scores are made here.
    """
    check_ratio_options(epsilon, beta)

    def contributions(logp_N: Tensor, plan: MaskPlan, batch: Batch) -> Tensor:
        logp_KBS = dense_logp(logp_N, plan)
        old_KBS, ref_KBS = old_and_reference(batch, logp_KBS)
        weight_KBS = plan.dense(plan.rows.weight.to(logp_N.dtype)) * shares_K11(plan, logp_N)

        def scores(dense_KBS: Tensor) -> Tensor:
            return (torch.where(plan.scored, dense_KBS, 0.0) * weight_KBS).sum(0)

        return token_terms(
            scores(logp_KBS),
            scores(old_KBS),
            None if ref_KBS is None else scores(ref_KBS),
            batch.per_sequence["advantages"][:, None],
            plan.completion_mask_BS,
            epsilon=epsilon,
            beta=beta,
        ).sum()

    return Objective(
        name="coupled_grpo",
        contributions=contributions,
        coupling="sequence",
        on_policy_coupling="sequence" if beta > 0 else "none",
        denominator="tokens",
        old_scores="old_logp",
        per_sequence=("advantages",),
        per_token=("old_logp", "ref_logp") if beta > 0 else ("old_logp",),
        scale=None if beta > 0 else "advantages",
    )


RECIPE = Recipe(
    name="coupled_grpo",
    title="DiffuCoder: Understanding and Improving Masked Diffusion Models for Code Generation",
    arxiv="2506.20639",
    status="verified against the code",
    objective=coupled_grpo_objective,
    law="coupled",
    law_options={"t_low": 0.2, "t_high": 0.8},
    samples=3,
    advantage="loo",
    needs_old=True,
    needs_reference=True,
    inner_iterations=2,
    window="eos",
    tail="hidden",
    notes="The code was read; it draws one t for the whole batch, the law one per sequence. Groups of 10, learning rate 1e-6 "
    "to 10 % by a cosine, full fine-tuning, completions of 256 tokens, temperature 1.",
)
