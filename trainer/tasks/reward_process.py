"""The process of a reward `module:function`.

python -m dllm_trainer.tasks.reward_process SPEC FILE_DESCRIPTOR
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from ..errors import first_line
from .trl_rewards import as_reward

_HERE = os.path.dirname(__file__)
_DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)


def main(spec: str, descriptor: int) -> None:
    """Answer each (number, nonce, examples, completions) by a JSON object until the end.

    It repeats number and nonce, and holds `good` with either `values` or the rest of a sentence in `said`.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C asks the run to stop, which closes the pipe
    _supervise(descriptor)
    _limit_memory()
    connection = Connection(descriptor)

    def answer(number: int, nonce: str, good: bool, **more: Any) -> None:
        told = {"number": number, "nonce": nonce, "good": good, **more}
        connection.send_bytes(json.dumps(told, default=_plain).encode())

    number, nonce = connection.recv()
    good, found = _find(spec)
    answer(number, nonce, good, said=None if good else found)
    while good:
        try:
            number, nonce, examples, completions = connection.recv()
        except EOFError:
            return
        try:
            values = found(examples, completions)
            values = values.tolist() if hasattr(values, "tolist") else values
            if isinstance(values, str | bytes) or not isinstance(values, Sequence):
                answer(number, nonce, False, said=f"must return one number per completion, got {type(values).__name__}")
            else:
                answer(number, nonce, True, values=list(values))
        except Exception as error:
            trace = error.__traceback__
            while trace is not None and os.path.dirname(trace.tb_frame.f_code.co_filename) == _HERE:
                trace = trace.tb_next  # the user's own frames are what tells
            traceback.print_exception(type(error), error, trace)
            last = traceback.extract_tb(error.__traceback__)[-1]
            answer(
                number, nonce, False, said=f"raised {first_line(error)} ({os.path.basename(last.filename)}, line {last.lineno})"
            )


def _plain(value: Any) -> Any:
    """For what JSON does not know, such as numbers of numpy: as float, else as a text, which is refused with its words."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return repr(value)[:60]


def _supervise(descriptor: int) -> None:
    """Go on in a child. This process, the leader of their group, ends the whole group once the child or the trainer has ended."""
    trainer = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIES_WITH_PARENT, signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGKILL))
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return
    os.close(descriptor)
    if os.getppid() == trainer:  # else it ended before it was watched
        os.waitpid(child, 0)
    os.killpg(0, signal.SIGKILL)


def _limit_memory() -> None:
    """To half of the machine's: a function that takes more gets a MemoryError, and the run lives."""
    half = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (half if most == resource.RLIM_INFINITY else min(half, most), most))


def _find(spec: str) -> tuple[bool, Any]:
    module, _, function = spec.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        inside = "" if error.name is not None and f"{module}.".startswith(f"{error.name}.") else f", which {module} imports"
        return False, f"cannot be loaded: there is no module {error.name}{inside}"
    except AttributeError as error:
        if isinstance(error.obj, type(sys)) and error.name == function:
            return False, f"cannot be loaded: module {module} has no {function}"
        return False, f"cannot be loaded: importing {module} raised {first_line(error)}"
    except BaseException as error:  # SystemExit too
        return False, f"cannot be loaded: importing {module} raised {first_line(error)}"
    if not callable(found):
        return False, f"is not a function but {type(found).__name__}"
    return True, as_reward(found)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
