"""RL objectives: pure functions of small tensors, and how the engine drives them. One file per algorithm."""

from collections.abc import Callable

from dllm_kernels.accumulation.objective import Batch, Objective
from dllm_kernels.objectives import bgpo as _bgpo
from dllm_kernels.objectives import coupled_grpo as _coupled_grpo
from dllm_kernels.objectives import d2 as _d2
from dllm_kernels.objectives import diffu_grpo as _diffu_grpo
from dllm_kernels.objectives import dmpo as _dmpo
from dllm_kernels.objectives import egspo as _egspo
from dllm_kernels.objectives import espo as _espo
from dllm_kernels.objectives import gdpo as _gdpo
from dllm_kernels.objectives import rspo as _rspo
from dllm_kernels.objectives import spg as _spg
from dllm_kernels.objectives import trace_rl as _trace_rl
from dllm_kernels.objectives import unigrpo as _unigrpo
from dllm_kernels.objectives import vrpo as _vrpo
from dllm_kernels.objectives import wd1 as _wd1
from dllm_kernels.objectives.advantages import group_advantages
from dllm_kernels.objectives.bgpo import BGPO, bgpo, bgpo_objective
from dllm_kernels.objectives.coupled_grpo import coupled_grpo, coupled_grpo_objective, coupled_scores
from dllm_kernels.objectives.d2 import d2, d2_objective
from dllm_kernels.objectives.diffu_grpo import diffu_grpo, diffu_grpo_objective
from dllm_kernels.objectives.dmpo import dmpo, dmpo_objective, effective_sample_size, wdce_baseline, wdce_weights
from dllm_kernels.objectives.egspo import egspo, egspo_objective, egspo_sa_objective, stepwise_returns
from dllm_kernels.objectives.espo import espo, espo_objective
from dllm_kernels.objectives.gdpo import gdpo, gdpo_objective
from dllm_kernels.objectives.recipe import Recipe
from dllm_kernels.objectives.rspo import rspo, rspo_objective
from dllm_kernels.objectives.spg import spg, spg_objective
from dllm_kernels.objectives.trace_rl import trace_rl, trace_rl_objective
from dllm_kernels.objectives.unigrpo import unigrpo, unigrpo_objective
from dllm_kernels.objectives.vrpo import vrpo, vrpo_objective
from dllm_kernels.objectives.wd1 import wd1, wd1_objective, wd1_weights

ALGORITHMS: dict[str, Objective] = {objective.name: objective for objective in (BGPO,)}

# by name; `FACTORIES[name](**RECIPES[name].defaults)` is the objective as published
FACTORIES: dict[str, Callable[..., Objective]] = {
    "bgpo": bgpo_objective,
    "coupled_grpo": coupled_grpo_objective,
    "d2": d2_objective,
    "diffu_grpo": diffu_grpo_objective,
    "dmpo": dmpo_objective,
    "egspo": egspo_objective,
    "egspo_sa": egspo_sa_objective,
    "espo": espo_objective,
    "gdpo": gdpo_objective,
    "rspo": rspo_objective,
    "spg": spg_objective,
    "trace_rl": trace_rl_objective,
    "unigrpo": unigrpo_objective,
    "vrpo": vrpo_objective,
    "wd1": wd1_objective,
}
RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        _bgpo.RECIPE,
        _coupled_grpo.RECIPE,
        _d2.RECIPE,
        _diffu_grpo.RECIPE,
        _dmpo.RECIPE,
        _egspo.RECIPE,
        _egspo.RECIPE_SA,
        _espo.RECIPE,
        _gdpo.RECIPE,
        _rspo.RECIPE,
        _spg.RECIPE,
        _trace_rl.RECIPE,
        _unigrpo.RECIPE,
        _vrpo.RECIPE,
        _wd1.RECIPE,
    )
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
    "bgpo_objective",
    "coupled_grpo",
    "coupled_grpo_objective",
    "coupled_scores",
    "d2",
    "d2_objective",
    "diffu_grpo",
    "diffu_grpo_objective",
    "dmpo",
    "dmpo_objective",
    "effective_sample_size",
    "egspo",
    "egspo_objective",
    "egspo_sa_objective",
    "espo",
    "espo_objective",
    "gdpo",
    "gdpo_objective",
    "group_advantages",
    "rspo",
    "rspo_objective",
    "spg",
    "spg_objective",
    "stepwise_returns",
    "trace_rl",
    "trace_rl_objective",
    "unigrpo",
    "unigrpo_objective",
    "vrpo",
    "vrpo_objective",
    "wd1",
    "wd1_objective",
    "wd1_weights",
    "wdce_baseline",
    "wdce_weights",
]
