"""Time and peak memory, measured so that two figures of one run can be compared."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.registry import Runner, Settings, load

ROUNDS = 7
SHORTEST_SAMPLE_S = 0.005  # faster work is repeated within one sample until it takes this long
WARM_S = 0.1  # a first run this long has warmed up what there is
MEMORY_TIMEOUT_S = 900
MIB = 1 << 20
FLUSH_BYTES = 64 << 20  # twice the last-level cache of the processors that we measured on
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
def _flush_buffer() -> torch.Tensor:
    return torch.zeros(FLUSH_BYTES, dtype=torch.uint8)


def flush_caches() -> None:
    """Write more than the caches hold: what runs next reads its operands from memory, whoever ran before."""
    _flush_buffer().add_(1)


@cache
def gflops_per_s(dtype: torch.dtype, device: str) -> float:
    """The rate of a large matrix product by the vendor's library, best of several shapes and runs: the arithmetic's ceiling."""
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


def cpu_clocks() -> str:
    """What the kernel says of the cores' clocks, as `2596-2601 MHz`; empty where it says nothing."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    clocks = [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
    return f"{min(clocks):.0f}-{max(clocks):.0f} MHz" if clocks else ""


def _quickest(work: Callable[[], object], device: str) -> float:
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def interleave(
    runners: Mapping[str, Runner], first_run_s: Mapping[str, float], rounds: int = ROUNDS
) -> dict[str, Timing | Exception]:
    """Time the runners in turn, so that a noisy minute hits all of them; every round starts with another one, from cold caches.

    Each has run once already, in `first_run_s` seconds. One that raises gets its exception instead of a timing.
    """
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
                if name in failures or (number < 0 and first_run_s[name] > WARM_S):
                    continue
                try:
                    count = repeats.get(name, 1)
                    flush_caches()
                    started = time.perf_counter()
                    for _ in range(count):
                        runners[name]()
                    seconds = (time.perf_counter() - started) / count
                except Exception as error:
                    failures[name] = error
                    continue
                if number < 0:
                    repeats[name] = max(1, int(SHORTEST_SAMPLE_S / max(seconds, 1e-9)))
                else:
                    times[name].append(seconds)
    finally:
        gc.enable()
    return failures | {name: Timing(tuple(runs)) for name, runs in times.items() if name not in failures}


@dataclass(frozen=True)
class Memory:
    """Growth of the resident set while one call ran, its outputs included."""

    extra_mib: float
    method: str


def start_memory_server(preload: Sequence[str]) -> None:
    """Start the process that `peak_memory` forks from, with these modules imported; once, before the first of them.

    What is not imported there is imported again in every child, half a second each.
    """
    root = str(Path(__file__).resolve().parent.parent)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([root, *([before] if before else [])])  # the server gets no sys.path
    multiprocessing.set_forkserver_preload(["torch", "dllm_kernels", "benchmarks.measure", *preload])
    forkserver.ensure_running()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


def peak_memory(suite: str, label: str, contestant: str, settings: Settings) -> Memory:
    """Peak memory of one call in a process of its own.

    The process is forked from a server that has imported the libraries and computed nothing; it warms up at the case's tiny
    sizes, sets the case up, resets the kernel's high-water mark, and calls once. Blocks from 1 MiB go back to the system when
    freed, so that the figure is live memory. Raises RuntimeError with the reason.
    """
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, suite, label, contestant, settings), daemon=True)
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


def _child(pipe: Connection, suite_name: str, label: str, contestant: str, settings: Settings) -> None:
    try:
        gc.freeze()  # else the collection below copies every page of the modules that the server shares
        # glibc raises its mmap threshold as blocks are freed, and keeps later ones: fragments, not live memory
        getattr(_libc(), "mallopt", lambda *_: 0)(M_MMAP_THRESHOLD, MIB)
        torch.set_num_threads(settings.threads)
        case = load(suite_name).case(label, settings)
        for sizes in (case.tiny, case.sizes):  # ends with the runner of the full size
            prepared = case.setup(sizes)
            make = next(c.make for c in prepared.contestants if c.name == contestant)
            assert make is not None
            runner = make()
            if sizes is case.tiny:
                runner()
        gc.collect()
        pipe.send(_growth(runner))
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _growth(runner: Runner) -> Memory:
    # freed blocks that malloc still holds would hide growth
    getattr(_libc(), "malloc_trim", lambda _: None)(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        outputs = runner()
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        method = "ru_maxrss, which cannot be reset: a peak during set-up hides growth"
    else:
        before = _status_bytes("VmRSS")
        outputs = runner()
        after = _status_bytes("VmHWM")
        method = "VmHWM after clear_refs"
    del outputs  # held until here: outputs count
    return Memory(max(0, after - before) / MIB, method)


def _status_bytes(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) << 10
