"""The passes over two slabs of logits in plain PyTorch, float64 too: the specification of the other implementations.

Each has these four functions. Sums are those of all slabs so far, in parts `[P, sums, N]` in float64 that `joined` adds up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_kernels.backends.contract import HeadOptions
from dllm_kernels.backends.divergence.problem import FAR, Slab, Statistics


def finish_(z_VN: Tensor, options: HeadOptions, span: slice, vocabulary: int) -> None:
    """Raw logits of the ids in `span` to final ones, in place; `z_VN` is dense by rows."""
    if options.bias is not None:
        z_VN += options.bias[span, None]
    if options.softcap is not None:
        z_VN.div_(options.softcap).tanh_().mul_(options.softcap)
    if isinstance(options.temperature, Tensor) or options.temperature != 1.0:
        z_VN /= options.temperature
    excluded_V = options.excluded(vocabulary, z_VN.device)
    if excluded_V is not None:  # after softcap, which would map -inf to a finite value
        z_VN.masked_fill_(excluded_V[span, None], float("-inf"))


def look(slab: Slab, before: Tensor | None = None) -> Tensor:
    """Five sums, those `before` included: max and `sum e^(z - max)` of the student, the same of the teacher, and below the same
    maximum, of forward_kl `sum e^t (t - s)`, of reverse_kl `sum e^s (s - t)`, of jsd 0."""
    (s_max_N, s_VN), (t_max_N, t_VN) = _exponentials(slab.student_VN), _exponentials(slab.teacher_VN)
    weighted_N = torch.zeros_like(s_max_N)
    if slab.problem.kind == "forward_kl":
        weighted_N = _times(t_VN, slab.teacher_VN - slab.student_VN).sum(0, dtype=torch.float64)
    elif slab.problem.kind == "reverse_kl":
        weighted_N = _times(s_VN, slab.student_VN - slab.teacher_VN).sum(0, dtype=torch.float64)
    s_sum_N, t_sum_N = (x.sum(0, dtype=torch.float64) for x in (s_VN, t_VN))
    sums_15N = torch.stack([x.double() for x in (s_max_N, s_sum_N, t_max_N, t_sum_N, weighted_N)])[None]
    return sums_15N if before is None else joined(torch.cat((before, sums_15N)), slab.problem.kind)[None]


def joined(parts_P5N: Tensor, kind: str) -> Tensor:
    """The five sums of `look` below one maximum of each row."""
    max_P2N, sum_P2N = parts_P5N[:, (0, 2)], parts_P5N[:, (1, 3)]
    max_2N = max_P2N.amax(0)
    scale_P2N = (max_P2N - torch.where(max_2N == float("-inf"), 0.0, max_2N)).exp()
    sum_2N = (sum_P2N * scale_P2N).sum(0)
    weighted_N = (parts_P5N[:, 4] * scale_P2N[:, int(kind == "forward_kl")]).sum(0)
    return torch.stack((max_2N[0], sum_2N[0], max_2N[1], sum_2N[1], weighted_N))


def mix(slab: Slab, student_lse_N: Tensor, teacher_lse_N: Tensor, before: Tensor | None = None) -> Tensor:
    """Two sums of jsd, those `before` included: `sum p (log p - log m)` and `sum q (log q - log m)`."""
    ratio_VN, excess_VN = _to_mixture(slab, student_lse_N, teacher_lse_N)
    of_teacher_VN = _times((slab.teacher_VN - teacher_lse_N).exp(), ratio_VN + excess_VN)
    of_student_VN = _times((slab.student_VN - student_lse_N).exp(), excess_VN)
    sums_12N = torch.stack([x.sum(0, dtype=torch.float64) for x in (of_teacher_VN, of_student_VN)])[None]
    return sums_12N if before is None else before + sums_12N


def operand(slab: Slab, found: Statistics, factor_N: Tensor, squeeze_N: Tensor | None, out_VN: Tensor) -> None:
    """`out = factor * d divergence / d student's final logit`, times `1 - (squeeze s)^2` where the student has a softcap."""
    p, s_VN, t_VN = slab.problem, slab.student_VN, slab.teacher_VN
    q_VN = (s_VN - found.student_lse).exp()
    if p.kind == "forward_kl":
        whole_VN = q_VN - (t_VN - found.teacher_lse).exp()
    elif p.kind == "reverse_kl":
        whole_VN = _times(q_VN, s_VN - t_VN - found.mean)
    else:
        excess_VN = _to_mixture(slab, found.student_lse, found.teacher_lse)[1]
        whole_VN = _times(q_VN, excess_VN - found.mean).mul_(1.0 - p.beta)
    whole_VN *= factor_N
    if squeeze_N is not None:
        whole_VN = _times(whole_VN, 1.0 - (s_VN * squeeze_N).square_())
    out_VN.copy_(whole_VN)


def _exponentials(z_VN: Tensor) -> tuple[Tensor, Tensor]:
    """The maximum, and exp of what is above it; 0 for what is -inf."""
    max_N = z_VN.amax(0)
    return max_N, (z_VN - torch.where(max_N == float("-inf"), 0.0, max_N)).exp_()


def _times(weight_VN: Tensor, x_VN: Tensor) -> Tensor:
    """0 where the weight is, whatever x: of an id without probability infinities were subtracted."""
    return torch.where(weight_VN == 0, 0.0, weight_VN * x_VN)


def _to_mixture(slab: Slab, s_lse_N: Tensor, t_lse_N: Tensor) -> tuple[Tensor, Tensor]:
    """`log p - log q`, far ratios bounded, and `log q - log m` where m = b p + (1 - b) q."""
    ratio_VN = (slab.teacher_VN - slab.student_VN).add_(s_lse_N - t_lse_N).clamp_(-FAR, FAR)
    beta = slab.problem.beta
    y_VN = torch.expm1(ratio_VN).mul_(beta)  # m / q - 1
    whole_VN = ratio_VN.exp().mul_(beta).add_(1.0 - beta)  # keeps its digits where beta is near 1 and p far below q
    return ratio_VN, torch.where(y_VN.abs() < 0.3, torch.log1p(y_VN), whole_VN.log()).neg_()
