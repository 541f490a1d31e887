"""TRL's trainer with our rollouts and gradients: it learns, and what it does is what the library does in a loop of one's own."""

import pytest
import torch
from torch.testing import assert_close

from dllm_kernels import accumulate, generate, make_mask_plan
from dllm_kernels.masks.tails import eos_tail
from dllm_kernels.noise import sequence_ids
from dllm_kernels.objectives import BGPO, RECIPES, Batch
from tests.tiny import checkpoint

pytest.importorskip("trl", reason="TRL is not installed: pip install 'dllm-kernels[integrations]'")
pytestmark = pytest.mark.slow  # TRL and datasets take ten seconds to import

GROUP, LENGTH, PROMPTS = 4, 6, ["0=", "11=", "222=", "43="]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("trl") / "model", alphabet="01234=")


def even(prompts, completions, **columns):
    """The share of even digits."""
    return [sum(c in "024" for c in text) / LENGTH for text in completions]


def matches(prompts, completions, first, **columns):
    """Whether the first digit is the data's; no reward for prompts that start with 4."""
    return [None if p[0] == "4" else float(c[:1] == f) for p, c, f in zip(prompts, completions, first, strict=True)]


def make(folder, out, rewards=(even,), model=None, **options):
    from datasets import Dataset
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    from dllm_kernels.integrations.trl import DiffusionGRPOConfig, DiffusionGRPOTrainer

    settings = {
        "per_device_train_batch_size": 16,
        "num_generations": GROUP,
        "max_completion_length": LENGTH,
        "max_steps": 1,
        "learning_rate": 0.1,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "shuffle_dataset": False,
        "samples": 4,
        "rollout": {"steps": LENGTH, "block_length": LENGTH},
    }
    data = Dataset.from_dict({"prompt": PROMPTS, "first": [p[0] for p in PROMPTS]})
    return DiffusionGRPOTrainer(
        AutoModelForMaskedLM.from_pretrained(folder) if model is None else model,
        list(rewards),
        DiffusionGRPOConfig(str(out), **(settings | options)),
        train_dataset=data,
        eval_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(folder),
    )


def weights(trainer):
    trainer.train()
    return [p.detach().clone() for p in trainer.model.parameters()]


def test_a_step_is_that_of_the_library_in_a_loop_of_one_s_own(folder, tmp_path):
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    trainer = make(folder, tmp_path, rewards=(even, matches), reward_weights=[1.0, 0.5])
    found = weights(trainer)
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    mask = tokenizer.mask_token_id
    prompts = [p for p in PROMPTS for _ in range(GROUP)]
    ids_B = sequence_ids([f"train/0/{n // GROUP}" for n in range(16)], members=[n % GROUP for n in range(16)])
    rollout = generate(
        model.eval(),
        [torch.tensor(tokenizer(p)["input_ids"]) for p in prompts],
        length=LENGTH,
        steps=LENGTH,
        block_length=LENGTH,
        temperature=1.0,
        mask_id=mask,
        seed=trainer.args.seed,
        sequence_ids=ids_B,
    )
    end = tokenizer.eos_token_id
    texts = []
    for row in rollout.completion_BL.tolist():
        texts.append(tokenizer.decode(row[: row.index(end) + 1] if end in row else row, skip_special_tokens=True))
    first = [p[0] for p in prompts]
    sums = [e + 0.5 * (m or 0.0) for e, m in zip(even(prompts, texts), matches(prompts, texts, first), strict=True)]
    rewards = torch.tensor(sums).view(-1, GROUP)
    advantages = ((rewards - rewards.mean(-1, keepdim=True)) / (rewards.std(-1, keepdim=True) + 1e-4)).flatten()
    plan = make_mask_plan(
        rollout.ids_BS,
        rollout.completion_mask_BS,
        law="exact",
        samples=4,
        seed=trainer.args.seed,
        sequence_ids=ids_B,
        mask_id=mask,
        attention_mask_BS=rollout.attention_mask_BS,
        eos_id=end,  # what BGPO scores ends with the first EOS, and what the model sees of the rest is its recipe's
        tail=RECIPES["bgpo"].tail,
    )
    real = rollout.attention_mask_BS & ~eos_tail(rollout.ids_BS, rollout.completion_mask_BS, end)
    assert RECIPES["bgpo"].window == "eos"
    accumulate(
        model,
        plan,
        BGPO,
        Batch({"advantages": advantages}),
        denominator=16,
        suppress=(mask,),
        model_kwargs={"attention_mask": (real if RECIPES["bgpo"].tail == "removed" else rollout.attention_mask_BS).long()},
    )
    want = [p.detach() - 0.1 * p.grad for p in model.parameters()]
    assert_close(found, want, rtol=0, atol=1e-6)
    log = trainer.state.log_history[0]
    assert log["reward"] == pytest.approx(float(rewards.mean()), abs=1e-6)
    assert log["rewards/matches/mean"] == pytest.approx(
        sum(m for m in matches(prompts, texts, first) if m is not None) / 12, abs=1e-6
    )


def test_it_learns(folder, tmp_path):
    trainer = make(folder, tmp_path, max_steps=15, learning_rate=3e-3, optim="adamw_torch", max_grad_norm=1.0)
    trainer.train()
    rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    assert sum(rewards[-3:]) / 3 > rewards[0] + 0.2
    told = trainer.evaluate()
    assert told["eval_reward"] > rewards[0] + 0.2
    assert told["eval_completions/mean_length"] <= LENGTH


@pytest.mark.parametrize("algorithm", [name for name, recipe in RECIPES.items() if not recipe.greedy])
def test_every_kind_of_algorithm_takes_steps_off_policy_and_at_any_memory(algorithm, folder, tmp_path):
    options = {"algorithm": algorithm, "num_iterations": 2, "max_steps": 2, "learning_rate": 1e-2, "samples": None}
    whole = make(folder, tmp_path, **options, samples_per_pass=16)
    before = [p.detach().clone() for p in whole.model.parameters()]
    found = weights(whole)
    assert any(not torch.equal(one, other) for one, other in zip(before, found, strict=True)), "it moved"
    small = weights(make(folder, tmp_path, **options, samples_per_pass=1, sequences_per_pass=3))
    assert_close(found, small, rtol=0, atol=2e-5)


def test_a_resumed_run_goes_on_as_the_unbroken_one_and_no_two_batches_of_an_evaluation_share_their_noise(folder, tmp_path):
    options = {"num_iterations": 2, "max_steps": 4, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2}
    drawn = {}

    def spied(start=None):
        trainer = make(folder, tmp_path, **options, per_device_train_batch_size=8, per_device_eval_batch_size=4)
        original, drawn[start] = trainer._generate_single_turn, {}

        def generated(*arguments, **named):
            found = original(*arguments, **named)
            if trainer.model.training:
                drawn[start][trainer.state.global_step] = trainer._rollout.ids_BS
            else:
                evaluated.extend(trainer._rollout.sequence_ids_B.tolist())
            return found

        trainer._generate_single_turn = generated
        trainer.train(resume_from_checkpoint=None if start is None else str(tmp_path / f"checkpoint-{start}"))
        return trainer

    evaluated = []
    whole = spied()
    for start in (2, 1):
        again = spied(start)
        if start == 2:
            assert_close(list(again.model.parameters()), list(whole.model.parameters()), rtol=0, atol=0)
    assert [list(steps) for steps in drawn.values()] == [[0, 2], [2], [1, 2]], "the second step of a rollout draws it anew"
    whole.evaluate()
    assert len(evaluated) == len(set(evaluated)) == 16, "four batches"


def test_an_adapter_is_its_own_reference(folder, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForMaskedLM

    model = get_peft_model(AutoModelForMaskedLM.from_pretrained(folder), LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    trainer = make(folder, tmp_path, model=model, algorithm="diffu_grpo", max_steps=2, samples=1)
    trainer.train()
    assert trainer.reference is None
    moved = {name for name, p in model.named_parameters() if "lora_B" in name and bool(p.any())}
    assert moved
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)


def test_log_probs_of_trl_are_those_of_full_logits(folder, tmp_path):
    trainer = make(folder, tmp_path, temperature=0.7)
    ids = torch.tensor([[5, 5, 1, 3, 2, 0, 4], [1, 2, 3, 4, 0, 1, 2]])
    real = torch.tensor([[0, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1]])
    logps, entropies, nothing = trainer._get_per_token_logps_and_entropies(
        trainer.model, ids, real, 4, batch_size=1, compute_entropy=True
    )
    assert nothing is None
    seen = {}
    trainer.model.register_forward_pre_hook(lambda m, a, kw: seen.update(kw), with_kwargs=True)
    again, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, real, 4)
    assert_close(again, logps, rtol=0, atol=1e-5)
    noisy = seen["input_ids"]
    assert (noisy[:, -4:][real[:, -4:] == 1] == trainer.args.mask_id).all(), "d1's estimate: everything is hidden"
    logits = trainer.model(input_ids=noisy, attention_mask=real).logits / 0.7
    logp = logits.log_softmax(-1)
    want = logp.gather(-1, ids[..., None])[..., 0] * real
    assert_close(logps, want[:, -4:], rtol=0, atol=1e-5)
    assert_close(entropies, (-(logp.exp() * logp).sum(-1) * real)[:, -4:], rtol=0, atol=1e-5)


def test_a_loss_of_trl_s_own_learns_from_rollouts_of_ours(folder, tmp_path, monkeypatch):
    from datasets import Dataset
    from transformers import AutoModelForMaskedLM, AutoTokenizer, GenerationConfig
    from trl import GRPOTrainer

    from dllm_kernels.integrations.logps import DiffusionLogps
    from dllm_kernels.integrations.trl import DiffusionGRPOConfig

    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")

    class Trainer(DiffusionLogps, GRPOTrainer):
        """GRPO as TRL has it."""

    def rollouts(prompts, trainer):
        ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
        keys = sequence_ids([f"{trainer.state.global_step}/{n}" for n in range(len(ids))])
        options = {"length": LENGTH, "steps": LENGTH, "block_length": LENGTH, "temperature": 1.0}
        found = generate(
            trainer.model.eval(), [torch.tensor(row) for row in ids], mask_id=trainer.args.mask_id, sequence_ids=keys, **options
        )
        trainer.model.train()
        return {"prompt_ids": ids, "completion_ids": found.completion_BL.tolist(), "logprobs": found.commit_logp_BL.tolist()}

    model, tokenizer = AutoModelForMaskedLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model.generation_config = GenerationConfig()  # TRL writes into it
    args = DiffusionGRPOConfig(
        str(tmp_path),
        mask_id=tokenizer.mask_token_id,
        loss_type="grpo",
        per_device_train_batch_size=32,
        num_generations=8,
        max_completion_length=LENGTH,
        max_steps=12,
        learning_rate=5e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    data = Dataset.from_dict({"prompt": PROMPTS})
    trainer = Trainer(model, even, args, train_dataset=data, processing_class=tokenizer, rollout_func=rollouts)
    trainer.train()
    rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    assert sum(rewards[-3:]) / 3 > rewards[0] + 0.15
    assert all("entropy" in row for row in trainer.state.log_history[:-1])


def test_log_probs_of_d1_s_trainers_are_those_of_full_logits(folder):
    """A host as d1's: its `forward_process` hides the completion and, by a seed, some of the prompt."""
    from types import SimpleNamespace

    from transformers import AutoModelForMaskedLM

    from dllm_kernels.integrations.logps import DiffusionLogps

    class Host(DiffusionLogps):
        args = SimpleNamespace(mask_id=8, cfg_scale=0.0)
        hidden: list = []  # noqa: RUF012

        def forward_process(self, ids, prompt, mask_id, seed=None):
            share = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed))
            noisy = torch.where(prompt & (share >= 0.15), ids, mask_id)
            self.hidden.append(noisy)
            return noisy, None

    host, model = Host(), AutoModelForMaskedLM.from_pretrained(folder).eval()
    ids = torch.randint(6, (2, 3, 7), generator=torch.Generator().manual_seed(0))
    found = host._get_per_token_logps(model, ids, 4, [5, 6])
    logp = model(input_ids=torch.cat(host.hidden)).logits.log_softmax(-1)
    want = logp.gather(-1, ids.view(6, 7, 1)).view(2, 3, 7)[:, :, -4:]
    assert_close(found, want, rtol=0, atol=1e-5)
    gradients = [torch.autograd.grad(value.square().sum(), list(model.parameters())[2:4]) for value in (found, want)]
    assert_close(*gradients, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"^mask_seeds must hold one seed for each of 2 iterations, got 1"):
        host._get_per_token_logps(model, ids, 4, [5])


def test_a_block_causal_model_learns_from_the_states_of_its_blocks(folder, tmp_path):
    from tests.rollouts.test_layouts import causal

    cached = {"rollout": {"sampler": "sdar", "steps": 4, "block_length": 4, "cache": True}, "max_completion_length": 6}
    options = {"algorithm": "trace_rl", "algorithm_options": {"shrink": 1}, "samples": None, **cached}
    trainer = make(folder, tmp_path, model=causal("Qwen3", torch.float32), causal_block=4, **options)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    after = weights(trainer)
    assert any(not torch.equal(*pair) for pair in zip(before, after, strict=True))
    (plan, _), rollout = trainer._update[0], trainer._rollout
    assert plan.causal_block == 4
    assert plan.shape[0] == 4 < int(rollout.steps_B.max()), "a sample holds a state of each block"
    with pytest.raises(ValueError, match=r"^causal_block must be the block_length of rollouts with cache=True, .* None and 4"):
        make(folder, tmp_path, model=causal("Qwen3", torch.float32), **options)
    stated = causal("Qwen3", torch.float32)
    stated.causal_block = 8
    with pytest.raises(ValueError, match=r"^causal_block must be 8, the block length of the model, got 4"):
        make(folder, tmp_path, model=stated, causal_block=4, **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"gradient_accumulation_steps": 2}, r"^gradient_accumulation_steps and steps_per_generation must be 1, got 2"),
        ({"beta": 0.1}, r"^beta must be left at 0.0, got 0.1: algorithm_options has"),
        ({"epsilon": 0.1}, r"^epsilon must be left at 0.2, got 0.1: algorithm_options has"),
        ({"loss_type": "grpo"}, r"^loss_type must be left at 'dapo', got 'grpo': algorithm says"),
        ({"algorithm": "dmpo", "scale_rewards": "none"}, r"^scale_rewards must be left at 'group' for dmpo, .* got 'none'"),
        ({"algorithm": "grpo"}, r"^algorithm must be one of bgpo"),
        ({"algorithm": "egspo_sa"}, r"^algorithm must not score intermediate states by the reward"),
        ({"algorithm_options": {"epsilon": 1}}, r"^epsilon is unknown"),
        ({"mask_id": 99}, r"^mask_id must be in 0..9, got 99, of the arguments"),
    ],
)
def test_what_would_have_no_effect_is_refused(options, said, folder, tmp_path):
    with pytest.raises(ValueError, match=said):
        make(folder, tmp_path, **options)
