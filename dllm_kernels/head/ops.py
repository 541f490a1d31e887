"""The head as `torch.library` ops, namespace `dllm_kernels`: what torch.compile, torch.export and FlopCounterMode see.

Eager calls go through the thinner `autograd.Score` and come here only while something looks on (`observed`). Checks that
read values run inside the ops, so a compiled call makes them too. An output that a call does not want is an empty tensor.

All ops begin with the same thirteen arguments, `_HEAD`: a `HeadProblem` spelled out, since a schema holds no structs. A
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

from dllm_kernels.backends.contract import BEST, STATISTICS, HeadOptions, HeadProblem, empty_operand
from dllm_kernels.head import forward_backward, low_rank, plans
from dllm_kernels.head.forward_backward import Arrived, Gradients, Needs
from dllm_kernels.head.low_rank import Pair
from dllm_kernels.head.options import make_problem

_HEAD = (
    "Tensor hidden, Tensor weight, Tensor target, Tensor? rows, Tensor? bias, Tensor? low_hidden, Tensor? low_weight, "
    "Tensor? temperatures, float temperature, Tensor? softcaps, float? softcap, SymInt[] suppress, SymInt? valid_vocab"
)
_SIZE = _HEAD.count(",") + 1
_OTHERS = (torch.nn.Parameter, type(None))  # types beside Tensor that the eager path takes as they are
_VECTORS = (*STATISTICS, *BEST)
_TENSORS = "(" + ", ".join(["Tensor"] * (len(_VECTORS) + 6)) + ")"
_NEEDS = "bool need_dhidden, bool need_dweight, bool need_dbias, bool need_dlow_hidden, bool need_dlow_weight"


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


def _flat(
    hidden: Tensor, weight: Tensor, target: Tensor, rows: Tensor | None, options: HeadOptions, pair: Pair = (None, None)
) -> tuple[Any, ...]:
    """The arguments of `_HEAD`."""
    temperature, softcap = options.temperature, options.softcap
    return (
        hidden,
        weight,
        target,
        rows,
        options.bias,
        *pair,
        *((temperature.detach(), 1.0) if isinstance(temperature, Tensor) else _number(float(temperature))),
        *((None, None) if softcap is None else _number(float(softcap))),
        list(options.suppress),
        options.valid_vocab,
    )


def _number(value: float) -> tuple[Tensor | None, float]:
    """A tensor that holds it where the compiler lets it vary, else None, and the number where it does not, else 1."""
    if torch.compiler.is_compiling() and not _is_constant(value):
        return torch.ones((), dtype=torch.float64, device="cpu") * value, 1.0
    return None, value


def _is_constant(value: float) -> bool:
    """Whether the compiler takes it for one. Nothing is one where Dynamo cannot ask (torch 2.6, 2.7), which costs a tensor."""
    if not _ASKS:
        return False
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(value != _SOME_NUMBER)


_ASKS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13)  # which of those between can has not been tried
_SOME_NUMBER = 0.8414709848078965  # that a constant differs from it is known at once; of a varying number nothing is


def _problem(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    low_hidden: Tensor | None,
    low_weight: Tensor | None,
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
    return make_problem(hidden, weight, target, rows, options, (low_hidden, low_weight))


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
    schema=f"({_HEAD}, Tensor? coef, Tensor? entropy_coef, SymInt best, str outputs, str plan, {_NEEDS}) -> {_TENSORS}",
)
def score(*arguments: Any) -> tuple[Tensor, ...]:
    """`weighted_sum`, the vectors of STATISTICS and BEST, and the five tensors that backward gets back.

    `outputs`: names joined by commas. See `forward_backward.forward` for the rest.
    """
    coef, entropy_coef, best, outputs, plan, *needs = arguments[_SIZE:]
    problem, names = replace(_problem(*arguments[:_SIZE]), best=best), outputs.split(",")
    target = problem.target_N
    result = forward_backward.forward(problem, names, plan, Needs(*needs), coef, entropy_coef)
    vectors = [_given(result.vectors.get(name) if name in names else None, target) for name in _VECTORS]
    weighted_sum = result.weighted_sum
    if weighted_sum is None:
        weighted_sum = target.new_empty(0, dtype=problem.statistics_dtype)
    return weighted_sum, *vectors, *(_given(tensor, target) for tensor in result.stored)


@score.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    hidden, weight, target, _, bias, low_hidden, low_weight = arguments[:7]
    _, _, best, outputs, plan, *flags = arguments[_SIZE:]
    needs, several = Needs(*flags), target.dim() == 2
    rows_N, (vocabulary, width), rank = target.shape[0], weight.shape, 0 if low_hidden is None else low_hidden.shape[-1]
    dtype, names, nothing = _statistics_dtype(hidden), outputs.split(","), target.new_empty(0)
    shapes = {"logp": target.shape, **dict.fromkeys(BEST, (rows_N, best))}
    vectors = [
        hidden.new_empty(shapes.get(name, (rows_N,)), dtype=torch.int64 if name.endswith("_id") else dtype)
        if name in names
        else target.new_empty(0)
        for name in _VECTORS
    ]
    stored = [nothing, *(target.new_empty(0) for _ in range(4))]
    if plan == "coef":
        like = ((needs.vectors, hidden, (rows_N, width)), (needs.weight, weight, weight.shape))
        stored[:2] = [x.new_empty(size) if needed else target.new_empty(0) for needed, x, size in like]
        if needs.bias:
            stored[2] = (weight if bias is None else bias).new_empty(vocabulary)
        if needs.low_weight and low_weight is not None:
            stored[3] = low_weight.new_empty(low_weight.shape)
        if needs.vectors and rank:
            stored[4] = hidden.new_empty(rows_N, rank, dtype=dtype)
    elif plan in ("unit", "keep"):
        for place, name in enumerate(("logp", "entropy")):
            if name in names or (several and name == "logp"):
                keeps = plan == "keep"
                stored[place] = empty_operand(hidden, rows_N, vocabulary) if keeps else hidden.new_empty(rows_N, width)
                if plan == "unit" and rank:
                    stored[2 + place] = hidden.new_empty(rows_N, rank, dtype=dtype)
                if several:
                    stored[2 + place] = hidden.new_empty(shapes.get(name, (rows_N,)), dtype=dtype)
    elif plan == "recompute" and best:
        stored[2] = target.new_empty(rows_N, best)
    return hidden.new_empty(() if plan == "coef" else 0, dtype=dtype), *vectors, *stored


def run_score(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    rows: Tensor | None,
    options: HeadOptions,
    pair: Pair,
    coef: Tensor | None,
    entropy_coef: Tensor | None,
    best: int,
    outputs: tuple[str, ...],
    plan: str,
    wants_gradient: bool,
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """`weighted_sum` and the vectors that `outputs` names, through the op."""
    needs = [wants_gradient and x is not None and x.requires_grad for x in (hidden, weight, options.bias, *pair)]
    flat = _flat(hidden, weight, target, rows, options, pair)
    weighted_sum, *rest = score(*flat, coef, entropy_coef, best, ",".join(outputs), plan, *needs)
    return (weighted_sum if plan == "coef" else None), {name: vector for name, vector in zip(_VECTORS, rest) if name in outputs}


def run_unit(hidden: Tensor, weight: Tensor, target: Tensor, rows: Tensor, options: HeadOptions) -> tuple[Tensor, Tensor]:
    """logp and the vectors that the plan "unit" stores, through the op."""
    flat = _flat(hidden, weight, target, rows, options)
    found = score(*flat, None, None, 0, "logp,lse", "unit", True, *(False,) * 4)
    return found[1 + _VECTORS.index("logp")], found[1 + len(_VECTORS)]


@torch.library.custom_op(
    "dllm_kernels::score_backward",
    mutates_args=(),
    schema=f"({_HEAD}, Tensor? dsum, Tensor? dlogp, Tensor? dentropy, Tensor? dlse, Tensor? dbest, Tensor[] stored, SymInt best, "
    f"str plan, SymInt[] hidden_shape, {_NEEDS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def score_backward(*arguments: Any) -> tuple[Tensor, ...]:
    """Gradients of hidden, weight, bias and the adapter's operands, which hold something where the plan reads them again."""
    *arrived, stored, best, plan, hidden_shape = arguments[_SIZE:-5]
    problem = replace(_problem(*arguments[:_SIZE]), best=best)
    kept = [tensor if tensor.numel() or tensor.dim() == 2 else None for tensor in stored]
    gradients = forward_backward.backward(problem, plan, hidden_shape, kept, Needs(*arguments[-5:]), Arrived(*arrived))
    # an op's result must not share memory with its arguments
    taken = {tensor.untyped_storage().data_ptr() for tensor in stored}
    fresh = [g.clone() if g is not None and g.untyped_storage().data_ptr() in taken else g for g in gradients]
    return tuple(_given(gradient, problem.target_N) for gradient in fresh)


@score_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    hidden, weight, target, _, bias, low_hidden, low_weight = arguments[:7]
    stored, _, plan, hidden_shape = arguments[_SIZE + 5 : -5]
    needs = Needs(*arguments[-5:])
    if plan == "coef":
        hidden, weight, bias, low_weight, low_hidden = stored
    elif plan == "unit":
        hidden, low_hidden = (a if a.dim() == 2 else b for a, b in (stored[:2], stored[2:4]))
    rank = 0 if low_hidden is None else low_hidden.shape[-1]
    dlow = hidden.new_empty((*hidden_shape[:-1], rank), dtype=_statistics_dtype(hidden)) if needs.low_hidden else None
    found = (
        hidden.new_empty(hidden_shape) if needs.hidden else None,
        weight.new_empty(weight.shape) if needs.weight else None,
        bias.new_empty(bias.shape) if needs.bias and bias is not None else None,
        dlow,
        low_weight.new_empty(low_weight.shape) if needs.low_weight else None,
    )
    return tuple(_given(gradient, target) for gradient in found)


def run_backward(
    problem: HeadProblem,
    plan: str,
    shape: Sequence[int],
    stored: Sequence[Tensor | None],
    needs: Needs,
    arrived: Arrived,
    operands: Sequence[Any],
) -> Gradients:
    """`forward_backward.backward` through the op; `operands` are the five that the plan reads again, or none."""
    observed()
    p, nothing = problem, problem.target_N.new_empty(0, 0)
    hidden, weight, bias, low_hidden, low_weight = operands or (nothing, nothing, None, None, None)
    flat = _flat(hidden, weight, p.target_N, p.index_N, replace(p.options, bias=bias), (low_hidden, low_weight))
    return _run_backward(flat, p.best, plan, shape, stored, needs, arrived)


def _run_backward(
    flat: Sequence[Any],
    best: int,
    plan: str,
    shape: Sequence[int],
    stored: Sequence[Tensor | None],
    needs: Needs,
    arrived: Arrived,
) -> Gradients:
    wanted = needs[:5]
    gradients = score_backward(*flat, *arrived, [_given(tensor, flat[2]) for tensor in stored], best, plan, shape, *wanted)
    return tuple(gradient if need else None for gradient, need in zip(gradients, wanted, strict=True))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, target, rows, bias, *pair, temperatures, temperature, softcaps, _, _, _ = inputs[:_SIZE]
    _coef, _entropy_coef, ctx.best, _outputs, plan, *needs = inputs[_SIZE:]
    operands = (hidden, weight, bias, *pair) if plan in plans.REREAD else ()
    ctx.save_for_backward(*output[1 + len(_VECTORS) :], target, rows, temperatures, softcaps, *operands)
    ctx.temperature, ctx.numbers = temperature, inputs[_SIZE - 3 : _SIZE]
    ctx.set_materialize_grads(False)
    ctx.plan, ctx.shape, ctx.needs, ctx.inputs = plan, hidden.shape, Needs(*needs), len(inputs)
    own = forward_backward.differentiable(plan, target.dim() == 2)
    differentiable = (0,) if plan == "coef" else [1 + _VECTORS.index(name) for name in own]
    ctx.mark_non_differentiable(*(tensor for place, tensor in enumerate(output) if place not in differentiable))


def _backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
    by_name = dict(zip(_VECTORS, upstream[1:]))
    vectors = [None if ctx.plan == "coef" else by_name[name] for name in ("logp", "entropy", "lse", "best_logp")]
    arrived = Arrived(upstream[0] if ctx.plan == "coef" else None, *vectors)
    if all(gradient is None for gradient in arrived):
        return (None,) * ctx.inputs
    stored, (target, rows, temperatures, softcaps, *operands) = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
    hidden, weight, bias, *pair = operands or (target.new_empty(0, 0), target.new_empty(0, 0), None, None, None)
    flat = (hidden, weight, target, rows, bias, *pair, temperatures, ctx.temperature, softcaps, *ctx.numbers)
    dhidden, dweight, *more = _run_backward(flat, ctx.best, ctx.plan, ctx.shape, stored, ctx.needs, arrived)
    return dhidden, dweight, None, None, *more, *((None,) * (ctx.inputs - 7))


score.register_autograd(_backward, setup_context=_setup)


# --- head_backward and sample_tokens ----------------------------------------------------------------------------------


@torch.library.custom_op(
    "dllm_kernels::add_gradient",
    mutates_args=("dweight_out", "dbias_out", "dlow_out"),
    schema=f"({_HEAD}, Tensor coef, Tensor? entropy_coef, Tensor(a15!)? dweight_out, Tensor(a16!)? dbias_out, "
    "Tensor(a17!)? dlow_out) -> (Tensor, Tensor)",
)
def add_gradient(*arguments: Any) -> tuple[Tensor, Tensor]:
    """`head_backward`: dH in hidden's shape and what the adapter's operand gets; dW, db and dB are added to their buffers."""
    problem = _problem(*arguments[:_SIZE])
    dhidden, dlow = forward_backward.add_gradient(problem, arguments[0].shape, *arguments[_SIZE:])
    return dhidden, _given(dlow, problem.target_N)


@add_gradient.register_fake
def _(hidden: Tensor, *more: Any) -> tuple[Tensor, Tensor]:
    target, low_hidden = more[1], more[4]
    dlow = target.new_empty(0) if low_hidden is None else hidden.new_empty(low_hidden.shape, dtype=_statistics_dtype(hidden))
    return hidden.new_empty(hidden.shape), dlow


def run_add_gradient(
    hidden: Tensor, weight: Tensor, target: Tensor, rows: Tensor, options: HeadOptions, pair: Pair, *more: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`forward_backward.add_gradient` through the op; `more` are its coefficients and buffers."""
    dhidden, dlow = add_gradient(*_flat(hidden, weight, target, rows, options, pair), *more)
    return dhidden, None if pair[0] is None else dlow


@torch.library.custom_op(
    "dllm_kernels::sample",
    mutates_args=(),
    schema=f"({_HEAD}, SymInt step, Tensor? sample_temperatures, float sample_temperature, SymInt? top_k=None, "
    "float? top_p=None, float? min_p=None) -> (Tensor, Tensor, Tensor)",
)
def sample(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Token, its logp and the row's entropy, see `sample_tokens`. In place of targets come the rows' keys."""
    problem = _problem(*arguments[:_SIZE])
    step, varying, temperature, *restriction = arguments[_SIZE:]
    chosen = varying if varying is not None and varying.dim() else _held(varying, temperature)
    result = forward_backward.sample(problem, problem.target_N, step, chosen, *restriction)
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
    pair: Pair,
    step: int,
    temperature: float | Tensor,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`forward_backward.sample` through the op."""
    flat = _flat(hidden, weight, key, rows, options, pair)
    own = (temperature, 1.0) if isinstance(temperature, Tensor) else _number(temperature)
    token, logp, entropy = sample(*flat, step, *own, top_k, top_p, min_p)
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


def _flops(count: int, rows: int, weight: Tensor | None) -> int:
    return 0 if weight is None else 2 * count * rows * weight.shape[0] * weight.shape[1]


def _score_flops(*arguments: Any, out_val: Any) -> int:
    _, weight, target, _, _, _, low_weight = arguments[:7]
    _, _, _, outputs, plan, *flags = arguments[_SIZE:]
    needs, vectors, total = Needs(*flags), plans.late_vectors(outputs.split(",")), 0
    for matrix, need_gradient in ((weight, needs.weight), (low_weight, needs.low_weight)):
        forward, _ = plans.gemms(plan, need_dhidden=needs.vectors, need_dweight=need_gradient, vectors=vectors)
        total += _flops(forward, len(target), matrix)
    return total


def _score_backward_flops(*arguments: Any, out_val: Any) -> int:
    _, weight, target, _, _, _, low_weight = arguments[:7]
    _, *late, _, _, plan, _ = arguments[_SIZE:-5]
    needs, total = Needs(*arguments[-5:]), 0
    if plan not in plans.REREAD:
        return 0
    live = None
    if plan == "recompute" and type(target) is Tensor:  # not a fake one: rows without a coefficient are not gone through again
        live = plans.live_rows(*late)
    for matrix, need_gradient in ((weight, needs.weight), (low_weight, needs.low_weight)):
        _, backward = plans.gemms(plan, need_dhidden=needs.vectors, need_dweight=need_gradient)
        total += _flops(backward, len(target) if live is None else len(live), matrix)
    return total


def _add_gradient_flops(*arguments: Any, out_val: Any) -> int:
    _, weight, target, _, _, _, low_weight = arguments[:7]
    dweight_out, _, dlow_out = arguments[_SIZE + 2 :]
    rows = target.numel()
    return _flops(2 + (dweight_out is not None), rows, weight) + _flops(2 + (dlow_out is not None), rows, low_weight)


def _sample_flops(*arguments: Any, out_val: Any, **_: Any) -> int:
    return _flops(1, arguments[2].numel(), arguments[1]) + _flops(1, arguments[2].numel(), arguments[6])


_FLOPS = {
    "score": _score_flops,
    "score_backward": _score_backward_flops,
    "add_gradient": _add_gradient_flops,
    "sample": _sample_flops,
    "low_rank": low_rank.flops,
    "low_rank_backward": low_rank.backward_flops,
}
