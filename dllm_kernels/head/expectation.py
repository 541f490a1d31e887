"""What a call of `expected_embedding` does once it is checked: from tensors to tensors, without autograd.

As in `forward_backward`, an autograd function and the ops of `expectation_ops` are two shells around `forward` and `backward`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dllm_kernels import backends
from dllm_kernels.backends.contract import HeadProblem
from dllm_kernels.backends.expectation import walk
from dllm_kernels.backends.expectation.problem import Buffers, ExpectationProblem
from dllm_kernels.head import distil
from dllm_kernels.head.forward_backward import Needs, _check_values, _outside_autocast, _scatter
from dllm_kernels.head.options import check_finite


class Wants(NamedTuple):
    """Which gradients are wanted: of the head's operands, and of an embedding that is not tied to its weight."""

    head: Needs
    embedding: bool

    @property
    def logits(self) -> bool:
        """Whether one of them passes through the logits."""
        return any(self.head[:5])


class Result(NamedTuple):
    """`expected_ND` in the embedding's dtype. With `keep`, for backward: of each row the largest logit and the sum of
    exponentials below it, and the expectation as it was added up, in memory of its own."""

    expected_ND: Tensor
    levels_2N: Tensor | None
    sum_ND: Tensor | None


Gradients = tuple[Tensor | None, ...]  # of hidden, weight, embedding, bias and the adapter's two operands


@_outside_autocast
def forward(problem: HeadProblem, embedding: Tensor | None, keep: bool) -> Result:
    """Check values and run. Of the problem's targets nothing but their number is read; an embedding of None is the weight."""
    p = problem
    _check_values(backends.select(p), p, targets=False)
    made = expectation_problem(p, embedding)
    sum_ND, seen = walk.run(made)
    check_finite(seen.log_sum_exp(), p)
    dtype = made.table_VD.dtype
    if not keep:
        return Result(sum_ND.to(dtype), None, None)
    levels_2N = torch.stack((seen.top_N, seen.sum_N.to(made.dtype)))
    return Result(sum_ND.to(dtype, copy=True), levels_2N, sum_ND)  # users scale embeddings in place


@_outside_autocast
def backward(
    problem: HeadProblem,
    embedding: Tensor | None,
    shape: Sequence[int],
    levels_2N: Tensor,
    sum_ND: Tensor,
    arrived_ND: Tensor,
    wants: Wants,
) -> Gradients:
    """The six gradients from what `forward` kept; hidden's in `shape`."""
    p, needs = problem, wants.head
    dtype, device = p.statistics_dtype, arrived_ND.device

    def empty(wanted: bool, shape: Sequence[int], kind: torch.dtype) -> Tensor | None:
        return torch.empty(shape, dtype=kind, device=device) if wanted else None

    rows = [empty(needs.hidden, (p.rows, p.hidden_MH.shape[1]), dtype)]
    weights = [empty(needs.weight, p.weight_VH.shape, p.weight_VH.dtype)]
    if p.low_rank is not None:
        low = p.low_rank
        rows.append(empty(needs.low_hidden, (p.rows, low.hidden_MR.shape[1]), dtype))
        weights.append(empty(needs.low_weight, low.weight_VR.shape, low.weight_VR.dtype))
    bias = empty(needs.bias, (len(p.weight_VH),), dtype)
    table = None if embedding is None else empty(wants.embedding, embedding.shape, embedding.dtype)
    buffers = Buffers(tuple(rows), tuple(weights), bias, table)
    walk.gradient(expectation_problem(p, embedding), levels_2N[0], levels_2N[1], sum_ND, arrived_ND, buffers)
    dhidden = None if rows[0] is None else _scatter(rows[0].to(p.hidden_MH.dtype), p.index_N, shape)
    low_rows, low_weight = rows[1] if len(rows) > 1 else None, weights[1] if len(weights) > 1 else None
    dlow = None if low_rows is None else _scatter(low_rows, p.index_N, (*shape[:-1], low_rows.shape[1]))
    dbias = bias if bias is None or p.options.bias is None else bias.to(p.options.bias.dtype)
    return dhidden, weights[0], table, dbias, dlow, low_weight


def expectation_problem(problem: HeadProblem, embedding: Tensor | None) -> ExpectationProblem:
    """The head's chosen rows and the embedding, in the dtypes in which they are multiplied."""
    p, dtype = problem, problem.statistics_dtype
    vocabulary, options = distil.walked(p)
    head = distil.side(p, distil.head_pairs(p), options, walk.product_dtype)
    table = None if embedding is None else embedding.detach()
    products = walk.product_dtype(p.weight_VH if table is None else table, dtype)
    return ExpectationProblem(head, table, products, dtype, vocabulary)
