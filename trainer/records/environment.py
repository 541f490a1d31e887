"""The environment of a run, for its files and `dllm-kernels env`, and the memory of this process."""

from __future__ import annotations

import resource
import subprocess
from pathlib import Path
from typing import Any

import torch

from dllm_kernels import env


def environment() -> dict[str, Any]:
    """That of the library, and the commit that runs."""
    found = env.environment()
    return {"dllm_kernels": found.pop("dllm_kernels"), "git_commit": _git_commit(), **found}


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
