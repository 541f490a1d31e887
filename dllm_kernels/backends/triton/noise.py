"""Philox4x32-10 in Triton: `philox4x32` for use inside kernels, and kernels with the bits of `dllm_kernels.noise`.

Inside Triton words are uint32; what leaves a kernel is int64, as everywhere in the library.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dllm_kernels import noise
from dllm_kernels.backends.triton.configs import ARITHMETIC

_BLOCK = 1024


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    """Ten rounds on broadcastable uint32 blocks; returns the four words."""
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, tl.full([], 0xD2511F53, tl.uint32)), c0 * tl.full([], 0xD2511F53, tl.uint32)
        high1, low1 = tl.umulhi(c2, tl.full([], 0xCD9E8D57, tl.uint32)), c2 * tl.full([], 0xCD9E8D57, tl.uint32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = k0 + tl.full([], 0x9E3779B9, tl.uint32)
        k1 = k1 + tl.full([], 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit(do_not_specialize=["seed", "stream"])
def _row_bits_kernel(  # type: ignore[no-untyped-def]
    sequence, sample, position, out, total, size1, size2,
    a0, a1, a2, b0, b1, b2, c0, c1, c2,  # strides of sequence, sample, position
    seed, stream, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < total
    i2 = i % size2
    i1 = i // size2 % size1
    i0 = i // size2 // size1
    sequence_id = tl.load(sequence + i0 * a0 + i1 * a1 + i2 * a2, mask=inside, other=0)
    sample_index = tl.load(sample + i0 * b0 + i1 * b1 + i2 * b2, mask=inside, other=0)
    position_index = tl.load(position + i0 * c0 + i1 * c1 + i2 * c2, mask=inside, other=0)
    zero = tl.zeros([BLOCK], tl.uint32)
    word0, word1, _, _ = philox4x32(
        sequence_id.to(tl.uint32),
        (sequence_id >> 32).to(tl.uint32),
        sample_index.to(tl.uint32),
        position_index.to(tl.uint32),
        zero + seed.to(tl.uint32),
        zero + stream.to(tl.uint32),
    )
    tl.store(out + i, word1.to(tl.int64) << 32 | word0.to(tl.int64), mask=inside)


@triton.jit(do_not_specialize=["tag"])
def _element_bits_kernel(key, step, step_stride, out, tokens, tag, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    quad = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row_key = tl.load(key + row)
    zero = tl.zeros([BLOCK], tl.uint32)
    words = philox4x32(
        quad.to(tl.uint32),
        zero + tl.load(step + row * step_stride).to(tl.uint32),
        zero,
        zero + tag.to(tl.uint32),
        zero + row_key.to(tl.uint32),
        zero + (row_key >> 32).to(tl.uint32),
    )
    for word in tl.static_range(4):
        token = quad * 4 + word
        tl.store(out + row * tokens + token, words[word].to(tl.int64), mask=token < tokens)


def row_bits(seed: int, stream: noise.Stream, sequence_id: Tensor, sample: Tensor, position: Tensor) -> Tensor:
    """`noise.row_bits`, bit by bit; the broadcast shape has at most three dimensions."""
    noise.check_seed(seed)
    tensors = torch.broadcast_tensors(sequence_id.long(), sample.long(), position.long())
    shape = tensors[0].shape
    if len(shape) > 3:
        raise ValueError(f"sequence_id, sample and position must broadcast to at most 3 dimensions, got {list(shape)}")
    out = torch.empty(shape, dtype=torch.int64, device=sequence_id.device)
    views = [t.view((1,) * (3 - len(shape)) + shape) for t in tensors]
    if total := out.numel():
        strides = [stride for t in views for stride in t.stride()]
        grid = (triton.cdiv(total, _BLOCK),)
        sizes = total, *views[0].shape[1:]
        _row_bits_kernel[grid](*views, out, *sizes, *strides, seed, int(stream), BLOCK=_BLOCK, **ARITHMETIC)
    return out


def element_bits(key_N: Tensor, tokens: int, *, step: int | Tensor = 0, tag: int = 0) -> Tensor:
    """`noise.element_bits`, bit by bit."""
    device = key_N.device
    step_N = (step if isinstance(step, Tensor) else torch.full((), step, device=device)).long().expand(key_N.shape)
    out = torch.empty(len(key_N), tokens, dtype=torch.int64, device=device)
    if out.numel():
        block = min(_BLOCK, triton.next_power_of_2(triton.cdiv(tokens, 4)))
        grid = (len(key_N), triton.cdiv(tokens, 4 * block))
        _element_bits_kernel[grid](key_N.contiguous(), step_N, step_N.stride(0), out, tokens, tag, BLOCK=block, **ARITHMETIC)
    return out
