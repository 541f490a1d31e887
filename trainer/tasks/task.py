"""The parts of a task: examples, and rewards for texts that answer them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Example:
    id: str  # stable: noise keys depend on it
    prompt: str  # the user's turn, without chat template
    answer: str = ""  # the demonstration for SFT; "" if there is none
    facts: Mapping[str, Any] = field(default_factory=dict)  # for rewards; plain, picklable values
    suffix: str = ""  # what follows the completion, which then fills the gap between the two
    problem: str = ""  # the same for prompts that ask the same in other words; "": no other prompt does


# one finite number per completion; completions are texts without special tokens
Reward = Callable[[Sequence[Example], Sequence[str]], Sequence[float]]


@dataclass(frozen=True)
class Curriculum:
    """Training examples of RL by difficulty; level 0 is `Task.train`."""

    levels: Sequence[Sequence[Example]]
    rise_at: float  # mean of `correct` over the last `updates` updates of a level, from where the next one is drawn from
    updates: int


@dataclass(frozen=True)
class Task:
    name: str
    train: Sequence[Example]
    tests: Mapping[str, Sequence[Example]]
    rewards: Mapping[str, Reward]  # `rl.reward` names one of them, or `module:function`
    correct: Reward  # 1.0 or 0.0; counted by evaluation
    metrics: Mapping[str, Reward]  # further figures of evaluation
    completion_length: int  # L in tokens; of the character tokenizer where there is an alphabet
    alphabet: str | None = None  # all characters of the texts, for a model built from scratch
    corpus: Sequence[str] | None = None  # instead: texts that such a model's BPE tokenizer is trained on
    vocabulary: int = 0  # its most tokens
    system: str = ""  # instructions for the answer's format; "" if the prompt has them
    shown: Sequence[Example] | None = None  # the examples of SFT where they are not all of `train`
    curriculum: Curriculum | None = None
    note: str = ""  # what a run says of how its examples were made

    @property
    def demonstrations(self) -> Sequence[Example]:
        """The examples of SFT."""
        return self.train if self.shown is None else self.shown

    def notes(self) -> list[str]:
        """`note`, and how many training questions stand in a test set, where any do."""
        levels = [self.train] if self.curriculum is None else self.curriculum.levels
        asked = [(example.prompt, example.suffix) for level in levels for example in level]
        found = [self.note] if self.note else []
        for name, test in self.tests.items():
            held_out = {(example.prompt, example.suffix) for example in test}
            if seen := sum(question in held_out for question in asked):
                found.append(f"warning: {seen:,} of {len(asked):,} training examples ask a question of the test set {name}")
        return found
