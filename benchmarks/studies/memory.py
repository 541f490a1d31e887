"""Growth of peak memory from 2 to 64 samples for every algorithm: the engine beside the full graph.

python -m benchmarks.studies.memory --out benchmarks/results/memory-of-algorithms.json     4 minutes, Linux

A fresh process per point, the probe of tests/accumulation/test_memory.py; the PNG lies beside the JSON.
Growth is that of the peak resident set over a warmed-up baseline at 2 samples, float32, V = 4096, 4 sequences
of 32 tokens, off-policy.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks import plots
from benchmarks.measure import MIB

WAYS = {"engine": "off-policy", "full graph": "full graph"}


def main() -> None:
    from dllm_trainer.records.environment import environment

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

    grown = {str(row["algorithm"]): {way: float(str(row[f"{way}, growth MiB"])) for way in WAYS} for row in rows}
    plots.growth(grown, "growth of peak memory from 2 to 64 samples, MiB", out.with_suffix(".png"))


if __name__ == "__main__":
    main()
