"""An algorithm with the options of a run, and what the trainer does for any of them: scores, entries, figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dllm_kernels import Rollout
from dllm_kernels.accumulation.objective import Batch, Objective
from dllm_kernels.accumulation.report import Report
from dllm_kernels.accumulation.scores import adapters_off, score_samples
from dllm_kernels.masks import steps
from dllm_kernels.masks.plan import MaskPlan
from dllm_kernels.objectives import RECIPES, Clip, Recipe, Rewards, Signal, States, Update
from dllm_kernels.objectives.update import ScoreOf

from ..config import RlConfig
from ..distributed import Ranks
from ..errors import ConfigError


@dataclass(frozen=True)
class Algorithm:
    """A recipe as one run uses it."""

    config: RlConfig
    recipe: Recipe
    options: Any  # an instance of `recipe.option_type`
    objective: Objective

    def rewards(self, values_B: Tensor, group_ids_B: Tensor, lengths_B: Tensor) -> Rewards:
        return Rewards(values_B, group_ids_B, lengths_B, self.config.advantage, self.config.positive_only)

    def signal(self, rewards: Rewards) -> Signal:
        return self.recipe.signal(rewards, self.objective, self.options)

    def states(self, rollout: Rollout, here_N: Tensor, seed: int) -> States | None:
        """Of those `here_N` of these rollouts; None where masks are drawn by a law."""
        trajectory = self.recipe.trajectory
        return None if trajectory is None else trajectory.states(rollout, self.options, seed).kept(here_N)

    def entries(self, update: Update) -> dict[str, Tensor]:
        """Those that need more than rewards, old and reference scores."""
        return {} if self.recipe.entries is None else self.recipe.entries(update, self.options)

    def figures(self, update: Update, batch: Batch) -> dict[str, float]:
        """The algorithm's own, of an optimizer step."""
        return {} if self.recipe.figures is None else self.recipe.figures(update, batch, self.options)


def choose_algorithm(config: RlConfig, length: int, steps: int) -> Algorithm:
    """The config's, for completions of `length` tokens in so many denoising steps.

    `rl.options` come over what the run itself says, that over the recipe.
    """
    recipe = RECIPES[config.algorithm]
    of_run = {} if recipe.from_run is None else recipe.from_run(length, steps)
    try:
        options = recipe.choose({**of_run, **config.options})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"rl.options of {config.algorithm}: {error}") from error
    return Algorithm(config, recipe, options, recipe.make(options))


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
        if kind == "sample_elbo" and plan.step_KBS is not None:  # one for each step, of which a sample has several
            return steps.sums(plan, score_samples(model, plan, per_token=True, **self.options).transpose(0, 1))
        elbo_BK = score_samples(model, plan, **self.options)
        return elbo_BK if kind == "sample_elbo" else (elbo_BK * plan.share_K).sum(-1)


def make_batches(
    objective: Objective,
    plans: Sequence[MaskPlan],
    entries: Mapping[str, Tensor],
    old: ScoreOf,
    ref: ScoreOf,
    *,
    states: States | None = None,
    off_policy: bool = False,
) -> list[Batch]:
    """What travels with each plan: these entries, and the scores that the objective declares beside them.

    Old scores are made where the update is `off_policy`; else they are the current ones, and cost no pass.
    """
    per_sample = {*objective.per_sample, *objective.per_token}
    batches = []
    for plan in plans:
        values = dict(entries)
        for name in (*objective.per_sequence, *objective.per_sample, *objective.per_token):
            if name in values:
                continue
            if name == objective.old_scores and off_policy:
                known = None if states is None else states.old_scores(name)
                values[name] = old(plan, name) if known is None else known
            elif name.startswith("ref_"):
                values[name] = ref(plan, name)
        batches.append(
            Batch(
                {name: value for name, value in values.items() if name not in per_sample},
                {name: value for name, value in values.items() if name in per_sample},
            )
        )
    return batches


def step_figures(algorithm: Algorithm, report: Report, plan: MaskPlan, batch: Batch, ranks: Ranks) -> dict[str, float]:
    """ELBO, ratios and distances of an optimizer step, over what all ranks scored.

    Ratios are those of the sequence or sample scores that the objective compares; token-wise ratios are not kept by the engine.
    """
    elbo_BK = report.sample_elbo_BK  # NaN where a sample was dropped, unscored
    scored = elbo_BK.isfinite()
    lengths_B1 = plan.lengths_B[:, None].clamp(min=1)
    share = plan.counts.t().float() / lengths_B1
    parts: dict[str, tuple[Tensor, Tensor]] = {"elbo": (elbo_BK, scored), "mask_ratio": (share, torch.ones_like(scored))}
    score_B1 = (elbo_BK.nan_to_num() * plan.share_K).sum(-1)[:, None]
    clip = Clip() if algorithm.recipe.clip is None else algorithm.recipe.clip(algorithm.options)
    figures: dict[str, float] = {}
    for name in filter(None, (algorithm.objective.old_scores, "ref_elbo", "ref_sample_elbo")):
        if name in batch.per_sample and name.endswith("_sample_elbo"):
            difference = elbo_BK - batch.per_sample[name].unsqueeze(-1).flatten(2).sum(-1)
        elif name in batch.per_sequence:
            difference = score_B1 - batch.per_sequence[name][:, None]
        else:
            continue
        seen = difference.isfinite()
        if name.startswith("ref_"):
            parts["kl"] = (difference / lengths_B1, seen)
            continue
        delta = difference / lengths_B1 if clip.per_token else difference
        worst = max(ranks.tell(float(delta[seen].abs().max()) if bool(seen.any()) else 0.0))
        figures["largest_ratio"] = math.exp(min(worst, 80.0))
        clipped = ((delta.exp() < 1 - clip.low) | (delta.exp() > 1 + clip.high)).float()
        parts["clip_fraction"] = (clipped, seen)
    for name, (values, where) in parts.items():
        total, count = ranks.total(float(values[where].sum())), ranks.total(float(where.sum()))
        figures[name] = total / max(1.0, count)
    return figures
