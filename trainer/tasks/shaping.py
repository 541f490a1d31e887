"""How well a completion follows the layout of `tags.TAGS`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .task import Example

_STRICT = re.compile(r"<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?\n</answer>\s*", re.DOTALL)
_SOFT = re.compile(r"\s*<reasoning>.*?</reasoning>\s*<answer>.*?</answer>", re.DOTALL)
_TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
_PER_CHARACTER = 0.001  # of text after the end


def layout(examples: Sequence[Example], completions: Sequence[str]) -> list[float]:
    """0..1 in three parts with d1's weights: exact layout, order of parts, each tag once and nothing after."""
    return [(_strict(text) + _soft(text) + _tags(text)) / 3 for text in completions]


def _strict(text: str) -> float:
    return float(_STRICT.fullmatch(text) is not None)


def _soft(text: str) -> float:
    return float(_SOFT.match(text) is not None)


def _tags(text: str) -> float:
    once = sum(text.count(tag) == 1 for tag in _TAGS) / len(_TAGS)
    after = len(text.rpartition("</answer>")[2].strip()) if "</answer>" in text else 0
    return max(0.0, once - 2 * _PER_CHARACTER * after)
