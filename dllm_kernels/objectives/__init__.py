"""RL objectives: pure functions of small tensors, and how the engine drives them. One file per algorithm."""

from dllm_kernels.objective import Batch, Objective
from dllm_kernels.objectives.advantages import group_advantages
from dllm_kernels.objectives.bgpo import BGPO, bgpo

ALGORITHMS: dict[str, Objective] = {objective.name: objective for objective in (BGPO,)}

__all__ = ["ALGORITHMS", "BGPO", "Batch", "Objective", "bgpo", "group_advantages"]
