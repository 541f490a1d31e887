"""The case `adapter` of the suite `head`: LoRA of rank 16 on a frozen head, A and B train, coefficients known beforehand.

ours            low_rank=(A, B, s) in the pass over W
merged          PyTorch on the logits of W + s B A, which autograd differentiates by both
eager           PyTorch on logits of W and of the adapter, which are added: what PEFT's layer does
without         ours on W alone: what the adapter costs
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
from dllm_kernels import backends, score_tokens

RANK, SCALE = 16, 2.0


@dataclass(frozen=True, kw_only=True)
class AdapterInputs(Inputs):
    down_RH: Tensor
    up_VR: Tensor

    @property
    def head_trains(self) -> bool:
        return False

    @property
    def products(self) -> tuple[str, ...]:
        return ("logits", "dhidden")

    @property
    def flops_of_adapter(self) -> float:
        N, (R, H), V = len(self.target_N), self.down_RH.shape, len(self.up_VR)
        return 2.0 * N * R * 3 * (V + H)

    @property
    def output_bytes(self) -> int:
        return super().output_bytes + self.down_RH.nbytes + self.up_VR.nbytes

    def adapter(self) -> tuple[Tensor, Tensor]:
        return self.down_RH.detach().requires_grad_(), self.up_VR.detach().requires_grad_()


def inputs(sizes: Mapping[str, int], *, dtype: torch.dtype, device: str) -> AdapterInputs:
    base = make_inputs({name: sizes[name] for name in ("N", "H", "V")}, plan="coef", dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(1)
    (V, H), on = base.weight_VH.shape, {"generator": generator, "device": device}
    down_RH, up_VR = torch.randn(RANK, H, **on) / H**0.5, torch.randn(V, RANK, **on) / RANK**0.5
    return AdapterInputs(**vars(base) | {"down_RH": down_RH.to(dtype), "up_VR": up_VR.to(dtype)})


def ours(x: AdapterInputs, *, adapter: bool = True) -> Work:
    hidden, _ = x.leaves()
    pair = x.adapter()

    def run() -> Result:
        for leaf in (hidden, *pair):
            leaf.grad = None
        more: dict[str, Any] = {"low_rank": (*pair, SCALE)} if adapter else {}
        scores = score_tokens(hidden, x.weight_VH, x.target_N, coef=x.coef_N, **more)
        assert scores.logp is not None
        assert scores.weighted_sum is not None
        scores.weighted_sum.backward()
        return _result(scores.logp, hidden, *pair)

    return Work(run, x.flops + adapter * x.flops_of_adapter, f"backend {backends.for_device(x.hidden_MH.device).NAME}")


def eager(x: AdapterInputs, *, merged: bool) -> Work:
    hidden, _ = x.leaves()
    down, up = x.adapter()

    def run() -> Result:
        for leaf in (hidden, down, up):
            leaf.grad = None
        if merged:
            logits = F.linear(hidden, x.weight_VH + SCALE * up @ down)
        else:
            logits = F.linear(hidden, x.weight_VH) + SCALE * F.linear(F.linear(hidden, down), up)
        logp = F.log_softmax(logits, dim=-1, dtype=torch.float32).gather(1, x.target_N[:, None])[:, 0]
        logp.backward(x.coef_N)
        return _result(logp, hidden, down, up)

    return Work(run)


def _result(logp_N: Tensor, *leaves: Tensor) -> Result:
    gradients = {name: leaf.grad for name, leaf in zip(("dhidden", "ddown", "dup"), leaves)}
    return {"logp": logp_N.detach()} | {name: value for name, value in gradients.items() if value is not None}


class AdapterOracle:
    """Errors against autograd of float64 logits, without the adapter for what has no gradient of one."""

    def __init__(self, x: AdapterInputs) -> None:
        self.x = x

    @functools.cache  # noqa: B019 - an oracle lives as long as its case
    def truth(self, *, adapter: bool) -> Result:
        x = self.x
        hidden, down, up = (t.detach().double().requires_grad_() for t in (x.hidden_MH, x.down_RH, x.up_VR))
        own = torch.cat([hidden @ w.double().t() for w in x.weight_VH.split(SLAB)], 1)
        logits = own + SCALE * (hidden @ down.t()) @ up.t() if adapter else own
        logp = logits.log_softmax(-1).gather(1, x.target_N[:, None])[:, 0]
        logp.backward(x.coef_N.double())
        return _result(logp, hidden, down, up)

    def __call__(self, result: Result) -> dict[str, float]:
        if not result:  # the floor's
            return {}
        truth = self.truth(adapter="ddown" in result)
        gradients = (relative_error([result[name]], [truth[name]]) for name in truth if name != "logp")
        return {"logp": float((result["logp"].double() - truth["logp"]).abs().max()), "gradient": max(gradients)}


CONTESTANTS = (
    Contestant("ours", "ours", ours),
    Contestant("merged", "peer", functools.partial(eager, merged=True)),
    Contestant("eager", "peer", functools.partial(eager, merged=False)),
    Contestant("without", "ours", functools.partial(ours, adapter=False)),
    Contestant("floor", "floor", floor),
)
