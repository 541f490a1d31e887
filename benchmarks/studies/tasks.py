"""Tasks from SFT to RL on the CPU, three seeds each, beside SFT alone with twice the steps.

for t in gym-spell-backward gym-chain-sum gym-gcd code-toy; do for s in 0 1 2; do
  dllm-kernels demo --config $t seed=$s --out runs/$t-$s
  dllm-kernels demo --config $t seed=$s --out runs/$t-$s-control rl.updates=0 sft.steps=600
done; done
python benchmarks/documents.py collect tasks runs/gym-* runs/code-toy-* --out benchmarks/results/tasks-cpu.json
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.report import markdown

WAYS = {"rollout": "T = 1", "greedy": "greedy"}


def collect(folders: Sequence[Path]) -> dict[str, Any]:
    """The figures of finished runs; a run without RL is a control."""
    runs = []
    for folder in folders:
        config = yaml.safe_load((folder / "config.yaml").read_text())
        before = json.loads((folder / "eval_before.json").read_text())
        after = json.loads(file.read_text()) if (file := folder / "eval_after.json").is_file() else None
        (test, ways) = next(iter(before["sets"].items()))
        task = next(iter(config["task"].get("datasets") or {"code, style characters": None}))
        runs.append(
            {
                "task": task,
                "seed": before["seed"],
                "sft_steps": config["sft"]["steps"],
                "updates": config["rl"]["updates"],
                "examples": ways["greedy"]["examples"],
                "sft": {way: ways[way]["correct"] for way in WAYS},
                "rl": None if after is None else {way: after["sets"][test][way]["correct"] for way in WAYS},
                "gain": None if after is None else {way: after["gain"][test][way] for way in WAYS},
                "config": (folder / "config.yaml").read_text(),
                "environment": before["environment"],
            }
        )
    return {"schema": 1, "runs": sorted(runs, key=lambda run: (run["task"], run["updates"] == 0, run["seed"]))}


def table(result: Mapping[str, Any]) -> str:
    """Means over the seeds; the interval is that of the paired gains of all examples of all seeds."""
    lines = []
    for task in dict.fromkeys(run["task"] for run in result["runs"]):
        runs = [run for run in result["runs"] if run["task"] == task and run["updates"]]
        controls = [run for run in result["runs"] if run["task"] == task and not run["updates"]]
        for way, told in WAYS.items():
            gains = [run["gain"][way] for run in runs]
            mean = _mean([gain["gain"] for gain in gains])
            half = math.sqrt(sum(((gain["high"] - gain["low"]) / 2) ** 2 for gain in gains)) / len(gains)
            each = ", ".join(f"{100 * gain['gain']:+.1f}" for gain in gains)
            sft, rl = (_mean([run[key][way] for run in runs]) for key in ("sft", "rl"))
            longer = [run["sft"][way] for run in controls]
            control = f"{100 * _mean(longer):.1f} ({len(longer)} seed{'s' * (len(longer) > 1)})" if longer else "not run"
            interval = f"{100 * mean:+.1f} [{100 * (mean - half):+.1f}, {100 * (mean + half):+.1f}]"
            lines.append([f"`{task}`", told, f"{100 * sft:.1f}", f"{100 * rl:.1f}", interval, each, control])
    heads = ["task", "decoding", "SFT (%)", "+ RL (%)", "gain [95 %, paired]", "of each seed", "SFT alone, twice the steps (%)"]
    return markdown(heads, lines, "---")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
