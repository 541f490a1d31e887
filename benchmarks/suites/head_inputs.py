"""What the head's contestants share: inputs, the floor of bare products, and the float64 oracle."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.registry import Result, Work, relative_error
from dllm_kernels import noise
from dllm_kernels.head import plans

SLAB = 2048  # vocabulary rows of the floor's blocked layout
CHECKED = 1 << 27  # logits in float64 that the oracle may hold: beyond, it judges the first rows, and no dW


@dataclass(frozen=True)
class Inputs:
    plan: str
    hidden_MH: Tensor
    weight_VH: Tensor
    target_N: Tensor
    coef_N: Tensor
    key_N: Tensor
    softcap: float | None = None
    rows: Tensor | None = None  # of hidden_MH, in order; None: all of them

    @property
    def head_trains(self) -> bool:
        return self.plan in ("coef", *plans.REREAD)

    @property
    def products(self) -> tuple[str, ...]:
        """The matrix products that the plan takes, 2 N H V operations each, by what they make."""
        gradients = ("dhidden",) * (self.plan not in ("forward", "sample")) + ("dweight",) * self.head_trains
        kind = "forward" if self.plan == "sample" else self.plan
        count = sum(plans.gemms(kind, need_dhidden="dhidden" in gradients, need_dweight=self.head_trains))
        return ("logits",) * (count - len(gradients)) + gradients

    @property
    def flops(self) -> float:
        return 2.0 * len(self.products) * len(self.target_N) * self.weight_VH.numel()

    @property
    def output_bytes(self) -> int:
        gradients = {"dhidden": self.hidden_MH.nbytes, "dweight": self.weight_VH.nbytes}
        return self.target_N.numel() * 4 + sum(gradients.get(name, 0) for name in self.products)

    def final(self, logits: Tensor) -> Tensor:
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    @functools.cached_property
    def hidden_NH(self) -> Tensor:
        return self.chosen(self.hidden_MH)

    def chosen(self, hidden_MH: Tensor) -> Tensor:
        """The rows that are scored; a copy, where not all are."""
        return hidden_MH if self.rows is None else hidden_MH[self.rows]

    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.hidden_MH.detach().requires_grad_(True), self.weight_VH.detach().requires_grad_(self.head_trains)

    def result(self, logp_N: Tensor | None, hidden: Tensor, weight: Tensor) -> Result:
        assert logp_N is not None
        found = {"logp": logp_N.detach(), "dhidden": hidden.grad, "dweight": weight.grad}
        return {name: value for name, value in found.items() if value is not None}


def make_inputs(sizes: Mapping[str, int], *, plan: str, dtype: torch.dtype, device: str) -> Inputs:
    N, H, V = sizes["N"], sizes["H"], sizes["V"]
    generator = torch.Generator(device).manual_seed(0)
    zero = torch.zeros((), dtype=torch.int64, device=device)
    on: dict[str, Any] = {"generator": generator, "device": device}
    M = sizes.get("M", N)
    return Inputs(
        plan=plan,
        hidden_MH=torch.randn(M, H, **on).to(dtype),
        weight_VH=torch.randn(V, H, **on).mul_(2.5 / H**0.5).to(dtype),  # logits of deviation 2.5
        target_N=torch.randint(V, (N,), **on),
        coef_N=torch.randn(N, **on),
        key_N=noise.row_bits(0, noise.Stream.TOKEN, zero, zero, torch.arange(N, device=device)),
        softcap=float(sizes["cap"]) if "cap" in sizes else None,
        rows=None if M == N else torch.randperm(M, **on)[:N].sort().values,
    )


def floor(x: Inputs) -> Work:
    """The bare products, each in the fastest layout on this machine."""
    V, N = len(x.weight_VH), len(x.target_N)
    slabs = [slice(v, min(v + SLAB, V)) for v in range(0, V, SLAB)]
    z_NV = torch.randn(N, V, device=x.hidden_NH.device, dtype=x.hidden_NH.dtype)
    dhidden_NH, dweight_VH = torch.ones_like(x.hidden_NH), torch.ones_like(x.weight_VH)
    layouts: dict[str, dict[str, Callable[[], object]]] = {
        "logits": {"whole": lambda: torch.mm(x.hidden_NH, x.weight_VH.t(), out=z_NV)},
        "dhidden": {"whole": lambda: torch.mm(z_NV, x.weight_VH, out=dhidden_NH)},
        "dweight": {"whole": lambda: torch.mm(z_NV.t(), x.hidden_NH, out=dweight_VH)},
    }
    best, note = dict.fromkeys(layouts, "whole"), ""
    if not x.hidden_NH.is_cuda:
        # where 16-bit products are emulated, an upcast in slabs is faster
        if x.hidden_NH.dtype != torch.float32:
            h_NH, z32_NV, out_NH, out_VH = x.hidden_NH.float(), z_NV.float(), dhidden_NH.float(), dweight_VH.float()
            layouts["logits"]["fp32"] = lambda: [torch.mm(h_NH, x.weight_VH[s].float().t(), out=z32_NV[:, s]) for s in slabs]
            layouts["dhidden"]["fp32"] = lambda: [out_NH.addmm_(z32_NV[:, s], x.weight_VH[s].float()) for s in slabs]
            layouts["dweight"]["fp32"] = lambda: torch.mm(z32_NV.t(), h_NH, out=out_VH)
        elif len(slabs) > 1:
            layouts["logits"]["slabs"] = lambda: [torch.mm(x.hidden_NH, x.weight_VH[s].t(), out=z_NV[:, s]) for s in slabs]
        best = {name: measure.fastest(layouts[name], "cpu") for name in dict.fromkeys(x.products)}
        note = ", ".join(f"{name} in {how}" for name, how in best.items() if how != "whole") or "whole products"
    chain = [layouts[name][best[name]] for name in x.products]

    def run() -> Result:
        for product in chain:
            product()
        return {}

    return Work(run, x.flops, note)


class HeadOracle:
    """Errors against float64 on the same inputs; the weight is upcast in vocabulary slabs."""

    def __init__(self, x: Inputs) -> None:
        rows = max(1, min(len(x.target_N), CHECKED // len(x.weight_VH)))
        self.rows, self.whole = rows, rows == len(x.target_N)
        self.x = replace(x, hidden_MH=x.hidden_NH[:rows], rows=None, target_N=x.target_N[:rows], coef_N=x.coef_N[:rows])
        self.places = x.rows  # of the rows among all positions

    def _own(self, name: str, value: Tensor) -> Tensor:
        """The rows that are judged: vectors have one entry per row, gradients one per position."""
        if name == "dweight":
            return value
        return (value[self.places] if name == "dhidden" and self.places is not None else value)[: self.rows]

    @functools.cached_property
    def logp_NV(self) -> Tensor:
        hidden_NH = self.x.hidden_NH.double()
        return self.x.final(torch.cat([hidden_NH @ w.double().t() for w in self.x.weight_VH.split(SLAB)], 1)).log_softmax(-1)

    @property
    def true_logp_N(self) -> Tensor:
        return self.logp_NV.gather(1, self.x.target_N[:, None])[:, 0]

    @functools.cached_property
    def operand_NV(self) -> Tensor:
        operand_NV = -self.logp_NV.exp()
        operand_NV[torch.arange(len(operand_NV), device=operand_NV.device), self.x.target_N] += 1.0
        if self.x.softcap is not None:
            hidden_NH = self.x.hidden_NH.double()
            for start in range(0, len(self.x.weight_VH), SLAB):
                t_NV = torch.tanh(hidden_NH @ self.x.weight_VH[start : start + SLAB].double().t() / self.x.softcap)
                operand_NV[:, start : start + SLAB] *= 1.0 - t_NV * t_NV
        return operand_NV.mul_(self.x.coef_N.double()[:, None])

    @functools.cached_property
    def dhidden_NH(self) -> Tensor:
        total_NH = torch.zeros_like(self.x.hidden_NH, dtype=torch.float64)
        for start in range(0, len(self.x.weight_VH), SLAB):
            span = slice(start, start + SLAB)
            total_NH.addmm_(self.operand_NV[:, span], self.x.weight_VH[span].double())
        return total_NH

    def __call__(self, result: Result) -> dict[str, float]:
        if not result:
            return {}
        result = {name: self._own(name, value) for name, value in result.items()}
        chosen_N1 = result.get("token", self.x.target_N)[:, None]
        true_logp_N = self.logp_NV.gather(1, chosen_N1)[:, 0]
        found = {"logp": float((result["logp"].double() - true_logp_N).abs().max())}
        if "entropy" in result:
            true_entropy_N = -(self.logp_NV.exp() * self.logp_NV).sum(-1)
            found["entropy"] = float((result["entropy"].double() - true_entropy_N).abs().max())
        gradients = []
        if "dhidden" in result:
            gradients.append(relative_error([result["dhidden"]], [self.dhidden_NH]))
        if "dweight" in result and self.whole:
            gradients.append(self._dweight_error(result["dweight"]))
        return found | ({"gradient": max(gradients)} if gradients else {})

    def _dweight_error(self, dweight_VH: Tensor) -> float:
        hidden_NH, difference, size = self.x.hidden_NH.double(), 0.0, 0.0
        for start in range(0, len(dweight_VH), SLAB):
            true_VH = self.operand_NV[:, start : start + SLAB].t() @ hidden_NH
            difference += float((dweight_VH[start : start + SLAB].double() - true_VH).square().sum())
            size += float(true_VH.square().sum())
        return (difference / size) ** 0.5
