"""The whole head suite once more, on every instruction set, with poison wherever a call finds memory that nobody has written.

The C++ engine's workspace is filled before every call, with NaN and with a number that no maximum or comparison drops;
results and PyTorch's own workspaces come from `torch.empty`, which PyTorch fills with NaN on request.
"""

from __future__ import annotations

import math

import pytest
import torch

from dllm_kernels.backends import cpu
from tests.head.head_callers import *  # noqa: F403
from tests.head.head_distillation import *  # noqa: F403
from tests.head.head_expectation import *  # noqa: F403
from tests.head.head_relations import *  # noqa: F403
from tests.head_suite import *  # noqa: F403
from tests.head_suite import Target

pytestmark = pytest.mark.slow
ISAS = cpu._C.supported_isas() if cpu.available() else []
CASES = [("reference", None, None), *(("cpu", isa, poison) for isa in ISAS for poison in (math.nan, 1e30))]


@pytest.fixture(params=CASES, ids=lambda case: "-".join(map(str, case)))
def backend(request, monkeypatch):
    name, isa, poison = request.param
    monkeypatch.setenv("DLLM_KERNELS_BACKEND", name)
    before = cpu.isa()
    torch.use_deterministic_algorithms(True)
    if isa is not None:
        cpu._C.set_isa(isa)
        cpu._C.poison_workspace(poison)
    try:
        yield Target(name, torch.device("cpu"))
    finally:
        torch.use_deterministic_algorithms(False)
        if isa is not None:
            cpu._C.poison_workspace(None)
            cpu._C.set_isa(before)
