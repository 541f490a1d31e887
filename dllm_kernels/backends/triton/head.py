"""The LM head on GPUs: vendor products and Triton row kernels over chunks of logits; fused kernels where no chunk is needed.

The contract is that of `backends.reference`. float64 goes there. With TRITON_INTERPRET=1 in the environment from the start
all of it runs on CPU tensors, in NumPy: for tests.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dllm_kernels.backends import reference, targets
from dllm_kernels.backends.contract import (
    BEST,
    LOW,
    STATISTICS,
    VECTORS,
    HeadOptions,
    HeadProblem,
    Low,
    allocate,
    check,
    rounded_once,
    zero,
)
from dllm_kernels.backends.triton import fused, low_rank, products, rows
from dllm_kernels.backends.triton.configs import ROW_BLOCK, chunk_rows, row_stride, spans
from dllm_kernels.backends.triton.tuning import choose

__all__ = ["NAME", "check", "from_operands", "run", "sample", "warmup", "why_unavailable", "workspace_bytes"]

NAME = "triton"
FEW_ROWS = 64  # up to here a draw is bound by reading the weight
_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_unavailable(device: torch.device) -> str | None:
    """A sentence for the user, None where this backend takes tensors of the device."""
    if device.type == "cuda" or (device.type == "cpu" and rows.interpreted()):
        return None
    return f"the tensors are on {device}; it takes CUDA tensors, or CPU tensors where TRITON_INTERPRET=1"


class _Chunk:
    """Buffers of one walk: fp32 logits, whose memory then holds the operand; gathered rows; the entropy's own operand."""

    def __init__(self, problem: HeadProblem, *, second: bool) -> None:
        p = problem
        self.problem, self.dtype = p, p.hidden_MH.dtype
        vocabulary, width = p.weight_VH.shape
        device, item = p.hidden_MH.device, p.hidden_MH.element_size()
        whole = chunk_rows(vocabulary, 4 + item * second, device.type)
        self.spans = spans(p.rows, whole)
        size = max((padded for *_, padded in self.spans), default=0)
        columns = row_stride(vocabulary)
        self._logits = torch.empty(size, columns, dtype=torch.float32, device=device)
        self._second = torch.zeros(size, columns, dtype=self.dtype, device=device) if second else None
        self._hidden = torch.zeros(size, width, dtype=self.dtype, device=device)
        self.adapter = low_rank.Walk(p, size)

    def load(self, start: int, count: int, padded: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Logits, their memory as an operand, hidden states and the second operand, for rows of which `count` are real."""
        p, vocabulary = self.problem, len(self.problem.weight_VH)
        span = slice(start, start + count)
        self._hidden[:count] = p.hidden_MH[span] if p.index_N is None else p.hidden_MH.index_select(0, p.index_N[span])
        logits_CV = self._logits[:padded, :vocabulary]
        products.logits_(logits_CV, self._hidden[:padded], p.weight_VH)
        self.adapter.add_logits_(logits_CV, span)
        operand_CV = self._logits[:padded].view(self.dtype)[:, :vocabulary]
        second_CV = None if self._second is None else self._second[:padded, :vocabulary]
        return logits_CV, operand_CV, self._hidden[:padded], second_CV


class _Several:
    """Several targets of a chunk's rows: taken out of its logits before the row kernel, joined to its statistics after."""

    def __init__(self, logits_CV: Tensor, target_CM: Tensor, options: HeadOptions, result: dict[str, Tensor], best: int) -> None:
        self.result = result
        self.z_CM, self.operand_CM = targets.final_logits(logits_CV.gather(1, target_CM), target_CM, options)
        if any(name in result for name in ("top_id", "top_logp", *BEST)):
            z_CV = logits_CV.clone()
            reference._transform_(z_CV, options)
            self.best_z_CK, self.best_id_CK = targets.best_of(z_CV, max(best, 1))
        count = len(logits_CV)
        self.joined_C, self.spread_C = self.z_CM.new_full((count,), float("-inf")), self.z_CM.new_zeros(count)
        self.share_CM = self.z_CM  # logp among the targets
        if target_CM.shape[1]:
            z_CM = self.z_CM.masked_fill(~targets.first_of_equals(target_CM), float("-inf"))
            top_C1, place_C1 = z_CM.max(1, keepdim=True)
            z_CM = z_CM - top_C1.clamp(min=-3e38)
            # what the others have beside the likeliest: its own 1 is lost to none of their digits
            more_C1 = torch.log1p(z_CM.exp().scatter(1, place_C1, 0.0).sum(1, keepdim=True))
            self.share_CM = (self.z_CM - top_C1.clamp(min=-3e38)) - more_C1
            self.joined_C = (top_C1 + more_C1)[:, 0]
            once_CM = z_CM - more_C1
            self.spread_C = torch.where(once_CM > -88, once_CM * once_CM.exp(), 0.0).sum(1)
            logits_CV.scatter_(1, target_CM, float("-inf"))

    def finish(
        self, stats: dict[str, Tensor], own_CM: Tensor | None, coef_C: Tensor | None, entropy_coef_C: Tensor | None
    ) -> None:
        """Write what the kernel could not know to the results; `operand_CM` is then what stands in the targets' places."""
        result = self.result
        logp_CM = self.share_CM + stats["logp"][:, None]
        if own_CM is not None and coef_C is not None:
            given_CM = targets.target_gradient(logp_CM, own_CM, coef_C, stats.get("entropy"), entropy_coef_C)
            self.operand_CM = self.operand_CM * given_CM
        if "logp" in result:
            result["logp"].copy_(logp_CM)
        for name in ("top_id", "best_id"):
            if name in result:
                result[name].copy_(self.best_id_CK[:, 0] if name == "top_id" else self.best_id_CK)
        for name in ("top_logp", "best_logp"):
            if name in result:
                logp_CK = (self.best_z_CK - stats["lse"][:, None]).clamp(max=0.0)
                result[name].copy_(logp_CK[:, 0] if name == "top_logp" else logp_CK)


def _on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device, which need not be the tensors'; nothing is recorded for autograd."""

    @functools.wraps(function)
    def guarded(problem: HeadProblem, *more: Any, **named: Any) -> Any:
        device = problem.hidden_MH.device
        with torch.no_grad(), torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            return function(problem, *more, **named)

    return guarded


def _contiguous(vector: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if vector is None else vector.to(dtype).contiguous()


def _plain(problem: HeadProblem) -> HeadProblem:
    """The same problem with vectors that a kernel can index."""
    p, options = problem, problem.options
    if isinstance(options.temperature, Tensor):
        options = replace(options, temperature=options.temperature.contiguous())
    if options.bias is not None:  # once, and not for each chunk
        options = replace(options, bias=options.bias.float().contiguous())
    index_N = _contiguous(p.index_N, torch.int64)
    return replace(p, target_N=p.target_N.contiguous(), index_N=index_N, options=options)


@rounded_once
@_on_its_device
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
    """`reference.run`. Statistics alone come from the fused kernel where the inputs have 16 bits, all else from chunks."""
    if problem.hidden_MH.dtype not in _TYPES:
        return reference.run(
            problem,
            outputs,
            coef_N=coef_N,
            entropy_coef_N=entropy_coef_N,
            dweight_VH=dweight_VH,
            dbias_V=dbias_V,
            dlow_VR=dlow_VR,
            own_NM=own_NM,
            overwrite=overwrite,
        )
    p = _plain(problem)
    total, device = p.rows, p.hidden_MH.device
    result = allocate(p, outputs)
    combined = "dhidden" in outputs or any(buffer is not None for buffer in (dweight_VH, dbias_V, dlow_VR))
    second = "entropy_unit" in outputs or "entropy_operand" in outputs
    gradient = combined or second or "unit" in outputs or "operand" in outputs
    if total == 0:
        if overwrite:
            zero(dweight_VH, dbias_V, dlow_VR)
        return result
    made = ("lse", "entropy") if p.several else STATISTICS  # the rest of several targets is made by `_Several`
    stats = {name: result[name] for name in made if name in result}
    for name in ("logp", "lse", *(("entropy",) if entropy_coef_N is not None else ())):
        stats.setdefault(name, torch.empty(total, device=device))
    chunked = gradient or p.hidden_MH.dtype == torch.float32 or p.several
    config = None if chunked else choose(p, "statistics")
    if config is not None:
        fused.fused(p, stats, config)
        return result

    coef_N = _contiguous(coef_N, torch.float32) if combined else None
    entropy_coef_N = _contiguous(entropy_coef_N, torch.float32) if combined else None
    chunk = _Chunk(p, second=second)
    for start, count, padded in chunk.spans:
        span = slice(start, start + count)
        logits_CV, operand_CV, hidden_CH, second_CV = chunk.load(start, count, padded)
        options, of_rows = p.options.of_rows(span), {name: vector[span] for name, vector in stats.items()}
        coefficients = [None if c is None else c[span] for c in (coef_N, entropy_coef_N)]
        several = None
        if p.several:
            found = {name: vector[span] for name, vector in result.items()}
            several = _Several(logits_CV[:count], p.target_N[span], options, found, p.best)
        rows.row_statistics(
            logits_CV,
            options,
            of_rows,
            target_N=p.target_N[span] if several is None else None,
            joined_N=None if several is None else several.joined_C,
            spread_N=None if several is None else several.spread_C,
            operand=operand_CV if gradient else None,
            entropy_operand=second_CV,
            coef_N=coefficients[0],
            entropy_coef_N=coefficients[1],
        )
        if several is not None:
            several.finish(of_rows, None if own_NM is None or coef_N is None else own_NM[span], *coefficients)
            if gradient:
                operand_CV[:count].scatter_(1, p.target_N[span], several.operand_CM.to(operand_CV.dtype))
        for name, source_CV in (("operand", operand_CV), ("entropy_operand", second_CV)):
            if name in result and source_CV is not None:
                result[name][span] = source_CV[:count]
        for name, source_CV in zip(VECTORS, (operand_CV, operand_CV, second_CV)):
            if name in result and source_CV is not None:
                result[name][span] = products.vectors(source_CV, p.weight_VH)[:count]
                if LOW + name in result:
                    result[LOW + name][span] = chunk.adapter.vectors(source_CV)[:count]
        products.add_head_gradient(operand_CV[:count], hidden_CH[:count], dweight_VH, dbias_V, overwrite=overwrite and start == 0)
        chunk.adapter.add_gradient(operand_CV[:count], dlow_VR, overwrite=overwrite and start == 0)
    return result


@rounded_once
@_on_its_device
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
    """`reference.from_operands`, for operands that `run` of this backend stored: one pass over a chunk of them, two products."""
    p = problem
    if p.hidden_MH.dtype not in _TYPES:
        return reference.from_operands(
            p,
            operands,
            dhidden=dhidden,
            dweight_VH=dweight_VH,
            dbias_V=dbias_V,
            dlow_VR=dlow_VR,
            given_NM=given_NM,
            overwrite=overwrite,
        )
    total, vocabulary = p.rows, len(p.weight_VH)
    device, dtype = p.hidden_MH.device, p.hidden_MH.dtype
    result = allocate(p, ("dhidden",) if dhidden else ())
    if total == 0 and overwrite:
        zero(dweight_VH, dbias_V, dlow_VR)
    stored = [(operand_NV.t(), coef_N.float().contiguous()) for operand_NV, coef_N in operands]
    stored = [(operand_VN if operand_VN.stride(1) == 1 else operand_VN.contiguous(), coef) for operand_VN, coef in stored]
    cuts = spans(total, chunk_rows(vocabulary, p.hidden_MH.element_size(), device.type))
    size = max((padded for *_, padded in cuts), default=0)
    scaled_VC = torch.zeros(vocabulary, size, dtype=dtype, device=device)
    adapter = low_rank.Walk(p, size)
    for start, count, padded in cuts:
        span = slice(start, start + count)
        rows.combine([(operand_VN[:, span], coef_N[span]) for operand_VN, coef_N in stored], scaled_VC[:, :count])
        if given_NM is not None:  # times the slopes that were stored in the targets' places
            target_MC = p.target_N[span].t()
            values_MC = given_NM[span].t() * stored[0][0][:, span].gather(0, target_MC).float()
            scaled_VC[:, :count].scatter_(0, target_MC, values_MC.to(dtype))
        if dhidden:
            scaled_CV = scaled_VC[:, :padded].t()
            result["dhidden"][span] = products.vectors(scaled_CV, p.weight_VH)[:count]
            if p.low_rank is not None:
                result[LOW + "dhidden"][span] = adapter.vectors(scaled_CV)[:count]
        hidden_CH = None
        if dweight_VH is not None:
            hidden_CH = p.hidden_MH[span] if p.index_N is None else p.hidden_MH.index_select(0, p.index_N[span])
        products.add_head_gradient(scaled_VC[:, :count].t(), hidden_CH, dweight_VH, dbias_V, overwrite=overwrite and start == 0)
        if dlow_VR is not None:
            adapter.load(span)
            adapter.add_gradient(scaled_VC[:, :count].t(), dlow_VR, overwrite=overwrite and start == 0)
    return result


@_on_its_device
def sample(
    problem: HeadProblem,
    key_N: Tensor,
    *,
    step: int,
    temperature: float | Tensor,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> dict[str, Tensor]:
    """`reference.sample`: by the fused kernel; at a temperature of each row, or of float32 operands, by chunks.

    `top_k`, `top_p` and `min_p` need all logits of a row: they go the reference's way.
    """
    number = None if isinstance(temperature, Tensor) else float(temperature)
    drawn = number is None or number > 0
    filtered = drawn and not (top_k is top_p is min_p is None)
    if problem.hidden_MH.dtype not in _TYPES or filtered:
        return reference.sample(problem, key_N, step=step, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    p, total, device = _plain(problem), problem.rows, problem.hidden_MH.device
    result = {"token": torch.empty(total, dtype=torch.int64, device=device)}
    result |= {name: torch.empty(total, device=device) for name in ("logp", "entropy", "lse")}
    if total == 0:
        return result
    key_N = key_N.contiguous()
    if number is not None and p.hidden_MH.dtype != torch.float32:
        config = choose(p, "statistics" if not drawn else "few draws" if total <= FEW_ROWS else "many draws")
        if config is not None:
            fused.fused(p, result, config, key_N=key_N, step=step, temperature=number)
            return result
    chunk = _Chunk(p, second=False)
    for start, count, padded in chunk.spans:
        span = slice(start, start + count)
        logits_CV, *_ = chunk.load(start, count, padded)
        stats = {name: vector[span] for name, vector in result.items()}
        own = temperature[span].contiguous() if isinstance(temperature, Tensor) else temperature
        rows.row_statistics(logits_CV, p.options.of_rows(span), stats, key_N=key_N[span], step=step, noise_temperature=own)
    return result


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
    """Memory that `run` takes beside its results: one chunk of logits, gathered rows, one product's fp32 result; or parts."""
    if dtype not in _TYPES:
        needs: Any = {"gradient": gradient, "dhidden": dhidden, "second": second, "dweight": dweight}
        more: Any = {"several": several, "best": best, "low": low, **needs}
        return reference.workspace_bytes(rows, hidden_size, vocabulary, dtype, **more)
    if rows == 0:
        return 0
    if not gradient and dtype != torch.float32 and several is None:
        return fused.largest_parts(rows, vocabulary, hidden_size, dtype.itemsize, low)
    chunk = chunk_rows(vocabulary, 4, "cuda")
    size = chunk if rows >= chunk else ROW_BLOCK
    item: Any = dtype.itemsize
    # of an adapter, operands in fp32 and, beside bfloat16 ones, as parts; the gradient of B by parts
    adapter = 4 * low.rank * (vocabulary * ((low.dtype != torch.float32) + 2 * gradient + 2 * low.gradient) + 3 * size)
    if best:  # final logits beside the raw ones, which of them are taken, and their ranks
        return size * (20 * row_stride(vocabulary) + hidden_size * item) + adapter
    columns = row_stride(vocabulary) * (4 + item * second)
    return size * (columns + hidden_size * (item + 4 * (gradient and dhidden))) + adapter


def warmup(
    hidden_size: int,
    vocabulary: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    device: torch.device | str = "cuda",
    options: HeadOptions | None = None,
) -> None:
    """Compile every kernel that a head of this shape and these options meets, so that no later call pays for it.

    options: None for those of most models, which suppress an id and have neither bias nor softcap.
    """
    device = torch.device(device)
    hidden_MH = torch.zeros(2, hidden_size, dtype=dtype, device=device)
    weight_VH = torch.zeros(vocabulary, hidden_size, dtype=dtype, device=device)
    target_N = torch.zeros(2, dtype=torch.int64, device=device)
    options = options or HeadOptions(suppress=(0,))
    one_N = torch.ones(2, device=device)
    for index_N in (None, torch.arange(2, device=device)):
        p = HeadProblem(hidden_MH, weight_VH, target_N, index_N, options)
        for outputs in (("logp", "lse"), ("logp", "entropy", "lse"), STATISTICS):
            run(p, outputs)
            run(p, (*outputs, "unit"))
        run(p, ("lse", "dhidden"), coef_N=one_N)
        run(p, ("lse", "logp", "dhidden"), coef_N=one_N, entropy_coef_N=one_N)
        for temperature in (0.0, 1.0):
            sample(p, target_N, step=0, temperature=temperature)
