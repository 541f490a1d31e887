"""The table of docs/cpu_engine.md from results of the `head` suite.

python benchmarks/run.py --suite head --threads 2 --shape N=512,H=1024,V=126464 --out a.json       and so on
python benchmarks/head_table.py collect a.json b.json --out benchmarks/results/head-cpu.json
python benchmarks/head_table.py write benchmarks/results/head-cpu.json        puts the table into docs/cpu_engine.md
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "cpu_engine.md"
BEGIN, END = "<!-- head table: benchmarks/head_table.py -->", "<!-- end of head table -->"
BOUNDS = {  # over the floor, by case: bfloat16, float32
    "forward": (1.20, 1.10),
    "unit": (1.20, 1.10),
    "coef": (1.25, 1.15),
    "sample": (1.45, 1.25),
}
PEERS = {"torch linear_ce": "F.linear_cross_entropy", "Liger chunked": "Liger", "TRL chunked": "TRL"}


def collect(files: list[Path]) -> dict[str, Any]:
    """The runs, as they are, in the order given. Raises ValueError for a file without the suite."""
    runs = [json.loads(file.read_text()) for file in files]
    for file, run in zip(files, runs, strict=True):
        if "head" not in run.get("suites", {}):
            raise ValueError(f"{file} holds no result of the head suite")
    return {"schema": 1, "runs": runs}


def table(result: dict[str, Any]) -> str:
    """One line per case: our time, and ratios of time and memory to the others of the same run."""
    lines = [
        "| plan | dtype | N, H, V | ours, ms | over the floor (bound) | over eager | over others | extra MiB: ours, eager |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in result["runs"]:
        cases: dict[str, dict[str, Any]] = {}
        for row in run["suites"]["head"]["rows"]:
            if row["time_ms"]:
                cases.setdefault(row["case"], {})[row["contestant"]] = row
        lines += [_line(run["settings"]["dtype"], rows) for rows in cases.values() if "ours" in rows]
    return "\n".join(lines)


def _line(dtype: str, rows: dict[str, Any]) -> str:
    ours, eager = rows["ours"], rows.get("eager")
    plan, sizes = ours["case"].split()[0], ours["sizes"]
    large = sizes["V"] > 100000
    bound = f" ({BOUNDS[plan][dtype == 'float32']:.2f})" if large and plan in BOUNDS else ""
    own = ours["time_ms"]["median"]
    others = [f"{own / rows[name]['time_ms']['median']:.2f} {label}" for name, label in PEERS.items() if name in rows]
    memory = [f"{row['memory_mib']:.0f}" for row in (ours, eager) if row and row["memory_mib"] is not None]
    cells = (
        f"`{plan}`",
        dtype,
        ", ".join(str(sizes[key]) for key in ("N", "H", "V")),
        f"{own:.{0 if large else 2}f}",
        f"{ours['to_floor']:.2f}{bound}",
        f"{ours['to_baseline']:.2f}" if ours["to_baseline"] else "–",
        ", ".join(others) or "–",
        ", ".join(memory),
    )
    return "| " + " | ".join(cells) + " |"


def in_document(text: str) -> str:
    return text.split(BEGIN)[1].split(END)[0].strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    first = commands.add_parser("collect")
    first.add_argument("files", nargs="+", type=Path)
    first.add_argument("--out", required=True, type=Path)
    second = commands.add_parser("write")
    second.add_argument("result", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "collect":
        arguments.out.write_text(json.dumps(collect(arguments.files), indent=1) + "\n")
        return
    text = DOCUMENT.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    DOCUMENT.write_text(f"{before}{BEGIN}\n{table(json.loads(arguments.result.read_text()))}\n{END}{after}")


if __name__ == "__main__":
    main()
