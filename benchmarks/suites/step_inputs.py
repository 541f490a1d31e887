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
from dllm_trainer.train.algorithms import Scores, make_objective, make_trajectory, signal
from torch import Tensor, nn

from benchmarks.registry import Result, multiplied_parameters, small_model
from dllm_kernels import Rollout, make_mask_plan
from dllm_kernels.accumulation.objective import Batch, Objective
from dllm_kernels.masks.plan import MaskPlan
from dllm_kernels.objectives import RECIPES, group_advantages, stepwise_returns, wdce_baseline, wdce_weights

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
    config: RlConfig
    objective: Objective
    model: nn.Module  # learns; every parameter has its `.grad` already
    behaviour: nn.Module  # rolls out and is the old policy
    reference: nn.Module
    optimizer: torch.optim.Optimizer
    prompts_BP: Tensor
    agreed: Rollout | None = None  # what all learn from, where 16 bits let samplers differ

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
    """The trainer's own for this algorithm; of trajectories, `selected` steps or segments, and every step is a state.

    GDPO is in the form of its published trainer.
    """
    overrides = [f"rl.algorithm={algorithm}", f"rl.selected_steps={selected}", f"rl.segments={selected}", "rl.shrink=1"]
    if algorithm == "gdpo":  # the paper's, a ratio of whole ELBOs, is at the mercy of fp32 sums of a thousand nats
        overrides.append("rl.options.mode=code")
    return load_config(None, overrides).rl


def samples_of(algorithm: str, wanted: int, steps: int) -> int:
    """K: the nearest number of samples, from `wanted` on, that the algorithm's law takes; of trajectories, their states."""
    law = RECIPES[algorithm].law
    if algorithm == "trace_rl":
        return steps
    if law == "trace":
        return min(wanted, steps)
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
    config = rl_config(algorithm, sizes["K"])
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(3, sizes["V"] - 1, (sizes["B"] // sizes["G"], sizes["P"]), generator=generator)
    return Inputs(
        sizes,
        config,
        make_objective(config, sizes["L"] / sizes["T"]),
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
    """Advantages, masks, and the old and reference scores that the objective declares, off-policy.

    As the trainer's updates make it. `scores` asks the behaviour policy and the reference; EGSPO and TraceRL have their old
    scores from the rollout.
    """
    config, objective = x.config, x.objective
    rollout = x.agreed or rollout
    rewards_B = reward(rollout.completion_BL, x.sizes["V"])
    found = signal(config, objective, rewards_B, x.group_ids_B, x.sizes["L"])
    kept_N, per_sequence = found.kept_N, dict(found.entries)
    per_sample: dict[str, Tensor] = {}
    trajectory = make_trajectory(config, rollout, kept_N, SEED)
    if trajectory is None:
        plan = masks(config, x.sizes, rollout.ids_BS).cut(sequences=kept_N)
    else:
        plan = trajectory.plan
    if config.algorithm == "dmpo":
        other = masks(config, x.sizes, rollout.ids_BS, iteration=1)  # of the weights, whose loss draws its own
        with clock("old"):
            elbo_B = scores.old(other, "old_elbo")
        with clock("reference"):
            ref_B = scores.ref(other, "ref_elbo")
        arguments = rewards_B.to(elbo_B), elbo_B, ref_B, x.group_ids_B
        per_sequence["weights"] = wdce_weights(*arguments)
        per_sequence["baseline"] = wdce_baseline("neg", *arguments)
    for names, into in (
        (objective.per_sequence, per_sequence),
        ((*objective.per_sample, *objective.per_token), per_sample),
    ):
        for name in names:
            if name == objective.old_scores:
                with clock("old"):
                    known = None if trajectory is None else trajectory.old_scores(name)
                    into[name] = scores.old(plan, name) if known is None else known
            elif name.startswith("ref_"):
                with clock("reference"):
                    into[name] = scores.ref(plan, name)
            elif name == "step_advantages":
                assert trajectory is not None
                into[name] = _step_advantages(x, rollout, rewards_B, trajectory.steps_BJ)
    denominator = found.denominator or max(1.0, float((plan.counts > 0).sum()))
    return Lesson(plan, Batch(per_sequence, per_sample), denominator)


def _step_advantages(x: Inputs, rollout: Rollout, rewards_B: Tensor, steps_BJ: Tensor | None) -> Tensor:
    """EGSPO-SA's, from the rewards of the greedy completions at the chosen steps."""
    assert rollout.greedy_BTL is not None
    assert steps_BJ is not None
    greedy_BJL = rollout.greedy_BTL.gather(1, steps_BJ[:, :, None].expand(-1, -1, x.sizes["L"]))
    returns_BJ = stepwise_returns(rewards_B, reward(greedy_BJL, x.sizes["V"]), lam=x.config.stepwise)
    return group_advantages(returns_BJ, x.group_ids_B, kind="mean")
