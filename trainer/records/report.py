"""report.md and the final table on the screen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from ..config import RunConfig
from ..errors import visible
from ..tasks.config import SudokuConfig
from . import samples
from .run_dir import RunDir, State

_PARTS = {
    "data": "data and model",
    "sft": "supervised fine-tuning",
    "rl_rollout": "RL: rollouts",
    "rl_gradient": "RL: gradients",
    "probes": "looks at unseen examples in between",
    "evaluation": "evaluation",
    "report": "curves",
}
_HEADINGS = ("test set", "decoding", "SFT", "+ RL", "gain [95 %]")
_KNOWN = ("examples", "correct", "decoding", "solved")  # the rest of an evaluation are the task's metrics


def result_rows(evaluations: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Rows by test set and decoding: right answers before and after RL, paired gain, first metric."""
    rows: list[tuple[str, ...]] = []
    before = evaluations[0]
    after = evaluations[1] if len(evaluations) > 1 else None
    for test, ways in before["sets"].items():
        for way, figures in ways.items():
            decoding = "greedy" if way == "greedy" else f"T = {figures['decoding']['temperature']:g}"
            more = _metrics(figures)[:1]
            solved, gain, cells = "", "", [_percent(figures[name]) for name in more]
            if after is not None:
                later, paired = after["sets"][test][way], after["gain"][test][way]
                solved = _percent(later["correct"])
                gain = f"{100 * paired['gain']:+.1f} [{100 * paired['low']:+.1f}, {100 * paired['high']:+.1f}]"
                cells = [f"{_percent(figures[name])}→{_percent(later[name])}" for name in more]
            rows.append((test.replace("_", " "), decoding, _percent(figures["correct"]), solved, gain, *cells))
    return rows


def _metrics(figures: dict[str, Any]) -> list[str]:
    return [name for name in figures if name not in _KNOWN]


def _headings(evaluations: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    ways: dict[str, Any] = next(iter(evaluations[0]["sets"].values()), {})
    return (*_HEADINGS, *(name.replace("_", " ") for name in _metrics(ways.get("greedy", {}))[:1]))


def result_table(folder: Path, state: State, evaluations: Sequence[dict[str, Any]], *, peak_mb: float) -> Group:
    accuracy = Table(title="Right answers (%)", title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for heading in _headings(evaluations):
        accuracy.add_column(heading, justify="left" if heading in _HEADINGS[:2] else "right", no_wrap=True)
    for row in result_rows(evaluations):
        accuracy.add_row(*(escape(visible(cell)) for cell in row))
    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for part, seconds in _seconds(state):
        facts.add_row(part, f"{seconds:.1f} s")
    facts.add_row("peak memory", f"{peak_mb:.0f} MB")
    facts.add_row("files", escape(str(folder)))
    facts.add_row("checkpoint", escape(str(folder / "checkpoint")))
    return Group(accuracy, facts)


def write_report(
    folder: RunDir, config: RunConfig, state: State, evaluations: Sequence[dict[str, Any]], *, parameters: int
) -> None:
    task, rl, rollout = config.task, config.rl, config.rollout
    environment = evaluations[-1]["environment"]
    headings = _headings(evaluations)
    start = "random start" if config.model.checkpoint is None else f"from {config.model.checkpoint}"
    what = f"{config.sft.steps} steps of {config.sft.batch} demonstrations"
    if isinstance(task, SudokuConfig) and task.careless_share:
        rule = task.careless_forget.replace("_", " ")
        what += f", {100 * task.careless_share:g} % of them by a demonstrator who forgets the {rule} ({task.careless_pick})"
    steps = "as many steps as it takes" if rollout.steps is None else f"{rollout.steps} steps"
    served = rollout.engine == "sglang"
    sampler = "by a server of SGLang" if served else f"{rollout.sampler}, {steps}"
    lines = [
        f"# {task.kind} with {rl.algorithm}",
        "",
        f"{parameters:,} parameters ({start}), seed {config.seed}. SFT: {what}. "
        f"RL: {rl.updates} updates of {rl.prompts} x {rl.group} rollouts ({sampler}, temperature "
        f"{rollout.temperature:g}), reward `{rl.reward}`, masks `{rl.law}`, learning rate {rl.lr:g}.",
        "",
        *markdown_table(headings, result_rows(evaluations)),
        "",
        "Percent of right answers: all that the task asks, see `trainer/tasks`.",
        f"Both models answered the same examples with {'noise of the server' if served else 'the same noise'}; the interval of "
        "the gain is paired.",
        "",
        "![curves](curves.png)",
        "",
        *samples.section(samples.read(folder.path / samples.NAME)),
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


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [_markdown_row(row) for row in (headings, ["---"] * len(headings), *rows)]


def _markdown_row(cells: Sequence[str]) -> str:
    told = [" ".join(visible(cell).split()).replace("|", "\\|") for cell in cells]  # names of tests are the user's
    return f"| {' | '.join(told)} |"
