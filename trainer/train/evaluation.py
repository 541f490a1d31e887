"""Right answers on examples that were not trained on, and what changed between two models on the very same examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dllm_kernels import Rollout, noise

from ..config import RolloutConfig
from ..tasks import Example
from .engines import engine_of
from .guards import guard_failures
from .setup import Setup

Figures = dict[str, Any]


def decodings(rollout: RolloutConfig) -> dict[str, RolloutConfig]:
    """How a model is evaluated: as the rollouts of training are drawn, and greedily."""
    return {"rollout": rollout, "greedy": rollout.model_copy(update={"temperature": 0.0})}


def evaluate(
    setup: Setup,
    name: str,
    examples: Sequence[Example],
    decoding: RolloutConfig,
    *,
    between: Callable[[int], None] | None = None,
    keep: int = 0,
    rewarded: bool = False,
) -> Figures:
    """Answer every example once; the noise depends on the example and not on the model, so two models can be paired.

    Returns `correct`, the share of right answers, the means of the task's metrics, the settings of `generate`, and `solved`, a
    string with a 1 or 0 per example; the same on all ranks. `between(done)` runs after each batch. With `keep`, `samples`
    are the answers to the first examples, see `records/samples.py`, and with `rewarded` their rewards.
    """
    task, ranks, batch = setup.task, setup.ranks, setup.config.evaluation.batch
    scores: dict[str, list[float]] = {key: [] for key in ("correct", *task.metrics)}
    settings: dict[str, Any] = {}
    samples: list[dict[str, Any]] = []
    for first in range(0, len(examples), batch):
        part = examples[first : first + batch]
        mine = part[ranks.share(len(part))]
        asked = mine or part[:1]  # every rank calls the model; whose share is empty throws the answer away
        sampled = engine_of(setup).generate(asked, noise.sequence_ids([f"{name}/{e.id}" for e in asked]), decoding=decoding)
        with ranks.together():
            guard_failures(sampled, asked)  # else a model that is broken would be one that answers nothing
            texts = setup.codec.texts(sampled.completion_BL)[: len(mine)]
            found = {key: list(metric(mine, texts)) for key, metric in (("correct", task.correct), *task.metrics.items())}
            kept = _samples(
                setup, mine[: max(0, keep - first - ranks.share(len(part)).start)], sampled, texts, found["correct"], rewarded
            )
        for told, theirs in ranks.tell((found, kept)):
            for key, values in told.items():
                scores[key] += values
            samples += theirs
        settings = sampled.settings
        if between is not None:
            between(len(part))
    means = {key: sum(values) / len(values) for key, values in scores.items()}
    solved = "".join("01"[int(value)] for value in scores["correct"])
    figures = {"examples": len(examples), **means, "decoding": settings, "solved": solved}
    return {**figures, "samples": [{"set": name, **sample} for sample in samples]} if keep else figures


def _samples(
    setup: Setup, examples: Sequence[Example], sampled: Rollout, texts: Sequence[str], correct: Sequence[float], rewarded: bool
) -> list[dict[str, Any]]:
    """One for each of these examples, which are the first rows of a rollout."""
    if not examples:
        return []
    rewards = setup.reward(examples, texts[: len(examples)]) if rewarded else [None] * len(examples)
    decode = setup.loaded.tokenizer.decode
    return [
        {
            "id": example.id,
            "prompt": example.prompt,
            "answer": example.answer,
            "completion": texts[row],
            "correct": bool(correct[row]),
            "reward": rewards[row],
            "tokens": [decode([token]) for token in sampled.completion_BL[row].tolist()],
            "steps": sampled.commit_step_BL[row].tolist(),
        }
        for row, example in enumerate(examples)
    ]


def is_whole(evaluation: Any, tests: Mapping[str, Sequence[Example]]) -> bool:
    """Whether what a file holds has the figures of all these tests."""
    try:
        sets = evaluation["sets"]
        for name, examples in tests.items():
            for way in ("rollout", "greedy"):
                figures = sets[name][way]
                texts = figures["solved"], figures["examples"]
                numbers = figures["correct"], figures["decoding"]["temperature"]
                if len(texts[0]) != len(examples) or texts[1] != len(examples) or not set(texts[0]) <= {"0", "1"}:
                    return False
                if not all(isinstance(number, float) for number in numbers):
                    return False
        return bool(sets.keys() == tests.keys())
    except (TypeError, LookupError, AttributeError):
        return False


def paired_gain(before: Figures, after: Figures) -> dict[str, float]:
    """Gain in `correct` with its 95 % interval from the paired differences of the examples (normal approximation)."""
    differences = [int(b) - int(a) for a, b in zip(before["solved"], after["solved"], strict=True)]
    n = len(differences)
    gain = sum(differences) / n
    variance = sum((d - gain) ** 2 for d in differences) / max(1, n - 1)
    half = 1.96 * math.sqrt(variance / n)
    return {"gain": gain, "low": gain - half, "high": gain + half}
