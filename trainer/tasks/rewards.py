"""Rewards as the trainer calls them: results are checked, and user functions run in a separate process.

A reward that hangs, in Python or in C, is stopped by killing its process, so nothing is left running.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import signal
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from typing import Any

from ..errors import UserError, first_line
from .task import Example, Reward

_IMPORT_SECONDS = 120.0  # a module may import torch on a busy machine
_LONGEST_ANSWER = 1 << 26  # bytes
_SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE", re.IGNORECASE)


def exact_match(examples: Sequence[Example], completions: Sequence[str]) -> list[float]:
    """1.0 if the completion is the example's `answer`, up to surrounding white space."""
    return [float(text.strip() == str(e.facts["answer"]).strip()) for e, text in zip(examples, completions, strict=True)]


def choose(name: str, rewards: Mapping[str, Reward], *, timeout: float) -> Reward:
    """The reward of a task by name (`task.rewards`), or a user's `module:function` in its own process."""
    if name in rewards:
        return rewards[name]
    if ":" in name:
        return load_reward(name, timeout=timeout)
    known = ", ".join(rewards) or "none"
    raise UserError(f"reward {name} is unknown: this task has {known}; one of your own is written module:function")


def checked(reward: Reward, name: str, *, truth: bool = False) -> Reward:
    """Wrap a reward to raise UserError, naming the example, unless it returns a finite number for each.

    truth: 0, 1 or a truth value for each, as what counts right answers must: gains are those of answers that became right.
    """

    def call(examples: Sequence[Example], completions: Sequence[str]) -> list[float]:
        try:
            values = reward(examples, completions)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"reward {name} raised {first_line(error)}{_place(error)}") from error
        numbers = _numbers(values, name, examples)
        for example, number in zip(examples, numbers, strict=True) if truth else ():
            if number not in (0, 1):
                raise UserError(f"reward {name} must return truth values, or 0 and 1, got {number:g} for {example.id}")
        return numbers

    return call


def load_reward(spec: str, *, timeout: float) -> Reward:
    """`module:function`, called as `function(examples, completions)` in a process of its own, checked.

    One whose signature names `prompts` is called as TRL does, `function(prompts=, completions=, **columns)`.

    A call that takes more than `timeout` seconds ends the process; the next call starts another. Output of
    the function goes to stderr. Raises UserError if there is no such function.
    """
    module, _, function = spec.partition(":")
    if not module or not function or ":" in function:
        raise UserError(f"a reward is written module:function, got {spec!r}")
    return checked(_Process(spec, timeout), spec)


class _Process:
    """A process that imports the function once and answers calls; it and its children end with this object or this process.

    It gets the environment without what is named like a secret. Its answers are JSON, of a limited size, and repeat the number
    and the random word of the call.
    """

    def __init__(self, spec: str, timeout: float):
        self._spec, self._timeout = spec, timeout
        self._number, self._nonce = 0, ""
        self._start()

    def __call__(self, examples: Sequence[Example], completions: Sequence[str]) -> Any:
        if not self._end.alive:
            self._start()
        self._send(list(examples), list(completions))
        return self._answer(self._timeout, f"scored {len(completions)} completions").get("values")

    def _start(self) -> None:
        ours, theirs = Pipe()
        kept = {name: value for name, value in os.environ.items() if not _SECRET.search(name)}
        process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.reward_process", self._spec, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=2,
            env={**kept, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)},
            start_new_session=True,
        )
        theirs.close()
        self._connection = ours
        self._end = weakref.finalize(self, _end, process, ours)
        self._send()
        self._answer(max(_IMPORT_SECONDS, self._timeout), "been imported")

    def _send(self, *what: Any) -> None:
        self._number, self._nonce = self._number + 1, secrets.token_hex(8)
        try:
            self._connection.send((self._number, self._nonce, *what))
        except OSError as error:
            self._end()
            raise UserError(f"reward {self._spec}: its process has ended; its output is above, if any") from error

    def _answer(self, seconds: float, done: str) -> dict[str, Any]:
        try:
            if not self._connection.poll(seconds):
                self._end()
                raise UserError(f"reward {self._spec} had not {done} after {seconds:g} s; its process was ended")
            told = json.loads(self._connection.recv_bytes(_LONGEST_ANSWER))
            is_it = (told["number"], told["nonce"]) == (self._number, self._nonce)
            good, said = told["good"], told.get("said")
        except (EOFError, OSError) as error:
            self._end()
            raise UserError(f"reward {self._spec}: its process ended before it had {done}") from error
        except (ValueError, TypeError, LookupError, RecursionError):
            is_it = False
        if not is_it:
            self._end()
            raise UserError(f"reward {self._spec}: something else than its answer came from its process, which was ended")
        if not good:
            raise UserError(f"reward {self._spec} {said}")
        return told  # type: ignore[no-any-return]


def _end(process: subprocess.Popen[bytes], connection: Connection) -> None:
    connection.close()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _numbers(values: Any, name: str, examples: Sequence[Example]) -> list[float]:
    values = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(values, str | Mapping) or not isinstance(values, Sequence):
        raise UserError(f"reward {name} must return one number per completion, got {type(values).__name__}")
    if len(values) != len(examples):
        raise UserError(f"reward {name} must return one number per completion ({len(examples)}), got {len(values)}")
    numbers = []
    for example, value in zip(examples, values, strict=True):
        try:
            number = float("nan" if isinstance(value, str) else value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise UserError(f"reward {name} must return finite numbers, got {value!r:.60} for example {example.id}")
        numbers.append(number)
    return numbers


def _place(error: BaseException) -> str:
    """` (file, line N)` of the raising line."""
    trace = error.__traceback__
    if trace is None:
        return ""
    while trace.tb_next is not None:
        trace = trace.tb_next
    return f" ({os.path.basename(trace.tb_frame.f_code.co_filename)}, line {trace.tb_lineno})"
