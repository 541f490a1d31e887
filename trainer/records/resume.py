"""Going on with a run: what of its config may change, what must not, and the note of it in history.jsonl."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from dllm_kernels.version import __version__

from ..config import RunConfig, load_config
from ..errors import ConfigError, UserError
from .checkpoints import Checkpoint
from .run_dir import HISTORY, RunDir

MAY_CHANGE = (
    "sft.steps",
    "rl.updates",
    "*.lr",
    "*.save_every",
    "*.micro_batch",
    "rl.samples_per_pass",
    "rl.memory_budget",
    "*timeout",
    "rollout.url",
    "rollout.retries",
    "rollout.weights",
    "checkpoints.*",
    "evaluation.*",
    "parallel.patience",
    "threads",
    "tensorboard",
    "wandb",
)
_ELSEWHERE = ("out",)  # a folder that was moved is still the run


def resumed_config(folder: Path, overrides: Sequence[str]) -> tuple[RunConfig, dict[str, list[Any]]]:
    """The config of a run with these overrides, and what they change: key -> [was, is].

    Raises UserError for a config.yaml that cannot be read, and for keys that may not change.
    """
    file = folder / "config.yaml"
    try:
        text = file.read_text(encoding="utf-8")
        before, after = (load_config(None, keys, base=text, base_name=str(file)) for keys in ((), overrides))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read ({error})") from error
    except ConfigError as error:
        raise UserError(f"{file} with what is given to --resume cannot be used: {error}") from error
    changed = _differences(before.written(), after.written())
    _refuse(changed, "--resume cannot change")
    return after, changed


def check_config(config: RunConfig, saved: Checkpoint) -> None:
    """Raises UserError, key by key, where the config is another than that under which the checkpoint was made."""
    made_under = saved.state.get("config")
    if not isinstance(made_under, dict):
        raise UserError(f"{saved.path} does not say under which config it was made")
    changed = _differences(made_under, config.written())
    if saved.state.get("phase") == "rl" and "sft.steps" in changed:
        raise UserError(f"sft.steps cannot change any more, as this run is past SFT: it was {changed['sft.steps'][0]}")
    _refuse(changed, f"config.yaml differs from the config of {saved.path} in")


def note(folder: RunDir, where: str, ranks: int, changed: Mapping[str, list[Any]]) -> None:
    """Append who goes on with the run, from where and with which changes, to its history.jsonl."""
    entry = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "at": where,
        "changed": changed,
        "ranks": ranks,
        "host": socket.gethostname(),
        "dllm_kernels": __version__,
        "launch": _launch(),
    }
    with (folder.path / HISTORY).open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def restarted(wanted: Path) -> Path | None:
    """The folder that this launch of torchrun went to before it started its processes anew; None if it did not."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0) == 0:
        return None
    numbered = sorted(wanted.parent.glob(f"{wanted.name}-*"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in (*numbered, wanted):
        try:
            last = json.loads((path / HISTORY).read_text(encoding="utf-8").splitlines()[-1])
            if last["launch"] == _launch():
                return path
        except (OSError, ValueError, LookupError, TypeError):
            continue
    return None


def _launch() -> str | None:
    return os.environ.get("TORCHELASTIC_RUN_ID")


def _refuse(changed: Mapping[str, list[Any]], what: str) -> None:
    told = [f"{key} ({was!r:.60} -> {now!r:.60})" for key, (was, now) in changed.items() if not _may_change(key)]
    if told:
        more = f" and {len(told) - 5} more keys" if told[5:] else ""
        raise UserError(f"{what} {', '.join(told[:5])}{more}; what may change are {', '.join(MAY_CHANGE)}")


def _may_change(key: str) -> bool:
    return any(fnmatch(key, pattern) for pattern in (*MAY_CHANGE, *_ELSEWHERE))


def _differences(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for name in {**one, **other}:
        was, now, key = one.get(name), other.get(name), f"{prefix}{name}"
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            found |= _differences(was, now, f"{key}.")
        elif was != now:
            found[key] = [was, now]
    return found
