"""Counter-based noise: every draw is a pure function of (seed, stream, sequence, sample, position, token, step).

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). Nothing here reads or writes a
global random state, so a draw does not depend on batch order, micro-batch size, world size, device, or earlier draws.

    row key      = first two words of Philox(key=(seed, stream), counter=(sequence_lo, sequence_hi, sample, position))
    element bits = Philox(key=row key, counter=(token >> 2, step, 0, tag)), word token & 3

A draw without a token axis (a mask, a level) uses the 64 bits of the row key themselves. A 64-bit uniform of a token
has its high word at tag 0 and its low word at tag 1.

torch has no unsigned arithmetic on the CPU: words travel as int64 in [0, 2^32), 64-bit patterns as int64. CPU tensors
take the C++ of csrc/noise.cpp where the extension was built; it gives the bits of the PyTorch form, which is the
specification and serves every other device.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Sequence
from enum import IntEnum
from types import ModuleType

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_TAG_HIGH, _TAG_LOW = 0, 1

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def _load() -> ModuleType | None:
    try:
        return importlib.import_module("dllm_kernels._C")
    except ImportError:
        return None


_C = _load()


def _cpp(*tensors: Tensor) -> ModuleType | None:
    """The extension, where it takes these tensors: on the CPU, with memory of their own (no fake or traced tensor)."""
    if _C is None or torch.compiler.is_compiling() or any(type(t) is not Tensor or not t.is_cpu for t in tensors):
        return None
    return _C


class Stream(IntEnum):
    """What a draw is for; draws of different streams are independent."""

    MASK = 1  # which tokens of a completion are masked
    LEVEL = 2  # the mask level: t, or the count
    TOKEN = 3  # Gumbel noise of sampled tokens
    PROMPT = 4  # noise on prompt tokens
    DATA = 5  # data order and generated data
    REMASK = 6  # random remasking order


def philox4x32(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Philox4x32-10 on broadcastable int64 tensors of 32-bit words.

    Example:
        >>> zero = torch.zeros((), dtype=torch.int64)
        >>> [hex(int(word)) for word in philox4x32((zero, zero, zero, zero), (zero, zero))]
        ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # mod 2^64: the words are what matters
        c0, c1, c2, c3 = (
            (product1 >> 32 & _MASK32) ^ c1 ^ k0,
            product1 & _MASK32,
            (product0 >> 32 & _MASK32) ^ c3 ^ k1,
            product0 & _MASK32,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK32, (k1 + _WEYL[1]) & _MASK32
    return c0, c1, c2, c3


def _scalar(value: int, device: torch.device) -> Tensor:
    """Filled on the device: a copy from the host would stall a GPU's stream."""
    return torch.full((), value, dtype=torch.int64, device=device)


def check_seed(seed: int) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int, got {type(seed).__name__}")
    if not 0 <= seed <= _MASK32:
        raise ValueError(f"seed must be in 0..2^32-1 (it is one 32-bit key word), got {seed}")
    return seed


def row_bits(seed: int, stream: Stream, sequence_id: Tensor, sample: Tensor, position: Tensor) -> Tensor:
    """The row key as one 64-bit pattern (word 0 low, word 1 high), int64, in the broadcast shape of the three tensors.

    `sequence_id`: any int64; `sample`, `position`: int64 in [0, 2^32). Raises ValueError for a seed beyond 32 bits.

    Example:
        >>> ids = sequence_ids(["puzzle-7"])
        >>> row_bits(0, Stream.MASK, ids, torch.arange(4), torch.tensor(0)).shape
        torch.Size([4])
    """
    check_seed(seed)
    cpp = _cpp(sequence_id, sample, position)
    if cpp is None:
        return _row_bits(seed, stream, sequence_id, sample, position)
    inputs = torch.broadcast_tensors(sequence_id.long(), sample.long(), position.long())
    out = torch.empty(inputs[0].shape, dtype=torch.int64)
    addresses = (t.data_ptr() for t in inputs)
    cpp.row_bits(seed, int(stream), *addresses, list(out.shape), *(list(t.stride()) for t in inputs), out.data_ptr())
    return out


def _row_bits(seed: int, stream: Stream, sequence_id: Tensor, sample: Tensor, position: Tensor) -> Tensor:
    device = sequence_id.device
    key = (_scalar(seed, device), _scalar(int(stream), device))
    counter = (sequence_id & _MASK32, sequence_id >> 32 & _MASK32, sample & _MASK32, position & _MASK32)
    word0, word1, _, _ = philox4x32(counter, key)
    return word1 << 32 | word0


def element_bits(key_N: Tensor, tokens: int, *, step: int | Tensor = 0, tag: int = _TAG_HIGH) -> Tensor:
    """32-bit words `[N, tokens]` (int64 in [0, 2^32)) of the tokens 0..tokens-1 under row keys `key_N` from `row_bits`.

    `step` is an int or an int64 tensor `[N]`. One Philox call serves four tokens.
    """
    step_N = step if isinstance(step, Tensor) else _scalar(step, key_N.device)
    cpp = _cpp(key_N, step_N)
    if cpp is None:
        return _element_bits(key_N, tokens, step_N, tag)
    key_N, step_N = key_N.contiguous(), step_N.long().expand(key_N.shape)
    out = torch.empty(len(key_N), tokens, dtype=torch.int64)
    cpp.element_bits(key_N.data_ptr(), len(key_N), tokens, step_N.data_ptr(), step_N.stride(0), tag, out.data_ptr())
    return out


def _element_bits(key_N: Tensor, tokens: int, step_N: Tensor, tag: int) -> Tensor:
    device = key_N.device
    key = ((key_N & _MASK32)[:, None], (key_N >> 32 & _MASK32)[:, None])
    quad_Q = torch.arange(-(-tokens // 4), device=device)[None, :]
    words = philox4x32((quad_Q, step_N.reshape(-1, 1), _scalar(0, device), _scalar(tag, device)), key)
    return torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(1)[:, :tokens]


def uniform(bits: Tensor) -> Tensor:
    """float64 in the open interval (0, 1) from 64-bit patterns: (top 52 bits + 1/2) / 2^52, exact on every device."""
    return ((bits >> 12 & (1 << 52) - 1).to(torch.float64) + 0.5) * 2.0**-52


def below(bits: Tensor, bound: Tensor) -> Tensor:
    """int64 in [0, bound) from 64-bit patterns; the bias is below bound / 2^52."""
    return (uniform(bits) * bound).floor().to(torch.int64)


def bernoulli(bits: Tensor, p: float | Tensor) -> Tensor:
    """bool: `uniform(bits) < p`, for a float or float64 tensor p in [0, 1]."""
    if not isinstance(p, Tensor):
        p = torch.full((), p, dtype=torch.float64, device=bits.device)
    # on integers, at half the time: (m + 1/2) / 2^52 < p means m < ceil(2^52 p - 1/2), and every step of that is exact
    return (bits >> 12 & (1 << 52) - 1) < (p * 2.0**52 - 0.5).ceil().long()


def smallest(bits_KBS: Tensor, among_BS: Tensor, count_KB: Tensor) -> Tensor:
    """bool `[K, B, S]`: in each row, the `count` entries with the smallest bits (signed; ties by position) where `among`.

    `among_BS` broadcasts to the bits. A count beyond what `among` holds takes it all.
    """
    cpp = _cpp(bits_KBS, among_BS, count_KB)
    if cpp is None:
        return _smallest(bits_KBS, among_BS, count_KB)
    K, B, S = bits_KBS.shape
    among_KBS = among_BS.contiguous().expand(K, B, S)
    bits_KBS, count_KB, out = bits_KBS.contiguous(), count_KB.long().contiguous(), torch.empty(K, B, S, dtype=torch.bool)
    cpp.smallest(
        bits_KBS.data_ptr(),
        among_KBS.data_ptr(),
        among_KBS.stride(0),
        among_KBS.stride(1),
        count_KB.data_ptr(),
        K,
        B,
        S,
        out.data_ptr(),
    )
    return out


def _smallest(bits_KBS: Tensor, among_BS: Tensor, count_KB: Tensor) -> Tensor:
    order_KBS = torch.argsort(bits_KBS, dim=-1, stable=True)
    among_KBS = among_BS.expand_as(bits_KBS).gather(-1, order_KBS)
    chosen_KBS = among_KBS & (among_KBS.cumsum(-1) <= count_KB[:, :, None])
    return torch.empty_like(chosen_KBS).scatter_(-1, order_KBS, chosen_KBS)


def gumbel(key_N: Tensor, tokens: int, *, step: int | Tensor = 0) -> Tensor:
    """Standard Gumbel noise `[N, tokens]`, float64: `-log(-log1p(-u))` with u of 64 bits, so the upper tail reaches 44.

    This is the oracle; kernels compute the same in fp32 with a log polynomial of their own.

    Example:
        >>> key_N = row_bits(0, Stream.TOKEN, sequence_ids(["a"]), torch.tensor([0]), torch.tensor([0]))
        >>> gumbel(key_N, 5).shape
        torch.Size([1, 5])
    """
    high_NV = element_bits(key_N, tokens, step=step, tag=_TAG_HIGH).to(torch.float64)
    low_NV = element_bits(key_N, tokens, step=step, tag=_TAG_LOW).to(torch.float64)
    u_NV = (high_NV * 2.0**32 + low_NV + 0.5) * 2.0**-64
    return -torch.log(-torch.log1p(-u_NV.clamp(max=1.0 - 2.0**-53)))


def sequence_id(data_id: str | int, *, epoch: int = 0, member: int = 0) -> int:
    """A stable signed 64-bit id of one sequence: a hash of (data id, epoch, member of its group).

    Equal on every machine and Python version; two sequences of a run share noise only if all three agree.

    Example:
        >>> sequence_id("gsm8k/17", epoch=2, member=5) == sequence_id("gsm8k/17", epoch=2, member=5)
        True
    """
    text = f"{type(data_id).__name__}:{data_id}\0{epoch}\0{member}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def sequence_ids(
    data_ids: Sequence[str | int],
    *,
    epoch: int = 0,
    members: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """`sequence_id` of each entry, int64 `[B]`; `members` defaults to 0 for all. Raises ValueError on unequal lengths.

    Example:
        >>> ids = sequence_ids(["prompt-0", "prompt-0"], members=[0, 1])
        >>> ids.dtype, len(ids.unique())
        (torch.int64, 2)
    """
    group = [0] * len(data_ids) if members is None else members
    if len(group) != len(data_ids):
        raise ValueError(f"members must have one entry per data id ({len(data_ids)}), got {len(group)}")
    ids = [sequence_id(data_id, epoch=epoch, member=member) for data_id, member in zip(data_ids, group, strict=True)]
    return torch.tensor(ids, dtype=torch.int64, device=device)


def permutation(seed: int, size: int, *, epoch: int = 0, stream: Stream = Stream.DATA) -> Tensor:
    """A permutation of 0..size-1, int64 `[size]`, as a pure function of (seed, stream, epoch).

    Example:
        >>> sorted(permutation(0, 4).tolist())
        [0, 1, 2, 3]
    """
    bits = row_bits(seed, stream, torch.tensor(epoch), torch.tensor(0), torch.arange(size))
    return torch.argsort(bits, stable=True)
