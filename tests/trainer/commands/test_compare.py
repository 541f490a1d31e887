"""`dllm-kernels compare`: equal forwards, a table of what really ran, and nothing done twice."""

import json
from pathlib import Path

import pytest
import torch
from dllm_trainer.commands.compare import Configure, compare_algorithms, forwards_per_update, improves
from dllm_trainer.config import RunConfig, load_config
from dllm_trainer.errors import UserError
from dllm_trainer.models.loading import build_model
from dllm_trainer.models.tokenizer import make_tokenizer
from dllm_trainer.train.forward_counts import Calls
from rich.console import Console

from tests.trainer.conftest import TINY

QUIET = Console(quiet=True)


def configurer(finished: Path, *more: str) -> Configure:
    keys = [*TINY, "tensorboard=false", "sft.steps=0", f"model.checkpoint={finished / 'checkpoint_sft'}"]

    def configure(overrides: list[str]) -> RunConfig:
        return load_config(overrides=[*keys, "evaluation.probe_every_rl=0", "rl.updates=2", *overrides, *more])

    return configure


def test_forwards_and_backwards_are_counted_by_sequences() -> None:
    model = build_model(load_config().model, make_tokenizer("0123456789="), seed=0)
    ids = torch.zeros(3, 5, dtype=torch.int64)
    calls = Calls(model)
    with calls:
        model(input_ids=ids)
        with torch.no_grad():
            model(input_ids=ids[:2])
    model(input_ids=ids)
    assert (calls.forwards, calls.backwards) == (5, 3)
    embedding = model.get_input_embeddings().weight
    multiplied = sum(p.numel() for p in model.parameters() if p is not embedding)
    assert calls.flops == 2 * multiplied * (15 + 10) + 4 * multiplied * 15


def test_rollouts_and_samples_are_forwards_and_gradients_are_backwards_too(finished: Path) -> None:
    # 16 rollouts of 4 steps, and 4 Monte-Carlo samples of each, where every group has a signal
    config = configurer(finished)(["rl.samples=4"])
    assert 64 < forwards_per_update(config) <= 64 + 64


def test_a_comparison_has_equal_forwards_a_table_and_a_plot_and_is_not_repeated(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "compare"
    rows = compare_algorithms(configurer(finished), "bgpo, dmpo", 2, 600, out, QUIET, jobs=2)
    assert [row["algorithm"] for row in rows] == ["bgpo", "dmpo"]
    costs = json.loads((out / "plan.json").read_text())["forwards_per_update"]
    for row in rows:
        for seed, made in enumerate(row["forwards"]):
            assert abs(made - 600) <= costs[row["algorithm"]], "further from the budget than one update"
            records = [json.loads(line) for line in (out / row["algorithm"] / f"seed-{seed}" / "metrics.jsonl").open()]
            assert sum(record["forwards"] for record in records) == made
            assert len(records) == row["updates"]
        assert len(row["rollout"]["gain"]) == len(row["greedy"]["gain"]) == 2
        assert min(row["backwards"]) > 0
        assert min(row["peak_memory_mb"]) > 0
    seeds = [(out / "bgpo" / f"seed-{seed}" / "metrics.jsonl").read_text() for seed in (0, 1)]
    assert seeds[0] != seeds[1]
    for seed in (0, 1):
        folders = [out / row["algorithm"] / f"seed-{seed}" for row in rows]
        answers = [(folder / "eval_before.json").read_text() for folder in folders]
        assert answers[0] == answers[1], "the checkpoint answers once per seed: a copy, load and moment included"
        configs = [load_config(folder / "config.yaml") for folder in folders]
        assert [(config.seed, config.task_seed) for config in configs] == [(seed, 0)] * 2, "held-out data are the checkpoint's"
    text = (out / "compare.md").read_text()
    assert "| bgpo |" in text and "| dmpo |" in text  # noqa: PT018
    assert (out / "rewards.png").read_bytes().startswith(b"\x89PNG")

    def never(*_: object) -> None:
        raise AssertionError("a finished run was repeated")

    monkeypatch.setattr("dllm_trainer.commands.compare._run", never)
    monkeypatch.setattr("dllm_trainer.commands.compare.forwards_per_update", never)
    assert compare_algorithms(configurer(finished), "bgpo,dmpo", 2, 600, out, QUIET) == rows


@pytest.mark.slow
def test_an_algorithm_alone_starts_from_the_answers_that_it_starts_from_among_others(finished: Path, tmp_path: Path) -> None:
    answers = []
    for algorithms in ("bgpo,wd1", "wd1"):
        compare_algorithms(configurer(finished), algorithms, 1, 1, tmp_path / algorithms, QUIET)
        answers.append(json.loads((tmp_path / algorithms / "wd1" / "seed-0" / "eval_before.json").read_text())["sets"])
    assert answers[0] == answers[1]


def test_a_run_that_a_guard_stops_is_a_row_and_is_not_repeated(finished: Path, tmp_path: Path) -> None:
    configure = configurer(finished, "rl.lr=0.99", "rl.warmup=0", "rl.updates=24")
    rows = compare_algorithms(configure, "bgpo,dmpo", 2, 2000, tmp_path, QUIET, jobs=2)
    for row in rows:
        assert all(why is not None for why in row["stopped"]), row["stopped"]
        assert not row["improves"]
        assert max(row["rollout"]["rl"]) <= 1
    text = (tmp_path / "compare.md").read_text()
    assert "Stopped by a guard, and evaluated as it was: bgpo, seed 0: rl step" in text
    assert (tmp_path / "rewards.png").is_file()
    assert compare_algorithms(configure, "bgpo,dmpo", 2, 2000, tmp_path, QUIET) == rows


@pytest.mark.parametrize(
    ("algorithms", "forwards", "sentence"),
    [
        ("bgpo,bpgo", None, "bpgo is unknown"),
        (" ,", None, "at least one algorithm"),
        ("bgpo", 0, "--forwards must be at least 1"),
    ],
)
def test_mistakes_are_sentences(finished: Path, tmp_path: Path, algorithms: str, forwards: int | None, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        compare_algorithms(configurer(finished), algorithms, 1, forwards, tmp_path, QUIET)


def test_an_algorithm_improves_only_where_the_spread_allows_it() -> None:
    assert improves([0.05, 0.06, 0.07], [])
    assert not improves([0.30, -0.20, 0.05], [])
    assert not improves([-0.05, -0.06, -0.07], [])
    assert improves([0.05], [{"gain": 0.05, "low": 0.01, "high": 0.09}])
    assert not improves([0.05], [{"gain": 0.05, "low": -0.01, "high": 0.11}])
