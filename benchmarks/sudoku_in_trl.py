"""The demo's reinforcement learning in TRL's trainer: the demo's data, reward, rollouts, algorithm and settings.

    dllm-kernels demo seed=1 --out runs/demo1
    python benchmarks/sudoku_in_trl.py train --checkpoint runs/demo1/checkpoint_sft --seed 1 --out runs/trl1
    dllm-kernels eval --config demo --checkpoint runs/trl1 seed=1 > runs/trl1/eval.json
    python benchmarks/sudoku_in_trl.py collect runs/demo1:runs/trl1 --out benchmarks/results/sudoku-in-trl.json

Both start from the demo's `checkpoint_sft` and are judged on the same test sets with the same noise. Rollouts, masks and the
order of the puzzles have noise of their own. Under `torchrun --nproc-per-node 2` with `--completions 64` it takes the same
steps.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    import checkout  # noqa: F401

import torch

from benchmarks.report import markdown


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


def collect(pairs: list[str]) -> dict[str, Any]:
    """What runs of the demo and of TRL, `DEMO:TRL`, found on the same puzzles."""
    from dllm_trainer.train.evaluation import paired_gain

    runs = []
    for demo, trl in (pair.split(":") for pair in pairs):
        before, ours = (json.loads(Path(demo, f"eval_{when}.json").read_text()) for when in ("before", "after"))
        found = json.loads(Path(trl, "eval.json").read_text())
        if len({side["seed"] for side in (before, ours, found)}) != 1:
            raise ValueError(f"{demo} and {trl} must have one seed")
        sets = {}
        for name, ways in found["sets"].items():
            sft, rl, in_trl = (side["sets"][name]["rollout"] for side in (before, ours, found))
            sets[name] = {
                "puzzles": in_trl["examples"],
                "sft": sft["correct"],
                "ours": rl["correct"],
                "trl": in_trl["correct"],
                "trl_over_sft": paired_gain(sft, in_trl),
                "trl_over_ours": paired_gain(rl, in_trl),
                "decoding": ways["rollout"]["decoding"],
            }
        rewards = json.loads(Path(trl, "rewards.json").read_text())
        runs.append({"seed": found["seed"], "sets": sets, "rewards": rewards, "environment": found["environment"]})
    return {"runs": runs}


def table(result: Mapping[str, Any]) -> str:
    """Per test set and seed the share of solved puzzles after fine-tuning, after the demo's RL, and after TRL's."""
    lines = []
    for name, told in (("unseen_puzzles", "unseen puzzles"), ("unseen_grids", "unseen solution grids")):
        for run in result["runs"]:
            found = run["sets"][name]
            shares = [f"{100 * found[side]:.1f} %" for side in ("sft", "ours", "trl")]
            spans = [
                f"{100 * gain['gain']:+.1f} [{100 * gain['low']:+.1f}, {100 * gain['high']:+.1f}]"
                for gain in (found["trl_over_sft"], found["trl_over_ours"])
            ]
            lines.append([told, str(run["seed"]), *shares, *spans])
    head = ["test set", "seed", "SFT", "`dllm-kernels rl`", "in TRL", "in TRL over SFT [95 %]", "over `dllm-kernels rl`"]
    return markdown(head, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="reinforcement learning in TRL, from a demo's checkpoint_sft")
    training.add_argument("--checkpoint", required=True)
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--updates", type=int, default=60)
    training.add_argument("--completions", type=int, default=128, help="per process and step")
    training.add_argument("--out", type=Path, required=True)
    collecting = commands.add_parser("collect", help="make the result file of finished runs")
    collecting.add_argument("pairs", nargs="+", metavar="DEMO:TRL")
    collecting.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    if given.command == "collect":
        given.out.write_text(json.dumps(collect(given.pairs), indent=1) + "\n")
        return
    torch.set_num_threads(1)  # at these sizes a second thread only waits
    rewards = train(given.checkpoint, given.seed, given.updates, given.completions, given.out)
    (given.out / "rewards.json").write_text(json.dumps(rewards))
    for step, mean in enumerate(rewards):
        print(f"update {step:3d}  reward {mean:.3f}")


if __name__ == "__main__":
    main()
