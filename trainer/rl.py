"""Reinforcement learning: groups of rollouts, a reward checked by the rules, an objective's exact gradient sample by sample.

BGPO, or any algorithm of `dllm-train algorithms` that needs no trajectory. Where it needs a reference policy, that is the model
as it was when RL began: a frozen second copy of the weights under full fine-tuning, the model with its adapters off
under LoRA.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dllm_kernels import accumulate, generate, make_mask_plan, noise
from dllm_kernels.generation import Rollout
from dllm_kernels.masks import MaskPlan
from dllm_kernels.objective import Objective
from dllm_kernels.objectives import effective_sample_size
from trainer.algorithms import Scores, Signal, make_batches, make_objective, signal
from trainer.config import RlConfig, RolloutConfig
from trainer.errors import GuardError
from trainer.sudoku import REWARDS, Puzzles, reference_cells, valid
from trainer.tokenizer import Codec
from trainer.training import batch_indices, guarded_step, learning_rate

IMPOSSIBLE_LOGP = -100.0  # nats at temperature 1, with room for lower temperatures


def rl_updates(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    data: Puzzles,
    codec: Codec,
    config: RlConfig,
    rollout: RolloutConfig,
    *,
    seed: int,
    start: int = 0,
    reference: nn.Module | None = None,
) -> Iterator[dict[str, float]]:
    """Updates `start`..`config.updates - 1`, each yielding its figures.

    Prompts, noise and masks are functions of (seed, update). `reference`: the frozen policy of algorithms that need one; None
    for a model with adapters, which are switched off for it.
    """
    objective = make_objective(config)
    prompt_ids = codec.prompt_ids(data.puzzles)
    for update in range(start, config.updates):
        started = time.perf_counter()
        chosen, epoch = batch_indices("rl", seed, len(data), config.prompts, update)
        index = chosen.repeat_interleave(config.group)
        members = list(range(config.group)) * config.prompts
        sequence_ids = noise.sequence_ids([f"rl/{i}" for i in index.tolist()], epoch=epoch, members=members)
        sampled = generate(
            model,
            prompt_ids[index],
            length=data.puzzles.shape[1],
            mask_id=codec.mask_id,
            seed=seed,
            sequence_ids=sequence_ids,
            **rollout.model_dump(),
        )
        filled = codec.digits(sampled.completion_BL)
        rewards = REWARDS[config.reward](data.puzzles[index], filled, data.solutions[index])
        _guard_rollouts(sampled, rewards, config.group, vocabulary=int(model.config.vocab_size))
        found = signal(config, objective, rewards, index, data.puzzles.shape[1])
        kept = found.kept_N
        rolled_out = time.perf_counter()

        figures = {
            "reward": rewards.mean().item(),
            "valid": valid(data.puzzles[index], filled).float().mean().item(),
            "reference_cells": reference_cells(data.puzzles[index], filled, data.solutions[index]).mean().item(),
            "groups_with_signal": len(index[kept].unique()),
            "sequences_scored": len(kept),
            "rollout_logp": sampled.commit_logp_BL.sum(-1).mean().item(),
            "tokens": sampled.ids_BS.numel() * rollout.steps,
            "seconds_rollout": rolled_out - started,
        }
        if len(kept):
            scores = Scores(model, reference)
            arguments = sampled, found, rewards[kept], index[kept], sequence_ids[kept], codec, config, seed, update
            figures |= _learn(model, optimizer, objective, scores, *arguments)
            figures["tokens"] += figures.pop("tokens_scored")
        figures["seconds_gradient"] = time.perf_counter() - rolled_out
        figures["seconds"] = time.perf_counter() - started
        yield figures


def _learn(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    scores: Scores,
    sampled: Rollout,
    found: Signal,
    rewards: Tensor,
    group_ids: Tensor,
    sequence_ids: Tensor,
    codec: Codec,
    config: RlConfig,
    seed: int,
    update: int,
) -> dict[str, float]:
    """The optimizer steps on one set of rollouts. Rewards, group and sequence ids are those of the rollouts that are kept."""
    ids = sampled.ids_BS[found.kept_N]
    completion = torch.arange(ids.shape[1]) >= ids.shape[1] - sampled.completion_BL.shape[1]

    def plan_of(iteration: int) -> MaskPlan:
        return make_mask_plan(
            ids,
            completion.expand(len(ids), -1),
            law=config.law,
            samples=config.samples,
            seed=seed,
            sequence_ids=sequence_ids,
            mask_id=codec.mask_id,
            iteration=iteration,
            **config.law_options(),
        )

    plans = [plan_of(iteration) for iteration in range(config.inner_iterations)]
    arguments = plans, lambda: plan_of(len(plans)), rewards, group_ids, scores
    batches = make_batches(config, objective, found, *arguments)
    passes = scores.passes
    lr = learning_rate(config, update, config.updates)
    for plan, batch in zip(plans, batches, strict=True):
        report = accumulate(model, plan, objective, batch, denominator=found.denominator)
        passes += report.passes
        norm = guarded_step(model, optimizer, report.loss, config, lr)
    figures = {
        "loss": report.loss.item(),
        "elbo": report.sample_elbo_BK.nanmean().item(),  # NaN where a sample was dropped, unscored
        "grad_norm": norm,
        "lr": lr,
        "tokens_scored": ids.numel() * config.samples * passes,
    }
    if config.algorithm == "dmpo":
        figures["ess"] = effective_sample_size(batches[0].per_sequence["weights"], group_ids).mean().item()
    return figures


def _guard_rollouts(sampled: Rollout, rewards: Tensor, group: int, *, vocabulary: int) -> None:
    completion = sampled.completion_BL
    if not bool(torch.isfinite(rewards).all()):
        raise GuardError(f"a reward is {float(rewards[~torch.isfinite(rewards)][0])}; rewards must be finite")
    if int(completion.min()) < 0 or int(completion.max()) >= vocabulary:
        raise GuardError(f"rollouts must hold ids in 0..{vocabulary - 1}, got {int(completion.min())}..{int(completion.max())}")
    if bool((completion == completion[:, :1]).all()):
        raise GuardError("every rollout repeats a single token: the policy has collapsed; a lower rl.lr usually helps")
    groups = completion.view(-1, group, completion.shape[1])
    # A policy that is sure of itself repeats itself; noise that is broken repeats what is improbable to be drawn twice.
    repeats_logp = float(sampled.commit_logp_BL.sum(-1).view(-1, group)[:, 1:].sum())
    if bool((groups == groups[:, :1]).all()) and repeats_logp < IMPOSSIBLE_LOGP:
        raise GuardError(
            f"every group consists of identical rollouts, though the policy gives that a log-probability of {repeats_logp:.0f}: "
            "the members of a group share their noise, or the sampler ignores its temperature"
        )
