"""The demo's reinforcement learning in TRL's trainer: the same data, reward, rollouts and settings as `dllm-kernels rl`.

    dllm-kernels sft --config demo --out runs/sft
    python benchmarks/sudoku_in_trl.py --checkpoint runs/sft/checkpoint --updates 30 --out runs/trl
    dllm-kernels rl --config demo --checkpoint runs/sft/checkpoint rl.updates=30 rl.prompts=8 --out runs/ours
    dllm-kernels eval --checkpoint runs/trl
    dllm-kernels eval --checkpoint runs/ours/checkpoint

Prints the mean reward of every step. Under `torchrun --nproc-per-node 2` with `--completions 32` it takes the same steps.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch


def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """1 for a grid that satisfies the rules and keeps the given cells."""
    from dllm_trainer.tasks.sudoku import cells
    from dllm_trainer.tasks.sudoku_grids import REWARDS

    puzzles = torch.tensor([cells(prompt.removesuffix("=")) for prompt in prompts])
    filled = torch.tensor([cells(text) for text in completions])
    return REWARDS["valid"](puzzles, filled, puzzles).tolist()


def train(checkpoint: str, updates: int, completions: int, out: Path) -> list[float]:
    from datasets import Dataset
    from dllm_trainer.tasks.config import SudokuConfig
    from dllm_trainer.tasks.sudoku import make
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    from dllm_kernels.integrations.trl import DiffusionGRPOConfig, DiffusionGRPOTrainer

    task = make(SudokuConfig(train_puzzles=4000), seed=0)
    arguments = DiffusionGRPOConfig(
        str(out),
        algorithm="bgpo",
        samples=16,
        rollout={"steps": 16, "block_length": 16},
        max_completion_length=16,
        num_generations=8,
        per_device_train_batch_size=completions,
        max_steps=updates,
        learning_rate=5e-4,
        warmup_steps=10,
        lr_scheduler_type="linear",
        adam_beta2=0.95,
        max_grad_norm=16.0,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
    )
    trainer = DiffusionGRPOTrainer(
        AutoModelForMaskedLM.from_pretrained(checkpoint),
        [reward],
        arguments,
        processing_class=AutoTokenizer.from_pretrained(checkpoint),
        train_dataset=Dataset.from_dict({"prompt": [example.prompt for example in task.train]}),
    )
    trainer.train()
    trainer.save_model(str(out))
    return [row["reward"] for row in trainer.state.log_history if "reward" in row]


if __name__ == "__main__":
    torch.set_num_threads(1)  # at these sizes a second thread only waits
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--updates", type=int, default=30)
    parser.add_argument("--completions", type=int, default=64, help="per process and step")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    for step, mean in enumerate(train(given.checkpoint, given.updates, given.completions, given.out)):
        print(f"update {step:3d}  reward {mean:.3f}")
