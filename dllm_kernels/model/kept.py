"""Bidirectional models called on a window of columns, with the keys and values of all others as an earlier call made them.

Nothing of the model knows: the full call's `scaled_dot_product_attention` is watched, layer by layer, and in a call on a window
the kept keys and values of all columns, those of the window replaced, take the place of its own. The layer's own mask is kept
too, so padding and local attention stay as they were. Positions are given by `position_ids`, or, where a model counts its
columns itself (LLaDA), by its rotary module, which gets queries and keys laid out in full width.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from dllm_kernels.model.headless import Body
from dllm_kernels.model.layouts import Lengths, Padded, Prompts
from dllm_kernels.model.wrappers import unwrapped

KINDS = ("prefix", "dual")
_PROBE = 8  # columns of the call that tells whether a model can be called on a window


class KeptAttention(TorchFunctionMode):
    """The keys, values and masks `[A, ...]` of a full call's layers; as a context, the calls within record or use them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self.causal = False  # whether a layer's attention was causal by a flag, not by its mask
        self._column_AQ: Tensor | None = None  # None: record
        self._masks: dict[int, Tensor] = {}  # of the window, by the full call's
        self._layer = 0

    @contextmanager
    def recording(self) -> Iterator[None]:
        self.layers, self._column_AQ = [], None
        with self:
            yield

    @contextmanager
    def on(self, column_AQ: Tensor) -> Iterator[None]:
        """A call on these columns, whose keys and values replace the kept ones."""
        self._column_AQ, self._masks, self._layer = column_AQ, {}, 0
        with self:
            yield

    def keep(self, row_A: Tensor) -> None:
        """Only these sequences from now on."""
        masks: dict[int, Tensor] = {}

        def part(mask: Tensor | None) -> Tensor | None:
            if mask is None or len(mask) == 1:
                return mask
            return masks.setdefault(id(mask), mask[row_A])

        self.layers = [(key[row_A], value[row_A], part(mask)) for key, value, mask in self.layers]

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is functional.scaled_dot_product_attention:
            return self._attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *more: Any, **options: Any
    ) -> Tensor:
        if self._column_AQ is None:
            self.causal |= bool(options.get("is_causal")) or any(more[1:2])
            self.layers.append((key.clone(), value.clone(), attn_mask))  # values may be a view of something else
            return functional.scaled_dot_product_attention(query, key, value, attn_mask, *more, **options)
        if self._layer >= len(self.layers):
            raise ValueError("model must call its attention as often for a window as for a whole sequence")
        keys, values, mask = self.layers[self._layer]
        self._layer += 1
        for kept, own in ((keys, key), (values, value)):
            if kept.shape[1] != own.shape[1]:  # repeated for grouped queries, where there was a mask
                own = own.repeat_interleave(kept.shape[1] // own.shape[1], dim=1)
            index = self._column_AQ[:, None, :, None].expand_as(own)
            kept.scatter_(2, index, own)
        options["enable_gqa"] = query.shape[1] != keys.shape[1]
        return functional.scaled_dot_product_attention(query, keys, values, self._rows(mask), *more, **options)

    def _rows(self, mask: Tensor | None) -> Tensor | None:
        """The window's rows of a mask `[A or 1, heads or 1, S or 1, S]`."""
        if mask is None or mask.shape[-2] == 1:
            return mask
        if id(mask) not in self._masks:
            assert self._column_AQ is not None
            A, Q = self._column_AQ.shape
            wide = mask.expand(A, *mask.shape[1:])
            self._masks[id(mask)] = wide.gather(2, self._column_AQ[:, None, :, None].expand(A, wide.shape[1], Q, wide.shape[3]))
        return self._masks[id(mask)]


def window_call(body: Body, kept: KeptAttention, ids_AS: Tensor, column_AQ: Tensor) -> Tensor:
    """Hidden states `[A, Q, H]` of these columns of the ids, among the kept keys and values of the others."""
    with kept.on(column_AQ):
        return _placed_call(body, ids_AS.gather(1, column_AQ), column_AQ, ids_AS.shape[1])


def _placed_call(body: Body, ids_AQ: Tensor, column_AQ: Tensor, columns: int) -> Tensor:
    """The model's hidden states of these ids alone, in these columns of so many."""
    model = _inner(body.model)
    if _takes_positions(model):
        return body(ids_AQ, position_ids=column_AQ)
    with ExitStack() as stack:
        for module in _rotary_modules(model):
            wide, narrow = _in_columns(column_AQ, columns)
            stack.callback(module.register_forward_pre_hook(wide).remove)
            stack.callback(module.register_forward_hook(narrow).remove)
        return body(ids_AQ)


def _in_columns(column_AQ: Tensor, columns: int) -> tuple[Any, Any]:
    """Hooks of a module that turns queries and keys `[A, heads, Q, D]` by their columns: theirs are these."""

    def wide(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        full = []
        for t in args[:2]:
            index = column_AQ[:, None, :, None].expand_as(t)
            full.append(t.new_zeros(*t.shape[:2], columns, t.shape[3]).scatter(2, index, t))
        return (*full, *args[2:])

    def narrow(_module: nn.Module, _args: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        A, Q = column_AQ.shape
        index = column_AQ[:, None, :, None]
        return tuple(t.gather(2, index.expand(A, t.shape[1], Q, t.shape[3])) for t in output)

    return wide, narrow


def _inner(model: nn.Module) -> nn.Module:
    """The model whose forward has the parameters' names: peft's takes anything."""
    model = unwrapped(model)
    base = getattr(model, "get_base_model", None)
    return base() if callable(base) else model


def _takes_positions(model: nn.Module) -> bool:
    return "position_ids" in inspect.signature(model.forward).parameters


def _rotary_modules(model: nn.Module) -> list[nn.Module]:
    """Modules of OLMo's kind, one in each block, that take queries and keys and count their columns."""
    return [
        module
        for module in model.modules()
        if type(module).__name__ == "RotaryEmbedding" and list(inspect.signature(module.forward).parameters)[:2] == ["q", "k"]
    ]


_CHECKED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@torch.no_grad()
def check_kept(body: Body, name: str) -> None:
    """Raises ValueError, for the argument `name`, where a model's rows are not the same when only their window is called.

    Four calls on at most eight columns, once per model, and a look at their results. A window must have the rows of the whole,
    and other places must have other rows. The model has to be in eval mode.
    """
    model = unwrapped(body.model)
    if model in _CHECKED:
        return
    kind, config = type(_inner(model)).__name__, getattr(model, "config", None)
    refused = f"{name} must be False for {kind}: keys and values are kept from outside the model, and "
    ids = (torch.arange(_PROBE, device=body.parameter.device) % body.vocabulary)[None]
    kept = KeptAttention()
    with kept.recording():
        whole = body(ids)
    if not kept.layers:
        implementation = getattr(config, "_attn_implementation", None)
        raise ValueError(
            f"{refused}its attention (attn_implementation={implementation!r}) is not scaled_dot_product_attention; load it with "
            "attn_implementation='sdpa'"
        )
    if kept.causal:
        raise ValueError(f"{refused}its attention is causal")
    if not _takes_positions(_inner(model)) and not _rotary_modules(_inner(model)):
        raise ValueError(f"{refused}it takes no position_ids")
    window = torch.arange(2, 5, device=ids.device)[None]
    try:
        again = window_call(body, kept, ids, window)
        near, far = (_placed_call(body, ids[:, :2], ids.new_tensor([[0, place]]), _PROBE) for place in (1, 7))
    except (RuntimeError, IndexError) as error:
        raise ValueError(f"{refused}it cannot be called on a window: {error}") from error
    if torch.equal(near, far):
        raise ValueError(f"{refused}it ignores the position_ids it is given")
    difference = float((again - whole[:, 2:5]).double().norm() / whole[:, 2:5].double().norm())
    bound = {torch.float64: 1e-10, torch.float32: 1e-4}.get(whole.dtype, 3e-2)
    if not difference <= bound:
        raise ValueError(f"{refused}the rows of a window differ from those of the whole sequence by {difference:.2g}")
    _CHECKED.add(model)


class Kept(Padded):
    """Full calls at a block's first step and every `refresh` steps; between them, calls on the block alone ("dual") or on it and
    all that follows ("prefix"), and with shift on the row before them. An approximation: what lies outside was computed when the
    block had more masks.
    """

    def __init__(
        self,
        body: Body,
        prompts: Prompts,
        lengths: Lengths,
        mask_id: int,
        block_length: int,
        kind: str,
        refresh: int | None,
        *,
        shift: int = 0,
        guidance: float = 0.0,
        opening: bool = False,
    ) -> None:
        super().__init__(body, prompts, lengths, mask_id, shift, guidance=guidance)
        self.block_length, self.kind, self.refresh = block_length, kind, refresh
        # the row before a block predicts its first token, which a sampler with an opening has decided by then
        self._before = 0 if opening else shift
        self.block = 0
        self.age = -1  # calls since the last full one
        self._kept = KeptAttention()
        self._who_A: Tensor | None = None  # whose keys and values are kept; None: everyone's

    def enter(self, block: int) -> None:
        self.block, self.age = block, -1

    def hidden(self, who_A: Tensor | None) -> Tensor:
        self.age += 1
        if self.age == 0 or self.age == self.refresh:
            self.age, self._who_A = 0, who_A
            with self._kept.recording():
                return super().hidden(who_A)
        self._narrow(who_A)
        who = slice(None) if who_A is None else who_A
        ids_AS = self.ids[who, : self.columns]
        column_AQ = self._window(slice(None) if who_A is None else who_A)
        if self.guidance:
            completion = self.completion_BW[who, : self.columns]
            ids_AS = torch.cat([ids_AS, torch.where(completion, ids_AS, self.mask_id)])
            column_AQ = torch.cat([column_AQ, column_AQ])
        return window_call(self.body, self._kept, ids_AS, column_AQ)

    def _narrow(self, who_A: Tensor | None) -> None:
        """Drop the keys and values of sequences that have finished the block: those of a later step were in all earlier ones."""
        if who_A is None or (self._who_A is not None and len(self._who_A) == len(who_A)):
            return
        before_B = torch.arange(len(self.ids), device=who_A.device) if self._who_A is None else self._who_A
        place_B = torch.zeros(len(self.ids), dtype=torch.int64, device=who_A.device)
        place_B[before_B] = torch.arange(len(before_B), device=who_A.device)
        row_A = place_B[who_A]
        self._kept.keep(torch.cat([row_A, row_A + len(before_B)]) if self.guidance else row_A)
        self._who_A = who_A

    def _window(self, who: Tensor | slice) -> Tensor:
        """The columns `[A, Q]` that are computed."""
        first = self.block * self.block_length
        last = first + self.block_length if self.kind == "dual" else self.column_BL.shape[1]
        column_AQ = self.column_BL[who, first:last]
        before = torch.arange(-self._before, 0, device=column_AQ.device)
        return torch.cat([column_AQ[:, :1] + before, column_AQ], dim=1)

    def rows(self, who_A: Tensor, place_AR: Tensor, *, whole: bool) -> Tensor:
        if self.age == 0:
            return super().rows(who_A, place_AR, whole=whole)
        column_AQ = self._window(who_A)
        row_A = who_A if whole else torch.arange(len(who_A), device=who_A.device)
        place_AR = self.column_BL[who_A].gather(1, place_AR) - self.shift - column_AQ[:, :1]
        return row_A[:, None] * column_AQ.shape[1] + place_AR
