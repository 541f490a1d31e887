"""What an update of RL hands to an algorithm, and what it gets back: rewards and a signal, rollouts and states, entries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dllm_kernels.accumulation.objective import Objective
from dllm_kernels.masks import steps
from dllm_kernels.masks.plan import MaskPlan
from dllm_kernels.objectives.advantages import group_advantages
from dllm_kernels.rollouts.rollout import Rollout
from dllm_kernels.rollouts.trajectories import rollout_logp

# (plan, name of an entry such as "old_elbo" or "ref_logp") -> the scores of that policy
ScoreOf = Callable[[MaskPlan, str], Tensor]


@dataclass(frozen=True, eq=False)
class Rewards:
    """Rewards of the rollouts of all ranks, and how the run wants advantages made of them."""

    values_B: Tensor
    group_ids_B: Tensor  # int64; equal ids are completions of one prompt
    lengths_B: Tensor  # int64, the scored tokens of each completion
    kind: str = "mean"  # of `group_advantages`
    positive_only: bool = False

    def advantages(self) -> Tensor:
        advantages_B = group_advantages(self.values_B, self.group_ids_B, kind=self.kind)
        return advantages_B.clamp(min=0.0) if self.positive_only else advantages_B


@dataclass(frozen=True, eq=False)
class Signal:
    """What rewards alone say about the rollouts of all ranks, before a model is asked."""

    kept_N: Tensor  # indices of the rollouts that the objective learns from
    entries: dict[str, Tensor]  # per sequence, of those
    denominator: float | None  # of the optimizer step, dropped rollouts included; None: the number of the plans' steps

    def of(self, mine: slice) -> tuple[dict[str, Tensor], Tensor]:
        """Entries and indices of those within a rank's part, counted from its start."""
        here_N = (self.kept_N >= mine.start) & (self.kept_N < mine.stop)
        return {name: value[here_N] for name, value in self.entries.items()}, self.kept_N[here_N] - mine.start


def signal_of(entries: dict[str, Tensor], rewards: Rewards, objective: Objective) -> Signal:
    """The signal that these entries `[B]` are; rollouts whose entry `objective.scale` is 0 contribute nothing and are dropped."""
    B, groups = len(rewards.values_B), len(rewards.group_ids_B.unique())
    counts = {"sequences": B, "tokens": max(1.0, float(rewards.lengths_B.sum())), "groups": groups, "steps": None}
    scale_B = entries.get(objective.scale or "")
    kept_N = torch.arange(B, device=rewards.values_B.device) if scale_B is None else scale_B.nonzero()[:, 0]
    return Signal(kept_N, {name: value[kept_N] for name, value in entries.items()}, counts[objective.denominator])


def advantage_signal(rewards: Rewards, objective: Objective, options: Any) -> Signal:
    """Group-relative advantages: what most algorithms learn from."""
    return signal_of({"advantages": rewards.advantages()}, rewards, objective)


def later_signal(rewards: Rewards, objective: Objective, options: Any) -> Signal:
    """All rollouts, without entries: those need scores or rewards of states, and are made by `Recipe.entries`."""
    return signal_of({}, rewards, objective)


@dataclass(frozen=True, eq=False)
class States:
    """The states of rollouts that are trained on."""

    rollout: Rollout
    plan: MaskPlan  # its samples are the states
    steps_BJ: Tensor | None = None  # the denoising steps that were chosen, -1 for none; None: all of them
    replayed: bool = True  # whether what is scored in a state is what the rollout wrote there

    def kept(self, here_N: Tensor) -> States:
        steps_BJ = None if self.steps_BJ is None else self.steps_BJ[here_N]
        return States(self.rollout.kept(here_N), self.plan.cut(sequences=here_N), steps_BJ, self.replayed)

    def old_scores(self, name: str) -> Tensor | None:
        """What the rollout itself saw, where a scoring pass would give the same: where states are single steps, seen exactly."""
        if self.rollout.approximate:
            return None
        if not self.replayed or self.plan.law != "trace" or self.plan.options["shrink"] != 1:
            return None
        logp_KBS = rollout_logp(self.rollout, self.plan)
        return steps.sums(self.plan, logp_KBS) if name == "old_sample_elbo" else logp_KBS.transpose(0, 1)


@dataclass(frozen=True, eq=False)
class Update:
    """One update, as this rank sees it: what an algorithm may make entries of, before the first optimizer step."""

    rewards: Rewards
    kept_N: Tensor  # this rank's rollouts that are learnt from, as indices of all
    states: States | None  # theirs
    old: ScoreOf  # of the policy that made the rollouts
    ref: ScoreOf  # of the reference
    fresh_plan: Callable[[], MaskPlan]  # masks that no inner iteration learns from
    reward: Callable[[Tensor], Tensor]  # of other completions [B, J, L] of these prompts: [B, J]
    gather: Callable[[Tensor], tuple[Tensor, slice]]  # [n, ...] of all ranks, and where this rank's are
