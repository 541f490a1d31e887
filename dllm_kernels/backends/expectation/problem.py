"""What the expectation of an embedding is computed of, and what comes out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dllm_kernels.backends.divergence.problem import Side


@dataclass(frozen=True, eq=False)
class ExpectationProblem:
    """`softmax(logits of the head) E` on N rows. Checked, without autograd."""

    head: Side
    embedding_VD: Tensor | None  # E in any floating dtype; None: the weight of the head's first pair
    products: torch.dtype  # in which E is multiplied
    dtype: torch.dtype  # of statistics
    vocabulary: int  # ids from here on have probability 0

    @property
    def rows(self) -> int:
        return len(self.head.pairs[0].rows_NK)

    @property
    def width(self) -> int:
        return self.table_VD.shape[1]

    @property
    def table_VD(self) -> Tensor:
        return self.head.pairs[0].weight_VK if self.embedding_VD is None else self.embedding_VD

    @property
    def device(self) -> torch.device:
        return self.table_VD.device


class Seen(NamedTuple):
    """Of each row's logits so far, updated in place."""

    top_N: Tensor  # the largest, in the statistics' dtype
    sum_N: Tensor  # of exp(z - top), float64

    def log_sum_exp(self) -> Tensor:
        return (self.top_N + self.sum_N.log()).to(self.top_N.dtype)


class Pull(NamedTuple):
    """What each id's upstream gradient is turned into the gradient by its raw logit with; `[N]` in the statistics' dtype."""

    mean_N: Tensor
    factor_N: Tensor  # 1 / temperature
    squeeze_N: Tensor | None  # temperature / softcap


class Buffers(NamedTuple):
    """Where gradients are written, None where one is not wanted: of each pair's rows `[N, K]` and weight `[V, K]`, of the bias
    `[V]` and of the embedding `[V, D]`; of a tied one the first weight's.

    Rows in the statistics' dtype, the others in any.
    """

    rows: tuple[Tensor | None, ...]
    weights: tuple[Tensor | None, ...]
    bias: Tensor | None
    embedding: Tensor | None

    @property
    def of_logits(self) -> bool:
        """Whether a gradient passes through the logits."""
        return self.bias is not None or any(x is not None for x in (*self.rows, *self.weights))
