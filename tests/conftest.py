"""Fixtures of all tests: the backends that run here, and hypothesis profiles."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.internal.conjecture import providers

from dllm_kernels import backends
from dllm_kernels.backends import cpu

# transformers copies a checkpoint's code there by the folder's name, in place, while other processes may read it
_code = tempfile.TemporaryDirectory(prefix="dllm-tests-code-")
os.environ["HF_MODULES_CACHE"] = _code.name

torch.set_num_threads(1)  # at these sizes a second thread only waits, and does so for long on a busy machine

# the same examples on every machine; HYPOTHESIS_PROFILE=explore looks for new ones
_quiet = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}
settings.register_profile("fixed", derandomize=True, max_examples=30, **_quiet)
settings.register_profile("few", derandomize=True, max_examples=5, **_quiet)  # where every shape costs a compilation
settings.register_profile("explore", max_examples=1000, **_quiet)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))
# one value in twenty is a constant out of the local modules imported so far, other ones in each process of pytest-xdist
if settings().derandomize and hasattr(providers, "_get_local_constants"):
    providers._get_local_constants = lambda: providers._local_constants
pytest.register_assert_rewrite(
    "tests.head_suite",
    "tests.head.head_relations",
    "tests.head.head_callers",
    "tests.head.head_several",
    "tests.head.head_distillation",
    "tests.head.head_expectation",
)

from tests.head_suite import Target  # noqa: E402 (its tests take the profile that is loaded when they are defined)


@pytest.fixture(params=[*backends.names(), *(["cuda"] if torch.cuda.is_available() else [])])
def backend(request, monkeypatch) -> Iterator[Target]:
    """Every backend that can run on this machine's CPU, forced by DLLM_KERNELS_BACKEND, and what a GPU's tensors select.

    The C++ engine finds NaN all over its workspace at every call.
    """
    if request.param == "cuda":
        monkeypatch.setenv("DLLM_KERNELS_VALIDATE", "1")  # the claims about bad values hold on a GPU on request alone
        device = torch.device("cuda", torch.cuda.current_device())
        yield Target(backends.for_device(device).NAME, device)
        return
    monkeypatch.setenv("DLLM_KERNELS_BACKEND", request.param)
    poisoned = cpu.available() and request.param == "cpu"
    if poisoned:
        cpu._C.poison_workspace(math.nan)
    yield Target(request.param, torch.device("cpu"))
    if poisoned:
        cpu._C.poison_workspace(None)
