"""The tables of docs/estimators.md from a result file of the `variance` suite.

python benchmarks/run.py --suite variance --threads 1 --shape B=64,R=32,M=4096 \\
    --model runs/demo/checkpoint_sft --model runs/demo/checkpoint --out benchmarks/results/estimators-cpu.json
python benchmarks/estimators_table.py benchmarks/results/estimators-cpu.json        puts the tables into docs/estimators.md
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "estimators.md"
BUDGETS = (1, 2, 3, 4, 8, 12)
LENGTHS = (16, 256)
Figure = Mapping[str, float]


def digits(value: float) -> str:
    """Two significant digits, no exponent."""
    if value == 0 or abs(value) >= 10:
        return f"{value:.0f}"
    return f"{float(f'{value:.2g}'):.6f}".rstrip("0").rstrip(".")


def cell(figure: Figure) -> str:
    return f"{digits(figure['value'])} [{digits(figure['low'])}, {digits(figure['high'])}]"


def percent(figure: Figure) -> str:
    return f"{100 * figure['value']:.0f} % [{100 * figure['low']:.0f}, {100 * figure['high']:.0f}]"


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines))


def shares(entry: Mapping[str, Any]) -> str:
    names = {"exact, independent": "count", "double Monte Carlo": "t"}
    return markdown(
        [
            "model",
            "tokens",
            "estimator",
            "variance of one pass",
            "its level",
            "from the level",
            "from the count given t",
            "from masks",
        ],
        [
            [
                x["model"],
                str(x["L"]),
                x["estimator"],
                cell(x["variance"]),
                names[x["estimator"]],
                percent(x["level"]),
                percent(x["count"]) if names[x["estimator"]] == "t" else "",
                percent(x["masks"]),
            ]
            for x in entry["shares_of_variance"]
        ],
    )


def squared_errors(entry: Mapping[str, Any]) -> str:
    found = {(r["model"], r["contestant"], r["sizes"].get("K")): r["figures"] for r in entry["rows"] if r["status"] == "ok"}
    pairs = dict.fromkeys((model, name) for model, name, _ in found)
    return markdown(
        ["model", "estimator", *(f"{n} pass{'es' * (n > 1)}" for n in BUDGETS)],
        [
            [model, name, *(cell(found[model, name, n]["mse"]) if (model, name, n) in found else "" for n in BUDGETS)]
            for model, name in pairs
        ],
    )


def at_twelve(entry: Mapping[str, Any]) -> str:
    return markdown(
        ["model", "estimator", "bias", "variance", "squared error"],
        [
            [r["model"], r["contestant"], *(cell(r["figures"][key]) for key in ("bias", "variance", "mse"))]
            for r in entry["rows"]
            if r["status"] == "ok" and r["sizes"]["K"] == 12
        ],
    )


def ratios(entry: Mapping[str, Any]) -> str:
    found = {
        (x["model"], x["estimator"], x["L"], x["budget"], x["over"]): x["mse_ratio"] for x in entry["quadrature_over_monte_carlo"]
    }
    lines = []
    for model, name in dict.fromkeys((model, name) for model, name, *_ in found):
        nodes = int(name.split()[1].rstrip(","))
        tight = [(L, nodes, over) for L in LENGTHS for over in ("double Monte Carlo", "exact, independent", "exact, stratified")]
        cells = [cell(found[(model, name, *key)]) for key in [*tight[:3], (LENGTHS[0], 12, "exact, stratified"), *tight[3:]]]
        lines.append([model, name, *cells])
    columns = ["double MC", "exact indep.", "exact strat."]
    head = [f"{L} tokens, n passes: over {c}" for L in LENGTHS for c in columns]
    return markdown(["model", "estimator", *head[:3], "16 tokens, 12 passes: over exact strat.", *head[3:]], lines)


TABLES = {"shares": shares, "squared errors": squared_errors, "twelve passes": at_twelve, "ratios": ratios}


def markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}: benchmarks/estimators_table.py -->", f"<!-- end of {name} -->"


def in_document(text: str, name: str) -> str:
    """The table of that name that stands in the document. Raises ValueError when its markers are missing."""
    begin, end = markers(name)
    found = re.search(f"{re.escape(begin)}\n(.*?)\n?{re.escape(end)}", text, flags=re.DOTALL)
    if found is None:
        raise ValueError(f"{DOCUMENT.name} must hold the markers {begin!r} and {end!r}")
    return found.group(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    entry = json.loads(parser.parse_args().result.read_text())["suites"]["variance"]
    text = DOCUMENT.read_text()
    for name, table in TABLES.items():
        begin, end = markers(name)
        before, _, rest = text.partition(begin)
        if not rest.partition(end)[1]:
            raise ValueError(f"{DOCUMENT.name} must hold the markers {begin!r} and {end!r}")
        text = f"{before}{begin}\n{table(entry)}\n{end}{rest.partition(end)[2]}"
    DOCUMENT.write_text(text)


if __name__ == "__main__":
    main()
