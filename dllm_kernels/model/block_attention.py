"""Attention of block-diffusion inputs: a mask that knows its structure, and the parts of attention that exist.

In `[clean S | noisy_1 C' | ... | noisy_k C']` most of the (S + k C')^2 pairs see nothing. Clean rows see clean
keys; a noisy row sees clean keys before its block and its own block, so the pairs that exist grow with k, not
with its square. `BlockMask` is an ordinary mask for a model that does anything else with it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dllm_kernels.masks.layout import Layout

# what returns the same values in the same places, if shape and kind stay
_KEEP = {Tensor.to, Tensor.contiguous, Tensor.__getitem__, Tensor.detach, Tensor.expand, Tensor.type, Tensor.clone}


class BlockMask(Tensor):
    """A mask `[R, 1, T, T]`, bool or additive, of a layout; with it `scaled_dot_product_attention` is computed in parts.

    As an argument it travels through checkpointing and wrappers, where a patch of the function would be gone.
    """

    of_layout: Layout

    @staticmethod
    def of(mask: Tensor, layout: Layout) -> BlockMask:
        made = mask.as_subclass(BlockMask)
        made.of_layout = layout
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        source = args[0] if args and isinstance(args[0], BlockMask) else None
        if isinstance(result, BlockMask) and hasattr(result, "of_layout"):
            return result
        if func in _KEEP and source is not None and isinstance(result, Tensor) and result.shape == source.shape:
            return BlockMask.of(result, source.of_layout)
        return result.as_subclass(Tensor) if isinstance(result, BlockMask) else result


def flex_mask(layout: Layout) -> Any:
    """`torch.nn.attention.flex_attention.BlockMask` of a layout, `[R, 1, T, T]`, for a model that calls `flex_attention`:
    whole tiles that see nothing are not computed.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    S, C, block_RT = layout.clean, max(1, layout.copy), layout.block_RT

    def sees(r: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        block_q, block_k = block_RT[r, query], block_RT[r, key]
        copy_q, copy_k = (torch.where(column < S, -1, (column - S) // C) for column in (query, key))
        before = (copy_k == -1) & (block_k < block_q + (copy_q == -1).long())
        own = (copy_k == copy_q) & (block_k == block_q)
        return (before | own) & (block_k >= 0) & (block_q >= 0) | (query == key)

    R, T = block_RT.shape
    return create_block_mask(sees, B=R, H=None, Q_LEN=T, KV_LEN=T, device=str(block_RT.device))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` with a `BlockMask`; any other use of it is the ordinary one."""
    T = query.shape[-2]
    layout = attn_mask.of_layout if isinstance(attn_mask, BlockMask) else None
    plain = None if attn_mask is None else attn_mask.as_subclass(Tensor)
    fits = (
        layout is not None
        and query.dim() == 4
        and len(query) == len(layout.ids_RT)
        and T == key.shape[-2] == layout.ids_RT.shape[1]
    )
    if layout is None or plain is None or not fits or dropout_p or is_causal or layout.copies < 1:
        return functional.scaled_dot_product_attention(
            query, key, value, plain, dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if (groups := query.shape[1] // key.shape[1]) > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    S, scale = layout.clean, 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    clean = functional.scaled_dot_product_attention(
        query[:, :, :S], key[:, :, :S], value[:, :, :S], plain[:, :, :S, :S], scale=scale
    )
    return torch.cat([clean, _noisy(query, key, value, layout, scale)], dim=2)


def _noisy(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
    """The outputs of the noisy rows: each part of a copy meets the clean columns before its end, and itself."""
    (R, H, _, D), S, k, C = query.shape, layout.clean, layout.copies, layout.copy
    # [R * k, H, C, D]: copies as sequences of their own
    query, key_copy, value_copy = (
        t[:, :, S:].reshape(R, H, k, C, D).transpose(1, 2).reshape(R * k, H, C, D) for t in (query, key, value)
    )
    parts = []
    for first, last, before, sees in layout.spans:
        keys, values = (
            torch.cat([_repeated(clean[:, :, :before], k), own[:, :, first:last]], dim=2)
            for clean, own in ((key, key_copy), (value, value_copy))
        )
        mask = _repeated(sees, k)
        parts.append(functional.scaled_dot_product_attention(query[:, :, first:last], keys, values, mask, scale=scale))
    return torch.cat(parts, dim=2).view(R, k, H, C, D).transpose(1, 2).reshape(R, H, k * C, D)


def _repeated(tensor: Tensor, k: int) -> Tensor:
    """`[R, ...]` as `[R * k, ...]`."""
    return tensor[:, None].expand(-1, k, *tensor.shape[1:]).flatten(0, 1)
