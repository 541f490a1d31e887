"""What a head call does once it is checked: from tensors to tensors, without autograd.

The eager autograd function and the custom ops of `ops.py` are two shells around `forward` and `backward`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from dllm_kernels import backends, checks
from dllm_kernels.backends import contract, targets
from dllm_kernels.backends.contract import LOW, HeadProblem
from dllm_kernels.head import plans
from dllm_kernels.head.options import check_finite, check_temperature, device_type
from dllm_kernels.head.weight_sum import WeightSum

_T = TypeVar("_T")
_ROWS_AT_ONCE = 1024  # of stored 16-bit vectors, multiplied in fp32


class Needs(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool
    low_hidden: bool = False  # of the operands of an adapter, see `LowRank`
    low_weight: bool = False
    wide: bool = False  # the weight's as it was added up, in fp32 where the weight has 16 bits

    @property
    def vectors(self) -> bool:
        """Whether a gradient of the rows is wanted: hidden states and the adapter's operand get theirs from one vector."""
        return self.hidden or self.low_hidden


Stored = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class Result(NamedTuple):
    """What `forward` computes.

    stored: what `backward` gets back. With the plan "coef" the finished gradients of the rows, weight, bias and of the
    adapter's operands, B first, which its upstream scalar multiplies; with "unit" and "keep" the vectors or operands of logp
    and of entropy; then with "unit" those of an adapter's operand, with "keep" and several targets their logp and the entropy;
    with "recompute" the ids that the forward pass found; None where not wanted.
    """

    vectors: dict[str, Tensor]
    weighted_sum: Tensor | None = None
    stored: Stored = (None, None, None, None, None)


def _outside_autocast(function: Callable[..., _T]) -> Callable[..., _T]:
    """Autocast would cast the operands of our products: it is off inside a function whose first argument is a problem."""

    @functools.wraps(function)
    def called(problem: HeadProblem, *more: Any, **named: Any) -> _T:
        kind = device_type(problem.target_N)
        if not torch.is_autocast_enabled(kind):
            return function(problem, *more, **named)
        with torch.autocast(kind, enabled=False):
            return function(problem, *more, **named)

    return called


def _check_values(
    backend: ModuleType,
    problem: HeadProblem,
    coef_N: Tensor | None = None,
    entropy_coef_N: Tensor | None = None,
    *,
    targets: bool = True,
) -> None:
    """Every check that has to read values, before anything runs."""
    backend.check(problem, targets=targets)
    check_temperature(problem.options.temperature)
    if coef_N is not None:
        checks.finite("coef", coef_N)
    if entropy_coef_N is not None:
        checks.finite("entropy_coef", entropy_coef_N)


def _check_rows(problem: HeadProblem) -> None:
    """Raise ValueError for a row of hidden states that is not finite, before its gradient joins sums that are there already."""
    hidden_MH, index_N = problem.hidden_MH, problem.index_N
    if not checks.may_read(hidden_MH):
        return
    largest_N = (hidden_MH if index_N is None else hidden_MH[index_N]).abs().amax(1)
    if (row := checks.first_not_finite(largest_N)) is not None:
        place = row if index_N is None else int(index_N[row])
        raise ValueError(f"hidden must be finite at the rows that are scored, got {float(largest_N[row])} at row {place}")


@_outside_autocast
def forward(
    problem: HeadProblem,
    outputs: Sequence[str],
    plan: str,
    needs: Needs | None = None,
    coef_N: Tensor | None = None,
    entropy_coef_N: Tensor | None = None,
    weight_sum: WeightSum | None = None,
) -> Result:
    """Check values and run the forward pass of a plan. `outputs` holds "lse"; coefficients come with the plan "coef", and so does
    `needs`, which others do not read.

    weight_sum: what the plan "coef" adds the weight's gradient to; it is not stored then.
    """
    backend = backends.select(problem)
    _check_values(backend, problem, coef_N, entropy_coef_N)
    if plan != "coef":
        kept = {"unit": "unit", "keep": "operand"}.get(plan)
        wanted = {*outputs}
        if kept is not None and problem.several:
            wanted.add("logp")
        if kept is not None:
            wanted |= {prefix + kept for prefix, name in (("", "logp"), ("entropy_", "entropy")) if name in wanted}
        vectors = backend.run(problem, wanted)
        check_finite(vectors["lse"], problem)
        if kept is None:
            found = vectors["best_id"].clone() if plan == "recompute" and "best_id" in vectors else None
            return Result(vectors, stored=(None, None, found, None, None))
        more = [vectors[x].clone() if problem.several and x in vectors else None for x in ("logp", "entropy")]
        if kept == "unit" and problem.low_rank is not None:
            more = [vectors.pop(LOW + name, None) for name in ("unit", "entropy_unit")]
        return Result(vectors, stored=(vectors.pop(kept, None), vectors.pop("entropy_" + kept, None), more[0], more[1], None))

    assert needs is not None
    dtype = problem.statistics_dtype
    known = coef_N is not None
    if coef_N is None:
        coef_N = torch.zeros(problem.target_N.shape, dtype=dtype, device=problem.target_N.device)
    elif coef_N.dtype != dtype:
        coef_N = coef_N.to(dtype)
    whole_N, own_NM = _of_targets(problem, coef_N)
    wanted = {*outputs, "logp"} if known else {*outputs}
    if needs.vectors:
        wanted.add("dhidden")
    if entropy_coef_N is not None:
        wanted.add("entropy")
        entropy_coef_N = entropy_coef_N.to(dtype)
    if weight_sum is not None and weight_sum.written:
        _check_rows(problem)
    dweight_VH, dbias_V, dlow_VR, overwrite = _buffers(problem, needs, weight_sum)
    vectors = backend.run(
        problem,
        wanted,
        coef_N=whole_N,
        entropy_coef_N=entropy_coef_N,
        dweight_VH=dweight_VH,
        dbias_V=dbias_V,
        dlow_VR=dlow_VR,
        own_NM=own_NM,
        overwrite=overwrite,
    )
    check_finite(vectors["lse"], problem)
    weighted_sum = vectors["lse"].new_zeros(())
    if known:  # a target of probability 0 adds nothing where its coefficient is 0
        weighted_sum = torch.dot(coef_N.flatten(), vectors["logp"].masked_fill(coef_N == 0, 0.0).flatten())
    if entropy_coef_N is not None:
        weighted_sum += torch.dot(entropy_coef_N, vectors["entropy"])
    finished = _finished(problem, dweight_VH, dbias_V, dlow_VR, weight_sum)
    return Result(vectors, weighted_sum, (vectors.pop("dhidden", None), *finished, vectors.pop(LOW + "dhidden", None)))


class Arrived(NamedTuple):
    """Upstream gradients."""

    sum: Tensor | None  # of weighted_sum
    logp: Tensor | None
    entropy: Tensor | None
    lse: Tensor | None = None  # this and the next of problems with several targets alone
    best: Tensor | None = None  # of best_logp


def differentiable(plan: str, several: bool) -> tuple[str, ...]:
    """The vectors that a plan has gradients of; with "coef" `weighted_sum` alone has one."""
    if plan == "coef":
        return ()
    return ("logp", "entropy", "lse", "best_logp") if several else ("logp", "entropy")


Gradients = tuple[Tensor | None, ...]  # of hidden, weight and bias, and of the adapter's two operands


@_outside_autocast
def backward(
    problem: HeadProblem,
    plan: str,
    shape: Sequence[int],
    stored: Sequence[Tensor | None],
    needs: Needs,
    arrived: Arrived,
    weight_sum: WeightSum | None = None,
) -> Gradients:
    """The five gradients from what `forward` stored and what arrives upstream, which is not nothing.

    The weight's is None where it was added to a `weight_sum`.

    `shape` is hidden's. The problem's operands are read for
    the plans "keep" and "recompute" alone. A result may be a stored tensor itself, where the upstream gradient is 1.
    """
    dsum, dlogp_N, dentropy_N, *_ = arrived
    if dsum is not None:
        # out of place, so that a second backward finds what the first one found; by 1, no copy
        factor = None if dsum.is_cpu and float(dsum) == 1.0 else dsum
        assert weight_sum is None or factor is None or not dsum.is_cpu
        rows_NH, dweight, dbias, dlow_weight, low_NR = [g if g is None or factor is None else g * factor for g in stored]
        dhidden, dlow_hidden = _scattered(rows_NH, low_NR, problem.index_N, shape, needs)
        return dhidden, dweight, dbias, dlow_hidden, dlow_weight
    if plan not in plans.REREAD:
        of_hidden, of_low = (_pairs(stored[k : k + 2], dlogp_N, dentropy_N) for k in (0, 2))
        dhidden, dlow_hidden = (
            _sum_of_scaled_rows(pairs, problem.index_N, (*shape[:-1], pairs[0][0].shape[1])) if needed else None
            for pairs, needed in ((of_hidden, needs.hidden), (of_low, needs.low_hidden))
        )
        return dhidden, None, None, dlow_hidden, None

    dweight_VH, dbias_V, dlow_VR, overwrite = _buffers(problem, needs, weight_sum)
    index_N = problem.index_N
    if plan == "keep":
        given_NM = None
        if problem.several:
            dlogp_N, given_NM = _given(problem, stored, arrived)
        result = backends.select(problem).from_operands(
            problem,
            _pairs(stored[:2], dlogp_N, dentropy_N),
            dhidden=needs.vectors,
            dweight_VH=dweight_VH,
            dbias_V=dbias_V,
            dlow_VR=dlow_VR,
            given_NM=given_NM,
            overwrite=overwrite,
        )
    else:
        if problem.best:  # what the forward pass found are targets like others now
            problem, arrived = _with_found(problem, stored[2], arrived)
        result, index_N = _recompute(problem, arrived, needs, dweight_VH, dbias_V, dlow_VR, overwrite)
    dhidden, dlow_hidden = _scattered(result.get("dhidden"), result.get(LOW + "dhidden"), index_N, shape, needs)
    dweight, dbias, dlow_weight = _finished(problem, dweight_VH, dbias_V, dlow_VR, weight_sum)
    return dhidden, dweight, dbias, dlow_hidden, dlow_weight


@_outside_autocast
def add_gradient(
    problem: HeadProblem,
    shape: Sequence[int],
    coef_N: Tensor,
    entropy_coef_N: Tensor | None,
    dweight_VH: Tensor | None,
    dbias_V: Tensor | None,
    dlow_VR: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """dH in hidden's `shape` for coefficients known beforehand, and what the adapter's operand of the rows gets.

    What weight, bias and the adapter's B get is added to the buffers.

    A backend writes only into buffers that lie by rows in memory of their own; to others their gradient is added afterwards.
    """
    backend = backends.select(problem)
    _check_values(backend, problem, coef_N, entropy_coef_N)
    read = [problem.hidden_MH, problem.weight_VH, coef_N, entropy_coef_N, problem.options.bias, *problem.of_rows()]
    read += problem.low_rank or ()
    buffers = (dweight_VH, dbias_V, dlow_VR)
    own = [_by_rows(buffer, [*read, *buffers[:k], *buffers[k + 1 :]]) for k, buffer in enumerate(buffers)]
    given = [b if b is None or direct else torch.zeros(b.shape, dtype=b.dtype, device=b.device) for b, direct in own]
    result = backend.run(
        problem,
        ("dhidden", "lse"),
        coef_N=coef_N.to(problem.statistics_dtype),
        entropy_coef_N=None if entropy_coef_N is None else entropy_coef_N.to(problem.statistics_dtype),
        dweight_VH=given[0],
        dbias_V=given[1],
        dlow_VR=given[2],
    )
    check_finite(result["lse"], problem)
    for (buffer, direct), gradient in zip(own, given):
        if buffer is None or gradient is None:
            continue
        if direct:  # written behind autograd's back
            torch.autograd.graph.increment_version(buffer)
        else:
            buffer += gradient
    needs = Needs(True, False, False, low_hidden=problem.low_rank is not None)
    dhidden, dlow_hidden = _scattered(result["dhidden"], result.get(LOW + "dhidden"), problem.index_N, shape, needs)
    assert dhidden is not None
    return dhidden, dlow_hidden


@_outside_autocast
def sample(
    problem: HeadProblem,
    key_N: Tensor,
    step: int,
    temperature: float | Tensor,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> dict[str, Tensor]:
    """Check values and draw; results as of `backends.reference.sample`."""
    backend = backends.select(problem)
    _check_values(backend, problem, targets=False)
    temperature = _check_sampling(problem, temperature)
    result = backend.sample(problem, key_N, step=step, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    check_finite(result["lse"], problem)
    return result


@_outside_autocast
def sample_drawn(
    problem: HeadProblem,
    key_N: Tensor,
    step: int,
    temperature: float | Tensor,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    *,
    top_p_first: bool,
) -> dict[str, Tensor]:
    """As `sample`, with the statistics of the distribution drawn from, which need all logits of a row: PyTorch, by chunks."""
    _check_values(backends.reference, problem, targets=False)
    temperature = _check_sampling(problem, temperature)
    result = backends.reference.sample(
        problem,
        key_N,
        step=step,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        top_p_first=top_p_first,
        drawn=True,
    )
    check_finite(result["lse"], problem)
    return result


def _check_sampling(problem: HeadProblem, temperature: float | Tensor) -> float | Tensor:
    """A sampling temperature as the backends take it; ValueError for one of a row that is below 0 or not finite."""
    if not isinstance(temperature, Tensor):
        return temperature
    checks.finite("temperature", temperature)
    if checks.may_read(temperature) and bool((temperature < 0).any()):
        raise ValueError(f"temperature must be at least 0 at every row, got {float(temperature.min())}")
    return temperature.to(problem.statistics_dtype)


def _of_targets(problem: HeadProblem, coef_N: Tensor) -> tuple[Tensor, Tensor | None]:
    """Known coefficients as a backend takes them: those of one target, or D and each target's own, see `backends.targets`."""
    if not problem.several:
        return coef_N, None
    return coef_N.sum(1), targets.own_coefficients(problem.target_N, coef_N)


def _late(problem: HeadProblem, arrived: Arrived) -> tuple[Tensor, Tensor]:
    """Likewise D and the targets' own, of what arrived for several."""
    coef_NM, p = arrived.logp, problem
    if coef_NM is None:
        coef_NM = torch.zeros(p.target_N.shape, dtype=p.statistics_dtype, device=p.target_N.device)
    whole_N = coef_NM.sum(1)
    return whole_N if arrived.lse is None else whole_N - arrived.lse, targets.own_coefficients(p.target_N, coef_NM)


def _given(problem: HeadProblem, stored: Sequence[Tensor | None], arrived: Arrived) -> tuple[Tensor, Tensor]:
    """D, and the gradients by the final logits of several targets, from what the plan "keep" stored."""
    whole_N, own_NM = _late(problem, arrived)
    logp_NM, entropy_N = stored[2:4]
    assert logp_NM is not None
    return whole_N, targets.target_gradient(logp_NM, own_NM, whole_N, entropy_N, arrived.entropy)


def _with_found(problem: HeadProblem, found_NK: Tensor | None, arrived: Arrived) -> tuple[HeadProblem, Arrived]:
    assert found_NK is not None
    p, dtype = problem, problem.statistics_dtype
    parts = [(arrived.logp, p.target_N), (arrived.best, found_NK)]
    coef_NM = torch.cat([torch.zeros(ids.shape, dtype=dtype, device=ids.device) if c is None else c for c, ids in parts], 1)
    return replace(p, target_N=torch.cat((p.target_N, found_NK), 1), best=0), arrived._replace(logp=coef_NM, best=None)


def _by_rows(buffer: Tensor | None, others: Sequence[Tensor | None]) -> tuple[Tensor | None, bool]:
    """The buffer, and whether its rows are dense and it shares no memory with any of the others."""
    if buffer is None or not buffer.numel():
        return buffer, True
    width = buffer.shape[1] if buffer.dim() == 2 else 1
    dense = buffer.stride(-1) == 1 and (buffer.dim() == 1 or buffer.stride(0) >= width)
    return buffer, dense and not any(other is not None and checks.may_overlap(buffer, other) for other in others)


def _pairs(stored: Sequence[Tensor | None], dlogp_N: Tensor | None, dentropy_N: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    return [(s, c) for s, c in zip(stored, (dlogp_N, dentropy_N), strict=True) if s is not None and c is not None]


def _buffers(
    problem: HeadProblem, needs: Needs, weight_sum: WeightSum | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, bool]:
    """Gradient buffers of weight, bias and the adapter's B, and whether they are to be overwritten.

    The weight's is in its own dtype, into which a backend rounds by itself, unless it is wanted as it was added up.
    """
    like, dtype, low = problem.weight_VH, problem.statistics_dtype, problem.low_rank
    dbias_V = torch.empty(like.shape[0], dtype=dtype, device=like.device) if needs.bias else None
    dlow_VR = torch.empty(low.weight_VR.shape, dtype=dtype, device=like.device) if low and needs.low_weight else None
    if not needs.weight:
        return None, dbias_V, dlow_VR, True
    if weight_sum is None:
        kind = dtype if needs.wide else like.dtype
        return torch.empty_like(like, dtype=kind, memory_format=torch.contiguous_format), dbias_V, dlow_VR, True
    if weight_sum.written:
        contract.zero(dbias_V, dlow_VR)
    return weight_sum.tensor, dbias_V, dlow_VR, not weight_sum.written


def _finished(
    problem: HeadProblem,
    dweight_VH: Tensor | None,
    dbias_V: Tensor | None,
    dlow_VR: Tensor | None,
    weight_sum: WeightSum | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What is handed on of the buffers: the weight's unless it was a sum, those of bias and B in their dtypes."""
    if weight_sum is not None and dweight_VH is not None:
        weight_sum.added()
        dweight_VH = None
    low = problem.low_rank
    return dweight_VH, _cast(dbias_V, problem.options.bias), None if low is None else _cast(dlow_VR, low.weight_VR)


def _cast(gradient: Tensor | None, like: Tensor | None) -> Tensor | None:
    if gradient is None or like is None or gradient.dtype == like.dtype:
        return gradient
    return gradient.to(like.dtype)


def _scatter(compact_NH: Tensor, index_N: Tensor | None, shape: Sequence[int]) -> Tensor:
    """The selected rows' values among all rows of `shape`, zero elsewhere."""
    if index_N is None:
        return compact_NH if len(shape) == 2 else compact_NH.view(shape)
    whole = compact_NH.new_zeros(shape)
    whole.view(-1, shape[-1]).index_copy_(0, index_N, compact_NH)
    return whole


def _scattered(
    rows_NH: Tensor | None, low_NR: Tensor | None, index_N: Tensor | None, shape: Sequence[int], needs: Needs
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of hidden, in its `shape`, and of the adapter's operand, from those of the selected rows."""
    return (
        _scatter(rows_NH, index_N, shape) if rows_NH is not None and needs.hidden else None,
        _scatter(low_NR, index_N, (*shape[:-1], low_NR.shape[1])) if low_NR is not None and needs.low_hidden else None,
    )


def _sum_of_scaled_rows(pairs: list[tuple[Tensor, Tensor]], index_N: Tensor | None, shape: Sequence[int]) -> Tensor:
    """`sum coef_N * vectors_NH` in the vectors' dtype from products in the coefficients', at most a few rows at a time."""
    vectors_NH, coef_N = pairs[0]
    if index_N is None and len(pairs) == 1 and vectors_NH.dtype == coef_N.dtype:
        scaled_NH = vectors_NH * coef_N.unsqueeze(1)
        return scaled_NH if len(shape) == 2 else scaled_NH.view(shape)
    whole = vectors_NH.new_empty(shape) if index_N is None else vectors_NH.new_zeros(shape)
    whole_MH = whole.view(-1, shape[-1])
    for start in range(0, len(coef_N), _ROWS_AT_ONCE):
        span = slice(start, start + _ROWS_AT_ONCE)
        sum_NH = vectors_NH[span] * coef_N[span, None]
        for more_NH, more_N in pairs[1:]:
            sum_NH += more_NH[span] * more_N[span, None]
        if index_N is None:
            whole_MH[span] = sum_NH
        else:
            whole_MH.index_copy_(0, index_N[span], sum_NH.to(whole.dtype))
    return whole


def _recompute(
    problem: HeadProblem,
    arrived: Arrived,
    needs: Needs,
    dweight_VH: Tensor | None,
    dbias_V: Tensor | None,
    dlow_VR: Tensor | None,
    overwrite: bool,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Gradients from a second pass over the rows whose coefficients are not 0, and the flat indices of these rows."""
    keep_N = plans.live_rows(arrived.logp, arrived.entropy, arrived.lse)
    if keep_N is not None:
        problem = problem.select(keep_N)
        arrived = Arrived(*(None if coef_N is None else coef_N[keep_N] for coef_N in arrived))
    own_NM, coef_N, entropy_coef_N = None, arrived.logp, arrived.entropy
    if problem.several:
        coef_N, own_NM = _late(problem, arrived)
    elif coef_N is None:
        coef_N = torch.zeros(problem.rows, dtype=problem.statistics_dtype, device=problem.target_N.device)
    result = backends.select(problem).run(
        problem,
        ("dhidden",) if needs.vectors else (),
        coef_N=coef_N,
        entropy_coef_N=entropy_coef_N,
        dweight_VH=dweight_VH,
        dbias_V=dbias_V,
        dlow_VR=dlow_VR,
        own_NM=own_NM,
        overwrite=overwrite,
    )
    return result, problem.index_N
