"""Supervised fine-tuning: the masked-diffusion loss on the demonstrations' answers."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from dllm_kernels import elbo_loss, headless, make_mask_plan, noise
from trainer.config import SftConfig
from trainer.sudoku import Puzzles
from trainer.tokenizer import Codec
from trainer.training import batch_indices, guarded_step, learning_rate


def sft_steps(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    data: Puzzles,
    codec: Codec,
    config: SftConfig,
    *,
    seed: int,
    start: int = 0,
) -> Iterator[dict[str, float]]:
    """Steps `start`..`config.steps - 1`, each yielding its figures; data, masks and order are functions of (seed, step)."""
    prompt_ids, answer_ids = codec.prompt_ids(data.puzzles), codec.answer_ids(data.answers)
    ids = torch.cat([prompt_ids, answer_ids], dim=1)
    completion = torch.arange(ids.shape[1]) >= prompt_ids.shape[1]
    for step in range(start, config.steps):
        started = time.perf_counter()
        chosen, epoch = batch_indices("sft", seed, len(data), config.batch, step)
        plan = make_mask_plan(
            ids[chosen],
            completion.expand(len(chosen), -1),
            law=config.law,
            samples=1,
            seed=seed,
            sequence_ids=noise.sequence_ids([f"sft/{index}" for index in chosen.tolist()], epoch=epoch),
            mask_id=codec.mask_id,
            **config.law_options(),
        )
        with headless(model) as body:
            hidden = body(plan.noisy_ids[0])
            p_mask, lengths = plan.p_mask_KB[0][:, None], plan.lengths_B
            loss = elbo_loss(hidden, body.weight, plan.input_ids_BS, plan.masked[0], p_mask, lengths=lengths, **body.options)
            loss.backward()
        lr = learning_rate(config, step, config.steps)
        norm = guarded_step(model, optimizer, loss, config, lr)
        yield {
            "loss": loss.item(),
            "elbo": -loss.item() * answer_ids.shape[1],
            "grad_norm": norm,
            "lr": lr,
            "tokens": plan.input_ids_BS.numel(),
            "seconds": time.perf_counter() - started,
        }
