"""The LM head on CPUs: the engine of csrc/ (own matrix products, fused softmax) for float32, bfloat16 and float16.

The extension `dllm_kernels._C` needs a C++ compiler at install and nothing else; without it `available()` is False and the
caller takes `reference`; float64 goes to the reference too.
DLLM_KERNELS_ISA=baseline|avx2|avx512|avx512bf16 forces an instruction set. Whatever the number of threads and of
rows, a row's bits are the same; threads are torch's own (`torch.get_num_threads()`).
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Collection
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dllm_kernels.backends import contract, reference
from dllm_kernels.backends.contract import BEST, LOW, STATISTICS, WORKSPACE_BYTES, HeadProblem, Low

__all__ = [
    "NAME",
    "available",
    "check",
    "from_operands",
    "isa",
    "run",
    "sample",
    "weight_sum_bytes",
    "why_unavailable",
    "workspace_bytes",
]

NAME = "cpu"
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        extension = importlib.import_module("dllm_kernels._C")
    except ImportError as error:
        return None, f"the extension dllm_kernels._C is not there, install with a C++17 compiler at hand ({error})"
    if isa := os.environ.get("DLLM_KERNELS_ISA"):
        try:
            extension.set_isa(isa)
        except ValueError as error:
            warnings.warn(f"DLLM_KERNELS_ISA is ignored: {error}", stacklevel=3)
    return extension, None


_C: Any  # the extension, or None
_C, _why = _load()


def available() -> bool:
    """Whether the C++ engine was built and loads."""
    return _C is not None


def why_unavailable() -> str | None:
    """A sentence for the user, None where the engine is available."""
    return _why


def isa() -> str | None:
    """The instruction set in use: "avx512bf16", "avx512", "avx2" or "baseline"; None without the extension."""
    return None if _C is None else str(_C.isa())


def _takes(problem: HeadProblem) -> bool:
    """Whether the engine computes a problem; the reference does otherwise."""
    return _C is not None and problem.hidden_MH.dtype in _TYPES


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _strided(tensor: Tensor) -> tuple[int, int, int, int]:
    return tensor.data_ptr(), _TYPES[tensor.dtype], tensor.stride(0), tensor.stride(1)


def _vector(tensor: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor | None:
    """Contiguous and in `dtype`. The caller keeps the result while its address is in use."""
    return None if tensor is None else tensor.to(dtype).contiguous()


def _narrow(operand: Tensor) -> Tensor:
    """One of an adapter's in a dtype that the engine reads: float64 beside other hidden states is rounded to float32."""
    return operand if operand.dtype in _TYPES else operand.float()


class _Call:
    """A problem as the C++ structs see it. Its addresses are good as long as this object lives."""

    def __init__(self, problem: HeadProblem) -> None:
        p, options = problem, problem.options
        self.target_N, index_N = p.target_N.contiguous(), _vector(p.index_N, torch.int64)
        bias_V, excluded_V = _vector(options.bias), p.excluded_V
        temperature_N = _vector(options.temperature) if isinstance(options.temperature, Tensor) else None
        low = [_narrow(operand) for operand in p.low_rank or ()]
        self._held = index_N, bias_V, temperature_N, excluded_V, *low
        self.operands = _C.Operands(_strided(p.hidden_MH), _strided(p.weight_VH), _address(index_N), p.rows, *p.weight_VH.shape)
        self.low_rank = _C.LowRank(*(_strided(operand) for operand in low), low[1].shape[1]) if low else _C.LowRank()
        self.options = _C.Options(
            _address(bias_V),
            options.softcap or 0.0,
            options.temperature if temperature_N is None else 1.0,
            _address(temperature_N),
            _address(excluded_V),
        )


def _several(problem: HeadProblem, own_NM: Tensor | None = None, given_NM: Tensor | None = None) -> object:
    each = problem.target_N.shape[1] if problem.several else -1
    return _C.Several(each, _address(own_NM), _address(given_NM))


def _statistics(result: dict[str, Tensor]) -> object:
    best = result["best_id"].shape[1] if "best_id" in result else 0
    return _C.Statistics(*(_address(result.get(name)) for name in (*STATISTICS, *BEST)), best)


def _gradients(
    result: dict[str, Tensor], dweight_VH: Tensor | None, dbias_V: Tensor | None, dlow_VR: Tensor | None, *, overwrite: bool
) -> object:
    return _C.Gradients(
        *(
            (_address(result.get(low + "dhidden", result.get(low + "unit"))), _address(result.get(low + "entropy_unit")))
            for low in ("", LOW)
        ),
        (_address(result.get("operand")), _address(result.get("entropy_operand"))),
        _address(dweight_VH),
        dweight_VH is not None and dweight_VH.dtype != torch.float32,
        0 if dweight_VH is None else dweight_VH.stride(0),
        _address(dbias_V),
        _address(dlow_VR),
        0 if dlow_VR is None else dlow_VR.stride(0),
        overwrite,
    )


def check(problem: HeadProblem, *, targets: bool) -> None:
    """`contract.check`, which also says what is wrong; the usual case, nothing, is found in one C++ call."""
    p = problem
    target_N, index_N, excluded_V = p.target_N.contiguous(), _vector(p.index_N, torch.int64), p.excluded_V
    if _C is None or not _C.values_fit(
        _address(target_N) if targets else 0,
        target_N.numel() if targets else 0,
        _address(index_N),
        p.rows,
        p.hidden_MH.shape[0],
        p.weight_VH.shape[0],
        _address(excluded_V),
    ):
        contract.check(p, targets=targets)


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
    """`reference.run` in one C++ call; `operand` and `entropy_operand` come as transposed views of `[V, N]` storage."""
    p = problem
    if not _takes(p):
        return reference.run(
            p,
            outputs,
            coef_N=coef_N,
            entropy_coef_N=entropy_coef_N,
            dweight_VH=dweight_VH,
            dbias_V=dbias_V,
            dlow_VR=dlow_VR,
            own_NM=own_NM,
            overwrite=overwrite,
        )
    combined = "dhidden" in outputs or any(buffer is not None for buffer in (dweight_VH, dbias_V, dlow_VR))
    result = contract.allocate(p, outputs)
    if p.rows == 0 and overwrite:
        contract.zero(dweight_VH, dbias_V, dlow_VR)
    coef_N, entropy_coef_N = (_vector(coef_N), _vector(entropy_coef_N)) if combined else (None, None)
    own_NM = _vector(own_NM)
    call = _Call(p)
    _C.head(
        call.operands,
        call.low_rank,
        call.options,
        _address(call.target_N),
        _several(p, own_NM if combined else None),
        _statistics(result),
        combined or any(name not in (*STATISTICS, *BEST) for name in outputs),
        (_address(coef_N), _address(entropy_coef_N)),
        _gradients(result, dweight_VH, dbias_V, dlow_VR, overwrite=overwrite),
        torch.get_num_threads(),
        WORKSPACE_BYTES["cpu"],
    )
    return result


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
    """`reference.from_operands` in one C++ call, for operands that `run` of this backend stored."""
    p = problem
    if not _takes(p):
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
    result = contract.allocate(p, ("dhidden",) if dhidden else ())
    if p.rows == 0 and overwrite:
        contract.zero(dweight_VH, dbias_V, dlow_VR)
    stored = [(operand_NV.t().contiguous(), _vector(coef_N)) for operand_NV, coef_N in operands]
    pairs = [*((_address(operand_VN), _address(coef_N)) for operand_VN, coef_N in stored), (0, 0)][:2]
    given_NM = _vector(given_NM)
    call = _Call(p)
    _C.from_operands(
        call.operands,
        call.low_rank,
        _address(call.target_N),
        _several(p, given_NM=given_NM),
        *zip(*pairs),
        _gradients(result, dweight_VH, dbias_V, dlow_VR, overwrite=overwrite),
        torch.get_num_threads(),
    )
    return result


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
    """`reference.sample` inside the pass over the logits: noise only for what can still win.

    `top_k`, `top_p` and `min_p` need all logits of a row at once: they go the reference's way, chunk by chunk.
    """
    p, by_row = problem, isinstance(temperature, Tensor)
    restricted = not (top_k is top_p is min_p is None)
    if not _takes(p) or (restricted and (by_row or temperature > 0)):
        return reference.sample(p, key_N, step=step, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    result = {"token": torch.empty(p.rows, dtype=torch.int64)}
    result |= {name: torch.empty(p.rows) for name in ("logp", "entropy", "lse")}
    call, key_N, temperature_N = _Call(p), key_N.contiguous(), _vector(temperature) if isinstance(temperature, Tensor) else None
    _C.sample(
        call.operands,
        call.low_rank,
        call.options,
        _statistics({name: result[name] for name in ("lse", "entropy")}),
        _C.Draw(
            _address(key_N),
            step,
            1.0 if by_row else temperature,
            _address(temperature_N),
            _address(result["token"]),
            _address(result["logp"]),
        ),
        torch.get_num_threads(),
    )
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
    """Bytes that a call works in beyond arguments and results: at most 256 MiB of logits, and packed operands."""
    if _C is None or dtype not in _TYPES:
        needs: Any = {"gradient": gradient, "dhidden": dhidden, "second": second, "dweight": dweight}
        more: Any = {"several": several, "best": best, "low": low, **needs}
        return reference.workspace_bytes(rows, hidden_size, vocabulary, dtype, **more)
    threads = torch.get_num_threads()
    return int(
        _C.workspace_bytes(
            rows,
            vocabulary,
            hidden_size,
            _TYPES[dtype],
            low.rank,
            _TYPES.get(low.dtype, 0),
            gradient,
            dweight,
            dhidden,
            second,
            low.gradient,
            -1 if several is None else several,
            best,
            threads,
            WORKSPACE_BYTES["cpu"],
        )
    )


def weight_sum_bytes(rows: int, hidden_size: int, vocabulary: int, dtype: torch.dtype, *, stored: bool = False) -> int:
    """Bytes in which a 16-bit weight's gradient is added up beside itself: none where one chunk holds all rows."""
    if _C is None or dtype not in _TYPES:
        return contract.weight_sum_bytes(rows, hidden_size, vocabulary, dtype, stored=stored)
    return int(_C.sum_bytes(rows, vocabulary, hidden_size, _TYPES[dtype], stored, 0 if stored else WORKSPACE_BYTES["cpu"]))
