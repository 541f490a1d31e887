"""Distillation: the divergence of a student's head from a teacher's over the whole vocabulary, with gradients of the student's
hidden states and weight, against eager PyTorch, Liger's chunked loss and the floor.

The floor is the four bare matrix products that any such loss takes: both heads' logits, dH and dW, each in the fastest of the
vendor's layouts. Errors are against float64 on the same inputs: `divergence`, of the mean over rows in nats; `gradient`,
|got - true| / |true|, the larger of hidden states' and weight's.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import plots
from benchmarks.registry import DTYPES, Case, Contestant, Result, Settings, Sizes, Suite, Work, relative_error
from benchmarks.suites import head_inputs
from dllm_kernels import backends, distillation_loss

KINDS = ("forward_kl", "reverse_kl", "jsd")
SHAPES = Sizes({"N": 16, "H": 16, "V": 64}, {"N": 128, "H": 512, "V": 16384}, {"N": 256, "H": 1024, "V": 126464})
LIGER_ROWS = 64  # of its chunks: its default of 1024 holds all logits at once at these sizes
JUDGED = 1 << 25  # logits in float64 that the oracle holds at a time


@dataclass(frozen=True)
class Inputs:
    kind: str
    hidden_NH: Tensor
    weight_VH: Tensor
    teacher_hidden_NH: Tensor
    teacher_weight_VH: Tensor

    @property
    def flops(self) -> float:
        return 8.0 * len(self.hidden_NH) * self.weight_VH.numel()

    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.hidden_NH.detach().requires_grad_(), self.weight_VH.detach().requires_grad_()


def make_inputs(sizes: Mapping[str, int], *, kind: str, dtype: torch.dtype, device: str) -> Inputs:
    """A teacher, and a student that is the teacher with noise of half its size: logits of deviation 2.5."""
    N, H, V = sizes["N"], sizes["H"], sizes["V"]
    generator = torch.Generator(device).manual_seed(0)
    on: dict[str, Any] = {"generator": generator, "device": device}
    teacher_hidden_NH, teacher_weight_VH = torch.randn(N, H, **on), torch.randn(V, H, **on).mul_(2.5 / H**0.5)
    hidden_NH = teacher_hidden_NH + 0.5 * torch.randn(N, H, **on)
    weight_VH = torch.randn(V, H, **on).mul_(1.25 / H**0.5).add_(teacher_weight_VH)
    return Inputs(kind, *(x.to(dtype) for x in (hidden_NH, weight_VH, teacher_hidden_NH, teacher_weight_VH)))


def _trained(x: Inputs, loss: Any, note: str = "", flops: float = 0.0) -> Work:
    hidden, weight = x.leaves()

    def run() -> Result:
        hidden.grad = weight.grad = None
        value = loss(hidden, weight)
        value.backward()
        assert hidden.grad is not None
        assert weight.grad is not None
        return {"divergence": value.detach(), "dhidden": hidden.grad, "dweight": weight.grad}

    return Work(run, flops, note)


def _ours(x: Inputs) -> Work:
    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return distillation_loss(hidden, weight, x.teacher_hidden_NH, x.teacher_weight_VH, kind=x.kind)

    return _trained(x, loss, f"backend {backends.for_device(x.hidden_NH.device).NAME}", x.flops)


def _eager(x: Inputs) -> Work:
    """What a trainer writes without a library: logits of both, fp32 log-softmax, `F.kl_div`, autograd."""

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        with torch.no_grad():
            p = F.log_softmax(F.linear(x.teacher_hidden_NH, x.teacher_weight_VH), -1, dtype=torch.float32)
        q = F.log_softmax(F.linear(hidden, weight), -1, dtype=torch.float32)
        if x.kind == "forward_kl":
            return F.kl_div(q, p, log_target=True, reduction="batchmean")
        if x.kind == "reverse_kl":
            return F.kl_div(p, q, log_target=True, reduction="batchmean")
        m = torch.logaddexp(p, q) - torch.log(torch.tensor(2.0))
        both = F.kl_div(m, p, log_target=True, reduction="batchmean") + F.kl_div(m, q, log_target=True, reduction="batchmean")
        return 0.5 * both

    return _trained(x, loss)


def _liger(x: Inputs) -> Work:
    module = importlib.import_module("liger_kernel.chunked_loss")
    beta = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}[x.kind]
    # its sum over rows is divided by the number of targets that are not ignored; nothing but the soft loss
    function = module.LigerFusedLinearJSDLoss(0.0, 1.0, beta=beta, compiled=False, chunk_size=min(LIGER_ROWS, len(x.hidden_NH)))
    target_N = torch.zeros(len(x.hidden_NH), dtype=torch.int64, device=x.hidden_NH.device)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        found: Tensor = function(hidden, weight, x.teacher_hidden_NH, x.teacher_weight_VH, target_N)
        return found

    return _trained(x, loss, f"{_liger_version()}, pure PyTorch, chunks of {LIGER_ROWS} rows, not compiled")


def _liger_version() -> str:
    try:
        return version("liger-kernel")
    except PackageNotFoundError:
        return "version unknown"


def _liger_applies(_: Inputs) -> str:
    return "" if importlib.util.find_spec("liger_kernel") else "not installed: pip install --no-deps liger-kernel"


def floor(x: Inputs) -> Work:
    """The head's floor of logits, dH and dW, and the teacher's logits once more."""
    nothing = torch.zeros(len(x.hidden_NH), dtype=torch.int64, device=x.hidden_NH.device)
    student = head_inputs.Inputs("coef", x.hidden_NH, x.weight_VH, nothing, nothing.float(), nothing)
    teacher = head_inputs.Inputs("forward", x.teacher_hidden_NH, x.teacher_weight_VH, nothing, nothing.float(), nothing)
    works = head_inputs.floor(student), head_inputs.floor(teacher)

    def run() -> Result:
        for work in works:
            work.run()
        return {}

    return Work(run, x.flops, works[0].note)


class Oracle:
    """Errors against float64, by blocks of rows."""

    def __init__(self, x: Inputs) -> None:
        self.x = x

    @functools.cached_property
    def true(self) -> Result:
        x, count = self.x, len(self.x.hidden_NH)
        weight_VH, teacher_VH = x.weight_VH.double(), x.teacher_weight_VH.double()
        total, dhidden, dweight_VH = 0.0, [], torch.zeros_like(weight_VH)
        for span in torch.arange(count).split(max(1, JUDGED // len(weight_VH))):
            hidden_NH = x.hidden_NH[span].double()
            q = (hidden_NH @ weight_VH.t()).log_softmax(-1)
            p = (x.teacher_hidden_NH[span].double() @ teacher_VH.t()).log_softmax(-1)
            if x.kind == "forward_kl":
                total += float((p.exp() * (p - q)).sum())
                operand = q.exp() - p.exp()
            else:
                m = torch.logaddexp(p, q) - torch.log(torch.tensor(2.0, dtype=p.dtype))
                share, other = (1.0, p) if x.kind == "reverse_kl" else (0.5, m)
                inner = q - other
                mean = (q.exp() * inner).sum(-1, keepdim=True)
                total += share * float(mean.sum()) + (0.5 * float((p.exp() * (p - m)).sum()) if x.kind == "jsd" else 0.0)
                operand = share * q.exp() * (inner - mean)
            operand /= count
            dhidden.append(operand @ weight_VH)
            dweight_VH.addmm_(operand.t(), hidden_NH)
        return {"divergence": torch.tensor(total / count), "dhidden": torch.cat(dhidden), "dweight": dweight_VH}

    def __call__(self, result: Result) -> dict[str, float]:
        if not result:
            return {}
        gradients = (relative_error([result[name]], [self.true[name]]) for name in ("dhidden", "dweight"))
        error = abs(float(result["divergence"]) - float(self.true["divergence"]))
        return {"divergence": error, "gradient": max(gradients)}


CONTESTANTS = (
    Contestant("ours", "ours", _ours),
    Contestant("eager", "peer", _eager),
    Contestant("Liger chunked", "peer", _liger, _liger_applies),
    Contestant("floor", "floor", floor),
)


def cases(settings: Settings) -> list[Case]:
    found = []
    dtypes = [settings.dtype] if settings.tiny or settings.shape or settings.dtype != "float32" else ["float32", "bfloat16"]
    for kind in KINDS:
        for dtype in dtypes:
            found.append(
                Case(
                    name=kind,
                    sizes=SHAPES.of(settings),
                    tiny=SHAPES.tiny,
                    inputs=functools.partial(make_inputs, kind=kind, dtype=DTYPES[dtype], device=settings.device),
                    contestants=CONTESTANTS,
                    oracle=Oracle,
                    tolerance=dict.fromkeys(("divergence", "gradient"), 1e-5)
                    if dtype == "float32"
                    else {"divergence": 1e-4, "gradient": 1e-2},
                    output_bytes=lambda x: x.hidden_NH.nbytes + x.weight_VH.nbytes,
                    dtype="" if dtype == settings.dtype else dtype,
                )
            )
    return found


SUITES = {
    "distillation": Suite(
        name="distillation",
        title="distillation: the divergence of a student's head from a teacher's, with gradients",
        cases=cases,
        baseline="eager",
        error_columns=("divergence", "gradient"),
        shape_keys=("N", "H", "V"),
        required_shape=("N", "H", "V"),
        measured_floor=True,
        plot=plots.bars,
    )
}
