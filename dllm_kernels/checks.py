"""Checks of what users pass in: each failure names the argument, what came and what is allowed."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Iterable, Sequence
from typing import cast

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


def as_tensor(name: str, value: object) -> Tensor:
    require_tensor(name, value)
    return cast(Tensor, value)


def dtype(name: str, tensor: Tensor, allowed: Sequence[torch.dtype]) -> None:
    require_tensor(name, tensor)
    if tensor.dtype not in allowed:
        of_a_mask = ": the indices of a mask are mask.flatten().nonzero()[:, 0]"
        hint = of_a_mask if name == "rows" and tensor.dtype == torch.bool else ""
        raise TypeError(f"{name} must be of dtype {' or '.join(str(a) for a in allowed)}, got {tensor.dtype}{hint}")


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
        hint = ": leave rows without a target out, with `rows`" if name == "target" and offender == -100 else ""
        raise ValueError(f"{name} must hold ids in {low}..{high - 1}, got {offender}{hint}")


def distinct(name: str, buffer: Tensor) -> None:
    """No two elements of a buffer that is written to share their memory."""
    least = 1
    for stride, size in sorted((stride, size) for stride, size in zip(buffer.stride(), buffer.shape) if size > 1):
        if stride < least:
            raise ValueError(f"{name} must not overlap itself, got {list(buffer.shape)} with strides {list(buffer.stride())}")
        least = stride * (size - 1) + least


def may_overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the spans of memory that two tensors lie in have a byte in common."""
    if not a.numel() or not b.numel() or a.device != b.device:
        return False

    def span(tensor: Tensor) -> tuple[int, int]:
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
        return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.itemsize

    (a0, a1), (b0, b1) = span(a), span(b)
    return a0 < b1 and b0 < a1


def choice(name: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(repr(a) for a in allowed)}, got {value!r}")


def names(name: str, value: Sequence[str], allowed: Sequence[str]) -> None:
    """Any of the allowed names, in a sequence: a lone string is one of letters."""
    if isinstance(value, str):
        raise TypeError(f"{name} must be a sequence of names, like ({value!r},), got the string {value!r}")
    for entry in value:
        if entry not in allowed:
            choice(name, entry, allowed)


def count(name: str, value: object, minimum: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return value


def ids(name: str, value: object) -> tuple[int, ...]:
    """Ints of any sequence or tensor of them, NumPy's included."""
    if isinstance(value, Tensor):
        value = value.tolist() if value.dim() == 1 else value
    if isinstance(value, (str, int, float, Tensor)) or not isinstance(value, Iterable):
        came = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a sequence of ids, got {came}")
    found = []
    for token in value:
        if isinstance(token, bool) or not hasattr(token, "__index__"):
            raise TypeError(f"{name} must hold ints, got {type(token).__name__}")
        found.append(operator.index(token))
    return tuple(found)


def finite(name: str, tensor: Tensor) -> None:
    """No NaN and no infinity; reads values, see `may_read`."""
    vector = tensor.detach() if tensor.requires_grad else tensor
    vector = vector if vector.dim() == 1 else vector.flatten()
    if may_read(tensor) and (place := first_not_finite(vector)) is not None:
        raise ValueError(f"{name} must be finite, got {float(vector[place])}")


def between(name: str, vector_N: Tensor, above: float = -math.inf, most: float = math.inf) -> Tensor:
    """The vector itself, or ValueError unless all it holds is finite, over `above` and at most `most`; see `may_read`.

    To be used in place of what came: in a compiled graph an op does this, which runs only if its result is wanted.
    """
    if torch.compiler.is_compiling():
        checked_N: Tensor = _between_op(vector_N, name, above, most)
        return checked_N
    if may_read(vector_N) and vector_N.numel():
        smallest, largest = (float(bound) for bound in vector_N.aminmax())
        if not (above < smallest and largest <= most and largest < math.inf):
            low = f"above {above:g} and finite" if above > -math.inf else "finite"
            allowed = low if most == math.inf else f"in ({above:g}, {most:g}]"
            raise ValueError(f"{name} must be {allowed}, got values from {smallest:g} to {largest:g}")
    return vector_N


@torch.library.custom_op(
    "dllm_kernels::between", mutates_args=(), schema="(Tensor vector, str name, float above, float most) -> Tensor"
)
def _between_op(vector_N: Tensor, name: str, above: float, most: float) -> Tensor:
    return between(name, vector_N, above, most).clone()


@_between_op.register_fake
def _(vector_N: Tensor, *_: object) -> Tensor:
    return torch.empty_like(vector_N)


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
    # by comparison: torch.compile traces no math.isfinite of a number that varies
    finite = -math.inf < value < math.inf
    if not finite or (above is not None and not value > above) or (least is not None and not value >= least):
        raise ValueError(f"{name} must be finite{bound}, got {value}")
    return float(value)
