"""`dllm-kernels` as a user meets it: one sentence for mistakes, Ctrl-C that loses nothing."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from dllm_trainer import cli
from dllm_trainer.cli import app
from dllm_trainer.config import RunConfig, load_config, shipped_configs
from dllm_trainer.records.checkpoints import latest
from dllm_trainer.records.run_dir import RunDir
from typer.testing import CliRunner, Result

from dllm_kernels.version import __version__
from tests.trainer.conftest import TINY, lines

ROOT = Path(__file__).parents[2]


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_version_and_environment() -> None:
    assert call("--version").output.split() == ["dllm-kernels", __version__]
    shown = call("env")
    assert shown.exit_code == 0
    assert any(how in shown.output for how in ("pure PyTorch", "C++ engine"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["demo", "rl.update=3"], "unknown config key rl.update: the nearest is rl.updates"),
        (["demo", "--out", "/dev/null/run"], "out: cannot write to /dev/null/run (its parent is not a folder)"),
        (["demo", "--out", "/dev/null"], "out: /dev/null is a file; name a folder"),
        (["sft", "rl.updates=5"], "sft makes no reinforcement updates, got rl.updates=5"),
        (["demo", "--resume", "/nonexistent"], "--resume: /nonexistent holds no run"),
        (["demo", "--resume", "/nonexistent", "--out", "x"], "leave out --out and --config"),
        (
            ["demo", "--config", "/nonexistent.yaml"],
            "No such file or directory; those that come along are code-toy",
        ),
        (["demo", "--config", "demoo"], "of those that come along the nearest is demo"),
        (["eval", "--checkpoint", "/nonexistent"], "model: there is no folder /nonexistent; a checkpoint is a folder, or an id"),
        (["generate", "--checkpoint", "runs/none/checkpoint"], "model: there is no folder runs/none/checkpoint"),
        (["task", "task.style=words"], "model.checkpoint must be given for this task"),
        (["generate", "--checkpoint", "/nonexistent", "--input", "/nonexistent.jsonl"], "/nonexistent.jsonl: cannot be read"),
        (["rl"], "rl needs a model: give --checkpoint, or a --config with model.checkpoint"),
        (["plot", "/nonexistent"], "plot: /nonexistent holds no run (there is no such folder)"),
        (["demo", "guard.no_signal=0"], "guard.no_signal must be greater than or equal to 1"),
        (["demo", "guard.shift_test=1"], "guard.shift_test must be a valid boolean"),
        (["demo", "evaluation.samples=-1"], "evaluation.samples must be greater than or equal to 0"),
    ],
)
def test_a_mistake_is_one_sentence_with_status_2(arguments: list[str], sentence: str) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert sentence in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_a_second_run_takes_the_next_name_and_says_so(finished: Path) -> None:
    kept = (finished / "metrics.jsonl").read_bytes()
    result = call("sft", *(key for key in TINY if key != "rl.updates=3"), "sft.steps=1", "--out", finished)
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


def test_rl_after_sft_alone_makes_the_default_number_of_updates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The config beside the checkpoint says rl.updates=0, which `sft` wrote."""
    started: list[RunConfig] = []
    (tmp_path / "config.yaml").write_text(load_config(overrides=["rl.updates=0"]).to_yaml())
    (tmp_path / "checkpoint").mkdir()
    monkeypatch.setattr(cli, "_execute", lambda folder, config, *_, **__: started.append(config))
    for more in ([], ["rl.updates=7"]):
        assert call("rl", "--checkpoint", tmp_path / "checkpoint", "--out", tmp_path / "rl", *more).exit_code == 0
    assert [config.rl.updates for config in started] == [load_config().rl.updates, 7]


def test_eval_repeats_the_runs_own_evaluation(finished: Path) -> None:
    result = call("eval", "--checkpoint", finished / "checkpoint")
    told, written = json.loads(result.output), json.loads((finished / "eval_after.json").read_text())
    assert told["sets"] == written["sets"]
    assert (told["seed"], told["checkpoint"]) == (0, str(finished / "checkpoint"))
    assert set(told["environment"]) == set(written["environment"])


def test_generate_fills_a_puzzle(finished: Path) -> None:
    result = call("generate", "--checkpoint", finished / "checkpoint", "--prompt", "1234341221434321=")
    assert result.exit_code == 0, result.output
    assert len(result.stdout.strip()) == 16


def damaged(finished: Path, tmp_path: Path, name: str, damage: str) -> tuple[Path, Path]:
    """A copy of the whole run without its report, one file cut in half, flipped in a bit, missing or replaced by a text."""
    run = tmp_path / "demo"
    shutil.copytree(finished, run)
    (run / "report.md").unlink()
    file = run / name
    if damage == "cut":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif damage == "flip":
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(bytes(data))
    elif damage == "missing":
        file.unlink()
    else:
        file.write_text(damage)
    return run, file


def assert_told(result: Result, what: str) -> None:
    assert result.exit_code == 2, (result.output, result.exception)
    (sentence,) = (line for line in result.output.splitlines() if line.startswith("dllm-kernels: "))
    assert re.search(what, sentence), sentence
    assert "go on with" not in sentence


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("manifest.json", "missing"),
        ("manifest.json", "{}"),
        ("manifest.json", "cut"),
        ("trainer_state.json", "cut"),
        ("trainer_state.json", '{"pace": 1}'),
        ("trainer_state.json", "missing"),
        ("state/rank-00000.safetensors", "cut"),
        ("state/rank-00000.safetensors", "missing"),
        ("state/rank-00000.safetensors", ""),
        ("model.safetensors", "cut"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*trying the one before it")
def test_a_run_whose_only_checkpoint_is_damaged_does_not_start_anew_in_silence(
    finished: Path, tmp_path: Path, name: str, damage: str
) -> None:
    run, _ = damaged(finished, tmp_path, f"checkpoints/step-00000013/{name}", damage)
    kept = (run / "metrics.jsonl").read_bytes()
    assert_told(call("demo", "--resume", run), r"none of its 1 checkpoint\(s\) is whole; start anew or restore one")
    assert (run / "metrics.jsonl").read_bytes() == kept


def test_a_damaged_evaluation_is_told_by_its_file(finished: Path, tmp_path: Path) -> None:
    run, file = damaged(finished, tmp_path, "eval_after.json", "cut")
    assert_told(call("demo", "--resume", run), rf"{file} is missing or damaged \(")


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("model.safetensors", "cut", r"checkpoint/model\.safetensors has \d+ bytes, \d+ were written"),
        ("model.safetensors", "missing", r"checkpoint/model\.safetensors is missing"),
        ("model.safetensors", "flip", r"checkpoint/model\.safetensors has changed since it was written"),
        ("tokenizer.json", "{", r"model: .*checkpoint cannot be loaded \("),
        ("config.json", '{"model_type": "unheard_of"}', r"model: .*checkpoint cannot be loaded \("),
        ("config.json", "cut", r"model: .*checkpoint cannot be loaded \("),
        ("manifest.json", "cut", r"checkpoint/manifest\.json is missing or damaged \("),
    ],
)
def test_a_damaged_checkpoint_is_told(finished: Path, tmp_path: Path, name: str, damage: str, said: str) -> None:
    _, file = damaged(finished, tmp_path, f"checkpoint/{name}", damage)
    assert_told(call("eval", "--checkpoint", file.parent), said)
    assert_told(call("generate", "--checkpoint", file.parent, "--prompt", "1234341221434321="), said)
    assert_told(call("rl", "--checkpoint", file.parent, "--out", tmp_path / "rl"), said)
    assert not (tmp_path / "rl").exists()


def test_a_damaged_line_of_metrics_is_skipped_with_one_warning(finished: Path, tmp_path: Path) -> None:
    text = (finished / "metrics.jsonl").read_text()
    run, _ = damaged(finished, tmp_path, "metrics.jsonl", "{bad\n" + text)
    result = call("demo", "--resume", run)
    assert result.exit_code == 0, result.output
    assert result.output.count("1 unreadable line(s) of") == 1
    assert (run / "report.md").is_file()


def test_resuming_a_finished_run_says_so_and_changes_nothing(finished: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in finished.rglob("*")}
    result = call("demo", "--resume", finished)
    assert result.exit_code == 0, result.output
    assert f"this run is finished already; its report: {finished / 'report.md'}" in result.output
    assert {file: file.stat().st_mtime_ns for file in finished.rglob("*") if file.is_file()} == {
        file: time_ns for file, time_ns in before.items() if file.is_file()
    }


def test_config_prints_yaml_or_schema() -> None:
    assert "updates: 7" in call("config", "rl.updates=7").output
    assert "properties" in json.loads(call("config-schema").output)
    assert [line.split()[0] for line in call("configs").output.splitlines()] == list(shipped_configs())


def test_ctrl_c_leaves_a_readable_folder_and_says_how_to_go_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "trainer", "demo", *TINY, "sft.steps=3", "rl.updates=100000", "rl.save_every=100000"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "runs" / "demo" / "metrics.jsonl"
    deadline = time.monotonic() + 600
    while not (metrics.is_file() and '"rl"' in metrics.read_text()):
        assert time.monotonic() < deadline, "no update within ten minutes"
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "go on with: dllm-kernels demo --resume runs/demo" in output
    run = RunDir.reopen(tmp_path / "runs" / "demo")
    saved = latest(run.path / "checkpoints")
    assert saved is not None
    assert (saved.state["phase"], saved.state["step"]) == ("rl", run.metrics()[-1]["step"]), "the interrupted step was lost"


def test_the_schema_says_what_each_key_is_for() -> None:
    schema = json.loads(call("config-schema").output)
    parts = {**schema["$defs"], "RunConfig": schema}
    bare = [
        f"{name}.{key}"
        for name, part in parts.items()
        for key, value in part["properties"].items()
        if not value.get("description")
    ]
    assert not bare
    assert parts["GuardConfig"]["properties"]["warn_after"]["description"].startswith("of such updates")
    assert parts["SftConfig"]["properties"]["betas"]["description"] == "of AdamW", "a section has what its parent says"
