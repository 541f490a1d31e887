"""The eager shell around `forward_backward`: one thin autograd function for every plan with a gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dllm_kernels.backends.contract import HeadProblem, WeightGradient
from dllm_kernels.head import forward_backward, ops, plans
from dllm_kernels.head.forward_backward import Arrived, Gradients, Needs
from dllm_kernels.head.weight_sum import WeightSum


class Score(torch.autograd.Function):
    """`forward` returns `weighted_sum` (None but for the plan "coef") and the vectors that `outputs` names."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        low_hidden: Tensor | None,
        low_weight: Tensor | None,
        problem: HeadProblem,
        outputs: tuple[str, ...],
        plan: str,
        coef_N: Tensor | None,
        entropy_coef_N: Tensor | None,
        take_dweight: WeightGradient | WeightSum | None,
    ) -> tuple[Tensor | None, ...]:
        hidden_, weight_, bias_, low_hidden_, low_weight_ = ctx.needs_input_grad[:5]
        needs = Needs(hidden_, weight_, bias_, low_hidden_, low_weight_, take_dweight is not None)
        weight_sum = take_dweight if isinstance(take_dweight, WeightSum) else None
        result = forward_backward.forward(problem, outputs, plan, needs, coef_N, entropy_coef_N, weight_sum)
        # what autograd saves it guards against changes in place; `unit` and `coef` need no operand again
        operands = (hidden, weight, bias, low_hidden, low_weight) if plan in plans.REREAD else ()
        ctx.save_for_backward(*result.stored, *problem.of_rows(), *operands)
        ctx.set_materialize_grads(False)
        ctx.problem, ctx.plan, ctx.shape, ctx.outputs = problem.without_tensors(), plan, hidden.shape, outputs
        ctx.needs, ctx.take_dweight = needs, take_dweight
        vectors = [result.vectors[name] for name in outputs]
        differentiable = forward_backward.differentiable(plan, problem.several)
        ctx.mark_non_differentiable(*[v for name, v in zip(outputs, vectors) if name not in differentiable])
        return result.weighted_sum, *vectors

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        # the wrapper that refuses a double backward is slow, and needed under create_graph=True alone
        return (_backward_once if torch.is_grad_enabled() else _backward)(ctx, *upstream)


def _backward(ctx: Any, dsum: Tensor | None, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    by_name = dict(zip(ctx.outputs, upstream))
    arrived = Arrived(dsum, *(by_name.get(name) for name in ("logp", "entropy", "lse", "best_logp")))
    if all(gradient is None for gradient in arrived):  # autograd may pass no gradient at all
        return (None,) * 11
    dhidden, dweight, *more = _gradients(ctx, arrived, *ctx.saved_tensors)
    if dweight is not None and ctx.take_dweight is not None and not isinstance(ctx.take_dweight, WeightSum):
        ctx.take_dweight(dweight)
        dweight = None
    return dhidden, dweight, *more, None, None, None, None, None, None


_backward_once = once_differentiable(_backward)


def _gradients(ctx: Any, arrived: Arrived, *saved: Any) -> Gradients:
    """Through the op where something looks on: a FlopCounterMode entered after the forward pass counts what backward runs."""
    stored, of_rows, operands = saved[:5], saved[5:8], saved[8:]
    problem = ctx.problem.with_tensors(of_rows, *operands)
    weight_sum = ctx.take_dweight if isinstance(ctx.take_dweight, WeightSum) else None
    if weight_sum is None and ops.observed(*arrived):
        return ops.run_backward(problem, ctx.plan, ctx.shape, stored, ctx.needs, arrived, operands)
    return forward_backward.backward(problem, ctx.plan, ctx.shape, stored, ctx.needs, arrived, weight_sum)
