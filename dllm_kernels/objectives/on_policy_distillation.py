"""On-policy distillation: the student's own rollouts, scored by a larger model of the same vocabulary (arXiv 2306.13649).

The gradient of `KL(student || teacher)` in the states that the student itself came through, estimated from the token that it
drew there: `E_q[(log q - log p) d log q]`. The teacher takes the place of the reference policy. The papers' models are
autoregressive; neither GKD's text nor code was read for this, nor that of MiniLLM (arXiv 2306.08543), whose estimator it is.
`dllm_kernels.distillation_loss` has the divergence over the whole vocabulary instead, for loops that hold both models.
"""

from __future__ import annotations

from torch import Tensor

from dllm_kernels.accumulation.objective import Batch, Objective
from dllm_kernels.masks.plan import MaskPlan
from dllm_kernels.objectives.recipe import Recipe, Trajectory
from dllm_kernels.objectives.surrogates import check_clip, check_mask, check_policy, check_values, dense_logp
from dllm_kernels.objectives.tokens import old_and_reference, token_terms
from dllm_kernels.objectives.update import States, later_signal
from dllm_kernels.rollouts.rollout import Rollout
from dllm_kernels.rollouts.trajectories import trajectory_rows

__all__ = ["on_policy_distillation", "on_policy_distillation_objective"]


def on_policy_distillation(
    logp_BL: Tensor, old_logp_BL: Tensor, teacher_logp_BL: Tensor, completion_mask_BL: Tensor, *, epsilon: float = 0.2
) -> Tensor:
    """Mean over completion tokens of `-min(rho A, clip(rho, 1 +- epsilon) A)`, `A = teacher - old`, `rho = e^(logp - old)`.

    On-policy its gradient is that of `KL(student || teacher)` per token, in expectation over tokens drawn from the student.

    Args:
        logp_BL: the student's log-probs `[B, L]` of the tokens in the states that drew them, float32 or float64, differentiable.
        old_logp_BL: the same of the policy that generated; `logp_BL.detach()` on-policy.
        teacher_logp_BL: the same of the teacher, in the same states.
        completion_mask_BL: bool `[B, L]`. The rest may hold anything.
        epsilon: the clip.

    Everything but logp_BL is detached. Raises TypeError or ValueError naming the argument.

    Example:
        >>> import torch
        >>> logp = torch.tensor([[-1.0, -2.0]], requires_grad=True)
        >>> on_policy_distillation(logp, logp, torch.tensor([[-1.5, -1.0]]), torch.tensor([[True, True]])).backward()
        >>> logp.grad
        tensor([[ 0.2500, -0.5000]])
    """
    sizes = check_policy("logp_BL", logp_BL, 2)
    check_clip(epsilon, epsilon)
    check_mask("completion_mask_BL", completion_mask_BL, sizes, logp_BL)
    check_values("old_logp_BL", old_logp_BL, sizes, logp_BL, where=completion_mask_BL)
    check_values("teacher_logp_BL", teacher_logp_BL, sizes, logp_BL, where=completion_mask_BL)
    return _sum(logp_BL, old_logp_BL, teacher_logp_BL, completion_mask_BL, epsilon) / completion_mask_BL.sum().clamp(min=1)


def _sum(logp: Tensor, old: Tensor, teacher: Tensor, mask: Tensor, epsilon: float) -> Tensor:
    advantages = (teacher.detach() - old.detach()).masked_fill(~mask, 0.0)
    return token_terms(logp, old, None, advantages, mask, epsilon=epsilon, beta=0.0).sum()


def on_policy_distillation_objective(*, epsilon: float = 0.2) -> Objective:
    """`on_policy_distillation` for the engine, on plans of law `trace`; divided by completion tokens.

    Entries: "ref_logp" `[B, K, S]`, the teacher's scores (`score_samples(teacher, plan, per_token=True)`); "old_logp" likewise,
    absent on-policy.
    """
    check_clip(epsilon, epsilon)

    def contributions(logp_N: Tensor, plan: MaskPlan, batch: Batch) -> Tensor:
        logp_KBS = dense_logp(logp_N, plan)
        old_KBS, teacher_KBS = old_and_reference(batch, logp_KBS)
        assert teacher_KBS is not None
        return _sum(logp_KBS, old_KBS, teacher_KBS, plan.scored, epsilon)

    return Objective(
        name="on_policy_distillation",
        contributions=contributions,
        coupling="token",
        on_policy_coupling="token",  # the advantage is the current policy's own
        denominator="tokens",
        old_scores="old_logp",
        per_token=("old_logp", "ref_logp"),
    )


def _single_steps(rollout: Rollout, options: object, seed: int) -> States:
    return States(rollout, trajectory_rows(rollout))


RECIPE = Recipe(
    name="on_policy_distillation",
    title="On-policy distillation: reverse KL to a teacher at the states of the student's rollouts",
    arxiv="2306.13649",
    status="unverified",
    objective=on_policy_distillation_objective,
    law="trace",
    law_options={"shrink": 1},
    samples=None,
    advantage=None,
    needs_old=True,
    needs_reference=True,
    inner_iterations=1,
    signal=later_signal,
    trajectory=Trajectory(_single_steps, lambda options, length, steps: -(-length // steps)),
    window="eos",
    tail="hidden",
    teacher=True,
    notes="Not read: the papers' models are autoregressive. The teacher is the reference policy, rl.teacher; rewards are logged, "
    "and nothing is learnt from them. Tokens are scored in the state that drew them; which positions a state decides the "
    "sampler chose, by confidence, so the estimate is that of the decided positions.",
)
