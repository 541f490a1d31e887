"""Given traces: the state of a rollout that each sample of a plan shows, and the tokens committed next.

A rollout's step map holds the step that committed each token. In state s, tokens of states >= s are hidden
and those of state s are scored. A state is a step, `shrink` consecutive steps (TraceRL) or a segment of steps
(d2). Blocks are independent given clean history, so a sample of a block-diffusion plan shows the r-th state of
*every* block: as many samples as a block has states, not as many as the rollout has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dllm_kernels import checks

EVENTS = ("shown_BKS", "event_steps_BKS", "event_ids_BKS")  # of law `trace`, in place of a step map
TENSORS = ("step_map_BS", "steps_BJ", *EVENTS)  # options that become the states of a plan


def states(law: str, options: Mapping[str, Any], completion_BS: Tensor, samples: int | None) -> tuple[Tensor, Tensor]:
    """(state of each token `[B, S]`, state of each sample `[B, K]`), int64, -1 for none; K may be ragged.

    A token outside the completion that has a step is hidden as its state says, and never scored.

    Raises ValueError or TypeError naming the option, or `samples` where it is not the number of states.
    """
    step_map_BS = _checked_steps(law, options, completion_BS).clamp(min=-1)
    if law == "segments":
        state_BS, count = _segments(step_map_BS, options["segments"], options["total_steps"]), options["segments"]
    else:
        state_BS = _shrunk(step_map_BS, options["shrink"]) if options["shrink"] > 1 else step_map_BS
        count = None
    if options.get("steps_BJ") is not None:
        state_BK = options["steps_BJ"]
        _check_chosen(state_BK, completion_BS)
        count = state_BK.shape[1]
    else:
        if count is None:  # on a GPU, a given number avoids a host sync
            known = None if checks.may_read(state_BS) else samples
            count = known if known is not None else max(1, int(state_BS.max()) + 1)
        state_BK = torch.arange(count, device=state_BS.device).expand(len(state_BS), -1)
    _check_count(law, samples, count)
    return state_BS, state_BK


def _checked_steps(law: str, options: Mapping[str, Any], completion_BS: Tensor) -> Tensor:
    step_map_BS = options["step_map_BS"]
    if step_map_BS is None:
        raise ValueError(f"step_map_BS must be given for law={law!r}: int64 [B, S], the step that committed each token")
    checks.dtype("step_map_BS", step_map_BS, [torch.int64])
    checks.shape("step_map_BS", step_map_BS, list(completion_BS.shape))
    checks.same_device("step_map_BS", step_map_BS, "input_ids_BS", completion_BS)
    if checks.may_read(step_map_BS) and bool((completion_BS & (step_map_BS < 0)).any()):
        least = int(step_map_BS[completion_BS].min())
        raise ValueError(f"step_map_BS must be at least 0 where completion_mask_BS is True, got {least}")
    return step_map_BS


def _check_chosen(steps_BJ: Tensor, completion_BS: Tensor) -> None:
    checks.dtype("steps_BJ", steps_BJ, [torch.int64])
    checks.shape("steps_BJ", steps_BJ, [len(completion_BS), None])
    checks.same_device("steps_BJ", steps_BJ, "input_ids_BS", completion_BS)


def _check_count(law: str, samples: int | None, count: int) -> None:
    if samples is not None and samples != count:
        raise ValueError(f"samples must be None or the number of states, {count}, for law={law!r}, got {samples}")


def events(options: Mapping[str, Any], completion_BS: Tensor) -> list[Tensor]:
    """The states that events give: ids `[B, K, S]` that each sample shows, steps of what it scores (-1 nothing), ids written.

    Ids may be any, so an edited token is scored from a row that shows what it replaced. Raises as `states` does.
    """
    B, S = completion_BS.shape
    given = [options[name] for name in EVENTS]
    for name, tensor in zip(EVENTS, given, strict=True):
        if tensor is None:
            raise ValueError(f"{name} must be given with the other of {', '.join(EVENTS)}, got None")
        checks.dtype(name, tensor, [torch.int64])
        checks.shape(name, tensor, [B, None, S])
        checks.same_device(name, tensor, "input_ids_BS", completion_BS)
    for name in ("step_map_BS", "steps_BJ"):
        if options[name] is not None:
            raise ValueError(f"{name} must be None where shown_BKS gives the states")
    if options["shrink"] > 1:
        raise ValueError(f"shrink must be 1 where shown_BKS gives the states, got {options['shrink']}")
    if checks.may_read(given[1]) and bool(((given[1] >= 0) & ~completion_BS[:, None]).any()):
        raise ValueError("event_steps_BKS must be -1 where completion_mask_BS is False")
    return given


def in_blocks(
    law: str, options: Mapping[str, Any], completion_BS: Tensor, block_BS: Tensor, length: int, samples: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(rank of each token's state within its block `[B, S]`, rank of each sample `[B, K]`, step of each token that
    is scored `[B, S]`), int64, -1 for none.

    The step of merged ones is the last of them, that of a segment its number. Otherwise as `states`.
    """
    step_map_BS = _checked_steps(law, options, completion_BS)
    step_map_BS = torch.where(block_BS >= 0, step_map_BS, -1).clamp(min=-1)
    if law == "segments":
        step_map_BS = _segments(step_map_BS, options["segments"], options["total_steps"])
    rank_BS = _ranks(step_map_BS, block_BS)
    if (shrink := options.get("shrink", 1)) > 1:
        rank_BS = rank_BS // shrink  # -1 // shrink is -1
    # the last step of each (block, rank); a block has at most `length` ranks
    slots = (block_BS.shape[1] // length + 2) * length
    key_BS = torch.where(rank_BS >= 0, block_BS * length + rank_BS, slots)
    last_BG = torch.full((len(key_BS), slots + 1), -1, device=key_BS.device).scatter_reduce_(1, key_BS, step_map_BS, "amax")
    step_BS = torch.where(completion_BS & (rank_BS >= 0), last_BG.gather(1, key_BS), -1)
    if (steps_BJ := options.get("steps_BJ")) is not None:
        _check_chosen(steps_BJ, completion_BS)
        step_BS = torch.where((step_BS[:, :, None] == steps_BJ[:, None, :]).any(-1), step_BS, -1)
    known = None if checks.may_read(step_BS) else samples
    count = known if known is not None else max(1, int(torch.where(step_BS >= 0, rank_BS, -1).max()) + 1)
    _check_count(law, samples, count)
    return rank_BS, torch.arange(count, device=step_BS.device).expand(len(step_BS), -1), step_BS


def _ranks(step_BS: Tensor, block_BS: Tensor) -> Tensor:
    """How many distinct smaller steps each token's block has, -1 where there is no step."""
    there_BS = step_BS >= 0
    span = step_BS.amax() + 2
    key_BS = torch.where(there_BS, block_BS * span + step_BS, -1)
    sorted_BS, order_BS = key_BS.sort(dim=-1)  # equal keys get equal ranks
    block_sorted_BS = sorted_BS // span  # -1 // span is -1
    new_BS, first_BS = torch.ones_like(there_BS), torch.ones_like(there_BS)
    new_BS[:, 1:] = sorted_BS[:, 1:] != sorted_BS[:, :-1]
    first_BS[:, 1:] = block_sorted_BS[:, 1:] != block_sorted_BS[:, :-1]
    distinct_BS = new_BS.cumsum(-1)
    rank_sorted_BS = distinct_BS - torch.where(first_BS, distinct_BS, 0).cummax(-1).values
    return torch.where(there_BS, torch.empty_like(step_BS).scatter_(1, order_BS, rank_sorted_BS), -1)


def _shrunk(step_map_BS: Tensor, shrink: int) -> Tensor:
    """Number the steps that committed a token from 0, and merge `shrink` of them into a state."""
    present_BT = torch.zeros(len(step_map_BS), int(step_map_BS.max()) + 2, dtype=torch.bool, device=step_map_BS.device)
    present_BT.scatter_(1, step_map_BS + 1, True)  # column 0 takes the -1
    rank_BT = present_BT[:, 1:].cumsum(-1) - 1
    if rank_BT.shape[1] == 0:
        return step_map_BS
    return torch.where(step_map_BS >= 0, rank_BT.gather(1, step_map_BS.clamp(min=0)) // shrink, -1)


def _segments(step_map_BS: Tensor, segments: int, total_steps: int | None) -> Tensor:
    if total_steps is None:
        total: Tensor | int = (step_map_BS.amax(-1, keepdim=True) + 1).clamp(min=1)
    else:
        total = total_steps
        if checks.may_read(step_map_BS) and int(step_map_BS.max()) >= total_steps:
            raise ValueError(f"step_map_BS must be below total_steps={total_steps}, got {int(step_map_BS.max())}")
    # segment k begins with step int(k T / N), as in the code
    return torch.where(step_map_BS >= 0, ((step_map_BS + 1) * segments - 1) // total, -1)
