"""The passes of `backends.divergence.reference` in Triton, for fp32 slabs `[v, N]`: each goes once over both slabs.

The formulas are those of csrc/divergence.inc. A program has C rows, one per lane, and some ids; lanes meet once, at the end.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dllm_kernels.backends.contract import HeadOptions
from dllm_kernels.backends.divergence.problem import KINDS, Slab, Statistics
from dllm_kernels.backends.divergence.reference import joined
from dllm_kernels.backends.triton.arithmetic import exp_far, far, finite_or_zero, tanh
from dllm_kernels.backends.triton.configs import ARITHMETIC
from dllm_kernels.backends.triton.rows import _narrow, flat, interpreted

PART = 256  # ids of a program that sums; from the slab's size alone, so that no sum depends on the device


@triton.jit
def log_mixture(x, beta, rest):  # type: ignore[no-untyped-def]
    """log(rest + beta exp(x)) for |x| <= 80 (or NaN) and rest = 1 - beta; near 0 log(1 + y) of y = beta (exp(x) - 1)."""
    k = tl.floor(x * 1.44269504 + 0.5)
    r = x - k * 0.693145751953125 - k * 1.42860677e-6
    q = 0.001382144634
    q = q * r + 0.008368661627
    q = q * r + 0.04166825488
    q = q * r + 0.1666652113
    q = q * r + 0.4999999404
    more = q * (r * r) + r
    scale = ((k.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    u = beta * (scale * more + scale) + rest
    offset = u.to(tl.int32, bitcast=True) - 0x3F3504F3  # of sqrt(1/2), so that f lies around 0
    exponent = offset >> 23
    e = exponent.to(tl.float32)
    y = beta * (scale * more + (scale - 1.0))
    f = tl.where(exponent == 0, y, ((offset & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0)
    t = f / (2.0 + f)
    w = t * t
    half = 0.5 * f * f
    tail = w * (0.6666677594 + w * (0.3997758329 + w * 0.298707962))
    log = e * 0.693145751953125 + (f - (half - (t * (half + tail) + e * 1.42860677e-6)))
    return tl.where(u == u, log, u)


@triton.jit
def times(weight, x):  # type: ignore[no-untyped-def]
    """0 where the weight is, whatever x: of an id without probability infinities were subtracted."""
    return tl.where(weight == 0, 0.0, weight * x)


@triton.jit
def probability(z, lse):  # type: ignore[no-untyped-def]
    return exp_far(far(z - lse[None, :]))


@triton.jit
def to_mixture(s, t, s_lse, t_lse, beta, rest):  # type: ignore[no-untyped-def]
    """`log p - log q`, far ratios bounded, and `log q - log m` where m = beta p + (1 - beta) q."""
    r = (t - s) + (s_lse - t_lse)[None, :]
    r = tl.where(r > 80.0, 80.0, tl.where(r < -80.0, -80.0, r))
    return r, -log_mixture(r, beta, rest)


@triton.jit
def _more(seen, total, z):  # type: ignore[no-untyped-def]
    """Running maxima and sums of exp below them with one logit more: (maxima, sums, rescaling, exp)."""
    big = tl.where(z > seen, z, seen)
    base = finite_or_zero(big)
    scale = exp_far(far(tl.where(seen == float("-inf"), float("-inf"), seen - base)))
    e = exp_far(far(z - base))
    return big, total * scale + e, scale, e


@triton.jit
def _scale_to(seen, big):  # type: ignore[no-untyped-def]
    return exp_far(far(tl.where(seen == float("-inf"), float("-inf"), seen - finite_or_zero(big)[None, :])))


@triton.jit(do_not_specialize=["rows", "ids", "part"])
def look_kernel(student, teacher, sums, rows, ids, part, KIND: tl.constexpr, R: tl.constexpr, C: tl.constexpr):  # type: ignore[no-untyped-def]
    """`look` of `part` ids: five sums of each row to sums[part of the slab]."""
    n = tl.program_id(0) * C + tl.arange(0, C)
    inside = n < rows
    first = tl.program_id(1) * part
    s_max = tl.full([R, C], float("-inf"), tl.float32)
    t_max = tl.full([R, C], float("-inf"), tl.float32)
    s_sum = tl.zeros([R, C], tl.float32)
    t_sum = tl.zeros([R, C], tl.float32)
    weighted = tl.zeros([R, C], tl.float32)
    for start in range(0, part, R):
        v = first + start + tl.arange(0, R)
        here = (v < ids)[:, None] & inside[None, :]
        at = v.to(tl.int64)[:, None] * rows + n[None, :]
        s = tl.load(student + at, mask=here, other=float("-inf"))
        t = tl.load(teacher + at, mask=here, other=float("-inf"))
        s_max, s_sum, s_scale, s_exp = _more(s_max, s_sum, s)
        t_max, t_sum, t_scale, t_exp = _more(t_max, t_sum, t)
        if KIND == 0:
            weighted = weighted * t_scale + times(t_exp, t - s)
        elif KIND == 1:
            weighted = weighted * s_scale + times(s_exp, s - t)
    s_big = tl.max(s_max, 0)
    t_big = tl.max(t_max, 0)
    s_scale = _scale_to(s_max, s_big)
    t_scale = _scale_to(t_max, t_big)
    to = sums + tl.program_id(1).to(tl.int64) * 5 * rows + n
    tl.store(to, s_big, mask=inside)
    tl.store(to + rows, tl.sum(s_sum * s_scale, 0), mask=inside)
    tl.store(to + 2 * rows, t_big, mask=inside)
    tl.store(to + 3 * rows, tl.sum(t_sum * t_scale, 0), mask=inside)
    if KIND == 0:
        weighted = weighted * t_scale
    elif KIND == 1:
        weighted = weighted * s_scale
    tl.store(to + 4 * rows, tl.sum(weighted, 0), mask=inside)


@triton.jit(do_not_specialize=["rows", "ids", "part", "beta", "rest"])
def mix_kernel(student, teacher, student_lse, teacher_lse, sums, rows, ids, part, beta, rest, R: tl.constexpr, C: tl.constexpr):  # type: ignore[no-untyped-def]
    """`mix` of `part` ids."""
    n = tl.program_id(0) * C + tl.arange(0, C)
    inside = n < rows
    first = tl.program_id(1) * part
    s_lse = tl.load(student_lse + n, mask=inside, other=0.0)
    t_lse = tl.load(teacher_lse + n, mask=inside, other=0.0)
    of_teacher = tl.zeros([R, C], tl.float32)
    of_student = tl.zeros([R, C], tl.float32)
    for start in range(0, part, R):
        v = first + start + tl.arange(0, R)
        here = (v < ids)[:, None] & inside[None, :]
        at = v.to(tl.int64)[:, None] * rows + n[None, :]
        s = tl.load(student + at, mask=here, other=float("-inf"))
        t = tl.load(teacher + at, mask=here, other=float("-inf"))
        ratio, excess = to_mixture(s, t, s_lse, t_lse, beta, rest)
        of_teacher += times(probability(t, t_lse), ratio + excess)
        of_student += times(probability(s, s_lse), excess)
    to = sums + tl.program_id(1).to(tl.int64) * 2 * rows + n
    tl.store(to, tl.sum(of_teacher, 0), mask=inside)
    tl.store(to + rows, tl.sum(of_student, 0), mask=inside)


@triton.jit(do_not_specialize=["rows", "ids", "beta", "rest"])
def operand_kernel(  # type: ignore[no-untyped-def]
    student, teacher, student_lse, teacher_lse, mean, factor, squeeze, out, rows, ids, beta, rest,
    KIND: tl.constexpr, ROUND: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """`operand` of R ids."""
    n = tl.program_id(0) * C + tl.arange(0, C)
    v = tl.program_id(1) * R + tl.arange(0, R)
    inside = n < rows
    here = (v < ids)[:, None] & inside[None, :]
    at = v.to(tl.int64)[:, None] * rows + n[None, :]
    s = tl.load(student + at, mask=here, other=float("-inf"))
    t = tl.load(teacher + at, mask=here, other=float("-inf"))
    s_lse = tl.load(student_lse + n, mask=inside, other=0.0)
    t_lse = tl.load(teacher_lse + n, mask=inside, other=0.0)
    q = probability(s, s_lse)
    if KIND == 0:
        x = q - probability(t, t_lse)
    else:
        expected = tl.load(mean + n, mask=inside, other=0.0)[None, :]
        if KIND == 1:
            x = times(q, (s - t) - expected)
        else:
            _, excess = to_mixture(s, t, s_lse, t_lse, beta, rest)
            x = times(q, excess - expected) * rest
    x = x * tl.load(factor + n, mask=inside, other=0.0)[None, :]
    if squeeze is not None:
        inner = s * tl.load(squeeze + n, mask=inside, other=0.0)[None, :]
        x = times(x, 1.0 - inner * inner)
    tl.store(out + at, _narrow(x, out.dtype.element_ty, ROUND), mask=here)


@triton.jit(do_not_specialize=["rows", "ids", "first", "stride", "softcap", "temperature"])
def finish_kernel(  # type: ignore[no-untyped-def]
    logits, bias, excluded, temperature_N, softcap, temperature, rows, ids, first, stride, R: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """`finish_` of R ids, the first of the slab being `first`."""
    n = tl.program_id(0) * C + tl.arange(0, C)
    v = tl.program_id(1) * R + tl.arange(0, R)
    inside = n < rows
    there = v < ids
    here = there[:, None] & inside[None, :]
    at = logits + v.to(tl.int64)[:, None] * stride + n[None, :]
    z = tl.load(at, mask=here, other=0.0)
    if bias is not None:
        z = z + tl.load(bias + first + v, mask=there, other=0.0)[:, None]
    if softcap is not None:
        z = softcap * tanh(z / softcap)
    if temperature_N is not None:
        z = z / tl.load(temperature_N + n, mask=inside, other=1.0)[None, :]
    elif temperature is not None:
        z = z / temperature
    if excluded is not None:
        z = tl.where((tl.load(excluded + first + v, mask=there, other=0) == 0)[:, None], z, float("-inf"))
    tl.store(at, z, mask=here)


def tile(interpreter: bool) -> dict[str, int]:
    """Four logits a thread and slab: with eight, registers spill on one device. The interpreter pays by the operation."""
    return {"R": 64, "C": 64, "num_warps": 4} if interpreter else {"R": 8, "C": 64, "num_warps": 4}


def _launch(kernel: Any, like: Tensor, ids: int, *arguments: Any, **constants: Any) -> None:
    """One program for each `ids` of a slab and C of its rows, on the tensors' own device."""
    size, (columns, rows) = tile(interpreted()), like.shape
    if rows == 0 or columns == 0:
        return
    grid = triton.cdiv(rows, size["C"]), triton.cdiv(columns, ids or size["R"])
    with torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext():
        kernel[grid](*arguments, **constants, **size, **ARITHMETIC)


def finish_(z_VN: Tensor, options: HeadOptions, span: slice, vocabulary: int) -> None:
    """See `reference.finish_`."""
    given = flat(options, vocabulary, z_VN.device)
    if any(option is not None for option in given):
        columns, rows = z_VN.shape
        _launch(finish_kernel, z_VN, 0, z_VN, *given, rows, columns, span.start, z_VN.stride(0))


def look(slab: Slab, before: Tensor | None = None) -> Tensor:
    """See `reference.look`."""
    sums = _sums(slab, 5)
    columns, rows = slab.student_VN.shape
    kind = KINDS.index(slab.problem.kind)
    _launch(look_kernel, slab.student_VN, PART, slab.student_VN, slab.teacher_VN, sums, rows, columns, PART, KIND=kind)
    parts = sums.double() if before is None else torch.cat((before, sums.double()))
    return joined(parts, slab.problem.kind)[None]


def mix(slab: Slab, student_lse_N: Tensor, teacher_lse_N: Tensor, before: Tensor | None = None) -> Tensor:
    """See `reference.mix`."""
    sums, both = _sums(slab, 2), (slab.student_VN, slab.teacher_VN)
    columns, rows = slab.student_VN.shape
    beta = slab.problem.beta
    _launch(mix_kernel, slab.student_VN, PART, *both, student_lse_N, teacher_lse_N, sums, rows, columns, PART, beta, 1.0 - beta)
    found = sums.sum(0, dtype=torch.float64)[None]
    return found if before is None else before + found


def operand(slab: Slab, found: Statistics, factor_N: Tensor, squeeze_N: Tensor | None, out_VN: Tensor) -> None:
    """See `reference.operand`. `out_VN` may have 16 bits."""
    columns, rows = slab.student_VN.shape
    of_rows = found.student_lse, found.teacher_lse, found.mean, factor_N, squeeze_N
    both, kind = (slab.student_VN, slab.teacher_VN), KINDS.index(slab.problem.kind)
    numbers = rows, columns, slab.problem.beta, 1.0 - slab.problem.beta
    _launch(operand_kernel, slab.student_VN, 0, *both, *of_rows, out_VN, *numbers, KIND=kind, ROUND=interpreted())


def _sums(slab: Slab, count: int) -> Tensor:
    columns, rows = slab.student_VN.shape
    return torch.empty(triton.cdiv(columns, PART), count, rows, device=slab.student_VN.device)
