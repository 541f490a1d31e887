"""Adapters are imported for their doctests only where the foreign package is installed."""

from importlib.util import find_spec
from pathlib import Path

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
