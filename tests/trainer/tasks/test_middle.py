"""Fill in the middle: problems by definition, careless demonstrations, and the shipped config down to its first updates."""

import json
from pathlib import Path

import pytest
from dllm_trainer.config import load_config
from dllm_trainer.errors import ConfigError
from dllm_trainer.records.run_dir import RunDir
from dllm_trainer.tasks import make_task
from dllm_trainer.tasks.middle import digits, right
from dllm_trainer.train.run import Run
from rich.console import Console


def test_every_equation_holds_with_its_middle_and_with_no_careless_one() -> None:
    task = make_task(load_config(Path("middle-toy")).task, seed=3)
    unseen = task.tests["unseen"]
    careless = 0
    for example in (*task.train, *unseen):
        before, total = int(example.prompt[:-1]), int(example.suffix[1:])
        middle = total - before
        assert example.prompt[-1] + example.suffix[0] == "+="
        assert example.facts["middle"] == f"{middle:02d}"
        assert (before % 10) + (middle % 10) >= 10, "a digit is borrowed, so carelessness is wrong"
        if example.answer != f"{middle:02d}":
            careless += 1
            assert int(example.answer) == middle + 10 - (100 if middle + 10 > 99 else 0), "the tens are one too many"
    assert careless / len(task.train) == pytest.approx(0.6, abs=0.03)
    seen = {(example.prompt, example.suffix) for example in task.train}
    assert not seen & {(example.prompt, example.suffix) for example in unseen}
    assert len({(example.prompt, example.suffix) for example in unseen}) == len(unseen) == 256
    assert all(example.answer == example.facts["middle"] for example in unseen)


def test_rewards_are_of_the_middle_alone() -> None:
    (example, *_), texts = make_task(load_config(Path("middle-toy")).task, seed=0).tests["unseen"], []
    tens, ones = example.facts["middle"]
    other = str((int(ones) + 1) % 10)
    texts = [tens + ones, tens + other, other + ones if other != tens else "x" + ones, "", tens]
    assert right([example] * 5, texts) == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert digits([example] * 5, texts) == [1.0, 0.5, 0.5, 0.0, 0.5]


def test_more_problems_than_there_are_is_a_sentence() -> None:
    with pytest.raises(ConfigError, match=r"task\.test_problems must be at most \d+, the held-out problems, got 5000"):
        make_task(load_config(Path("middle-toy"), ["task.test_problems=5000"]).task, seed=0)


def test_the_shipped_config_runs_from_sft_to_rl(tmp_path: Path) -> None:
    small = ["sft.steps=3", "sft.batch=8", "rl.updates=1", "rl.prompts=2", "rl.group=4", "rl.reward=digits", "rl.warmup=0"]
    small += ["task.test_problems=4", "evaluation.probe_every_sft=0", "evaluation.probe_every_rl=0", "sft.warmup=1"]
    config = load_config(Path("middle-toy"), [*small, f"out={json.dumps(str(tmp_path / 'run'))}"])
    Run(RunDir.create(Path(config.out)), config, Console(quiet=True)).execute()
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["phase"], last["on_policy_gap"] < 1e-4) == ("rl", True)
    evaluation = json.loads((tmp_path / "run" / "eval_after.json").read_text())
    assert 0 <= evaluation["sets"]["unseen"]["greedy"]["digits"] <= 1
