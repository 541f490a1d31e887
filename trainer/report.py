"""report.md and the last table on the screen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from trainer.config import RunConfig
from trainer.run_dir import RunDir, State

_PARTS = {
    "data": "puzzles",
    "sft": "supervised fine-tuning",
    "rl_rollout": "RL: rollouts",
    "rl_gradient": "RL: gradients",
    "probes": "looks at unseen puzzles in between",
    "evaluation": "evaluation",
    "report": "curves",
}
_HEADINGS = ("test set", "decoding", "SFT", "+ RL", "gain [95 %]", "cells right")


def result_rows(evaluations: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A row per test set and decoding: share solved before and after RL, paired gain, share of reference cells."""
    rows: list[tuple[str, ...]] = []
    before = evaluations[0]
    after = evaluations[1] if len(evaluations) > 1 else None
    for test, ways in before["sets"].items():
        for way, figures in ways.items():
            decoding = "greedy" if way == "greedy" else f"T = {figures['decoding']['temperature']:g}"
            solved, gain, cells = "", "", _percent(figures["reference_cells"])
            if after is not None:
                later, paired = after["sets"][test][way], after["gain_in_valid"][test][way]
                solved = _percent(later["valid"])
                gain = f"{100 * paired['gain']:+.1f} [{100 * paired['low']:+.1f}, {100 * paired['high']:+.1f}]"
                cells += f"→{_percent(later['reference_cells'])}"
            rows.append((test.replace("_", " "), decoding, _percent(figures["valid"]), solved, gain, cells))
    return rows


def result_table(folder: Path, state: State, evaluations: Sequence[dict[str, Any]], *, peak_mb: float) -> Group:
    puzzles = next(iter(evaluations[0]["sets"].values()))["greedy"]["puzzles"]
    title = f"Share of {puzzles} puzzles solved: all rules, every clue kept (%)"
    accuracy = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for heading in _HEADINGS:
        accuracy.add_column(heading, justify="left" if heading in _HEADINGS[:2] else "right", no_wrap=True)
    for row in result_rows(evaluations):
        accuracy.add_row(*row)
    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for part, seconds in _seconds(state):
        facts.add_row(part, f"{seconds:.1f} s")
    facts.add_row("peak memory", f"{peak_mb:.0f} MB")
    facts.add_row("files", str(folder))
    facts.add_row("checkpoint", str(folder / "checkpoint"))
    return Group(accuracy, facts)


def write_report(
    folder: RunDir, config: RunConfig, state: State, evaluations: Sequence[dict[str, Any]], *, parameters: int
) -> None:
    task, rl, rollout = config.task, config.rl, config.rollout
    environment = evaluations[-1]["environment"]
    rule = task.careless_forget.replace("_", " ")
    lines = [
        "# A small diffusion language model learns Sudoku by BGPO",
        "",
        f"{parameters:,} parameters (EuroBERT, random start), seed {config.seed}. "
        f"Puzzles of {task.clues_min} to {task.clues_max} clues with one solution. "
        f"SFT: {config.sft.steps} steps of {config.sft.batch} demonstrations, {100 * task.careless_share:g} % of them "
        f"by a demonstrator who forgets the {rule} ({task.careless_pick} filling that fits). "
        f"RL: {rl.updates} updates of {rl.prompts} x {rl.group} rollouts ({rollout.steps} steps, temperature "
        f"{rollout.temperature:g}), reward `{rl.reward}`, {rl.samples} Monte-Carlo samples, learning rate {rl.lr:g}.",
        "",
        _markdown_row(_HEADINGS),
        _markdown_row(["---"] * len(_HEADINGS)),
        *(_markdown_row(row) for row in result_rows(evaluations)),
        "",
        f"Percent of {task.test_puzzles} puzzles solved: all rows, columns and boxes right and every given cell kept.",
        "Cells right: share of empty cells equal to the solution (the figure that d1 calls accuracy).",
        f"Unseen puzzles share their solution grids with training puzzles; the {task.held_out_grids} unseen grids do not.",
        "Both models answered the same puzzles with the same noise; the interval of the gain is paired.",
        "",
        "![curves](curves.png)",
        "",
        "| part | seconds |",
        "|---|---|",
        *(f"| {part} | {seconds:.1f} |" for part, seconds in _seconds(state)),
        "",
        f"{state.tokens:,} tokens through the model in training. {environment['cpu']}, {environment['threads']} threads; "
        f"Python {environment['python']}, torch {environment['torch']}, transformers {environment['transformers']}, "
        f"dllm-kernels {environment['dllm_kernels']}; head: {environment['head']}.",
        "",
    ]
    folder.write_text("report.md", "\n".join(lines))


def _seconds(state: State) -> list[tuple[str, float]]:
    parts = [(label, state.seconds[part]) for part, label in _PARTS.items() if part in state.seconds]
    return [*parts, ("together", sum(seconds for _, seconds in parts))]


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
