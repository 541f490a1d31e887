"""The whole demo at a tiny setting: every file, exact resume, nothing overwritten, guards."""

import io
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dllm_trainer.config import load_config
from dllm_trainer.errors import GuardError, Stopped
from dllm_trainer.records.checkpoints import latest
from dllm_trainer.train.evaluation import paired_gain
from dllm_trainer.train.optimization import batch_indices, guarded_step
from dllm_trainer.train.run import Run, is_finished
from rich.console import Console
from transformers import AutoModelForMaskedLM, AutoTokenizer

from dllm_kernels import Rollout
from tests.trainer.conftest import lines, new_run, resumed, rollouts_through, tiny_config


def stop_after(monkeypatch: pytest.MonkeyPatch, run: Run, phase: str, step: int) -> None:
    """What Ctrl-C during this step does."""
    log = run.folder.log

    def spy(record: dict[str, float]) -> None:
        log(record)
        run.stop.wanted = run.stop.wanted or (record["phase"], record["step"]) == (phase, step)

    monkeypatch.setattr(run.folder, "log", spy)


def outcomes(out: Path, name: str) -> object:
    return json.loads((out / name).read_text())["sets"]


def test_the_run_folder_holds_everything(finished: Path) -> None:
    files = {file.name for file in finished.iterdir() if not file.name.startswith("events")}
    assert files == {
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "samples.jsonl",
        "unmasking.png",
        "eval_before.json",
        "eval_after.json",
        "curves.png",
        "report.md",
        "checkpoint_sft",
        "checkpoint",
        "checkpoints",
    }
    assert list(finished.glob("events.out.tfevents.*"))
    assert load_config(finished / "config.yaml") == tiny_config(finished)
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")
    report = (finished / "report.md").read_text()
    assert "| unseen puzzles | T = 1 |" in report
    assert "| unseen grids | greedy |" in report
    assert "failed: example 0 of unseen_puzzles, reward 0." in report
    assert "![order of unmasking](unmasking.png)" in report


def test_metrics_have_one_line_per_step_with_all_figures(finished: Path) -> None:
    records = lines(finished)
    assert [(r["phase"], r["step"]) for r in records] == [("sft", s) for s in range(1, 11)] + [("rl", s) for s in range(1, 4)]
    for record in records:
        assert all(math.isfinite(value) for key, value in record.items() if key != "phase")
        assert {"loss", "elbo", "grad_norm", "lr", "tokens"} <= set(record)
    assert {"reward", "reward_std", "correct", "groups_with_signal", "rollout_logp", "completion_length"} <= set(records[-1])
    whole = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert all(record["tokens_per_second"] > 0 and record["peak_memory_mb"] > 0 for record in whole)
    assert [r["step"] for r in records if "probe_greedy" in r] == [5, 10, 2]
    assert records[9]["loss"] < records[0]["loss"] == pytest.approx(math.log(10), rel=0.02), "at first ten ids are as likely"
    samples = [json.loads(line) for line in (finished / "samples.jsonl").read_text().splitlines()]
    kept = {step: {s["set"] for s in samples if (s["phase"], s["step"]) == ("sft", step)} for step in (5, 10)}
    assert kept == {5: {"unseen_puzzles"}, 10: {"unseen_puzzles", "unseen_grids"}}, "a probe is of the first set"


def test_evaluations_hold_every_decoding_setting_and_the_machine(finished: Path) -> None:
    before, after = (json.loads((finished / name).read_text()) for name in ("eval_before.json", "eval_after.json"))
    for evaluation in (before, after):
        assert {"torch", "transformers", "dllm_kernels", "cpu", "threads", "head"} <= set(evaluation["environment"])
        for test in ("unseen_puzzles", "unseen_grids"):
            for way, temperature in (("rollout", 1.0), ("greedy", 0.0)):
                figures = evaluation["sets"][test][way]
                assert figures["examples"] == len(figures["solved"]) == 16
                assert figures["decoding"]["temperature"] == temperature
                assert {"steps", "block_length", "remasking", "seed", "suppress"} <= set(figures["decoding"])
                assert figures["correct"] == figures["solved"].count("1") / 16
    assert before["sets"] != after["sets"], "three updates changed no answer at all: was anything learned?"
    assert set(after["gain"]["unseen_grids"]["greedy"]) == {"gain", "low", "high"}


def test_the_checkpoint_loads_with_transformers_and_is_the_last_policy(finished: Path) -> None:
    model = AutoModelForMaskedLM.from_pretrained(finished / "checkpoint")
    tokenizer = AutoTokenizer.from_pretrained(finished / "checkpoint")
    ids = torch.tensor([tokenizer("0103020400103000=" + "[MASK]" * 16)["input_ids"]])
    last = AutoModelForMaskedLM.from_pretrained(finished / "checkpoints" / "step-00000013")
    supervised = AutoModelForMaskedLM.from_pretrained(finished / "checkpoint_sft")
    with torch.no_grad():
        logits = model(ids).logits
        assert torch.equal(logits, last(ids).logits)
        assert not torch.equal(logits, supervised(ids).logits)


def test_a_run_stopped_in_both_phases_and_resumed_equals_one_that_was_not(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run(tmp_path / "demo")
    stop_after(monkeypatch, run, "sft", 6)
    with pytest.raises(Stopped):
        run.execute()
    assert run.where() == "sft step 6 of 10"
    run = resumed(tmp_path / "demo")
    stop_after(monkeypatch, run, "rl", 1)
    with pytest.raises(Stopped):
        run.execute()
    assert run.where() == "rl step 1 of 3"
    resumed(tmp_path / "demo").execute()
    assert lines(tmp_path / "demo") == lines(finished)
    for name in ("checkpoint", "checkpoint_sft"):
        ours, theirs = ((folder / name / "model.safetensors").read_bytes() for folder in (tmp_path / "demo", finished))
        assert ours == theirs
    for name in ("eval_before.json", "eval_after.json"):
        assert outcomes(tmp_path / "demo", name) == outcomes(finished, name)


def test_a_run_that_died_between_two_saved_states_repeats_the_lost_steps(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run(tmp_path / "demo")
    log = run.folder.log

    def die(record: dict[str, float]) -> None:
        log(record)
        if (record["phase"], record["step"]) == ("rl", 3):
            raise MemoryError

    monkeypatch.setattr(run.folder, "log", die)
    with pytest.raises(MemoryError):
        run.execute()
    assert lines(tmp_path / "demo")[-1]["step"] == 3
    again = resumed(tmp_path / "demo")
    assert again.where() == "rl step 2 of 3"
    again.execute()
    assert lines(tmp_path / "demo") == lines(finished)


def test_inner_iterations_run_off_policy_and_resume_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("rl.inner_iterations=2", "rl.updates=2", "sft.steps=2", "evaluation.probe_every_rl=0")
    whole = new_run(tmp_path / "whole", *options)
    whole.execute()
    run = new_run(tmp_path / "cut", *options)
    stop_after(monkeypatch, run, "rl", 1)
    with pytest.raises(Stopped):
        run.execute()
    resumed(tmp_path / "cut").execute()
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    assert lines(tmp_path / "whole")[-1]["loss"] != 0.0


def test_what_lacks_an_update_is_neither_finished_nor_evaluated(finished: Path) -> None:
    folder: Any = SimpleNamespace(path=finished, read_json=lambda name: json.loads((finished / name).read_text()))
    assert is_finished(folder, tiny_config(finished))
    assert not is_finished(folder, tiny_config(finished, "rl.updates=4"))
    assert not is_finished(SimpleNamespace(path=finished / "checkpoint"), tiny_config(finished))  # type: ignore[arg-type]
    task = SimpleNamespace(tests={name: [None] * 16 for name in ("unseen_puzzles", "unseen_grids")})
    run: Any = SimpleNamespace(folder=folder, setup=SimpleNamespace(task=task))
    for where, evaluated in (("rl step 3 of 3", True), ("rl step 4 of 4", False)):
        run.where = lambda at=where: at
        assert Run._has(run, "eval_after.json") == evaluated


def test_two_seeds_differ_and_sft_alone_needs_no_rl(finished: Path, tmp_path: Path) -> None:
    run = new_run(tmp_path / "demo", "seed=1", "rl.updates=0", "sft.steps=3", "evaluation.samples=0")
    run.console = Console(file=(said := io.StringIO()))
    run.execute()
    assert re.search(r"^\S.*  3/3  .*  loss \d", said.getvalue(), re.MULTILINE), "progress ends with the last step"
    assert not (tmp_path / "demo" / "samples.jsonl").exists()
    assert run.setup.steps == 4
    assert not (tmp_path / "demo" / "eval_after.json").exists()
    assert (tmp_path / "demo" / "report.md").is_file()
    assert lines(tmp_path / "demo")[0]["loss"] != lines(finished)[0]["loss"]


def test_groups_without_a_signal_cost_no_gradient(tmp_path: Path) -> None:
    run = new_run(tmp_path / "demo", "rl.reward=valid", "sft.steps=0", "rl.updates=1")
    run.execute()
    (record,) = lines(tmp_path / "demo")
    assert record["sequences_scored"] == record["groups_with_signal"] == 0
    assert "loss" not in record


def test_a_collapsed_policy_stops_with_a_sentence_and_a_saved_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def repeating(sampled: Rollout) -> Rollout:
        sampled.ids_BS[:, -16:] = sampled.ids_BS[:, -16:-15]
        return sampled

    run = new_run(tmp_path / "demo", "sft.steps=2")
    rollouts_through(monkeypatch, repeating)
    with pytest.raises(GuardError, match="every rollout repeats a single token"):
        run.execute()
    saved = latest(tmp_path / "demo" / "checkpoints")
    assert saved is not None
    assert (saved.state["phase"], saved.state["step"]) == ("sft", 2)


def test_a_guard_between_two_saves_saves_what_was_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def repeating(sampled: Rollout) -> Rollout:
        calls.append(sampled)
        if len(calls) == 3:
            sampled.ids_BS[:, -16:] = sampled.ids_BS[:, -16:-15]
        return sampled

    run = new_run(tmp_path / "demo", "sft.steps=2", "rl.save_every=100", "evaluation.probe_every_rl=0")
    rollouts_through(monkeypatch, repeating)
    with pytest.raises(GuardError, match="every rollout repeats a single token"):
        run.execute()
    saved = latest(tmp_path / "demo" / "checkpoints")
    assert saved is not None
    assert (saved.state["phase"], saved.state["step"]) == ("rl", 2)


def test_identical_rollouts_stop_with_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def identical(sampled: Rollout) -> Rollout:
        sampled.ids_BS[:, -16:] = sampled.ids_BS[:1, -16:]
        return sampled

    run = new_run(tmp_path / "demo", "sft.steps=2")
    rollouts_through(monkeypatch, identical)
    with pytest.raises(GuardError, match="every group consists of identical rollouts"):
        run.execute()


def test_a_loss_or_gradient_that_is_not_finite_never_reaches_the_weights() -> None:
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    config, before = load_config().sft, model.weight.detach().clone()
    with pytest.raises(GuardError, match="the loss became nan"):
        guarded_step(model, optimizer, float("nan"), config, 1e-3)
    model.weight.grad = torch.full_like(model.weight, float("inf"))
    with pytest.raises(GuardError, match="the gradient norm became inf"):
        guarded_step(model, optimizer, 1.0, config, 1e-3)
    assert torch.equal(model.weight, before)


def test_every_example_comes_once_an_epoch_in_a_new_order() -> None:
    epochs = [torch.cat([batch_indices("sft", 0, 20, 5, step)[0] for step in range(e * 4, e * 4 + 4)]) for e in range(2)]
    assert [sorted(epoch.tolist()) for epoch in epochs] == [list(range(20))] * 2
    assert not torch.equal(epochs[0], epochs[1])
    assert batch_indices("sft", 0, 20, 5, 4)[1] == 1
    assert not torch.equal(batch_indices("rl", 0, 20, 5, 0)[0], epochs[0][:5])


def test_the_paired_interval_is_that_of_the_differences() -> None:
    before, after = {"solved": "0011" * 25}, {"solved": "0111" * 25}
    gain = paired_gain(before, after)
    assert gain["gain"] == 0.25
    half = 1.96 * math.sqrt(0.25 * 0.75 / 99)
    assert gain["low"] == pytest.approx(0.25 - half)
    assert gain["high"] == pytest.approx(0.25 + half)
    assert paired_gain(before, before) == {"gain": 0.0, "low": 0.0, "high": 0.0}
    two = paired_gain({"solved": "01"}, {"solved": "11"})
    assert two["high"] == pytest.approx(0.5 + 1.96 * 0.5), "the squares of two are divided by 1"
