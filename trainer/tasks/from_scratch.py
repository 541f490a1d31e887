"""How a model from scratch reads a task: by the characters of its texts, or by BPE tokens trained on them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .config import Style
from .task import Example


def reading(style: Style, examples: Iterable[Example], vocabulary: int, more: Sequence[str] = ()) -> dict[str, Any]:
    """Fields of `Task` that say it, of prompts and answers and `more` texts."""
    if style == "words":
        return {}
    texts = [*more, *(text for example in examples for text in (example.prompt, example.answer, example.suffix))]
    if style == "bpe":
        return {"corpus": texts, "vocabulary": vocabulary}
    return {"alphabet": "".join(sorted(set().union(*texts)))}


def longest(examples: Iterable[Example]) -> int:
    """Tokens that hold every answer: its characters, or the bytes of it, of which a BPE token has at least one."""
    return max((len(example.answer.encode()) for example in examples), default=1) or 1
