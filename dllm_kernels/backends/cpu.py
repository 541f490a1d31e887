"""The LM head on CPUs: PyTorch's matrix products and, for float32 logits, the C++ row kernel of csrc/.

The extension `dllm_kernels._C` needs a C++ compiler at install and nothing else; without it `available()` is False and
the caller takes `reference`. DLLM_KERNELS_ISA=baseline|avx2|avx512 forces an instruction set: all give the same bits.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from types import ModuleType

import torch
from torch import Tensor

from dllm_kernels.backends import reference
from dllm_kernels.backends.reference import from_operands

__all__ = ["NAME", "available", "from_operands", "isa", "row_kernel_", "run", "sample", "why_unavailable"]

NAME = "cpu"


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


_C, _why = _load()


def available() -> bool:
    """Whether the C++ row kernel was built and loads."""
    return _C is not None


def why_unavailable() -> str | None:
    """A sentence for the user, None where the kernel is available."""
    return _why


def isa() -> str | None:
    """The instruction set in use: "avx512", "avx2" or "baseline"; None without the extension."""
    return None if _C is None else str(_C.isa())


def _vector(name: str, tensor: Tensor | None, size: int, *dtypes: torch.dtype) -> Tensor | None:
    """A contiguous CPU vector whose address may be handed over."""
    if tensor is None:
        return None
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be of dtype {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
    if not tensor.is_cpu or tensor.shape != (size,):
        raise ValueError(f"{name} must have shape [{size}] on the CPU, got {list(tensor.shape)} on {tensor.device}")
    return tensor.contiguous()


def _matrix(name: str, tensor: Tensor, rows: int, width: int) -> None:
    if tensor.dtype != torch.float32:
        raise TypeError(f"{name} must be of dtype torch.float32, got {tensor.dtype}")
    if not tensor.is_cpu or tensor.shape != (rows, width):
        raise ValueError(f"{name} must have shape [{rows}, {width}] on the CPU, got {list(tensor.shape)} on {tensor.device}")
    if (width > 1 and tensor.stride(1) != 1) or (rows > 1 and tensor.stride(0) < width):
        raise ValueError(f"{name} must have unit stride in V and rows that do not overlap, got {tensor.stride()}")


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def row_kernel_(
    logits_NV: Tensor,
    target_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    excluded_V: Tensor | None = None,
    entropy: bool = False,
    top: bool = False,
    gradient: bool = False,
    coef_N: Tensor | None = None,
    entropy_coef_N: Tensor | None = None,
    entropy_operand_NV: Tensor | None = None,
) -> dict[str, Tensor]:
    """`reference.row_kernel_` in C++: same arguments, same results; float64 logits go to the reference itself.

    `logits_NV` is float32 on the CPU, the other floating tensors float32, `target_N` int64, `excluded_V` bool or uint8.
    The bits depend on neither the instruction set nor the number of threads (`torch.get_num_threads()`), nor on N.
    Raises TypeError for another dtype, ValueError for a shape, device or stride that the kernel cannot take,
    IndexError for a target outside the vocabulary, RuntimeError where the extension is missing.
    """
    if logits_NV.dtype == torch.float64:
        return reference.row_kernel_(
            logits_NV,
            target_N,
            bias_V=bias_V,
            softcap=softcap,
            temperature=temperature,
            excluded_V=excluded_V,
            entropy=entropy,
            top=top,
            gradient=gradient,
            coef_N=coef_N,
            entropy_coef_N=entropy_coef_N,
            entropy_operand_NV=entropy_operand_NV,
        )
    if _C is None:
        raise RuntimeError(_why)
    if logits_NV.dim() != 2 or logits_NV.shape[1] == 0:
        raise ValueError(f"logits_NV must have shape [N, V] with V >= 1, got {list(logits_NV.shape)}")
    rows, vocabulary = logits_NV.shape
    f32 = torch.float32
    _matrix("logits_NV", logits_NV, rows, vocabulary)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive or None, got {softcap}")
    target_N = _vector("target_N", target_N, rows, torch.int64)  # type: ignore[assignment]
    bias_V = _vector("bias_V", bias_V, vocabulary, f32)
    excluded_V = _vector("excluded_V", excluded_V, vocabulary, torch.bool, torch.uint8)
    coef_N = _vector("coef_N", coef_N, rows, f32)
    entropy_coef_N = _vector("entropy_coef_N", entropy_coef_N, rows, f32)
    temperature_N = _vector("temperature", temperature, rows, f32) if isinstance(temperature, Tensor) else None
    scalar = 1.0 if isinstance(temperature, Tensor) else temperature
    entropy_stride = 0
    if entropy_operand_NV is not None:
        _matrix("entropy_operand_NV", entropy_operand_NV, rows, vocabulary)
        entropy_stride = entropy_operand_NV.stride(0)

    names = ["logp", "lse"]
    if top:
        names.append("top_logp")
    if entropy or entropy_coef_N is not None or entropy_operand_NV is not None:
        names.append("entropy")
    stats = {name: logits_NV.new_empty(rows) for name in names}
    if top:
        stats["top_id"] = target_N.new_empty(rows)  # type: ignore[union-attr]
    _C.row_kernel(
        logits_NV.data_ptr(),
        rows,
        vocabulary,
        logits_NV.stride(0),
        target_N.data_ptr(),
        _address(bias_V),
        softcap or 0.0,
        scalar,
        _address(temperature_N),
        _address(excluded_V),
        _address(coef_N),
        _address(entropy_coef_N),
        _address(entropy_operand_NV),
        entropy_stride,
        gradient,
        stats["logp"].data_ptr(),
        stats["lse"].data_ptr(),
        _address(stats.get("entropy")),
        _address(stats.get("top_logp")),
        _address(stats.get("top_id")),
        torch.get_num_threads(),
    )
    return stats


run = functools.partial(reference.run, row_kernel=row_kernel_)
sample = functools.partial(reference.sample, row_kernel=row_kernel_)
