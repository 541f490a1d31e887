"""The guards that stop an RL run: broken or degenerate rollouts, and scores that disagree with them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dllm_kernels import Rollout, select_steps, step_entropy, trajectory_logp, trajectory_rows
from dllm_kernels.accumulation.scores import score_samples

from ..config import GuardConfig
from ..errors import GuardError
from ..tasks import Example
from .setup import Setup

IMPOSSIBLE_LOGP = -100.0  # nats at temperature 1, with room for lower temperatures


def on_policy_gap(setup: Setup, sampled: Rollout) -> float:
    """Largest |logp at rollout - logp at scoring| per token, in nats, over a step of each rollout on all
    ranks.

    Both are the same policy, so a gap comes from a cache, another batch shape, dropout or another dtype, and
    every ratio is off by it. The step is drawn among all but the last, which hides hardly any token.
    Raises GuardError above `rl.gap_bound`. With `rollout.cache` prefix or dual the gap is that of the approximation.
    """
    entropy_TB = step_entropy(sampled.commit_entropy_BL, sampled.commit_step_BL, steps=sampled.masked_entropy_BT.shape[1])
    drawn_BJ = select_steps(entropy_TB, 2, "random", seed=setup.config.seed, sequence_ids=sampled.sequence_ids_B)
    plan = trajectory_rows(sampled, drawn_BJ[:, :1])  # the second is always the last step
    options = setup.scoring_options(sampled.attention_mask_BS, setup.config.rl, as_rolled_out=True)
    scored_BK = score_samples(setup.model, plan, **options)
    tokens_BK = plan.counts.t().clamp(min=1)
    gap = ((scored_BK - trajectory_logp(sampled, plan, approximate=True)) / tokens_BK).abs().max()
    worst = max(setup.ranks.tell(float(gap)))
    bound = setup.config.rl.gap_bound
    if sampled.approximate and not worst <= bound:
        raise GuardError(
            f"the rollout's log-probs are off by {worst:.3g} nats a token (bound rl.gap_bound={bound:g}), which "
            f"rollout.cache={setup.config.rollout.cache} makes of them: a smaller rollout.refresh brings them closer, and a "
            "larger rl.gap_bound allows it"
        )
    if not worst <= bound:
        raise GuardError(
            f"scoring differs from the rollout by {worst:.3g} nats a token, though both are the same policy (bound "
            f"rl.gap_bound={bound:g}); a cache, dropout, or 16-bit weights make such gaps"
        )
    return worst


def guard_failures(sampled: Rollout, examples: Sequence[Example]) -> None:
    """Raises GuardError if hidden states of a rollout were not finite."""
    if bool(sampled.failed_B.any()):
        first = examples[int(sampled.failed_B.nonzero()[0])]
        raise GuardError(
            f"{int(sampled.failed_B.sum())} rollout(s) met hidden states that are not finite, the first of example {first.id}; "
            "a lower learning rate or float32 weights usually help"
        )


def guard_rollouts(setup: Setup, sampled: Rollout, rewards: Tensor) -> None:
    """Raises GuardError for a reward that is not finite, and for ids outside the vocabulary."""
    completion, vocabulary = sampled.completion_BL, int(setup.model.config.get_text_config().vocab_size)
    if not bool(torch.isfinite(rewards).all()):
        raise GuardError(f"a reward is {float(rewards[~torch.isfinite(rewards)][0])}; rewards must be finite")
    if int(completion.min()) < 0 or int(completion.max()) >= vocabulary:
        raise GuardError(f"rollouts must hold ids in 0..{vocabulary - 1}, got {int(completion.min())}..{int(completion.max())}")


class NoSignal:
    """Tells, and where `guard.no_signal` says so ends, a run whose updates have no gradient: a reward that is the same for all
    rollouts of a group teaches nothing, and all else looks as if it worked.
    """

    def __init__(self, config: GuardConfig):
        self._config, self._updates = config, 0

    def seen(self, figures: Mapping[str, float]) -> str:
        """After each update; a warning, or "". Raises GuardError."""
        if figures.get("groups_with_signal", 1):  # learning from pairs has no groups
            self._updates = 0
            return ""
        self._updates += 1
        constant = figures["reward_std"] == 0
        what = (
            f"every rollout has the reward {figures['reward']:g}" if constant else "all rollouts of a group have the same reward"
        )
        told = f"nothing was learned in the last {self._updates} update(s): {what}; another rl.reward, more of rl.group, "
        told += "more SFT or easier examples would give a signal"
        if self._config.no_signal is not None and self._updates >= self._config.no_signal:
            raise GuardError(f"{told} (guard.no_signal={self._config.no_signal})")
        return told if self._updates == self._config.warn_after else ""


def guard_groups(completion_BL: Tensor, logp_BL: Tensor, group: int) -> None:
    """Raises GuardError if the policy collapsed to one token or the members of groups share their noise.

    Completions and their log-probs `[B, L]`, of all ranks; `group` consecutive ones belong together.
    """
    if bool((completion_BL == completion_BL[:, :1]).all()) and completion_BL.shape[1] > 1:
        raise GuardError("every rollout repeats a single token: the policy has collapsed; a lower rl.lr usually helps")
    groups = completion_BL.view(-1, group, completion_BL.shape[1])
    # a confident policy repeats itself; broken noise repeats what is very unlikely to be drawn twice
    repeats_logp = float(logp_BL.sum(-1).view(-1, group)[:, 1:].sum())
    if bool((groups == groups[:, :1]).all()) and not repeats_logp >= IMPOSSIBLE_LOGP:  # nan: another engine did not tell
        told = "" if math.isnan(repeats_logp) else f", though the policy gives that a log-probability of {repeats_logp:.0f}"
        raise GuardError(
            f"every group consists of identical rollouts{told}: the members of a group share their noise, or the sampler ignores "
            "its temperature"
        )
