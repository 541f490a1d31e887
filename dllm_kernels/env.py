"""Versions, machine, and which code runs the LM head.

python -m dllm_kernels.env      (with the trainer, `dllm-kernels env` adds the commit)
"""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from dllm_kernels.backends import cpu
from dllm_kernels.version import __version__

__all__ = ["environment"]


def environment() -> dict[str, Any]:
    """Names and values for a report, as JSON values; None for what is not installed or not there.

    Example:
        >>> "head" in environment()
        True
    """
    return {
        "dllm_kernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "triton": _version("triton"),
        "system": platform.platform(),
        "cpu": _cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "head": _head_path(),
    }


def show(found: dict[str, Any]) -> None:
    """Print one line a name."""
    for name, value in found.items():
        print(f"{name:<15} {value if value is not None else 'none'}")


def _head_path() -> str:
    """Which kernels run the LM head on CPU tensors, and why."""
    reason = cpu.why_unavailable()
    return f"pure PyTorch ({reason})" if reason else f"C++ engine ({cpu.isa()})"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    show(environment())
