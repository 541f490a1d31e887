"""A run of two ranks under `dllm_trainer.launch`, whose ranks can be told apart, stopped and killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from dllm_trainer.records.checkpoints import latest

from tests.trainer.conftest import TINY

ROOT = Path(__file__).parents[2]
ENDLESS = ["rl.updates=0", "sft.steps=1000000", "sft.save_every=1000000", "evaluation.probe_every_sft=0", "tensorboard=false"]


class Launch:
    """The demo, with these overrides, in two processes."""

    def __init__(self, out: Path, *keys: str, options: tuple[str, ...] = ()) -> None:
        self.out = out
        launcher = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2", *options]
        command = [sys.executable, "-m", "dllm_trainer.launch", *launcher, "-m", "dllm_trainer", "demo", *TINY, *keys]
        self.process = subprocess.Popen(
            [*command, "--out", str(out)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def wait_for_steps(self, count: int) -> None:
        """Until so many are logged."""
        file, end = self.out / "metrics.jsonl", time.monotonic() + 600
        while not file.is_file() or file.read_text().count("\n") < count:
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < end, "no progress in ten minutes"
            time.sleep(0.02)

    def ranks(self) -> dict[int, int]:
        """The process of each rank that lives."""
        found = {}
        for folder in Path("/proc").iterdir():
            try:
                if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == self.process.pid:
                    variables = (folder / "environ").read_bytes().decode().split("\0")
                    found[int(dict(v.split("=", 1) for v in variables if "=" in v)["RANK"])] = int(folder.name)
            except (OSError, ValueError, KeyError, IndexError):  # no process, or one that ends just now
                continue
        return found

    def seconds_until_only(self, left: set[int]) -> float:
        started = time.monotonic()
        while set(self.ranks()) - left:
            assert time.monotonic() - started < 60, f"ranks {sorted(self.ranks())} go on"
            time.sleep(0.05)
        return time.monotonic() - started

    def end(self) -> str:
        """What it printed, once it has ended."""
        try:
            return self.process.communicate(timeout=240)[0]
        except subprocess.TimeoutExpired:
            for process in (*self.ranks().values(), self.process.pid):
                os.kill(process, signal.SIGKILL)
            raise AssertionError(f"no end: {self.process.communicate()[0]}") from None


def resumes_at(out: Path) -> int:
    saved = latest(out / "checkpoints")
    return 0 if saved is None else saved.step
