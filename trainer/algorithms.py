"""What each RL algorithm makes of rollouts and rewards: the entries that its objective declares, and who is scored for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dllm_kernels.accumulation import adapters_off, score_samples
from dllm_kernels.masks import MaskPlan
from dllm_kernels.objective import Batch, Objective
from dllm_kernels.objectives import FACTORIES, RECIPES, group_advantages, wd1_weights, wdce_baseline, wdce_weights
from trainer.config import RlConfig


@dataclass(frozen=True)
class Signal:
    """What rewards say about rollouts before any model is asked."""

    kept_N: Tensor  # rollouts that the objective learns from, indices
    entries: dict[str, Tensor]  # per sequence, of those
    denominator: float  # of the optimizer step, rollouts that were dropped included


def make_objective(config: RlConfig) -> Objective:
    """With the hyper-parameters of its recipe."""
    return FACTORIES[config.algorithm](**RECIPES[config.algorithm].defaults)


def signal(config: RlConfig, objective: Objective, rewards: Tensor, group_ids: Tensor, length: int) -> Signal:
    """Advantages, weights or pairs of `rewards` `[B]`. Rollouts without an advantage are dropped where nothing else is learnt."""
    if "chosen" in objective.per_sequence:
        return _pairs(rewards, group_ids)
    groups = len(group_ids.unique())
    denominator = {"sequences": len(rewards), "tokens": len(rewards) * length, "groups": groups}[objective.denominator]
    everyone = torch.arange(len(rewards))
    if config.algorithm == "dmpo":  # its weights need ELBOs, see `dmpo_entries`
        return Signal(everyone, {}, denominator)
    advantages = group_advantages(rewards, group_ids, kind=config.advantage)
    if config.positive_only:
        advantages = advantages.clamp(min=0.0)
    values, name = advantages, "advantages"
    if "weights" in objective.per_sequence:
        values, name = wd1_weights(advantages, group_ids), "weights"
    kept = everyone if objective.scale is None else values.nonzero()[:, 0]
    return Signal(kept, {name: values[kept]}, denominator)


def _pairs(rewards: Tensor, group_ids: Tensor) -> Signal:
    """The best and the worst rollout of each group whose rewards differ."""
    chosen: list[int] = []
    rejected: list[int] = []
    for group in group_ids.unique():
        members = (group_ids == group).nonzero()[:, 0]
        best, worst = members[rewards[members].argmax()], members[rewards[members].argmin()]
        if rewards[best] > rewards[worst]:
            chosen.append(int(best))
            rejected.append(int(worst))
    pairs = torch.arange(len(chosen))
    is_chosen = torch.arange(2 * len(chosen)) < len(chosen)
    entries = {"chosen": is_chosen, "group_ids": torch.cat([pairs, pairs])}
    return Signal(torch.tensor(chosen + rejected, dtype=torch.int64), entries, float(max(1, len(chosen))))


class Scores:
    """Scores of plans under the policy and under its reference, without gradients; counts the passes."""

    def __init__(self, model: nn.Module, reference: nn.Module | None) -> None:
        """Without a `reference`, the model with its adapters off is its own."""
        self.model, self.reference = model, reference
        self.passes = 0

    def old(self, plan: MaskPlan, name: str) -> Tensor:
        self.passes += 1
        return _scores(self.model, plan, name.removeprefix("old_"))

    def ref(self, plan: MaskPlan, name: str) -> Tensor:
        self.passes += 1
        with adapters_off(self.model) if self.reference is None else nullcontext():
            return _scores(self.reference or self.model, plan, name.removeprefix("ref_"))


def _scores(model: nn.Module, plan: MaskPlan, kind: str) -> Tensor:
    if kind == "logp":
        return score_samples(model, plan, per_token=True)
    elbo_BK = score_samples(model, plan)
    return elbo_BK if kind == "sample_elbo" else (elbo_BK * plan.share_K).sum(-1)


def make_batches(
    config: RlConfig,
    objective: Objective,
    found: Signal,
    plans: Sequence[MaskPlan],
    rollout_plan: Callable[[], MaskPlan],
    rewards: Tensor,
    group_ids: Tensor,
    scores: Scores,
) -> list[Batch]:
    """What travels with each inner iteration's plan, scored before the first step, under the policy that made the rollouts.

    A single iteration is on-policy: its old scores are the current ones, and cost no pass. `rollout_plan` makes the masks of
    DMPO's weights, whose loss draws its own.
    """
    entries = dict(found.entries)
    if config.algorithm == "dmpo":
        entries |= _dmpo_entries(objective, rollout_plan(), rewards, group_ids, scores)
    batches = []
    for plan in plans:
        per_sequence = dict(entries)
        per_sample: dict[str, Tensor] = {}
        for names, into in ((objective.per_sequence, per_sequence), ((*objective.per_sample, *objective.per_token), per_sample)):
            for name in names:
                if name == objective.old_scores and len(plans) > 1:
                    into[name] = scores.old(plan, name)
                elif name.startswith("ref_"):
                    into[name] = scores.ref(plan, name)
        batches.append(Batch(per_sequence, per_sample))
    return batches


def _dmpo_entries(objective: Objective, plan: MaskPlan, rewards: Tensor, group_ids: Tensor, scores: Scores) -> dict[str, Tensor]:
    """Weights and the recipe's baseline, from ELBOs under one set of masks of their own."""
    elbo_B, ref_B = scores.old(plan, "old_elbo"), scores.ref(plan, "ref_elbo")
    entries = {"weights": wdce_weights(rewards, elbo_B, ref_B, group_ids)}
    if "baseline" in objective.per_sequence:
        kind = str(RECIPES["dmpo"].defaults["baseline"])
        entries["baseline"] = wdce_baseline(kind, rewards, elbo_B, ref_B, group_ids)
    return entries
