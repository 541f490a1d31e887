"""Block diffusion: the grid of blocks of a sequence, and the units that a law draws over.

A block-causal model denoises a block given the clean blocks before it, so level, count and weight are drawn
for every block. Its bound is `sum over blocks j of E[weight_j * sum over hidden l in j of log p(y_l | clean
blocks < j, noisy block j)]` (BD3-LM, arXiv 2503.09573).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ORIGINS = ("sequence", "completion")
EDGES = ("clean", "noisy")


def grid(real_BS: Tensor, completion_BS: Tensor, length: int, origin: str) -> Tensor:
    """int64 `[B, S]`: the block of each real token, from 0; -1 at padding.

    "sequence": blocks count from the first real token. "completion": a block begins at the first token of the
    completion, and the grid goes on to the left, where the prompt's first block may be short.
    """
    ordinal_BS = real_BS.cumsum(-1) - 1
    if origin == "completion":
        first_B1 = ordinal_BS.masked_fill(~completion_BS, torch.iinfo(torch.int64).max).amin(-1, keepdim=True)
        ordinal_BS = ordinal_BS + torch.where(completion_BS.any(-1, keepdim=True), -first_B1 % length, 0)
    return torch.where(real_BS, ordinal_BS // length, -1)


@dataclass(frozen=True, eq=False)
class Units:
    """The scorable tokens as a law draws over them: a unit is a completion, or one block of it.

    Units of a sequence follow each other, `U = B` or `B * blocks`; W is the width of the widest.
    """

    mask_UW: Tensor  # bool: there is a token
    token_UW: Tensor | None  # int64: ordinal of the token within the completion; None: within the unit, U = B
    block_U: Tensor  # int64, `[U]` or a scalar 0: ordinal of the block, from the first with a completion token
    lengths_U: Tensor  # int64: tokens per unit
    slot_BS: Tensor | None = None  # int64: place of each scorable token among those of its sequence's units; None: U = B
    column_UW: Tensor | None = None  # int64: the token's column in S, 0 where there is none

    def spread(self, values_KUW: Tensor) -> Tensor:
        """Values of the units' places at the tokens, `[K, B, S]`; arbitrary where nothing can be scored."""
        if self.slot_BS is None:
            return values_KUW
        B = len(self.slot_BS)
        return values_KUW.reshape(len(values_KUW), B, -1).gather(2, self.slot_BS.expand(len(values_KUW), -1, -1))

    def at_tokens(self, values_KU: Tensor) -> Tensor:
        """One value per unit at its tokens: `[K, B, S]`, or `[K, B, 1]` where a unit is a completion."""
        if self.slot_BS is None:
            return values_KU[:, :, None]
        B, W = len(self.slot_BS), self.mask_UW.shape[1]
        index_BS = self.slot_BS // W
        return values_KU.reshape(len(values_KU), B, -1).gather(2, index_BS.expand(len(values_KU), -1, -1))

    def gathered(self, values_KBS: Tensor) -> Tensor:
        """Values of the tokens at the units' places, `[K, U, W]`; arbitrary where there is no token."""
        if self.column_UW is None or self.slot_BS is None:
            return values_KBS
        K, B = len(values_KBS), len(self.slot_BS)
        return values_KBS.gather(2, self.column_UW.view(B, -1).expand(K, -1, -1)).view(K, *self.mask_UW.shape)

    def collect(self, values_KBS: Tensor) -> Tensor:
        """Sums `[K, U]` over each unit of values that are 0 or False where nothing can be scored; differentiable."""
        if self.slot_BS is None:
            return values_KBS.sum(-1)
        return self.gathered(values_KBS).masked_fill(~self.mask_UW, 0).sum(-1)


def whole(completion_BS: Tensor, lengths_B: Tensor) -> Units:
    """Completions as units."""
    zero = torch.zeros((), dtype=torch.int64, device=completion_BS.device)
    return Units(completion_BS, None, zero, lengths_B)


def by_block(completion_BS: Tensor, block_BS: Tensor, length: int) -> Units:
    """The blocks from the first with a completion token on as units; those without one are empty."""
    (B, S), device = completion_BS.shape, completion_BS.device
    blocks = -(-S // length) + 1  # as many as S tokens may touch: no host sync
    first_B1, _ = span(completion_BS, block_BS)
    column_S = torch.arange(S, device=device)
    ordinal_BS = (block_BS >= 0).cumsum(-1) - 1
    # where the grid begins, seen from the first real token: a whole block shows it
    origin_B1 = torch.where(block_BS >= 0, block_BS * length - ordinal_BS, 0).amax(-1, keepdim=True)
    within_BS = (ordinal_BS + origin_B1) % length
    slot_BS = torch.where(completion_BS, (block_BS - first_B1) * length + within_BS, 0)
    # the last place of the scatter takes what is no completion
    goal_BS = torch.where(completion_BS, slot_BS, blocks * length)
    source_BG = torch.full((B, blocks * length + 1), -1, device=device).scatter_(1, goal_BS, column_S.expand(B, -1))[:, :-1]
    mask_UW = (source_BG >= 0).view(-1, length)
    token_BG = (completion_BS.cumsum(-1) - 1).clamp(min=0).gather(1, source_BG.clamp(min=0))
    block_U = torch.arange(blocks, device=device).repeat(B)
    return Units(mask_UW, token_BG.view(-1, length), block_U, mask_UW.sum(-1), slot_BS, source_BG.clamp(min=0).view(-1, length))


def span(completion_BS: Tensor, block_BS: Tensor) -> tuple[Tensor, Tensor]:
    """First and last block with a completion token, int64 `[B, 1]` each; the last is below the first where there is none."""
    last_B1 = torch.where(completion_BS, block_BS, -1).amax(-1, keepdim=True)
    first_B1 = torch.where(completion_BS, block_BS, torch.iinfo(torch.int32).max).amin(-1, keepdim=True)
    return first_B1, last_B1
