"""The LM head alone: scoring with each plan, and sampling, against eager PyTorch, PyTorch's own fused loss and the floor.

The floor is the bare matrix products of the plan, outputs preallocated and touched, each by the fastest of the layouts that
the vendor libraries offer here; its memory is the outputs alone, by arithmetic. With a size M, the N rows are the masked ones of
M positions: everybody is given all hidden states and the rows to take, and "all positions" is who makes logits of all M first,
as the published trainers do.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import plots
from benchmarks.registry import DTYPES, Case, Contestant, Prepared, Result, Row, Runner, Settings, Suite, relative_error
from benchmarks.suites import head_peers
from dllm_kernels import explain, noise, sample_tokens, score_tokens
from dllm_kernels.backends import select
from dllm_kernels.backends.contract import HeadProblem

# plan: matrix products (each 2 N H V FLOPs) by output, whether the head trains
PLANS: dict[str, tuple[tuple[str, ...], bool]] = {
    "forward": (("logits",), False),
    "unit": (("logits", "dhidden"), False),
    "coef": (("logits", "dhidden", "dweight"), True),
    "keep": (("logits", "dhidden", "dweight"), True),
    "recompute": (("logits", "logits", "dhidden", "dweight"), True),
    "sample": (("logits",), False),
}
USUAL = {"N": 256, "M": 512, "H": 512, "V": 16384}  # in every run; half of the positions are masked
LLADA = {"N": 512, "H": 1024, "V": 126464}  # LLaDA's vocabulary: what the bounds are stated for
PLANS_OF_BOUNDS = ("forward", "unit", "coef", "sample")
# what --full measures on a CPU: sizes, dtype, plans
FULL: tuple[tuple[dict[str, int], str, tuple[str, ...]], ...] = (
    (LLADA, "float32", PLANS_OF_BOUNDS),
    (LLADA, "bfloat16", PLANS_OF_BOUNDS),
    ({**LLADA, "M": 1024}, "float32", ("coef",)),  # half of the positions masked
    ({"N": 64, "H": 128, "V": 64}, "float32", PLANS_OF_BOUNDS),
    ({"N": 2048, "H": 128, "V": 64}, "float32", PLANS_OF_BOUNDS),
)
LARGE = 1 << 26  # logits, beyond which the slowest contestants are left out: the smaller sizes have them
HEADS: dict[str, dict[str, int]] = {  # models on GPUs; `cap`: the softcap of their logits
    "LLaDA": {"H": 4096, "V": 126464},
    "Dream": {"H": 3584, "V": 152064},
    "SDAR": {"H": 2560, "V": 151936},
    "LLaDA2": {"H": 2048, "V": 157184},
    "Gemma": {"H": 2304, "V": 262144, "cap": 30},
}
GPU_SHAPES = tuple({"N": N, **head} for N in (4096, 1024, 256, 16384, 65536) for head in HEADS.values())
GPU_USUAL = tuple({"N": 4096, **head} for head in HEADS.values())
SAMPLE_ROWS = 32  # a block of 32, as LLaDA decodes
TINY = {"N": 16, "H": 16, "V": 64}
SLAB = 2048  # vocabulary rows of the floor's blocked layout
CHECKED = 1 << 27  # logits in float64 that the oracle may hold: beyond, it judges the first rows, and no dW


@dataclass(frozen=True)
class _Inputs:
    hidden_MH: Tensor
    weight_VH: Tensor
    target_N: Tensor
    coef_N: Tensor
    key_N: Tensor
    softcap: float | None = None
    rows: Tensor | None = None  # of hidden_MH, in order; None: all of them

    def final(self, logits: Tensor) -> Tensor:
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    @functools.cached_property
    def hidden_NH(self) -> Tensor:
        return self.chosen(self.hidden_MH)

    def chosen(self, hidden_MH: Tensor) -> Tensor:
        """The rows that are scored; a copy, where not all are."""
        return hidden_MH if self.rows is None else hidden_MH[self.rows]

    def leaves(self, head_trains: bool) -> tuple[Tensor, Tensor]:
        return self.hidden_MH.detach().requires_grad_(True), self.weight_VH.detach().requires_grad_(head_trains)


def _inputs(sizes: Mapping[str, int], dtype: torch.dtype, device: str) -> _Inputs:
    N, H, V = sizes["N"], sizes["H"], sizes["V"]
    generator = torch.Generator(device).manual_seed(0)
    zero = torch.zeros((), dtype=torch.int64, device=device)
    on: dict[str, Any] = {"generator": generator, "device": device}
    M = sizes.get("M", N)
    return _Inputs(
        hidden_MH=torch.randn(M, H, **on).to(dtype),
        weight_VH=torch.randn(V, H, **on).mul_(2.5 / H**0.5).to(dtype),  # logits of deviation 2.5
        target_N=torch.randint(V, (N,), **on),
        coef_N=torch.randn(N, **on),
        key_N=noise.row_bits(0, noise.Stream.TOKEN, zero, zero, torch.arange(N, device=device)),
        softcap=float(sizes["cap"]) if "cap" in sizes else None,
        rows=None if M == N else torch.randperm(M, **on)[:N].sort().values,
    )


def _shapes(settings: Settings) -> list[tuple[dict[str, int], str, tuple[str, ...]]]:
    """Sizes, dtype and plans of a run."""
    everything, own = tuple(PLANS), settings.dtype
    if settings.tiny:
        return [({**TINY, "M": 24}, own, everything)]
    if settings.shape:
        return [(dict(settings.shape), own, everything)]
    if settings.device == "cuda":
        return [(dict(shape), own, everything) for shape in (GPU_SHAPES if settings.full else GPU_USUAL)]
    usual = [(dict(USUAL), own, everything)]
    if settings.full:
        return usual + [(dict(sizes), dtype, plans) for sizes, dtype, plans in FULL]
    return usual + ([(dict(USUAL), "bfloat16", ("forward", "coef"))] if own == "float32" else [])


def cases(settings: Settings) -> list[Case]:
    found = []
    for shape, dtype, plans in _shapes(settings):
        for plan in plans:
            sizes = dict(shape)
            if plan == "sample":  # rows of a block: all of them are undecided
                sizes.pop("M", None)
                if shape == USUAL:
                    sizes["N"] = SAMPLE_ROWS
            found.append(
                Case(
                    name=plan,
                    sizes=sizes,
                    tiny={**TINY, "M": 24} if "M" in sizes else TINY,
                    setup=functools.partial(_setup, plan=plan, dtype=DTYPES[dtype], device=settings.device),
                    flops=0.0,  # the floor is measured
                    tolerance={
                        "logp": 1e-3 if dtype != "float32" else 1e-4,
                        "entropy": 1e-3 if dtype != "float32" else 1e-4,
                        "gradient": 2e-2 if dtype != "float32" else 1e-5,
                    },
                    dtype="" if dtype == settings.dtype else dtype,
                )
            )
    return found


def _setup(sizes: Mapping[str, int], *, plan: str, dtype: torch.dtype, device: str) -> Prepared:
    x = _inputs(sizes, dtype, device)
    head_trains = PLANS[plan][1]
    active = select(HeadProblem(x.hidden_NH, x.weight_VH, x.target_N)).NAME
    floor = _Floor(x, PLANS[plan][0])
    makers: list[Contestant] = [
        Contestant("ours", "ours", functools.partial(_ours, x, plan), note=f"backend {active}", flops=_formula(x, plan)),
        _reference(x, plan, active),
        Contestant("eager", "peer", functools.partial(_eager, x, plan)),
        _everywhere(x, plan),
        *([Contestant("torch.compile", "peer", functools.partial(_eager, x, plan, compiled=True))] if device == "cuda" else []),
        *head_peers.contestants(plan, lambda: x.leaves(head_trains), x.chosen, x.target_N, x.coef_N, x.softcap),
        Contestant("floor", "floor", floor.make, note=lambda: floor.note, flops=floor.flops),
    ]
    outputs = x.target_N.numel() * 4
    if plan not in ("forward", "sample"):
        outputs += x.hidden_MH.nbytes + (x.weight_VH.nbytes if head_trains else 0)
    return Prepared(tuple(makers), Oracle(x), outputs)


def _formula(x: _Inputs, plan: str) -> float:
    """What `explain` says of the operations."""
    V, H = x.weight_VH.shape
    if plan == "sample":
        return 2.0 * len(x.target_N) * H * V
    trains = PLANS[plan][1]
    kind = {"rows": len(x.target_N), "hidden_size": H, "vocabulary": V, "dtype": x.weight_VH.dtype, "trainable_head": trains}
    how = {"wants_gradient": plan != "forward", "coef_known": plan == "coef"}
    return float(explain(**kind, **how, plan=plan if plan in ("unit", "keep", "recompute") else None).flops)


@contextmanager
def _backend(name: str | None) -> Iterator[None]:
    before = os.environ.get("DLLM_KERNELS_BACKEND")
    if name is not None:
        os.environ["DLLM_KERNELS_BACKEND"] = name
    try:
        yield
    finally:
        if name is not None:
            os.environ.pop("DLLM_KERNELS_BACKEND")
            if before is not None:
                os.environ["DLLM_KERNELS_BACKEND"] = before


def _ours(x: _Inputs, plan: str, backend: str | None = None) -> Runner:
    hidden, weight = x.leaves(PLANS[plan][1])

    def run() -> Result:
        hidden.grad = weight.grad = None
        with _backend(backend):
            if plan == "sample":
                drawn = sample_tokens(x.hidden_MH, x.weight_VH, x.key_N, softcap=x.softcap)
                return {"token": drawn.token, "logp": drawn.logp, "entropy": drawn.entropy}
            if plan == "forward":
                want = ("logp", "entropy", "top_logp", "top_id")
                found = score_tokens(hidden.detach(), x.weight_VH, x.target_N, rows=x.rows, want=want, softcap=x.softcap)
                assert found.logp is not None
                assert found.entropy is not None
                return {"logp": found.logp, "entropy": found.entropy}
            if plan == "coef":
                scores = score_tokens(hidden, weight, x.target_N, rows=x.rows, coef=x.coef_N, softcap=x.softcap)
                assert scores.weighted_sum is not None
                scores.weighted_sum.backward()
            else:
                scores = score_tokens(hidden, weight, x.target_N, rows=x.rows, plan=plan, softcap=x.softcap)
                assert scores.logp is not None
                scores.logp.backward(x.coef_N)
        return _with_gradients(scores.logp, hidden, weight)

    return run


def _reference(x: _Inputs, plan: str, active: str) -> Contestant:
    name = "reference"
    if active == "reference":
        return Contestant(name, "reference", absent="the active backend is the reference already")
    if len(x.target_N) * len(x.weight_VH) > LARGE:
        return Contestant(name, "reference", absent="left out at this size; the smaller one has it")
    make = functools.partial(_ours, x, plan, "reference")
    return Contestant(name, "reference", make, note="our PyTorch specification", flops=_formula(x, plan))


def _everywhere(x: _Inputs, plan: str) -> Contestant:
    name = "all positions"
    if x.rows is None:
        return Contestant(name, "peer", absent="all rows are scored")
    return Contestant(name, "peer", functools.partial(_eager, x, plan, everywhere=True), note=f"eager on {len(x.hidden_MH)} rows")


def _log_softmax(hidden_NH: Tensor, weight_VH: Tensor, softcap: float | None) -> Tensor:
    logits = F.linear(hidden_NH, weight_VH)
    return F.log_softmax(logits if softcap is None else softcap * torch.tanh(logits / softcap), dim=-1, dtype=torch.float32)


@functools.cache
def _compiled() -> Callable[[Tensor, Tensor, float | None], Tensor]:
    return torch.compile(_log_softmax, dynamic=True)  # one compilation for all shapes: a dozen seconds each otherwise


def _eager(x: _Inputs, plan: str, *, compiled: bool = False, everywhere: bool = False) -> Runner:
    """What a trainer writes without a library: logits, an fp32 log-softmax, a gather, autograd."""
    hidden, weight = x.leaves(PLANS[plan][1])
    generator = torch.Generator(x.hidden_NH.device)

    log_softmax = _compiled() if compiled else _log_softmax

    def run() -> Result:
        hidden.grad = weight.grad = None
        if plan == "sample":
            # github ML-GSAI/LLaDA, generate.py: Gumbel-max in float64
            logits = x.final(F.linear(x.hidden_MH, x.weight_VH).float())
            uniform = torch.rand(logits.shape, dtype=torch.float64, generator=generator, device=logits.device)
            token = (logits.double().exp() / -torch.log(uniform)).argmax(-1)
            logps = logits.log_softmax(-1)
            return {
                "token": token,
                "logp": logps.gather(1, token[:, None])[:, 0],
                "entropy": -(logps.exp() * logps).sum(-1),
            }
        with torch.set_grad_enabled(plan != "forward"):
            logps = log_softmax(hidden if everywhere else x.chosen(hidden), weight, x.softcap)
            logps = x.chosen(logps) if everywhere else logps
            logp = logps.gather(1, x.target_N[:, None])[:, 0]
        if plan == "forward":
            logps.max(-1)
            return {"logp": logp, "entropy": -(logps.exp() * logps).sum(-1)}
        del logps
        logp.backward(x.coef_N)
        return _with_gradients(logp, hidden, weight)

    return run


def _with_gradients(logp: Tensor | None, hidden: Tensor | None = None, weight: Tensor | None = None) -> Result:
    assert logp is not None
    found = {"logp": logp.detach()}
    for name, leaf in (("dhidden", hidden), ("dweight", weight)):
        if leaf is not None and leaf.grad is not None:
            found[name] = leaf.grad
    return found


class _Floor:
    """The bare products; `make` picks the fastest layout of each on this machine."""

    def __init__(self, x: _Inputs, products: Sequence[str]) -> None:
        self.x, self.products, self.note = x, products, ""
        self.flops = 2.0 * len(products) * len(x.target_N) * x.weight_VH.numel()

    def make(self) -> Runner:
        x, V, N = self.x, len(self.x.weight_VH), len(self.x.target_N)
        slabs = [slice(v, min(v + SLAB, V)) for v in range(0, V, SLAB)]
        z_NV = torch.randn(N, V, device=x.hidden_NH.device, dtype=x.hidden_NH.dtype)
        dhidden_NH, dweight_VH = torch.ones_like(x.hidden_NH), torch.ones_like(x.weight_VH)
        layouts: dict[str, dict[str, Callable[[], object]]] = {
            "logits": {"whole": lambda: torch.mm(x.hidden_NH, x.weight_VH.t(), out=z_NV)},
            "dhidden": {"whole": lambda: torch.mm(z_NV, x.weight_VH, out=dhidden_NH)},
            "dweight": {"whole": lambda: torch.mm(z_NV.t(), x.hidden_NH, out=dweight_VH)},
        }
        if x.hidden_NH.is_cuda:
            return self._chain([layouts[name]["whole"] for name in self.products])
        if x.hidden_NH.dtype == torch.float32:
            if len(slabs) > 1:
                layouts["logits"]["slabs"] = lambda: [torch.mm(x.hidden_NH, x.weight_VH[s].t(), out=z_NV[:, s]) for s in slabs]
        else:  # where 16-bit products are emulated, an upcast in slabs is faster
            h_NH, z32_NV, out_NH, out_VH = x.hidden_NH.float(), z_NV.float(), dhidden_NH.float(), dweight_VH.float()
            layouts["logits"]["fp32"] = lambda: [torch.mm(h_NH, x.weight_VH[s].float().t(), out=z32_NV[:, s]) for s in slabs]
            layouts["dhidden"]["fp32"] = lambda: [out_NH.addmm_(z32_NV[:, s], x.weight_VH[s].float()) for s in slabs]
            layouts["dweight"]["fp32"] = lambda: torch.mm(z32_NV.t(), h_NH, out=out_VH)
        best = {
            name: min(layouts[name], key=lambda layout: _quickest(layouts[name][layout])) for name in dict.fromkeys(self.products)
        }
        self.note = ", ".join(f"{name} in {best[name]}" for name in best if best[name] != "whole") or "whole products"
        return self._chain([layouts[name][best[name]] for name in self.products])

    @staticmethod
    def _chain(chain: Sequence[Callable[[], object]]) -> Runner:
        def run() -> Result:
            for product in chain:
                product()
            return {}

        return run


def _quickest(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


class Oracle:
    """Errors against float64 on the same inputs; the weight is upcast in vocabulary slabs."""

    def __init__(self, x: _Inputs) -> None:
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


def summary(rows: Sequence[Row]) -> str:
    by_shape: dict[str, list[Row]] = {}
    for row in rows:
        if row["contestant"] == "ours" and row["to_baseline"] and row["to_floor"]:
            shape = " ".join(row["case"].split()[1:]) if row["case"].split()[0] != "sample" else "sample"
            by_shape.setdefault(shape, []).append(row)
    if not by_shape:
        return "ours did not run beside eager and the floor"
    return (
        "; ".join(
            f"{shape}: "
            + ", ".join(f"{r['case'].split()[0]} {r['to_baseline']:.2f} ({r['to_floor']:.2f})" for r in members)
            + f", faster in {sum(r['to_baseline'] < 1 for r in members)} of {len(members)}"
            for shape, members in by_shape.items()
        )
        + "; our time over eager's, and over the floor's in brackets"
    )


SUITE = Suite(
    name="head",
    title="the LM head: hidden states to log-probabilities, gradients and samples",
    cases=cases,
    baseline="eager",
    error_columns=("logp", "entropy", "gradient"),
    shape_keys=("N", "M", "H", "V", "cap"),
    required_shape=("N", "H", "V"),
    summary=summary,
    plot=plots.bars,
)
