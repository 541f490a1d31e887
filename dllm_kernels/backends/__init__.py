"""Backends of the head: each module has `NAME` and the functions of `reference` that its docstring names."""

from __future__ import annotations

import os
from types import ModuleType

import torch

from dllm_kernels.backends import cpu, reference
from dllm_kernels.backends.reference import HeadProblem

_BY_NAME: dict[str, ModuleType] = {"reference": reference, "cpu": cpu}


def select(problem: HeadProblem) -> ModuleType:
    """The backend that runs a problem, see `for_device`."""
    return for_device(problem.hidden_MH.device)


def for_device(device: torch.device) -> ModuleType:
    """The backend for tensors of a device: DLLM_KERNELS_BACKEND where set, else C++ on the CPU where it was built.

    Raises ValueError for an unknown name and for a backend that cannot run here.
    """
    forced = os.environ.get("DLLM_KERNELS_BACKEND")
    if forced is None:
        return cpu if device.type == "cpu" and cpu.available() else reference
    if forced not in _BY_NAME:
        raise ValueError(f"DLLM_KERNELS_BACKEND must be one of {', '.join(_BY_NAME)}, got {forced!r}")
    if forced == "cpu" and (not cpu.available() or device != torch.device("cpu")):
        why = cpu.why_unavailable() or f"the tensors are on {device}"
        raise ValueError(f"DLLM_KERNELS_BACKEND=cpu cannot run here: {why}")
    return _BY_NAME[forced]


def names() -> tuple[str, ...]:
    """Backends that can run on this machine's CPU, the reference first."""
    return tuple(name for name in _BY_NAME if name != "cpu" or cpu.available())
