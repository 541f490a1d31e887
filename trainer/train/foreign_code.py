"""What a run executes beyond this package, told before it does."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..config import RunConfig


def announce_code(config: RunConfig) -> None:
    """Say on stderr, before it happens, which foreign code a run under this config executes."""
    for sentence in code_of(config):
        print(f"this run executes {sentence}", file=sys.stderr)


def code_of(config: RunConfig) -> Iterator[str]:
    """A phrase for each piece of foreign code that a run under this config executes, with its digest."""
    model = config.model
    if model.checkpoint is not None and model.trust_remote_code:
        files = _python_files(model.checkpoint, model.revision)
        yield f"the code that {model.checkpoint} brings: {_described(files)}"
    named = {key: value for key, value in _functions(config).items() if value is not None and ":" in value}
    for key, value in named.items():
        module = value.partition(":")[0]
        spec = None if "." in module else importlib.util.find_spec(module)  # parents of a dotted one would be imported
        found = [Path(spec.origin)] if spec is not None and spec.origin is not None else []
        yield f"{key}={value}: {_described(found) if found else 'installed with its package'}"


def _functions(config: RunConfig) -> dict[str, str | None]:
    return {"task.correct": getattr(config.task, "correct", None), "rl.reward": config.rl.reward if config.rl.updates else None}


def _python_files(source: str, revision: str | None) -> list[Path]:
    """The code in a folder, or of a hub id (which is downloaded, not run)."""
    folder = Path(source)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(source, revision=revision, allow_patterns=["*.py"]))
        except Exception:  # what is wrong with the name or the network is said when the model is loaded
            return []
    return sorted(folder.glob("*.py"))


def _described(files: Sequence[Path]) -> str:
    if not files:
        return "no Python file"
    digest = hashlib.sha256()
    for file in files:
        content = file.read_bytes() if file.is_file() else b""
        digest.update(f"{file.name}\0{len(content)}\0".encode())
        digest.update(content)
    return f"{', '.join(str(file) for file in files)} (sha256 {digest.hexdigest()[:16]})"
