"""The tables of docs/comparison.md from comparisons that `dllm-kernels compare` made.

    dllm-kernels sft --out runs/sft
    dllm-kernels compare --checkpoint runs/sft/checkpoint_sft --jobs 2 --out runs/compare-sudoku rl.updates=60
    python benchmarks/comparison_table.py collect runs/compare-sudoku --command "..." --out benchmarks/results/compare-sudoku.json
    python benchmarks/comparison_table.py write        puts the tables of the committed files into docs/comparison.md

The plot of reward curves is kept beside each file.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [str(ROOT), *(p for p in sys.path if p and Path(p).resolve() not in (ROOT, ROOT / "benchmarks"))]

from dllm_trainer.commands.compare import table, verdict  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
DOCUMENT = ROOT / "docs" / "comparison.md"
TASKS = ("sudoku", "countdown")


def result_of(task: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"compare-{task}.json").read_text())
    return found


def block(result: dict[str, Any]) -> str:
    """Command, table, verdict, and greedy accuracies, which the table leaves out."""
    rows = result["algorithms"]
    greedy = [f"{row['algorithm']} {100 * _mean(row['greedy']['rl']):.1f}" for row in rows]
    stopped = [f"{row['algorithm']}, seed {n}: {why}" for row in rows for n, why in enumerate(row["stopped"]) if why is not None]
    lines = [
        # what the runs were made with, under the command's name of today
        f"```\n{result['command'].replace('dllm-train ', 'dllm-kernels ')}\n```",
        f"{result['budget']:,} forwards a run, {len(rows[0]['forwards'])} seeds, {result['jobs']} runs at once; "
        f"{result['environment']['cpu']}, one thread each.",
        table(result),
        f"**{verdict(result)}**",
        f"Greedy, in %: {', '.join(greedy)} (SFT {100 * _mean(rows[0]['greedy']['sft']):.1f}).",
        *([f"Stopped by a guard, and evaluated as it was: {'; '.join(stopped)}."] if stopped else []),
    ]
    return "\n\n".join(lines)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def markers(task: str) -> tuple[str, str]:
    return f"<!-- {task}: benchmarks/comparison_table.py -->", f"<!-- end of {task} -->"


def in_document(text: str, task: str) -> str:
    """What stands between a task's markers. Raises ValueError when they are missing."""
    begin, end = markers(task)
    found = re.search(f"{re.escape(begin)}\n(.*?)\n{re.escape(end)}", text, flags=re.DOTALL)
    if found is None:
        raise ValueError(f"{DOCUMENT.name} must hold the markers {begin!r} and {end!r}")
    return found.group(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    collecting = commands.add_parser("collect")
    collecting.add_argument("folder", type=Path)
    collecting.add_argument("--command", dest="made_by", required=True, help="how the folder was made")
    collecting.add_argument("--out", type=Path, required=True)
    commands.add_parser("write")
    arguments = parser.parse_args()
    if arguments.command == "collect":
        result = {"schema": 1, "command": arguments.made_by, **json.loads((arguments.folder / "compare.json").read_text())}
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
        shutil.copy(arguments.folder / "rewards.png", arguments.out.with_suffix(".png"))
        return
    text = DOCUMENT.read_text()
    for task in TASKS:
        begin, end = markers(task)
        text = text.replace(f"{begin}\n{in_document(text, task)}\n{end}", f"{begin}\n{block(result_of(task))}\n{end}")
    DOCUMENT.write_text(text)


if __name__ == "__main__":
    main()
