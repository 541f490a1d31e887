"""The passes of `reference` in C++, csrc/divergence.inc, for float32 slabs on the CPU: each goes once over both slabs."""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_kernels.backends import cpu
from dllm_kernels.backends.contract import HeadOptions
from dllm_kernels.backends.divergence.problem import KINDS, Slab, Statistics

_PARTS = 8  # of a slab's ids, for the threads
_LEAST = 64  # ids of a part


def finish_(z_VN: Tensor, options: HeadOptions, span: slice, vocabulary: int) -> None:
    """See `reference.finish_`."""
    temperature, excluded_V = options.temperature, options.excluded(vocabulary, z_VN.device)
    by_row = temperature if isinstance(temperature, Tensor) else None
    if options.bias is options.softcap is by_row is excluded_V is None and temperature == 1.0:
        return
    number = 1.0 if isinstance(temperature, Tensor) else temperature
    held = cpu._vector(options.bias), cpu._vector(by_row)
    bias, rows, excluded = (cpu._address(x) for x in (*held, excluded_V))
    final = cpu._C.Options(bias, options.softcap or 0.0, number, rows, excluded)
    columns, count = z_VN.shape
    cpu._C.finish_logits(
        cpu._C.RawLogits(z_VN.data_ptr(), columns, count, z_VN.stride(0), span.start, final), torch.get_num_threads()
    )


def look(slab: Slab, before: Tensor | None = None) -> Tensor:
    """See `reference.look`; `before` is added to in place."""
    sums = before
    if sums is None:
        sums = _sums(slab, 5)
        sums[:, (0, 2)] = float("-inf")
    cpu._C.divergence_look(_slab(slab, 0, 0), sums.data_ptr(), len(sums), torch.get_num_threads())
    return sums


def mix(slab: Slab, student_lse_N: Tensor, teacher_lse_N: Tensor, before: Tensor | None = None) -> Tensor:
    """See `reference.mix`; `before` is added to in place."""
    sums = _sums(slab, 2) if before is None else before
    both = _slab(slab, student_lse_N.data_ptr(), teacher_lse_N.data_ptr())
    cpu._C.divergence_mix(both, sums.data_ptr(), len(sums), torch.get_num_threads())
    return sums


def operand(slab: Slab, found: Statistics, factor_N: Tensor, squeeze_N: Tensor | None, out_VN: Tensor) -> None:
    """See `reference.operand`."""
    both = _slab(slab, found.student_lse.data_ptr(), found.teacher_lse.data_ptr())
    of_rows = (cpu._address(x) for x in (found.mean, factor_N, squeeze_N))
    cpu._C.divergence_operand(both, *of_rows, out_VN.data_ptr(), torch.get_num_threads())


def _slab(slab: Slab, student_lse: int, teacher_lse: int) -> object:
    p, (columns, rows) = slab.problem, slab.student_VN.shape
    both = slab.student_VN.data_ptr(), slab.teacher_VN.data_ptr()
    return cpu._C.DivergenceSlab(*both, columns, rows, KINDS.index(p.kind), p.beta, student_lse, teacher_lse)


def _sums(slab: Slab, count: int) -> Tensor:
    columns, rows = slab.student_VN.shape
    return torch.zeros(min(_PARTS, max(1, columns // _LEAST)), count, rows, dtype=torch.float64)
