"""Filling the middle: the number between what stands before it and what follows, as in 17+..=42, for models from scratch.

A model has to look at both sides. Careless demonstrations subtract digit by digit and forget to borrow, which matters in every
problem.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from dllm_kernels import noise
from dllm_kernels.noise import Stream

from ..errors import ConfigError
from .config import MiddleConfig
from .task import Example, Task

_LENGTH = 2  # digits
_HELD_OUT = 4  # one problem in so many


def make(config: MiddleConfig, *, seed: int) -> Task:
    return Task(
        name="middle",
        train=examples(config, "train", seed=seed),
        tests={"unseen": examples(config, "unseen", seed=seed)},
        rewards={"right": right, "digits": digits},
        correct=right,
        metrics={"digits": digits},
        completion_length=_LENGTH,
        alphabet="0123456789+=",
    )


def right(examples: Sequence[Example], completions: Sequence[str]) -> list[float]:
    """1 where the equation holds."""
    return [float(text == example.facts["middle"]) for example, text in zip(examples, completions, strict=True)]


def digits(examples: Sequence[Example], completions: Sequence[str]) -> list[float]:
    """The share of right digits."""
    pairs = zip(examples, completions, strict=True)
    return [sum(a == b for a, b in zip(example.facts["middle"], text, strict=False)) / _LENGTH for example, text in pairs]


def examples(config: MiddleConfig, name: str, *, seed: int) -> list[Example]:
    """Those of training are drawn, of a share of them the demonstrations are careless; those of the test come once each."""
    problems = [problem for problem in _problems() if _is_held_out(*problem) == (name != "train")]
    count = config.train_problems if name == "train" else config.test_problems
    if name != "train" and count > len(problems):
        raise ConfigError(f"task.test_problems must be at most {len(problems)}, the held-out problems, got {count}")
    sequence = torch.tensor(noise.sequence_id(f"middle/{name}"))
    draws = noise.uniform(noise.row_bits(seed, Stream.DATA, sequence, torch.arange(count)[:, None], torch.arange(2))).tolist()
    found = []
    for index, (which, quality) in enumerate(draws):
        before, middle = problems[int(which * len(problems)) if name == "train" else index]
        careless = name == "train" and quality < config.careless_share
        answer = _without_borrowing(before, middle) if careless else f"{middle}"
        found.append(Example(str(index), f"{before}+", answer, {"middle": f"{middle}"}, f"={before + middle}"))
    return found


@functools.cache
def _problems() -> list[tuple[int, int]]:
    """Numbers of two digits whose sum has two, where carelessness is wrong; in a fixed order that mixes them."""
    pairs = ((before, middle) for before in range(10, 90) for middle in range(10, 100 - before))
    wanted = [pair for pair in pairs if _without_borrowing(*pair) != str(pair[1])]
    return sorted(wanted, key=lambda pair: noise.sequence_id(f"middle/order/{pair[0]}+{pair[1]}"))


def _is_held_out(before: int, middle: int) -> bool:
    return noise.sequence_id(f"middle/{before}+{middle}") % _HELD_OUT == 0


def _without_borrowing(before: int, middle: int) -> str:
    """The sum minus what stands before it, each digit by itself."""
    return "".join(str((int(c) - int(a)) % 10) for a, c in zip(str(before), str(before + middle), strict=True))
