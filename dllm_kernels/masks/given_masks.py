"""Masks that the caller has drawn, as a `MaskPlan`: law `given`, for loops whose noise is not ours."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dllm_kernels import checks
from dllm_kernels.masks.laws import Law
from dllm_kernels.masks.plan import MaskPlan

# nothing is drawn: levels, pairs and strata are the caller's
LAW = Law("given", "steps", "independent", "1", "mean", False, "drawn by the caller")


@dataclass(frozen=True, eq=False, kw_only=True)
class GivenPlan(MaskPlan):
    """A plan of given masks; all that reads plans takes it. The score of a sequence is the mean over its samples."""

    given_BKS: Tensor
    given_weight_BK: Tensor
    given_weight_BKS: Tensor | None = None  # of plans of blocks, whose weights may differ: one of each block at its tokens

    @cached_property
    def rule(self) -> Law:
        return LAW

    @cached_property
    def _hidden_KBS(self) -> Tensor:
        return self.given_BKS.transpose(0, 1)[self.sample_K]

    @cached_property
    def scored(self) -> Tensor:
        return self._hidden_KBS

    @cached_property
    def _weight_KU(self) -> Tensor:
        weight_KB = self.given_weight_BK.t()[self.sample_K]
        if self.block_BS is None:
            return weight_KB
        if self.given_weight_BKS is None:
            return weight_KB.repeat_interleave(len(self.units.lengths_U) // max(1, len(self.lengths_B)), dim=1)
        return _of_blocks(self, self.given_weight_BKS.transpose(0, 1)[self.sample_K])[0]


def _of_blocks(plan: GivenPlan, weight_KBS: Tensor) -> tuple[Tensor, Tensor]:
    """`[K, U]` twice: the largest and the smallest weight of each block's hidden tokens, 0 where it hides none."""
    units = plan.units
    hidden_KUW = units.gathered(plan.scored) & units.mask_UW
    weight_KUW, none_KU = units.gathered(weight_KBS), ~hidden_KUW.any(-1)
    most = weight_KUW.masked_fill(~hidden_KUW, -torch.inf).amax(-1).masked_fill(none_KU, 0)
    return most, weight_KUW.masked_fill(~hidden_KUW, torch.inf).amin(-1).masked_fill(none_KU, 0)


def make(
    fields: dict[str, Any],
    samples: int | None,
    *,
    masked_KBS: Tensor | None = None,
    weight_KB: Tensor | None = None,
    weight_KBS: Tensor | None = None,
) -> GivenPlan:
    """The plan of these masks; `fields` are those that every plan has.

    Raises ValueError or TypeError naming the option, or `samples` where it is not the number of masks.
    """
    completion_BS: Tensor = fields["completion_mask_BS"]
    if masked_KBS is None:
        raise ValueError("masked_KBS must be given for law='given': bool [K, B, S], the tokens that each sample hides")
    checks.dtype("masked_KBS", masked_KBS, [torch.bool])
    checks.shape("masked_KBS", masked_KBS, [None, *completion_BS.shape])
    checks.same_device("masked_KBS", masked_KBS, "input_ids_BS", completion_BS)
    K, B, _ = masked_KBS.shape
    if samples is not None and samples != K:
        raise ValueError(f"samples must be None or the number of masks, {K}, for law='given', got {samples}")
    if K == 0:
        raise ValueError("masked_KBS must hold at least one sample, got none")
    if checks.may_read(masked_KBS) and bool((masked_KBS & ~completion_BS).any()):
        raise ValueError("masked_KBS must be False where completion_mask_BS is (after the first EOS too, where eos_id is given)")
    if weight_KBS is not None and (weight_KB is not None or fields["block_BS"] is None):
        raise ValueError("weight_KBS must be None without causal_block, and where weight_KB is given")
    for name, weight, sizes in (("weight_KB", weight_KB, [K, B]), ("weight_KBS", weight_KBS, [*masked_KBS.shape])):
        if weight is not None:
            checks.dtype(name, weight, checks.FLOATS)
            checks.shape(name, weight, sizes)
            checks.same_device(name, weight, "input_ids_BS", completion_BS)
            checks.finite(name, weight)
    weight_KB = torch.ones(K, B, device=masked_KBS.device) if weight_KB is None else weight_KB
    plan = GivenPlan(
        **fields,
        law=LAW.name,
        options={},
        samples=K,
        sample_K=torch.arange(K, device=masked_KBS.device),
        given_BKS=masked_KBS.transpose(0, 1),
        given_weight_BK=weight_KB.detach().float().t(),
        given_weight_BKS=None if weight_KBS is None else weight_KBS.detach().float().transpose(0, 1),
    )
    if weight_KBS is not None and checks.may_read(weight_KBS):
        most, least = _of_blocks(plan, weight_KBS)
        if bool((most != least).any()):
            raise ValueError("weight_KBS must be the same at all tokens that a sample hides in a block, whose level it weighs")
    return plan
