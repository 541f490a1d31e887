r"""MATH: competition problems with answers in \boxed{}, compared by math-verify."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from ..errors import UserError
from . import d1_compat, math_scores
from .config import MathConfig
from .files import first_rows, text_of
from .from_scratch import reading
from .math_scores import last_boxed
from .rewards import load_reward
from .tags import TAGS, final_answer, tagged
from .task import Example, Reward, Task


def make(config: MathConfig, *, seed: int) -> Task:
    if find_spec("math_verify") is None:
        raise UserError("task.kind=math compares answers by the package math-verify: pip install 'dllm-kernels[math]'")
    train, test = read(config.train, config.train_rows), read(config.test, config.test_rows)
    system = f"{TAGS}\nWrite the final answer as \\boxed{{...}} inside the answer tags."
    exact = load_reward(f"{math_scores.__name__}:exact", timeout=config.timeout)
    return Task(
        name="math",
        train=train,
        tests={"test": test},
        rewards={"exact": exact, "shaped": shaped(exact), "d1": d1_compat.math},
        correct=exact,
        metrics={"boxed": boxed},
        completion_length=config.completion_length,
        system=system,
        **reading(config.style, (*train, *test), config.vocabulary, [system]),
    )


def read(source: str, rows: int | None) -> list[Example]:
    r"""Columns `problem` and `solution`; the answer is column `answer`, else the solution's last box."""
    examples = []
    for index, (where, row) in enumerate(first_rows(source, rows)):
        solution = text_of(row, "solution", where)
        gold = text_of(row, "answer", where) if "answer" in row else last_boxed(solution)
        if gold is None:
            raise UserError(f"{where}: a solution must hold a closed \\boxed{{...}}, or the row a column 'answer'")
        shown = tagged(solution, f"\\boxed{{{gold}}}")
        examples.append(Example(str(index), text_of(row, "problem", where), shown, {"answer": gold, "solution": solution}))
    return examples


def boxed(examples: Sequence[Example], completions: Sequence[str]) -> list[float]:
    r"""1.0 if the last `<answer>` holds a closed \boxed."""
    return [float((place := final_answer(text)) is not None and last_boxed(place) is not None) for text in completions]


def shaped(exact: Reward) -> Reward:
    r"""d1's weights without its defects: answer 2, answer tags 0.5, \boxed in them 0.5, else 0.25."""

    def reward(examples: Sequence[Example], completions: Sequence[str]) -> list[float]:
        parts = zip(exact(examples, completions), boxed(examples, completions), completions, strict=True)
        return [2.0 * right + 0.5 * (final_answer(text) is not None) + 0.25 + 0.25 * box for right, box, text in parts]

    return reward
