"""What the cells of a comparison say: the rate of each algorithm, a row of the table, what is missing; compare.md."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ..records.report import markdown_table
from ..train.evaluation import paired_gain
from .compare_cells import CHECKPOINT, COUNTS, Cell, Entry, cell_of

Result = Mapping[str, Any]  # of compare.json

_HEADINGS = (
    *("algorithm", "rate", "updates", "SFT (%)", "+ RL (%)", "gain"),
    *("forwards", "backwards", "TFLOP", "seconds", "peak MB"),
)


def chosen(cells: Sequence[Entry], algorithm: str, rates: Sequence[float]) -> float | None:
    """Of the sweep's rates that with most right answers, of equal ones the lowest; one whose run failed is no choice.

    None while a cell of the sweep is missing, and where all failed.
    """
    own = [e for e in cells if e["phase"] == "sweep" and e["algorithm"] == algorithm and e["rate"] in rates]
    whole = [entry for entry in own if entry["failed"] is None]
    if len(own) < len(rates) or not whole:
        return None
    best: float = min(whole, key=lambda entry: (-entry["right"]["rollout"]["correct"], entry["rate"]))["rate"]
    return best


def rate_of(result: Result, algorithm: str) -> float | None:
    rates = result["rates"]
    return rates[0] if len(rates) == 1 else chosen(result["cells"], algorithm, rates)


def missing(result: Result) -> list[Cell]:
    """The cells that the settings ask for and that are not there; finals only where the rate is known."""
    there = {cell_of(entry) for entry in result["cells"]}
    names, rates, seeds = result["algorithms"], result["rates"], result["seeds"]
    wanted = [Cell("sweep", name, rate, 0) for name in names for rate in rates if len(rates) > 1]
    wanted += [Cell("checkpoint", CHECKPOINT, None, seed) for seed in seeds]
    known = {name: rate for name in names if (rate := rate_of(result, name)) is not None}
    wanted += [Cell("final", name, rate, seed) for name, rate in known.items() for seed in seeds]
    return [cell for cell in wanted if cell not in there]


def rows(result: Result) -> list[dict[str, Any]]:
    """One of each algorithm that has final cells: lists have an entry per seed that has run and did not fail.

    `failed` are the sentences of those that did; such a row has no means.
    """
    there = {cell_of(entry): entry for entry in result["cells"]}
    found = []
    for name in result["algorithms"]:
        rate = rate_of(result, name)
        if rate is None:
            continue
        runs = {seed: there[cell] for seed in result["seeds"] if (cell := Cell("final", name, rate, seed)) in there}
        failed = [
            f"seed {seed}, after {e['updates']} updates: {e['failed']}" for seed, e in runs.items() if e["failed"] is not None
        ]
        pairs = [
            (before["right"], run["right"])
            for seed, run in runs.items()
            if run["failed"] is None and (before := there.get(Cell("checkpoint", CHECKPOINT, None, seed))) is not None
        ]
        if not pairs and not failed:
            continue
        row: dict[str, Any] = {"algorithm": name, "rate": rate, "failed": failed, "updates": [], "improves": False}
        for way in ("rollout", "greedy"):
            sft, rl = ([pair[i][way]["correct"] for pair in pairs] for i in (0, 1))
            row[way] = {"sft": sft, "rl": rl, "gain": [b - a for a, b in zip(sft, rl, strict=True)]}
        for key in ("updates", *COUNTS, "seconds", "peak_memory_mb"):
            row[key] = [run[key] for run in runs.values() if run["failed"] is None]
        if pairs and not failed:
            paired = [paired_gain(before["rollout"], after["rollout"]) for before, after in pairs]
            row["improves"] = improves(row["rollout"]["gain"], paired)
        found.append(row)
    return found


def improves(gains: Sequence[float], paired: Sequence[Mapping[str, float]]) -> bool:
    """Whether the mean gain over SFT is above 0 by a one-sided 95 % test over seeds; of one seed, by its paired interval."""
    mean = statistics.fmean(gains)
    if len(gains) == 1:
        return paired[0]["low"] > 0
    return mean > 0 and mean > _STUDENT.get(len(gains), 1.645) * statistics.stdev(gains) / math.sqrt(len(gains))


_STUDENT = {2: 6.314, 3: 2.920, 4: 2.353, 5: 2.132, 6: 2.015, 7: 1.943, 8: 1.895, 9: 1.860, 10: 1.833}  # 95 %, by seeds


def curves(result: Result) -> dict[str, list[list[tuple[int, float]]]]:
    """By algorithm and final run: (forwards so far, reward of the rollouts) of each update."""
    found: dict[str, list[list[tuple[int, float]]]] = {}
    for entry in result["cells"]:
        name = entry["algorithm"]
        if entry["phase"] == "final" and entry["rate"] == rate_of(result, name) and entry["updates"]:
            spent = itertools.accumulate(entry["curve"]["forwards"])
            found.setdefault(name, []).append(list(zip(spent, entry["curve"]["reward"], strict=True)))
    return {name: found[name] for name in result["algorithms"] if name in found}


def table(rows_of_result: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a line per row, in the order of their recipes."""
    return "\n".join(markdown_table(_HEADINGS, [_cells(row) for row in rows_of_result]))


def sweeps(result: Result) -> str:
    """Markdown: right answers of the validation examples by algorithm and rate, in %, the chosen one bold."""
    by_cell = {cell_of(entry): entry for entry in result["cells"] if entry["phase"] == "sweep"}
    lines = []
    for name in result["algorithms"]:
        taken, texts = rate_of(result, name), []
        for rate in result["rates"]:
            entry = by_cell.get(Cell("sweep", name, rate, 0))
            text = "not run" if entry is None else "failed"
            if entry is not None and entry["failed"] is None:
                text = f"{100 * entry['right']['rollout']['correct']:.1f}"
            texts.append(f"**{text}**" if rate == taken else text)
        lines.append([name, *texts])
    return "\n".join(markdown_table(("algorithm", *(f"{rate:g}" for rate in result["rates"])), lines))


def verdict(rows_of_result: Sequence[Mapping[str, Any]]) -> str:
    if not rows_of_result:
        return "No final run has ended."
    failed = [row["algorithm"] for row in rows_of_result if row["failed"]]
    worse = [row["algorithm"] for row in rows_of_result if not row["improves"] and not row["failed"]]
    told = [f"Failed: {', '.join(failed)}."] if failed else []
    told += [f"Not shown to improve over SFT: {', '.join(worse)}."] if worse else []
    return " ".join(told) or "All improve over SFT."


def notes(result: Result) -> list[str]:
    """What a reader must know beside the tables: edges of the grid, failures, what is missing."""
    grid, found = result["rates"], []
    if len(grid) > 1:
        taken = {name: rate_of(result, name) for name in result["algorithms"]}
        for word, edge in (("lowest", grid[0]), ("highest", grid[-1])):
            if names := [name for name, rate in taken.items() if rate == edge]:
                found.append(f"At the {word} rate of the grid, so that a better one may lie beyond: {', '.join(names)}.")
        swept = {name: [e for e in result["cells"] if e["phase"] == "sweep" and e["algorithm"] == name] for name in taken}
        if names := [name for name, own in swept.items() if len(own) >= len(grid) and taken[name] is None]:
            found.append(f"Failed at every rate, so without a row: {', '.join(names)}.")
    failures = [f"{cell_of(e)}, after {e['updates']} updates: {e['failed']}" for e in result["cells"] if e["failed"] is not None]
    if failures:
        found.append(f"Failed, and in no mean: {'; '.join(failures)}.")
    if lacking := missing(result):
        unswept = sorted({cell.algorithm for cell in lacking if cell.of_sweep})
        told = [f"{sum(c.of_sweep for c in lacking)} of the sweep ({', '.join(unswept)})"] if unswept else []
        if rest := len([cell for cell in lacking if not cell.of_sweep]):
            told.append(f"{rest} final ones of algorithms whose rate is chosen")
        found.append(f"**Not complete: missing are {' and '.join(told)}.**")
    return found


def describe(result: Result) -> str:
    """compare.md: both tables, who does not improve, what is missing, and how to read it."""
    found = rows(result)
    notes_of_reading = (
        f"Right answers on {result['examples']} held-out examples at temperature {result['temperature']:g}, mean and deviation "
        "over the seeds of noise and order that have run; the data are the same. Rates were chosen on "
        f"{result['validation']} other examples, in runs of {result['sweep_budget']:,} forwards. An algorithm improves where a "
        "one-sided 95 % test over the seeds tells it (with one seed: the paired interval over the examples). A forward is one "
        "sequence through a model once; a run ends with the update that comes nearest to the budget. TFLOP by formula: 2 x "
        "parameters x tokens of a forward, as much again in backward, and 2 x trained parameters x tokens; attention's products "
        "of tokens with tokens are left out. Seconds are of rollouts and gradients alone. Peak memory is the largest of the "
        "seeds, each a process of its own."
    )
    title = f"# {result['task']} from {result['checkpoint']}: {result['budget']:,} forwards a run"
    parts = [title, table(found), verdict(found), *notes(result)]
    if len(result["rates"]) > 1:
        parts += ["## Learning rates: right answers of the validation examples, in %", sweeps(result)]
    return "\n\n".join([*parts, notes_of_reading]) + "\n"


def _cells(row: Mapping[str, Any]) -> list[str]:
    head = [row["algorithm"], f"{row['rate']:g}"]
    if row["failed"]:
        return [*head, f"failed: {len(row['failed'])} of {len(row['failed']) + len(row['updates'])} seeds", *["–"] * 8]
    way, seeds = row["rollout"], len(row["rollout"]["gain"])
    gain = f"{_spread(way['gain'], '+.1f')}{'' if row['improves'] else ' (not shown)'}"
    counts = [f"{statistics.fmean(row[key]):,.0f}" for key in ("forwards", "backwards")]
    tera = f"{statistics.fmean(row['flops']) / 1e12:.3g}"
    seconds, peak = f"{statistics.fmean(row['seconds']):.1f}", f"{max(row['peak_memory_mb']):.0f}"
    accuracies = [_spread(way[when], ".1f") for when in ("sft", "rl")]
    accuracies[1] += " (1 seed)" if seeds == 1 else ""
    return [*head, f"{statistics.fmean(row['updates']):.0f}", *accuracies, gain, *counts, tera, seconds, peak]


def _spread(values: Sequence[float], form: str) -> str:
    mean = format(100 * statistics.fmean(values), form)
    return mean if len(values) == 1 else f"{mean} ± {100 * statistics.stdev(values):.1f}"
