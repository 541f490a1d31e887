"""The demo under torchrun: two processes do what one does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.trainer.conftest import TINY, lines, new_run

ROOT = Path(__file__).parents[3]
SAME = ("loss", "reward", "grad_norm", "elbo", "lr", "correct", "tokens", "sequences_scored", "probe_greedy")


def torchrun(processes: int, *arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--local-addr",
        "127.0.0.1",
        "--nproc-per-node",
        str(processes),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "-m", "trainer", *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=800
    )


def assert_same_metrics(ours: Path, theirs: Path) -> None:
    assert len(lines(ours)) == len(lines(theirs))
    for mine, other in zip(lines(ours), lines(theirs), strict=True):
        assert mine.keys() == other.keys()
        for key in SAME:
            if key in other:
                # the mean of advantages is 0: an on-policy loss is what rounding leaves of it
                scale = 1e-4 if key == "loss" and other["phase"] == "rl" else 1e-6
                assert mine[key] == pytest.approx(other[key], rel=1e-4, abs=scale), (key, other["phase"], other["step"])


@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="FSDP2 of torch 2.6 does not run on a CPU")
def test_two_processes_log_what_one_does(tmp_path: Path) -> None:
    few = ["sft.steps=2", "rl.updates=1", "rl.prompts=3", "rl.group=3", "task.test_puzzles=3", "evaluation.probe_every_sft=2"]
    new_run(tmp_path / "one", *few).execute()
    done = torchrun(2, "demo", *TINY, *few, "--out", tmp_path / "two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert_same_metrics(tmp_path / "two", tmp_path / "one")
    assert done.stdout.count("training examples;") == 1, "every rank spoke"
    # the command alone keeps a history
    names = [
        {file.name for file in (tmp_path / run).iterdir() if not file.name.startswith(("events", "history"))}
        for run in ("one", "two")
    ]
    assert names[0] == names[1]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("algorithm", ["bgpo", "egspo_sa", "dmpo"])
def test_two_processes_train_any_algorithm_as_one_does_and_go_on_where_they_stopped(algorithm: str, tmp_path: Path) -> None:
    keys = [f"rl.algorithm={algorithm}", "rl.inner_iterations=2", "rl.micro_batch=2", "sft.micro_batch=3"]
    new_run(tmp_path / "one", *keys).execute()
    done = torchrun(2, "demo", *TINY, *keys, "--out", tmp_path / "two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert_same_metrics(tmp_path / "two", tmp_path / "one")
    (tmp_path / "two" / "report.md").unlink()
    (tmp_path / "two" / "eval_after.json").unlink()
    again = torchrun(2, "demo", "--resume", tmp_path / "two", cwd=tmp_path)
    assert again.returncode == 0, again.stderr[-4000:]
    assert (tmp_path / "two" / "report.md").is_file()


@pytest.mark.slow
def test_a_mistake_is_one_sentence_of_one_process_and_ends_both(tmp_path: Path) -> None:
    done = torchrun(2, "demo", *TINY, "rl.reward=luck", "--out", tmp_path / "two", cwd=tmp_path)
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("dllm-kernels: ")]
    assert told
    assert all("reward luck is unknown" in line for line in told)
    assert "Traceback" not in done.stderr.partition("dllm-kernels: ")[0]
    assert not (tmp_path / "two").exists()
