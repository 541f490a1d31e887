"""The tables of docs/, and the README's figure, from the committed result files.

    python benchmarks/documents.py write                      every block between markers
    python benchmarks/documents.py write measured demo        those of some tables
    python benchmarks/documents.py pictures                   every committed picture, as PNG and SVG
    python benchmarks/documents.py collect demo runs/seed0 runs/seed1 runs/seed2 --out demo-cpu.json
    python benchmarks/documents.py collect head a.json b.json --out head-cpu.json
    python benchmarks/documents.py collect comparison runs/sudoku --command "..." --out compare-sudoku.json

`collect` makes one result file of what several commands measured, to be kept in benchmarks/results:

    demo         for s in 0 1 2; do dllm-kernels demo --out runs/seed$s seed=$s; done
    head         python benchmarks/run.py --suite head --threads 2 --shape N=512,H=1024,V=126464 --out a.json,
                 and so on
    comparison   dllm-kernels compare --checkpoint runs/sft/checkpoint_sft --out runs/sudoku rl.updates=60,
                 stopped or at its end: what is missing is told

The other result files come from `benchmarks/run.py`, `benchmarks.studies.claims`, `benchmarks.studies.block_cost`,
`benchmarks.studies.block_rates`, `benchmarks.studies.block_learning`, `benchmarks.studies.cached_rollouts`,
`benchmarks.studies.cached_rl`, `benchmarks/loops.py` and `benchmarks/sudoku_in_trl.py`. "measured" is made of the default run
(--out benchmarks/results/default-cpu.json), the full one (--full --threads 2 --out benchmarks/results/cpu.json)
and runs of single suites or cases (benchmarks/results/cpu-*.json). Nothing is chosen
by its outcome: `LINES` names the cases and who stands beside ours before they are run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import stdev
from typing import Any, NamedTuple

if __name__ == "__main__":
    import checkout  # noqa: F401

from benchmarks import registry
from benchmarks.registry import Row
from benchmarks.report import caption, digits, every_row, known, markdown, summary, two_places

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FIGURE = RESULTS / "cpu-readme.png"

# where each table stands; a block of the same name in several documents is the same in all of them
DOCUMENTS: dict[str, tuple[str, ...]] = {
    "measured": ("docs/results.md",),
    "every row": ("docs/benchmarks.md",),
    "demo": ("docs/demo.md",),
    "algorithms": ("docs/algorithms.md",),
    "published": ("docs/published.md",),
    "comparison": ("docs/comparison.md",),
    "estimators": ("docs/estimators.md",),
    "head": ("docs/cpu_engine.md",),
    "claims": ("docs/claims.md",),
    "tasks": ("docs/tasks.md",),
    "blocks": ("docs/block_diffusion.md",),
    "fuzz": ("docs/loop.md",),
    "kept": ("docs/rollouts.md",),
    "attacks": ("docs/trainer.md",),
    "mutants": ("CONTRIBUTING.md",),
    "loops": ("docs/integrations.md",),
}


def result_of(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


# --- blocks between markers ---------------------------------------------------------------------------------


def in_document(text: str, name: str) -> str:
    """What stands between the markers of that name. Raises ValueError when they are missing."""
    return _marked(text, name).group(2)


def filled(text: str, blocks: Mapping[str, str]) -> str:
    """The document with these blocks made anew. Raises ValueError when a marker is missing."""
    for name, block in blocks.items():
        found = _marked(text, name)
        text = f"{text[: found.start(2)]}{block}{text[found.end(2) :]}"
    return text


def _marked(text: str, name: str) -> re.Match[str]:
    own = re.escape(name)
    found = re.search(rf"(<!-- {own}: benchmarks/[\w./]+ -->\n)(.*?)(?=\n<!-- end of {own} -->)", text, flags=re.DOTALL)
    if found is None:
        expected = f"<!-- {name}: benchmarks/documents.py -->", f"<!-- end of {name} -->"
        raise ValueError(f"the document must hold the markers {expected[0]!r} and {expected[1]!r}")
    return found


# --- what was measured: the README's lines, and every row ---------------------------------------------------


class Line(NamedTuple):
    """How a case's label begins and ends, the contestant beside ours, and the name that readers see."""

    suite: str
    name: str
    sizes: str  # that the label holds
    beside: str
    told: str


HEAD = ("forward", "unit", "coef", "sample")
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
    """The default run, the full run, runs of suites and cases: they replace default suites, later cases earlier ones."""
    return [RESULTS / "default-cpu.json", RESULTS / "cpu.json", *sorted(RESULTS.glob("cpu-*.json"))]


def digest() -> str:
    """Of all result files, one after the other."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in sources())).hexdigest()


def load() -> dict[str, Any]:
    """The suites of all files, each with its `figure`; what they ran on is that of the full run."""
    results = {file.stem: result_of(file.stem) for file in sources()}
    suites: dict[str, dict[str, Any]] = {}
    for stem, result in results.items():
        for name, entry in result["suites"].items():
            dtype = result["settings"]["dtype"]
            rows = [{**row, "case": _with_dtype(row["case"], dtype)} if "case" in row else row for row in entry["rows"]]
            here = {**entry, "rows": rows, "figure": f"cpu-{name}.png", "files": [stem]}
            usual = name not in suites or suites[name]["files"] == ["default-cpu"]
            suites[name] = here if usual else joined(name, suites[name], here)
    used = dict.fromkeys(stem for entry in suites.values() for stem in entry["files"])
    return {**results["cpu"], "suites": suites, "runs": [results[stem] for stem in used]}


def _with_dtype(case: str, dtype: str) -> str:
    """A run names its cases without its own dtype; beside runs in float32 another one is named."""
    return case if dtype == "float32" else f"{case} {dtype}"


def joined(name: str, first: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """A suite that was measured in two sittings: cases of the second come after those of the first, or replace them."""
    again = {row.get("case") for row in more["rows"]}
    rows = [row for row in first["rows"] if row.get("case") not in again] + more["rows"]
    files = [*first["files"], *more["files"]]
    return {**first, "rows": rows, "summary": summary(registry.load(name), rows), "files": files}  # type: ignore[arg-type]


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
    """Theirs over ours, of "time_ms" (medians) or "memory_mib"; None where unknown or below 0.1 MiB."""
    ours, other = pair.ours[key], pair.other[key]
    if key == "time_ms":
        return float(other["median"] / ours["median"]) if ours and other else None
    return float(other / ours) if ours is not None and other is not None and min(ours, other) >= 0.1 else None


def _pair_cells(pair: Pair) -> list[str]:
    ours, other = pair.ours, pair.other
    errors = [max(row["errors"].values()) if row["errors"] else None for row in (ours, other)]
    return [
        pair.line.told,
        pair.line.beside,
        digits(ours["time_ms"]["median"]),
        known(ratio(pair, "time_ms"), lambda value: f"**{digits(value)}**"),
        ", ".join(known(row["memory_mib"]) for row in (ours, other)),
        known(ratio(pair, "memory_mib"), lambda value: f"**{digits(value)}**"),
        known(ours["to_floor"], two_places),
        ", ".join(known(error, lambda value: f"{value:.0e}") for error in errors),
    ]


def measured(result: Mapping[str, Any]) -> str:
    """The lines of `LINES`, and the summary of every suite."""
    summaries = [f"- {name}: {entry['summary']}." for name, entry in result["suites"].items()]
    columns = ["what", "beside", "ours, ms", "their time / ours", "extra MiB: ours, theirs", "their memory / ours"]
    columns += ["over the limit", "largest error: ours, theirs"]
    return "\n\n".join([caption(result), markdown(columns, map(_pair_cells, pairs(result)), "---"), "\n".join(summaries)])


# --- the demo over several seeds ----------------------------------------------------------------------------

SETS = {"unseen_puzzles": "unseen puzzles", "unseen_grids": "unseen solution grids"}
DECODINGS = {"rollout": "rollout's temperature", "greedy": "greedy"}


def collect_demo(folders: list[Path]) -> dict[str, Any]:
    """What finished runs measured: shares of solved puzzles before and after RL, paired gains, settings."""
    return {"command": "dllm-kernels demo seed=N", "runs": [_demo_run(folder) for folder in folders]}


def _demo_run(folder: Path) -> dict[str, Any]:
    before, after = (json.loads((folder / name).read_text()) for name in ("eval_before.json", "eval_after.json"))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    sets: dict[str, dict[str, Any]] = {}
    for test, ways in after["sets"].items():
        for way, figures in ways.items():
            sets.setdefault(test, {})[way] = {
                "puzzles": figures["examples"],
                "sft": before["sets"][test][way]["correct"],
                "rl": figures["correct"],
                "gain": after["gain"][test][way],
                "sft_reference_cells": before["sets"][test][way]["reference_cells"],
                "rl_reference_cells": figures["reference_cells"],
                "decoding": figures["decoding"],
            }
    return {
        "seed": after["seed"],
        "sets": sets,
        "tokens": {phase: sum(int(x["tokens"]) for x in lines if x["phase"] == phase) for phase in ("sft", "rl")},
        "steps": {phase: sum(x["phase"] == phase for x in lines) for phase in ("sft", "rl")},
        "report": (folder / "report.md").read_text(),
        "environment": after["environment"],
        "config": (folder / "config.yaml").read_text(),
    }


def demo(result: Mapping[str, Any]) -> str:
    """Per test set, decoding and seed the solved share after SFT and after RL, and the paired gain."""
    lines = []
    for test, way in ((test, way) for test in SETS for way in DECODINGS):
        name, gains = f"{SETS[test]}, {DECODINGS[way]}", []
        for run in result["runs"]:
            figures, gain = run["sets"][test][way], run["sets"][test][way]["gain"]
            gains.append(gain["gain"])
            points = f"{100 * gain['gain']:+.1f} [{100 * gain['low']:+.1f}, {100 * gain['high']:+.1f}]"
            lines.append([name, str(run["seed"]), f"{100 * figures['sft']:.1f} %", f"{100 * figures['rl']:.1f} %", points])
        lines.append([f"**{name}**", "mean | |", f"**{100 * sum(gains) / len(gains):+.1f}**"])
    return markdown(["test set, decoding", "seed", "SFT", "after RL", "gain [95 %, paired]"], lines, "---")


# --- algorithms ---------------------------------------------------------------------------------------------


def algorithms() -> str:
    """The list of algorithms, from their recipes."""
    from dllm_kernels.objectives import RECIPES

    status = {"verified against the paper": "paper", "verified against the code": "code", "unverified": "unverified"}
    lines = []
    for name, recipe in RECIPES.items():
        objective = recipe.make()
        coupling = ", ".join(dict.fromkeys((objective.coupling, objective.on_policy_coupling)))
        masks = f"`{recipe.law}`" + ("" if recipe.samples is None else f" x {recipe.samples}")
        learns = "from trajectories" if recipe.needs_trajectory else "from fresh masks"
        scored = "all" if recipe.window == "completion" else f"to EOS, tail {recipe.tail or 'as the law has it'}"
        lines.append([f"`{name}`", recipe.arxiv, status[recipe.status], masks, scored, coupling, learns])
    heads = ["`--algorithm`", "arXiv", "verified against", "masks", "scored", "coupling, on-policy", "learns"]
    return markdown(heads, lines, "---")


def published(result: Mapping[str, Any]) -> str:
    """What of the authors' code was run beside each recipe, and how far apart loss and gradient were."""
    lines = []
    for name, row in result["recipes"].items():
        files: dict[str, list[str]] = {}
        for path, line, function in row["ran"]:
            files.setdefault(path, []).append(f"{line} `{function}`" if function else str(line))
        places = "; ".join(f"{path}: {', '.join(functions)}" for path, functions in files.items())
        differences = [f"{row[key]:.0e}" for key in ("loss_error", "gradient_error")]
        lines.append([f"`{name}`", f"{row['repository']} @ {row['commit']}", places, *differences])
    return markdown(["recipe", "repository", "file: line, function", "loss", "gradient"], lines, "---")


# --- comparisons of algorithms from one checkpoint ----------------------------------------------------------

TASKS = ("sudoku", "countdown")


def collect_comparison(folder: Path, made_by: str, out: Path) -> dict[str, Any]:
    """The comparison with the command that made it, and its picture beside the result where a run has ended."""
    result = {"schema": 2, "command": made_by, **json.loads((folder / "compare.json").read_text())}
    draw_comparison(result, out.with_suffix(".png"))
    return result


def comparison(result: dict[str, Any]) -> str:
    """Command, tables, verdict, what is missing, and greedy accuracies, which the table leaves out."""
    from dllm_trainer.commands.compare_report import notes, rows, sweeps, table, verdict

    found = rows(result)
    greedy = [f"{row['algorithm']} {100 * _mean(row['greedy']['rl']):.1f}" for row in found if not row["failed"]]
    seeds = max((len(row["forwards"]) for row in found), default=0)
    lines = [
        f"```\n{result['command']}\n```",
        f"{result['budget']:,} forwards a run, {seeds or 'no'} seed{'s' * (seeds != 1)}; "
        f"{result['environment']['cpu']}, one thread each.",
    ]
    if found:
        lines += [table(found), f"**{verdict(found)}**"]
    if greedy:
        lines.append(f"Greedy, in %: {', '.join(greedy)} (SFT {100 * _mean(found[0]['greedy']['sft']):.1f}).")
    told = (
        f"Right answers of {result['validation']} validation examples, in %, after {result['sweep_budget']:,} forwards at "
        "each learning rate; the chosen one is bold."
    )
    return "\n\n".join([*lines, *notes(result), told, sweeps(result), *_other_rates(result)])


def _other_rates(result: Mapping[str, Any]) -> list[str]:
    """What the table leaves out: seeds that have run at a rate that was not chosen."""
    from dllm_trainer.commands.compare_report import rate_of

    found: dict[str, dict[float, list[float]]] = {}
    for cell in result["cells"]:
        if cell["phase"] == "final" and cell["failed"] is None:
            right = found.setdefault(cell["algorithm"], {}).setdefault(cell["rate"], [])
            right.append(100 * cell["right"]["rollout"]["correct"])
    lines = []
    for name, by_rate in sorted(found.items()):
        taken = rate_of(result, name)
        texts = {rate: f"{_mean(right):.1f} ± {stdev(right):.1f}" for rate, right in by_rate.items() if len(right) > 1}
        for rate in sorted(texts.keys() - {taken}):
            lines.append([name, f"{taken:g}", texts[taken], f"{rate:g}", texts[rate]])
    if not lines:
        return []
    told = "Seeds that have run at another rate as well; the table above leaves them out."
    return [told, markdown(["algorithm", "rate", "+ RL (%)", "other rate", "+ RL (%)"], lines, "---")]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


# --- the head alone on a CPU --------------------------------------------------------------------------------

BOUNDS = {  # over the floor, by case: bfloat16, float32
    "forward": (1.20, 1.10),
    "unit": (1.20, 1.10),
    "coef": (1.25, 1.15),
    "sample": (1.45, 1.25),
}
PEERS = {"torch linear_ce": "F.linear_cross_entropy", "Liger chunked": "Liger", "TRL chunked": "TRL"}


def collect_head(files: list[Path]) -> dict[str, Any]:
    """The runs, as they are, in the order given. Raises ValueError for a file without the suite."""
    runs = [json.loads(file.read_text()) for file in files]
    for file, run in zip(files, runs, strict=True):
        if "head" not in run.get("suites", {}):
            raise ValueError(f"{file} holds no result of the head suite")
    return {"schema": 1, "runs": runs}


def head(result: Mapping[str, Any]) -> str:
    """One line per case: our time, and ratios of time and memory to the others of the same run."""
    lines = []
    for run in result["runs"]:
        cases: dict[str, dict[str, Row]] = {}
        for row in run["suites"]["head"]["rows"]:
            if row["time_ms"]:
                cases.setdefault(row["case"], {})[row["contestant"]] = row
        lines += [_head_cells(run["settings"]["dtype"], rows) for rows in cases.values() if "ours" in rows]
    columns = ["plan", "dtype", "N, H, V", "ours, ms", "over the floor (bound)", "over eager", "over others"]
    return markdown([*columns, "extra MiB: ours, eager"], lines, "---")


def _head_cells(dtype: str, rows: Mapping[str, Row]) -> list[str]:
    ours, eager = rows["ours"], rows.get("eager")
    plan, sizes, own = ours["case"].split()[0], ours["sizes"], ours["time_ms"]["median"]
    large = sizes["V"] > 100000
    bound = f" ({BOUNDS[plan][dtype == 'float32']:.2f})" if large and plan in BOUNDS else ""
    others = [f"{own / rows[name]['time_ms']['median']:.2f} {label}" for name, label in PEERS.items() if name in rows]
    return [
        f"`{plan}`",
        dtype,
        ", ".join(str(sizes[key]) for key in ("N", "H", "V")),
        f"{own:.{0 if large else 2}f}",
        f"{ours['to_floor']:.2f}{bound}",
        known(ours["to_baseline"] or None, two_places),
        ", ".join(others) or "–",
        ", ".join(f"{row['memory_mib']:.0f}" for row in (ours, eager) if row and row["memory_mib"] is not None),
    ]


# --- all of them --------------------------------------------------------------------------------------------


def blocks(table: str) -> dict[str, str]:
    """The blocks of one of `DOCUMENTS`, by the name that their markers have."""
    if table == "measured":
        return {table: measured(load())}
    if table == "every row":
        return {table: every_row(load())}
    if table == "demo":
        return {"demo table": demo(result_of("demo-cpu"))}
    if table == "algorithms":
        return {table: algorithms()}
    if table == "published":
        return {table: published(result_of("published"))}
    if table == "comparison":
        return {task: comparison(result_of(f"compare-{task}")) for task in TASKS}
    if table == "head":
        return {"head table": head(result_of("head-cpu"))}
    if table == "estimators":
        from benchmarks.studies import many_samples, variance

        of_laws = variance.blocks(result_of("estimators-cpu")["suites"]["variance"])
        return {**of_laws, "many samples": many_samples.table(result_of("many-samples-cpu"))}
    if table == "tasks":
        from benchmarks.studies import tasks

        return {"tasks table": tasks.table(result_of("tasks-cpu"))}
    if table == "blocks":
        from benchmarks.studies import block_cost, block_learning, block_rates

        return {
            "block cost": block_cost.table(result_of("block-cost-cpu")),
            "block learning": block_learning.table(result_of("block-learning-cpu")),
            "block rates": block_rates.table(result_of("block-rates-cpu")),
        }
    if table == "attacks":
        return {table: attacks(result_of("attack-cpu"))}
    if table == "mutants":
        from benchmarks import mutants

        return {table: mutants.counts(result_of("mutants"))}
    if table == "loops":
        from benchmarks import loops, sudoku_in_trl

        return {
            "loops table": loops.table(result_of("loops-cpu")),
            "sudoku in trl": sudoku_in_trl.table(result_of("sudoku-in-trl")),
        }
    if table == "kept":
        from benchmarks.studies import cached_rl, cached_rollouts

        found = result_of("cached-rollouts-cpu")
        return {
            "kept": cached_rollouts.table(found),
            "kept of the learned": cached_rollouts.table_of_learned(found),
            "kept in RL": cached_rl.table(result_of("cached-rl-cpu")),
        }
    if table == "fuzz":
        from benchmarks import fuzz

        return {
            "fuzzed calls": fuzz.counts(result_of("fuzz")),
            "fuzzed distillation": fuzz.counts(result_of("fuzz-distillation")),
            "fuzzed soft embeddings": fuzz.counts(result_of("fuzz-expectation")),
            "fuzzed gradients": fuzz.table(result_of("fuzz")),
        }
    from benchmarks.studies import claims

    return claims.blocks(result_of("claims-cpu"))


# what `benchmarks/attack.py` does in its kinds
ATTACKS = {
    "kills": "kill -9, one to three times, at any moment",
    "signals": "a signal that asks for an end, at any moment",
    "damage": "a file of a run lost, emptied, cut, flipped, garbled or replaced",
    "two": "two processes on one folder",
    "ranks": "one of two ranks killed or stopped",
    "resumes": "eight algorithms, fp32, bf16, LoRA, one and two ranks, stopped and gone on with: the same bits",
    "inputs": "hostile keys, files and configs: a sentence, or a run",
    "answers": "hostile completions to rewards and checkers",
}


def attacks(result: Mapping[str, Any]) -> str:
    lines = [
        [told, f"{result['kinds'][kind]['tried']:,}", f"{result['kinds'][kind]['survived']:,}"] for kind, told in ATTACKS.items()
    ]
    marks = result["long"]["marks"]
    sizes, handles = [mark["resident_mib"] for mark in marks], {mark["handles"] for mark in marks}
    flat = (
        f"A run of {result['long']['updates']:,} updates: {min(sizes):.0f} to {max(sizes):.0f} MiB resident and "
        f"{' or '.join(map(str, sorted(handles)))} open files at all of its {len(marks)} marks."
    )
    mended = "".join(
        f" Of `{entry['what'].partition(':')[0]}` the campaign saw a traceback; mended by commit "
        f"{entry['mended'].split()[2].rstrip(';')}, and tried again."
        for entry in result["mended"]
    )
    return f"{markdown(['attack', 'tried', 'survived'], lines)}\n\n{flat}{mended}"


def write(tables: Sequence[str]) -> None:
    """Fills the documents, and redraws the README's figure if the results have changed since it was drawn."""
    from benchmarks import plots

    for table in tables:
        for document in DOCUMENTS[table]:
            path = ROOT / document
            path.write_text(filled(path.read_text(), blocks(table)))
    if "measured" in tables and plots.source(FIGURE) != digest():
        draw_measured(load())


def draw_measured(result: Mapping[str, Any]) -> None:
    """The README's figure, and one of every timed suite."""
    for name, entry in result["suites"].items():
        if isinstance(registry.load(name), registry.Suite):
            registry.load(name).plot(entry["rows"], RESULTS / entry["figure"])
    draw(result, FIGURE, digest())


def draw(result: Mapping[str, Any], path: Path, source: str) -> None:
    """Their time and memory over ours, a bar each. `source`, a digest, is kept in the file."""
    from benchmarks import plots

    found = list(pairs(result))
    ratios = {
        title: [ratio(pair, key) or 0.0 for pair in found]
        for title, key in (("their time / ours", "time_ms"), ("their extra memory / ours", "memory_mib"))
    }
    plots.ratios([pair.line.told.replace("`", "") for pair in found], ratios, path, source)


def pictures() -> None:
    """Draws every picture of the committed results again."""
    from benchmarks import plots
    from benchmarks.studies import many_samples

    draw_measured(load())
    many_samples.draw(result_of("many-samples-cpu"), RESULTS / "many-samples-cpu.png")
    for file in sorted(RESULTS.glob("*.json")):
        result = result_of(file.stem)
        for name, entry in result["suites"].items() if isinstance(result.get("suites"), dict) else ():
            path = RESULTS / f"{file.stem}-{name}.png"
            if path.is_file():
                registry.load(name).plot(entry["rows"], path)
    grown = {row["algorithm"]: row for row in result_of("memory-of-algorithms")["rows"]}
    ways = ("engine", "full graph")
    plots.growth(
        {name: {way: float(row[f"{way}, growth MiB"]) for way in ways} for name, row in grown.items()},
        "growth of peak memory from 2 to 64 samples, MiB",
        RESULTS / "memory-of-algorithms.png",
    )
    for task in TASKS:
        draw_comparison(result_of(f"compare-{task}"), RESULTS / f"compare-{task}.png")


def draw_comparison(result: Mapping[str, Any], path: Path) -> None:
    """Right answers on unseen examples before and after RL, a point per seed; nothing where no run has ended."""
    from dllm_trainer.commands.compare_report import rows

    from benchmarks import plots

    points = {row["algorithm"]: row["rollout"] for row in rows(result) if row["rollout"]["rl"]}
    if points:
        plots.before_and_after(points, f"right answers, unseen {result['task']}, temperature {result['temperature']:g} (%)", path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("write", help="put tables of the committed results into their documents")
    writing.add_argument("tables", nargs="*", metavar="NAME", help=f"default all of {', '.join(DOCUMENTS)}")
    commands.add_parser("pictures", help="draw every committed picture again")
    collecting = commands.add_parser("collect", help="make a result file of what several commands measured")
    collecting.add_argument("table", choices=("demo", "head", "comparison", "tasks"))
    collecting.add_argument("sources", nargs="+", type=Path)
    collecting.add_argument("--command", dest="made_by", default="", help="how a comparison was made")
    collecting.add_argument("--out", required=True, type=Path)
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "write":
            if unknown := [name for name in arguments.tables if name not in DOCUMENTS]:
                raise ValueError(f"a table must be one of {', '.join(DOCUMENTS)}, got {unknown[0]!r}")
            write(arguments.tables or list(DOCUMENTS))
        elif arguments.command == "pictures":
            pictures()
        else:
            arguments.out.write_text(json.dumps(_collected(arguments), indent=1) + "\n")
    except (ValueError, OSError) as error:
        print(f"documents: {error}", file=sys.stderr)
        return 2
    return 0


def _collected(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.table == "demo":
        return collect_demo(arguments.sources)
    if arguments.table == "tasks":
        from benchmarks.studies import tasks

        return tasks.collect(arguments.sources)
    if arguments.table == "head":
        return collect_head(arguments.sources)
    if len(arguments.sources) != 1 or not arguments.made_by:
        raise ValueError("collect comparison takes one folder, and --command: how it was made")
    return collect_comparison(arguments.sources[0], arguments.made_by, arguments.out)


if __name__ == "__main__":
    sys.exit(main())
