"""kill -9 at any moment, and damage to what was saved: the run goes on with `--resume auto` and ends where it
would have.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from dllm_trainer.errors import UserError
from safetensors.torch import load_file

from tests.trainer.conftest import TINY, lines, new_run, resumed

pytestmark = pytest.mark.xdist_group("kills")  # one worker: what its fixtures make is made once

ROOT = Path(__file__).parents[3]
OFTEN = ["sft.save_every=1", "rl.save_every=1", "checkpoints.keep_last=2"]
STEPS = 13  # of both phases together


def launch(out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "trainer", "demo", *TINY, *OFTEN, "--out", str(out), "--resume", "auto"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def steps_logged(out: Path) -> int:
    file = out / "metrics.jsonl"
    return file.read_text().count("\n") if file.is_file() else 0


def is_at_work(process: subprocess.Popen[str], out: Path) -> bool:
    lock = out / ".lock"
    return lock.is_file() and f'"pid": {process.pid},' in lock.read_text() and (out / "config.yaml").is_file()


def killed_until_finished(out: Path, kills: int, seed: int) -> list[int]:
    """The steps that were logged when each kill came: none or a few after it went on, at a drawn moment within a step."""
    draw = random.Random(seed)
    moments = []
    for _ in range(kills):
        process = launch(out)
        target = min(steps_logged(out) + draw.randrange(2), STEPS)
        deadline = time.monotonic() + 600
        while process.poll() is None and not (is_at_work(process, out) and steps_logged(out) >= target):
            assert time.monotonic() < deadline, "no progress in ten minutes"
            time.sleep(0.002)
        time.sleep(draw.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        output, _ = process.communicate(timeout=240)
        assert process.returncode in (0, -signal.SIGKILL), output
        moments.append(steps_logged(out))
    process = launch(out)
    output, _ = process.communicate(timeout=800)
    assert process.returncode == 0, output
    return moments


def assert_ended_alike(out: Path, finished: Path) -> None:
    assert lines(out) == lines(finished)
    for name in ("checkpoint", "checkpoint_sft"):
        ours, theirs = (load_file(folder / name / "model.safetensors") for folder in (out, finished))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    assert not list(out.glob(".*.part")), "half-written files are left"


@pytest.mark.timeout(3600)  # starts of a run, one after the other
@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_ends_with_the_weights_of_one_in_peace(kills: int, finished: Path, tmp_path: Path) -> None:
    moments = killed_until_finished(tmp_path / "demo", kills, seed=kills)
    assert len(moments) == kills
    assert len(set(moments)) > kills // 4, "killed at different moments"
    assert_ended_alike(tmp_path / "demo", finished)


# --- damage to the newest checkpoint, through the run -------------------------------------------------------


@pytest.fixture(scope="module")
def halfway(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that died in RL with its last two checkpoints, of updates 1 and 2."""
    out = tmp_path_factory.mktemp("halfway") / "demo"
    run = new_run(out, *OFTEN)
    log = run.folder.log

    def die(record: dict[str, float]) -> None:
        log(record)
        if (record["phase"], record["step"]) == ("rl", 3):
            raise MemoryError

    run.folder.log = die  # type: ignore[method-assign, assignment]
    with pytest.raises(MemoryError):
        run.execute()
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-00000011", "step-00000012"]
    return out


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def halve(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", flip),
        ("model.safetensors", halve),
        ("state/rank-00000.safetensors", flip),
        ("trainer_state.json", halve),
    ],
)
def test_the_checkpoint_before_a_damaged_one_is_used_with_a_warning(
    name: str, damage: object, halfway: Path, finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(halfway, tmp_path / "demo")
    damage(tmp_path / "demo" / "checkpoints" / "step-00000012" / name)  # type: ignore[operator]
    with pytest.warns(UserWarning, match=f"step-00000012/{name}.*; trying the one before it"):
        run = resumed(tmp_path / "demo")
    assert run.where() == "rl step 1 of 3"
    run.execute()
    assert_ended_alike(tmp_path / "demo", finished)


@pytest.mark.filterwarnings("ignore:.*trying the one before it")
def test_where_both_are_damaged_the_run_says_so_and_touches_nothing(halfway: Path, tmp_path: Path) -> None:
    shutil.copytree(halfway, tmp_path / "demo")
    for folder in (tmp_path / "demo" / "checkpoints").iterdir():
        flip(folder / "model.safetensors")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(UserError, match=r"none of its 2 checkpoint\(s\) is whole"):
        resumed(tmp_path / "demo")
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
