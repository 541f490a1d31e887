"""Soft embeddings: `softmax(h W^T) W` at every row of hidden, as a self-conditioned model feeds it back, against eager PyTorch
and PyTorch's own attention, which with the weight as keys and values computes the same.

`forward`: nothing wants a gradient. `frozen`: hidden states do. `trains`: they and the tied weight. The floor is the bare matrix
products that no such call can do without, if it keeps what it makes: logits and result; for `frozen` the upstream gradient at
each id and dH; for `trains` two for dW. We make the logits once more instead. Errors are against float64 on the same inputs,
|got - true| / |true|: `expected`, of the result; `gradient`, the larger of hidden states' and weight's.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import plots
from benchmarks.registry import DTYPES, Case, Contestant, Result, Settings, Sizes, Suite, Work, relative_error
from benchmarks.suites import head_inputs
from dllm_kernels import backends, expected_embedding

WANTS = ("forward", "frozen", "trains")
# a canvas of 256 positions and the vocabulary of DiffusionGemma; its hidden size is 2816
SHAPES = Sizes({"N": 16, "H": 16, "V": 64}, {"N": 128, "H": 256, "V": 32768}, {"N": 256, "H": 512, "V": 262144})
PRODUCTS = {"forward": 2, "frozen": 4, "trains": 6}
JUDGED = 1 << 25  # logits in float64 that the oracle holds at a time


@dataclass(frozen=True)
class Inputs:
    wants: str
    hidden_NH: Tensor
    weight_VH: Tensor
    upstream_NH: Tensor

    @property
    def flops(self) -> float:
        """Of the floor."""
        return 2.0 * PRODUCTS[self.wants] * len(self.hidden_NH) * self.weight_VH.numel()

    @property
    def output_bytes(self) -> int:
        gradients = {"forward": 0, "frozen": self.hidden_NH.nbytes, "trains": self.hidden_NH.nbytes + self.weight_VH.nbytes}
        return self.hidden_NH.nbytes + gradients[self.wants]


def make_inputs(sizes: Mapping[str, int], *, wants: str, dtype: torch.dtype, device: str) -> Inputs:
    """Logits of deviation 2.5."""
    N, H, V = sizes["N"], sizes["H"], sizes["V"]
    on: dict[str, Any] = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    hidden_NH, weight_VH = torch.randn(N, H, **on), torch.randn(V, H, **on).mul_(2.5 / H**0.5)
    return Inputs(wants, *(x.to(dtype) for x in (hidden_NH, weight_VH, torch.randn(N, H, **on))))


def _call(x: Inputs, expected: Any, note: str = "", flops: float = 0.0) -> Work:
    hidden = x.hidden_NH.detach().requires_grad_(x.wants != "forward")
    weight = x.weight_VH.detach().requires_grad_(x.wants == "trains")

    def run() -> Result:
        hidden.grad = weight.grad = None
        value = expected(hidden, weight)
        if x.wants != "forward":
            value.backward(x.upstream_NH)
        found = {"expected": value.detach(), "dhidden": hidden.grad, "dweight": weight.grad}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    return Work(run, flops, note)


def _ours(x: Inputs) -> Work:
    again = 2.0 * len(x.hidden_NH) * x.weight_VH.numel() * (x.wants != "forward")
    return _call(x, expected_embedding, f"backend {backends.for_device(x.hidden_NH.device).NAME}", x.flops + again)


def _eager(x: Inputs) -> Work:
    """As DiffusionGemma's decoder in transformers: logits, softmax in fp32, back to the embedding's dtype, product."""

    def expected(hidden: Tensor, weight: Tensor) -> Tensor:
        return F.linear(hidden, weight).softmax(-1, dtype=torch.float32).to(weight.dtype) @ weight

    return _call(x, expected)


def _attention(x: Inputs) -> Work:
    """It knows neither bias, softcap nor excluded ids."""

    def expected(hidden: Tensor, weight: Tensor) -> Tensor:
        queries, table = hidden[None, None], weight[None, None]
        return F.scaled_dot_product_attention(queries, table, table, scale=1.0)[0, 0]

    return _call(x, expected, "no bias, softcap or excluded ids")


def floor(x: Inputs) -> Work:
    """The head's floors of as many products with the same sizes: of logits and dH, for `trains` of dW too."""
    nothing = torch.zeros(len(x.hidden_NH), dtype=torch.int64, device=x.hidden_NH.device)
    plan, times = {"forward": ("unit", 1), "frozen": ("unit", 2), "trains": ("coef", 2)}[x.wants]
    work = head_inputs.floor(head_inputs.Inputs(plan, x.hidden_NH, x.weight_VH, nothing, nothing.float(), nothing))

    def run() -> Result:
        for _ in range(times):
            work.run()
        return {}

    return Work(run, x.flops, work.note)


class Oracle:
    """Errors against float64, by blocks of rows."""

    def __init__(self, x: Inputs) -> None:
        self.x = x

    @functools.cached_property
    def true(self) -> Result:
        x, weight_VH = self.x, self.x.weight_VH.double()
        expected, dhidden, dweight_VH = [], [], torch.zeros_like(weight_VH)
        for span in torch.arange(len(x.hidden_NH)).split(max(1, JUDGED // len(weight_VH))):
            hidden_NH, upstream_NH = x.hidden_NH[span].double(), x.upstream_NH[span].double()
            p_NV = (hidden_NH @ weight_VH.t()).softmax(-1)
            expected.append(p_NV @ weight_VH)
            if x.wants == "forward":
                continue
            operand_NV = p_NV * (upstream_NH @ weight_VH.t() - (upstream_NH * expected[-1]).sum(-1, keepdim=True))
            dhidden.append(operand_NV @ weight_VH)
            if x.wants == "trains":
                dweight_VH.addmm_(operand_NV.t(), hidden_NH).addmm_(p_NV.t(), upstream_NH)
        found = {"expected": torch.cat(expected)} | ({"dhidden": torch.cat(dhidden)} if dhidden else {})
        return found | ({"dweight": dweight_VH} if x.wants == "trains" else {})

    def __call__(self, result: Result) -> dict[str, float]:
        if not result:
            return {}
        errors = {name: relative_error([result[name]], [true]) for name, true in self.true.items()}
        gradients = {"gradient": max(errors[name] for name in errors if name != "expected")} if len(errors) > 1 else {}
        return {"expected": errors["expected"]} | gradients


CONTESTANTS = (
    Contestant("ours", "ours", _ours),
    Contestant("eager", "peer", _eager),
    Contestant("SDPA", "peer", _attention),
    Contestant("floor", "floor", floor),
)


def cases(settings: Settings) -> list[Case]:
    tolerance = 1e-5 if settings.dtype == "float32" else 1e-2
    return [
        Case(
            name=wants,
            sizes=SHAPES.of(settings),
            tiny=SHAPES.tiny,
            inputs=functools.partial(make_inputs, wants=wants, dtype=DTYPES[settings.dtype], device=settings.device),
            contestants=CONTESTANTS,
            oracle=Oracle,
            tolerance={"expected": tolerance, "gradient": tolerance},
            output_bytes=lambda x: x.output_bytes,
        )
        for wants in WANTS
    ]


SUITES = {
    "expectation": Suite(
        name="expectation",
        title="soft embeddings: the mean embedding of the head's distribution at every row",
        cases=cases,
        baseline="eager",
        error_columns=("expected", "gradient"),
        shape_keys=("N", "H", "V"),
        required_shape=("N", "H", "V"),
        measured_floor=True,
        plot=plots.bars,
    )
}
