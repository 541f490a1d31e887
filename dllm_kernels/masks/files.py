"""Mask plans on disk: written atomically; a damaged file is an error in one sentence."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

FORMAT = 2


def write(state: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Atomic: readers never see a partial file, and a crash leaves the old one."""
    target = Path(path)
    aside = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with aside.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Raises FileNotFoundError, or ValueError for a file that is damaged or holds something else."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # unpickling damaged bytes raises almost anything
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        raise ValueError(f"path must name a saved mask plan, but {os.fspath(path)} cannot be read: {first_line}") from error
    if not isinstance(state, dict):
        raise ValueError(f"path must name a saved mask plan, but {os.fspath(path)} holds a {type(state).__name__}")
    return state
