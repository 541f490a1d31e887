"""The passes over a slab of logits in plain PyTorch, float64 too: the specification of the other implementations.

Each has these two functions, and the `finish_` of `divergence.reference`. Slabs are dense `[v, N]` in the statistics' dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_kernels.backends.divergence.reference import _times, finish_
from dllm_kernels.backends.expectation.problem import Pull, Seen

__all__ = ["finish_", "pull", "soften"]


def soften(z_VN: Tensor, seen: Seen, out_VN: Tensor) -> Tensor:
    """`out = exp(z - top)`, where `top` is the largest logit of the slab and of those before; `seen` counts the slab then.

    Returns `[N]` by what sums below the top before are to be multiplied, 0 where nothing was before. `out` may be `z`.
    """
    top_N = torch.maximum(seen.top_N, z_VN.amax(0))
    base_N = torch.where(top_N == float("-inf"), 0.0, top_N)
    scale_N = (seen.top_N.double() - base_N.double()).exp()
    e_VN = (z_VN - base_N).exp_()
    seen.sum_N.mul_(scale_N).add_(e_VN.sum(0, dtype=torch.float64))
    seen.top_N.copy_(top_N)
    out_VN.copy_(e_VN)
    return scale_N.to(z_VN.dtype)


def pull(
    z_VN: Tensor,
    pull_VN: Tensor | None,
    top_N: Tensor,
    inverse_N: Tensor,
    of_rows: Pull | None,
    p_VN: Tensor | None,
    out_VN: Tensor | None,
) -> None:
    """`p = exp(z - top) * inverse`, and with `pull` `out = factor * p * (pull - mean) * (1 - (squeeze z)^2)`.

    `p` and `out` may lie where `z` and `pull` do. `inverse`: 1 / sum of exp(z - top).
    """
    probability_VN = (z_VN - top_N).exp_().mul_(inverse_N)
    if pull_VN is not None and of_rows is not None and out_VN is not None:
        whole_VN = _times(probability_VN, pull_VN - of_rows.mean_N).mul_(of_rows.factor_N)
        if of_rows.squeeze_N is not None:
            whole_VN = _times(whole_VN, 1.0 - (z_VN * of_rows.squeeze_N).square_())
        out_VN.copy_(whole_VN)
    if p_VN is not None:
        p_VN.copy_(probability_VN)
