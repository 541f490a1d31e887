"""Supervised fine-tuning in transformers' `Trainer`: the ELBO loss without logits, an evaluation with fixed masks.

    python examples/sft_with_transformers.py --steps 40

A random EuroBERT learns to repeat four digits. The same script runs under `torchrun --nproc-per-node 2`, with the same
steps. Your model, tokenizer and data go where `make_model` and `make_data` are.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from torch import Tensor
from transformers import EuroBertConfig, EuroBertForMaskedLM

from dllm_kernels.integrations.transformers import IGNORED, DiffusionCollator, DiffusionSFTConfig, DiffusionSFTTrainer

VOCABULARY, MASK, PAD = 12, 11, 10


def make_model() -> EuroBertForMaskedLM:
    torch.manual_seed(0)
    config = EuroBertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=None,
        mask_token_id=MASK,
    )
    return EuroBertForMaskedLM(config)


def make_data(count: int, seed: int) -> list[dict[str, Tensor]]:
    """Digits and the same digits again: the first are shown, the others are learnt."""
    digits = torch.randint(10, (count, 4), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row.repeat(2), "labels": torch.cat([torch.full((4,), IGNORED), row])} for row in digits]


def train(steps: int, folder: str) -> tuple[float, float]:
    """The loss on unseen digits before and after, in nats per token."""
    arguments = DiffusionSFTConfig(
        folder,
        max_steps=steps,
        per_device_train_batch_size=32,
        learning_rate=5e-3,
        law="exact",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = DiffusionSFTTrainer(
        make_model(),
        arguments,
        train_dataset=make_data(256, seed=0),
        eval_dataset=make_data(64, seed=1),
        data_collator=DiffusionCollator(PAD),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    return before, trainer.evaluate()["eval_loss"]


if __name__ == "__main__":
    torch.set_num_threads(1)  # at these sizes a second thread only waits
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    with tempfile.TemporaryDirectory() as folder:
        losses = train(parser.parse_args().steps, folder)
    print(f"loss before {losses[0]:.3f} after {losses[1]:.3f}")
