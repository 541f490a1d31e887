"""EGSPO: policy optimisation over the denoising steps of highest entropy; EGSPO-SA adds stepwise advantages (arXiv 2603.12554).

A rollout is a Markov decision process whose actions are the tokens revealed in one step, so the policy gradient is a sum over
steps. Each sequence is trained at its own K steps of highest entropy.

Verified against the public code (vishnutez/egspo-dllm-rl at a7d618b, egspo/egspo_trainer.py); of the paper only the abstract and
notes were read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dllm_kernels import checks
from dllm_kernels.accumulation.objective import Batch, Objective
from dllm_kernels.masks import steps
from dllm_kernels.masks.plan import MaskPlan
from dllm_kernels.objectives.advantages import group_advantages
from dllm_kernels.objectives.recipe import Clip, Recipe, Trajectory
from dllm_kernels.objectives.surrogates import SCORES, check_clip, check_policy, check_values, clipped_ratio_term, k3
from dllm_kernels.objectives.tokens import check_reference
from dllm_kernels.objectives.update import States, Update, later_signal
from dllm_kernels.rollouts.rollout import Rollout
from dllm_kernels.rollouts.trajectories import SELECTIONS, select_steps, step_entropy, trajectory_rows

__all__ = ["egspo", "egspo_objective", "egspo_sa_objective", "stepwise_returns"]


def egspo(
    step_logp_B: Tensor,
    old_step_logp_B: Tensor,
    ref_step_logp_B: Tensor | None,
    advantages_B: Tensor,
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.5,
    beta: float = 0.04,
    tokens_per_step: float,
    kl_B: Tensor | None = None,
) -> Tensor:
    """`mean_b (-min(rho A, clip(rho, 1 - epsilon_low, 1 + epsilon_high) A) + beta KL) / tokens_per_step`, `rho = e^(s - old)`.

    s is the joint log-prob of the tokens that a step commits, given the state before it; KL = k3(s, ref) or exact (lines 86-146
    of the code).

    Args:
        step_logp_B: s, `[B]`, float32 or float64, differentiable: one step of each sequence.
        old_step_logp_B: the same of the policy that generated; `step_logp_B.detach()` on-policy.
        ref_step_logp_B: the same of the reference; None is allowed where beta is 0 or kl_B is given.
        advantages_B: `[B]`, of that step, see `stepwise_returns`.
        tokens_per_step: above 0, completion length over number of steps.
        kl_B: `[B]`, the exact `sum_v p (log p - log p_ref)` summed over the step's tokens, where it was computed; takes the place
            of k3, and carries a gradient if it has one.

    Old, reference and advantages are detached. The gradient of the surrogate is `-A rho`, exactly 0 where it is strictly
    clipped, and -A at rho = 1 also with epsilon = 0. Raises TypeError or ValueError naming the argument.

    Example:
        >>> step = torch.tensor([-1.0, -2.0], requires_grad=True)
        >>> egspo(step, step, step, torch.tensor([2.0, 4.0]), tokens_per_step=2).item()
        -1.5
    """
    sizes = check_policy("step_logp_B", step_logp_B, 1)
    _check_options(epsilon_low, epsilon_high, beta, tokens_per_step)
    check_values("old_step_logp_B", old_step_logp_B, sizes, step_logp_B)
    check_values("advantages_B", advantages_B, sizes, step_logp_B)
    if kl_B is None:
        check_reference("ref_step_logp_B", ref_step_logp_B, sizes, step_logp_B, beta)
    else:
        check_values("kl_B", kl_B, sizes, step_logp_B)
    terms_B = -clipped_ratio_term(step_logp_B - old_step_logp_B.detach(), advantages_B, epsilon_low, epsilon_high)
    if beta > 0:
        terms_B = terms_B + beta * (_kl(step_logp_B, ref_step_logp_B) if kl_B is None else kl_B)
    return terms_B.mean() / tokens_per_step


def _kl(step_logp: Tensor, ref_step_logp: Tensor | None) -> Tensor:
    assert ref_step_logp is not None
    return k3(step_logp - ref_step_logp.detach())


def stepwise_returns(rewards_B: Tensor, step_rewards: Tensor, *, lam: float = 0.5, normalize: bool = True) -> Tensor:
    """EGSPO-SA's returns `R + lam (R - R_k)`, divided by `1 + lam` if `normalize`; detached (lines 884-969 of the code).

    `group_advantages(returns, group_ids, kind="mean")` then centres them by group and entropy rank: column k holds each
    sequence's k-th chosen step, not one time step. lam = 0 is EGSPO. The code's option `standard_grpo_returns` is
    `(group_advantages(rewards_B, group_ids)[:, None] + lam * (rewards_B[:, None] - step_rewards)) / (1 + lam)`, without the
    division where it does not normalise.

    Args:
        rewards_B: R, `[B]`, of the final completions.
        step_rewards: R_k, `[B]` or `[B, J]`, of the greedy completion at each chosen step. The result has its shape.
        lam: at least 0.

    Raises TypeError or ValueError naming the argument.

    Example:
        >>> stepwise_returns(torch.tensor([1.0]), torch.tensor([[1.0, 0.0]]))
        tensor([[0.6667, 1.0000]])
    """
    checks.dtype("rewards_B", rewards_B, SCORES)
    checks.shape("rewards_B", rewards_B, [None])
    checks.finite("rewards_B", rewards_B)
    checks.require_tensor("step_rewards", step_rewards)
    if step_rewards.dim() not in (1, 2):
        raise ValueError(f"step_rewards must have shape [B] or [B, J], got {list(step_rewards.shape)}")
    check_values("step_rewards", step_rewards, [len(rewards_B), *step_rewards.shape[1:]], rewards_B)
    checks.number("lam", lam, least=0)
    final = rewards_B.detach().view(-1, *[1] * (step_rewards.dim() - 1))
    returns = final + lam * (final - step_rewards.detach())
    return returns / (1 + lam) if normalize else returns


def egspo_objective(
    *, epsilon_low: float = 0.2, epsilon_high: float = 0.5, beta: float = 0.04, tokens_per_step: float
) -> Objective:
    """EGSPO for the engine, on plans of law `trace` with the chosen steps as `steps_BJ`; KL by k3.

    Entries: "advantages" `[B]`; "old_sample_elbo" `[B, K]`, absent on-policy; "ref_sample_elbo" `[B, K]` where beta is above
    0; with blocks `[B, K, blocks]`, as `masks.steps` has them. Its denominator is the number of pairs (sequence, step)
    with a token, `masks.steps.number(plan)`, summed over the plans of an optimizer step: all K steps of a sequence at
    once, where the code takes one per micro-batch.
    """
    return _objective("egspo", epsilon_low, epsilon_high, beta, tokens_per_step)


def egspo_sa_objective(
    *, epsilon_low: float = 0.2, epsilon_high: float = 0.5, beta: float = 0.04, tokens_per_step: float
) -> Objective:
    """EGSPO-SA for the engine: as `egspo_objective`, but with "step_advantages" `[B, K]` in the place of "advantages"."""
    return _objective("egspo_sa", epsilon_low, epsilon_high, beta, tokens_per_step)


def _objective(name: str, epsilon_low: float, epsilon_high: float, beta: float, tokens_per_step: float) -> Objective:
    _check_options(epsilon_low, epsilon_high, beta, tokens_per_step)
    stepwise = name == "egspo_sa"

    def contributions(logp_N: Tensor, plan: MaskPlan, batch: Batch) -> Tensor:
        joint = steps.sums(plan, plan.dense(logp_N))  # [B, K], a step of a sequence each; with blocks [B, K, blocks]
        old = batch.per_sample.get("old_sample_elbo", joint).detach()
        if stepwise:
            advantages = batch.per_sample["step_advantages"]
        else:
            advantages = batch.per_sequence["advantages"].view(-1, *[1] * (joint.dim() - 1))
        terms = -clipped_ratio_term(joint - old, advantages, epsilon_low, epsilon_high)
        if beta > 0:
            terms = terms + beta * _kl(joint, batch.per_sample.get("ref_sample_elbo"))
        # a sequence may have fewer steps than others: what is not there is no action
        return torch.where(steps.present(plan), terms, 0.0).sum() / tokens_per_step

    scores = ("old_sample_elbo", "ref_sample_elbo") if beta > 0 else ("old_sample_elbo",)
    return Objective(
        name=name,
        contributions=contributions,
        coupling="sample",
        on_policy_coupling="sample" if beta > 0 else "none",
        denominator="steps",
        old_scores="old_sample_elbo",
        per_sequence=() if stepwise else ("advantages",),
        per_sample=(*scores, "step_advantages") if stepwise else scores,
        scale=None if beta > 0 else "step_advantages" if stepwise else "advantages",
        of_steps=True,
    )


def _check_options(epsilon_low: float, epsilon_high: float, beta: float, tokens_per_step: float) -> None:
    check_clip(epsilon_low, epsilon_high, ("epsilon_low", "epsilon_high"))
    checks.number("beta", beta, least=0)
    checks.number("tokens_per_step", tokens_per_step, above=0)


@dataclass(frozen=True)
class Options:
    """Of the loss, and of the choice of steps."""

    epsilon_low: float = 0.2
    epsilon_high: float = 0.5
    beta: float = 0.04
    tokens_per_step: float = 2.0  # a run's own, where it is not given
    selected_steps: int = 8  # denoising steps of each rollout that are trained on
    step_selection: str = "entropy"

    def __post_init__(self) -> None:
        checks.count("selected_steps", self.selected_steps)
        checks.choice("step_selection", self.step_selection, SELECTIONS)


@dataclass(frozen=True)
class OptionsSA(Options):
    """And of the returns."""

    stepwise: float = 0.5  # lambda of `stepwise_returns`

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.number("stepwise", self.stepwise, least=0)


def _selected_steps(rollout: Rollout, options: Options, seed: int) -> States:
    most, ids_B = rollout.masked_entropy_BT.shape[1], rollout.sequence_ids_B
    entropy_TB = step_entropy(rollout.commit_entropy_BL, rollout.commit_step_BL, steps=most)
    steps_BJ = select_steps(entropy_TB, options.selected_steps, options.step_selection, seed=seed, sequence_ids=ids_B)
    return States(rollout, trajectory_rows(rollout, steps_BJ), steps_BJ)


def _step_tokens(options: Options, length: int, steps: int) -> int:
    return -(-length // steps)


def _step_advantages(update: Update, options: OptionsSA) -> dict[str, Tensor]:
    """`[B, J]`: returns centred by group and entropy rank, from rewards of the greedy completions at the chosen steps."""
    states = update.states
    assert states is not None
    steps_BJ, greedy_BTL = states.steps_BJ, states.rollout.greedy_BTL
    assert steps_BJ is not None
    assert greedy_BTL is not None
    index_BJL = steps_BJ.clamp(min=0)[:, :, None].expand(-1, -1, greedy_BTL.shape[-1])
    # a step that a short rollout does not have gets 0, and is no action
    seen_BJ = torch.where(steps_BJ < 0, 0.0, update.reward(greedy_BTL.gather(1, index_BJL)))
    final_B = update.rewards.values_B[update.kept_N]
    everyone, mine = update.gather(stepwise_returns(final_B, seen_BJ, lam=options.stepwise))
    advantages_BJ = group_advantages(everyone, update.rewards.group_ids_B, kind="mean")[mine]
    if states.plan.step_KBS is None:
        return {"step_advantages": advantages_BJ}
    there = steps.states(states.plan)[..., None] == steps_BJ.masked_fill(steps_BJ < 0, -2)[:, None, None]
    return {"step_advantages": torch.where(there, advantages_BJ[:, None, None], 0.0).sum(-1)}


RECIPE = Recipe(
    name="egspo",
    title="Reinforcement Learning for Diffusion LLMs with Entropy-Guided Step Selection and Stepwise Advantages",
    arxiv="2603.12554",
    status="verified against the code",
    objective=egspo_objective,
    law="trace",
    law_options={},
    samples=None,
    advantage="mean",
    needs_old=True,
    needs_reference=True,
    inner_iterations=1,
    options=Options,
    from_run=lambda length, steps: {"tokens_per_step": length / steps},
    trajectory=Trajectory(_selected_steps, _step_tokens, lambda options, length, steps: min(options.selected_steps, steps)),
    clip=lambda options: Clip(options.epsilon_low, options.epsilon_high),
    window="completion",
    notes="The code was read in full, of the paper the abstract and notes. The 8 steps of highest entropy of 128, for 256 "
    "tokens; the code takes 2 of the 8 per optimizer step, we take all. Groups of 8, learning rate 3e-5, LoRA, temperature "
    "0.9.",
)
RECIPE_SA = replace(
    RECIPE,
    name="egspo_sa",
    objective=egspo_sa_objective,
    options=OptionsSA,
    signal=later_signal,
    greedy=True,
    entries=_step_advantages,
    notes=RECIPE.notes + " Advantages are of `stepwise_returns` with lam 0.5, normalised, by entropy rank.",
)
