"""Solved puzzles by the rules, and what changed between two models on the very same puzzles."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from dllm_kernels import generate, noise
from trainer.config import RolloutConfig
from trainer.sudoku import Puzzles, keeps_clues, reference_cells, valid
from trainer.tokenizer import Codec

Figures = dict[str, Any]


def decodings(rollout: RolloutConfig) -> dict[str, RolloutConfig]:
    """How a model is evaluated: as the rollouts of training are drawn, and greedily."""
    return {"rollout": rollout, "greedy": rollout.model_copy(update={"temperature": 0.0})}


def evaluate(
    model: PreTrainedModel,
    data: Puzzles,
    codec: Codec,
    decoding: RolloutConfig,
    *,
    seed: int,
    batch: int,
    between: Callable[[int], None] | None = None,
) -> Figures:
    """Solve every puzzle once; the noise depends on the puzzle and not on the model, so two models can be paired.

    Returns shares in 0..1 (`valid`: solved with the clues kept; `reference_cells`: the d1 figure; `clues_kept`), the
    settings of `generate`, and `solved`, a string with a 1 or 0 per puzzle. `between(done)` runs after each batch.
    """
    filled = []
    settings: dict[str, Any] = {}
    for first in range(0, len(data), batch):
        index = range(first, min(first + batch, len(data)))
        sampled = generate(
            model,
            codec.prompt_ids(data.puzzles[first : first + batch]),
            length=data.puzzles.shape[1],
            mask_id=codec.mask_id,
            seed=seed,
            sequence_ids=noise.sequence_ids([f"{data.name}/{i}" for i in index]),
            **decoding.model_dump(),
        )
        filled.append(codec.digits(sampled.completion_BL))
        settings = sampled.settings
        if between is not None:
            between(len(index))
    answers = torch.cat(filled)
    solved = valid(data.puzzles, answers)
    return {
        "puzzles": len(data),
        "valid": solved.float().mean().item(),
        "reference_cells": reference_cells(data.puzzles, answers, data.solutions).mean().item(),
        "clues_kept": keeps_clues(data.puzzles, answers).all(-1).float().mean().item(),
        "decoding": settings,
        "solved": "".join("01"[int(one)] for one in solved),
    }


def paired_gain(before: Figures, after: Figures) -> dict[str, float]:
    """Gain in `valid` with its 95 % interval from the paired differences of the puzzles (normal approximation)."""
    differences = [int(b) - int(a) for a, b in zip(before["solved"], after["solved"], strict=True)]
    n = len(differences)
    gain = sum(differences) / n
    variance = sum((d - gain) ** 2 for d in differences) / max(1, n - 1)
    half = 1.96 * math.sqrt(variance / n)
    return {"gain": gain, "low": gain - half, "high": gain + half}
