"""The expectation of an embedding, and its gradients, slab by slab: what `expected_embedding` runs on every device.

Forward walks the vocabulary once, in slabs of some thousand ids: logits `[v, N]` by the vendor's product, exponentials below the
largest logit so far, their product with the slab's embeddings added to what was, which is scaled down where the largest logit
rises. Backward makes the logits again, and beside them `E g^T`, what the upstream gradient is at each id; the two become the
gradient by the logits, which meets the weight and the rows. Nothing is held beyond a slab.

Products of 2 N H V (or N D V) operations: two forward; backward one for the logits, one for `E g^T` where a gradient passes
through them, and one for each gradient of rows, weight and embedding.
"""

from __future__ import annotations

import importlib
from bisect import bisect_left
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from dllm_kernels import backends
from dllm_kernels.backends.divergence import walk
from dllm_kernels.backends.divergence.walk import multiply_
from dllm_kernels.backends.expectation import engine, reference
from dllm_kernels.backends.expectation.problem import Buffers, ExpectationProblem, Pull, Seen


def passes(device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The implementation of `reference` for slabs of this dtype on this device."""
    name = "reference" if dtype == torch.float64 else backends.for_device(device).NAME
    if name == "triton":
        return importlib.import_module("dllm_kernels.backends.triton.expectation")
    return engine if name == "cpu" else reference


def product_dtype(weight: Tensor, statistics: torch.dtype) -> torch.dtype:
    """In which dtype a slab meets this weight: probabilities of a large vocabulary are below what float16 tells apart."""
    return statistics if weight.dtype == torch.float16 else walk.product_dtype(weight, statistics)


def slab_ids(rows: int, widest: int, vocabulary: int, device: torch.device) -> int:
    """How many ids are walked at a time: from sizes alone, and the same in both directions, so that logits are too."""
    return walk.slab_ids(max(1, rows), widest, vocabulary, device)


@torch.no_grad()
def run(problem: ExpectationProblem) -> tuple[Tensor, Seen]:
    """`[N, D]` in the statistics' dtype, and what backward needs of the logits."""
    p, walker = problem, _Walker(problem)
    sum_ND = torch.zeros(p.rows, p.width, dtype=p.dtype, device=p.device)
    seen = Seen(
        torch.full((p.rows,), float("-inf"), dtype=p.dtype, device=p.device),
        torch.zeros(p.rows, dtype=torch.float64, device=p.device),
    )
    own = walker.slab_like(p.products) if p.products != p.dtype else None
    for span, z_VN in walker.walk():
        e_VN = z_VN if own is None else own[: len(z_VN)]
        scale_N = walker.passes.soften(z_VN, seen, e_VN)
        sum_ND.mul_(scale_N[:, None])
        multiply_(sum_ND, e_VN.t(), walker.embedding(span), add=True)
    return sum_ND.div_(seen.sum_N.to(p.dtype)[:, None]), seen


@torch.no_grad()
def gradient(
    problem: ExpectationProblem, top_N: Tensor, sum_N: Tensor, expected_ND: Tensor, arrived_ND: Tensor, buffers: Buffers
) -> None:
    """Write the gradient of `sum arrived * expected`, from what `run` found, into the buffers."""
    p, walker, pairs = problem, _Walker(problem), problem.head.pairs
    options = p.head.options
    for x in buffers.rows:
        if x is not None:
            x.zero_()
    for of_ids in (*buffers.weights, buffers.bias, buffers.embedding):
        if of_ids is not None:
            of_ids[p.vocabulary :] = 0.0  # which the walk leaves out
    tied = p.embedding_VD is None and buffers.weights[0] is not None
    to_table = tied or buffers.embedding is not None
    upstream_ND = arrived_ND.to(p.products).contiguous()  # what autograd hands over may be expanded
    inverse_N, of_rows = (1.0 / sum_N).to(p.dtype), None
    if buffers.of_logits:
        mean_N = (arrived_ND.to(p.dtype) * expected_ND).sum(-1, dtype=torch.float64).to(p.dtype)
        factor_N = (torch.ones_like(mean_N) / options.temperature).contiguous()
        squeeze_N = None if options.softcap is None else torch.full_like(mean_N, 1.0 / options.softcap) * options.temperature
        of_rows = Pull(mean_N, factor_N, squeeze_N)
    kinds = {pair.rows_NK.dtype for pair in pairs}
    operands = kinds.pop() if len(kinds) == 1 and buffers.bias is None else p.dtype
    # a slab's results lie in place of what they are made of, but for those in 16 bits
    pulls, own_p, own_out = (
        walker.slab_like(dtype) if wanted else None
        for wanted, dtype in (
            (buffers.of_logits, p.dtype),
            (to_table and p.products != p.dtype, p.products),
            (buffers.of_logits and operands != p.dtype, operands),
        )
    )
    for span, z_VN in walker.walk():
        ids = slice(0, len(z_VN))
        pull_VN = out_VN = None
        if pulls is not None:
            pull_VN = pulls[ids]
            out_VN = pull_VN if own_out is None else own_out[ids]
            multiply_(pull_VN, walker.embedding(span), upstream_ND.t(), add=False)
        p_VN = None if not to_table else z_VN if own_p is None else own_p[ids]
        walker.passes.pull(z_VN, pull_VN, top_N, inverse_N, of_rows, p_VN, out_VN)
        if buffers.bias is not None and out_VN is not None:
            buffers.bias[span] = out_VN.sum(1)
        for number, (pair, rows_NK, weight_VK) in enumerate(zip(pairs, buffers.rows, buffers.weights)):
            if out_VN is None or rows_NK is weight_VK is None:
                continue
            factor_VN = out_VN.to(pair.rows_NK.dtype)
            if rows_NK is not None:
                multiply_(rows_NK, factor_VN.t(), walker.weight(number, span), add=True)
            if weight_VK is not None:
                terms = [(factor_VN, pair.rows_NK)]
                if number == 0 and tied and p_VN is not None:
                    terms.append((p_VN, upstream_ND))
                walker.write_(weight_VK[span], terms)
        if buffers.embedding is not None and p_VN is not None:
            walker.write_(buffers.embedding[span], [(p_VN, upstream_ND)])


class _Walker:
    """Makes the logits of all rows slab by slab."""

    def __init__(self, problem: ExpectationProblem) -> None:
        p = self.problem = problem
        self.passes = passes(p.device, p.dtype)
        self.widest = max(p.width, *(weight_VK.shape[1] for _, weight_VK in p.head.pairs))
        self.size = slab_ids(p.rows, self.widest, p.vocabulary, p.device)
        self.suppressed = sorted(p.head.options.suppress)
        self.excluded_V = p.head.options.excluded(p.vocabulary, p.device)
        self._held: dict[object, Tensor] = {}
        self._of: dict[int, slice] = {}

    def slab_like(self, dtype: torch.dtype) -> Tensor:
        return torch.empty(self.size, self.problem.rows, dtype=dtype, device=self.problem.device)

    def walk(self) -> Iterator[tuple[slice, Tensor]]:
        """Spans of ids with their final logits, which may be written over."""
        p, made = self.problem, self.slab_like(self.problem.dtype)
        for first in range(0, p.vocabulary, self.size):
            span = slice(first, min(first + self.size, p.vocabulary))
            z_VN = made[: span.stop - first]
            for number, pair in enumerate(p.head.pairs):
                multiply_(z_VN, self.weight(number, span), pair.rows_NK.t(), add=number > 0)
            self.passes.finish_(z_VN, p.head.options, span, p.vocabulary)
            yield span, z_VN

    def weight(self, number: int, span: slice) -> Tensor:
        """A slab of a pair's weight as its rows meet it."""
        pair = self.problem.head.pairs[number]
        return self._slab(number, pair.weight_VK, pair.rows_NK.dtype, span)

    def embedding(self, span: slice) -> Tensor:
        """A slab of the embedding as probabilities meet it."""
        p = self.problem
        if p.embedding_VD is None and p.products == p.head.pairs[0].rows_NK.dtype:
            return self.weight(0, span)
        return self._slab(-1, p.table_VD, p.products, span)

    def _slab(self, number: int, weight_VK: Tensor, dtype: torch.dtype, span: slice) -> Tensor:
        """Excluded ids as zeros, since 0 times what they hold may be NaN: they have no probability whatever it is."""
        excluded = self._excluded(span)
        if weight_VK.dtype == dtype and not excluded:
            return weight_VK[span]
        held_VK = self._memory(number, weight_VK.shape[1], dtype)[: span.stop - span.start]
        if self._of.get(number) != span:
            self._of[number] = span
            held_VK.copy_(weight_VK[span])
            if excluded and self.excluded_V is not None:
                held_VK.masked_fill_(self.excluded_V[span, None], 0.0)
        return held_VK

    def _excluded(self, span: slice) -> bool:
        return bisect_left(self.suppressed, span.start) < bisect_left(self.suppressed, span.stop)

    def _memory(self, name: object, width: int, dtype: torch.dtype) -> Tensor:
        if name not in self._held:
            self._held[name] = torch.empty(self.size, width, dtype=dtype, device=self.problem.device)
        return self._held[name]

    def write_(self, out_VK: Tensor, terms: list[tuple[Tensor, Tensor]]) -> None:
        """`out = sum left @ right`, added up in the statistics' dtype."""
        p = self.problem
        sum_VK = out_VK
        if out_VK.dtype != p.dtype:
            sum_VK = self._memory(f"sum of {out_VK.shape[1]}", out_VK.shape[1], p.dtype)[: len(out_VK)]
        for number, (left_VN, right_NK) in enumerate(terms):
            multiply_(sum_VK, left_VN, right_NK, add=number > 0)
        if sum_VK is not out_VK:
            out_VK.copy_(sum_VK)
