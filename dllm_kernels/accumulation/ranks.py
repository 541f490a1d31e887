"""What the ranks of an optimizer step exchange: counts, and one number per sequence."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dllm_kernels.accumulation.objective import Batch, Objective
from dllm_kernels.masks import steps
from dllm_kernels.masks.plan import MaskPlan


def denominator(objective: Objective, plan: MaskPlan, batch: Batch, group: dist.ProcessGroup | None) -> float:
    """The number of the objective's units in plan and batch, over all ranks of the group; at least 1.

    Raises ValueError where the groups cannot be counted.
    """
    kind, entries = objective.denominator, batch.per_sequence
    if kind == "groups":
        if "group_ids" not in entries:
            raise ValueError(
                f"denominator must be given for {objective.name}, which counts groups, or batch must hold 'group_ids'"
            )
        parts = _gather(entries["group_ids"].cpu(), group)
        return float(len(torch.cat(parts).unique()))
    if kind in ("sequences", "pairs"):
        here = len(plan.input_ids_BS)
    elif kind == "tokens":
        here = int(plan.lengths_B.sum())
    else:
        here = steps.number(plan)
    total = sum(_gather(here, group))
    return float(max(1, total // 2 if kind == "pairs" else total))


def couple(
    objective: Objective, numbers_B: Tensor, plan: MaskPlan, batch: Batch, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """This rank's share of the total contributions, and their gradient `[B]` with respect to its own numbers.

    Every rank computes the total from the same numbers in the same order. Raises ValueError for a sequence
    held by two ranks, which would be counted twice.
    """
    entries = dict(batch.per_sequence)
    mine = {"": numbers_B, "lengths": plan.lengths_B, "ids": plan.sequence_ids_B, **{f"entry {k}": v for k, v in entries.items()}}
    parts = _gather({name: tensor.detach().cpu() for name, tensor in mine.items()}, group)
    everyone = {name: torch.cat([part[name] for part in parts]).to(numbers_B.device) for name in mine}
    if len(everyone["ids"].unique()) < len(everyone["ids"]):
        raise ValueError("plan must hold sequence ids that no other rank of the group holds")
    with torch.enable_grad():
        leaf = everyone[""].requires_grad_(True)
        assert objective.couple is not None
        total = objective.couple(leaf, everyone["lengths"], {name: everyone[f"entry {name}"] for name in entries})
        (gradient,) = torch.autograd.grad(total, leaf)
    rank = 0 if group is None else dist.get_rank(group)
    start = sum(len(part[""]) for part in parts[:rank])
    return total.detach() / len(parts), gradient[start : start + len(numbers_B)]


def _gather(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """The values of all ranks, in their order."""
    if group is None:
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values
