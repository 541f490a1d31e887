"""Checkpoints: folders that `from_pretrained` reads, with the state for a bit-exact resume beside the
weights.

FOLDER/step-00000120/    config.json, *.safetensors, tokenizer, remote code; LoRA adapters in PEFT's layout
    state/               optimiser and random states as safetensors, each rank its shards, see states.py
    trainer_state.json   version, step, metrics and the caller's state
    manifest.json        size and sha256 of every file above, written last

A checkpoint is written aside, flushed to disk and renamed, so a folder of that name is complete; the manifest
reveals later damage. Nothing in it is executed when it is read, but for remote code that the config allows.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..distributed import Ranks
from ..errors import UserError, first_line
from .manifest import DamagedCheckpoint, flush, seal, verify
from .states import save_state
from .weights import cleared_if_it_fails, disk_errors, whole_weights, write_pretrained

VERSION = 1
_NAME = re.compile(r"step-(\d+)(?:\.(\d+))?")  # .1, .2: the same step saved again
_STATE = "trainer_state.json"
_FIELDS = {"version": int, "step": int, "metrics": dict, "state": dict}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint found to be complete; `from_pretrained` takes its `path`."""

    path: Path
    step: int
    metrics: Mapping[str, float]
    state: Mapping[str, Any]


@dataclass
class Checkpoints:
    """The checkpoints of a run. All methods are collective: every rank calls them.

    keep_last: number of newest checkpoints to keep, at least 1; with 2, damage to the newest costs one
        interval. keep_best: number of further ones to keep by their `metric`, larger being better unless
        `smaller_is_better`. background: checksums and the flush to disk, most of a save's time, are left to a
        thread; the checkpoint is there once they are done, at the latest when `finish` returns.
    """

    folder: Path
    ranks: Ranks = field(default_factory=Ranks)
    keep_last: int = 2
    keep_best: int = 0
    metric: str | None = None
    smaller_is_better: bool = False
    background: bool = False

    def __post_init__(self) -> None:
        if self.keep_last < 1 or self.keep_best < 0:
            raise ValueError(f"keep_last must be at least 1 and keep_best 0, got {self.keep_last} and {self.keep_best}")
        if self.keep_best and self.metric is None:
            raise ValueError(f"metric must be given to keep the {self.keep_best} best checkpoints")
        self._worker = ThreadPoolExecutor(1) if self.background and self.ranks.is_first else None
        self._pending: Future[None] | None = None

    def save(
        self,
        step: int,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase | None,
        optimizer: torch.optim.Optimizer,
        *,
        state: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> Path:
        """Write a checkpoint of all ranks' state, delete those not to be kept, and return its folder.

        state, metrics: JSON values. Raises OSError if the disk is full or not writable.
        """
        first = self.ranks.is_first
        self.finish()
        with self.ranks.together():
            name = _free_name(self.folder, step) if first else ""
        target = self.folder / self.ranks.tell(name)[0]
        aside = target.with_name(f".{target.name}.part")
        with self.ranks.together():
            if first:
                self.sweep()
                (aside / "state").mkdir(parents=True)
        with cleared_if_it_fails(aside):
            weights = whole_weights(model, keep=first)
            with self.ranks.together(), disk_errors(target):
                if first:
                    write_pretrained(aside, model, tokenizer, weights)
                    content = {"version": VERSION, "step": step, "metrics": dict(metrics or {}), "state": dict(state or {})}
                    (aside / _STATE).write_text(json.dumps(content, indent=1) + "\n")
            del weights
            with self.ranks.together(), disk_errors(target):
                save_state(aside / "state", model, optimizer, self.ranks)
        if self._worker is not None:
            self._pending = self._worker.submit(self._complete, aside, target)
        with self.ranks.together():
            if first and self._worker is None:
                self._complete(aside, target)
        return target

    def finish(self) -> None:
        """Wait for what is written in the background, and raise what went wrong there."""
        if not self.background:
            return
        with self.ranks.together():
            if self._pending is not None:
                pending, self._pending = self._pending, None
                pending.result()

    def sweep(self) -> None:
        """Remove what a run that was killed left half written or half deleted. Not collective: the first rank's."""
        for leftover in self.folder.glob(".step-*.part"):
            shutil.rmtree(leftover, ignore_errors=True)

    def latest(self) -> Checkpoint | None:
        """The newest complete one, as `latest`."""
        return latest(self.folder, self.ranks)

    def _complete(self, aside: Path, target: Path) -> None:
        with cleared_if_it_fails(aside), disk_errors(target):
            seal(aside)
            aside.rename(target)
            flush(self.folder)
        self._drop_old()

    def _drop_old(self) -> None:
        saved = _saved(self.folder)
        keep = set(saved[-self.keep_last :])
        if self.keep_best:
            sign = 1.0 if self.smaller_is_better else -1.0
            values = {path: _read_metrics(path).get(self.metric or "") for path in saved}
            ranked = sorted((sign * value, -number) for number, path in enumerate(saved) if (value := values[path]) is not None)
            keep |= {saved[-number] for _, number in ranked[: self.keep_best]}
        for path in saved:
            if path not in keep and not path.is_symlink():  # a link is the user's, as is what it points to
                doomed = path.with_name(f".{path.name}.part")  # never found half deleted
                path.rename(doomed)
                shutil.rmtree(doomed, ignore_errors=True)


def latest(folder: Path, ranks: Ranks | None = None) -> Checkpoint | None:
    """The newest complete checkpoint of `folder`, for `--resume auto`; None where none was saved.

    Damaged ones are skipped with a warning. Raises UserError if all are damaged.
    """
    ranks = ranks or Ranks()
    found: Checkpoint | None = None
    with ranks.together():
        if ranks.is_first:
            found = _newest_whole(folder)
    return ranks.tell(found)[0]  # type: ignore[no-any-return]


def _newest_whole(folder: Path) -> Checkpoint | None:
    saved = _saved(folder)
    for path in reversed(saved):
        try:
            return load(path)
        except DamagedCheckpoint as error:
            warnings.warn(f"{error}; trying the one before it", stacklevel=3)
    if saved:
        raise UserError(f"{folder}: none of its {len(saved)} checkpoint(s) is whole; start anew or restore one from a backup")
    return None


def load(path: Path) -> Checkpoint:
    """The checkpoint in a folder. Raises DamagedCheckpoint for a file that is missing, has changed or is of another version."""
    verify(path)
    try:
        content = json.loads((path / _STATE).read_text(encoding="utf-8"))
        for name, kind in _FIELDS.items():
            if not isinstance(content.get(name), kind):
                raise ValueError(f"{name} must be of type {kind.__name__}, got {content.get(name)!r:.60}")
        if content["version"] != VERSION or content.keys() != _FIELDS.keys():
            raise ValueError(f"version {VERSION} with {', '.join(_FIELDS)} is wanted, got {content['version']}")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path / _STATE} cannot be used ({first_line(error)})") from error
    return Checkpoint(path, content["step"], content["metrics"], content["state"])


def _saved(folder: Path) -> list[Path]:
    """Checkpoint folders, ordered by step and by number of saves of it."""
    matches = [(_NAME.fullmatch(path.name), path) for path in folder.glob("step-*") if path.is_dir()]
    return [path for *_, path in sorted((int(match[1]), int(match[2] or 0), path) for match, path in matches if match)]


def _free_name(folder: Path, step: int) -> str:
    name, number = f"step-{step:08d}", 0
    while (folder / name).exists() or (folder / name).is_symlink():
        number += 1
        name = f"step-{step:08d}.{number}"
    return name


def _read_metrics(path: Path) -> Mapping[str, float]:
    try:
        return json.loads((path / _STATE).read_text())["metrics"]  # type: ignore[no-any-return]
    except (OSError, ValueError, KeyError):
        return {}
