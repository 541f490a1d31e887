"""Reinforcement learning: groups of rollouts, a reward, an objective's exact gradient sample by sample.

Where an algorithm needs a reference policy, that is the model as it was when RL began: a frozen second copy of the weights under
full fine-tuning, the model with its adapters off under LoRA. Prompts, noise and masks are functions of (seed, update), and of no
rank: ranks take consecutive rollouts of the same global batch, and share rewards.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from dllm_kernels import Rollout, accumulate, make_mask_plan, noise
from dllm_kernels.masks import layout, steps
from dllm_kernels.masks.plan import MaskPlan
from dllm_kernels.objectives import RECIPES, Rewards, Signal, Update

from ..errors import ConfigError
from ..models.self_tests import check_layouts
from ..tasks import Example, Reward
from .algorithms import Algorithm, Scores, choose_algorithm, make_batches, step_figures
from .curriculum import Climb
from .engines import engine_of
from .forward_counts import Calls
from .guards import guard_failures, guard_groups, guard_rollouts
from .optimization import batch_indices, guarded_step, learning_rates
from .setup import Setup
from .window import Window, window_of

MOST_ROLLOUTS = 1_000_000  # of an update; more is a slip of the finger, and its lists alone fill the memory


def prepare_rl(setup: Setup) -> tuple[Algorithm, Reward]:
    """The algorithm and the reward of a run. Raises UserError for what the first update would refuse, hours earlier."""
    config, task = setup.config.rl, setup.task
    total = config.prompts * config.group
    if total < setup.ranks.size:
        raise ConfigError(f"rl.prompts x rl.group = {total} must be at least the number of ranks, {setup.ranks.size}")
    batch_indices("rl", setup.config.seed, len(task.train), config.prompts, 0)
    if total > MOST_ROLLOUTS:
        raise ConfigError(f"rl.prompts x rl.group must be at most {MOST_ROLLOUTS:,} rollouts, got {total:,}")
    learning_rates("rl", config, config.updates)
    window_of(config, setup.facts)
    check_layouts(setup.loaded)
    if config.law == "block" and setup.facts.block_length is not None:
        raise ConfigError(
            f"rl.law must be another than block for a block-causal model, got that of {config.algorithm}: it hides all later "
            "blocks and noises earlier ones, which such a model never sees"
        )
    if setup.facts.block_length is not None and not RECIPES[config.algorithm].blocks:
        raise ConfigError(
            f"rl.algorithm must be one that trains block-causal models, got {config.algorithm}: it scores other tokens of a "
            "rollout's states than those that were drawn there, which is published for models without blocks alone"
        )
    if setup.config.task.kind == "pairs":
        if not RECIPES[config.algorithm].pairs:
            those = " or ".join(name for name, recipe in RECIPES.items() if recipe.pairs)
            raise ConfigError(f"rl.algorithm must be {those} for a task of preference pairs, got {config.algorithm}")
        if config.prompts % setup.ranks.size:
            raise ConfigError(f"rl.prompts must be a multiple of the {setup.ranks.size} ranks, got {config.prompts}")
    algorithm = choose_algorithm(config, setup.length, max(1, setup.steps))
    return algorithm, setup.reward


def rl_updates(
    setup: Setup, optimizer: torch.optim.Optimizer, *, start: int = 0, rate: Callable[[int], float] | None = None
) -> Iterator[dict[str, float]]:
    """Updates `start`..`rl.updates - 1`, each yielding its figures, the same on all ranks.

    `rate`: the learning rate of an update in place of the config's schedule; the updates then have no end.
    """
    config, ranks, task = setup.config.rl, setup.ranks, setup.task
    algorithm, reward = prepare_rl(setup)
    window = window_of(config, setup.facts)
    total = config.prompts * config.group
    climb, engine = Climb(task, setup.curriculum), engine_of(setup)
    updates: Iterable[int] = itertools.count(start) if rate is not None else range(start, config.updates)
    rate = rate or learning_rates("rl", config, config.updates)
    calls = Calls(setup.model, *([] if setup.reference is None else [setup.reference]))
    for update in updates:
        calls.reset()
        started = time.perf_counter()
        chosen, epoch = batch_indices("rl", setup.config.seed, len(climb.examples), config.prompts, update)
        index = chosen.repeat_interleave(config.group)
        members = list(range(config.group)) * config.prompts
        mine = ranks.share(total)
        examples = [climb.examples[i] for i in index[mine].tolist()]
        sequence_ids = noise.sequence_ids([f"rl/{e.id}" for e in examples], epoch=epoch, members=members[mine])
        with calls:
            sampled = engine.generate(examples, sequence_ids, greedy=algorithm.recipe.greedy)
        with ranks.together():
            texts = setup.codec.texts(sampled.completion_BL)
            guard_failures(sampled, examples)
            rewards = torch.tensor(reward(examples, texts), dtype=torch.float32, device=ranks.device)
            guard_rollouts(setup, sampled, rewards)
        figures = _rollout_figures(setup, sampled, rewards, examples, texts, index.to(ranks.device))
        guard_groups(ranks.gather(sampled.completion_BL)[0], ranks.gather(sampled.commit_logp_BL)[0], config.group)
        due = bool(config.gap_every) and update % config.gap_every == 0
        sampled, told = engine.check(sampled, due=due, replayed=algorithm.recipe.needs_trajectory)
        figures |= told
        if not sampled.unscored:
            figures["rollout_logp"] = ranks.gather(sampled.commit_logp_BL.sum(-1, dtype=torch.float64).float())[0].mean().item()
        lengths_B = ranks.gather(window.lengths(sampled.ids_BS, sampled.completion_mask_BS))[0]
        everyone = algorithm.rewards(ranks.gather(rewards)[0], index.to(ranks.device), lengths_B)
        found = algorithm.signal(everyone)
        figures |= {"groups_with_signal": len(index[found.kept_N.cpu()].unique()), "sequences_scored": len(found.kept_N)}
        rolled_out = time.perf_counter()
        if len(found.kept_N):
            reward_of = partial(_rewards_of, setup, reward, examples)
            with calls:
                figures |= _learn(setup, optimizer, algorithm, window, sampled, mine, everyone, found, reward_of, rate(update))
            figures["tokens"] += figures.pop("tokens_scored")
        for name in ("forwards", "backwards", "flops"):  # the check of the gap is no training, and not among them
            figures[name] = ranks.total(getattr(calls, name))
        figures |= climb.made(figures["correct"])
        figures["seconds_rollout"] = rolled_out - started
        figures["seconds_gradient"] = time.perf_counter() - rolled_out
        figures["seconds"] = time.perf_counter() - started
        figures["tokens_per_second"] = figures["tokens"] / figures["seconds"]
        yield figures


def _learn(
    setup: Setup,
    optimizer: torch.optim.Optimizer,
    algorithm: Algorithm,
    window: Window,
    sampled: Rollout,
    mine: slice,
    rewards: Rewards,
    found: Signal,
    reward_of: Callable[[Tensor, Tensor], Tensor],
    lr: float,
) -> dict[str, float]:
    """The optimizer steps on one set of rollouts."""
    config, ranks, objective = setup.config.rl, setup.ranks, algorithm.objective
    entries, here_N = found.of(mine)
    kept, states = sampled.kept(here_N), algorithm.states(window.of_trajectory(sampled), here_N, setup.config.seed)

    def plan_of(iteration: int) -> MaskPlan:
        if states is not None:
            return states.plan if states.plan.prompt_noise == 0 else replace(states.plan, iteration=iteration)
        return make_mask_plan(
            sampled.ids_BS,
            sampled.completion_mask_BS,
            law=config.law,
            samples=config.samples,
            seed=setup.config.seed,
            sequence_ids=sampled.sequence_ids_B,
            mask_id=setup.facts.mask_id,
            shift=setup.facts.shift,
            attention_mask_BS=sampled.text_mask_BS,
            iteration=iteration,
            causal_block=setup.facts.block_length,
            **window.plan_options,
            **config.law_options(),
        ).cut(sequences=here_N)

    plans = [plan_of(iteration) for iteration in range(config.inner_iterations)]
    seen_BS = kept.text_mask_BS if states is None else kept.attention_mask_BS
    attention_BS = window.attention(kept.ids_BS, kept.completion_mask_BS, seen_BS)
    setup.fit(plans[0], objective, attention_BS, off_policy=len(plans) > 1)
    options = setup.scoring_options(attention_BS, config, as_rolled_out=states is not None)
    scores = Scores(setup.model, setup.reference, options)
    update = Update(
        rewards=rewards,
        kept_N=here_N + mine.start,
        states=states,
        old=scores.old,
        ref=scores.ref,
        fresh_plan=lambda: plan_of(len(plans)),
        reward=partial(reward_of, here_N),
        gather=ranks.gather,
    )
    entries |= algorithm.entries(update)
    # scored before the first step, under the policy that made the rollouts
    batches = make_batches(objective, plans, entries, scores.old, scores.ref, states=states, off_policy=len(plans) > 1)
    passes = scores.passes
    denominator = found.denominator
    if denominator is None:  # steps: what the plans of all ranks hold
        denominator = max(1.0, ranks.total(float(steps.number(plans[0]))))
    figures: dict[str, float] = {}
    for plan, batch in zip(plans, batches, strict=True):
        report = accumulate(setup.model, plan, objective, batch, denominator=denominator, group=ranks.group, **options)
        passes += report.passes
        loss = ranks.total(float(report.loss))
        norm = guarded_step(setup.model, optimizer, loss, config, lr)
        setup.weights_changed()
        figures |= step_figures(algorithm, report, plan, batch, ranks) | algorithm.figures(update, batch)
    known = plans[0].shape, plans[0].completion_mask_BS, plans[0].block_BS
    scored = layout.input_tokens(*known, options["samples_per_pass"]) * passes
    return {**figures, "loss": loss, "grad_norm": norm, "lr": lr, "tokens_scored": ranks.total(float(scored))}


def _rewards_of(setup: Setup, reward: Reward, examples: Sequence[Example], here_N: Tensor, completion_BJL: Tensor) -> Tensor:
    """`[B, J]` of J completions for each of the examples `here_N`."""
    B, J, _ = completion_BJL.shape
    texts = setup.codec.texts(completion_BJL.flatten(0, 1))
    values = reward([examples[i] for i in here_N.tolist() for _ in range(J)], texts)
    return torch.tensor(values, dtype=torch.float32, device=completion_BJL.device).view(B, J)


def _rollout_figures(
    setup: Setup, sampled: Rollout, rewards: Tensor, examples: Sequence[Example], texts: Sequence[str], index: Tensor
) -> dict[str, float]:
    """What a look at the rollouts of all ranks tells."""
    ranks, task, eos = setup.ranks, setup.task, setup.facts.eos_id
    everyone, _ = ranks.gather(rewards)
    columns: dict[str, Sequence[float]] = {"correct": task.correct(examples, texts)}
    columns |= {name: metric(examples, texts) for name, metric in task.metrics.items()}
    ended_BL = (
        (sampled.completion_BL == eos).cumsum(-1) > 0 if eos is not None else torch.zeros_like(sampled.completion_BL).bool()
    )
    columns["completion_length"] = (~ended_BL).sum(-1).tolist()
    spread = everyone.view(-1, setup.config.rl.group).std(-1, correction=0)
    figures = {
        "reward": everyone.mean().item(),
        "reward_std": everyone.std(correction=0).item(),
        "groups_without_signal": int((spread == 0).sum()),
        "tokens": ranks.total(sampled.ids_BS.shape[1] * float(sampled.steps_B.sum())),
    }
    for name, values in columns.items():
        figures[name] = ranks.gather(torch.tensor(values, dtype=torch.float32))[0].mean().item()
    return figures
