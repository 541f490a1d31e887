"""JustGRPO: GRPO on the denoiser read from left to right (arXiv 2601.15165).

The state of token l shows the prompt and the tokens before l and hides the rest; only l is scored in it. The product of these
is an exact likelihood, of the policy that generates one token after another.

Verified against the code (LeapLabTHU/JustGRPO at eebe50e, grpo.py and train.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_kernels.accumulation.objective import Batch, Objective
from dllm_kernels.masks.plan import MaskPlan
from dllm_kernels.objectives.recipe import Recipe, Trajectory
from dllm_kernels.objectives.surrogates import check_clip, check_mask, check_policy, check_values, dense_logp
from dllm_kernels.objectives.tokens import old_and_reference, token_terms
from dllm_kernels.objectives.update import Rewards, Signal, States, signal_of
from dllm_kernels.rollouts.rollout import Rollout
from dllm_kernels.rollouts.trajectories import plan_of_states

__all__ = ["justgrpo", "justgrpo_objective"]


def justgrpo(
    logp_BL: Tensor, old_logp_BL: Tensor, advantages_B: Tensor, completion_mask_BL: Tensor, *, epsilon: float = 0.2
) -> Tensor:
    """`-sum_b (1/L_b) sum_l c_bl min(rho A_b, clip(rho, 1 +- epsilon) A_b) / #{b: A_b != 0}`, `rho = e^(logp - old)`.

    Lines 27-50 of the code, whose policy is the one that generated in every step; its 1e-5 beside the count is left out.

    Args:
        logp_BL: log-probs `[B, L]`, each token given the prompt and the tokens before it, float32 or float64, differentiable.
        old_logp_BL: the same of the policy that generated; `logp_BL.detach()` on-policy.
        advantages_B: `[B]`; the code's are z-scores by std + 1e-4.
        completion_mask_BL: bool, c; in the code the whole window, of L tokens. The rest may hold anything.

    Everything but logp_BL is detached. Without an advantage the loss is 0. Raises TypeError or ValueError naming the argument.

    Example:
        >>> logp = torch.tensor([[-1.0, -2.0], [-3.0, -1.0]], requires_grad=True)
        >>> justgrpo(logp, logp, torch.tensor([2.0, 0.0]), torch.ones(2, 2, dtype=torch.bool)).backward()
        >>> logp.grad
        tensor([[-1., -1.],
                [ 0.,  0.]])
    """
    sizes = check_policy("logp_BL", logp_BL, 2)
    check_clip(epsilon, epsilon)
    check_mask("completion_mask_BL", completion_mask_BL, sizes, logp_BL)
    check_values("old_logp_BL", old_logp_BL, sizes, logp_BL, where=completion_mask_BL)
    check_values("advantages_B", advantages_B, sizes[:1], logp_BL)
    terms_BL = token_terms(logp_BL, old_logp_BL, None, advantages_B[:, None], completion_mask_BL, epsilon=epsilon, beta=0.0)
    means_B = terms_BL.sum(-1) / completion_mask_BL.sum(-1).clamp(min=1)
    return means_B.sum() / (advantages_B != 0).sum().clamp(min=1)


def justgrpo_objective(*, epsilon: float = 0.2) -> Objective:
    """`justgrpo` for the engine, on plans in which every token is scored once; the recipe counts sequences with an advantage.

    Entries: "advantages" `[B]`; "old_logp" `[B, K, S]`, absent on-policy.
    """
    check_clip(epsilon, epsilon)

    def contributions(logp_N: Tensor, plan: MaskPlan, batch: Batch) -> Tensor:
        logp_KBS = dense_logp(logp_N, plan)
        old_KBS, _ = old_and_reference(batch, logp_KBS)
        advantages_B1 = batch.per_sequence["advantages"][:, None]
        terms_KBS = token_terms(logp_KBS, old_KBS, None, advantages_B1, plan.scored, epsilon=epsilon, beta=0.0)
        return (terms_KBS.sum((0, 2)) / plan.lengths_B.clamp(min=1)).sum()

    return Objective(
        name="justgrpo",
        contributions=contributions,
        coupling="token",
        on_policy_coupling="none",
        denominator="sequences",
        old_scores="old_logp",
        per_sequence=("advantages",),
        per_token=("old_logp",),
        scale="advantages",
    )


def _left_to_right(rollout: Rollout, options: object, seed: int) -> States:
    """A state for each token, whatever the order in which the rollout decided them."""
    completion_BS = rollout.completion_mask_BS
    length = rollout.commit_step_BL.shape[1]
    plan = plan_of_states(
        rollout,
        "segments",  # not "trace": the scores of the rollout are of its own order
        seed=seed,
        prompt_noise=0.0,
        causal_block=rollout.settings.get("causal_block"),
        # what lies between a completion and the end of its block comes after all of its tokens
        step_map_BS=torch.where(completion_BS, completion_BS.cumsum(-1) - 1, (rollout.step_map_BS >= 0).long() * length - 1),
        segments=length,
        total_steps=length,
    )
    return States(rollout, plan)


def _signal(rewards: Rewards, objective: Objective, options: object) -> Signal:
    found = signal_of({"advantages": rewards.advantages()}, rewards, objective)
    return Signal(found.kept_N, found.entries, float(max(1, len(found.kept_N))))


RECIPE = Recipe(
    name="justgrpo",
    title="JustGRPO: GRPO on a diffusion language model read from left to right",
    arxiv="2601.15165",
    status="verified against the code",
    objective=justgrpo_objective,
    law="segments",
    law_options={},
    samples=None,
    advantage="std",
    needs_old=True,
    needs_reference=False,
    inner_iterations=1,
    signal=_signal,
    trajectory=Trajectory(_left_to_right, lambda options, length, steps: 1),
    window="completion",
    notes="The code was read, of the paper the abstract. The code divides by the sequences with an advantage of each prompt and "
    "adds prompts up, here by those of the whole step. Rollouts take one token after another (rollout.block_length=1), at "
    "temperature 1; groups of 16, learning rate 5e-6, full fine-tuning, 256 tokens.",
)
