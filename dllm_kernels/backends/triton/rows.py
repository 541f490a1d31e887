"""Kernels over a chunk of logits that the vendor's product has left: statistics and gradient operands, row by row."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dllm_kernels.backends.contract import HeadOptions
from dllm_kernels.backends.triton.arithmetic import draw, exp_far, far, finish, finite_or_zero, reduce_parts, tanh, top_of
from dllm_kernels.backends.triton.configs import ARITHMETIC


@triton.jit
def _logit(raw, v, excluded_at, bias, temperature_rows, softcap, temperature, vocabulary, HOLES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Raw logits `[R, C]` to final ones and their slopes d final / d raw; what is excluded or beyond V is at -inf.

    With HOLES what is -inf before stays so, whatever the softcap.
    """
    z = raw
    if HOLES:
        z = tl.where(raw == float("-inf"), 0.0, raw)
    if bias is not None:
        z = z + tl.load(bias + v, mask=v < vocabulary, other=0.0)[None, :]
    slope = tl.full([1, 1], 1.0, tl.float32)
    if softcap is not None:
        t = tanh(z / softcap)
        z = softcap * t
        slope = 1.0 - t * t
    if temperature_rows is not None:
        z = z / temperature_rows
        slope = slope / temperature_rows
    elif temperature is not None:
        z = z / temperature
        slope = slope / temperature
    keep = v < vocabulary
    if excluded_at is not None:
        keep = keep & (tl.load(excluded_at + v, mask=keep, other=1) == 0)
    if HOLES:
        z = tl.where(raw == float("-inf"), float("-inf"), z)
    return tl.where(keep[None, :], z, float("-inf")), slope


@triton.jit
def _narrow(x, dtype: tl.constexpr, ROUND: tl.constexpr):  # type: ignore[no-untyped-def]
    """To the operand's dtype. The interpreter cuts bfloat16 off where hardware rounds to even: ROUND does it for it."""
    if ROUND and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit(do_not_specialize=["rows", "vocabulary", "softcap", "temperature", "step", "inverse"])
def row_kernel(  # type: ignore[no-untyped-def]
    logits, operand, entropy_operand, target, joined, spread, key, temperature_of, bias, excluded, temperature_N,
    softcap, temperature, coef, entropy_coef,
    logp, lse, entropy, top_logp, top_id, token,
    rows, vocabulary, stride, operand_stride, entropy_stride, step, inverse,
    ENTROPY: tl.constexpr, SHARED: tl.constexpr, ROUND: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """R rows of fp32 logits per program; an output that is None is not written. Either targets, or tokens: drawn with `key`,
    at `inverse` or at the temperatures `temperature_of`.

    In place of targets may stand `joined`: the logsumexp of several per row, whose raw logits are at -inf, and `spread`, their
    mean logit, by their probabilities among each other, less that. `logp` is then their joint one, no `top_id` is found,
    and operands stay 0 in the targets' places.

    Each of the C lanes of a row keeps its own online softmax, and the lanes meet once, at the end. The target stays out of
    the sums until then. With `operand` a second pass writes the gradient operand, from left to right; where it is 16 bit and
    lies in the logits' own memory (SHARED), what is written lies behind what every thread has read.
    """
    n = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    inside = n < rows
    at = n * stride
    TOP: tl.constexpr = (top_id is not None) or (token is not None and key is None)
    y = tl.full([R], -1, tl.int32)
    target_z = tl.full([R], float("-inf"), tl.float32)
    if target is not None:
        y = tl.load(target + n, mask=inside, other=0).to(tl.int32)
        target_z = tl.zeros([R], tl.float32)
    HOLES: tl.constexpr = joined is not None
    if joined is not None:
        target_z = tl.load(joined + n, mask=inside, other=0.0)
    share = None
    if temperature_of is not None:
        own = tl.load(temperature_of + n, mask=inside, other=1.0)
        share = tl.where(own == 0, 0.0, 1.0)
        inverse = 1.0 / tl.where(own == 0, 1.0, own)
    if key is not None:
        row_key = tl.load(key + n, mask=inside, other=0)
        key0 = row_key.to(tl.uint32)
        key1 = (row_key >> 32).to(tl.uint32)
        best = tl.full([R], float("-inf"), tl.float32)
        best_id = tl.zeros([R], tl.int32)
        best_z = tl.zeros([R], tl.float32)
    temperature_rows = None
    if temperature_N is not None:
        temperature_rows = tl.load(temperature_N + n, mask=inside, other=1.0)[:, None]
    columns = tl.arange(0, C)
    m = tl.full([R, C], float("-inf"), tl.float32)
    s = tl.zeros([R, C], tl.float32)
    weighted = tl.zeros([R, C], tl.float32)
    top = tl.zeros([R, C], tl.int32)
    for start in range(0, vocabulary, C):
        v = start + columns
        here = inside[:, None] & (v < vocabulary)[None, :]
        raw = tl.load(logits + at[:, None] + v[None, :], mask=here, other=0.0)
        z, _ = _logit(raw, v, excluded, bias, temperature_rows, softcap, temperature, vocabulary, HOLES)
        if target is not None:
            hit = v[None, :] == y[:, None]
            target_z += tl.sum(tl.where(hit, z, 0.0), 1)
            z = tl.where(hit, float("-inf"), z)
        later = z > m
        big = tl.where(later, z, m)
        base = finite_or_zero(big)
        down = far(tl.where(m == float("-inf"), float("-inf"), m - base))
        scale = exp_far(down)
        d = far(z - base)
        e = exp_far(d)
        if ENTROPY:
            weighted = scale * (weighted + down * s) + e * d
        s = s * scale + e
        if TOP:
            top = tl.where(later, v[None, :], top)
        m = big
        if key is not None:
            best, best_id, best_z = draw(z, start, inverse, share, key0, key1, step, best, best_id, best_z, R, C)
    big, s_row, weighted_row, top_row = reduce_parts(m, s, weighted, top, ENTROPY, TOP)
    base, others, total, mean, log_sum = finish(big, s_row, weighted_row, target_z)
    if ENTROPY and HOLES:
        mean += exp_far(far(target_z - base)) / total * tl.load(spread + n, mask=inside, other=0.0)
    own_z = target_z
    if token is not None:
        if key is not None:
            own_z = best_z
            tl.store(token + n, best_id.to(tl.int64), mask=inside)
        else:
            own_z = big
            tl.store(token + n, top_row.to(tl.int64), mask=inside)
    tl.store(logp + n, own_z - base - log_sum, mask=inside)
    tl.store(lse + n, base + log_sum, mask=inside)
    if entropy is not None:
        tl.store(entropy + n, log_sum - mean, mask=inside)
    if top_logp is not None:
        tl.store(top_logp + n, -log_sum, mask=inside)
    if top_id is not None:
        tl.store(top_id + n, top_of(big, top_row, target_z, y).to(tl.int64), mask=inside)

    if operand is not None:
        scale_row = 1.0 / total
        rest = others * scale_row  # the true class: minus the sum of the others
        for start in range(0, vocabulary, C):
            v = start + columns
            here = inside[:, None] & (v < vocabulary)[None, :]
            raw = tl.load(logits + at[:, None] + v[None, :], mask=here, other=0.0)
            z, slope = _logit(raw, v, excluded, bias, temperature_rows, softcap, temperature, vocabulary, HOLES)
            d = far(z - base[:, None])
            p = exp_far(d) * scale_row[:, None]
            out = tl.where(v[None, :] == y[:, None], rest[:, None], -p) * slope
            if coef is not None:
                out = out * tl.load(coef + n, mask=inside, other=0.0)[:, None]
            if ENTROPY:
                h = -p * (d - mean[:, None]) * slope
                if entropy_coef is not None:
                    out = out + h * tl.load(entropy_coef + n, mask=inside, other=0.0)[:, None]
                if entropy_operand is not None:
                    to = entropy_operand + (n * entropy_stride)[:, None] + v[None, :]
                    tl.store(to, _narrow(h, entropy_operand.dtype.element_ty, ROUND), mask=here)
            if SHARED:
                tl.debug_barrier()
            to = operand + (n * operand_stride)[:, None] + v[None, :]
            tl.store(to, _narrow(out, operand.dtype.element_ty, ROUND), mask=here)


@triton.jit(do_not_specialize=["vocabulary", "columns"])
def combine_kernel(  # type: ignore[no-untyped-def]
    first, second, first_coef, second_coef, out, vocabulary, columns, stride, second_stride, out_stride,
    ROUND: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """out[v, n] = first[v, n] * first_coef[n] (+ second[v, n] * second_coef[n]): late coefficients on stored operands."""
    v = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    n = tl.program_id(1) * C + tl.arange(0, C)
    here = (v < vocabulary)[:, None] & (n < columns)[None, :]
    known = n < columns
    x = tl.load(first + (v * stride)[:, None] + n[None, :], mask=here, other=0.0).to(tl.float32)
    x = x * tl.load(first_coef + n, mask=known, other=0.0)[None, :]
    if second is not None:
        other = tl.load(second + (v * second_stride)[:, None] + n[None, :], mask=here, other=0.0).to(tl.float32)
        x = x + other * tl.load(second_coef + n, mask=known, other=0.0)[None, :]
    tl.store(out + (v * out_stride)[:, None] + n[None, :], _narrow(x, out.dtype.element_ty, ROUND), mask=here)


def interpreted() -> bool:
    """Whether TRITON_INTERPRET=1 was set when Triton was imported: kernels run on CPU tensors, in NumPy."""
    return not isinstance(row_kernel, triton.JITFunction)


def flat(options: HeadOptions, vocabulary: int, device: torch.device) -> tuple[Any, ...]:
    """Options as the five arguments that every kernel takes them by; None is compiled away."""
    excluded_V, temperature = options.excluded(vocabulary, device), options.temperature
    by_row = isinstance(temperature, Tensor)
    return (
        None if options.bias is None else options.bias.float().contiguous(),
        None if excluded_V is None else excluded_V.view(torch.uint8),
        temperature if by_row else None,
        options.softcap,
        None if by_row or temperature == 1.0 else temperature,
    )


def row_tile(rows: int, *, draw: bool, interpreter: bool) -> dict[str, int]:
    """One row per program, 8 logits per thread; with few rows, more warps on each. The interpreter pays by the operation."""
    if interpreter:
        return {"R": 64, "C": 128, "num_warps": 4, "num_stages": 1}
    warps = 8 if rows >= 512 or draw else 16
    return {"R": 1, "C": 256 * warps, "num_warps": warps, "num_stages": 1}


def row_statistics(
    logits_CV: Tensor,
    options: HeadOptions,
    results: dict[str, Tensor],
    *,
    target_N: Tensor | None = None,
    joined_N: Tensor | None = None,
    spread_N: Tensor | None = None,
    operand: Tensor | None = None,
    entropy_operand: Tensor | None = None,
    coef_N: Tensor | None = None,
    entropy_coef_N: Tensor | None = None,
    key_N: Tensor | None = None,
    step: int = 0,
    noise_temperature: float | Tensor = 0.0,
) -> None:
    """Launch `row_kernel` on as many rows as `results` have; they hold `logp` and `lse`, and what else is wanted.

    With `target_N`, or `joined_N` and `spread_N` of several targets, their statistics and, where given, operands; without,
    `token`: a draw at a noise temperature above 0, or at those of the rows.
    """
    rows, vocabulary = len(results["logp"]), logits_CV.shape[1]
    temperature_N = noise_temperature if isinstance(noise_temperature, Tensor) else None
    inverse = 0.0 if isinstance(noise_temperature, Tensor) or noise_temperature == 0 else 1.0 / noise_temperature
    drawn = temperature_N is not None or inverse > 0
    tile = row_tile(rows, draw=drawn, interpreter=interpreted())
    row_kernel[(triton.cdiv(rows, tile["R"]),)](
        logits_CV, operand, entropy_operand, target_N, joined_N, spread_N, key_N if drawn else None, temperature_N,
        *flat(options, vocabulary, logits_CV.device), coef_N, entropy_coef_N,
        *(results.get(name) for name in ("logp", "lse", "entropy", "top_logp", "top_id", "token")),
        rows, vocabulary, logits_CV.stride(0), 0 if operand is None else operand.stride(0),
        0 if entropy_operand is None else entropy_operand.stride(0), step, inverse,
        ENTROPY="entropy" in results or entropy_operand is not None or entropy_coef_N is not None,
        SHARED=operand is not None and operand.dtype != torch.float32, ROUND=interpreted(), **tile, **ARITHMETIC,
    )  # fmt: skip


def combine(pairs: list[tuple[Tensor, Tensor]], out_VN: Tensor) -> None:
    """`out = sum operand_VN * coef_N`; unit stride along N."""
    (first, first_coef), (second, second_coef) = pairs[0], pairs[1] if len(pairs) > 1 else (None, None)
    vocabulary, columns = out_VN.shape
    tile = {"R": 256, "C": 128} if interpreted() else {"R": 8, "C": 256}
    combine_kernel[(triton.cdiv(vocabulary, tile["R"]), triton.cdiv(columns, tile["C"]))](
        first, second, first_coef, second_coef, out_VN, vocabulary, columns, first.stride(0),
        0 if second is None else second.stride(0), out_VN.stride(0), ROUND=interpreted(), **tile, num_warps=4, **ARITHMETIC,
    )  # fmt: skip
