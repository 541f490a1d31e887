"""Programs that a model wrote, judged by tests: each program in one sandbox, its tests in another."""

from __future__ import annotations

import json
import os
import queue
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from ..errors import UserError
from . import code_cell
from .sandbox import Limits, Mechanism, Process, Sandbox, python


@dataclass(frozen=True)
class Job:
    program: str
    tests: tuple[str, ...]  # each a text that raises unless it holds
    setup: str = ""  # run before each test
    names: tuple[str, ...] = ()  # that tests call in the program though Python has them too


class Judge:
    """Judges programs, several at once; results come in order, whatever ends when.

    Raises UserError at the first use where no sandbox works, and at any where one does not start.
    """

    def __init__(self, mechanism: Mechanism = "auto", limits: Limits | None = None, workers: int | None = None):
        self._mechanism, self._limits = mechanism, limits or Limits()
        self._known: dict[Job, list[bool]] = {}  # verdicts of the last call
        self._workers = workers or _share_of_the_cores()

    def __call__(self, jobs: Sequence[Job]) -> list[list[bool]]:
        """Which tests hold; all that come after one that exceeds the limits fail."""
        # a group of rollouts often writes the same program; reward and evaluation ask for the same batch, one after the other
        new = [job for job in dict.fromkeys(jobs) if job not in self._known]
        fresh = dict(zip(new, self._pool.map(self._judge, new), strict=True))
        self._known = {job: fresh[job] if job in fresh else self._known[job] for job in jobs}
        return [self._known[job] for job in jobs]

    @cached_property
    def _sandbox(self) -> Sandbox:
        return Sandbox(self._mechanism)

    @cached_property
    def _slots(self) -> queue.SimpleQueue[int]:
        slots: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(self._workers):
            slots.put(slot)
        return slots

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        self._slots, self._sandbox  # noqa: B018  made here, not in a thread
        return ThreadPoolExecutor(self._workers, thread_name_prefix="judge")

    def _judge(self, job: Job) -> list[bool]:
        slot = self._slots.get()
        try:
            lines = self._run(job, slot)
        except OSError as error:
            raise UserError(f"no sandbox can be started for a program: {error.strerror}") from error
        finally:
            self._slots.put(slot)
        passed = [line == b"true" for line in lines[: len(job.tests)]]
        return passed + [False] * (len(job.tests) - len(passed))

    def _run(self, job: Job, slot: int) -> list[bytes]:
        bare = self._sandbox.mechanism == "none"
        limits = asdict(self._limits) | {"sandboxed": not bare} | ({"processes": None} if bare else {})
        command = [*python(), _SOURCE]
        calls_read, calls_write, answers_read, answers_write = ends = (*os.pipe(), *os.pipe())
        started: list[Process] = []
        try:
            try:
                program = [*command, "program", json.dumps(limits)]
                started.append(self._sandbox.start(program, slot=2 * slot, stdin=calls_read, stdout=answers_write))
                tests = [*command, "tests", json.dumps(limits), str(calls_write), str(answers_read)]
                ours = (calls_write, answers_read)
                pipe = subprocess.PIPE
                started.append(self._sandbox.start(tests, slot=2 * slot + 1, stdin=pipe, stdout=pipe, pass_fds=ours))
            finally:
                for end in ends:
                    os.close(end)
            # the program's time begins here: how long a sandbox takes to start is the machine's affair, not a verdict
            if not started[1].said(code_cell.READY, _START_SECONDS):
                told = "; ".join(filter(None, (process.end() for process in started)))
                raise UserError(f"the sandbox of a program did not start ({told or f'in {_START_SECONDS:g} s'})")
            spec = json.dumps({"program": job.program, "tests": job.tests, "setup": job.setup, "names": job.names})
            return started[1].communicate(spec.encode(), self._limits.seconds).splitlines()
        finally:
            for process in started:
                process.end()


def _share_of_the_cores() -> int:
    """Of this process, where torchrun may have started others beside it: programs that wait for a core run out of wall time."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE") or 1))


_SOURCE = Path(code_cell.__file__).read_text()
_START_SECONDS = 60.0
