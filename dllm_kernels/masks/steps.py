"""The step groups of a plan: the tokens that one state of a sequence decides, for objectives that couple them.

A sample of a trace is one state of a sequence. With blocks it holds one state of *every* block, so the tokens
of a state are those of equal (sequence, `rows.state`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_kernels import checks
from dllm_kernels.masks.plan import MaskPlan


def number(plan: MaskPlan) -> int:
    """Pairs (sequence, state) with a scored token, of the samples of this cut."""
    if plan.step_KBS is None:
        return int((plan.counts > 0).sum())
    rows = plan.rows
    assert rows.state is not None
    return len(torch.unique(torch.stack([rows.sequence, rows.state]), dim=1).t())


def sizes(plan: MaskPlan) -> Tensor:
    """int64, broadcastable to `[K, B, S]`: tokens of each scored token's group, in all samples of the plan."""
    if plan.step_KBS is None:
        return plan.counts[:, :, None]
    if plan.step_BS is None:  # of given events, of which a token may have several
        K, B, S = plan.shape
        key_BG = torch.where(plan.scored, plan.step_KBS, -1).transpose(0, 1).reshape(B, K * S)
        sorted_BG = key_BG.sort(dim=-1).values
        sizes_BG = torch.searchsorted(sorted_BG, key_BG, right=True) - torch.searchsorted(sorted_BG, key_BG)
        return sizes_BG.view(B, K, S).transpose(0, 1)
    key_BS = torch.where(plan.completion_mask_BS, plan.step_BS, -1)
    sorted_BS = key_BS.sort(dim=-1).values
    return (torch.searchsorted(sorted_BS, key_BS, right=True) - torch.searchsorted(sorted_BS, key_BS))[None]


def shape(plan: MaskPlan) -> list[int]:
    """Sizes of a tensor with an entry per group: `[B, K]`; of a trace in blocks `[B, K, blocks]`."""
    K, B, _ = plan.shape
    return [B, K] if plan.step_KBS is None else [B, K, len(plan.units.lengths_U) // max(1, B)]


def sums(plan: MaskPlan, values_KBS: Tensor) -> Tensor:
    """Sums over the scored tokens of each group, float64, of the sizes of `shape`; differentiable.

    Raises ValueError where a step decides tokens of several blocks, which no block-causal rollout does.
    """
    values_KBS = torch.where(plan.scored, values_KBS.double(), 0.0)
    if plan.step_KBS is None:
        return values_KBS.sum(-1).t()
    sums_KBJ = plan.units.collect(values_KBS).view(plan.shape[0], *shape(plan)[::2])
    check_blocks(plan)
    return sums_KBJ.transpose(0, 1)


def check_blocks(plan: MaskPlan) -> None:
    """Raises ValueError where a step decides tokens of several blocks: groups would run together, and the states are not
    those of a rollout that ended one block before it began the next.
    """
    if plan.step_KBS is None or not checks.may_read(plan.input_ids_BS):
        return
    there_BKJ, states_BKJ = present(plan), states(plan)
    if int(there_BKJ.sum()) != number(plan):
        raise ValueError("step_map_BS must decide tokens of one block in a step, where an objective couples the tokens of a step")
    ends_BJ = states_BKJ.amax(1).cummax(-1).values
    begins_BJ = states_BKJ.masked_fill(~there_BKJ, torch.iinfo(torch.int64).max).amin(1)
    if bool((begins_BJ[:, 1:] < ends_BJ[:, :-1]).any()):
        raise ValueError(
            "step_map_BS must decide a block before it begins the next, where an objective couples the tokens of a step: the "
            "blocks before it are clean in every state"
        )


def present(plan: MaskPlan) -> Tensor:
    """bool, of the sizes of `shape`: the group has a token."""
    if plan.step_KBS is None:
        return plan.counts.t() > 0
    return (plan.units.collect(plan.scored).view(plan.shape[0], *shape(plan)[::2]) > 0).transpose(0, 1)


def states(plan: MaskPlan) -> Tensor:
    """int64, of the sizes of `shape`: the state of each group, -1 where there is none."""
    if plan.step_KBS is None:
        assert plan.state_BK is not None
        return plan.state_BK[:, plan.sample_K]
    steps_KBS = torch.where(plan.scored, plan.step_KBS, -1)
    units = plan.units
    found_KUW = units.gathered(steps_KBS).masked_fill(~units.mask_UW, -1)
    return found_KUW.amax(-1).view(plan.shape[0], *shape(plan)[::2]).transpose(0, 1)
