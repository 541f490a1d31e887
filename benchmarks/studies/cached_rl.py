"""Whether RL is stable on cached rollouts: Sudoku, keys and values kept around the active block (Fast-dLLM's dual), and exact.

    python -m benchmarks.studies.cached_rl run --out runs/cached-rl            about 15 minutes of one core; again to go on
    python -m benchmarks.studies.cached_rl collect runs/cached-rl --out benchmarks/results/cached-rl-cpu.json

Three seeds. SFT once a seed, then RL from there twice, on exact rollouts and on rollouts with `cache="dual"` in blocks of four:
TraceRL, which replays the states of rollouts, with two optimizer steps an update, so that old scores matter. The trainer makes
them in an exact pass for both. Everything else is the demo's. Evaluation is by exact rollouts for both.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dllm_trainer.config import load_config
from dllm_trainer.distributed import Ranks
from dllm_trainer.records.environment import environment
from dllm_trainer.records.run_dir import RunDir
from dllm_trainer.tasks import make_task
from dllm_trainer.train.evaluation import decodings, evaluate
from dllm_trainer.train.run import Run, is_finished, prepare
from rich.console import Console

from benchmarks.report import markdown

SEEDS = (0, 1, 2)
ARMS: Mapping[str, Sequence[str]] = {"exact": (), "dual": ("rollout.cache=dual", "rl.gap_bound=20.0")}
COMMON = ("rollout.block_length=4", "rollout.steps=16", "evaluation.probe_every_sft=0", "evaluation.probe_every_rl=0")
SFT = ("sft.steps=500", "rl.updates=0", "task.test_puzzles=128")
RL = ("sft.steps=0", "rl.algorithm=trace_rl", "rl.inner_iterations=2", "rl.updates=30", "rl.gap_every=5", "rl.options.shrink=4")
TINY = ("sft.steps=2", "rl.updates=2", "task.test_puzzles=4", "task.train_puzzles=200", "sft.batch=8", "rl.prompts=2",
        "rl.group=2", "rl.reward=rules", "model.layers=2", "sft.warmup=1", "rl.warmup=1", "rl.gap_every=1")  # fmt: skip


def train(out: Path, keys: Sequence[str]) -> Path:
    """The folder of a run, which is made, gone on with, or found finished."""
    config = load_config(overrides=[*keys, f"out={json.dumps(str(out))}"])
    folder = RunDir.reopen(out) if (out / "config.yaml").is_file() else RunDir.create(out)
    if not is_finished(folder, config):
        Run(folder, config, Console(quiet=True)).execute()
    folder.close()
    return out


def run(out: Path, *, tiny: bool = False) -> None:
    """All runs that are not there yet, and what each learned."""
    for seed in SEEDS[: 1 if tiny else None]:
        small = [key for key in TINY if tiny]
        common = [*COMMON, f"seed={seed}", f"data_seed={seed}", "tensorboard=false"]
        sft = train(out / f"sft-{seed}", [*common, *SFT, *small, "rl.updates=0"])
        for arm, own in ARMS.items():
            goal = out / f"{arm}-{seed}"
            begin = f"model.checkpoint={json.dumps(str(sft / 'checkpoint'))}"
            keys = [*common, *SFT, *RL, *small, "sft.steps=0", begin, *own]
            train(goal, keys)
            if not (goal / "exact.json").is_file():
                (goal / "exact.json").write_text(json.dumps(solved(goal, keys)))


def solved(folder: Path, keys: Sequence[str]) -> dict[str, float]:
    """Right answers of the test sets by exact rollouts, whatever the run was trained on: before and after RL."""
    found = {}
    exact = [key for key in keys if not key.startswith(("rollout.cache", "model.checkpoint"))]
    for when, name in (("before", "checkpoint_sft"), ("after", "checkpoint")):
        config = load_config(overrides=[*exact, f"model.checkpoint={json.dumps(str(folder / name))}"])
        setup = prepare(config, make_task(config.task, seed=config.task_seed), Ranks())
        for way, decoding in decodings(config.rollout).items():
            figures = [evaluate(setup, test, puzzles, decoding)["correct"] for test, puzzles in setup.task.tests.items()]
            found[f"{when} {way}"] = sum(figures) / len(figures)
    return found


def collect(out: Path) -> dict[str, Any]:
    """Of each seed and arm: right answers, the gap of the cache, and whether anything blew up."""
    rows = []
    for seed in SEEDS:
        for arm in ARMS:
            folder = out / f"{arm}-{seed}"
            if not (folder / "exact.json").is_file():
                continue
            records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            learnt = [record for record in records if "loss" in record]
            gaps = [record["on_policy_gap"] for record in records if "on_policy_gap" in record]
            rows.append(
                {
                    "seed": seed,
                    "arm": arm,
                    **json.loads((folder / "exact.json").read_text()),
                    "reward": [record["reward"] for record in records],
                    "largest gap": max(gaps),
                    "largest gradient": max(record["grad_norm"] for record in learnt),
                    "updates": len(records),
                }
            )
    return {"rows": rows, "keys": [*COMMON, *SFT, *RL], "environment": environment()}


def table(result: Mapping[str, Any]) -> str:
    """Of each run: right answers by exact rollouts, reward of the rollouts it learned from, and what would show that it broke."""
    head = ["rollouts", "seed", "T = 1: SFT, RL", "greedy: SFT, RL", "reward, first and last five", "largest gap, nats a token"]
    lines = []
    for row in sorted(result["rows"], key=lambda row: (list(ARMS).index(row["arm"]), row["seed"])):
        of_ways = [[row[f"{when} {way}"] for when in ("before", "after")] for way in ("rollout", "greedy")]
        shares = [", ".join(f"{100 * share:.1f} %" for share in pair) for pair in of_ways]
        reward = ", ".join(f"{sum(part) / len(part):.2f}" for part in (row["reward"][:5], row["reward"][-5:]))
        broke = [f"{row['largest gap']:.2g}", f"{row['largest gradient']:.2g}"]
        lines.append([row["arm"], str(row["seed"]), *shares, reward, *broke])
    return markdown([*head, "largest gradient"], lines, "---")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True)
    running, collecting = commands.add_parser("run"), commands.add_parser("collect")
    running.add_argument("--out", type=Path, required=True)
    running.add_argument("--tiny", action="store_true", help="one seed, nothing is learned")
    collecting.add_argument("runs", type=Path)
    collecting.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    if given.command == "run":
        run(given.out, tiny=given.tiny)
        return
    result = collect(given.runs)
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
