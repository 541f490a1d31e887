"""The process of a reward `module:function`.

python -m dllm_trainer.tasks.reward_process SPEC FILE_DESCRIPTOR
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import traceback
from multiprocessing.connection import Connection
from typing import Any

from ..errors import first_line
from .trl_rewards import as_reward


def main(spec: str, descriptor: int) -> None:
    """Answer each (examples, completions) by (True, values) or (False, rest of a sentence) until the end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C asks the run to stop, which closes the pipe
    connection = Connection(descriptor)
    good, found = _find(spec)
    connection.send((good, None if good else found))
    while good:
        try:
            examples, completions = connection.recv()
        except EOFError:
            return
        try:
            values = found(examples, completions)
            answer = True, values.tolist() if hasattr(values, "tolist") else values
        except Exception as error:
            traceback.print_exc()
            last = traceback.extract_tb(error.__traceback__)[-1]
            answer = False, f"raised {first_line(error)} ({os.path.basename(last.filename)}, line {last.lineno})"
        try:
            connection.send(answer)
        except Exception:  # the result cannot be sent, such as a generator
            connection.send((False, f"must return one number per completion, got {type(answer[1]).__name__}"))


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
