"""Adapters on the head: `headless` gives the model's own logits with them, without them, and merged, or refuses by name."""

import pytest
import torch
import transformers as tf
from torch import nn

from dllm_kernels import elbo_loss, generate, headless, score_tokens
from tests.tiny import eurobert

peft = pytest.importorskip("peft")

IDS = torch.randint(3, 30, (2, 7), generator=torch.Generator().manual_seed(1))
TARGET = torch.randint(3, 30, (14,), generator=torch.Generator().manual_seed(2))
TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}


def bare():
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=37, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    return tf.LlamaForCausalLM(config).double().eval()


def adapted(**config):
    settings = {"r": 3, "lora_alpha": 5, "target_modules": ["lm_head", "q_proj"], "init_lora_weights": False} | config
    return peft.get_peft_model(bare(), peft.LoraConfig(**settings)).double().eval()


def own_logp(model):
    logp = model(input_ids=IDS).logits.log_softmax(-1)
    return logp.reshape(-1, logp.shape[-1]).gather(1, TARGET[:, None])[:, 0]


def our_logp(model):
    with headless(model) as body:
        return score_tokens(body(IDS), body.weight, TARGET, take_dweight=body.take_dweight, **body.options).logp


def gradients_of(logp, model):
    model.zero_grad()
    (logp * torch.linspace(-1, 2, len(logp), dtype=logp.dtype)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(model):
    ours, want = our_logp(model), own_logp(model)
    torch.testing.assert_close(ours, want, **TOLERANCE)
    return gradients_of(ours, model), gradients_of(want, model)


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"lora_dropout": 0.3}], ids=str)
def test_lora_on_the_head_gives_the_model_s_own_scores_and_gradients(config):
    model = adapted(**config)
    got, want = same(model)
    assert any("lm_head.lora_A" in name for name in want)
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, **TOLERANCE)


def test_switched_off_merged_and_unmerged_each_is_what_the_model_computes():
    model = adapted()
    with torch.no_grad():
        with_adapter = own_logp(model)
        with model.disable_adapter():
            same_off = our_logp(model)
            torch.testing.assert_close(same_off, own_logp(model), **TOLERANCE)
        assert (same_off - with_adapter).abs().max() > 0.1
        with headless(model) as body:  # switched at call time, inside one context
            on = score_tokens(body(IDS), body.weight, TARGET, **body.options).logp
            with model.disable_adapter():
                off = score_tokens(body(IDS), body.weight, TARGET, **body.options).logp
        torch.testing.assert_close(on, with_adapter, **TOLERANCE)
        torch.testing.assert_close(off, same_off, **TOLERANCE)
        model.merge_adapter()
        torch.testing.assert_close(our_logp(model), with_adapter, **TOLERANCE)
        model.unmerge_adapter()
        torch.testing.assert_close(our_logp(model), with_adapter, **TOLERANCE)


def test_several_active_adapters_act_together_and_one_alone_by_itself():
    model = adapted()
    model.add_adapter("other", peft.LoraConfig(r=2, lora_alpha=7, target_modules=["lm_head"], init_lora_weights=False))
    model.double()
    for active in (["default", "other"], ["other"], ["default"]):
        model.base_model.set_adapter(active)
        got, want = same(model)
        for name, gradient in want.items():
            torch.testing.assert_close(got[name], gradient, **TOLERANCE)


def test_a_head_in_modules_to_save_is_the_copy_that_is_active():
    model = adapted(target_modules=["q_proj"], modules_to_save=["lm_head"])
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.5)
        with_copy = our_logp(model)
        torch.testing.assert_close(with_copy, own_logp(model), **TOLERANCE)
        with model.disable_adapter():
            torch.testing.assert_close(our_logp(model), own_logp(model), **TOLERANCE)
            assert (our_logp(model) - with_copy).abs().max() > 1e-3
    got, want = same(model)
    assert got.keys() == want.keys()


@pytest.mark.parametrize(
    ("config", "train", "words"),
    [
        ({"use_dora": True}, False, "'default' with Dora"),
        ({"lora_bias": True}, False, "'default' with lora_bias"),
        ({"lora_dropout": 0.25}, True, "'default' with dropout 0.25 in training"),
    ],
    ids=str,
)
def test_an_adapter_that_is_no_low_rank_map_is_refused_by_name(config, train, words):
    model = adapted(**config).train(train)
    with pytest.raises(ValueError, match=words), headless(model) as body:
        body(IDS)
    with model.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(our_logp(model), own_logp(model), **TOLERANCE)


def test_another_kind_of_adapter_on_the_head_is_refused_by_name():
    tokens = adapted(target_modules=["q_proj"], trainable_token_indices={"lm_head": [1, 2]})
    with pytest.raises(ValueError, match="wrapped by peft's TrainableTokensWrapper with adapters default"), headless(tokens):
        pass
    config = peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[])
    model = peft.get_peft_model(bare(), config).double().eval()
    with pytest.raises(ValueError, match="'default' of kind Linear, which is no LoRA"), headless(model) as body:
        body(IDS)


class Normed(nn.Linear):
    def forward(self, x):
        return super().forward(nn.functional.layer_norm(x, x.shape[-1:]))


class Scaled(nn.Linear):
    def forward(self, x):
        return 0.5 * super().forward(x)


@pytest.mark.parametrize("kind", [Normed, Scaled])
def test_a_head_whose_forward_is_another_map_is_refused(kind):
    model = bare()
    model.lm_head.__class__ = kind
    for _ in range(2):
        with pytest.raises(ValueError, match=f"got a {kind.__name__} whose own output differs"), headless(model) as body:
            body(IDS)


def test_the_head_s_own_output_is_computed_once_per_model_and_set_of_adapters():
    model, rows = adapted(), []
    head = model.get_output_embeddings()
    head.base_layer.register_forward_hook(lambda _, args, out: rows.append(len(args[0])))
    for _ in range(3):
        our_logp(model)
    with model.disable_adapter():
        our_logp(model)
    assert rows == [1, 1]


def test_losses_and_rollouts_have_the_adapter_too():
    model = adapted()
    merged = adapted()
    merged.load_state_dict(model.state_dict())
    merged.merge_adapter()
    masked, p_mask = torch.ones(2, 7, dtype=torch.bool), torch.full((2, 7), 0.5, dtype=torch.float64)
    losses, rollouts = [], []
    for each in (model, merged):
        with torch.no_grad(), headless(each) as body:
            losses.append(elbo_loss(body(IDS), body.weight, IDS, masked, p_mask, **body.options))
        rollouts.append(generate(each, IDS[:, :3], mask_id=36, length=4, block_length=4, steps=4, seed=1))
    torch.testing.assert_close(*losses, **TOLERANCE)
    assert torch.equal(rollouts[0].ids_BS, rollouts[1].ids_BS)


def test_a_bf16_model_with_fp32_adapters_is_within_its_own_rounding():
    model = peft.get_peft_model(
        eurobert().bfloat16(), peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    ).eval()
    head = model.get_output_embeddings()
    assert head.lora_A["default"].weight.dtype == torch.float32
    ids = torch.randint(2, head.weight.shape[0] - 1, (2, 6))
    with torch.no_grad():
        with headless(model) as body:
            ours = score_tokens(body(ids), body.weight, ids.reshape(-1), **body.options).logp
        own = model(input_ids=ids).logits.float().log_softmax(-1).gather(-1, ids[..., None]).reshape(-1)
    assert (ours - own).abs().max() < 0.1
