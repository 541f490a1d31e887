"""`distillation_loss` as `torch.library` ops, for torch.compile, torch.export and FlopCounterMode; see `ops`.

They begin with the arguments of the head's ops, in place of targets the rows' coefficients, then those of the teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dllm_kernels.backends.contract import HeadOptions, HeadProblem
from dllm_kernels.head import distil, ops
from dllm_kernels.head.distil import Teacher
from dllm_kernels.head.distil_cost import Sizes
from dllm_kernels.head.forward_backward import Gradients, Needs
from dllm_kernels.head.low_rank import Pair

_TEACHER = (
    "Tensor teacher_hidden, Tensor teacher_weight, Tensor? teacher_bias, Tensor? teacher_softcaps, float? teacher_softcap, "
    "str kind, Tensor? betas, float beta, str plan"
)
_SIZE = ops._SIZE + _TEACHER.count(",") + 1
_FIVE = "(Tensor, Tensor, Tensor, Tensor, Tensor)"


def _flat(teacher: Teacher, plan: str) -> tuple[Any, ...]:
    """The arguments of `_TEACHER`."""
    t = teacher
    softcap = (None, None) if t.softcap is None else ops._number(float(t.softcap))
    return t.hidden, t.weight, t.bias, *softcap, t.kind, *ops._number(float(t.beta)), plan


def _spelled(arguments: Sequence[Any]) -> tuple[HeadProblem, Teacher, str]:
    *of_problem, hidden, weight, bias, softcaps, softcap, kind, betas, beta, plan = arguments[:_SIZE]
    teacher = Teacher(hidden, weight, bias, ops._held(softcaps, softcap), kind, ops._held(betas, beta))
    return ops._problem(*of_problem), teacher, plan


@torch.library.custom_op(
    "dllm_kernels::distil",
    mutates_args=(),
    schema=f"({ops._HEAD}, {_TEACHER}, {ops._NEEDS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def distil_op(*arguments: Any) -> tuple[Tensor, ...]:
    """The weighted sum, the divergences, and the five tensors that backward gets back."""
    problem, teacher, plan = _spelled(arguments)
    result = distil.forward(problem, teacher, plan, Needs(*arguments[_SIZE:]))
    return result.weighted_sum, result.divergence_N, *(ops._given(x, problem.target_N) for x in result.stored)


@distil_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    hidden, weight, coef, _, _, low_hidden, low_weight = arguments[:7]
    plan, needs, dtype, rows_N = arguments[_SIZE - 1], Needs(*arguments[_SIZE:]), ops._statistics_dtype(hidden), coef.shape[0]

    def empty(wanted: bool, shape: Sequence[Any], like: torch.dtype) -> Tensor:
        return coef.new_empty(shape if wanted else 0, dtype=like if wanted else coef.dtype)

    stored = [coef.new_empty(0) for _ in range(5)]
    if plan == "recompute":
        stored[0] = coef.new_empty((3, rows_N), dtype=dtype)
    elif plan in ("coef", "unit"):
        stored[0] = empty(needs.hidden, (rows_N, weight.shape[1]), dtype)
        stored[1] = empty(needs.weight, weight.shape, weight.dtype)
        stored[2] = empty(needs.bias, (weight.shape[0],), dtype)
        if low_hidden is not None:
            stored[3] = empty(needs.low_hidden, (rows_N, low_hidden.shape[-1]), dtype)
            stored[4] = empty(needs.low_weight, low_weight.shape, low_weight.dtype)
    return coef.new_empty((), dtype=dtype), coef.new_empty(rows_N, dtype=dtype), *stored


def run(
    hidden: Tensor,
    weight: Tensor,
    coef_N: Tensor,
    rows: Tensor | None,
    options: HeadOptions,
    pair: Pair,
    teacher: Teacher,
    plan: str,
) -> tuple[Tensor, Tensor]:
    """The weighted sum and the divergences, through the op."""
    needs = [plan != "forward" and x is not None and x.requires_grad for x in (hidden, weight, options.bias, *pair)]
    weighted_sum, divergence_N, *_ = distil_op(
        *ops._flat(hidden, weight, coef_N, rows, options, pair), *_flat(teacher, plan), *needs
    )
    return weighted_sum, divergence_N


@torch.library.custom_op(
    "dllm_kernels::distil_backward",
    mutates_args=(),
    schema=f"({ops._HEAD}, {_TEACHER}, Tensor arrived, Tensor[] stored, SymInt[] hidden_shape, {ops._NEEDS}) -> {_FIVE}",
)
def distil_backward_op(*arguments: Any) -> tuple[Tensor, ...]:
    """Gradients of hidden, weight, bias and the adapter's operands. Where the plan does not read operands again, those of the
    student come empty, in their dtypes."""
    problem, teacher, plan = _spelled(arguments)
    arrived, stored, shape, *needs = arguments[_SIZE:]
    kept = [tensor if tensor.numel() or tensor.dim() == 2 else None for tensor in stored]
    gradients = distil.backward(problem, teacher, plan, shape, kept, Needs(*needs), arrived)
    # an op's result must not share memory with its arguments
    taken = {tensor.untyped_storage().data_ptr() for tensor in stored}
    fresh = [g.clone() if g is not None and g.untyped_storage().data_ptr() in taken else g for g in gradients]
    return tuple(ops._given(gradient, problem.target_N) for gradient in fresh)


@distil_backward_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    hidden, weight, coef, _, bias, low_hidden, low_weight = arguments[:7]
    plan, (_, stored, shape, *flags) = arguments[_SIZE - 1], arguments[_SIZE:]
    needs = Needs(*flags)
    if plan != "recompute":
        low_hidden, weight, low_weight = stored[3], stored[1], stored[4]
    dtype = ops._statistics_dtype(hidden)
    dbias = coef.new_empty(0)
    if needs.bias and bias is not None:
        dbias = bias.new_empty(bias.shape if plan == "recompute" else stored[2].shape)
    return (
        hidden.new_empty(shape) if needs.hidden else coef.new_empty(0),
        weight.new_empty(weight.shape) if needs.weight else coef.new_empty(0),
        dbias,
        hidden.new_empty((*shape[:-1], low_hidden.shape[-1]), dtype=dtype) if needs.low_hidden else coef.new_empty(0),
        low_weight.new_empty(low_weight.shape) if needs.low_weight else coef.new_empty(0),
    )


def run_backward(
    problem: HeadProblem,
    teacher: Teacher,
    plan: str,
    shape: Sequence[int],
    stored: Sequence[Tensor | None],
    needs: Needs,
    arrived: Tensor,
    operands: Sequence[Any],
) -> Gradients:
    """`distil.backward` through the op; `operands` are the student's five that the plan reads again, or none."""
    ops.observed()
    p = problem
    hidden, weight, bias, *pair = operands or (p.hidden_MH, p.weight_VH, p.options.bias, None, None)
    options = replace(p.options, bias=bias)
    flat = *ops._flat(hidden, weight, p.target_N, p.index_N, options, (pair[0], pair[1])), *_flat(teacher, plan)
    return _run_backward(flat, stored, shape, needs, arrived)


def _run_backward(
    flat: Sequence[Any], stored: Sequence[Tensor | None], shape: Sequence[int], needs: Needs, arrived: Tensor
) -> Gradients:
    wanted = needs[:5]
    gradients = distil_backward_op(*flat, arrived, [ops._given(tensor, flat[2]) for tensor in stored], shape, *wanted)
    return tuple(gradient if need else None for gradient, need in zip(gradients, wanted, strict=True))


_OPERANDS = (0, 1, 4, 5, 6, ops._SIZE, ops._SIZE + 1, ops._SIZE + 2)  # which arguments "recompute" alone reads again


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    plan, needs = inputs[_SIZE - 1], inputs[_SIZE:]
    again = plan == "recompute"
    ctx.blank = {} if again else {n: (min(2, inputs[n].dim()), inputs[n].dtype) for n in _OPERANDS if inputs[n] is not None}
    saved = [x if isinstance(x, Tensor) and n not in ctx.blank else None for n, x in enumerate(inputs[:_SIZE])]
    ctx.save_for_backward(*output[2:], *saved)
    ctx.others = [None if isinstance(x, Tensor) else x for x in inputs[:_SIZE]]
    ctx.set_materialize_grads(False)
    ctx.plan, ctx.shape, ctx.needs, ctx.inputs = plan, inputs[0].shape, Needs(*needs), len(inputs)
    kept = 0 if plan == "coef" else 1
    ctx.mark_non_differentiable(*(tensor for place, tensor in enumerate(output) if place != kept))


def _backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
    arrived = upstream[0 if ctx.plan == "coef" else 1]
    if arrived is None:
        return (None,) * ctx.inputs
    stored, saved = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
    flat = [other if tensor is None else tensor for tensor, other in zip(saved, ctx.others, strict=True)]
    for place, (dimensions, dtype) in ctx.blank.items():
        flat[place] = stored[0].new_empty((0,) * dimensions, dtype=dtype)
    dhidden, dweight, *more = _run_backward(flat, stored, ctx.shape, ctx.needs, arrived)
    return dhidden, dweight, None, None, *more, *((None,) * (ctx.inputs - 7))


distil_op.register_autograd(_backward, setup_context=_setup)


# --- FLOP formulas: the matrix products that really run ---------------------------------------------------------------


def _sizes(arguments: Sequence[Any], needs: Sequence[bool]) -> Sizes:
    hidden, weight, coef, _, _, low_hidden, low_weight = arguments[:7]
    teacher_hidden = arguments[ops._SIZE]
    return Sizes(
        rows=coef.numel(),
        positions=hidden.numel() // max(1, hidden.shape[-1]),
        width=weight.shape[-1],
        teacher_width=teacher_hidden.shape[-1],
        rank=0 if low_hidden is None else low_hidden.shape[-1],
        vocabulary=weight.shape[0],
        walked=arguments[ops._SIZE - 1] or weight.shape[0],
        dtype=hidden.dtype,
        teacher_dtype=teacher_hidden.dtype,
        low_dtype=None if low_weight is None else low_weight.dtype,
        needs=Needs(*needs),
        indexed=arguments[3] is not None,
        device=hidden.device,
        kind=arguments[_SIZE - 4],
        plan=arguments[_SIZE - 1],
    )


def _distil_flops(*arguments: Any, out_val: Any) -> int:
    return _sizes(arguments, arguments[_SIZE:]).flops(backward=False)


def _distil_backward_flops(*arguments: Any, out_val: Any) -> int:
    return _sizes(arguments, arguments[_SIZE + 3 :]).flops(backward=True)


ops._FLOPS |= {"distil": _distil_flops, "distil_backward": _distil_backward_flops}
