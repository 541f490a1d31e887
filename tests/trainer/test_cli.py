"""`dllm-train` as a user meets it: one sentence for mistakes, Ctrl-C that loses nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from dllm_kernels.version import __version__
from tests.trainer.conftest import TINY, lines
from trainer.cli import app
from trainer.run_dir import RunDir

ROOT = Path(__file__).parents[2]


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_version_and_environment() -> None:
    assert call("--version").output.split() == ["dllm-kernels", __version__]
    shown = call("env")
    assert shown.exit_code == 0
    assert any(how in shown.output for how in ("pure PyTorch", "C++ row kernels"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["demo", "rl.update=3"], "unknown config key rl.update: the nearest is rl.updates"),
        (["demo", "--out", "/dev/null/run"], "out: cannot write to /dev/null/run (its parent is not a folder)"),
        (["demo", "--resume", "/nonexistent"], "--resume: /nonexistent holds no run"),
        (["demo", "--resume", "/nonexistent", "seed=1"], "leave out overrides"),
        (["demo", "--config", "/nonexistent.yaml"], "cannot be read"),
        (["eval", "--checkpoint", "/nonexistent"], "holds no config.json"),
        (["generate", "--checkpoint", "/nonexistent", "--prompt", "12"], "--prompt must be 16 digits in 0-4"),
    ],
)
def test_a_mistake_is_one_sentence_with_status_2(arguments: list[str], sentence: str) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert sentence in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_a_second_run_takes_the_next_name_and_says_so(finished: Path) -> None:
    kept = (finished / "metrics.jsonl").read_bytes()
    result = call("sft", *TINY, "sft.steps=1", "--out", finished)
    assert result.exit_code == 0, result.output
    assert f"{finished} already holds files; this run goes to {finished}-2" in result.output
    assert (finished / "metrics.jsonl").read_bytes() == kept
    assert (finished.with_name("demo-2") / "checkpoint" / "model.safetensors").is_file()


def test_rl_goes_on_from_a_checkpoint_with_its_runs_config(finished: Path, tmp_path: Path) -> None:
    result = call("rl", "--checkpoint", finished / "checkpoint_sft", "--out", tmp_path / "rl", "rl.updates=2")
    assert result.exit_code == 0, result.output
    two = [{key: value for key, value in record.items() if key != "lr"} for record in lines(tmp_path / "rl")]
    assert two[0]["reward"] == lines(finished)[10]["reward"], "the same policy, seed and update gave other rollouts"
    assert (tmp_path / "rl" / "eval_after.json").is_file()


def test_eval_repeats_the_runs_own_evaluation(finished: Path) -> None:
    result = call("eval", "--checkpoint", finished / "checkpoint")
    assert json.loads(result.output) == json.loads((finished / "eval_after.json").read_text())["sets"]


def test_generate_fills_a_puzzle(finished: Path) -> None:
    result = call("generate", "--checkpoint", finished / "checkpoint", "--prompt", "1234341221434321")
    assert result.exit_code == 0, result.output
    assert len(result.stdout.strip()) == 16


def test_config_prints_yaml_or_schema() -> None:
    assert "updates: 7" in call("config", "rl.updates=7").output
    assert "properties" in json.loads(call("config", "--schema").output)


def test_ctrl_c_leaves_a_readable_folder_and_says_how_to_go_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "trainer", "demo", *TINY, "sft.steps=3", "rl.updates=100000", "rl.save_every=100000"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "runs" / "demo" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and '"rl"' in metrics.read_text()):
        assert time.monotonic() < deadline, "no update within two minutes"
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "go on with: dllm-train demo --resume runs/demo" in output
    run = RunDir.reopen(tmp_path / "runs" / "demo")
    saved = run.saved_state()
    assert saved is not None
    assert (saved[0].phase, saved[0].step) == ("rl", run.metrics()[-1]["step"]), "the interrupted step was lost"
