"""Processes that see an empty machine: a read-only system, a private /tmp, no network, no other process.

Two mechanisms, both of well-kept tools: bubblewrap (`bwrap`), or `unshare`, `mount`, `pivot_root` and `setpriv` of
util-linux. Either gives a process its own mount, pid, network, ipc and uts namespaces, a user that owns nothing (its own
user namespace where the trainer does not run as root), no capability and no environment.
"""

from __future__ import annotations

import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import PurePath
from typing import Literal

from ..errors import UserError

Mechanism = Literal["auto", "bubblewrap", "unshare", "none"]

_UIDS = range(61000, 65534)  # users that sandboxes run as where the trainer runs as root; rootless containers map no higher
_SYSTEM = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache")
_ENVIRONMENT = {"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "LANG": "C.UTF-8"}
_DEVICES = ("null", "zero", "urandom")
_TMP_BYTES = 16 * 2**20

# As pid 1 of its own namespaces: build a root of read-only binds, enter it, run the command as a user without rights. The
# shell stays pid 1, so that it dies with `unshare` whatever the command does, and all others with it.
_ENTER = """
set -eu
root=$1 places=$2; shift 2
echo 0 2>/dev/null >/proc/sys/kernel/shmall || :
mount -t tmpfs -o size=1m,mode=755,nosuid,nodev tmpfs "$root"
cd "$root"
for place in $places; do
  if [ -L "$place" ]; then ln -s "$(readlink "$place")" ".$place"
  elif [ -e "$place" ]; then
    if [ -d "$place" ]; then mkdir -p ".$place"; else mkdir -p ".${place%/*}"; : >".$place"; fi
    mount --rbind "$place" ".$place"
    mount -o remount,bind,ro,nosuid,nodev ".$place"
  fi
done
mkdir -p proc dev tmp old
mount -t proc -o nosuid,nodev,noexec proc proc
for device in DEVICES; do : >"dev/$device"; mount --bind "/dev/$device" "dev/$device"; done
mount -t tmpfs -o size=TMP,nr_inodes=4k,mode=1777,nosuid,nodev tmpfs tmp
pivot_root . old
umount -l /old
mount -o remount,bind,ro,nosuid,nodev /
cd /tmp
"$@" || exit $?
exit 0
""".replace("DEVICES", " ".join(_DEVICES)).replace("TMP", str(_TMP_BYTES))


@dataclass(frozen=True)
class Limits:
    """What one sandbox may use; processes and memory multiply, so that all of it may take their product."""

    seconds: float = 5.0  # of wall time, for all tests of a program
    memory_mib: int = 256  # address space of each process
    processes: int = 8
    file_bytes: int = 4 * 2**20
    files: int = 32
    answer_bytes: int = 2**20  # of one answer


class Sandbox:
    """Starts processes in sandboxes. Raises UserError where the mechanism does not work on this machine."""

    def __init__(self, mechanism: Mechanism = "auto"):
        self.mechanism = _working(mechanism)
        self._root = tempfile.TemporaryDirectory(prefix="dllm-sandbox-")  # sandboxes mount their root over it, each its own
        self._users: dict[int, int] = {}  # of each slot
        self._held = ExitStack()
        weakref.finalize(self, self._held.close)

    def start(self, command: Sequence[str], *, slot: int, stdin: int, stdout: int, pass_fds: Sequence[int] = ()) -> Process:
        """Start a command; sandboxes that run at the same time have different slots."""
        if os.geteuid() == 0 and self.mechanism != "none" and slot not in self._users:
            self._users[slot], held = _free_user()
            self._held.enter_context(held)
        uid = self._users.get(slot, _UIDS[0])
        return Process(_wrapped(self.mechanism, command, self._root.name, uid), stdin, stdout, pass_fds)


class Process:
    """A command in a sandbox; after `end` nothing of it runs."""

    def __init__(self, command: Sequence[str], stdin: int, stdout: int, pass_fds: Sequence[int]):
        self._process = subprocess.Popen(
            command,
            stdin=stdin,
            stdout=stdout,
            stderr=subprocess.PIPE,  # of the mechanism, and of the command until it closes it
            pass_fds=tuple(pass_fds),
            env=_ENVIRONMENT,
            start_new_session=True,
        )

    def said(self, what: bytes, seconds: float) -> bool:
        """Whether these are the first bytes that come back, and come in time; no more of them is read."""
        assert self._process.stdout is not None
        source, over = self._process.stdout.fileno(), time.monotonic() + seconds
        waiting, got = select.poll(), b""
        waiting.register(source, select.POLLIN)
        while len(got) < len(what):
            in_time = waiting.poll(max(0.0, 1000 * (over - time.monotonic())))
            if not in_time or not (more := os.read(source, len(what) - len(got))):
                return False
            got += more
        return got == what

    def communicate(self, given: bytes, seconds: float) -> bytes:
        """Send bytes; what came back when the process ended, or when the time was over."""
        try:
            return self._process.communicate(given, timeout=seconds)[0]
        except subprocess.TimeoutExpired:
            self._kill()
            return self._process.communicate()[0]

    def end(self) -> str:
        """The last line of its errors, if any, at the first call."""
        self._kill()
        if self._process.stderr is None or self._process.stderr.closed:
            return ""
        return _last_line(self._process.communicate()[1])

    def _kill(self) -> None:
        """End the group, and with its first process all of its pid namespace."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


def python() -> list[str]:
    """The interpreter without site packages, user settings or bytecode files, for code that comes by `-c`."""
    return [getattr(sys, "_base_executable", sys.executable), "-I", "-S", "-B", "-c"]


def _free_user() -> tuple[int, socket.socket]:
    """A user that no sandbox has, and what keeps it until it is closed or this process ends.

    The kernel counts the processes of a user over all its sandboxes: a fork bomb under one rank, or in another run, would
    take those of a program here.
    """
    start = secrets.randbelow(len(_UIDS))  # names of sockets are known within a network alone, the count goes beyond it
    for uid in (*_UIDS[start:], *_UIDS[:start]):
        held = socket.socket(socket.AF_UNIX)
        try:
            held.bind(f"\0dllm-sandbox-user-{uid}")
            return uid, held
        except OSError:  # another has it
            held.close()
    raise UserError(f"all {len(_UIDS)} users that sandboxes run as are taken; end other runs, or give fewer task.workers")


def _wrapped(mechanism: str, command: Sequence[str], root: str, uid: int) -> list[str]:
    as_root = os.geteuid() == 0
    user = ["--reuid", str(uid), "--regid", str(uid), "--clear-groups"] if as_root else []
    dropped = ["setpriv", *user, "--inh-caps=-all", "--bounding-set=-all", "--no-new-privs", "--", *command]
    bound_to_us = ["setpriv", "--pdeathsig", "KILL", "--"]
    if mechanism == "unshare":
        own = ["--mount", "--pid", "--net", "--ipc", "--uts", *([] if as_root else ["--user", "--map-root-user"])]
        enter = ["sh", "-c", _ENTER, "sh", root, " ".join(_places()), *dropped]
        return [*bound_to_us, "unshare", *own, "--fork", "--kill-child", "--", *enter]
    if mechanism == "bubblewrap":
        own = ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--die-with-parent", "--new-session"]
        own += [f for c in ("SETUID", "SETGID", "SETPCAP") for f in ("--cap-add", f"CAP_{c}")] if as_root else ["--unshare-user"]
        binds: list[str] = []
        for place in _places():
            # bubblewrap makes what is above a place for its own user alone, and ours is another
            for above in reversed(PurePath(place).parents[:-1]):
                binds += ["--perms", "0755", "--dir", str(above)]
            kind = ["--symlink", os.readlink(place)] if os.path.islink(place) else ["--ro-bind", place]
            binds += [*kind, place]
        rest = [
            "--proc",
            "/proc",
            "--dev",
            "/dev",
            "--remount-ro",
            "/dev",
            "--perms",
            "1777",
            "--size",
            str(_TMP_BYTES),
            "--tmpfs",
            "/tmp",
            "--remount-ro",
            "/",
        ]
        return [*bound_to_us, "bwrap", *own, *binds, *rest, "--chdir", "/tmp", "--", *dropped]
    return list(command)


@cache
def _places() -> tuple[str, ...]:
    """What of this machine is there to read: the system's libraries, and the interpreter."""
    found = [place for place in _SYSTEM if os.path.lexists(place)]
    for prefix in {os.path.realpath(sys.base_prefix), os.path.realpath(sys.base_exec_prefix)}:
        if not any(prefix == place or prefix.startswith(f"{place}/") for place in found):
            found.append(prefix)
    return tuple(found)


@cache
def _working(mechanism: Mechanism) -> str:
    """The mechanism by name, tried once."""
    if mechanism == "none":
        return "none"
    tried = []
    for name, program in (("bubblewrap", "bwrap"), ("unshare", "unshare")):
        if mechanism not in ("auto", name):
            continue
        why = "is not installed" if shutil.which(program) is None else _fails(name)
        if why is None:
            return name
        tried.append(f"{program} {why}")
    raise UserError(
        f"programs that a model writes run in a sandbox, and none works here: {'; '.join(tried)}; install bubblewrap, or "
        "write task.sandbox=none to run them with all your rights"
    )


def _fails(name: str) -> str | None:
    """Why a mechanism does not work; None if it does."""
    with tempfile.TemporaryDirectory() as root:
        command = _wrapped(name, [*python(), "print('inside')"], root, _UIDS[0])
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, env=_ENVIRONMENT, timeout=30, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"cannot be run ({type(error).__name__})"
    if done.stdout == b"inside\n":
        return None
    return f"fails ({_last_line(done.stderr) or f'exit code {done.returncode}'})"


def _last_line(errors: bytes) -> str:
    return "".join(errors.decode(errors="replace").strip().splitlines()[-1:])
