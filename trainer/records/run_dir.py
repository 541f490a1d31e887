"""A run's folder: never overwritten, readable at any moment, and enough to resume from.

config.yaml        the resolved configuration          eval_before.json, eval_after.json
metrics.jsonl      one line per step, flushed          curves.png, unmasking.png, report.md
samples.jsonl      answers to a few fixed examples, at every evaluation
events.out.*       the same for TensorBoard            checkpoint_sft/, checkpoint/
environment.json   versions and machine                checkpoints/  what --resume reads, see checkpoints.py
history.jsonl      one line per start: from where, what changed, on which machine
.lock              while a process writes here
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from ..errors import UserError, first_line
from . import samples
from .checkpoints import Checkpoint
from .lock import NAME as LOCK
from .lock import Lock

PHASES = ("sft", "rl")
HISTORY = "history.jsonl"
EVENTS = "events.out.tfevents.*"
_BEFORE_CONFIG = {LOCK, ".writable", ".config.yaml.part"}


@dataclass
class State:
    """Progress of a run: `step` steps of `phase` are done."""

    phase: str = PHASES[0]
    step: int = 0
    tokens: int = 0  # through the model so far, rollouts and gradients
    seconds: dict[str, float] = field(default_factory=dict)  # by part of the run, summed over resumes
    before: dict[str, Any] | None = None  # eval_before.json, once RL began
    curriculum: dict[str, Any] = field(default_factory=dict)  # where RL stands in it
    passes: dict[str, int] = field(default_factory=dict)  # the micro-batch that was found to fit rl.memory_budget

    @classmethod
    def read(cls, saved: Checkpoint) -> State:
        """That of a checkpoint. Raises UserError for a field that is unknown, missing or of a wrong type."""
        values = {key: value for key, value in saved.state.items() if key not in ("facts", "config")}
        kinds: dict[str, Any] = {
            "phase": str,
            "step": int,
            "tokens": int,
            "seconds": dict,
            "before": (dict, type(None)),
            "curriculum": dict,
            "passes": dict,
        }
        for name in ("curriculum", "passes"):  # checkpoints of earlier versions have none
            values.setdefault(name, {})
        wrong = sorted(values.keys() ^ kinds.keys()) or [key for key, kind in kinds.items() if not isinstance(values[key], kind)]
        if wrong or values["phase"] not in PHASES or not isinstance(saved.state.get("facts"), dict):
            raise UserError(f"{saved.path}: its trainer_state.json cannot be used (field {(wrong or ['phase or facts'])[0]})")
        return cls(**values)

    def is_past(self, phase: str, step: int) -> bool:
        return (PHASES.index(phase), step) <= (PHASES.index(self.phase), self.step)


class RunDir:
    def __init__(self, path: Path):
        self.path = path
        self.tensorboard = True
        self.wandb: str | None = None  # project
        self._wandb_run: Any = None
        self._metrics: Any = None
        self._events: Any = None
        self._kept: list[dict[str, Any]] = []  # records before a resume, for TensorBoard
        self._kept_samples: list[dict[str, Any]] = []
        self._warned = False
        self._lock: Lock | None = None

    def lock(self) -> None:
        """Be the one process that writes here, until `close`. Raises UserError naming the one that is."""
        try:
            self._lock = Lock(self.path)
        except OSError as error:
            raise _unwritable(self.path, error) from error

    @classmethod
    def create(cls, wanted: Path) -> RunDir:
        """`wanted`, or the next free name (`demo-2`, `demo-3`, ...) when it already holds something."""
        path, number = wanted, 1
        try:
            if (wanted.is_symlink() or wanted.exists()) and not wanted.is_dir():
                raise UserError(f"out: {wanted} is a file; name a folder")
            wanted.parent.mkdir(parents=True, exist_ok=True)
            while not _claim(path):
                number += 1
                path = wanted.with_name(f"{wanted.name}-{number}")
            _check_writable(path)
        except OSError as error:
            raise _unwritable(path, error) from error
        return cls(path)

    @classmethod
    def reopen(cls, path: Path, *, alone: bool = False, argument: str = "--resume") -> RunDir:
        """The folder of a run, whatever else happens in it; `alone`: locked, or not at all; `argument`: what named it."""
        if not (path / "config.yaml").is_file():
            why = "there is no config.yaml in it" if path.is_dir() else "there is no such folder"
            raise UserError(f"{argument}: {path} holds no run ({why})")
        folder = cls(path)
        if alone:
            folder.lock()
        try:
            _check_writable(path)
        except OSError as error:
            raise _unwritable(path, error) from error
        return folder

    def write_text(self, name: str, text: str) -> None:
        """Atomic: written aside, flushed to disk, renamed."""
        target = self.path / name
        aside = target.with_name(f".{target.name}.part")
        aside.unlink(missing_ok=True)  # a link of that name is not followed
        with aside.open("x", encoding="utf-8") as file:
            file.write(text)
            _flush(file)
        aside.replace(target)

    def write_json(self, name: str, value: Any) -> None:
        self.write_text(name, json.dumps(value, indent=1) + "\n")

    def read_json(self, name: str) -> Any:
        file = self.path / name
        try:
            return json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise _damaged(file, error) from error

    def log(self, record: dict[str, Any]) -> None:
        """Append one step's figures to metrics.jsonl and to TensorBoard; null for those that are not finite, as in JSON.

        Raises UserError for a figure that is no number, as an algorithm of one's own may return.
        """
        record = {name: _figure(name, value) for name, value in record.items()}
        self._open()
        self._metrics.write(json.dumps(record) + "\n")
        self._metrics.flush()
        self._show(record)

    def keep(self, records: Sequence[dict[str, Any]]) -> None:
        """Append to samples.jsonl, and show in TensorBoard."""
        self._open()
        with (self.path / samples.NAME).open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
        self._show_samples(records)

    def _open(self) -> None:
        if self._metrics is not None:
            return
        self._metrics = (self.path / "metrics.jsonl").open("a")
        if self.wandb is not None:
            try:
                import wandb
            except ImportError as error:
                raise UserError("wandb names a project, but the package is missing: pip install 'dllm-kernels[wandb]'") from error
            self._wandb_run = wandb.init(project=self.wandb, name=self.path.name, dir=str(self.path), resume="allow")
        if self.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            # log everything again, and first: TensorBoard's own purging goes by the step, which both phases count
            # from 1, and by the order of the files' names, which begin with the second and the machine
            for file in self.path.glob(EVENTS):
                file.unlink()
            self._events = SummaryWriter(str(self.path))  # type: ignore[no-untyped-call]
            self._show_samples(self._kept_samples)
        for earlier in self._kept:
            self._show(earlier)

    def _show(self, record: dict[str, Any]) -> None:
        own = {name: value for name, value in record.items() if name not in ("phase", "step")}
        figures = {f"{record['phase']}/{name}": math.nan if value is None else value for name, value in own.items()}
        if self._wandb_run is not None:
            self._wandb_run.log({**figures, f"{record['phase']}/step": record["step"]})
        for name, value in figures.items() if self._events is not None else ():
            self._events.add_scalar(name, value, record["step"])

    def _show_samples(self, records: Sequence[dict[str, Any]]) -> None:
        evaluations = groupby(records, itemgetter("phase", "set", "step")) if self._events is not None else ()
        for (phase, shown, step), of_one in evaluations:
            self._events.add_text(f"{phase}/{shown}", samples.as_text(of_one), step)

    def metrics(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl; damaged lines are skipped with a warning."""
        file = self.path / "metrics.jsonl"
        lines = file.read_text(errors="replace").split("\n")[:-1] if file.is_file() else []
        records = [record for record in map(_record, lines) if record is not None]
        if len(records) < len(lines) and not self._warned:
            self._warned = True
            print(f"dllm-kernels: {len(lines) - len(records)} unreadable line(s) of {file} skipped", file=sys.stderr)
        return records

    def rewind(self, state: State, *, sft_steps: int = 0) -> None:
        """Drop the records after the last saved state: these steps will be repeated identically. Those that are lost are told."""
        records = self.metrics()
        kept = [record for record in records if state.is_past(record["phase"], record["step"])]
        done = state.step + (sft_steps if state.phase == "rl" else 0)
        if (lost := done - len({(record["phase"], record["step"]) for record in kept})) > 0:
            print(f"dllm-kernels: {self.path / 'metrics.jsonl'} lacks {lost} of the {done} steps that were made", file=sys.stderr)
        clean = [{name: _figure(name, value) for name, value in record.items()} for record in kept]  # earlier versions had NaN
        self.write_text("metrics.jsonl", "".join(json.dumps(record) + "\n" for record in clean))
        if (self.path / samples.NAME).is_file():
            known = [s for s in samples.read(self.path / samples.NAME) if state.is_past(s["phase"], s["step"])]
            self.write_text(samples.NAME, "".join(json.dumps(s, ensure_ascii=False) + "\n" for s in known))
            self._kept_samples = known
        self._kept = clean

    def drop_if_empty(self) -> None:
        """Remove the folder of a run that failed before its first step and cannot be resumed."""
        idle = {"config.yaml", "environment.json", "metrics.jsonl", samples.NAME, HISTORY, LOCK}
        if {file.name for file in self.path.iterdir()} <= idle:
            shutil.rmtree(self.path, ignore_errors=True)

    def close(self) -> None:
        for logger in (self._metrics, self._events):
            with suppress(OSError):  # every line is flushed when it is logged: what fails again here was told then
                if logger is not None:
                    logger.close()
        if self._wandb_run is not None:
            self._wandb_run.finish()
        if self._lock is not None:
            lock, self._lock = self._lock, None
            lock.release()


def _claim(path: Path) -> bool:
    """Create the folder, or take an existing empty one; whether that worked.

    One that a run was killed in before it had a config is empty too, else `--resume auto` would begin elsewhere each time.
    """
    try:
        path.mkdir()
    except FileExistsError:
        if not path.is_dir() or not (names := {file.name for file in path.iterdir()}) <= _BEFORE_CONFIG:
            return False
        if LOCK in names:
            try:
                Lock(path).release()
            except UserError:  # that run is only just beginning
                return False
    return True


def _check_writable(path: Path) -> None:
    probe = path / ".writable"
    probe.touch()
    probe.unlink()


def _unwritable(path: Path, error: OSError) -> UserError:
    reason = "its parent is not a folder" if isinstance(error, FileExistsError) else error.strerror
    return UserError(f"out: cannot write to {path} ({reason}); name a writable folder with --out")


def _damaged(file: Path, error: Exception) -> UserError:
    return UserError(
        f"{file} is missing or damaged ({first_line(error)}), so this run cannot go on; start anew with another --out"
    )


def _record(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(record, dict) and record.get("phase") in PHASES and isinstance(record.get("step"), int)
    return record if whole else None


def _figure(name: str, value: Any) -> Any:
    if value is None or isinstance(value, (str, int)):
        return value
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"figure {name} of a step must be a number, got {type(value).__name__}") from error
    return number if math.isfinite(number) else None


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
