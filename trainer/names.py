"""One package with two names: `dllm_trainer` if installed, `trainer` in a checkout (`python -m trainer`).

The name that is imported first is the real one. The other resolves to the same module objects, so classes,
registries and `isinstance` agree in every process. Another package named `trainer` (PyPI has one) is left
alone.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import InspectLoader, Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import CodeType, ModuleType

NAMES = ("dllm_trainer", "trainer")
_FOLDER = Path(__file__).resolve().parent


class _Alias(Loader):
    """Loads a module by returning the one with the real name."""

    def __init__(self, real: ModuleSpec) -> None:
        self._real = real

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(self._real.name)
        self._real = module.__spec__ or self._real
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._real  # the import system replaced it by the alias's

    def get_code(self, name: str) -> CodeType | None:
        """What `python -m` runs."""
        loader = self._real.loader
        return loader.get_code(self._real.name) if isinstance(loader, InspectLoader) else None


class _OtherName(MetaPathFinder):
    def __init__(self, real: str, other: str) -> None:
        self._real, self._other = real, other

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        root, _, rest = name.partition(".")
        if root != self._other:
            return None
        if not rest and root == "trainer" and not _is_here(PathFinder.find_spec(name)):
            return None
        if rest and sys.modules.get(root) is not sys.modules[self._real]:
            return None
        real = importlib.util.find_spec(self._real + name[len(root) :])
        if real is None:
            return None
        is_package = real.submodule_search_locations is not None
        return importlib.util.spec_from_loader(name, _Alias(real), origin=real.origin, is_package=is_package)


def _is_here(spec: ModuleSpec | None) -> bool:
    return spec is not None and spec.origin is not None and Path(spec.origin).resolve().parent == _FOLDER


def share(real: str) -> None:
    """Called once by the package itself, with the name under which it is being imported."""
    other = NAMES[1 - NAMES.index(real)]
    sys.meta_path.insert(0, _OtherName(real, other))
