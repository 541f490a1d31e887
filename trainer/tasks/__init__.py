"""Tasks: examples, and rewards that are pure functions of texts. `make_task` makes the one that a config describes.

Importing this package loads neither torch nor a data set: `dllm-kernels --help` reads the configs through it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import AnyTaskConfig

# kind of a task's config -> the module whose `make(config, seed=...)` makes it
MODULES = {
    "sudoku": ".sudoku",
    "countdown": ".countdown",
    "gsm8k": ".gsm8k",
    "math": ".math",
    "file": ".files",
    "pairs": ".pairs",
}


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


def make_task(config: AnyTaskConfig, *, seed: int) -> Task:
    """The task that `config` describes, its rewards checked; the same for the same config, seed and files, on every machine.

    Raises UserError naming the key or the file and line that is wrong.
    """
    from .rewards import checked  # which imports this module

    made: Task = importlib.import_module(MODULES[config.kind], __name__).make(config, seed=seed)
    return replace(
        made,
        rewards={name: checked(reward, name) for name, reward in made.rewards.items()},
        correct=checked(made.correct, "correct"),
        metrics={name: checked(reward, name) for name, reward in made.metrics.items()},
    )
