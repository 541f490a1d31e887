"""`expected_embedding` as `torch.library` ops, for torch.compile, torch.export and FlopCounterMode; see `ops`.

They begin with the arguments of the head's ops, of whose targets the number alone counts, and the embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dllm_kernels.backends.contract import HeadOptions, HeadProblem
from dllm_kernels.head import expectation, ops
from dllm_kernels.head.expectation import Gradients, Wants
from dllm_kernels.head.expectation_cost import Sizes
from dllm_kernels.head.forward_backward import Needs
from dllm_kernels.head.low_rank import Pair

_SIZE = ops._SIZE + 1
_WANTS = f"{ops._NEEDS}, bool need_dembedding"


def _wants(flags: Sequence[bool]) -> Wants:
    return Wants(Needs(*flags[:5]), flags[5])


@torch.library.custom_op(
    "dllm_kernels::expect",
    mutates_args=(),
    schema=f"({ops._HEAD}, Tensor? embedding, {_WANTS}) -> (Tensor, Tensor, Tensor)",
)
def expect_op(*arguments: Any) -> tuple[Tensor, ...]:
    """The expectation, and what backward gets back: nothing where no gradient is wanted."""
    *head, embedding = arguments[:_SIZE]
    problem = ops._problem(*head)
    result = expectation.forward(problem, embedding, any(arguments[_SIZE:]))
    return result.expected_ND, *(ops._given(x, problem.target_N) for x in result[1:])


@expect_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    hidden, weight, target = arguments[:3]
    table = weight if arguments[ops._SIZE] is None else arguments[ops._SIZE]
    rows, width, dtype = target.shape[0], table.shape[1], ops._statistics_dtype(hidden)
    keep = any(arguments[_SIZE:])
    shapes = [(2, rows), (rows, width)] if keep else [0, 0]
    kept = [target.new_empty(shape, dtype=dtype if keep else target.dtype) for shape in shapes]
    return table.new_empty(rows, width), *kept


def run(
    hidden: Tensor,
    weight: Tensor,
    embedding: Tensor | None,
    target_N: Tensor,
    rows: Tensor | None,
    options: HeadOptions,
    pair: Pair,
) -> Tensor:
    """The expectation, through the op."""
    grad = torch.is_grad_enabled()
    wants = [grad and x is not None and x.requires_grad for x in (hidden, weight, options.bias, *pair, embedding)]
    found: Tensor = expect_op(*ops._flat(hidden, weight, target_N, rows, options, pair), embedding, *wants)[0]
    return found


@torch.library.custom_op(
    "dllm_kernels::expect_backward",
    mutates_args=(),
    schema=f"({ops._HEAD}, Tensor? embedding, Tensor arrived, Tensor levels, Tensor summed, {_WANTS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def expect_backward_op(*arguments: Any) -> tuple[Tensor, ...]:
    """Gradients of hidden, weight, embedding, bias and the adapter's operands."""
    *head, embedding = arguments[:_SIZE]
    arrived, levels, summed, *flags = arguments[_SIZE:]
    problem = ops._problem(*head)
    found = expectation.backward(problem, embedding, arguments[0].shape, levels, summed, arrived, _wants(flags))
    return tuple(ops._given(gradient, problem.target_N) for gradient in found)


@expect_backward_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    hidden, weight, target, _, bias, low_hidden, low_weight = arguments[:7]
    wants = _wants(arguments[_SIZE + 3 :])
    needs, like = wants.head, (hidden, weight, arguments[ops._SIZE], bias, low_hidden, low_weight)
    wanted = needs.hidden, needs.weight, wants.embedding, needs.bias, needs.low_hidden, needs.low_weight
    return tuple(
        x.new_empty(x.shape) if want and x is not None else target.new_empty(0) for x, want in zip(like, wanted, strict=True)
    )


def run_backward(
    problem: HeadProblem,
    operands: Sequence[Any],
    embedding: Tensor | None,
    levels_2N: Tensor,
    sum_ND: Tensor,
    arrived_ND: Tensor,
    wants: Wants,
) -> Gradients:
    """`expectation.backward` through the op; `operands` are the head's five."""
    ops.observed()
    hidden, weight, bias, *pair = operands
    options = replace(problem.options, bias=bias)
    flat = ops._flat(hidden, weight, problem.target_N, problem.index_N, options, (pair[0], pair[1]))
    return _run_backward((*flat, embedding), levels_2N, sum_ND, arrived_ND, (*wants.head[:5], wants.embedding))


def _run_backward(flat: Sequence[Any], levels_2N: Tensor, sum_ND: Tensor, arrived_ND: Tensor, flags: Sequence[bool]) -> Gradients:
    found = expect_backward_op(*flat, arrived_ND, levels_2N, sum_ND, *flags)
    head = _wants(flags).head
    wanted = head.hidden, head.weight, flags[5], head.bias, head.low_hidden, head.low_weight
    return tuple(gradient if want else None for gradient, want in zip(found, wanted, strict=True))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:], *(x if isinstance(x, Tensor) else None for x in inputs[:_SIZE]))
    ctx.others = [None if isinstance(x, Tensor) else x for x in inputs[:_SIZE]]
    ctx.flags = inputs[_SIZE:]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, arrived: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if arrived is None:
        return (None,) * (_SIZE + 6)
    levels, summed, *saved = ctx.saved_tensors
    flat = [other if tensor is None else tensor for tensor, other in zip(saved, ctx.others, strict=True)]
    dhidden, dweight, dembedding, *more = _run_backward(flat, levels, summed, arrived, ctx.flags)
    between = (None,) * (ops._SIZE - 7)
    return dhidden, dweight, None, None, *more, *between, dembedding, *((None,) * 6)


expect_op.register_autograd(_backward, setup_context=_setup)


# --- FLOP formulas: the matrix products that really run ---------------------------------------------------------------


def _sizes(arguments: Sequence[Any], flags: Sequence[bool]) -> Sizes:
    hidden, weight, target, rows, _, low_hidden, low_weight = arguments[:7]
    table = arguments[ops._SIZE]
    return Sizes(
        rows=target.shape[0],
        positions=hidden.numel() // max(1, hidden.shape[-1]),
        width=weight.shape[-1],
        embedding_width=(weight if table is None else table).shape[-1],
        rank=0 if low_hidden is None else low_hidden.shape[-1],
        vocabulary=weight.shape[0],
        walked=arguments[ops._SIZE - 1] or weight.shape[0],
        dtype=hidden.dtype,
        embedding_dtype=None if table is None else table.dtype,
        low_dtype=None if low_weight is None else low_weight.dtype,
        wants=_wants(flags),
        indexed=rows is not None,
        device=hidden.device,
    )


def _expect_flops(*arguments: Any, out_val: Any) -> int:
    return _sizes(arguments, arguments[_SIZE:]).flops(backward=False)


def _expect_backward_flops(*arguments: Any, out_val: Any) -> int:
    return _sizes(arguments, arguments[_SIZE + 3 :]).flops(backward=True)


ops._FLOPS |= {"expect": _expect_flops, "expect_backward": _expect_backward_flops}
