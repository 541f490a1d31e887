"""`dllm-kernels plan --on`: calls, tokens and operations are those of a run; seconds are those of this machine."""

import dataclasses
import json
import os
import re
from pathlib import Path

import pytest
from dllm_trainer.commands import planned_calls, time_plan
from dllm_trainer.commands.time_plan import DEVICES, Phase, describe_time, phases
from dllm_trainer.config import load_config, shipped_configs
from dllm_trainer.errors import UserError
from dllm_trainer.models.published_sizes import LLADA, LLADA2
from dllm_trainer.records.run_dir import RunDir
from dllm_trainer.train.run import Run
from rich.console import Console

from tests.tiny import checkpoint
from tests.trainer.conftest import new_run, tiny_config

ONE = ["rl.updates=1", "sft.steps=1", "rl.gap_every=0", "task.train_puzzles=20", "task.test_puzzles=2"]


def planned(folder: Path, *keys: str, ranks: int = 1) -> dict[tuple[str, str], Phase]:
    found, _ = phases(tiny_config(folder, *ONE, *keys), ranks=ranks)
    return {(phase.step, phase.name): phase for phase in found}


@pytest.mark.parametrize(
    "keys",
    [
        [],
        ["rl.micro_batch=3", "sft.micro_batch=5", "rollout.micro_batch=7"],
        ["rl.algorithm=espo", "rl.samples=4", "rl.inner_iterations=2", "rl.lr=1e-9", "rl.law=exact"],
        ["rl.algorithm=egspo", "rl.inner_iterations=1", "rl.options={selected_steps: 2}"],
    ],
    ids=["plain", "micro-batches", "old and reference scores, two passes", "two states of a trajectory"],
)
def test_forwards_of_an_update_are_those_that_a_run_counts(tmp_path: Path, keys: list[str]) -> None:
    found = planned(tmp_path, *keys)
    forwards = sum(
        phase.calls * phase.work.sequences for (step, _), phase in found.items() if step == "rl update" and phase.work is not None
    )
    run = new_run(tmp_path / "run", *ONE, *keys)
    run.execute()
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    update = next(record for record in records if record["phase"] == "rl")
    assert update["sequences_scored"] == 16, "every group has a signal, else this compares nothing"
    assert forwards == pytest.approx(update["forwards"])


def test_operations_are_two_a_parameter_and_token_and_attentions(tmp_path: Path) -> None:
    H, heads, inner, S = 64, 2, 96, 33
    sizes = [f"model.hidden_size={H}", f"model.heads={heads}", f"model.intermediate_size={inner}", "model.layers=3"]
    work = planned(tmp_path, *sizes)["rl update", "rollout"].work
    assert work is not None
    assert work.tokens == S
    products = 3 * (4 * H * H + 3 * H * inner)
    want = work.sequences * (2 * S * products + 3 * 4 * S * S * H)
    assert work.flops == pytest.approx(want, rel=1e-5)  # transformers 4 makes the rotary angles of a call by a product, too


def test_what_a_config_adds_is_a_phase_of_its_own(tmp_path: Path) -> None:
    assert ("rl update", "old scores") not in planned(tmp_path)
    assert ("rl update", "reference scores") in planned(tmp_path, "rl.algorithm=rspo")
    assert ("rl update", "first pass") in planned(tmp_path, "rl.algorithm=spg", "rl.samples=4")
    assert ("rl update", "first pass") not in planned(tmp_path, "rl.algorithm=spg", "rl.samples=4", "rl.samples_per_pass=4")
    plain = planned(tmp_path, "rollout.steps=16", "rollout.block_length=4")["rl update", "rollout"]
    kept = planned(tmp_path, "rollout.steps=16", "rollout.block_length=4", "rollout.cache=dual")["rl update", "rollout"]
    assert kept.calls == plain.calls
    assert kept.tokens == pytest.approx(plain.tokens * (1 / 4 * 33 + 3 / 4 * 4) / 33, rel=0.03)
    keys = ("rollout.steps=16", "rollout.block_length=4", "rollout.cache=prefix")
    kept = planned(tmp_path, *keys)["rl update", "rollout"]
    assert kept.tokens == kept.calls * 16 * round(1 / 4 * 33 + 3 / 4 * (4 + 16 // 2)), "a block, and half of what follows it"


def test_a_state_of_blocks_decides_a_token_of_each_and_a_cached_call_sees_one_block_and_a_share_of_the_one_before(
    tmp_path: Path,
) -> None:
    facts = ["topology=block_causal", "block_length=4", "attention_mask=float"]
    keys = [f"model.checkpoint={json.dumps(str(checkpoint(tmp_path / 'm', alphabet='01234=')))}"]
    keys += [f"model.facts.{fact}" for fact in facts]
    keys += ["rollout.sampler=sdar", "rollout.block_length=4", "rollout.steps=4", "rl.algorithm=trace_rl", "rl.options.shrink=1"]
    learned = planned(tmp_path, *keys)["rl update", "gradient"].work
    assert learned is not None
    assert learned.rows == 4 * learned.sequences
    for shift, width in (("0", 4 + 4 / 4), ("1", 4 + 4)):
        kept = planned(tmp_path, *keys, "rollout.cache=true", f"model.facts.shift={shift}")["rl update", "rollout"].work
        assert kept is not None
        assert kept.tokens == round(width + 17 / 16), "the prompt is read once in 16 steps"


def test_a_couple_of_a_batch_is_one_pass_where_one_call_holds_all(tmp_path: Path) -> None:
    """Samples that go together are sequences of one call, whose rows are a pass's share of all."""
    rspo = ("rl.algorithm=rspo", "rl.samples=4")
    whole, cut = planned(tmp_path, *rspo, "rl.samples_per_pass=4"), planned(tmp_path, *rspo, "rl.samples_per_pass=2")
    assert ("rl update", "first pass") not in whole
    assert ("rl update", "first pass") in cut
    assert ("rl update", "first pass") in planned(tmp_path, *rspo, "rl.samples_per_pass=4", "rl.micro_batch=4")
    assert ("rl update", "first pass") in planned(tmp_path, *rspo, "rl.samples_per_pass=4", ranks=2)
    works = [found["rl update", name].work for found in (whole, cut) for name in ("gradient", "reference scores")]
    assert [work and work.sequences for work in works] == [16 * 4, 16 * 4, 16 * 2, 16 * 2]
    rows = [work.rows for work in works if work]
    assert rows[0] == rows[1] == 2 * rows[2] == 2 * rows[3], rows
    work = whole["sft step", "gradient"].work
    assert work is not None
    assert work.rows == 16 * 17 // 2
    assert whole["rl update", "rollout"].at_most, "a completion may end early"


def test_what_takes_most_is_said_with_what_halves_it(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, *ONE)
    found = {(phase.step, phase.name): phase for phase in phases(config)[0]}
    for name, advice in {
        ("rl update", "rollout"): "half of rollout.steps, or keys",
        ("rl update", "gradient"): "half of rl.samples, of the states",
        ("rl update", "optimizer"): "adapters (model.lora.rank)",
        ("sft step", "optimizer"): "adapters (model.lora.rank)",
        ("sft step", "gradient"): "half of sft.batch",
    }.items():
        assert time_plan._advice(config, found[name]).startswith(advice)
    assert [time_plan._duration(seconds) for seconds in (119, 120, 7199, 7200)] == ["119 s", "2 min", "120 min", "2 h"]
    assert re.search(r"^evaluation: .* s, 2 of them", describe_time(config, on="H200"), re.MULTILINE), "after both trainings"


def test_ranks_share_the_calls(tmp_path: Path) -> None:
    one, four = planned(tmp_path), planned(tmp_path, ranks=4)
    for name, phase in one.items():
        assert four[name].tokens == pytest.approx(phase.tokens / (4 if phase.work else 1))
        assert phase.work or phase.tokens == phase.flops == 0


def test_a_datasheets_slowest_part_is_what_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(tmp_path, *ONE)
    found, _ = phases(config)
    slow = dataclasses.replace(DEVICES["H200"], memory=1.0)
    weights_only = time_plan._by_datasheet(config, found, slow, 1)
    parameters = int(planned_bytes(config) / 4)
    for phase, seconds in zip(found, weights_only, strict=True):
        bytes_of_call = 28 * parameters if phase.work is None else 4 * parameters * (3 if phase.work.trains else 1)
        assert seconds == pytest.approx(phase.calls * bytes_of_call)
    for phase, seconds in zip(found, time_plan._by_datasheet(config, found, slow, 4), strict=True):
        if phase.work is None:
            assert seconds == pytest.approx(phase.calls * 28 * parameters / 4), "each rank steps its shard"
    fast = dataclasses.replace(DEVICES["H200"], memory=1e30, fp32=1.0)
    for phase, seconds in zip(found, time_plan._by_datasheet(config, found, fast, 1), strict=True):
        assert seconds == pytest.approx(phase.flops / time_plan.SHARE, abs=1e-9)
    half = tiny_config(tmp_path, *ONE, "model.dtype=bfloat16")
    bf16 = dataclasses.replace(DEVICES["H200"], memory=1e30, bf16=1.0)
    for phase, seconds in zip(found, time_plan._by_datasheet(half, found, bf16, 1), strict=True):
        assert seconds == pytest.approx(phase.flops / time_plan.SHARE, abs=1e-9)
    assert sum(time_plan._by_datasheet(config, found, DEVICES["H200"], 1)) < 0.5, "one GPU waits for no other"


def planned_bytes(config) -> int:
    setup, _ = planned_calls.skeleton(config, planned_calls.planned_task(config)[0], 1)
    return sum(p.numel() * p.element_size() for p in setup.trained.parameters())


def test_a_published_model_is_planned_without_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    one_layer = dataclasses.replace(LLADA, layers=1)  # 32 take their time, as fake ones too
    monkeypatch.setitem(planned_calls.PUBLISHED, "gsai-ml/llada-8b-instruct", one_layer)
    config = load_config(shipped_configs()["llada-8b-bgpo"])
    text = describe_time(config, on="H200", ranks=8)
    assert "a prediction: 40% of the datasheet's products" in text
    assert "of rl the rollout takes" in text
    assert "half of rollout.steps" in text
    assert LLADA2.idle + 1.42e9 == pytest.approx(16.26e9, rel=5e-3), "LLaDA2.0-mini has 32.51 GB in bf16"


def test_an_unknown_place_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--on must be one of here, A100, H100, H200, got TPU"):
        describe_time(tiny_config(tmp_path), on="TPU")


def test_this_machine_is_measured_on_every_kind_of_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_plan, "PATIENCE", 0.0)
    text = describe_time(tiny_config(tmp_path, *ONE, "rl.algorithm=rspo"), on="here")
    for name in ("rollout", "reference scores", "gradient", "optimizer", "all test sets"):
        assert name in text


@pytest.mark.slow
@pytest.mark.parametrize("size", ["demo", "58 million"])
def test_seconds_of_a_step_are_predicted_within_a_quarter(tmp_path: Path, size: str) -> None:
    """On a machine that others share both are measured at a higher priority, where that is allowed."""
    keys = ["rl.reward=rules", "task.test_puzzles=2", "evaluation.probe_every_sft=0", "evaluation.probe_every_rl=0"]
    keys += ["sft.steps=20", "rl.updates=4", f"out={tmp_path / 'run'}"]
    if size != "demo":
        keys += ["model.hidden_size=512", "model.layers=14", "model.heads=8", "model.intermediate_size=2048", "sft.batch=16"]
        keys += ["sft.steps=3", "rl.updates=1", "rl.prompts=2", "rl.group=4", "rl.samples=4", "rl.micro_batch=4"]
    config = load_config(overrides=keys)
    found, _ = phases(config)
    seconds = dict(zip([(phase.step, phase.name) for phase in found], time_plan._here(config, found), strict=True))
    Run(RunDir.create(Path(config.out)), config, Console(quiet=True)).execute()
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    sft = sorted(record["seconds"] for record in records if record["phase"] == "sft")
    rl = [record for record in records if record["phase"] == "rl"]
    rollouts = sorted(record["seconds_rollout"] for record in rl)
    gradients = sorted(
        record["seconds_gradient"] * config.rl.prompts * config.rl.group / record["sequences_scored"] for record in rl
    )
    predicted = {
        "sft": sum(taken for (step, _), taken in seconds.items() if step == "sft step"),
        "rollout": seconds["rl update", "rollout"],
        "gradient": seconds["rl update", "gradient"] + seconds["rl update", "optimizer"],
    }
    measured = {"sft": sft[len(sft) // 2], "rollout": rollouts[len(rl) // 2], "gradient": gradients[len(rl) // 2]}
    print(f"{size}: predicted {predicted}, measured {measured}, load {os.getloadavg()[0]:.1f}")
    assert sum(predicted.values()) == pytest.approx(sum(measured.values()), rel=0.25)
