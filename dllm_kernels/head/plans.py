"""The plan of a head call, chosen from static facts alone, and how many matrix products it takes.

`score_tokens` and `explain` share these functions, so that what is explained is what runs.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from dllm_kernels import checks

PLANS = ("forward", "unit", "coef", "keep", "recompute")
REREAD = ("keep", "recompute")  # their backward reads hidden states and weight again
KEEP_BYTES = 256 << 20  # a stored operand [N, V] up to this size is cheaper than a second pass

_WHY = {
    "forward": "nothing wants a gradient",
    "unit": "the head is frozen and the coefficients arrive in backward: the gradient vectors are stored, backward has no GEMM",
    "coef": "the coefficients are known beforehand: all gradients come with the forward pass",
    "keep": "the head trains and the coefficients arrive in backward: the gradient operand [N, V] is small enough to be stored",
    "recompute": "the head trains and the coefficients arrive in backward: the operand [N, V] is too large, backward repeats it",
}


def choose(
    plan: str | None,
    *,
    wants_gradient: bool,
    head_trains: bool,
    coef_known: bool,
    operand_bytes: int,
    several: bool = False,
    best: int = 0,
) -> str:
    """The plan that runs. `plan` forces one; ValueError where it cannot run.

    wants_gradient, head_trains: what autograd will ask for, both False under no_grad. operand_bytes: of an `[N, V]` matrix
    in the dtype of the hidden states. several: coefficients of several log-probabilities of a row, or of lse, arrive late:
    one vector cannot take them all. best: so many ids are found in the forward pass, and are targets in backward alone.
    """
    if coef_known:
        automatic = "coef"
    elif not wants_gradient:
        automatic = "forward"
    elif not head_trains and not several:
        automatic = "unit"
    elif best:
        automatic = "recompute"
    else:
        automatic = "keep" if _known(operand_bytes <= KEEP_BYTES) else "recompute"
    if plan is None:
        return automatic
    checks.choice("plan", plan, PLANS)
    if (plan == "coef") != coef_known:
        given = "with" if coef_known else "without"
        raise ValueError(f"plan='coef' and coefficients go together, got plan={plan!r} {given} coef or entropy_coef")
    if plan == "unit" and several and wants_gradient:
        raise ValueError("plan='unit' has one gradient vector a row: not for ids, want_top or a differentiable lse")
    if plan == "keep" and best and wants_gradient:
        raise ValueError("plan='keep' stores what has no place yet for the ids of want_top: use plan='recompute' or None")
    if plan == "unit" and head_trains:
        raise ValueError("plan='unit' needs a frozen head: weight (and bias) must not require a gradient")
    if plan == "forward" and wants_gradient:
        raise ValueError("plan='forward' has no backward: use torch.no_grad() or inputs that require no gradient")
    return plan if wants_gradient or coef_known else "forward"


def _known(condition: bool) -> bool:
    """The condition; False to a compiler that cannot know it, since the number of rows depends on values."""
    if torch.compiler.is_compiling():
        from torch.fx.experimental import symbolic_shapes

        condition = getattr(symbolic_shapes, "guard_or_false", bool)(condition)
    return condition


def why(plan: str, *, forced: bool, several: bool = False, best: int = 0) -> str:
    """The reason for a plan, in words."""
    reason = _WHY[plan]
    if several and plan in REREAD:
        which = "ids that the forward pass finds" if best else "each id or of lse"
        reason = f"coefficients of {which} arrive in backward, and the operand [N, V] is "
        reason += "small enough to be stored" if plan == "keep" else "repeated there"
    return f"forced; it is chosen where {reason}" if forced else reason


def recorded(want: Sequence[str], coef_known: bool, several: bool = False) -> bool:
    """Whether a call has anything to differentiate; top_* have no gradient."""
    return coef_known or several or any(name in want for name in ("logp", "entropy", "lse"))


def late_vectors(outputs: Sequence[str]) -> int:
    """How many of a late plan's outputs have a gradient of their own: each costs `unit` a product, `keep` an operand."""
    return ("logp" in outputs) + ("entropy" in outputs)


def gemms(plan: str, *, need_dhidden: bool, need_dweight: bool, vectors: int = 1) -> tuple[int, int]:
    """Matrix products of 2 N H V floating-point operations that a plan executes, in forward and in backward."""
    gradients = int(need_dhidden) + int(need_dweight)
    if plan == "unit":
        return 1 + vectors * need_dhidden, 0
    if plan == "coef":
        return 1 + gradients, 0
    return 1, {"forward": 0, "keep": gradients, "recompute": 1 + gradients}[plan]


def live_rows(*coefficients: Tensor | None) -> Tensor | None:
    """int64 indices of the rows with a coefficient that is not 0; None where that is all of them. Each is `[N]` or `[N, M]`.

    None on a GPU too, where their count would stall the stream, unless DLLM_KERNELS_COMPACT=1 allows it; never in a capture.
    """
    terms = [c if c.dim() == 1 else c.abs().sum(1) for c in coefficients if c is not None]
    if not terms[0].is_cpu and (os.environ.get("DLLM_KERNELS_COMPACT") != "1" or torch.cuda.is_current_stream_capturing()):
        return None
    if any(bool(term_N.all()) for term_N in terms):
        return None
    live_N = terms[0] if len(terms) == 1 else sum((term_N.abs() for term_N in terms[1:]), terms[0].abs())
    return live_N.nonzero()[:, 0]
