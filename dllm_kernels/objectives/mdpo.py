"""MDPO: masked diffusion policy optimization (arXiv 2508.13148).

Each step of the rollout is an action: the draft of all hidden tokens that its state suggests. The drafts are rewarded, and the
steps of each rollout with the largest advantages are trained on, weighed by how many tokens are hidden and how sure the draft is.

Verified against the code (autonomousvision/mdpo at e6ae439, src/open_r1/mdpo/mdpo_trainer.py, lines 850-857, 917-949 and
1487-1546); DARE's port (yjyddq/DARE at 83ae8a3, verl/trainer/ppo/mdpo_algos.py) has the same loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dllm_kernels import checks
from dllm_kernels.accumulation.objective import Batch, Objective
from dllm_kernels.masks.plan import MaskPlan
from dllm_kernels.objectives.advantages import group_advantages
from dllm_kernels.objectives.recipe import Recipe, Trajectory
from dllm_kernels.objectives.surrogates import (
    check_mask,
    check_policy,
    check_values,
    clipped_ratio_term,
    dense_logp,
    k2,
    masked_difference,
)
from dllm_kernels.objectives.tokens import check_ratio_options, check_reference, old_and_reference
from dllm_kernels.objectives.update import States, Update, later_signal
from dllm_kernels.rollouts.rollout import Rollout
from dllm_kernels.rollouts.trajectories import plan_of_states

__all__ = ["mdpo", "mdpo_objective", "mdpo_step_values"]


def mdpo(
    logp_BL: Tensor,
    old_logp_BL: Tensor,
    ref_logp_BL: Tensor | None,
    advantages_B: Tensor,
    hidden_mask_BL: Tensor,
    confidence_BL: Tensor,
    *,
    epsilon: float = 0.2,
    beta: float = 0.0,
) -> Tensor:
    """`mean_b (1/n_b) sum_{l hidden} conf_l [ -(L / n_b) min(rho A, clip(rho, 1 +- epsilon) A) + beta k2(logp, ref) ]`.

    `rho = e^(logp - old)`, n_b the hidden tokens of a row, which is a pair (sequence, step) (lines 1487-1530 of the code, which
    adds 1e-4 to n).

    Args:
        logp_BL: log-probs `[B, L]` of the step's draft in the state before it, float32 or float64, differentiable; L is the
            completion's length.
        old_logp_BL, ref_logp_BL: the same of the policy that generated, `logp_BL.detach()` on-policy, and of the reference,
            which may be None where beta is 0.
        advantages_B: `[B]`, of the step, see `mdpo_step_values`.
        hidden_mask_BL: bool `[B, L]`. The rest may hold anything. An empty row contributes 0 and is counted in B.
        confidence_BL: `[B, L]`, the probability of the draft's tokens at rollout.
        epsilon, beta: the clip, in [0, 1], and the weight of the KL.

    Everything but logp_BL is detached. Raises TypeError or ValueError naming the argument.

    Example:
        >>> logp = torch.tensor([[-1.0, -2.0, -9.0]], requires_grad=True)
        >>> hidden, sure = torch.tensor([[True, True, False]]), torch.tensor([[0.5, 1.0, 1.0]])
        >>> mdpo(logp, logp, None, torch.tensor([4.0]), hidden, sure).backward()
        >>> logp.grad  # L / n^2 = 3 / 4
        tensor([[-1.5000, -3.0000,  0.0000]])
    """
    check_ratio_options(epsilon, beta)
    sizes = check_policy("logp_BL", logp_BL, 2)
    check_mask("hidden_mask_BL", hidden_mask_BL, sizes, logp_BL)
    check_values("old_logp_BL", old_logp_BL, sizes, logp_BL, where=hidden_mask_BL)
    check_values("confidence_BL", confidence_BL, sizes, logp_BL, where=hidden_mask_BL)
    check_reference("ref_logp_BL", ref_logp_BL, sizes, logp_BL, beta, where=hidden_mask_BL)
    check_values("advantages_B", advantages_B, sizes[:1], logp_BL)
    scores = logp_BL, old_logp_BL, ref_logp_BL
    return _means(*scores, advantages_B[:, None], hidden_mask_BL, confidence_BL, sizes[1], epsilon, beta).mean()


def _means(
    logp: Tensor,
    old: Tensor,
    ref: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    confidence: Tensor,
    length: Tensor | int,
    epsilon: float,
    beta: float,
) -> Tensor:
    """The loss of each row, the last dimension summed up; `length` broadcasts to the rows with a last dimension of 1."""
    size = mask.sum(-1, keepdim=True).clamp(min=1)
    terms = -clipped_ratio_term(masked_difference(logp, old, mask), advantages, epsilon, epsilon) * length / size
    if beta > 0:
        assert ref is not None
        terms = terms + beta * k2(masked_difference(logp, ref, mask))
    weight = torch.where(mask, confidence.detach(), 0.0)
    return (terms * weight / size).sum(-1)


def mdpo_step_values(step_rewards_BT: Tensor) -> Tensor:
    """What a step is worth, `[B, T]`: `(R_t - R_{t-1} + 1) + mean of R_{t+1}..R_{T-1}`, with `R_{-1} = 0`; the last has R in
    place of the mean (lines 850-853 of the code). `group_advantages(values, group_ids, kind="std")` makes advantages of them.

    Args:
        step_rewards_BT: R, float `[B, T]`, the rewards of the drafts.

    Raises TypeError or ValueError naming the argument.

    Example:
        >>> mdpo_step_values(torch.tensor([[0.0, 1.0, 1.0]]))
        tensor([[2., 3., 2.]])
    """
    checks.dtype("step_rewards_BT", step_rewards_BT, [torch.float32, torch.float64])
    checks.shape("step_rewards_BT", step_rewards_BT, [None, None])
    checks.finite("step_rewards_BT", step_rewards_BT)
    rewards_BT = step_rewards_BT.detach()
    T = rewards_BT.shape[1]
    gained_BT = rewards_BT - torch.nn.functional.pad(rewards_BT, (1, 0))[:, :T] + 1
    later_BT = rewards_BT[:, 1:].flip(-1).cumsum(-1) / torch.arange(1, T, device=rewards_BT.device)
    return gained_BT + torch.cat([later_BT.flip(-1), rewards_BT[:, -1:]], dim=-1)


def mdpo_objective(*, epsilon: float = 0.2, beta: float = 0.0) -> Objective:
    """`mdpo` for the engine, on plans whose samples score drafts; the confidence is the old policy's probability.

    Entries: "step_advantages" and "step_weights" `[B, K]`, the latter 1 / J at a sequence's J chosen steps and 0 elsewhere;
    "old_logp" `[B, K, S]`, absent on-policy; "ref_logp" `[B, K, S]` where beta is above 0.
    """
    check_ratio_options(epsilon, beta)

    def contributions(logp_N: Tensor, plan: MaskPlan, batch: Batch) -> Tensor:
        logp_KBS = dense_logp(logp_N, plan)
        old_KBS, ref_KBS = old_and_reference(batch, logp_KBS)
        sure_KBS = torch.exp(torch.where(plan.scored, old_KBS.detach(), 0.0))
        advantages_KB1, weights_KB = batch.per_sample["step_advantages"].t()[..., None], batch.per_sample["step_weights"].t()
        length_B1 = plan.lengths_B[:, None]
        means_KB = _means(logp_KBS, old_KBS, ref_KBS, advantages_KB1, plan.scored, sure_KBS, length_B1, epsilon, beta)
        return (means_KB * weights_KB.detach()).sum()

    return Objective(
        name="mdpo",
        contributions=contributions,
        coupling="token",
        on_policy_coupling="token",
        denominator="sequences",
        old_scores="old_logp",
        per_sample=("step_advantages", "step_weights"),
        per_token=("old_logp", "ref_logp") if beta > 0 else ("old_logp",),
        scale="step_weights",
    )


@dataclass(frozen=True)
class Options:
    """Of the loss, and of the choice of steps."""

    epsilon: float = 0.2
    beta: float = 0.0
    selected_steps: int = 16

    def __post_init__(self) -> None:
        checks.count("selected_steps", self.selected_steps)


def _drafts(rollout: Rollout) -> Tensor:
    """int64 `[B, T, L]`: the likeliest completion before each step; the final one where a rollout has ended."""
    assert rollout.greedy_BTL is not None
    ended_BT = torch.arange(rollout.greedy_BTL.shape[1], device=rollout.steps_B.device) >= rollout.steps_B[:, None]
    return torch.where(ended_BT[:, :, None], rollout.completion_BL[:, None].long(), rollout.greedy_BTL.long())


def _draft_states(rollout: Rollout, options: Options, seed: int) -> States:
    """Every step's state, and the draft of its hidden tokens; which steps are trained on follows from rewards."""
    completion_BS, drafts_BTL = rollout.completion_mask_BS, _drafts(rollout)
    B, T, _ = drafts_BTL.shape
    shown_BTS = torch.stack([rollout.state_at(step) for step in range(T)], dim=1).long()
    hidden_BTS = completion_BS[:, None] & (shown_BTS == rollout.mask_id)
    step_T1 = torch.arange(T, device=shown_BTS.device)[:, None]
    plan = plan_of_states(
        rollout,
        "trace",
        seed=seed,
        prompt_noise=0.0,
        shown_BKS=shown_BTS,
        event_steps_BKS=torch.where(hidden_BTS, step_T1, -1),
        event_ids_BKS=torch.stack([rollout.spread(drafts_BTL[:, t], shown_BTS[:, t]) for t in range(T)], dim=1),
    )
    return States(rollout, plan, step_T1.t().expand(B, T), replayed=False)


def _steps(update: Update, options: Options) -> dict[str, Tensor]:
    """Advantages of all steps, and the weights of each sequence's steps with the largest ones, of either sign.

    The code chooses by a sum over the sequences of a process, which its configs and its README make one (line 922).
    """
    states = update.states
    assert states is not None
    everyone, mine = update.gather(mdpo_step_values(update.reward(_drafts(states.rollout))))
    advantages_BT = group_advantages(everyone, update.rewards.group_ids_B, kind="std")
    J = min(options.selected_steps, advantages_BT.shape[1])
    chosen_BJ = advantages_BT.abs().argsort(dim=-1, descending=True, stable=True)[:, :J]
    weights_BT = torch.zeros_like(advantages_BT).scatter(1, chosen_BJ, 1.0 / J)
    return {"step_advantages": advantages_BT[mine], "step_weights": weights_BT[mine]}


RECIPE = Recipe(
    name="mdpo",
    title="MDPO: Overcoming the Training-Inference Divide of Masked Diffusion Language Models",
    arxiv="2508.13148",
    status="verified against the code",
    objective=mdpo_objective,
    law="trace",
    law_options={},
    samples=None,
    advantage=None,
    needs_old=True,
    needs_reference=False,
    inner_iterations=1,
    options=Options,
    signal=later_signal,
    trajectory=Trajectory(
        _draft_states,
        lambda options, length, steps: -(-length // 2),
        lambda options, length, steps: min(options.selected_steps, steps),
    ),
    window="completion",
    greedy=True,
    blocks=False,
    entries=_steps,
    notes="The code was read, of the paper the abstract. Its drafts are drawn at temperature 0.1, ours are the likeliest tokens; "
    "its logits are divided by that temperature, ours are not. 16 of 128 steps, 512 tokens, groups of 4, learning rate 1e-5, "
    "full fine-tuning, by its config; its README's command for the paper has 8 steps, beta 0.02, learning rate 7e-7, temperature "
    "0.4. Running confidence remasking is a rollout's.",
)
