"""Divergence of a student's head from a teacher's over the whole vocabulary, from hidden states, without logits.

Who knows the coefficients of the rows, and when, decides the order of work, see `distil`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dllm_kernels import checks
from dllm_kernels.backends.contract import HeadOptions, WeightGradient
from dllm_kernels.backends.divergence.problem import KINDS
from dllm_kernels.head import distil, distil_ops, ops
from dllm_kernels.head import low_rank as adapter
from dllm_kernels.head.distil import Teacher
from dllm_kernels.head.distil_autograd import Distil
from dllm_kernels.head.options import autocast_operands, check_arguments, coefficient, make_problem
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
    until then: PyTorch raises. Sums over slabs are in float64. torch.compile and FlopCounterMode see one custom op with one
    more for its backward (`dllm_kernels.head.distil_ops`). Double backward is not supported. Raises ValueError or TypeError
    naming the argument; a row of either model whose logits are not finite is reported on the CPU always, on a GPU under
    DLLM_KERNELS_VALIDATE=1.

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
    checks.require_tensor("teacher_hidden", teacher_hidden)
    teacher_hidden, teacher_weight = autocast_operands(teacher_hidden, teacher_weight)
    teacher = Teacher(teacher_hidden.detach(), teacher_weight.detach(), teacher_bias, teacher_softcap, kind, beta)
    distil.check_teacher(hidden, weight, teacher, valid_vocab)
    coef = coefficient("coef", coef, (count,), hidden)
    if options.low_rank is not None:
        ops.observed(hidden)  # a counter at work learns the formula of the adapter's product before it runs
    pair = adapter.pair(hidden, options)
    of_head = weight, bias, pair[1]
    wants = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, pair[0], *of_head))
    plan = distil.choose(wants, any(x is not None and x.requires_grad for x in of_head), reduction != "none")
    factor_N = hidden.new_ones(count, dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32)
    if coef is not None:
        factor_N = coef.to(factor_N.dtype)
    if reduction == "mean":
        factor_N = factor_N / max(1, count)
    if ops.observed(hidden, weight, bias, pair[1], teacher.hidden, teacher.weight):
        found = distil_ops.run(hidden, weight, factor_N, rows, options, pair, teacher, plan)
    else:
        problem = make_problem(hidden, weight, factor_N, rows, options, pair)
        if plan == "forward":
            found = distil.forward(problem, teacher, plan)[:2]
        else:
            found = Distil.apply(hidden, weight, bias, *pair, problem, teacher, plan, take_dweight)
    weighted_sum, divergence_N = found
    if reduction != "none":
        return weighted_sum
    return divergence_N if coef is None else divergence_N * factor_N


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
    if not ids_NM.shape[1]:
        raise ValueError("teacher_ids must hold at least one id of each row, got shape " + str(list(ids_NM.shape)))
    logp_NM = (_given_op if torch.compiler.is_compiling() else _given)(logp_NM.detach(), ids_NM)
    scores = score(hidden, weight, None, rows, options, want=(), take_dweight=take_dweight, ids=ids_NM)
    own_NM = scores.ids_logp
    assert own_NM is not None
    return _with_rest(logp_NM.to(own_NM.dtype)), _with_rest(own_NM)


def _given(logp_NM: Tensor, ids_NM: Tensor) -> Tensor:
    """The log-probabilities themselves, or ValueError unless they are some of distinct ids. Reads values."""
    checks.finite("teacher_logp", logp_NM)
    if checks.may_read(ids_NM) and ids_NM.numel():
        ordered_NM = ids_NM.sort(-1).values
        if bool((ordered_NM[:, 1:] == ordered_NM[:, :-1]).any()):
            raise ValueError("teacher_ids must be distinct within a row")
        most = float(logp_NM.double().logsumexp(-1).max())
        if most > _SUM_SLACK:
            raise ValueError(
                f"teacher_logp must be log-probabilities, got a row whose probabilities add up to {math.exp(most):.6g}"
            )
    return logp_NM


@torch.library.custom_op("dllm_kernels::given", mutates_args=(), schema="(Tensor logp, Tensor ids) -> Tensor")
def _given_op(logp_NM: Tensor, ids_NM: Tensor) -> Tensor:
    return _given(logp_NM, ids_NM).clone()


@_given_op.register_fake
def _(logp_NM: Tensor, ids_NM: Tensor) -> Tensor:
    return torch.empty_like(logp_NM)


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
    coef_N = coefficient("coef", coef_N, found_N.shape, found_N)
    if coef_N is not None:
        found_N = found_N * checks.between("coef", coef_N).to(found_N.dtype)
    if reduction == "none":
        return found_N
    return found_N.sum() / max(1, len(found_N)) if reduction == "mean" else found_N.sum()
