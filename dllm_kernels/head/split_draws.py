"""Draws from a head split over ranks by rows of its weight: the tokens of the unsplit head.

The noise of an id is that of the unsplit head. It is computed in float64 for every id, in PyTorch: exact, and slower than the
backends' own. What `top_k`, `top_p` and `min_p` leave is found from what the ranks tell each other: the k largest logits of
each, the largest of all, and how much probability lies above a threshold, which is searched by halves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dllm_kernels.backends import reference
from dllm_kernels.backends.contract import ROW_BLOCK, HeadProblem
from dllm_kernels.backends.targets import best_of
from dllm_kernels.head.shards import Shard, gathered, largest, summed
from dllm_kernels.head.vocab_parallel import merge
from dllm_kernels.noise import gumbel


class Filters(NamedTuple):
    """Which ids a token is drawn from, as in `sample_tokens`; 1 and 0, which leave all, are None."""

    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    top_p_first: bool = False


def sample(
    problem: HeadProblem | None,
    key_N: Tensor,
    shard: Shard,
    filters: Filters,
    *,
    step: int,
    temperature: float | Tensor,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Token, its logp and entropy of the whole head, equal on all ranks; `problem` is None where this rank has no id."""
    N, device = key_N.numel(), key_N.device
    best_N = torch.full((N,), -torch.inf, dtype=torch.float64, device=device)
    z_N = torch.zeros(N, dtype=dtype, device=device)
    lse_N, entropy_N = z_N - torch.inf, z_N.clone()
    token_N = torch.zeros(N, dtype=torch.int64, device=device)
    noisy = isinstance(temperature, Tensor) or temperature > 0
    restricted = noisy and (filters.top_k, filters.top_p, filters.min_p) != (None, None, None)
    size = max(1, ROW_BLOCK // 8)
    for start in range(0, N if restricted or problem is not None else 0, size):
        span = slice(start, min(start + size, N))
        if problem is None:  # one id that is never drawn
            z_NV = torch.full((span.stop - span.start, 1), -torch.inf, dtype=dtype, device=device)
        else:
            z_NV = _final_logits(problem, span)
        T = temperature[span, None].double() if isinstance(temperature, Tensor) else temperature
        left_NV = z_NV
        if restricted:
            tempering_N1 = torch.where(T == 0, 1.0, T) if isinstance(T, Tensor) else z_NV.new_full((len(z_NV), 1), T).double()
            left_NV = restricted_logits(z_NV, tempering_N1, filters, shard)
        if problem is None:
            continue
        perturbed_NV = left_NV.double()
        if noisy:
            perturbed_NV = perturbed_NV + T * gumbel(key_N[span], shard.first + shard.count, step=step)[:, shard.first :]
        best_N[span] = perturbed_NV.amax(-1)
        token_N[span] = perturbed_NV.argmax(-1)  # torch: the first of equal ones
        z_N[span] = z_NV.gather(1, token_N[span, None])[:, 0]
        logp_NV = z_NV.log_softmax(-1)
        lse_N[span] = z_NV.logsumexp(-1)
        entropy_N[span] = -torch.where(logp_NV > -torch.inf, logp_NV.exp() * logp_NV, 0.0).sum(-1)
    best_RN = gathered(best_N, shard.group)
    of_N = best_RN.argmax(0)  # ties: the smallest id, as ranks are in the order of their ids
    token_N = gathered(token_N + shard.first, shard.group).gather(0, of_N[None])[0]
    held_N1 = (of_N == shard.rank)[:, None]
    whole = merge(shard.group, held_N1, (z_N - lse_N)[:, None] if problem is not None else z_N[:, None], lse_N, entropy_N)
    return {"token": token_N, "logp": whole.logp[:, 0], "entropy": whole.entropy, "lse": whole.lse}


def _final_logits(problem: HeadProblem, span: slice) -> Tensor:
    p = problem
    rows_NH = p.hidden_MH[span] if p.index_N is None else p.hidden_MH[p.index_N[span]]
    z_NV = torch.empty(len(rows_NH), len(p.weight_VH), dtype=p.statistics_dtype, device=rows_NH.device)
    reference._matmul_nt_(z_NV, rows_NH.to(p.statistics_dtype), p.weight_VH)
    adapter = reference.Adapter(p, len(rows_NH))
    adapter.add_logits_(z_NV, span)
    reference._transform_(z_NV, p.options.of_rows(span))
    return z_NV


def restricted_logits(z_NV: Tensor, scale_N1: Tensor, filters: Filters, shard: Shard) -> Tensor:
    """The logits, -inf where `backends.reference.restrict_` on all ranks' ids leaves them out. Collectives."""
    best_N1 = z_NV.amax(-1, keepdim=True)
    dist.all_reduce(best_N1, dist.ReduceOp.MAX, group=shard.group)
    found_NV = z_NV
    if filters.top_k is not None and filters.top_k < shard.vocabulary:
        found_NV = z_NV.masked_fill(~_among_largest(z_NV, filters.top_k, shard), -torch.inf)
    if filters.top_p is not None:
        of_NV = z_NV if filters.top_p_first else found_NV
        found_NV = found_NV.masked_fill(~_nucleus(of_NV, best_N1, scale_N1, filters.top_p, shard), -torch.inf)
    if filters.min_p is not None:
        found_NV = found_NV.masked_fill((z_NV - best_N1).double() / scale_N1 < math.log(filters.min_p), -torch.inf)
    return found_NV


def _among_largest(z_NV: Tensor, count: int, shard: Shard) -> Tensor:
    """bool `[N, V]`: the `count` largest logits of all ranks; of equal ones the smaller ids."""
    own = best_of(z_NV, min(count, z_NV.shape[1]))
    z_NK, id_NK, *_ = largest(shard, *own, count)
    least_N1, last_N1 = z_NK[:, -1:], id_NK[:, -1:]
    id_V = torch.arange(shard.first, shard.first + z_NV.shape[1], device=z_NV.device)
    return (z_NV > least_N1) | ((z_NV == least_N1) & (id_V <= last_N1))


def _nucleus(z_NV: Tensor, best_N1: Tensor, scale_N1: Tensor, top_p: float, shard: Shard) -> Tensor:
    """bool `[N, V]`: ids before which, in falling order, of equal ones the smaller first, less than `top_p` of the mass lies."""
    sorted_NV = z_NV.sort(-1, descending=True).values
    e_NV = (sorted_NV.double() / scale_N1 - best_N1.double() / scale_N1).exp()
    total_N1 = summed(e_NV.sum(-1, keepdim=True), shard.group)
    mass_NV = torch.nn.functional.pad((e_NV / total_N1).cumsum(-1), (1, 0))
    rising_NV = -sorted_NV

    def above(z_N1: Tensor) -> Tensor:
        """The mass of the larger logits, on all ranks."""
        return summed(mass_NV.gather(1, torch.searchsorted(rising_NV, -z_N1)), shard.group)

    level_N1 = _smallest(best_N1, lambda z_N1: above(z_N1) < top_p)
    before_N1 = above(level_N1)
    equal_NV = z_NV == level_N1
    counts_RN1 = gathered(equal_NV.sum(-1, keepdim=True), shard.group)
    p_N1 = (level_N1.double() / scale_N1 - best_N1.double() / scale_N1).exp() / total_N1
    kept_N1 = ((top_p - before_N1) / p_N1).ceil()
    kept_N1 = torch.where(before_N1 + (kept_N1 - 1) * p_N1 >= top_p, kept_N1 - 1, kept_N1)
    kept_N1 = torch.where(before_N1 + kept_N1 * p_N1 < top_p, kept_N1 + 1, kept_N1).nan_to_num(torch.inf)
    own_N1 = kept_N1 - counts_RN1[: shard.rank].sum(0)
    return (z_NV > level_N1) | (equal_NV & (equal_NV.cumsum(-1) <= own_N1))


def _smallest(best_N1: Tensor, holds: Callable[[Tensor], Any]) -> Tensor:
    """The smallest number, -inf included, up to one of which a condition holds, of which it holds: by halving all floats."""
    whole = torch.int32 if best_N1.dtype == torch.float32 else torch.int64
    flipped = torch.iinfo(whole).max

    def key(z: Tensor) -> Tensor:  # in the order of the numbers
        bits = (z + 0.0).view(whole)  # no negative zero
        return torch.where(bits >= 0, bits, bits ^ flipped).long()

    def number(keys: Tensor) -> Tensor:
        narrow = keys.to(whole)
        return torch.where(narrow >= 0, narrow, narrow ^ flipped).view(best_N1.dtype)

    high_N1, low_N1 = key(best_N1), key(torch.full_like(best_N1, -torch.inf)) - 1
    for _ in range(torch.iinfo(whole).bits):
        middle_N1 = (high_N1 & low_N1) + ((high_N1 ^ low_N1) >> 1)  # rounded down, without overflow
        middle_N1 = torch.where(middle_N1 == low_N1, high_N1, middle_N1)
        true_N1 = holds(number(middle_N1))
        high_N1, low_N1 = torch.where(true_N1, middle_N1, high_N1), torch.where(true_N1, low_N1, middle_N1)
    return number(high_N1)
