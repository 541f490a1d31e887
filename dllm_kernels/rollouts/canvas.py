"""What a rollout is to fill: tokens after prompts, or the masks of canvases."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dllm_kernels import checks
from dllm_kernels.model.layouts import Lengths, Prompts, collect, holes_of
from dllm_kernels.rollouts.samplers import Sampler


def make_canvas(ids: Tensor, holes: Sequence[tuple[int, int]], *, mask_id: int) -> Tensor:
    """Ids int64 `[S]` with masks in holes, each the columns `first` to `end - 1`: a prompt for `generate(length=None)`.

    Raises ValueError or TypeError naming the argument: for ids that hold mask_id, and for holes that are none, empty, outside
    or overlap.

    Example:
        >>> make_canvas(torch.tensor([3, 4, 5, 6, 7]), [(1, 2), (3, 5)], mask_id=9)
        tensor([3, 9, 5, 9, 9])
    """
    checks.count("mask_id", mask_id, 0)
    checks.dtype("ids", ids, [torch.int64])
    checks.shape("ids", ids, [None])
    if bool((ids == mask_id).any()):
        raise ValueError(f"ids must not hold mask_id={mask_id}, which marks the holes")
    if not isinstance(holes, (list, tuple)):
        raise TypeError(f"holes must be a list or tuple of (first, end), got {type(holes).__name__}")
    if len(holes) == 0:
        raise ValueError("holes must hold at least one (first, end), got none")
    if wrong := [hole for hole in holes if not _is_pair(hole)]:
        raise TypeError(f"holes must be pairs of ints, (first, end), got {wrong[0]!r}")
    found, before = ids.clone(), (0, 0)
    for hole in sorted(holes):
        first, end = hole
        if not 0 <= first < end <= len(ids):
            raise ValueError(f"holes must be (first, end) with 0 <= first < end <= {len(ids)}, got {hole}")
        if first < before[1]:
            raise ValueError(f"holes must not overlap, got {before} and {hole}")
        found[first:end] = mask_id
        before = hole
    return found


def _is_pair(hole: object) -> bool:
    return isinstance(hole, (list, tuple)) and len(hole) == 2 and all(type(edge) is int for edge in hole)


def check(
    prompt_ids: Tensor | Sequence[Tensor],
    attention_mask: Tensor | None,
    mask_id: int,
    width: int | None,
    length: int | Sequence[int] | None,
) -> tuple[Prompts, Lengths | None]:
    """The prompts; where lengths differ, or masks are to be filled, as canvases, with what is generated of them."""
    checks.count("mask_id", mask_id, 0)
    if length is None:
        prompts = _prompts(prompt_ids, attention_mask, width)
        canvas = prompts
    elif isinstance(length, int):
        prompts = _prompts(prompt_ids, attention_mask, width)
        _refuse_masks(prompts, mask_id)
        return prompts, None
    else:
        lengths = _lengths(length, len(prompt_ids))
        prompts = _prompts(prompt_ids, attention_mask, None)
        _refuse_masks(prompts, mask_id)
        canvas = _extended(prompt_ids, prompts, lengths, mask_id, width)
    holes = holes_of(canvas, mask_id)
    if bool((holes.lengths_B == 0).any()):
        without = (holes.lengths_B == 0).nonzero()[:, 0].tolist()
        raise ValueError(
            f"prompt_ids must hold mask_id={mask_id} in every canvas, where length=None says that masks are filled, got none in "
            f"{without[:5]}"
        )
    return canvas, holes


def _lengths(length: Sequence[int], prompts: int) -> list[int]:
    if not isinstance(length, (list, tuple)):
        raise TypeError(f"length must be an int, None, or a list of an int for each prompt, got {type(length).__name__}")
    if len(length) != prompts:
        raise ValueError(f"length must be one number for each of the {prompts} prompts, got {len(length)}")
    return [checks.count(f"length[{b}]", n) for b, n in enumerate(length)]


def _extended(
    prompt_ids: Tensor | Sequence[Tensor], prompts: Prompts, lengths: list[int], mask_id: int, width: int | None
) -> Prompts:
    """Prompts with so many masks behind each."""
    if not isinstance(prompt_ids, Tensor):
        rows = [torch.cat([ids, ids.new_full((n,), mask_id)]) for ids, n in zip(prompt_ids, lengths, strict=True)]
        if width is not None and width < (longest := max(map(len, rows))):
            raise ValueError(f"width must be at least the {longest} tokens of the longest prompt and its length, got {width}")
        return collect(rows, width)
    if width is not None:
        raise ValueError(f"width must be None where prompt_ids is a tensor, which has its own, got {width}")
    most = max(lengths)
    ids_BP = torch.nn.functional.pad(prompts.ids_BP, (0, most), value=mask_id)
    place_L = torch.arange(most, device=ids_BP.device)
    there_BL = place_L < torch.tensor(lengths, device=ids_BP.device)[:, None]
    keep_BP = torch.ones_like(prompts.ids_BP, dtype=torch.bool) if prompts.keep_BP is None else prompts.keep_BP
    return Prompts(ids_BP, torch.cat([keep_BP, there_BL], 1), False)


def all_steps(sampler: Sampler, longest: int, steps: int | None, block_length: int | None) -> int | None:
    """Steps of the longest sequence: `steps` for each of its blocks, where the sampler has blocks."""
    if sampler.blocks != "completion" or not sampler.scheduled or steps is None or block_length is None:
        return steps
    checks.count("block_length", block_length)
    if checks.count("steps", steps) > block_length:
        raise ValueError(
            f"steps (of a block, where length is not one int) must be at most block_length={block_length}, got {steps}"
        )
    return steps * -(-longest // block_length)


def check_options(
    canvas: Prompts, holes: Lengths, sampler: Sampler, *, shift: int, eos_id: int | None, cache: bool | str
) -> None:
    """Raises ValueError for what does not go with holes that may be anywhere."""
    if sampler.blocks == "sequence":
        raise ValueError(
            f"length must be an int for sampler={sampler.name!r}, whose model sees no block behind the active one: it fills what "
            "follows a prompt, to the end of a block"
        )
    if cache is not False:
        raise ValueError(f"cache must be False where length is not one int, as blocks of holes are in no window, got {cache!r}")
    real_BP = torch.ones_like(canvas.ids_BP, dtype=torch.bool) if canvas.keep_BP is None else canvas.keep_BP
    none_BW = real_BP.new_zeros(len(real_BP), holes.columns + holes.widest)  # places that a sequence lacks lie at the end
    hole_BP = none_BW.scatter(1, holes.hole_BL, True)[:, : holes.columns]  # type: ignore[arg-type]
    if shift and bool((hole_BP & (real_BP.cumsum(-1) <= shift)).any()):
        raise ValueError(f"prompt_ids must begin with {shift} given token(s) when shift={shift}, which no row predicts")
    if eos_id is not None and bool((real_BP & ~hole_BP & (hole_BP.cumsum(-1) > 0)).any()):
        raise ValueError(f"eos_id must be None where given tokens follow a mask, which an EOS would not end, got {eos_id}")


def _prompts(prompt_ids: Tensor | Sequence[Tensor], attention_mask: Tensor | None, width: int | None) -> Prompts:
    if isinstance(prompt_ids, Tensor):
        checks.dtype("prompt_ids", prompt_ids, [torch.int64])
        checks.shape("prompt_ids", prompt_ids, [None, None])
        if width is not None:
            raise ValueError(f"width must be None where prompt_ids is a tensor, which has its own, got {width}")
        if attention_mask is not None:
            checks.shape("attention_mask", attention_mask, list(prompt_ids.shape))
            checks.same_device("attention_mask", attention_mask, "prompt_ids", prompt_ids)
        prompts = Prompts(prompt_ids, None if attention_mask is None else attention_mask != 0, False)
    else:
        if attention_mask is not None:
            raise ValueError("attention_mask must be None where prompt_ids is a sequence of prompts, which are padded here")
        if not isinstance(prompt_ids, (list, tuple)):
            raise TypeError(f"prompt_ids must be a torch.Tensor or a list or tuple of them, got {type(prompt_ids).__name__}")
        for b, prompt in enumerate(prompt_ids):
            checks.dtype(f"prompt_ids[{b}]", prompt, [torch.int64])
            checks.shape(f"prompt_ids[{b}]", prompt, [None])
            checks.same_device(f"prompt_ids[{b}]", prompt, "prompt_ids[0]", prompt_ids[0])
        longest = max((len(prompt) for prompt in prompt_ids), default=0)
        if width is not None and checks.count("width", width) < longest:
            raise ValueError(f"width must be at least the longest prompt's {longest} tokens, got {width}")
        if prompt_ids:
            prompts = collect(prompt_ids, width)
    if len(prompt_ids) == 0:
        raise ValueError("prompt_ids must hold at least one sequence, got an empty batch")
    return prompts


def _refuse_masks(prompts: Prompts, mask_id: int) -> None:
    if checks.may_read(prompts.ids_BP):
        held_BP = prompts.ids_BP == mask_id
        if bool((held_BP if prompts.keep_BP is None else held_BP & prompts.keep_BP).any()):
            raise ValueError(f"prompt_ids must not hold mask_id={mask_id}; masks are filled with length=None")
