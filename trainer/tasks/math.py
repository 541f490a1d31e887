r"""MATH: competition problems with answers in \boxed{}, compared in a normal form and by value."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from ..errors import UserError
from . import d1_compat
from .config import MathConfig
from .files import first_rows, text_of
from .from_scratch import reading
from .tags import TAGS, final_answer, tagged
from .task import Example, Task

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)|\\(?:boxed|fbox)\s+(?!\{)")
_LONGEST = 1000  # characters; longer answers are compared without normalisation
_DROPPED = re.compile(
    r"\\(?:left|right)(?![A-Za-z])|\\[!,;:> ]|\\(?:q?quad)(?![A-Za-z])|\^\{?\\circ\}?|\\degree(?![A-Za-z])|\\?[$%]|~|\s"
)
_WORDS = re.compile(r"\\(?:text|mbox|textbf|mathrm|operatorname)\s*\{([^{}]*)\}")
_UNIT = re.compile(r"(?<=[\d}])\\(?:text|mbox|mathrm)\s*\{[^{}]*\}(?:\^\{?\d\}?)?\Z")
_NAME = re.compile(r"\A(?:[A-Za-z]|\\[A-Za-z]+)(?:\([A-Za-z]\))?=(?=[^=]+\Z)")
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_COMMAND = re.compile(r"\\(frac|sqrt)")
_DECIMAL = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)", re.ASCII)
_RATIO = re.compile(r"([-+]?)(\d*)\\frac\{([-+]?\d+)\}\{([-+]?\d+)\}|([-+]?\d+)/(\d+)", re.ASCII)
_PAIRS = {"(": ")", "[": "]", "{": "}"}


def make(config: MathConfig, *, seed: int) -> Task:
    train, test = read(config.train, config.train_rows), read(config.test, config.test_rows)
    system = f"{TAGS}\nWrite the final answer as \\boxed{{...}} inside the answer tags."
    return Task(
        name="math",
        train=train,
        tests={"test": test},
        rewards={"exact": exact, "shaped": shaped, "d1": d1_compat.math},
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


def last_boxed(text: str) -> str | None:
    r"""The content of the last \boxed or \fbox, with nested and escaped braces; None if missing or cut off.

    Example:
        >>> last_boxed(r"so \boxed{\frac{1}{2}} and not \boxed 3$")
        '3'
    """
    found = list(_BOX.finditer(text))
    if not found:
        return None
    rest = text[found[-1].end() :]
    if not rest.startswith("{"):
        return re.split(r"[\s$]", rest, maxsplit=1)[0].rstrip(".") or None
    depth = 0
    for token in re.finditer(r"\\.|[{}]", rest, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(token.group(), 0)
        if depth == 0 and token.group() == "}":
            return rest[1 : token.start()].strip()
    return None


def answer(completion: str) -> str | None:
    """The last box of the `<answer>`, or all of it; without tags, the last box of the completion."""
    place = final_answer(completion)
    if place is None:
        return last_boxed(completion)
    return last_boxed(place) if "\\boxed" in place else place or None


def normal_form(text: str) -> str:
    """A normal form without spaces, dollar and degree signs, units and variable names, with braced fractions.

    Example:
        >>> normal_form(r"x = \\dfrac12\\text{ cm}")
        '\\\\frac{1}{2}'
    """
    if len(text) > _LONGEST:
        return text
    text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", text.strip().rstrip("."))
    text = _UNIT.sub("", _DROPPED.sub("", text))
    text = _NAME.sub("", _WORDS.sub(lambda found: found.group(1), text))
    text = text.replace(",", "") if _THOUSANDS.fullmatch(text) else text
    return _braced(text)


def _braced(text: str) -> str:
    r"""\frac12, \frac1{72} and \sqrt3 with braces around each argument."""
    position = 0
    while (found := _COMMAND.search(text, position)) is not None:
        position = found.end()
        for _ in range(2 if found.group(1) == "frac" else 1):
            if position < len(text) and text[position].isalnum():
                text = f"{text[:position]}{{{text[position]}}}{text[position + 1 :]}"
            position = _after_group(text, position)
        position = found.end()
    return text


def _after_group(text: str, start: int) -> int:
    """The position after the braced group at `start`; `start` if there is none."""
    depth = 0
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return position + 1 if position > start else start
    return start


def value(text: str) -> Fraction | None:
    """The rational number of a normal form: decimal, a/b, \\frac{a}{b} or a mixed number."""
    if _DECIMAL.fullmatch(text) and len(text) < _LONGEST:
        return Fraction(text.rstrip("."))
    found = _RATIO.fullmatch(text)
    if found is None:
        return None
    sign, whole, top, bottom, a, b = found.groups()
    over, under = (int(a), int(b)) if b else (int(top), int(bottom))
    if under == 0:
        return None
    share = Fraction(over, under)
    return share if b else (-1 if sign == "-" else 1) * (int(whole or 0) + share)


def equal(one: str, other: str) -> bool:
    r"""Whether two answers agree: in normal form, by value, or entry by entry in (1, 2) and \{1, 2\}."""
    a, b = normal_form(one), normal_form(other)
    if a == b:
        return True
    x, y = value(a), value(b)
    if x is not None and y is not None:
        return x == y
    first, second = _parts(a), _parts(b)
    return len(first) == len(second) > 1 and all(map(_same, first, second))


def _same(one: str, other: str) -> bool:
    x, y = value(one), value(other)
    return one == other or (x is not None and x == y)


def _parts(text: str) -> list[str]:
    """Brackets and entries of a list, "(1,2)" to "(", "1", "2", ")"; split at commas outside brackets."""
    if text[:1] not in _PAIRS or text[-1:] != _PAIRS[text[0]]:
        opening, inside, closing = "", text, ""
    else:
        opening, inside, closing = text[0], text[1:-1], text[-1]
    entries, depth = [""], 0
    for character in inside:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            entries.append("")
        else:
            entries[-1] += character
    return [opening, *entries, closing] if len(entries) > 1 else [text]


def exact(examples: Sequence[Example], completions: Sequence[str]) -> list[float]:
    """1.0 if the answers agree."""
    given = [(e, answer(text)) for e, text in zip(examples, completions, strict=True)]
    return [float(found is not None and equal(found, e.facts["answer"])) for e, found in given]


def boxed(examples: Sequence[Example], completions: Sequence[str]) -> list[float]:
    r"""1.0 if the last `<answer>` holds a closed \boxed."""
    return [float((place := final_answer(text)) is not None and last_boxed(place) is not None) for text in completions]


def shaped(examples: Sequence[Example], completions: Sequence[str]) -> list[float]:
    r"""d1's weights without its defects: answer 2, answer tags 0.5, \boxed in them 0.5, else 0.25."""
    parts = zip(exact(examples, completions), boxed(examples, completions), completions, strict=True)
    return [2.0 * right + 0.5 * (final_answer(text) is not None) + 0.25 + 0.25 * box for right, box, text in parts]
