"""SDAR: a Qwen3 that needs a mask of four dimensions, and in training mode makes a block-diffusion batch of its own."""

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import LossKwargs  # gone in transformers 5

from .layers import MLP, RMSNorm, RotaryEmbedding, attend, rotate, split


class SDARConfig(PretrainedConfig):
    model_type = "sdar"

    def __init__(
        self,
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        rope_theta=1000000.0,
        rope_scaling=None,
        block_size=4,
        tie_word_embeddings=False,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.rope_theta = rope_theta
        self.rope_scaling = rope_scaling
        self.block_size = block_size
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)


class SDARAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        heads, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, heads, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv, bias=False)
        self.o_proj = nn.Linear(heads, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim)
        self.k_norm = RMSNorm(config.head_dim)

    def forward(self, x, attention_mask, angle):
        c = self.config
        q = self.q_norm(split(self.q_proj(x), c.num_attention_heads))
        k = self.k_norm(split(self.k_proj(x), c.num_key_value_heads))
        v = split(self.v_proj(x), c.num_key_value_heads)
        attention_mask = attention_mask.bool()
        assert not torch.all(attention_mask), "flash attention is called where everyone sees everyone"
        return self.o_proj(attend(rotate(q, angle), rotate(k, angle), v, attention_mask))


class SDARDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config):
        super().__init__()
        self.self_attn = SDARAttention(config)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size)
        self.post_attention_layernorm = RMSNorm(config.hidden_size)

    def forward(self, hidden_states, attention_mask=None, position_embeddings=None):
        x = hidden_states + self.self_attn(self.input_layernorm(hidden_states), attention_mask, position_embeddings)
        return (x + self.mlp(self.post_attention_layernorm(x)),)


class SDARPreTrainedModel(PreTrainedModel):
    config_class = SDARConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.data.normal_(mean=0.0, std=0.02)


class SDARModel(SDARPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(SDARDecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size)
        self.rotary_emb = RotaryEmbedding(config)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, use_cache=None):
        use_cache = use_cache if use_cache is not None else self.config.use_cache
        x = self.embed_tokens(input_ids)
        angle = self.rotary_emb(x.shape[1], x.device, position_ids)
        for layer in self.layers:
            x = layer(x, attention_mask=attention_mask, position_embeddings=angle)[0]
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x))


class SDARForCausalLM(SDARPreTrainedModel):
    _tied_weights_keys = ["lm_head.weight"]  # noqa: RUF012 (as published)

    def __init__(self, config):
        super().__init__(config)
        self.model = SDARModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        **kwargs: Unpack[LossKwargs],
    ):
        assert not self.training, "Labels must be provided for training."
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache)
        hidden_states = outputs.last_hidden_state[:, slice(-logits_to_keep, None), :].contiguous()
        return CausalLMOutputWithPast(logits=self.lm_head(hidden_states))
