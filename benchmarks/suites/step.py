"""One RL step end to end, per algorithm and by phase: rollout, old and reference scores, update.

Two ways to the same weights' gradient:

    ours        `generate`, `score_samples`, `accumulate` with their defaults: no logits, one Monte-Carlo sample at a time
    published   as d1 and the sequence-level trainers after it (GDPO, ESPO): logits of every position in rollout, scores and
                update, the graphs of all K samples kept; `step_published.py`, in pure PyTorch

Same model, prompts, noise, rewards and masks: one `MaskPlan`, made in either step from its own rollout, so a token that
differs shows in the gradient too. Off-policy, as one update behind: the policy that rolls out and is scored as "old" and
the reference are copies with slightly other weights, so that ratios are not 1. Phases are the medians over all calls.

A step ends with AdamW at learning rate 0, the same for both: its whole work, and weights that stay, so that rounds are alike.
Weights, gradients and optimizer state exist, resident, before a call and are written in place: the memory figures are what a
step needs beyond them, which both ways hold alike.

Rewards make advantages of about 1; centred ones nearly cancel in the loss, whose error is therefore absolute.
Loss and gradients are judged by the published step in float64, at the sizes of `--full`'s bound (where that would not
fit) by the published step itself; tokens by its sampler. Beyond float32 samplers may differ by a rounding of the logits: all
then learn from one rollout, and tokens are not judged.

By arithmetic, at the bound's sizes: the published step keeps 8 log-softmaxes [B L, V] of 494 MiB, and in backward a gradient of
another's size, its copy and one of all positions (617 MiB), 6 GiB or so; ours has a workspace and one gradient of the head, 256
and 247 MiB, and the activations of one sample's body, some 200 MiB. Its denoising steps are few (one a block), since those are
where ours gain most.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from dllm_trainer.train.algorithms import Scores

from benchmarks import plots
from benchmarks.registry import Case, Contestant, Prepared, Result, Row, Runner, Settings, Suite, relative_error
from benchmarks.suites.step_inputs import (
    PHASES,
    TEMPERATURE,
    Clock,
    Inputs,
    make_inputs,
    make_lesson,
    masks,
    rl_config,
    samples_of,
)
from benchmarks.suites.step_published import WRITTEN, complete, published_step
from dllm_kernels import Rollout, accumulate, generate
from dllm_kernels.objectives import RECIPES
from dllm_kernels.rollouts.samplers import commits_per_step

# B sequences in groups of G; prompts of P, completions of L tokens in blocks of R and T denoising steps; K samples or states
SIZES = {"B": 4, "G": 2, "P": 16, "L": 32, "R": 16, "T": 8, "K": 4, "H": 64, "V": 4096, "layers": 2}
TINY = {"B": 4, "G": 2, "P": 4, "L": 8, "R": 4, "T": 4, "K": 2, "H": 32, "V": 64, "layers": 1}
BOUND = {"B": 8, "G": 4, "P": 32, "L": 128, "R": 32, "T": 4, "K": 8, "H": 512, "V": 126464, "layers": 4}
DEFAULT = ("bgpo", "gdpo", "espo", "diffu_grpo", "egspo")
AT_THE_BOUND = ("gdpo",)  # eight minutes on two cores
TOLERANCE = {
    "float32": {"loss": 1e-4, "gradient": 1e-4, "tokens": 0.0},
    "bfloat16": {"loss": 0.2, "gradient": 0.1},
}
EXACT_BYTES = 2 << 30  # of float64 logits in the published step; beyond, it is no oracle


def cases(settings: Settings) -> list[Case]:
    tolerance = TOLERANCE["float32" if settings.dtype == "float32" else "bfloat16"]

    def case(algorithm: str, base: Mapping[str, int], name: str) -> Case:
        sizes, tiny = ({**s, "K": samples_of(algorithm, s["K"], s["T"])} for s in ({**base, **settings.shape}, TINY))
        setup = functools.partial(_setup, algorithm=algorithm, settings=settings)
        return Case(name, sizes, tiny, setup, least_flops(algorithm, sizes), tolerance)

    names = RECIPES if settings.full else DEFAULT
    found = [case(algorithm, TINY if settings.tiny else SIZES, algorithm) for algorithm in names]
    if settings.full and not settings.tiny:
        found += [case(algorithm, BOUND, f"{algorithm}_bound") for algorithm in AT_THE_BOUND]
    return found


def least_flops(algorithm: str, sizes: Mapping[str, int]) -> float:
    """What no exact step does without: every state through the body once per pass, and the head on the rows that count.

    The head runs on tokens that are drawn, on tokens that are scored, and three times as much in the update; attention's own
    products are left out.
    """
    recipe, B, L, K, T = RECIPES[algorithm], sizes["B"], sizes["L"], sizes["K"], sizes["T"]
    if algorithm == "vrpo":  # learns from the best and the worst of each group
        B = 2 * (B // sizes["G"])
    S, H = sizes["P"] + L, sizes["H"]
    if algorithm in ("egspo", "egspo_sa"):
        rows = float(B * K * L // T)
    elif recipe.needs_trajectory:
        rows = float(B * L)
    else:
        ids = torch.zeros(B, S, dtype=torch.int64)
        rows = float(masks(rl_config(algorithm, K), sizes, ids).counts.sum())
    # EuroBERT: four matrices of H x H, three of H x 3H
    body, head = 2.0 * sizes["layers"] * 13 * H * H, 2.0 * H * sizes["V"]
    scoring = recipe.needs_reference + (recipe.needs_old and algorithm not in ("egspo", "egspo_sa", "trace_rl"))
    rollout = sizes["B"] * (T * S * body + L * head)
    return rollout + (3 + scoring) * (B * K * S * body + rows * head)


def _setup(sizes: Mapping[str, int], *, algorithm: str, settings: Settings) -> Prepared:
    x = make_inputs(algorithm, sizes, settings.torch_dtype, settings.device)
    if settings.dtype != "float32":
        x = replace(x, agreed=complete(x))
    written = "" if algorithm in WRITTEN else ", its loss ours"
    contestants = (
        _contestant("ours", our_step, x, "no logits"),
        _contestant("published", published_step, x, f"full logits{written}"),
    )
    return Prepared(contestants, Oracle(x), 0)


def _contestant(name: str, step: Callable[[Inputs, Clock], Runner], x: Inputs, note: str) -> Contestant:
    clock = Clock(x.prompts_BP.device.type)
    return Contestant(
        name,
        "ours" if name == "ours" else "peer",
        functools.partial(step, x, clock),
        note=note,
        flops=lambda: clock.flops,
        phases=clock.medians,
    )


def our_step(x: Inputs, clock: Clock) -> Runner:
    sizes = x.sizes
    per_block = sizes["T"] * sizes["R"] // sizes["L"]
    commits = commits_per_step(sizes["R"], per_block)
    undecided = sizes["L"] // sizes["R"] * sum(sizes["R"] - sum(commits[:step]) for step in range(per_block))
    greedy = x.config.algorithm == "egspo_sa"
    if greedy:  # the head on all masked rows too
        undecided += sum(sizes["L"] - sum((commits * sizes["T"])[:step]) for step in range(sizes["T"]))

    def run() -> Result:
        clock.start()
        with clock("rollout"):
            rollout = generate(
                x.behaviour,
                x.prompts_BP,
                length=sizes["L"],
                block_length=sizes["R"],
                steps=sizes["T"],
                mask_id=x.mask_id,
                temperature=TEMPERATURE,
                sequence_ids=x.sequence_ids_B,
                greedy=greedy,
            )
        scores = Scores(x.behaviour, x.reference, {})
        lesson = make_lesson(x, rollout, scores, clock)
        with clock("update"):
            x.optimizer.zero_grad(set_to_none=False)
            report = accumulate(x.model, lesson.plan, x.objective, lesson.batch, denominator=lesson.denominator)
            x.optimizer.step()
        plan, tokens = lesson.plan, sizes["T"] * rollout.ids_BS.numel()
        clock.flops = report.flops + x.forward_flops(tokens, sizes["B"] * undecided)
        clock.flops += scores.passes * x.forward_flops(plan.noisy_ids.numel(), len(plan.rows.index))
        return x.result(report.loss, rollout)

    return run


class Oracle:
    """Errors against the published step in float64; against itself where that would not fit."""

    def __init__(self, x: Inputs) -> None:
        self.x = x

    @functools.cached_property
    def _true(self) -> Result:
        x = self.x
        rollout: Rollout = x.agreed or complete(x)
        elements = x.sizes["B"] * x.sizes["K"] * (x.sizes["P"] + x.sizes["L"]) * x.sizes["V"]
        exact = 8 * elements <= EXACT_BYTES
        found = published_step(x.double(rollout) if exact else replace(x, agreed=rollout), Clock(rollout.ids_BS.device.type))()
        return {**{name: tensor.clone() for name, tensor in found.items()}, "tokens": rollout.completion_BL}

    def __call__(self, result: Result) -> dict[str, float]:
        result = {name: tensor.clone() for name, tensor in result.items()} if "_true" not in self.__dict__ else result
        true = self._true
        if result.keys() != true.keys():
            raise ValueError(f"gradients of {sorted(result.keys() ^ true.keys())} are missing or unexpected")
        names = [name for name in true if name not in ("loss", "tokens")]
        return {
            "loss": float((result["loss"].double() - true["loss"].double()).abs()),
            "gradient": relative_error([result[n] for n in names], [true[n] for n in names]),
            "tokens": float((result["tokens"] != true["tokens"]).float().mean()),
        }


def summary(rows: Sequence[Row]) -> str:
    by = {(row["case"].split()[0], row["contestant"]): row for row in rows if row["status"] == "ok"}
    parts = []
    for name in dict.fromkeys(case for case, _ in by):
        ours, published = by.get((name, "ours")), by.get((name, "published"))
        if ours is None or published is None:
            continue
        text = f"{name} {1 / ours['to_baseline']:.2f} x as fast"
        if ours["memory_mib"] and published["memory_mib"]:
            text += f", {published['memory_mib'] / ours['memory_mib']:.1f} x less extra memory"
        parts.append(text)
    if not parts:
        return "step: ours or the published step did not run"
    worst = max(row["errors"]["gradient"] for (_, contestant), row in by.items() if contestant == "ours")
    return f"against the published step: {'; '.join(parts)}; gradients equal to {worst:.0e}"


def plot(rows: Sequence[Row], path: Path) -> None:
    """Seconds by phase of every case and contestant, as shares of the slowest's; extra memory beside it."""
    pyplot = plots.pyplot_module()
    measured = [row for row in rows if row["time_ms"] and row["phases_s"]]
    if not measured:
        return
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 1.2 + 0.34 * len(measured)), sharey=True)
    labels = [f"{row['case'].split()[0]}: {row['contestant']}" for row in measured]
    most = {row["case"]: max(sum(r["phases_s"].values()) for r in measured if r["case"] == row["case"]) for row in measured}
    ends = [0.0] * len(measured)
    for number, phase in enumerate(PHASES):
        shares = [row["phases_s"][phase] / most[row["case"]] for row in measured]
        left.barh(labels, shares, left=ends, label=phase, color=f"C{number}")
        ends = [end + share for end, share in zip(ends, shares, strict=True)]
    for place, (end, row) in enumerate(zip(ends, measured, strict=True)):
        left.text(end + 0.01, place, f"{row['time_ms']['median'] / 1e3:.3g} s", va="center", fontsize=8)
    left.set_title("seconds by phase (bars: shares of the slower)", loc="left", fontsize=10)
    left.set_xlim(0, 1.2)
    left.legend(frameon=False, ncols=len(PHASES), loc="upper left", bbox_to_anchor=(0, -0.12), fontsize=8)
    colours = [plots.COLOURS["ours" if row["role"] == "ours" else "full graph"] for row in measured]
    drawn = right.barh(labels, [row["memory_mib"] or 0.0 for row in measured], color=colours)
    right.bar_label(drawn, fmt="%.3g", fontsize=8, padding=2)
    right.set_xscale("symlog", linthresh=1)
    right.set_title("extra peak memory, MiB", loc="left", fontsize=10)
    left.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


SUITE = Suite(
    name="step",
    title="an RL step end to end: rollout, old and reference scores, update",
    cases=cases,
    baseline="published",
    error_columns=("loss", "gradient", "tokens"),
    shape_keys=tuple(SIZES),
    summary=summary,
    plot=plot,
    preload=("transformers.models.eurobert.modeling_eurobert", "dllm_trainer.train.algorithms", "dllm_trainer.config"),
)
