"""Imports between modules, from the syntax tree, including those in functions and under TYPE_CHECKING."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

Graph = Mapping[str, Collection[str]]


@dataclass(frozen=True)
class Import:
    source: str  # the importing module, such as dllm_kernels.head.plans
    target: str  # the imported one: the submodule where `from package import name` names one
    line: int

    def __str__(self) -> str:
        return f"{self.source}:{self.line} imports {self.target}"


def find_modules(root: Path, packages: Collection[str]) -> dict[str, Path]:
    """The modules of the packages under `root` by dotted name; a package has its own name, without
    `__init__`.
    """
    found = {}
    for package in packages:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def find_imports(root: Path, packages: Collection[str], aliases: Mapping[str, str] | None = None) -> list[Import]:
    """All imports among the modules of the packages. `aliases`: other names under which packages are
    imported.

    Ignored: `import a.b` also runs the `__init__` of a, which may import everything below it.
    """
    modules = find_modules(root, packages)
    found = []
    for source, path in modules.items():
        package = source if path.name == "__init__.py" else source.rpartition(".")[0]
        for line, name, names in _statements(ast.parse(path.read_text()), package):
            top, dot, rest = name.partition(".")
            name = (aliases or {}).get(top, top) + dot + rest
            for target in {_longest_known(f"{name}.{part}" if part else name, modules) for part in names}:
                if target is not None and target != source:
                    found.append(Import(source, target, line))
    return found


def _statements(tree: ast.Module, package: str) -> Iterator[tuple[int, str, list[str]]]:
    """Line, absolute module name, and the names taken from it ("" for the module itself)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, [""]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            yield node.lineno, ".".join([*above, *([node.module] if node.module else [])]), [a.name for a in node.names]


def _longest_known(name: str, modules: Collection[str]) -> str | None:
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name or None


def find_circle(graph: Graph) -> list[str] | None:
    """A path along arrows that ends where it began, or None."""
    done: set[str] = set()
    for start in graph:
        stack = [(start, iter(sorted(graph[start])))]
        path = [start]
        while stack and start not in done:
            following = next((name for name in stack[-1][1] if name not in done), None)
            if following is None:
                done.add(path.pop())
                stack.pop()
            elif following in path:
                return [*path[path.index(following) :], following]
            else:
                path.append(following)
                stack.append((following, iter(sorted(graph.get(following, ())))))
    return None
