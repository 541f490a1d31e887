"""Rollouts on disk, one of them a line of JSON."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

NEEDED = {"prompt_ids": "prompts", "completion_ids": "completions", "step_map": "step_map"}
OPTIONAL = {"logp": "logp", "entropy": "entropy", "edits": "edits", "length": "lengths"}
SAME = ("mask_id", "shift", "causal_block", "eos_id", "temperature", "approximate")  # in all lines of a file
KEYS = (*NEEDED, *OPTIONAL, "sequence_id", *SAME, "meta")


def write(path: str | os.PathLike[str], lines: Iterable[dict[str, Any]]) -> None:
    """Atomic: readers never see a partial file, and a crash leaves the old one."""
    target = Path(path)
    aside = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with aside.open("w", encoding="utf-8") as file:
            for line in lines:
                file.write(json.dumps(line, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)


def read(path: str | os.PathLike[str], mask_id: int | None) -> dict[str, Any]:
    """The arguments of `Rollout.from_steps`. Raises FileNotFoundError, or ValueError naming file and line."""
    rows: list[dict[str, Any]] = []
    with Path(path).open(encoding="utf-8") as file:
        for number, text in enumerate(file, 1):
            if text.strip():
                rows.append(_row(f"{os.fspath(path)}:{number}", text))
    if not rows:
        raise ValueError(f"path must name a file with a rollout a line, but {os.fspath(path)} has none")
    found: dict[str, Any] = {"mask_id": mask_id}
    for key in SAME:
        values = {json.dumps(row.get(key)) for row in rows}
        if len(values) > 1:
            raise ValueError(f"{os.fspath(path)}: {key} must be the same in all lines, got {' and '.join(sorted(values)[:2])}")
        if (value := rows[0].get(key)) is not None:
            found[key] = value
    if found["mask_id"] is None:
        raise ValueError(f"mask_id must be given where the lines of {os.fspath(path)} do not hold it, got None")
    if mask_id is not None and found["mask_id"] != mask_id:
        raise ValueError(f"mask_id must be the {found['mask_id']} of {os.fspath(path)}, got {mask_id}")
    for key, argument in NEEDED.items():
        found[argument] = [row[key] for row in rows]
    for key, argument in OPTIONAL.items():
        if any(row.get(key) is not None for row in rows):
            found[argument] = [row.get(key) for row in rows]
    if "edits" in found:
        found["edits"] = [edits or [] for edits in found["edits"]]
    if "lengths" in found:
        pairs = zip(found["lengths"], found["completions"], strict=True)
        found["lengths"] = [len(completion) if length is None else length for length, completion in pairs]
    ids = [row.get("sequence_id") for row in rows]
    if any(value is not None for value in ids):
        if not all(isinstance(value, int) for value in ids):
            raise ValueError(f"{os.fspath(path)}: sequence_id must be an integer in all lines or in none")
        found["sequence_ids"] = torch.tensor(ids, dtype=torch.int64)
    return found


def _row(where: str, text: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where}: a rollout must be a line of JSON, but {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a rollout must be an object, got {type(row).__name__}")
    for key in NEEDED:
        if not isinstance(row.get(key), list):
            raise ValueError(f"{where}: {key} must be a list of integers, got {row.get(key)!r:.40}")
    for key in row:
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{where}: {key} is no key of a rollout, which are {', '.join(KEYS)}{hint}")
    return row
