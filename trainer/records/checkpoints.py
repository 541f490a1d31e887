"""Checkpoints: folders that `from_pretrained` reads, with the state for a bit-exact resume beside the
weights.

FOLDER/step-00000120/    config.json, *.safetensors, tokenizer, remote code; LoRA adapters in PEFT's layout
    state/               optimiser and random states by torch.distributed.checkpoint, each rank its shards
    trainer_state.json   step, metrics and the caller's state
    manifest.json        size and sha256 of every file above, written last

A checkpoint is written aside, flushed to disk and renamed, so a folder of that name is complete; the manifest
reveals later damage.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dllm_kernels.model.sharding import find_shards, is_sharded

from ..distributed import Ranks
from ..errors import UserError, first_line

_NAME = re.compile(r"step-(\d+)(?:\.(\d+))?")  # .1, .2: the same step saved again
_MANIFEST, _STATE = "manifest.json", "trainer_state.json"
_CHUNK = 1 << 22


class DamagedCheckpoint(UserError):  # noqa: N818 - a state of a folder
    """A file of a checkpoint is missing or has changed."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint found to be complete; `from_pretrained` takes its `path`."""

    path: Path
    step: int
    metrics: Mapping[str, float]
    state: Mapping[str, Any]


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of a run. All methods are collective: every rank calls them.

    keep_last: number of newest checkpoints to keep, at least 1; with 2, damage to the newest costs one
        interval. keep_best: number of further ones to keep by their `metric`, larger being better unless
        `smaller_is_better`.
    """

    folder: Path
    ranks: Ranks = field(default_factory=Ranks)
    keep_last: int = 2
    keep_best: int = 0
    metric: str | None = None
    smaller_is_better: bool = False

    def __post_init__(self) -> None:
        if self.keep_last < 1 or self.keep_best < 0:
            raise ValueError(f"keep_last must be at least 1 and keep_best 0, got {self.keep_last} and {self.keep_best}")
        if self.keep_best and self.metric is None:
            raise ValueError(f"metric must be given to keep the {self.keep_best} best checkpoints")

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
        with self.ranks.together():
            name = _free_name(self.folder, step) if first else ""
        target = self.folder / self.ranks.tell(name)[0]
        aside = target.with_name(f".{target.name}.part")
        with self.ranks.together():
            if first:
                for leftover in self.folder.glob(".step-*.part"):
                    shutil.rmtree(leftover, ignore_errors=True)
                aside.mkdir(parents=True)
        weights = _whole_weights(model, keep=first)
        with self.ranks.together(), _disk_errors(target):
            if first:
                _write_pretrained(aside, model, tokenizer, weights)
                content = {"step": step, "metrics": dict(metrics or {}), "state": dict(state or {})}
                (aside / _STATE).write_text(json.dumps(content, indent=1) + "\n")
        del weights
        with _disk_errors(target):
            _save_state(aside / "state", model, optimizer, self.ranks)
        with self.ranks.together(), _disk_errors(target):
            if first:
                _seal(aside)
                aside.rename(target)
                _flush(self.folder)
                self._drop_old()
        return target

    def latest(self) -> Checkpoint | None:
        """The newest complete one, as `latest`."""
        return latest(self.folder, self.ranks)

    def _drop_old(self) -> None:
        saved = _saved(self.folder)
        keep = set(saved[-self.keep_last :])
        if self.keep_best:
            sign = 1.0 if self.smaller_is_better else -1.0
            values = {path: _read_metrics(path).get(self.metric or "") for path in saved}
            ranked = sorted((sign * value, -number) for number, path in enumerate(saved) if (value := values[path]) is not None)
            keep |= {saved[-number] for _, number in ranked[: self.keep_best]}
        for path in saved:
            if path not in keep:
                doomed = path.with_name(f".{path.name}.part")  # never found half deleted
                path.rename(doomed)
                shutil.rmtree(doomed)


def save_model(target: Path, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, ranks: Ranks | None = None) -> None:
    """Write a folder for `from_pretrained`, replacing an older one only when complete. A collective."""
    ranks = ranks or Ranks()
    weights = _whole_weights(model, keep=ranks.is_first)
    with ranks.together(), _disk_errors(target):
        if ranks.is_first:
            _replace(target, model, tokenizer, weights)


def _replace(target: Path, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, weights: dict[str, Tensor]) -> None:
    aside, old = target.with_name(f".{target.name}.part"), target.with_name(f".{target.name}.old")
    for leftover in (aside, old):
        shutil.rmtree(leftover, ignore_errors=True)
    aside.mkdir(parents=True)
    _write_pretrained(aside, model, tokenizer, weights)
    _seal(aside)
    if target.exists():
        target.rename(old)
    aside.rename(target)
    shutil.rmtree(old, ignore_errors=True)


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
    """The checkpoint in a folder. Raises DamagedCheckpoint for a file that is missing or has changed."""
    verify(path)
    content = json.loads((path / _STATE).read_text())
    return Checkpoint(path, content["step"], content["metrics"], content["state"])


def verify(path: Path, pattern: str = "*") -> None:
    """Raises DamagedCheckpoint where a file of this pattern is missing or has changed."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
        expected = {name: (int(entry["size"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{path / _MANIFEST} is missing or damaged ({first_line(error)})") from error
    for name, (size, digest) in expected.items():
        file = path / name
        if not file.match(pattern):
            continue
        if not file.is_file():
            raise DamagedCheckpoint(f"{file} is missing")
        if file.stat().st_size != size:
            raise DamagedCheckpoint(f"{file} has {file.stat().st_size} bytes, {size} were written")
        if _sha256(file) != digest:
            raise DamagedCheckpoint(f"{file} has changed since it was written (its checksum differs)")


def verify_weights(source: str) -> None:
    """Verify the weights of a folder saved by a run; users may edit its text files."""
    if (Path(source) / _MANIFEST).is_file():
        verify(Path(source), "*.safetensors")


def load_state(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks | None = None) -> None:
    """Restore optimiser and random states; the former are resharded to the number of ranks.

    Weights come from `from_pretrained(checkpoint.path)` before the model is sharded. A rank gets the random
    state that it saved; new ranks take those of the old ones in turn.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    ranks, folder = ranks or Ranks(), checkpoint.path / "state"
    find_shards(model)
    try:
        known = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
        savers = len({key.split(".")[1] for key in known if key.startswith("random.")})
        mine = {key: entry for key, entry in known.items() if key.startswith(f"random.{ranks.rank % savers}.")}
        states: dict[str, Any] = {}
        for key, entry in mine.items():
            states[key] = torch.empty(entry.size, dtype=entry.properties.dtype)  # type: ignore[union-attr]
        if any(key.startswith("optimizer.") for key in known):
            states["optimizer"] = get_optimizer_state_dict(model, optimizer)
        with _no_warning_of_being_alone():
            dcp.load(states, checkpoint_id=folder, no_dist=not ranks.launched)
        if "optimizer" in states:
            set_optimizer_state_dict(model, optimizer, states["optimizer"])
    except (Exception, dcp.CheckpointException) as error:  # depends on the defect and on torch's version
        raise UserError(f"{folder} does not fit this model and optimiser ({first_line(error)})") from error
    _set_random({key.rpartition(".")[2]: states[key] for key in mine})


# --- weights ------------------------------------------------------------------------------------------------


def _whole_weights(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """The state dict, gathered tensor by tensor to the CPU of the rank that keeps it; ties are preserved."""
    find_shards(model)
    parameters = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    whole: dict[str, Tensor] = {}
    gathered: dict[int, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            continue
        key = parameters.get(name, id(tensor))
        if key not in gathered:
            once = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
            gathered[key] = once.detach().cpu() if keep else once.new_empty(0)
        whole[name] = gathered[key]
    return whole


def _write_pretrained(
    folder: Path, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, weights: dict[str, Tensor]
) -> None:
    with _own_classes(model):
        model.save_pretrained(folder, state_dict=weights)  # type: ignore[operator]
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


@contextmanager
def _own_classes(model: nn.Module) -> Iterator[None]:
    """Undo FSDP's replacement of module classes, for names and remote code to be saved correctly."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    changed = [(module, type(module)) for module in model.modules() if isinstance(module, kind)]
    try:
        for module, own in changed:
            module.__class__ = next(base for base in own.__mro__[1:] if not issubclass(base, kind))
        yield
    finally:
        for module, own in changed:
            module.__class__ = own


# --- optimiser and random states ----------------------------------------------------------------------------


def _save_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    states: dict[str, Any] = {f"random.{ranks.rank}.{name}": value for name, value in _get_random().items()}
    if optimizer.state:  # empty before the first step, and querying it then would make a step
        states["optimizer"] = get_optimizer_state_dict(model, optimizer)
    try:
        with _no_warning_of_being_alone():
            dcp.save(states, checkpoint_id=folder, no_dist=not ranks.launched)
    except dcp.CheckpointException as error:  # not an Exception; holds those of all ranks
        causes = [cause for cause, _ in error.failures.values()]
        raise OSError(f"saving {folder} failed, {first_line(causes[0] if causes else error)}") from error


@contextmanager
def _no_warning_of_being_alone() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def _get_random() -> dict[str, Tensor]:
    algorithm, keys, *rest = np.random.get_state(legacy=True)
    states = {
        "torch": torch.get_rng_state(),
        "python": _as_bytes(random.getstate()),
        "numpy": _as_bytes([algorithm, np.asarray(keys).tolist(), *rest]),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random(states: Mapping[str, Tensor]) -> None:
    if "torch" in states:
        torch.set_rng_state(states["torch"])
        version, keys, gauss = _from_bytes(states["python"])
        random.setstate((version, tuple(keys), gauss))
        np.random.set_state(tuple(_from_bytes(states["numpy"])))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _as_bytes(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _from_bytes(tensor: Tensor) -> Any:
    return json.loads(bytes(tensor.tolist()))


# --- files --------------------------------------------------------------------------------------------------


def _saved(folder: Path) -> list[Path]:
    """Checkpoint folders, ordered by step and by number of saves of it."""
    matches = [(_NAME.fullmatch(path.name), path) for path in folder.glob("step-*") if path.is_dir()]
    return [path for *_, path in sorted((int(match[1]), int(match[2] or 0), path) for match, path in matches if match)]


def _free_name(folder: Path, step: int) -> str:
    name, number = f"step-{step:08d}", 0
    while (folder / name).exists():
        number += 1
        name = f"step-{step:08d}.{number}"
    return name


def _read_metrics(path: Path) -> Mapping[str, float]:
    try:
        return json.loads((path / _STATE).read_text())["metrics"]  # type: ignore[no-any-return]
    except (OSError, ValueError, KeyError):
        return {}


def _seal(folder: Path) -> None:
    """Write a manifest of all files, and flush files and folders to disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = {str(f.relative_to(folder)): {"size": f.stat().st_size, "sha256": _sha256(f)} for f in files}
    (folder / _MANIFEST).write_text(json.dumps({"files": entries}, indent=1) + "\n")
    for path in [*files, folder / _MANIFEST, *(p for p in folder.rglob("*") if p.is_dir()), folder]:
        _flush(path)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        while chunk := handle.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, SafetensorError) as error:  # how torch and safetensors report a full disk
        raise OSError(f"saving {target} failed, {first_line(error)}") from error
