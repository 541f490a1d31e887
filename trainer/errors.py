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


def first_line(error: BaseException) -> str:
    """`Type: first line` of the message, to quote a cause in a sentence."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__


class Stopped(Exception):  # noqa: N818 - nothing went wrong
    """Ctrl-C was pressed; raised only where the run's state is consistent."""
