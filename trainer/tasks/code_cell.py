"""What runs inside the two sandboxes of one program, as source text: `program` and `tests`. Standard library alone.

The program never meets its tests. It answers calls, plain values in and out; the tests run in the other sandbox, where every
name that they do not define themselves is such a call. So nothing that the program patches, prints or ends changes a verdict.
"""

from __future__ import annotations

import ast
import builtins
import ctypes
import errno
import json
import os
import resource
import struct
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import IO, Any

READY = b"ready\n"


def restrict(limits: dict[str, Any]) -> None:
    """Set the limits of this process and of all that it starts; none can be raised again."""
    memory = limits["memory_mib"] * 2**20
    wanted = {
        resource.RLIMIT_CPU: int(limits["seconds"]) + 1,
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: limits["file_bytes"],
        resource.RLIMIT_NOFILE: limits["files"],
        resource.RLIMIT_CORE: 0,
    }
    if limits["processes"] is not None:
        wanted[resource.RLIMIT_NPROC] = limits["processes"]
    for which, value in wanted.items():
        resource.setrlimit(which, (value, value))
    if limits["sandboxed"]:
        refuse_system_calls()


# System calls by which a program without any right reaches what no namespace and no limit above holds, by number on x86_64
# and on aarch64: keys that outlive the sandbox; memory that no limit counts; namespaces of its own, in which it has rights;
# and large parts of the kernel that no program of a test needs. Those from 424 on have one number everywhere.
_REFUSED = {
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "memfd_create": (319, 279),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "io_uring_setup": (425, 425),
    "open_tree": (428, 428),
    "fsopen": (430, 430),
    "pidfd_getfd": (438, 438),
    "memfd_secret": (447, 447),
    "setxattrat": (463, 463),
}
_SOCKET, _CLONE, _CLONE3 = (41, 198), (56, 220), 435
_FAMILIES = (1, 2, 10, 16)  # of sockets: local, of the own network, netlink; one of the machine's hypervisor has no namespace
_NEW_NAMESPACES = 0x7E020000  # flags of clone(2)
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of the numbers, AUDIT_ARCH of seccomp(2)


def refuse_system_calls() -> None:
    """Let these calls of this process, and of all that it starts, fail for good. OSError where the kernel cannot."""
    machine = os.uname().machine
    if machine not in _MACHINES:
        raise OSError(f"no list of system calls for {machine}")
    column, architecture = _MACHINES[machine]
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allowed, refused, unknown = 0x7FFF0000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS
    filters = [
        (load, 0, 0, 4),
        (equal, 1, 0, architecture),
        (give, 0, 0, refused),
        (load, 0, 0, 0),
        (at_least, 0, 1, 0x40000000),  # the numbers of x32
        (give, 0, 0, refused),
        (equal, 0, 1, _CLONE3),
        (give, 0, 0, unknown),  # its flags are out of sight; libraries then take clone
        *(step for numbers in _REFUSED.values() for step in ((equal, 0, 1, numbers[column]), (give, 0, 0, refused))),
        (equal, 0, 3, _CLONE[column]),
        (load, 0, 0, 16),
        (any_bit, 0, 1, _NEW_NAMESPACES),
        (give, 0, 0, refused),
        (load, 0, 0, 0),
        (equal, 0, 2 + len(_FAMILIES), _SOCKET[column]),
        (load, 0, 0, 16),
        *((equal, len(_FAMILIES) - place, 0, family) for place, family in enumerate(_FAMILIES)),
        (give, 0, 0, refused),
        (give, 0, 0, allowed),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in filters))
    program = ctypes.create_string_buffer(struct.pack("HP", len(filters), ctypes.addressof(code)))
    system = ctypes.CDLL(None, use_errno=True)
    no_new_privileges, set_filter, by_program = 38, 22, 2
    if system.prctl(no_new_privileges, 1, 0, 0, 0) or system.prctl(set_filter, by_program, program, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


def silence() -> tuple[int, int]:
    """Duplicates of stdin and stdout, which then lead nowhere."""
    kept = os.dup(0), os.dup(1)
    nowhere = os.open("/dev/null", os.O_RDWR)
    for place in (0, 1, 2):
        os.dup2(nowhere, place)
    return kept


_LARGE = 1 << 64  # Python refuses to write or read thousands of decimal digits


def encode(value: Any) -> Any:
    """A plain value as JSON; containers by their base types. TypeError for all others."""
    if value is None or value is True or value is False:
        return value
    if isinstance(value, int) and abs(int(value)) >= _LARGE:
        return {"int": hex(int(value))}
    for plain in (int, float, str):
        if isinstance(value, plain):
            return plain(value)
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    for kind in (tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [encode(item) for item in value]}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    raise TypeError(f"{type(value).__name__} is no plain value")


def decode(value: Any) -> Any:
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, items),) = value.items()
    if kind == "dict":
        return {decode(key): decode(item) for key, item in items}
    if kind == "int":
        return int(items, 16)
    if kind == "bytes":
        return bytes.fromhex(items)
    if kind == "complex":
        return complex(*items)
    return {"tuple": tuple, "set": set, "frozenset": frozenset}[kind](decode(item) for item in items)


def program(limits: dict[str, Any]) -> None:
    """Say that it is ready, run the program of the first line, then answer calls until the end."""
    restrict(limits)
    requests, answers = silence()
    with os.fdopen(requests, "rb") as calls, os.fdopen(answers, "wb") as out:
        out.write(READY)
        out.flush()
        space: dict[str, Any] = {"__name__": "program"}
        failed: BaseException | None = None
        try:
            exec(compile(json.loads(calls.readline()), "program", "exec"), space)
        except BaseException as error:
            failed = error
        for line in calls:
            try:
                name, args, options = decode(json.loads(line))
                if failed is not None:
                    raise failed
                if name not in space:
                    raise NameError(name)
                answer = json.dumps({"value": encode((space[name](*args, **options), args))})
            except BaseException as error:
                answer = json.dumps({"error": type(error).__name__})
            out.write(answer.encode() + b"\n")
            out.flush()


class Call:
    """A function of the program."""

    def __init__(self, name: str, requests: IO[bytes], answers: IO[bytes], most: int):
        self._name, self._requests, self._answers, self._most = name, requests, answers, most

    def __call__(self, *args: Any, **options: Any) -> Any:
        self._requests.write(json.dumps(encode((self._name, args, options))).encode() + b"\n")
        self._requests.flush()
        line = self._answers.readline(self._most)
        if not line.endswith(b"\n"):
            self._answers.close()  # no later answer belongs to its call
            raise EOFError("the program has ended, or answers too much")
        answer = json.loads(line)
        if "error" in answer:
            kind = getattr(builtins, str(answer["error"]), None)
            if isinstance(kind, type) and issubclass(kind, Exception):
                raise kind(self._name)
            raise RuntimeError(str(answer["error"]))
        value, after = decode(answer["value"])
        for ours, theirs in zip(args, after):  # what the program changed in place
            if isinstance(ours, list) and isinstance(theirs, list):
                ours[:] = theirs
            elif isinstance(ours, (dict, set)) and type(ours) is type(theirs):
                ours.clear()
                ours.update(theirs)
        return value


def unknown_names(source: str, asked: list[str]) -> set[str]:
    """The names of the program: those that a text reads and does not bind, built in only where they are `asked` for."""
    read: set[str] = set()
    bound = set(dir(builtins)).difference(asked)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name):
            (read if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.ExceptHandler) and node.name is not None:
            bound.add(node.name)
    return read - bound


def tests(limits: dict[str, Any], requests: int, answers: int) -> None:
    """Say that both cells are ready, run every test of stdin's JSON; the verdicts are lines of true and false."""
    restrict(limits)
    given, verdicts = silence()
    with os.fdopen(requests, "wb") as calls, os.fdopen(answers, "rb") as replies, os.fdopen(verdicts, "wb") as out:
        if replies.readline(len(READY)) != READY:
            return
        out.write(READY)
        out.flush()
        with os.fdopen(given, "rb") as file:
            spec = json.load(file)
        calls.write(json.dumps(spec["program"]).encode() + b"\n")
        for test in spec["tests"]:
            source = spec["setup"] + "\n" + test
            space: dict[str, Any] = {"__name__": "tests"}
            try:
                space.update(
                    {name: Call(name, calls, replies, limits["answer_bytes"]) for name in unknown_names(source, spec["names"])}
                )
                exec(compile(source, "tests", "exec"), space)
                passed = True
            except BaseException:
                passed = False
            out.write(json.dumps(passed).encode() + b"\n")
            out.flush()
        os._exit(0)  # whatever is left in a buffer for the program


if __name__ == "__main__":
    if sys.argv[1] == "program":
        program(json.loads(sys.argv[2]))
    else:
        tests(json.loads(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
