"""diffu-GRPO: a token-level GRPO on one-step log-probs (d1, arXiv 2504.12216).

One forward with the whole completion hidden, and prompt tokens hidden with probability 0.15, scores every token at once: a
mean-field approximation of the sequence's likelihood, not an ELBO.

Verified against the public code (dllm-reasoning/d1 at 837888f, diffu-grpo/diffu_grpo_trainer.py).
"""

from __future__ import annotations

from torch import Tensor

from dllm_kernels.accumulation.objective import Objective
from dllm_kernels.objectives.recipe import Recipe
from dllm_kernels.objectives.tokens import mean_token_loss, token_objective

__all__ = ["diffu_grpo", "diffu_grpo_objective"]


def diffu_grpo(
    logp_BL: Tensor,
    old_logp_BL: Tensor,
    ref_logp_BL: Tensor | None,
    advantages_B: Tensor,
    completion_mask_BL: Tensor,
    *,
    epsilon: float = 0.5,
    beta: float = 0.04,
) -> Tensor:
    """`sum_bl c_bl (-min(rho A_b, clip(rho, 1 +- epsilon) A_b) + beta k3(logp, ref)) / sum_bl c_bl`, `rho = e^(logp - old)`.

    `k3 = e^(ref - logp) - (ref - logp) - 1` (lines 96-121 of the code, which divides by the tokens of a micro-batch).

    Args:
        logp_BL: log-prob of each token under the policy `[B, L]`, float32 or float64, differentiable.
        old_logp_BL: the same of the policy that generated, with the same masks; `logp_BL.detach()` on-policy.
        ref_logp_BL: the same of the reference; None is allowed where beta is 0.
        advantages_B: `[B]`; the code's are r - mean of the group.
        completion_mask_BL: bool `[B, L]`, True up to and including the first EOS. The rest may hold anything.

    Everything but logp_BL is detached. The gradient of a token is `-A rho`, exactly 0 where it is strictly clipped, and -A at
    rho = 1 also with epsilon = 0. No token at all: 0. Raises TypeError or ValueError naming the argument.

    Example:
        >>> import torch
        >>> logp = torch.tensor([[-1.0, -2.0]], requires_grad=True)
        >>> mask = torch.tensor([[True, False]])
        >>> loss = diffu_grpo(logp, logp, logp, torch.tensor([2.0]), mask)
        >>> loss.backward()
        >>> loss.item(), logp.grad
        (-2.0, tensor([[-2.,  0.]]))
    """
    return mean_token_loss(
        ("logp_BL", "old_logp_BL", "ref_logp_BL"),
        logp_BL,
        old_logp_BL,
        ref_logp_BL,
        advantages_B,
        completion_mask_BL,
        completion_mask_BL,
        epsilon=epsilon,
        beta=beta,
    )


def diffu_grpo_objective(*, epsilon: float = 0.5, beta: float = 0.04) -> Objective:
    """diffu-GRPO for the engine, on plans of law `full`; their K samples are averaged.

    Entries: "advantages" `[B]`; "old_logp" `[B, K, S]`, absent on-policy; "ref_logp" `[B, K, S]` where beta is above 0.
    """
    return token_objective("diffu_grpo", epsilon, beta)


RECIPE = Recipe(
    name="diffu_grpo",
    title="d1: Scaling Reasoning in Diffusion Large Language Models via Reinforcement Learning",
    arxiv="2504.12216",
    status="verified against the code",
    objective=diffu_grpo_objective,
    law="full",
    law_options={},
    samples=1,
    advantage="mean",
    needs_old=True,
    needs_reference=True,
    inner_iterations=12,
    window="eos",
    tail="hidden",
    notes="The code was read. Prompt noise 0.15, a new one per inner iteration, shared by policy, old and reference. "
    "Groups of 6, learning rate 3e-6, LoRA, completions of 256 tokens.",
)
