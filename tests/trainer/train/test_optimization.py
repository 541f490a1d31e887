"""AdamW as users expect it, and a run without a gradient."""

import json
from pathlib import Path

import pytest
import torch
from dllm_trainer.config import GuardConfig, load_config
from dllm_trainer.errors import GuardError
from dllm_trainer.train.guards import NoSignal
from dllm_trainer.train.optimization import make_optimizer
from torch import nn

from tests.tiny import eurobert
from tests.trainer.conftest import lines, new_run


@pytest.mark.parametrize("tied", [False, True])
def test_weight_decay_is_for_matrices_alone(tied: bool) -> None:
    """With gradients of zero all that AdamW does is decay."""
    model = eurobert(vocab=12, hidden=16, layers=1, dtype=torch.float32)
    model.extra = nn.Linear(3, 2)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    config = load_config(overrides=["sft.weight_decay=0.5", "sft.lr=0.1"]).sft
    optimizer = make_optimizer(model, config)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    decayed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    kept = before.keys() - decayed
    assert "model.embed_tokens.weight" in kept
    assert "extra.bias" in kept
    assert any("norm" in name for name in kept)
    assert not any("norm" in name for name in decayed)
    assert {"extra.weight"} <= decayed
    assert ("lm_head.weight" in decayed) == (not tied)
    assert all(torch.allclose(value, 0.95 * before[name]) for name, value in model.named_parameters() if name in decayed)


def test_without_weight_decay_there_is_one_group_of_all_parameters() -> None:
    """In their order, so that such runs keep their numbers."""
    model = eurobert(vocab=12, hidden=16, layers=1, dtype=torch.float32)
    (group,) = make_optimizer(model, load_config(overrides=["sft.weight_decay=0.0"]).sft).param_groups
    assert [id(parameter) for parameter in group["params"]] == [id(parameter) for parameter in model.parameters()]


def test_updates_without_a_signal_are_told_once_and_then_end_the_run() -> None:
    empty = {"groups_with_signal": 0, "reward_std": 0.0, "reward": 0.25}
    guard = NoSignal(GuardConfig(no_signal=4, warn_after=2))
    told = [guard.seen(figures) for figures in (empty, {**empty, "groups_with_signal": 1}, empty, empty, empty)]
    assert [bool(text) for text in told] == [False, False, False, True, False], "a signal in between starts the count anew"
    assert "the last 2 update(s): every rollout has the reward 0.25" in told[3]
    with pytest.raises(GuardError, match=r"rollouts of a group have the same reward.*\(guard.no_signal=4\)"):
        guard.seen({**empty, "reward_std": 0.5})
    assert NoSignal(GuardConfig()).seen({"loss": 1.0}) == "", "pairs have no groups"


def test_a_run_that_learns_nothing_stops_where_it_is_told_to(tmp_path: Path) -> None:
    """An untrained model solves no Sudoku: reward 0 for all rollouts."""
    run = new_run(tmp_path / "run", "rl.reward=valid", "guard.no_signal=2", "sft.steps=1", "evaluation.samples=2")
    with pytest.raises(GuardError, match="nothing was learned in the last 2"):
        run.execute()
    assert [record["step"] for record in lines(tmp_path / "run") if record["phase"] == "rl"] == [1]
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").open()]
    assert {(s["phase"], s["step"], s["set"], s["id"]) for s in samples} == {
        ("sft", 1, name, number) for name in ("unseen_puzzles", "unseen_grids") for number in ("0", "1")
    }
