"""`DiffusionSFTTrainer` is the Trainer with the usual loss on full logits, whatever the cut, the law and the schedule."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from dllm_kernels import accumulate
from dllm_kernels.accumulation.objective import NEGATIVE_ELBO, Batch
from dllm_kernels.accumulation.scores import score_samples
from tests.tiny import eurobert, gradients, worst_gradient_error

transformers = pytest.importorskip("transformers")

from dllm_kernels.integrations.transformers import (  # noqa: E402
    DiffusionCollator,
    DiffusionSFTConfig,
    DiffusionSFTTrainer,
    check_parallelism,
)

MASK, PAD = 10, 0


def examples(count=8, seed=0):
    """Prompts of 1 to 3 tokens, answers of 2 to 7."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for n in range(count):
        ids = torch.randint(3, 10, (3 + n % 4 + n // 4 + 2,), generator=generator)
        labels = ids.clone()
        labels[: 1 + n % 3] = -100
        made.append({"input_ids": ids, "labels": labels})
    return made


def cosine(t):
    """alpha(t) = 1 - cos(pi/2 (1 - t)): (1 - alpha, -alpha' / (1 - alpha))."""
    angle = math.pi / 2 * (1 - t)
    return torch.cos(angle), math.pi / 2 * torch.sin(angle) / torch.cos(angle)


def make(folder, *, trainer=DiffusionSFTTrainer, model=None, schedule=None, loss=None, **options):
    settings = {
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 0.1,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "mask_id": MASK,
    }
    args = DiffusionSFTConfig(str(folder), **(settings | options))
    model = eurobert() if model is None else model
    data = {"train_dataset": examples(), "eval_dataset": examples(7, seed=1)}
    return trainer(model, args, data_collator=DiffusionCollator(PAD), schedule=schedule, compute_loss_func=loss, **data)


class OnLogits(DiffusionSFTTrainer):
    """The same masks and the plain loss: all logits, cross-entropy, weights, one sequence after the other."""

    training_step = transformers.Trainer.training_step  # which keeps the model's head

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        samples, iteration = self.args.samples, self.state.global_step
        plan = self.plan(inputs, samples=samples, seed=self.args.seed, iteration=iteration)
        ids, shift, sums = inputs["input_ids"], self.args.shift, []
        lengths = (inputs["labels"] != -100).sum(-1)
        for k in range(samples):
            logits = model(input_ids=plan.noisy_ids[k], attention_mask=inputs["attention_mask"]).logits
            logits = torch.cat([logits[:, :1]] * shift + [logits[:, : logits.shape[1] - shift]], dim=1)
            ce = F.cross_entropy(logits.transpose(1, 2), ids, reduction="none")
            sums.append((ce * plan.scored[k]).sum(-1) * plan.weight_KB[k])
        total = sum(sums) / samples
        if self.args.reduction == "sequence":
            total = total / lengths
        return total.sum() / num_items_in_batch * self.accelerator.num_processes  # gradients are averaged


def parameters(trainer):
    trainer.train()
    return [p.detach().clone() for p in trainer.model.parameters()]


WAYS = {
    "token": {},
    "LLaDA's SFT, exact counts": {"reduction": "sequence", "law": "exact"},
    "LLaDA's pre-training": {"reduction": "position"},
    "pairs": {"reduction": "batch", "law": "antithetic", "samples": 2},
    "shift": {"shift": 1},
    "schedule": {"schedule": cosine, "law_options": {"t_min": 0.01}},
    "packed": {"packed": True, "samples": 2},
}


QUICK = ("token", "packed")


@pytest.mark.parametrize("way", [*QUICK, *(pytest.param(way, marks=pytest.mark.slow) for way in WAYS if way not in QUICK)])
def test_two_optimizer_steps_are_those_of_the_loss_on_full_logits(way, tmp_path):
    options = {"gradient_accumulation_steps": 2} | WAYS[way]
    ours = make(tmp_path, **options)
    found = parameters(ours)
    plain = make(tmp_path, trainer=OnLogits, **options)
    want = parameters(plain)
    assert_close(found, want, rtol=0, atol=2e-7)  # coefficients are fp32
    assert not torch.equal(found[0], next(eurobert().parameters())), "it moved"
    losses = [[row["loss"] for row in trainer.state.log_history if "loss" in row] for trainer in (ours, plain)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


@pytest.mark.parametrize("reduction", ["token", pytest.param("sequence", marks=pytest.mark.slow)])
def test_the_cut_of_an_optimizer_step_changes_nothing(reduction, tmp_path):
    whole = parameters(make(tmp_path, reduction=reduction, per_device_train_batch_size=8))
    for size, steps in ((4, 2), (1, 8)):
        cut = make(tmp_path, reduction=reduction, per_device_train_batch_size=size, gradient_accumulation_steps=steps)
        assert_close(parameters(cut), whole, rtol=0, atol=1e-6)


def test_the_evaluation_loss_is_a_number_of_the_weights_whatever_the_batch(tmp_path):
    trainer = make(tmp_path)
    first, again = (trainer.evaluate()["eval_loss"] for _ in range(2))
    assert first == again
    for size in (3, 7):
        assert make(tmp_path, per_device_eval_batch_size=size).evaluate()["eval_loss"] == pytest.approx(first, abs=1e-6)
    plan = trainer.plan(trainer.data_collator(trainer.eval_dataset), samples=4, seed=0)
    logits = trainer.model(
        input_ids=plan.noisy_ids.flatten(0, 1),
        attention_mask=trainer.data_collator(trainer.eval_dataset)["attention_mask"].repeat(4, 1),
    ).logits.view(*plan.shape, -1)
    logp = logits.log_softmax(-1).gather(-1, plan.input_ids_BS.expand(plan.shape)[..., None])[..., 0]
    want = -(logp.detach() * plan.scored).sum(-1).mul(plan.weight_KB).mean(0).sum() / plan.lengths_B.sum()
    assert first == pytest.approx(float(want), abs=1e-6)


@pytest.mark.parametrize("origin", ["sequence", "completion"])
def test_a_block_causal_model_has_the_loss_of_its_blocks(origin, tmp_path):
    blocks = {"causal_block": 2, "block_origin": origin, "samples": 2, "reduction": "sequence", "law": "exact"}
    trainer = make(tmp_path, **blocks)
    batch = trainer.data_collator(trainer.train_dataset[:4])
    trainer.compute_loss(trainer.model, batch).backward()
    found = gradients(trainer.model)
    trainer.model.zero_grad()
    plan = trainer.plan(batch, samples=2, seed=trainer.args.seed)
    assert plan.causal_block == 2
    mask = {"attention_mask": batch["attention_mask"]}
    accumulate(trainer.model, plan, NEGATIVE_ELBO, Batch(), denominator=4, model_kwargs=mask)
    assert worst_gradient_error(gradients(trainer.model), found) < 1e-6
    batch = trainer.data_collator(trainer.eval_dataset)
    plan = trainer.plan(batch, samples=4, seed=0)
    elbo = score_samples(trainer.model, plan, model_kwargs={"attention_mask": batch["attention_mask"]}).mean(-1)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(-float((elbo / plan.lengths_B).mean()), abs=1e-6)
    with pytest.raises(ValueError, match=r"^causal_block must be None where packed is given, got 2"):
        make(tmp_path, packed=True, **blocks)


def test_a_schedule_has_a_level_and_a_weight_for_each_block(tmp_path):
    """BD3-LM trains under other schedules than the linear one, whose plan is that of the law itself."""
    blocks = {"causal_block": 2, "samples": 2, "law_options": {"t_min": 0.01}}
    trainer = make(tmp_path, **blocks)
    batch = trainer.data_collator(trainer.train_dataset[:4])
    want = trainer.plan(batch, samples=2, seed=0)
    plan = make(tmp_path, schedule=lambda t: (t, 1 / t), **blocks).plan(batch, samples=2, seed=0)
    assert plan.law == "given"
    assert torch.equal(plan.masked, want.masked)
    assert_close(plan.rows.weight, want.rows.weight, rtol=1e-6, atol=0)
    curved = make(tmp_path, schedule=cosine, **blocks)
    plan = curved.plan(batch, samples=500, seed=0)
    drawn = trainer.plan(batch, samples=500, seed=0)
    _, weight_KU = cosine(drawn.level.t_KB)
    weight_KBS = drawn.units.at_tokens(weight_KU)
    assert_close(plan.dense(plan.rows.weight)[plan.scored], weight_KBS[plan.scored].float())
    assert float(plan.scored.sum() / plan.completion_mask_BS.sum() / 500) == pytest.approx(2 / math.pi, abs=0.02)
    curved.compute_loss(curved.model, batch).backward()
    found = gradients(curved.model)
    curved.model.zero_grad()
    mask = {"attention_mask": batch["attention_mask"]}
    plan, length = curved.plan(batch, samples=2, seed=curved.args.seed), float((batch["labels"] != -100).sum())
    elbo_loss = replace(NEGATIVE_ELBO, contributions=lambda logp, plan, batch: -plan.score(logp).sum())
    accumulate(curved.model, plan, elbo_loss, Batch(), denominator=length, model_kwargs=mask)
    assert worst_gradient_error(gradients(curved.model), found) < 1e-6


def test_masks_change_with_the_step_and_the_loss_falls(tmp_path):
    model = eurobert(dtype=torch.float32)
    trainer = make(tmp_path, model=model, max_steps=25, learning_rate=3e-3, optim="adamw_torch", per_device_train_batch_size=8)
    batch = trainer.data_collator(trainer.train_dataset)
    masks = [trainer.plan(batch, samples=1, seed=0, iteration=step).masked for step in range(2)]
    assert not torch.equal(*masks)
    before = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] < before - 0.5


def test_what_cannot_be_right_is_refused(tmp_path):
    trainer = make(tmp_path)
    batch = trainer.data_collator(examples(2))
    with pytest.raises(ValueError, match=r"^labels must be in every batch, got attention_mask, input_ids"):
        trainer.compute_loss(trainer.model, {n: v for n, v in batch.items() if n != "labels"})
    with pytest.raises(ValueError, match=r"^labels must be the input_ids, unshifted"):
        trainer.compute_loss(trainer.model, batch | {"labels": batch["labels"].roll(1, -1)})
    with pytest.raises(ValueError, match=r"^reduction must be one of 'token', 'sequence', 'batch', 'position', got 'mean'"):
        make(tmp_path, reduction="mean")
    with pytest.raises(ValueError, match=r"^law must be 'bernoulli' where a schedule is given, got 'exact'"):
        make(tmp_path, law="exact", schedule=cosine)
    with pytest.raises(ValueError, match=r"^law_options must have no weight where a schedule is given"):
        make(tmp_path, law_options={"weight": "L/count"}, schedule=cosine)
    with pytest.raises(ValueError, match=r"^label_smoothing_factor must be 0, got 0.1"):
        make(tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match=r"^average_tokens_across_devices must be True"):
        make(tmp_path, average_tokens_across_devices=False)
    with pytest.raises(ValueError, match=r"^compute_loss_func must be None"):
        make(tmp_path, loss=F.cross_entropy)
    with pytest.raises(ValueError, match=r"^mask_id must be in 0..10, got 128002, of the model's config"):
        make(tmp_path, mask_id=None)
    apart = SimpleNamespace(parallelism_config=pytest.importorskip("accelerate").ParallelismConfig(cp_size=2))
    with pytest.raises(ValueError, match=r"^parallelism_config must have cp_size=1, got 2"):
        check_parallelism(apart)  # where accelerate takes that, it wants accelerators
    packing = make(tmp_path, packed=True)
    with pytest.raises(ValueError, match=r"^packed takes input_ids, labels and attention_mask only, got position_ids"):
        packing.compute_loss(packing.model, batch | {"position_ids": batch["input_ids"]})
