"""The demo's reinforcement learning in TRL's trainer: the demo's data, reward, rollouts, algorithm and settings.

    dllm-kernels demo seed=1 --out runs/demo
    python benchmarks/sudoku_in_trl.py --checkpoint runs/demo/checkpoint_sft --seed 1 --out runs/trl
    dllm-kernels eval --config demo --checkpoint runs/trl seed=1

Prints the mean reward of every update. The demo's own gain is in its report; both started from `checkpoint_sft`, and are
judged on the same test sets with the same noise. Under `torchrun --nproc-per-node 2` with `--completions 64` it takes the
same steps.
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


def train(checkpoint: str, seed: int, updates: int, completions: int, out: Path) -> list[float]:
    from datasets import Dataset
    from dllm_trainer.tasks.config import SudokuConfig
    from dllm_trainer.tasks.sudoku import make
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    from dllm_kernels.integrations.trl import DiffusionGRPOConfig, DiffusionGRPOTrainer

    task = make(SudokuConfig(), seed=seed)
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
        lr_scheduler_type="cosine_warmup_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        adam_beta2=0.95,
        max_grad_norm=16.0,
        seed=seed,
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
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--completions", type=int, default=128, help="per process and step")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    for step, mean in enumerate(train(given.checkpoint, given.seed, given.updates, given.completions, given.out)):
        print(f"update {step:3d}  reward {mean:.3f}")
