"""The on-policy gap: how far scoring is from what the rollout saw, where both are the same policy.

A cache, another batch shape, dropout or another dtype make it; a ratio that is not 1 on-policy is a bug.
"""

from __future__ import annotations

from dllm_kernels import Rollout, select_steps, step_entropy, trajectory_logp, trajectory_rows
from dllm_kernels.accumulation.scores import score_samples

from ..errors import GuardError
from .setup import Setup


def on_policy_gap(setup: Setup, sampled: Rollout) -> float:
    """Largest |logp at rollout - logp at scoring| per token over one step of every rollout of all ranks, in nats.

    The step is drawn at random among all but the last, which hides nearly nothing. Raises GuardError above `rl.gap_bound`.
    """
    entropy_TB = step_entropy(sampled.commit_entropy_BL, sampled.commit_step_BL, steps=sampled.masked_entropy_BT.shape[1])
    drawn_BJ = select_steps(entropy_TB, 2, "random", seed=setup.config.seed, sequence_ids=sampled.sequence_ids_B)
    plan = trajectory_rows(sampled, drawn_BJ[:, :1])  # the other one is always the last
    options = setup.scoring_options(sampled.attention_mask_BS, setup.config.rl.micro_batch, as_rolled_out=True)
    scored_BK = score_samples(setup.model, plan, **options)
    tokens_BK = plan.counts.t().clamp(min=1)
    gap = ((scored_BK - trajectory_logp(sampled, plan)) / tokens_BK).abs().max()
    worst = max(setup.ranks.tell(float(gap)))
    bound = setup.config.rl.gap_bound
    if not worst <= bound:
        raise GuardError(
            f"scoring differs from the rollout by {worst:.3g} nats a token, though both are the same policy (bound "
            f"rl.gap_bound={bound:g}); a cache, dropout, or 16-bit weights make such gaps"
        )
    return worst
