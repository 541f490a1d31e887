"""A process that has imported and collected the tests of an area, and forks a child for each verdict.

The child replaces the code of the functions that a mutant changes in place, so that it need not import and collect again.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import json
import math
import os
import resource
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, NoReturn

import pytest

from benchmarks.mutation.lines import Recorder, redirect

OURS = ("benchmarks", "dllm_kernels", "dllm_trainer", "trainer", "tests")
PATIENCE = 10.0  # times the CPU seconds that a test takes in peace, and
GRACE = 5.0  # CPU seconds more


@dataclass(frozen=True)
class Request:
    tests: Sequence[str]  # node ids, in this order, until one fails
    seconds: Mapping[str, float]  # of CPU that each takes in peace
    changed: tuple[str, str, str] | None = None  # file, its source and the mutant's, to be patched into what is imported
    budget: float = math.inf  # CPU seconds after which no further test starts
    wall: float = 3600.0


@dataclass(frozen=True)
class Reply:
    verdict: str  # survived, killed, "killed, by the clock"; undecided; "import" where it cannot be patched
    test: str = ""  # that failed
    seconds: float = 0.0  # of CPU
    each: Mapping[str, float] = field(default_factory=dict)  # of CPU, by test that passed


def cpu_seconds() -> float:
    return sum(os.times()[:4])


def serve(tree: Path, files: Sequence[str], line: Connection, collection: Path | None = None) -> NoReturn:
    """In a forked process: collect these files of the tree, say which tests they hold, and answer requests.

    `collection`: a file for the lines that run meanwhile.
    """
    recorder = Recorder(str(tree)) if collection else None
    if recorder:
        recorder.enter(str(collection))
    _run_pytest(tree, files, _Server(tree, line, recorder))


def record(tree: Path, files: Sequence[str], folder: Path) -> NoReturn:
    """In a forked process: run these files of the tree, and write which lines each test and wider fixture runs."""
    recorder = Recorder(str(tree))
    (folder / "lines").mkdir(parents=True)
    recorder.enter(str(folder / "lines" / "collection"))
    _run_pytest(tree, files, _Recording(recorder, folder))


def _run_pytest(tree: Path, files: Sequence[str], plugin: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.chdir(tree)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(tree), str(tree / ".mutants")])
    root = Path(__file__).resolve().parents[2]
    sys.path[:] = [str(tree), *(path for path in sys.path if Path(path or ".").resolve() not in (root, root / "benchmarks"))]
    redirect(str(tree))
    for name in list(sys.modules):
        if name.partition(".")[0] in OURS:
            del sys.modules[name]
    options = ["-q", "--timeout=0", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not slow", "--rootdir", str(tree)]
    code = 1
    try:
        code = int(pytest.main([*options, f"--basetemp={tree.parent / 'temporary'}", *files], plugins=[plugin]))
    except BaseException:  # what a mutant raises at import
        pass
    finally:
        os._exit(code)


class _Server:
    def __init__(self, tree: Path, line: Connection, recorder: Recorder | None) -> None:
        self.tree, self.line, self.recorder, self.failed, self.child = tree, line, recorder, "", 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed = report.nodeid

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        _untimed(items)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if self.recorder:
            self.recorder.leave()
        if session.testsfailed:
            return True
        signal.signal(signal.SIGTERM, self._stop)
        self.items = {item.nodeid: item for item in session.items}
        self.line.send({name: digest_of(item) for name, item in self.items.items()})
        self.functions: dict[tuple[str, str, int], list[FunctionType]] = {}
        for one in gc.get_objects():
            if type(one) is FunctionType and one.__code__.co_filename.startswith(str(self.tree)):
                self.functions.setdefault(_key(one.__code__), []).append(one)
        gc.collect()
        gc.freeze()  # children would copy what a collection touches
        while True:
            try:
                request = Request(*self.line.recv())
            except EOFError:
                return True
            self.line.send(astuple(self._answer(request)))  # by value: these modules are not those that the other end has

    def _stop(self, *_: Any) -> None:
        if self.child:
            os.killpg(self.child, signal.SIGKILL)
        os._exit(0)

    def _answer(self, request: Request) -> Reply:
        ours, theirs = Pipe(duplex=False)
        self.child = child = os.fork()
        if child == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.setsid()
            theirs.send(astuple(self._verdict(request)))
            os._exit(0)
        theirs.close()
        try:
            # a second at a time, so that what stops this process stops the clock too
            arrived = any(ours.poll(1.0) for _ in range(math.ceil(request.wall)))
            reply = Reply(*ours.recv()) if arrived else Reply("killed, by the clock", seconds=request.wall)
        except EOFError:  # killed by a signal
            reply = None
        try:
            os.killpg(child, signal.SIGKILL)
        except ProcessLookupError:  # between fork and setsid
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        self.child = 0
        ours.close()
        late = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU
        return reply or Reply("killed, by the clock" if late else "killed", test="a crash")

    def _verdict(self, request: Request) -> Reply:
        before = last = cpu_seconds()
        if request.changed and not self._patched(*request.changed):
            return Reply("import")
        for cache in caches():  # what collecting has kept was made by the code as it was
            cache.cache_clear()
        each: dict[str, float] = {}
        for index, name in enumerate(request.tests):
            if last - before > request.budget:
                return Reply("undecided", "", last - before, each)
            limit = last + GRACE + PATIENCE * request.seconds.get(name, 10.0)
            resource.setrlimit(resource.RLIMIT_CPU, (int(limit), resource.getrlimit(resource.RLIMIT_CPU)[1]))
            following = request.tests[index + 1] if index + 1 < len(request.tests) else None
            item = self.items[name]
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=self.items[following] if following else None)
            now = cpu_seconds()
            if self.failed:
                return Reply("killed", name, now - before, each)
            each[name], last = round(now - last, 3), now
        return Reply("survived", "", last - before, each)

    def _patched(self, file: str, source: str, changed: str) -> bool:
        """Whether all functions that differ could be given their new code."""
        path = str(self.tree / file)
        pairs = list(_pairs(compile(source, path, "exec"), compile(changed, path, "exec")))
        keys = [_key(old) for old, _ in pairs]
        for key, (old, new) in zip(keys, pairs, strict=True):
            if old == new:
                continue
            if keys.count(key) > 1 or old.co_freevars != new.co_freevars:
                return False
            for function in self.functions.get(key, []):
                function.__code__ = new
        return len(pairs) > 0


def _key(code: CodeType) -> tuple[str, str, int]:
    return code.co_filename, code.co_name, code.co_firstlineno


def _pairs(old: CodeType, new: CodeType) -> Iterator[tuple[CodeType, CodeType]]:
    """The code objects inside, in their order. Nothing where there are not as many."""
    inner = [[one for one in code.co_consts if isinstance(one, CodeType)] for code in (old, new)]
    if len(inner[0]) == len(inner[1]):
        for pair in zip(*inner, strict=True):
            yield pair
            yield from _pairs(*pair)


def _untimed(items: Sequence[pytest.Item]) -> None:
    """CPU seconds are limited here: those of the clock say as much of what else runs."""
    for node in {node for item in items for node in item.listchain()}:
        node.own_markers[:] = [mark for mark in node.own_markers if mark.name != "timeout"]


def caches() -> list[Any]:
    """Of all functions of ours and of the tests that keep what they have returned."""
    kind = functools._lru_cache_wrapper
    modules = [module for name, module in sys.modules.items() if name.partition(".")[0] in OURS]
    return [one for module in modules for one in vars(module).values() if isinstance(one, kind)]


def digest_of(item: Any) -> str:
    """Of the file in which the test stands."""
    function = getattr(item, "function", None)
    path = function.__code__.co_filename if isinstance(function, FunctionType) else str(item.path)
    inner = getattr(getattr(function, "hypothesis", None), "inner_test", None)
    path = inner.__code__.co_filename if isinstance(inner, FunctionType) else path
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


class _Recording:
    """Writes tests.json: of each test its CPU seconds, its digest and its contexts."""

    def __init__(self, recorder: Recorder, folder: Path) -> None:
        self.recorder, self.folder = recorder, folder
        self.fixtures: dict[str, float] = {}  # context: seconds
        self.tests: dict[str, dict[str, Any]] = {}
        self.kept: list[Any] = []

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        _untimed(items)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.recorder.leave()
        self.kept = caches()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any, nextitem: Any) -> Any:
        for cache in self.kept:  # so that not only the first test that asks is seen to run it
            cache.cache_clear()
        context = f"test{len(self.tests)}"
        self.recorder.enter(str(self.folder / "lines" / context))
        before = cpu_seconds()
        try:
            return (yield)
        finally:
            self.recorder.leave()
            wide = [
                _context(definition)
                for definitions in item._fixtureinfo.name2fixturedefs.values()
                for definition in definitions
                if definition.scope != "function"
            ]
            self.tests[item.nodeid] = {
                "seconds": round(cpu_seconds() - before, 3),
                "digest": digest_of(item),
                "contexts": [context, *wide],
            }

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> Any:
        if fixturedef.scope == "function":
            return (yield)
        context = _context(fixturedef)
        self.recorder.enter(str(self.folder / "lines" / context))
        before = cpu_seconds()
        try:
            return (yield)
        finally:
            self.fixtures[context] = max(self.fixtures.get(context, 0.0), cpu_seconds() - before)
            self.recorder.leave()

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        for test in self.tests.values():  # in another order a test may be the one that pays for its fixtures
            test["seconds"] += sum(self.fixtures.get(context, 0.0) for context in test["contexts"][1:])
        (self.folder / "tests.json").write_text(json.dumps(self.tests))


def _context(definition: Any) -> str:
    return f"fixture-{definition.argname}-{definition.baseid}".replace(os.sep, "-")
