"""Where the options of a head are listed by name, read from the syntax tree."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from typing import NamedTuple

NAMES = frozenset({"bias", "softcap", "temperature", "suppress", "valid_vocab", "logit_temperature", "excluded"})
LEAST = 3  # so many of them in one place are a listing

_Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


class Listing(NamedTuple):
    line: int
    names: tuple[str, ...]  # sorted
    of: str  # the function or class whose signature or fields list them; what a call calls; "" for a literal
    inside: str  # the outermost function or class around it, itself included; "" at the top of a module


def listings(source: str) -> list[Listing]:
    """Three or more head options in one call, literal, signature or class body, in the order of lines.

    Options passed by `*` of a literal, or by `**` of a dict built in the same function, count as listed in
    the call.
    """
    visitor = _Visitor()
    visitor.visit(ast.parse(source))
    return sorted(visitor.found)


class _Visitor(ast.NodeVisitor):
    def __init__(self) -> None:
        self.found: list[Listing] = []
        self._built: list[dict[str, set[str]]] = [{}]  # by scope: the options that a local dict holds
        self._around: list[str] = []
        self._spread: set[ast.AST] = set()  # literals that count as a part of the call or dict around them

    def _note(self, node: ast.AST, names: Iterable[str], of: str = "") -> None:
        chosen = tuple(sorted(NAMES.intersection(names)))
        if len(chosen) >= LEAST:
            inside = self._around[0] if self._around else ""
            self.found.append(Listing(node.lineno, chosen, of, inside))  # type: ignore[attr-defined]

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._around.append(node.name)
        targets = [t for s in node.body for t in (s.targets if isinstance(s, ast.Assign) else [getattr(s, "target", None)])]
        self._note(node, [target.id for target in targets if isinstance(target, ast.Name)], node.name)
        self.generic_visit(node)
        self._around.pop()

    def visit_FunctionDef(self, node: _Function) -> None:
        arguments = node.args
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        name = getattr(node, "name", "lambda")
        self._around.append(name)
        self._note(node, [argument.arg for argument in every], name)
        self._built.append({})
        self.generic_visit(node)
        self._built.pop()
        self._around.pop()

    visit_AsyncFunctionDef = visit_Lambda = visit_FunctionDef

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            self._build(target, node.value, anew=True)
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self._build(node.target, node.value, anew=True)
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self._build(node.target, node.value, anew=False)
        self.generic_visit(node)

    def _build(self, target: ast.expr, value: ast.expr, *, anew: bool) -> None:
        scope = self._built[-1]
        if isinstance(target, ast.Name):
            scope[target.id] = self._keys(value) | (set() if anew else scope.get(target.id, set()))
        elif isinstance(target, ast.Subscript) and isinstance(target.value, ast.Name):
            scope.setdefault(target.value.id, set()).update(_strings([target.slice]))

    def visit_Call(self, node: ast.Call) -> None:
        names = {keyword.arg for keyword in node.keywords if keyword.arg is not None}
        for keyword in node.keywords:
            if keyword.arg is None:
                names |= self._keys(keyword.value)
                self._spread.add(keyword.value)
        for argument in node.args:
            if isinstance(argument, ast.Starred) and isinstance(argument.value, ast.Tuple | ast.List):
                names.update(_words(argument.value.elts))
                self._spread.add(argument.value)
            else:
                names.update(_words([argument]))
        self._note(node, names, next(_words([node.func])))
        self.generic_visit(node)

    def visit_Dict(self, node: ast.Dict) -> None:
        if node not in self._spread:
            self._note(node, self._keys(node))
        self.generic_visit(node)

    def visit_Tuple(self, node: ast.Tuple | ast.List | ast.Set) -> None:
        if node not in self._spread:
            self._note(node, [*_words(node.elts), *_strings(node.elts)])
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if node not in self._spread:
            self._note(node, self._keys(node))
        self.generic_visit(node)

    visit_List = visit_Set = visit_Tuple

    def _keys(self, value: ast.expr) -> set[str]:
        """The keys of a dict as far as its expression shows them; nested literals are counted once."""
        if isinstance(value, ast.Name):
            return set().union(*(scope.get(value.id, ()) for scope in self._built))
        if isinstance(value, ast.BinOp) and isinstance(value.op, ast.BitOr):
            self._spread.update((value.left, value.right))
            return self._keys(value.left) | self._keys(value.right)
        if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "dict":
            keys = {keyword.arg for keyword in value.keywords if keyword.arg is not None}
            spread = [*value.args, *(keyword.value for keyword in value.keywords if keyword.arg is None)]
            return keys.union(*map(self._keys, spread))
        if isinstance(value, ast.Dict):
            spread = [inner for key, inner in zip(value.keys, value.values, strict=True) if key is None]
            self._spread.update(inner for inner in spread if isinstance(inner, ast.Dict))
            return set(_strings(key for key in value.keys if key is not None)).union(*map(self._keys, spread))
        return set()


def _strings(nodes: Iterable[ast.expr]) -> Iterator[str]:
    return (node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))


def _words(nodes: Iterable[ast.expr]) -> Iterator[str]:
    """What variables and attributes are called: `bias`, `problem.bias`, `self._bias`."""
    for node in nodes:
        name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
        yield name.lstrip("_")
