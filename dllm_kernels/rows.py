"""`Rows`: the selected rows of hidden states, made by mask plans and taken by the head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

_MISSING = cast(Tensor, None)


@dataclass(frozen=True)
class Rows:
    """N selected rows of hidden states `[K, B, S, H]` seen as `[K * B * S, H]`. Indices are unique.

    Mask plans fill in all fields. Those that a head does not read may be left out: all rows then belong to sequence 0 and
    sample 0, and weigh 1.

    Example:
        >>> rows = Rows(index=torch.tensor([2, 5]), target=torch.tensor([7, 1]))
        >>> len(rows), rows.weight
        (2, tensor([1., 1.]))
    """

    # int64 [N], flat row of the hidden states, shift resolved; of block-diffusion plans the token itself, see
    # `MaskPlan.layout`
    index: Tensor
    target: Tensor  # int64 [N]
    sequence: Tensor = _MISSING  # int64 [N], 0..B-1
    sample: Tensor = _MISSING  # int64 [N], 0..K-1
    weight: Tensor = _MISSING  # fp32 [N]
    # int64 [N], of given traces: the state that commits the token; of block-diffusion plans the rollout's step
    state: Tensor | None = None

    def __post_init__(self) -> None:
        for name, fill, dtype in (("sequence", 0, torch.int64), ("sample", 0, torch.int64), ("weight", 1, torch.float32)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, torch.full_like(self.index, fill, dtype=dtype))

    def __len__(self) -> int:
        return self.index.numel()
