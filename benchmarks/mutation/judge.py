"""Verdicts: which tests can notice a mutant, and whether one does."""

from __future__ import annotations

import contextlib
import difflib
import gzip
import json
import math
import os
import shutil
import signal
import tempfile
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import astuple, replace
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from benchmarks.mutation import lines, nursery
from benchmarks.mutation.nursery import Reply, Request
from benchmarks.mutation.sources import Area, Mutant, place_of


class Judge:
    """A copy of the tree; of each area what its tests run, and a process that has collected them.

    `kept` is a folder for what was recorded, which is used again. Tests whose file has changed since are taken to run every line,
    and go first; a line that has changed is taken to be run by the tests of what stood there before. So what kills may be
    missed where an edit lets other tests run a line: without the folder all is recorded anew.
    """

    def __init__(self, root: Path, areas: Mapping[str, Area], kept: Path | None = None) -> None:
        self.root, self.areas, self.kept = root, areas, kept
        self.folder = Path(tempfile.mkdtemp(prefix="mutants-"))
        self.tree = self.folder / "tree"
        ignored = shutil.ignore_patterns(".git", ".venv*", "runs", "build", "dist", "*.egg-info", ".*_cache")
        shutil.copytree(root, self.tree, ignore=ignored)
        (self.tree / ".mutants").mkdir()
        shutil.copyfile(lines.__file__, self.tree / ".mutants" / "sitecustomize.py")
        self.recorded: dict[str, dict[str, Any]] = {}
        self.nurseries: dict[str, _Nursery] = {}
        self.kills: Counter[tuple[str, str]] = Counter()  # by file and test
        self.alone: dict[str, bool] = {}  # does the test pass by itself, without a mutant?
        self.seconds: dict[str, float] = {}  # of CPU that a test takes, where it has run

    def close(self) -> None:
        for one in self.nurseries.values():
            one.close()
        shutil.rmtree(self.folder)

    def quick(self, area: str, mutant: Mutant, budget: float) -> Reply:
        """Without a record of what runs which lines: the likeliest tests for so many CPU seconds; killed or undecided."""
        present, source, place = self._nursery(area), self._source(mutant), place_of(self._source(mutant), mutant)
        if not place.in_function or any(f"{mutant.file}:{line}" in present.at_collection for line in place.lines):
            return Reply("undecided")
        reply = self._judged(area, mutant, source, present.tests, set(), budget)
        return replace(reply, verdict="undecided") if reply.verdict in ("survived", "import") else reply

    def verdict(self, area: str, mutant: Mutant) -> Reply:
        """Raises RuntimeError where the area's tests fail without a mutant."""
        known, present = self._known(area), self._nursery(area)
        source = self._source(mutant)
        place = place_of(source, mutant)
        lines_of = [f"{mutant.file}:{line}" for line in place.lines]
        at_import = not place.in_function or any(line in present.at_collection for line in lines_of)
        names = list(known["tests"])
        runs = {names[number] for line in lines_of for number in known["lines"].get(line, ())}
        changed = {test for test, digest in present.tests.items() if known["tests"].get(test, {}).get("digest") != digest}
        able = [test for test in present.tests if at_import or test in runs or test in changed]
        if not able:
            return Reply("survived", "no test runs this line")
        return self._judged(area, mutant, source, able, runs | changed, math.inf, changed, at_import)

    def _judged(
        self,
        area: str,
        mutant: Mutant,
        source: str,
        able: Iterable[str],
        runs: Collection[str],
        budget: float,
        changed: Collection[str] = (),
        at_import: bool = False,
    ) -> Reply:
        """What kills must pass alone; a test that does not is left out."""
        kills_of_area: Counter[str] = Counter()
        for (_, test), count in self.kills.items():
            kills_of_area[test] += count

        able, turn, seen = list(able), dict[str, int](), Counter[str]()
        for test in able:  # one case of each test, then the second of each
            seen[test.partition("[")[0]] += 1
            turn[test] = seen[test.partition("[")[0]]

        def rank(test: str) -> tuple[bool, int, bool, float]:
            own = Path(test.partition("::")[0]).stem == f"test_{Path(mutant.file).stem}"
            seconds = turn[test] * self.seconds.get(test, 0.3) * (1.0 if own else 4.0) / (1 + kills_of_area[test])
            return test not in changed, -self.kills[mutant.file, test], bool(runs) and test not in runs, seconds

        while True:
            chosen = sorted((test for test in able if self.alone.get(test, True)), key=rank)
            seconds = {test: self.seconds[test] for test in chosen if test in self.seconds}
            wall = 600.0 + 20.0 * sum(seconds.values())
            reply = self._run(area, mutant, source, Request(chosen, seconds, None, budget, wall), at_import)
            for test, one in reply.each.items():
                self.seconds[test] = max(one, self.seconds.get(test, 0.0))
            if reply.test not in self.nurseries[area].tests or self._passes_alone(area, reply.test):
                self.kills[mutant.file, reply.test] += reply.verdict == "killed"
                return reply

    def _source(self, mutant: Mutant) -> str:
        return (self.tree / mutant.file).read_text()

    def _nursery(self, area: str) -> _Nursery:
        if area not in self.nurseries:
            self.nurseries[area] = _Nursery(self.tree, self._files(area), self.folder / f"collection-{area}")
        return self.nurseries[area]

    def _run(self, area: str, mutant: Mutant, source: str, request: Request, at_import: bool) -> Reply:
        file = self.tree / mutant.file
        stamp = file.stat()
        changed = mutant.applied(source)
        try:
            file.write_text(changed)
            if not at_import:
                reply = self.nurseries[area].ask(replace(request, changed=(mutant.file, source, changed)))
                if reply.verdict != "import" or request.budget < math.inf:
                    return reply
            return self._anew(request)
        finally:
            file.write_text(source)
            os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))

    def _anew(self, request: Request) -> Reply:
        """In processes that import the mutant: first the files of the first tests, then the others."""
        files = list(dict.fromkeys(test.partition("::")[0] for test in request.tests))
        spent = 0.0
        for some in (files[:1], files[1:3], files[3:]):
            if not some:
                continue
            try:
                fresh = _Nursery(self.tree, some)
            except EOFError:
                return Reply("killed", "at import")
            present = [test for test in request.tests if test.partition("::")[0] in some]
            gone = [test for test in present if test not in fresh.tests]
            reply = Reply("killed", "at collection") if gone else fresh.ask(replace(request, tests=present))
            fresh.close()
            spent += reply.seconds
            if reply.verdict != "survived":
                return replace(reply, seconds=spent)
        return Reply("survived", seconds=spent)

    def _passes_alone(self, area: str, test: str) -> bool:
        if test not in self.alone:
            self.alone[test] = self.nurseries[area].ask(Request([test], {})).verdict == "survived"
        return self.alone[test]

    def _files(self, area: str) -> list[str]:
        given = [self.tree / name for name in self.areas[area].tests]
        files = [test for one in given for test in ([one] if one.is_file() else sorted(one.rglob("test_*.py")))]
        return [str(file.relative_to(self.tree)) for file in files]

    def _known(self, area: str) -> dict[str, Any]:
        if area in self.recorded:
            return self.recorded[area]
        files = sorted(file for package in lines.PACKAGES for file in self.tree.glob(f"{package}/**/*.py"))
        sources = {str(file.relative_to(self.tree)): file.read_text() for file in files}
        path = self.kept / f"{area}.json.gz" if self.kept else None
        found: dict[str, Any]
        if path and path.is_file():
            found = json.loads(gzip.decompress(path.read_bytes()))
            found["lines"] = carried_over(found["lines"], found["sources"], sources)
        else:
            found = {"sources": sources, **self._record(area)}
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(gzip.compress(json.dumps(found).encode()))
        self.recorded[area] = found
        self.seconds |= {test: one["seconds"] for test, one in found["tests"].items()}
        return found

    def _record(self, area: str) -> dict[str, Any]:
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        child = os.fork()
        if child == 0:
            os.setsid()
            nursery.record(self.tree, self._files(area), folder)
        _, status = os.waitpid(child, 0)
        if status != 0 or not (folder / "tests.json").is_file():
            raise RuntimeError(f"the tests of {area} fail without a mutant: {', '.join(self.areas[area].tests)}")
        tests = json.loads((folder / "tests.json").read_text())
        by_context = {file.name: set(file.read_text().split()) for file in (folder / "lines").iterdir()}
        found: dict[str, list[int]] = defaultdict(list)  # line: tests by their number
        for index, one in enumerate(tests.values()):
            for line in set().union(*(by_context.get(context, set()) for context in one["contexts"])):
                found[line].append(index)
        shutil.rmtree(folder)
        return {"tests": tests, "lines": found}


def carried_over(
    recorded: Mapping[str, list[int]], before: Mapping[str, str], now: Mapping[str, str]
) -> Mapping[str, Sequence[int]]:
    """What was recorded of the lines of earlier sources, for the lines of others."""
    same_files = {file for file, text in now.items() if before.get(file) == text}
    found = {line: tests for line, tests in recorded.items() if line.rpartition(":")[0] in same_files}
    for file, text in now.items():
        if before.get(file) in (None, text):
            continue
        old, new = before[file].splitlines(), text.splitlines()
        for _, i, j, k, m in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
            same = j - i == m - k
            around = {test for n in range(max(0, i - 1), j + 1) for test in recorded.get(f"{file}:{n + 1}", ())}
            for n in range(k, m):
                tests = recorded.get(f"{file}:{n - k + i + 1}", ()) if same else around
                if tests:
                    found[f"{file}:{n + 1}"] = sorted(tests)
    return found


class _Nursery:
    """Raises EOFError where the tests cannot be collected."""

    def __init__(self, tree: Path, files: Sequence[str], collection: Path | None = None) -> None:
        self.line, theirs = Pipe()
        self.process = os.fork()
        if self.process == 0:
            os.setsid()
            self.line.close()
            nursery.serve(tree, files, theirs, collection)
        theirs.close()
        try:
            self.tests: dict[str, str] = self.line.recv()
        except EOFError:
            self.close()
            raise
        self.at_collection = set(collection.read_text().split()) if collection else set()

    def ask(self, request: Request) -> Reply:
        self.line.send(astuple(request))
        return Reply(*self.line.recv())

    def close(self) -> None:
        self.line.close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process, signal.SIGTERM)
        os.waitpid(self.process, 0)
