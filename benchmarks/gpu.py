"""What a GPU needs beside a CPU's measurements: time by events with a cold L2 cache, memory by the allocator, clocks."""

from __future__ import annotations

import functools
import gc
import importlib.metadata
import importlib.util
import subprocess
from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.measure import MIB, ROUNDS, Memory, Timing
from benchmarks.registry import Runner

FLUSH_BYTES = 256 << 20  # several times the L2 cache of any card
COPY_BYTES = 4 << 30


@functools.cache
def _flush_buffer() -> torch.Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")


def _one(runner: Runner) -> float:
    """Seconds of one call; whatever it reads comes from memory, not from the cache that the call before filled."""
    _flush_buffer().zero_()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    outputs = runner()
    end.record()
    end.synchronize()
    del outputs
    return begin.elapsed_time(end) / 1e3


def interleave(runners: Mapping[str, Runner], rounds: int = ROUNDS) -> dict[str, Timing | Exception]:
    """`measure.interleave` by events: every round starts with another contestant, each has warmed up twice."""
    failures: dict[str, Timing | Exception] = {}
    times: dict[str, list[float]] = {name: [] for name in runners}
    names = list(runners)
    for number in range(-1, rounds):
        turn = number % len(names) if names else 0
        for name in names[turn:] + names[:turn]:
            if name in failures:
                continue
            try:
                seconds = _one(runners[name])
            except Exception as error:
                failures[name] = error
                continue
            if number >= 0:
                times[name].append(seconds)
    return failures | {name: Timing(tuple(runs)) for name, runs in times.items() if name not in failures}


def peak_memory(runner: Runner) -> Memory:
    """What one call adds to the allocator's peak, its outputs included."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = runner()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    del outputs
    return Memory((peak - before) / MIB, "torch.cuda.max_memory_allocated")


def clocks() -> str:
    """Clocks, temperature and power of the card, as nvidia-smi says them; empty where there is none."""
    query = "clocks.sm,clocks.mem,temperature.gpu,power.draw"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "-i", str(torch.cuda.current_device())],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def copy_gbytes() -> float:
    """GB/s of a large copy on the card, bytes read and written: the ceiling of the row kernels."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)

    def copy() -> dict[str, torch.Tensor]:
        target.copy_(source)
        return {}

    copy()
    return 2 * COPY_BYTES / sorted(_one(copy) for _ in range(7))[3] / 1e9


def environment() -> dict[str, Any]:
    """The card, what it copies, its clocks, and the versions of everybody's kernels; plain values."""
    names = ("triton", "liger-kernel", "trl", "cut-cross-entropy", "quack-kernels")
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu_multiprocessors": properties.multi_processor_count,
        "gpu_memory_mib": properties.total_memory // MIB,
        "cuda": torch.version.cuda or torch.version.hip,
        "copy_gbytes_per_s": round(copy_gbytes()),
        "clocks": clocks(),
        "versions": versions,
    }
