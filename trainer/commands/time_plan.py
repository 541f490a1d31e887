"""`dllm-kernels plan --on`: how long a run will take, phase by phase.

Calls of the model, tokens and operations follow from the config and from calls over fake tensors. Seconds come from a rate: of
a datasheet, of which SHARE is taken to be reached, or of this machine, on which each kind of call is made with random weights
for a few seconds. What is left out: rewards, data, saving, and groups without signal, which cost no gradient.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from dllm_kernels import accumulate, generate, make_mask_plan, score_samples
from dllm_kernels.accumulation.objective import NEGATIVE_ELBO, Batch
from dllm_kernels.masks.plan import MaskPlan
from dllm_kernels.objectives import RECIPES

from ..config import RunConfig
from ..errors import UserError
from ..train.algorithms import choose_algorithm
from ..train.evaluation import decodings
from ..train.optimization import make_optimizer
from ..train.setup import Setup
from .planned_calls import Work, idle_parameters, measure_call, planned_task, prompt_tokens, rows_of, skeleton, trained_tokens

Kind = Literal["draw", "score", "learn", "optimizer"]
SHARE = 0.4  # of a datasheet's products that calls of a model reach; an assumption
PATIENCE = 2.5  # seconds for each kind of call on this machine
NODE = 8  # GPUs that reach each other over links


@dataclass(frozen=True)
class Phase:
    """What a rank does again and again: `calls` of the model like `work` in one step."""

    step: Literal["sft step", "rl update", "evaluation"]
    name: str
    kind: Kind
    calls: float  # the last micro-batch may be a fraction of one
    work: Work | None = None  # None: the optimizer
    sequences: int = 0  # B of a call
    samples: int = 1  # of a call
    prompt: int = 0  # tokens
    at_most: bool = False

    @property
    def tokens(self) -> float:
        return 0.0 if self.work is None else self.calls * self.work.sequences * self.work.tokens

    @property
    def flops(self) -> float:
        return 0.0 if self.work is None else self.calls * (self.work.flops + self.work.head_flops)


@dataclass(frozen=True)
class Datasheet:
    """Of one GPU: operations a second of dense products in bf16 and in fp32, bytes a second of its memory, of links and between
    nodes, one way."""

    bf16: float
    fp32: float
    memory: float
    link: float
    network: float


DEVICES = {
    "A100": Datasheet(312e12, 19.5e12, 2.0e12, 300e9, 25e9),
    "H100": Datasheet(989e12, 67e12, 3.35e12, 450e9, 50e9),
    "H200": Datasheet(989e12, 67e12, 4.8e12, 450e9, 50e9),
}
PLACES = ("here", *DEVICES)


def describe_time(config: RunConfig, *, on: str, ranks: int = 1) -> str:
    """Phases with their calls, tokens, operations and seconds on a rank, as text; which one dominates, and what halves it.

    on: `here`, or a name of DEVICES. Raises UserError for another.
    """
    if on not in PLACES:
        raise UserError(f"--on must be one of {', '.join(PLACES)}, got {on}")
    torch.set_num_threads(config.threads)
    found, assumed = phases(config, ranks=ranks)
    seconds = _here(config, found) if on == "here" else _by_datasheet(config, found, DEVICES[on], ranks)
    lines = [f"{'time on ' + on:<14}{'phase':<20}{'model calls':>12}{'tokens':>14}{'TFLOP':>12}{'seconds':>10}{'share':>7}"]
    totals: dict[str, float] = {}
    for phase, taken in zip(found, seconds, strict=True):
        totals[phase.step] = totals.get(phase.step, 0.0) + taken
    for phase, taken in zip(found, seconds, strict=True):
        share = taken / totals[phase.step] if totals[phase.step] else 0.0
        calls = f"{'<= ' * phase.at_most}{phase.calls:,.4g}" if phase.work else "-"
        figures = f"{calls:>12}{phase.tokens:>14,.0f}{_short(phase.flops / 1e12):>12}{_short(taken):>10}{share:>7.0%}"
        lines.append(f"{phase.step:<14}{phase.name:<20}{figures}")
    lines += ["", *_summary(config, found, seconds, totals)]
    if on != "here":
        lines.append(
            f"a prediction: {SHARE:.0%} of the datasheet's products or all of its memory, link or network, the slowest of them"
        )
    elif ranks > 1:
        lines.append(f"measured in one process, as if {ranks} ranks did not slow each other down")
    return "\n".join([*lines, *assumed])


def _summary(config: RunConfig, found: list[Phase], seconds: list[float], totals: dict[str, float]) -> Iterator[str]:
    times = {"sft step": config.sft.steps, "rl update": config.rl.updates}
    times["evaluation"] = 1 + (config.sft.steps > 0 and config.rl.updates > 0)
    for step, one in totals.items():
        yield f"{step + ':':<14}{_short(one)} s, {times[step]:,} of them {_duration(one * times[step])}"
    step = "rl update" if "rl update" in totals else "sft step" if "sft step" in totals else "evaluation"
    taken, phase = _largest(found, seconds, step)
    half = totals[step] - taken / 2
    yield (
        f"of {step.split()[0]} the {phase.name} takes {taken / totals[step]:.0%}, and with half of it a step {_short(half)} s: "
        f"{_advice(config, phase)}"
    )


def _largest(found: list[Phase], seconds: list[float], step: str) -> tuple[float, Phase]:
    index = max((i for i, phase in enumerate(found) if phase.step == step), key=lambda i: seconds[i])
    return seconds[index], found[index]


def _advice(config: RunConfig, phase: Phase) -> str:
    if phase.kind == "draw":
        return "half of rollout.steps, or keys and values that are kept (rollout.cache)"
    if phase.kind == "optimizer":
        return "adapters (model.lora.rank), or larger batches for each step"
    if phase.step == "sft step":
        return "half of sft.batch"
    if phase.name == "first pass":
        return "rl.samples_per_pass = rl.samples, where memory allows, leaves this pass out"
    return "half of rl.samples, of the states that are trained on, or of rl.inner_iterations"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:,.3g} h"


# --- what is done how often ---------------------------------------------------------------------------------------------


def phases(config: RunConfig, *, ranks: int = 1) -> tuple[list[Phase], list[str]]:
    """Of every kind of step of a run, and what was assumed."""
    task, assumed = planned_task(config)
    setup, known = skeleton(config, task, ranks)
    assumed += known
    prompt = prompt_tokens(setup, assumed)
    return [*_of_sft(setup, ranks, prompt), *_of_rl(setup, ranks, prompt), *_of_evaluation(setup, ranks, prompt)], assumed


def _of_sft(setup: Setup, ranks: int, prompt: int) -> Iterator[Phase]:
    config = setup.config.sft
    if not config.steps:
        return
    share = config.batch / ranks
    B = min(-(-config.batch // ranks), config.micro_batch or config.batch)
    work = measure_call(
        setup, "sft", B, trained_tokens(setup, prompt, 1), B * (setup.length + 1) // 2, trains=True, again=share > B
    )
    yield Phase("sft step", "gradient", "learn", share / B, work, B, prompt=prompt)
    yield Phase("sft step", "optimizer", "optimizer", 1)


def _of_rl(setup: Setup, ranks: int, prompt: int) -> Iterator[Phase]:
    config, rollout, L = setup.config.rl, setup.config.rollout, setup.length
    if not config.updates:
        return
    total = config.prompts * config.group
    whole, share = -(-total // ranks), total / ranks
    if rollout.engine == "ours":
        yield _drawing(setup, "rl update", "rollout", min(whole, rollout.micro_batch or whole), share, prompt)

    B = min(whole, config.micro_batch or whole)
    rows = rows_of(setup, B)
    passes = -(-rows.samples // rows.together)
    size = B if setup.facts.block_length is not None else B * rows.together
    tokens = trained_tokens(setup, prompt, rows.together)
    calls = share / B * rows.samples / rows.together * config.inner_iterations
    shape: dict[str, Any] = {"sequences": B, "samples": rows.together, "prompt": prompt}
    scored = measure_call(setup, "rl score", size, tokens, rows.total // passes, trains=False)
    learned = measure_call(setup, "rl gradient", size, tokens, rows.total // passes, trains=True, again=True)
    objective = choose_algorithm(config, L, max(1, setup.steps)).objective
    names = (*objective.per_sequence, *objective.per_sample, *objective.per_token)
    off_policy = objective.old_scores is not None and config.inner_iterations > 1
    if off_policy:
        yield Phase("rl update", "old scores", "score", calls, scored, **shape)
    if any(name.startswith("ref_") for name in names) and RECIPES[config.algorithm].wants_reference(config.options):
        yield Phase("rl update", "reference scores", "score", calls, scored, **shape)
    coupling = objective.coupling if off_policy else objective.on_policy_coupling
    one_cut = passes == 1 and whole <= B and ranks == 1
    if (coupling == "batch" and not one_cut) or (coupling == "sequence" and passes > 1):
        yield Phase("rl update", "first pass", "score", calls, scored, **shape)
    yield Phase("rl update", "gradient", "learn", calls, learned, **shape)
    yield Phase("rl update", "optimizer", "optimizer", config.inner_iterations)


def _of_evaluation(setup: Setup, ranks: int, prompt: int) -> Iterator[Phase]:
    held = sum(map(len, setup.task.tests.values()))
    if held and setup.config.rollout.engine == "ours":
        share = min(setup.config.evaluation.batch, held) / ranks
        whole = -(-min(setup.config.evaluation.batch, held) // ranks)
        B = min(whole, setup.config.rollout.micro_batch or whole)
        times = held * len(decodings(setup.config.rollout)) / (share * ranks)
        yield _drawing(setup, "evaluation", "all test sets", B, share * times, prompt)


def _drawing(setup: Setup, step: Any, name: str, B: int, share: float, prompt: int) -> Phase:
    rollout, S = setup.config.rollout, prompt + setup.length
    block = min(setup.length, rollout.block_length or setup.length)
    rows = max(1, B * block // 2)  # half of the active block is still hidden
    work = measure_call(setup, name, B, S, rows, trains=False)
    if rollout.cache:
        of_block = max(1, setup.steps // -(-setup.length // block))
        if rollout.cache is True:  # the first call of a block recomputes the block before it, and the first of all the prompt
            whole, width = 0.0, round(block * (1 + (setup.facts.shift or 1 / of_block)) + prompt / setup.steps)
        else:  # calls that recompute everything, and those of a block alone, or with prefix of what follows it too
            whole = 1 / (of_block if rollout.refresh is None else min(of_block, rollout.refresh))
            width = block + setup.length // 2 if rollout.cache == "prefix" else block
        width = min(S, width)
        narrow = measure_call(setup, name, B, width, rows, trains=False)
        tokens, flops = (whole * a + (1 - whole) * b for a, b in ((S, width), (work.flops, narrow.flops)))
        work = replace(work, tokens=round(tokens), flops=round(flops))
    at_most = rollout.resolved().commit != "schedule" or setup.facts.eos_id is not None
    return Phase(step, name, "draw", setup.steps * share / B, work, B, prompt=prompt, at_most=at_most)


# --- seconds by a datasheet -----------------------------------------------------------------------------------------------


def _by_datasheet(config: RunConfig, found: list[Phase], device: Datasheet, ranks: int) -> list[float]:
    setup, _ = skeleton(config, planned_task(config)[0], ranks)
    model: Any = setup.trained
    idle = idle_parameters(config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) + idle
    item = 2 if "bfloat16" in (config.parallel.dtype, config.model.dtype) else 4
    rate = SHARE * (device.bf16 if item == 2 else device.fp32)
    weights = item * (sum(p.numel() for p in model.parameters()) + idle)
    shards = ranks // config.parallel.replicas
    wire = device.link if shards <= NODE else device.network
    gathered = weights * (shards - 1) / shards / wire

    def seconds(phase: Phase) -> float:
        if phase.work is None:  # reads weight, gradient and two moments, writes three of them
            exchanged = 0.0 if shards == ranks else 2 * 4 * trained / shards / device.network  # between the copies of the model
            return phase.calls * (28 * trained / shards / device.memory + exchanged)
        through = 3 if phase.work.trains else 1  # weights: read forward and backward, gradients written
        moved = 0.0 if ranks == 1 else gathered * (3 if phase.work.trains else 1)  # gathered twice, gradients reduced
        return phase.calls * max((phase.work.flops + phase.work.head_flops) / rate, through * weights / device.memory, moved)

    return [seconds(phase) for phase in found]


# --- seconds of this machine ----------------------------------------------------------------------------------------------


class _Enough(Exception):  # noqa: N818 - no error: the clock has seen enough steps
    pass


def _here(config: RunConfig, found: list[Phase]) -> list[float]:
    """Random weights of the run's shapes, and real calls of the library."""
    setup, _ = skeleton(config, planned_task(config)[0], 1, fake=False)
    assert setup.trained is not None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    setup.trained.to(device)
    seconds = []
    for phase in found:
        if phase.work is None:
            optimizer = make_optimizer(setup.trained, config.rl if phase.step == "rl update" else config.sft)
            one = _median(optimizer.step, device)
            del optimizer
            setup.trained.zero_grad()
        elif phase.kind == "draw":
            one = _seconds_of_a_step(setup, phase, device)
        else:
            one = _median(_scoring(setup, phase, device), device)
        seconds.append(phase.calls * one)
    return seconds


def _median(call: Callable[[], object], device: torch.device) -> float:
    call()
    taken: list[float] = []
    while not taken or (sum(taken) < PATIENCE and len(taken) < 20):
        started = _clock(device)
        call()
        taken.append(_clock(device) - started)
    return statistics.median(taken)


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _random_ids(setup: Setup, B: int, length: int, device: torch.device) -> Tensor:
    known = setup.facts.valid_vocab or setup.model.get_output_embeddings().weight.shape[0]  # type: ignore[union-attr, operator]
    ids = torch.randint(known, (B, length), generator=torch.Generator().manual_seed(0))
    special = [i for i in (setup.facts.mask_id, setup.facts.eos_id, setup.facts.pad_id) if i is not None]
    usual = next(i for i in range(known) if i not in special)
    return torch.where(torch.isin(ids, torch.tensor(special)), usual, ids).to(device)


def _seconds_of_a_step(setup: Setup, phase: Phase, device: torch.device) -> float:
    assert phase.work is not None
    prompts = list(_random_ids(setup, phase.sequences, phase.prompt, device))
    marks = [_clock(device)]

    def on_step(number: int, completion_BL: Tensor) -> None:
        marks.append(_clock(device))
        if marks[-1] - marks[0] > PATIENCE and len(marks) > 3:
            raise _Enough

    ids = torch.arange(phase.sequences, device=device)
    options = {**setup.generate_options(canvas=False), "eos_id": None, "micro_batch": None}
    with suppress(_Enough):
        generate(setup.model, prompts, sequence_ids=ids, seed=0, on_step=on_step, **options)
    return statistics.mean(after - before for before, after in pairwise(marks))


def _scoring(setup: Setup, phase: Phase, device: torch.device) -> Callable[[], object]:
    plan = _plan(setup, phase, device)
    config = setup.config.rl
    options = setup.scoring_options(None, config, as_rolled_out=False)
    options |= {"sequences_per_pass": phase.sequences, "samples_per_pass": phase.samples}
    if phase.kind == "score":
        return lambda: score_samples(setup.model, plan, **options)
    return lambda: accumulate(setup.model, plan, NEGATIVE_ELBO, Batch(), denominator=1.0, **options)


def _plan(setup: Setup, phase: Phase, device: torch.device) -> MaskPlan:
    """Of one call: as many scored rows as `phase.work` has, the samples of a sequence alike."""
    assert phase.work is not None
    B, K, L, block = phase.sequences, phase.samples, setup.length, setup.facts.block_length
    S = phase.prompt + L
    ids = _random_ids(setup, B, S, device)
    completion = torch.zeros_like(ids, dtype=torch.bool)
    completion[:, S - L :] = True
    fields: dict[str, Any] = {"samples": K, "seed": 0, "mask_id": setup.facts.mask_id, "shift": setup.facts.shift}
    fields["sequence_ids"] = torch.arange(B, device=device)
    if block is not None:
        return make_mask_plan(ids, completion, law="exact", causal_block=block, **fields)
    hidden = max(1, min(L, round(phase.work.rows / (B * K))))
    masked = torch.zeros(K, B, S, dtype=torch.bool, device=device)
    masked[:, :, S - hidden :] = True
    return make_mask_plan(ids, completion, law="given", masked_KBS=masked, **fields)
