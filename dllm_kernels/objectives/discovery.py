"""Finds the algorithms: modules of this package that hold recipes, and the recipes of installed packages.

An installed package adds one by an entry point of the group `dllm_kernels.algorithms` whose name is the algorithm's and whose
object is its `Recipe`. It is loaded when it is asked for, never at import.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType

from dllm_kernels.objectives.recipe import Recipe

GROUP = "dllm_kernels.algorithms"


class AlgorithmError(ValueError):
    """An installed algorithm cannot be used, and why."""


def algorithm_modules(package: str, path: list[str]) -> list[ModuleType]:
    """Modules of a package that define a recipe, by name."""
    modules = [importlib.import_module(f"{package}.{found.name}") for found in pkgutil.iter_modules(path)]
    return [module for module in modules if recipes_of(module)]


def recipes_of(module: ModuleType) -> list[Recipe]:
    return [value for value in vars(module).values() if isinstance(value, Recipe)]


@functools.cache
def installed() -> dict[str, EntryPoint]:
    """By algorithm; read once per process (`installed.cache_clear()` forgets it)."""
    points: dict[str, EntryPoint] = {}
    for point in entry_points(group=GROUP):
        first = points.setdefault(point.name, point)
        if first.value != point.value:
            raise AlgorithmError(f"two entry points of {GROUP} are called {point.name}: {first.value} and {point.value}")
    return points


class Recipes(Mapping[str, Recipe]):
    """All recipes by name, this package's first.

    Raises AlgorithmError, naming the entry point, where an installed one cannot be loaded or has a name that is taken.
    """

    def __init__(self, own: list[Recipe]) -> None:
        self._own: dict[str, Recipe] = {}
        for recipe in own:
            if self._own.setdefault(recipe.name, recipe) is not recipe:  # a file may import another's
                raise ValueError(f"two algorithms are called {recipe.name}")

    def __getitem__(self, name: str) -> Recipe:
        points = self._points()
        return self._own[name] if name in self._own else _load(points[name])

    def __iter__(self) -> Iterator[str]:
        return iter([*self._own, *self._points()])

    def __len__(self) -> int:
        return len(self._own) + len(self._points())

    def _points(self) -> dict[str, EntryPoint]:
        for name in installed():
            if name in self._own:
                raise AlgorithmError(f"entry point {name} of {GROUP} has the name of an algorithm that dllm_kernels has itself")
        return installed()


def _load(point: EntryPoint) -> Recipe:
    try:
        recipe = point.load()
    except Exception as error:  # whatever a foreign package raises on import
        cause = (str(error).strip().splitlines() or [""])[0]
        raise AlgorithmError(f"entry point {point.name} of {GROUP} cannot be loaded ({type(error).__name__}: {cause})") from error
    if not isinstance(recipe, Recipe):
        raise AlgorithmError(f"entry point {point.name} of {GROUP} must be a Recipe, got {type(recipe).__name__}")
    if recipe.name != point.name:
        raise AlgorithmError(f"entry point {point.name} of {GROUP} must have its recipe's name, {recipe.name}")
    return recipe
