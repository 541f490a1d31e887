"""`dllm-kernels plan`: what it predicts is what a fresh process then holds; what cannot fit is refused before it is loaded."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from dllm_trainer.commands import memory_plan, planned_calls
from dllm_trainer.commands.memory_plan import describe_plan
from dllm_trainer.config import load_config, shipped_configs
from dllm_trainer.errors import UserError
from dllm_trainer.models.published_sizes import LLADA
from dllm_trainer.models.tokenizer import make_tokenizer
from dllm_trainer.train.setup import Setup
from transformers import EuroBertConfig, EuroBertForMaskedLM

from dllm_kernels import explain
from tests.trainer.conftest import tiny_config

linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/status is Linux's")
SHORT = ["sft.steps=2", "rl.updates=2", "evaluation.probe_every_sft=0", "evaluation.probe_every_rl=0", "tensorboard=false"]


def call(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", "trainer", *arguments], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def term(text: str, name: str) -> float:
    found = re.search(rf"^{name} +([\d,.]+) MiB", text, re.MULTILINE)
    assert found is not None, text
    return float(found[1].replace(",", ""))


def predicted_and_measured(out: Path, *keys: str) -> tuple[float, float]:
    predicted = term(call("plan", *keys), "predicted peak")
    call("demo", "--out", str(out), *keys)
    records = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    return predicted, max(record["peak_memory_mb"] for record in records)


def checkpoint(folder: Path) -> str:
    tokenizer = make_tokenizer("0123456789=")
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, "vocab_size": 32000}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 256, "bos_token_id": None}
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("mask", "pad", "eos")}
    EuroBertForMaskedLM(EuroBertConfig(**sizes, **heads, **ids)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@linux
@pytest.mark.slow
def test_the_demos_peak_is_predicted_within_15_percent(tmp_path: Path) -> None:
    predicted, measured = predicted_and_measured(tmp_path / "run", *SHORT)
    print(f"demo: predicted {predicted:.0f} MiB, measured {measured:.0f} MiB")
    assert predicted == pytest.approx(measured, rel=0.15)


@linux
@pytest.mark.slow
def test_a_mid_size_runs_peak_is_predicted_within_15_percent(tmp_path: Path) -> None:
    keys = [f"model.checkpoint={checkpoint(tmp_path / 'model')}", "task.train_puzzles=500", "task.test_puzzles=32", *SHORT]
    keys += ["rl.prompts=4", "rl.group=4", "rl.samples=2", "rl.reward=rules"]
    predicted, measured = predicted_and_measured(tmp_path / "run", *keys)
    print(f"mid-size: predicted {predicted:.0f} MiB, measured {measured:.0f} MiB")
    assert predicted == pytest.approx(measured, rel=0.15)


def test_terms_are_those_of_the_parameters(tmp_path: Path) -> None:
    text = describe_plan(tiny_config(tmp_path, "model.hidden_size=256", "model.intermediate_size=512"))
    parameters = int(re.match(r"([\d,]+) parameters", text)[1].replace(",", ""))  # type: ignore[index]
    weights = 4 * parameters / 2**20
    assert term(text, "weights") == pytest.approx(weights, abs=0.1)
    assert term(text, "gradients") == pytest.approx(weights, abs=0.1)
    assert term(text, "optimiser") == pytest.approx(2 * weights, abs=0.1)
    assert "reference policy" not in text
    with_reference = describe_plan(tiny_config(tmp_path, "model.hidden_size=256", "rl.algorithm=rspo"))
    assert term(with_reference, "reference policy") == term(with_reference, "weights")
    assert not list(tmp_path.iterdir()), "nothing is written, nothing loaded"


def test_the_peak_is_that_of_the_call_that_holds_most_and_calls_are_those_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    works: list[planned_calls.Work] = []
    setups: list[Setup] = []
    of_run = memory_plan.works_of

    def watched(setup: Setup, *more: int) -> list[planned_calls.Work]:
        works[:], setups[:] = of_run(setup, *more), [setup]
        return works

    monkeypatch.setattr(memory_plan, "works_of", watched)
    monkeypatch.setattr(memory_plan, "resident_bytes", lambda: 100 << 20)
    keys = ["model.hidden_size=256", "model.intermediate_size=512", "sft.batch=17", "sft.micro_batch=4", "rollout.block_length=8"]
    keys += ["rl.prompts=3", "rl.group=5", "rl.micro_batch=4", "rl.samples_per_pass=2", "rl.samples=4", "rl.algorithm=rspo"]
    config = tiny_config(tmp_path, *keys)
    text = describe_plan(config, ranks=4)
    calls = {work.name: (work.sequences, work.tokens, work.rows) for work in works}
    rows = calls["rl gradient"][2]
    assert calls == {
        "sft": (4, 33, 4 * 17 // 2),  # of 16 tokens half, and a half of one more where a level is never 0
        "rl gradient": (4 * 2, 33, rows),  # two samples of each at a time
        "evaluation": (4, 33, 4 * 8),  # rows of a block
        "rl rollout": (4, 33, 4 * 8),
    }
    assert 4 * 2 * 16 / 3 < rows < 4 * 2 * 16
    (row_bytes,) = {work.logits / (work.sequences * work.tokens * (3 if work.trains else 1)) for work in works}
    assert row_bytes % 4 == 0
    for work in works:
        assert work.peak == max(work.activations, work.kept + work.head)
        assert work.peak_with_logits == max(work.activations, work.kept + work.logits)
        assert work.activations >= work.kept >= work.sequences * work.tokens * 256 * 4, "the last hidden states live on"
    sizes = {"rows": 32, "hidden_size": 256, "vocabulary": int(row_bytes) // 4, "dtype": torch.float32}
    forward = explain(**sizes, trainable_head=False, coef_known=False, wants_gradient=False)
    assert [work.head for work in works if not work.trains] == [forward.peak_bytes] * 2
    vast = dataclasses.replace(works[0], head=0, logits=works[0].activations)
    assert vast.peak_with_logits == vast.kept + vast.activations > vast.peak
    first, later = (planned_calls.measure_call(setups[0], "", 4, 33, 68, trains=True, again=again) for again in (False, True))
    assert first.activations <= later.activations, "gradients that a first backward makes are a term of their own"
    assert later.head - first.head == row_bytes * 256, "and so is the head's, which a later one adds to"
    terms = ("weights", "gradients", "optimiser", "reference policy", "heap fragmentation", "gathered layers")
    total = 100.0 + sum(term(text, name) for name in terms)
    assert term(text, "framework and data") == 100.0
    assert term(text, "activations and head") == pytest.approx(max(work.peak for work in works) / 2**20, abs=0.06)
    assert term(text, "predicted peak") == pytest.approx(total + term(text, "activations and head"), abs=0.4)
    with_logits = max(work.peak_with_logits for work in works) / 2**20
    assert term(text, "with full logits in place of our kernels:") == pytest.approx(total + with_logits, abs=0.4)
    adapted = describe_plan(tiny_config(tmp_path, *keys, "model.lora.rank=2"))
    assert "reference policy" not in adapted, "with adapters it is the model with them off"


def test_ranks_share_weights_and_their_states(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "model.hidden_size=512", "model.intermediate_size=1024", "sft.batch=16")
    one, four = (describe_plan(config, ranks=ranks) for ranks in (1, 4))
    for name in ("weights", "gradients", "optimiser"):
        assert term(four, name) == pytest.approx(term(one, name) / 4, abs=0.1)
    assert term(four, "gathered layers") > term(four, "weights")
    setup, _ = planned_calls.skeleton(config, planned_calls.planned_task(config)[0], 4)
    model: Any = setup.trained
    layer, head = (sum(p.numel() for p in part.parameters()) for part in (model.model.layers[0], model.lm_head))
    assert memory_plan._gathered(model, config) == 4 * (2 * layer + head) + 4 * head, "two layers, the head and its gradient"


def test_activations_are_counted_and_checkpointing_takes_less(tmp_path: Path) -> None:
    sizes = ("model.layers=4", "model.hidden_size=64", "sft.batch=64", "rl.updates=0")
    plain, checkpointed = (
        describe_plan(tiny_config(tmp_path, *sizes, f"model.gradient_checkpointing={on}")) for on in ("false", "true")
    )
    assert term(checkpointed, "activations and head") < 0.6 * term(plain, "activations and head")


def test_what_cannot_fit_is_refused_with_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_plan, "_capacity", lambda device: 8 << 30)
    config = tiny_config(tmp_path, "model.hidden_size=8192", "model.layers=4", "model.intermediate_size=16384", "rl.updates=0")
    with pytest.raises(UserError, match=r"needs [\d,.]+ MiB on each of 1 rank\(s\) and the .* has 8,192.0 MiB; most of it"):
        describe_plan(config)
    assert torch.get_default_dtype() == torch.float32


def test_neither_data_nor_hub_are_needed_for_a_published_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's command, on a machine without a network."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(memory_plan, "_capacity", lambda device: 1 << 50)
    one_layer = dataclasses.replace(LLADA, layers=1)  # 32 take their time, as fake ones too
    monkeypatch.setitem(planned_calls.PUBLISHED, "gsai-ml/llada-8b-instruct", one_layer)
    config = load_config(shipped_configs()["llada-8b-gdpo"], ["model.lora.rank=0", "model.gradient_checkpointing=false"])
    text = describe_plan(config, ranks=8)
    parameters, V, H = int(text.split()[0].replace(",", "")), 126464, 4096
    layer = parameters - 2 * V * H - H
    assert 2 * V * H + H + 32 * layer == pytest.approx(8.02e9, rel=1e-3), "LLaDA-8B has 8.02 billion"
    assert "3 x 768 tokens" in text
    assert "prompts are taken to have 512 tokens, as prompt.max_length allows" in text
    assert "not here, and not read: hub:openai/gsm8k:main:train" in text


def test_with_auto_an_update_is_planned_to_hold_its_budget(tmp_path: Path) -> None:
    for budget in (1, 300):
        config = tiny_config(tmp_path, "rl.samples_per_pass=auto", f"rl.memory_budget={budget}")
        setup, _ = planned_calls.skeleton(config, planned_calls.planned_task(config)[0], 1)
        (work,) = (work for work in planned_calls.works_of(setup, 1, 8) if work.name == "rl gradient")
        assert work.sequences == 1, "not all of the update, which a budget may not hold"
        assert budget << 20 <= work.peak < (budget + 1) << 20
