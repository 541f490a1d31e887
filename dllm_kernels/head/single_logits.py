"""Final logits of one id per row, and their mean over all ids, by products with a few vectors: differentiable, without logits.

They give what is a simple function of them and of `logp` its gradient: `lse = z_y - logp`, and label smoothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_kernels.backends.contract import HeadOptions


def target_logits(hidden: Tensor, weight: Tensor, target_N: Tensor, rows: Tensor | None, options: HeadOptions) -> Tensor:
    """`[N]` in fp32 (fp64 for fp64): `softcap * tanh((h W_y^T + b_y) / softcap) / temperature`, with the adapter's share."""
    hidden_NH, dtype = _rows(hidden, rows)
    z_N = (hidden_NH * weight[target_N].to(dtype)).sum(-1)
    if options.low_rank is not None:
        down_RH, up_VR, scale = options.low_rank
        z_N = z_N + scale * ((hidden_NH @ down_RH.to(dtype).t()) * up_VR[target_N].to(dtype)).sum(-1)
    if options.bias is not None:
        z_N = z_N + options.bias[target_N].to(dtype)
    if options.softcap is not None:
        z_N = options.softcap * torch.tanh(z_N / options.softcap)
    return z_N / options.temperature


def mean_logits(hidden: Tensor, weight: Tensor, rows: Tensor | None, options: HeadOptions) -> Tensor:
    """`[N]` likewise: the mean over the ids that are not excluded. Linear in W, so raises ValueError for a softcap."""
    refuse_softcap(options)
    hidden_NH, dtype = _rows(hidden, rows)
    mean_H = _mean(weight, options, dtype)
    z_N = hidden_NH @ mean_H
    if options.low_rank is not None:
        down_RH, up_VR, scale = options.low_rank
        z_N = z_N + scale * (hidden_NH @ (down_RH.to(dtype).t() @ _mean(up_VR, options, dtype)))
    if options.bias is not None:
        z_N = z_N + _mean(options.bias, options, dtype)
    return z_N / options.temperature


def refuse_softcap(options: HeadOptions) -> None:
    if options.softcap is not None:
        raise ValueError(f"label_smoothing takes no softcap, whose mean logit is not linear in the weight, got {options.softcap}")


def _rows(hidden: Tensor, rows: Tensor | None) -> tuple[Tensor, torch.dtype]:
    hidden_NH = hidden.reshape(-1, hidden.shape[-1])
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return (hidden_NH if rows is None else hidden_NH[rows]).to(dtype), dtype


def _mean(of_ids: Tensor, options: HeadOptions, dtype: torch.dtype) -> Tensor:
    """Over the first dimension, ids that the options exclude left out; sums in `dtype`."""
    limit = len(of_ids) if options.valid_vocab is None else options.valid_vocab
    out = [token for token in dict.fromkeys(options.suppress) if token < limit]
    total = of_ids[:limit].sum(0, dtype=dtype)
    if out:
        total = total - of_ids[torch.tensor(out, device=of_ids.device)].sum(0, dtype=dtype)
    return total / (limit - len(out))
