"""The passes of `backends.expectation.reference` in Triton, for fp32 slabs `[v, N]`.

The formulas are those of csrc/expectation.inc. A program has C rows, one per lane, and some ids; lanes meet once, at the end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dllm_kernels.backends.expectation.problem import Pull, Seen
from dllm_kernels.backends.triton.arithmetic import exp_far, far, finite_or_zero
from dllm_kernels.backends.triton.divergence import PART, _launch, finish_, times
from dllm_kernels.backends.triton.rows import _narrow, interpreted

__all__ = ["finish_", "pull", "soften"]


@triton.jit(do_not_specialize=["rows", "ids", "part"])
def top_kernel(logits, tops, rows, ids, part, R: tl.constexpr, C: tl.constexpr):  # type: ignore[no-untyped-def]
    """The largest logit of `part` ids: one of each row to tops[part of the slab]."""
    n = tl.program_id(0) * C + tl.arange(0, C)
    inside = n < rows
    first = tl.program_id(1) * part
    top = tl.full([R, C], float("-inf"), tl.float32)
    for start in range(0, part, R):
        v = first + start + tl.arange(0, R)
        at = v.to(tl.int64)[:, None] * rows + n[None, :]
        z = tl.load(logits + at, mask=(v < ids)[:, None] & inside[None, :], other=float("-inf"))
        top = tl.where(z > top, z, top)
    tl.store(tops + tl.program_id(1).to(tl.int64) * rows + n, tl.max(top, 0), mask=inside)


@triton.jit(do_not_specialize=["rows", "ids", "part"])
def soften_kernel(logits, top, out, sums, rows, ids, part, ROUND: tl.constexpr, R: tl.constexpr, C: tl.constexpr):  # type: ignore[no-untyped-def]
    """exp(z - top) of `part` ids to `out`, and their sum of each row to sums[part of the slab]."""
    n = tl.program_id(0) * C + tl.arange(0, C)
    inside = n < rows
    first = tl.program_id(1) * part
    base = finite_or_zero(tl.load(top + n, mask=inside, other=0.0))
    total = tl.zeros([R, C], tl.float32)
    for start in range(0, part, R):
        v = first + start + tl.arange(0, R)
        here = (v < ids)[:, None] & inside[None, :]
        at = v.to(tl.int64)[:, None] * rows + n[None, :]
        z = tl.load(logits + at, mask=here, other=float("-inf"))
        e = exp_far(far(z - base[None, :]))
        total += e
        tl.store(out + at, _narrow(e, out.dtype.element_ty, ROUND), mask=here)
    tl.store(sums + tl.program_id(1).to(tl.int64) * rows + n, tl.sum(total, 0), mask=inside)


@triton.jit(do_not_specialize=["rows", "ids"])
def pull_kernel(  # type: ignore[no-untyped-def]
    logits, pulls, top, inverse, mean, factor, squeeze, p, out, rows, ids, ROUND: tl.constexpr, R: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """`pull` of R ids."""
    n = tl.program_id(0) * C + tl.arange(0, C)
    v = tl.program_id(1) * R + tl.arange(0, R)
    inside = n < rows
    here = (v < ids)[:, None] & inside[None, :]
    at = v.to(tl.int64)[:, None] * rows + n[None, :]
    z = tl.load(logits + at, mask=here, other=float("-inf"))
    probability = exp_far(far(z - tl.load(top + n, mask=inside, other=0.0)[None, :]))
    probability = probability * tl.load(inverse + n, mask=inside, other=0.0)[None, :]
    if pulls is not None:
        x = tl.load(pulls + at, mask=here, other=0.0)
        x = times(probability, x - tl.load(mean + n, mask=inside, other=0.0)[None, :])
        x = x * tl.load(factor + n, mask=inside, other=0.0)[None, :]
        if squeeze is not None:
            inner = z * tl.load(squeeze + n, mask=inside, other=0.0)[None, :]
            x = times(x, 1.0 - inner * inner)
        tl.store(out + at, _narrow(x, out.dtype.element_ty, ROUND), mask=here)
    if p is not None:
        tl.store(p + at, _narrow(probability, p.dtype.element_ty, ROUND), mask=here)


def soften(z_VN: Tensor, seen: Seen, out_VN: Tensor) -> Tensor:
    """See `reference.soften`. `out_VN` may have 16 bits."""
    columns, rows = z_VN.shape
    parts = torch.empty(triton.cdiv(columns, PART), rows, device=z_VN.device)
    _launch(top_kernel, z_VN, PART, z_VN, parts, rows, columns, PART)
    before_N = seen.top_N.double()
    seen.top_N.copy_(torch.maximum(seen.top_N, parts.amax(0)))
    _launch(soften_kernel, z_VN, PART, z_VN, seen.top_N, out_VN, parts, rows, columns, PART, ROUND=interpreted())
    scale_N = (before_N - seen.top_N.double()).exp_().masked_fill_(before_N == float("-inf"), 0.0)
    seen.sum_N.mul_(scale_N).add_(parts.sum(0, dtype=torch.float64))
    return scale_N.float()


def pull(
    z_VN: Tensor,
    pull_VN: Tensor | None,
    top_N: Tensor,
    inverse_N: Tensor,
    of_rows: Pull | None,
    p_VN: Tensor | None,
    out_VN: Tensor | None,
) -> None:
    """See `reference.pull`. `p_VN` and `out_VN` may have 16 bits."""
    columns, rows = z_VN.shape
    vectors = top_N, inverse_N, *(of_rows or (None, None, None))
    _launch(pull_kernel, z_VN, 0, z_VN, pull_VN, *vectors, p_VN, out_VN, rows, columns, ROUND=interpreted())
