"""How the model is called: on a rollout's tokens, padded, packed, or with a cache, and on block-diffusion layouts.

Each layout of a rollout has `ids` (all tokens), `column_BL` (columns of the completions' tokens), `enter`, `write`, `hidden` (one
call of the model) and `rows` (the rows of its result that predict given completion tokens).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dllm_kernels import checks
from dllm_kernels.masks.layout import Layout
from dllm_kernels.masks.plan import MaskPlan
from dllm_kernels.model.block_attention import BlockMask, flex_mask
from dllm_kernels.model.headless import Body
from dllm_kernels.model.wrappers import unwrapped


@dataclass(frozen=True)
class Prompts:
    """Ids, and a bool mask of real tokens (None: all). Ragged prompts are padded on the right."""

    ids_BP: Tensor
    keep_BP: Tensor | None
    ragged: bool

    @property
    def lengths_B(self) -> Tensor:
        if self.keep_BP is None:
            return torch.full((len(self.ids_BP),), self.ids_BP.shape[1], device=self.ids_BP.device)
        return self.keep_BP.sum(-1)

    def part(self, span: Tensor) -> Prompts:
        return Prompts(self.ids_BP[span], None if self.keep_BP is None else self.keep_BP[span], self.ragged)

    def first_columns(self) -> Tensor:
        """First columns of the completions, `[B]`: after each ragged prompt, else all the same."""
        if self.ragged and self.keep_BP is not None:
            return self.lengths_B
        return torch.full((len(self.ids_BP),), self.ids_BP.shape[1], device=self.ids_BP.device)


def collect(prompts: Sequence[Tensor], width: int | None) -> Prompts:
    """Stack one-dimensional prompts, padded to `width` columns or to the longest prompt."""
    lengths = [len(prompt) for prompt in prompts]
    width = max(lengths) if width is None else width
    ids_BP = torch.stack([torch.nn.functional.pad(prompt, (0, width - len(prompt))) for prompt in prompts])
    if all(length == width for length in lengths):
        return Prompts(ids_BP, None, True)
    keep_BP = torch.arange(width, device=ids_BP.device) < torch.tensor(lengths, device=ids_BP.device)[:, None]
    return Prompts(ids_BP, keep_BP, True)


@dataclass(frozen=True)
class Lengths:
    """How many tokens each sequence generates: those asked for, and what lies between them and the end of their block."""

    lengths_B: Tensor
    widest: int  # at least the longest, in all micro-batches
    columns: int  # of prompts and completions together, in all micro-batches
    ragged: bool  # whether any is shorter than the widest
    # of a canvas, whose masks are what is generated: their columns `[B, widest]`, beyond `columns` where a sequence has fewer
    hole_BL: Tensor | None = None

    def part(self, span: Tensor) -> Lengths:
        hole_BL = None if self.hole_BL is None else self.hole_BL[span]
        return replace(self, lengths_B=self.lengths_B[span], hole_BL=hole_BL)

    def column_BL(self, prompts: Prompts) -> Tensor:
        """The columns of what is generated."""
        if self.hole_BL is not None:
            return self.hole_BL
        first_B = prompts.first_columns()
        return first_B[:, None] + torch.arange(self.widest, device=first_B.device)


def lengths_of(prompts: Prompts, length: int, block_length: int | None, *, fixed: bool) -> Lengths:
    """`length` tokens each; with the sequence's own blocks, the last one to its end. `fixed`: columns that do not
    depend on the prompts.
    """
    B, P = prompts.ids_BP.shape
    lengths_B = torch.full((B,), length, device=prompts.ids_BP.device)
    if block_length is None:
        return Lengths(lengths_B, length, P + length, False)
    lengths_B = lengths_B + -(prompts.lengths_B + length) % block_length
    widest = length + block_length - 1 if fixed else int(lengths_B.max())
    # prompts that begin in the first column end with a block of the same grid
    columns = P + length + -(P + length) % block_length if prompts.ragged else P + widest
    return Lengths(lengths_B, widest, columns, bool((lengths_B < widest).any()))


def holes_of(canvas: Prompts, mask_id: int) -> Lengths:
    """What is generated of a canvas: its masks."""
    hole_BP = canvas.ids_BP == mask_id
    if canvas.keep_BP is not None:
        hole_BP = hole_BP & canvas.keep_BP
    lengths_B, columns = hole_BP.sum(-1), hole_BP.shape[1]
    widest = int(lengths_B.max())
    place_L = torch.arange(widest, device=hole_BP.device)
    hole_BL = hole_BP.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[:, :widest]
    there_BL = place_L < lengths_B[:, None]
    return Lengths(lengths_B, widest, columns, not bool(there_BL.all()), torch.where(there_BL, hole_BL, columns + place_L))


class Padded:
    """One row per sequence; with `guidance`, a second half of rows with hidden prompts."""

    def __init__(
        self, body: Body, prompts: Prompts, lengths: Lengths, mask_id: int, shift: int, *, guidance: float = 0.0
    ) -> None:
        self.body, self.shift, self.guidance, self.mask_id = body, shift, guidance, mask_id
        length, self.columns = lengths.widest, lengths.columns  # places that a sequence lacks lie beyond them
        (B, P), device = prompts.ids_BP.shape, prompts.ids_BP.device
        self.ids = torch.cat([prompts.ids_BP, prompts.ids_BP.new_full((B, length), mask_id)], dim=1)
        self.column_BL = lengths.column_BL(prompts)
        there_BL = torch.arange(length, device=device) < lengths.lengths_B[:, None]
        self.completion_BW = torch.zeros(B, P + length, dtype=torch.bool, device=device).scatter(1, self.column_BL, there_BL)
        self.keep_BW: Tensor | None = None
        if prompts.keep_BP is not None or lengths.ragged:
            keep_BP = torch.ones_like(prompts.ids_BP, dtype=torch.bool) if prompts.keep_BP is None else prompts.keep_BP
            self.keep_BW = torch.nn.functional.pad(keep_BP, (0, length)) | self.completion_BW
            self.ids = torch.where(self.completion_BW, mask_id, self.ids)

    def enter(self, block: int) -> None:
        """Called before the first step of a block; only layouts with a cache care."""

    def write(self, who_A1: Tensor, place_AR: Tensor, token_AR: Tensor) -> None:
        self.ids[who_A1, self.column_BL[who_A1, place_AR]] = token_AR

    def hidden(self, who_A: Tensor | None) -> Tensor:
        who = slice(None) if who_A is None else who_A
        ids = self.ids[who, : self.columns]
        kwargs = {}
        if self.keep_BW is not None:
            kwargs["attention_mask"] = self.keep_BW[who, : self.columns].long()
        if self.guidance:
            completion = self.completion_BW[who, : self.columns]
            ids = torch.cat([ids, torch.where(completion, ids, self.mask_id)])
            kwargs = {name: torch.cat([mask, mask]) for name, mask in kwargs.items()}
        return self.body(ids, **kwargs)

    def rows(self, who_A: Tensor, place_AR: Tensor, *, whole: bool) -> Tensor:
        """Flat rows `[A, R]` of `hidden(who_A)`, or of `hidden(None)` if `whole`."""
        row_A = who_A if whole else torch.arange(len(who_A), device=who_A.device)
        return row_A[:, None] * self.columns + self.column_BL[who_A].gather(1, place_AR) - self.shift

    def pick(self, hidden: Tensor, row_N: Tensor) -> Tensor:
        return _guided(hidden, row_N, self.guidance)


class Shadowed(Padded):
    """A second copy of the active block, all of it masks: what the model says of each decided token without seeing it (WINO).

    A copy's row sees all tokens but the one that it stands for, and the other rows of the copy; nothing else sees the copy.
    """

    def __init__(self, body: Body, prompts: Prompts, lengths: Lengths, mask_id: int, block_length: int) -> None:
        super().__init__(body, prompts, lengths, mask_id, 0)
        self.block_length = block_length
        self.block_B = torch.zeros_like(lengths.lengths_B)  # set before each call
        self._lengths_B = lengths.lengths_B

    def hidden(self, who_A: Tensor | None) -> Tensor:
        who = slice(None) if who_A is None else who_A
        ids_AC, Q, C = self.ids[who, : self.columns], self.block_length, self.columns
        A, device = len(ids_AC), ids_AC.device
        place_AQ = self.block_B[who, None] * Q + torch.arange(Q, device=device)
        there_AQ = place_AQ < self._lengths_B[who, None]
        own_AQ = self.column_BL[who].gather(1, place_AQ.clamp(max=self.column_BL.shape[1] - 1)).clamp(max=C - 1)
        real_AC = torch.ones_like(ids_AC, dtype=torch.bool) if self.keep_BW is None else self.keep_BW[who, :C]
        sees = torch.cat([real_AC, there_AQ], 1)[:, None].expand(A, C + Q, C + Q).clone()
        sees[:, :C, C:] = False
        not_own_AQC = torch.ones(A, Q, C, dtype=torch.bool, device=device).scatter(2, own_AQ[:, :, None], False)
        sees[:, C:, :C] &= not_own_AQC
        position = torch.cat([torch.arange(C, device=device).expand(A, C), own_AQ], 1)
        ids = torch.cat([ids_AC, ids_AC.new_full((A, Q), self.mask_id)], 1)
        return self.body(ids, attention_mask=_additive(sees, self.body.model)[:, None], position_ids=position)

    def rows(self, who_A: Tensor, place_AR: Tensor, *, whole: bool) -> Tensor:
        row_A = who_A if whole else torch.arange(len(who_A), device=who_A.device)
        return row_A[:, None] * (self.columns + self.block_length) + self.column_BL[who_A].gather(1, place_AR)

    def shadow_rows(self, who_A: Tensor, *, whole: bool) -> Tensor:
        """Flat rows `[A, block_length]` of the copies."""
        row_A = who_A if whole else torch.arange(len(who_A), device=who_A.device)
        place_Q = torch.arange(self.block_length, device=who_A.device)
        return row_A[:, None] * (self.columns + self.block_length) + self.columns + place_Q


class Packed:
    """All sequences in one row without padding; positions restart and attention stays within a sequence.

    flash-attn's variable-length kernel finds the sequences by their positions; other kernels get a
    block-diagonal mask, which is as exact and no faster.
    """

    def __init__(self, body: Body, prompts: Prompts, lengths: Lengths, mask_id: int, shift: int) -> None:
        self.body, self.shift = body, shift
        canvas = Padded(body, prompts, lengths, mask_id, shift)
        ids_BC = canvas.ids[:, : canvas.columns]
        B, W = ids_BC.shape
        keep_BW = torch.ones_like(ids_BC, dtype=torch.bool) if canvas.keep_BW is None else canvas.keep_BW[:, :W]
        self.ids = ids_BC[keep_BW]
        width_B = keep_BW.sum(-1)
        self.sequence_M = torch.arange(B, device=width_B.device).repeat_interleave(width_B)
        self.start_B = width_B.cumsum(0) - width_B
        self.position_M = torch.arange(len(self.ids), device=width_B.device) - self.start_B[self.sequence_M]
        rank_BW = keep_BW.cumsum(-1) - 1
        self.column_BL = self.start_B[:, None] + rank_BW.gather(1, canvas.column_BL.clamp(max=W - 1))
        self.width_B = width_B
        self._flash = _implementation(body.model).startswith("flash")

    def enter(self, block: int) -> None:
        """As for padded layouts."""

    def write(self, who_A1: Tensor, place_AR: Tensor, token_AR: Tensor) -> None:
        self.ids[self.column_BL[who_A1, place_AR]] = token_AR

    def hidden(self, who_A: Tensor | None) -> Tensor:
        ids, position, sequence = self.ids, self.position_M, self.sequence_M
        if who_A is not None:
            keep = torch.isin(sequence, who_A)
            ids, position, sequence = ids[keep], position[keep], sequence[keep]
        kwargs: dict[str, Any] = {"position_ids": position[None]}
        if not self._flash:
            kwargs["attention_mask"] = _additive(sequence[:, None] == sequence, self.body.model)[None, None]
        return self.body(ids[None], **kwargs)

    def rows(self, who_A: Tensor, place_AR: Tensor, *, whole: bool) -> Tensor:
        columns_AR = self.column_BL[who_A].gather(1, place_AR) - self.shift
        if whole:
            return columns_AR
        width_A = self.width_B[who_A]
        return columns_AR - self.start_B[who_A][:, None] + (width_A.cumsum(0) - width_A)[:, None]

    def pick(self, hidden: Tensor, row_N: Tensor) -> Tensor:
        return hidden[0].index_select(0, row_N)


class Cached:
    """Block-causal models with a cache of finished blocks; blocks count from the start of the prompt.

    All sequences lie on one grid of blocks: prompts are padded on the left by whole blocks, so all
    completions begin in the same block. The first step of a block recomputes the block before it, whose keys
    and values are final by then: one call of the model per step. With shift every step does, since a block's
    first token is predicted by the row before it.
    """

    def __init__(
        self,
        body: Body,
        prompts: Prompts,
        lengths: Lengths,
        mask_id: int,
        block_length: int,
        *,
        shift: int,
        guidance: float,
    ) -> None:
        from transformers import DynamicCache

        self.body, self.block_length, self.shift = body, block_length, shift
        self.guidance, self.mask_id = guidance, mask_id
        canvas = Padded(body, prompts, lengths, mask_id, shift)
        B, W = canvas.ids.shape
        device = canvas.ids.device
        lengths_B = prompts.lengths_B
        blocks_B = lengths_B // block_length
        self.prompt_blocks = int(blocks_B.max())
        ends_B = lengths_B % block_length + lengths.lengths_B
        columns = (self.prompt_blocks + -(-int(ends_B.max()) // block_length)) * block_length
        keep_BW = torch.ones(B, W, dtype=torch.bool, device=device) if canvas.keep_BW is None else canvas.keep_BW
        offset_B = (self.prompt_blocks - blocks_B) * block_length
        grid_BW = offset_B[:, None] + keep_BW.cumsum(-1) - 1
        row_BW = torch.arange(B, device=device)[:, None].expand(B, W)
        self.ids = canvas.ids.new_zeros(B, columns)
        self.keep_BC = torch.zeros(B, columns, dtype=torch.bool, device=device)
        self.ids[row_BW[keep_BW], grid_BW[keep_BW]] = canvas.ids[keep_BW]
        self.keep_BC[row_BW[keep_BW], grid_BW[keep_BW]] = True
        self.column_BL = grid_BW.gather(1, canvas.column_BL)
        self.completion_BC = torch.zeros_like(self.keep_BC)
        self.completion_BC[row_BW[canvas.completion_BW], grid_BW[canvas.completion_BW]] = True
        self.position_BC = (torch.arange(columns, device=device) - offset_B[:, None]).clamp(min=0)
        self.cache = DynamicCache()
        self.cached = 0  # columns
        self.block = 0  # of the completion, set by `enter`
        self._window = 0

    def enter(self, block: int) -> None:
        self.block = block

    def write(self, who_A1: Tensor, place_AR: Tensor, token_AR: Tensor) -> None:
        self.ids[who_A1, self.column_BL[who_A1, place_AR]] = token_AR

    def hidden(self, who_A: Tensor | None) -> Tensor:
        first, last = self.cached, (self.prompt_blocks + self.block + 1) * self.block_length
        column_C = torch.arange(last, device=self.ids.device)
        query_Q = column_C[first:]
        sees_QC = column_C // self.block_length <= (query_Q // self.block_length)[:, None]
        # padding attends to itself, or its softmax would be empty
        sees_BQC = sees_QC & self.keep_BC[:, None, :last] | (query_Q[:, None] == column_C)
        self._window = first
        ids, position = self.ids[:, first:last], self.position_BC[:, first:last]
        mask = _additive(sees_BQC, self.body.model)[:, None]
        if self.guidance:
            ids = torch.cat([ids, torch.where(self.completion_BC[:, first:last], ids, self.mask_id)])
            position, mask = torch.cat([position, position]), torch.cat([mask, mask])
        hidden = self.body(ids, attention_mask=mask, position_ids=position, past_key_values=self.cache, use_cache=True)
        # the block is not final yet
        again = min(last, self.block_length * (2 if self.shift else 1))
        self.cached = last - again
        self.cache.crop(-again)
        return hidden

    def rows(self, who_A: Tensor, place_AR: Tensor, *, whole: bool) -> Tensor:
        width = (self.prompt_blocks + self.block + 1) * self.block_length - self._window
        return who_A[:, None] * width + self.column_BL[who_A].gather(1, place_AR) - self._window - self.shift

    def pick(self, hidden: Tensor, row_N: Tensor) -> Tensor:
        return _guided(hidden, row_N, self.guidance)


def _guided(hidden: Tensor, row_N: Tensor, guidance: float) -> Tensor:
    """Hidden states `[N, H]` of these rows, with guidance `h + guidance (h - h without prompt)` of the second half.

    The head is linear, so this is guidance of the logits.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    chosen_NH = flat.index_select(0, row_N)
    if not guidance:
        return chosen_NH
    without_NH = flat.index_select(0, row_N + len(flat) // 2).float()
    return (chosen_NH.float() + guidance * (chosen_NH.float() - without_NH)).to(flat.dtype)


def _additive(sees: Tensor, model: nn.Module) -> Tensor:
    """Additive mask as transformers takes it: 0 where a query sees a key, else the dtype's minimum."""
    dtype = next(model.parameters()).dtype
    return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill_(~sees, torch.finfo(dtype).min)


def _arguments(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """What a model's forward takes; with adapters that of the model which they are of, since theirs takes anything."""
    model = unwrapped(model)
    within = getattr(model, "get_base_model", None)
    return inspect.signature((within() if callable(within) else model).forward).parameters


def _implementation(model: nn.Module) -> str:
    """Which kernel of attention the model's configuration names; "" where none."""
    return str(getattr(getattr(unwrapped(model), "config", None), "_attn_implementation", ""))


def takes(body: Body, name: str) -> bool:
    """Whether the model's forward has an argument of this name."""
    return name in _arguments(body.model)


def takes_cache(body: Body) -> bool:
    return takes(body, "past_key_values")


# --- block diffusion ----------------------------------------------------------------------------------------

# where the configuration of a block-causal model states its block length, by model_type
BLOCK_LENGTHS = {"sdar": "block_size", "sdar_moe": "block_size", "fast_dllm_qwen": "bd_size"}


def block_diffusion(body: Body, layout: Layout, model_kwargs: Mapping[str, Tensor]) -> Tensor:
    """Hidden states `[R, T, H]` of a plan's layout; `[B, S, ...]` arguments of the model are extended to it."""
    return body(layout.ids_RT, **block_inputs(body.model, layout, model_kwargs))


def block_inputs(model: nn.Module, layout: Layout, model_kwargs: Mapping[str, Tensor]) -> dict[str, Any]:
    """Keywords of a model's call on a layout, beside its ids: positions, the mask, and what `model_kwargs` extend to."""
    declared, parameters, name = causal_block(model), _arguments(model), type(unwrapped(model)).__name__
    if declared not in (None, layout.block):
        raise ValueError(f"causal_block must be the model's {declared}, got a layout of {layout.block}")
    for argument, why in (("attention_mask", "says what each copy sees"), ("position_ids", "the copies repeat")):
        if argument not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            raise ValueError(f"model must take {argument}, which {why}, but {name} does not")
    if _implementation(model).startswith("flash_attention"):
        raise ValueError(
            f"model must attend by sdpa, eager or flex_attention, under a mask of four dimensions, but {name} does by "
            f"{_implementation(model)}, which takes none"
        )
    extended = {name: layout.extended(tensor) for name, tensor in model_kwargs.items() if name != "attention_mask"}
    if _implementation(model) == "flex_attention":
        mask = flex_mask(layout)
    else:
        mask = BlockMask.of(_additive(layout.sees, model)[:, None], layout)
    return {"attention_mask": mask, "position_ids": layout.position_RT, **extended}


def causal_block(model: nn.Module) -> int | None:
    """The block length of a block-causal model: its attribute `causal_block`, as the trainer's have it (None: it is none),
    else that of its configuration, where the kind of model is one of `BLOCK_LENGTHS`.
    """
    for module in model.modules():
        if "causal_block" in module.__dict__:
            return module.__dict__["causal_block"]
    config = getattr(unwrapped(model), "config", None)
    stated = getattr(config, BLOCK_LENGTHS.get(str(getattr(config, "model_type", "")), ""), None)
    return stated if isinstance(stated, int) else None


def check_block_length(model: nn.Module, length: int | None) -> None:
    """Raises ValueError where plans of this block length, None of no blocks, are not for the model."""
    declared = causal_block(model)
    if declared is not None and length != declared:
        raise ValueError(f"causal_block must be {declared}, the block length of the model, got {length}")


def check_blocks(model: nn.Module, plan: MaskPlan, model_kwargs: Mapping[str, Tensor]) -> None:
    """Raises ValueError where the plan's blocks are not the model's, or its padding is not the attention mask's."""
    declared = causal_block(model)
    if declared is not None and plan.causal_block is None:
        raise ValueError(
            f"plan must have causal_block={declared} for a block-causal model, which has never seen noise before a block: "
            "fed a noisy sequence, it would score each block given noisy history"
        )
    if plan.block_BS is None:
        return
    if declared is not None and plan.causal_block != declared:
        raise ValueError(f"causal_block must be the model's {declared}, got a plan of {plan.causal_block}")
    mask = model_kwargs.get("attention_mask")
    if mask is None or not checks.may_read(mask):
        return
    if mask.shape != plan.block_BS.shape:
        raise ValueError(
            f"attention_mask must have shape {list(plan.block_BS.shape)}, got {list(mask.shape)}: blocks make the rest"
        )
    if bool(((mask != 0) != (plan.block_BS >= 0)).any()):
        raise ValueError("attention_mask must be that of the plan: give it to make_mask_plan as attention_mask_BS")
