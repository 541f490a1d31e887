"""Run by the tests, once per rank: a trainer of theirs in as many processes as there are.

python -m tests.integrations.ranks KIND OUT OPTIONS, with the environment of torchrun: rank 0 saves the parameters after
training, once all ranks have been seen to hold the same.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

torch.set_num_threads(1)


def sft(world: int, out: Path, options: dict) -> torch.nn.Module:
    from tests.integrations.test_transformers import OnLogits, make

    if options.pop("plain", False):
        options["trainer"] = OnLogits
    trainer = make(out, per_device_train_batch_size=4 // world, gradient_accumulation_steps=2, **options)
    trainer.train()
    trainer.evaluation = trainer.evaluate()["eval_loss"]
    return trainer


def grpo(world: int, out: Path, options: dict) -> torch.nn.Module:
    from tests.integrations.test_trl import make

    trainer = make(out.parent / "model", out, per_device_train_batch_size=16 // world, **options)
    trainer.train()
    trainer.evaluation = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    return trainer


def main(kind: str, out: Path, options: dict) -> None:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    trainer = {"sft": sft, "grpo": grpo}[kind](world, out, options)
    flat = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    if world > 1:
        everyone = [torch.empty_like(flat) for _ in range(world)]
        dist.all_gather(everyone, flat)
        assert all(torch.equal(flat, other) for other in everyone), "ranks drifted apart"
        assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
    if trainer.args.process_index == 0:
        torch.save((flat, trainer.evaluation), out / "found")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]))
