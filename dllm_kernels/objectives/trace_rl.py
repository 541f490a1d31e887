"""TraceRL: token-level policy optimisation along a rollout's own steps (dLLM-RL, arXiv 2509.06949, ICLR 2026).

Each training row is a pair (sequence, step): the state of the rollout before the step, scored at the tokens it commits.

Verified against the public code (Gen-Verse/dLLM-RL at 10b4fd1, train/rl_llada.py and train/train_sdar_policy.py). The value
model of the SDAR runs is left out on purpose; its advantages per token can be given.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dllm_kernels import checks
from dllm_kernels.accumulation.objective import Batch, Objective
from dllm_kernels.masks import steps
from dllm_kernels.masks.plan import MaskPlan
from dllm_kernels.objectives.recipe import Recipe, Trajectory
from dllm_kernels.objectives.surrogates import (
    check_mask,
    check_policy,
    check_values,
    clipped_ratio_term,
    dense_logp,
    k3,
    masked_difference,
)
from dllm_kernels.objectives.tokens import check_ratio_options
from dllm_kernels.objectives.update import States
from dllm_kernels.rollouts.rollout import Rollout
from dllm_kernels.rollouts.trajectories import trajectory_rows

__all__ = ["trace_rl", "trace_rl_objective"]

MODES = ("llada", "sdar")
DELTA_BOUND = 10.0  # of the SDAR code


def trace_rl(
    logp_BL: Tensor,
    old_logp_BL: Tensor,
    advantages_B: Tensor,
    step_mask_BL: Tensor,
    *,
    epsilon: float = 0.2,
    beta: float = 0.01,
    mode: str = "llada",
) -> Tensor:
    """Mean over the B rows (sequence, step) of a clipped surrogate and a KL to the *old* policy on the step's tokens M_b.

    "llada" (rl_llada.py, lines 573-607): `-(1/B) sum_b (1/|M_b|) sum_{l in M_b} min(rho A, clip(rho, 1 +- epsilon) A)
    + (beta/B) sum_b sum_{l in M_b} k3(logp, old)`, `rho = e^(logp - old)`: the KL is summed, not averaged. "sdar"
    (train_sdar_policy.py, lines 475-520): `logp - old` is clamped to +-10 in the exponents, not in the KL's linear term, and both
    are divided by L.

    Args:
        logp_BL: log-probs `[B, L]` under the policy in the state before the step, float32 or float64, differentiable. For
            "sdar", L must be the response window.
        old_logp_BL: the same of the policy that generated; `logp_BL.detach()` on-policy.
        advantages_B: `[B]`; the code's are z-scores per prompt by the population std. For "sdar" also `[B, L]`.
        step_mask_BL: bool `[B, L]`, M_b. The rest may hold anything. An empty row contributes 0 and is counted in B.

    Everything but logp_BL is detached. The gradient of the surrogate is exactly 0 where it is strictly clipped, and -A at rho = 1
    also with epsilon = 0; on-policy that of the KL is 0. Raises TypeError or ValueError naming the argument.

    Example:
        >>> logp = torch.tensor([[-1.0, -2.0]], requires_grad=True)
        >>> trace_rl(logp, logp, torch.tensor([2.0]), torch.tensor([[True, True]])).item()
        -2.0
    """
    checks.choice("mode", mode, MODES)
    check_ratio_options(epsilon, beta)
    sizes = check_policy("logp_BL", logp_BL, 2)
    check_mask("step_mask_BL", step_mask_BL, sizes, logp_BL)
    check_values("old_logp_BL", old_logp_BL, sizes, logp_BL, where=step_mask_BL)
    per_token = mode == "sdar" and isinstance(advantages_B, Tensor) and advantages_B.dim() == 2
    if per_token:
        check_values("advantages_B", advantages_B, sizes, logp_BL, where=step_mask_BL)
    else:
        check_values("advantages_B", advantages_B, sizes[:1], logp_BL)
    advantages_BL = advantages_B if per_token else advantages_B[:, None]
    window = sizes[1] if mode == "sdar" else None
    size_B1 = step_mask_BL.sum(-1, keepdim=True)
    losses_BL = _token_losses(logp_BL, old_logp_BL, advantages_BL, step_mask_BL, size_B1, epsilon, beta, window)
    return losses_BL.sum(-1).mean()


def _token_losses(
    logp: Tensor,
    old: Tensor,
    advantages: Tensor,
    mask: Tensor,
    size: Tensor,
    epsilon: float,
    beta: float,
    window: int | None,
) -> Tensor:
    """Each token's part of its row's loss. `size`: tokens of the row, LLaDA's divisor of the surrogate; `window`: that of the
    SDAR form, None is LLaDA's form.
    """
    delta = masked_difference(logp, old, mask)
    bounded = delta if window is None else delta.clamp(-DELTA_BOUND, DELTA_BOUND)
    surrogate = torch.where(mask, clipped_ratio_term(bounded, advantages, epsilon, epsilon), 0.0)
    if window is not None:  # the KL's exponent is bounded, its linear term is not
        return (beta * (k3(bounded) + delta - bounded) - surrogate) / window
    return beta * k3(delta) - surrogate / size.clamp(min=1)


def trace_rl_objective(*, epsilon: float = 0.2, beta: float = 0.01, mode: str = "llada", window: int | None = None) -> Objective:
    """TraceRL for the engine, on plans of law `trace`; its denominator is the number of pairs (sequence, state) with a token.

    That number is `masks.steps.number(plan)`, summed over the plans of an optimizer step. `window` is the divisor of mode
    "sdar", the length of the response window. Entries: "advantages" `[B]`; "old_logp" `[B, K, S]`, absent on-policy.
    """
    checks.choice("mode", mode, MODES)
    check_ratio_options(epsilon, beta)
    if (window is None) == (mode == "sdar"):
        raise ValueError(f"window must be given for mode 'sdar' and for no other, got window={window} with mode={mode!r}")
    if window is not None:
        checks.count("window", window)

    def contributions(logp_N: Tensor, plan: MaskPlan, batch: Batch) -> Tensor:
        logp_KBS = dense_logp(logp_N, plan)
        old_BKS = batch.per_sample.get("old_logp")
        old_KBS = logp_KBS if old_BKS is None else old_BKS.transpose(0, 1)
        advantages_B1 = batch.per_sequence["advantages"][:, None]
        size_KBS = steps.sizes(plan)
        return _token_losses(logp_KBS, old_KBS, advantages_B1, plan.scored, size_KBS, epsilon, beta, window).sum()

    return Objective(
        name="trace_rl",
        contributions=contributions,
        coupling="token",
        on_policy_coupling="none",  # the KL to the old policy has no gradient there
        denominator="steps",
        old_scores="old_logp",
        per_sequence=("advantages",),
        per_token=("old_logp",),
        scale=None if beta > 0 else "advantages",
    )


@dataclass(frozen=True)
class Options:
    """Of the loss, and of the states."""

    epsilon: float = 0.2
    beta: float = 0.01
    mode: str = "llada"
    window: int | None = None
    shrink: int = 8  # steps that make one state
    length: int | None = None  # of a run's completions: the window of mode "sdar", where none is given

    def __post_init__(self) -> None:
        checks.count("shrink", self.shrink)
        if self.mode == "sdar" and self.window is None:
            object.__setattr__(self, "window", self.length)


def _merged_steps(rollout: Rollout, options: Options, seed: int) -> States:
    return States(rollout, trajectory_rows(rollout, shrink=options.shrink))


def _state_tokens(options: Options, length: int, steps: int) -> int:
    return -(-length * options.shrink // steps)


RECIPE = Recipe(
    name="trace_rl",
    title="Revolutionizing Reinforcement Learning Framework for Diffusion Large Language Models",
    arxiv="2509.06949",
    status="verified against the code",
    objective=trace_rl_objective,
    law="trace",
    law_options={"shrink": Options.shrink},
    samples=None,
    advantage="population_std",
    needs_old=True,
    needs_reference=False,
    inner_iterations=1,
    options=Options,
    from_run=lambda length, steps: {"length": length},
    trajectory=Trajectory(_merged_steps, _state_tokens),
    window="eos",
    tail="hidden",
    notes="The code was read; its value model is left out. 8 steps are merged for LLaDA, 1 for TraDo. 32 prompts of 8 rollouts, "
    "learning rate 1e-6, full fine-tuning, 512 tokens, temperature 0.8; prompts solved less than 20 % or more than 80 % of "
    "the time are dropped.",
)
