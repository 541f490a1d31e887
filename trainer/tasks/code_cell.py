"""What runs inside the two sandboxes of one program, as source text: `program` and `tests`. Standard library alone.

The program never meets its tests. It answers calls, plain values in and out; the tests run in the other sandbox, where every
name that they do not define themselves is such a call. So nothing that the program patches, prints or ends changes a verdict.
"""

from __future__ import annotations

import ast
import builtins
import json
import os
import resource
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import IO, Any


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


def silence() -> tuple[int, int]:
    """Duplicates of stdin and stdout, which then lead nowhere."""
    kept = os.dup(0), os.dup(1)
    nowhere = os.open("/dev/null", os.O_RDWR)
    for place in (0, 1, 2):
        os.dup2(nowhere, place)
    return kept


def encode(value: Any) -> Any:
    """A plain value as JSON; containers by their base types. TypeError for all others."""
    if value is None or value is True or value is False:
        return value
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
    if kind == "bytes":
        return bytes.fromhex(items)
    if kind == "complex":
        return complex(*items)
    return {"tuple": tuple, "set": set, "frozenset": frozenset}[kind](decode(item) for item in items)


def program(limits: dict[str, Any]) -> None:
    """Run the program of the first line, then answer calls until the end."""
    requests, answers = silence()
    restrict(limits)
    with os.fdopen(requests, "rb") as calls, os.fdopen(answers, "wb") as out:
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
                answer = {"value": encode((space[name](*args, **options), args))}
            except BaseException as error:
                answer = {"error": type(error).__name__}
            out.write(json.dumps(answer).encode() + b"\n")
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


def unknown_names(source: str) -> set[str]:
    """The names that a text reads, neither bound in it nor built in: those of the program."""
    read: set[str] = set()
    bound = set(dir(builtins))
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
    """Run every test of stdin's JSON; the verdicts are lines of true and false."""
    given, verdicts = silence()
    with os.fdopen(given, "rb") as file:
        spec = json.load(file)
    restrict(limits)
    with os.fdopen(requests, "wb") as calls, os.fdopen(answers, "rb") as replies, os.fdopen(verdicts, "wb") as out:
        calls.write(json.dumps(spec["program"]).encode() + b"\n")
        for test in spec["tests"]:
            source = spec["setup"] + "\n" + test
            space: dict[str, Any] = {"__name__": "tests"}
            try:
                space.update({name: Call(name, calls, replies, limits["answer_bytes"]) for name in unknown_names(source)})
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
