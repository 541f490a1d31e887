"""A rank that stands still or goes away ends the others with a sentence, and `--max-restarts` goes on by itself."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.trainer.conftest import lines
from tests.trainer.ranks import ENDLESS, Launch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_stands_still_ends_the_other_in_time_and_is_named(victim: int, tmp_path: Path) -> None:
    run = Launch(tmp_path / "run", *ENDLESS, "parallel.patience=5")
    run.wait_for_steps(3)
    stopped = run.ranks()[victim]
    os.kill(stopped, signal.SIGSTOP)
    seconds = run.seconds_until_only({victim})
    assert 2 < seconds < 15, f"patience is 5 s, it took {seconds:.1f}"
    os.kill(stopped, signal.SIGKILL)  # torchrun would do so after half a minute
    output = run.end()
    assert run.process.returncode in (1, 137), output
    assert f"dllm-kernels: rank {victim} has not answered for 5 s, so the run ends; the last saved state is kept" in output
    assert "Traceback" not in output


def test_a_store_that_does_not_answer_ends_the_run_too() -> None:
    """Without a launcher rank 0 keeps the store; if it is stopped, nobody's calls of the store come back."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(silent.getsockname()[1])}
        code = "import time; from dllm_trainer import distributed, watch; "
        code += "watch.Watch(distributed.Ranks(rank=1, size=3), 2.0); time.sleep(60)"
        ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=50)
    assert ended.returncode == 1
    assert "dllm-kernels: rank 0, or whoever keeps the ranks' store, has not answered for 2 s, so the run ends" in ended.stderr


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_other_within_seconds_without_a_traceback(victim: int, tmp_path: Path) -> None:
    run = Launch(tmp_path / "run", *ENDLESS)
    run.wait_for_steps(3)
    os.kill(run.ranks()[victim], signal.SIGKILL)
    seconds = run.seconds_until_only(set())
    assert seconds < 5, f"it took {seconds:.1f} s"
    output = run.end()
    assert run.process.returncode in (1, 137), output
    assert "Traceback" not in output
    assert "gloo/" not in output
    assert f"dllm-kernels: rank {1 - victim} ends, as another rank has ended or cannot be reached" in output


@pytest.mark.parametrize("victim", [0, 1])
def test_with_restarts_a_killed_rank_changes_nothing_in_the_end(victim: int, tmp_path: Path) -> None:
    keys = ["sft.save_every=1", "rl.save_every=1", "tensorboard=false"]
    peace = Launch(tmp_path / "peace", *keys)
    output = peace.end()
    assert peace.process.returncode == 0, output
    run = Launch(tmp_path / "run", *keys, options=("--max-restarts", "1"))
    run.wait_for_steps(4)
    os.kill(run.ranks()[victim], signal.SIGKILL)
    output = run.end()
    assert run.process.returncode == 0, output
    assert len((run.out / "history.jsonl").read_text().splitlines()) == 2, "it was started anew, in the same folder"
    assert lines(run.out) == lines(peace.out)
    ours, theirs = (load_file(out / "checkpoint" / "model.safetensors") for out in (run.out, peace.out))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
