"""Change one operator, comparison, constant or flag of the numerics at a time, and see whether the fast tests notice.

    python benchmarks/mutants.py --count 600 --seed 0                    go on to 600 mutants in all
    python benchmarks/mutants.py --area masks --count 40                 of one area
    python benchmarks/mutants.py --show 'masks/draws.py:88:14 + -> -'    one mutant's difference, and its verdict anew
    python benchmarks/mutants.py --count 600 --out benchmarks/results/mutants.json

A mutant lives in a copy of the tree and is judged by all fast tests of its area, those of the file's own name first, until
one fails. It is killed by a failing test and by tests that take five times as long as in peace. The same seed draws the same
mutants of the same sources. Verdicts are kept in --state (default runs/mutants-<seed>.json), and a run that was cut off goes
on from there. --share 0/2 and --share 1/2 are two halves of the work for two processes, each with a state of its own; the last
one with --out puts them together. A survivor's reason, the sentence why it means nothing, is written by hand into --out and
kept there.
"""

from __future__ import annotations

import argparse
import ast
import copy
import difflib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    import checkout  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 5.0  # times what the tests of the area take in peace


@dataclass(frozen=True)
class Area:
    sources: tuple[str, ...]  # globs below the root
    tests: tuple[str, ...]  # files and folders: the area's whole fast suite


AREAS: Mapping[str, Area] = {
    "noise": Area(("dllm_kernels/noise.py", "dllm_kernels/rows.py"), ("tests/test_noise.py",)),
    "masks": Area(("dllm_kernels/masks/*.py",), ("tests/masks", "tests/accumulation/test_block_diffusion.py")),
    "head": Area(
        ("dllm_kernels/head/*.py", "dllm_kernels/backends/reference.py", "dllm_kernels/backends/cpu.py"),
        ("tests/head", "tests/backends/test_cpu_engine.py"),
    ),
    "losses": Area(("dllm_kernels/losses.py",), ("tests/test_losses.py",)),
    "model": Area(("dllm_kernels/model/*.py",), ("tests/model",)),
    "accumulation": Area(("dllm_kernels/accumulation/*.py",), ("tests/accumulation",)),
    "objectives": Area(("dllm_kernels/objectives/*.py",), ("tests/objectives", "tests/accumulation/test_all_algorithms.py")),
    "rollouts": Area(("dllm_kernels/rollouts/*.py",), ("tests/rollouts",)),
    "trainer": Area(("trainer/train/*.py", "trainer/records/checkpoints.py"), ("tests/trainer/train", "tests/trainer/records")),
    "costs": Area(("trainer/commands/*_plan.py", "trainer/commands/planned_calls.py"), ("tests/trainer/commands",)),
}
SWAPS: Mapping[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}


@dataclass(frozen=True)
class Mutant:
    file: str  # below the root
    line: int
    column: int
    start: int  # characters of the file that are replaced
    end: int
    text: str  # by this

    def applied(self, source: str) -> str:
        return source[: self.start] + self.text + source[self.end :]

    def described(self, source: str) -> str:
        return f"{self.file}:{self.line}:{self.column} {' '.join(source[self.start : self.end].split())} -> {self.text}"


def mutants(file: str, source: str) -> Iterator[Mutant]:
    """All of a file, but for types, decorators, texts and what is raised."""
    offsets = [0]
    for line in source.splitlines(keepends=True):
        offsets.append(offsets[-1] + len(line))
    lines = source.splitlines(keepends=True)

    def place(row: int, byte: int) -> int:
        return offsets[row - 1] + len(lines[row - 1].encode()[:byte].decode())

    for node in _nodes(ast.parse(source)):
        for changed in _changes(node):
            text = ast.unparse(ast.fix_missing_locations(changed))
            text = text if isinstance(changed, ast.Constant) else f"({text})"
            assert node.end_lineno is not None
            assert node.end_col_offset is not None
            start, end = place(node.lineno, node.col_offset), place(node.end_lineno, node.end_col_offset)
            yield Mutant(file, node.lineno, node.col_offset, start, end, text)


def _nodes(tree: ast.AST) -> Iterator[ast.expr]:
    for name, child in ((name, child) for name, value in ast.iter_fields(tree) for child in _listed(value)):
        skipped = name in ("annotation", "returns", "decorator_list", "type_params")
        if skipped or isinstance(child, ast.Raise | ast.JoinedStr) or not isinstance(child, ast.AST):
            continue
        if isinstance(child, ast.BinOp | ast.BoolOp | ast.Compare | ast.UnaryOp | ast.Constant):
            yield child
        yield from _nodes(child)


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else [value]


def _changes(node: ast.expr) -> Iterator[ast.expr]:
    if isinstance(node, ast.Constant):
        value = node.value
        if isinstance(value, bool):
            yield ast.Constant(not value)
        elif isinstance(value, int):
            yield ast.Constant(value + 1)
        elif isinstance(value, float):
            yield ast.Constant(2.0 * value or 1.0)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield node.operand
    elif isinstance(node, ast.Compare):
        for index, op in enumerate(node.ops):
            changed = copy.deepcopy(node)
            changed.ops[index] = SWAPS[type(op)]()  # type: ignore[call-overload]
            yield changed
    elif isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in SWAPS:
        changed_op = copy.deepcopy(node)
        changed_op.op = SWAPS[type(node.op)]()  # type: ignore[assignment]
        yield changed_op


def drawn(root: Path, areas: Sequence[str], count: int, seed: int) -> list[tuple[str, Mutant]]:
    """Each area's share is as its number of possible mutants, but at least three per cent of all."""
    found: dict[str, list[Mutant]] = {}
    for area in areas:
        files = sorted({file for pattern in AREAS[area].sources for file in root.glob(pattern)})
        found[area] = [m for file in files for m in mutants(str(file.relative_to(root)), file.read_text())]
        random.Random(f"{seed} {area}").shuffle(found[area])
    total = sum(map(len, found.values()))
    share = {area: max(count * len(many) / total, 0.03 * count) for area, many in found.items()}
    scale = count / sum(share.values())
    chosen = [(area, m) for area, many in found.items() for m in many[: round(share[area] * scale)]]
    random.Random(seed).shuffle(chosen)  # a run that is cut off has seen all areas
    return chosen


class Judge:
    """A copy of the tree, and a process that has imported the libraries: each verdict is a fork of it."""

    def __init__(self, root: Path, areas: Mapping[str, Area]) -> None:
        self.root, self.areas = root, areas
        self.tree = Path(tempfile.mkdtemp(prefix="mutants-"))
        ignored = shutil.ignore_patterns(".git", ".venv*", "runs", "build", "dist", "*.egg-info", "__pycache__", ".*_cache")
        shutil.copytree(root, self.tree / "tree", ignore=ignored)
        self.tree /= "tree"

    def close(self) -> None:
        shutil.rmtree(self.tree.parent)

    def in_peace(self, area: str) -> float:
        """Seconds of the area's tests without a mutant. Raises RuntimeError where they fail."""
        started = time.monotonic()
        if self._run(self._tests(area, ""), 3600.0) != "survived":
            raise RuntimeError(f"the tests of {area} fail without a mutant: {', '.join(self.areas[area].tests)}")
        return time.monotonic() - started

    def verdict(self, area: str, mutant: Mutant, seconds: float) -> str:
        file = self.tree / mutant.file
        source = file.read_text()
        try:
            file.write_text(mutant.applied(source))
            return self._run(self._tests(area, mutant.file), 30.0 + PATIENCE * seconds)
        finally:
            file.write_text(source)

    def _tests(self, area: str, file: str) -> list[str]:
        """Files of tests, those that are named like the source first."""
        given = [self.tree / name for name in self.areas[area].tests]
        files = [test for one in given for test in ([one] if one.is_file() else sorted(one.rglob("test_*.py")))]
        return [str(test) for test in sorted(files, key=lambda test: test.stem != f"test_{Path(file).stem}")]

    def _run(self, tests: list[str], patience: float) -> str:
        child = os.fork()
        if child == 0:
            os.setsid()
            os._exit(_tested(self.tree, tests))
        ends = time.monotonic() + patience
        while time.monotonic() < ends:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return "survived" if os.waitstatus_to_exitcode(status) == 0 else "killed"
            time.sleep(0.02)
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return "killed, by the clock"


def _tested(tree: Path, tests: list[str]) -> int:
    """In a forked process: pytest on the tree, of which both packages are imported."""
    import pytest

    os.chdir(tree)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    os.environ |= {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True
    sys.path[:] = [str(tree), *(path for path in sys.path if Path(path or ".").resolve() not in (ROOT, ROOT / "benchmarks"))]
    for name, module in list(sys.modules.items()):
        if name.startswith("__editable__") and hasattr(module, "MAPPING"):  # of an editable install
            for package, folder in module.MAPPING.items():
                module.MAPPING[package] = str(tree / Path(folder).name)
        if name.partition(".")[0] in ("benchmarks", "dllm_kernels", "dllm_trainer", "trainer", "tests"):
            del sys.modules[name]
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not slow", "--rootdir", str(tree)]
    try:
        return int(pytest.main([*options, *tests]))
    except BaseException:  # what a mutant raises at import
        return 1


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=600, help="mutants in all, those of earlier runs included")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--area", action="append", choices=tuple(AREAS), help="may be given several times; default all")
    parser.add_argument("--share", default="0/1", metavar="K/N", help="every N-th mutant from the K-th on")
    parser.add_argument("--show", metavar="MUTANT", help="as the state names it: print its difference and judge it")
    parser.add_argument("--minutes", type=float, help="start no further mutant after so many")
    parser.add_argument("--state", type=Path, metavar="FILE.json")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the score and the survivors there too")
    arguments = parser.parse_args(argv)
    part, _, parts = arguments.share.partition("/")
    if arguments.count < 1 or not (part.isdigit() and parts.isdigit() and int(part) < int(parts)):
        print("error: --count must be at least 1 and --share like 0/2", file=sys.stderr)
        return 2
    os.environ["OMP_NUM_THREADS"] = "1"
    import hypothesis  # noqa: F401  what a fork need not import again
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    areas = arguments.area or list(AREAS)
    chosen = drawn(ROOT, areas, arguments.count, arguments.seed)
    sources = {file: (ROOT / file).read_text() for file in {m.file for _, m in chosen}}
    judge = Judge(ROOT, AREAS)
    try:
        if arguments.show:
            return _show(judge, arguments.show, areas)
        suffix = "" if parts == "1" else f"-{part}-of-{parts}"
        path = arguments.state or ROOT / "runs" / f"mutants-{arguments.seed}{suffix}.json"
        state: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"seconds_in_peace": {}, "verdicts": {}}
        path.parent.mkdir(parents=True, exist_ok=True)
        ends = time.monotonic() + 60 * (arguments.minutes or 1e9)
        share = chosen[int(part) :: int(parts)]
        for area, mutant in share:
            name = mutant.described(sources[mutant.file])
            if name in state["verdicts"] or time.monotonic() > ends:
                continue
            if area not in state["seconds_in_peace"]:
                state["seconds_in_peace"][area] = round(judge.in_peace(area), 1)
            started = time.monotonic()
            verdict = judge.verdict(area, mutant, state["seconds_in_peace"][area])
            seconds = round(time.monotonic() - started, 1)
            state["verdicts"][name] = {"area": area, "verdict": verdict, "seconds": seconds}
            path.write_text(json.dumps(state, indent=1) + "\n")
            print(f"{len(state['verdicts'])}/{len(share)} {verdict} after {seconds} s: {name}", flush=True)
        if arguments.out:
            halves = sorted(path.parent.glob(f"mutants-{arguments.seed}*.json")) if arguments.state is None else [path]
            _write(arguments.out, [json.loads(half.read_text()) for half in halves], len(chosen), arguments.seed)
    finally:
        judge.close()
    return 0


def _show(judge: Judge, name: str, areas: Sequence[str]) -> int:
    for area in areas:
        for pattern in AREAS[area].sources:
            for file in sorted(ROOT.glob(pattern)):
                source = file.read_text()
                for mutant in mutants(str(file.relative_to(ROOT)), source):
                    if mutant.described(source) == name:
                        before, after = source.splitlines(), mutant.applied(source).splitlines()
                        print("\n".join(difflib.unified_diff(before, after, lineterm="", n=4)))
                        print(judge.verdict(area, mutant, 600.0))
                        return 0
    print(f"error: --show must name a mutant of these sources, got {name!r}", file=sys.stderr)
    return 2


def _write(out: Path, states: Sequence[dict[str, Any]], planned: int, seed: int) -> None:
    """Counts by area and the survivors, with the reasons that stood in the file before."""
    from dllm_trainer.records.environment import environment

    before = json.loads(out.read_text())["survivors"] if out.is_file() else {}
    verdicts = {name: verdict for state in states for name, verdict in state["verdicts"].items()}
    counts: dict[str, dict[str, int]] = {}
    for verdict in verdicts.values():
        count = counts.setdefault(verdict["area"], {"killed": 0, "survived": 0})
        count["survived" if verdict["verdict"] == "survived" else "killed"] += 1
    killed = sum(count["killed"] for count in counts.values())
    found = {
        "schema": 1,
        "command": f"python benchmarks/mutants.py --count {planned} --seed {seed}",
        "environment": environment(),
        "planned": planned,
        "judged": len(verdicts),
        "killed": killed,
        "killed_share": round(killed / max(1, len(verdicts)), 4),
        "by_area": dict(sorted(counts.items())),
        "survivors": {n: before.get(n, "") for n, v in sorted(verdicts.items()) if v["verdict"] == "survived"},
    }
    out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{killed} of {len(verdicts)} killed ({found['killed_share']:.1%}); {out}")


if __name__ == "__main__":
    sys.exit(main())
