"""What a task is made of: examples, and rewards of the texts that answer them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Example:
    id: str  # stable: noise keys hang on it
    prompt: str  # what the user says, without chat template
    answer: str = ""  # the demonstration for SFT; "" if there is none
    facts: Mapping[str, Any] = field(default_factory=dict)  # what rewards need; plain values, so that a process can be sent them


# One finite number per completion. Completions are texts, special tokens stripped.
Reward = Callable[[Sequence[Example], Sequence[str]], Sequence[float]]


@dataclass(frozen=True)
class Task:
    name: str
    train: Sequence[Example]
    tests: Mapping[str, Sequence[Example]]
    rewards: Mapping[str, Reward]  # `rl.reward` names one of them, or `module:function`
    correct: Reward  # 1.0 or 0.0: what evaluation counts
    metrics: Mapping[str, Reward]  # more figures for evaluation
    completion_length: int  # L in tokens: of the character tokenizer where there is an alphabet, else a usual one
    alphabet: str | None = None  # every character of the task's texts, for a model built from scratch
    system: str = ""  # what the answer must look like, in words; "" where the prompt alone says it
