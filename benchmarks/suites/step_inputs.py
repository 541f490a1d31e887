"""What both ways to do an RL step share: the policies, prompts and optimizer, what rewards say, and the clock of the phases."""

from __future__ import annotations

import copy
import functools
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from dllm_trainer.config import RlConfig, load_config
from dllm_trainer.distributed import Ranks
from dllm_trainer.train.algorithms import Algorithm, Scores, choose_algorithm, make_batches
from torch import Tensor, nn

from benchmarks.registry import Result, multiplied_parameters, small_model
from dllm_kernels import Rollout, make_mask_plan
from dllm_kernels.accumulation.objective import Batch, Objective
from dllm_kernels.masks.plan import MaskPlan
from dllm_kernels.objectives import RECIPES, Update

SEED = 5
TEMPERATURE = 0.9  # d1's
EXPAND = 3  # LLaDA-8B's feed-forward layers are 3 times as wide as its hidden states
SHARPEN = 5.0  # a trained head is not flat
NEARBY = 0.001  # of a weight's standard deviation: sequence ratios of some 10 %, so that hardly one is clipped
PHASES = ("rollout", "old", "reference", "update")


class Clock:
    """Seconds of each phase of each call of a step, and operations of the last call by formula."""

    def __init__(self, device: str) -> None:
        self.on_gpu, self.calls, self.flops = device == "cuda", list[dict[str, float]](), 0.0

    def start(self) -> None:
        self.calls.append(dict.fromkeys(PHASES, 0.0))
        self.flops = 0.0

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = self._now()
        yield
        self.calls[-1][phase] += self._now() - started

    def _now(self) -> float:
        if self.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def medians(self) -> dict[str, float]:
        return {phase: statistics.median(call[phase] for call in self.calls) for phase in PHASES} if self.calls else {}


@dataclass(frozen=True)
class Inputs:
    """One step's givens. The three policies have one architecture, and weights that differ a little."""

    sizes: Mapping[str, int]
    algorithm: Algorithm
    model: nn.Module  # learns; every parameter has its `.grad` already
    behaviour: nn.Module  # rolls out and is the old policy
    reference: nn.Module
    optimizer: torch.optim.Optimizer
    prompts_BP: Tensor
    agreed: Rollout | None = None  # what all learn from, where 16 bits let samplers differ

    @property
    def config(self) -> RlConfig:
        return self.algorithm.config

    @property
    def objective(self) -> Objective:
        return self.algorithm.objective

    @property
    def mask_id(self) -> int:
        return self.sizes["V"] - 1

    @property
    def sequence_ids_B(self) -> Tensor:
        return torch.arange(len(self.prompts_BP), device=self.prompts_BP.device)

    @property
    def group_ids_B(self) -> Tensor:
        return self.sequence_ids_B // self.sizes["G"]

    def forward_flops(self, tokens: float, rows: float) -> float:
        """Of the body on so many tokens and the head on so many rows, without attention's own products."""
        H, V = self.sizes["H"], self.sizes["V"]
        return 2.0 * multiplied_parameters(self.model) * tokens + 2.0 * rows * H * V

    def result(self, loss: Tensor, rollout: Rollout) -> Result:
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        return {"loss": loss.detach(), "tokens": rollout.completion_BL, **gradients}

    def double(self, agreed: Rollout) -> Inputs:
        """The same in float64, learning from a given rollout."""
        model, behaviour, reference = (copy.deepcopy(m).double() for m in (self.model, self.behaviour, self.reference))
        optimizer = make_optimizer(model)
        return replace(self, model=model, behaviour=behaviour, reference=reference, optimizer=optimizer, agreed=agreed)


@functools.lru_cache(maxsize=64)
def rl_config(algorithm: str, selected: int) -> RlConfig:
    """The trainer's own for this algorithm; of trajectories, `selected` steps or segments, and every step is a state."""
    options = {"selected_steps": selected, "segments": selected, "shrink": 1}
    known = RECIPES[algorithm].option_names
    overrides = [f"rl.options.{name}={value}" for name, value in options.items() if name in known]
    return load_config(None, [f"rl.algorithm={algorithm}", *overrides]).rl


def samples_of(algorithm: str, wanted: int, steps: int) -> int:
    """K: the nearest number of samples, from `wanted` on, that the algorithm's law takes; of trajectories, their states."""
    law = RECIPES[algorithm].law
    if law == "trace":
        return min(wanted, steps) if "selected_steps" in RECIPES[algorithm].option_names else steps
    if law == "full":
        return 1
    if law == "coupled":
        return max(3, wanted + 1 - wanted % 2)
    return wanted + wanted % 2 if law == "antithetic" else wanted


def masks(config: RlConfig, sizes: Mapping[str, int], ids_BS: Tensor, iteration: int = 0) -> MaskPlan:
    """The plan of a law that draws its own masks; a function of ids in their places alone."""
    K, P = sizes["K"], sizes["P"]
    options = config.law_options()
    if config.law == "quadrature":
        options["nodes"] = next(n for n in (4, 3, 1) if K % n == 0)
    if config.law == "block":
        options["block_length"] = sizes["R"]
    return make_mask_plan(
        ids_BS,
        (torch.arange(ids_BS.shape[1], device=ids_BS.device) >= P).expand_as(ids_BS),
        law=config.law,
        samples=K,
        seed=SEED,
        sequence_ids=torch.arange(len(ids_BS), device=ids_BS.device),
        mask_id=sizes["V"] - 1,
        iteration=iteration,
        **options,
    )


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW at learning rate 0: all its arithmetic, and weights that stay. Its state and all gradients are resident after."""
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter).zero_()  # written to: fresh zeros take no memory yet
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=True)
    optimizer.step()
    return optimizer


def _nearby(model: nn.Module, seed: int) -> nn.Module:
    """A frozen copy, a little off: a policy before the last updates."""
    other = copy.deepcopy(model).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in other.parameters():
        if parameter.dim() > 1:
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.add_(noise, alpha=NEARBY * float(parameter.std()))
    return other


def make_inputs(algorithm: str, sizes: Mapping[str, int], dtype: torch.dtype, device: str) -> Inputs:
    model = small_model(
        V=sizes["V"], H=sizes["H"], layers=sizes["layers"], dtype=dtype, device=device, expand=EXPAND, sharpen=SHARPEN
    )
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(3, sizes["V"] - 1, (sizes["B"] // sizes["G"], sizes["P"]), generator=generator)
    return Inputs(
        sizes,
        choose_algorithm(rl_config(algorithm, sizes["K"]), sizes["L"], sizes["T"]),
        model,
        _nearby(model, 2),
        _nearby(model, 3),
        make_optimizer(model),
        prompts.repeat_interleave(sizes["G"], 0).to(device),
    )


def reward(completion_BL: Tensor, vocabulary: int) -> Tensor:
    """Something cheap that all completions differ in: the mean token id, in units that make rewards differ by about 1."""
    return completion_BL.double().mean(-1).mul(completion_BL.shape[-1] ** 0.5 / (0.3 * vocabulary)).float()


@dataclass(frozen=True)
class Lesson:
    """What one update learns from."""

    plan: MaskPlan
    batch: Batch
    denominator: float


def make_lesson(x: Inputs, rollout: Rollout, scores: Scores, clock: Clock) -> Lesson:
    """Advantages, masks, and the old and reference scores that the objective declares, off-policy: made by the trainer.

    `scores` asks the behaviour policy and the reference; states that are single steps have their old scores from the rollout.
    """
    algorithm, vocabulary = x.algorithm, x.sizes["V"]
    rollout = x.agreed or rollout
    rewards = algorithm.rewards(
        reward(rollout.completion_BL, vocabulary), x.group_ids_B, torch.full_like(x.group_ids_B, x.sizes["L"])
    )
    found = algorithm.signal(rewards)
    states = algorithm.states(rollout, found.kept_N, SEED)

    def drawn(iteration: int) -> MaskPlan:
        return masks(x.config, x.sizes, rollout.ids_BS, iteration).cut(sequences=found.kept_N)

    def old(plan: MaskPlan, name: str) -> Tensor:
        with clock("old"):
            return scores.old(plan, name)

    def ref(plan: MaskPlan, name: str) -> Tensor:
        with clock("reference"):
            return scores.ref(plan, name)

    plan = drawn(0) if states is None else states.plan
    update = Update(
        rewards,
        found.kept_N,
        states,
        old,
        ref,
        fresh_plan=lambda: drawn(1),
        reward=lambda completion_BJL: reward(completion_BJL, vocabulary),
        gather=Ranks().gather,
    )
    entries = found.entries | algorithm.entries(update)
    (batch,) = make_batches(x.objective, [plan], entries, old, ref, states=states, off_policy=True)
    return Lesson(plan, batch, found.denominator or max(1.0, float((plan.counts > 0).sum())))
