"""Group-relative advantages."""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_kernels import checks

KINDS = ("mean", "loo", "std", "population_std")
STD_EPSILON = 1e-4


def group_advantages(rewards: Tensor, group_ids: Tensor, kind: str = "mean") -> Tensor:
    """Rewards relative to the group of completions of one prompt.

    Args:
        rewards: float `[B]`, or `[B, J]` for J columns (such as step ranks) treated one by one; finite.
        group_ids: int64 `[B]`; equal ids form a group, in any order, of any size.
        kind: "mean": r - mean (d1, GDPO). "loo": r minus the mean of the others, (r - mean) G / (G - 1) (DiffuCoder,
            ESPO); 0 for a group of one. "std": (r - mean) / (unbiased std + 1e-4) (GRPO, BGPO). "population_std": a
            z-score, 0 where the std is 0 (TraceRL).

    A group of equal rewards gets exactly 0. Returns detached advantages of the rewards' shape and dtype. Raises TypeError
    or ValueError naming the argument; a NaN or infinite reward would silently spoil its group, so it is an error (on a GPU
    under DLLM_KERNELS_VALIDATE=1).

    Example:
        >>> group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.tensor([7, 7, 9, 9]), kind="mean")
        tensor([ 0.5000, -0.5000,  0.0000,  0.0000])
    """
    checks.choice("kind", kind, KINDS)
    checks.dtype("rewards", rewards, checks.FLOATS)
    checks.dtype("group_ids", group_ids, [torch.int64])
    if rewards.dim() not in (1, 2):
        raise ValueError(f"rewards must have shape [B] or [B, J], got {list(rewards.shape)}")
    if rewards.numel() == 0:
        raise ValueError(f"rewards must hold at least one value, got shape {list(rewards.shape)}")
    checks.shape("group_ids", group_ids, [rewards.shape[0]])
    checks.same_device("group_ids", group_ids, "rewards", rewards)
    checks.finite("rewards", rewards)
    rewards = rewards.detach()
    B = len(group_ids)
    # a dense [B, B] membership keeps every sum in a fixed order and needs no host sync for the number of groups; no matrix
    # product, which autocast would do in bf16
    member_BB = (group_ids[:, None] == group_ids[None, :]).to(rewards.dtype)
    columns_BJ = rewards.reshape(B, -1)
    size_B1 = member_BB.sum(1, keepdim=True)
    centred_BJ = columns_BJ - _sums(member_BB, columns_BJ) / size_B1
    peers_BBJ = torch.where(member_BB[:, :, None] > 0, columns_BJ[None], columns_BJ[:, None])
    equal_BJ = (peers_BBJ == columns_BJ[:, None]).all(1)
    if kind == "loo":
        centred_BJ = centred_BJ * size_B1 / (size_B1 - 1).clamp(min=1)
    elif kind != "mean":
        ddof = 1 if kind == "std" else 0
        std_BJ = (_sums(member_BB, centred_BJ.square()) / (size_B1 - ddof).clamp(min=1)).sqrt()
        centred_BJ = centred_BJ / (std_BJ + STD_EPSILON if kind == "std" else torch.where(std_BJ > 0, std_BJ, 1.0))
    return torch.where(equal_BJ, 0.0, centred_BJ).reshape(rewards.shape)


def _sums(member_BB: Tensor, columns_BJ: Tensor) -> Tensor:
    return (member_BB[:, :, None] * columns_BJ[None]).sum(1)
