"""Checks of what users pass in: each failure names the argument, what came and what is allowed."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def may_read(tensor: Tensor) -> bool:
    """Whether a check may look at values: always on the CPU; on a GPU it would stall the stream, so only on request."""
    return tensor.is_cpu or os.environ.get("DLLM_KERNELS_VALIDATE") == "1"


def shape(name: str, tensor: Tensor, allowed: Sequence[int | None]) -> None:
    """`allowed` holds a size per dimension, None for any."""
    require_tensor(name, tensor)
    if len(allowed) == 1 == tensor.dim() and (allowed[0] is None or allowed[0] == tensor.shape[0]):
        return  # the common case, and on the way of every call
    if tensor.dim() != len(allowed) or any(a is not None and a != s for a, s in zip(allowed, tensor.shape, strict=True)):
        wanted = ", ".join("any" if a is None else str(a) for a in allowed)
        raise ValueError(f"{name} must have shape [{wanted}], got {list(tensor.shape)}")


def require_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def dtype(name: str, tensor: Tensor, allowed: Sequence[torch.dtype]) -> None:
    require_tensor(name, tensor)
    if tensor.dtype not in allowed:
        raise TypeError(f"{name} must be of dtype {' or '.join(str(a) for a in allowed)}, got {tensor.dtype}")


def same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name} ({other.device}), got {tensor.device}")


def in_range(name: str, tensor: Tensor, low: int, high: int) -> None:
    """Every value of an integer tensor in [low, high); reads values, see `may_read`."""
    if tensor.numel() == 0 or not may_read(tensor):
        return
    smallest, largest = (int(bound) for bound in tensor.aminmax())
    if smallest < low or largest >= high:
        offender = smallest if smallest < low else largest
        raise ValueError(f"{name} must hold ids in {low}..{high - 1}, got {offender}")


def choice(name: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(repr(a) for a in allowed)}, got {value!r}")


def count(name: str, value: object, minimum: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return value


def finite(name: str, tensor: Tensor) -> None:
    """No NaN and no infinity; reads values, see `may_read`."""
    vector = tensor.detach() if tensor.requires_grad else tensor
    vector = vector if vector.dim() == 1 else vector.flatten()
    if may_read(tensor) and (place := first_not_finite(vector)) is not None:
        raise ValueError(f"{name} must be finite, got {float(vector[place])}")


def first_not_finite(vector_N: Tensor) -> int | None:
    """Where a vector first holds NaN or an infinity. A finite sum proves that it holds none, in one operation."""
    short = vector_N.numel() <= 128 and vector_N.is_cpu  # Python is faster than the launch of a tensor operation
    if math.isfinite(sum(vector_N.tolist()) if short else vector_N.sum()):
        return None
    places = (~torch.isfinite(vector_N)).nonzero()
    return int(places[0, 0]) if len(places) else None


def number(name: str, value: object, *, above: float | None = None, least: float | None = None) -> float:
    """A finite Python number, above or at least a bound."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    bound = (
        "" if above is None and least is None else f" and {f'above {above:g}' if above is not None else f'at least {least:g}'}"
    )
    if not math.isfinite(value) or (above is not None and not value > above) or (least is not None and not value >= least):
        raise ValueError(f"{name} must be finite{bound}, got {value}")
    return float(value)
