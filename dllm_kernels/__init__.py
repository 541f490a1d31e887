"""Fused scoring, sampling and mask noise for reinforcement learning of masked diffusion language models."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

from dllm_kernels.accumulation.estimation import estimate_elbo
from dllm_kernels.accumulation.fitting import Fit, fit_passes
from dllm_kernels.accumulation.loop import accumulate
from dllm_kernels.accumulation.scores import score_samples
from dllm_kernels.head.distillation import distillation_loss
from dllm_kernels.head.expected_embedding import expected_embedding
from dllm_kernels.head.explain import explain
from dllm_kernels.head.sampling import sample_tokens
from dllm_kernels.head.scoring import head_backward, score_tokens
from dllm_kernels.losses import bgpo_loss, elbo_loss
from dllm_kernels.masks.make import make_mask_plan
from dllm_kernels.masks.plan import MaskPlan
from dllm_kernels.model.headless import headless
from dllm_kernels.noise import sequence_ids
from dllm_kernels.rollouts.generation import generate
from dllm_kernels.rollouts.rollout import Rollout
from dllm_kernels.rollouts.trajectories import select_steps, step_entropy, trajectory_logp, trajectory_rows
from dllm_kernels.rows import Rows
from dllm_kernels.version import __version__

if TYPE_CHECKING:
    from dllm_kernels import objectives

__all__ = [
    "Fit",
    "MaskPlan",
    "Rollout",
    "Rows",
    "__version__",
    "accumulate",
    "bgpo_loss",
    "distillation_loss",
    "elbo_loss",
    "estimate_elbo",
    "expected_embedding",
    "explain",
    "fit_passes",
    "generate",
    "head_backward",
    "headless",
    "make_mask_plan",
    "objectives",
    "sample_tokens",
    "score_samples",
    "score_tokens",
    "select_steps",
    "sequence_ids",
    "step_entropy",
    "trajectory_logp",
    "trajectory_rows",
]


def __getattr__(name: str) -> ModuleType:
    """`objectives` is imported when it is first wanted: the head and the losses do without it."""
    if name != "objectives":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return importlib.import_module("dllm_kernels.objectives")
