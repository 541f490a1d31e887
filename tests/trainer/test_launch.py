"""Torchrun without its traceback: a signal, a mistake and a lost rank end a launch with what they mean."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trainer.conftest import lines
from tests.trainer.ranks import ENDLESS, Launch, resumes_at


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
@pytest.mark.parametrize("everyone", [True, False], ids=["as the terminal sends it", "to the launcher alone"])
def test_a_signal_saves_and_ends_without_a_traceback(number: signal.Signals, code: int, everyone: bool, tmp_path: Path) -> None:
    run = Launch(tmp_path / "run", *ENDLESS)
    run.wait_for_steps(3)
    (os.killpg if everyone else os.kill)(run.process.pid, number)
    output = run.end()
    assert run.process.returncode == code, output
    assert "Traceback" not in output
    assert output.count("state saved; go on with: dllm-kernels demo --resume") == 1
    assert resumes_at(run.out) == len(lines(run.out)), "what was logged is saved"


@pytest.mark.parametrize(("end", "code"), [("sys.exit(75)", 75), ("os.kill(os.getpid(), 9)", 137), ("pass", 0)])
def test_the_status_is_that_of_the_rank_that_failed_first(end: str, code: int, tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(f"import os, sys\n{end}\n")
    options = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "1"]
    command = [sys.executable, "-m", "dllm_trainer.launch", *options, str(tmp_path / "rank.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    how = {75: "with status 75", 137: "by SIGKILL"}.get(code)
    assert (f"dllm-kernels: rank 0 ended {how}, and with it the run" in done.stderr) == (how is not None)
