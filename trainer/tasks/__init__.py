"""Tasks: examples, and rewards that are pure functions of texts. `make_task` makes one from its config.

Importing this package loads neither torch nor a data set, which keeps `dllm-kernels --help` fast.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import TYPE_CHECKING

from .rewards import checked
from .task import Example, Reward, Task

if TYPE_CHECKING:
    from .config import AnyTaskConfig

__all__ = ["Example", "Reward", "Task", "make_task"]

# kind of a task's config -> the module whose `make(config, seed=...)` makes it
MODULES = {
    "sudoku": ".sudoku",
    "countdown": ".countdown",
    "gsm8k": ".gsm8k",
    "math": ".math",
    "file": ".files",
    "code": ".code",
    "middle": ".middle",
    "reasoning_gym": ".reasoning_gym",
    "pairs": ".pairs",
}


def make_task(config: AnyTaskConfig, *, seed: int) -> Task:
    """The task of a config, with checked rewards; a function of config, seed and files on every machine.

    Raises UserError naming the wrong key, or the file and line.
    """
    made: Task = importlib.import_module(MODULES[config.kind], __name__).make(config, seed=seed)
    return replace(
        made,
        rewards={name: checked(reward, name) for name, reward in made.rewards.items()},
        correct=checked(made.correct, "correct", truth=True),
        metrics={name: checked(reward, name) for name, reward in made.metrics.items()},
    )
