"""Updates whose coefficients depend on K samples: memory and seconds of BGPO and of sequence objectives.

BGPO's own update, and objectives whose coefficients couple all samples of a sequence (GDPO, ESPO, SPG), a
pair (VRPO) or the batch (RSPO). All are off-policy, so that coefficients depend on the scores. Every token is
masked with probability 0.5, so that samples are alike and their number n_t is all that changes (under the
published laws the largest of more samples is larger).

    ours         `accumulate`: one sample at a time; in one pass for BGPO, after a pass of scores for the
                 others
    ours (fits)  the others: in the micro-batch that `fit_passes` finds for the bytes that autograd saves in the
                 full graph
    ours (half)  for half of these bytes; the note says of both what fits, and whether in one pass or two
    ours (loop)  BGPO: `bgpo_loss` in a loop written by hand
    full graph   pure PyTorch as the published sequence-level trainers (d1, GDPO, ESPO) score: logits of every
                 position, the graphs of all samples alive until one backward; the losses of BGPO, GDPO and
                 ESPO are those written out in `step_published.py`, the others call ours on these scores
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import plots, registry, report
from benchmarks.registry import EUROBERT, Case, Contestant, Result, Row, Settings, Sizes, Suite, Work
from benchmarks.suites import step_published
from benchmarks.suites.elbo import TINY, accumulated, against, double, make_data
from benchmarks.suites.step_inputs import Lesson
from dllm_kernels import MaskPlan, bgpo_loss, fit_passes, headless
from dllm_kernels.accumulation.fitting import Fit, Saved
from dllm_kernels.accumulation.objective import Batch, Objective
from dllm_kernels.accumulation.scores import score_samples
from dllm_kernels.objectives import RECIPES

CURVE, CURVE_IN_FULL = (1, 4, 16), (1, 2, 4, 8, 16, 32)
SIZES = Sizes(
    TINY,
    {"B": 2, "S": 32, "L": 24, "H": 64, "V": 16384, "layers": 1},
    {"B": 2, "S": 64, "L": 48, "H": 64, "V": 32768, "layers": 2},
)
# coefficients that couple samples, at two numbers of them; small, as it is only their growth that counts
COUPLED, COUPLED_IN_FULL = ("gdpo", "espo", "vrpo"), ("gdpo", "espo", "spg", "vrpo", "rspo")
COUPLED_SAMPLES = (2, 16)
_COUPLED = {"B": 2, "S": 32, "L": 24, "H": 32, "V": 8192, "layers": 1}
COUPLED_SIZES = Sizes(TINY, _COUPLED, _COUPLED)
EXPAND = 2
WRITTEN = {"bgpo": step_published.bgpo, "gdpo": step_published.gdpo, "espo": step_published.espo}


@dataclass(frozen=True)
class Update:
    """What the contestants of `bgpo` are given."""

    model: nn.Module
    objective: Objective
    lesson: Lesson
    prompt: int
    algorithm: str

    def operations(self, rows: float) -> float:
        V, H = self.model.get_parameter("lm_head.weight").shape
        parameters, tokens = registry.multiplied_parameters(self.model), self.lesson.plan.noisy_ids.numel()
        return registry.operations(parameters, tokens, rows, {"H": H, "V": V}, gradients=True)


def _plan(sizes: Mapping[str, int], device: str) -> MaskPlan:
    return make_data(sizes, "bernoulli", device, seed=0, t=0.5).plan()


def _update(sizes: Mapping[str, int], *, algorithm: str, dtype: torch.dtype, device: str) -> Update:
    B, K = sizes["B"], sizes["K"]
    model = registry.small_model(V=sizes["V"], H=sizes["H"], layers=sizes["layers"], dtype=dtype, device=device, expand=EXPAND)
    plan = _plan(sizes, device)
    off_BK = 0.3 * torch.randn(B, K, generator=torch.Generator().manual_seed(2)).to(device)
    old_elbo_BK, pairs_B = score_samples(model, plan) + off_BK, torch.arange(B, device=device)
    objective = RECIPES[algorithm].make()
    per_sequence = {
        "advantages": torch.linspace(-1.0, 1.0, B, device=device),
        "old_elbo": old_elbo_BK.mean(1),
        "ref_elbo": old_elbo_BK.mean(1) - 0.5,
        "chosen": pairs_B % 2 == 0,
        "group_ids": pairs_B // 2,
    }
    per_sample = {"old_sample_elbo": old_elbo_BK}
    batch = Batch(
        {name: per_sequence[name] for name in objective.per_sequence}, {name: per_sample[name] for name in objective.per_sample}
    )
    denominators = {"sequences": float(B), "tokens": float(plan.lengths_B.sum()), "pairs": B / 2}
    lesson = Lesson(plan, batch, denominators[objective.denominator])
    return Update(model, objective, lesson, sizes["S"] - sizes["L"], algorithm)


def cases(settings: Settings) -> list[Case]:
    largest = settings.shape.get("K", 2 if settings.tiny else CURVE_IN_FULL[-1])
    tolerance = {"loss": 1e-4, "gradient": 1e-4} if settings.dtype == "float32" else {"loss": 0.2, "gradient": 0.1}

    def case(algorithm: str, sizes: Sizes, n: int, contestants: tuple[Contestant, ...]) -> Case:
        own = {**sizes.of(settings), "K": n}
        tokens, masked = own["B"] * own["S"] * n, float(_plan(own, "cpu").counts.sum())
        return Case(
            name=f"n_t={n}" if algorithm == "bgpo" else f"{algorithm}/n_t={n}",
            sizes=own,
            tiny={**TINY, "K": min(n, 2)},
            inputs=functools.partial(_update, algorithm=algorithm, dtype=settings.torch_dtype, device=settings.device),
            contestants=contestants,
            oracle=lambda x: against(_graph(double(x)), "loss"),
            tolerance=tolerance,
            flops=registry.operations(registry.body_parameters(own, EXPAND), tokens, masked, own, gradients=True),
            output_bytes=lambda x: sum(p.nbytes for p in x.model.parameters()),
        )

    curve = CURVE_IN_FULL if settings.full or settings.tiny else CURVE
    coupled = COUPLED_IN_FULL if settings.full else COUPLED
    return [
        *(case("bgpo", SIZES, n, OF_BGPO) for n in curve if n <= largest),
        *(case(name, COUPLED_SIZES, n, OF_COUPLED) for name in coupled for n in COUPLED_SAMPLES if n <= largest),
    ]


def _our_update(x: Update) -> Work:
    note = "accumulate" + ", two passes" * (x.objective.coupling != "sample")
    return accumulated(x.model, x.lesson.plan, x.objective, x.lesson.batch, note)


def _fit(x: Update, part: int) -> tuple[Fit, int]:
    """The micro-batch that fits a part of what autograd saves in the full graph, and how many bytes that is."""
    saved = Saved()
    with saved.counted():
        _graph(x)()
    budget = saved.bytes(x.model) // part
    del saved
    return fit_passes(x.model, x.lesson.plan, x.objective, x.lesson.batch, memory_budget=budget), budget


def _nothing_fits(x: Update, *, part: int) -> str:
    """At the smallest sizes the engine's workspace is larger than the full graph."""
    try:
        _fit(x, part)
    except ValueError as error:
        return str(error)
    return ""


def _fitted(x: Update, *, part: int) -> Work:
    fit, budget = _fit(x, part)
    cut = {"samples_per_pass": fit.samples_per_pass, "sequences_per_pass": fit.sequences_per_pass}
    note = f"{budget >> 20} MiB fit {fit.samples_per_pass} samples of {fit.sequences_per_pass} sequences: "
    note += "one pass" if fit.passes == 1 else "two passes"
    return accumulated(x.model, x.lesson.plan, x.objective, x.lesson.batch, note, **cut)


def _loop(x: Update) -> Work:
    plan, batch, K = x.lesson.plan, x.lesson.batch, x.lesson.plan.shape[0]
    old_BK, advantages_B = batch.per_sample["old_sample_elbo"], batch.per_sequence["advantages"]

    def run() -> Result:
        x.model.zero_grad(set_to_none=True)
        total = torch.zeros((), device=advantages_B.device)
        with headless(x.model) as body:
            for k in range(K):
                one = plan.cut(samples=slice(k, k + 1))
                given = one.input_ids_BS, one.masked[0], one.weight_KB[0][:, None], old_BK[:, k], advantages_B
                loss = bgpo_loss(body(one.noisy_ids[0]), body.weight, *given, samples=K)
                loss.backward()
                total += loss.detach()
        return {"loss": total} | registry.gradients(x.model)

    return Work(run, x.operations(float(plan.counts.sum())), "bgpo_loss by hand")


def _graph(x: Update) -> Callable[[], Result]:
    plan, scored_KBL = x.lesson.plan, x.lesson.plan.scored[:, :, x.prompt :]

    def run() -> Result:
        x.model.zero_grad(set_to_none=True)
        logp_KBL = torch.stack([step_published.token_logps(x.model, plan, k, x.prompt) for k in range(plan.shape[0])])
        if x.algorithm in WRITTEN:
            loss = WRITTEN[x.algorithm](torch.where(scored_KBL, logp_KBL, 0.0), x.lesson)
        else:
            loss = x.objective.contributions(logp_KBL[scored_KBL], plan, x.lesson.batch) / x.lesson.denominator
        loss.backward()
        return {"loss": loss.detach()} | registry.gradients(x.model)

    return run


def _full_graph(x: Update) -> Work:
    note = "all n_t graphs kept" + ", its loss ours" * (x.algorithm not in WRITTEN)
    return Work(_graph(x), x.operations(x.lesson.plan.noisy_ids.numel()), note)


OF_BGPO = (
    Contestant("ours", "ours", _our_update),
    Contestant("ours (loop)", "ours", _loop),
    Contestant("full graph", "peer", _full_graph),
)
OF_COUPLED = (
    OF_BGPO[0],
    Contestant("ours (fits)", "ours", functools.partial(_fitted, part=1), functools.partial(_nothing_fits, part=1)),
    Contestant("ours (half)", "ours", functools.partial(_fitted, part=2), functools.partial(_nothing_fits, part=2)),
    OF_BGPO[2],
)

# LLaDA-8B in bf16 with the paper's 512-token responses (ALGORITHMS.md section 5; prompt of 512 assumed)
PAPER = {"V": 126464, "S": 1024, "L": 512, "H": 4096}
PUBLISHED = {1: "fits", 2: "fits", 4: "fits (math); out of memory for code", 8: "out of memory", 16: "out of memory (follows)"}


def arithmetic() -> list[dict[str, Any]]:
    """Head tensors per sequence and policy update at the paper's size, in GiB: computed, not measured."""
    V, S, L, H = (PAPER[key] for key in ("V", "S", "L", "H"))
    gib, masked = 1 << 30, L // 2  # mean number of masked tokens
    # per sample: bf16 logits [S, V], the zero buffer of that size that the port fills, the masked rows' fp32
    # log-softmax
    per_sample = 2 * S * V * 2 + masked * V * 4
    # whatever n_t is: the GPU workspace, an fp32 dW, one sample's unit vectors and hidden gradient
    ours = {"ours GiB": round(((512 << 20) + 4 * H * V + 2 * masked * H + 2 * S * H) / gib, 2)}
    return [
        {"n_t": n, "full graph GiB": round(n * per_sample / gib, 2), **ours, "published, 80 GB GPUs": verdict}
        for n, verdict in PUBLISHED.items()
    ]


def _plot(rows: Sequence[Row], path: Path) -> None:
    families: dict[str, list[Row]] = {}
    for row in rows:
        families.setdefault(f"{(report.family(row) or 'bgpo').upper()}'s update", []).append(row)
    plots.curves_over_samples(families, path, title="EuroBERT", samples="n_t")


SUITES = {
    "bgpo": Suite(
        name="bgpo",
        title="BGPO and sequence-level objectives: peak memory and time against the number of Monte-Carlo samples n_t",
        cases=cases,
        baseline="full graph",
        error_columns=("loss", "gradient"),
        shape_keys=(*TINY, "K"),
        plot=_plot,
        arithmetic=arithmetic,
        arithmetic_title="head tensors per sequence in the paper's setting (LLaDA-8B, bf16; its micro-batch is not published)",
        preload=(EUROBERT, "dllm_trainer.train.algorithms"),
    ),
}
