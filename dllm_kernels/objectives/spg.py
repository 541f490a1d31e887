"""SPG: sandwiched policy gradient (arXiv 2510.09541, ICLR 2026).

A lower bound of the log-likelihood is raised for completions of positive advantage; for the others a mixture of it with an upper
bound (EUBO) is lowered, because lowering a lower bound need not lower the likelihood.

Verified against the public code (facebookresearch/SPG at a1c7120, spg/spg_trainer.py).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dllm_kernels import checks
from dllm_kernels.accumulation.objective import Batch, Objective
from dllm_kernels.masks.plan import MaskPlan
from dllm_kernels.objectives.recipe import Recipe
from dllm_kernels.objectives.surrogates import check_mask, check_policy, check_values, dense_logp, masked_sum

__all__ = ["spg", "spg_objective"]

NEGATIVES = ("mix", "elbo", "eubo", "zero")


def spg(
    sample_logp_BKL: Tensor,
    sample_mask_BKL: Tensor,
    advantages_B: Tensor,
    completion_mask_BL: Tensor,
    *,
    omega: float = 0.5,
    eubo_beta: float = 1.5,
    negative: str = "mix",
) -> Tensor:
    """`-sum_b A_b V_b len_b / sum_b len_b`, `len = sum_l c_l`; V is a mean log-prob from below or from above.

    With n_j masked completion tokens in sample j of K, `tau_j = n_j / len`, both sums over masked completion tokens (lines
    114-118 and 432-559 of the code):

        A > 0:  V = (1/K) sum_j (1/n_j) sum_l logp_jl                                                        (elbo)
        A <= 0: V = omega U + (1 - omega) elbo, `U = (1/beta) mean_{l: a_l > 0} log a_l`,
                `a_l = (1/K) sum_j p_jl^beta / tau_j` over the samples that mask l                           (mix)

    Args:
        sample_logp_BKL: log-probs `[B, K, L]`, float32 or float64, differentiable.
        sample_mask_BKL: bool, the tokens that each sample masks.
        advantages_B: `[B]`; the code's are r - mean of the group.
        completion_mask_BL: bool `[B, L]`, True up to and including the first EOS. What is outside, or not masked, may
            hold any score.
        omega: in [0, 1], the share of U. eubo_beta: beta, above 0; U is an upper bound from 1 on.
        negative: V where A <= 0: "mix"; "elbo"; "eubo", U alone; "zero", none.

    a_l is a log-sum-exp, so p^beta cannot underflow; the gradient of U at (j, l) is `softmax_j(beta logp_jl - log tau_j)` over
    the number of positions. A sample, or a completion, without a masked token contributes 0. Everything but sample_logp_BKL is
    detached. Raises TypeError or ValueError naming the argument.

    Example:
        >>> logp = torch.full((2, 2, 3), -1.0, requires_grad=True)
        >>> everything = torch.ones(2, 2, 3, dtype=torch.bool)
        >>> spg(logp, everything, torch.tensor([3.0, -1.0]), everything[:, 0]).item()
        1.0
    """
    sizes = check_policy("sample_logp_BKL", sample_logp_BKL, 3)
    _check_options(omega, eubo_beta, negative)
    B, _, L = sizes
    check_mask("sample_mask_BKL", sample_mask_BKL, sizes, sample_logp_BKL)
    check_mask("completion_mask_BL", completion_mask_BL, [B, L], sample_logp_BKL)
    check_values("advantages_B", advantages_B, [B], sample_logp_BKL)
    masked_BKL = sample_mask_BKL & completion_mask_BL[:, None]
    lengths_B = completion_mask_BL.sum(-1)
    total = _total(sample_logp_BKL, masked_BKL, advantages_B, lengths_B, omega, eubo_beta, negative)
    return total / lengths_B.sum().clamp(min=1)


def _total(
    logp_BKL: Tensor,
    masked_BKL: Tensor,
    advantages_B: Tensor,
    lengths_B: Tensor,
    omega: float,
    eubo_beta: float,
    negative: str,
) -> Tensor:
    advantages_B = advantages_B.detach()
    counts_BK = masked_BKL.sum(-1)
    lower_B = (masked_sum(logp_BKL, masked_BKL, -1) / counts_BK.clamp(min=1)).mean(-1)
    if negative == "elbo":
        other_B = lower_B
    elif negative == "zero":
        other_B = torch.zeros_like(lower_B)
    else:
        upper_B = _upper(logp_BKL, masked_BKL, counts_BK, lengths_B, eubo_beta)
        other_B = upper_B if negative == "eubo" else omega * upper_B + (1 - omega) * lower_B
    return -(advantages_B * torch.where(advantages_B > 0, lower_B, other_B) * lengths_B).sum()


def _upper(logp_BKL: Tensor, masked_BKL: Tensor, counts_BK: Tensor, lengths_B: Tensor, eubo_beta: float) -> Tensor:
    """U: `(1/beta)` times the mean of log a_l over the positions where a_l is above 0."""
    # a quotient of integers would be of fp32
    tau_BK = counts_BK.clamp(min=1).to(logp_BKL.dtype) / lengths_B.clamp(min=1)[:, None]
    log_tau_BK1 = tau_BK.log()[:, :, None]
    scaled_BKL = torch.where(masked_BKL, eubo_beta * logp_BKL - log_tau_BK1, -math.inf)
    positive_BL = (scaled_BKL != -math.inf).any(1)
    # where no sample masks a position, the log-sum-exp of nothing would put a NaN into the gradient
    log_a_BL = torch.logsumexp(torch.where(positive_BL[:, None], scaled_BKL, 0.0), 1) - math.log(logp_BKL.shape[1])
    return masked_sum(log_a_BL, positive_BL, -1) / positive_BL.sum(-1).clamp(min=1) / eubo_beta


def spg_objective(*, omega: float = 0.5, eubo_beta: float = 1.5, negative: str = "mix") -> Objective:
    """SPG for the engine, on plans of law `block`. Entries: "advantages" `[B]`; it has no old policy and no reference."""
    _check_options(omega, eubo_beta, negative)

    def contributions(logp_N: Tensor, plan: MaskPlan, batch: Batch) -> Tensor:
        if plan.shape[0] != plan.samples:
            raise ValueError(f"plan must hold all {plan.samples} samples of its sequences for spg, got {plan.shape[0]}")
        logp_BKS, scored_BKS = dense_logp(logp_N, plan).transpose(0, 1), plan.scored.transpose(0, 1)
        return _total(logp_BKS, scored_BKS, batch.per_sequence["advantages"], plan.lengths_B, omega, eubo_beta, negative)

    return Objective(
        name="spg",
        contributions=contributions,
        coupling="sequence",
        on_policy_coupling="sequence",
        denominator="tokens",
        old_scores=None,
        per_sequence=("advantages",),
        scale="advantages",
    )


def _check_options(omega: float, eubo_beta: float, negative: str) -> None:
    if checks.number("omega", omega, least=0) > 1:
        raise ValueError(f"omega must be in [0, 1], got {omega}")
    checks.number("eubo_beta", eubo_beta, above=0)
    checks.choice("negative", negative, NEGATIVES)


RECIPE = Recipe(
    name="spg",
    title="SPG: Sandwiched Policy Gradient for Masked Diffusion Language Models",
    arxiv="2510.09541",
    status="verified against the code",
    objective=spg_objective,
    law="block",
    law_options={"block_length": 32},
    samples=2,
    advantage="mean",
    needs_old=False,
    needs_reference=False,
    inner_iterations=4,
    window="eos",
    tail="hidden",
    notes="The code was read. Prompt noise 0.15, also on earlier blocks of the completion. eubo_beta 1 for Sudoku, 2 with "
    "negative='eubo' for Countdown. Groups of 6, learning rate 3e-6, LoRA, completions of 256 tokens.",
)
