"""The configs that come along: each resolves, each LLaDA-8B one trains its architecture, GSM8K runs from file to report."""

import json
from pathlib import Path

import pytest
import torch
from dllm_trainer.commands.memory_plan import describe_plan
from dllm_trainer.config import RunConfig, load_config, shipped_configs
from dllm_trainer.models.tokenizer import make_tokenizer
from dllm_trainer.records.run_dir import RunDir
from dllm_trainer.tasks import make_task
from dllm_trainer.train.run import Run
from rich.console import Console

from tests.trainer.models import tiny_checkpoints

SHARED = Path("/work/shared/data")
LLADA = ("bgpo", "gdpo", "dmpo", "egspo", "egspo-sa", "rspo")
QUESTIONS = [{"question": f"Add {a} and {b}.", "answer": f"\n#### {a + b}"} for a, b in ((1, 2), (3, 4), (5, 6), (7, 8))]
ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
SMALL = [
    "threads=1",
    "tensorboard=false",
    "prompt.instructions=false",
    "task.completion_length=64",
    "task.test_rows=2",
    "rl.updates=2",
    "rl.prompts=1",
    "rl.group=4",
    "rl.micro_batch=8",
    "model.dtype=float32",  # 16-bit products are slow on most CPUs
    "parallel.dtype=null",
    "rl.lr=1.0e-6",  # more would carry GDPO's ratios beyond their clip within its 12 iterations
    "rollout.steps=4",
    "rollout.block_length=64",
    "evaluation.probe_every_rl=0",
]


def written(folder: Path) -> list[str]:
    """GSM8K's format in a file, and the keys that name it."""
    file = folder / "gsm8k.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return [f"task.train={file}", f"task.test={file}"]


def checksum(examples: object, completions: list[str]) -> list[float]:
    """A reward that random texts differ in."""
    return [float(sum(map(ord, text)) % 7) for text in completions]


def run(config: RunConfig) -> list[dict[str, float]]:
    Run(RunDir.create(Path(config.out)), config, Console(quiet=True)).execute()
    return [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]


def test_every_shipped_config_resolves_and_says_what_it_is() -> None:
    names = shipped_configs()
    assert {f"llada-8b-{name}" for name in LLADA} | {"demo", "countdown", "gsm8k-toy"} <= set(names)
    for name, file in names.items():
        config = load_config(Path(name))
        assert file.read_text().startswith("# "), name
        assert load_config(base=config.to_yaml()) == config, name
    assert [load_config(Path(f"llada-8b-{name}")).rl.algorithm for name in LLADA] == [name.replace("-", "_") for name in LLADA]


@pytest.mark.parametrize("name", LLADA)
def test_each_llada_config_makes_two_updates_on_a_tiny_checkpoint_of_that_architecture(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dllm_trainer.train.setup.choose", lambda *args, **kwargs: checksum)
    tokenizer = make_tokenizer(ALPHABET)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("mask", "pad", "eos")}
    tiny_checkpoints.write("llada", tmp_path / "llada", vocab_size=128, embedding_size=128, **ids)
    tokenizer.save_pretrained(tmp_path / "llada")
    keys = [f"model.checkpoint={tmp_path / 'llada'}", f"out={tmp_path / 'run'}", *written(tmp_path), *SMALL]
    shipped = load_config(Path(f"llada-8b-{name}"))
    if shipped.model.lora.rank:
        keys.append("model.lora.rank=2")
    config = load_config(Path(f"llada-8b-{name}"), keys)
    # sizes and dtypes alone: what makes the algorithm is as shipped
    for kept in ("algorithm", "law", "samples", "inner_iterations", "advantage", "options", "betas"):
        assert getattr(config.rl, kept) == getattr(shipped.rl, kept), kept
    records = run(config)
    assert [record["step"] for record in records] == [1, 2]
    assert [(record["grad_norm"] > 0, record["backwards"] > 0) for record in records] == [(True, True)] * 2
    before = torch.get_default_dtype()
    assert "predicted peak" in describe_plan(config)
    assert torch.get_default_dtype() == before


def test_gsm8k_runs_from_file_to_report_with_a_model_from_scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dllm_trainer.train.setup.choose", lambda *args, **kwargs: checksum)
    keys = [*written(tmp_path), *SMALL, "task.train_rows=null", "sft.steps=2", "sft.batch=2", "rl.samples=2"]
    records = run(load_config(Path("gsm8k-toy"), [*keys, f"out={tmp_path / 'run'}"]))
    assert [record["phase"] for record in records] == ["sft", "sft", "rl", "rl"]
    assert json.loads((tmp_path / "run" / "eval_after.json").read_text())["sets"]["test"]["greedy"]["examples"] == 2
    assert (tmp_path / "run" / "report.md").is_file()


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="the data lie beside a developer's checkout")
def test_the_toy_config_runs_on_gsm8k_itself(tmp_path: Path) -> None:
    keys = [f"task.train={SHARED / 'gsm8k_train.jsonl'}", f"task.test={SHARED / 'gsm8k_test.jsonl'}", "threads=1"]
    config = load_config(Path("gsm8k-toy"), [*keys, f"out={tmp_path / 'run'}"])
    task = make_task(config.task, seed=0)
    assert len(task.train) == 64
    records = run(config)
    assert [record["phase"] for record in records] == ["sft"] * 10 + ["rl"] * 2
    assert all(record["forwards"] > 0 for record in records[-2:])
