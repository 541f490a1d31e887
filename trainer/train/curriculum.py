"""Which level of difficulty RL draws its prompts from: the next one, once enough of this one's rollouts are right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..tasks import Example, Task


class Climb:
    """`state` is kept in checkpoints, so that a resume goes on where it was: `level`, and `recent`, shares of its updates."""

    def __init__(self, task: Task, state: dict[str, Any]):
        self._task, self._state = task, state
        state.setdefault("level", 0)
        state.setdefault("recent", [])

    @property
    def examples(self) -> Sequence[Example]:
        curriculum = self._task.curriculum
        return self._task.train if curriculum is None else curriculum.levels[self._state["level"]]

    def made(self, correct: float) -> dict[str, float]:
        """An update was made with this share of right rollouts; figures of it."""
        curriculum, state = self._task.curriculum, self._state
        if curriculum is None:
            return {}
        figures = {"level": state["level"]}
        recent = [*state["recent"], correct][-curriculum.updates :]
        full = len(recent) == curriculum.updates
        if full and sum(recent) / len(recent) >= curriculum.rise_at and state["level"] + 1 < len(curriculum.levels):
            state["level"], recent = state["level"] + 1, []
        state["recent"] = recent
        return figures
