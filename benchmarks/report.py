"""Result files as text: tables for the screen and Markdown, summaries, and the comparison of two runs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.registry import Row, Suite

SMALLEST_CHANGE = 0.05  # of the median; two runs of the same code differ by as much
SMALLEST_MEMORY_MIB = 4.0
STYLES = {"ours": "bold green", "reference": "green", "peer": "", "floor": "dim"}
Columns = Mapping[str, Callable[[Row], str]]

# --- figures ------------------------------------------------------------------------------------------------


def digits(value: float) -> str:
    """Three significant digits, and no exponent above 1."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def two_digits(value: float) -> str:
    """Two significant digits, and an exponent only where there would be many zeros."""
    if value == 0:
        return "0"
    if abs(value) >= 1e6 or abs(value) < 1e-4:
        return f"{value:.1e}"
    if abs(value) >= 10:
        return f"{value:.0f}"
    return f"{float(f'{value:.2g}'):.6f}".rstrip("0").rstrip(".")


def two_places(value: float) -> str:
    return f"{value:.2f}"


def interval(figure: Mapping[str, float]) -> str:
    return f"{two_digits(figure['value'])} [{two_digits(figure['low'])}, {two_digits(figure['high'])}]"


def percent(figure: Mapping[str, float]) -> str:
    return f"{100 * figure['value']:.0f} % [{100 * figure['low']:.0f}, {100 * figure['high']:.0f}]"


def known(value: float | None, form: Callable[[float], str] = digits, missing: str = "–") -> str:
    return missing if value is None else form(value)


def one_digit(value: float) -> str:
    return f"{value:.1e}"


def verdict(row: Row, mark: Callable[[str], str] = str) -> str:
    """What stands in the last column where a row is not ok."""
    return f"{mark(row['status'])}: {row['reason']}"


def operations(row: Row, missing: str = "-") -> str:
    """GFLOP as counted, and by formula in brackets."""
    counted, formula = (f"{row[key] / 1e9:.4g}" if row[key] else missing for key in ("flops_counted", "flops_by_formula"))
    return counted if formula == missing else f"{counted} ({formula})"


# --- Markdown -----------------------------------------------------------------------------------------------


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]], rule: str = " --- ") -> str:
    first, *rest = ["| " + " | ".join(line) + " |" for line in (head, *lines)]
    return "\n".join([first, "|" + f"{rule}|" * len(head), *rest])


def caption(result: Mapping[str, Any]) -> str:
    """Commands, and what they ran on; of one run, or of the `runs` that a result was put together from."""
    alike: dict[str, list[str]] = {}
    for run in result.get("runs", [result]):
        environment = run["environment"]
        versions = ", ".join(
            f"{name} {version}" for name, version in environment["versions"].items() if version != "not installed"
        )
        where = f"{environment['cpu']} ({environment['head']}), torch {environment['torch']}, transformers "
        where += f"{environment['transformers']}, {versions}, commit {(environment['git_commit'] or 'unknown')[:12]}"
        told = f"`{run['command']}` ({environment['threads']} threads, load before {environment['load_average']})"
        alike.setdefault(where, []).append(told)
    return "\n\n".join(f"On {where}: {', '.join(commands)}." for where, commands in alike.items())


def every_row(result: Mapping[str, Any]) -> str:
    """A section per suite: all rows of what was timed, absent and failed ones with their reasons."""
    parts = [caption(result)]
    for name, entry in result["suites"].items():
        if "time_ms" in entry["rows"][0] and name != "variance":
            figure = f"![{name}](../benchmarks/results/{entry['figure']})"
            parts.append(f"## {name}\n\n{entry['summary']}.\n\n{figure}\n\n{_timed(entry['rows'])}")
    if accuracy := result["suites"].get("accuracy"):
        parts.append(f"## accuracy\n\n{accuracy['summary']}.\n\n{_accuracy(accuracy['rows'])}")
    return "\n\n".join(parts)


def _timed(rows: Sequence[Row]) -> str:
    head = [
        "case",
        "contestant",
        "ms [quartiles]",
        "over limit",
        "over baseline",
        "extra MiB",
        "GFLOP (formula)",
        "errors",
        "note",
    ]
    lines, previous = [], ""
    for row in rows:
        time = row["time_ms"]
        spread = f" [{digits(time['q1'])}, {digits(time['q3'])}]" if time and time["runs"] else ""
        cells = [
            "" if row["case"] == previous else row["case"].replace(",", ", "),
            row["contestant"],
            f"{digits(time['median'])}{spread}" if time else "–",
            known(row["to_floor"], two_places),
            known(row["to_baseline"], two_places),
            known(row["memory_mib"]),
            operations(row, "–"),
            ", ".join(f"{name} {value:.0e}" for name, value in row["errors"].items()) or "–",
            row["note"] if row["status"] == "ok" else verdict(row),
        ]
        previous = row["case"]
        lines.append([cell.replace("|", "/") for cell in cells])
    return markdown(head, lines, "---")


def _accuracy(rows: Sequence[Row]) -> str:
    names = ("logp", "elbo256", "entropy", "gradient")
    lines = [
        [
            row["case"],
            row["contestant"],
            *(known(row["errors"].get(name), one_digit) for name in names),
            "" if row["status"] == "ok" else verdict(row),
        ]
        for row in rows
    ]
    return markdown(["plan, dtype", "contestant", *names, "note"], lines, "---")


# --- the screen ---------------------------------------------------------------------------------------------


def console() -> Console:
    """As wide as the terminal, or wide enough for a log file."""
    plain = Console(highlight=False)
    return plain if plain.is_terminal else Console(highlight=False, width=180)


def header(environment: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    commit = (environment["git_commit"] or "no commit")[:12]
    machine = environment["cpu"] if settings["device"] == "cpu" else environment["gpu"]
    return (
        f"{machine}, {environment['clocks']}, {environment['threads']} threads, torch {environment['torch']}, "
        f"dllm_kernels {environment['dllm_kernels']} ({commit}), head: {environment['head']}, "
        f"{settings['dtype']}, load {environment['load_average']}"
    )


def table(name: str, title: str, rows: Sequence[Row], label: Callable[[Row], str], columns: Columns) -> Table:
    """A line per row: its case (once), the contestant, `columns`, and a note."""
    found = Table(title=f"{name} · {title}", title_justify="left", title_style="bold", header_style="bold")
    found.add_column("case", no_wrap=True)
    found.add_column("contestant", no_wrap=True)
    for column in columns:
        found.add_column(column, justify="right", no_wrap=True)
    found.add_column("note")
    previous = None
    for row in rows:
        if previous not in (None, row["case"]):
            found.add_section()
        note = row.get("note", "") if row["status"] == "ok" else verdict(row, lambda status: f"[red]{status.upper()}[/]")
        if row["status"] == "ok" and row.get("memory_method") and row["memory_mib"] is None and row["role"] != "floor":
            note = f"no memory figure: {row['memory_method']}"
        case = "" if row["case"] == previous else label(row)
        cells = (form(row) for form in columns.values())
        found.add_row(case, row["contestant"], *cells, note, style=STYLES[row["role"]])
        previous = row["case"]
    return found


def timed_columns(suite: Suite, rows: Sequence[Row]) -> dict[str, Callable[[Row], str]]:
    """What is measured of every contestant of a race."""

    def quartiles(row: Row) -> str:
        time = row["time_ms"]
        return f"{digits(time['q1'])} - {digits(time['q3'])}" if time and time["runs"] else "-"

    found: dict[str, Callable[[Row], str]] = {
        "ms": lambda row: digits(row["time_ms"]["median"]) if row["time_ms"] else "-",
        "quartiles": quartiles,
        "x floor": lambda row: known(row["to_floor"], two_places, "-"),
        f"x {suite.baseline}": lambda row: known(row["to_baseline"], two_places, "-"),
        "extra MiB": lambda row: known(row["memory_mib"], lambda mib: f"{mib:.1f}", "-"),
        "GFLOP (formula)": operations,
        **error_columns(suite.error_columns, " err"),
    }
    if all(row["role"] != "floor" for row in rows):
        del found["x floor"]
    return found


def error_columns(names: Sequence[str], suffix: str = "") -> dict[str, Callable[[Row], str]]:
    return {name + suffix: lambda row, name=name: known(row["errors"].get(name), one_digit, "-") for name in names}  # type: ignore[misc]


def on_two_lines(row: Row) -> str:
    """A case's label: its name, its sizes."""
    sizes = ",".join(f"{key}={value}" for key, value in row["sizes"].items())
    return str(row["case"]).replace(f" {sizes}", f"\n{sizes}", 1)


def arithmetic_table(suite: Suite, entries: Sequence[Mapping[str, Any]]) -> Table:
    title = f"{suite.name} · computed, not measured: {suite.arithmetic_title}"
    found = Table(title=title, title_justify="left", title_style="bold")
    for name in entries[0]:
        found.add_column(name, justify="right", no_wrap=True)
    for entry in entries:
        found.add_row(*(str(value) for value in entry.values()))
    return found


# --- a suite in a sentence ----------------------------------------------------------------------------------


def family(row: Row) -> str:
    """What cases that differ in sizes or in the number of samples share: the rest of their name."""
    return re.sub(r"\W*n_t=\d+$", "", str(row["case"]).split(" ")[0])


def summary(suite: Suite, rows: Sequence[Row]) -> str:
    """Per family of cases our time and memory beside the baseline's, growth with K; then our errors."""
    fine = [row for row in rows if row["status"] == "ok"]
    others = {row["case"]: row for row in fine if row["contestant"] == suite.baseline}
    families: dict[tuple[str, str], list[Row]] = {}
    for row in fine:
        if row["role"] == "ours" and row["to_baseline"]:
            families.setdefault((family(row) or suite.name, row["contestant"]), []).append(row)
    parts = []
    for (name, who), members in families.items():
        said = [f"{_range([row['to_baseline'] for row in members])} x {suite.baseline}'s time"]
        if suite.measured_floor and all(row["to_floor"] for row in members):
            said.append(f"{_range([row['to_floor'] for row in members])} x the floor's")
        own, other = members[-1], others.get(members[-1]["case"])
        curve = len(members) > 1 and len({re.sub(r"\d+", "", row["case"]) for row in members}) == 1  # over K
        if other and own["memory_mib"] and other["memory_mib"]:
            less = other["memory_mib"] / own["memory_mib"]
            where = f" at K = {own['sizes']['K']}" if curve and "K" in own["sizes"] else ""
            said.append(f"{digits(own['memory_mib'])} MiB beside {digits(other['memory_mib'])} ({less:.1f} x less){where}")
        # from 2 on: only the first backward has no earlier gradients to be added to
        grown = [row for row in members if curve and row["memory_mib"] and row["sizes"].get("K", 0) > 1]
        if len(grown) > 1:
            said.append(f"{grown[-1]['memory_mib'] / grown[0]['memory_mib'] - 1:+.0%} from K = {grown[0]['sizes']['K']}")
        parts.append(f"{name}{'' if who == 'ours' else f', {who}'}: {', '.join(said)}")
    if not parts:
        return f"ours did not run beside {suite.baseline}"
    for key in suite.error_columns:
        if errors := [row["errors"][key] for row in fine if row["role"] == "ours" and key in row["errors"]]:
            parts.append(f"our largest {key} error {max(errors):.0e}")
    return "; ".join(parts)


def _range(values: Sequence[float]) -> str:
    low, high = two_digits(min(values)), two_digits(max(values))
    return low if low == high else f"{low} to {high}"


# --- two runs -----------------------------------------------------------------------------------------------


def compare(base: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[list[str], int]:
    """What changed beyond the spread between two result files, and how many changes are for the worse."""
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
            yield f"time {digits(was['median'])} -> {digits(now['median'])} ms (x{ratio:.2f})", ratio > 1
    if old.get("memory_mib") is not None and new.get("memory_mib") is not None:
        growth = new["memory_mib"] - old["memory_mib"]
        if abs(growth) > max(SMALLEST_MEMORY_MIB, SMALLEST_CHANGE * old["memory_mib"]):
            yield f"extra memory {old['memory_mib']:.1f} -> {new['memory_mib']:.1f} MiB", growth > 0
    for name in old["errors"].keys() & new["errors"].keys():
        was_error, now_error = old["errors"][name], new["errors"][name]
        if not 0.5 * was_error <= now_error <= 2 * was_error and max(was_error, now_error) > 1e-7:
            yield f"{name} error {was_error:.1e} -> {now_error:.1e}", not now_error < was_error
