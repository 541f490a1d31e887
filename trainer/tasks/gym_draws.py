"""Draws examples of reasoning-gym: `python -m dllm_trainer.tasks.gym_draws`, config and seed by stdin, examples by stdout."""

from __future__ import annotations

import bisect
import dataclasses
import difflib
import importlib.metadata
import itertools
import os
import pickle
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from dllm_kernels import noise
from dllm_kernels.noise import Stream

from ..errors import ConfigError, UserError, first_line
from .config import ReasoningGymConfig
from .task import Example

_FRUITLESS = 64  # give up after so many instances in a row that cannot be used


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the package prints is no answer
    config, seed = pickle.load(sys.stdin.buffer)
    try:
        told: tuple[str, Any] = ("drawn", draw(config, seed))
    except ConfigError as error:
        told = ("config", str(error))
    except UserError as error:
        told = ("user", str(error))
    answers.write(pickle.dumps(told))
    answers.close()


def draw(config: ReasoningGymConfig, seed: int) -> tuple[dict[str, list[Example]], list[list[Example]], int]:
    """Test sets by name, training examples by level, and how many were drawn beside these that ask a test set's question."""
    levels = [_Mixture(config, level) for level in range(config.levels)]
    names = [f"level_{level}" for level in range(config.levels)] if config.levels > 1 else ["unseen"]
    tests = {name: mixture.test_set() for name, mixture in zip(names, levels, strict=True)}
    held_out = {example.prompt for test in tests.values() for example in test}
    trains = [mixture.training_set(seed, held_out) for mixture in levels]
    return tests, trains, sum(mixture.left_out for mixture in levels)


class _Mixture:
    """The data sets of a task at one level of difficulty."""

    def __init__(self, config: ReasoningGymConfig, level: int):
        self.config, self.level = config, level
        self.left_out = 0  # instances drawn for training that are held out
        self.names = list(config.datasets)
        self.options = {name: _options(name, config, level) for name in self.names}
        total = sum(config.datasets[name].weight for name in self.names)
        self.up_to = list(itertools.accumulate(config.datasets[name].weight / total for name in self.names))

    def test_set(self) -> list[Example]:
        """Distinct questions, the same for every seed."""
        return self._examples("test", self.config.test_problems, 0, set(), distinct=True)

    def training_set(self, seed: int, held_out: set[str]) -> list[Example]:
        return self._examples("train", self.config.train_problems, seed, held_out, distinct=False)

    def _examples(self, split: str, count: int, seed: int, without: set[str], *, distinct: bool) -> list[Example]:
        label = f"reasoning_gym/{split}/{self.level}"
        sequence, places = torch.tensor(noise.sequence_id(label)), torch.arange(count)
        draws = noise.uniform(noise.row_bits(seed, Stream.DATA, sequence, torch.tensor(0), places)).tolist()
        sources = {name: self._entries(name, split, seed) for name in self.names}
        found: list[Example] = []
        without, fruitless = set(without), 0
        for index, draw in enumerate(draws):
            name = self.names[min(bisect.bisect_right(self.up_to, draw), len(self.names) - 1)]
            for entry in sources[name]:
                if entry["question"] not in without:
                    break
                fruitless += 1
                self.left_out += not distinct
                if fruitless >= _FRUITLESS:
                    what = "distinct ones" if distinct else "questions that are in no test set"
                    raise ConfigError(
                        f"task: reasoning-gym's {name} gave only {len(found)} of the {count} {split} problems at level "
                        f"{self.level} that are {what}; ask for fewer of them, or for a wider range by its options"
                    )
            fruitless = 0
            if distinct:
                without.add(entry["question"])
            answer = entry["answer"] if isinstance(entry["answer"], str) else ""
            facts = {"dataset": name, "options": self.options[name], "entry": entry}
            label = str(index) if self.config.levels == 1 else f"{self.level}/{index}"
            found.append(Example(label, entry["question"], answer, facts))
        return found

    def _entries(self, name: str, split: str, seed: int) -> Iterator[dict[str, Any]]:
        """Instances one after the other. The package draws instance i from `seed + i`, so seeds must lie far apart."""
        first = noise.sequence_id(f"reasoning_gym/{split}/{name}/{self.level}/{seed}") % 2**31
        dataset = _dataset(name, {**self.options[name], "seed": first, "size": 2**31 - 1})
        for index in itertools.count():
            try:
                entry = dataset[index]
            except Exception as error:
                raise UserError(f"task: reasoning-gym's {name} failed at instance {index} ({first_line(error)})") from error
            yield {key: entry[key] for key in ("question", "answer", "metadata")}


def _options(name: str, config: ReasoningGymConfig, level: int) -> dict[str, Any]:
    """What the package's curriculum sets at a level, under the config's own options."""
    factory = _package().factory
    if name not in factory.DATASETS:
        version = importlib.metadata.version("reasoning-gym")
        near = difflib.get_close_matches(name, factory.DATASETS, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"task.datasets: reasoning-gym {version} has no data set {name}: the nearest is {near}; there are "
            f"{', '.join(sorted(factory.DATASETS))}"
        )
    given = config.datasets[name].options
    known = {field.name for field in dataclasses.fields(factory.DATASETS[name][1])} - {"seed", "size"}
    if unknown := sorted(given.keys() - known):
        raise ConfigError(f"task.datasets.{name}.options has no {unknown[0]}; there are {', '.join(sorted(known))}")
    if config.levels == 1:
        options = dict(given)
    else:
        if not factory.has_curriculum(name):
            raise ConfigError(f"task.levels must be 1 for reasoning-gym's {name}, which has no curriculum, got {config.levels}")
        curriculum = factory.create_curriculum(name)
        most = max(len(attribute.levels) for attribute in curriculum.attributes.values())
        if config.levels > most:
            raise ConfigError(f"task.levels must be at most {most}, the levels of reasoning-gym's {name}, got {config.levels}")
        curriculum.set_global_level(level)
        set_by_level = dataclasses.asdict(curriculum.generate_configuration())
        options = {key: value for key, value in set_by_level.items() if key in known} | given
    _dataset(name, options)
    return options


def _dataset(name: str, options: Mapping[str, Any]) -> Any:
    try:
        return _package().factory.create_dataset(name, **options)
    except Exception as error:  # assertions of the package, mostly
        raise ConfigError(f"task.datasets.{name}.options: reasoning-gym refuses {dict(options)} ({first_line(error)})") from error


def _package() -> Any:
    try:
        import reasoning_gym
    except ImportError as error:
        raise UserError(
            f"task.kind=reasoning_gym needs the package reasoning-gym ({first_line(error)}): pip install 'dllm-kernels[gym]'"
        ) from error
    return reasoning_gym


if __name__ == "__main__":
    main()
