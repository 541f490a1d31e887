"""The vendor's matrix products with fp32 results: logits, dH and dW of one chunk of rows."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from dllm_kernels.backends import reference


@functools.cache
def _mixed(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch multiplies this dtype into fp32 results, strided ones too: tried once. CUDA has it since torch 2.8."""
    if device.type != "cuda" or "dtype_out" not in torch.ops.aten.addmm.overloads():
        return False
    ones = torch.ones(16, 16, dtype=dtype, device=device)
    out = torch.zeros(16, 64, device=device)[:, :16]
    try:
        torch.mm(ones, ones.t(), out_dtype=torch.float32, out=out)
        torch.addmm(out, ones.t(), ones, out_dtype=torch.float32, out=out)
    except (RuntimeError, NotImplementedError, TypeError):
        return False
    return True


def _slabs(vocabulary: int, width: int) -> list[slice]:
    size = max(1, reference.SLAB_BYTES // (4 * width))
    return [slice(v, min(v + size, vocabulary)) for v in range(0, vocabulary, size)]


def logits_(out_CV: Tensor, hidden_CH: Tensor, weight_VH: Tensor) -> None:
    """out = hidden @ weight^T in fp32."""
    if hidden_CH.dtype == torch.float32:
        torch.mm(hidden_CH, weight_VH.t(), out=out_CV)
    elif _mixed(hidden_CH.device, hidden_CH.dtype):
        torch.mm(hidden_CH, weight_VH.t(), out_dtype=torch.float32, out=out_CV)
    else:
        hidden_CH = hidden_CH.float()
        for span in _slabs(*weight_VH.shape):
            torch.mm(hidden_CH, weight_VH[span].float().t(), out=out_CV[:, span])


def vectors(operand_CV: Tensor, weight_VH: Tensor) -> Tensor:
    """operand @ weight in fp32, whatever the operand: a split sum must not be rounded to 16 bits in between."""
    if operand_CV.dtype == torch.float32:
        return torch.mm(operand_CV, weight_VH)
    if _mixed(operand_CV.device, operand_CV.dtype):
        return torch.mm(operand_CV, weight_VH, out_dtype=torch.float32)
    out_CH = torch.zeros(len(operand_CV), weight_VH.shape[1], device=operand_CV.device)
    for span in _slabs(*weight_VH.shape):
        out_CH.addmm_(operand_CV[:, span].float(), weight_VH[span].float())
    return out_CH


def add_head_gradient(
    operand_CV: Tensor, hidden_CH: Tensor | None, dweight_VH: Tensor | None, dbias_V: Tensor | None, *, overwrite: bool
) -> None:
    """What these rows add to the fp32 gradients of weight and bias; with `overwrite` the buffers' old content is not read."""
    if dweight_VH is not None and hidden_CH is not None:
        operand_VC = operand_CV.t()
        if operand_CV.dtype == torch.float32:
            if overwrite:
                torch.mm(operand_VC, hidden_CH, out=dweight_VH)
            else:
                dweight_VH.addmm_(operand_VC, hidden_CH)
        elif _mixed(operand_CV.device, operand_CV.dtype):
            if overwrite:
                torch.mm(operand_VC, hidden_CH, out_dtype=torch.float32, out=dweight_VH)
            else:
                torch.addmm(dweight_VH, operand_VC, hidden_CH, out_dtype=torch.float32, out=dweight_VH)
        else:
            hidden_CH = hidden_CH.float()
            for span in _slabs(*dweight_VH.shape):
                part_VC = operand_VC[span].float()
                if overwrite:
                    torch.mm(part_VC, hidden_CH, out=dweight_VH[span])
                else:
                    dweight_VH[span].addmm_(part_VC, hidden_CH)
    if dbias_V is not None:
        if overwrite:
            torch.sum(operand_CV, 0, dtype=torch.float32, out=dbias_V)
        else:
            dbias_V += operand_CV.sum(0, dtype=torch.float32)
