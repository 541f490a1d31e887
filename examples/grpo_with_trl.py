"""Reinforcement learning in TRL's `GRPOTrainer`: its data, rewards and arguments, any of our algorithms.

    python examples/grpo_with_trl.py --checkpoint runs/demo/checkpoint --algorithm bgpo --steps 12

The model learns to answer with even digits, by two weighted rewards. Under `torchrun --nproc-per-node 2` with half of
`--completions` it takes the same steps. Needs `pip install 'dllm-kernels[integrations]'`.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForMaskedLM, AutoTokenizer

from dllm_kernels.integrations.trl import DiffusionGRPOConfig, DiffusionGRPOTrainer

LENGTH = 8


def even(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """The share of even digits."""
    return [sum(character in "02468" for character in text) / LENGTH for text in completions]


def begins(prompts: list[str], completions: list[str], first: list[str], **columns: Any) -> list[float | None]:
    """Whether the first digit is that of the data's column; no reward where it names none."""
    return [None if not digit else float(text.startswith(digit)) for text, digit in zip(completions, first, strict=True)]


def train(checkpoint: str, algorithm: str, steps: int, completions: int, folder: str) -> list[float]:
    """The mean reward of every step."""
    arguments = DiffusionGRPOConfig(
        folder,
        algorithm=algorithm,
        rollout={"steps": LENGTH, "block_length": LENGTH},
        max_completion_length=LENGTH,
        num_generations=8,
        per_device_train_batch_size=completions,
        max_steps=steps,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        reward_weights=[1.0, 0.1],
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        bf16=False,
    )
    trainer = DiffusionGRPOTrainer(
        AutoModelForMaskedLM.from_pretrained(checkpoint),
        [even, begins],
        arguments,
        processing_class=AutoTokenizer.from_pretrained(checkpoint),
        train_dataset=Dataset.from_dict({"prompt": ["0=", "1=", "2=", "3="] * 8, "first": ["0", "", "2", ""] * 8}),
    )
    trainer.train()
    return [row["rewards/even/mean"] for row in trainer.state.log_history if "rewards/even/mean" in row]


if __name__ == "__main__":
    torch.set_num_threads(1)  # at these sizes a second thread only waits
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--algorithm", default="bgpo")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--completions", type=int, default=32, help="per process and step")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for step, mean in enumerate(train(given.checkpoint, given.algorithm, given.steps, given.completions, folder)):
            print(f"step {step:3d}  reward {mean:.3f}")
