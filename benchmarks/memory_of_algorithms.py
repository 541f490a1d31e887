"""Growth of peak memory from 2 to 64 Monte-Carlo samples, for every algorithm: the engine beside the full graph.

python benchmarks/memory_of_algorithms.py --out benchmarks/results/memory-of-algorithms.json        about 4 minutes, Linux

A fresh process per point, the probe of tests/accumulation/test_memory.py; the PNG lies beside the JSON. Growth is that of
the peak resident set over a warmed-up baseline at 2 samples, float32, V = 4096, 4 sequences of 32 tokens, off-policy.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [str(ROOT), *(p for p in sys.path if p and Path(p).resolve() not in (ROOT, ROOT / "benchmarks"))]

MIB = 2**20
WAYS = {"engine": "off-policy", "full graph": "full graph"}


def main() -> None:
    from dllm_trainer.records.environment import environment

    from benchmarks.plots import pyplot_module
    from tests.accumulation.test_memory import peaks
    from tests.algorithms import RECIPES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    out = parser.parse_args().out
    rows = []
    for name in RECIPES:
        row: dict[str, object] = {"algorithm": name}
        for way, how in WAYS.items():
            before, after = peaks(name, how)
            row |= {f"{way}, baseline MiB": round(before / MIB, 1), f"{way}, growth MiB": round((after - before) / MIB, 2)}
        rows.append(row)
        print(row, flush=True)
    out.write_text(json.dumps({"schema": 1, "environment": environment(), "rows": rows}, indent=1) + "\n")

    pyplot = pyplot_module()
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for offset, (way, colour) in zip((-0.2, 0.2), {"engine": "#1b7837", "full graph": "#b35806"}.items(), strict=True):
        growth = [max(float(str(row[f"{way}, growth MiB"])), 0.1) for row in rows]
        axes.barh([i + offset for i in range(len(rows))], growth, 0.4, color=colour, label=way)
    axes.set_yticks(range(len(rows)), [str(row["algorithm"]) for row in rows])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("growth of peak memory from 2 to 64 samples, MiB")
    axes.legend()
    figure.tight_layout()
    figure.savefig(out.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main()
