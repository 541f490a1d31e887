"""Each rank of a run watches the next one, so that one that stands still ends the run instead of a night."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from .distributed import Ranks

BEAT = 1.0  # seconds
LEAST = 60.0  # of patience once a step was made, and at least so many steps' time:
STEPS = 10


class Watch:
    """A thread that says every second that this rank lives, and one that ends the process where the next rank has not for
    `patience` s, or where the store has not answered: rank 0 keeps it, and may stand still itself, where no launcher does.
    """

    def __init__(self, ranks: Ranks, patience: float) -> None:
        self.patience = patience
        self._rank, self._next = ranks.rank, (ranks.rank + 1) % ranks.size
        self._heard = time.monotonic()
        self._asked: float | None = None  # since when the store is asked
        self._over = threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._listen, self._judge)]
        for thread in self._threads:
            thread.start()

    def step_made(self, seconds: float) -> None:
        """Nothing takes long any more but what takes long in every step."""
        self.patience = min(self.patience, max(LEAST, STEPS * seconds))

    def end(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(timeout=2 * BEAT)

    def _listen(self) -> None:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        number, last = 0, b""
        store: dist.Store | None = None
        while not self._over.wait(BEAT):
            self._asked = time.monotonic()
            try:
                if store is None:
                    client = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=10))
                    store = dist.PrefixStore(f"watch/{restart}", client)
                store.set(str(self._rank), str(number))
                number += 1
                if store.check([str(self._next)]) and (now := store.get(str(self._next))) != last:
                    last, self._heard = now, time.monotonic()
            except (RuntimeError, OSError):  # the store's process stands still or is gone
                store = None
            self._asked = None

    def _judge(self) -> None:
        while not self._over.wait(BEAT):
            now, asked = time.monotonic(), self._asked
            if now - self._heard <= self.patience:
                continue
            stuck = asked is not None and now - asked > self.patience / 2
            silent = "rank 0, or whoever keeps the ranks' store," if stuck else f"rank {self._next}"
            print(
                f"dllm-kernels: {silent} has not answered for {self.patience:.0f} s, so the run ends; "
                "the last saved state is kept",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)


@contextmanager
def watching(ranks: Ranks, patience: float) -> Iterator[Watch | None]:
    """A `Watch` while it is entered; None where there is no other rank."""
    watch = Watch(ranks, patience) if ranks.size > 1 else None
    try:
        yield watch
    finally:
        if watch is not None:
            watch.end()
