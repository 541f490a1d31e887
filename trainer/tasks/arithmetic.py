"""Arithmetic of untrusted text: parsed to a tree and walked, never evaluated by Python."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterator
from fractions import Fraction

LONGEST = 200  # characters; rules out harmful nesting and numbers that are slow to compute
_CHARACTERS = frozenset("0123456789+-*/() ")
_OPERATIONS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def parse(text: str) -> ast.expr | None:
    """The tree of an expression of integers, + - * / and parentheses; None for anything else or too long."""
    if len(text) > LONGEST or not set(text) <= _CHARACTERS:
        return None
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None
    return tree if all(_allowed(node) for node in ast.walk(tree)) else None


def _allowed(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        return type(node.value) is int
    if isinstance(node, ast.BinOp):
        return type(node.op) in _OPERATIONS
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, ast.USub)
    return isinstance(node, (ast.USub, *_OPERATIONS))


def value(tree: ast.expr) -> Fraction | None:
    """The exact value of a tree from `parse`; None if it divides by zero.

    Example:
        >>> value(parse("(1 + 2) / 4"))
        Fraction(3, 4)
    """
    try:
        return _value(tree)
    except ZeroDivisionError:
        return None


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.BinOp):
        return _OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp):
        return -_value(node.operand)
    assert isinstance(node, ast.Constant)
    assert isinstance(node.value, int)
    return Fraction(node.value)


def integers(tree: ast.expr) -> Iterator[int]:
    """The integers in a tree from `parse`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            yield node.value
