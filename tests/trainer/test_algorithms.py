"""`dllm-train rl --algorithm NAME`: every algorithm without trajectories trains on the demo's task."""

import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from dllm_kernels.accumulation import score_samples
from dllm_kernels.objectives import RECIPES, effective_sample_size, wd1_weights
from tests.plans import plan_of
from tests.tiny import eurobert
from tests.trainer.conftest import TINY
from trainer import algorithms
from trainer.cli import app
from trainer.config import load_config
from trainer.demo import Run
from trainer.errors import ConfigError
from trainer.models import load_checkpoint
from trainer.rl import rl_updates
from trainer.run_dir import RunDir
from trainer.sudoku import make_task
from trainer.tokenizer import Codec
from trainer.training import make_optimizer

KEYS = [key for key in TINY if not key.startswith(("rl.samples", "rl.updates"))]
TRAINABLE = [name for name, recipe in RECIPES.items() if not recipe.needs_trajectory]
F64 = torch.float64


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sft") / "run"
    config = load_config(overrides=[*KEYS, "sft.steps=3", "rl.updates=0", "task.test_puzzles=2", f"out={json.dumps(str(out))}"])
    Run(RunDir.create(out), config, Console(quiet=True)).execute()
    return out / "checkpoint_sft"


@pytest.mark.parametrize("inner", [1, 2])
@pytest.mark.parametrize("name", TRAINABLE)
def test_every_algorithm_without_trajectories_trains(name: str, inner: int, checkpoint: Path) -> None:
    keys = [*KEYS, "rl.updates=2", "rl.prompts=2", f"rl.inner_iterations={inner}", f"rl.algorithm={name}"]
    config = load_config(overrides=keys)
    assert (config.rl.law, config.rl.samples) == (RECIPES[name].law, RECIPES[name].samples)
    model, tokenizer = load_checkpoint(checkpoint)
    reference = load_checkpoint(checkpoint)[0].requires_grad_(False) if RECIPES[name].needs_reference else None
    before = [parameter.detach().clone() for parameter in model.parameters()]
    task = make_task(config.task, seed=config.seed).train
    arguments = model, make_optimizer(model, config.rl), task, Codec(tokenizer), config.rl, config.rollout
    records = list(rl_updates(*arguments, seed=0, reference=reference))
    assert len(records) == 2
    learnt = [record for record in records if "loss" in record]
    assert learnt, "no update had a signal"
    assert all(math.isfinite(record["loss"]) and 0 < record["grad_norm"] < 1e4 for record in learnt)
    assert all(("ess" in record) == (name == "dmpo") and 0 < record.get("ess", 1.0) <= 1 for record in learnt)
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    if reference is not None:
        assert all(torch.equal(a, b) for a, b in zip(before, reference.parameters(), strict=True)), "the reference moved"


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe.needs_trajectory])
def test_an_algorithm_of_trajectories_says_what_it_lacks(name: str, checkpoint: Path, tmp_path: Path) -> None:
    arguments = ["rl", "--checkpoint", checkpoint, "--algorithm", name, "--out", tmp_path / "run"]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2
    assert f"algorithm {name} needs the trajectories of rollouts" in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_the_command_trains_the_algorithm_that_it_names(checkpoint: Path, tmp_path: Path) -> None:
    arguments = [
        "rl",
        "--checkpoint",
        checkpoint,
        "--algorithm",
        "gdpo",
        "--out",
        tmp_path / "run",
        "rl.updates=1",
        "rl.samples=6",
    ]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    config = load_config(tmp_path / "run" / "config.yaml")
    assert (config.rl.algorithm, config.rl.law, config.rl.samples, config.rl.advantage) == ("gdpo", "quadrature", 6, "mean")


def test_a_recipe_s_defaults_give_way_to_keys_and_only_come_where_an_algorithm_is_chosen() -> None:
    assert (load_config().rl.algorithm, load_config().rl.samples, load_config(overrides=["rl.samples=3"]).rl.samples) == (
        "bgpo",
        16,
        3,
    )
    chosen = load_config(overrides=["rl.advantage=std", "rl.algorithm=espo", "rl.samples=2"])
    assert (chosen.rl.law, chosen.rl.samples, chosen.rl.advantage) == ("antithetic", 2, "std")
    again = load_config(base=chosen.to_yaml(), overrides=["rl.updates=1"])
    assert again.rl.samples == 2, "a run's own config is taken as it is"
    assert load_config(overrides=["rl.algorithm=wd1", "rl.law=exact"]).rl.law_options() == {}
    assert load_config(overrides=["rl.law=bernoulli"]).rl.law_options() == {"t_min": 0.001}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["rl.algorithm=gdop"], r"rl: algorithm gdop is unknown: the nearest is gdpo; there are bgpo, "),
        (["rl.algorithm=gdpo", "rl.samples=4"], r"rl: samples must be a multiple of nodes=3 for law='quadrature', got 4"),
        (["rl.law=blocks"], r"rl\.law must be 'exact'"),
    ],
)
def test_a_mistake_names_the_key(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(overrides=overrides)


def test_the_list_shows_every_algorithm() -> None:
    result = CliRunner().invoke(app, ["algorithms"])
    assert result.exit_code == 0
    for name, recipe in RECIPES.items():
        (row,) = [line for line in result.output.splitlines() if f" {name} " in line]
        assert recipe.arxiv in row
        assert recipe.law in row
        assert ("trajectory" in row) == recipe.needs_trajectory or "trajec" in result.output


# --- what is made of rewards -------------------------------------------------------------------------------------------


REWARDS, GROUPS = torch.tensor([1.0, 0.0, 0.5, 0.5, 0.0, 1.0, 1.0, 0.0]), torch.tensor([3, 3, 5, 5, 9, 9, 9, 9])


def signal_of(name: str) -> algorithms.Signal:
    config = load_config(overrides=[f"rl.algorithm={name}"]).rl
    return algorithms.signal(config, algorithms.make_objective(config), REWARDS, GROUPS, 16)


def test_groups_of_equal_rewards_are_dropped_where_nothing_else_is_learnt() -> None:
    for name in ("bgpo", "gdpo", "wd1", "spg"):
        assert signal_of(name).kept_N.tolist() == [0, 1, 4, 5, 6, 7], name
    for name in ("diffu_grpo", "espo", "rspo", "dmpo"):  # a KL, a regression, weights of ELBOs
        assert len(signal_of(name).kept_N) == 8, name
    assert [signal_of(name).denominator for name in ("bgpo", "spg", "wd1", "dmpo")] == [8, 128, 3, 3]
    torch.testing.assert_close(signal_of("wd1").entries["weights"][:2], wd1_weights(torch.tensor([0.5, -0.5]), GROUPS[:2]))


def test_pairs_are_the_best_and_the_worst_of_a_group() -> None:
    found = signal_of("vrpo")
    assert found.kept_N.tolist() == [0, 5, 1, 4]
    assert found.entries["chosen"].tolist() == [True, True, False, False]
    assert found.entries["group_ids"].tolist() == [0, 1, 0, 1]
    assert found.denominator == 2


def test_dmpo_s_weights_are_of_the_policy_and_the_reference_and_sum_to_1_in_a_group() -> None:
    config = load_config(overrides=["rl.algorithm=dmpo"]).rl
    model, reference = eurobert(vocab=100), eurobert(vocab=100, seed=1)
    plan, groups = plan_of([5, 4, 6, 7], samples=2), torch.tensor([1, 1, 2, 2])
    objective = algorithms.make_objective(config)
    rewards = torch.tensor([0.1, 0.0, 0.0, 0.1])
    scores = algorithms.Scores(model, reference)
    found = algorithms.Signal(torch.arange(4), {}, 2.0)
    (batch,) = algorithms.make_batches(config, objective, found, [plan], lambda: plan, rewards, groups, scores)
    weights = batch.per_sequence["weights"]
    torch.testing.assert_close(weights.view(2, 2).sum(1), torch.ones(2, dtype=F64))
    assert scores.passes == 2
    delta = (score_samples(reference, plan) - score_samples(model, plan)).mean(1) + rewards / 0.04
    torch.testing.assert_close(weights.view(2, 2), delta.view(2, 2).softmax(1))
    assert (effective_sample_size(weights, groups) >= 0.5).all()
