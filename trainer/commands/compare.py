"""`dllm-kernels compare`: algorithms from one checkpoint at equal model forwards, each at a learning rate chosen for it.

A forward is one sequence through a model once: rollouts, old and reference scores and gradients all count (`forward_counts.py`).
For every algorithm there are

    sweep   a run at each of the learning rates with a quarter of the forwards and seed 0, which answers the first
            `evaluation.probe_examples` examples of the first test set. The rate with most right answers at the rollout's
            temperature is taken; of equal ones the lowest; one whose run failed never.
    final   runs with seeds 1, 2, ... at that rate with all forwards, which answer the other examples of that test set; the
            checkpoint answers them too, with the same seeds.

Every run is a cell, see `compare_cells.py`; the same command goes on where it was stopped, and with more seeds, rates or
algorithms it runs what is missing. The report says what still is.
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

from rich.console import Console

from dllm_kernels.objectives import RECIPES

from ..config import RunConfig
from ..distributed import Ranks
from ..errors import UserError, telling_of_algorithms
from ..models.loading import check_place
from ..records.environment import environment
from ..records.plots import draw_rewards
from ..records.run_dir import RunDir
from ..tasks import make_task
from ..train.foreign_code import announce_code
from ..train.run import prepare
from . import compare_cells
from .compare_cells import CHECKPOINT, Cell, CellFile, Entry, overrides, run_cell, split
from .compare_report import chosen, curves, describe, missing

Configure = Callable[[list[str]], RunConfig]

SWEEP_SHARE = 4  # a sweep's run has so many times fewer forwards


def compare_algorithms(
    configure: Configure,
    algorithms: str,
    seeds: int,
    forwards: int | None,
    out: Path,
    console: Console,
    *,
    rates: str | None = None,
    jobs: int = 1,
) -> dict[str, Any]:
    """Runs the cells that `out` lacks, then writes compare.json, compare.md and rewards.png into it.

    Args:
        configure: a config of RL from the checkpoint, with further overrides. algorithms: names, comma-separated, or "all".
        seeds: final runs of each algorithm. forwards: of a final run; None: those of the rollouts of `rl.updates` updates.
        rates: learning rates, comma-separated, one for no sweep; None: a third of `rl.lr`, itself, three times it.
        jobs: cells at once.

    Returns what compare.json holds. Raises UserError for unknown names and rates, where `out` holds a comparison under other
    settings, and where processes ended without a result: the same command makes these cells again.
    """
    names = _names(algorithms)
    if forwards is not None and forwards < 1:
        raise UserError(f"--forwards must be at least 1, got {forwards}")
    base = configure([f"rl.algorithm={names[0]}"])
    if base.rollout.engine != "ours":
        raise UserError(
            "rollout.engine must be ours for a comparison, whose budget counts the forwards of this process, got "
            f"{base.rollout.engine}"
        )
    for name in names:
        if not configure([f"rl.algorithm={name}"]).rl.updates:
            raise UserError(
                "rl.updates must be at least 1 for a comparison, got 0: the checkpoint's run made none; set rl.updates"
            )
    grid = _rates(rates, base.rl.lr)
    announce_code(base)
    budget, examples = _sizes(base, forwards)
    out.mkdir(parents=True, exist_ok=True)
    folder = RunDir(out)
    folder.lock()
    try:
        settings: dict[str, Any] = {
            "task": base.task.kind,
            "checkpoint": base.model.checkpoint,
            "temperature": base.rollout.temperature,
            "budget": budget,
            "sweep_budget": max(1, budget // SWEEP_SHARE),
            **examples,
            "config": _shared(configure([])),
        }
        _keep_settings(folder, settings)
        cells, finals, told = CellFile(out), range(1, seeds + 1), environment()

        def report() -> dict[str, Any]:
            found = {"rates": grid, "seeds": list(finals), "environment": told, "cells": list(cells.found.values())}
            result = {**settings, "algorithms": names, **found}
            folder.write_json("compare.json", result)
            folder.write_text("compare.md", describe(result))
            return result

        def run(wanted: Iterable[Cell]) -> None:
            pending = [cell for cell in wanted if cell not in cells.found]
            configs = {cell: configure(overrides(cell, base.task_seed)) for cell in pending}
            budgets = {cell: settings["sweep_budget"] if cell.of_sweep else budget for cell in pending}
            _run_all(configs, budgets, cells, jobs, console, report)

        if len(grid) > 1:
            run(Cell("sweep", name, rate, 0) for name in names for rate in grid)
        run(Cell("checkpoint", CHECKPOINT, None, seed) for seed in finals)
        found = list(cells.found.values())
        best = {name: grid[0] if len(grid) == 1 else chosen(found, name, grid) for name in names}
        run(Cell("final", name, rate, seed) for seed in finals for name, rate in best.items() if rate is not None)
        result = report()
        if drawn := curves(result):
            draw_rewards(drawn, out / "rewards.png")
    finally:
        folder.close()
    text = describe(result)
    console.print(text, highlight=False, soft_wrap=True, markup=False)
    if lacking := missing(result):
        raise UserError(f"{len(lacking)} cells ended without a result, {lacking[0]} first; the same command makes them again")
    return result


@telling_of_algorithms()
def _names(algorithms: str) -> list[str]:
    everyone = [name for name, recipe in RECIPES.items() if not recipe.teacher]  # what learns from rewards alone
    names = everyone if algorithms == "all" else list(dict.fromkeys(n.strip() for n in algorithms.split(",") if n.strip()))
    for name in names:
        if name not in RECIPES:
            raise UserError(f"--algorithms: {name} is unknown; there are {', '.join(RECIPES)}")
    if not names:
        raise UserError("--algorithms must name at least one algorithm, got none")
    return names


def _rates(text: str | None, own: float) -> list[float]:
    if text is None:
        return [float(f"{own / 3:.1e}"), own, float(f"{own * 3:.1e}")]
    try:
        rates = sorted({float(part) for part in text.split(",")})
    except ValueError as error:
        raise UserError(f"--rates must be numbers with commas between them, got {text}") from error
    if not all(0 < rate < 1 for rate in rates):
        raise UserError(f"--rates must lie between 0 and 1, got {text}")
    return rates


def _sizes(config: RunConfig, forwards: int | None) -> tuple[int, dict[str, int]]:
    """The budget, and how many examples choose a rate and fill the table. Raises UserError where there are too few."""
    assert config.model.checkpoint is not None
    check_place(config.model.checkpoint)
    task = make_task(config.task, seed=config.task_seed)
    if not task.tests:
        raise UserError("compare needs a task with a test set: held-out accuracy is what it compares")
    name, validation, table = split(task, config.evaluation.probe_examples)
    if not table:
        raise UserError(
            f"the test set {name} must have more examples than evaluation.probe_examples={config.evaluation.probe_examples}, "
            f"by which rates are chosen; it has {len(validation)}"
        )
    steps = prepare(config, task, Ranks()).steps  # a checkpoint that cannot be used is told here, before any cell runs
    if forwards is None:
        forwards = config.rl.updates * config.rl.prompts * config.rl.group * steps
    return forwards, {"validation": len(validation), "examples": len(table)}


def _shared(config: RunConfig) -> str:
    """The config of all cells, without what differs between them."""
    return config.model_copy(update={"out": "", "seed": 0, "data_seed": config.task_seed}).to_yaml()


def _keep_settings(folder: RunDir, settings: Mapping[str, Any]) -> None:
    """Written once. Raises UserError where others are there: cells of two comparisons must not meet in one table."""
    if (folder.path / "settings.json").is_file():
        known = folder.read_json("settings.json")
        if wrong := [key for key, value in settings.items() if known.get(key) != value]:
            told = "" if wrong[0] == "config" else f": {known.get(wrong[0])}, now {settings[wrong[0]]}"
            raise UserError(f"{folder.path} holds a comparison with another {wrong[0]}{told}; give another --out")
    else:
        folder.write_json("settings.json", settings)


def _run_all(
    configs: Mapping[Cell, RunConfig],
    budgets: Mapping[Cell, int],
    cells: CellFile,
    jobs: int,
    console: Console,
    report: Callable[[], object],
) -> None:
    """`jobs` at once, each in a process that has computed nothing before; one that dies leaves no entry.

    `report` is called after each, so that a comparison that is stopped has one.
    """
    if not configs:
        return
    method = "spawn" if sys.platform == "win32" else "forkserver"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload([compare_cells.__name__])
    with ThreadPoolExecutor(jobs) as pool:
        asked = {pool.submit(_run_alone, config, cell, budgets[cell], context): cell for cell, config in configs.items()}
        try:
            for future in as_completed(asked):
                try:
                    entry = future.result()
                except BrokenProcessPool:
                    console.print(f"{asked[future]}: its process was killed", highlight=False, soft_wrap=True)
                    continue
                if entry["phase"] == CHECKPOINT and entry["failed"] is not None:  # then nothing can be compared
                    raise UserError(entry["failed"])
                cells.add(entry)
                report()
                console.print(f"{asked[future]}: {_ending(entry)}", highlight=False, soft_wrap=True)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _ending(entry: Entry) -> str:
    if entry["failed"] is not None:
        return f"failed after {entry['updates']} updates: {entry['failed']}"
    right = entry["right"]["rollout"]
    return f"{100 * right['correct']:.1f} % of {right['examples']} right, {entry['updates']} updates"


def _run_alone(config: RunConfig, cell: Cell, budget: int, context: BaseContext) -> Entry:
    """`run_cell` in a process of its own; Python 3.10's executors cannot be told to start one for every task."""
    with ProcessPoolExecutor(1, mp_context=context, initializer=_die_quietly) as process:
        return process.submit(run_cell, config, cell, budget).result()


def _die_quietly() -> None:
    """Ctrl-C reaches all processes; a cell's has nothing to save and nothing to say."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
