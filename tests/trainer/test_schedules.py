"""Learning rates are those of transformers' schedules, whose names and options a config takes."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dllm_trainer.config import load_config
from dllm_trainer.errors import ConfigError
from dllm_trainer.schedules import OPTIONS
from dllm_trainer.train.optimization import learning_rates
from transformers import get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from tests.trainer.conftest import lines, new_run

NEEDED: dict[str, dict[str, Any]] = {
    "cosine_with_min_lr": {"min_lr": 0.01},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.2, "warmup_lr_rate": 0.1},
    "cosine_with_restarts": {"num_cycles": 3},
    "polynomial": {"lr_end": 0.001, "power": 2.0},
    "warmup_stable_decay": {"num_decay_steps": 7, "decay_type": "1-sqrt", "min_lr_ratio": 0.1},
}
OF_A_FIGURE = {"reduce_lr_on_plateau", "greedy"}


def keys(name: str, *more: str) -> list[str]:
    return [f"sft.schedule={name}", f"sft.schedule_options={json.dumps(NEEDED.get(name, {}))}", "sft.lr=0.1", *more]


def test_every_schedule_of_transformers_is_here_but_those_that_follow_a_measured_figure() -> None:
    assert OPTIONS.keys() == {kind.value for kind in TYPE_TO_SCHEDULER_FUNCTION} - OF_A_FIGURE


@pytest.mark.parametrize("name", OPTIONS)
def test_the_options_and_their_defaults_are_those_of_transformers(name: str) -> None:
    function = {kind.value: one for kind, one in TYPE_TO_SCHEDULER_FUNCTION.items()}[name]
    ours = {"optimizer", "last_epoch", "num_warmup_steps", "num_training_steps"}
    theirs = {key: given.default for key, given in inspect.signature(function).parameters.items() if key not in ours}
    known = {
        key: inspect.Parameter.empty if field.is_required() else field.default
        for key, field in OPTIONS[name].model_fields.items()
    }
    assert known == theirs


@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize("name", OPTIONS)
def test_rates_are_those_of_its_own_trainer(name: str, warmup: int) -> None:
    config = load_config(overrides=keys(name, f"sft.warmup={warmup}")).sft
    rate = learning_rates("sft", config, 20)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    theirs = "constant_with_warmup" if name == "constant" else name
    scheduler = get_scheduler(theirs, optimizer, warmup, 20, scheduler_specific_kwargs=NEEDED.get(name, {}))
    for step in range(20):
        assert rate(step) == scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()


def test_a_schedule_takes_the_place_of_another_with_its_options() -> None:
    config = load_config(overrides=["rl.schedule=cosine", "sft.schedule_options.num_cycles=1.5"])
    assert config.rl.schedule_options == {}
    assert config.sft.schedule_options == {"min_lr_rate": 0.02, "num_cycles": 1.5}
    again = load_config(base=config.to_yaml(), overrides=["sft.schedule=linear"])
    assert again.sft.schedule_options == {}


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["sft.schedule=reduce_lr_on_plateau"], r"sft\.schedule must be 'constant', .* or 'warmup_stable_decay', got"),
        (
            ["sft.final_lr_share=0.1"],
            r"sft\.final_lr_share: it is sft\.schedule_options\.min_lr_rate, of the schedules cosine_with",
        ),
        (["rl.lr_scheduler_type=cosine"], r"unknown config key rl\.lr_scheduler_type: it is rl\.schedule$"),
        (["sft.schedule_options=3"], r"sft\.schedule_options must be a valid dictionary, got 3"),
        (["rl.schedule=linear", "rl.schedule_options.power=2"], r"schedule_options of linear have no power: it has none"),
        (["rl.schedule_options.power=2"], r"have no power: there are num_cycles, min_lr, min_lr_rate, warmup_lr_rate"),
        (["rl.schedule=warmup_stable_decay"], r"rl: schedule_options\.num_decay_steps is missing"),
        (["rl.schedule=cosine_with_min_lr"], r"must have min_lr or min_lr_rate, got neither"),
        (["rl.schedule_options.min_lr=0.0001"], r"must have min_lr or min_lr_rate, got both"),
        (
            ["rl.schedule_options={min_lr: 0.1, min_lr_rate: null}"],
            r"rl: schedule_options\.min_lr must be below lr=0\.0005, got 0\.1",
        ),
        (["rl.schedule=polynomial", "rl.lr=1.0e-8"], r"schedule_options\.lr_end must be below lr=1e-08, got 1e-07"),
        (
            ["sft.schedule_options.min_lr_rate=1.5"],
            r"sft: schedule_options\.min_lr_rate must be less than or equal to 1, got 1\.5",
        ),
    ],
)
def test_a_schedule_that_cannot_be_is_refused_in_a_sentence(more: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load_config(overrides=more)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (
            ["rl.schedule=linear", "rl.updates=1"],
            r"rl\.warmup must be 0 for rl\.updates=1, as linear begins at a rate of 0, got 10",
        ),
        (
            ["rl.schedule=warmup_stable_decay", "rl.schedule_options.num_decay_steps=7", "rl.updates=16"],
            r"rl\.warmup, num_stable_steps and num_decay_steps must be at most rl\.updates=16 together, got 17",
        ),
    ],
)
def test_what_does_not_fit_into_its_steps_ends_the_run_before_sft(more: list[str], told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=told):
        new_run(tmp_path / "run", *more).execute()
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or not lines(tmp_path / "run")
