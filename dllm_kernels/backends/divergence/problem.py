"""What the divergence of two heads is computed of, and what comes out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from dllm_kernels.backends.contract import HeadOptions

KINDS = ("forward_kl", "reverse_kl", "jsd")
FAR = 80.0  # nats: exp(-80) times anything finite is nothing, exp(80) does not overflow


class Pair(NamedTuple):
    """`rows_NK weight_VK^T`, a part of a head's raw logits. Rows in the statistics' dtype or in the weight's."""

    rows_NK: Tensor
    weight_VK: Tensor


@dataclass(frozen=True, eq=False)
class Side:
    """One of the two heads: the sum of its pairs, then what `options` say (a bias and a temperature in the statistics' dtype).

    Options of the two sides differ in bias and softcap alone.
    """

    pairs: tuple[Pair, ...]
    options: HeadOptions

    def of_rows(self, span: slice) -> Side:
        pairs = tuple(Pair(rows_NK[span], weight_VK) for rows_NK, weight_VK in self.pairs)
        return replace(self, pairs=pairs, options=self.options.of_rows(span))


@dataclass(frozen=True, eq=False)
class DivergenceProblem:
    """Two heads on the same N rows. Checked, without autograd."""

    student: Side
    teacher: Side
    kind: str
    beta: float
    dtype: torch.dtype  # of statistics
    vocabulary: int  # ids from here on have probability 0 in both

    @property
    def rows(self) -> int:
        return len(self.student.pairs[0].rows_NK)

    @property
    def widest(self) -> int:
        """Columns of the widest weight."""
        return max(weight_VK.shape[1] for side in (self.student, self.teacher) for _, weight_VK in side.pairs)

    @property
    def device(self) -> torch.device:
        return self.student.pairs[0].rows_NK.device

    def of_rows(self, span: slice) -> DivergenceProblem:
        return replace(self, student=self.student.of_rows(span), teacher=self.teacher.of_rows(span))


class Statistics(NamedTuple):
    """`[N]` in the statistics' dtype."""

    divergence: Tensor
    student_lse: Tensor
    teacher_lse: Tensor
    mean: Tensor  # the expectation that the gradients of reverse_kl and jsd subtract


class Slab(NamedTuple):
    """A part of the vocabulary with its final logits, dense `[v, N]` in the statistics' dtype, which must be left as they are."""

    problem: DivergenceProblem
    student_VN: Tensor
    teacher_VN: Tensor


class Buffers(NamedTuple):
    """Where gradients are written, None where one is not wanted: of each pair's rows `[N, K]` and weight `[V, K]`, of the bias.

    Rows in the statistics' dtype, the others in any.
    """

    rows: tuple[Tensor | None, ...]
    weights: tuple[Tensor | None, ...]
    bias: Tensor | None = None

    def of_rows(self, span: slice) -> Buffers:
        return self._replace(rows=tuple(None if rows_NK is None else rows_NK[span] for rows_NK in self.rows))
