"""The eager shell around `distil`: one thin autograd function for every plan."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dllm_kernels.backends.contract import HeadProblem, WeightGradient
from dllm_kernels.head import distil, distil_ops, ops
from dllm_kernels.head.distil import Teacher
from dllm_kernels.head.forward_backward import Needs


class Distil(torch.autograd.Function):
    """Returns the weighted sum and the divergences; of the plan "coef" the former is differentiable, else the latter."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        low_hidden: Tensor | None,
        low_weight: Tensor | None,
        problem: HeadProblem,
        teacher: Teacher,
        plan: str,
        take_dweight: WeightGradient | None,
    ) -> tuple[Tensor, Tensor]:
        hidden_, weight_, bias_, low_hidden_, low_weight_ = ctx.needs_input_grad[:5]
        ctx.needs = Needs(hidden_, weight_, bias_, low_hidden_, low_weight_, take_dweight is not None)
        result = distil.forward(problem, teacher, plan, ctx.needs)
        again = plan == "recompute"
        operands = (hidden, weight, bias, low_hidden, low_weight, teacher.hidden, teacher.weight, teacher.bias) if again else ()
        ctx.save_for_backward(*result.stored, *problem.of_rows(), *operands)
        ctx.set_materialize_grads(False)
        ctx.problem, ctx.plan, ctx.shape, ctx.take = problem.without_tensors(), plan, hidden.shape, take_dweight
        ctx.dtypes = hidden.dtype, None if bias is None else bias.dtype
        ctx.teacher = replace(teacher, hidden=_NOTHING, weight=_NOTHING, bias=None)
        ctx.mark_non_differentiable(result.divergence_N if plan == "coef" else result.weighted_sum)
        return result.weighted_sum, result.divergence_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dsum: Tensor | None, ddivergence: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        arrived = dsum if ctx.plan == "coef" else ddivergence
        if arrived is None:
            return (None,) * 9
        saved, teacher = ctx.saved_tensors, ctx.teacher
        stored, of_rows, operands = saved[:5], saved[5:8], saved[8:]
        if operands:
            of_student, (hidden, weight, bias) = operands[:5], operands[5:]
            teacher = replace(teacher, hidden=hidden, weight=weight, bias=bias)
            problem = ctx.problem.with_tensors(of_rows, *of_student)
        else:  # their dtypes alone are needed
            dtype, of_bias = ctx.dtypes
            like = _NOTHING.to(dtype)
            problem = ctx.problem.with_tensors(of_rows, like, like, None if of_bias is None else _NOTHING.flatten().to(of_bias))
        if ops.observed(arrived):
            gradients = distil_ops.run_backward(problem, teacher, ctx.plan, ctx.shape, stored, ctx.needs, arrived, operands[:5])
        else:
            gradients = distil.backward(problem, teacher, ctx.plan, ctx.shape, stored, ctx.needs, arrived)
        dhidden, dweight, *more = gradients
        if ctx.take is not None and dweight is not None:
            ctx.take(dweight)
            dweight = None
        return dhidden, dweight, *more, None, None, None, None


_NOTHING = torch.empty(0, 0)
