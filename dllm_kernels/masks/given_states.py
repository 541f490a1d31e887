"""Given traces: the state of a rollout that each sample of a plan shows, and the tokens committed next.

A rollout's step map holds the step that committed each token. In state s, tokens of states >= s are hidden
and those of state s are scored. A state is a step, `shrink` consecutive steps (TraceRL) or a segment of steps
(d2).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dllm_kernels import checks

TENSORS = ("step_map_BS", "steps_BJ")  # options that become the states of a plan


def states(law: str, options: Mapping[str, Any], completion_BS: Tensor, samples: int | None) -> tuple[Tensor, Tensor]:
    """(state of each token `[B, S]`, state of each sample `[B, K]`), int64, -1 for none; K may be ragged.

    Raises ValueError or TypeError naming the option, or `samples` where it is not the number of states.
    """
    step_map_BS = options["step_map_BS"]
    if step_map_BS is None:
        raise ValueError(f"step_map_BS must be given for law={law!r}: int64 [B, S], the step that committed each token")
    checks.dtype("step_map_BS", step_map_BS, [torch.int64])
    checks.shape("step_map_BS", step_map_BS, list(completion_BS.shape))
    checks.same_device("step_map_BS", step_map_BS, "input_ids_BS", completion_BS)
    step_map_BS = torch.where(completion_BS, step_map_BS, -1)
    if checks.may_read(step_map_BS) and bool((completion_BS & (step_map_BS < 0)).any()):
        raise ValueError(f"step_map_BS must be at least 0 where completion_mask_BS is True, got {int(step_map_BS.min())}")
    if law == "segments":
        state_BS, count = _segments(step_map_BS, options["segments"], options["total_steps"]), options["segments"]
    else:
        state_BS = _shrunk(step_map_BS, options["shrink"]) if options["shrink"] > 1 else step_map_BS
        count = None
    if options.get("steps_BJ") is not None:
        state_BK = options["steps_BJ"]
        checks.dtype("steps_BJ", state_BK, [torch.int64])
        checks.shape("steps_BJ", state_BK, [len(step_map_BS), None])
        checks.same_device("steps_BJ", state_BK, "input_ids_BS", completion_BS)
        count = state_BK.shape[1]
    else:
        if count is None:  # on a GPU, a given number avoids a host sync
            known = None if checks.may_read(state_BS) else samples
            count = known if known is not None else max(1, int(state_BS.max()) + 1)
        state_BK = torch.arange(count, device=state_BS.device).expand(len(state_BS), -1)
    if samples is not None and samples != count:
        raise ValueError(f"samples must be None or the number of states, {count}, for law={law!r}, got {samples}")
    return state_BS, state_BK


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
    return torch.where(step_map_BS >= 0, step_map_BS * segments // total, -1)
