"""The list of algorithms of docs/algorithms.md, from their recipes.

python benchmarks/algorithms_table.py prints it; tests/test_docs.py compares.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

from dllm_kernels.objectives import RECIPES

BEGIN, END = "<!-- algorithms: benchmarks/algorithms_table.py -->", "<!-- end of algorithms -->"
_STATUS = {"verified against the paper": "paper", "verified against the code": "code", "unverified": "unverified"}


def table() -> str:
    lines = [
        "| `--algorithm` | arXiv | verified against | masks | coupling, on-policy | learns |",
        "|---|---|---|---|---|---|",
    ]
    for name, recipe in RECIPES.items():
        objective = recipe.make()
        coupling = objective.coupling
        if objective.on_policy_coupling != coupling:
            coupling += f", {objective.on_policy_coupling}"
        masks = f"`{recipe.law}`" + ("" if recipe.samples is None else f" x {recipe.samples}")
        learns = "from trajectories" if recipe.needs_trajectory else "from fresh masks"
        lines.append(f"| `{name}` | {recipe.arxiv} | {_STATUS[recipe.status]} | {masks} | {coupling} | {learns} |")
    return "\n".join(lines)


def in_document(text: str) -> str:
    return text.split(BEGIN)[1].split(END)[0].strip()


if __name__ == "__main__":
    print(table())
