"""Errors that the command line shows as one sentence, and the signal that a run was asked to stop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """An error that the user can fix; the CLI prints the sentence and exits with status 2."""


class ConfigError(UserError, ValueError):
    """A config key or value that is not allowed."""


class GuardError(UserError, RuntimeError):
    """Training failed in a way that more steps would not repair (see `optimization.py` and `guards.py`)."""


@contextmanager
def telling_of_algorithms() -> Iterator[None]:
    """An installed algorithm that cannot be used becomes a sentence."""
    from dllm_kernels.objectives import AlgorithmError

    try:
        yield
    except AlgorithmError as error:
        raise UserError(str(error)) from error


def visible(text: object) -> str:
    """With control characters as escapes: what a file or a model wrote must not steer the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode("ascii") for c in str(text))


def first_line(error: BaseException) -> str:
    """`Type: first line` of the message, to quote a cause in a sentence."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__


STOPPED_BY_CTRL_C = 130
STOPPED_BY_SIGNAL = 75  # EX_TEMPFAIL: to be started again


class Stopped(Exception):  # noqa: N818 - nothing went wrong
    """The run was asked to stop; raised only where its state is consistent."""

    def __init__(self, code: int = STOPPED_BY_CTRL_C):
        super().__init__(code)
        self.code = code


class StoppedAtOnce(KeyboardInterrupt):
    """The run was asked to stop where nothing is to be saved, or by a second Ctrl-C."""

    def __init__(self, code: int):
        super().__init__(code)
        self.code = code
