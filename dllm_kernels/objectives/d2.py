"""d2 with StepMerge: token-level GRPO scored at the start of each segment of a trajectory (arXiv 2509.21474).

The denoising steps of a rollout are cut into N consecutive segments; one forward at the state where a segment starts scores
the tokens that it commits.

Verified against the public code (kuleshov-group/d2 at 381b9f1, diffu-grpo/diffu_grpo_trainer.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dllm_kernels import checks
from dllm_kernels.accumulation.objective import Objective
from dllm_kernels.objectives.recipe import Recipe, Trajectory
from dllm_kernels.objectives.surrogates import check_mask, check_policy
from dllm_kernels.objectives.tokens import mean_token_loss, token_objective
from dllm_kernels.objectives.update import States
from dllm_kernels.rollouts.rollout import Rollout
from dllm_kernels.rollouts.trajectories import trajectory_rows

__all__ = ["d2", "d2_objective"]


def d2(
    logp_BL: Tensor,
    old_logp_BL: Tensor,
    ref_logp_BL: Tensor | None,
    advantages_B: Tensor,
    completion_mask_BL: Tensor,
    segment_mask_BL: Tensor,
    *,
    segments: int,
    epsilon: float = 0.5,
    beta: float = 0.04,
) -> Tensor:
    """The loss of one of N segments: `N sum_{l in segment} c_bl term_bl / sum_bl c_bl`.

    `term = -min(rho A, clip(rho, 1 +- epsilon) A) + beta k3(logp, ref)`, `rho = e^(logp - old)` (lines 687-750 of the code). The
    mean over the N segments, which gradient accumulation takes, is the token mean over the whole completion.

    Args:
        logp_BL: log-probs `[B, L]` under the policy at the segment's start, float32 or float64, differentiable.
        old_logp_BL: the same of the policy that generated; `logp_BL.detach()` on-policy.
        ref_logp_BL: the same of the reference; None is allowed where beta is 0.
        advantages_B: `[B]`; the code's are r - mean of the group.
        completion_mask_BL: bool `[B, L]`, True up to and including the first EOS.
        segment_mask_BL: bool `[B, L]`, the tokens committed within the segment. Tokens outside it may hold any policy
            score; old and reference scores must be finite in the completion.
        segments: N.

    Everything but logp_BL is detached. Clipping and gradients as in `diffu_grpo`. Raises TypeError or ValueError naming the
    argument.

    Example:
        >>> import torch
        >>> logp = torch.tensor([[-1.0, -2.0]], requires_grad=True)
        >>> completion, segment = torch.tensor([[True, True]]), torch.tensor([[True, False]])
        >>> d2(logp, logp, logp, torch.tensor([2.0]), completion, segment, segments=2).item()
        -2.0
    """
    checks.count("segments", segments)
    sizes = check_policy("logp_BL", logp_BL, 2)
    check_mask("completion_mask_BL", completion_mask_BL, sizes, logp_BL)
    check_mask("segment_mask_BL", segment_mask_BL, sizes, logp_BL)
    return segments * mean_token_loss(
        ("logp_BL", "old_logp_BL", "ref_logp_BL"),
        logp_BL,
        old_logp_BL,
        ref_logp_BL,
        advantages_B,
        completion_mask_BL,
        completion_mask_BL & segment_mask_BL,
        epsilon=epsilon,
        beta=beta,
    )


def d2_objective(*, epsilon: float = 0.5, beta: float = 0.04) -> Objective:
    """d2 for the engine, on plans of law `segments`: the mean of the losses of all segments, a token mean.

    Entries: "advantages" `[B]`; "old_logp" `[B, K, S]`, absent on-policy; "ref_logp" `[B, K, S]` where beta is above 0.
    """
    return token_objective("d2", epsilon, beta)


@dataclass(frozen=True)
class Options:
    """Of the loss, and of the states."""

    epsilon: float = 0.5
    beta: float = 0.04
    segments: int = 8  # parts of a trajectory

    def __post_init__(self) -> None:
        checks.count("segments", self.segments)


def _segments(rollout: Rollout, options: Options, seed: int) -> States:
    return States(rollout, trajectory_rows(rollout, segments=options.segments))


def _segment_tokens(options: Options, length: int, steps: int) -> int:
    return -(-length // options.segments)


RECIPE = Recipe(
    name="d2",
    title="d2: Improved Techniques for Training Reasoning Diffusion Language Models",
    arxiv="2509.21474",
    status="verified against the code",
    objective=d2_objective,
    law="segments",
    law_options={"segments": Options.segments},
    samples=None,
    advantage="mean",
    needs_old=True,
    needs_reference=True,
    inner_iterations=12,
    options=Options,
    trajectory=Trajectory(_segments, _segment_tokens),
    window="eos",
    tail="hidden",
    notes="The code was read. Prompt noise 0.15, a new one per inner iteration, the same in all segments, policy, old and "
    "reference. 8 segments for GSM8K, 16 for Countdown; the rest as diffu-GRPO. "
    "The any-order variant for a causal model is not here.",
)
