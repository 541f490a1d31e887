"""The plan "unit" in two halves: the vectors `d logp / d hidden` of a forward pass, and late coefficients times them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dllm_kernels import checks
from dllm_kernels.backends.contract import HeadOptions
from dllm_kernels.head import forward_backward, ops
from dllm_kernels.head.options import autocast_operands, check_arguments, make_problem


class UnitVectors(NamedTuple):
    """Log-probs `[N]` of the rows, fp32 (fp64 for fp64), and their vectors `[N, H]` in the dtype of the hidden states."""

    logp: Tensor
    vectors: Tensor

    def gradient(self, coef_N: Tensor, keep_N: Tensor, index_M: Tensor, shape: Sequence[int]) -> Tensor:
        """dH in `shape` for `sum coef * logp` of the rows where `keep_N`, which lie at `index_M` there; 0 elsewhere.

        Raises ValueError for a coefficient that is not finite in the dtype of `logp`, as the plan "coef" does.
        """
        coef_M = coef_N[keep_N].to(self.logp.dtype)
        checks.finite("coef", coef_M)
        return forward_backward._sum_of_scaled_rows([(self.vectors[keep_N], coef_M)], index_M, shape)


@torch.no_grad()
def unit_vectors(hidden: Tensor, weight: Tensor, target: Tensor, rows: Tensor, options: HeadOptions) -> UnitVectors:
    """Of selected rows, as `score` takes them; without an adapter. A second pass over the head is not needed then."""
    hidden, weight = autocast_operands(hidden, weight)
    check_arguments(hidden, weight, rows, len(target), options)
    if ops.observed(hidden, weight):
        return UnitVectors(*ops.run_unit(hidden, weight, target, rows, options))
    problem = make_problem(hidden, weight, target, rows, options)
    found = forward_backward.forward(problem, ("logp", "lse"), "unit")
    vectors_NH = found.stored[0]
    assert vectors_NH is not None
    return UnitVectors(found.vectors["logp"], vectors_NH)
