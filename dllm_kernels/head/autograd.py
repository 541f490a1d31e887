"""The eager shell around `launch`: one thin autograd function for every plan with a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dllm_kernels.backends.contract import HeadProblem
from dllm_kernels.head import forward_backward, ops, plans
from dllm_kernels.head.options import Options, flat


class Score(torch.autograd.Function):
    """`forward` returns `weighted_sum` (None but for the plan "coef") and the vectors that `outputs` names."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        problem: HeadProblem,
        options: Options,
        outputs: tuple[str, ...],
        plan: str,
        coef_N: Tensor | None,
        entropy_coef_N: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        needs = forward_backward.Needs(*ctx.needs_input_grad[:3])
        # a gathered weight takes its gradient in fp32 whatever its own dtype is, see `sharding.WholeHead`
        ctx.take_gradient = getattr(weight, "take_gradient", None) if needs.weight else None
        wide = ctx.take_gradient is not None
        result = forward_backward.forward(problem, outputs, plan, needs, coef_N, entropy_coef_N, wide=wide)
        # what autograd saves it guards against changes in place; `unit` and `coef` need no operand again
        ctx.save_for_backward(*result.stored, *((hidden, weight, bias) if plan in plans.REREAD else ()))
        ctx.set_materialize_grads(False)
        ctx.needs, ctx.shape, ctx.outputs, ctx.plan, ctx.options = needs, hidden.shape, outputs, plan, options
        ctx.vectors_N = problem.target_N, problem.index_N, problem.temperature, problem.excluded_V
        vectors = [result.vectors[name] for name in outputs]
        differentiable = () if plan == "coef" else ("logp", "entropy")
        ctx.mark_non_differentiable(*[v for name, v in zip(outputs, vectors) if name not in differentiable])
        return result.weighted_sum, *vectors

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        # the wrapper that refuses a double backward is slow, and needed under create_graph=True alone
        return (_backward_once if torch.is_grad_enabled() else _backward)(ctx, *upstream)


def _backward(ctx: Any, dsum: Tensor | None, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    by_name = dict(zip(ctx.outputs, upstream))
    arrived = dsum, by_name.get("logp"), by_name.get("entropy")
    if dsum is arrived[1] is arrived[2] is None:  # autograd may pass no gradient at all
        return (None,) * 9
    a, b, c, *operands = ctx.saved_tensors
    shell = _through_the_op if ops.observed(*arrived) else _directly
    dhidden, dweight, dbias = shell(ctx, arrived, (a, b, c), operands)
    if ctx.take_gradient is not None and dweight is not None:
        ctx.take_gradient(dweight)
        dweight = None
    return dhidden, dweight, dbias, None, None, None, None, None, None


_backward_once = once_differentiable(_backward)


def _directly(
    ctx: Any, arrived: ops.Gradients, stored: Sequence[Tensor | None], operands: Sequence[Tensor | None]
) -> ops.Gradients:
    target_N, index_N, temperature, excluded_V = ctx.vectors_N
    problem = None
    if operands:
        hidden, weight, bias = operands
        assert hidden is not None
        assert weight is not None
        bias_V = None if bias is None else bias.detach()
        problem = HeadProblem(
            flat(hidden), weight.detach(), target_N, index_N, bias_V, ctx.options.softcap, temperature, excluded_V
        )
    wide = ctx.take_gradient is not None
    return forward_backward.backward(ctx.plan, problem, index_N, ctx.shape, stored, ctx.needs, *arrived, wide=wide)


def _through_the_op(
    ctx: Any, arrived: ops.Gradients, stored: Sequence[Tensor | None], operands: Sequence[Tensor | None]
) -> ops.Gradients:
    """So that a FlopCounterMode entered after the forward pass still counts what backward executes."""
    target_N, index_N, _, _ = ctx.vectors_N
    if ctx.plan == "keep":  # the op's layout of an operand
        stored = [None if operand_NV is None else operand_NV.t() for operand_NV in stored]
    return ops.run_backward(arrived, stored, operands, target_N, index_N, ctx.options, ctx.plan, ctx.shape, ctx.needs)
