"""The table of docs/results.md, the README's figure and every row in docs/benchmarks.md, from the committed result files.

    python benchmarks/run.py --out benchmarks/results/default-cpu.json                    the default run
    python benchmarks/run.py --full --threads 2 --out benchmarks/results/cpu.json         an hour; or suite by suite, like
    python benchmarks/run.py --full --threads 2 --suite step --out benchmarks/results/cpu-step.json
    python benchmarks/readme.py                                                           of all these

Nothing is chosen by its outcome: `LINES` names cases and who stands beside ours, before they are run.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [str(ROOT), *(p for p in sys.path if p and Path(p).resolve() not in (ROOT, ROOT / "benchmarks"))]

from benchmarks.registry import Row  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "cpu.json"
FIGURE = ROOT / "benchmarks" / "results" / "cpu-readme.png"
BEGIN, END = "<!-- measured: benchmarks/readme.py -->", "<!-- end of measured -->"
HEAD = ("forward", "unit", "coef", "sample")


class Line(NamedTuple):
    """A case by how its label begins and ends, the contestant beside ours, and what the reader is told that it is."""

    suite: str
    name: str
    sizes: str  # that the label holds
    beside: str
    told: str


LLADA, SMALL = "N=512,H=1024,V=126464", "N=64,H=128,V=64"
LINES = (
    *(Line("head", plan, LLADA, "eager", f"head, `{plan}`") for plan in HEAD),
    *(Line("head", plan, f"{LLADA} bfloat16", "eager", f"head, `{plan}`, bfloat16") for plan in HEAD),
    *(Line("head", plan, SMALL, "eager", f"small head, `{plan}`") for plan in HEAD),
    Line("elbo", "score", "K=16", "full logits", "ELBOs, 16 samples"),
    Line("elbo", "train", "K=16", "full logits", "their gradients"),
    Line("bgpo", "n_t=32", "", "full graph", "BGPO update, n_t = 32"),
    Line("bgpo", "gdpo/n_t=16", "", "full graph", "GDPO update, 16 samples"),
    Line("entropy", "rows", "", "published", "entropies of a rollout's steps"),
    Line("rollout", "argmax", "", "published", "denoising step, temperature 0, V = 8192"),
    Line("rollout", "completion", "", "published", "a completion, V = 8192"),
    Line("step", "gdpo_bound", "", "published", "RL step, GDPO, K = 8"),
)


class Pair(NamedTuple):
    line: Line
    ours: Row
    other: Row


def sources() -> list[Path]:
    """The default run, the full one, and full ones of single suites: a later one's suite goes over an earlier one's."""
    return [RESULT.with_name("default-cpu.json"), RESULT, *sorted(RESULT.parent.glob("cpu-*.json"))]


def load() -> dict[str, Any]:
    """The suites of all files, each with its `figure`; what they ran on is that of the full run."""
    results = {file: json.loads(file.read_text()) for file in sources()}
    suites = {
        name: {**entry, "figure": f"{file.stem}-{name}.png", "command": result["command"]}
        for file, result in results.items()
        for name, entry in result["suites"].items()
    }
    used = dict.fromkeys(entry["command"] for entry in suites.values())
    return {**results[RESULT], "suites": suites, "command": "`, `".join(used)}


def pairs(result: Mapping[str, Any]) -> Iterator[Pair]:
    """Raises ValueError for a line that the result does not have exactly once."""
    for line in LINES:
        rows = [row for row in result["suites"][line.suite]["rows"] if _is(row, line)]
        ours, other = ([row for row in rows if row["contestant"] == name] for name in ("ours", line.beside))
        if len(ours) != 1 or len(other) != 1:
            raise ValueError(f"the result must hold one case {line.name} {line.sizes} of {line.suite}, got {len(ours)}")
        yield Pair(line, ours[0], other[0])


def _is(row: Row, line: Line) -> bool:
    name, _, sizes = str(row["case"]).partition(" ")
    exact = sizes == line.sizes if line.suite == "head" else line.sizes in sizes.split(",") or not line.sizes
    return name == line.name and exact and row["status"] == "ok"


def ratio(pair: Pair, key: str) -> float | None:
    """Theirs over ours, of "time_ms" (medians) or "memory_mib"; None where one is not known or below a tenth of a MiB."""
    ours, other = pair.ours[key], pair.other[key]
    if key == "time_ms":
        return float(other["median"] / ours["median"]) if ours and other else None
    return float(other / ours) if ours is not None and other is not None and min(ours, other) >= 0.1 else None


def table(result: Mapping[str, Any]) -> str:
    lines = [
        "| what | beside | ours, ms | their time / ours | extra MiB: ours, theirs | their memory / ours | over the limit "
        "| largest error: ours, theirs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for pair in pairs(result):
        ours, other = pair.ours, pair.other
        faster, less = ratio(pair, "time_ms"), ratio(pair, "memory_mib")
        errors = [max(row["errors"].values()) if row["errors"] else None for row in (ours, other)]
        cells = (
            pair.line.told,
            pair.line.beside,
            digits(ours["time_ms"]["median"]),
            "–" if faster is None else f"**{digits(faster)}**",
            ", ".join("–" if row["memory_mib"] is None else digits(row["memory_mib"]) for row in (ours, other)),
            "–" if less is None else f"**{digits(less)}**",
            "–" if ours["to_floor"] is None else f"{ours['to_floor']:.2f}",
            ", ".join("–" if error is None else f"{error:.0e}" for error in errors),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def digits(value: float) -> str:
    """Three significant digits, no exponent."""
    return f"{value:.0f}" if value >= 100 else f"{float(f'{value:.3g}'):g}"


def caption(result: Mapping[str, Any]) -> str:
    environment = result["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version != "not installed")
    return (
        f"`{result['command']}` on {environment['cpu']} ({environment['head']}, {environment['threads']} threads, "
        f"{environment['clocks']}), torch {environment['torch']}, transformers {environment['transformers']}, {versions}, commit "
        f"{(environment['git_commit'] or 'unknown')[:12]}, load before {environment['load_average']}."
    )


def measured(result: Mapping[str, Any]) -> str:
    summaries = [f"- {name}: {entry['summary']}." for name, entry in result["suites"].items()]
    return "\n\n".join([caption(result), table(result), "\n".join(summaries)])


def every_row(result: Mapping[str, Any]) -> str:
    """A section per suite: all rows of what was timed, absent and failed ones with their reasons."""
    parts = [caption(result)]
    for name, entry in result["suites"].items():
        rows = entry["rows"]
        if "time_ms" not in rows[0] or name == "variance":
            continue
        parts.append(f"## {name}\n\n{entry['summary']}.\n\n![{name}](../benchmarks/results/{entry['figure']})\n\n{_rows(rows)}")
    accuracy = result["suites"].get("accuracy")
    if accuracy:
        parts.append(f"## accuracy\n\n{accuracy['summary']}.\n\n{_accuracy(accuracy['rows'])}")
    return "\n\n".join(parts)


def _rows(rows: Sequence[Row]) -> str:
    lines = [
        "| case | contestant | ms [quartiles] | over limit | over baseline | extra MiB | GFLOP (formula) | errors | note |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    previous = ""
    for row in rows:
        time, errors = row["time_ms"], ", ".join(f"{name} {value:.0e}" for name, value in row["errors"].items())
        spread = f" [{digits(time['q1'])}, {digits(time['q3'])}]" if time and time["runs"] else ""
        counted, formula = (f"{row[key] / 1e9:.4g}" if row[key] else "–" for key in ("flops_counted", "flops_by_formula"))
        cells = (
            "" if row["case"] == previous else row["case"].replace(",", ", "),
            row["contestant"],
            f"{digits(time['median'])}{spread}" if time else "–",
            "–" if row["to_floor"] is None else f"{row['to_floor']:.2f}",
            "–" if row["to_baseline"] is None else f"{row['to_baseline']:.2f}",
            "–" if row["memory_mib"] is None else digits(row["memory_mib"]),
            counted if formula == "–" else f"{counted} ({formula})",
            errors or "–",
            row["note"] if row["status"] == "ok" else f"{row['status']}: {row['reason']}",
        )
        previous = row["case"]
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines)


def _accuracy(rows: Sequence[Row]) -> str:
    names = ("logp", "elbo256", "entropy", "gradient")
    lines = ["| plan, dtype | contestant | " + " | ".join(names) + " | note |", "|---" * 7 + "|"]
    for row in rows:
        cells = [f"{row['errors'][name]:.1e}" if name in row["errors"] else "–" for name in names]
        note = "" if row["status"] == "ok" else f"{row['status']}: {row['reason']}"
        lines.append("| " + " | ".join([row["case"], row["contestant"], *cells, note]) + " |")
    return "\n".join(lines)


def draw(result: Mapping[str, Any], path: Path, source: str) -> None:
    """Their time and memory over ours, a bar each; to the left of 1 ours loses. `source`, a digest, is kept in the file."""
    from benchmarks.plots import pyplot_module

    pyplot = pyplot_module()
    found = list(pairs(result))
    labels = [pair.line.told.replace("`", "") for pair in found]
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 0.9 + 0.27 * len(found)), sharey=True)
    for axis, key, title in (
        (axes[0], "time_ms", "their time / ours"),
        (axes[1], "memory_mib", "their extra memory / ours"),
    ):
        values = [ratio(pair, key) or 0.0 for pair in found]
        drawn = axis.barh(labels, values, color=["#1b7837" if value >= 1 else "#b2182b" for value in values])
        axis.bar_label(drawn, [digits(value) if value else "–" for value in values], fontsize=8, padding=2)
        axis.axvline(1.0, color="#555555", linewidth=1)
        axis.set_xscale("log")
        axis.set_xlim(min(0.3, 0.8 * min((v for v in values if v), default=1.0)), 3 * max(values))
        axis.set_title(title, loc="left", fontsize=10)
        axis.grid(axis="y", visible=False)
    axes[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Source": source})
    pyplot.close(figure)


def digest() -> str:
    """Of all result files, one after the other."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in sources())).hexdigest()


def in_document(text: str) -> str:
    """What stands between the markers. Raises ValueError when they are missing."""
    found = re.search(f"{re.escape(BEGIN)}\n(.*?)\n{re.escape(END)}", text, flags=re.DOTALL)
    if found is None:
        raise ValueError(f"a document must hold the markers {BEGIN!r} and {END!r}")
    return found.group(1)


def main() -> None:
    result = load()
    for name, make in (("docs/results.md", measured), ("docs/benchmarks.md", every_row)):
        text = (ROOT / name).read_text()
        (ROOT / name).write_text(text.replace(f"{BEGIN}\n{in_document(text)}\n{END}", f"{BEGIN}\n{make(result)}\n{END}"))
    draw(result, FIGURE, digest())


if __name__ == "__main__":
    main()
