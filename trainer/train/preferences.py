"""Learning from preference pairs that are given: no rollouts, one update per batch of pairs."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from dllm_kernels import accumulate, make_mask_plan, noise
from dllm_kernels.masks import layout

from ..models.codec import joined
from ..tasks.pairs import split
from .algorithms import Scores, make_batches, step_figures
from .optimization import batch_indices, guarded_step, learning_rates
from .rl import prepare_rl
from .setup import Setup
from .window import window_of


def pair_updates(setup: Setup, optimizer: torch.optim.Optimizer, *, start: int = 0) -> Iterator[dict[str, float]]:
    """Updates `start`..`rl.updates - 1` of `rl.prompts` pairs each, yielding their figures; a pair stays on one rank."""
    config, ranks, facts = setup.config.rl, setup.ranks, setup.facts
    window = window_of(config, facts)
    algorithm, _ = prepare_rl(setup)
    rate = learning_rates("rl", config, config.updates)
    for update in range(start, config.updates):
        started = time.perf_counter()
        index, epoch = batch_indices("rl", setup.config.seed, len(setup.task.train), config.prompts, update)
        mine = ranks.share(config.prompts)
        pairs = [setup.task.train[i] for i in index[mine].tolist()]
        with ranks.together():
            chosen, rejected = split(pairs)
            both = [*chosen, *rejected]
            ids, completion, real = joined(setup.codec.prompts(both), setup.codec.answers(both), facts.pad_id or 0)
        members = [0] * len(pairs) + [1] * len(pairs)
        plan = make_mask_plan(
            ids,
            completion,
            law=config.law,
            samples=config.samples,
            seed=setup.config.seed,
            sequence_ids=noise.sequence_ids([f"rl/{e.id}" for e in both], epoch=epoch, members=members),
            mask_id=facts.mask_id,
            shift=facts.shift,
            attention_mask_BS=real,
            causal_block=facts.block_length,
            **window.plan_options,
            **config.law_options(),
        ).to(ranks.device)
        attention = window.attention(ids, completion, real)
        attention = None if attention is None else attention.to(ranks.device)
        setup.fit(plan, algorithm.objective, attention, off_policy=False)
        options = setup.scoring_options(attention, config, as_rolled_out=False)
        scores = Scores(setup.model, setup.reference, options)
        pair_ids = torch.arange(mine.start, mine.stop, device=ranks.device)
        entries = {"chosen": torch.tensor(members, device=ranks.device) == 0, "group_ids": torch.cat([pair_ids, pair_ids])}
        (batch,) = make_batches(algorithm.objective, [plan], entries, scores.old, scores.ref)
        lr = rate(update)
        denominator = float(config.prompts)
        report = accumulate(setup.model, plan, algorithm.objective, batch, denominator=denominator, group=ranks.group, **options)
        loss = ranks.total(float(report.loss))
        norm = guarded_step(setup.model, optimizer, loss, config, lr)
        setup.weights_changed()
        seconds = time.perf_counter() - started
        seen = layout.input_tokens(plan.shape, plan.completion_mask_BS, plan.block_BS, options["samples_per_pass"])
        tokens = ranks.total(float(seen * (report.passes + scores.passes)))
        yield {
            **step_figures(algorithm, report, plan, batch, ranks),
            "loss": loss,
            "grad_norm": norm,
            "lr": lr,
            "tokens": tokens,
            "seconds_rollout": 0.0,
            "seconds_gradient": seconds,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
        }
