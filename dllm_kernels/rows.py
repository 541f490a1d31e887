"""`Rows`: the selected rows of hidden states, made by mask plans and taken by the head."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """N selected rows of hidden states `[K, B, S, H]` seen as `[K * B * S, H]`. Indices are unique."""

    index: Tensor  # int64 [N], flat row of the hidden states, shift resolved
    target: Tensor  # int64 [N]
    sequence: Tensor  # int64 [N], 0..B-1
    sample: Tensor  # int64 [N], 0..K-1
    weight: Tensor  # fp32 [N]

    def __len__(self) -> int:
        return self.index.numel()
