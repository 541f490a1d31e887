"""Logits of two heads slab by slab, statistics and gradients from them: what `distillation_loss` runs on every device.

The vocabulary is walked in slabs of some thousand ids: logits `[v, N]` of both heads by the vendor's product, row statistics
updated from them. A last walk turns the logits into the gradient operand and multiplies it; jsd needs one in between, since a
mixture is one of probabilities. Logits wait for the later walks where there is room, which costs no memory where the weight
trains: they lie in its gradient, whose slab is written when its logits have been read. Rows without room have theirs made again.

Products of 2 N H V operations: one for each head's logits, one for each gradient of hidden states and of weight; two more on
every further walk over rows that do not wait.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dllm_kernels import backends
from dllm_kernels.backends import contract
from dllm_kernels.backends.divergence import engine, reference
from dllm_kernels.backends.divergence.problem import Buffers, DivergenceProblem, Pair, Side, Slab, Statistics
from dllm_kernels.backends.triton import products

SLAB_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 24}  # of one buffer of logits
WEIGHT_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 26}  # of a weight's slab in the statistics' dtype
LEAST_SLAB, MOST_SLAB = 64, 16384
SMALL_BYTES = 8 << 20  # of logits of both heads


def passes(device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The implementation of `reference` for slabs of this dtype on this device."""
    name = "reference" if dtype == torch.float64 else backends.for_device(device).NAME
    if name == "triton":
        return importlib.import_module("dllm_kernels.backends.triton.divergence")
    return engine if name == "cpu" else reference


@dataclass(frozen=True)
class Course:
    """How the logits are walked: from sizes alone."""

    chunk: int  # rows at a time
    slab: int  # ids
    kept: int  # rows of a chunk whose logits wait for the later walks
    own_room: bool  # not in a weight's gradient, but in memory of their own
    walks: int

    def logit_rows(self, rows: int) -> int:
        """How many rows' logits are made of either head, of `rows` in all: those that do not wait once more for each walk."""
        return rows + (self.walks - 1) * (rows - self.kept if self.chunk >= rows else 0)


def course(
    rows: int,
    vocabulary: int,
    widest: int,
    dtype: torch.dtype,
    device: torch.device,
    kind: str,
    gradient: bool,
    of_weights: Sequence[int] | None,
) -> Course:
    """`widest`: columns of the widest weight. `of_weights`: bytes of an id in each weight's gradient, None where no gradient of
    the head is wanted."""
    per_row, count = 2 * dtype.itemsize, max(1, rows)  # bytes of an id and row, of both heads
    chunk, own_room, kept = count, False, 0
    walks = 1 + (kind == "jsd") + gradient
    if of_weights is not None:  # all rows at once: a slab of the gradient is written once
        roomy = max(of_weights, default=0)
        own_room = roomy < per_row * count and per_row * count * vocabulary <= SMALL_BYTES
        kept = count if own_room else min(count, roomy // per_row)
    elif walks > 1:
        budget = contract.WORKSPACE_BYTES.get(device.type, contract.GPU_WORKSPACE_BYTES)
        chunk = kept = min(count, max(contract.ROW_BLOCK // 4, budget // (per_row * vocabulary)))
        own_room = True
    return Course(chunk, slab_ids(chunk, widest, vocabulary, device), kept, own_room, walks)


def slab_ids(rows: int, widest: int, vocabulary: int, device: torch.device) -> int:
    """Ids of a slab for so many rows, at least one, and a weight of so many columns."""
    where = "cpu" if device.type == "cpu" else "cuda"
    fits = min(SLAB_ELEMENTS[where] // rows, WEIGHT_ELEMENTS[where] // widest, MOST_SLAB)
    return min(max(LEAST_SLAB, fits // 64 * 64), vocabulary)


def course_of(problem: DivergenceProblem, buffers: Buffers | None) -> Course:
    """That of `run`."""
    p, of_weights = problem, None
    if buffers is not None and (buffers.bias is not None or any(weight_VK is not None for weight_VK in buffers.weights)):
        of_weights = [w_VK.shape[1] * w_VK.itemsize for w_VK in buffers.weights if w_VK is not None]
    return course(p.rows, p.vocabulary, p.widest, p.dtype, p.device, p.kind, buffers is not None, of_weights)


def run(problem: DivergenceProblem, buffers: Buffers | None = None, coef_N: Tensor | None = None) -> Statistics:
    """Divergences of all rows and, with `buffers`, the gradient of `sum coef * divergence` (of None: 1).

    Memory beside buffers and results: three slabs, one of a weight, and the room where logits wait, see `course`.
    """
    p, way = problem, course_of(problem, buffers)
    room = None
    if way.own_room:
        room = torch.empty(p.vocabulary, 2 * way.kept, dtype=p.dtype, device=p.device)
    elif way.kept and buffers is not None:
        room = max((w_VK for w_VK in buffers.weights if w_VK is not None), key=lambda w_VK: w_VK.shape[1] * w_VK.itemsize)
    parts = []
    for start in range(0, max(p.rows, 1), way.chunk):
        span = slice(start, start + way.chunk)
        chunk, of_chunk = (p, buffers) if way.chunk >= p.rows else (p.of_rows(span), buffers and buffers.of_rows(span))
        walker = _Walker(chunk, way, room)
        parts.append(_statistics(walker))
        if of_chunk is not None:
            _gradient(walker, parts[-1], of_chunk, None if coef_N is None else coef_N[span])
    return Statistics(*(torch.cat(vectors) for vectors in zip(*parts))) if len(parts) > 1 else parts[0]


def gradient(problem: DivergenceProblem, found: Statistics, buffers: Buffers, coef_N: Tensor) -> None:
    """What `run` writes to buffers, from the statistics that it returned: the logits are made again."""
    p = problem
    again = course(p.rows, p.vocabulary, p.widest, p.dtype, p.device, "forward_kl", False, [])
    _gradient(_Walker(p, again, None), found, buffers, coef_N)


# --- logits -------------------------------------------------------------------------------------------------------------


class _Walker:
    """Makes the logits of a chunk slab by slab. Those of the first `kept` rows stay in `room_VK`."""

    def __init__(self, problem: DivergenceProblem, way: Course, room_VK: Tensor | None) -> None:
        p = self.problem = problem
        self.passes = passes(p.device, p.dtype)
        self.size, self.kept = way.slab, min(way.kept, p.rows)
        self.room = None if room_VK is None or not self.kept else room_VK.view(torch.uint8)
        self._again = False
        self._made: list[Tensor] = []
        self._wide: Tensor | None = None

    def slab_like(self) -> Tensor:
        return torch.empty(self.size, self.problem.rows, dtype=self.problem.dtype, device=self.problem.device)

    def wide(self, ids: int, width: int) -> Tensor:
        """Memory for ids of any weight in the statistics' dtype."""
        if self._wide is None:
            p = self.problem
            self._wide = torch.empty(self.size * p.widest, dtype=p.dtype, device=p.device)
        return self._wide[: ids * width].view(ids, width)

    def weight(self, pair: Pair, span: slice) -> Tensor:
        """A slab of a weight in the dtype of its rows, good until the next call."""
        slab_VK = pair.weight_VK[span]
        return slab_VK if slab_VK.dtype == pair.rows_NK.dtype else self.wide(*slab_VK.shape).copy_(slab_VK)

    def walk(self) -> Iterator[tuple[slice, Slab]]:
        p, again, kept = self.problem, self._again, self.kept
        self._again, whole = True, kept == p.rows and self.room is not None
        if not whole and not self._made:
            self._made = [self.slab_like(), self.slab_like()]
        for first in range(0, p.vocabulary, self.size):
            span = slice(first, min(first + self.size, p.vocabulary))
            held = self._held(span)
            both = list(held) if whole and held is not None else [x_VN[: span.stop - first] for x_VN in self._made]
            if not (whole and again):
                missing = slice(kept if again else 0, None)
                for which, (side, out_VN) in enumerate(zip((p.student, p.teacher), both)):
                    self._logits_(side, span, missing, out_VN[:, missing])
                    if held is not None and not whole:
                        source, target = (held[which], out_VN[:, :kept]) if again else (out_VN[:, :kept], held[which])
                        target.copy_(source)
            yield span, Slab(p, both[0], both[1])

    def _held(self, span: slice) -> Tensor | None:
        """`[2, v, kept]`: the memory of a slab's ids, for the logits of student and teacher."""
        if self.room is None:
            return None
        dtype, size = self.problem.dtype, (2, span.stop - span.start, self.kept)
        flat = self.room[span].view(-1)[: size[0] * size[1] * size[2] * dtype.itemsize]
        return flat.view(dtype).view(size)

    def _logits_(self, side: Side, span: slice, rows: slice, out_VN: Tensor) -> None:
        """The final logits of some rows."""
        for number, pair in enumerate(side.pairs):
            multiply_(out_VN, self.weight(pair, span), pair.rows_NK[rows].t(), add=number > 0)
        self.passes.finish_(out_VN, side.options.of_rows(rows), span, self.problem.vocabulary)


def multiply_(out: Tensor, left: Tensor, right: Tensor, *, add: bool) -> None:
    """`out (+)= left @ right` with fp32 results for 16-bit operands, which come only where the vendor has that product."""
    more: dict[str, Any] = {} if left.dtype == out.dtype else {"out_dtype": out.dtype}
    if add:
        torch.addmm(out, left, right, out=out, **more)
    else:
        torch.mm(left, right, out=out, **more)


def product_dtype(weight: Tensor, statistics: torch.dtype) -> torch.dtype:
    """In which dtype rows meet this weight: its own where the vendor multiplies it into the statistics' dtype."""
    return weight.dtype if products._mixed(weight.device, weight.dtype) else statistics


# --- row statistics -----------------------------------------------------------------------------------------------------


def _statistics(walker: _Walker) -> Statistics:
    p = walker.problem
    sums_P5N = None
    for _, slab in walker.walk():
        sums_P5N = walker.passes.look(slab, sums_P5N)
    assert sums_P5N is not None
    s_max_N, s_sum_N, t_max_N, t_sum_N, weighted_N = reference.joined(sums_P5N, p.kind)
    s_lse_N, t_lse_N = s_max_N + s_sum_N.log(), t_max_N + t_sum_N.log()
    if p.kind == "jsd":
        narrow, sums_P2N = (s_lse_N.to(p.dtype), t_lse_N.to(p.dtype)), None
        for _, slab in walker.walk():
            sums_P2N = walker.passes.mix(slab, *narrow, sums_P2N)
        assert sums_P2N is not None
        of_teacher_N, mean_N = sums_P2N.sum(0)
        divergence_N = p.beta * of_teacher_N + (1.0 - p.beta) * mean_N
    elif p.kind == "forward_kl":
        mean_N = weighted_N / t_sum_N
        divergence_N = mean_N - t_lse_N + s_lse_N
    else:
        mean_N = weighted_N / s_sum_N
        divergence_N = mean_N - s_lse_N + t_lse_N
    return Statistics(*(vector_N.to(p.dtype) for vector_N in (divergence_N, s_lse_N, t_lse_N, mean_N)))


# --- gradients ----------------------------------------------------------------------------------------------------------


def _gradient(walker: _Walker, found: Statistics, buffers: Buffers, coef_N: Tensor | None) -> None:
    """Write the gradient of `sum coef * divergence`."""
    p, pairs, options = walker.problem, walker.problem.student.pairs, walker.problem.student.options
    _clear(buffers, p.vocabulary)
    factor_N = torch.ones(p.rows, dtype=p.dtype, device=p.device) if coef_N is None else coef_N.to(p.dtype)
    factor_N = (factor_N / options.temperature).contiguous()
    squeeze_N = None
    if options.softcap is not None:
        squeeze_N = torch.full_like(factor_N, 1.0 / options.softcap) * options.temperature
    kinds = {pair.rows_NK.dtype for pair in pairs}
    dtype = kinds.pop() if len(kinds) == 1 and buffers.bias is None else p.dtype
    slab_VN = torch.empty(walker.size, p.rows, dtype=dtype, device=p.device)
    for span, slab in walker.walk():
        operand_VN = slab_VN[: span.stop - span.start]
        walker.passes.operand(slab, found, factor_N, squeeze_N, operand_VN)
        if buffers.bias is not None:
            buffers.bias[span] = operand_VN.sum(1)
        for pair, rows_NK, weight_VK in zip(pairs, buffers.rows, buffers.weights):
            factor_VN = operand_VN.to(pair.rows_NK.dtype)
            if rows_NK is not None:
                multiply_(rows_NK, factor_VN.t(), walker.weight(pair, span), add=True)
            if weight_VK is not None and weight_VK.dtype == p.dtype:
                multiply_(weight_VK[span], factor_VN, pair.rows_NK, add=False)
            elif weight_VK is not None:
                wide_VK = walker.wide(len(factor_VN), weight_VK.shape[1])
                multiply_(wide_VK, factor_VN, pair.rows_NK, add=False)
                weight_VK[span] = wide_VK


def _clear(buffers: Buffers, vocabulary: int) -> None:
    """Rows start at 0, and so does what the walk leaves out; a weight's slabs may hold logits and are written whole."""
    for rows_NK in buffers.rows:
        if rows_NK is not None:
            rows_NK.zero_()
    for of_ids in (*buffers.weights, buffers.bias):
        if of_ids is not None:
            of_ids[vocabulary:] = 0.0
