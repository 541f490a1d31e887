"""Programs with unit tests: MBPP's and HumanEval's files, a small set that ships, and a toy for models from scratch.

The reward is the share of tests that a completion's program passes, each run in a sandbox.
"""

from __future__ import annotations

import ast
import builtins
import functools
import itertools
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dllm_kernels import noise
from dllm_kernels.noise import Stream

from ..errors import ConfigError, UserError, first_line
from .config import CodeConfig
from .files import distinct, first_rows, text_of
from .judge import Job, Judge
from .sandbox import Limits
from .task import Example, Reward, Task

SHIPPED = Path(__file__).with_name("programs.jsonl")
SYSTEM = "Answer with one Python function in a block that begins with ```python and ends with ```, and nothing else."

_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)
_TOY_INPUTS = range(6)
_TOY_LENGTH = 7  # (x+1)*2


def make(config: CodeConfig, *, seed: int) -> Task:
    limits = Limits(seconds=config.timeout, memory_mib=config.memory_mib, processes=config.processes)
    judge = Judge(config.sandbox, limits, config.workers)
    toy = config.style == "characters"
    train: Sequence[Example]
    tests: Mapping[str, Sequence[Example]]
    if toy:
        train, tests = toy_examples(config, "train", seed=seed), {"unseen": toy_examples(config, "unseen", seed=seed)}
    else:
        train = read(str(config.train or SHIPPED), config.train_rows)
        tests = {name: read(source, config.test_rows) for name, source in config.tests.items()}
    share, solved = _rewards(judge, _toy_program if toy else program)
    return Task(
        name="code",
        train=train,
        tests=tests,
        rewards={"tests": share, "solved": solved, **({} if toy else {"tests_and_format": _with_format(share)})},
        correct=solved,
        metrics={"tests": share, **({} if toy else {"format": well_formed})},
        completion_length=_TOY_LENGTH if toy else config.completion_length,
        alphabet="0123456789+-*()x=" if toy else None,
        system="" if toy else SYSTEM,
    )


def read(source: str, rows: int | None) -> list[Example]:
    """Rows in the form of MBPP (`test_list`) or of HumanEval (`test`, `entry_point`)."""
    found: list[Example] = []
    for where, row in first_rows(source, rows):
        name = text_of(row, "task_id", where) if "task_id" in row else str(len(found))
        reader = _mbpp if "test_list" in row else _human_eval if "entry_point" in row else None
        if reader is None:
            raise UserError(
                f"{where}: tests are columns test_list (as MBPP's) or test and entry_point (as HumanEval's), "
                f"and the columns are {', '.join(row) or 'none'}"
            )
        found.append(reader(name, row, where))
    return distinct(found, source)


def _mbpp(name: str, row: Mapping[str, Any], where: str) -> Example:
    tests, imports = _texts(row, "test_list", where), _texts(row, "test_imports", where)
    setup = [text_of(row, "test_setup_code", where)] if "test_setup_code" in row else []
    asked = text_of(row, "prompt" if "prompt" in row else "text", where)
    shown = text_of(row, "code", where) if "code" in row else ""
    facts = {"tests": tests, "setup": "\n".join([*imports, *setup]), "before": "", "names": _built_in(shown)}
    _check(facts, where)
    # the tests tell the function's name, as in MBPP's own prompts
    return Example(name, f"{asked}\nIt must pass these tests:\n{chr(10).join(tests)}", _block(shown), facts)


def _human_eval(name: str, row: Mapping[str, Any], where: str) -> Example:
    head = text_of(row, "prompt", where)
    check = f"{text_of(row, 'test', where)}\ncheck({text_of(row, 'entry_point', where)})"
    shown = head + text_of(row, "canonical_solution", where) if "canonical_solution" in row else ""
    name_asked = text_of(row, "entry_point", where)
    facts = {"tests": [check], "setup": "", "before": head, "name": name_asked, "names": [name_asked]}
    _check(facts, where)
    return Example(name, f"Complete this function:\n```python\n{head}```", _block(shown), facts)


def _built_in(code: str) -> list[str]:
    """The functions of a solution that have the names of Python's own, as `sum` in MBPP: tests mean the program's."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            defined = [node.name for node in ast.parse(code).body if isinstance(node, ast.FunctionDef)]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    return [name for name in defined if hasattr(builtins, name)]


def _check(facts: Mapping[str, Any], where: str) -> None:
    """Raises UserError for a test that no program could pass, as Python does not read it."""
    for test in facts["tests"]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of its style
                ast.parse(f"{facts['setup']}\n{test}")
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise UserError(f"{where}: a test is no Python ({first_line(error)}): {test!r:.80}") from error


def _texts(row: Mapping[str, Any], column: str, where: str) -> list[str]:
    found = row.get(column, [])
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found) or (column == "test_list" and not found):
        raise UserError(f"{where}: column {column!r} must be a list of texts, got {found!r:.60}")
    return list(found)


def _block(code: str) -> str:
    return f"```python\n{code.strip()}\n```" if code else ""


def program(example: Example, completion: str) -> str:
    """The last block of a completion, or all of it.

    It comes after the example's own lines: after all of them where it goes on in the body, else after the imports and helpers
    that they begin with, which a model that writes the function anew need not repeat.
    """
    blocks = _BLOCK.findall(completion)
    code = blocks[-1] if blocks else completion.partition("```")[0]
    before = example.facts["before"]
    if not before:
        return code
    named = rf"^(?:(?:async )?def|class) {re.escape(example.facts['name'])}\b"
    if re.search(named, code, re.MULTILINE) is None:
        return f"{before}{code}"
    begins = re.search(named, before, re.MULTILINE)
    return f"{before[: begins.start()] if begins else ''}{code}"


def _toy_program(example: Example, completion: str) -> str:
    return f"def f(x):\n    return {completion.strip() or None}"


def well_formed(examples: Sequence[Example], completions: Sequence[str]) -> list[float]:
    """1.0 for one block and nothing around it."""
    return [float(_BLOCK.fullmatch(text.strip()) is not None) for text in completions]


def _rewards(judge: Judge, written: Any) -> tuple[Reward, Reward]:
    def verdicts(examples: Sequence[Example], completions: Sequence[str]) -> list[list[bool]]:
        pairs = zip(examples, completions, strict=True)
        jobs = ((e.facts, written(e, text)) for e, text in pairs)
        return judge([Job(text, tuple(f["tests"]), f["setup"], tuple(f.get("names", ()))) for f, text in jobs])

    def share(examples: Sequence[Example], completions: Sequence[str]) -> list[float]:
        return [sum(passed) / len(passed) for passed in verdicts(examples, completions)]

    def solved(examples: Sequence[Example], completions: Sequence[str]) -> list[float]:
        return [float(all(passed)) for passed in verdicts(examples, completions)]

    return share, solved


def _with_format(share: Reward) -> Reward:
    def reward(examples: Sequence[Example], completions: Sequence[str]) -> list[float]:
        both = zip(share(examples, completions), well_formed(examples, completions), strict=True)
        return [passed + _FORMAT * form for passed, form in both]

    return reward


_FORMAT = 0.1


def toy_examples(config: CodeConfig, name: str, *, seed: int) -> list[Example]:
    """Programs of a stack machine to be written as Python: `x4+2*=` is `(x+4)*2`, or any other program of the same values.

    A hash of the problem decides whether it is held out. A share of the training demonstrations leaves the parentheses out,
    as if precedence did not matter; in every problem of the toy it does.
    """
    count = config.train_problems if name == "train" else config.test_problems
    problems = [problem for problem in _toy_problems() if _held_out(problem) == (name != "train")]
    if name != "train":
        if len(problems) < count:
            raise ConfigError(
                f"task.test_problems must be at most {len(problems)}, the held-out problems of the toy, got {count}"
            )
        problems = problems[:count]
    sequence = torch.tensor(noise.sequence_id(f"code/{name}"))
    draws = noise.uniform(noise.row_bits(seed, Stream.DATA, sequence, torch.arange(count)[:, None], torch.arange(2))).tolist()
    found = []
    for index, (which, quality) in enumerate(draws):
        problem = problems[int(which * len(problems)) if name == "train" else index]
        tests = [f"assert f({x}) == {value}" for x, value in zip(_TOY_INPUTS, problem.values, strict=True)]
        careless = name == "train" and quality < config.careless_share
        answer = problem.careless if careless else problem.right
        found.append(Example(str(index), f"{problem.asked}=", answer, {"tests": tests, "setup": ""}))
    return found


class _Problem(NamedTuple):
    asked: str  # for a stack machine
    right: str
    careless: str  # without parentheses
    values: tuple[int, ...]


@functools.cache
def _toy_problems() -> list[_Problem]:
    """(a+b)*c, a*(b+c), a-(b+c) and the like, of x and digits, where parentheses matter; in a fixed order that mixes them."""
    leaves, found = "x123456789", []
    for a, b, c in itertools.product(leaves, repeat=3):
        for first, second in itertools.product("+-*", repeat=2):
            for asked, right in (
                (f"{a}{b}{first}{c}{second}", f"({a}{first}{b}){second}{c}"),
                (f"{a}{b}{c}{second}{first}", f"{a}{first}({b}{second}{c})"),
            ):
                careless = right.replace("(", "").replace(")", "")
                values, others = ([eval(text, {"x": x}) for x in _TOY_INPUTS] for text in (right, careless))  # texts of ours
                if "x" in asked and values != others:
                    found.append(_Problem(asked, right, careless, tuple(values)))
    return sorted(found, key=lambda problem: noise.sequence_id(f"code/order/{problem.asked}"))


def _held_out(problem: _Problem) -> bool:
    return noise.sequence_id(f"code/{problem.asked}") % 4 == 0
