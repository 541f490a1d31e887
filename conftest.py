"""Adapters are imported for their doctests only where the foreign package is installed; no test draws what another left."""

import random
from importlib.util import find_spec
from pathlib import Path

import numpy
import pytest
import torch

_FOREIGN = {
    "automodel": "nemo_automodel/recipes/dllm",
    "dllm": "dllm/core",  # another package of the field installs a `dllm` too
    "lm_eval": "lm_eval",
    "transformers": "transformers",
    "trl": "trl",
}


def installed(folder: str) -> bool:
    """Whether a package that has this folder is installed; imports nothing."""
    spec = find_spec(folder.partition("/")[0])
    return spec is not None and any((Path(place).parent / folder).is_dir() for place in spec.submodule_search_locations or ())


collect_ignore = [f"dllm_kernels/integrations/{file}.py" for file, folder in _FOREIGN.items() if not installed(folder)]


def _seed(value: int) -> None:
    random.seed(value)
    numpy.random.seed(value)
    torch.manual_seed(value)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Which tests ran before in this process, and what they drew, is pytest-xdist's choice."""
    _seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    """Once more, since a fixture of a whole file or session is made for the first of its tests alone."""
    _seed(1)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """pytest-xdist 3.8 tells its groups by node ids, which pytest 9.2 no longer lets it change: all fixtures of a group
    are then made in every process, without a word."""
    if getattr(config.option, "loadgroup", False) and hasattr(config, "workerinput"):
        for item in items:
            if item.get_closest_marker("xdist_group") and "@" not in item.nodeid:
                raise pytest.UsageError(
                    f"pytest {pytest.__version__} does not know the groups of pytest-xdist; install pytest<9.2"
                )
