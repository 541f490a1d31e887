"""Scores of reasoning-gym for a completion. Runs in a process of its own: some of its scorers evaluate what they are given."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

from .cpu_time import TooLong, limited
from .tags import final_answer
from .task import Example

SECONDS = 5.0  # of CPU time, for one answer


def score(examples: Sequence[Example], completions: Sequence[str]) -> list[float]:
    """0..1 by the data set's own `score_answer`; 0 where it raises or takes more than `SECONDS`.

    What is scored is the text in the last `<answer>` tags, or all of it, without white space around it.
    """
    return [_score(example, text) for example, text in zip(examples, completions, strict=True)]


def _score(example: Example, completion: str) -> float:
    tagged = final_answer(completion)
    text = completion.strip() if tagged is None else tagged
    facts = example.facts
    dataset = _dataset(facts["dataset"], json.dumps(facts["options"]))
    try:
        with limited(SECONDS):
            value = float(dataset.score_answer(text, facts["entry"]))
    except (Exception, TooLong):  # a scorer that stumbles over an answer has not found it right
        return 0.0
    return min(1.0, max(0.0, value)) if value == value else 0.0


@cache
def _dataset(name: str, options: str) -> Any:
    from reasoning_gym.factory import create_dataset

    return create_dataset(name, **json.loads(options))
