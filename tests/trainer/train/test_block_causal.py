"""SFT and RL of a block-causal model: blocks come from the model's facts, in every phase and algorithm."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from dllm_trainer.distributed import Ranks
from dllm_trainer.errors import UserError
from dllm_trainer.models.self_tests import check_positions
from dllm_trainer.tasks import make_task
from dllm_trainer.train.guards import on_policy_gap
from dllm_trainer.train.optimization import make_optimizer
from dllm_trainer.train.rl import rl_updates
from dllm_trainer.train.run import prepare
from dllm_trainer.train.setup import Setup
from dllm_trainer.train.sft import sft_steps

from dllm_kernels import generate, trajectory_rows
from dllm_kernels.objectives import RECIPES
from tests.tiny import checkpoint
from tests.trainer.conftest import tiny_config

FACTS = [
    "model.facts.topology=block_causal",
    "model.facts.block_length=4",
    "model.facts.attention_mask=float",
    "rollout.sampler=sdar",
    "rollout.block_length=4",
    "rollout.steps=4",
    "sft.steps=3",
    "sft.save_every=10",
    "rl.updates=2",
    "rl.save_every=10",
    "evaluation.probe_every_sft=10",
    "evaluation.probe_every_rl=10",
]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("model") / "m", alphabet="01234=")


def setup_of(folder: Path, *more: str) -> Setup:
    config = tiny_config(folder / "run", *FACTS, f"model.checkpoint={json.dumps(str(folder))}", *more)
    setup = prepare(config, make_task(config.task, seed=config.seed), Ranks())
    if RECIPES[config.rl.algorithm].needs_reference:
        setup.reference = copy.deepcopy(setup.model).requires_grad_(False)
    return setup


@pytest.mark.parametrize("algorithm", ["bgpo", "trace_rl", "egspo_sa", "ebpo", "dmpo", "coupled_grpo"])
def test_a_block_causal_model_is_trained_by_blocks(model_folder: Path, algorithm: str) -> None:
    """The old form raises an error in the library, so a run that ends has scored by blocks throughout."""
    samples = ["rl.samples=3"] if algorithm == "coupled_grpo" else []
    setup = setup_of(model_folder, f"rl.algorithm={algorithm}", "rl.gap_every=1", *samples)
    assert setup.model.causal_block == 4
    records = list(sft_steps(setup, make_optimizer(setup.trained, setup.config.sft)))
    records += rl_updates(setup, make_optimizer(setup.trained, setup.config.rl))
    assert len(records) == 5
    assert all(math.isfinite(value) for record in records for value in record.values())
    assert all(record["on_policy_gap"] < 1e-4 for record in records[3:])
    assert records[0]["elbo"] < 0
    assert records[-1]["grad_norm"] > 0


def test_scores_are_those_of_the_rollout_and_of_no_other_state(model_folder: Path) -> None:
    setup = setup_of(model_folder)
    prompts = setup.codec.prompts([setup.task.train[i] for i in range(4)])
    rollout = generate(setup.model, prompts, sequence_ids=torch.arange(4), seed=1, **setup.generate_options())
    assert rollout.settings["causal_block"] == 4
    plan = trajectory_rows(rollout)
    assert plan.causal_block == 4
    assert plan.shape[0] <= 4 < int(rollout.steps_B.max())
    assert on_policy_gap(setup, rollout) < 1e-4


def test_samples_that_share_a_clean_copy_give_the_same_update_for_fewer_tokens(model_folder: Path) -> None:
    records = []
    for k in (1, 3):
        setup = setup_of(model_folder, "rl.updates=1", "rl.samples=3", f"rl.samples_per_pass={k}", "rl.reward=reference_cells")
        (record,) = rl_updates(setup, make_optimizer(setup.trained, setup.config.rl))
        records.append(record)
    one, three = records
    assert one["grad_norm"] > 0
    for name in ("grad_norm", "elbo"):
        assert three[name] == pytest.approx(one[name], rel=1e-4), name
    scored = one["sequences_scored"]
    # 17 + 16 tokens, and the rest of the last block, which rollouts keep
    assert one["tokens"] - three["tokens"] == scored * 2 * 36, "of three clean copies two are left out"


def test_a_sampler_of_other_blocks_is_refused(model_folder: Path) -> None:
    setup = setup_of(model_folder)
    with pytest.raises(ValueError, match="block_length must be the model's 4 for sampler='sdar', got 8"):
        generate(setup.model, torch.tensor([[1, 2]]), length=8, mask_id=9, sampler="sdar", steps=4, block_length=8)


def test_adapters_and_checkpointing_change_nothing_of_how_it_is_scored(model_folder: Path) -> None:
    """Attention in parts is recomputed in backward, and the reference is the model with its adapters off."""
    keys = ["rl.algorithm=trace_rl", "rl.gap_every=1", "model.lora.rank=2", "model.gradient_checkpointing=true"]
    setup = setup_of(model_folder, *keys)
    records = list(sft_steps(setup, make_optimizer(setup.trained, setup.config.sft)))
    records += rl_updates(setup, make_optimizer(setup.trained, setup.config.rl))
    assert all(record["on_policy_gap"] < 1e-4 for record in records[3:])
    assert all(record["grad_norm"] > 0 for record in records)


def test_a_model_that_ignores_positions_is_refused(model_folder: Path) -> None:
    loaded = setup_of(model_folder).loaded
    check_positions(loaded)
    rotary = loaded.model.model.rotary_emb
    fixed = {"position_ids": torch.arange(2)[None]}
    rotary.register_forward_pre_hook(lambda module, args, kwargs: (args, kwargs | fixed), with_kwargs=True)
    with pytest.raises(UserError, match="EuroBertForMaskedLM ignores position_ids"):
        check_positions(loaded)
