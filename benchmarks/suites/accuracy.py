"""Errors against float64 on the same inputs, by dtype, plan and contestant: ours, its PyTorch specification, and every peer.

    logp, entropy     the largest absolute error of a row, in nats
    elbo256           the largest absolute error of a sum of 256 log-probs, in nats: what an importance ratio exponentiates
    gradient          |got - true| / |true|, the larger of hidden states' and weight's

The contestants, inputs and the float64 oracle are those of the suite `head`. One of ours beyond that suite's tolerance is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from benchmarks import plots
from benchmarks.registry import DTYPES, Case, Contestant, Prepared, Result, Row, Settings, Study
from benchmarks.suites import head

SIZES = {"N": 512, "H": 256, "V": 32003}
FULL = {"N": 1024, "H": 1024, "V": 32003}
TOKENS = 256  # of a sequence whose log-probs are summed
PLANS = ("forward", "unit", "coef", "sample")
COLUMNS = ("logp", "elbo256", "entropy", "gradient")


def sizes_of(settings: Settings) -> dict[str, int]:
    return {**(head.TINY if settings.tiny else FULL if settings.full else SIZES), **settings.shape}


def _cases(settings: Settings) -> list[tuple[str, Case]]:
    """Each plan in each dtype; a run's --dtype leaves only that one, unless it is the default."""
    names = list(DTYPES) if settings.dtype == "float32" else [settings.dtype]
    shape = sizes_of(settings)
    found = []
    for name in names:
        own = replace(settings, dtype=name, shape=shape)
        found += [(name, case) for case in head.cases(own) if case.name in PLANS and settings.cases in ((), (case.name,))]
    return found


def elbo_error(result: Result, true_logp_N: torch.Tensor) -> float:
    """Of the sums over consecutive `TOKENS` rows (all rows, where there are fewer)."""
    difference_N = result["logp"].double()[: len(true_logp_N)] - true_logp_N
    whole = max(TOKENS, len(difference_N) // TOKENS * TOKENS)
    return float(torch.stack([part.sum() for part in difference_N[:whole].split(TOKENS)]).abs().max())


def measure(settings: Settings) -> dict[str, Any]:
    rows: list[Row] = []
    for dtype, case in _cases(settings):
        prepared = case.setup(case.sizes)
        for contestant in prepared.contestants:
            if contestant.role != "floor" and settings.runs(contestant):
                rows.append(_row(dtype, case, prepared, contestant))
    return {"rows": rows, "summary": summary(rows)}


def _row(dtype: str, case: Case, prepared: Prepared, contestant: Contestant) -> Row:
    row: Row = {
        "case": f"{case.name} {dtype}",
        "plan": case.name,
        "dtype": dtype,
        "sizes": dict(case.sizes),
        "contestant": contestant.name,
        "role": contestant.role,
        "status": "ok",
        "reason": "",
        "errors": {},
    }
    if contestant.make is None:
        return {**row, "status": "absent", "reason": contestant.absent}
    try:
        result = contestant.make()()
        errors = prepared.errors(result)
        if case.name != "sample" and isinstance(prepared.errors, head.Oracle):
            errors["elbo256"] = elbo_error(result, prepared.errors.true_logp_N)
    except Exception as error:
        return {**row, "status": "failed", "reason": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
    over = [
        f"{n} error {errors[n]:.1e} above {limit:.0e}" for n, limit in case.tolerance.items() if not errors.get(n, 0.0) <= limit
    ]
    wrong = bool(over) and contestant.role != "peer"
    return {**row, "errors": errors, "status": "wrong" if wrong else "ok", "reason": "; ".join(over) if wrong else ""}


def summary(rows: Sequence[Row]) -> str:
    parts = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):

        def worst(name: str, pick: Callable[[Row], bool], dtype: str = dtype) -> float:
            return max((row["errors"].get(name, 0.0) for row in rows if row["dtype"] == dtype and pick(row)), default=0.0)

        ours = worst("elbo256", lambda row: row["contestant"] == "ours")
        eager = worst("elbo256", lambda row: row["contestant"] == "eager")
        parts.append(f"{dtype} {ours:.1e} (eager {eager:.1e})")
    return "error of a 256-token ELBO sum in nats: " + ", ".join(parts)


def table(rows: Sequence[Row]) -> Table:
    found = Table(title="accuracy · errors against float64 on the same inputs", title_justify="left", title_style="bold")
    for name in ("plan, dtype", "contestant"):
        found.add_column(name, no_wrap=True)
    for name in COLUMNS:
        found.add_column(name, justify="right", no_wrap=True)
    found.add_column("note")
    previous = None
    for row in rows:
        if previous not in (None, row["case"]):
            found.add_section()
        cells = [f"{row['errors'][name]:.1e}" if name in row["errors"] else "-" for name in COLUMNS]
        note = "" if row["status"] == "ok" else f"{row['status'].upper()}: {row['reason']}"
        found.add_row("" if row["case"] == previous else row["case"], row["contestant"], *cells, note)
        previous = row["case"]
    return found


def plot(rows: Sequence[Row], path: Path) -> None:
    """The error of a 256-token ELBO sum by dtype and contestant."""
    points = {
        dtype: {
            row["contestant"]: row["errors"]["elbo256"] for row in rows if row["case"] == f"forward {dtype}" and row["errors"]
        }
        for dtype in dict.fromkeys(row["dtype"] for row in rows)
    }
    plots.grouped(points, "error of a 256-token ELBO sum against float64, nats", path)


def check(settings: Settings) -> None:
    if settings.shape and settings.shape["N"] % TOKENS and not settings.tiny:
        raise ValueError(f"--shape of accuracy takes N a multiple of {TOKENS}, got {settings.shape['N']}")


def listing(settings: Settings) -> Sequence[str]:
    return [f"{case.label} {dtype}" for dtype, case in _cases(settings)]


SUITE = Study(
    name="accuracy",
    title="errors against float64 of logp, entropy, ELBO sums of 256 tokens and gradients, beside everybody's",
    check=check,
    measure=measure,
    listing=listing,
    table=table,
    shape_keys=("N", "H", "V"),
    required_shape=("N", "H", "V"),
    plot=plot,
)
