"""RL objectives: pure functions of small tensors, and how the engine drives them. One file per algorithm."""

from collections.abc import Callable

from dllm_kernels.objective import Batch, Objective
from dllm_kernels.objectives import dmpo as _dmpo
from dllm_kernels.objectives import espo as _espo
from dllm_kernels.objectives import gdpo as _gdpo
from dllm_kernels.objectives import rspo as _rspo
from dllm_kernels.objectives import vrpo as _vrpo
from dllm_kernels.objectives import wd1 as _wd1
from dllm_kernels.objectives.advantages import group_advantages
from dllm_kernels.objectives.bgpo import BGPO, bgpo
from dllm_kernels.objectives.dmpo import dmpo, dmpo_objective, effective_sample_size, wdce_baseline, wdce_weights
from dllm_kernels.objectives.espo import espo, espo_objective
from dllm_kernels.objectives.gdpo import gdpo, gdpo_objective
from dllm_kernels.objectives.recipe import Recipe
from dllm_kernels.objectives.rspo import rspo, rspo_objective
from dllm_kernels.objectives.vrpo import vrpo, vrpo_objective
from dllm_kernels.objectives.wd1 import wd1, wd1_objective, wd1_weights

ALGORITHMS: dict[str, Objective] = {objective.name: objective for objective in (BGPO,)}

# by name; `FACTORIES[name](**RECIPES[name].defaults)` is the objective as published
FACTORIES: dict[str, Callable[..., Objective]] = {
    "dmpo": dmpo_objective,
    "espo": espo_objective,
    "gdpo": gdpo_objective,
    "rspo": rspo_objective,
    "vrpo": vrpo_objective,
    "wd1": wd1_objective,
}
RECIPES: dict[str, Recipe] = {
    recipe.name: recipe for recipe in (_dmpo.RECIPE, _espo.RECIPE, _gdpo.RECIPE, _rspo.RECIPE, _vrpo.RECIPE, _wd1.RECIPE)
}

__all__ = [
    "ALGORITHMS",
    "BGPO",
    "FACTORIES",
    "RECIPES",
    "Batch",
    "Objective",
    "Recipe",
    "bgpo",
    "dmpo",
    "dmpo_objective",
    "effective_sample_size",
    "espo",
    "espo_objective",
    "gdpo",
    "gdpo_objective",
    "group_advantages",
    "rspo",
    "rspo_objective",
    "vrpo",
    "vrpo_objective",
    "wd1",
    "wd1_objective",
    "wd1_weights",
    "wdce_baseline",
    "wdce_weights",
]
