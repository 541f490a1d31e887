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
        return self.given_weight_BK.t()[self.sample_K]


def make(
    fields: dict[str, Any], samples: int | None, *, masked_KBS: Tensor | None = None, weight_KB: Tensor | None = None
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
    if weight_KB is None:
        weight_KB = torch.ones(K, B, device=masked_KBS.device)
    checks.dtype("weight_KB", weight_KB, checks.FLOATS)
    checks.shape("weight_KB", weight_KB, [K, B])
    checks.same_device("weight_KB", weight_KB, "input_ids_BS", completion_BS)
    checks.finite("weight_KB", weight_KB)
    return GivenPlan(
        **fields,
        law=LAW.name,
        options={},
        samples=K,
        sample_K=torch.arange(K, device=masked_KBS.device),
        given_BKS=masked_KBS.transpose(0, 1),
        given_weight_BK=weight_KB.detach().float().t(),
    )
