"""The LM head alone: scoring with each plan and sampling, against eager PyTorch, fused losses and the floor.

The suite `head` measures time and memory. The floor is the bare matrix products of the plan, outputs
preallocated and touched, each by the fastest of the layouts that the vendor libraries offer here; its memory
is the outputs alone, by arithmetic. With a size M, the N rows are the masked ones of M positions: everybody
is given all hidden states and the rows to take, and "all positions" is who makes logits of all M first, as
the published trainers do.

The suite `accuracy` has the same contestants, inputs and float64 oracle, and errors alone, in every dtype:

    logp, entropy     the largest absolute error of a row, in nats
    elbo256           the largest absolute error of a sum of 256 log-probs, in nats: what an importance ratio
                      exponentiates
    gradient          |got - true| / |true|, the larger of hidden states' and weight's
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import execution, plots, report
from benchmarks.registry import (
    DTYPES,
    Case,
    Contestant,
    Oracle,
    Result,
    Row,
    Settings,
    Sizes,
    Study,
    Suite,
    Work,
)
from benchmarks.suites import head_adapter, head_ids
from benchmarks.suites.head_inputs import HeadOracle, Inputs, floor, make_inputs
from benchmarks.suites.head_peers import GPU_PEERS, PEERS
from dllm_kernels import backends, sample_tokens, score_tokens
from dllm_kernels.head import plans

PLANS = (*plans.PLANS, "sample")
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


def _shapes(settings: Settings) -> list[tuple[dict[str, int], str, tuple[str, ...]]]:
    """Sizes, dtype and plans of a run."""
    own = settings.dtype
    if settings.tiny:
        return [({**TINY, "M": 24}, own, PLANS)]
    if settings.shape:
        return [(dict(settings.shape), own, PLANS)]
    if settings.device == "cuda":
        return [(dict(shape), own, PLANS) for shape in (GPU_SHAPES if settings.full else GPU_USUAL)]
    usual = [(dict(USUAL), own, PLANS)]
    if settings.full:
        return usual + [(dict(sizes), dtype, plans) for sizes, dtype, plans in FULL]
    return usual + ([(dict(USUAL), "bfloat16", ("forward", "coef"))] if own == "float32" else [])


def cases(settings: Settings) -> list[Case]:
    found = []
    for shape, dtype, wanted in _shapes(settings):
        nats, relative = (1e-4, 1e-5) if dtype == "float32" else (1e-3, 2e-2)
        for plan in wanted:
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
                    inputs=functools.partial(make_inputs, plan=plan, dtype=DTYPES[dtype], device=settings.device),
                    contestants=CONTESTANTS_ON_GPU if settings.device == "cuda" else CONTESTANTS,
                    oracle=HeadOracle,
                    tolerance={"logp": nats, "entropy": nats, "gradient": relative},
                    output_bytes=lambda x: x.output_bytes,
                    dtype="" if dtype == settings.dtype else dtype,
                )
            )
    return found + _of_other_kinds(settings)


def _of_other_kinds(settings: Settings) -> list[Case]:
    """In the run's dtype at one size: the others are measured with one target and the head's own weight."""
    nats, relative = (1e-4, 1e-5) if settings.dtype == "float32" else (1e-3, 2e-2)
    shape = {key: value for key, value in (settings.shape or USUAL).items() if key in TINY}
    if "cap" in settings.shape:
        return []
    common: dict[str, Any] = {"dtype": settings.torch_dtype, "device": settings.device}
    kinds: dict[str, tuple[Any, Any, Any]] = {
        kind: (functools.partial(head_ids.inputs, kind=kind, **common), head_ids.CONTESTANTS, head_ids.IdsOracle)
        for kind in head_ids.KINDS
    }
    kinds["adapter"] = functools.partial(head_adapter.inputs, **common), head_adapter.CONTESTANTS, head_adapter.AdapterOracle
    return [
        Case(
            name=kind,
            sizes=TINY if settings.tiny else shape,
            tiny=TINY,
            inputs=inputs,
            contestants=contestants,
            oracle=oracle,
            tolerance={"logp": nats, "gradient": relative},
            output_bytes=lambda x: x.output_bytes,
        )
        for kind, (inputs, contestants, oracle) in kinds.items()
    ]


# --- contestants --------------------------------------------------------------------------------------------


def _active(x: Inputs) -> str:
    return str(backends.for_device(x.hidden_MH.device).NAME)


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


def _ours(x: Inputs, backend: str | None = None) -> Work:
    hidden, weight = x.leaves()
    options: dict[str, Any] = {"rows": x.rows, "softcap": x.softcap}

    def run() -> Result:
        hidden.grad = weight.grad = None
        with _backend(backend):
            if x.plan == "sample":
                drawn = sample_tokens(x.hidden_MH, x.weight_VH, x.key_N, softcap=x.softcap)
                return {"token": drawn.token, "logp": drawn.logp, "entropy": drawn.entropy}
            if x.plan == "forward":
                want = ("logp", "entropy", "top_logp", "top_id")
                found = score_tokens(hidden.detach(), x.weight_VH, x.target_N, want=want, **options)
                assert found.logp is not None
                assert found.entropy is not None
                return {"logp": found.logp, "entropy": found.entropy}
            if x.plan == "coef":
                scores = score_tokens(hidden, weight, x.target_N, coef=x.coef_N, **options)
                assert scores.weighted_sum is not None
                scores.weighted_sum.backward()
            else:
                scores = score_tokens(hidden, weight, x.target_N, plan=x.plan, **options)
                assert scores.logp is not None
                scores.logp.backward(x.coef_N)
        return x.result(scores.logp, hidden, weight)

    return Work(run, x.flops, "our PyTorch specification" if backend else f"backend {_active(x)}")


def _reference_applies(x: Inputs) -> str:
    if _active(x) == "reference":
        return "the active backend is the reference already"
    return "left out at this size; the smaller one has it" if len(x.target_N) * len(x.weight_VH) > LARGE else ""


def _log_softmax(hidden_NH: Tensor, weight_VH: Tensor, softcap: float | None) -> Tensor:
    logits = F.linear(hidden_NH, weight_VH)
    return F.log_softmax(logits if softcap is None else softcap * torch.tanh(logits / softcap), dim=-1, dtype=torch.float32)


@functools.cache
def _compiled() -> Callable[[Tensor, Tensor, float | None], Tensor]:
    # one compilation for all shapes: a dozen seconds each otherwise
    return torch.compile(_log_softmax, dynamic=True)


def _eager(x: Inputs, *, compiled: bool = False, everywhere: bool = False) -> Work:
    """What a trainer writes without a library: logits, an fp32 log-softmax, a gather, autograd."""
    hidden, weight = x.leaves()
    generator = torch.Generator(x.hidden_NH.device)
    log_softmax = _compiled() if compiled else _log_softmax

    def run() -> Result:
        hidden.grad = weight.grad = None
        if x.plan == "sample":
            # github ML-GSAI/LLaDA, generate.py: Gumbel-max in float64
            logits = x.final(F.linear(x.hidden_MH, x.weight_VH).float())
            uniform = torch.rand(logits.shape, dtype=torch.float64, generator=generator, device=logits.device)
            token = (logits.double().exp() / -torch.log(uniform)).argmax(-1)
            logps = logits.log_softmax(-1)
            return {"token": token, "logp": logps.gather(1, token[:, None])[:, 0], "entropy": -(logps.exp() * logps).sum(-1)}
        with torch.set_grad_enabled(x.plan != "forward"):
            logps = log_softmax(hidden if everywhere else x.chosen(hidden), weight, x.softcap)
            logps = x.chosen(logps) if everywhere else logps
            logp = logps.gather(1, x.target_N[:, None])[:, 0]
        if x.plan == "forward":
            logps.max(-1)
            return {"logp": logp, "entropy": -(logps.exp() * logps).sum(-1)}
        del logps
        logp.backward(x.coef_N)
        return x.result(logp, hidden, weight)

    return Work(run, note=f"eager on {len(x.hidden_MH)} rows" if everywhere else "")


BESIDE = (
    Contestant("ours", "ours", _ours),
    Contestant("reference", "reference", functools.partial(_ours, backend="reference"), _reference_applies),
    Contestant("eager", "peer", _eager),
    Contestant(
        "all positions",
        "peer",
        functools.partial(_eager, everywhere=True),
        lambda x: "all rows are scored" if x.rows is None else "",
    ),
)
FLOOR = Contestant("floor", "floor", floor)
CONTESTANTS = (*BESIDE, *PEERS, FLOOR)
COMPILED = Contestant("torch.compile", "peer", functools.partial(_eager, compiled=True))
CONTESTANTS_ON_GPU = (*BESIDE, COMPILED, *PEERS, *GPU_PEERS, FLOOR)


# --- errors alone -------------------------------------------------------------------------------------------

ACCURACY = Sizes(TINY, {"N": 512, "H": 256, "V": 32003}, {"N": 1024, "H": 1024, "V": 32003})
TOKENS = 256  # of a sequence whose log-probs are summed


class _ElboOracle(HeadOracle):
    """Errors of ELBOs too: of the sums over consecutive `TOKENS` rows (all rows, where there are fewer)."""

    def __call__(self, result: Result) -> dict[str, float]:
        found = super().__call__(result)
        if self.x.plan == "sample":
            return found
        difference_N = result["logp"].double()[: self.rows] - self.true_logp_N
        whole = max(TOKENS, len(difference_N) // TOKENS * TOKENS)
        return {**found, "elbo256": float(torch.stack([part.sum() for part in difference_N[:whole].split(TOKENS)]).abs().max())}


def _accuracy_cases(settings: Settings) -> list[tuple[str, Case]]:
    """Each plan in each dtype; a run's --dtype leaves only that one, unless it is the default."""
    names, shape = list(DTYPES) if settings.dtype == "float32" else [settings.dtype], ACCURACY.of(settings)
    return [
        (name, replace(case, oracle=_ElboOracle) if case.name in PLANS_OF_BOUNDS else case)
        for name in names
        for case in cases(replace(settings, dtype=name, shape=shape))
        if case.name in (*PLANS_OF_BOUNDS, *head_ids.KINDS, "adapter") and settings.cases in ((), (case.name,))
    ]


def measure_errors(settings: Settings) -> dict[str, Any]:
    """One of ours beyond the tolerance of the suite `head` is wrong; peers are as they are."""
    rows: list[Row] = []
    for dtype, case in _accuracy_cases(settings):
        x = case.inputs(case.sizes)
        oracle: Oracle = case.oracle(x)
        for contestant in case.contestants:
            if contestant.role != "floor" and settings.runs(contestant):
                row: Row = {
                    "case": f"{case.name} {dtype}",
                    "plan": case.name,
                    "dtype": dtype,
                    "sizes": dict(case.sizes),
                    "contestant": contestant.name,
                    "role": contestant.role,
                    "status": "ok",
                    "reason": "",
                    "errors": {},
                }
                execution.judged(row, case, contestant, x, oracle, peer_slack=math.inf)
                rows.append(row)
    return {"rows": rows, "summary": _worst_elbos(rows)}


def _worst_elbos(rows: Sequence[Row]) -> str:
    def worst(dtype: str, name: str) -> float:
        mine = [row for row in rows if (row["dtype"], row["contestant"]) == (dtype, name)]
        return max((row["errors"].get("elbo256", 0.0) for row in mine), default=0.0)

    dtypes = dict.fromkeys(row["dtype"] for row in rows)
    parts = [f"{dtype} {worst(dtype, 'ours'):.1e} (eager {worst(dtype, 'eager'):.1e})" for dtype in dtypes]
    return "error of a 256-token ELBO sum in nats: " + ", ".join(parts)


def _plot_errors(rows: Sequence[Row], path: Path) -> None:
    """The error of a 256-token ELBO sum by dtype and contestant."""
    points: dict[str, dict[str, float]] = {row["dtype"]: {} for row in rows}
    for row in rows:
        if row["plan"] == "forward" and row["errors"]:
            points[row["dtype"]][row["contestant"]] = row["errors"]["elbo256"]
    plots.grouped(points, "error of a 256-token ELBO sum against float64, nats", path)


def _check(settings: Settings) -> None:
    if settings.shape and settings.shape["N"] % TOKENS and not settings.tiny:
        raise ValueError(f"--shape of accuracy takes N a multiple of {TOKENS}, got {settings.shape['N']}")


SUITES = {
    "head": Suite(
        name="head",
        title="the LM head: hidden states to log-probabilities, gradients and samples",
        cases=cases,
        baseline="eager",
        error_columns=("logp", "entropy", "gradient"),
        shape_keys=("N", "M", "H", "V", "cap"),
        required_shape=("N", "H", "V"),
        measured_floor=True,
        plot=plots.bars,
    ),
    "accuracy": Study(
        name="accuracy",
        title="errors against float64 of logp, entropy, ELBO sums of 256 tokens and gradients, beside everybody's",
        check=_check,
        measure=measure_errors,
        listing=lambda settings: [f"{case.label} {dtype}" for dtype, case in _accuracy_cases(settings)],
        label=lambda row: row["case"],
        columns=report.error_columns(("logp", "elbo256", "entropy", "gradient")),
        shape_keys=("N", "H", "V"),
        required_shape=("N", "H", "V"),
        plot=_plot_errors,
    ),
}
