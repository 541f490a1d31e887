"""The runs of a comparison: what a cell is, what one finds, and the file that keeps those that are finished.

A cell is one run in a process of its own, a function of the comparison's settings and the cell alone: one that is killed leaves
nothing and is made again from its start, one that ends is a line of cells.jsonl and is never repeated.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import torch

from ..config import RunConfig
from ..distributed import Ranks
from ..errors import UserError
from ..records.environment import environment, peak_memory_mb
from ..tasks import Example, Task, make_task
from ..train.evaluation import decodings, evaluate
from ..train.guards import NoSignal
from ..train.optimization import learning_rates, make_optimizer
from ..train.rl import rl_updates
from ..train.run import autocast, prepare, reference_model
from ..train.setup import Setup

FILE = "cells.jsonl"
COUNTS = ("forwards", "backwards", "flops")
CHECKPOINT = "checkpoint"  # stands where a cell has no algorithm

Entry = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """`checkpoint`: what the checkpoint answers. `sweep`: a short run that a rate is chosen by. `final`: one of the table's."""

    phase: Literal["checkpoint", "sweep", "final"]
    algorithm: str
    rate: float | None  # learning rate; None: nothing is trained
    seed: int

    @property
    def of_sweep(self) -> bool:
        return self.phase == "sweep"

    def __str__(self) -> str:
        if self.rate is None:
            return f"{self.algorithm}, seed {self.seed}"
        return f"{self.algorithm}, {'sweep' if self.of_sweep else 'final'}, rate {self.rate:g}, seed {self.seed}"


def overrides(cell: Cell, task_seed: int) -> list[str]:
    """Keys of a cell's config over those of the comparison."""
    keys = [f"seed={cell.seed}", f"data_seed={task_seed}"]  # other data would have tests among what SFT was shown
    return keys if cell.rate is None else [*keys, f"rl.algorithm={cell.algorithm}", f"rl.lr={cell.rate!r}"]


def split(task: Task, validation: int) -> tuple[str, Sequence[Example], Sequence[Example]]:
    """(name of the first test set, its first examples for choices, the others for the table); no problem is in both."""
    name, examples = next(iter(task.tests.items()))
    chosen_by = examples[:validation]
    known = {example.problem or example.prompt for example in chosen_by}
    return name, chosen_by, [example for example in examples[validation:] if (example.problem or example.prompt) not in known]


def run_cell(config: RunConfig, cell: Cell, budget: int) -> Entry:
    """Trains from the checkpoint until `budget` forwards are spent, then answers the examples of the cell's phase.

    The learning rate follows the config's schedule over the share of the budget that is spent, whatever an update costs. What
    a user could mend, a guard that stopped the run among it, is the entry's `failed`, and nothing is then evaluated.
    """
    torch.set_num_threads(config.threads)
    entry: Entry = {"task": config.task.kind, **asdict(cell), "created": _now(), "git_commit": environment()["git_commit"]}
    figures: list[Mapping[str, float]] = []
    failed = None
    try:
        setup = prepare(config, make_task(config.task, seed=config.task_seed), Ranks())
        if cell.rate is not None:
            for made in updates(setup, budget):
                figures.append(made)
        name, validation, table = split(setup.task, config.evaluation.probe_examples)
        entry["right"] = _answers(setup, name, validation if cell.of_sweep else table)
    except UserError as error:
        failed = str(error)
    entry |= {key: int(sum(f[key] for f in figures)) for key in COUNTS}
    entry |= {"updates": len(figures), "seconds": round(sum(f["seconds"] for f in figures), 1)}
    curve = {key: [float(f"{f[key]:.4g}") for f in figures] for key in ("reward", "correct")}
    curve["forwards"] = [int(f["forwards"]) for f in figures]
    return entry | {"curve": curve, "peak_memory_mb": round(peak_memory_mb()), "failed": failed}


def updates(setup: Setup, budget: int) -> Iterator[Mapping[str, float]]:
    """Whole updates, as many as come nearest to `budget` forwards, at least one."""
    config = setup.config.rl
    setup.reference = reference_model(setup, lambda: copy.deepcopy(setup.trained))
    schedule = learning_rates("rl", config, config.updates)
    signal, spent = NoSignal(setup.config.guard), 0.0
    made = rl_updates(setup, make_optimizer(setup.trained, config), rate=lambda _: schedule(config.updates * spent / budget))
    while True:
        with autocast(setup):
            figures = next(made)
        signal.seen(figures)
        spent += figures["forwards"]
        yield figures
        if spent + figures["forwards"] / 2 >= budget:
            return


def _answers(setup: Setup, name: str, examples: Sequence[Example]) -> Entry:
    with autocast(setup):
        found = {way: evaluate(setup, name, examples, how) for way, how in decodings(setup.config.rollout).items()}
    return {way: {key: figures[key] for key in ("examples", "correct", "solved")} for way, figures in found.items()}


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


class CellFile:
    """cells.jsonl: a line per finished cell, in the order in which they ended."""

    def __init__(self, folder: Path):
        self._file = folder / FILE
        self.found: dict[Cell, Entry] = {}
        text = self._file.read_text(encoding="utf-8") if self._file.is_file() else ""
        whole = text[: text.rfind("\n") + 1]  # the process that wrote the rest was killed
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                entry = json.loads(line)
                self.found[cell_of(entry)] = entry
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(f"{self._file}, line {number}, is no entry of a comparison; remove that line") from error
        if whole != text:
            os.truncate(self._file, len(whole.encode()))

    def add(self, entry: Entry) -> None:
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.found[cell_of(entry)] = entry


def cell_of(entry: Mapping[str, Any]) -> Cell:
    return Cell(entry["phase"], entry["algorithm"], entry["rate"], entry["seed"])
