"""One case through setup, accuracy, time and memory: the rows of a result file."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpu
from benchmarks.measure import MIB, Memory, Timing, gflops_per_s, interleave, peak_memory
from benchmarks.registry import DTYPES, Case, Contestant, Prepared, Row, Runner, Settings, Suite

# a peer that rounds its logits to 16 bits is worse than ours and still a peer; beyond this it does another job
PEER_SLACK = 100.0


def measure(suite: Suite, settings: Settings) -> dict[str, Any]:
    """The entry of a result file: the rows of all cases, what is computed, and the summary."""
    cases = [case for case in suite.cases(settings) if not settings.cases or case.name in settings.cases]
    rows: list[Row] = []
    started = time.monotonic()
    for number, case in enumerate(cases, 1):
        if settings.minutes and time.monotonic() - started > 60 * settings.minutes:
            print(
                f"[{suite.name}] {settings.minutes:g} minutes are over: {len(cases) - number + 1} cases not measured",
                file=sys.stderr,
            )
            break
        print(f"[{suite.name} {number}/{len(cases)}] {case.label}", file=sys.stderr, flush=True)
        rows += measure_case(suite, case, settings)
    return {"rows": rows, "arithmetic": suite.arithmetic(), "summary": suite.summary(rows)}


def measure_case(suite: Suite, case: Case, settings: Settings) -> list[Row]:
    """Every contestant's row: `status` is ok, absent, failed or wrong, with a `reason` unless ok.

    Whatever raises becomes a row; nothing is dropped.
    """
    try:
        prepared = case.setup(case.sizes)
    except Exception as error:
        return [_row(case, Contestant("all", "ours"), status="failed", reason=f"set-up: {_describe(error)}")]
    prepared = replace(prepared, contestants=tuple(filter(settings.runs, prepared.contestants)))
    rows = {contestant.name: _row(case, contestant) for contestant in prepared.contestants}
    runners: dict[str, Runner] = {}
    first_run_s: dict[str, float] = {}
    for contestant in prepared.contestants:
        row = rows[contestant.name]
        if contestant.make is None:
            row |= {"status": "absent", "reason": contestant.absent}
            continue
        try:
            runner = contestant.make()
            started = time.perf_counter()
            result = runner()
            first_run_s[contestant.name] = time.perf_counter() - started
            row["errors"] = prepared.errors(result)
            del result
        except Exception as error:
            row |= {"status": "failed", "reason": _describe(error)}
            continue
        row["note"] = contestant.note() if callable(contestant.note) else contestant.note
        row["flops_by_formula"] = contestant.flops() if callable(contestant.flops) else contestant.flops
        row |= _counted(runner)
        runners[contestant.name] = runner
        if excess := _excess(row["errors"], case, contestant):
            row |= {"status": "wrong", "reason": excess}
    on_gpu = settings.device == "cuda"
    timed = gpu.interleave(runners) if on_gpu else interleave(runners, first_run_s)
    for name, timing in timed.items():
        if isinstance(timing, Timing):
            rows[name]["time_ms"] = timing.as_json()
        else:
            rows[name] |= {"status": "failed", "reason": _describe(timing)}
    for contestant in prepared.contestants:
        if contestant.phases is not None and rows[contestant.name]["time_ms"]:
            _add_phases(rows[contestant.name], contestant.phases())
    if case.flops and all(c.role != "floor" for c in prepared.contestants):
        rows["limit"] = _limit(case, settings)
    _add_ratios(rows, suite, case, prepared)
    if on_gpu:
        _finish_on_gpu(rows, runners, prepared)
        return list(rows.values())
    runners.clear()
    for contestant in prepared.contestants:
        if contestant.role != "floor" and rows[contestant.name]["time_ms"]:
            _add_memory(rows[contestant.name], suite, case, contestant, settings)
    return list(rows.values())


def _add_phases(row: Row, seconds: Mapping[str, float]) -> None:
    row["phases_s"] = {name: round(value, 5) for name, value in seconds.items()}
    row["note"] += "".join(f"{', ' if row['note'] else ''}{name} {value:.2g} s" for name, value in seconds.items())


def _row(case: Case, contestant: Contestant, *, status: str = "ok", reason: str = "") -> Row:
    return {
        "case": case.label,
        "sizes": dict(case.sizes),
        "contestant": contestant.name,
        "role": contestant.role,
        "status": status,
        "reason": reason,
        "note": "",
        "time_ms": None,
        "flops_counted": None,
        "flops_by_formula": None,
        "gflops_per_s": None,
        "to_floor": None,
        "to_baseline": None,
        "memory_mib": None,
        "memory_method": "",
        "errors": {},
        "phases_s": {},
    }


def _counted(runner: Runner) -> dict[str, Any]:
    """Operations of one call, by torch's counter with the library's formulas; kernels that torch does not see count as 0."""
    try:
        with FlopCounterMode(display=False) as counter:
            runner()
    except Exception as error:  # a peer whose kernels cannot run under a dispatch mode may still be timed
        return {"flops_counted": None, "flops_reason": _describe(error)}
    return {"flops_counted": int(counter.get_total_flops())}


def _limit(case: Case, settings: Settings) -> Row:
    """The least arithmetic of the case at the rate of a bare matrix product, which nobody goes below: computed."""
    rate = gflops_per_s(DTYPES[case.dtype or settings.dtype], settings.device)
    row = _row(case, Contestant("limit", "floor"))
    milliseconds = round(case.flops / rate / 1e6, 5)
    row["time_ms"] = {**dict.fromkeys(("median", "min", "q1", "q3"), milliseconds), "runs": 0}
    row |= {"note": f"{case.flops / 1e9:.4g} GFLOP at {rate:.0f} GFLOP/s, computed", "flops_by_formula": case.flops}
    return row


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def _excess(errors: dict[str, float], case: Case, contestant: Contestant) -> str:
    slack = PEER_SLACK if contestant.role == "peer" else 1.0
    over = [
        f"{name} error {errors[name]:.1e} above {limit * slack:.0e}"
        for name, limit in case.tolerance.items()
        if name in errors and not errors[name] <= limit * slack  # a NaN is wrong
    ]
    return "; ".join(over)


def _add_ratios(rows: dict[str, Row], suite: Suite, case: Case, prepared: Prepared) -> None:
    def median(name: str) -> float | None:
        row: dict[str, Any] = rows.get(name) or {}
        return row["time_ms"]["median"] if row.get("time_ms") else None

    floor = next((name for name, row in rows.items() if row["role"] == "floor"), "")
    for name, row in rows.items():
        if (own := median(name)) is None:
            continue
        if operations := row["flops_counted"] or row["flops_by_formula"]:
            row["gflops_per_s"] = round(operations / own / 1e6, 1)
        for key, other in (("to_floor", median(floor)), ("to_baseline", median(suite.baseline))):
            row[key] = round(own / other, 4) if other else None
        if row["role"] == "floor" and prepared.output_bytes:
            row |= {"memory_mib": round(prepared.output_bytes / MIB, 2), "memory_method": "outputs, by arithmetic"}


def _finish_on_gpu(rows: dict[str, Row], runners: dict[str, Runner], prepared: Prepared) -> None:
    """Memory by the allocator, in this process, and the clocks after the race."""
    for contestant in prepared.contestants:
        row = rows[contestant.name]
        if contestant.role != "floor" and row["time_ms"]:
            try:
                memory = gpu.peak_memory(runners[contestant.name])
            except Exception as error:
                row["memory_method"] = _describe(error)
            else:
                row |= {"memory_mib": round(memory.extra_mib, 2), "memory_method": memory.method}
        if row["time_ms"]:
            row["kernels"] = gpu.kernels(runners[contestant.name])
        row["clocks"] = gpu.clocks() if contestant.role == "floor" else ""


def _add_memory(row: Row, suite: Suite, case: Case, contestant: Contestant, settings: Settings) -> None:
    try:
        memory: Memory = peak_memory(suite.name, case.label, contestant.name, settings)
    except Exception as error:
        row["memory_method"] = _describe(error)
    else:
        row |= {"memory_mib": round(memory.extra_mib, 2), "memory_method": memory.method}
