"""The environment of a run, for its files and `dllm-kernels env`, and the memory of this process."""

from __future__ import annotations

import platform
import resource
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import dllm_kernels
from dllm_kernels.backends import cpu


def environment() -> dict[str, Any]:
    """Versions, machine and code path of the head, as JSON values."""
    return {
        "dllm_kernels": dllm_kernels.__version__,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "system": platform.platform(),
        "cpu": _cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "head": head_path(),
    }


def head_path() -> str:
    """Which kernels run the LM head on CPU tensors, and why."""
    reason = cpu.why_unavailable()
    return f"pure PyTorch ({reason})" if reason else f"C++ engine ({cpu.isa()})"


def peak_memory_mb() -> float:
    """Peak memory of this process so far: the allocator's on a GPU, else the resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resident_bytes(peak=True)
    if peak is None:  # on Linux this would include the parent's peak before the fork
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return peak / 2**20


def resident_bytes(*, peak: bool = False) -> int | None:
    """The resident set of this process, or its peak so far; None where there is no /proc."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return int(status.split("VmHWM:" if peak else "VmRSS:")[1].split()[0]) * 1024


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _git_commit() -> str | None:
    """Commit of the checkout that this package runs from; None if installed."""
    here = Path(__file__)
    git = ["git", "-C", str(here.parent)]
    try:  # the virtual environment may lie inside another project's checkout
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], capture_output=True, timeout=5, check=True)
        found = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
