"""LoRA: all linear layers of the blocks and no other, the bare model as reference, PEFT's own files."""

from pathlib import Path

import peft
import pytest
import torch
from dllm_trainer.distributed import find_blocks
from dllm_trainer.errors import UserError
from dllm_trainer.models import lora
from dllm_trainer.models.loading import Loaded, load
from dllm_trainer.models.lora import add_lora, linear_names, load_lora
from transformers import PreTrainedModel

from dllm_kernels import accumulate, headless, make_mask_plan, noise, score_tokens
from dllm_kernels.accumulation.objective import Batch
from dllm_kernels.accumulation.scores import adapters_off
from dllm_kernels.objectives import BGPO
from tests.trainer.models.test_published import IDS, PROMPT, REAL
from tests.trainer.models.tiny_checkpoints import write

D1_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"]
LLADA_TARGETS = ["attn_out", "ff_out", "ff_proj", "k_proj", "q_proj", "up_proj", "v_proj"]


def loaded(kind: str, folder: Path) -> Loaded:
    write(kind, folder)
    return load(folder, dtype=torch.float64, trust_remote_code=True)


def adapted(model: torch.nn.Module) -> set[str]:
    return {
        name.split(".lora_A")[0].removeprefix("base_model.model.") for name, _ in model.named_parameters() if ".lora_A" in name
    }


def trained_a_little(model: torch.nn.Module) -> None:
    """Adapters begin as no change at all: B is 0."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.3)


def test_the_published_target_list_misses_half_of_llada_and_ours_does_not(tmp_path: Path) -> None:
    model = loaded("llada", tmp_path).model
    assert linear_names(model) == LLADA_TARGETS
    published = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=D1_TARGETS))
    assert {name.rpartition(".")[2] for name in adapted(published)} == {"q_proj", "k_proj", "v_proj", "up_proj"}
    ours = adapted(add_lora(published.unload(), rank=2, alpha=4))
    assert ours == {f"model.transformer.blocks.{block}.{name}" for block in range(2) for name in LLADA_TARGETS}


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("dream", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("llada2", {"query_key_value", "dense", "gate_proj", "up_proj", "down_proj"}),
        ("llada_moe", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),  # and no router
        ("modernbert", {"Wqkv", "Wo", "Wi"}),
    ],
)
def test_every_linear_layer_of_the_blocks_is_adapted_and_nothing_else(tmp_path: Path, kind: str, names: set[str]) -> None:
    one = loaded(kind, tmp_path)
    path, blocks = find_blocks(one.model)
    linear = {f"{path}.{name}" for name, module in blocks.named_modules() if isinstance(module, torch.nn.Linear)}
    routers = {name for name in linear if name.endswith(".gate")}
    assert len(routers) == (2 if kind == "llada_moe" else 0)
    model = add_lora(one.model, rank=2, alpha=4)
    assert adapted(model) == linear - routers
    assert {name.rpartition(".")[2] for name in adapted(model)} == names
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(".lora_" in name for name in trainable)


def test_a_target_that_does_not_exist_is_told(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"lora\.targets: there is no down_proj in the model's blocks; there are attn_out, ff_out"
    ):
        add_lora(loaded("llada", tmp_path).model, rank=2, alpha=4, targets=D1_TARGETS)


def test_chosen_targets_alone_are_adapted(tmp_path: Path) -> None:
    model = add_lora(loaded("llada", tmp_path).model, rank=2, alpha=4, targets=["ff_out"])
    assert adapted(model) == {f"model.transformer.blocks.{block}.ff_out" for block in range(2)}


@pytest.mark.parametrize("kind", ["llada", "sdar"])
def test_adapters_off_is_the_model_as_it_was(tmp_path: Path, kind: str) -> None:
    """SDAR also shows that the mask's form survives peft, which calls the wrapped model's forward and no
    hooks.
    """
    one = loaded(kind, tmp_path)
    kwargs = one.call_kwargs(REAL)
    with torch.no_grad():
        before = one.model(input_ids=IDS, **kwargs).logits
        model = add_lora(one.model, rank=2, alpha=4)
        trained_a_little(model)
        assert not torch.allclose(model(input_ids=IDS, **kwargs).logits, before)
        with adapters_off(model):
            assert torch.equal(model(input_ids=IDS, **kwargs).logits, before)


@pytest.mark.parametrize("kind", ["llada", "dream"])
def test_the_head_is_frozen_and_one_step_takes_its_cheap_plan(tmp_path: Path, kind: str) -> None:
    one = loaded(kind, tmp_path)
    model = add_lora(one.model, rank=2, alpha=4)
    trained_a_little(model)
    assert not model.get_output_embeddings().weight.requires_grad
    plan = make_mask_plan(
        IDS,
        torch.arange(IDS.shape[1]).expand(2, -1) >= PROMPT,
        law="exact",
        samples=2,
        seed=1,
        sequence_ids=noise.sequence_ids(["a", "b"]),
        mask_id=one.facts.mask_id,
        shift=one.facts.shift,
    )
    batch = Batch({"advantages": torch.tensor([1.0, -0.5])})
    accumulate(model, plan, BGPO, batch, model_kwargs=one.call_kwargs(REAL))
    grads = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert grads == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    with headless(model) as body:
        assert body.weight.grad is None
        hidden = body(IDS, **one.call_kwargs(REAL))
        assert score_tokens(hidden, body.weight, IDS.flatten()).plan == "unit"


def test_dropout_is_off_unless_asked_for(tmp_path: Path) -> None:
    model = add_lora(loaded("llada", tmp_path).model, rank=2, alpha=4)
    assert not any(isinstance(module, torch.nn.Dropout) and module.p for module in model.modules())
    assert not model.training


def test_adapters_are_saved_as_peft_saves_them_and_load_again(tmp_path: Path) -> None:
    one = loaded("llada", tmp_path / "base")
    model = add_lora(one.model, rank=2, alpha=4)
    trained_a_little(model)
    model.save_pretrained(tmp_path / "adapter")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {file.name for file in (tmp_path / "adapter").iterdir()}
    with torch.no_grad():
        want = model(input_ids=IDS).logits
        again = load_lora(fresh(tmp_path / "base"), tmp_path / "adapter")
        assert torch.equal(again(input_ids=IDS).logits, want)
        theirs = peft.PeftModel.from_pretrained(fresh(tmp_path / "base"), str(tmp_path / "adapter"))
        assert torch.equal(theirs(input_ids=IDS).logits, want)
    assert not any(parameter.requires_grad for parameter in again.parameters())
    trainable = load_lora(fresh(tmp_path / "base"), tmp_path / "adapter", trainable=True)
    assert any(parameter.requires_grad for parameter in trainable.parameters())


def fresh(folder: Path) -> PreTrainedModel:
    return load(folder, dtype=torch.float64, trust_remote_code=True).model


def test_a_folder_without_adapters_is_told(tmp_path: Path) -> None:
    model = loaded("llada", tmp_path / "base").model
    with pytest.raises(UserError, match=r"adapters: .* cannot be loaded"):
        load_lora(model, tmp_path)


def test_four_bit_without_its_package_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    write("llada", tmp_path)
    with pytest.raises(UserError, match=r"model\.four_bit needs the package bitsandbytes and a GPU"):
        load(tmp_path, trust_remote_code=True, four_bit=True)
