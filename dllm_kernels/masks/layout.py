"""The model's input of a block-diffusion plan: clean copies beside noisy ones, and where each scored row lies.

`[clean S | noisy_1 C' | ... | noisy_k C']`: a noisy copy holds the whole blocks from the first to the last
with a completion token. It sees the clean blocks strictly before each of its blocks, and that block of
itself, so k samples cost S + k C' tokens in one pass of the model, and all are exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dllm_kernels import checks
from dllm_kernels.masks import blocks
from dllm_kernels.rows import Rows

SPAN = 64  # columns of a copy that attention takes together


@dataclass(frozen=True, eq=False)
class Layout:
    """R inputs of T columns, made by `MaskPlan.layout`; a sequence has one input for every k samples.

    Plain tensors: what a model makes of them is its caller's affair.
    """

    ids_RT: Tensor
    position_RT: Tensor  # int64: ordinals of real tokens, the same in every copy; 0 at padding
    block_RT: Tensor  # int64: block of each column, -1 at padding
    column_RT: Tensor  # int64: the column of `[B, S]` that each column shows
    sequence_R: Tensor  # int64: the sequence of each input
    clean: int  # S
    copy: int  # C', the widest copy of the batch
    block: int  # b, tokens of a whole block
    # the M distinct rows of `[R * T]` that predict the N scored tokens, and which of them predicts each: with shift, the
    # clean row before a block predicts its first token for every sample
    index_M: Tensor
    target_M: Tensor
    row_N: Tensor

    @property
    def copies(self) -> int:
        """The most noisy copies of an input."""
        return (self.ids_RT.shape[1] - self.clean) // max(1, self.copy)

    @cached_property
    def sees(self) -> Tensor:
        """bool `[R, T, T]`: which columns (last dimension) each column sees. Padding sees itself alone."""
        T = self.ids_RT.shape[1]
        column_T = torch.arange(T, device=self.ids_RT.device)
        copy_T = torch.where(column_T < self.clean, 0, 1 + (column_T - self.clean) // max(1, self.copy))
        query, key = copy_T[:, None], copy_T
        block_q, block_k = self.block_RT[:, :, None], self.block_RT[:, None, :]
        before = (key == 0) & (block_k < block_q + (query == 0))
        own = (key == query) & (block_k == block_q)
        return ((before | own) & (block_k >= 0) & (block_q >= 0)) | (column_T[:, None] == column_T)

    @cached_property
    def spans(self) -> list[tuple[int, int, int, Tensor]]:
        """The parts of a copy in whole blocks, about `SPAN` columns each: (first column, last + 1, the clean columns
        that any of its rows may see, bool `[R, 1, columns, clean columns + columns]`: which of those and of its own).

        The same for every copy of an input.
        """
        R, S, C = len(self.ids_RT), self.clean, self.copy
        width = -(-SPAN // self.block) * self.block
        # of the first copy, which every input has
        column_RC, block_RC = self.column_RT[:, S : S + C], self.block_RT[:, S : S + C]
        clean_RS = self.block_RT[:, :S]
        found = []
        for first in range(0, C, width):
            last = min(first + width, C)
            query = block_RC[:, first:last, None]
            before = int(torch.where(block_RC[:, first:last] >= 0, column_RC[:, first:last], 0).max())
            key_RS = clean_RS[:, None, :before]
            sees_clean = (key_RS < query) & (key_RS >= 0)
            itself = torch.eye(last - first, dtype=torch.bool, device=query.device)
            sees_own = (query == query.transpose(1, 2)) & (query >= 0) | itself
            found.append((first, last, before, torch.cat([sees_clean, sees_own], dim=2).view(R, 1, last - first, -1)))
        return found

    def extended(self, values: Tensor) -> Tensor:
        """An argument of the model, `[B, S, ...]` or `[B, ...]`, for these inputs: `[R, T, ...]` or `[R, ...]`."""
        chosen = values[self.sequence_R]
        if chosen.dim() < 2 or chosen.shape[1] != self.clean:
            return chosen
        index = self.column_RT.view(*self.column_RT.shape, *[1] * (chosen.dim() - 2))
        return chosen.gather(1, index.expand(*self.column_RT.shape, *chosen.shape[2:]))


def input_tokens(shape: tuple[int, int, int], completion_BS: Tensor, block_BS: Tensor | None, copies: int) -> int:
    """Tokens that a model sees of K samples of B sequences, `copies` samples at once: B (S ceil(K / copies) + K C').

    Without blocks K B S. C' is that of the widest copy of the batch; samples without a scored row are counted too.
    """
    K, B, S = shape
    if block_BS is None:
        return K * B * S
    first_B1, last_B1 = blocks.span(completion_BS, block_BS)
    copy = int(((block_BS >= first_B1) & (block_BS <= last_B1)).sum(-1).max())
    return B * (-(-K // copies) * S + K * copy)


def make(
    rows: Rows,
    keep_N: Tensor | None,
    noisy_KBS: Tensor,
    input_ids_BS: Tensor,
    completion_BS: Tensor,
    block_BS: Tensor,
    *,
    length: int,
    copies: int | None,
    shift: int,
    edge: str,
) -> Layout:
    """See `MaskPlan.layout`; samples without a kept row get no copy."""
    (K, B, S), device = noisy_KBS.shape, noisy_KBS.device
    index_N, target_N, sample_N, sequence_N = rows.index, rows.target, rows.sample, rows.sequence
    if keep_N is not None:
        index_N, target_N, sample_N, sequence_N = (t[keep_N] for t in (index_N, target_N, sample_N, sequence_N))
    k = K if copies is None else min(K, checks.count("copies", copies))
    used_BK = torch.zeros(B, K, dtype=torch.bool, device=device)
    used_BK[sequence_N, sample_N] = True
    rank_BK = used_BK.cumsum(-1) - 1
    inputs_B = (used_BK.sum(-1) + k - 1) // k
    sequence_R = torch.arange(B, device=device).repeat_interleave(inputs_B)
    R, k = len(sequence_R), min(k, int(used_BK.sum(-1).max())) if B else 0
    input_BK = (inputs_B.cumsum(0) - inputs_B)[:, None] + rank_BK // max(1, k)
    copy_BK = rank_BK % max(1, k)
    sample_Rk = torch.full((R, k), -1, device=device)
    sample_Rk[input_BK[used_BK], copy_BK[used_BK]] = torch.arange(K, device=device).expand(B, K)[used_BK]

    first_B1, last_B1 = blocks.span(completion_BS, block_BS)
    inside_BS = (block_BS >= first_B1) & (block_BS <= last_B1)
    place_BS = inside_BS.cumsum(-1) - 1  # within the copy
    C = int(inside_BS[sequence_R].sum(-1).max()) if R else 0
    column_RC = inside_BS[sequence_R].to(torch.int8).argsort(dim=-1, descending=True, stable=True)[:, :C]
    there_RC = inside_BS[sequence_R].gather(1, column_RC)

    column_RkC = column_RC[:, None].expand(R, k, C)
    noisy_RkC = noisy_KBS[sample_Rk.clamp(min=0), sequence_R[:, None]].gather(2, column_RkC)
    block_RkC = torch.where(
        there_RC[:, None] & (sample_Rk >= 0)[:, :, None], block_BS[sequence_R].gather(1, column_RC)[:, None], -1
    )
    column_RT = torch.cat([torch.arange(S, device=device).expand(R, S), column_RkC.reshape(R, k * C)], dim=1)
    block_RT = torch.cat([block_BS[sequence_R], block_RkC.reshape(R, k * C)], dim=1)
    ids_RT = input_ids_BS[sequence_R].gather(1, column_RT)
    ids_RT[:, S:] = noisy_RkC.reshape(R, k * C)
    ordinal_BS = ((block_BS >= 0).cumsum(-1) - 1).clamp(min=0)

    token_N = index_N - (sample_N * B + sequence_N) * S
    row_N = token_N - shift
    in_copy_N = inside_BS[sequence_N, row_N]
    if edge == "clean":  # the token before a block is read where it is clean
        in_copy_N = in_copy_N & (block_BS[sequence_N, row_N] == block_BS[sequence_N, token_N])
    noisy_N = S + copy_BK[sequence_N, sample_N] * C + place_BS[sequence_N, row_N]
    index_N = input_BK[sequence_N, sample_N] * ids_RT.shape[1] + torch.where(in_copy_N, noisy_N, row_N)
    if shift and k > 1 and edge == "clean":
        index_M, row_N = torch.unique(index_N, return_inverse=True)
        target_M = torch.empty_like(index_M).scatter_(0, row_N, target_N)
        if bool((target_M[row_N] != target_N).any()):  # events of one token wrote several ids: a row predicts one
            given = noisy_KBS, input_ids_BS, completion_BS, block_BS
            return make(rows, keep_N, *given, length=length, copies=1, shift=shift, edge=edge)
    else:
        index_M, target_M, row_N = index_N, target_N, torch.arange(len(index_N), device=device)
    return Layout(
        ids_RT=ids_RT,
        position_RT=ordinal_BS[sequence_R].gather(1, column_RT),
        block_RT=block_RT,
        column_RT=column_RT,
        sequence_R=sequence_R,
        clean=S,
        copy=C,
        block=length,
        index_M=index_M,
        target_M=target_M,
        row_N=row_N,
    )
