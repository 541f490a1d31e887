"""Updates on pairs of a chosen and a rejected answer."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from dllm_trainer.config import load_config
from dllm_trainer.distributed import Ranks
from dllm_trainer.tasks import make_task
from dllm_trainer.train.optimization import make_optimizer
from dllm_trainer.train.preferences import pair_updates
from dllm_trainer.train.run import prepare

from dllm_kernels import estimate_elbo
from tests.tiny import checkpoint


def test_what_was_chosen_becomes_likelier_beside_what_was_rejected(tmp_path: Path) -> None:
    prompts, file = ("01=", "12=", "23=", "34="), tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps({"prompt": p, "chosen": "111", "rejected": "222"}) + "\n" for p in prompts))
    keys = ["task.kind=pairs", f"task.train={file}", "task.style=characters", "task.completion_length=4"]
    keys += [f"model.checkpoint={checkpoint(tmp_path / 'm', alphabet='01234=')}", "sft.steps=0", "rl.algorithm=vrpo"]
    keys += ["rl.reward=exact_match", "rl.updates=4", "rl.prompts=4", "rl.samples=2", "rl.lr=2e-3", "rl.warmup=0"]
    keys += ["rollout.block_length=4", "rollout.steps=4", f"out={tmp_path}", "threads=1"]
    config = load_config(overrides=keys)
    setup = prepare(config, make_task(config.task, seed=0), Ranks())
    setup.reference = copy.deepcopy(setup.model).requires_grad_(False)
    records = list(pair_updates(setup, make_optimizer(setup.trained, setup.config.rl)))
    assert records[0]["loss"] == pytest.approx(math.log(2)), "the policy is still the reference"
    assert records[0]["tokens"] == 8 * (3 + 4) * 2 * (1 + 2), "of two answers and two samples, in the reference's pass and ours"
    encode = setup.codec.prompts(setup.task.train[:4])
    ids = torch.tensor([[*prompt.tolist(), *[answer] * 3] for answer in (1, 2) for prompt in encode])
    masks = {"samples": 16, "sequence_ids": torch.arange(8), "mask_id": setup.facts.mask_id}
    margins = []
    for model in (setup.reference, setup.model):
        elbo = estimate_elbo(model, ids, torch.arange(6).expand(8, 6) >= 3, **masks).elbo_B
        margins.append(elbo[:4] - elbo[4:])
    assert bool((margins[1] > margins[0] + 0.1).all()), margins
