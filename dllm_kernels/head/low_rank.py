"""An adapter on the head, `W + s B A`: its first product `s h A^T`, an op of its own, whose result is a second pair with B.

The pair's product is added to each chunk of logits by the backends, so that neither `W + s B A` nor full logits are built.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dllm_kernels import checks
from dllm_kernels.backends.contract import ROW_BLOCK, HeadOptions

Pair = tuple[Tensor | None, Tensor | None]  # operands of the adapter: `[..., R]` and `[V, R]`


def check(given: Any, hidden: Tensor, weight: Tensor) -> None:
    """Raise TypeError or ValueError for what is no `low_rank` of this head."""
    if not isinstance(given, tuple) or len(given) != 3:
        raise TypeError(f"low_rank must be a tuple (A, B, scale), got {type(given).__name__}")
    down, up, scale = given
    checks.number("low_rank scale", scale)
    (vocabulary, hidden_size), rank = weight.shape, up.shape[-1] if isinstance(up, Tensor) and up.dim() else None
    for name, tensor, shape in (("low_rank A", down, [rank, hidden_size]), ("low_rank B", up, [vocabulary, None])):
        checks.dtype(name, tensor, checks.FLOATS)
        if type(tensor).__name__ == "DTensor":
            raise TypeError(f"{name} must be a plain tensor, got a DTensor: gather it first, with full_tensor()")
        checks.shape(name, tensor, shape)
        checks.same_device(name, tensor, "hidden", hidden)
    if not rank:
        raise ValueError(f"low_rank must have a rank of at least 1, got A {list(down.shape)} and B {list(up.shape)}")


def pair(hidden: Tensor, options: HeadOptions) -> Pair:
    """`s h A^T` of all rows, differentiable in both, and B; None without an adapter."""
    if options.low_rank is None:
        return None, None
    down_RH, up_VR, scale = options.low_rank
    projected: Tensor = project(hidden, down_RH, float(scale))
    return projected, up_VR


def _wide(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


@torch.library.custom_op("dllm_kernels::low_rank", mutates_args=(), schema="(Tensor hidden, Tensor down, float scale) -> Tensor")
def project(hidden: Tensor, down_RH: Tensor, scale: float) -> Tensor:
    """`scale * hidden down^T`, `[..., R]` in fp32 (fp64 for fp64), in whole row blocks: a row's bits depend on no other."""
    hidden_MH, dtype = hidden.reshape(-1, hidden.shape[-1]), _wide(hidden)
    out_MR = torch.empty(len(hidden_MH), len(down_RH), dtype=dtype, device=hidden.device)
    block_CH = torch.zeros(ROW_BLOCK, hidden.shape[-1], dtype=dtype, device=hidden.device)
    down_HR = down_RH.to(dtype).t() * scale
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, len(hidden_MH), ROW_BLOCK):
            rows_NH = hidden_MH[start : start + ROW_BLOCK]
            block_CH[: len(rows_NH)] = rows_NH
            out_MR[start : start + ROW_BLOCK] = (block_CH @ down_HR)[: len(rows_NH)]
    return out_MR.view(*hidden.shape[:-1], len(down_RH))


@project.register_fake
def _(hidden: Tensor, down_RH: Tensor, scale: float) -> Tensor:
    return hidden.new_empty((*hidden.shape[:-1], down_RH.shape[0]), dtype=_wide(hidden))


@torch.library.custom_op(
    "dllm_kernels::low_rank_backward",
    mutates_args=(),
    schema="(Tensor gradient, Tensor hidden, Tensor down, float scale, bool need_dhidden, bool need_ddown) -> (Tensor, Tensor)",
)
def project_backward(
    gradient: Tensor, hidden: Tensor, down_RH: Tensor, scale: float, need_dhidden: bool, need_ddown: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden and of down, in their dtypes, from that of `project`'s result; fp32 products and sums."""
    dtype, hidden_MH = _wide(hidden), hidden.reshape(-1, hidden.shape[-1])
    gradient_MR = gradient.reshape(-1, len(down_RH))
    dhidden_MH = torch.empty(hidden_MH.shape if need_dhidden else 0, dtype=hidden.dtype, device=hidden.device)
    ddown_RH = torch.zeros(down_RH.shape if need_ddown else 0, dtype=dtype, device=hidden.device)
    wide_RH = down_RH.to(dtype) * scale
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, len(hidden_MH), ROW_BLOCK):
            span = slice(start, start + ROW_BLOCK)
            rows_NR = gradient_MR[span].to(dtype)
            if need_dhidden:
                dhidden_MH[span] = rows_NR @ wide_RH
            if need_ddown:  # a row that nobody scored may hold anything, and 0 times NaN is NaN
                rows_NH = hidden_MH[span].to(dtype).masked_fill((rows_NR == 0).all(1, keepdim=True), 0.0)
                ddown_RH.addmm_(rows_NR.t(), rows_NH, alpha=scale)
    return (dhidden_MH.view(hidden.shape) if need_dhidden else dhidden_MH), ddown_RH.to(down_RH.dtype)


@project_backward.register_fake
def _(gradient: Tensor, hidden: Tensor, down_RH: Tensor, scale: float, need_dhidden: bool, need_ddown: bool) -> Any:
    return hidden.new_empty(hidden.shape if need_dhidden else 0), down_RH.new_empty(down_RH.shape if need_ddown else 0)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden, down_RH, ctx.scale = inputs
    ctx.save_for_backward(hidden, down_RH)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    hidden, down_RH = ctx.saved_tensors
    needs = ctx.needs_input_grad[:2]
    dhidden, ddown = project_backward(gradient, hidden, down_RH, ctx.scale, *needs)
    return dhidden if needs[0] else None, ddown if needs[1] else None, None


project.register_autograd(_backward, setup_context=_setup)


def flops(hidden: Tensor, down_RH: Tensor, scale: float, *, out_val: Any) -> int:
    """Of `project`."""
    return 2 * hidden.numel() * down_RH.shape[0]


def backward_flops(_: Tensor, hidden: Tensor, down_RH: Tensor, scale: float, *needs: bool, out_val: Any) -> int:
    """Of `project_backward`."""
    return 2 * hidden.numel() * down_RH.shape[0] * sum(needs)
