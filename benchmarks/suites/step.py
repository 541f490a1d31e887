"""One RL step end to end, per algorithm and by phase: rollout, old and reference scores, update.

Two ways to the same weights' gradient:

    ours        `generate`, `score_samples`, `accumulate` with their defaults: no logits, one Monte-Carlo
                sample at a time
    published   as d1 and the sequence-level trainers after it (GDPO, ESPO): logits of every position in
                rollout, scores and update, the graphs of all K samples kept; `step_published.py`, in pure
                PyTorch

Same model, prompts, noise, rewards and masks: one `MaskPlan`, made in either step from its own rollout, so a
token that differs shows in the gradient too. Off-policy, as one update behind: the policy that rolls out and
is scored as "old" and the reference are copies with slightly other weights, so that ratios are not 1. Phases
are the medians over all calls.

A step ends with AdamW at learning rate 0, the same for both: its whole work, and weights that stay, so that
rounds are alike. Weights, gradients and optimizer state exist, resident, before a call and are written in
place: the memory figures are what a step needs beyond them, which both ways hold alike.

Rewards make advantages of about 1; centred ones nearly cancel in the loss, whose error is therefore absolute.
Loss and gradients are judged by the published step in float64, at the sizes of `--full`'s bound (where that
would not fit) by the published step itself; tokens by its sampler. Beyond float32 samplers may differ by a
rounding of the logits: all then learn from one rollout, and tokens are not judged.

By arithmetic, at the bound's sizes: the published step keeps 8 log-softmaxes [B L, V] of 494 MiB, and in
backward a gradient of another's size, its copy and one of all positions (617 MiB), 6 GiB or so; ours has a
workspace and one gradient of the head, 256 and 247 MiB, and the activations of one sample's body, some 200
MiB. Its denoising steps are few (one a block), since those are where ours gain most.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from dllm_trainer.train.algorithms import Scores

from benchmarks import plots, registry
from benchmarks.registry import EUROBERT, Case, Contestant, Result, Runner, Settings, Sizes, Suite, Work
from benchmarks.suites.step_inputs import (
    EXPAND,
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
from dllm_kernels.rollouts.schedules import commits_per_step

# B sequences in groups of G; prompts of P, completions of L tokens in blocks of R and T denoising steps; K
# samples or states
TINY = {"B": 4, "G": 2, "P": 4, "L": 8, "R": 4, "T": 4, "K": 2, "H": 32, "V": 64, "layers": 1}
_USUAL = {"B": 4, "G": 2, "P": 16, "L": 32, "R": 16, "T": 8, "K": 4, "H": 64, "V": 4096, "layers": 2}
SIZES = Sizes(TINY, _USUAL, _USUAL)
BOUND = Sizes(
    TINY,
    _USUAL,
    {"B": 8, "G": 4, "P": 32, "L": 128, "R": 32, "T": 4, "K": 8, "H": 512, "V": 126464, "layers": 4},
)
DEFAULT = ("bgpo", "gdpo", "espo", "diffu_grpo", "egspo")
AT_THE_BOUND = ("gdpo",)  # eight minutes on two cores
TOLERANCE = {
    "float32": {"loss": 1e-4, "gradient": 1e-4, "tokens": 0.0},
    "bfloat16": {"loss": 0.2, "gradient": 0.1},
}
EXACT_BYTES = 2 << 30  # of float64 logits in the published step; beyond, it is no oracle


def cases(settings: Settings) -> list[Case]:
    tolerance = TOLERANCE["float32" if settings.dtype == "float32" else "bfloat16"]

    def case(algorithm: str, tiers: Sizes, name: str) -> Case:
        sizes, tiny = ({**s, "K": samples_of(algorithm, s["K"], s["T"])} for s in (tiers.of(settings), TINY))
        inputs = functools.partial(_inputs, algorithm=algorithm, settings=settings)
        return Case(name, sizes, tiny, inputs, CONTESTANTS, Oracle, tolerance, least_flops(algorithm, sizes))

    found = [case(algorithm, SIZES, algorithm) for algorithm in (RECIPES if settings.full else DEFAULT)]
    if settings.full and not settings.tiny:
        found += [case(algorithm, BOUND, f"{algorithm}_bound") for algorithm in AT_THE_BOUND]
    return found


def least_flops(algorithm: str, sizes: Mapping[str, int]) -> float:
    """The least of any exact step: every state through the body once per pass, the head on rows that count.

    The head runs on tokens that are drawn, on tokens that are scored, and three times as much in the update;
    attention's own products are left out.
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
    body, head = 2.0 * registry.body_parameters(sizes, EXPAND), 2.0 * H * sizes["V"]
    scoring = recipe.needs_reference + (recipe.needs_old and algorithm not in ("egspo", "egspo_sa", "trace_rl"))
    rollout = sizes["B"] * (T * S * body + L * head)
    return rollout + (3 + scoring) * (B * K * S * body + rows * head)


def _inputs(sizes: Mapping[str, int], *, algorithm: str, settings: Settings) -> Inputs:
    x = make_inputs(algorithm, sizes, settings.torch_dtype, settings.device)
    return x if settings.dtype == "float32" else replace(x, agreed=complete(x))


def _work(x: Inputs, step: Callable[[Inputs, Clock], Runner], note: str) -> Work:
    clock = Clock(x.prompts_BP.device.type)
    runner = step(x, clock)

    def run() -> Result:
        result = runner()
        work.flops = clock.flops
        return result

    work = Work(run, note=note, phases=clock.medians)
    return work


def _ours(x: Inputs) -> Work:
    return _work(x, our_step, "no logits")


def _published(x: Inputs) -> Work:
    return _work(x, published_step, "full logits" + ", its loss ours" * (x.config.algorithm not in WRITTEN))


CONTESTANTS = (Contestant("ours", "ours", _ours), Contestant("published", "peer", _published))


def our_step(x: Inputs, clock: Clock) -> Runner:
    sizes = x.sizes
    per_block = sizes["T"] * sizes["R"] // sizes["L"]
    commits = commits_per_step(sizes["R"], per_block)
    undecided = sizes["L"] // sizes["R"] * sum(sizes["R"] - sum(commits[:step]) for step in range(per_block))
    greedy = RECIPES[x.config.algorithm].greedy
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
        return {
            "loss": float((result["loss"].double() - true["loss"].double()).abs()),
            "gradient": registry.gradient_error(result, true, "loss", "tokens"),
            "tokens": float((result["tokens"] != true["tokens"]).float().mean()),
        }


SUITES = {
    "step": Suite(
        name="step",
        title="an RL step end to end: rollout, old and reference scores, update",
        cases=cases,
        baseline="published",
        error_columns=("loss", "gradient", "tokens"),
        shape_keys=tuple(TINY),
        plot=functools.partial(plots.seconds_and_memory, phases=PHASES),
        preload=(EUROBERT, "dllm_trainer.train.algorithms", "dllm_trainer.config"),
    )
}
