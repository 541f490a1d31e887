"""How well a completion follows the layout of `tags.TAGS`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .task import Example

_OPEN, _BETWEEN, _CLOSE = "<reasoning>\n", "\n</reasoning>\n<answer>\n", "\n</answer>"
_JOINT = re.compile(r"</reasoning>\s*<answer>")
_TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
_PER_CHARACTER = 0.001  # of text after the end


def layout(examples: Sequence[Example], completions: Sequence[str]) -> list[float]:
    """0..1 in three parts with d1's weights: exact layout, order of parts, each tag once and nothing after."""
    return [(_strict(text) + _soft(text) + _tags(text)) / 3 for text in completions]


def _strict(text: str) -> float:
    """By searches from the left: a regular expression with two open gaps takes quadratic time on hostile texts."""
    between, whole = text.find(_BETWEEN, len(_OPEN)), text.rstrip()
    fits = between >= 0 and between + len(_BETWEEN) <= len(whole) - len(_CLOSE)
    return float(fits and text.startswith(_OPEN) and whole.endswith(_CLOSE))


def _soft(text: str) -> float:
    inner = text.lstrip()
    joint = _JOINT.search(inner, len("<reasoning>")) if inner.startswith("<reasoning>") else None
    return float(joint is not None and inner.find("</answer>", joint.end()) >= 0)


def _tags(text: str) -> float:
    once = sum(text.count(tag) == 1 for tag in _TAGS) / len(_TAGS)
    after = len(text.rpartition("</answer>")[2].strip()) if "</answer>" in text else 0
    return max(0.0, once - 2 * _PER_CHARACTER * after)
