"""`Rows`: the selected rows of hidden states, made by mask plans and taken by the head."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """N selected rows of hidden states `[K, B, S, H]` seen as `[K * B * S, H]`. Indices are unique."""

    # int64 [N], flat row of the hidden states, shift resolved; of block-diffusion plans the token itself, see
    # `MaskPlan.layout`
    index: Tensor
    target: Tensor  # int64 [N]
    sequence: Tensor  # int64 [N], 0..B-1
    sample: Tensor  # int64 [N], 0..K-1
    weight: Tensor  # fp32 [N]
    # int64 [N], of given traces: the state that commits the token; of block-diffusion plans the rollout's step
    state: Tensor | None = None

    def __len__(self) -> int:
        return self.index.numel()
