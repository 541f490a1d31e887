"""The trainer names no algorithm but the one that a run trains which chooses none."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import dllm_trainer
import pytest
from dllm_trainer.config import RlConfig

from dllm_kernels.objectives import RECIPES

TRAINER = Path(dllm_trainer.__file__).parent
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def texts(tree: ast.AST) -> Iterator[str]:
    """Every string and identifier of a syntax tree, docstrings apart."""
    docstrings = {id(node.body[0].value) for node in ast.walk(tree) if isinstance(node, DOCUMENTED) and ast.get_docstring(node)}  # type: ignore[attr-defined]
    for node in ast.walk(tree):
        if id(node) in docstrings:
            continue
        if isinstance(node, ast.BinOp):
            yield joined(node)
        for _, value in ast.iter_fields(node):
            for part in value if isinstance(value, list) else [value]:
                if isinstance(part, bytes):
                    yield part.decode(errors="replace")
                elif isinstance(part, str):
                    yield part


def joined(node: ast.AST) -> str:
    """What a sum of strings makes, "" for what is none."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return joined(node.left) + joined(node.right)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def algorithms_in(source: str) -> list[str]:
    """Names of algorithms in a module, alone or at the head of a longer one such as `gdpo_objective`."""
    words = [word for text in texts(ast.parse(source)) for word in re.split(r"\W+", text)]
    return [name for word in words for name in RECIPES if word == name or word.startswith(f"{name}_")]


@pytest.mark.parametrize(
    "source",
    [
        "name == 'gdpo'",
        "name in ('vrpo', 'gdpo')",
        "{'gdpo': 1}",
        "{**{'gdpo': 1}}",
        "dict(gdpo=1)",
        "call(**{'gdpo': 1})",
        "f'{x} gdpo'",
        "f'{x:gdpo}'",
        "x = 'of gdpo: the paper'",
        "x = 'gd' 'po'",
        "x = 'gd' + 'po'",
        "b'gdpo'",
        "match x:\n    case 'gdpo': pass",
        "match x:\n    case {'gdpo': y}: pass",
        "match x:\n    case Found(gdpo=1): pass",
        "objectives.gdpo",
        "from dllm_kernels.objectives import gdpo",
        "from dllm_kernels.objectives.gdpo import MODES",
        "from dllm_kernels.objectives import gdpo_objective as f",
        "gdpo = 1",
        "def gdpo(): pass",
        "def f(gdpo): pass",
        "def f():\n    'Of something.'\n    'gdpo'",
    ],
)
def test_a_name_is_found_wherever_it_stands(source: str) -> None:
    assert "gdpo" in algorithms_in(source)


@pytest.mark.parametrize("source", ["'''As gdpo has it.'''", "def f():\n    '''Of gdpo.'''", "# gdpo\nx = 'gdpox'"])
def test_docstrings_and_comments_may_name_one(source: str) -> None:
    assert algorithms_in(source) == []


def test_no_module_names_an_algorithm_but_the_default() -> None:
    found = {str(file.relative_to(TRAINER)): algorithms_in(file.read_text()) for file in sorted(TRAINER.rglob("*.py"))}
    assert len(found) > 30
    assert {file: names for file, names in found.items() if names} == {"config.py": ["bgpo"]}
    assert RlConfig.model_fields["algorithm"].default == "bgpo"
