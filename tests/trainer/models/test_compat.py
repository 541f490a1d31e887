"""Old remote code on current transformers, heads, checkpointing from outside, and the forms of a mask."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.utils
from dllm_trainer.facts import Facts
from dllm_trainer.models import compat
from dllm_trainer.models.compat import AttentionForm, checkpoint_blocks
from dllm_trainer.models.loading import load
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from dllm_kernels import expected_embedding, headless
from tests.tiny import eurobert, gradients, worst_gradient_error
from tests.trainer.models.test_published import IDS, REAL
from tests.trainer.models.tiny_checkpoints import write

CURRENT = pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5, reason="transformers 4 runs this code as it was written, and needs no patch"
)
GEMMA = pytest.mark.skipif(
    not hasattr(transformers, "DiffusionGemmaConfig"), reason=f"transformers {transformers.__version__} has no DiffusionGemma"
)


def published(kind: str, folder: Path) -> PreTrainedModel:
    write(kind, folder)
    return load(folder, dtype=torch.float64, trust_remote_code=True).model


# --- loading ------------------------------------------------------------------------------------------------


@CURRENT
@pytest.mark.parametrize(
    ("kind", "auto", "symptom"),
    [
        ("llada", AutoModel, "all_tied_weights_keys"),
        ("dream", AutoModel, "default"),
        ("sdar", AutoModelForCausalLM, "LossKwargs"),
        ("llada2", AutoModelForCausalLM, "default"),
    ],
)
def test_the_published_code_does_not_load_by_itself(tmp_path: Path, kind: str, auto: type, symptom: str) -> None:
    """Or these tests would show nothing. The copy's name gives it modules of its own, which no patch has
    touched.
    """
    write(kind, tmp_path / "patched")
    unpatched = (tmp_path / "patched").rename(tmp_path / f"unpatched_{kind}")
    with pytest.raises((AttributeError, KeyError, ImportError), match=symptom):
        auto.from_pretrained(unpatched, trust_remote_code=True)
    assert load(unpatched, trust_remote_code=True).facts.mask_id == 59


@CURRENT
def test_only_what_is_missing_is_patched(tmp_path: Path) -> None:
    cls = type(published("dream", tmp_path / "dream"))
    assert "tie_weights" not in vars(cls)
    assert "all_tied_weights_keys" not in vars(cls)
    old = type(published("llada", tmp_path / "llada"))
    assert vars(old)["all_tied_weights_keys"] == {}
    assert not hasattr(transformers.utils, "LossKwargs")
    assert "default" not in transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS


def test_the_frequencies_that_no_checkpoint_holds_are_restored(tmp_path: Path) -> None:
    """transformers leaves them uninitialised, which may look right by chance: here they are spoilt first."""
    for kind in ("dream", "llada2"):
        model = published(kind, tmp_path / kind)
        rotary = model.model.rotary_emb
        size = rotary.inv_freq.numel() * 2
        theta = {"dream": 1e6, "llada2": 6e5}[kind]
        want = theta ** (-torch.arange(0, size, 2) / size)
        torch.testing.assert_close(rotary.inv_freq, want)
        assert size == {"dream": 16, "llada2": 8}[kind]  # LLaDA2 rotates half of each head
        weights = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
        rotary.inv_freq.fill_(torch.nan)
        rotary.original_inv_freq = rotary.inv_freq.to("meta")
        state = torch.get_rng_state()
        with torch.random.fork_rng(devices=[]):
            compat.restore_buffers(model)
        assert torch.equal(torch.get_rng_state(), state)
        torch.testing.assert_close(rotary.inv_freq, want)
        torch.testing.assert_close(rotary.original_inv_freq, want)
        assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == weights
    assert torch.nn.Linear(2, 2).weight.device.type == "cpu", "new modules have memory again"


def test_loading_leaves_the_global_random_state_alone(tmp_path: Path) -> None:
    write("sdar", tmp_path)
    state = torch.get_rng_state()
    load(tmp_path, trust_remote_code=True)
    assert torch.equal(torch.get_rng_state(), state)


# --- heads --------------------------------------------------------------------------------------------------


def test_llada_s_head_is_not_the_mlp_of_the_same_name(tmp_path: Path) -> None:
    model = published("llada", tmp_path)
    same_name = [name for name, _ in model.named_modules() if name.endswith("ff_out")]
    assert len(same_name) == 3
    with headless(model) as body:
        assert body.head is model.get_submodule("model.transformer.ff_out")


def test_a_head_that_only_the_table_knows_is_found() -> None:
    class Config(PretrainedConfig):
        model_type = "mdlm"

    class Output(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 11)

    class Model(PreTrainedModel):
        config_class = Config

        def __init__(self) -> None:
            super().__init__(Config())
            self.vocab_embed = nn.Embedding(11, 8)
            self.output_layer = Output()

        def forward(self, input_ids: Tensor) -> MaskedLMOutput:
            return MaskedLMOutput(logits=self.output_layer.linear(self.vocab_embed(input_ids)))

    model = Model()
    assert model.get_output_embeddings() is None
    compat.adapt_head(model, Facts(family="mdlm", mask_id=10, head="output_layer.linear"))
    ids = torch.tensor([[1, 2, 3]])
    want = model(ids).logits
    with headless(model) as body:
        assert body.head is model.output_layer.linear
        torch.testing.assert_close(nn.functional.linear(body(ids), body.weight, body.bias), want)


def test_logits_that_are_scaled_in_place_are_noticed_and_hidden_states_stay_whole(tmp_path: Path) -> None:
    """OLMo's `scale_logits`, which LLaDA's code has too: on a view of the hidden states it would spoil their
    first column.
    """
    model = published("llada", tmp_path)
    inner, calls = model.model.forward, []

    def scaled(**kwargs: Tensor) -> object:
        outputs = inner(**kwargs)
        outputs.logits.mul_(0.5)
        calls.append(outputs)
        return outputs

    model.model.forward = scaled
    with headless(model) as body, pytest.raises(ValueError, match="model must not change its logits beyond softcap and scale"):
        body(IDS)
    assert calls


def tiny_diffusion_gemma() -> tuple[Any, Tensor, Tensor]:
    """Model, prompt and canvas."""
    tiny = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    text = tiny | {"vocab_size": 64, "num_hidden_layers": 1, "layer_types": ["full_attention"], "final_logit_softcapping": 0.5}
    experts = {"num_experts": 2, "top_k_experts": 1, "moe_intermediate_size": 8}
    config = transformers.DiffusionGemmaConfig(
        text_config=text | experts,
        vision_config=tiny | {"num_hidden_layers": 1, "position_embedding_size": 16},
        canvas_length=4,
    )
    model = transformers.DiffusionGemmaForBlockDiffusion(config).eval()
    with torch.no_grad():
        model.lm_head.weight.copy_(torch.randn(64, 16, generator=torch.Generator().manual_seed(0)))
    prompt, canvas = torch.randint(3, 60, (2, 2, 4), generator=torch.Generator().manual_seed(0))
    return model, prompt, canvas


@GEMMA
def test_diffusion_gemma_s_head_is_tied_and_capped() -> None:
    model, prompt, canvas = tiny_diffusion_gemma()
    with torch.no_grad(), headless(model) as body:
        assert body.softcap == 0.5
        assert body.weight is model.get_input_embeddings().weight
        z = body(prompt, decoder_input_ids=canvas) @ body.weight.T
    with torch.no_grad():
        logits = model(input_ids=prompt, decoder_input_ids=canvas).logits
    torch.testing.assert_close(0.5 * torch.tanh(z / 0.5), logits)


@GEMMA
def test_diffusion_gemma_s_own_soft_embeddings_are_the_expected_embeddings_of_its_head() -> None:
    """What its decoder is conditioned on in the next step: the embedding's rows under the softmax of tempered logits, scaled."""
    model, prompt, canvas = tiny_diffusion_gemma()
    seen: list[Tensor] = []
    decoder = model.model.decoder
    hook = decoder.self_conditioning.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[1]))
    with torch.no_grad(), headless(model) as body:
        hidden = body(prompt, decoder_input_ids=canvas)
        soft = expected_embedding(hidden, body.weight, **{**body.options, "temperature": 0.6})
        soft = (soft * decoder.embed_tokens.embed_scale).view(2, 4, 16)
    with torch.no_grad():
        logits = model(input_ids=prompt, decoder_input_ids=canvas).logits
        model(input_ids=prompt, decoder_input_ids=canvas, self_conditioning_logits=logits / 0.6)
    hook.remove()
    torch.testing.assert_close(soft, seen[-1])


# --- activation checkpointing -------------------------------------------------------------------------------


def kept_bytes_and_gradients(model: nn.Module, ids: Tensor, **kwargs: Tensor) -> tuple[int, dict[str, Tensor]]:
    kept = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size() if not isinstance(tensor, nn.Parameter) else 0
        return tensor

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids, **kwargs).logits.double().pow(2).sum()
    forward_only = kept
    loss.backward()
    return forward_only, gradients(model)


@pytest.mark.parametrize("kind", ["llada", "dream", "sdar", "llada2", "eurobert"])
def test_checkpointing_from_outside_keeps_less_and_gives_the_same_gradients(tmp_path: Path, kind: str) -> None:
    """In eval mode too, where transformers' own does nothing; LLaDA's class has none, Dream's would fill a
    cache twice.
    """
    write(kind, tmp_path)
    one = load(tmp_path, dtype=torch.float64, trust_remote_code=True)
    kwargs = one.call_kwargs(REAL)
    kept, want = kept_bytes_and_gradients(one.model, IDS, **kwargs)
    names = list(one.model.state_dict())
    assert checkpoint_blocks(one.model) == 2
    kept_now, got = kept_bytes_and_gradients(one.model, IDS, **kwargs)
    assert kept_now < 0.5 * kept
    assert worst_gradient_error(got, want) == 0.0
    assert list(one.model.state_dict()) == names
    assert checkpoint_blocks(one.model) == 2, "twice is once"
    assert kept_bytes_and_gradients(one.model, IDS, **kwargs)[0] == kept_now


def test_a_copy_of_a_checkpointed_model_runs_its_own_blocks() -> None:
    model = eurobert()
    checkpoint_blocks(model)
    twin = copy.deepcopy(model)
    model(input_ids=IDS % 11).logits.sum().backward()
    assert not gradients(twin)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not twin(input_ids=IDS % 11).logits.any()


# --- the attention mask -------------------------------------------------------------------------------------


def test_block_causal_masks_count_blocks_from_the_first_real_token() -> None:
    real = torch.tensor([[0, 1, 1, 1, 1, 1]])
    seen = AttentionForm("bool", 2)(real, torch.zeros(1, 6, dtype=torch.int64), torch.float32)
    assert seen is not None
    want = [
        [0, 1, 1, 0, 0, 0],  # padding sees what the first block sees, so that its softmax has something to sum
        [0, 1, 1, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 1, 1, 1, 1, 0],
        [0, 1, 1, 1, 1, 0],
        [0, 1, 1, 1, 1, 1],
    ]
    assert seen[0, 0].int().tolist() == want
    added = AttentionForm("float", 2)(real, torch.zeros(1, 6, dtype=torch.int64), torch.bfloat16)
    assert added is not None
    assert added.dtype == torch.bfloat16
    assert torch.equal(added == 0, seen)
    everyone = AttentionForm("bias", None)(real, torch.zeros(1, 6, dtype=torch.int64), torch.float32)
    assert everyone is not None
    assert everyone.shape == (1, 1, 1, 6)
    assert AttentionForm("bias", None).keyword == "attention_bias"
    assert added.min() == torch.finfo(torch.bfloat16).min


def test_a_mask_is_made_only_where_one_is_needed() -> None:
    ids = torch.zeros(2, 4, dtype=torch.int64)
    ones = torch.ones_like(ids)
    assert AttentionForm("none", 4)(ones, ids, torch.float32) is None
    assert AttentionForm("bool", None)(None, ids, torch.float32) is None
    assert AttentionForm("bool", 2)(None, ids, torch.float32) is not None


def test_a_mask_of_pairs_keeps_its_pairs_and_takes_the_model_s_dtype() -> None:
    ids = torch.zeros(1, 4, dtype=torch.int64)
    seen = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    added = torch.zeros(1, 1, 4, 4).masked_fill(~seen, torch.finfo(torch.float32).min)
    for given in (seen, added):
        as_bool = AttentionForm("bool", 2)(given, ids, torch.float32)
        as_bias = AttentionForm("bias", None)(given, ids, torch.float32)
        assert as_bool is not None
        assert as_bias is not None
        assert torch.equal(as_bool, seen)
        assert torch.equal(as_bias, added)
    with pytest.raises(ValueError, match="attention_mask must be None for a model that takes none, got a mask of pairs"):
        AttentionForm("none", None)(seen, ids, torch.float32)


def test_llada_becomes_causal_by_a_mask_and_stays_bidirectional_by_a_bias(tmp_path: Path) -> None:
    """As MMaDA's published copy of LLaDA's code does; nothing is said, and the logits are wrong."""
    model = published("llada", tmp_path)
    changed = IDS.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 50

    def first_row_sees_the_last(**kwargs: Tensor) -> bool:
        with torch.no_grad():
            logits = [type(model).forward.__wrapped__(model, input_ids=ids, **kwargs).logits for ids in (IDS, changed)]
        return not torch.equal(logits[0][0, 2], logits[1][0, 2])

    assert first_row_sees_the_last()
    assert not first_row_sees_the_last(attention_mask=REAL.long())
    bias = AttentionForm("bias", None)(REAL, IDS, torch.float64)
    assert bias is not None
    assert first_row_sees_the_last(attention_bias=bias)


def test_two_dimensions_cannot_say_what_a_block_sees() -> None:
    facts = Facts(family="x", mask_id=1, topology="block_causal", block_length=4, attention_mask="int")
    with pytest.raises(ValueError, match="attention_mask must be bool, float, bias or none for a block-causal model, got 'int'"):
        compat.adapt_forward(eurobert(), facts)
