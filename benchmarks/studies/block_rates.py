"""Which learning rate RL by blocks takes: what one update does to completions that it has not seen, and short runs.

    python -m benchmarks.studies.block_rates --out benchmarks/results/block-rates-cpu.json     8 minutes of one core

From one SFT of `benchmarks.studies.block_learning`, on a seed and on puzzles that no line of its table has. What is
already in the file is left alone, so that a sweep which was cut short goes on; the weights of the SFT lie beside it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from dllm_trainer.records.environment import environment
from dllm_trainer.tasks import Example, make_task
from dllm_trainer.train import rl
from dllm_trainer.train.optimization import make_optimizer
from dllm_trainer.train.setup import Setup
from torch import Tensor

from benchmarks.report import markdown
from benchmarks.studies.block_learning import (
    ALGORITHMS,
    BLOCK,
    BLOCKS,
    TINY,
    USUAL,
    Sizes,
    config_of,
    keys_of,
    paired,
    save_model,
    setup_of,
    solved,
    told,
    train_rl,
    train_sft,
)
from dllm_kernels import generate, make_mask_plan, noise
from dllm_kernels.accumulation.scores import score_samples

SEED, VALIDATION = 11, "unseen_grids"
LEARNING_RATES = (2.5e-5, 5.0e-5, 1.0e-4, 2.0e-4)
FIRST_UPDATES = (*((lr, 16) for lr in LEARNING_RATES), (5.0e-5, 64), (5.0e-5, 256))  # learning rate, prompts


def first_update(setup: Setup, weights: Mapping[str, Tensor], probes: Sequence[Example]) -> dict[str, float]:
    """What one update does to ELBOs of completions that it has not seen, in nats: the change of right ones and of wrong ones,
    of groups with both, and of each group the sum of advantage times change, which the objective raises.
    """
    group, config = setup.config.rl.group, setup.config
    setup.model.load_state_dict(weights)
    examples = [example for example in probes for _ in range(group)]
    ids = noise.sequence_ids([f"probe/{e.id}" for e in examples], members=list(range(group)) * len(probes))
    rollout = generate(setup.model, setup.codec.prompts(examples), sequence_ids=ids, seed=config.seed, **setup.generate_options())
    right = torch.tensor(setup.reward(examples, setup.codec.texts(rollout.completion_BL))).view(-1, group)
    both = right.std(1) > 0
    kept, right = rollout.kept(both.repeat_interleave(group).nonzero()[:, 0]), right[both]
    plan = make_mask_plan(
        kept.ids_BS, kept.completion_mask_BS, law="exact", samples=4, seed=config.seed, sequence_ids=kept.sequence_ids_B,
        mask_id=setup.facts.mask_id, causal_block=BLOCK, attention_mask_BS=kept.text_mask_BS,
    )  # fmt: skip
    before = score_samples(setup.model, plan, samples_per_pass=4).mean(1)
    for _ in rl.rl_updates(setup, make_optimizer(setup.trained, config.rl)):
        pass
    change = (score_samples(setup.model, plan, samples_per_pass=4).mean(1) - before).view(right.shape)
    raised = ((right - right.mean(1, keepdim=True)) * change).sum(1)
    return {
        "groups": len(right),
        "right": float(change[right > 0].mean()),
        "wrong": float(change[right == 0].mean()),
        "rms": float(change.square().mean().sqrt()),
        "raised": float(raised.mean()),
        "standard error": float(raised.std() / len(right) ** 0.5),
    }


def sweep(sizes: Sizes, out: Path) -> dict[str, Any]:
    """RL by blocks at each learning rate, from one SFT, written to `out` after each run; the weights of the SFT beside it."""
    torch.set_num_threads(1)
    weights = out.with_suffix(".pt")
    found: dict[str, Any] = (
        json.loads(out.read_text()) if out.exists() else {"seed": SEED, "rl": [], "environment": environment()}
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder, SEED)
        base = config_of(folder, SEED, sizes)
        task = make_task(base.task, seed=base.task_seed)
        if not weights.exists():
            setup = setup_of(base, task, BLOCKS)
            found["sft"] = train_sft(setup) | {"solved": solved(setup, VALIDATION)}
            torch.save(setup.model.state_dict(), weights)
            out.write_text(json.dumps(found, indent=1) + "\n")
        one = ["rl.updates=1", "rl.warmup=0", "rl.schedule=constant"]
        if "first updates" not in found:
            found["first updates"] = []
            for algorithm in ALGORITHMS:
                for lr, prompts in FIRST_UPDATES:
                    keys = [*keys_of(algorithm, lr, sizes), *one, f"rl.prompts={prompts if sizes is USUAL else 2}"]
                    setup = setup_of(config_of(folder, SEED, sizes, *keys), task, BLOCKS)
                    changes = first_update(setup, torch.load(weights, weights_only=True), task.train[-sizes.probes :])
                    found["first updates"].append({"algorithm": algorithm, "lr": lr, "prompts": prompts, **changes})
                    print(algorithm, lr, prompts, changes, flush=True)
            out.write_text(json.dumps(found, indent=1) + "\n")
        for algorithm in ALGORITHMS:
            for lr in LEARNING_RATES:
                if any((row["algorithm"], row["lr"]) == (algorithm, lr) for row in found["rl"]):
                    continue
                setup = setup_of(config_of(folder, SEED, sizes, *keys_of(algorithm, lr, sizes)), task, BLOCKS)
                setup.model.load_state_dict(torch.load(weights, weights_only=True))
                figures = train_rl(setup) | {"solved": solved(setup, VALIDATION)}
                found["rl"].append({"algorithm": algorithm, "lr": lr, **figures})
                out.write_text(json.dumps(found, indent=1) + "\n")
                print(algorithm, lr, told(figures), flush=True)
    return found


def table(result: Mapping[str, Any]) -> str:
    """One line per algorithm, learning rate and number of prompts: of one update, the change of ELBOs of unseen completions; of
    a run, points over the SFT, [95 % of the puzzles], where it has been run.
    """
    lines = []
    for row in result["first updates"]:
        runs = result["rl"] if row["prompts"] == 16 else []
        same = [run for run in runs if (run["algorithm"], run["lr"]) == (row["algorithm"], row["lr"])]
        cells = [
            row["algorithm"],
            f"{row['lr']:.1e}",
            str(row["prompts"]),
            f"{row['right']:+.3f}",
            f"{row['wrong']:+.3f}",
            f"{row['rms']:.2f}",
        ]
        cells.append(f"{row['raised']:+.2f} ± {row['standard error']:.2f}")
        for way in ("rollout", "greedy"):
            outcomes = [
                [torch.tensor([float(bit) for bit in run["solved"][way]["solved"]]) for run in runs]
                for runs in (same, [result["sft"]])
            ]
            cells.append(paired(*outcomes) if same else "")
        lines.append(cells)
    heads = ["", "learning rate", "prompts", "right ones", "wrong ones", "rms", "sum of advantage x change", "solved, over SFT"]
    return markdown([*heads, "greedy, over SFT"], lines, "---")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="every run, for a moment")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args(argv)
    sweep(TINY if arguments.tiny else USUAL, arguments.out)


if __name__ == "__main__":
    main()
