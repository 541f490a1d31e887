"""The events of a rollout: who wrote what, when, over what. Any state is replayed from them, edits included."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Events:
    """E changes of tokens, by sequence, then step, then position; all detached."""

    sequence_E: Tensor  # int64
    step_E: Tensor  # int64: of the sequence, from 0
    position_E: Tensor  # int64: column of the rollout's ids
    old_id_E: Tensor  # int64: the mask id, or the token that was edited
    new_id_E: Tensor  # int64
    logp_E: Tensor  # fp32: of the new token in the state before the step, at temperature 1, nats
    entropy_E: Tensor  # fp32: of its row, likewise

    def __len__(self) -> int:
        return len(self.step_E)

    def tensors(self) -> list[Tensor]:
        return [getattr(self, f.name) for f in fields(self)]

    def at(self, index: Tensor) -> Events:
        """The events at these indices, or where a mask is True."""
        return Events(*(tensor[index] for tensor in self.tensors()))

    def writes(self, mask_id: int) -> Tensor:
        """bool `[E]`: a token was written, not taken back."""
        return (self.new_id_E != mask_id) | (self.old_id_E == mask_id)

    def ordered(self, columns: int) -> Events:
        """By (sequence, step, position); `columns` is the width of the rollout's ids."""
        steps = int(self.step_E.max()) + 1 if len(self) else 1
        return self.at(torch.argsort((self.sequence_E * steps + self.step_E) * columns + self.position_E, stable=True))

    def kept(self, index_N: Tensor, sequences: int) -> Events:
        """The events of these of the sequences, renumbered by their place in `index_N`."""
        place_B = torch.full((sequences,), -1, device=index_N.device)
        place_B[index_N] = torch.arange(len(index_N), device=index_N.device)
        part = self.at(place_B[self.sequence_E] >= 0)
        moved = Events(place_B[part.sequence_E], *part.tensors()[1:])
        return moved.at(torch.argsort(moved.sequence_E, stable=True))

    def last(self, shape: torch.Size) -> Tensor:
        """bool `[E]`: no later event changes the same token."""
        cell_E = self.sequence_E * shape[1] + self.position_E
        latest = torch.full((shape[0] * shape[1],), -1, device=cell_E.device)
        latest = latest.scatter_reduce(0, cell_E, self.step_E, "amax")
        return self.step_E == latest[cell_E]

    def levels(self, shape: torch.Size) -> list[Events]:
        """The first event of each token, the second events, and so on; no token occurs twice in one of them."""
        left, found = self, []
        while len(left):
            cell_E = left.sequence_E * shape[1] + left.position_E
            earliest = torch.full((shape[0] * shape[1],), torch.iinfo(torch.int64).max, device=cell_E.device)
            earliest = earliest.scatter_reduce(0, cell_E, left.step_E, "amin")
            first_E = left.step_E == earliest[cell_E]
            found.append(left.at(first_E))
            left = left.at(~first_E)
        return found

    def states(self, ids_BS: Tensor, before_BKS: Tensor) -> Tensor:
        """Ids `[B, K, S]` before the given step of each token; `ids_BS` are the final ones."""
        state_BKS = ids_BS[:, None].expand(before_BKS.shape).clone()
        for number, level in enumerate(self.levels(ids_BS.shape)):
            at = level.sequence_E, slice(None), level.position_E
            if number == 0:
                state_BKS[at] = level.old_id_E[:, None].expand(-1, before_BKS.shape[1])
            happened_EK = level.step_E[:, None] < before_BKS[at]
            state_BKS[at] = torch.where(happened_EK, level.new_id_E[:, None], state_BKS[at])
        return state_BKS
