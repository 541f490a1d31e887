"""GSM8K: grade-school word problems whose answer is a number; demonstrations are the data's own reasoning."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from ..errors import UserError
from . import d1_compat
from .config import Gsm8kConfig
from .files import first_rows, text_of
from .from_scratch import reading
from .math_scores import last_boxed
from .shaping import layout
from .tags import TAGS, final_answer, tagged
from .task import Example, Task

_CALCULATION = re.compile(r"<<[^<>]*>>")  # calculator annotations in the data: 48/2 = <<48/2=24>>24
_NUMBER = re.compile(r"(?<![\d.,])-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?![\d,]*\d)|(?<![\d.])-?\.\d+", re.ASCII)
_LONGEST = 60  # characters of a number; int() of more would be slow


def make(config: Gsm8kConfig, *, seed: int) -> Task:
    train, test = read(config.train, config.train_rows), read(config.test, config.test_rows)
    return Task(
        name="gsm8k",
        train=train,
        tests={"test": test},
        rewards={"exact": exact, "shaped": shaped, "d1": d1_compat.gsm8k},
        correct=exact,
        metrics={"layout": layout},
        completion_length=config.completion_length,
        system=TAGS,
        **reading(config.style, (*train, *test), config.vocabulary, [TAGS]),
    )


def read(source: str, rows: int | None) -> list[Example]:
    """Questions, and answers whose last line is `#### number`."""
    examples = []
    for index, (where, row) in enumerate(first_rows(source, rows)):
        reasoning, _, gold = text_of(row, "answer", where).rpartition("####")
        if number(gold) is None:
            raise UserError(f"{where}: an answer must end in '#### number', got {gold.strip()[-40:]!r}")
        shown = tagged(_CALCULATION.sub("", reasoning).strip(), gold.strip())
        examples.append(Example(str(index), text_of(row, "question", where), shown, {"answer": gold.strip()}))
    return examples


def number(text: str) -> Fraction | None:
    """The only number in a text, with sign and thousands separators allowed; None for none or several."""
    found = _NUMBER.findall(text)
    if len(found) != 1 or len(found[0]) > _LONGEST:
        return None
    return Fraction(found[0].replace(",", ""))


def answer(completion: str) -> Fraction | None:
    """The number in the `<answer>`, else after `####`, else in the last box."""
    place = final_answer(completion)
    if place is None and "####" in completion:
        place = completion.rpartition("####")[2].strip().partition("\n")[0]
    if place is None or "\\boxed" in place:
        place = last_boxed(completion if place is None else place)
    return None if place is None else number(place)


def exact(examples: Sequence[Example], completions: Sequence[str]) -> list[float]:
    """1.0 if the answer is the same number."""
    return [float(answer(text) == number(e.facts["answer"])) for e, text in zip(examples, completions, strict=True)]


def shaped(examples: Sequence[Example], completions: Sequence[str]) -> list[float]:
    """d1's weights without its defects: 2 for the number, 0.5 for an integer, up to 1.5 for the layout."""
    integer = [0.5 * ((found := answer(text)) is not None and found.denominator == 1) for text in completions]
    parts = zip(exact(examples, completions), integer, layout(examples, completions), strict=True)
    return [2.0 * right + whole + 1.5 * format for right, whole, format in parts]
