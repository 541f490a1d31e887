"""A run's folder: never overwritten, readable at any moment, and enough to resume from.

config.yaml        the resolved configuration          eval_before.json, eval_after.json
metrics.jsonl      one line per step, flushed          curves.png, report.md
events.out.*       the same for TensorBoard            checkpoint_sft/, checkpoint/
environment.json   versions and machine                state/  what --resume reads
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainer.errors import UserError

PHASES = ("sft", "rl")


@dataclass
class State:
    """Where a run stands: `step` steps of `phase` are done."""

    phase: str = PHASES[0]
    step: int = 0
    tokens: int = 0  # through the model so far, rollouts and gradients
    seconds: dict[str, float] = field(default_factory=dict)  # by part of the run, over all its sittings

    def is_past(self, phase: str, step: int) -> bool:
        return (PHASES.index(phase), step) <= (PHASES.index(self.phase), self.step)


class RunDir:
    def __init__(self, path: Path):
        self.path = path
        self._metrics: Any = None
        self._events: Any = None

    @classmethod
    def create(cls, wanted: Path) -> RunDir:
        """`wanted`, or the next free name (`demo-2`, `demo-3`, ...) when it already holds something."""
        path, number = wanted, 1
        try:
            wanted.parent.mkdir(parents=True, exist_ok=True)
            while not _claim(path):
                number += 1
                path = wanted.with_name(f"{wanted.name}-{number}")
            _check_writable(path)
        except OSError as error:
            raise _unwritable(path, error) from error
        return cls(path)

    @classmethod
    def reopen(cls, path: Path) -> RunDir:
        if not (path / "config.yaml").is_file():
            raise UserError(f"--resume: {path} holds no run (there is no config.yaml in it)")
        try:
            _check_writable(path)
        except OSError as error:
            raise _unwritable(path, error) from error
        return cls(path)

    def write_text(self, name: str, text: str) -> None:
        """All or nothing: written aside, flushed to disk, renamed."""
        target = self.path / name
        aside = target.with_name(f".{target.name}.part")
        with aside.open("w") as file:
            file.write(text)
            _flush(file)
        aside.replace(target)

    def write_json(self, name: str, value: Any) -> None:
        self.write_text(name, json.dumps(value, indent=1) + "\n")

    def read_json(self, name: str) -> Any:
        return json.loads((self.path / name).read_text())

    def log(self, record: dict[str, Any]) -> None:
        """Append one step's figures to metrics.jsonl and to TensorBoard."""
        if self._metrics is None:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            self._metrics = (self.path / "metrics.jsonl").open("a")
            self._events = SummaryWriter(str(self.path))  # type: ignore[no-untyped-call]
        self._metrics.write(json.dumps(record) + "\n")
        self._metrics.flush()
        for name, value in record.items():
            if name not in ("phase", "step"):
                self._events.add_scalar(f"{record['phase']}/{name}", value, record["step"])

    def metrics(self) -> list[dict[str, Any]]:
        """Every whole line of metrics.jsonl."""
        file = self.path / "metrics.jsonl"
        lines = file.read_text().split("\n")[:-1] if file.is_file() else []
        return [json.loads(line) for line in lines]

    def rewind(self, state: State) -> None:
        """Drop the lines of steps that were logged after the last saved state: they will be made again, alike."""
        records = self.metrics()
        kept = [record for record in records if state.is_past(record["phase"], record["step"])]
        self.write_text("metrics.jsonl", "".join(json.dumps(record) + "\n" for record in kept))

    def close(self) -> None:
        if self._metrics is not None:
            self._metrics.close()
            self._events.close()

    def save_model(self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Path:
        """A folder that `from_pretrained` loads; an older one of that name stays whole until the new one is."""

        def fill(folder: Path) -> None:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)

        return self._replace_folder(name, fill)

    def save_state(
        self, state: State, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, optimizer: torch.optim.Optimizer
    ) -> None:
        def fill(folder: Path) -> None:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            torch.save(optimizer.state_dict(), folder / "optimizer.pt")
            (folder / "state.json").write_text(json.dumps(asdict(state)))

        name = f"{state.phase}-{state.step:06d}"
        self._replace_folder(f"state/{name}", fill)
        self.write_text("state/latest", name)  # the moment at which the new state counts
        for old in (self.path / "state").iterdir():
            if old.is_dir() and old.name != name:
                shutil.rmtree(old)

    def saved_state(self) -> tuple[State, Path] | None:
        """The newest state and its folder: weights, tokenizer, optimizer.pt; None when nothing was saved yet."""
        pointer = self.path / "state" / "latest"
        if not pointer.is_file():
            return None
        folder = self.path / "state" / pointer.read_text()
        return State(**json.loads((folder / "state.json").read_text())), folder

    def _replace_folder(self, name: str, fill: Callable[[Path], None]) -> Path:
        target = self.path / name
        aside, old = target.with_name(f".{target.name}.part"), target.with_name(f".{target.name}.old")
        for leftover in (aside, old):
            shutil.rmtree(leftover, ignore_errors=True)
        aside.mkdir(parents=True)
        fill(aside)
        for file in aside.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        if target.exists():
            target.rename(old)
        aside.rename(target)
        shutil.rmtree(old, ignore_errors=True)
        return target


def _claim(path: Path) -> bool:
    """Make an empty folder, or take one that is empty already."""
    try:
        path.mkdir()
    except FileExistsError:
        return path.is_dir() and not any(path.iterdir())
    return True


def _check_writable(path: Path) -> None:
    probe = path / ".writable"
    probe.touch()
    probe.unlink()


def _unwritable(path: Path, error: OSError) -> UserError:
    reason = "its parent is not a folder" if isinstance(error, FileExistsError) else error.strerror
    return UserError(f"out: cannot write to {path} ({reason}); name a writable folder with --out")


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
