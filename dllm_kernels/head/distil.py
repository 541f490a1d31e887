"""What a call of `distillation_loss` does once it is checked: from tensors to tensors, without autograd.

As in `forward_backward`, an autograd function and the ops of `distil_ops` are two shells around `forward` and `backward`. Plans
are those of `score_tokens` by who knows the coefficients of the rows, and when:

    forward    nothing wants a gradient
    coef       known ("mean", "sum"): all gradients come with the forward pass, 2 products of logits and 1 for each gradient
    unit       late ("none"), head frozen: the gradient vectors [N, H] are stored, backward multiplies them by what arrives
    recompute  late ("none"), head trainable: three numbers of a row are stored, backward makes the logits again
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from dllm_kernels import backends, checks
from dllm_kernels.backends.contract import HeadOptions, HeadProblem, flat
from dllm_kernels.backends.divergence import walk
from dllm_kernels.backends.divergence.problem import Buffers, DivergenceProblem, Pair, Side, Statistics
from dllm_kernels.head.forward_backward import Gradients, Needs, _check_values, _outside_autocast, _scatter
from dllm_kernels.head.options import check_finite, check_head

Stored = Sequence[Tensor | None]


@dataclass(frozen=True, eq=False)
class Teacher:
    """The other head, and how the two are compared."""

    hidden: Tensor  # [..., K]
    weight: Tensor  # [V', K]
    bias: Tensor | None
    softcap: float | None
    kind: str
    beta: float


class Result(NamedTuple):
    """`stored` is what `backward` gets back, five entries: of the plan "coef" finished gradients of the rows, weight, bias and
    the adapter's two operands; of "unit" vectors of the rows and of the adapter's operand; of "recompute" `[3, N]`
    statistics, the first entry."""

    weighted_sum: Tensor
    divergence_N: Tensor
    stored: Stored


def check_teacher(hidden: Tensor, weight: Tensor, teacher: Teacher, valid_vocab: int | None) -> None:
    """Raise TypeError or ValueError, naming the argument, for what is no teacher of this student."""
    t = teacher
    check_head(t.hidden, t.weight, t.bias, t.softcap, of="teacher_")
    for name, tensor in (("teacher_hidden", t.hidden), ("teacher_weight", t.weight), ("teacher_bias", t.bias)):
        if tensor is not None:
            checks.same_device(name, tensor, "hidden", hidden)
    if t.hidden.dtype == torch.float64 != hidden.dtype:
        raise TypeError(f"teacher_hidden may be float64 only where hidden is, got {hidden.dtype} there")
    if t.hidden.shape[:-1] != hidden.shape[:-1]:
        leading = "".join(f"{size}, " for size in hidden.shape[:-1])
        raise ValueError(f"teacher_hidden must have shape [{leading}any], like hidden, got {list(t.hidden.shape)}")
    if valid_vocab is None and len(t.weight) != len(weight):
        raise ValueError(
            f"teacher_weight must have weight's {len(weight)} rows, got {len(t.weight)}: "
            "where the two are padded differently, valid_vocab says how many ids they share"
        )
    if valid_vocab is not None and len(t.weight) < valid_vocab:
        raise ValueError(f"teacher_weight must have at least valid_vocab={valid_vocab} rows, got {len(t.weight)}")


def choose(wants_gradient: bool, head_trains: bool, coef_known: bool) -> str:
    """The plan."""
    if not wants_gradient:
        return "forward"
    return "coef" if coef_known else "recompute" if head_trains else "unit"


@_outside_autocast
def forward(problem: HeadProblem, teacher: Teacher, plan: str, needs: Needs | None = None) -> Result:
    """Check values and run the forward pass. In place of targets `problem` has the rows' coefficients; `needs` says which
    gradients come with it.
    """
    p, coef_N = problem, problem.target_N
    _check_values(backends.select(p), p, coef_N, targets=False)
    for name, bias in (("bias", p.options.bias), ("teacher_bias", teacher.bias)):
        if bias is not None:
            checks.finite(name, bias)
    made = divergence_problem(p, teacher)
    coef_N = coef_N.to(made.dtype)
    buffers = _buffers(p, needs) if needs is not None and plan in ("coef", "unit") else None
    found = walk.run(made, buffers, coef_N if plan == "coef" else None)
    check_finite(found.student_lse, p)
    check_finite(found.teacher_lse, p, "teacher_hidden, teacher_weight")
    stored: Stored = (None, None, None, None, None)
    if buffers is not None:
        (rows, *low_rows), (weight, *low_weight) = buffers.rows, buffers.weights
        stored = rows, weight, buffers.bias, *(low_rows or (None,)), *(low_weight or (None,))
    elif plan == "recompute":
        stored = torch.stack(found[1:]), None, None, None, None
    return Result(torch.dot(coef_N, found.divergence), found.divergence, stored)


@_outside_autocast
def backward(
    problem: HeadProblem, teacher: Teacher | None, plan: str, shape: Sequence[int], stored: Stored, needs: Needs, arrived: Tensor
) -> Gradients:
    """Gradients of hidden (in `shape`), weight, bias and the adapter's two operands.

    `arrived`: of the weighted sum under the plan "coef", else of the divergences. "recompute" alone reads operands and teacher.
    """
    p = problem
    rows, weight, bias, low_rows, low_weight = stored
    if plan == "recompute":
        assert teacher is not None
        assert rows is not None
        buffers = _buffers(p, needs)
        nothing = rows[0]  # of the divergences, which no gradient depends on
        walk.gradient(divergence_problem(p, teacher), Statistics(nothing, *rows), buffers, arrived)
        (rows, *low), (weight, *low_up), bias = buffers
        low_rows, low_weight = (low or (None,))[0], (low_up or (None,))[0]
    elif plan == "unit":
        rows, low_rows = (x if x is None else x * arrived[:, None] for x in (rows, low_rows))
    elif not (arrived.is_cpu and float(arrived) == 1.0):  # out of place: a second backward finds the same
        rows, weight, bias, low_rows, low_weight = (x if x is None else x * arrived for x in stored)
    dhidden = None if rows is None else _scatter(rows.to(p.hidden_MH.dtype), p.index_N, shape)
    dlow = None if low_rows is None else _scatter(low_rows, p.index_N, (*shape[:-1], low_rows.shape[1]))
    dbias = bias if bias is None or p.options.bias is None else bias.to(p.options.bias.dtype)
    return dhidden, weight, dbias, dlow, low_weight


def divergence_problem(problem: HeadProblem, teacher: Teacher) -> DivergenceProblem:
    """Both heads' chosen rows, in the dtypes in which they are multiplied."""
    vocabulary, options = walked(problem)
    other = flat(teacher.hidden).detach(), teacher.weight.detach()
    of_teacher = replace(options, bias=teacher.bias, softcap=teacher.softcap)
    sides = side(problem, head_pairs(problem), options), side(problem, [other], of_teacher)
    return DivergenceProblem(*sides, teacher.kind, teacher.beta, problem.statistics_dtype, vocabulary)


def walked(problem: HeadProblem) -> tuple[int, HeadOptions]:
    """How many ids a walk over slabs goes through, the rest having no probability, and the options within them."""
    limit, options = problem.options.valid_vocab, problem.options
    vocabulary = len(problem.weight_VH) if limit is None else limit
    kept = tuple(token for token in options.suppress if token < vocabulary)
    return vocabulary, replace(options, suppress=kept, valid_vocab=None)


def head_pairs(problem: HeadProblem) -> list[tuple[Tensor, Tensor]]:
    """All rows and the weight, then an adapter's."""
    p = problem
    return [(p.hidden_MH.detach(), p.weight_VH.detach()), *([] if p.low_rank is None else [p.low_rank])]


def side(
    problem: HeadProblem,
    pairs: Sequence[tuple[Tensor, Tensor]],
    options: HeadOptions,
    product_dtype: Callable[[Tensor, torch.dtype], torch.dtype] = walk.product_dtype,
) -> Side:
    """A head on the problem's rows, in the dtypes in which they are multiplied."""
    dtype, made = problem.statistics_dtype, []
    for rows_MK, weight_VK in pairs:
        rows_NK = rows_MK if problem.index_N is None else rows_MK[problem.index_N]
        product = product_dtype(weight_VK, dtype) if rows_NK.dtype == weight_VK.dtype else dtype
        made.append(Pair(rows_NK.to(product), weight_VK))
    bias = options.bias
    return Side(tuple(made), replace(options, bias=None if bias is None else bias.detach().to(dtype)))


def _buffers(problem: HeadProblem, needs: Needs) -> Buffers:
    """Uninitialised memory for the gradients that are wanted: the weights' in their dtypes, or as they are added up."""
    p, dtype, device = problem, problem.statistics_dtype, problem.target_N.device

    def empty(wanted: bool, shape: Sequence[int], kind: torch.dtype) -> Tensor | None:
        return torch.empty(shape, dtype=kind, device=device) if wanted else None

    rows = [empty(needs.hidden, (p.rows, p.hidden_MH.shape[1]), dtype)]
    weights = [empty(needs.weight, p.weight_VH.shape, dtype if needs.wide else p.weight_VH.dtype)]
    if p.low_rank is not None:
        low = p.low_rank
        rows.append(empty(needs.low_hidden, (p.rows, low.hidden_MR.shape[1]), dtype))
        weights.append(empty(needs.low_weight, low.weight_VR.shape, low.weight_VR.dtype))
    return Buffers(tuple(rows), tuple(weights), empty(needs.bias, (len(p.weight_VH),), dtype))
