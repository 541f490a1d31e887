"""Time, memory and the machine's rates, measured so that two figures of one run can be compared.

On a GPU time is told by events, with a cold L2 cache, and memory by the allocator.
"""

from __future__ import annotations

import ctypes
import gc
import math
import multiprocessing
import os
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.registry import Runner, Settings, Suite, load

ROUNDS = 7
SHORTEST_SAMPLE_S = 0.005  # faster work is repeated within one sample until it takes this long
WARM_S = 0.1  # a first run this long has warmed up what there is
MEMORY_TIMEOUT_S = 900
MIB = 1 << 20
# twice the last-level cache of the processors that we measured on; several times the L2 cache of any card
FLUSH_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}
M_MMAP_THRESHOLD = -3  # malloc.h


@dataclass(frozen=True)
class Timing:
    """Seconds per call, one entry per round."""

    runs: tuple[float, ...]

    def as_json(self) -> dict[str, Any]:
        """Milliseconds: median, min, and the quartiles as the spread."""
        q1, median, q3 = statistics.quantiles(self.runs, n=4, method="inclusive")
        values = {"median": median, "min": min(self.runs), "q1": q1, "q3": q3}
        return {**{name: round(value * 1e3, 5) for name, value in values.items()}, "runs": len(self.runs)}


@cache
def _flush_buffer(device: str) -> torch.Tensor:
    return torch.zeros(FLUSH_BYTES[device], dtype=torch.uint8, device=device)


def flush_caches(device: str) -> None:
    """Write more than the caches hold: what runs next reads its operands from memory, whoever ran before."""
    _flush_buffer(device).add_(1)


@cache
def gflops_per_s(dtype: torch.dtype, device: str) -> float:
    """The rate of a large matrix product, best of several shapes and runs: the ceiling of arithmetic."""
    best = 0.0
    for n, k, m in ((512, 1024, 8192), (2048, 2048, 2048)):
        a, b = torch.randn(n, k, device=device).to(dtype), torch.randn(m, k, device=device).to(dtype).t()
        out = torch.empty(n, m, dtype=dtype, device=device)
        best = max(best, 2.0 * n * k * m / _quickest(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device) / 1e9)
    return best


@cache
def gbytes_per_s(device: str) -> float:
    """The rate of a large copy, bytes read and written: the memory's ceiling."""
    source = torch.ones((4 << 30) if device == "cuda" else (512 << 20), dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2.0 * source.nbytes / _quickest(lambda: target.copy_(source), device) / 1e9


def _proc(name: str) -> list[str]:
    """Lines of a file under /proc; none where the system has no such file."""
    try:
        return Path("/proc", name).read_text().splitlines()
    except OSError:
        return []


def clocks(device: str) -> str:
    """A CPU's core clocks as `2596-2601 MHz`; a GPU's clocks, temperature and power; empty if unknown."""
    if device == "cuda":
        return _nvidia_smi("clocks.sm,clocks.mem,temperature.gpu,power.draw")
    found = [float(line.partition(":")[2]) for line in _proc("cpuinfo") if line.startswith("cpu MHz")]
    return f"{min(found):.0f}-{max(found):.0f} MHz" if found else ""


def _nvidia_smi(query: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "-i", str(torch.cuda.current_device())]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def card() -> dict[str, Any]:
    """The GPU, its driver, and its ceilings; plain values."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu_multiprocessors": properties.multi_processor_count,
        "gpu_memory_mib": properties.total_memory // MIB,
        "driver": _nvidia_smi("driver_version"),
        "cuda": torch.version.cuda or torch.version.hip,
    }


def _quickest(work: Callable[[], object], device: str) -> float:
    return min(list(_repeated(work, device, 5))[1:])


def _repeated(work: Callable[[], object], device: str, times: int) -> Iterator[float]:
    for _ in range(times):
        started = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        yield time.perf_counter() - started


def fastest(layouts: Mapping[str, Callable[[], object]], device: str) -> str:
    """The name of the layout that takes the least time, best of three."""
    return min(layouts, key=lambda name: min(_repeated(layouts[name], device, 3)))


# --- time ---------------------------------------------------------------------------------------------------


def interleave(
    runners: Mapping[str, Runner], first_run_s: Mapping[str, float], device: str = "cpu", rounds: int = ROUNDS
) -> dict[str, Timing | Exception]:
    """Time the runners in turn from cold caches, each round in another order, so that noise hits all alike.

    Each has run once already, in `first_run_s` seconds. One that raises gets its exception instead of a
    timing.
    """
    sample, warm_s = (_by_events, math.inf) if device == "cuda" else (_by_clock, WARM_S)
    failures: dict[str, Timing | Exception] = {}
    repeats: dict[str, int] = {}
    times: dict[str, list[float]] = {name: [] for name in runners}
    names = list(runners)
    gc.collect()
    gc.disable()
    try:
        for number in range(-1, rounds):  # round -1 warms up and finds the repeats
            turn = number % len(names) if names else 0
            for name in names[turn:] + names[:turn]:
                if name in failures or (number < 0 and first_run_s[name] > warm_s):
                    continue
                try:
                    flush_caches(device)
                    seconds = sample(runners[name], repeats.get(name, 1))
                except Exception as error:
                    failures[name] = error
                    continue
                if number >= 0:
                    times[name].append(seconds)
                elif device == "cpu":
                    repeats[name] = max(1, int(SHORTEST_SAMPLE_S / max(seconds, 1e-9)))
    finally:
        gc.enable()
    return failures | {name: Timing(tuple(runs)) for name, runs in times.items() if name not in failures}


def _by_clock(runner: Runner, count: int) -> float:
    started = time.perf_counter()
    for _ in range(count):
        runner()
    return (time.perf_counter() - started) / count


def _by_events(runner: Runner, count: int) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(count):
        outputs = runner()
    end.record()
    end.synchronize()
    del outputs
    return float(begin.elapsed_time(end)) / 1e3 / count


def kernels(runner: Runner, most: int = 4) -> list[str]:
    """The kernels that take most of a call's time, slowest first: whether a peer took its fast path."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        runner()
        torch.cuda.synchronize()
    spent: dict[str, float] = {}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            spent[event.name] = spent.get(event.name, 0.0) + event.time_range.elapsed_us()
    return [name[:80] for name in sorted(spent, key=lambda name: -spent[name])[:most]]


# --- memory -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Growth of live memory while one call ran, its outputs included."""

    extra_mib: float
    method: str


def allocator_peak(runner: Runner) -> Memory:
    """What one call adds to the peak of the GPU's allocator, in this process."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = runner()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    del outputs
    return Memory((peak - before) / MIB, "torch.cuda.max_memory_allocated")


def start_memory_server(preload: Sequence[str]) -> None:
    """Start the process that `peak_memory` forks from, with these modules imported; call it once, first.

    What is not imported there is imported again in every child, half a second each.
    """
    root = str(Path(__file__).resolve().parent.parent)
    before = os.environ.get("PYTHONPATH")
    # the server gets no sys.path
    os.environ["PYTHONPATH"] = os.pathsep.join([root, *([before] if before else [])])
    multiprocessing.set_forkserver_preload(["torch", "dllm_kernels", "benchmarks.measure", *preload])
    forkserver.ensure_running()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


def peak_memory(suite: str, label: str, contestant: str, settings: Settings) -> Memory:
    """`peak_of` a contestant of a suite, warmed up at the case's tiny sizes."""
    return peak_of(_of_suite, suite, label, contestant, settings)


def peak_of(prepare: Callable[..., Runner], *arguments: Any) -> Memory:
    """Peak memory of one call in a process of its own, by the resident set.

    The process is forked from a server that has imported the libraries and computed nothing; it calls
    `prepare(*arguments)`, which warms up and sets up what is measured, resets the kernel's high-water mark,
    and calls the result once. Blocks from 1 MiB go back to the system when freed, so that the figure is live
    memory. Raises RuntimeError with the reason.
    """
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, prepare, arguments), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(MEMORY_TIMEOUT_S):
            raise RuntimeError(f"no memory figure within {MEMORY_TIMEOUT_S} s")
        answer = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(
            f"the memory subprocess ended with code {process.exitcode}" + " (out of memory?)" * (process.exitcode == -9)
        ) from None
    finally:
        if process.is_alive():
            process.join(5)
        if process.is_alive():
            process.kill()
            process.join()
    if isinstance(answer, str):
        raise RuntimeError(answer)
    return answer


def _of_suite(suite_name: str, label: str, contestant: str, settings: Settings) -> Runner:
    torch.set_num_threads(settings.threads)
    suite = load(suite_name)
    assert isinstance(suite, Suite)
    case = next(case for case in suite.cases(settings) if case.label == label)
    setup = next(one.setup for one in case.contestants if one.name == contestant)
    setup(case.inputs(case.tiny)).run()
    return setup(case.inputs(case.sizes)).run


def _child(pipe: Connection, prepare: Callable[..., Runner], arguments: Sequence[Any]) -> None:
    try:
        gc.freeze()  # else the collection below copies every page of the modules that the server shares
        # glibc raises its mmap threshold as blocks are freed, and keeps later ones: fragments, not live
        # memory
        getattr(_libc(), "mallopt", lambda *_: 0)(M_MMAP_THRESHOLD, MIB)
        runner = prepare(*arguments)
        gc.collect()
        pipe.send(_growth(runner))
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _growth(runner: Runner) -> Memory:
    # freed blocks that malloc still holds would hide growth
    getattr(_libc(), "malloc_trim", lambda _: None)(0)
    resettable = _reset_high_water_mark()
    before = _resident_bytes("VmRSS" if resettable else "")
    outputs = runner()
    after = _resident_bytes("VmHWM" if resettable else "")
    del outputs  # held until here: outputs count
    method = "VmHWM after clear_refs" if resettable else "ru_maxrss, which cannot be reset: a peak during set-up hides growth"
    return Memory(max(0, after - before) / MIB, method)


def _reset_high_water_mark() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident_bytes(key: str) -> int:
    """What the kernel calls VmRSS (now) or VmHWM (the most so far); without a key the most ever."""
    if not key:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    return next(int(line.split()[1]) << 10 for line in _proc("self/status") if line.startswith(key + ":"))
