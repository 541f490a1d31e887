"""A run's folder: claimed once, never overwritten, whole at every moment."""

import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from dllm_trainer.errors import UserError
from dllm_trainer.records import samples
from dllm_trainer.records.plots import draw_curves, draw_unmasking
from dllm_trainer.records.run_dir import RunDir, State
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SAMPLE = {
    "phase": "rl",
    "step": 1,
    "set": "test",
    "id": "0",
    "prompt": "1+1=",
    "answer": "2",
    "completion": "3",
    "correct": 0.0,
    "reward": None,
    "tokens": ["3"],
    "steps": [0],
}


def test_a_taken_name_is_left_alone(tmp_path: Path) -> None:
    first = RunDir.create(tmp_path / "runs" / "demo")
    first.write_text("config.yaml", "mine")
    second = RunDir.create(tmp_path / "runs" / "demo")
    second.write_text("config.yaml", "other")
    third = RunDir.create(tmp_path / "runs" / "demo")
    assert [run.path.name for run in (first, second, third)] == ["demo", "demo-2", "demo-3"]
    assert (first.path / "config.yaml").read_text() == "mine"


def test_the_folder_of_a_run_that_was_killed_before_it_had_a_config_is_taken_again(tmp_path: Path) -> None:
    first = RunDir.create(tmp_path / "demo")
    first.lock()
    beginning = RunDir.create(tmp_path / "demo")
    assert beginning.path.name == "demo-2", "the first is at work"
    first.close()
    (first.path / ".lock").write_text("{}")  # what kill -9 leaves
    (first.path / ".config.yaml.part").write_text("se")
    assert RunDir.create(tmp_path / "demo").path == first.path
    (first.path / "precious").touch()
    assert RunDir.create(tmp_path / "demo").path != first.path


def test_an_empty_folder_is_used_and_a_file_is_not(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert RunDir.create(tmp_path / "empty").path == tmp_path / "empty"
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UserError, match="is a file; name a folder"):
        RunDir.create(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "precious"


def test_an_unwritable_folder_is_told_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"out: cannot write to .*file/demo \(its parent is not a folder\); name a writable"):
        RunDir.create(tmp_path / "file" / "demo")


def test_resuming_what_is_no_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run"):
        RunDir.reopen(tmp_path / "nothing")


def test_metrics_are_readable_after_every_step_and_rewind_to_the_saved_state(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run")
    for phase, step in [("sft", 1), ("sft", 2), ("rl", 1), ("rl", 2), ("rl", 3)]:
        run.log({"phase": phase, "step": step, "loss": 0.5})
        assert run.metrics()[-1] == {"phase": phase, "step": step, "loss": 0.5}
    run.close()
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "rl", "st')  # the power failed here
    assert len(run.metrics()) == 5
    run.rewind(State("rl", 2))
    assert [(r["phase"], r["step"]) for r in run.metrics()] == [("sft", 1), ("sft", 2), ("rl", 1), ("rl", 2)]
    assert list(run.path.glob("events.out.tfevents.*"))


def test_a_resumed_run_shows_each_step_once_in_tensorboard(tmp_path: Path) -> None:
    first = RunDir.create(tmp_path / "run")
    for phase, step in [("sft", 1), ("sft", 2), ("sft", 3), ("rl", 1), ("rl", 2)]:
        first.log({"phase": phase, "step": step, "loss": 0.5})
    first.keep([SAMPLE])
    first.keep([SAMPLE | {"step": 2}])
    first.close()
    for loss in range(12):  # within a second, so that the order of the files' names is not that of the resumes
        again = RunDir(first.path)
        again.rewind(State("rl", 1))
        again.log({"phase": "rl", "step": 2, "loss": float(loss)})
        again.keep([SAMPLE | {"step": 2}])
        again.close()
        shown = EventAccumulator(str(first.path)).Reload()
        assert [event.step for event in shown.Scalars("sft/loss")] == [1, 2, 3]
        assert [(event.step, event.value) for event in shown.Scalars("rl/loss")] == [(1, 0.5), (2, loss)]
        assert [event.step for event in shown.Tensors("rl/test/text_summary")] == [1, 2]


def test_tensorboard_begins_with_the_first_step_where_it_is_switched_on_at_a_resume(tmp_path: Path) -> None:
    first = RunDir.create(tmp_path / "run")
    first.tensorboard = False
    first.log({"phase": "rl", "step": 1, "loss": 0.5})
    first.close()
    again = RunDir(first.path)
    again.rewind(State("rl", 1))
    again.log({"phase": "rl", "step": 2, "loss": 0.25})
    again.close()
    assert [event.step for event in EventAccumulator(str(first.path)).Reload().Scalars("rl/loss")] == [1, 2]


def test_figures_that_are_not_finite_leave_json_that_others_read(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run")
    run.keep([SAMPLE])  # of an evaluation before the first step
    run.log({"phase": "rl", "step": 1, "loss": math.nan, "elbo": torch.tensor(-math.inf), "reward": np.float32(0.5)})
    run.log({"phase": "rl", "step": 2, "loss": 0.25, "elbo": -1.0, "reward": 1})
    with pytest.raises(UserError, match="figure rank of a step must be a number, got list"):
        run.log({"phase": "rl", "step": 3, "rank": [1]})
    run.close()
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert records[0] == {"phase": "rl", "step": 1, "loss": None, "elbo": None, "reward": 0.5}
    draw_curves(records, [], run.path / "curves.png")
    shown = EventAccumulator(str(run.path)).Reload()
    assert [event.step for event in shown.Scalars("rl/loss")] == [1, 2]
    assert [event.step for event in shown.Tensors("rl/test/text_summary")] == [1]
    (run.path / "metrics.jsonl").write_text('{"phase": "rl", "step": 1, "loss": NaN}\n')  # of an earlier version
    again = RunDir(run.path)
    again.rewind(State("rl", 1))
    assert (run.path / "metrics.jsonl").read_text() == '{"phase": "rl", "step": 1, "loss": null}\n'


def test_pictures_and_reports_take_any_text(tmp_path: Path) -> None:
    texts = {"id": r"a $\nonsense$ \x1b[2J", "tokens": ["$", r"$\x", "\x07", "\u4e2d"], "steps": [0, 1, 2, 3]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_unmasking([SAMPLE | texts], tmp_path / "unmasking.png")
    looked_at_twice = [SAMPLE | {"completion": "4"}, SAMPLE]
    assert samples.chosen(looked_at_twice) == [SAMPLE]


def test_a_full_disk_is_told_once(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run")
    run.tensorboard = False
    (run.path / "metrics.jsonl").symlink_to("/dev/full")
    run.lock()
    with pytest.raises(OSError, match="No space left"):
        run.log({"phase": "rl", "step": 1})
    run.close()
    assert not (run.path / ".lock").exists()


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run")
    run.write_json("eval.json", {"correct": 0.5})
    with pytest.raises(TypeError):
        run.write_json("eval.json", {"correct": object()})
    assert json.loads((run.path / "eval.json").read_text()) == {"correct": 0.5}
