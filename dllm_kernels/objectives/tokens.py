"""What the objectives with a ratio per token share: their checks and the term of a token."""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_kernels import checks
from dllm_kernels.accumulation.objective import Batch, Objective
from dllm_kernels.masks.plan import MaskPlan
from dllm_kernels.objectives.surrogates import (
    check_clip,
    check_mask,
    check_policy,
    check_values,
    clipped_ratio_term,
    dense_logp,
    k3,
    masked_difference,
)


def token_terms(
    logp: Tensor, old: Tensor, ref: Tensor | None, advantages: Tensor, mask: Tensor, *, epsilon: float, beta: float
) -> Tensor:
    """`-min(rho A, clip(rho, 1 +- epsilon) A) + beta k3(logp, ref)` with `rho = e^(logp - old)` where mask, 0 elsewhere.

    All broadcast; old, ref and advantages are detached. ref may be None where beta is 0.
    """
    terms = -clipped_ratio_term(masked_difference(logp, old, mask), advantages, epsilon, epsilon)
    if beta > 0:
        assert ref is not None
        terms = terms + beta * k3(masked_difference(logp, ref, mask))
    return torch.where(mask, terms, 0.0)


def mean_token_loss(
    names: tuple[str, str, str],
    score_BL: Tensor,
    old_BL: Tensor,
    ref_BL: Tensor | None,
    advantages_B: Tensor,
    completion_mask_BL: Tensor,
    selected_BL: Tensor,
    *,
    epsilon: float,
    beta: float,
) -> Tensor:
    """Sum of the `token_terms` of the selected tokens over the number of completion tokens (at least 1).

    `names` are those of the first three arguments, to blame.
    """
    sizes = check_policy(names[0], score_BL, 2)
    check_ratio_options(epsilon, beta)
    check_mask("completion_mask_BL", completion_mask_BL, sizes, score_BL)
    check_values(names[1], old_BL, sizes, score_BL, where=completion_mask_BL)
    check_reference(names[2], ref_BL, sizes, score_BL, beta, where=completion_mask_BL)
    check_values("advantages_B", advantages_B, sizes[:1], score_BL)
    terms_BL = token_terms(score_BL, old_BL, ref_BL, advantages_B[:, None], selected_BL, epsilon=epsilon, beta=beta)
    return terms_BL.sum() / completion_mask_BL.sum().clamp(min=1)


def check_ratio_options(epsilon: float, beta: float) -> None:
    check_clip(epsilon, epsilon)
    checks.number("beta", beta, least=0)


def check_reference(
    name: str, ref: Tensor | None, sizes: list[int], policy: Tensor, beta: float, *, where: Tensor | None = None
) -> None:
    """Raises ValueError where the KL term has a weight but no reference."""
    if ref is not None:
        check_values(name, ref, sizes, policy, where=where)
    elif beta > 0:
        raise ValueError(f"{name} must be given where beta is above 0, got None and beta={beta}")


def old_and_reference(batch: Batch, current_KBS: Tensor) -> tuple[Tensor, Tensor | None]:
    """`[K, B, S]` log-probs of the old policy, which is the current one where none are given, and of the reference."""
    old_BKS, ref_BKS = batch.per_sample.get("old_logp"), batch.per_sample.get("ref_logp")
    old_KBS = current_KBS if old_BKS is None else old_BKS.transpose(0, 1)
    return old_KBS, None if ref_BKS is None else ref_BKS.transpose(0, 1)


def shares_K11(plan: MaskPlan, like: Tensor) -> Tensor:
    """The weight of each sample in its sequence's score, `[K, 1, 1]`."""
    return plan.share_K.to(like.dtype)[:, None, None]


def token_objective(name: str, epsilon: float, beta: float) -> Objective:
    """The sum over rows of their `token_terms`, each weighed by its sample's share; divided by completion tokens."""
    check_ratio_options(epsilon, beta)

    def contributions(logp_N: Tensor, plan: MaskPlan, batch: Batch) -> Tensor:
        logp_KBS = dense_logp(logp_N, plan)
        old_KBS, ref_KBS = old_and_reference(batch, logp_KBS)
        advantages_B1 = batch.per_sequence["advantages"][:, None]
        terms_KBS = token_terms(logp_KBS, old_KBS, ref_KBS, advantages_B1, plan.scored, epsilon=epsilon, beta=beta)
        return (terms_KBS * shares_K11(plan, terms_KBS)).sum()

    return Objective(
        name=name,
        contributions=contributions,
        coupling="token",
        on_policy_coupling="token" if beta > 0 else "none",
        denominator="tokens",
        old_scores="old_logp",
        per_sequence=("advantages",),
        per_token=("old_logp", "ref_logp") if beta > 0 else ("old_logp",),
        scale=None if beta > 0 else "advantages",
    )
