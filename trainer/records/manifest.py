"""What tells whether a folder is as it was written: manifest.json, the size and sha256 of each of its files."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from ..errors import UserError, first_line

MANIFEST = "manifest.json"
_CHUNK = 1 << 22


class DamagedCheckpoint(UserError):  # noqa: N818 - a state of a folder
    """A file of a checkpoint is missing, has changed, or was not written by the run."""


def seal(folder: Path) -> None:
    """Write the manifest of all files, and flush files and folders to disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = {str(f.relative_to(folder)): {"size": f.stat().st_size, "sha256": sha256(f)} for f in files}
    (folder / MANIFEST).write_text(json.dumps({"files": entries}, indent=1) + "\n")
    for path in [*files, folder / MANIFEST, *(p for p in folder.rglob("*") if p.is_dir()), folder]:
        flush(path)


def verify(folder: Path, pattern: str = "*") -> None:
    """Raises DamagedCheckpoint where a file of this pattern is missing, has changed or is not in the manifest."""
    manifest = folder / MANIFEST
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        expected = {name: (int(entry["size"]), str(entry["sha256"])) for name, entry in content["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCheckpoint(f"{manifest} is missing or damaged ({first_line(error)})") from error
    for name, (size, digest) in expected.items():
        file = folder / name
        if not file.match(pattern):
            continue
        if not file.is_file():
            raise DamagedCheckpoint(f"{file} is missing")
        if file.stat().st_size != size:
            raise DamagedCheckpoint(f"{file} has {file.stat().st_size} bytes, {size} were written")
        if sha256(file) != digest:
            raise DamagedCheckpoint(f"{file} has changed since it was written (its checksum differs)")
    for file in sorted(folder.rglob(pattern)):
        if not file.is_dir() and file != manifest and str(file.relative_to(folder)) not in expected:
            raise DamagedCheckpoint(f"{file} is not among the files that were written")


def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        while chunk := handle.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def flush(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
