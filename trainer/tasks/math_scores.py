"""Answers in boxes, compared by math-verify. Runs in a process of its own: a hostile expression takes any time to evaluate."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from .cpu_time import TooLong, limited
from .tags import final_answer
from .task import Example

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)|\\(?:boxed|fbox)\s+(?!\{)")
for _module in ("parser", "grader"):  # which warn that their own limit, of time on the wall, is switched off
    logging.getLogger(f"math_verify.{_module}").setLevel(logging.ERROR)
_LONGEST = 1000  # characters; of longer answers only the same text is right
_SECONDS = 5.0  # of CPU time, for reading an answer, and for comparing two


def exact(examples: Sequence[Example], completions: Sequence[str]) -> list[float]:
    """1.0 if the answers agree."""
    given = [(e, answer(text)) for e, text in zip(examples, completions, strict=True)]
    return [float(found is not None and equal(e.facts["answer"], found)) for e, found in given]


def equal(gold: str, given: str) -> bool:
    r"""Whether math-verify takes the given answer for the right one; as it does, (x+1)^2 for x^2+2x+1, and 5 for x = 5.

    Example:
        >>> equal(r"\\frac{1}{2}", "0.5"), equal("(1,2)", "(2,1)")
        (True, False)
    """
    if gold == given:
        return True
    if max(len(gold), len(given)) > _LONGEST:
        return False
    from math_verify import verify

    try:
        one, other = _parsed(gold), _parsed(given)
        with limited(_SECONDS):
            return bool(one and other and verify(one, other, timeout_seconds=None))
    except TooLong:
        return False


@lru_cache(maxsize=4096)  # a group of rollouts asks for the same gold answer
def _parsed(text: str) -> Any:
    """What math-verify reads; nothing where it fails. TooLong where it takes too long, which the cache does not keep."""
    from math_verify import parse

    try:
        with limited(_SECONDS):
            return parse(f"${text.strip().strip('$').rstrip('.')}$", parsing_timeout=None, raise_on_error=True)
    except Exception:  # of any kind, by what the text holds
        return []


def answer(completion: str) -> str | None:
    """The last box of the `<answer>`, or all of it; without tags, the last box of the completion."""
    place = final_answer(completion)
    if place is None:
        return last_boxed(completion)
    return last_boxed(place) if "\\boxed" in place else place or None


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
