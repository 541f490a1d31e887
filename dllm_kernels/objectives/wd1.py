"""wd1: weighted policy optimization without ratios (arXiv 2507.08838, ICLR 2026).

Completions of a group are pulled by softmax(A) and pushed by softmax(-A); no old and no reference policy.

Verified against the code (xiaohangt/wd1 at 0898985). wd1++ (step-wise, with intermediate predictions) is left out on purpose.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dllm_kernels.accumulation.objective import Batch, Objective
from dllm_kernels.masks.plan import MaskPlan
from dllm_kernels.objectives import surrogates
from dllm_kernels.objectives.recipe import Recipe
from dllm_kernels.objectives.update import Rewards, Signal, signal_of

__all__ = ["wd1", "wd1_objective", "wd1_weights"]


def wd1(logp_BL: Tensor, advantages_B: Tensor, completion_mask_BL: Tensor, group_ids_B: Tensor) -> Tensor:
    """`sum_b (-w+_b + w-_b) sum_l c_bl logp_bl`, `w+ = softmax(A)`, `w- = softmax(-A)` within a group, no temperature.

    Args:
        logp_BL: log-probs `[B, L]` (nats) with the whole completion hidden, differentiable, fp32 or fp64.
        advantages_B: `[B]`, reward minus its group's mean; detached.
        completion_mask_BL: bool `[B, L]`, the tokens that count; anything may stand elsewhere.
        group_ids_B: int64 `[B]`; equal ids form a group, in any order, of any size. (The code takes the local batch for one
            group, rev_grpo_trainer.py:144-160, and mixes prompts where it is not.)

    Returns the scalar loss: a sum over the tokens and sequences of each group and over the groups; divide by the number of
    groups for their mean, as the engine does. Raises TypeError or ValueError naming the argument.

    Example:
        >>> import torch
        >>> logp = torch.tensor([[-1.0, -2.0], [-3.0, -1.0]], requires_grad=True)
        >>> wd1(logp, torch.tensor([0.5, -0.5]), torch.tensor([[True, True], [True, False]]), torch.tensor([7, 7])).backward()
        >>> logp.grad
        tensor([[-0.4621, -0.4621],
                [ 0.4621,  0.0000]])
    """
    B, L = surrogates.check_policy("logp_BL", logp_BL, 2)
    surrogates.check_mask("completion_mask_BL", completion_mask_BL, [B, L], logp_BL)
    surrogates.check_values("advantages_B", advantages_B, [B], logp_BL)
    return -(wd1_weights(advantages_B, group_ids_B) * surrogates.masked_sum(logp_BL, completion_mask_BL, 1)).sum()


def wd1_weights(advantages_B: Tensor, group_ids_B: Tensor) -> Tensor:
    """`softmax(A) - softmax(-A)` within each group, `[B]`, detached: 0 for equal advantages, each group's sum is 0."""
    (B,) = surrogates.check_policy("advantages_B", advantages_B, 1)
    surrogates.check_values("advantages_B", advantages_B, [B], advantages_B)
    surrogates.check_group_ids(group_ids_B, [B], advantages_B)
    return surrogates.group_softmax(advantages_B, group_ids_B) - surrogates.group_softmax(-advantages_B, group_ids_B)


def _contributions(logp_N: Tensor, plan: MaskPlan, batch: Batch) -> Tensor:
    return -(batch.per_sequence["weights"].detach() * plan.score(logp_N)).sum()


def wd1_objective() -> Objective:
    """`wd1` for the engine. Batch: per sequence "weights" from `wd1_weights`, made over whole groups, so that any cut may do.

    "group_ids" may be given to count the groups by.
    """
    return Objective(
        name="wd1",
        contributions=_contributions,
        coupling="none",
        on_policy_coupling="none",
        denominator="groups",
        old_scores=None,
        per_sequence=("weights",),
        scale="weights",
    )


def _signal(rewards: Rewards, objective: Objective, options: Any) -> Signal:
    return signal_of({"weights": wd1_weights(rewards.advantages(), rewards.group_ids_B)}, rewards, objective)


RECIPE = Recipe(
    name="wd1",
    title="wd1: weighted policy optimization for reasoning in diffusion language models",
    arxiv="2507.08838",
    status="verified against the code",
    objective=wd1_objective,
    law="full",
    law_options={},
    samples=1,
    advantage="mean",
    needs_old=False,
    needs_reference=False,
    inner_iterations=8,
    signal=_signal,
    window="eos",
    tail="hidden",
    notes="The official code was read; wd1++ is left out. Prompt noise 0.15 is the law's own; 6 completions a prompt, learning "
    "rate 3e-6, 8 to 12 inner iterations.",
)
