"""An adapter on the head beside 16-bit operands, in which its own operands keep their digits as sums of several numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_kernels.backends.contract import HeadProblem, Low
from dllm_kernels.backends.reference import SLAB_BYTES, Adapter
from dllm_kernels.backends.triton import products

DIGITS = 3  # bfloat16 numbers that a float32 is the sum of
DEPTH = 16  # columns of the fused kernel's planes at a time


def planes_of(dtype: torch.dtype) -> int:
    """How many bfloat16 numbers one of this dtype is the sum of."""
    return {torch.bfloat16: 1, torch.float16: 2}.get(dtype, DIGITS)


def planes(x_MR: Tensor, count: int | None = None) -> Tensor:
    """`[count, M, R']` in bfloat16, R' = R in whole DEPTH: x rounded, what that left rounded, and so on; 0 beyond R.

    What is bfloat16 already, and fits, is not copied.
    """
    M, R = x_MR.shape
    count = planes_of(x_MR.dtype) if count is None else count
    if count == 1 and R % DEPTH == 0:
        return x_MR.contiguous()[None]
    found = torch.zeros(count, M, -(-R // DEPTH) * DEPTH, dtype=torch.bfloat16, device=x_MR.device)
    rest_MR = x_MR.float()
    for plane_MR in found[:, :, :R]:
        plane_MR.copy_(rest_MR)
        rest_MR = rest_MR - plane_MR
    return found


def fused_bytes(rows: int, vocabulary: int, low: Low) -> int:
    """Of the planes that a launch of the fused kernel reads."""
    copied = planes_of(low.dtype) if low.dtype != torch.bfloat16 or low.rank % DEPTH else 0
    return 2 * -(-low.rank // DEPTH) * DEPTH * (DIGITS * rows + copied * vocabulary)


class Walk(Adapter):
    """`reference.Adapter`, whose products with a chunk of 16-bit operands make no fp32 copy of the chunk."""

    def __init__(self, problem: HeadProblem, chunk: int) -> None:
        super().__init__(problem, chunk)
        self._weight_VP: Tensor | None = None

    def vectors(self, operand_CV: Tensor) -> Tensor:
        if not _by_parts(operand_CV):
            found_CR = operand_CV.new_zeros(len(operand_CV), self.weight_VR.shape[1], dtype=torch.float32)
            for span in _spans(operand_CV):
                found_CR.addmm_(operand_CV[:, span].float(), self.weight_VR[span])
            return found_CR
        if self._weight_VP is None:
            self._weight_VP = _parts(self.weight_VR, operand_CV.dtype)
        return products.vectors(operand_CV, self._weight_VP).unflatten(1, (-1, self.weight_VR.shape[1])).sum(1)

    def add_gradient(self, operand_NV: Tensor, dlow_VR: Tensor | None, *, overwrite: bool) -> None:
        if self.pair is None or dlow_VR is None:
            return
        hidden_NR = self.hidden_CR[: len(operand_NV)]
        if overwrite:
            dlow_VR.zero_()
        if not _by_parts(operand_NV):
            for span in _spans(operand_NV):
                dlow_VR[span].addmm_(operand_NV[:, span].t().float(), hidden_NR)
            return
        hidden_NP = _parts(hidden_NR, operand_NV.dtype)
        found_VP = dlow_VR.new_empty(len(dlow_VR), hidden_NP.shape[1])
        products.add_head_gradient(operand_NV, hidden_NP, found_VP, None, overwrite=True)
        for part_VR in found_VP.split(dlow_VR.shape[1], 1):
            dlow_VR += part_VR


def _by_parts(operand: Tensor) -> bool:
    """Whether the vendor multiplies these operands into fp32 itself; float16 has too few exponents to be split."""
    return operand.dtype == torch.float32 or (operand.dtype == torch.bfloat16 and products._mixed(operand.device, operand.dtype))


def _parts(x_MR: Tensor, dtype: torch.dtype) -> Tensor:
    """An operand of the adapter, of fp32, in the other operand's dtype: beside bfloat16 as two parts `[M, 2 R]`."""
    return x_MR if dtype == torch.float32 else planes(x_MR, 2)[:, :, : x_MR.shape[1]].permute(1, 0, 2).flatten(1)


def _spans(operand_CV: Tensor) -> list[slice]:
    """Of the vocabulary, whose operands are upcast at a time."""
    vocabulary, size = operand_CV.shape[1], max(1, SLAB_BYTES // (4 * max(len(operand_CV), 1)))
    return [slice(v, min(v + size, vocabulary)) for v in range(0, vocabulary, size)]
