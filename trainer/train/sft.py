"""Supervised fine-tuning with the ELBO: one mask per example and step, drawn anew every epoch."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from dllm_kernels import accumulate, elbo_loss, headless, make_mask_plan, noise
from dllm_kernels.accumulation.objective import NEGATIVE_ELBO, Batch
from dllm_kernels.masks import layout
from dllm_kernels.masks.plan import MaskPlan

from ..errors import ConfigError
from ..models.codec import joined
from ..models.self_tests import check_layouts
from .optimization import batch_indices, guarded_step, learning_rates
from .setup import Setup


def sft_steps(setup: Setup, optimizer: torch.optim.Optimizer, *, start: int = 0) -> Iterator[dict[str, float]]:
    """Steps `start`..`sft.steps - 1`, each yielding its figures; data, masks and order are functions of (seed, step)."""
    config, ranks, task, facts = setup.config.sft, setup.ranks, setup.task, setup.facts
    if config.batch % ranks.size:
        raise ConfigError(f"sft.batch must be a multiple of the {ranks.size} ranks, got {config.batch}")
    shown = task.demonstrations
    check_layouts(setup.loaded)
    pad_id = facts.pad_id if facts.pad_id is not None else facts.eos_id or 0
    rate = learning_rates("sft", config, config.steps)
    for step in range(start, config.steps):
        started = time.perf_counter()
        chosen, epoch = batch_indices("sft", setup.config.seed, len(shown), config.batch, step)
        examples = [shown[i] for i in chosen[ranks.share(config.batch)].tolist()]
        with ranks.together():
            ids, completion, real = joined(
                setup.codec.prompts(examples), setup.codec.answers(examples), pad_id, setup.codec.suffixes(examples)
            )
        plan = make_mask_plan(
            ids,
            completion,
            law=config.law,
            samples=1,
            seed=setup.config.seed,
            sequence_ids=noise.sequence_ids([f"sft/{e.id}" for e in examples], epoch=epoch),
            mask_id=facts.mask_id,
            shift=facts.shift,
            attention_mask_BS=real,
            causal_block=facts.block_length,
            **config.law_options(),
        ).to(ranks.device)
        value = _accumulate(setup, plan, None if real is None else real.to(ranks.device))
        value = ranks.total(value)
        lr = rate(step)
        norm = guarded_step(setup.model, optimizer, value, config, lr)
        setup.weights_changed()
        seconds = time.perf_counter() - started
        tokens = ranks.total(layout.input_tokens(plan.shape, plan.completion_mask_BS, plan.block_BS, 1))
        yield {
            "loss": value,
            "elbo": -value * setup.length,
            "grad_norm": norm,
            "lr": lr,
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
        }


def _accumulate(setup: Setup, plan: MaskPlan, real_BS: Tensor | None) -> float:
    """Add the gradient of this rank's examples to `.grad`; their part of the loss."""
    config, facts = setup.config.sft, setup.facts
    examples = len(plan.input_ids_BS)
    micro_batch = config.micro_batch or examples
    if facts.block_length is not None:
        report = accumulate(
            setup.model,
            plan,
            NEGATIVE_ELBO,
            Batch(),
            denominator=float(config.batch),
            sequences_per_pass=micro_batch,
            model_kwargs=setup.loaded.call_kwargs(real_BS),
        )
        return float(report.loss)
    value = 0.0
    with headless(setup.model) as body:
        for first in range(0, examples, micro_batch):
            span = slice(first, first + micro_batch)
            part = plan.cut(sequences=span)
            hidden = body(part.noisy_ids[0], **setup.loaded.call_kwargs(None if real_BS is None else real_BS[span]))
            p_mask, lengths = part.p_mask_KB[0][:, None], part.lengths_B
            options = {**body.options, "shift": facts.shift, "take_dweight": body.take_dweight}
            loss = elbo_loss(hidden, body.weight, part.input_ids_BS, part.masked[0], p_mask, lengths=lengths, **options)
            share = len(part.input_ids_BS) / config.batch
            (loss if share == 1 else loss * share).backward()
            value += float(loss.detach()) * share
    return value
