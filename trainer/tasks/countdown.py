"""Countdown: reach a target with +, -, * and / from numbers to be used once each; always solvable."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch

from dllm_kernels import noise
from dllm_kernels.noise import Stream

from ..errors import ConfigError, UserError
from . import arithmetic, d1_compat
from .config import CountdownConfig
from .files import first_rows, text_of
from .tags import TAGS, final_answer
from .task import Example, Task

_CHUNK = 2048
_FRUITLESS = 16  # give up after so many chunks without a new problem
_SENTENCE = (
    "Use each of the numbers {numbers} exactly once, with +, -, *, / and parentheses, to make {target}. "
    "Answer with the expression alone, without an equals sign."
)
_PARTIAL = 0.1  # d1's credit for a wrong answer


@dataclass(frozen=True, slots=True)
class Term:
    """An expression with its value; `text` has the necessary parentheses, `careless` none."""

    top: int  # the value is top / bottom, not reduced: a Fraction is slow, and millions are drawn
    bottom: int
    text: str
    careless: str
    rank: int  # 2: a number; 1: a product or quotient; 0: a sum or difference
    place: int  # of its first number in the problem

    @property
    def value(self) -> Fraction:
        return Fraction(self.top, self.bottom)

    @staticmethod
    def number(value: int, place: int) -> Term:
        return Term(value, 1, str(value), str(value), 2, place)


def combine(left: Term, operation: str, right: Term) -> Term | None:
    """`left operation right`, operands of + and * in the problem's order; None if it divides by zero."""
    if operation in "+*" and right.place < left.place:
        left, right = right, left
    if operation == "/" and right.top == 0:
        return None
    rank = 0 if operation in "+-" else 1
    wrap_right = right.rank < rank or (right.rank == rank and operation in "-/")
    a = f"({left.text})" if left.rank < rank else left.text
    b = f"({right.text})" if wrap_right else right.text
    x, y, z = left.top * right.bottom, right.top * left.bottom, left.bottom * right.bottom
    top, bottom = {"+": (x + y, z), "-": (x - y, z), "*": (left.top * right.top, z), "/": (x, y)}[operation]
    return Term(
        top, bottom, f"{a}{operation}{b}", f"{left.careless}{operation}{right.careless}", rank, min(left.place, right.place)
    )


def make(config: CountdownConfig, *, seed: int) -> Task:
    tests = {"unseen": examples(config, "unseen", config.test_problems, seed=seed)}
    if config.test_file is not None:
        tests["file"] = read_d1(config.test_file, config.style)
    width = len(str(config.number_max))
    return Task(
        name="countdown",
        train=examples(config, "train", config.train_problems, seed=seed),
        tests=tests,
        rewards={"exact": exact, "partial": partial, **({"d1": d1_compat.countdown} if config.style == "words" else {})},
        correct=exact,
        metrics={"well_formed": well_formed, "right_numbers": right_numbers},
        completion_length=longest(max(config.numbers), width) if config.style == "characters" else 256,
        alphabet="0123456789+-*/()> =" if config.style == "characters" else None,
        system="" if config.style == "characters" else TAGS,
    )


def longest(numbers: int, width: int) -> int:
    """Length of the longest expression without redundant parentheses."""
    return numbers * width + (numbers - 1) + 2 * max(0, numbers - 2)


def examples(config: CountdownConfig, name: str, count: int, *, seed: int) -> list[Example]:
    """`count` problems with the expressions they were made from; a function of (config, name, seed).

    A hash of the problem, independent of the order of its numbers, decides whether it is held out for tests.
    A share of the training demonstrations omits parentheses, as if precedence did not matter; some are right
    nevertheless.
    """
    found: list[Example] = []
    seen: set[tuple[tuple[int, ...], int]] = set()
    chunk, last_gain = 0, 0
    while len(found) < count:
        if chunk - last_gain >= _FRUITLESS:
            raise ConfigError(
                f"task: only {len(found)} of {count} problems for {name} found with numbers up to {config.number_max} and "
                f"targets up to {config.target_max}; ask for fewer problems or a wider range"
            )
        for numbers, target, term, quality in _candidates(config, name, chunk, seed=seed):
            key = (numbers, target)
            if len(found) < count and key not in seen and held_out(numbers, target, config.held_out_share) == (name != "train"):
                seen.add(key)
                careless = name == "train" and quality < config.careless_share
                answer = term.careless if careless else term.text
                found.append(_example(str(len(found)), numbers, target, answer, config.style, len(str(config.number_max))))
                last_gain = chunk
        chunk += 1
    return found


def held_out(numbers: Iterable[int], target: int, share: float) -> bool:
    """Whether a problem belongs to the tests; independent of the seed and the order of its numbers."""
    return noise.sequence_id(f"countdown/{_problem(numbers, target)}") % 2**32 < share * 2**32


def _problem(numbers: Iterable[int], target: int) -> str:
    return f"{','.join(map(str, sorted(numbers)))}>{target}"


def _candidates(
    config: CountdownConfig, name: str, chunk: int, *, seed: int
) -> Iterator[tuple[tuple[int, ...], int, Term, float]]:
    """(numbers, target, expression, draw for the demonstration's quality) of the problems in range."""
    most = max(config.numbers)
    sequence = torch.tensor(noise.sequence_id(f"countdown/{name}"))
    sample = torch.arange(chunk * _CHUNK, (chunk + 1) * _CHUNK)[:, None]
    draws = noise.uniform(noise.row_bits(seed, Stream.DATA, sequence, sample, torch.arange(2 + 4 * most))).tolist()
    for row in draws:
        source = iter(row)
        quality = next(source)
        count = config.numbers[int(next(source) * len(config.numbers))]
        numbers = tuple(1 + int(next(source) * config.number_max) for _ in range(count))
        term = _build([Term.number(number, place) for place, number in enumerate(numbers)], config.operations, source)
        if term is not None and term.top % term.bottom == 0 and 1 <= term.top // term.bottom <= config.target_max:
            yield numbers, term.top // term.bottom, term, quality


def _build(terms: list[Term], operations: str, draws: Iterator[float]) -> Term | None:
    """Combine random pairs by random operations until one expression is left."""
    while len(terms) > 1:
        left = terms.pop(int(next(draws) * len(terms)))
        right = terms.pop(int(next(draws) * len(terms)))
        made = combine(left, operations[int(next(draws) * len(operations))], right)
        if made is None:
            return None
        terms.append(made)
    return terms[0]


def _example(name: str, numbers: Sequence[int], target: int, answer: str, style: str, width: int) -> Example:
    facts = {"numbers": list(numbers), "target": target}
    if style == "characters":
        shown = " ".join(f"{number:0{width}d}" for number in numbers)
        return Example(name, f"{shown}>{target}=", answer, facts, problem=_problem(numbers, target))
    prompt = _SENTENCE.format(numbers=", ".join(map(str, numbers)), target=target)
    answer = f"<answer>\n{answer}\n</answer>" if answer else ""
    return Example(name, prompt, answer, facts, problem=_problem(numbers, target))


def read_d1(path: str, style: str) -> list[Example]:
    """Problems of a JSONL file in d1's format: {"input": "30,100,93", "output": "23"}."""
    found = []
    for index, (where, row) in enumerate(first_rows(path, None)):
        numbers, target = text_of(row, "input", where).split(","), text_of(row, "output", where)
        if not all(number.strip().isdecimal() for number in [*numbers, target]):
            raise UserError(f"{where}: input must be numbers with commas between them, and output a number, got {dict(row)}")
        found.append(_example(str(index), [int(number) for number in numbers], int(target), "", style, width=1))
    return found


def grade(example: Example, completion: str) -> tuple[bool, bool, bool]:
    """Whether it is an expression, whether it uses exactly these numbers, and whether it makes the target."""
    tagged = final_answer(completion)
    tree = arithmetic.parse(completion if tagged is None else tagged)
    if tree is None:
        return False, False, False
    numbers = sorted(arithmetic.integers(tree)) == sorted(example.facts["numbers"])
    return True, numbers, numbers and arithmetic.value(tree) == example.facts["target"]


def exact(examples: Sequence[Example], completions: Sequence[str]) -> list[float]:
    """1.0 for an expression of exactly these numbers with the target as its value."""
    return [float(grade(example, text)[2]) for example, text in zip(examples, completions, strict=True)]


def partial(examples: Sequence[Example], completions: Sequence[str]) -> list[float]:
    """As `exact`, with 0.1 for any other expression."""
    grades = [grade(example, text) for example, text in zip(examples, completions, strict=True)]
    return [1.0 if solved else _PARTIAL * well for well, _, solved in grades]


def well_formed(examples: Sequence[Example], completions: Sequence[str]) -> list[float]:
    return [float(grade(example, text)[0]) for example, text in zip(examples, completions, strict=True)]


def right_numbers(examples: Sequence[Example], completions: Sequence[str]) -> list[float]:
    return [float(grade(example, text)[1]) for example, text in zip(examples, completions, strict=True)]
