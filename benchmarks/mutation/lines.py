"""Which lines of the packages a test runs, its subprocesses included.

A context is a file to which every line is appended once, as path:line, when it is first run. A copy of this module named
sitecustomize.py, on PYTHONPATH, lets a subprocess import the tree that it lies in, and records it to the file that MUTANTS_LINES
names; a forked one goes on by itself.
"""

import os
import sys
import threading
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

VARIABLE = "MUTANTS_LINES"
PACKAGES = ("dllm_kernels", "trainer")


class Recorder:
    """Contexts nest: what runs inside the inner one belongs to it alone."""

    def __init__(self, tree: str) -> None:
        self.prefixes = tuple(os.path.join(tree, package) + os.sep for package in PACKAGES)
        self.start = len(tree) + 1
        self.rest: dict[int, set[int]] = {}  # of each code object, by its id: the lines that have not run in this context
        self.held: dict[int, CodeType] = {}  # so that no id is used twice
        self.file = -1
        self.outer: list[tuple[int, dict[int, set[int]], str | None]] = []

    def enter(self, path: str) -> None:
        self.outer.append((self.file, self.rest, os.environ.get(VARIABLE)))
        self.file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self.rest = {}
        os.environ[VARIABLE] = path
        sys.settrace(self._called)
        threading.settrace(self._called)

    def leave(self) -> None:
        os.close(self.file)
        self.file, self.rest, path = self.outer.pop()
        if path is not None:
            os.environ[VARIABLE] = path
            return
        del os.environ[VARIABLE]
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]

    def _called(self, frame: FrameType, event: str, argument: Any) -> Any:
        rest = self.rest.get(id(frame.f_code))
        if rest is None:
            rest = self._new(frame.f_code)
        return self._ran if rest else None

    def _new(self, code: CodeType) -> set[int]:
        self.held[id(code)] = code
        ours = code.co_filename.startswith(self.prefixes)
        rest = {line for _, _, line in code.co_lines() if line} if ours else set()
        self.rest[id(code)] = rest
        return rest

    def _ran(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            rest = self.rest.get(id(frame.f_code))
            if rest is None:  # a generator of another context
                rest = self._new(frame.f_code)
            if frame.f_lineno in rest:
                rest.discard(frame.f_lineno)
                os.write(self.file, f"{frame.f_code.co_filename[self.start :]}:{frame.f_lineno}\n".encode())
        return self._ran


def redirect(tree: str) -> None:
    """Let an editable install of the packages name this tree."""
    for name, module in list(sys.modules.items()):
        if name.startswith("__editable__") and hasattr(module, "MAPPING"):
            for package, folder in module.MAPPING.items():
                module.MAPPING[package] = str(Path(tree) / Path(folder).name)


if __name__ == "sitecustomize":
    TREE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    redirect(TREE)
    if VARIABLE in os.environ:
        Recorder(TREE).enter(os.environ[VARIABLE])
