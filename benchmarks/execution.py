"""One case through set-up, errors, time and memory: the rows of a result file."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from typing import Any

from torch.utils.flop_counter import FlopCounterMode

from benchmarks import measure as measuring
from benchmarks import report
from benchmarks.measure import MIB, ROUNDS, Memory, Timing, gflops_per_s, interleave, peak_memory
from benchmarks.registry import DTYPES, Case, Contestant, Oracle, Row, Runner, Settings, Suite, Work

# a peer that rounds its logits to 16 bits is worse than ours and still a peer; beyond this it does another
# job
PEER_SLACK = 100.0
LEAST_ROUNDS = 2  # a spread takes two
OUT_OF_TIME = "not measured: the case's share of --minutes was over"


def measure(suite: Suite, settings: Settings, seconds: float = math.inf) -> dict[str, Any]:
    """The entry of a result file: the rows of the cases, what is computed, the summary, and what was cut.

    In `seconds` cases have equal shares of what is left; with `--full` the first take what they need. A case takes fewer rounds
    where seven do not fit, and does without memory figures once its share is over; but for the first, cases that would begin too
    late are left out.
    """
    cases = [case for case in suite.cases(settings) if not settings.cases or case.name in settings.cases]
    rows: list[Row] = []
    cut: list[str] = []
    ends = time.monotonic() + seconds
    for number, case in enumerate(cases):
        left = ends - time.monotonic()
        if number and left <= 0:
            cut.append(f"{len(cases) - number} of {len(cases)} cases: {', '.join(case.name for case in cases[number:])}")
            break
        print(f"[{suite.name} {number + 1}/{len(cases)}] {case.label}", file=sys.stderr, flush=True)
        rows += measure_case(suite, case, settings, max(0.0, left / (1 if settings.full else len(cases) - number)))
    timed = [row for row in rows if row["time_ms"] and row["time_ms"]["runs"]]
    if fewer := sum(row["time_ms"]["runs"] < ROUNDS for row in timed):
        cut.append(
            f"rounds of {fewer} of {len(timed)} rows, down to {min(row['time_ms']['runs'] for row in timed)} from {ROUNDS}"
        )
    if without := sum(row["memory_method"] == OUT_OF_TIME for row in rows):
        cut.append(f"memory of {without} rows")
    return {"rows": rows, "arithmetic": suite.arithmetic(), "summary": report.summary(suite, rows), "cut": cut}


def measure_case(suite: Suite, case: Case, settings: Settings, seconds: float = math.inf) -> list[Row]:
    """Every contestant's row: `status` is ok, absent, failed or wrong, with a `reason` unless ok.

    Whatever raises becomes a row; nothing is dropped.
    """
    ends = time.monotonic() + seconds
    try:
        x = case.inputs(case.sizes)
        oracle = case.oracle(x)
    except Exception as error:
        return [_row(case, "all", "ours") | {"status": "failed", "reason": f"set-up: {_describe(error)}"}]
    contestants = [contestant for contestant in case.contestants if settings.runs(contestant)]
    rows = {contestant.name: _row(case, contestant.name, contestant.role) for contestant in contestants}
    works: dict[str, Work] = {}
    for contestant in contestants:
        row = rows[contestant.name]
        work = judged(row, case, contestant, x, oracle)
        if work is not None:
            row |= {"note": work.note, "flops_by_formula": work.flops, **_counted(work.run)}
            works[contestant.name] = work
    runners = {name: work.run for name, work in works.items()}
    first_s = {name: work.first_s for name, work in works.items()}
    fit = (ends - time.monotonic()) / max(1e-9, sum(first_s.values()))
    rounds = max(LEAST_ROUNDS, int(min(fit, ROUNDS)))
    timed = interleave(runners, first_s, settings.device, rounds)
    for name, timing in timed.items():
        if isinstance(timing, Timing):
            rows[name]["time_ms"] = timing.as_json()
            if (phases := works[name].phases) is not None:
                _add_phases(rows[name], phases())
        else:
            rows[name] |= {"status": "failed", "reason": _describe(timing)}
    if case.flops and all(contestant.role != "floor" for contestant in contestants):
        rows["limit"] = _limit(case, settings)
    _add_ratios(rows, suite, case.output_bytes(x))
    if settings.device != "cuda":
        works.clear()
        runners.clear()
    for contestant in contestants:
        row = rows[contestant.name]
        if not row["time_ms"]:
            continue
        if contestant.role != "floor" and time.monotonic() > ends:
            row["memory_method"] = OUT_OF_TIME
        elif contestant.role != "floor":
            row |= _memory(suite, case, contestant, settings, runners.get(contestant.name))
        if settings.device == "cuda":
            clocks = measuring.clocks("cuda") if contestant.role == "floor" else ""
            row |= {"kernels": measuring.kernels(runners[contestant.name]), "clocks": clocks}
    return list(rows.values())


def judged(row: Row, case: Case, contestant: Contestant, x: Any, oracle: Oracle, peer_slack: float = PEER_SLACK) -> Work | None:
    """Sets a contestant up, runs it once and fills in its row; returns None if it does not run."""
    try:
        if reason := contestant.applies(x):
            row |= {"status": "absent", "reason": reason}
            return None
        work = contestant.setup(x)
        started = time.perf_counter()
        result = work.run()
        work.first_s = time.perf_counter() - started
        errors = row["errors"] = oracle(result)
    except Exception as error:
        row |= {"status": "failed", "reason": _describe(error)}
        return None
    slack = peer_slack if contestant.role == "peer" else 1.0
    over = [
        f"{name} error {errors[name]:.1e} above {limit * slack:.0e}"
        for name, limit in case.tolerance.items()
        if name in errors and not errors[name] <= limit * slack  # a NaN is wrong
    ]
    if over:
        row |= {"status": "wrong", "reason": "; ".join(over)}
    return work


def _row(case: Case, name: str, role: str) -> Row:
    return {
        "case": case.label,
        "sizes": dict(case.sizes),
        "contestant": name,
        "role": role,
        "status": "ok",
        "reason": "",
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
    """Operations of one call by torch's counter and the library's formulas; foreign kernels count as 0."""
    try:
        with FlopCounterMode(display=False) as counter:
            runner()
    except Exception as error:  # a peer whose kernels cannot run under a dispatch mode may still be timed
        return {"flops_counted": None, "flops_reason": _describe(error)}
    return {"flops_counted": int(counter.get_total_flops())}


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def _add_phases(row: Row, seconds: Mapping[str, float]) -> None:
    row["phases_s"] = {name: round(value, 5) for name, value in seconds.items()}
    row["note"] += "".join(f"{', ' if row['note'] else ''}{name} {value:.2g} s" for name, value in seconds.items())


def _limit(case: Case, settings: Settings) -> Row:
    """The least arithmetic of the case at the rate of a bare matrix product: computed, not measured."""
    rate = gflops_per_s(DTYPES[case.dtype or settings.dtype], settings.device)
    milliseconds = round(case.flops / rate / 1e6, 5)
    return _row(case, "limit", "floor") | {
        "time_ms": {**dict.fromkeys(("median", "min", "q1", "q3"), milliseconds), "runs": 0},
        "note": f"{case.flops / 1e9:.4g} GFLOP at {rate:.0f} GFLOP/s, computed",
        "flops_by_formula": case.flops,
    }


def _add_ratios(rows: Mapping[str, Row], suite: Suite, output_bytes: int) -> None:
    medians = {name: row["time_ms"]["median"] for name, row in rows.items() if row["time_ms"]}
    floor = next((name for name, row in rows.items() if row["role"] == "floor"), "")
    for name, own in medians.items():
        row = rows[name]
        if operations := row["flops_counted"] or row["flops_by_formula"]:
            row["gflops_per_s"] = round(operations / own / 1e6, 1)
        for key, other in (("to_floor", medians.get(floor)), ("to_baseline", medians.get(suite.baseline))):
            row[key] = round(own / other, 4) if other else None
        if row["role"] == "floor" and output_bytes:
            row |= {"memory_mib": round(output_bytes / MIB, 2), "memory_method": "outputs, by arithmetic"}


def _memory(suite: Suite, case: Case, contestant: Contestant, settings: Settings, here: Runner | None) -> dict[str, Any]:
    """Of one call: by the allocator in this process where `here` is given, else in a process of its own."""
    try:
        memory: Memory = (
            measuring.allocator_peak(here) if here else peak_memory(suite.name, case.label, contestant.name, settings)
        )
    except Exception as error:
        return {"memory_method": _describe(error)}
    return {"memory_mib": round(memory.extra_mib, 2), "memory_method": memory.method}
