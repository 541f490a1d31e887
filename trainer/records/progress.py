"""Progress: bars with ETA and figures on a terminal, else a plain line every few seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

_SECONDS_BETWEEN_LINES = 5.0


class Bar:
    """One task on the screen, moved by `advance`."""

    def __init__(self, console: Console, name: str, total: int, done: int, rich: tuple[Progress, TaskID] | None):
        self._console, self._name, self._total, self._rich = console, name, total, rich
        self._first = self._done = done
        self._started = self._printed = time.monotonic()

    def advance(self, steps: int, figures: Mapping[str, float] | None = None) -> None:
        self._done += steps
        text = "  ".join(f"{name} {value:.3g}" for name, value in (figures or {}).items())
        if self._rich is not None:
            progress, task = self._rich
            progress.update(task, advance=steps, figures=text)
            return
        now = time.monotonic()
        if now - self._printed >= _SECONDS_BETWEEN_LINES or self._done == self._total:
            self._printed = now
            elapsed = now - self._started
            remaining = elapsed / (self._done - self._first) * (self._total - self._done)
            times = f"{_clock(elapsed)} elapsed, {_clock(remaining)} to go"
            self._console.print(f"{self._name}  {self._done}/{self._total}  {times}  {text}", highlight=False, soft_wrap=True)


@contextmanager
def bar(console: Console, name: str, total: int, *, done: int = 0, shown: bool = True) -> Iterator[Bar]:
    if not shown:
        yield Bar(Console(quiet=True), name, total, done, None)
        return
    if not console.is_terminal:
        yield Bar(console, name, total, done, None)
        return
    columns = (
        TextColumn("{task.description:<20}"),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
    )
    with Progress(*columns, console=console, expand=True) as progress:
        yield Bar(console, name, total, done, (progress, progress.add_task(name, total=total, completed=done, figures="")))


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
