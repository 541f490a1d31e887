"""What each RL algorithm makes of rollouts and rewards: the entries that its objective declares, and who is scored for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dllm_kernels import Rollout, select_steps, step_entropy, trajectory_logp, trajectory_rows
from dllm_kernels.accumulation.objective import Batch, Objective
from dllm_kernels.accumulation.report import Report
from dllm_kernels.accumulation.scores import adapters_off, score_samples
from dllm_kernels.masks.plan import MaskPlan
from dllm_kernels.objectives import (
    FACTORIES,
    RECIPES,
    effective_sample_size,
    group_advantages,
    stepwise_returns,
    wd1_weights,
    wdce_baseline,
    wdce_weights,
)

from ..config import TRACES, RlConfig
from ..distributed import Ranks
from ..errors import ConfigError


@dataclass(frozen=True)
class Signal:
    """What rewards say about the rollouts of all ranks before any model is asked."""

    kept_N: Tensor  # rollouts that the objective learns from, indices
    entries: dict[str, Tensor]  # per sequence, of those
    denominator: float | None  # of the optimizer step, rollouts that were dropped included; None: the plans' steps

    def of(self, mine: slice) -> tuple[dict[str, Tensor], Tensor]:
        """Entries and indices of those within a rank's part, counted from its start."""
        here_N = (self.kept_N >= mine.start) & (self.kept_N < mine.stop)
        return {name: value[here_N] for name, value in self.entries.items()}, self.kept_N[here_N] - mine.start


def make_objective(config: RlConfig, tokens_per_step: float) -> Objective:
    """With the hyper-parameters of its recipe and, over them, those of `rl.options`."""
    options = dict(RECIPES[config.algorithm].defaults)
    if "tokens_per_step" in options:
        options["tokens_per_step"] = tokens_per_step
    try:
        return FACTORIES[config.algorithm](**{**options, **config.options})
    except (TypeError, ValueError) as error:
        allowed = ", ".join(options) or "none"
        raise ConfigError(f"rl.options of {config.algorithm}: {error}; its options are {allowed}") from error


def signal(config: RlConfig, objective: Objective, rewards: Tensor, group_ids: Tensor, length: int) -> Signal:
    """Advantages, weights or pairs of `rewards` `[B]`. Rollouts without an advantage are dropped where nothing else is learnt."""
    if "chosen" in objective.per_sequence:
        return _pairs(rewards, group_ids)
    groups = len(group_ids.unique())
    counts = {"sequences": len(rewards), "tokens": len(rewards) * length, "groups": groups, "steps": None}
    denominator = counts[objective.denominator]
    everyone = torch.arange(len(rewards), device=rewards.device)
    if config.algorithm in ("dmpo", "egspo_sa"):  # whose weights need ELBOs, or the rewards of single steps
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
    pairs = torch.arange(len(chosen), device=rewards.device)
    is_chosen = torch.arange(2 * len(chosen), device=rewards.device) < len(chosen)
    entries = {"chosen": is_chosen, "group_ids": torch.cat([pairs, pairs])}
    kept = torch.tensor(chosen + rejected, dtype=torch.int64, device=rewards.device)
    return Signal(kept, entries, float(max(1, len(chosen))))


class Scores:
    """Scores of plans under the policy and under its reference, without gradients; counts the passes."""

    def __init__(self, model: nn.Module, reference: nn.Module | None, options: dict[str, Any]) -> None:
        """Without a `reference`, the model with its adapters off is its own. `options` are of `score_samples`."""
        self.model, self.reference, self.options = model, reference, options
        self.passes = 0

    def old(self, plan: MaskPlan, name: str) -> Tensor:
        self.passes += 1
        return self._scores(self.model, plan, name.removeprefix("old_"))

    def ref(self, plan: MaskPlan, name: str) -> Tensor:
        self.passes += 1
        with adapters_off(self.model) if self.reference is None else nullcontext():
            return self._scores(self.reference or self.model, plan, name.removeprefix("ref_"))

    def _scores(self, model: nn.Module, plan: MaskPlan, kind: str) -> Tensor:
        if kind == "logp":
            return score_samples(model, plan, per_token=True, **self.options)
        elbo_BK = score_samples(model, plan, **self.options)
        return elbo_BK if kind == "sample_elbo" else (elbo_BK * plan.share_K).sum(-1)


@dataclass(frozen=True)
class Trajectory:
    """The states of this rank's rollouts that are trained on."""

    rollout: Rollout
    plan: MaskPlan
    steps_BJ: Tensor | None  # EGSPO's choice

    def old_scores(self, name: str) -> Tensor | None:
        """What the rollout itself saw, where that is what a scoring pass would give: states are single steps."""
        if self.plan.law != "trace" or self.plan.options["shrink"] != 1:
            return None
        if name == "old_sample_elbo":
            return trajectory_logp(self.rollout, self.plan)
        logp_BS = torch.zeros_like(self.rollout.ids_BS, dtype=torch.float32)
        logp_BS = logp_BS.masked_scatter(self.rollout.completion_mask_BS, self.rollout.commit_logp_BL)
        return torch.where(self.plan.scored, logp_BS, 0.0).transpose(0, 1)


def make_trajectory(config: RlConfig, rollout: Rollout, here_N: Tensor, seed: int) -> Trajectory | None:
    """Of those `here_N` of this rank's rollouts; None for laws that draw their own masks."""
    if config.law not in TRACES:
        return None
    steps_BJ = None
    if config.law == "segments":
        plan = trajectory_rows(rollout, segments=config.segments)
    elif config.algorithm == "trace_rl":
        plan = trajectory_rows(rollout, shrink=config.shrink)
    else:
        most = rollout.masked_entropy_BT.shape[1]
        entropy_TB = step_entropy(rollout.commit_entropy_BL, rollout.commit_step_BL, steps=most)
        ids = rollout.sequence_ids_B
        steps_BJ = select_steps(entropy_TB, config.selected_steps, config.step_selection, seed=seed, sequence_ids=ids)
        plan = trajectory_rows(rollout, steps_BJ)
    return Trajectory(rollout.kept(here_N), plan.cut(sequences=here_N), None if steps_BJ is None else steps_BJ[here_N])


@dataclass(frozen=True)
class Update:
    """One update, as this rank sees it. Rewards and group ids are those of all ranks."""

    config: RlConfig
    objective: Objective
    ranks: Ranks
    rewards: Tensor
    group_ids: Tensor
    mine: slice  # of all rollouts
    here_N: Tensor  # of this rank's, those that are kept
    entries: dict[str, Tensor]
    trajectory: Trajectory | None
    step_rewards_BJ: Tensor | None  # EGSPO-SA: of the greedy completions at the chosen steps

    def batches(self, plans: Sequence[MaskPlan], rollout_plan: Callable[[], MaskPlan], scores: Scores) -> list[Batch]:
        """What travels with each inner iteration's plan, scored before the first step, under the policy that made the rollouts.

        A single iteration is on-policy: its old scores are the current ones, and cost no pass. `rollout_plan` makes the
        masks of DMPO's weights, whose loss draws its own.
        """
        entries, objective = dict(self.entries), self.objective
        if self.config.algorithm == "dmpo":
            entries |= self._dmpo_entries(rollout_plan(), scores)
        batches = []
        for plan in plans:
            per_sequence = dict(entries)
            per_sample: dict[str, Tensor] = {}
            declared = ((objective.per_sequence, per_sequence), ((*objective.per_sample, *objective.per_token), per_sample))
            for names, into in declared:
                for name in names:
                    if name == objective.old_scores and len(plans) > 1:
                        known = None if self.trajectory is None else self.trajectory.old_scores(name)
                        into[name] = scores.old(plan, name) if known is None else known
                    elif name.startswith("ref_"):
                        into[name] = scores.ref(plan, name)
                    elif name == "step_advantages":
                        into[name] = self._step_advantages()
            batches.append(Batch(per_sequence, per_sample))
        return batches

    def _step_advantages(self) -> Tensor:
        """EGSPO-SA's, `[B, J]`: returns centred by group and entropy rank."""
        assert self.step_rewards_BJ is not None
        mine_B = self.rewards[self.mine][self.here_N]
        everyone, place = self.ranks.gather(stepwise_returns(mine_B, self.step_rewards_BJ, lam=self.config.stepwise))
        return group_advantages(everyone, self.group_ids, kind="mean")[place]

    def _dmpo_entries(self, plan: MaskPlan, scores: Scores) -> dict[str, Tensor]:
        """Weights and the recipe's baseline, from ELBOs under one set of masks of their own."""
        elbo_B, mine = self.ranks.gather(scores.old(plan, "old_elbo"))
        ref_B, _ = self.ranks.gather(scores.ref(plan, "ref_elbo"))
        arguments = self.rewards, elbo_B, ref_B, self.group_ids
        entries = {"weights": wdce_weights(*arguments)[mine]}
        if "baseline" in self.objective.per_sequence:
            kind = str({**RECIPES["dmpo"].defaults, **self.config.options}["baseline"])
            entries["baseline"] = wdce_baseline(kind, *arguments)[mine]
        return entries

    def figures(self, report: Report, plan: MaskPlan, batch: Batch) -> dict[str, float]:
        """ELBO, ratios and distances of an optimizer step, over what all ranks scored. Ratios are those of the sequence or sample
        scores that the objective compares; token-wise ratios are not kept by the engine.
        """
        elbo_BK = report.sample_elbo_BK  # NaN where a sample was dropped, unscored
        scored = elbo_BK.isfinite()
        lengths_B1 = plan.lengths_B[:, None].clamp(min=1)
        share = plan.counts.t().float() / lengths_B1
        parts: dict[str, tuple[Tensor, Tensor]] = {"elbo": (elbo_BK, scored), "mask_ratio": (share, torch.ones_like(scored))}
        entries = {**batch.per_sequence, **batch.per_sample}
        score_BK = elbo_BK if "old_sample_elbo" in entries or "ref_sample_elbo" in entries else None
        score_B = (elbo_BK.nan_to_num() * plan.share_K).sum(-1)
        figures: dict[str, float] = {}
        for kind in ("old", "ref"):
            if (other := entries.get(f"{kind}_sample_elbo")) is not None and score_BK is not None:
                delta, per_token = score_BK - other, (score_BK - other) / lengths_B1
            elif (other := entries.get(f"{kind}_elbo")) is not None and self.config.algorithm != "dmpo":
                difference_B1 = (score_B - other)[:, None]
                per_token = difference_B1 / lengths_B1
                delta = difference_B1 if self.config.algorithm == "gdpo" and self._options()["mode"] == "paper" else per_token
            else:
                continue
            seen = delta.isfinite()
            if kind == "ref":
                parts["kl"] = (per_token, seen)
            else:
                worst = max(self.ranks.tell(float(delta[seen].abs().max()) if bool(seen.any()) else 0.0))
                figures["largest_ratio"] = math.exp(min(worst, 80.0))
                low, high = self._clip()
                clipped = ((delta.exp() < 1 - low) | (delta.exp() > 1 + high)).float()
                parts["clip_fraction"] = (clipped, seen)
        for name, (values, where) in parts.items():
            total, count = self.ranks.total(float(values[where].sum())), self.ranks.total(float(where.sum()))
            figures[name] = total / max(1.0, count)
        if self.config.algorithm == "dmpo":
            weights, _ = self.ranks.gather(batch.per_sequence["weights"])
            figures["ess"] = effective_sample_size(weights, self.group_ids).mean().item()
        return figures

    def _options(self) -> dict[str, Any]:
        return {**RECIPES[self.config.algorithm].defaults, **self.config.options}

    def _clip(self) -> tuple[float, float]:
        """Bounds of the ratio's clip; none where the objective has none."""
        options = self._options()
        epsilon = options.get("epsilon", math.inf)
        return float(options.get("epsilon_low", epsilon)), float(options.get("epsilon_high", epsilon))
