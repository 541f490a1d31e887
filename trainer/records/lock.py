"""One process writes a run's folder: an advisory lock that dies with its owner."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..errors import UserError

NAME = ".lock"
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class Lock:
    """Held from the call on until `release`, or until the process ends in whatever way: the system then drops it.

    The file says who holds it. Where the file system knows no locks, what it says decides: a process of this machine that has
    ended holds nothing, one of another machine is believed. Raises UserError where another process holds the folder.
    """

    def __init__(self, folder: Path):
        self._file = folder / NAME
        while True:
            self._handle = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
            try:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = False
            except OSError as error:
                held = error.errno not in _UNSUPPORTED or not _has_ended(self._owner())
            if held:
                owner = self._owner()
                os.close(self._handle)
                raise UserError(f"{folder} is in use by {_told(owner)}; nothing was changed")
            if self._is_current():
                break
            os.close(self._handle)  # its owner removed it just now
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        content = {"pid": os.getpid(), "host": socket.gethostname(), "since": now}
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, (json.dumps(content) + "\n").encode(), 0)

    def release(self) -> None:
        if self._is_current():
            self._file.unlink()
        os.close(self._handle)

    def _is_current(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._handle), self._file.lstat())
        except FileNotFoundError:
            return False

    def _owner(self) -> dict[str, Any]:
        try:
            found = json.loads(os.pread(self._handle, 4096, 0))
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}


def _told(owner: dict[str, Any]) -> str:
    if not owner:
        return "another process"
    return f"process {owner.get('pid')} on {owner.get('host')} since {owner.get('since')}"


def _has_ended(owner: dict[str, Any]) -> bool:
    if not owner:
        return True
    if owner.get("host") != socket.gethostname():
        return False
    try:
        os.kill(int(owner["pid"]), 0)
    except (ProcessLookupError, KeyError, TypeError, ValueError):
        return True
    except PermissionError:
        pass
    return False
