# ruff: noqa: F403
"""RL objectives: pure functions of small tensors, and how engine and trainer drive them. One file per algorithm.

The files are found, not listed: a module here that holds a `Recipe` is an algorithm, and what its `__all__` names can be
imported from here. `RECIPES` has them by name, those of installed packages too (see `discovery`).
"""

from typing import TYPE_CHECKING

from dllm_kernels.accumulation.objective import Batch, Objective
from dllm_kernels.objectives.advantages import group_advantages
from dllm_kernels.objectives.discovery import AlgorithmError, Recipes, algorithm_modules, recipes_of
from dllm_kernels.objectives.recipe import Clip, Recipe, Trajectory
from dllm_kernels.objectives.update import Rewards, Signal, States, Update, advantage_signal, later_signal, signal_of

if TYPE_CHECKING:  # type checkers cannot follow what is found at run time; a file that is not here works all the same
    from dllm_kernels.objectives.bgpo import *
    from dllm_kernels.objectives.cj_grpo import *
    from dllm_kernels.objectives.coupled_grpo import *
    from dllm_kernels.objectives.d2 import *
    from dllm_kernels.objectives.diffu_grpo import *
    from dllm_kernels.objectives.dmpo import *
    from dllm_kernels.objectives.egspo import *
    from dllm_kernels.objectives.espo import *
    from dllm_kernels.objectives.gdpo import *
    from dllm_kernels.objectives.gdsd import *
    from dllm_kernels.objectives.justgrpo import *
    from dllm_kernels.objectives.mdpo import *
    from dllm_kernels.objectives.on_policy_distillation import *
    from dllm_kernels.objectives.rldf import *
    from dllm_kernels.objectives.rspo import *
    from dllm_kernels.objectives.spg import *
    from dllm_kernels.objectives.trace_rl import *
    from dllm_kernels.objectives.unigrpo import *
    from dllm_kernels.objectives.vrpo import *
    from dllm_kernels.objectives.wd1 import *

__all__ = [
    "RECIPES",
    "AlgorithmError",
    "Batch",
    "Clip",
    "Objective",
    "Recipe",
    "Rewards",
    "Signal",
    "States",
    "Trajectory",
    "Update",
    "advantage_signal",
    "group_advantages",
    "later_signal",
    "signal_of",
]

_found = algorithm_modules(__name__, __path__)  # noqa: F405 - the package's own
RECIPES = Recipes([recipe for module in _found for recipe in recipes_of(module)])
for _module in _found:
    _names = getattr(_module, "__all__", [])
    globals().update({name: getattr(_module, name) for name in _names})
    __all__ += _names


def __getattr__(name: str) -> Objective:
    """`GDPO`, `DIFFU_GRPO` and so on: the objective of every recipe as published, by its name in capitals."""
    if name.isupper() and name.lower() in RECIPES:
        return RECIPES[name.lower()].make()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
