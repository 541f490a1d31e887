"""Result files: the tables on the screen, and the comparison of two runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.registry import Row, Suite

SMALLEST_CHANGE = 0.05  # of the median; two runs of the same code differ by as much
SMALLEST_MEMORY_MIB = 4.0
STYLES = {"ours": "bold green", "reference": "green", "peer": "", "floor": "dim"}


def table(suite: Suite, rows: Sequence[Row]) -> Table:
    found = Table(title=f"{suite.name} · {suite.title}", title_justify="left", title_style="bold", header_style="bold")
    found.add_column("case", no_wrap=True)
    found.add_column("contestant", no_wrap=True)
    has_floor = any(row["role"] == "floor" for row in rows)
    for name in ("ms", "quartiles", *(["x floor"] if has_floor else []), f"x {suite.baseline}", "extra MiB", "GFLOP (formula)"):
        found.add_column(name, justify="right", no_wrap=True)
    for name in suite.error_columns:
        found.add_column(f"{name} err", justify="right", no_wrap=True)
    found.add_column("note")
    previous = None
    for row in rows:
        if previous not in (None, row["case"]):
            found.add_section()
        time = row["time_ms"]
        cells = [
            "" if row["case"] == previous else _broken(row),
            row["contestant"],
            _digits(time["median"]) if time else "-",
            f"{_digits(time['q1'])} - {_digits(time['q3'])}" if time and time["runs"] else "-",
            *([_ratio(row["to_floor"])] if has_floor else []),
            _ratio(row["to_baseline"]),
            "-" if row["memory_mib"] is None else f"{row['memory_mib']:.1f}",
            _operations(row),
            *(f"{row['errors'][name]:.1e}" if name in row["errors"] else "-" for name in suite.error_columns),
            row["note"] if row["status"] == "ok" else f"[red]{row['status'].upper()}[/]: {row['reason']}",
        ]
        if row["status"] == "ok" and row["memory_mib"] is None and row["role"] != "floor":
            cells[-1] = f"no memory figure: {row['memory_method']}"
        found.add_row(*cells, style=STYLES[row["role"]])
        previous = row["case"]
    return found


def arithmetic_table(suite: Suite, entries: Sequence[Mapping[str, Any]]) -> Table:
    found = Table(
        title=f"{suite.name} · computed, not measured: {suite.arithmetic_title}", title_justify="left", title_style="bold"
    )
    for name in entries[0]:
        found.add_column(name, justify="right", no_wrap=True)
    for entry in entries:
        found.add_row(*(str(value) for value in entry.values()))
    return found


def header(environment: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    commit = (environment["git_commit"] or "no commit")[:12]
    machine = environment["cpu"] if settings["device"] == "cpu" else environment["gpu"]
    return (
        f"{machine}, {environment['clocks']}, {environment['threads']} threads, torch {environment['torch']}, "
        f"dllm_kernels {environment['dllm_kernels']} ({commit}), head: {environment['head']}, "
        f"{settings['dtype']}, load {environment['load_average']}"
    )


def console() -> Console:
    """As wide as the terminal, or wide enough for a log file."""
    plain = Console(highlight=False)
    return plain if plain.is_terminal else Console(highlight=False, width=180)


def _broken(row: Row) -> str:
    """The case's label on two lines: its name, its sizes."""
    sizes = ",".join(f"{key}={value}" for key, value in row["sizes"].items())
    return str(row["case"]).replace(f" {sizes}", f"\n{sizes}", 1)


def _operations(row: Row) -> str:
    """Counted, and by formula in brackets; "-" where nobody says."""
    counted, formula = ("-" if not row[key] else f"{row[key] / 1e9:.4g}" for key in ("flops_counted", "flops_by_formula"))
    return counted if formula == "-" else f"{counted} ({formula})"


def _digits(milliseconds: float) -> str:
    return f"{milliseconds:.3g}" if milliseconds < 100 else f"{milliseconds:.0f}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def compare(base: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[list[str], int]:
    """Sentences on what changed beyond the spread from one result file to another, and how many are for the worse."""
    lines = [
        f"environment differs: {key} was {base['environment'].get(key)}, is {new['environment'].get(key)}"
        for key in ("cpu", "gpu", "threads", "torch", "head")
        if base["environment"].get(key) != new["environment"].get(key)
    ]
    before = {_key(base, name, row): row for name, row in _rows(base)}
    worse = compared = 0
    for name, row in _rows(new):
        key = _key(new, name, row)
        old = before.get(key)
        if old is None:
            continue
        compared += 1
        for sentence, is_worse in _changes(old, row):
            worse += is_worse
            lines.append(f"{'WORSE ' if is_worse else 'better'} {' / '.join(key)}: {sentence}")
    lines.append(f"compared {compared} rows: {worse} worse")
    if compared == 0:
        lines.append("no row has a counterpart: the files differ in suites, sizes or dtype")
    return lines, worse


def _rows(results: Mapping[str, Any]) -> Iterator[tuple[str, Row]]:
    for name, suite in results["suites"].items():
        for row in suite["rows"]:
            yield name, row


def _key(results: Mapping[str, Any], suite: str, row: Row) -> tuple[str, ...]:
    return suite, results["settings"]["dtype"], row["case"], row["contestant"]


def _changes(old: Row, new: Row) -> Iterator[tuple[str, bool]]:
    if old["status"] != new["status"]:
        yield f"status {old['status']} -> {new['status']} {new['reason']}", new["status"] != "ok"
    was, now = old.get("time_ms"), new.get("time_ms")
    if was and now and now["runs"]:  # not what is computed
        ratio = now["median"] / was["median"]
        apart = now["q1"] > was["q3"] or now["q3"] < was["q1"]
        if apart and abs(ratio - 1) > SMALLEST_CHANGE:
            yield f"time {_digits(was['median'])} -> {_digits(now['median'])} ms (x{ratio:.2f})", ratio > 1
    if old.get("memory_mib") is not None and new.get("memory_mib") is not None:
        growth = new["memory_mib"] - old["memory_mib"]
        if abs(growth) > max(SMALLEST_MEMORY_MIB, SMALLEST_CHANGE * old["memory_mib"]):
            yield f"extra memory {old['memory_mib']:.1f} -> {new['memory_mib']:.1f} MiB", growth > 0
    for name in old["errors"].keys() & new["errors"].keys():
        was_error, now_error = old["errors"][name], new["errors"][name]
        if not 0.5 * was_error <= now_error <= 2 * was_error and max(was_error, now_error) > 1e-7:
            yield f"{name} error {was_error:.1e} -> {now_error:.1e}", not now_error < was_error
