"""Levels of difficulty rise with the share of right rollouts, and a resumed run stands where it stood."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from dllm_trainer.errors import Stopped
from dllm_trainer.tasks import Example, Task, make_task
from dllm_trainer.tasks.task import Curriculum
from dllm_trainer.train import run as run_module
from dllm_trainer.train.curriculum import Climb

from tests.trainer.conftest import lines, new_run, resumed


def test_the_next_level_comes_after_enough_right_updates_in_a_row() -> None:
    levels = [[Example(str(level), "")] for level in range(3)]
    nothing: Any = None
    task = Task("x", levels[0], {}, {}, nothing, {}, 1, curriculum=Curriculum(levels, rise_at=0.5, updates=2))
    state: dict[str, Any] = {}
    climb = Climb(task, state)
    seen = []
    for correct in (0.9, 0.0, 0.6, 0.4, 0.9, 1.0, 1.0, 1.0):
        seen.append((climb.examples[0].id, climb.made(correct)["level"]))
        climb = Climb(task, state)  # as after a resume
    assert [level for _, level in seen] == [0, 0, 0, 0, 1, 1, 2, 2], "the mean of the last two of a level, none counted twice"
    assert all(name == str(level) for name, level in seen)
    assert Climb(task, {}).examples is levels[0]


def with_levels(config: Any, *, seed: int) -> Task:
    """The demo's task, whose second level are the puzzles backwards."""
    task = make_task(config, seed=seed)
    levels = [task.train, [dataclasses.replace(e, id=f"1/{e.id}") for e in reversed(task.train)]]
    return dataclasses.replace(task, curriculum=Curriculum(levels, rise_at=1e-9, updates=2), correct=lambda e, t: [1.0] * len(t))


def test_a_resumed_run_goes_on_at_its_level_bit_by_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "make_task", with_levels)
    keys = ["rl.updates=4", "rl.save_every=3", "sft.steps=2", "sft.save_every=2", "evaluation.probe_every_rl=0"]
    new_run(tmp_path / "whole", *keys).execute()
    whole = [record for record in lines(tmp_path / "whole") if record["phase"] == "rl"]
    assert [record["level"] for record in whole] == [0, 0, 1, 1]
    cut = new_run(tmp_path / "cut", *keys)
    made = cut.folder.log

    def stop(record: dict[str, Any]) -> None:
        made(record)
        if (record["phase"], record["step"]) == ("rl", 3):
            cut.stop.wanted = True

    monkeypatch.setattr(cut.folder, "log", stop)
    with pytest.raises(Stopped):
        cut.execute()
    cut.folder.close()
    resumed(tmp_path / "cut").execute()
    assert [record for record in lines(tmp_path / "cut") if record["phase"] == "rl"] == whole
