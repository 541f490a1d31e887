"""The demo over several seeds: one result file from finished runs, and the table of docs/demo.md from that file.

for s in 0 1 2; do dllm-kernels demo --out runs/seed$s seed=$s; done
python benchmarks/demo_table.py collect runs/seed0 runs/seed1 runs/seed2 --out benchmarks/results/demo-cpu.json
python benchmarks/demo_table.py write benchmarks/results/demo-cpu.json        puts the table into docs/demo.md
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- demo table: benchmarks/demo_table.py -->", "<!-- end of demo table -->"
SETS = (("unseen_puzzles", "unseen puzzles"), ("unseen_grids", "unseen solution grids"))
DECODINGS = (("rollout", "rollout's temperature"), ("greedy", "greedy"))


def collect(folders: list[Path]) -> dict[str, Any]:
    """What finished runs measured: shares of solved puzzles before and after RL, paired gains, seconds, settings."""
    runs = []
    for folder in folders:
        before, after = (json.loads((folder / name).read_text()) for name in ("eval_before.json", "eval_after.json"))
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        sets = {
            test: {
                way: {
                    "puzzles": figures["examples"],
                    "sft": before["sets"][test][way]["correct"],
                    "rl": figures["correct"],
                    "gain": after["gain"][test][way],
                    "sft_reference_cells": before["sets"][test][way]["reference_cells"],
                    "rl_reference_cells": figures["reference_cells"],
                    "decoding": figures["decoding"],
                }
                for way, figures in ways.items()
            }
            for test, ways in after["sets"].items()
        }
        runs.append(
            {
                "seed": after["seed"],
                "sets": sets,
                "tokens": {phase: sum(int(x["tokens"]) for x in lines if x["phase"] == phase) for phase in ("sft", "rl")},
                "steps": {phase: sum(x["phase"] == phase for x in lines) for phase in ("sft", "rl")},
                "report": (folder / "report.md").read_text(),
                "environment": after["environment"],
                "config": (folder / "config.yaml").read_text(),
            }
        )
    return {"command": "dllm-kernels demo seed=N", "runs": runs}


def table(result: dict[str, Any]) -> str:
    """Markdown: per test set, decoding and seed the solved share after SFT and after RL, and the paired gain."""
    lines = ["| test set, decoding | seed | SFT | after RL | gain [95 %, paired] |", "|---|---|---|---|---|"]
    for test, test_name in SETS:
        for way, way_name in DECODINGS:
            gains = []
            for run in result["runs"]:
                figures = run["sets"][test][way]
                gain = figures["gain"]
                gains.append(gain["gain"])
                lines.append(
                    f"| {test_name}, {way_name} | {run['seed']} | {100 * figures['sft']:.1f} % | {100 * figures['rl']:.1f} % "
                    f"| {100 * gain['gain']:+.1f} [{100 * gain['low']:+.1f}, {100 * gain['high']:+.1f}] |"
                )
            lines.append(f"| **{test_name}, {way_name}** | mean | | | **{100 * sum(gains) / len(gains):+.1f}** |")
    return "\n".join(lines)


def in_readme(readme: str) -> str:
    """The table that stands in docs/demo.md. Raises ValueError when its markers are missing."""
    found = re.search(f"{re.escape(BEGIN)}\n(.*?)\n{re.escape(END)}", readme, flags=re.DOTALL)
    if found is None:
        raise ValueError(f"docs/demo.md must hold the markers {BEGIN!r} and {END!r}")
    return found.group(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    collecting = commands.add_parser("collect")
    collecting.add_argument("folders", type=Path, nargs="+")
    collecting.add_argument("--out", type=Path, required=True)
    writing = commands.add_parser("write")
    writing.add_argument("result", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "collect":
        arguments.out.write_text(json.dumps(collect(arguments.folders), indent=1) + "\n")
        return
    path = ROOT / "docs" / "demo.md"
    readme = path.read_text()
    path.write_text(readme.replace(in_readme(readme), table(json.loads(arguments.result.read_text()))))


if __name__ == "__main__":
    main()
