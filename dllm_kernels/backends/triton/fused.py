"""Logits that never reach memory: a matrix product whose epilogue is an online softmax, or a draw, and a merge of its parts.

A program makes one block of rows times one segment of the vocabulary and writes one part per row; a segment has as many
columns whatever N is, and the merge sums in a fixed order: no atomics, no locks, and bits that depend on no other row.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dllm_kernels.backends.contract import NO_LOW, HeadProblem, Low
from dllm_kernels.backends.triton import low_rank
from dllm_kernels.backends.triton.arithmetic import draw, exp_far, far, finish, finite_or_zero, reduce_parts, tanh, top_of
from dllm_kernels.backends.triton.configs import ARITHMETIC, CONFIGS, Config
from dllm_kernels.backends.triton.rows import flat, interpreted

PARTS_BYTES = 64 << 20  # of the parts of one launch
GATHERED_BYTES = 128 << 20  # of the rows that one launch gathers for its descriptors


@triton.jit
def _final(z, v, bias, excluded, temperature_rows, softcap, temperature, vocabulary, y, target_z):  # type: ignore[no-untyped-def]
    """Raw logits to final ones; the target's goes to `target_z`, its row's place in memory, and leaves -inf."""
    if bias is not None:
        z = z + tl.load(bias + v, mask=v < vocabulary, other=0.0)[None, :]
    if softcap is not None:
        z = softcap * tanh(z / softcap)
    if temperature_rows is not None:
        z = z / temperature_rows
    elif temperature is not None:
        z = z / temperature
    keep = v < vocabulary
    if excluded is not None:
        keep = keep & (tl.load(excluded + v, mask=keep, other=1) == 0)
    z = tl.where(keep[None, :], z, float("-inf"))
    if target_z is not None:
        hit = v[None, :] == y[:, None]
        tl.store(target_z + tl.zeros_like(v)[None, :], z, mask=hit)  # one lane of the whole vocabulary
        z = tl.where(hit, float("-inf"), z)
    return z


@triton.jit
def _take(  # type: ignore[no-untyped-def]
    z, v0, bias, excluded, temperature_rows, softcap, temperature, vocabulary, y, target_z, m, s, weighted, top,
    inverse, key0, key1, step, best, best_id, best_z,
    ENTROPY: tl.constexpr, TOP: tl.constexpr, R: tl.constexpr, C: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """A tile `[R, C]` takes part in the online softmax and with `key0` in the draw, PIECE columns at a time from the left: what
    is live must fit registers. A draw has bounds for a whole piece, and exact noise for what may win alone."""
    if C > PIECE:
        left, right = z.reshape(R, 2, C // 2).permute(0, 2, 1).split()
        m, s, weighted, top, best, best_id, best_z = _take(
            left, v0, bias, excluded, temperature_rows, softcap, temperature, vocabulary, y, target_z,
            m, s, weighted, top, inverse, key0, key1, step, best, best_id, best_z, ENTROPY, TOP, R, C // 2, PIECE,
        )  # fmt: skip
        m, s, weighted, top, best, best_id, best_z = _take(
            right, v0 + C // 2, bias, excluded, temperature_rows, softcap, temperature, vocabulary, y, target_z,
            m, s, weighted, top, inverse, key0, key1, step, best, best_id, best_z, ENTROPY, TOP, R, C // 2, PIECE,
        )  # fmt: skip
    else:
        v = v0 + tl.arange(0, C)
        z = _final(z, v, bias, excluded, temperature_rows, softcap, temperature, vocabulary, y, target_z)
        if TOP:
            tile_max, tile_top = tl.max(z, 1, return_indices=True, return_indices_tie_break_left=True)
            top = tl.where(tile_max > m, v0 + tile_top, top)
        else:
            tile_max = tl.max(z, 1)
        later = tile_max > m
        big = tl.where(later, tile_max, m)
        base = finite_or_zero(big)
        down = far(tl.where(m == float("-inf"), float("-inf"), m - base))
        scale = exp_far(down)
        d = far(z - base[:, None])
        e = exp_far(d)
        if ENTROPY:
            weighted = scale * (weighted + down * s) + tl.sum(e * d, 1)
        s = s * scale + tl.sum(e, 1)
        m = big
        if key0 is not None:
            best, best_id, best_z = draw(z, v0, inverse, None, key0, key1, step, best, best_id, best_z, R, C)
    return m, s, weighted, top, best, best_id, best_z


@triton.jit(do_not_specialize=["rows", "vocabulary", "segments", "plane", "softcap", "temperature", "step", "inverse"])
def fused_kernel(  # type: ignore[no-untyped-def]
    hidden, weight, index, low_hidden, low_weight, bias, excluded, temperature_N, softcap, temperature,
    target, key, target_z, parts, part_ids,
    rows, vocabulary, width, segments,
    hidden_stride, hidden_step, weight_stride, weight_step, plane, rank, low_hidden_plane, low_weight_plane,
    step, inverse,
    ENTROPY: tl.constexpr, TOP: tl.constexpr, DESCRIPTORS: tl.constexpr, EVEN: tl.constexpr, UPCAST: tl.constexpr,
    LOW_PLANES: tl.constexpr, BR: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TILES: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Rows [m BM, ..) x columns of one segment. With `key` the draw takes part, with `target` it stays out of the sums.

    An adapter's `low_hidden` and `low_weight` add their product to the logits: planes of bfloat16 that sum to its operands,
    those of `low_hidden` in the rows' order, `rank` in whole BR; pairs of planes beyond fp32's digits are left out.

    Planes of `parts`: max, sum, sum of exp times its logarithm; with a draw best and its logit. Of `part_ids`: the id of
    the max; with a draw of the best. The target's logit goes to `target_z` at once.
    """
    blocks = tl.cdiv(rows, BM)
    m0 = (tl.program_id(0) % blocks) * BM  # neighbours share the weight's columns in the L2 cache
    segment = tl.program_id(0) // blocks
    n = m0 + tl.arange(0, BM)
    inside = n < rows
    temperature_rows = None
    if temperature_N is not None:
        temperature_rows = tl.load(temperature_N + n, mask=inside, other=1.0)[:, None]
    y = tl.full([BM], -1, tl.int32)
    target_at = None
    if target is not None:
        y = tl.load(target + n, mask=inside, other=-1).to(tl.int32)
        target_at = (target_z + n)[:, None]
    key0 = None
    key1 = None
    if key is not None:
        row_key = tl.load(key + n, mask=inside, other=0)
        key0 = row_key.to(tl.uint32)
        key1 = (row_key >> 32).to(tl.uint32)
    best = tl.full([BM], float("-inf"), tl.float32)
    best_id = tl.zeros([BM], tl.int32)
    best_z = tl.zeros([BM], tl.float32)
    if not DESCRIPTORS:
        k = tl.arange(0, BK).to(tl.int64)
        source = n.to(tl.int64)
        if index is not None:
            source = tl.load(index + n, mask=inside, other=0)
        hidden_at = hidden + (source * hidden_stride)[:, None]
    m = tl.full([BM], float("-inf"), tl.float32)
    s = tl.zeros([BM], tl.float32)
    weighted = tl.zeros([BM], tl.float32)
    top = tl.zeros([BM], tl.int32)
    first = segment * (TILES * BN)
    for v0 in range(first, min(first + TILES * BN, vocabulary), BN):
        v = v0 + tl.arange(0, BN)
        z = tl.zeros([BM, BN], tl.float32)
        if low_hidden is not None:
            low_hidden_at = low_hidden + tl.cast(m0, tl.int64) * rank
            low_weight_at = low_weight + tl.cast(v0, tl.int64) * rank
            for r0 in tl.range(0, rank, BR, num_stages=1):
                r = r0 + tl.arange(0, BR)
                for i in tl.static_range(LOW_PLANES):
                    b_at = low_weight_at + i * low_weight_plane + ((tl.arange(0, BN) * rank)[None, :] + r[:, None])
                    b = tl.load(b_at, mask=(v < vocabulary)[None, :], other=0.0)
                    if UPCAST:
                        b = b.to(tl.float32)
                    for j in tl.static_range(3 - i):
                        a_at = low_hidden_at + j * low_hidden_plane + ((tl.arange(0, BM) * rank)[:, None] + r[None, :])
                        a = tl.load(a_at, mask=inside[:, None], other=0.0)
                        if UPCAST:
                            a = a.to(tl.float32)
                        z = tl.dot(a, b, z)
        if DESCRIPTORS:
            for k0 in range(0, width, BK):
                a = hidden.load([m0, k0])
                b = weight.load([v0, k0])
                if UPCAST:
                    a = a.to(tl.float32)
                    b = b.to(tl.float32)
                z = tl.dot(a, b.T, z)
        else:
            weight_at = weight + (v.to(tl.int64) * weight_stride)[None, :]
            for k0 in range(0, width, BK):
                across = k0 + k
                a_at = hidden_at + (across * hidden_step)[None, :]
                b_at = weight_at + (across * weight_step)[:, None]
                if EVEN:
                    a = tl.load(a_at, mask=inside[:, None], other=0.0)
                    b = tl.load(b_at, mask=(v < vocabulary)[None, :], other=0.0)
                else:
                    more = across < width
                    a = tl.load(a_at, mask=inside[:, None] & more[None, :], other=0.0)
                    b = tl.load(b_at, mask=(v < vocabulary)[None, :] & more[:, None], other=0.0)
                if UPCAST:
                    a = a.to(tl.float32)
                    b = b.to(tl.float32)
                z = tl.dot(a, b, z)

        m, s, weighted, top, best, best_id, best_z = _take(
            z, v0, bias, excluded, temperature_rows, softcap, temperature, vocabulary, y, target_at, m, s, weighted, top,
            inverse, key0, key1, step, best, best_id, best_z, ENTROPY, TOP, BM, BN, PIECE,
        )  # fmt: skip

    to = n.to(tl.int64) * segments + segment
    tl.store(parts + to, m, mask=inside)
    tl.store(parts + plane + to, s, mask=inside)
    if ENTROPY:
        tl.store(parts + 2 * plane + to, weighted, mask=inside)
    if TOP:
        tl.store(part_ids + to, top, mask=inside)
    if key is not None:
        tl.store(parts + 3 * plane + to, best, mask=inside)
        tl.store(parts + 4 * plane + to, best_z, mask=inside)
        tl.store(part_ids + plane + to, best_id, mask=inside)


@triton.jit(do_not_specialize=["rows", "segments", "plane"])
def merge_kernel(  # type: ignore[no-untyped-def]
    parts, part_ids, target, target_at, logp, lse, entropy, top_logp, top_id, token,
    rows, segments, plane, DRAW: tl.constexpr, R: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Parts of R rows to statistics; with `token` to the drawn id (DRAW) or the largest logit's, and its logp."""
    n = tl.program_id(0) * R + tl.arange(0, R)
    inside = n < rows
    part = tl.arange(0, P)
    here = inside[:, None] & (part < segments)[None, :]
    at = (n.to(tl.int64) * segments)[:, None] + part[None, :]
    m = tl.load(parts + at, mask=here, other=float("-inf"))
    s = tl.load(parts + plane + at, mask=here, other=0.0)
    weighted = s
    top = tl.zeros([R, P], tl.int32)
    if entropy is not None:
        weighted = tl.load(parts + 2 * plane + at, mask=here, other=0.0)
    if (top_id is not None) or (token is not None and not DRAW):
        top = tl.load(part_ids + at, mask=here, other=0)
    big, s_row, weighted_row, top_row = reduce_parts(m, s, weighted, top, True, True)
    if target is not None:
        y = tl.load(target + n, mask=inside, other=0).to(tl.int32)
        target_z = tl.load(target_at + n, mask=inside, other=0.0)
    else:
        y = tl.full([R], -1, tl.int32)
        target_z = tl.full([R], float("-inf"), tl.float32)
    base, _, _, mean, log_sum = finish(big, s_row, weighted_row, target_z)
    tl.store(lse + n, base + log_sum, mask=inside)
    if entropy is not None:
        tl.store(entropy + n, log_sum - mean, mask=inside)
    if top_logp is not None:
        tl.store(top_logp + n, -log_sum, mask=inside)
    if top_id is not None:
        tl.store(top_id + n, top_of(big, top_row, target_z, y).to(tl.int64), mask=inside)
    own_z = target_z
    if token is not None:
        own_z = big
        own = top_row
        if DRAW:
            best = tl.load(parts + 3 * plane + at, mask=here, other=float("-inf"))
            best_z = tl.load(parts + 4 * plane + at, mask=here, other=0.0)
            ids = tl.load(part_ids + plane + at, mask=here, other=0)
            winners = here & (best == tl.max(best, 1)[:, None])
            own = tl.min(tl.where(winners, ids, 2147483647), 1)
            own_z = tl.sum(tl.where(winners & (ids == own[:, None]), best_z, 0.0), 1)
        tl.store(token + n, own.to(tl.int64), mask=inside)
    tl.store(logp + n, own_z - base - log_sum, mask=inside)


def _fits_descriptor(matrix: Tensor) -> bool:
    stride, step = matrix.stride()
    return step == 1 and stride * matrix.element_size() % 16 == 0 and matrix.data_ptr() % 16 == 0


def rows_at_once(rows: int, vocabulary: int, width: int, itemsize: int, config: Config) -> int:
    """Rows per launch: their parts and what is gathered of the hidden states stay within fixed budgets."""
    segments = triton.cdiv(vocabulary, config.segment)
    most = min(PARTS_BYTES // (32 * segments), GATHERED_BYTES // (width * itemsize))
    return min(rows, max(config.BM, most // config.BM * config.BM))


def largest_parts(rows: int, vocabulary: int, width: int, itemsize: int, low: Low = NO_LOW) -> int:
    """Memory of one launch beside its results, the largest of all configurations."""

    def one(config: Config) -> int:
        at_once = rows_at_once(rows, vocabulary, width, itemsize, config)
        gathered = at_once * width * itemsize if config.descriptors else 0
        gathered += low_rank.fused_bytes(at_once, vocabulary, low)
        return at_once * (28 * triton.cdiv(vocabulary, config.segment) + 4) + gathered

    return max(one(config) for uses in CONFIGS.values() for config in uses)


def fused(
    problem: HeadProblem,
    result: dict[str, Tensor],
    config: Config,
    *,
    key_N: Tensor | None = None,
    step: int = 0,
    temperature: float = 0.0,
) -> None:
    """Fill `result`: `logp` and `lse` always, `entropy`, `top_logp`, `top_id` where present; a draw where `token` is."""
    p, rows = problem, problem.rows
    vocabulary, width = p.weight_VH.shape
    sampling = "token" in result
    drawn = sampling and temperature > 0
    at_once = rows_at_once(rows, vocabulary, width, p.hidden_MH.element_size(), config)
    segments = triton.cdiv(vocabulary, config.segment)
    device = p.hidden_MH.device
    parts = torch.empty(5, at_once, segments, dtype=torch.float32, device=device)
    target_z = None if sampling else torch.full((at_once,), float("nan"), dtype=torch.float32, device=device)
    part_ids = torch.empty(2, at_once, segments, dtype=torch.int32, device=device)
    low_PVR = None if p.low_rank is None else low_rank.planes(p.low_rank.weight_VR)
    for start in range(0, rows, at_once):
        span = slice(start, min(start + at_once, rows))
        count = span.stop - span.start
        hidden_MH, index_N = (p.hidden_MH, p.index_N[span]) if p.index_N is not None else (p.hidden_MH[span], None)
        described = config.descriptors and _fits_descriptor(p.weight_VH)
        if described and index_N is not None:
            hidden_MH, index_N = hidden_MH.index_select(0, index_N), None
        described = described and _fits_descriptor(hidden_MH)
        operands: tuple[Any, Any] = (hidden_MH, p.weight_VH)
        if described:
            operands = (
                TensorDescriptor.from_tensor(hidden_MH, [config.BM, config.BK]),
                TensorDescriptor.from_tensor(p.weight_VH, [config.BN, config.BK]),
            )
        low_PNR = None
        if p.low_rank is not None:
            own_MR = p.low_rank.hidden_MR
            own_NR = own_MR[span] if p.index_N is None else own_MR.index_select(0, p.index_N[span])
            low_PNR = low_rank.planes(own_NR, low_rank.DIGITS)
        target_N = None if sampling else p.target_N[span]
        fused_kernel[(triton.cdiv(count, config.BM) * segments,)](
            *operands, index_N, low_PNR, low_PVR, *flat(p.options.of_rows(span), vocabulary, device), target_N,
            key_N[span] if drawn and key_N is not None else None, target_z, parts, part_ids,
            count, vocabulary, width, segments, *hidden_MH.stride(), *p.weight_VH.stride(), parts.stride(0),
            *((0, 0, 0) if low_PNR is None or low_PVR is None else (low_PVR.shape[2], low_PNR.stride(0), low_PVR.stride(0))),
            step if drawn else 0, 1.0 / temperature if drawn else 0.0,
            ENTROPY="entropy" in result, TOP="top_id" in result or (sampling and not drawn), DESCRIPTORS=described,
            EVEN=width % config.BK == 0, UPCAST=interpreted() and (p.hidden_MH.dtype == torch.bfloat16 or low_PNR is not None),
            LOW_PLANES=0 if low_PVR is None else len(low_PVR), BR=low_rank.DEPTH, **config.kernel, **ARITHMETIC,
        )  # fmt: skip
        whole = triton.next_power_of_2(segments)
        at = {name: vector[span] for name, vector in result.items()}
        merge_rows = 64 if interpreted() else max(1, 1024 // whole)
        merge_kernel[(triton.cdiv(count, merge_rows),)](
            parts, part_ids, target_N, target_z, at["logp"], at["lse"], at.get("entropy"), at.get("top_logp"), at.get("top_id"),
            at.get("token"), count, segments, parts.stride(0), DRAW=drawn, R=merge_rows, P=whole, num_warps=4, **ARITHMETIC,
        )  # fmt: skip
