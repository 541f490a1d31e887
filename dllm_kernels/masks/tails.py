"""What follows the first EOS of a completion: where it is, and whether a model sees what its plan took away."""

from __future__ import annotations

from torch import Tensor

from dllm_kernels import checks


def eos_tail(input_ids_BS: Tensor, completion_mask_BS: Tensor, eos_id: int) -> Tensor:
    """bool `[B, S]`: the tokens of each completion after its first EOS.

    Example:
        >>> import torch
        >>> ids = torch.tensor([[7, 1, 7, 2, 7]])
        >>> eos_tail(ids, torch.tensor([[False, True, True, True, True]]), 7)
        tensor([[False, False, False,  True,  True]])
    """
    eos_BS = completion_mask_BS & (input_ids_BS == checks.count("eos_id", eos_id, 0))
    return completion_mask_BS & (eos_BS.cumsum(-1) - eos_BS.long() > 0)


def check_removed(removed_BS: Tensor | None, attention_mask: Tensor | None) -> None:
    """Raises ValueError where a model would see tokens that `make_mask_plan(tail="removed")` counts as padding.

    Args:
        removed_BS: `plan.removed_BS`, bool `[B, S]`; None: the plan removes nothing.
        attention_mask: what the model is called with: `[B, S]`, nonzero at what is seen; or of pairs, `[B, S, S]` or
            `[B, heads, S, S]`, bool or integers (nonzero: seen) or additive floats (-10000 and less: not seen),
            where the rows of removed tokens may see anything; None: everything is seen.

    Reads values on a GPU too: the number would be wrong without a sign of it, and the plan's rows stall the stream anyway.

    Example:
        >>> import torch
        >>> removed_BS = torch.tensor([[False, False, True]])
        >>> check_removed(removed_BS, torch.tensor([[1, 1, 0]]))
    """
    if removed_BS is None:
        return
    B, S = removed_BS.shape
    if attention_mask is None:
        shown_BS = removed_BS
    elif list(attention_mask.shape) == [B, S]:
        shown_BS = removed_BS & (attention_mask != 0)
    elif attention_mask.dim() in (3, 4) and (len(attention_mask), *attention_mask.shape[-2:]) == (B, S, S):
        sees = attention_mask > -1e4 if attention_mask.is_floating_point() else attention_mask != 0
        sees_BSS = sees if sees.dim() == 3 else sees.any(1)
        shown_BS = removed_BS & (sees_BSS & ~removed_BS[:, :, None]).any(1)
    else:
        raise ValueError(
            f"attention_mask must have shape [{B}, {S}], [{B}, {S}, {S}] or [{B}, heads, {S}, {S}] for a plan with "
            f"tail='removed', got {list(attention_mask.shape)}"
        )
    if bool(shown_BS.any()):
        raise ValueError(
            f"attention_mask must leave out what follows the first EOS, as the plan does with tail='removed', "
            f"got {'none' if attention_mask is None else 'one'} that shows {int(shown_BS.sum())} token(s) of it"
        )
