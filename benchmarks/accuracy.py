"""Errors of the head against float64 on the same inputs, by plan and dtype, beside eager PyTorch's: one table.

    python benchmarks/accuracy.py --device cuda --out accuracy.json
    python benchmarks/accuracy.py --tiny

Statistics: largest absolute error in nats. Gradients: relative error |got - true| / |true|. Exit code 1 where ours is worse
than the tolerance of the `head` suite.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [str(ROOT), *(p for p in sys.path if p and Path(p).resolve() not in (ROOT, ROOT / "benchmarks"))]

SIZES = {"N": 512, "H": 1024, "V": 32003}
ROWS = ("plan", "dtype", "contestant", "logp", "entropy", "gradient")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--tiny", action="store_true", help="smallest sizes")
    parser.add_argument("--out", type=Path, help="a JSON file")
    arguments = parser.parse_args(argv)

    from benchmarks.registry import DTYPES, Settings
    from benchmarks.suites import head

    rows: list[dict[str, Any]] = []
    bad = 0
    for dtype in DTYPES:
        shape = head.TINY if arguments.tiny else SIZES
        for case in head.cases(Settings(dtype=dtype, shape=shape, device=arguments.device)):
            prepared = case.setup(case.sizes)
            for contestant in prepared.contestants:
                if contestant.name not in ("ours", "eager") or contestant.make is None:
                    continue
                errors = prepared.errors(contestant.make()())
                rows.append({"plan": case.name, "dtype": dtype, "contestant": contestant.name, **errors})
                over = contestant.name == "ours" and any(not errors[n] <= case.tolerance[n] for n in errors)
                bad += over
                cells = [f"{errors[name]:12.2e}" if name in errors else " " * 12 for name in ROWS[3:]]
                print(f"{case.name:10} {dtype:9} {contestant.name:6}", *cells, "  TOO LARGE" * over, flush=True)
    if arguments.out is not None:
        arguments.out.write_text(
            json.dumps({"schema": 1, "device": arguments.device, "sizes": shape, "rows": rows}, indent=1) + "\n"
        )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
