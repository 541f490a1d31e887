"""Optimiser and random states on disk: safetensors alone, so that reading them runs nothing.

FOLDER/rank-00000.safetensors of each rank holds its shards of the optimiser's state and its random states; the header's
`layout` says of which rows of which whole tensor they are. Any number of ranks reads what any other wrote. Hyperparameters
are not among them: they are the config's.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dllm_kernels.model.sharding import find_shards, is_sharded

from ..distributed import Ranks
from ..errors import UserError, first_line

VERSION = 1
_OPTIMIZER, _RANDOM = "optimizer/", "random/"


@dataclass(frozen=True)
class _Piece:
    """Rows `first`.. of a whole tensor, in one rank's file."""

    file: Any
    first: int
    shape: list[int]  # of the whole


def save_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks) -> None:
    """Write this rank's file; the folder exists. Raises OSError if the disk is full."""
    find_shards(model)
    tensors = {f"{_RANDOM}{name}": value for name, value in _get_random().items()}
    pieces = {}
    for name, parameter in _trained(model, optimizer):
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor):
                raise TypeError(f"optimizer: its state must consist of tensors, {key} of {name} is a {type(value).__name__}")
            first, rows, is_mine = _place(value, ranks)
            if is_mine and rows:
                local = value.to_local() if is_sharded(value) else value  # type: ignore[attr-defined]
                tensors[f"{_OPTIMIZER}{name}/{key}"] = local.detach().contiguous()
                pieces[f"{_OPTIMIZER}{name}/{key}"] = {"first": first, "shape": list(value.shape)}
    trained = [name for name, _ in _trained(model, optimizer)]
    layout = {"version": VERSION, "ranks": ranks.size, "trained": trained, "pieces": pieces}
    save_file(tensors, folder / f"rank-{ranks.rank:05d}.safetensors", {"layout": json.dumps(layout)})


def load_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks | None = None) -> None:
    """Restore optimiser and random states; the former are resharded to the number of ranks.

    Weights come from `from_pretrained` before the model is sharded. A rank gets the random state that it saved; new ranks take
    those of the old ones in turn. Raises UserError where the files are not of this model and optimiser.
    """
    ranks = ranks or Ranks()
    find_shards(model)
    try:
        with ExitStack() as stack:
            files = [stack.enter_context(safe_open(file, "pt")) for file in sorted(folder.glob("rank-*.safetensors"))]
            trained = dict(_trained(model, optimizer))
            pieces = _pieces(files, list(trained))
            for name, known in pieces.items():
                parameter = trained[name]
                state = {key: _read(f"{_OPTIMIZER}{name}/{key}", found, parameter, ranks) for key, found in known.items()}
                optimizer.state[parameter] = state
            mine = files[ranks.rank % len(files)]
            states = {key.removeprefix(_RANDOM): mine.get_tensor(key) for key in mine.keys() if key.startswith(_RANDOM)}  # noqa: SIM118
        _set_random(states)
    except Exception as error:  # whatever libraries raise over values that are not what they were
        raise UserError(f"{folder} does not fit this model and optimiser ({first_line(error)})") from error


def _pieces(files: list[Any], trained: list[str]) -> dict[str, dict[str, list[_Piece]]]:
    """By parameter and name of the state."""
    found: dict[str, dict[str, list[_Piece]]] = defaultdict(lambda: defaultdict(list))
    for file in files:
        layout = json.loads(file.metadata()["layout"])
        if layout["version"] != VERSION or layout["ranks"] != len(files):
            raise ValueError(f"version {VERSION} of {layout['ranks']} rank(s) is wanted, got {layout['version']} of {len(files)}")
        if other := sorted(set(trained) ^ set(layout["trained"])):
            raise ValueError(f"{other[0]} is trained in only one of them")
        for key, piece in layout["pieces"].items():
            name, _, state = key.removeprefix(_OPTIMIZER).rpartition("/")
            found[name][state].append(_Piece(file, piece["first"], piece["shape"]))
    if not files:
        raise ValueError("there is no rank-*.safetensors in it")
    return found


def _trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, nn.Parameter]]:
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return ((name, parameter) for name, parameter in model.named_parameters() if id(parameter) in held)


def _place(value: Tensor, ranks: Ranks) -> tuple[int, int, bool]:
    """This rank's rows of a whole tensor, the first and how many, and whether it is the rank to write them."""
    rows, first, is_mine = value.shape[0] if value.ndim else 1, 0, True
    if not is_sharded(value):
        return 0, rows, ranks.is_first
    mesh = value.device_mesh  # type: ignore[attr-defined]
    for dimension, placement in enumerate(value.placements):  # type: ignore[attr-defined]
        index = mesh.get_local_rank(dimension)
        if placement.is_replicate():
            is_mine = is_mine and index == 0
        elif placement.is_shard(0):  # in equal parts, the last ones smaller or empty
            part = -(-rows // mesh.size(dimension))
            skipped = min(rows, index * part)
            first, rows = first + skipped, min(part, rows - skipped)
        else:
            raise TypeError(f"optimizer: its state must be sharded by rows, got {placement}")
    return first, rows, is_mine


def _read(key: str, pieces: list[_Piece], parameter: nn.Parameter, ranks: Ranks) -> Tensor:
    """The state, laid out as this parameter is; a scalar as it was saved."""
    if not pieces[0].shape:
        return pieces[0].file.get_tensor(key).to(parameter.device)
    if pieces[0].shape != list(parameter.shape):
        raise ValueError(f"{key} is of shape {pieces[0].shape}, the parameter of {list(parameter.shape)}")
    dtype = pieces[0].file.get_slice(key)[:0].dtype
    whole = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
    local = whole.to_local() if is_sharded(whole) else whole  # type: ignore[attr-defined]
    start, rows, _ = _place(whole, ranks)
    filled = 0
    for piece in pieces:
        held = piece.file.get_slice(key)
        low, high = max(start, piece.first), min(start + rows, piece.first + held.get_shape()[0])
        if low < high:
            local[low - start : high - start].copy_(held[low - piece.first : high - piece.first])
            filled += high - low
    if filled != rows:
        raise ValueError(f"{key} has {filled} of rows {start}..{start + rows - 1}")
    return whole


# --- random states --------------------------------------------------------------------------------------------


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
