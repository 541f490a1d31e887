"""The passes of `reference` in C++, csrc/expectation.inc, for float32 slabs on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_kernels.backends import cpu
from dllm_kernels.backends.divergence.engine import finish_
from dllm_kernels.backends.expectation.problem import Pull, Seen

__all__ = ["finish_", "pull", "soften"]


def soften(z_VN: Tensor, seen: Seen, out_VN: Tensor) -> Tensor:
    """See `reference.soften`."""
    columns, rows = z_VN.shape
    scale_N = torch.empty(rows)
    addresses = seen.top_N.data_ptr(), seen.sum_N.data_ptr(), scale_N.data_ptr()
    cpu._C.expectation_soften(z_VN.data_ptr(), out_VN.data_ptr(), columns, rows, *addresses, torch.get_num_threads())
    return scale_N


def pull(
    z_VN: Tensor,
    pull_VN: Tensor | None,
    top_N: Tensor,
    inverse_N: Tensor,
    of_rows: Pull | None,
    p_VN: Tensor | None,
    out_VN: Tensor | None,
) -> None:
    """See `reference.pull`."""
    columns, rows = z_VN.shape
    mean, factor, squeeze = (cpu._address(x) for x in of_rows or (None, None, None))
    vectors = top_N.data_ptr(), inverse_N.data_ptr(), mean, factor, squeeze
    slabs = cpu._address(p_VN), cpu._address(out_VN)
    cpu._C.expectation_pull(z_VN.data_ptr(), cpu._address(pull_VN), columns, rows, *vectors, *slabs, torch.get_num_threads())
