"""The head as `torch.library` ops, namespace `dllm_kernels`: what torch.compile, torch.export and FlopCounterMode see.

Eager calls go through the thinner `autograd.Score` and come here only while something looks on (`observed`). Checks that
read values run inside the ops, so a compiled call makes them too. An output that a call does not want is an empty tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from dllm_kernels.backends.contract import STATISTICS, HeadProblem
from dllm_kernels.head import flops, forward_backward, plans
from dllm_kernels.head.options import Options, make_problem

_OTHERS = (torch.nn.Parameter, type(None))  # types beside Tensor that the launcher takes as they are


def observed(*tensors: Tensor | None) -> bool:
    """Whether something other than eager PyTorch is to see this call as one op: the compiler, a dispatch mode, fake tensors."""
    if torch.compiler.is_compiling():
        return True
    if torch._C._len_torch_dispatch_stack():
        flops.register()
        return True
    for tensor in tensors:
        kind = type(tensor)
        if (kind is not Tensor and kind not in _OTHERS) or (tensor is not None and tensor.is_meta):
            return True
    return False


def _options(
    softcap: float | None, temperature: float, temperature_N: Tensor | None, suppress: Sequence[int], valid_vocab: int | None
) -> Options:
    return Options(softcap, temperature if temperature_N is None else temperature_N, tuple(suppress), valid_vocab)


def split_temperature(temperature: float | Tensor) -> tuple[float, Tensor | None]:
    """A temperature as the two arguments that an op's schema can hold."""
    return (1.0, temperature.detach()) if isinstance(temperature, Tensor) else (float(temperature), None)


def _given(tensor: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if tensor is None else tensor


@torch.library.custom_op("dllm_kernels::score", mutates_args=())
def score(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    coef: Tensor | None,
    entropy_coef: Tensor | None,
    temperature_N: Tensor | None,
    temperature: float,
    softcap: float | None,
    suppress: Sequence[int],
    valid_vocab: int | None,
    outputs: str,
    plan: str,
    need_dhidden: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`weighted_sum`, the five vectors of STATISTICS, and the three tensors that backward gets back.

    `outputs`: names joined by commas. See `launch.forward` for the rest.
    """
    options = _options(softcap, temperature, temperature_N, suppress, valid_vocab)
    problem = make_problem(hidden, weight, target, rows, bias, options)
    needs = forward_backward.Needs(need_dhidden, need_dweight, need_dbias)
    result = forward_backward.forward(problem, outputs.split(","), plan, needs, coef, entropy_coef)
    vectors = [_given(result.vectors.get(name) if name in outputs.split(",") else None, target) for name in STATISTICS]
    stored = [t.t() if plan == "keep" and t is not None else t for t in result.stored]
    weighted_sum = hidden.new_empty(0, dtype=problem.statistics_dtype) if result.weighted_sum is None else result.weighted_sum
    return _nine(weighted_sum, *vectors, *(_given(tensor, target) for tensor in stored))


def _nine(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return cast(tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tensors)


@score.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    coef: Tensor | None,
    entropy_coef: Tensor | None,
    temperature_N: Tensor | None,
    temperature: float,
    softcap: float | None,
    suppress: Sequence[int],
    valid_vocab: int | None,
    outputs: str,
    plan: str,
    need_dhidden: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows_N, (vocabulary, hidden_size) = target.numel(), weight.shape
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    names = outputs.split(",")

    def empty(wanted: bool, like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return like.new_empty(shape, dtype=dtype or like.dtype) if wanted else target.new_empty(0)

    vectors = [empty(name in names, hidden, rows_N, dtype=torch.int64 if name == "top_id" else dtype) for name in STATISTICS]
    if plan == "coef":
        stored = [
            empty(need_dhidden, hidden, rows_N, hidden_size),
            empty(need_dweight, weight, vocabulary, hidden_size),
            empty(need_dbias, weight if bias is None else bias, vocabulary),
        ]
    else:
        size = (rows_N, hidden_size) if plan == "unit" else (vocabulary, rows_N)
        keeps = plan in ("unit", "keep")
        stored = [empty(keeps and name in names, hidden, *size) for name in ("logp", "entropy")]
        stored.append(target.new_empty(0))
    weighted_sum = hidden.new_empty(() if plan == "coef" else 0, dtype=dtype)
    return _nine(weighted_sum, *vectors, *stored)


def run_score(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    options: Options,
    coef: Tensor | None,
    entropy_coef: Tensor | None,
    outputs: tuple[str, ...],
    plan: str,
    wants_gradient: bool,
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """`weighted_sum` and the vectors that `outputs` names, through the op."""
    temperature, temperature_N = split_temperature(options.temperature)
    weighted_sum, *rest = score(
        hidden,
        weight,
        target,
        rows,
        bias,
        coef,
        entropy_coef,
        temperature_N,
        temperature,
        options.softcap,
        list(options.suppress),
        options.valid_vocab,
        ",".join(outputs),
        plan,
        wants_gradient and hidden.requires_grad,
        wants_gradient and weight.requires_grad,
        wants_gradient and bias is not None and bias.requires_grad,
    )
    return (weighted_sum if plan == "coef" else None), {name: vector for name, vector in zip(STATISTICS, rest) if name in outputs}


@torch.library.custom_op("dllm_kernels::score_backward", mutates_args=())
def score_backward(
    dsum: Tensor | None,
    dlogp: Tensor | None,
    dentropy: Tensor | None,
    stored: Sequence[Tensor],
    hidden: Tensor | None,
    weight: Tensor | None,
    target: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    temperature_N: Tensor | None,
    temperature: float,
    softcap: float | None,
    suppress: Sequence[int],
    valid_vocab: int | None,
    plan: str,
    hidden_shape: Sequence[int],
    need_dhidden: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; `hidden` and `weight` are given where the plan reads them again."""
    options = _options(softcap, temperature, temperature_N, suppress, valid_vocab)
    problem: HeadProblem | None = None
    if hidden is not None and weight is not None:
        problem = make_problem(hidden, weight, target, rows, bias, options)
    kept = [tensor if tensor.numel() or tensor.dim() == 2 else None for tensor in stored]
    if plan == "keep":
        kept = [None if tensor is None else tensor.t() for tensor in kept]
    needs = forward_backward.Needs(need_dhidden, need_dweight, need_dbias)
    gradients = forward_backward.backward(plan, problem, rows, hidden_shape, kept, needs, dsum, dlogp, dentropy)
    # an op's result must not share memory with its arguments
    taken = {tensor.untyped_storage().data_ptr() for tensor in stored}
    fresh = [g.clone() if g is not None and g.untyped_storage().data_ptr() in taken else g for g in gradients]
    dhidden, dweight, dbias = (_given(gradient, target) for gradient in fresh)
    return dhidden, dweight, dbias


@score_backward.register_fake
def _(
    dsum: Tensor | None,
    dlogp: Tensor | None,
    dentropy: Tensor | None,
    stored: Sequence[Tensor],
    hidden: Tensor | None,
    weight: Tensor | None,
    target: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    temperature_N: Tensor | None,
    temperature: float,
    softcap: float | None,
    suppress: Sequence[int],
    valid_vocab: int | None,
    plan: str,
    hidden_shape: Sequence[int],
    need_dhidden: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    a, b, c = stored
    like_hidden = hidden if hidden is not None else (a if plan == "coef" or a.dim() == 2 else b)
    like_weight, like_bias = (b, c) if weight is None else (weight, bias)
    return (
        like_hidden.new_empty(hidden_shape) if need_dhidden else target.new_empty(0),
        like_weight.new_empty(like_weight.shape) if need_dweight else target.new_empty(0),
        like_bias.new_empty(like_bias.shape) if need_dbias and like_bias is not None else target.new_empty(0),
    )


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def run_backward(
    arrived: Gradients,
    stored: Sequence[Tensor | None],
    operands: Sequence[Tensor | None],
    target: Tensor,
    rows: Tensor | None,
    options: Options,
    plan: str,
    shape: Sequence[int],
    needs: forward_backward.Needs,
) -> Gradients:
    """`launch.backward` through the op; `operands` are hidden, weight and bias, or nothing where the plan reads none."""
    observed()
    hidden, weight, bias = operands or (None, None, None)
    temperature, temperature_N = split_temperature(options.temperature)
    gradients = score_backward(
        *arrived,
        [_given(tensor, target) for tensor in stored],
        hidden,
        weight,
        target,
        rows,
        bias,
        temperature_N,
        temperature,
        options.softcap,
        list(options.suppress),
        options.valid_vocab,
        plan,
        shape,
        *needs,
    )
    dhidden, dweight, dbias = (gradient if need else None for gradient, need in zip(gradients, needs, strict=True))
    return dhidden, dweight, dbias


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, target, rows, bias, _coef, _entropy_coef, temperature_N, *numbers, _outputs, plan, a, b, c = inputs
    ctx.save_for_backward(*output[6:], target, rows, temperature_N, *((hidden, weight, bias) if plan in plans.REREAD else ()))
    ctx.set_materialize_grads(False)
    ctx.numbers, ctx.plan, ctx.shape, ctx.needs = numbers, plan, hidden.shape, forward_backward.Needs(a, b, c)
    differentiable = (0,) if plan == "coef" else (1, 3)  # weighted_sum, or logp and entropy
    ctx.mark_non_differentiable(*(tensor for place, tensor in enumerate(output) if place not in differentiable))


def _backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
    arrived = (upstream[0], None, None) if ctx.plan == "coef" else (None, upstream[1], upstream[3])
    if all(gradient is None for gradient in arrived):
        return (None,) * 17
    a, b, c, target, rows, temperature_N, *operands = ctx.saved_tensors
    temperature, softcap, suppress, valid_vocab = ctx.numbers
    options = _options(softcap, temperature, temperature_N, suppress, valid_vocab)
    dhidden, dweight, dbias = run_backward(arrived, (a, b, c), operands, target, rows, options, ctx.plan, ctx.shape, ctx.needs)
    return dhidden, dweight, None, None, dbias, *((None,) * 12)


score.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("dllm_kernels::add_gradient", mutates_args=("dweight_out", "dbias_out"))
def add_gradient(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    coef: Tensor,
    entropy_coef: Tensor | None,
    temperature_N: Tensor | None,
    temperature: float,
    softcap: float | None,
    suppress: Sequence[int],
    valid_vocab: int | None,
    dweight_out: Tensor | None,
    dbias_out: Tensor | None,
) -> Tensor:
    """`head_backward`: dH in hidden's shape; dW and db are added to their buffers."""
    options = _options(softcap, temperature, temperature_N, suppress, valid_vocab)
    problem = make_problem(hidden, weight, target, rows, bias, options)
    return forward_backward.add_gradient(problem, hidden.shape, coef, entropy_coef, dweight_out, dbias_out)


@add_gradient.register_fake
def _(hidden: Tensor, *_: Any) -> Tensor:
    return hidden.new_empty(hidden.shape)


def run_add_gradient(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    rows: Tensor,
    bias: Tensor | None,
    options: Options,
    coef: Tensor,
    entropy_coef: Tensor | None,
    dweight_out: Tensor | None,
    dbias_out: Tensor | None,
) -> Tensor:
    """`launch.add_gradient` through the op."""
    temperature, temperature_N = split_temperature(options.temperature)
    return add_gradient(
        hidden,
        weight,
        target,
        rows,
        bias,
        coef,
        entropy_coef,
        temperature_N,
        temperature,
        options.softcap,
        list(options.suppress),
        options.valid_vocab,
        dweight_out,
        dbias_out,
    )


@torch.library.custom_op("dllm_kernels::sample", mutates_args=())
def sample(
    hidden: Tensor,
    weight: Tensor,
    key: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    logit_temperature: float,
    softcap: float | None,
    suppress: Sequence[int],
    valid_vocab: int | None,
    step: int,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Token, its logp and the row's entropy, see `sample_tokens`."""
    options = Options(softcap, logit_temperature, tuple(suppress), valid_vocab)
    result = forward_backward.sample(make_problem(hidden, weight, key, rows, bias, options), key, step, temperature, top_k, top_p)
    return result["token"], result["logp"], result["entropy"]


@sample.register_fake
def _(hidden: Tensor, weight: Tensor, key: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return torch.empty_like(key), hidden.new_empty(key.numel(), dtype=dtype), hidden.new_empty(key.numel(), dtype=dtype)
