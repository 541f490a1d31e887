"""Gradients against the number of Monte-Carlo samples n_t: peak memory, seconds, and equality, on a small EuroBERT.

BGPO and the objectives whose coefficients couple all samples of a sequence (GDPO, ESPO, SPG), a pair (VRPO) or the batch (RSPO).
Off-policy, so that coefficients depend on the scores; every token masked with probability 0.5, so that samples are alike
and n_t is all that changes (under the published laws the largest of more samples is larger). Ways to one gradient:

    ours        `accumulate`: one sample at a time; in one pass for BGPO, after a pass of scores for the others
    ours (loop) BGPO: `bgpo_loss` in a loop written by hand
    full graph  pure PyTorch as the published sequence-level trainers (d1, GDPO, ESPO) score: logits of every position,
                an fp32 log-softmax over the completion, the graphs of all samples alive until one backward; the losses of
                BGPO, GDPO and ESPO are written out here and in `step_published.py`, the others call ours on these scores

The model, masks, noise, old and reference scores are the same, and a loss or gradient off the float64 one fails the run.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import plots
from benchmarks.registry import (
    Case,
    Contestant,
    Prepared,
    Result,
    Row,
    Runner,
    Settings,
    Suite,
    multiplied_parameters,
    relative_error,
    small_model,
)
from benchmarks.suites import step_published
from benchmarks.suites.step_inputs import Lesson
from dllm_kernels import MaskPlan, accumulate, bgpo_loss, headless, make_mask_plan
from dllm_kernels.accumulation.scores import score_samples
from dllm_kernels.objectives import BGPO, RECIPES, Batch, Objective

SAMPLES = (1, 4, 16)
SAMPLES_IN_FULL = (1, 2, 4, 8, 16, 32)
SIZES = {"B": 2, "S": 32, "L": 24, "H": 64, "V": 16384, "layers": 1}
SIZES_IN_FULL = {"B": 2, "S": 64, "L": 48, "H": 64, "V": 32768, "layers": 2}
# coefficients that couple samples, at two numbers of them; small, as it is only their growth that counts
COUPLED = ("gdpo", "espo", "vrpo")
COUPLED_IN_FULL = ("gdpo", "espo", "spg", "vrpo", "rspo")
COUPLED_SAMPLES = (2, 16)
COUPLED_SIZES = {"B": 2, "S": 32, "L": 24, "H": 32, "V": 8192, "layers": 1}
TINY = {"B": 2, "S": 12, "L": 8, "H": 16, "V": 64, "layers": 1}
EXPAND = 2
WRITTEN = {"gdpo": step_published.gdpo_paper, "espo": step_published.espo}
TOLERANCE = {"float32": {"loss": 1e-4, "gradient": 1e-4}, "bfloat16": {"loss": 0.2, "gradient": 0.1}}


@dataclass(frozen=True)
class _Inputs:
    model: nn.Module
    plan: MaskPlan
    old_elbo_BK: Tensor
    advantages_B: Tensor
    prompt: int

    def result(self, loss: Tensor) -> Result:
        return {"loss": loss.detach()} | {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}


def _plan(sizes: Mapping[str, int], ids_BS: Tensor) -> MaskPlan:
    B, S, L, V, K = (sizes[key] for key in ("B", "S", "L", "V", "K"))
    completion_BS = (torch.arange(S, device=ids_BS.device) >= S - L).expand(B, S)
    ids_B = torch.arange(B, device=ids_BS.device)
    return make_mask_plan(ids_BS, completion_BS, law="bernoulli", t=0.5, samples=K, seed=1, sequence_ids=ids_B, mask_id=V - 1)


def _inputs(sizes: Mapping[str, int], dtype: torch.dtype, device: str) -> _Inputs:
    B, S, L, H, V, K = (sizes[key] for key in ("B", "S", "L", "H", "V", "K"))
    generator = torch.Generator().manual_seed(0)
    model = small_model(V=V, H=H, layers=sizes["layers"], dtype=dtype, device=device, expand=EXPAND)
    plan = _plan(sizes, torch.randint(3, V - 1, (B, S), generator=generator).to(device))
    old_elbo_BK = score_samples(model, plan) + 0.3 * torch.randn(B, K, generator=generator).to(device)
    return _Inputs(model, plan, old_elbo_BK, torch.linspace(-1.0, 1.0, B, device=device), S - L)


def cases(settings: Settings) -> list[Case]:
    shape = dict(settings.shape)
    largest = shape.pop("K", 2 if settings.tiny else SAMPLES_IN_FULL[-1])
    tolerance = TOLERANCE["float32" if settings.dtype == "float32" else "bfloat16"]

    def case(name: str, base: Mapping[str, int], n: int, setup: Callable[..., Prepared], **options: Any) -> Case:
        sizes = {**(TINY if settings.tiny else base), **shape, "K": n}
        bound = functools.partial(setup, dtype=settings.torch_dtype, device=settings.device, **options)
        return Case(name, sizes, {**TINY, "K": min(n, 2)}, bound, _least_flops(sizes), tolerance)

    curve = SAMPLES_IN_FULL if settings.full or settings.tiny else SAMPLES
    coupled = COUPLED_IN_FULL if settings.full else COUPLED
    return [
        *(case(f"n_t={n}", SIZES_IN_FULL if settings.full else SIZES, n, _setup) for n in curve if n <= largest),
        *(
            case(f"{algorithm}/n_t={n}", COUPLED_SIZES, n, _setup_coupled, algorithm=algorithm)
            for algorithm in coupled
            for n in COUPLED_SAMPLES
            if n <= largest
        ),
    ]


def _flops(sizes: Mapping[str, int], rows: float, parameters: float) -> float:
    """A forward and a backward: the body on every masked sequence, the head on some rows; without attention's own products."""
    tokens = float(sizes["B"] * sizes["S"] * sizes["K"])
    return 6.0 * (parameters * tokens + rows * sizes["H"] * sizes["V"])


def _least_flops(sizes: Mapping[str, int]) -> float:
    """The head on the masked rows alone."""
    plan = _plan(sizes, torch.zeros(sizes["B"], sizes["S"], dtype=torch.int64))
    # EuroBERT: four matrices of H x H, three of H x 2H
    return _flops(sizes, float(plan.counts.sum()), sizes["layers"] * (4 + 3 * EXPAND) * sizes["H"] ** 2)


def _setup(sizes: Mapping[str, int], *, dtype: torch.dtype, device: str) -> Prepared:
    x = _inputs(sizes, dtype, device)
    batch = Batch({"advantages": x.advantages_B}, {"old_sample_elbo": x.old_elbo_BK})
    ours, least = _Accumulate(x, BGPO, batch), _least_flops(sizes)
    return Prepared(
        (
            Contestant("ours", "ours", ours.make, note="accumulate", flops=lambda: ours.flops),
            Contestant("ours (loop)", "ours", functools.partial(_loop, x), note="bgpo_loss by hand", flops=least),
            _full_graph_contestant(x, sizes, functools.partial(_full_graph, x), "all n_t graphs kept"),
        ),
        _Oracle(x),
        sum(p.nbytes for p in x.model.parameters()),
    )


def _full_graph_contestant(x: _Inputs, sizes: Mapping[str, int], make: Callable[[], Runner], note: str) -> Contestant:
    every = float(sizes["B"] * sizes["S"] * sizes["K"])
    return Contestant("full graph", "peer", make, note=note, flops=_flops(sizes, every, multiplied_parameters(x.model)))


class _Accumulate:
    """The engine; `flops` is what it says of its last call."""

    def __init__(self, x: _Inputs, objective: Objective, batch: Batch) -> None:
        self.x, self.objective, self.batch, self.flops = x, objective, batch, 0.0

    def make(self) -> Runner:
        def run() -> Result:
            self.x.model.zero_grad(set_to_none=True)
            report = accumulate(self.x.model, self.x.plan, self.objective, self.batch)
            self.flops = float(report.flops)
            return self.x.result(report.loss)

        return run


def _loop(x: _Inputs) -> Runner:
    K = x.plan.shape[0]

    def run() -> Result:
        x.model.zero_grad(set_to_none=True)
        total = torch.zeros((), device=x.advantages_B.device)
        with headless(x.model) as body:
            for k in range(K):
                one = x.plan.cut(samples=slice(k, k + 1))
                loss = bgpo_loss(
                    body(one.noisy_ids[0]),
                    body.weight,
                    one.input_ids_BS,
                    one.masked[0],
                    one.weight_KB[0][:, None],
                    x.old_elbo_BK[:, k],
                    x.advantages_B,
                    samples=K,
                )
                loss.backward()
                total += loss.detach()
        return x.result(total)

    return run


def bgpo_in_pytorch(elbo_BK: Tensor, old_elbo_BK: Tensor, advantages_B: Tensor) -> Tensor:
    """BGPO's loss in four lines (arXiv 2510.11683), independent of the library's."""
    d_BK, A_B1 = elbo_BK - old_elbo_BK, advantages_B[:, None]
    ratio_BK = torch.where(A_B1 >= 0, 1 + d_BK, torch.exp(torch.where(A_B1 >= 0, 0.0, d_BK)))
    return -(A_B1 * ratio_BK).mean(1).mean()


def _full_graph(x: _Inputs) -> Runner:
    plan, prompt = x.plan, x.prompt
    target_BL1 = plan.input_ids_BS[:, prompt:, None]

    def run() -> Result:
        x.model.zero_grad(set_to_none=True)
        elbos = []
        for k in range(plan.shape[0]):
            one = plan.cut(samples=slice(k, k + 1))
            logits_BSV = x.model(input_ids=one.noisy_ids[0]).logits
            logp_BL = logits_BSV[:, prompt:].float().log_softmax(-1).gather(-1, target_BL1)[..., 0]
            elbos.append((logp_BL * one.masked[0, :, prompt:]).sum(-1) * one.weight_KB[0])
        loss = bgpo_in_pytorch(torch.stack(elbos, 1), x.old_elbo_BK, x.advantages_B)
        loss.backward()
        return x.result(loss)

    return run


class _Oracle:
    """Errors against pure PyTorch in float64, one sample at a time."""

    def __init__(self, x: _Inputs) -> None:
        self.x = x

    @functools.cached_property
    def true(self) -> Result:
        x = self.x
        model, (K, B, S) = copy.deepcopy(x.model).double(), x.plan.shape
        model.zero_grad(set_to_none=True)
        body, weight_VH = model.get_submodule("model"), model.get_parameter("lm_head.weight")
        total = torch.zeros((), dtype=torch.float64, device=x.advantages_B.device)
        for k in range(K):
            one = x.plan.cut(samples=slice(k, k + 1))
            rows = one.rows
            hidden_MH = body(input_ids=one.noisy_ids[0]).last_hidden_state.view(B * S, -1)
            logp_N = (hidden_MH[rows.index] @ weight_VH.t()).log_softmax(-1).gather(1, rows.target[:, None])[:, 0]
            elbo_B = logp_N.new_zeros(B).index_add(0, rows.sequence, logp_N) * one.weight_KB[0]
            loss = bgpo_in_pytorch(elbo_B[:, None], x.old_elbo_BK[:, k : k + 1].double(), x.advantages_B.double()) / K
            loss.backward()
            total += loss.detach()
        return {"loss": total} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    def __call__(self, result: Result) -> dict[str, float]:
        return _errors(result, self.true)


def _errors(result: Result, true: Result) -> dict[str, float]:
    if result.keys() != true.keys():
        raise ValueError(f"gradients of {sorted(result.keys() ^ true.keys())} are missing or unexpected")
    names = [name for name in true if name != "loss"]
    return {
        "loss": float((result["loss"].double() - true["loss"]).abs()),
        "gradient": relative_error([result[n] for n in names], [true[n] for n in names]),
    }


# --- objectives that couple samples -----------------------------------------------------------------------------------


def _setup_coupled(sizes: Mapping[str, int], *, dtype: torch.dtype, device: str, algorithm: str) -> Prepared:
    x = _inputs(sizes, dtype, device)
    objective = RECIPES[algorithm].make()
    old_elbo_B, pairs_B = x.old_elbo_BK.mean(1), torch.arange(sizes["B"], device=device)
    entries = {
        "advantages": x.advantages_B,
        "old_elbo": old_elbo_B,
        "ref_elbo": old_elbo_B - 0.5,
        "chosen": pairs_B % 2 == 0,
        "group_ids": pairs_B // 2,
    }
    lesson = Lesson(x.plan, Batch({name: entries[name] for name in objective.per_sequence}), _denominator(objective, x.plan))
    ours = _Accumulate(x, objective, lesson.batch)
    written = algorithm in WRITTEN
    note = "all n_t graphs kept" + ", its loss ours" * (not written)
    return Prepared(
        (
            Contestant("ours", "ours", ours.make, note="accumulate, two passes", flops=lambda: ours.flops),
            _full_graph_contestant(x, sizes, functools.partial(_coupled_graph, x, objective, lesson), note),
        ),
        _CoupledOracle(x, objective, lesson),
        sum(p.nbytes for p in x.model.parameters()),
    )


def _denominator(objective: Objective, plan: MaskPlan) -> float:
    B = plan.shape[1]
    return {"sequences": float(B), "tokens": float(plan.lengths_B.sum()), "pairs": B / 2}[objective.denominator]


def _coupled_graph(x: _Inputs, objective: Objective, lesson: Lesson) -> Runner:
    plan, prompt, name = lesson.plan, x.prompt, objective.name
    scored_KBL = plan.scored[:, :, prompt:]

    def run() -> Result:
        x.model.zero_grad(set_to_none=True)
        logp_KBL = torch.stack([step_published.token_logps(x.model, plan, k, prompt) for k in range(plan.shape[0])])
        if name in WRITTEN:
            loss = WRITTEN[name](torch.where(scored_KBL, logp_KBL, 0.0), lesson)
        else:
            loss = objective.contributions(logp_KBL[scored_KBL], plan, lesson.batch) / lesson.denominator
        loss.backward()
        return x.result(loss)

    return run


class _CoupledOracle:
    """Errors against the full graph in float64."""

    def __init__(self, x: _Inputs, objective: Objective, lesson: Lesson) -> None:
        self.arguments = x, objective, lesson

    @functools.cached_property
    def true(self) -> Result:
        x, objective, lesson = self.arguments
        return _coupled_graph(replace(x, model=copy.deepcopy(x.model).double()), objective, lesson)()

    def __call__(self, result: Result) -> dict[str, float]:
        return _errors(result, self.true)


# LLaDA-8B in bf16 with the paper's 512-token responses (ALGORITHMS.md section 5; prompt of 512 assumed)
PAPER = {"V": 126464, "S": 1024, "L": 512, "H": 4096}
PUBLISHED = {1: "fits", 2: "fits", 4: "fits (math); out of memory for code", 8: "out of memory", 16: "out of memory (follows)"}


def arithmetic() -> list[dict[str, Any]]:
    """Head tensors per sequence and policy update at the paper's size, in GiB: computed, not measured."""
    V, S, L, H = (PAPER[key] for key in ("V", "S", "L", "H"))
    gib, masked = 1 << 30, L // 2  # mean number of masked tokens
    # per sample: bf16 logits [S, V], the zero buffer of that size that the port fills, the masked rows' fp32 log-softmax
    per_sample = 2 * S * V * 2 + masked * V * 4
    # whatever n_t is: the GPU workspace, an fp32 dW, one sample's unit vectors and hidden gradient
    ours = (512 << 20) + 4 * H * V + 2 * masked * H + 2 * S * H
    return [
        {
            "n_t": n,
            "full graph GiB": round(n * per_sample / gib, 2),
            "ours GiB": round(ours / gib, 2),
            "published, 80 GB GPUs": verdict,
        }
        for n, verdict in PUBLISHED.items()
    ]


def summary(rows: Sequence[Row]) -> str:
    found = [row for row in rows if row["status"] == "ok" and row["role"] != "floor"]
    parts = []
    for family, members in _families(found).items():
        by = {(row["contestant"], row["sizes"]["K"]): row for row in members}
        measured = sorted(n for name, n in by if name == "ours" and by[name, n]["memory_mib"])
        if not measured or ("full graph", measured[-1]) not in by:
            parts.append(f"{family}: ours or the full graph did not run at the largest n_t")
            continue
        # from 2 on: only the first backward has no earlier gradients to be added to
        first, last = next((n for n in measured if n > 1), measured[0]), measured[-1]
        growth = []
        for name in ("ours", "full graph"):
            low, high = ((by.get((name, n)) or {}).get("memory_mib") for n in (first, last))
            growth.append(f"{name} {low:.0f} to {high:.0f} MiB ({high / low - 1:+.0%})" if low and high else f"{name} unknown")
        text = f"{family}, n_t = {first} to {last}: {', '.join(growth)}"
        if ratio := by["ours", last]["to_baseline"]:
            text += f", time {ratio:.2f} x the full graph's"
        parts.append(text)
    if not found:
        return "bgpo: nothing ran"
    return f"extra memory of {'; '.join(parts)}; gradients equal to {max(row['errors']['gradient'] for row in found):.0e}"


def _families(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each objective."""
    families: dict[str, list[Row]] = {}
    for row in rows:
        name, _, number = row["case"].split()[0].partition("/")
        families.setdefault(name.upper() if number else "BGPO", []).append(row)
    return families


def plot(rows: Sequence[Row], path: Path) -> None:
    plots.curves_over_samples({f"{k}'s update": v for k, v in _families(rows).items()}, path, title="EuroBERT", samples="n_t")


SUITE = Suite(
    name="bgpo",
    title="BGPO and sequence-level objectives: peak memory and time against the number of Monte-Carlo samples n_t",
    cases=cases,
    baseline="full graph",
    error_columns=("loss", "gradient"),
    shape_keys=(*SIZES, "K"),
    summary=summary,
    plot=plot,
    arithmetic=arithmetic,
    arithmetic_title="head tensors per sequence in the paper's setting (LLaDA-8B, bf16; its micro-batch is not published)",
    preload=("transformers.models.eurobert.modeling_eurobert", "dllm_trainer.train.algorithms"),
)
