"""`headless`: hidden states and head of any Hugging Face model, such that scoring them equals the model's own
logits.
"""

import pytest
import torch
import transformers as tf

from dllm_kernels import generate, headless, sample_tokens, score_tokens
from dllm_kernels.model.headless import dropout_names
from tests.tiny import eurobert, gradients, worst_gradient_error

SMALL = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DECODER = SMALL | {"num_key_value_heads": 1, "head_dim": 8}


MODELS = {
    "eurobert": lambda: tf.EuroBertForMaskedLM(tf.EuroBertConfig(**SMALL, num_key_value_heads=2)),
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER)),
    "llama_tied": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER, tie_word_embeddings=True)),
    "modernbert": lambda: tf.ModernBertForMaskedLM(tf.ModernBertConfig(**SMALL, cls_token_id=1, sep_token_id=2)),
    "bert": lambda: tf.BertForMaskedLM(tf.BertConfig(**SMALL)),
    "gemma2_softcap": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**DECODER, final_logit_softcapping=0.5)),
    "gemma3_softcap": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**DECODER, final_logit_softcapping=0.5)),
    "cohere_logit_scale": lambda: tf.CohereForCausalLM(tf.CohereConfig(**SMALL, logit_scale=0.0625)),
    "granite_logits_scaling": lambda: tf.GraniteForCausalLM(tf.GraniteConfig(**SMALL, logits_scaling=8.0)),
    "gpt2_tied": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=37, n_embd=16, n_layer=1, n_head=2, n_positions=32)),
}


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    made = MODELS[request.param]().double().eval()
    with torch.no_grad():
        for parameter in made.parameters():  # tied and zero-initialised heads would hide errors
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64) * 0.5)
    return made


IDS = torch.randint(3, 30, (2, 7), generator=torch.Generator().manual_seed(1))
TARGET = torch.randint(3, 30, (14,), generator=torch.Generator().manual_seed(2))


def own_logp(model, ids=IDS, target=TARGET):
    logp = model(input_ids=ids).logits.log_softmax(-1)
    return logp.reshape(-1, logp.shape[-1]).gather(1, target[:, None])[:, 0]


def test_scores_over_headless_hidden_states_equal_the_model_s_own_logits(model):
    with torch.no_grad(), headless(model) as body:
        hidden = body(IDS)
        assert hidden.shape == (*IDS.shape, body.weight.shape[1])
        got = score_tokens(hidden, body.weight, TARGET, **body.options).logp
    with torch.no_grad():
        torch.testing.assert_close(got, own_logp(model), rtol=1e-11, atol=1e-11)


def test_training_through_headless_gives_the_full_model_s_gradients(model):
    with headless(model) as body:
        (-score_tokens(body(IDS), body.weight, TARGET, **body.options).logp.sum()).backward()
    ours = gradients(model)
    model.zero_grad()
    (-own_logp(model).sum()).backward()
    want = gradients(model)
    assert want
    assert worst_gradient_error(ours, want) < 1e-10


def test_greedy_tokens_and_their_logp_equal_the_model_s_own(model):
    with torch.no_grad(), headless(model) as body:
        options = dict(body.options)
        got = sample_tokens(
            body(IDS),
            body.weight,
            torch.arange(14),
            temperature=0.0,
            logit_temperature=options.pop("temperature"),
            **options,
        )
    with torch.no_grad():
        logp = model(input_ids=IDS).logits.reshape(14, -1).log_softmax(-1)
    model_logp, token = logp.max(-1)
    assert torch.equal(got.token, token)
    torch.testing.assert_close(got.logp, model_logp, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(got.confidence, model_logp.exp(), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(got.entropy, -(logp.exp() * logp).sum(-1), rtol=1e-10, atol=1e-10)


def test_sampled_tokens_of_a_model_with_scaled_logits_follow_its_scaled_distribution():
    """Granite divides and Cohere multiplies its logits; a sampler that forgets it is far too greedy."""
    logits = torch.tensor([[0.0, 8.0, 16.0]])
    key = torch.arange(6000)
    drawn = sample_tokens(logits.expand(6000, 3), torch.eye(3), key, temperature=1.0, logit_temperature=8.0)
    p = (logits[0] / 8.0).softmax(-1)
    observed = torch.bincount(drawn.token, minlength=3).double()
    assert ((observed / 6000 - p).abs() < 5 * (p * (1 - p) / 6000).sqrt()).all()
    torch.testing.assert_close(drawn.confidence, p[drawn.token])


def test_logits_are_never_built(model):
    """The head's own forward would make `[B, S, V]`; within the context it makes one column."""
    seen = []
    handle = model.get_output_embeddings().register_forward_hook(lambda module, args, output: seen.append(output.shape))
    with torch.no_grad(), headless(model) as body:
        body(IDS)
    handle.remove()
    assert seen == [(*IDS.shape, 1)]


def test_the_model_is_restored_on_exit_and_after_an_exception(model):
    head = model.get_output_embeddings()
    with torch.no_grad():
        before = model(input_ids=IDS).logits
    keys = dict(head.__dict__)
    with headless(model):
        pass
    with pytest.raises(KeyError, match="boom"), headless(model):
        raise KeyError("boom")
    assert head.__dict__.keys() == keys.keys()
    assert model.get_output_embeddings() is head
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, before)


def test_state_dict_parameters_and_modules_stay_in_place_inside(model):
    state = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    parameters = [name for name, _ in model.named_parameters()]
    with headless(model) as body:
        assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == state
        assert [name for name, _ in model.named_parameters()] == parameters
        assert body.weight is model.get_output_embeddings().weight


def test_a_patched_head_keeps_its_patch(model):
    """accelerate and others replace an instance's forward."""
    head = model.get_output_embeddings()
    original = head.forward
    head.forward = lambda hidden: original(hidden).clone()
    with headless(model) as body, torch.no_grad():
        body(IDS)
    with torch.no_grad():
        assert head.forward(torch.ones(1, head.weight.shape[1], dtype=torch.float64)).shape == (1, 37)
    assert "forward" in head.__dict__


def test_contexts_may_nest():
    model = eurobert()
    with headless(model) as outer, torch.no_grad():
        with headless(model) as inner:
            a = inner(IDS % 10)
        b = outer(IDS % 10)
    assert torch.equal(a, b)
    assert "forward" not in model.get_output_embeddings().__dict__


def test_leading_dimensions_become_one_batch_and_the_attention_mask_follows():
    model = eurobert()
    ids = torch.randint(3, 10, (3, 2, 5), generator=torch.Generator().manual_seed(0))
    attention = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    with torch.no_grad(), headless(model) as body:
        got = body(ids, attention_mask=attention)
        for k in range(3):
            torch.testing.assert_close(got[k], body(ids[k], attention_mask=attention))
        assert not torch.allclose(got[:, 1], body(ids)[:, 1])
        with pytest.raises(ValueError, match="input_ids must be on the device of the input embedding"):
            body(ids.to("meta"))


@pytest.mark.parametrize("bare", [lambda: tf.EuroBertModel(tf.EuroBertConfig(**SMALL)), lambda: torch.nn.Linear(3, 4)])
def test_a_model_without_an_output_embedding_is_an_error(bare):
    module = bare()
    with pytest.raises(ValueError, match=r"model.*output embedding"), headless(module):
        pass
    with pytest.raises(TypeError, match=r"model.*str"), headless("llada"):
        pass


def test_a_model_that_does_not_call_its_output_embedding_is_an_error():
    model = eurobert()
    model.forward = lambda input_ids: input_ids
    with headless(model) as body, pytest.raises(ValueError, match=r"model.*output embedding"):
        body(IDS % 10)


@pytest.mark.parametrize(
    "make",
    [
        lambda: tf.FalconH1ForCausalLM(
            tf.FalconH1Config(
                **SMALL,
                num_key_value_heads=1,
                lm_head_multiplier=0.1,
                mamba_d_ssm=16,
                mamba_n_heads=2,
                mamba_d_head=8,
                mamba_d_state=4,
                mamba_n_groups=1,
            )
        ),
        lambda: tf.RecurrentGemmaForCausalLM(
            tf.RecurrentGemmaConfig(**SMALL, num_key_value_heads=1, lru_width=16, logits_soft_cap=0.5, block_types=["attention"])
        ),
    ],
    ids=["falcon_h1_lm_head_multiplier", "recurrent_gemma_logits_soft_cap"],
)
def test_logits_that_a_model_changes_in_an_unknown_way_are_an_error_or_reproduced(make):
    """A scale or a cap under another config name must not be dropped in silence."""
    torch.manual_seed(0)
    model = make().double().eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_()
        try:
            with headless(model) as body:
                got = score_tokens(body(IDS), body.weight, TARGET, **body.options).logp
        except ValueError as error:
            assert "logits" in str(error)  # noqa: PT017
        else:
            torch.testing.assert_close(got, own_logp(model), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("call", ["body", "rollout"])
def test_ids_outside_the_vocabulary_are_an_error_that_names_them(call):
    model = eurobert()
    for ids in (torch.tensor([[3, 11]]), torch.tensor([[3, -1]])):
        with pytest.raises(ValueError, match=r"ids.*(11|-1)"):
            (_body if call == "body" else _rollout)(model, ids)


def test_a_model_whose_states_are_nan_is_not_said_to_change_its_logits():
    model = eurobert()
    with torch.no_grad():
        model.get_input_embeddings().weight[4] = torch.nan
        with headless(model) as body:
            assert body(torch.tensor([[3, 4]])).isnan().any()


def _body(model, ids):
    with headless(model) as body:
        return body(ids)


def _rollout(model, ids):
    return generate(model, ids, length=2, steps=1, block_length=2, mask_id=10)


def test_dropout_is_found_where_it_is_active():
    assert dropout_names(eurobert()) == []
    assert dropout_names(eurobert().train()) == []
    assert dropout_names(eurobert(attention_dropout=0.1).train()) == ["config.attention_dropout"]
    assert dropout_names(eurobert(attention_dropout=0.1)) == []
    bert = tf.BertForMaskedLM(tf.BertConfig(**SMALL))
    assert dropout_names(bert.eval()) == []
    assert any("dropout" in name for name in dropout_names(bert.train()))
    bert = tf.BertForMaskedLM(tf.BertConfig(**SMALL, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    assert dropout_names(bert.train()) == [], "dropout of nothing"
