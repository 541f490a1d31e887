"""What is changed: operators, comparisons, constants and flags of the numerics, and the tests that should notice."""

from __future__ import annotations

import ast
import copy
import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Area:
    sources: tuple[str, ...]  # globs below the root
    tests: tuple[str, ...]  # files and folders: the area's whole fast suite


AREAS: Mapping[str, Area] = {
    "noise": Area(("dllm_kernels/noise.py",), ("tests/test_noise.py",)),
    "masks": Area(
        ("dllm_kernels/masks/*.py",),
        (
            *("tests/masks", "tests/accumulation/test_block_diffusion.py", "tests/rollouts/test_trajectories.py"),
            "tests/rollouts/test_events.py",
            *("tests/objectives/test_egspo.py", "tests/objectives/test_trace_rl.py"),
        ),
    ),
    "head": Area(
        ("dllm_kernels/head/*.py", "dllm_kernels/rows.py", "dllm_kernels/backends/reference.py", "dllm_kernels/backends/cpu.py"),
        ("tests/head", "tests/backends/test_cpu_engine.py"),
    ),
    "losses": Area(("dllm_kernels/losses.py",), ("tests/test_losses.py",)),
    "model": Area(
        ("dllm_kernels/model/*.py",),
        ("tests/model", "tests/rollouts/test_layouts.py", "tests/rollouts/test_events.py", "tests/rollouts/test_samplers.py"),
    ),
    "accumulation": Area(("dllm_kernels/accumulation/*.py",), ("tests/accumulation", "tests/model/test_sharded.py")),
    "objectives": Area(
        ("dllm_kernels/objectives/*.py",),
        (
            *("tests/objectives", "tests/accumulation/test_all_algorithms.py"),
            *("tests/trainer/train/test_algorithms.py", "tests/trainer/train/test_installed_algorithm.py"),
        ),
    ),
    "rollouts": Area(("dllm_kernels/rollouts/*.py",), ("tests/rollouts", "tests/model/test_kept.py")),
    "trainer": Area(
        ("trainer/train/*.py", "trainer/records/checkpoints.py"),
        (
            *("tests/trainer/train", "tests/trainer/records", "tests/trainer/test_attacks.py", "tests/trainer/test_schedules.py"),
            "tests/trainer/commands/test_compare.py",
        ),
    ),
    "costs": Area(("trainer/commands/*_plan.py", "trainer/commands/planned_calls.py"), ("tests/trainer/commands",)),
}
_ALONG_AN_AXIS = re.compile("all|any|amax|amin|argmax|argmin|argsort|sort|cumprod|cumsum|sum|logsumexp|gather")
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
    change: str  # in words
    name: str  # by file, text of the line and place in it, so that edits elsewhere leave it

    def applied(self, source: str) -> str:
        return source[: self.start] + self.text + source[self.end :]


def mutants(file: str, source: str) -> Iterator[Mutant]:
    """All of a file, but for types, decorators, texts, what is raised, and the strictness of a zip.

    `strict` only says aloud that two sequences have one length, which they have wherever the code is right. Where -1 names the
    last axis of a tensor that has two by its name, as in `x_BS.sum(-1)`, it becomes -2 but not 1, which is the same axis.
    """
    lines = source.splitlines(keepends=True)
    offsets = [0]
    for line in lines:
        offsets.append(offsets[-1] + len(line))
    seen: Counter[str] = Counter()

    def place(row: int, byte: int) -> int:
        return offsets[row - 1] + len(lines[row - 1].encode()[:byte].decode())

    for node in _nodes(ast.parse(source)):
        for changed in _changes(node):
            text = ast.unparse(ast.fix_missing_locations(changed))
            text = text if isinstance(changed, ast.Constant) else f"({text})"
            assert node.end_lineno is not None
            assert node.end_col_offset is not None
            start, end = place(node.lineno, node.col_offset), place(node.end_lineno, node.end_col_offset)
            change = f"{' '.join(source[start:end].split())} -> {text}"
            line = lines[node.lineno - 1]
            name = f"{file} | {line.strip()} | {node.col_offset - len(line) + len(line.lstrip())}: {change}"
            seen[name] += 1
            name = name if seen[name] == 1 else f"{name} #{seen[name]}"
            yield Mutant(file, node.lineno, node.col_offset, start, end, text, change, name)


def _nodes(tree: ast.AST) -> Iterator[ast.expr]:
    for name, child in ((name, child) for name, value in ast.iter_fields(tree) for child in _listed(value)):
        skipped = name in ("annotation", "returns", "decorator_list", "type_params")
        if skipped or isinstance(child, ast.Raise | ast.JoinedStr) or not isinstance(child, ast.AST):
            continue
        if (isinstance(child, ast.keyword) and child.arg == "strict") or _is_optional(child):
            continue
        same = _is_last_of_two_axes(tree, child)
        if isinstance(child, ast.BinOp | ast.BoolOp | ast.Compare | ast.UnaryOp | ast.Constant) and not same:
            yield child
        yield from _nodes(child)


def _is_last_of_two_axes(call: ast.AST, argument: ast.AST) -> bool:
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute) or argument not in call.args[:1]:
        return False
    owner, method = call.func.value, call.func.attr
    name = getattr(owner, "id", getattr(owner, "attr", ""))
    by_axis = ast.unparse(argument) == "-1" and _ALONG_AN_AXIS.fullmatch(method) is not None
    return by_axis and re.search(r"_[A-Z][A-Za-z0-9]$", name) is not None


def _is_optional(node: ast.AST) -> bool:
    """A type: X | None."""
    none = isinstance(node, ast.BinOp) and isinstance(node.right, ast.Constant) and node.right.value is None
    return none and isinstance(node.op, ast.BitOr)  # type: ignore[attr-defined]


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
    """Each area's share is as its number of possible mutants, but at least three per cent of all; rounded up.

    The order is that of hashes of seed and name: an edit of the sources changes the draw by what it edits alone.
    """
    found: dict[str, list[Mutant]] = {}
    for area in areas:
        files = sorted({file for pattern in AREAS[area].sources for file in root.glob(pattern)})
        every = [m for file in files for m in mutants(str(file.relative_to(root)), file.read_text())]
        found[area] = sorted(every, key=lambda mutant: hashlib.sha256(f"{seed} {mutant.name}".encode()).digest())
    total = sum(map(len, found.values()))
    share = {area: max(count * len(many) / total, 0.03 * count) for area, many in found.items()}
    scale = count / sum(share.values())
    return [(area, m) for area, many in found.items() for m in many[: math.ceil(share[area] * scale)]]


@dataclass(frozen=True)
class Place:
    """Where a mutant stands: the lines of its statement, and whether they run in a function, or when its module is imported."""

    lines: range
    in_function: bool


def place_of(source: str, mutant: Mutant) -> Place:
    best, inside = range(mutant.line, mutant.line + 1), False
    for node in ast.walk(ast.parse(source)):
        body: Any = getattr(node, "body", None)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            first, last = (body[0], body[-1]) if isinstance(body, list) else (body, body)
            starts, ends = (first.lineno, first.col_offset), (last.end_lineno, last.end_col_offset)
            inside |= starts <= (mutant.line, mutant.column) < ends
        if not isinstance(node, ast.stmt) or not node.lineno <= mutant.line <= (node.end_lineno or 0):
            continue
        last_line = node.end_lineno or node.lineno
        if isinstance(body, list) and body:
            last_line = max(node.lineno, body[0].lineno - 1)
        if mutant.line <= last_line:  # an inner statement comes later in the walk
            best = range(node.lineno, last_line + 1)
    return Place(best, inside)
