"""The head as `torch.library` ops, namespace `dllm_kernels`: what torch.compile, torch.export and FlopCounterMode see.

Eager calls go through the thinner `autograd.Score` and come here only while something looks on (`observed`). Checks that
read values run inside the ops, so a compiled call makes them too. An output that a call does not want is an empty tensor.

All ops begin with the same eleven arguments, `_HEAD`: a `HeadProblem` spelled out, since a schema holds no structs. A
float of a schema is a constant to the compiler, one compilation for each value; one that varies comes as a tensor beside it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from dllm_kernels.backends.contract import STATISTICS, HeadOptions, HeadProblem, empty_operand
from dllm_kernels.head import forward_backward, plans
from dllm_kernels.head.forward_backward import Gradients, Needs
from dllm_kernels.head.options import make_problem

_HEAD = (
    "Tensor hidden, Tensor weight, Tensor target, Tensor? rows, Tensor? bias, Tensor? temperatures, float temperature, "
    "Tensor? softcaps, float? softcap, SymInt[] suppress, SymInt? valid_vocab"
)
_SIZE = _HEAD.count(",") + 1
_OTHERS = (torch.nn.Parameter, type(None))  # types beside Tensor that the eager path takes as they are
_NINE = "(" + ", ".join(["Tensor"] * 9) + ")"


def observed(*tensors: Tensor | None) -> bool:
    """Whether something other than eager PyTorch is to see this call as one op: the compiler, a dispatch mode, fake tensors."""
    if torch.compiler.is_compiling():
        return True
    if torch._C._len_torch_dispatch_stack():
        _register_flops()
        return True
    for tensor in tensors:
        kind = type(tensor)
        if (kind is not Tensor and kind not in _OTHERS) or (tensor is not None and tensor.is_meta):
            return True
    return False


def _flat(hidden: Tensor, weight: Tensor, target: Tensor, rows: Tensor | None, options: HeadOptions) -> tuple[Any, ...]:
    """The arguments of `_HEAD`."""
    temperature, softcap = options.temperature, options.softcap
    return (
        hidden,
        weight,
        target,
        rows,
        options.bias,
        *((temperature.detach(), 1.0) if isinstance(temperature, Tensor) else _number(float(temperature))),
        *((None, None) if softcap is None else _number(float(softcap))),
        list(options.suppress),
        options.valid_vocab,
    )


def _number(value: float) -> tuple[Tensor | None, float]:
    """A tensor that holds it where the compiler lets it vary, else None, and the number where it does not, else 1."""
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        if not statically_known_true(value != _SOME_NUMBER):
            return torch.ones((), dtype=torch.float64, device="cpu") * value, 1.0
    return None, value


_SOME_NUMBER = 0.8414709848078965  # that a constant differs from it is known at once; of a varying number nothing is


def _problem(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    softcaps: Tensor | None,
    softcap: float | None,
    suppress: Sequence[int],
    valid_vocab: int | None,
) -> HeadProblem:
    by_row = temperatures if temperatures is not None and temperatures.dim() else None
    number = _held(temperatures, temperature) if by_row is None else by_row
    options = HeadOptions(bias, _held(softcaps, softcap), number, tuple(suppress), valid_vocab)
    return make_problem(hidden, weight, target, rows, options)


def _held(number: Tensor | None, otherwise: Any) -> Any:
    return otherwise if number is None else float(number)


def _given(tensor: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if tensor is None else tensor


def _statistics_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


# --- score_tokens -----------------------------------------------------------------------------------------------------


@torch.library.custom_op(
    "dllm_kernels::score",
    mutates_args=(),
    schema=f"({_HEAD}, Tensor? coef, Tensor? entropy_coef, str outputs, str plan, "
    f"bool need_dhidden, bool need_dweight, bool need_dbias) -> {_NINE}",
)
def score(*arguments: Any) -> tuple[Tensor, ...]:
    """`weighted_sum`, the five vectors of STATISTICS, and the three tensors that backward gets back.

    `outputs`: names joined by commas. See `forward_backward.forward` for the rest.
    """
    coef, entropy_coef, outputs, plan, *needs = arguments[_SIZE:]
    problem, names = _problem(*arguments[:_SIZE]), outputs.split(",")
    target = problem.target_N
    result = forward_backward.forward(problem, names, plan, Needs(*needs), coef, entropy_coef)
    vectors = [_given(result.vectors.get(name) if name in names else None, target) for name in STATISTICS]
    weighted_sum = result.weighted_sum
    if weighted_sum is None:
        weighted_sum = target.new_empty(0, dtype=problem.statistics_dtype)
    return weighted_sum, *vectors, *(_given(tensor, target) for tensor in result.stored)


@score.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    hidden, weight, target, _, bias = arguments[:5]
    _, _, outputs, plan, need_dhidden, need_dweight, need_dbias = arguments[_SIZE:]
    rows_N, (vocabulary, hidden_size) = target.numel(), weight.shape
    dtype, names, nothing = _statistics_dtype(hidden), outputs.split(","), target.new_empty(0)
    vectors = [
        hidden.new_empty(rows_N, dtype=torch.int64 if name == "top_id" else dtype) if name in names else target.new_empty(0)
        for name in STATISTICS
    ]
    stored = [nothing, target.new_empty(0), target.new_empty(0)]
    if plan == "coef":
        like = ((need_dhidden, hidden, (rows_N, hidden_size)), (need_dweight, weight, weight.shape))
        stored[:2] = [x.new_empty(size) if needed else target.new_empty(0) for needed, x, size in like]
        if need_dbias:
            stored[2] = (weight if bias is None else bias).new_empty(vocabulary)
    elif plan in ("unit", "keep"):
        for place, name in enumerate(("logp", "entropy")):
            if name in names:
                keeps = plan == "keep"
                stored[place] = empty_operand(hidden, rows_N, vocabulary) if keeps else hidden.new_empty(rows_N, hidden_size)
    return hidden.new_empty(() if plan == "coef" else 0, dtype=dtype), *vectors, *stored


def run_score(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    rows: Tensor | None,
    options: HeadOptions,
    coef: Tensor | None,
    entropy_coef: Tensor | None,
    outputs: tuple[str, ...],
    plan: str,
    wants_gradient: bool,
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """`weighted_sum` and the vectors that `outputs` names, through the op."""
    needs = [wants_gradient and x is not None and x.requires_grad for x in (hidden, weight, options.bias)]
    flat = _flat(hidden, weight, target, rows, options)
    weighted_sum, *rest = score(*flat, coef, entropy_coef, ",".join(outputs), plan, *needs)
    return (weighted_sum if plan == "coef" else None), {name: vector for name, vector in zip(STATISTICS, rest) if name in outputs}


@torch.library.custom_op(
    "dllm_kernels::score_backward",
    mutates_args=(),
    schema=f"({_HEAD}, Tensor? dsum, Tensor? dlogp, Tensor? dentropy, Tensor[] stored, str plan, SymInt[] hidden_shape, "
    "bool need_dhidden, bool need_dweight, bool need_dbias) -> (Tensor, Tensor, Tensor)",
)
def score_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; `hidden` and `weight` hold something where the plan reads them again."""
    *arrived, stored, plan, hidden_shape, a, b, c = arguments[_SIZE:]
    problem = _problem(*arguments[:_SIZE])
    kept = [tensor if tensor.numel() or tensor.dim() == 2 else None for tensor in stored]
    gradients = forward_backward.backward(problem, plan, hidden_shape, kept, Needs(a, b, c), tuple(arrived))
    # an op's result must not share memory with its arguments
    taken = {tensor.untyped_storage().data_ptr() for tensor in stored}
    fresh = [g.clone() if g is not None and g.untyped_storage().data_ptr() in taken else g for g in gradients]
    dhidden, dweight, dbias = (_given(gradient, problem.target_N) for gradient in fresh)
    return dhidden, dweight, dbias


@score_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, target, _, bias = arguments[:5]
    *_, stored, plan, hidden_shape, need_dhidden, need_dweight, need_dbias = arguments[_SIZE:]
    if plan not in plans.REREAD:
        a, weight, bias = stored
        hidden = a if plan == "coef" or a.dim() == 2 else weight
    return (
        hidden.new_empty(hidden_shape) if need_dhidden else target.new_empty(0),
        weight.new_empty(weight.shape) if need_dweight else target.new_empty(0),
        bias.new_empty(bias.shape) if need_dbias and bias is not None else target.new_empty(0),
    )


def run_backward(
    problem: HeadProblem,
    plan: str,
    shape: Sequence[int],
    stored: Sequence[Tensor | None],
    needs: Needs,
    arrived: Gradients,
    operands: Sequence[Any],
) -> Gradients:
    """`forward_backward.backward` through the op; `operands` are hidden, weight and bias where the plan reads them again."""
    observed()
    p, nothing = problem, problem.target_N.new_empty(0, 0)
    hidden, weight, bias = operands or (nothing, nothing, None)
    flat = _flat(hidden, weight, p.target_N, p.index_N, replace(p.options, bias=bias))
    return _run_backward(flat, plan, shape, stored, needs, arrived)


def _run_backward(
    flat: Sequence[Any], plan: str, shape: Sequence[int], stored: Sequence[Tensor | None], needs: Needs, arrived: Gradients
) -> Gradients:
    wanted = needs[:3]
    gradients = score_backward(*flat, *arrived, [_given(tensor, flat[2]) for tensor in stored], plan, shape, *wanted)
    dhidden, dweight, dbias = (gradient if need else None for gradient, need in zip(gradients, wanted, strict=True))
    return dhidden, dweight, dbias


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, target, rows, bias, temperatures, temperature, softcaps, *numbers = inputs[:_SIZE]
    _coef, _entropy_coef, _outputs, plan, *needs = inputs[_SIZE:]
    operands = (hidden, weight, bias) if plan in plans.REREAD else ()
    ctx.save_for_backward(*output[6:], target, rows, temperatures, softcaps, *operands)
    ctx.temperature, ctx.numbers = temperature, numbers
    ctx.set_materialize_grads(False)
    ctx.plan, ctx.shape, ctx.needs, ctx.inputs = plan, hidden.shape, Needs(*needs), len(inputs)
    differentiable = (0,) if plan == "coef" else (1, 3)  # weighted_sum, or logp and entropy
    ctx.mark_non_differentiable(*(tensor for place, tensor in enumerate(output) if place not in differentiable))


def _backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
    arrived = (upstream[0], None, None) if ctx.plan == "coef" else (None, upstream[1], upstream[3])
    if all(gradient is None for gradient in arrived):
        return (None,) * ctx.inputs
    a, b, c, target, rows, temperatures, softcaps, *operands = ctx.saved_tensors
    hidden, weight, bias = operands or (target.new_empty(0, 0), target.new_empty(0, 0), None)
    flat = (hidden, weight, target, rows, bias, temperatures, ctx.temperature, softcaps, *ctx.numbers)
    dhidden, dweight, dbias = _run_backward(flat, ctx.plan, ctx.shape, (a, b, c), ctx.needs, arrived)
    return dhidden, dweight, None, None, dbias, *((None,) * (ctx.inputs - 5))


score.register_autograd(_backward, setup_context=_setup)


# --- head_backward and sample_tokens ----------------------------------------------------------------------------------


@torch.library.custom_op(
    "dllm_kernels::add_gradient",
    mutates_args=("dweight_out", "dbias_out"),
    schema=f"({_HEAD}, Tensor coef, Tensor? entropy_coef, Tensor(a12!)? dweight_out, Tensor(a13!)? dbias_out) -> Tensor",
)
def add_gradient(*arguments: Any) -> Tensor:
    """`head_backward`: dH in hidden's shape; dW and db are added to their buffers."""
    return forward_backward.add_gradient(_problem(*arguments[:_SIZE]), arguments[0].shape, *arguments[_SIZE:])


@add_gradient.register_fake
def _(hidden: Tensor, *_: Any) -> Tensor:
    return hidden.new_empty(hidden.shape)


def run_add_gradient(
    hidden: Tensor, weight: Tensor, target: Tensor, rows: Tensor, options: HeadOptions, *more: Tensor | None
) -> Tensor:
    """`forward_backward.add_gradient` through the op; `more` are its coefficients and buffers."""
    return add_gradient(*_flat(hidden, weight, target, rows, options), *more)


@torch.library.custom_op(
    "dllm_kernels::sample",
    mutates_args=(),
    schema=f"({_HEAD}, SymInt step, Tensor? sample_temperatures, float sample_temperature, SymInt? top_k=None, "
    "float? top_p=None) -> (Tensor, Tensor, Tensor)",
)
def sample(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Token, its logp and the row's entropy, see `sample_tokens`. In place of targets come the rows' keys."""
    problem = _problem(*arguments[:_SIZE])
    step, varying, temperature, *restriction = arguments[_SIZE:]
    result = forward_backward.sample(problem, problem.target_N, step, _held(varying, temperature), *restriction)
    return result["token"], result["logp"], result["entropy"]


@sample.register_fake
def _(hidden: Tensor, weight: Tensor, key: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype, N = _statistics_dtype(hidden), key.numel()
    return torch.empty_like(key), hidden.new_empty(N, dtype=dtype), hidden.new_empty(N, dtype=dtype)


def run_sample(
    hidden: Tensor,
    weight: Tensor,
    key: Tensor,
    rows: Tensor | None,
    options: HeadOptions,
    step: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`forward_backward.sample` through the op."""
    flat = _flat(hidden, weight, key, rows, options)
    token, logp, entropy = sample(*flat, step, *_number(temperature), top_k, top_p)
    return token, logp, entropy


# --- FLOP formulas: the matrix products that really run ---------------------------------------------------------------


def _register_flops() -> None:
    """Make the formulas known to every FlopCounterMode, those already at work included.

    Called when a dispatch mode is met and not at import, because `torch.utils.flop_counter` imports Triton. A counter copies
    the registry when it is made, so one that is older than the registration gets the formulas by hand.
    """
    module = sys.modules.get("torch.utils.flop_counter")
    if module is None:  # then nobody counts
        return
    formulas = {getattr(torch.ops.dllm_kernels, name): formula for name, formula in _FLOPS.items()}
    registries = [module.flop_registry]
    for mode in _get_current_dispatch_mode_stack():
        registries.append(getattr(getattr(mode, "counter", None), "flop_registry", {}))
    for registry in registries:
        for op, formula in formulas.items():
            registry.setdefault(op, formula)


def _flops(count: int, rows: int, weight: Tensor) -> int:
    return 2 * count * rows * weight.shape[0] * weight.shape[1]


def _score_flops(*arguments: Any, out_val: Any) -> int:
    _, _, outputs, plan, need_dhidden, need_dweight, _ = arguments[_SIZE:]
    vectors = plans.late_vectors(outputs.split(","))
    forward, _ = plans.gemms(plan, need_dhidden=need_dhidden, need_dweight=need_dweight, vectors=vectors)
    return _flops(forward, arguments[2].numel(), arguments[1])


def _score_backward_flops(*arguments: Any, out_val: Any) -> int:
    weight, target = arguments[1:3]
    _, dlogp, dentropy, _, plan, _, need_dhidden, need_dweight, _ = arguments[_SIZE:]
    _, backward = plans.gemms(plan, need_dhidden=need_dhidden, need_dweight=need_dweight)
    if not backward:
        return 0
    live = None
    if plan == "recompute" and type(target) is Tensor:  # not a fake one: rows without a coefficient are not gone through again
        live = plans.live_rows(dlogp, dentropy)
    return _flops(backward, target.numel() if live is None else len(live), weight)


def _add_gradient_flops(*arguments: Any, out_val: Any) -> int:
    dweight_out = arguments[_SIZE + 2]
    return _flops(2 + (dweight_out is not None), arguments[2].numel(), arguments[1])


def _sample_flops(*arguments: Any, out_val: Any, **_: Any) -> int:
    return _flops(1, arguments[2].numel(), arguments[1])


_FLOPS = {
    "score": _score_flops,
    "score_backward": _score_backward_flops,
    "add_gradient": _add_gradient_flops,
    "sample": _sample_flops,
}
