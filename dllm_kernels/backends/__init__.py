"""Backends of the head: each module has `NAME` and the functions of `reference` that its docstring names."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from types import ModuleType

import torch

from dllm_kernels.backends import cpu, reference
from dllm_kernels.backends.contract import HeadProblem

_NAMES = ("reference", "cpu", "triton")


@functools.cache
def _triton() -> ModuleType | None:
    """Imported when it is first wanted; None where Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("dllm_kernels.backends.triton.head")


@functools.cache
def _warn_of_no_engine() -> None:
    """Once in a process."""
    warnings.warn(
        f"dllm_kernels runs the LM head on the CPU in plain PyTorch, slower and with chunks of logits: {cpu.why_unavailable()}. "
        "DLLM_KERNELS_BACKEND=reference chooses this, without a warning",
        stacklevel=2,
    )


def select(problem: HeadProblem) -> ModuleType:
    """The backend that runs a problem, see `for_device`."""
    return for_device(problem.hidden_MH.device)


def for_device(device: torch.device) -> ModuleType:
    """The backend for tensors of a device: DLLM_KERNELS_BACKEND where set, else C++ on the CPU and Triton on a GPU.

    Both need to be there: the reference runs otherwise. Raises ValueError for an unknown name and for a backend that cannot
    run here.
    """
    forced = os.environ.get("DLLM_KERNELS_BACKEND")
    if forced is None:
        if device.type == "cpu":
            if cpu.available():
                return cpu
            _warn_of_no_engine()
            return reference
        return (_triton() if device.type == "cuda" else None) or reference
    if forced not in _NAMES:
        raise ValueError(f"DLLM_KERNELS_BACKEND must be one of {', '.join(_NAMES)}, got {forced!r}")
    if forced == "reference":
        return reference
    module: ModuleType | None = cpu
    if forced == "cpu":
        why = cpu.why_unavailable() or (None if device == torch.device("cpu") else f"the tensors are on {device}")
    else:
        module = _triton()
        why = "triton is not installed" if module is None else module.why_unavailable(device)
    if module is None or why is not None:
        raise ValueError(f"DLLM_KERNELS_BACKEND={forced} cannot run here: {why}")
    return module


def names() -> tuple[str, ...]:
    """Backends that can run on this machine's CPU, the reference first; Triton's with TRITON_INTERPRET=1 alone."""
    found = ["reference", *(["cpu"] if cpu.available() else [])]
    if os.environ.get("TRITON_INTERPRET") == "1" and _triton() is not None:
        found.append("triton")
    return tuple(found)
