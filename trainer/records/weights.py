"""A model's folder for `from_pretrained`: weights gathered from all ranks, configuration, tokenizer, remote code."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dllm_kernels.model.sharding import find_shards, is_sharded

from ..distributed import Ranks
from ..errors import first_line
from .manifest import MANIFEST, seal, verify


def save_model(target: Path, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, ranks: Ranks | None = None) -> None:
    """Write a folder for `from_pretrained`, replacing an older one only when complete. A collective."""
    ranks = ranks or Ranks()
    weights = whole_weights(model, keep=ranks.is_first)
    with ranks.together(), disk_errors(target):
        if ranks.is_first:
            _replace(target, model, tokenizer, weights)


def _replace(target: Path, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, weights: dict[str, Tensor]) -> None:
    aside, old = target.with_name(f".{target.name}.part"), target.with_name(f".{target.name}.old")
    for leftover in (aside, old):
        shutil.rmtree(leftover, ignore_errors=True)
    aside.mkdir(parents=True)
    with cleared_if_it_fails(aside):
        write_pretrained(aside, model, tokenizer, weights)
        seal(aside)
    if target.exists():
        target.rename(old)
    aside.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def verify_weights(source: str) -> None:
    """Verify the weights of a folder saved by a run; users may edit its text files."""
    if (Path(source) / MANIFEST).is_file():
        verify(Path(source), "*.safetensors")


def whole_weights(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
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


def write_pretrained(
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


@contextmanager
def cleared_if_it_fails(folder: Path) -> Iterator[None]:
    """A folder half written, as on a full disk, would take the room that its successor needs."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


@contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, SafetensorError) as error:  # how torch and safetensors report a full disk
        raise OSError(f"saving {target} failed, {first_line(error)}") from error
