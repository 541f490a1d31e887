"""FLOP formulas of the ops in `ops.py` for `torch.utils.flop_counter.FlopCounterMode`: the matrix products that really run."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from dllm_kernels.head import plans


def register() -> None:
    """Make the formulas known to every FlopCounterMode, those already at work included.

    Called when a dispatch mode is met and not at import, because `torch.utils.flop_counter` imports Triton. A counter copies
    the registry when it is made, so one that is older than the registration gets the formulas by hand.
    """
    module = sys.modules.get("torch.utils.flop_counter")
    if module is None:  # then nobody counts
        return
    formulas = {getattr(torch.ops.dllm_kernels, name): formula for name, formula in _FORMULAS.items()}
    registries = [module.flop_registry]
    for mode in _get_current_dispatch_mode_stack():
        registries.append(getattr(getattr(mode, "counter", None), "flop_registry", {}))
    for registry in registries:
        for op, formula in formulas.items():
            registry.setdefault(op, formula)


def _gemms(count: int, rows: int, weight: Tensor) -> int:
    return 2 * count * rows * weight.shape[0] * weight.shape[1]


def _score(hidden: Tensor, weight: Tensor, target: Tensor, *rest: Any, out_val: Any) -> int:
    outputs, plan, need_dhidden, need_dweight, _ = rest[9:]
    vectors = plans.late_vectors(outputs.split(","))
    forward, _ = plans.gemms(plan, need_dhidden=need_dhidden, need_dweight=need_dweight, vectors=vectors)
    return _gemms(forward, target.numel(), weight)


def _score_backward(
    dsum: Any, dlogp: Any, dentropy: Any, stored: Any, hidden: Any, weight: Any, target: Tensor, *rest: Any, out_val: Any
) -> int:
    plan, _, need_dhidden, need_dweight, _ = rest[7:]
    _, backward = plans.gemms(plan, need_dhidden=need_dhidden, need_dweight=need_dweight)
    if not backward:
        return 0
    live = None
    if plan == "recompute" and type(target) is Tensor:  # not a fake one: rows without a coefficient are not gone through again
        live = plans.live_rows(dlogp, dentropy)
    return _gemms(backward, target.numel() if live is None else len(live), weight)


def _add_gradient(hidden: Tensor, weight: Tensor, target: Tensor, *rest: Any, out_val: Any) -> int:
    return _gemms(2 + (rest[9] is not None), target.numel(), weight)


def _sample(hidden: Tensor, weight: Tensor, key: Tensor, *rest: Any, out_val: Any) -> int:
    return _gemms(1, key.numel(), weight)


_FORMULAS = {"score": _score, "score_backward": _score_backward, "add_gradient": _add_gradient, "sample": _sample}
