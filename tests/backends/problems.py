"""Head problems as the tests of single backends take them."""

from __future__ import annotations

from dataclasses import replace

import torch

from dllm_kernels.backends.contract import HeadProblem, LowRank


def to_float64(problem: HeadProblem) -> HeadProblem:
    """The same problem in float64: what the reference makes of it is the truth."""

    def exact(value):
        return value.double() if isinstance(value, torch.Tensor) else value

    p, options = problem, problem.options
    options = replace(options, bias=exact(options.bias), temperature=exact(options.temperature))
    low = None if p.low_rank is None else LowRank(*(operand.double() for operand in p.low_rank))
    return replace(p, hidden_MH=p.hidden_MH.double(), weight_VH=p.weight_VH.double(), options=options, low_rank=low)
