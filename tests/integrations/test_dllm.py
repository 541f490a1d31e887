"""ZHZisZZ/dllm's trainer and sampler, and ours in their place: the same losses, gradients and tokens."""

import importlib.util
from pathlib import Path

import pytest
import torch

from tests.tiny import checkpoint, gradients, worst_gradient_error

WHY = "ZHZisZZ/dllm is not installed; it is on no package index: pip install git+https://github.com/ZHZisZZ/dllm"
FOUND = importlib.util.find_spec("dllm")  # another package of the field installs a `dllm` too
HERE = FOUND is not None and any((Path(place) / "core").is_dir() for place in FOUND.submodule_search_locations or ())
pytestmark = pytest.mark.skipif(not HERE, reason=WHY)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    folder = checkpoint(tmp_path_factory.mktemp("dllm") / "model")
    return AutoModelForMaskedLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder, padding_side="right")


def batch():
    ids = torch.randint(10, (3, 9), generator=torch.Generator().manual_seed(0))
    scored = torch.arange(9) >= torch.tensor([[2], [3], [5]])
    real = torch.arange(9) < torch.tensor([[9], [8], [7]])
    return {"input_ids": ids, "labels": ids.masked_fill(~scored | ~real, -100), "attention_mask": real.long()}


@pytest.mark.parametrize("norm", ["token", "sequence", "batch"])
@pytest.mark.parametrize("schedule", ["LinearAlphaScheduler", "CosineAlphaScheduler"])
@pytest.mark.parametrize("shift", [False, True])
def test_the_loss_and_its_gradients_are_those_of_its_trainer(norm, schedule, shift, loaded, tmp_path):
    from dllm.core.schedulers import make_alpha_scheduler
    from dllm.core.trainers import MDLMConfig, MDLMTrainer

    from dllm_kernels.integrations.dllm import HeadlessMDLMTrainer

    model, tokenizer = loaded
    found = []
    for cls in (MDLMTrainer, HeadlessMDLMTrainer):
        args = MDLMConfig(
            str(tmp_path),
            loss_norm_type=norm,
            right_shift_logits=shift,
            report_to="none",
            use_cpu=True,
            bf16=False,
            eval_strategy="no",
        )
        trainer = cls(model=model, args=args, processing_class=tokenizer, scheduler=make_alpha_scheduler(schedule))
        model.zero_grad()
        torch.manual_seed(3)
        loss = trainer.compute_loss(model, batch())
        loss.backward()
        found.append((float(loss.detach()), gradients(model)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert worst_gradient_error(found[1][1], found[0][1]) < 1e-4


@pytest.mark.parametrize("config", [{}, {"cfg_scale": 1.5}, {"right_shift_logits": True}, {"suppress_tokens": [1, 2]}])
def test_the_sampler_writes_the_same_tokens(config, loaded):
    from dllm.core.samplers import MDLMSampler

    from dllm_kernels.integrations.dllm import HeadlessMDLMSampler

    model, tokenizer = loaded
    prompts = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
    options = {"max_new_tokens": 8, "block_size": 4, "steps": 8, "return_dict": True, **config}
    theirs, ours = (
        cls(model=model, tokenizer=tokenizer).sample(prompts, **options) for cls in (MDLMSampler, HeadlessMDLMSampler)
    )
    assert torch.equal(theirs.sequences, ours.sequences)
    assert len(theirs.histories) == len(ours.histories)
    assert all(torch.equal(a, b) for a, b in zip(theirs.histories, ours.histories, strict=True))
