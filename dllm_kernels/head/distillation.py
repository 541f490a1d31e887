"""Divergence of a student's head from a teacher's over the whole vocabulary, from hidden states, without logits.

Who knows the coefficients of the rows, and when, decides the order of work, as in `scoring`:

    known ("mean", "sum")          all gradients come with the forward pass: 2 products of logits, 1 for each gradient
    late ("none"), frozen head     the gradient vectors [N, H] are stored, backward multiplies them by what arrives
    late ("none"), trainable head  nothing is stored, backward makes the logits again
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd.function import once_differentiable

from dllm_kernels import checks
from dllm_kernels.backends import divergence
from dllm_kernels.backends.contract import HeadOptions, WeightGradient, flat
from dllm_kernels.backends.divergence import KINDS, Buffers, DivergenceProblem, Pair, Side, Statistics
from dllm_kernels.head import low_rank as adapter
from dllm_kernels.head.forward_backward import _scatter
from dllm_kernels.head.options import autocast_operands, check_arguments, check_temperature, device_type
from dllm_kernels.head.scoring import score

REDUCTIONS = ("mean", "sum", "none")
_SUM_SLACK = 1e-2  # of the log of given probabilities' sum: they may come in 16 bits
_LEAST_REST = 2.0**-24


def distillation_loss(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    *,
    teacher_ids: Tensor | None = None,
    teacher_logp: Tensor | None = None,
    kind: str = "forward_kl",
    beta: float | None = None,
    rows: Tensor | None = None,
    coef: Tensor | None = None,
    reduction: str = "mean",
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    suppress: Sequence[int] = (),
    valid_vocab: int | None = None,
    low_rank: tuple[Tensor, Tensor, float] | None = None,
    teacher_bias: Tensor | None = None,
    teacher_softcap: float | None = None,
    take_dweight: WeightGradient | None = None,
) -> Tensor:
    """Divergence of the student's distribution Q from the teacher's P at each selected row, over all V ids.

    With P and Q the softmax of the final logits of each head:

        forward_kl   `KL(P || Q) = sum_v p_v (log p_v - log q_v)`
        reverse_kl   `KL(Q || P)`
        jsd          `b KL(P || M) + (1 - b) KL(Q || M)`, `M = b P + (1 - b) Q`: the generalised Jensen-Shannon divergence
                     of on-policy distillation (GKD, arXiv 2306.13649, eq. 1), whose b is `beta`

    Args:
        hidden: `[..., H]`, float32, bfloat16, float16 or float64. weight: `[V, H]` in its dtype.
        teacher_hidden: `[..., H']` with hidden's leading dimensions; teacher_weight: `[V, H']` in its dtype. Both have a dtype
            of their own (float64 with float64 only), are detached, and may have another width. Where `valid_vocab` is given
            the two vocabularies may differ in size beyond it.
        teacher_ids, teacher_logp: in place of these two, `[N, k]` distinct ids of each row, such as the teacher's likeliest, and
            their finite log-probabilities at `temperature`. The divergence is then that of k + 1 events, each id and "any
            other": never above the whole one, and the whole one where the ids are all. A rest below 2^-24 counts as that.
        beta: of "jsd", in (0, 1), default 0.5.
        rows: int64 `[N]`, unique flat indices into the leading dimensions of both; None means all rows in order.
        coef: `[N]`, finite, detached: multiplies the rows' divergences; None means 1.
        reduction: "mean": `sum coef * D / N`. "sum": `sum coef * D`. "none": `coef * D`, `[N]`.
        bias, softcap, low_rank: of the student, as in `score_tokens`; teacher_bias `[V]`, teacher_softcap: of the teacher. Biases
            must be finite.
        temperature: > 0, a number or `[N]`, divides the logits of both. Nothing is multiplied by its square.
        suppress, valid_vocab: ids without probability in both, as in `score_tokens`.
        take_dweight: as in `score_tokens`.

    Returns float32 (float64 for float64 inputs), differentiable in hidden, weight, bias, A and B. Neither logits nor
    probabilities are held beyond a slab of the vocabulary; a trainable weight's gradient serves as memory for the logits of
    its own slab, others take up to the workspace budget. With "mean" and "sum" nothing but finished gradients is kept for
    backward. With "none" and a trainable head backward makes the logits again, and what it reads must not change in place
    until then: PyTorch raises. Sums over slabs are in float64. Under torch.compile the call breaks the graph. Double
    backward is not supported. Raises ValueError or TypeError naming the argument; a row of either model whose logits are
    not finite is reported on the CPU always, on a GPU under DLLM_KERNELS_VALIDATE=1.

    Example:
        >>> hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
        >>> loss = distillation_loss(hidden, weight, torch.randn(4, 16), torch.randn(11, 16), kind="jsd", temperature=2.0)
        >>> loss.backward()
    """
    options = HeadOptions(bias, softcap, temperature, suppress, valid_vocab, low_rank)
    checks.choice("kind", kind, KINDS)
    checks.choice("reduction", reduction, REDUCTIONS)
    if beta is not None and kind != "jsd":
        raise ValueError(f"beta goes with kind='jsd', got beta={beta} with kind={kind!r}")
    beta = 0.5 if beta is None else checks.number("beta", beta)
    if not 0 < beta < 1:
        raise ValueError(f"beta must be in (0, 1), got {beta}: the ends are kind='forward_kl' (0) and 'reverse_kl' (1)")
    checks.require_tensor("hidden", hidden)
    if teacher_ids is not None or teacher_logp is not None:
        given = teacher_hidden, teacher_weight, teacher_bias, teacher_softcap
        if any(value is not None for value in given) or teacher_ids is None or teacher_logp is None:
            raise TypeError(
                "teacher_ids and teacher_logp go together, in place of teacher_hidden, teacher_weight and their options"
            )
        events = _events(hidden, weight, teacher_ids, teacher_logp, rows, options, take_dweight)
        return _reduced(_of_events(*events, kind, beta), coef, reduction)
    if teacher_hidden is None or teacher_weight is None:
        raise TypeError("teacher_hidden and teacher_weight must be given, or teacher_ids and teacher_logp")
    hidden, weight = autocast_operands(hidden, weight)
    count = rows.numel() if isinstance(rows, Tensor) else hidden.numel() // max(1, hidden.shape[-1] if hidden.dim() else 1)
    check_arguments(hidden, weight, rows, count, options)
    vocabulary = len(weight) if valid_vocab is None else valid_vocab
    checks.require_tensor("teacher_hidden", teacher_hidden)
    teacher_hidden, teacher_weight = autocast_operands(teacher_hidden, teacher_weight)
    _check_teacher(hidden, weight, teacher_hidden, teacher_weight, teacher_bias, teacher_softcap, valid_vocab)
    if coef is not None:
        checks.dtype("coef", coef, checks.FLOATS)
        checks.shape("coef", coef, [count])
        checks.same_device("coef", coef, "hidden", hidden)
    pair = adapter.pair(hidden, options)
    run = _apart if torch.compiler.is_compiling() else _run
    problem = kind, beta, vocabulary, teacher_hidden.detach(), teacher_weight.detach(), teacher_bias, teacher_softcap
    return run(hidden, weight, bias, pair, rows, options, problem, coef, reduction, take_dweight)


def _events(
    hidden: Tensor,
    weight: Tensor,
    ids_NM: Tensor,
    logp_NM: Tensor,
    rows: Tensor | None,
    options: HeadOptions,
    take_dweight: WeightGradient | None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities `[N, k + 1]` of the given ids and of any other: the teacher's and, differentiable, the student's."""
    checks.dtype("teacher_ids", ids_NM, [torch.int64])
    checks.shape("teacher_ids", ids_NM, [None if rows is None else rows.numel(), None])
    checks.dtype("teacher_logp", logp_NM, checks.FLOATS)
    checks.shape("teacher_logp", logp_NM, ids_NM.shape)
    checks.same_device("teacher_ids", ids_NM, "hidden", hidden)
    checks.same_device("teacher_logp", logp_NM, "hidden", hidden)
    checks.finite("teacher_logp", logp_NM)
    if not ids_NM.shape[1]:
        raise ValueError("teacher_ids must hold at least one id of each row, got shape " + str(list(ids_NM.shape)))
    if checks.may_read(ids_NM) and ids_NM.numel():
        ordered_NM = ids_NM.sort(-1).values
        if bool((ordered_NM[:, 1:] == ordered_NM[:, :-1]).any()):
            raise ValueError("teacher_ids must be distinct within a row")
        most = float(logp_NM.double().logsumexp(-1).max())
        if most > _SUM_SLACK:
            raise ValueError(
                f"teacher_logp must be log-probabilities, got a row whose probabilities add up to {math.exp(most):.6g}"
            )
    scores = score(hidden, weight, None, rows, options, want=(), take_dweight=take_dweight, ids=ids_NM)
    own_NM = scores.ids_logp
    assert own_NM is not None
    return _with_rest(logp_NM.detach().to(own_NM.dtype)), _with_rest(own_NM)


def _with_rest(logp_NM: Tensor) -> Tensor:
    """With the log of what is missing to 1 beside them, at least that of `_LEAST_REST`."""
    missing_N1 = -torch.expm1(logp_NM.logsumexp(-1, keepdim=True))
    return torch.cat((logp_NM, missing_N1.clamp(min=_LEAST_REST).log()), -1)


def _of_events(p: Tensor, q: Tensor, kind: str, beta: float) -> Tensor:
    """The divergence of few events from their log-probabilities, the teacher's and the student's."""
    if kind == "forward_kl":
        return (p.exp() * (p - q)).sum(-1)
    if kind == "reverse_kl":
        return (q.exp() * (q - p)).sum(-1)
    m = torch.logaddexp(math.log(beta) + p, math.log1p(-beta) + q)
    return (beta * p.exp() * (p - m) + (1.0 - beta) * q.exp() * (q - m)).sum(-1)


def _reduced(found_N: Tensor, coef_N: Tensor | None, reduction: str) -> Tensor:
    if coef_N is not None:
        checks.dtype("coef", coef_N, checks.FLOATS)
        checks.shape("coef", coef_N, found_N.shape)
        checks.same_device("coef", coef_N, "hidden", found_N)
        checks.finite("coef", coef_N)
        found_N = found_N * coef_N.detach().to(found_N.dtype)
    if reduction == "none":
        return found_N
    return found_N.sum() / max(1, len(found_N)) if reduction == "mean" else found_N.sum()


def _run(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pair: adapter.Pair,
    index_N: Tensor | None,
    options: HeadOptions,
    of_teacher: tuple[Any, ...],
    coef_N: Tensor | None,
    reduction: str,
    take_dweight: WeightGradient | None,
) -> Tensor:
    """`distillation_loss` from where values are looked at."""
    kind, beta, vocabulary, teacher_hidden, teacher_weight, teacher_bias, teacher_softcap = of_teacher
    with torch.no_grad(), torch.autocast(device_type(hidden), enabled=False):
        _check_rows(index_N, hidden)
        check_temperature(options.temperature)
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        for name, value in (("coef", coef_N), ("bias", bias), ("teacher_bias", teacher_bias)):
            if value is not None:
                checks.finite(name, value)
        temperature = options.temperature
        problem = DivergenceProblem(
            _side([(hidden, weight), pair], index_N, bias, options.softcap, dtype),
            _side([(teacher_hidden, teacher_weight)], index_N, teacher_bias, teacher_softcap, dtype),
            kind,
            beta,
            dtype,
            temperature.detach().to(dtype) if isinstance(temperature, Tensor) else float(temperature),
            tuple(options.suppress),
            vocabulary,
        )
        known_N = None
        if reduction != "none":
            known_N = torch.ones(problem.rows, dtype=dtype, device=hidden.device) if coef_N is None else coef_N.detach().to(dtype)
            known_N = known_N / max(1, problem.rows) if reduction == "mean" else known_N
    found: Tensor = _Distil.apply(
        hidden, weight, bias, *pair, problem, (teacher_hidden, teacher_weight, teacher_bias), index_N, known_N, take_dweight
    )
    return found if known_N is not None or coef_N is None else found * coef_N.detach().to(dtype)


_apart = _disable_dynamo(_run)


def _side(
    pairs: Sequence[tuple[Tensor | None, Tensor | None]],
    index_N: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    dtype: torch.dtype,
) -> Side:
    made = []
    for hidden, weight in pairs:
        if hidden is None or weight is None:
            continue
        rows_MK = flat(hidden.detach())
        rows_NK = rows_MK if index_N is None else rows_MK[index_N]
        product = divergence.product_dtype(weight, dtype) if rows_NK.dtype == weight.dtype else dtype
        made.append(Pair(rows_NK.to(product), weight.detach()))
    return Side(tuple(made), None if bias is None else bias.detach().to(dtype), None if softcap is None else float(softcap))


class _Distil(torch.autograd.Function):
    """Returns the weighted sum where coefficients are known, else the rows' divergences."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        low_hidden: Tensor | None,
        low_weight: Tensor | None,
        problem: DivergenceProblem,
        teacher: tuple[Tensor, Tensor, Tensor | None],
        index_N: Tensor | None,
        coef_N: Tensor | None,
        take_dweight: WeightGradient | None,
    ) -> Tensor:
        ctx.needs, ctx.inputs, ctx.take = ctx.needs_input_grad[:5], (hidden, weight, bias, low_hidden, low_weight), take_dweight
        ctx.known, ctx.shape, ctx.index_N = coef_N is not None, hidden.shape, index_N
        ctx.frozen = not (ctx.needs[1] or ctx.needs[2] or ctx.needs[4])
        ctx.dtypes = tuple(None if x is None else x.dtype for x in ctx.inputs)
        ctx.shapes = tuple(None if x is None else x.shape for x in ctx.inputs)
        ctx.inputs = None
        buffers = None
        if any(ctx.needs) and (ctx.known or ctx.frozen):
            buffers = _buffers(ctx, problem)
        with torch.autocast(problem.device.type, enabled=False):
            found = divergence.run(problem, buffers, coef_N)
        _check_finite(found, index_N)
        if buffers is not None:
            ctx.save_for_backward(*buffers.rows, *buffers.weights, buffers.bias)
        elif any(ctx.needs):
            ctx.problem, ctx.found = problem, found
            temperature = problem.temperature if isinstance(problem.temperature, Tensor) else None
            ctx.save_for_backward(hidden, weight, bias, low_hidden, low_weight, *teacher, index_N, temperature)
        return found.divergence if coef_N is None else torch.dot(coef_N, found.divergence)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        saved, pairs = ctx.saved_tensors, 2 if ctx.dtypes[3] is not None else 1
        if ctx.known or ctx.frozen:
            rows, weights, bias = saved[:pairs], saved[pairs : 2 * pairs], saved[-1]
            if not ctx.known:
                rows = [None if rows_NK is None else rows_NK * upstream[:, None] for rows_NK in rows]
            elif not (upstream.is_cpu and float(upstream) == 1.0):  # out of place: a second backward finds the same
                rows, weights = ([None if g is None else g * upstream for g in group] for group in (rows, weights))
                bias = None if bias is None else bias * upstream
        else:
            buffers = _buffers(ctx, ctx.problem)
            with torch.autocast(ctx.problem.device.type, enabled=False):
                divergence.gradient(ctx.problem, ctx.found, buffers, upstream)
            rows, weights, bias = buffers
        places = ((0, 1), (3, 4))
        gradients: list[Tensor | None] = [None] * 5
        for (of_rows, of_weight), rows_NK, weight_VK in zip(places, rows, weights):
            if rows_NK is not None:
                gradients[of_rows] = _scatter(rows_NK.to(ctx.dtypes[of_rows]), ctx.index_N, ctx.shapes[of_rows])
            gradients[of_weight] = weight_VK
        gradients[2] = None if bias is None else bias.to(ctx.dtypes[2])
        if ctx.take is not None and gradients[1] is not None:
            ctx.take(gradients[1])
            gradients[1] = None
        return *gradients, None, None, None, None, None


def _buffers(ctx: Any, problem: DivergenceProblem) -> Buffers:
    """Uninitialised memory for the gradients that autograd wants: the weight's in its dtype, or in fp32 to be taken."""
    hidden, weight, bias, low_hidden, low_weight = ctx.needs
    dtype, device = problem.dtype, problem.device
    rows, weights = [], []
    wanted = ((hidden, weight, 1), (low_hidden, low_weight, 4))
    for pair, (of_rows, of_weight, place) in zip(problem.student.pairs, wanted):
        rows.append(torch.empty(pair.rows_NK.shape, dtype=dtype, device=device) if of_rows else None)
        kind = dtype if ctx.take is not None and place == 1 else ctx.dtypes[place]
        weights.append(torch.empty(pair.weight_VK.shape, dtype=kind, device=device) if of_weight else None)
    return Buffers(tuple(rows), tuple(weights), torch.empty(ctx.shapes[2], dtype=dtype, device=device) if bias else None)


def _check_teacher(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    teacher_softcap: float | None,
    valid_vocab: int | None,
) -> None:
    """Raise TypeError or ValueError, naming the argument, for what is no teacher of this student."""
    checks.dtype("teacher_hidden", teacher_hidden, checks.FLOATS)
    checks.dtype("teacher_weight", teacher_weight, [teacher_hidden.dtype])
    for name, tensor in (("teacher_hidden", teacher_hidden), ("teacher_weight", teacher_weight), ("teacher_bias", teacher_bias)):
        if tensor is None:
            continue
        if type(tensor).__name__ == "DTensor":
            raise TypeError(f"{name} must be a plain tensor, got a DTensor: gather it first, with {name}.full_tensor()")
        checks.require_tensor(name, tensor)
        checks.same_device(name, tensor, "hidden", hidden)
    if teacher_hidden.dtype == torch.float64 != hidden.dtype:
        raise TypeError(f"teacher_hidden may be float64 only where hidden is, got {hidden.dtype} there")
    if teacher_hidden.dim() == 0 or teacher_hidden.shape[:-1] != hidden.shape[:-1]:
        leading = "".join(f"{size}, " for size in hidden.shape[:-1])
        raise ValueError(f"teacher_hidden must have shape [{leading}any], like hidden, got {list(teacher_hidden.shape)}")
    checks.shape("teacher_weight", teacher_weight, [None, teacher_hidden.shape[-1]])
    if not teacher_weight.numel():
        raise ValueError(f"teacher_weight must have at least one row and one column, got {list(teacher_weight.shape)}")
    if valid_vocab is None and len(teacher_weight) != len(weight):
        raise ValueError(
            f"teacher_weight must have weight's {len(weight)} rows, got {len(teacher_weight)}: "
            "where the two are padded differently, valid_vocab says how many ids they share"
        )
    if valid_vocab is not None and len(teacher_weight) < valid_vocab:
        raise ValueError(f"teacher_weight must have at least valid_vocab={valid_vocab} rows, got {len(teacher_weight)}")
    if teacher_bias is not None:
        checks.dtype("teacher_bias", teacher_bias, checks.FLOATS)
        checks.shape("teacher_bias", teacher_bias, [len(teacher_weight)])
    if teacher_softcap is not None:
        checks.number("teacher_softcap", teacher_softcap, above=0)


def _check_rows(index_N: Tensor | None, hidden: Tensor) -> None:
    if index_N is None:
        return
    checks.in_range("rows", index_N, 0, hidden.numel() // hidden.shape[-1])
    if checks.may_read(index_N) and index_N.numel() and bool((index_N.bincount() > 1).any()):
        raise ValueError(f"rows must be unique, got {int(index_N.bincount().argmax())} more than once")


def _check_finite(found: Statistics, index_N: Tensor | None) -> None:
    for whose, lse_N in (("hidden, weight, bias", found.student_lse), ("teacher_hidden, teacher_weight", found.teacher_lse)):
        if checks.may_read(lse_N) and (row := checks.first_not_finite(lse_N)) is not None:
            place = row if index_N is None else int(index_N[row])
            raise ValueError(f"{whose} must give finite logits, got logsumexp {float(lse_N[row])} at row {place} of hidden")
