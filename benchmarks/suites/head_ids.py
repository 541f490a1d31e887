"""Cases of the suite `head` for more than one log-probability of a row, with a trainable head.

ids         8 given ids of each row, with coefficients that arrive late
want_top    the 8 likeliest ids of each row, likewise
z_loss      logp and the mean square of lse

The libraries' chunked log-probabilities take one target a row: for `ids` they get each row once for every id.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.registry import Contestant, Result, Work, relative_error
from benchmarks.suites.head_inputs import SLAB, Inputs, floor, make_inputs
from benchmarks.suites.head_peers import CHUNKED, Loader, absent
from dllm_kernels import backends, score_tokens
from dllm_kernels.head import plans

KINDS = ("ids", "want_top", "z_loss")
COUNT = 8  # ids of a row
Z_LOSS = 1e-2


@dataclass(frozen=True, kw_only=True)
class IdsInputs(Inputs):
    ids_NM: Tensor
    coef_NM: Tensor

    @property
    def head_trains(self) -> bool:
        return True

    @property
    def products(self) -> tuple[str, ...]:
        forced = "recompute" if self.plan == "want_top" else None
        size = len(self.target_N) * len(self.weight_VH) * self.hidden_MH.dtype.itemsize
        facts: dict[str, Any] = {"wants_gradient": True, "head_trains": True, "coef_known": False, "operand_bytes": size}
        plan = plans.choose(forced, **facts, several=True)
        count = sum(plans.gemms(plan, need_dhidden=True, need_dweight=True))
        return ("logits",) * (count - 2) + ("dhidden", "dweight")


def inputs(sizes: Mapping[str, int], *, kind: str, dtype: torch.dtype, device: str) -> IdsInputs:
    base = make_inputs({name: sizes[name] for name in ("N", "H", "V")}, plan=kind, dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(1)
    N, count = sizes["N"], min(COUNT, sizes["V"])
    ids_NM = torch.randint(sizes["V"], (N, count), generator=generator, device=device)
    coef_NM = torch.randn(N, count, generator=generator, device=device)
    return IdsInputs(**vars(base) | {"ids_NM": ids_NM, "coef_NM": coef_NM})


def _loss(x: IdsInputs, logp: Tensor, lse: Tensor | None) -> Tensor:
    """Of `[N]` log-probs and lse where there is one, else of `[N, M]`."""
    if lse is None:
        return (logp * x.coef_NM.to(logp.dtype)).sum()
    return (logp * x.coef_N.to(logp.dtype)).sum() + Z_LOSS * lse.square().mean()


def ours(x: IdsInputs) -> Work:
    hidden, weight = x.leaves()

    def run() -> Result:
        hidden.grad = weight.grad = None
        if x.plan == "z_loss":
            scores = score_tokens(hidden, weight, x.target_N, want=("logp", "lse"))
            logp = scores.logp
        elif x.plan == "ids":
            scores = score_tokens(hidden, weight, ids=x.ids_NM)
            logp = scores.ids_logp
        else:
            scores = score_tokens(hidden, weight, rows=x.rows, want_top=x.coef_NM.shape[1])
            logp = scores.best_logp
        assert logp is not None
        _loss(x, logp, scores.lse if x.plan == "z_loss" else None).backward()
        return x.result(logp, hidden, weight)

    return Work(run, x.flops, f"backend {backends.for_device(x.hidden_MH.device).NAME}")


def eager(x: IdsInputs) -> Work:
    hidden, weight = x.leaves()

    def run() -> Result:
        hidden.grad = weight.grad = None
        logp, lse = _by_logits(x, F.linear(hidden, weight).float())
        _loss(x, logp, lse).backward()
        return x.result(logp, hidden, weight)

    return Work(run)


def _by_logits(x: IdsInputs, logits_NV: Tensor) -> tuple[Tensor, Tensor | None]:
    if x.plan == "z_loss":
        lse_N = logits_NV.logsumexp(-1)
        return logits_NV.gather(1, x.target_N[:, None])[:, 0] - lse_N, lse_N
    logp_NV = logits_NV.log_softmax(-1)
    return (logp_NV.gather(1, x.ids_NM) if x.plan == "ids" else logp_NV.topk(x.coef_NM.shape[1]).values), None


class IdsOracle:
    """Errors against autograd of float64 logits."""

    def __init__(self, x: IdsInputs) -> None:
        self.x = x

    @functools.cached_property
    def truth(self) -> Result:
        hidden, weight = (tensor.detach().double().requires_grad_() for tensor in (self.x.hidden_MH, self.x.weight_VH))
        logp, lse = _by_logits(self.x, torch.cat([hidden @ w.t() for w in weight.split(SLAB)], 1))
        _loss(self.x, logp, lse).backward()
        return self.x.result(logp, hidden, weight)

    def __call__(self, result: Result) -> dict[str, float]:
        if not result:
            return {}
        gradients = (relative_error([result[name]], [self.truth[name]]) for name in ("dhidden", "dweight"))
        return {"logp": float((result["logp"].double() - self.truth["logp"]).abs().max()), "gradient": max(gradients)}


def _peer(x: IdsInputs, load: Loader) -> Work:
    N, M = x.ids_NM.shape
    logp, note = load(N * M, None)
    hidden, weight = x.leaves()

    def run() -> Result:
        hidden.grad = weight.grad = None
        logp_NM = logp(hidden.repeat_interleave(M, 0), weight, x.ids_NM.flatten()).view(N, M)
        _loss(x, logp_NM, None).backward()
        return x.result(logp_NM, hidden, weight)

    return Work(run, note=f"{note}, {M} times the rows")


def _applies(x: IdsInputs, load: Loader) -> str:
    if x.plan != "ids":
        return "its lse has no gradient" if x.plan == "z_loss" else "it does not tell the likeliest ids"
    return absent(x, load)


CONTESTANTS = (
    Contestant("ours", "ours", ours),
    Contestant("eager", "peer", eager),
    *(
        Contestant(name, "peer", functools.partial(_peer, load=load), functools.partial(_applies, load=load))
        for name, load in CHUNKED.items()
    ),
    Contestant("floor", "floor", floor),
)
