"""CJ-GRPO: consistency-trajectory GRPO, every step of the rollout replayed exactly (arXiv 2509.23924).

The tokens that a step wrote are scored in the state that the rollout saw before it, edits and revocations included.

Verified against the code (yjyddq/EOSER-ASS-RL at 5affb4e, cj-grpo/cj_grpo_trainer_semiar.py, lines 85-151, 262-360, 400-434).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dllm_kernels.accumulation.objective import Batch, Objective
from dllm_kernels.masks import steps
from dllm_kernels.masks.plan import MaskPlan
from dllm_kernels.objectives.recipe import Recipe, Trajectory
from dllm_kernels.objectives.surrogates import check_mask, check_policy, check_values, dense_logp
from dllm_kernels.objectives.tokens import check_ratio_options, check_reference, old_and_reference, token_terms
from dllm_kernels.objectives.update import States
from dllm_kernels.rollouts.rollout import Rollout
from dllm_kernels.rollouts.trajectories import trajectory_rows

__all__ = ["cj_grpo", "cj_grpo_objective"]


def cj_grpo(
    logp_BL: Tensor,
    old_logp_BL: Tensor,
    ref_logp_BL: Tensor | None,
    advantages_B: Tensor,
    step_mask_BL: Tensor,
    *,
    epsilon: float = 0.5,
    beta: float = 0.04,
) -> Tensor:
    """`mean_b (1/|M_b|) sum_{l in M_b} [ -min(rho A, clip(rho, 1 +- epsilon) A) + beta k3(logp, ref) ]`, `rho = e^(logp - old)`.

    A row is a pair (sequence, step), M_b the tokens that the step wrote (lines 109-140 of the code, which divides by the step's
    tokens of the whole batch and by the number of steps: the same where all sequences take equally many steps, and a step
    writes equally many tokens in each).

    Args:
        logp_BL: log-probs `[B, L]` of what the step wrote, in the state before it, float32 or float64, differentiable.
        old_logp_BL, ref_logp_BL: the same of the policy that generated and of the reference, which may be None where beta is 0.
        advantages_B: `[B]`, reward minus its group's mean.
        step_mask_BL: bool `[B, L]`, M_b. The rest may hold anything. An empty row contributes 0 and is counted in B.
        epsilon, beta: the clip, in [0, 1], and the weight of the KL.

    Everything but logp_BL is detached. The gradient of a token is `-A rho / |M_b|`, 0 where it is strictly clipped. Raises
    TypeError or ValueError naming the argument.

    Example:
        >>> import torch
        >>> logp = torch.tensor([[-1.0, -2.0, -9.0]], requires_grad=True)
        >>> cj_grpo(logp, logp, logp, torch.tensor([2.0]), torch.tensor([[True, True, False]])).backward()
        >>> logp.grad
        tensor([[-1., -1.,  0.]])
    """
    check_ratio_options(epsilon, beta)
    sizes = check_policy("logp_BL", logp_BL, 2)
    check_mask("step_mask_BL", step_mask_BL, sizes, logp_BL)
    check_values("old_logp_BL", old_logp_BL, sizes, logp_BL, where=step_mask_BL)
    check_reference("ref_logp_BL", ref_logp_BL, sizes, logp_BL, beta, where=step_mask_BL)
    check_values("advantages_B", advantages_B, sizes[:1], logp_BL)
    options = {"epsilon": epsilon, "beta": beta}
    terms_BL = token_terms(logp_BL, old_logp_BL, ref_logp_BL, advantages_B[:, None], step_mask_BL, **options)
    return (terms_BL / step_mask_BL.sum(-1, keepdim=True).clamp(min=1)).sum(-1).mean()


def cj_grpo_objective(*, epsilon: float = 0.5, beta: float = 0.04) -> Objective:
    """`cj_grpo` for the engine, on plans of law `trace`; its denominator is the number of pairs (sequence, step) with a token.

    That number is `masks.steps.number(plan)`, summed over the plans of an optimizer step. Entries: "advantages" `[B]`;
    "old_logp" `[B, K, S]`, absent on-policy; "ref_logp" `[B, K, S]` where beta is above 0.
    """
    check_ratio_options(epsilon, beta)

    def contributions(logp_N: Tensor, plan: MaskPlan, batch: Batch) -> Tensor:
        logp_KBS = dense_logp(logp_N, plan)
        old_KBS, ref_KBS = old_and_reference(batch, logp_KBS)
        advantages_B1 = batch.per_sequence["advantages"][:, None]
        terms_KBS = token_terms(logp_KBS, old_KBS, ref_KBS, advantages_B1, plan.scored, epsilon=epsilon, beta=beta)
        return (terms_KBS / steps.sizes(plan).clamp(min=1)).sum()

    return Objective(
        name="cj_grpo",
        contributions=contributions,
        coupling="token",
        on_policy_coupling="token" if beta > 0 else "none",
        denominator="steps",
        old_scores="old_logp",
        per_sequence=("advantages",),
        per_token=("old_logp", "ref_logp") if beta > 0 else ("old_logp",),
        scale=None if beta > 0 else "advantages",
    )


def _every_step(rollout: Rollout, options: Any, seed: int) -> States:
    return States(rollout, trajectory_rows(rollout, score="all_events" if rollout.edited else "last"))


def _step_tokens(options: Any, length: int, steps: int) -> int:
    return -(-length // steps)


RECIPE = Recipe(
    name="cj_grpo",
    title="Taming Masked Diffusion Language Models via Consistency Trajectory RL with Fewer Decoding Steps",
    arxiv="2509.23924",
    status="verified against the code",
    objective=cj_grpo_objective,
    law="trace",
    law_options={},
    samples=None,
    advantage="mean",
    needs_old=True,
    needs_reference=True,
    inner_iterations=12,
    trajectory=Trajectory(_every_step, _step_tokens),
    window="completion",
    notes="The code was read, of the paper the abstract. Its decoding (EOSER, ascending step sizes) is a rollout's. Groups of 6, "
    "learning rate 3e-6, LoRA, 256 tokens in 128 steps, temperature 1.",
)
