"""What a GPU needs beside a CPU's measurements: time by events with a cold L2 cache, memory by the allocator, clocks."""

from __future__ import annotations

import functools
import gc
import subprocess
from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.measure import MIB, ROUNDS, Memory, Timing
from benchmarks.registry import Runner

FLUSH_BYTES = 256 << 20  # several times the L2 cache of any card


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


def kernels(runner: Runner, most: int = 4) -> list[str]:
    """Names of the kernels that take most of a call's time, the slowest first: whether a peer took its fast path."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        runner()
        torch.cuda.synchronize()
    spent: dict[str, float] = {}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            spent[event.name] = spent.get(event.name, 0.0) + event.time_range.elapsed_us()
    return [name[:80] for name in sorted(spent, key=lambda name: -spent[name])[:most]]


def clocks() -> str:
    """Clocks, temperature and power of the card, as nvidia-smi says them; empty where there is none."""
    return _nvidia_smi("clocks.sm,clocks.mem,temperature.gpu,power.draw")


def _nvidia_smi(query: str) -> str:
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


def environment() -> dict[str, Any]:
    """The card, its driver, and its ceilings; plain values."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu_multiprocessors": properties.multi_processor_count,
        "gpu_memory_mib": properties.total_memory // MIB,
        "driver": _nvidia_smi("driver_version"),
        "cuda": torch.version.cuda or torch.version.hip,
    }
