import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from dllm_trainer.config import RunConfig, load_config
from dllm_trainer.records.run_dir import RunDir
from dllm_trainer.train import rl
from dllm_trainer.train.engines import OwnEngine
from dllm_trainer.train.run import Run
from rich.console import Console

from dllm_kernels import Rollout

# reward=rules: an almost untrained model solves nothing, and groups without a signal teach nothing
TINY = [
    "threads=1",
    "task.train_puzzles=200",
    "task.test_puzzles=16",
    "model.hidden_size=16",
    "model.layers=1",
    "model.heads=2",
    "model.intermediate_size=32",
    "sft.steps=10",
    "sft.batch=16",
    "sft.save_every=4",
    "rl.updates=3",
    "rl.prompts=4",
    "rl.group=4",
    "rl.samples=4",
    "rl.reward=rules",
    "rl.save_every=2",
    "rollout.steps=4",
    "evaluation.probe_every_sft=5",
    "evaluation.probe_every_rl=2",
    "evaluation.probe_examples=8",
]
_CLOCK = ("seconds", "tokens_per_second", "peak_memory_mb")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The trainer sets the number of threads that its config asks for; other tests keep theirs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_config(out: Path, *more: str) -> RunConfig:
    served = "rollout.engine=sglang" in more  # how a server decodes is not ours to say
    base = [key for key in TINY if not (served and key.startswith("rollout."))]
    return load_config(overrides=[*base, f"out={json.dumps(str(out))}", *more])


def new_run(out: Path, *more: str) -> Run:
    config = tiny_config(out, *more)
    return Run(RunDir.create(Path(config.out)), config, Console(quiet=True))


def resumed(out: Path) -> Run:
    return Run(RunDir.reopen(out), load_config(out / "config.yaml"), Console(quiet=True))


def global_random_states() -> tuple[object, ...]:
    numpy_state = numpy.random.get_state()
    return random.getstate(), numpy_state[1].tobytes(), numpy_state[2], torch.get_rng_state().numpy().tobytes()


def rollouts_through(monkeypatch: pytest.MonkeyPatch, change: Callable[[Rollout], Rollout]) -> None:
    """RL learns from `change` of what it draws; evaluations are left alone."""

    class Changed(OwnEngine):
        def generate(self, *args: Any, **kwargs: Any) -> Rollout:
            return change(super().generate(*args, **kwargs))

    monkeypatch.setattr(rl, "engine_of", Changed)


def lines(out: Path) -> list[dict[str, float]]:
    """metrics.jsonl without the clock and the memory, which no two runs share."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if not key.startswith(_CLOCK)} for record in records]


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one whole tiny demo, never interrupted."""
    out = tmp_path_factory.mktemp("runs") / "demo"
    before, threads = global_random_states(), torch.get_num_threads()
    run = new_run(out)
    run.execute()
    torch.set_num_threads(threads)
    assert global_random_states() == before, "the run changed a global random state"
    return out
