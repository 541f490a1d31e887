"""The LM head in plain PyTorch: the specification of every backend, its oracle, and the benchmark's baseline.

`run` walks the selected rows in chunks of a fixed row block, so that the bits of a row do not depend on how many rows there
are, nor on its place among them where the vendor's product sums all rows alike (on several threads it may not).
`row_kernel_` turns one chunk of logits into statistics and, in place, into the gradient operand. Other backends offer
`check`, `run`, `from_operands`, `sample` and `workspace_bytes` with these signatures.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor

from dllm_kernels.backends.contract import (
    BEST,
    LOW,
    ROW_BLOCK,
    STATISTICS,
    VECTORS,
    HeadOptions,
    HeadProblem,
    Low,
    allocate,
    check,
    chunk_rows,
    rounded_once,
    zero,
)
from dllm_kernels.backends.targets import best_of, target_gradient
from dllm_kernels.noise import gumbel

__all__ = ["NAME", "check", "from_operands", "restrict_", "row_kernel_", "run", "sample", "workspace_bytes"]

NAME = "reference"
NO_OPTIONS = HeadOptions()
SLAB_BYTES = 16 << 20  # of a 16-bit weight, upcast at a time


def workspace_bytes(
    rows: int,
    hidden_size: int,
    vocabulary: int,
    dtype: torch.dtype,
    *,
    gradient: bool,
    dhidden: bool,
    second: bool,
    dweight: bool,
    several: int | None,
    best: int,
    low: Low,
) -> int:
    """Memory that `run` takes beside its results: one chunk of logits with the row kernel's temporaries, one weight slab."""
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    chunk = chunk_rows(rows, vocabulary, statistics, torch.device("cpu")) if rows else 0
    copies = (5 if gradient else 3) + (2 if best else 0)  # logits, their exponentials, products; d entropy and the scaled operand
    slab = 0 if dtype == statistics else min(SLAB_BYTES, vocabulary * hidden_size * statistics.itemsize)
    widened = vocabulary * low.rank if low.dtype != statistics else 0
    return (chunk * (copies * vocabulary + hidden_size + 2 * low.rank) + widened) * statistics.itemsize + slab


def _transform_(z_NV: Tensor, options: HeadOptions) -> Tensor | None:
    """Raw logits to final ones in place; returns d tanh of the softcap, None without one."""
    slope_NV = None
    if options.bias is not None:
        z_NV += options.bias.to(z_NV.dtype)
    if options.softcap is not None:
        tanh_NV = torch.tanh(z_NV / options.softcap)
        slope_NV = 1.0 - tanh_NV * tanh_NV
        torch.mul(tanh_NV, options.softcap, out=z_NV)
    z_NV /= _by_row(options.temperature)
    excluded_V = options.excluded(z_NV.shape[1], z_NV.device)
    if excluded_V is not None:  # after softcap, which would map -inf to a finite value
        z_NV.masked_fill_(excluded_V, float("-inf"))
    return slope_NV


def _by_row(temperature: float | Tensor) -> float | Tensor:
    return temperature[:, None] if isinstance(temperature, Tensor) else temperature


def row_kernel_(
    logits_NV: Tensor,
    target_N: Tensor,
    options: HeadOptions = NO_OPTIONS,
    *,
    entropy: bool = False,
    top: bool = False,
    gradient: bool = False,
    coef_N: Tensor | None = None,
    entropy_coef_N: Tensor | None = None,
    entropy_operand_NV: Tensor | None = None,
    best: int = 0,
    own_NM: Tensor | None = None,
) -> dict[str, Tensor]:
    """Statistics of one chunk of raw logits `h W^T` (float32 or float64), whose storage is used up.

    Returns `[N]` vectors `logp`, `lse`, and on request `entropy`, `top_logp`, `top_id` (ties go to the smallest id).
    With `gradient`, `logits_NV` is overwritten by `coef * d logp / d raw + entropy_coef * d entropy / d raw`
    (`coef_N=None` means 1, `entropy_coef_N=None` means 0), and `entropy_operand_NV`, where given, by `d entropy / d raw`.
    With `best` also `best_logp`, `best_id` `[N, best]`.

    `target_N` may be `[N, M]`, and so is `logp` then. `coef_N` is D of `targets.py` and `own_NM` the targets' own coefficients;
    without these, for late ones, the slopes `d final / d raw` stand in the targets' places, and 0 in `entropy_operand_NV`.
    Every `[.., V]` tensor has unit stride in V.
    """
    z_NV = logits_NV
    slope_NV = _transform_(z_NV, options)
    found = best_of(z_NV, best) if best else None
    max_N = z_NV.amax(-1)
    z_NV -= max_N[:, None]  # both terms of logp are shifted, so a common offset costs no digits
    several = target_N.dim() == 2
    target_NM = target_N if several else target_N[:, None]
    shifted_target_NM = z_NV.gather(1, target_NM)
    top_id_N = z_NV.argmax(-1) if top or several else target_NM[:, 0]  # torch: the first of equal maxima
    p_NV = torch.exp(z_NV)
    sum_N = p_NV.sum(-1)  # >= 1: the maximum contributes exp(0)
    log_sum_N = torch.log(sum_N)
    if several:  # the largest logit may be among several targets, whose 1 - p comes from their logp
        log_sum_N = torch.log1p(p_NV.scatter(1, top_id_N[:, None], 0.0).sum(-1))
    logp_NM = shifted_target_NM - log_sum_N[:, None]
    stats = {"logp": logp_NM if several else logp_NM[:, 0], "lse": max_N + log_sum_N}
    if found is not None:
        stats |= {"best_logp": (found[0] - max_N[:, None]) - log_sum_N[:, None], "best_id": found[1]}
    if top:
        stats["top_logp"] = -log_sum_N
        stats["top_id"] = top_id_N
    need_entropy_operand = entropy_coef_N is not None or entropy_operand_NV is not None
    if entropy or need_entropy_operand:
        z_NV.masked_fill_(z_NV == float("-inf"), 0.0)  # an excluded lane adds exactly 0, not 0 * -inf
        entropy_N = log_sum_N - (p_NV * z_NV).sum(-1) / sum_N
        stats["entropy"] = entropy_N
    if not gradient:
        return stats

    entropy_NV = None
    if need_entropy_operand:
        entropy_NV = -(p_NV / sum_N[:, None]) * (z_NV + (entropy_N - log_sum_N)[:, None])
    # d logp: the true class as the sum of the others' probabilities; p - 1 would cancel where p -> 1
    p_NV.scatter_(1, target_NM, 0.0)
    torch.div(p_NV, -sum_N[:, None], out=z_NV)
    if not several:
        z_NV.scatter_(1, target_NM, (p_NV.sum(-1) / sum_N)[:, None])
    elif entropy_NV is not None:
        entropy_NV.scatter_(1, target_NM, 0.0)
    scale = _by_row(options.temperature)
    factor_NV = 1.0 / scale if slope_NV is None else slope_NV / scale
    z_NV *= factor_NV
    if coef_N is not None:
        z_NV *= coef_N[:, None]
    if entropy_NV is not None:
        entropy_NV *= factor_NV
        if entropy_operand_NV is not None:
            entropy_operand_NV.copy_(entropy_NV)
        if entropy_coef_N is not None:
            z_NV += entropy_NV * entropy_coef_N[:, None]
    if several:
        slope_NM = torch.ones_like(logp_NM) / scale
        if slope_NV is not None:
            slope_NM = (slope_NV / scale).gather(1, target_NM)
        if own_NM is not None and coef_N is not None:
            slope_NM = slope_NM * target_gradient(logp_NM, own_NM, coef_N, stats.get("entropy"), entropy_coef_N)
        z_NV.scatter_(1, target_NM, slope_NM)
    return stats


def _slabs(weight_VH: Tensor, dtype: torch.dtype) -> list[tuple[slice, Tensor]]:
    """The weight in `dtype`: itself, or vocabulary slabs to be upcast one at a time."""
    vocabulary, hidden_size = weight_VH.shape
    if weight_VH.dtype == dtype:
        return [(slice(0, vocabulary), weight_VH)]
    rows = max(1, SLAB_BYTES // (hidden_size * dtype.itemsize))
    return [(slice(v, min(v + rows, vocabulary)), weight_VH[v : v + rows]) for v in range(0, vocabulary, rows)]


def _matmul_nt_(out_NV: Tensor, hidden_NH: Tensor, weight_VH: Tensor, *, add: bool = False) -> None:
    """out = hidden @ weight^T in blocks of ROW_BLOCK rows; fp32 accumulators and results for 16-bit operands too."""
    for span, slab_VH in _slabs(weight_VH, out_NV.dtype):
        slab_HV = slab_VH.to(out_NV.dtype).t()
        for n in range(0, len(hidden_NH), ROW_BLOCK):
            hidden, out = hidden_NH[n : n + ROW_BLOCK], out_NV[n : n + ROW_BLOCK, span]
            if add:
                out.addmm_(hidden, slab_HV)
            else:
                torch.mm(hidden, slab_HV, out=out)


class Adapter:
    """The second pair of operands of a problem, beside chunks of rows: does nothing where there is none."""

    def __init__(self, problem: HeadProblem, chunk: int) -> None:
        p = problem
        self.pair, self.index_N = p.low_rank, p.index_N
        if self.pair is not None:
            hidden_MR, weight_VR = self.pair
            self.weight_VR = weight_VR.to(p.statistics_dtype)
            self.hidden_CR = torch.zeros(chunk, hidden_MR.shape[1], dtype=p.statistics_dtype, device=hidden_MR.device)

    def add_logits_(self, logits_CV: Tensor, span: slice) -> None:
        """To the logits of `span`'s rows, padding included, whose adapter operands are kept for `add_gradient`."""
        if self.pair is not None:
            self.load(span)
            _matmul_nt_(logits_CV, self.hidden_CR[: len(logits_CV)], self.weight_VR, add=True)

    def vectors(self, operand_CV: Tensor) -> Tensor:
        """Gradient vectors of the adapter's operand."""
        return _matmul_nn(operand_CV, self.weight_VR)

    def add_gradient(self, operand_NV: Tensor, dlow_VR: Tensor | None, *, overwrite: bool) -> None:
        """The share of the rows of the last `add_logits_` or `load` in the gradient of B."""
        if self.pair is not None and dlow_VR is not None:
            _add_head_gradient(operand_NV, self.hidden_CR[: len(operand_NV)], dlow_VR, None, overwrite=overwrite)

    def load(self, span: slice) -> None:
        """Take the operands of `span`'s rows where no logits are made."""
        if self.pair is not None:
            hidden_MR = self.pair.hidden_MR
            rows_NR = hidden_MR[span] if self.index_N is None else hidden_MR[self.index_N[span]]
            self.hidden_CR[: len(rows_NR)] = rows_NR


def _matmul_nn(operand_NV: Tensor, weight_VH: Tensor) -> Tensor:
    """operand @ weight in the operand's dtype, block by block like the logits."""
    out_NH = operand_NV.new_zeros(len(operand_NV), weight_VH.shape[1])
    for span, slab_VH in _slabs(weight_VH, operand_NV.dtype):
        slab_VH = slab_VH.to(operand_NV.dtype)
        for n in range(0, len(operand_NV), ROW_BLOCK):
            out_NH[n : n + ROW_BLOCK].addmm_(operand_NV[n : n + ROW_BLOCK, span], slab_VH)
    return out_NH


def _add_head_gradient(
    operand_NV: Tensor, hidden_NH: Tensor | None, dweight_VH: Tensor | None, dbias_V: Tensor | None, *, overwrite: bool
) -> None:
    """The share of these rows in the gradients of weight and bias, added to the buffers or written into them."""
    if dweight_VH is not None and hidden_NH is not None:
        if overwrite:
            torch.mm(operand_NV.t(), hidden_NH, out=dweight_VH)
        else:
            dweight_VH.addmm_(operand_NV.t(), hidden_NH)
    if dbias_V is not None:
        if overwrite:
            torch.sum(operand_NV, 0, out=dbias_V)
        else:
            dbias_V += operand_NV.sum(0)


@rounded_once
@torch.no_grad()
def run(
    problem: HeadProblem,
    outputs: Collection[str],
    *,
    coef_N: Tensor | None = None,
    entropy_coef_N: Tensor | None = None,
    dweight_VH: Tensor | None = None,
    dbias_V: Tensor | None = None,
    dlow_VR: Tensor | None = None,
    own_NM: Tensor | None = None,
    overwrite: bool = False,
) -> dict[str, Tensor]:
    """Everything a plan needs from one walk over the rows.

    `outputs`: any of STATISTICS and BEST (fp32 `[N]`, fp64 for fp64 inputs); `unit`, `entropy_unit` (`[N, H]`, d logp / d h and
    d entropy / d h); `operand`, `entropy_operand` (`[N, V]`, the same before the product with W); `dhidden` (`[N, H]`,
    sum of `coef * unit + entropy_coef * entropy_unit`). The last five come in the dtype of `hidden`.
    With an adapter, `low_rank`, each of these vectors comes with a second, `[N, R]`: what the adapter's operand of the row gets.
    `dweight_VH`, `dbias_V`, `dlow_VR` (of the adapter's B): buffers in the statistics' dtype to which the coefficients'
    gradients are added; with `overwrite` their old content is not read and they hold the gradients alone, and `dweight_VH` may
    have the weight's 16 bits: it is rounded once, from sums in fp32. With several targets `coef_N` and `own_NM` are those of
    `targets.py`, and no `unit` is made.
    """
    p = problem
    dtype, device, rows = p.statistics_dtype, p.hidden_MH.device, p.rows
    vocabulary, hidden_size = p.weight_VH.shape
    accumulate = dweight_VH is not None or dbias_V is not None or dlow_VR is not None
    combined = "dhidden" in outputs or accumulate
    late = any(name in outputs for name in ("unit", "entropy_unit", "operand", "entropy_operand"))
    late_entropy = "entropy_unit" in outputs or "entropy_operand" in outputs
    gradient = combined or late

    result = allocate(p, outputs)
    if rows == 0:
        if overwrite:
            zero(dweight_VH, dbias_V, dlow_VR)
        return result

    chunk = chunk_rows(rows, vocabulary, dtype, device, buffers=2 if late_entropy else 1)
    logits_CV = torch.empty(chunk, vocabulary, dtype=dtype, device=device)
    entropy_CV = torch.empty_like(logits_CV) if late_entropy else None
    hidden_CH = torch.zeros(chunk, hidden_size, dtype=dtype, device=device)
    adapter = Adapter(p, chunk)

    for start in range(0, rows, chunk):
        n = min(chunk, rows - start)
        padded = -(-n // ROW_BLOCK) * ROW_BLOCK
        span = slice(start, start + n)
        source_NH = p.hidden_MH[span] if p.index_N is None else p.hidden_MH[p.index_N[span]]
        hidden_CH[:n] = source_NH
        _matmul_nt_(logits_CV[:padded], hidden_CH[:padded], p.weight_VH)
        adapter.add_logits_(logits_CV[:padded], span)
        stats = row_kernel_(
            logits_CV[:n],
            p.target_N[span],
            p.options.of_rows(span),
            entropy="entropy" in outputs,
            top="top_logp" in outputs or "top_id" in outputs,
            gradient=gradient,
            coef_N=coef_N[span] if combined and coef_N is not None else None,
            entropy_coef_N=entropy_coef_N[span] if combined and entropy_coef_N is not None else None,
            entropy_operand_NV=None if entropy_CV is None else entropy_CV[:n],
            best=p.best if "best_id" in result else 0,
            own_NM=own_NM[span] if combined and own_NM is not None else None,
        )
        for name in (*STATISTICS, *BEST):
            if name in result:
                result[name][span] = stats[name]
        if "operand" in result:
            result["operand"][span] = logits_CV[:n]
        if "entropy_operand" in result and entropy_CV is not None:
            result["entropy_operand"][span] = entropy_CV[:n]
        for name, operand_CV in zip(VECTORS, (logits_CV, logits_CV, entropy_CV)):
            if name in result and operand_CV is not None:
                result[name][span] = _matmul_nn(operand_CV[:padded], p.weight_VH)[:n]
                if LOW + name in result:
                    result[LOW + name][span] = adapter.vectors(operand_CV[:padded])[:n]
        _add_head_gradient(logits_CV[:n], hidden_CH[:n], dweight_VH, dbias_V, overwrite=overwrite and start == 0)
        adapter.add_gradient(logits_CV[:n], dlow_VR, overwrite=overwrite and start == 0)
    return result


@rounded_once
@torch.no_grad()
def from_operands(
    problem: HeadProblem,
    operands: list[tuple[Tensor, Tensor]],
    *,
    dhidden: bool,
    dweight_VH: Tensor | None = None,
    dbias_V: Tensor | None = None,
    dlow_VR: Tensor | None = None,
    given_NM: Tensor | None = None,
    overwrite: bool = False,
) -> dict[str, Tensor]:
    """Gradients of the `keep` plan from stored `(operand_NV, coef_N)` pairs: two GEMMs and no logits. Buffers as in `run`.

    Returns what `run` does for `dhidden`, where that is wanted.

    `given_NM`: of several targets, the gradients by their final logits, which the stored slopes in their places multiply.
    """
    p = problem
    dtype, rows = p.statistics_dtype, p.rows
    result = allocate(p, ("dhidden",) if dhidden else ())
    if rows == 0 and overwrite:
        zero(dweight_VH, dbias_V, dlow_VR)
    chunk = chunk_rows(max(rows, 1), p.weight_VH.shape[0], dtype, p.hidden_MH.device, buffers=2)
    adapter = Adapter(p, chunk)
    for start in range(0, rows, chunk):
        span = slice(start, min(start + chunk, rows))
        terms = [operand_NV[span].to(dtype) * coef_N[span, None] for operand_NV, coef_N in operands]
        scaled_NV = terms[0] if len(terms) == 1 else terms[0].add_(terms[1])
        if given_NM is not None:
            slope_NM = operands[0][0][span].gather(1, p.target_N[span]).to(dtype)
            scaled_NV.scatter_(1, p.target_N[span], given_NM[span] * slope_NM)
        if dhidden:
            # whole row blocks of one layout, like every other product: a row's bits do not depend on how many rows there are
            padded_NV = scaled_NV.new_zeros(-(-len(scaled_NV) // ROW_BLOCK) * ROW_BLOCK, scaled_NV.shape[1])
            padded_NV[: len(scaled_NV)] = scaled_NV
            result["dhidden"][span] = _matmul_nn(padded_NV, p.weight_VH)[: len(scaled_NV)]
            if p.low_rank is not None:
                result[LOW + "dhidden"][span] = adapter.vectors(padded_NV)[: len(scaled_NV)]
        source_NH = None
        if dweight_VH is not None:
            source_NH = (p.hidden_MH[span] if p.index_N is None else p.hidden_MH[p.index_N[span]]).to(dtype)
        _add_head_gradient(scaled_NV, source_NH, dweight_VH, dbias_V, overwrite=overwrite and start == 0)
        if dlow_VR is not None:
            adapter.load(span)
            adapter.add_gradient(scaled_NV, dlow_VR, overwrite=overwrite and start == 0)
    return result


@torch.no_grad()
def restrict_(
    z_NV: Tensor,
    temperature: float | Tensor,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None = None,
    *,
    top_p_first: bool = False,
) -> None:
    """Set to -inf what is not among the `top_k` largest logits, then what is not in the nucleus of mass `top_p`.

    The nucleus is the shortest run of the most probable ids, at `temperature` and among what `top_k` left, whose probability
    reaches `top_p`; with `top_p_first` among all ids. Of equal logits the smaller ids come first, so exactly `top_k` ids are
    left. Last goes what is less than `min_p` times as probable, at `temperature`, as the likeliest id. `temperature`: above
    0, a number or `[N]`.
    """
    scale = _by_row(temperature)
    faint_NV = None
    if min_p is not None:  # of the likeliest id, which nothing else leaves out
        faint_NV = (z_NV - z_NV.amax(-1, keepdim=True)).double() / scale < math.log(min_p)
    if not top_k is top_p is None:
        _leave_largest_(z_NV, scale, top_k, top_p, top_p_first)
    if faint_NV is not None:
        z_NV.masked_fill_(faint_NV, float("-inf"))


def _leave_largest_(z_NV: Tensor, scale: float | Tensor, top_k: int | None, top_p: float | None, top_p_first: bool) -> None:
    sorted_NV, id_NV = z_NV.sort(dim=-1, descending=True, stable=True)
    if top_k is not None and not top_p_first:
        sorted_NV[:, top_k:] = float("-inf")
    if top_p is not None:
        p_NV = (sorted_NV.double() / scale).softmax(-1)
        sorted_NV.masked_fill_(p_NV.cumsum(-1) - p_NV >= top_p, float("-inf"))
    if top_k is not None and top_p_first:
        sorted_NV[:, top_k:] = float("-inf")
    z_NV.scatter_(1, id_NV, sorted_NV)


def _drawn_statistics(z_NV: Tensor, token_N: Tensor) -> dict[str, Tensor]:
    """Of the distribution `softmax(z)` that a token was drawn from: its log-probability, the entropy, how far first leads."""
    logp_NV = z_NV.log_softmax(-1)
    p_NV = logp_NV.exp()
    best_N2 = p_NV.topk(min(2, p_NV.shape[1]), dim=-1).values
    return {
        "drawn_logp": logp_NV.gather(1, token_N[:, None])[:, 0],
        "drawn_entropy": -torch.where(p_NV > 0, p_NV * logp_NV, 0.0).sum(-1),
        "margin": best_N2[:, 0] - (best_N2[:, 1] if best_N2.shape[1] > 1 else 0.0),
    }


def sample(
    problem: HeadProblem,
    key_N: Tensor,
    *,
    step: int,
    temperature: float | Tensor,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    top_p_first: bool = False,
    drawn: bool = False,
) -> dict[str, Tensor]:
    """Gumbel-max over `z + temperature * gumbel(key, step)`, argmax at temperature 0; ties go to the smallest id.

    `temperature`: a number or `[N]`. With `top_k`, `top_p` or `min_p` only over the ids that `restrict_` leaves.
    Returns `token` int64 `[N]`, and at temperature 1 its `logp`, and the `entropy` of the row, in the statistics' dtype. With
    `drawn` also `drawn_logp`, `drawn_entropy` and `margin` of the distribution drawn from, restricted and at `temperature`
    (at temperature 0: restricted, at temperature 1).
    `problem.target_N` gives the number of rows, its values are not read.
    """
    p = problem
    dtype, device, rows = p.statistics_dtype, p.hidden_MH.device, p.rows
    vocabulary, hidden_size = p.weight_VH.shape
    result = {"token": torch.empty(rows, dtype=torch.int64, device=device)}
    extra = ("drawn_logp", "drawn_entropy", "margin") if drawn else ()
    result |= {name: torch.empty(rows, dtype=dtype, device=device) for name in ("logp", "entropy", "lse", *extra)}
    if rows == 0:
        return result
    by_row = isinstance(temperature, Tensor)
    noisy = by_row or temperature > 0
    restricted = (noisy or drawn) and not (top_k is top_p is min_p is None)
    chunk = chunk_rows(rows, vocabulary, dtype, device, buffers=6)  # Gumbel noise is float64, its words int64; sorting takes less
    hidden_CH = torch.zeros(chunk, hidden_size, dtype=dtype, device=device)
    logits_CV = torch.empty(chunk, vocabulary, dtype=dtype, device=device)
    adapter = Adapter(p, chunk)
    for start in range(0, rows, chunk):
        n = min(chunk, rows - start)
        padded = -(-n // ROW_BLOCK) * ROW_BLOCK
        span = slice(start, start + n)
        hidden_CH[:n] = p.hidden_MH[span] if p.index_N is None else p.hidden_MH[p.index_N[span]]
        _matmul_nt_(logits_CV[:padded], hidden_CH[:padded], p.weight_VH)
        adapter.add_logits_(logits_CV[:padded], span)
        options = p.options.of_rows(span)
        chosen = temperature[span] if isinstance(temperature, Tensor) else temperature
        tempering = torch.where(chosen == 0, 1.0, chosen) if isinstance(chosen, Tensor) else chosen or 1.0
        perturbed_NV = logits_CV[:n].clone()
        _transform_(perturbed_NV, options)
        if restricted:
            restrict_(perturbed_NV, tempering, top_k, top_p, min_p, top_p_first=top_p_first)
        tempered_NV = perturbed_NV / _by_row(tempering) if drawn else None
        if noisy:
            # scaled by the temperature, which changes no argmax and overflows at none
            perturbed_NV = perturbed_NV.double() + _by_row(chosen) * gumbel(key_N[span], vocabulary, step=step)
        token_N = perturbed_NV.argmax(-1)
        stats = row_kernel_(logits_CV[:n], token_N, options, entropy=True)
        if tempered_NV is not None:
            stats |= _drawn_statistics(tempered_NV, token_N)
        result["token"][span] = token_N
        for name in ("logp", "entropy", "lse", *extra):
            result[name][span] = stats[name]
    return result
