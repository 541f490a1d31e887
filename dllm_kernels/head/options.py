"""From the arguments of `score_tokens` and `sample_tokens` to a checked `HeadProblem`.

`check_arguments` looks at types, shapes, dtypes and Python numbers only, so it works while `torch.compile` traces; what has
to read values (`backend.check`, `check_finite`) runs inside the op.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dllm_kernels import checks
from dllm_kernels.backends.contract import HeadOptions, HeadProblem, LowRank, flat
from dllm_kernels.head import low_rank


def check_arguments(hidden: Tensor, weight: Tensor, rows: Tensor | None, count: int, options: HeadOptions) -> None:
    """Raise TypeError or ValueError, naming the argument, for what cannot be a problem of `count` rows."""
    bias, temperature = options.bias, options.temperature
    if not torch.compiler.is_compiling():
        _refuse_transforms(hidden=hidden, weight=weight, rows=rows, bias=bias, temperature=temperature)
        if options.low_rank is not None:
            _refuse_transforms(low_rank=options.low_rank[0])
            _refuse_transforms(low_rank=options.low_rank[1])
    check_head(hidden, weight, bias, options.softcap)
    hidden_size, vocabulary = weight.shape[1], weight.shape[0]
    if rows is None:
        available = hidden.numel() // hidden_size
        if count != available:
            raise ValueError(f"rows may be left out only for all {available} rows of hidden, got {count} targets or keys")
    else:
        checks.dtype("rows", rows, [torch.int64])
        checks.shape("rows", rows, [count])
    if isinstance(temperature, Tensor):
        checks.shape("temperature", temperature, [count])
    elif not (type(temperature) is float and 0 < temperature < float("inf")):  # checks.number, but for what is common
        checks.number("temperature", temperature, above=0)
    if not (hidden.is_cpu and weight.is_cpu and rows is bias is None and not isinstance(temperature, Tensor)):
        for name, value in (("weight", weight), ("rows", rows), ("bias", bias), ("temperature", temperature)):
            if isinstance(value, Tensor):
                checks.same_device(name, value, "hidden", hidden)
    if options.low_rank is not None:
        low_rank.check(options.low_rank, hidden, weight)
    if options.suppress or options.valid_vocab is not None:
        _check_excluded(options, vocabulary)


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, of: str = "") -> None:
    """Raise TypeError or ValueError for what is no head and its rows; `of` comes before the arguments' names."""
    checks.dtype(f"{of}hidden", hidden, checks.FLOATS)
    checks.dtype(f"{of}weight", weight, checks.FLOATS)
    if type(weight) is not Tensor or type(hidden) is not Tensor:
        for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
            if type(tensor).__name__ == "DTensor":
                raise TypeError(
                    f"{of}{name} must be a plain tensor, got a DTensor: "
                    f"gather it first, once per optimizer step, with {of}{name}.full_tensor()"
                )
    weight_shape, hidden_shape = weight.shape, hidden.shape
    if len(weight_shape) != 2:
        checks.shape(f"{of}weight", weight, [None, None])
    vocabulary, hidden_size = weight_shape
    if len(hidden_shape) < 1 or hidden_shape[-1] != hidden_size:
        raise ValueError(
            f"{of}hidden must have shape [..., {hidden_size}] to match {of}weight {list(weight_shape)}, got {list(hidden_shape)}"
        )
    if weight.dtype != hidden.dtype:
        raise TypeError(f"{of}weight must have {of}hidden's dtype {hidden.dtype}, got {weight.dtype}")
    if vocabulary == 0 or hidden_size == 0:
        raise ValueError(f"{of}weight must have at least one row and one column, got {list(weight_shape)}")
    if bias is not None:
        checks.dtype(f"{of}bias", bias, checks.FLOATS)
        checks.shape(f"{of}bias", bias, [vocabulary])
    if softcap is not None:
        checks.number(f"{of}softcap", softcap, above=0)


def coefficient(name: str, coef: Tensor | None, shape: Sequence[int], hidden: Tensor) -> Tensor | None:
    """A tensor of coefficients, detached; raises TypeError or ValueError where it is none of this shape."""
    if coef is None:
        return None
    checks.dtype(name, coef, checks.FLOATS)
    checks.shape(name, coef, shape)
    checks.same_device(name, coef, "hidden", hidden)
    return coef.detach() if coef.requires_grad else coef


def _refuse_transforms(**arguments: Any) -> None:
    """Raise TypeError for tensors of torch.func and of forward-mode differentiation, whose second half would be lost."""
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    dual = forward_ad._current_level >= 0
    if not transformed and not dual:
        return
    for name, tensor in arguments.items():
        if not isinstance(tensor, Tensor):
            continue
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            raise TypeError(
                f"{name} must be a plain tensor, got one inside a transform of torch.func (vmap, grad, jvp, ...): hidden takes "
                "any leading dimensions in place of vmap, gradients come by backward() or torch.autograd.grad, there is no jvp"
            )
        if dual and forward_ad.unpack_dual(tensor).tangent is not None:
            raise TypeError(
                f"{name} must not carry a forward-mode tangent, got a dual tensor of torch.autograd.forward_ad: "
                "the head differentiates in reverse mode only"
            )


def _check_excluded(options: HeadOptions, vocabulary: int) -> None:
    suppress, valid_vocab, limit = options.suppress, options.valid_vocab, vocabulary
    if valid_vocab is not None:
        limit = checks.count("valid_vocab", valid_vocab)
        if limit > vocabulary:
            raise ValueError(f"valid_vocab must be in 1..{vocabulary}, got {valid_vocab}")
    for token in suppress:
        if not 0 <= token < vocabulary:
            raise ValueError(f"suppress must hold ids in 0..{vocabulary - 1}, got {token}")
    if len(suppress) >= limit and len({token for token in suppress if token < limit}) == limit:
        raise ValueError("suppress and valid_vocab must leave at least one id, got all of them excluded")


def make_problem(
    hidden: Tensor,
    weight: Tensor,
    target_N: Tensor,
    rows: Tensor | None,
    options: HeadOptions,
    pair: low_rank.Pair = (None, None),
    best: int = 0,
) -> HeadProblem:
    """The problem of arguments that `check_arguments` let pass; values are not looked at yet, and gradients never recorded."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return HeadProblem(flat(hidden), weight, target_N, rows, options.normalised(dtype), LowRank.of(*pair), best)


def device_type(tensor: Tensor) -> str:
    """`tensor.device.type`, of which the CPU's is asked for most and costs least this way."""
    return "cpu" if tensor.is_cpu else tensor.device.type


def check_temperature(temperature: float | Tensor) -> None:
    """Raise ValueError for a per-row temperature that is not finite and above 0; reads values, see `checks.may_read`."""
    if isinstance(temperature, Tensor):
        checks.finite("temperature", temperature)
        if checks.may_read(temperature) and not bool((temperature > 0).all()):
            raise ValueError("temperature must be above 0 at every row")


def check_finite(lse_N: Tensor, problem: HeadProblem, whose: str = "hidden, weight, bias") -> None:
    """Raise ValueError naming the first row whose logits are not finite; reads values, see `checks.may_read`."""
    if checks.may_read(lse_N) and (row := checks.first_not_finite(lse_N)) is not None:
        place = row if problem.index_N is None else int(problem.index_N[row])
        raise ValueError(f"{whose} must give finite logits (or -inf), got logsumexp {float(lse_N[row])} at row {place} of hidden")


def autocast_operands(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Under torch.autocast, hidden and weight in its dtype as for `F.linear`; the casts carry their gradients back."""
    kind = device_type(hidden)
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return hidden, weight
    dtype = torch.get_autocast_dtype(kind)
    low = (torch.float32, torch.bfloat16, torch.float16)  # autocast leaves float64 alone
    return (
        hidden.to(dtype) if hidden.dtype in low else hidden,
        weight.to(dtype) if isinstance(weight, Tensor) and weight.dtype in low else weight,
    )
