"""Signals that ask a run to stop, at a moment that loses nothing."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from ..errors import STOPPED_BY_CTRL_C, STOPPED_BY_SIGNAL, StoppedAtOnce

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGQUIT)
IN_TIME = 20.0  # seconds; torchrun kills its processes 30 s after SIGTERM


class StopRequest:
    """While it is entered, a signal asks the run to stop at its next consistent moment; a second Ctrl-C stops it at once.

    nothing_to_lose: no step has been made that is not saved, so the first signal stops the run where it is.
    """

    def __init__(self, *, nothing_to_lose: bool) -> None:
        self.wanted = False
        self.nothing_to_lose = nothing_to_lose
        self._code = STOPPED_BY_CTRL_C
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup says to ignore it
                    self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def code(self) -> int:
        """The exit status that is due: 0 unless a stop is wanted, 130 after Ctrl-C, 75 after another signal."""
        return self._code if self.wanted else 0

    def _note(self, number: int, _frame: FrameType | None) -> None:
        again, self.wanted = self.wanted, True
        if not again:
            self._at = time.monotonic()
            self._code = STOPPED_BY_CTRL_C if number == signal.SIGINT else STOPPED_BY_SIGNAL
        # torchrun sends on to its processes what the terminal has sent them already
        once_more = again and number == signal.SIGINT and ("RANK" not in os.environ or time.monotonic() - self._at > 2.0)
        if self.nothing_to_lose or once_more:
            raise StoppedAtOnce(self._code)


class Moments:
    """When a checkpoint is due by the clock, and how long a stop may take."""

    def __init__(self, every_minutes: float | None) -> None:
        self._every = every_minutes
        self._saved = time.monotonic()
        self._longest_save = self._longest_step = 0.0
        self._told = False

    def is_due(self) -> bool:
        return self._every is not None and time.monotonic() - self._saved >= 60 * self._every

    def saved(self, seconds: float) -> None:
        self._saved = time.monotonic()
        self._longest_save = max(self._longest_save, seconds)

    def warning(self, step_seconds: float) -> str:
        """Once, as soon as it is known that a stop may take too long; else ""."""
        self._longest_step = max(self._longest_step, step_seconds)
        needed = self._longest_step + self._longest_save
        if self._told or needed <= IN_TIME:
            return ""
        self._told = True
        return (
            f"a stop by a signal takes up to {needed:.0f} s here, as a step is finished and saved first; torchrun kills 30 s "
            "after SIGTERM: let the scheduler's signal come earlier, and set checkpoints.every_minutes"
        )
