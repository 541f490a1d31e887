"""curves.png: the training curves of both phases, from metrics.jsonl."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..errors import visible

Records = list[dict[str, Any]]

_WIDTH, _LINES = 32, 8  # tokens in a line of the picture of a completion, and lines

_BLUE, _ORANGE, _GREY = "#1f6fb2", "#d9741a", "#b8bec6"
_WAYS = {"rollout": ("at the rollout's temperature", _BLUE), "greedy": ("greedy", _ORANGE)}
# key of metrics.jsonl, title, unit
_SFT = (("elbo", "ELBO of demonstrations", "nats"), ("loss", "loss", "nats per token"), ("grad_norm", "gradient norm", ""))
_RL = (("elbo", "ELBO of rollouts", "nats"), ("loss", "loss", ""), ("grad_norm", "gradient norm", ""))


def draw_curves(records: Records, evaluations: Sequence[dict[str, Any]], file: Path) -> None:
    """Two rows, SFT and RL: single steps (thin), running means (thick), full evaluations (dots)."""
    by_phase = {phase: [r for r in records if r["phase"] == phase] for phase in ("sft", "rl")}
    figure = Figure(figsize=(19, 7), layout="constrained")
    axes = figure.subplots(2, 5)
    for row, (phase, panels) in enumerate((("sft", _SFT), ("rl", _RL))):
        own = by_phase[phase]
        for column, (key, title, unit) in enumerate(panels):
            _line(axes[row, column + 2], own, key, title, unit)
        _accuracy(axes[row, 1], own)
        axes[row, 0].set_ylabel({"sft": "SFT", "rl": "RL"}[phase], fontsize=14, fontweight="bold", labelpad=12)
    _line(axes[0, 0], by_phase["sft"], "lr", "learning rate", "")
    _line(axes[1, 0], by_phase["rl"], "reward", "reward of rollouts (training examples)", "")
    last = by_phase["rl"][-1]["step"] if by_phase["rl"] else 0
    for at, evaluation in zip((0, last), evaluations, strict=False):
        for way, (_, color) in _WAYS.items():
            test = next(iter(evaluation["sets"].values()), None)
            if test is not None:
                axes[1, 1].plot([at], [100 * test[way]["correct"]], "o", color=color, markersize=8, clip_on=False, zorder=5)
                axes[1, 1].set_title(f"right answers (%; dots: all {test[way]['examples']})", fontsize=11)
    for axis in axes.flat:
        axis.grid(color="#e8eaed", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=9)
    for axis in axes[0]:
        axis.set_xlabel("step", fontsize=9)
    for axis in axes[1]:
        axis.set_xlabel("update", fontsize=9)
    figure.savefig(file, dpi=110)


def draw_unmasking(samples: Sequence[dict[str, Any]], file: Path) -> None:
    """One row of tokens per sample, the earlier a token was written the darker; long completions in several lines."""
    rows: list[tuple[str, list[str], list[int]]] = []
    for sample in samples:
        tokens, steps = sample["tokens"][: _WIDTH * _LINES], sample["steps"][: _WIDTH * _LINES]
        for first in range(0, len(tokens), _WIDTH):
            name = f"{'solved' if sample['correct'] else 'failed'}: {visible(sample['id'])[:_WIDTH]}" if first == 0 else ""
            rows.append((name, tokens[first : first + _WIDTH], steps[first : first + _WIDTH]))
    width = max(len(tokens) for _, tokens, _ in rows)
    most = max(1, *(max(steps) for _, _, steps in rows))
    figure = Figure(figsize=(2.6 + 0.46 * width, 1.0 + 0.5 * len(rows)), layout="constrained")
    axis = figure.subplots()
    shades = [[*steps, *[math.nan] * (width - len(steps))] for _, _, steps in rows]
    image = axis.imshow([[1 + step for step in row] for row in shades], cmap="viridis", vmin=1, vmax=most + 1, aspect="auto")
    for y, (_, tokens, steps) in enumerate(rows):
        for x, (token, step) in enumerate(zip(tokens, steps, strict=True)):
            color = "white" if step < 0.6 * most else "black"
            text = visible(token.replace("\n", "⏎"))[:6] or "·"
            axis.text(x, y, text, ha="center", va="center", fontsize=8, color=color, parse_math=False)
    axis.set_yticks(range(len(rows)), [name for name, _, _ in rows], fontsize=8, parse_math=False)
    axis.set_xticks([])
    axis.set_title("order of unmasking", fontsize=10, loc="left")
    axis.spines[:].set_visible(False)
    figure.colorbar(image, ax=axis, label="step")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # of a script that its font lacks, a box is drawn
        figure.savefig(file, dpi=110)


def draw_rewards(runs: Mapping[str, Sequence[Sequence[tuple[float, float]]]], file: Path) -> None:
    """Rollout reward over forwards so far, one panel per algorithm: mean and range of runs, the others in grey."""
    curves = {}
    for name, several in runs.items():
        common = min(map(len, several))  # a run that a guard stopped has fewer
        counted = _means([forwards for forwards, _ in run[:common]] for run in several)
        curves[name] = counted, [_running([reward for _, reward in run[:common]], share=8) for run in several]
    # as few empty panels as can be, then as near to twice as wide as high as can be
    columns = min(range(1, min(5, len(curves)) + 1), key=lambda n: (-len(curves) % n, abs(n - (1.5 * len(curves)) ** 0.5)))
    lines = -(-len(curves) // columns)
    figure = Figure(figsize=(3.4 * columns, 0.6 + 2.5 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat
    for axis, (name, (made, own)) in zip(axes, curves.items(), strict=False):
        for other, (forwards, values) in curves.items():
            if other != name:
                axis.plot(forwards, _means(values), color=_GREY, linewidth=0.6, zorder=1)
        low, high = ([pick(values) for values in zip(*own, strict=True)] for pick in (min, max))
        axis.fill_between(made, low, high, color=_BLUE, alpha=0.2, linewidth=0)
        axis.plot(made, _means(own), color=_BLUE, linewidth=1.8, zorder=3)
        axis.set_title(name, fontsize=10, loc="left")
        axis.grid(color="#e8eaed", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
        axis.locator_params(axis="x", nbins=4)
        axis.xaxis.set_major_formatter(lambda forwards, _: f"{forwards / 1000:g}k")
    for axis in figure.axes[len(curves) :]:
        axis.axis("off")
    figure.suptitle(
        "reward of rollouts (training examples; running mean over an eighth of the run, range of the seeds)", fontsize=10
    )
    figure.supxlabel("forwards (sequences through a model)", fontsize=9)
    figure.savefig(file, dpi=110)


def _means(rows: Iterable[Sequence[float]]) -> list[float]:
    return [sum(values) / len(values) for values in zip(*rows, strict=True)]


def _running(values: Sequence[float], share: int = 20) -> list[float]:
    """Running means over a `1 / share` of all values."""
    width = max(1, len(values) // share)
    return [sum(part) / len(part) for i in range(len(values)) if (part := values[max(0, i - width + 1) : i + 1])]


def _line(axis: Axes, records: Records, key: str, title: str, unit: str) -> None:
    points = [(r["step"], r[key]) for r in records if isinstance(r.get(key), float | int)]
    axis.set_title(f"{title} ({unit})" if unit else title, fontsize=11)
    if not points:
        axis.text(0.5, 0.5, "no steps", ha="center", va="center", transform=axis.transAxes, color=_GREY)
        return
    steps, values = zip(*points, strict=True)
    if key == "lr":
        axis.plot(steps, values, color=_BLUE, linewidth=1.8)
        return
    axis.plot(steps, values, color=_GREY, linewidth=0.8)
    axis.plot(steps, _running(values), color=_BLUE, linewidth=1.8)
    if max(abs(value) for value in values) < 1e-4:  # on-policy, BGPO's value is minus the mean advantage
        axis.set_ylim(-0.1, 0.1)
        axis.text(
            0.5, 0.6, "0 by construction: on-policy,\nadvantages of a group sum to 0", ha="center", transform=axis.transAxes
        )


def _accuracy(axis: Axes, records: Records) -> None:
    axis.set_title("right answers on unseen examples (%)", fontsize=11)
    for way, (label, color) in _WAYS.items():
        probed = [r for r in records if isinstance(r.get(f"probe_{way}"), float | int)]
        values = [100 * r[f"probe_{way}"] for r in probed]
        axis.plot([r["step"] for r in probed], values, color=color, linewidth=1.8, marker=".", label=label)
    axis.set_ylim(0, 100)
    axis.legend(fontsize=9, frameon=False, loc="lower right")
