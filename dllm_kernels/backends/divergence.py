"""Divergence of two heads over one vocabulary, slab by slab: what `distillation_loss` runs on every device.

The vocabulary is walked in slabs of some thousand ids: logits `[v, N]` of both heads by the vendor's product into one
buffer each, row statistics updated from them. A last walk turns the logits into the gradient operand and multiplies it.
In between the logits are kept where there is room, which costs no memory where the weight trains: they lie in its
gradient, whose slab is written when its logits have been read. Rows without room have their logits made again.

Products of 2 N H V operations: one for each head's logits, one for each gradient of hidden states and of weight; two
more on every further walk over rows that are not kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dllm_kernels.backends import contract
from dllm_kernels.backends.triton import products

KINDS = ("forward_kl", "reverse_kl", "jsd")
SLAB_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}  # of one buffer of logits
LEAST_SLAB, MOST_SLAB = 64, 16384
SMALL_BYTES = 8 << 20  # of logits of both heads
_FAR = 80.0  # nats: exp(-80) times anything finite is nothing, exp(80) does not overflow


class Pair(NamedTuple):
    """`rows_NK weight_VK^T`, a part of a head's raw logits. Rows in the statistics' dtype or in the weight's."""

    rows_NK: Tensor
    weight_VK: Tensor


@dataclass(frozen=True, eq=False)
class Side:
    """One of the two heads: the sum of its pairs, then bias (in the statistics' dtype) and softcap."""

    pairs: tuple[Pair, ...]
    bias_V: Tensor | None = None
    softcap: float | None = None

    def of_rows(self, span: slice) -> Side:
        return replace(self, pairs=tuple(Pair(rows_NK[span], weight_VK) for rows_NK, weight_VK in self.pairs))


@dataclass(frozen=True, eq=False)
class DivergenceProblem:
    """Two heads on the same N rows, and what their distributions have in common. Checked, without autograd."""

    student: Side
    teacher: Side
    kind: str
    beta: float
    dtype: torch.dtype  # of statistics
    temperature: float | Tensor  # a number or [N] in this dtype
    suppress: tuple[int, ...]
    vocabulary: int  # ids from here on have probability 0 in both

    @property
    def rows(self) -> int:
        return len(self.student.pairs[0].rows_NK)

    @property
    def device(self) -> torch.device:
        return self.student.pairs[0].rows_NK.device

    def of_rows(self, span: slice) -> DivergenceProblem:
        temperature = self.temperature[span] if isinstance(self.temperature, Tensor) else self.temperature
        return replace(self, student=self.student.of_rows(span), teacher=self.teacher.of_rows(span), temperature=temperature)


class Statistics(NamedTuple):
    """`[N]` in the statistics' dtype."""

    divergence: Tensor
    student_lse: Tensor
    teacher_lse: Tensor
    mean: Tensor  # the expectation that the gradients of reverse_kl and jsd subtract

    def of_rows(self, span: slice) -> Statistics:
        return Statistics(*(vector_N[span] for vector_N in self))


class Buffers(NamedTuple):
    """Where gradients are written, None where one is not wanted: of each pair's rows `[N, K]` and weight `[V, K]`, of the bias.

    Rows in the statistics' dtype, the others in any.
    """

    rows: tuple[Tensor | None, ...]
    weights: tuple[Tensor | None, ...]
    bias: Tensor | None = None

    @property
    def of_head(self) -> bool:
        return self.bias is not None or any(weight_VK is not None for weight_VK in self.weights)

    def of_rows(self, span: slice) -> Buffers:
        return self._replace(rows=tuple(None if rows_NK is None else rows_NK[span] for rows_NK in self.rows))


def run(problem: DivergenceProblem, buffers: Buffers | None = None, coef_N: Tensor | None = None) -> Statistics:
    """Divergences of all rows and, with `buffers`, the gradient of `sum coef * divergence` (of None: 1).

    Memory beside buffers and results: six slabs and, unless a weight's gradient holds it, up to the workspace budget.
    """
    p = problem
    walks_again = buffers is not None or p.kind == "jsd"
    if buffers is not None and buffers.of_head:  # all rows at once: a slab of the gradient is written once
        walker = _Walker(p, _room_beside(p, buffers))
        found = _statistics(walker)
        _gradient(walker, found, buffers, coef_N)
        return found
    budget = contract.WORKSPACE_BYTES.get(p.device.type, contract.GPU_WORKSPACE_BYTES)
    most = max(contract.ROW_BLOCK // 4, budget // (2 * p.dtype.itemsize * p.vocabulary))
    room = None
    if walks_again:
        room = torch.empty(p.vocabulary, 2 * min(most, max(p.rows, 1)), dtype=p.dtype, device=p.device)
    parts = []
    for start in range(0, max(p.rows, 1), most):
        span = slice(start, start + most)
        walker = _Walker(p.of_rows(span), room)
        parts.append(_statistics(walker))
        if buffers is not None:
            _gradient(walker, parts[-1], buffers.of_rows(span), None if coef_N is None else coef_N[span])
    return Statistics(*(torch.cat(vectors) for vectors in zip(*parts))) if len(parts) > 1 else parts[0]


def _room_beside(problem: DivergenceProblem, buffers: Buffers) -> Tensor | None:
    """Where logits wait for the last walk: in a weight's gradient, unless that is too narrow for what is small anyway."""
    p = problem
    roomy = next((weight_VK for weight_VK in buffers.weights if weight_VK is not None), None)
    needed = 2 * p.dtype.itemsize * p.rows  # bytes of an id
    if needed * p.vocabulary <= SMALL_BYTES and (roomy is None or roomy.shape[1] * roomy.itemsize < needed):
        return torch.empty(p.vocabulary, 2 * p.rows, dtype=p.dtype, device=p.device)
    return roomy


def gradient(problem: DivergenceProblem, found: Statistics, buffers: Buffers, coef_N: Tensor) -> None:
    """What `run` writes to buffers, from the statistics that it returned: the logits are made again."""
    _gradient(_Walker(problem), found, buffers, coef_N)


# --- logits -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Slab:
    """A part of the vocabulary with its logits, which must be left as they are, and three buffers of their size."""

    span: slice
    dead: Tensor | None  # suppressed ids, counted from the first of the slab
    student_VN: Tensor
    teacher_VN: Tensor
    work: tuple[Tensor, Tensor, Tensor]


class _Walker:
    """Makes the logits of a problem slab by slab. Those of the first rows stay in `room_VK`, as many as it has place for."""

    def __init__(self, problem: DivergenceProblem, room_VK: Tensor | None = None) -> None:
        p = self.problem = problem
        elements = SLAB_ELEMENTS["cpu" if p.device.type == "cpu" else "cuda"]
        size = max(LEAST_SLAB, min(MOST_SLAB, elements // max(1, p.rows) // 64 * 64))
        self.size = min(size, p.vocabulary)
        self.room = None if room_VK is None else room_VK.view(torch.uint8)
        per_row = 2 * p.dtype.itemsize
        self.kept = 0 if self.room is None else min(p.rows, self.room.shape[1] // per_row)
        self._again = False
        self._buffers = [torch.empty(self.size, p.rows, dtype=p.dtype, device=p.device) for _ in range(5)]
        widest = max(weight_VK.shape[1] for side in (p.student, p.teacher) for _, weight_VK in side.pairs)
        self._wide = torch.empty(self.size * widest, dtype=p.dtype, device=p.device)

    def operand(self, pair: Pair, span: slice) -> Tensor:
        """A slab of a weight in the dtype of its rows, good until the next call."""
        slab_VK = pair.weight_VK[span]
        if slab_VK.dtype == pair.rows_NK.dtype:
            return slab_VK
        return self._wide[: slab_VK.numel()].view(slab_VK.shape).copy_(slab_VK)

    def walk(self) -> Iterator[_Slab]:
        p, again, kept = self.problem, self._again, self.kept
        self._again = True
        for first in range(0, p.vocabulary, self.size):
            span = slice(first, min(first + self.size, p.vocabulary))
            student_VN, teacher_VN, *work = (buffer[: span.stop - first] for buffer in self._buffers)
            ids = [token - first for token in p.suppress if first <= token < span.stop]
            dead = torch.tensor(ids, device=p.device) if ids else None
            held = self._held(span)
            if again and kept == p.rows and held is not None:
                student_VN, teacher_VN = held
            else:
                missing = slice(kept if again else 0, None)
                for which, (side, out_VN) in enumerate(((p.student, student_VN), (p.teacher, teacher_VN))):
                    self._logits_(side, span, missing, out_VN[:, missing], dead)
                    if held is not None and again:
                        out_VN[:, :kept] = held[which]
                    elif held is not None:
                        held[which].copy_(out_VN[:, :kept])
            yield _Slab(span, dead, student_VN, teacher_VN, (work[0], work[1], work[2]))

    def _held(self, span: slice) -> Tensor | None:
        """`[2, v, kept]`: the memory of a slab's ids, for the logits of student and teacher."""
        if self.room is None or not self.kept:
            return None
        dtype, size = self.problem.dtype, (2, span.stop - span.start, self.kept)
        flat = self.room[span].view(-1)[: size[0] * size[1] * size[2] * dtype.itemsize]
        return flat.view(dtype).view(size)

    def _logits_(self, side: Side, span: slice, rows: slice, out_VN: Tensor, dead: Tensor | None) -> None:
        """The final logits of some rows."""
        temperature = self.problem.temperature
        for number, pair in enumerate(side.pairs):
            _multiply_(out_VN, self.operand(pair, span), pair.rows_NK[rows].t(), add=number > 0)
        if side.bias_V is not None:
            out_VN += side.bias_V[span, None]
        if side.softcap is not None:
            out_VN.div_(side.softcap).tanh_().mul_(side.softcap)
        if isinstance(temperature, Tensor):
            out_VN /= temperature[rows]
        elif temperature != 1.0:
            out_VN /= temperature
        if dead is not None:  # after softcap, which would map -inf to a finite value
            out_VN.index_fill_(0, dead, float("-inf"))


def _multiply_(out: Tensor, left: Tensor, right: Tensor, *, add: bool) -> None:
    """`out (+)= left @ right` with fp32 results for 16-bit operands, which come only where the vendor has that product."""
    more: dict[str, Any] = {} if left.dtype == out.dtype else {"out_dtype": out.dtype}
    if add:
        torch.addmm(out, left, right, out=out, **more)
    else:
        torch.mm(left, right, out=out, **more)


def product_dtype(weight: Tensor, statistics: torch.dtype) -> torch.dtype:
    """In which dtype rows meet this weight: its own where the vendor multiplies it into the statistics' dtype."""
    return weight.dtype if products._mixed(weight.device, weight.dtype) else statistics


# --- row statistics -----------------------------------------------------------------------------------------------------


class _Sum:
    """`sum_v e^(z_v)` of each row and, on request, of `e^(z_v) x_v`, below a running maximum; sums of slabs in float64."""

    def __init__(self, problem: DivergenceProblem) -> None:
        N, device = problem.rows, problem.device
        self.max_N = torch.full((N,), torch.finfo(problem.dtype).min, dtype=problem.dtype, device=device)
        self.sum_N = torch.zeros(N, dtype=torch.float64, device=device)
        self.weighted_N = torch.zeros_like(self.sum_N)

    def see(self, z_VN: Tensor, work_VN: Tensor, x_VN: Tensor | None = None) -> None:
        max_N = torch.maximum(self.max_N, z_VN.amax(0))
        scale_N = (self.max_N - max_N).double().exp()
        self.max_N = max_N
        torch.sub(z_VN, max_N, out=work_VN).exp_()
        self.sum_N = self.sum_N * scale_N + work_VN.sum(0)
        if x_VN is not None:
            self.weighted_N = self.weighted_N * scale_N + work_VN.mul_(x_VN).sum(0)

    @property
    def lse_N(self) -> Tensor:
        return self.max_N + self.sum_N.log()


def _statistics(walker: _Walker) -> Statistics:
    p = walker.problem
    student, teacher = _Sum(p), _Sum(p)
    for slab in walker.walk():
        s_VN, t_VN = slab.student_VN, slab.teacher_VN
        work_VN, x_VN, _ = slab.work
        if p.kind == "forward_kl":
            student.see(s_VN, work_VN)
            teacher.see(t_VN, work_VN, _alive(slab, torch.sub(t_VN, s_VN, out=x_VN)))
        elif p.kind == "reverse_kl":
            student.see(s_VN, work_VN, _alive(slab, torch.sub(s_VN, t_VN, out=x_VN)))
            teacher.see(t_VN, work_VN)
        else:
            student.see(s_VN, work_VN)
            teacher.see(t_VN, work_VN)
    s_lse_N, t_lse_N = student.lse_N, teacher.lse_N
    if p.kind == "jsd":
        divergence_N, mean_N = _mixture(walker, s_lse_N.to(p.dtype), t_lse_N.to(p.dtype))
    elif p.kind == "forward_kl":
        mean_N = teacher.weighted_N / teacher.sum_N
        divergence_N = mean_N - t_lse_N + s_lse_N
    else:
        mean_N = student.weighted_N / student.sum_N
        divergence_N = mean_N - s_lse_N + t_lse_N
    return Statistics(*(vector_N.to(p.dtype) for vector_N in (divergence_N, s_lse_N, t_lse_N, mean_N)))


def _alive(slab: _Slab, difference_VN: Tensor) -> Tensor:
    """0 for suppressed ids, where infinities were subtracted."""
    return difference_VN if slab.dead is None else difference_VN.index_fill_(0, slab.dead, 0.0)


def _mixture(walker: _Walker, s_lse_N: Tensor, t_lse_N: Tensor) -> tuple[Tensor, Tensor]:
    """`b KL(P || M) + (1 - b) KL(Q || M)`, and the mean of `log q - log m` under Q; float64."""
    beta = walker.problem.beta
    of_teacher_N = torch.zeros(len(s_lse_N), dtype=torch.float64, device=s_lse_N.device)
    of_student_N = torch.zeros_like(of_teacher_N)
    for slab in walker.walk():
        ratio_VN, excess_VN = _to_mixture(slab, beta, s_lse_N, t_lse_N)
        ratio_VN += excess_VN  # log p - log m
        p_VN = torch.sub(slab.teacher_VN, t_lse_N, out=slab.work[2]).exp_()
        of_teacher_N += p_VN.mul_(ratio_VN).sum(0)
        q_VN = torch.sub(slab.student_VN, s_lse_N, out=slab.work[2]).exp_()
        of_student_N += q_VN.mul_(excess_VN).sum(0)
    return beta * of_teacher_N + (1.0 - beta) * of_student_N, of_student_N


def _to_mixture(slab: _Slab, beta: float, s_lse_N: Tensor, t_lse_N: Tensor) -> tuple[Tensor, Tensor]:
    """`log p - log q` and `log q - log m`, m = b p + (1 - b) q, where either matters: far ratios are bounded."""
    ratio_VN = _alive(slab, torch.sub(slab.teacher_VN, slab.student_VN, out=slab.work[0]))
    ratio_VN.add_(s_lse_N - t_lse_N).clamp_(-_FAR, _FAR)
    return ratio_VN, torch.expm1(ratio_VN, out=slab.work[1]).mul_(beta).log1p_().neg_()


# --- gradients ----------------------------------------------------------------------------------------------------------


def _gradient(walker: _Walker, found: Statistics, buffers: Buffers, coef_N: Tensor | None) -> None:
    """Write the gradient of `sum coef * divergence`."""
    p, pairs = walker.problem, walker.problem.student.pairs
    _clear(buffers, p.vocabulary)
    factor_N = torch.ones(p.rows, dtype=p.dtype, device=p.device) if coef_N is None else coef_N.to(p.dtype)
    factor_N = factor_N / p.temperature
    for slab in walker.walk():
        operand_VN = _operand(p, slab, found)
        operand_VN *= factor_N
        if p.student.softcap is not None:
            tanh_VN = torch.mul(slab.student_VN, p.temperature, out=slab.work[1]).div_(p.student.softcap)
            operand_VN *= tanh_VN.square_().neg_().add_(1.0)
            if slab.dead is not None:
                operand_VN.index_fill_(0, slab.dead, 0.0)
        if buffers.bias is not None:
            buffers.bias[slab.span] = operand_VN.sum(1)
        for pair, rows_NK, weight_VK in zip(pairs, buffers.rows, buffers.weights):
            factor_VN = operand_VN.to(pair.rows_NK.dtype)
            if rows_NK is not None:
                _multiply_(rows_NK, factor_VN.t(), walker.operand(pair, slab.span), add=True)
            if weight_VK is not None and weight_VK.dtype == p.dtype:
                _multiply_(weight_VK[slab.span], factor_VN, pair.rows_NK, add=False)
            elif weight_VK is not None:
                wide_VK = walker._wide[: (slab.span.stop - slab.span.start) * weight_VK.shape[1]].view(-1, weight_VK.shape[1])
                _multiply_(wide_VK, factor_VN, pair.rows_NK, add=False)
                weight_VK[slab.span] = wide_VK


def _clear(buffers: Buffers, vocabulary: int) -> None:
    """Rows start at 0, and so does what the walk leaves out; a weight's slabs may hold logits and are written whole."""
    for rows_NK in buffers.rows:
        if rows_NK is not None:
            rows_NK.zero_()
    for of_ids in (*buffers.weights, buffers.bias):
        if of_ids is not None:
            of_ids[vocabulary:] = 0.0


def _operand(problem: DivergenceProblem, slab: _Slab, found: Statistics) -> Tensor:
    """d divergence / d final logit of the student, in the first work buffer."""
    p, s_VN, t_VN = problem, slab.student_VN, slab.teacher_VN
    if p.kind == "forward_kl":  # q - p
        p_VN = torch.sub(t_VN, found.teacher_lse, out=slab.work[1]).exp_()
        return torch.sub(s_VN, found.student_lse, out=slab.work[0]).exp_().sub_(p_VN)
    if p.kind == "reverse_kl":  # q (log q - log p - KL)
        inner_VN = _alive(slab, torch.sub(s_VN, t_VN, out=slab.work[0]))
    else:  # (1 - b) q (log q - log m - its mean under q)
        excess_VN = _to_mixture(slab, p.beta, found.student_lse, found.teacher_lse)[1]
        inner_VN = slab.work[0].copy_(excess_VN)
    inner_VN -= found.mean
    if p.kind == "jsd":
        inner_VN *= 1.0 - p.beta
    return inner_VN.mul_(torch.sub(s_VN, found.student_lse, out=slab.work[1]).exp_())
