"""DMPO: distribution matching policy optimization (arXiv 2510.08233, ICML 2026).

Cross-entropy fit to the reward-tilted target `p*(y) ~ p_ref(y) e^{r(y) / alpha}` with samples of the current policy,
importance-weighted within a group (WDCE): no ratio, clip or KL. Weights come from the ELBOs at rollout; the loss draws fresh
masks.

Verified against the code (yuchen-zhu-zyc/DMPO at 96af1a4). Its `ddo` loss and adaptive coefficient are left out on purpose.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dllm_kernels import checks
from dllm_kernels.accumulation.objective import Batch, Objective
from dllm_kernels.masks.plan import MaskPlan
from dllm_kernels.objectives import surrogates
from dllm_kernels.objectives.recipe import Recipe
from dllm_kernels.objectives.update import Update, later_signal

__all__ = ["dmpo", "dmpo_objective", "effective_sample_size", "wdce_baseline", "wdce_weights"]

BASELINES = ("none", "neg", "mean", "unbias")


def wdce_weights(
    rewards_B: Tensor,
    elbo_B: Tensor,
    ref_elbo_B: Tensor,
    group_ids_B: Tensor,
    *,
    alpha: float = 0.04,
    kappa: float = 1.0,
) -> Tensor:
    """Target weights of the sequences within their group: `softmax(kappa (ref_elbo - elbo + r / alpha))`.

    Args:
        rewards_B: `[B]`.
        elbo_B, ref_elbo_B: ELBOs `[B]` (nats) at rollout under current policy and reference, with the same masks.
        group_ids_B: int64 `[B]`; equal ids form a group, in any order, of any size.
        alpha: the temperature of the target, above 0. 0: `softmax(kappa r)`. -1: the rewards
            themselves (dmpo_trainer.py:431-457).
        kappa: above 0; flattens the weights where they rest on few sequences, see `effective_sample_size`.

    Returns detached weights `[B]`, of sum 1 in each group (but for alpha = -1). Raises TypeError or ValueError naming the
    argument.

    Example:
        >>> elbo = torch.tensor([-8.0, -6.0, -5.0])
        >>> wdce_weights(torch.tensor([1.0, 1.0, 0.0]), elbo, elbo, torch.tensor([1, 1, 2]))
        tensor([0.5000, 0.5000, 1.0000])
    """
    _check_rollout(rewards_B, elbo_B, ref_elbo_B, group_ids_B, alpha, kappa)
    return _tilted(rewards_B, elbo_B, ref_elbo_B, group_ids_B, alpha, kappa, 1.0)


def wdce_baseline(
    kind: str,
    rewards_B: Tensor,
    elbo_B: Tensor,
    ref_elbo_B: Tensor,
    group_ids_B: Tensor,
    *,
    alpha: float = 0.04,
    kappa: float = 1.0,
    current_elbo: Tensor | None = None,
) -> Tensor:
    """What to subtract from the weights so that bad completions are pushed away: `[B]`, detached.

    Args:
        kind: "none": 0. "neg", the code's default: `softmax(kappa (ref_elbo - elbo - r / alpha))`, with alpha = 0
            `softmax(-kappa r)`, with -1 `-r`. "mean": the group's mean weight. "unbias": `softmax(current_elbo - elbo)`.
            All within a group, where the code's last two take the local batch, be it more or less than a group.
        current_elbo: `[B]` under the policy as it is in this inner iteration, from the masks of the loss; for "unbias".
        rewards_B, elbo_B, ref_elbo_B, group_ids_B, alpha, kappa: as in `wdce_weights`.

    Raises TypeError or ValueError naming the argument.

    Example:
        >>> elbo = torch.tensor([-8.0, -6.0])
        >>> wdce_baseline("mean", torch.tensor([1.0, 0.0]), elbo, elbo, torch.tensor([1, 1]))
        tensor([0.5000, 0.5000])
    """
    checks.choice("kind", kind, BASELINES)
    _check_rollout(rewards_B, elbo_B, ref_elbo_B, group_ids_B, alpha, kappa)
    if kind == "none":
        return torch.zeros_like(elbo_B)
    if kind == "neg":
        return _tilted(rewards_B, elbo_B, ref_elbo_B, group_ids_B, alpha, kappa, -1.0)
    if kind == "mean":
        weights_B = _tilted(rewards_B, elbo_B, ref_elbo_B, group_ids_B, alpha, kappa, 1.0)
        return surrogates.group_mean(weights_B, group_ids_B)
    if current_elbo is None:
        raise ValueError("current_elbo must be given for kind='unbias', got None")
    surrogates.check_values("current_elbo", current_elbo, [len(elbo_B)], elbo_B)
    return surrogates.group_softmax(current_elbo - elbo_B, group_ids_B)


def dmpo(mean_logp_BR: Tensor, weights_B: Tensor, baseline_B: Tensor, *, strength: float = 1.0) -> Tensor:
    """`(1 / R) sum_{b, r} (w_b - strength * baseline_b) (-mean_logp_br)`: a weighted negative log-likelihood.

    Args:
        mean_logp_BR: `[B, R]`, the mean log-prob (nats) of the masked tokens of each of R replicates, `(1 / m) sum logp`, 0
            where none is masked; differentiable, fp32 or fp64. The code's replicates are pairs of complementary masks.
        weights_B: `[B]` from `wdce_weights`; detached. baseline_B: `[B]` from `wdce_baseline`; detached.
        strength: of the baseline.

    Returns the scalar loss (dmpo_trainer.py:156-184): a sum, not a mean, over the sequences of each group, whose weights sum
    to 1, and over the groups; divide by the number of groups for their mean, as the engine does. Raises TypeError or
    ValueError naming the argument.

    Example:
        >>> logp = torch.tensor([[-1.0, -3.0], [-2.0, -2.0]], requires_grad=True)
        >>> dmpo(logp, torch.tensor([0.75, 0.25]), torch.tensor([0.25, 0.75])).backward()
        >>> logp.grad
        tensor([[-0.2500, -0.2500],
                [ 0.2500,  0.2500]])
    """
    B, R = surrogates.check_policy("mean_logp_BR", mean_logp_BR, 2)
    surrogates.check_values("weights_B", weights_B, [B], mean_logp_BR)
    surrogates.check_values("baseline_B", baseline_B, [B], mean_logp_BR)
    checks.number("strength", strength)
    return _total(mean_logp_BR, weights_B - strength * baseline_B, R)


def effective_sample_size(weights_B: Tensor, group_ids_B: Tensor) -> Tensor:
    """`1 / (N sum w^2)` of each sequence's group of N, `[B]`, in (0, 1]: 1 where all weigh the same, 1/N where one has it all."""
    (B,) = surrogates.check_policy("weights_B", weights_B, 1)
    surrogates.check_group_ids(group_ids_B, [B], weights_B)
    size_B = surrogates.group_sum(torch.ones_like(weights_B), group_ids_B)
    return 1.0 / (size_B * surrogates.group_sum(weights_B.detach().square(), group_ids_B))


def _check_rollout(
    rewards_B: Tensor, elbo_B: Tensor, ref_elbo_B: Tensor, group_ids_B: Tensor, alpha: float, kappa: float
) -> None:
    (B,) = surrogates.check_policy("elbo_B", elbo_B, 1)
    surrogates.check_values("elbo_B", elbo_B, [B], elbo_B)
    surrogates.check_values("rewards_B", rewards_B, [B], elbo_B)
    surrogates.check_values("ref_elbo_B", ref_elbo_B, [B], elbo_B)
    surrogates.check_group_ids(group_ids_B, [B], elbo_B)
    _check_tilt(alpha, kappa)


def _check_tilt(alpha: float, kappa: float) -> None:
    if checks.number("alpha", alpha) < 0 and alpha != -1:
        raise ValueError(f"alpha must be above 0, 0 or -1, got {alpha}")
    checks.number("kappa", kappa, above=0)


def _tilted(
    rewards_B: Tensor, elbo_B: Tensor, ref_elbo_B: Tensor, group_ids_B: Tensor, alpha: float, kappa: float, sign: float
) -> Tensor:
    rewards_B = sign * rewards_B.detach().to(elbo_B.dtype)
    if alpha == -1:
        return rewards_B
    logits_B = ref_elbo_B - elbo_B + rewards_B / alpha if alpha > 0 else rewards_B
    return surrogates.group_softmax(kappa * logits_B, group_ids_B)


def _total(mean_logp_BR: Tensor, coefficients_B: Tensor, replicates: int) -> Tensor:
    return -(coefficients_B.detach()[:, None] * mean_logp_BR).sum() / replicates


def dmpo_objective(*, baseline: str = "neg", strength: float = 1.0) -> Objective:
    """`dmpo` for the engine; the samples of the plan are the replicates.

    Batch: per sequence "weights" from `wdce_weights` over whole groups, and "baseline" from `wdce_baseline`; but
    baseline="none" takes no more than the weights, and baseline="unbias" takes "old_elbo", the rollout's ELBO under the
    policy, and "group_ids": it depends on all that one call (or its `group` of ranks) sees, and is made anew from the
    policy's scores. The others may have "group_ids" to count the groups by.
    """
    checks.choice("baseline", baseline, BASELINES)
    checks.number("strength", strength)

    def reduce(logp_N: Tensor, plan: MaskPlan) -> Tensor:
        """The mean over the replicates of the mean log-prob of their masked tokens."""
        return surrogates.mean_logp(logp_N, plan).sum(1) / plan.samples

    def couple(mean_logp_B: Tensor, lengths_B: Tensor, entries: Mapping[str, Tensor]) -> Tensor:
        coefficients_B = entries["weights"]
        if baseline == "unbias":
            logits_B = lengths_B * mean_logp_B - entries["old_elbo"]
            coefficients_B = coefficients_B - strength * surrogates.group_softmax(logits_B, entries["group_ids"])
        elif baseline != "none":
            coefficients_B = coefficients_B - strength * entries["baseline"]
        return _total(mean_logp_B[:, None], coefficients_B, 1)

    def contributions(logp_N: Tensor, plan: MaskPlan, batch: Batch) -> Tensor:
        return couple(reduce(logp_N, plan), plan.lengths_B, batch.per_sequence)

    more = {"none": (), "unbias": ("old_elbo", "group_ids")}.get(baseline, ("baseline",))
    return Objective(
        name="dmpo",
        contributions=contributions,
        coupling="batch" if baseline == "unbias" else "none",
        on_policy_coupling="batch" if baseline == "unbias" else "none",
        denominator="groups",
        old_scores=None,
        per_sequence=("weights", *more),
        scale="weights" if baseline == "none" else None,
        reduce=reduce,
        couple=couple,
    )


@dataclass(frozen=True)
class Options:
    """Of the loss, and of its weights."""

    baseline: str = "neg"
    strength: float = 1.0
    alpha: float = 0.04  # of `wdce_weights` and `wdce_baseline`, as kappa
    kappa: float = 1.0

    def __post_init__(self) -> None:
        _check_tilt(self.alpha, self.kappa)


def _entries(update: Update, options: Options) -> dict[str, Tensor]:
    """Weights, and what the baseline needs, from ELBOs under one set of masks of their own."""
    plan = update.fresh_plan()
    elbo_B, mine = update.gather(update.old(plan, "old_elbo"))
    ref_elbo_B, _ = update.gather(update.ref(plan, "ref_elbo"))
    arguments = update.rewards.values_B, elbo_B, ref_elbo_B, update.rewards.group_ids_B
    entries = {"weights": wdce_weights(*arguments, alpha=options.alpha, kappa=options.kappa)[mine]}
    if options.baseline == "unbias":
        return entries | {"old_elbo": elbo_B[mine], "group_ids": update.rewards.group_ids_B[mine]}
    if options.baseline != "none":
        baseline_B = wdce_baseline(options.baseline, *arguments, alpha=options.alpha, kappa=options.kappa)
        entries["baseline"] = baseline_B[mine]
    return entries


def _figures(update: Update, batch: Batch, options: Options) -> dict[str, float]:
    weights_B, _ = update.gather(batch.per_sequence["weights"])
    return {"ess": effective_sample_size(weights_B, update.rewards.group_ids_B).mean().item()}


RECIPE = Recipe(
    name="dmpo",
    title="DMPO: distribution matching policy optimization",
    arxiv="2510.08233",
    status="verified against the code",
    objective=dmpo_objective,
    law="antithetic",
    law_options={"weight": "dmpo"},
    samples=4,
    advantage=None,
    needs_old=True,
    needs_reference=True,
    inner_iterations=8,
    options=Options,
    signal=later_signal,
    entries=_entries,
    figures=_figures,
    window="completion",
    notes="The official code was read; its `ddo` loss and adaptive coefficient are left out. Weights: alpha 0.04, kappa 1. Old "
    "and reference ELBOs are taken once, at rollout, with masks of their own. 16 completions a prompt, learning rate 1e-6, "
    "temperature 0.2.",
)
