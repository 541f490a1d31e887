"""The generators of the package reasoning-gym, one or a weighted mixture, with its own scores and levels of difficulty.

Which data set an example comes from is a draw of ours; the instance is the package's, of a seed that depends on the run's
data seed, the data set and the level. Test sets do not depend on the seed, and no training example asks one of their
questions. Instances are made in a process whose hash seed is fixed: some generators walk through sets of texts, and would
give other instances on every rank and after every resume.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence

from ..errors import ConfigError, UserError
from .config import ReasoningGymConfig
from .from_scratch import longest, reading
from .gym_scores import score
from .rewards import load_reward
from .tags import TAGS
from .task import Curriculum, Example, Reward, Task

_SOLVED = 1.0 - 1e-6
_CHECKED = 16


def make(config: ReasoningGymConfig, *, seed: int) -> Task:
    tests, trains, left_out = _drawn(config, seed)
    if config.question == "short":
        cut = _constant_ends(itertools.chain(*tests.values(), *trains))
        tests = {name: [cut(example) for example in test] for name, test in tests.items()}
        trains = [[cut(example) for example in train] for train in trains]
    scored = load_reward(f"{score.__module__}:{score.__qualname__}", timeout=config.timeout)
    _check_scores(scored, trains[0])
    everything = [*itertools.chain(*tests.values(), *trains)] if config.style != "words" else []
    length = config.completion_length or (256 if config.style == "words" else longest(everything))
    shown = [example for example in trains[0][: config.demonstrations] if example.answer]
    questions = [example.prompt for train in trains for example in train]
    return Task(
        name="reasoning_gym",
        note=f"{len(set(questions)):,} of {len(questions):,} training questions are distinct; {left_out:,} more were drawn and "
        "left out, as they are held out for tests",
        train=trains[0],
        tests=tests,
        rewards={"score": scored, "solved": _solved(scored)},
        correct=_solved(scored),
        metrics={"score": scored},
        completion_length=length,
        system=TAGS if config.style == "words" else "",
        shown=shown,
        curriculum=Curriculum(trains, config.rise_at, config.rise_after) if config.levels > 1 else None,
        **reading(config.style, everything, config.vocabulary),
    )


def _check_scores(scored: Reward, examples: Sequence[Example]) -> None:
    """Raises UserError where the package takes none of its own answers for right: a reward that is always 0 says nothing."""
    known = [example for example in examples if example.answer][:_CHECKED]
    if known and max(_solved(scored)(known, [example.answer for example in known])) == 0:
        raise UserError(f"task: reasoning-gym takes none of its own answers for right, the first of them {known[0].answer!r:.60}")


def _solved(scored: Reward) -> Reward:
    def solved(examples: Sequence[Example], completions: Sequence[str]) -> list[float]:
        return [float(value >= _SOLVED) for value in scored(examples, completions)]

    return solved


def _drawn(config: ReasoningGymConfig, seed: int) -> tuple[dict[str, list[Example]], list[list[Example]], int]:
    """`gym_draws.draw` in a process of its own."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    done = subprocess.run(
        [sys.executable, "-m", f"{__package__}.gym_draws"],
        input=pickle.dumps((config, seed)),
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "0"},
        check=False,
    )
    if done.returncode != 0:
        raise UserError(f"task: the process that draws reasoning-gym's examples ended with {done.returncode}, see above")
    kind, found = pickle.loads(done.stdout)
    if kind != "drawn":
        raise (ConfigError if kind == "config" else UserError)(found)
    tests, trains, left_out = found
    return tests, trains, left_out


def _constant_ends(examples: Iterable[Example]) -> Callable[[Example], Example]:
    """Takes off the words that all questions of a data set begin and end with; where there are several, its name is put first."""
    words: dict[str, list[list[str]]] = {}
    for example in examples:
        words.setdefault(example.facts["dataset"], []).append(example.prompt.split(" "))
    ends = {name: _ends(rows) for name, rows in words.items()}

    def cut(example: Example) -> Example:
        name, row = example.facts["dataset"], example.prompt.split(" ")
        first, last = ends[name]
        rest = " ".join(row[first : len(row) - last])
        return dataclasses.replace(example, prompt=rest if len(ends) == 1 else f"{name}: {rest}")

    return cut


def _ends(rows: Sequence[Sequence[str]]) -> tuple[int, int]:
    """Words to take off at the beginning and at the end, which leave each question one at least, and different ones different."""
    shortest = min(map(len, rows))
    first = min(_common(rows), shortest - 1)
    return first, min(_common([row[::-1] for row in rows]), shortest - 1 - first)


def _common(rows: Sequence[Sequence[str]]) -> int:
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False)))
