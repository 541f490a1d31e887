"""Adapters are imported for their doctests only where the foreign package is installed."""

import importlib.util

_FOREIGN = {"automodel": "nemo_automodel", "dllm": "dllm", "lm_eval": "lm_eval", "transformers": "transformers", "trl": "trl"}
collect_ignore = [
    f"dllm_kernels/integrations/{file}.py" for file, package in _FOREIGN.items() if importlib.util.find_spec(package) is None
]
