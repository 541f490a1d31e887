"""A limit of CPU time: what a machine does besides must not turn a right answer into a wrong one."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class TooLong(BaseException):
    """What is limited has used up its time. No Exception, as those are what scorers catch."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises TooLong once this process has computed for so long inside; in the main thread alone, and not nested."""

    def over(*_: object) -> None:
        raise TooLong

    before = signal.signal(signal.SIGPROF, over)
    signal.setitimer(signal.ITIMER_PROF, seconds, 1.0)  # and again each second, where a bare `except` or a finalizer takes it
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
