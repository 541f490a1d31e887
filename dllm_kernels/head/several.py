"""From `target`, `ids` and `want_top` to the targets of a problem, `[N]` or `[N, T]`, and back to what the caller asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_kernels import checks
from dllm_kernels.backends.contract import HeadOptions

MOST = 1024  # ids of `want_top`


def check(hidden: Tensor, target: Tensor | None, ids: Tensor | None, rows: Tensor | None) -> int:
    """The number of rows; TypeError or ValueError for targets that do not fit it."""
    count = None if rows is None else rows.numel()
    if target is not None or ids is None:
        if target is None:
            count = hidden[..., 0].numel() if count is None else count
        else:
            checks.dtype("target", target, [torch.int64])
            checks.shape("target", target, [count])
            checks.same_device("target", target, "hidden", hidden)
            count = target.numel()
    if ids is not None:
        checks.dtype("ids", ids, [torch.int64])
        checks.shape("ids", ids, [count, None])
        checks.same_device("ids", ids, "hidden", hidden)
        count = len(ids)
    assert count is not None
    return count


def check_want_top(want_top: int, vocabulary: int, options: HeadOptions) -> None:
    """Raise for a number of likeliest ids that there are not."""
    if want_top == 0 and not isinstance(want_top, bool):
        return
    checks.count("want_top", want_top, 0)
    limit = vocabulary if options.valid_vocab is None else options.valid_vocab
    most = min(MOST, limit - len({token for token in options.suppress if token < limit}))
    if want_top > most:
        raise ValueError(f"want_top must be in 0..{most}, at most {MOST} of the ids that are not excluded, got {want_top}")


def joined(target: Tensor | None, ids: Tensor | None, count: int, device: torch.device) -> Tensor:
    """`[N, T]`: the target, where there is one, before the ids."""
    parts = [] if target is None else [target[:, None]]
    parts += [] if ids is None else [ids]
    if not parts:
        return torch.empty(count, 0, dtype=torch.int64, device=device)
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def parted(logp: Tensor | None, target: Tensor | None, ids: Tensor | None, wanted: bool) -> tuple[Tensor | None, Tensor | None]:
    """The log-probabilities `[N, T]` of `joined` targets as those of the target, `[N]`, where wanted, and of the ids."""
    if logp is None:
        return None, None
    first = 0 if target is None else 1
    return (logp[:, 0] if first and wanted else None), (None if ids is None else logp[:, first:] if first else logp)
