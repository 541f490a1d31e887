"""SFT and RL of a block-causal model: blocks come from the model's facts, in every phase and algorithm."""

import copy
import json
import math
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from dllm_trainer.commands.memory_plan import describe_plan
from dllm_trainer.distributed import Ranks
from dllm_trainer.errors import ConfigError, Stopped, UserError
from dllm_trainer.models.self_tests import check_positions
from dllm_trainer.models.tokenizer import make_tokenizer
from dllm_trainer.tasks import make_task
from dllm_trainer.train import rl
from dllm_trainer.train.guards import on_policy_gap
from dllm_trainer.train.optimization import make_optimizer
from dllm_trainer.train.rl import prepare_rl, rl_updates
from dllm_trainer.train.run import prepare
from dllm_trainer.train.setup import Setup
from dllm_trainer.train.sft import sft_steps
from safetensors.torch import load_file

from dllm_kernels import MaskPlan, Rollout, accumulate, generate, trajectory_rows
from dllm_kernels.objectives import RECIPES
from tests.tiny import checkpoint
from tests.trainer.conftest import TINY, lines, new_run, resumed, rollouts_through, tiny_config
from tests.trainer.train.test_processes import assert_same_metrics, torchrun
from tests.trainer.train.test_run import stop_after

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
        if RECIPES[config.rl.algorithm].teacher:  # who is the student has nothing to teach
            setup.reference.get_output_embeddings().weight.mul_(1.5)
    return setup


def test_supervised_steps_score_by_blocks(model_folder: Path) -> None:
    setup = setup_of(model_folder)
    assert setup.model.causal_block == 4
    records = list(sft_steps(setup, make_optimizer(setup.trained, setup.config.sft)))
    assert all(record["elbo"] < 0 and record["grad_norm"] > 0 for record in records)
    assert records[0]["tokens"] == setup.config.sft.batch * (33 + 17), "a clean copy and a noisy one from the block of the 17th"


OPTIONS = {
    "trace_rl": ["rl.options.mode=sdar", "rl.options.shrink=1"],
    "coupled_grpo": ["rl.samples=3"],
    "gdpo": ["rl.samples=3"],
}


@pytest.mark.parametrize("algorithm", [name for name, recipe in RECIPES.items() if recipe.law != "block" and recipe.blocks])
def test_a_block_causal_model_is_trained_by_blocks(model_folder: Path, algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old form raises an error in the library, so a run that ends has scored by blocks throughout. Lengths and
    denominators leave out what a rollout generates beyond the completion, to the end of its last block.
    """
    rollouts: list[Rollout] = []
    learnt: list[tuple[MaskPlan, dict[str, Any]]] = []

    def seen(sampled: Rollout) -> Rollout:
        rollouts.append(sampled)
        return sampled

    def told(model: Any, plan: MaskPlan, *args: Any, **kwargs: Any) -> Any:
        learnt.append((plan, kwargs))
        return accumulate(model, plan, *args, **kwargs)

    rollouts_through(monkeypatch, seen)
    monkeypatch.setattr(rl, "accumulate", told)
    keys = [f"rl.algorithm={algorithm}", "rl.gap_every=1", *OPTIONS.get(algorithm, [])]
    setup = setup_of(model_folder, *keys)
    records = list(rl_updates(setup, make_optimizer(setup.trained, setup.config.rl)))
    assert len(records) == len(learnt) == 2
    for record, rollout, (plan, kwargs) in zip(records, rollouts, learnt, strict=True):
        assert all(math.isfinite(value) for value in record.values())
        assert record["on_policy_gap"] < 1e-4
        assert record["grad_norm"] > 0
        assert plan.causal_block == 4
        assert rollout.ids_BS.shape[1] == 36
        assert not plan.scored[:, :, 33:].any()
        want = lengths_by_hand(rollout, setup.facts.eos_id if RECIPES[algorithm].window == "eos" else None)
        index = [rollout.sequence_ids_B.tolist().index(i) for i in plan.sequence_ids_B.tolist()]
        assert plan.lengths_B.tolist() == [want[i] for i in index]
        kinds = {
            "tokens": sum(want),
            "sequences": len(plan.lengths_B) if algorithm == "justgrpo" else 16,
            "groups": 4,
            "pairs": record["groups_with_signal"],
            "steps": 8 * len(index) if algorithm.startswith("egspo") else steps_by_hand(rollout, index, want),
        }
        assert kwargs["denominator"] == kinds[RECIPES[algorithm].make().denominator]


def lengths_by_hand(rollout: Rollout, eos: int | None) -> list[int]:
    """Of the completions, up to and with their first EOS."""
    texts = [row[where].tolist() for row, where in zip(rollout.ids_BS, rollout.completion_mask_BS, strict=True)]
    return [text.index(eos) + 1 if eos in text else len(text) for text in texts]


def steps_by_hand(rollout: Rollout, index: list[int], lengths: list[int]) -> int:
    """Pairs (sequence, step) in which a token that counts was decided."""
    return sum(len(set(rollout.commit_step_BL[i, : lengths[i]].tolist())) for i in index)


def test_the_plan_of_a_run_counts_a_clean_copy_and_k_noisy_ones(model_folder: Path) -> None:
    for algorithm, k, want in (("bgpo", 1, 33 + 17), ("bgpo", 3, 33 + 3 * 17), ("trace_rl", 9, 33 + 4 * 17)):
        options = ["rl.options.shrink=1"] if algorithm == "trace_rl" else []
        keys = [*FACTS, f"model.checkpoint={json.dumps(str(model_folder))}", f"rl.algorithm={algorithm}", *options]
        text = describe_plan(tiny_config(model_folder / "run", *keys, f"rl.samples_per_pass={k}"))
        found = {line[:22].strip(): line[22:].split()[:2] for line in text.splitlines()}
        assert found["sft"] == ["16", "50"]
        assert found["rl gradient"] == ["16", str(want)]
        assert found["rl rollout"] == ["16", "33"]


def test_a_model_that_takes_no_mask_is_refused_before_anything_is_trained(model_folder: Path) -> None:
    setup = setup_of(model_folder)
    setup.loaded = replace(setup.loaded, facts=replace(setup.facts, attention_mask="none"))
    for training in (prepare_rl, lambda setup: next(sft_steps(setup, make_optimizer(setup.trained, setup.config.sft)))):
        with pytest.raises(UserError, match=r"EuroBertForMaskedLM takes no attention mask .* under one of four dimensions"):
            training(setup)


def test_a_law_that_needs_noisy_history_is_refused_before_anything_is_trained(model_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"rl\.law must be another than block for a block-causal model, got that of spg: it"):
        prepare_rl(setup_of(model_folder, "rl.algorithm=spg"))
    for name in ("mdpo", "rldf"):
        with pytest.raises(ConfigError, match=rf"rl\.algorithm must be one that trains block-causal models, got {name}: it"):
            prepare_rl(setup_of(model_folder, f"rl.algorithm={name}"))


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


@pytest.fixture(scope="module")
def cached_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal language model made block-causal by its mask, which keeps keys and values: EuroBERT does not."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder, tokenizer = tmp_path_factory.mktemp("cached") / "m", make_tokenizer("01234=")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 16, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False, "bos_token_id": None}
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "eos_token_id")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), **sizes, **heads, **ids)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


CACHED = {
    "sdar": [],
    "shift": ["model.facts.shift=1"],
    "adapters": ["model.lora.rank=2", "model.gradient_checkpointing=true"],
    "editing": [
        "rollout.sampler=llada2",
        "rollout.steps=null",
        "rollout.threshold=0.2",
        "rollout.editing_threshold=0.15",
        "rl.options.shrink=1",
    ],
}


@pytest.mark.parametrize("kind", CACHED)
def test_cached_rollouts_train_with_shift_adapters_and_editing(cached_folder: Path, kind: str) -> None:
    keys = ["rl.algorithm=trace_rl", "rollout.cache=true", "rl.gap_every=1", "rl.updates=1", "rl.samples_per_pass=4"]
    setup = setup_of(cached_folder, *keys, *CACHED[kind])
    (record,) = rl_updates(setup, make_optimizer(setup.trained, setup.config.rl))
    assert record["on_policy_gap"] < 1e-4
    assert record["grad_norm"] > 0
    (step,) = islice(sft_steps(setup, make_optimizer(setup.trained, setup.config.sft)), 1)
    assert step["grad_norm"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["trace_rl", "ebpo"])
def test_a_run_of_blocks_that_is_stopped_and_resumed_has_the_same_bits(
    cached_folder: Path, tmp_path: Path, algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [*FACTS, f"model.checkpoint={json.dumps(str(cached_folder))}", f"rl.algorithm={algorithm}", "rollout.cache=true"]
    keys += ["rl.inner_iterations=2", "rl.samples_per_pass=2", "rl.updates=3"]
    new_run(tmp_path / "whole", *keys).execute()
    for phase, step in (("sft", 2), ("rl", 1)):
        run = new_run(tmp_path / "parts", *keys) if phase == "sft" else resumed(tmp_path / "parts")
        stop_after(monkeypatch, run, phase, step)
        with pytest.raises(Stopped):
            run.execute()
    resumed(tmp_path / "parts").execute()
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    weights = [load_file(tmp_path / name / "checkpoint" / "model.safetensors") for name in ("whole", "parts")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("more", [[], ["model.lora.rank=2", "model.gradient_checkpointing=true"]], ids=["whole", "adapters"])
def test_two_processes_train_by_blocks_as_one_does(cached_folder: Path, tmp_path: Path, more: list[str]) -> None:
    """FSDP2: ranks whose copies differ in number and width call the model equally often."""
    keys = [*FACTS, f"model.checkpoint={json.dumps(str(cached_folder))}", "rl.algorithm=trace_rl", "rollout.cache=true"]
    keys += ["rl.inner_iterations=2", "rl.micro_batch=3", "sft.micro_batch=3", "rl.samples_per_pass=3", *more]
    new_run(tmp_path / "one", *keys).execute()
    done = torchrun(2, "demo", *TINY, *keys, "--out", tmp_path / "two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert_same_metrics(tmp_path / "two", tmp_path / "one")


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
    rotary.register_forward_pre_hook(lambda module, args, kwargs: (args[:1], kwargs | fixed), with_kwargs=True)
    with pytest.raises(UserError, match="EuroBertForMaskedLM ignores position_ids"):
        check_positions(loaded)
