"""The eager shell around `expectation`: one thin autograd function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dllm_kernels.backends.contract import HeadProblem
from dllm_kernels.head import expectation, expectation_ops, ops
from dllm_kernels.head.expectation import Wants
from dllm_kernels.head.forward_backward import Needs


class Expect(torch.autograd.Function):
    """The expectation, differentiable in all six tensors that come first."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        embedding: Tensor | None,
        bias: Tensor | None,
        low_hidden: Tensor | None,
        low_weight: Tensor | None,
        problem: HeadProblem,
    ) -> Tensor:
        hidden_, weight_, embedding_, *others = ctx.needs_input_grad[:6]
        ctx.wants = Wants(Needs(hidden_, weight_, *others), embedding_)
        result = expectation.forward(problem, embedding, True)
        operands = hidden, weight, bias, low_hidden, low_weight, embedding
        ctx.save_for_backward(result.levels_2N, result.sum_ND, *problem.of_rows(), *operands)
        ctx.problem, ctx.shape = problem.without_tensors(), hidden.shape
        return result.expected_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, arrived: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        levels, summed, *saved = ctx.saved_tensors
        of_rows, operands, embedding = saved[:3], saved[3:8], saved[8]
        problem = ctx.problem.with_tensors(of_rows, *operands)
        if ops.observed(arrived):
            gradients = expectation_ops.run_backward(problem, operands, embedding, levels, summed, arrived, ctx.wants)
        else:
            gradients = expectation.backward(problem, embedding, ctx.shape, levels, summed, arrived, ctx.wants)
        return *gradients, None
