"""Several targets per row, and the likeliest ids of a row: what every backend does with them on small tensors.

Among M given ids of a row, c the coefficients of their logp, e that of lse and t that of the entropy, the weighted sum has
with `D = sum c - e` the gradients `-D p_v - t p_v (log p_v + entropy)` by the final logits of all other ids, and
`c_v (1 - p_v) - (D - c_v) p_v - t p_v (log p_v + entropy)` by those of the given ones, where `1 - p = -expm1(logp)` keeps its
digits as p -> 1. So a backend scales a row by D, as with one target, and writes the few values in the places of the targets.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_kernels.backends.contract import HeadOptions

_PAIRS_AT_ONCE = 1 << 22  # of targets that are compared with each other


def first_of_equals(target_NM: Tensor) -> Tensor:
    """bool `[N, M]`: False where the same id stands before it in its row."""
    M = target_NM.shape[1]
    if M < 2:
        return torch.ones_like(target_NM, dtype=torch.bool)
    sorted_NM, order_NM = target_NM.sort(dim=1, stable=True)
    first_NM = torch.ones_like(target_NM, dtype=torch.bool)
    first_NM[:, 1:] = sorted_NM[:, 1:] != sorted_NM[:, :-1]
    return torch.empty_like(first_NM).scatter_(1, order_NM, first_NM)


def own_coefficients(target_NM: Tensor, coef_NM: Tensor) -> Tensor:
    """`[N, M]`: of each id its coefficients in the row together; equal ids have equal ones."""
    N, M = target_NM.shape
    if M < 2:
        return coef_NM
    own_NM = torch.empty_like(coef_NM, memory_format=torch.contiguous_format)
    step = max(1, _PAIRS_AT_ONCE // (M * M))
    for start in range(0, N, step):
        span = slice(start, start + step)
        same_NMM = target_NM[span, :, None] == target_NM[span, None, :]
        own_NM[span] = torch.where(same_NMM, coef_NM[span, None, :], 0.0).sum(-1)
    return own_NM


def target_gradient(
    logp_NM: Tensor, own_NM: Tensor, coef_N: Tensor, entropy_N: Tensor | None = None, entropy_coef_N: Tensor | None = None
) -> Tensor:
    """`[N, M]`: of the weighted sum by the final logits of the targets. `coef_N` is D, `own_NM` of `own_coefficients`."""
    p_NM = logp_NM.exp()
    gradient_NM = own_NM * -torch.expm1(logp_NM) - (coef_N[:, None] - own_NM) * p_NM
    if entropy_N is not None and entropy_coef_N is not None:
        of_entropy_NM = torch.where(p_NM > 0, -p_NM * (logp_NM + entropy_N[:, None]), 0.0)
        gradient_NM += of_entropy_NM * entropy_coef_N[:, None]
    return gradient_NM


def best_of(z_NV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Largest logits `[N, count]` of each row and their ids, in falling order; of equal ones the smaller ids come first.

    No value is read: `topk` says which logit is the last to count, and among its equals the first ones by id are taken.
    """
    least_N1 = z_NV.topk(count, dim=-1).values[:, -1:]
    above_NV, level_NV = z_NV > least_N1, z_NV == least_N1
    room_N1 = count - above_NV.sum(-1, keepdim=True, dtype=torch.int32)
    taken_NV = above_NV | (level_NV & (level_NV.cumsum(-1, dtype=torch.int32) <= room_N1))
    # exactly `count` of each row are taken: by rising ids, then stably by logits
    exact = torch.float32 if z_NV.shape[1] <= 1 << 24 else torch.float64
    rank_V = -torch.arange(z_NV.shape[1], dtype=exact, device=z_NV.device)
    id_NK = torch.where(taken_NV, rank_V, float("-inf")).topk(count, dim=-1).indices
    z_NK, order_NK = z_NV.gather(1, id_NK).sort(dim=-1, descending=True, stable=True)
    return z_NK, id_NK.gather(1, order_NK)


def final_logits(raw_NM: Tensor, target_NM: Tensor, options: HeadOptions) -> tuple[Tensor, Tensor]:
    """Final logits of a few ids per row, none of them excluded, and their slopes d final / d raw."""
    z_NM, temperature = raw_NM, options.temperature
    if options.bias is not None:
        z_NM = z_NM + options.bias.to(z_NM.dtype)[target_NM]
    slope_NM = torch.ones_like(raw_NM)
    if options.softcap is not None:
        tanh_NM = torch.tanh(z_NM / options.softcap)
        z_NM, slope_NM = options.softcap * tanh_NM, 1.0 - tanh_NM * tanh_NM
    scale = temperature[:, None] if isinstance(temperature, Tensor) else temperature
    return z_NM / scale, slope_NM / scale
