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
    """A thread that says every second that this rank lives, and ends the process where the next rank has not for `patience` s."""

    def __init__(self, ranks: Ranks, patience: float) -> None:
        self.patience = patience
        self._rank, self._next = ranks.rank, (ranks.rank + 1) % ranks.size
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def step_made(self, seconds: float) -> None:
        """Nothing takes long any more but what takes long in every step."""
        self.patience = min(self.patience, max(LEAST, STEPS * seconds))

    def end(self) -> None:
        self._over.set()
        self._thread.join(timeout=2 * BEAT)

    def _run(self) -> None:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        heard, number, last = time.monotonic(), 0, b""
        store: dist.Store | None = None
        while not self._over.wait(BEAT):
            try:
                if store is None:
                    client = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=10))
                    store = dist.PrefixStore(f"watch/{restart}", client)
                store.set(str(self._rank), str(number))
                number += 1
                if store.check([str(self._next)]) and (now := store.get(str(self._next))) != last:
                    last, heard = now, time.monotonic()
            except (RuntimeError, OSError):  # the store's process stands still or is gone
                store = None
            if time.monotonic() - heard > self.patience and not self._over.is_set():
                print(
                    f"dllm-kernels: rank {self._next} has not answered for {self.patience:.0f} s, so the run ends; "
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
