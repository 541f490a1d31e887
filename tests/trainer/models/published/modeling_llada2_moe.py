"""LLaDA2.x: experts behind a router that is a bare parameter, one projection for q, k and v, causal unless told otherwise."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast

from .layers import MLP, Experts, RMSNorm, RotaryEmbedding, attend, rotate, split


class LLaDA2MoeConfig(PretrainedConfig):
    model_type = "llada2_moe"

    def __init__(
        self,
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        rope_theta=600000.0,
        rope_scaling=None,
        partial_rotary_factor=0.5,
        pad_token_id=57,
        use_cache=False,
        tie_word_embeddings=False,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.moe_intermediate_size = moe_intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.first_k_dense_replace = first_k_dense_replace
        self.rope_theta = rope_theta
        self.rope_scaling = rope_scaling
        self.partial_rotary_factor = partial_rotary_factor
        self.use_cache = use_cache
        super().__init__(pad_token_id=pad_token_id, tie_word_embeddings=tie_word_embeddings, **kwargs)


class LLaDA2MoeGate(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, x):
        return F.linear(x.float(), self.weight.float()).to(x.dtype)


class LLaDA2MoeAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, self.kv = config.num_attention_heads, config.num_key_value_heads
        self.query_key_value = nn.Linear(config.hidden_size, (self.heads + 2 * self.kv) * config.head_dim, bias=False)
        self.query_layernorm = RMSNorm(config.head_dim)
        self.key_layernorm = RMSNorm(config.head_dim)
        self.dense = nn.Linear(self.heads * config.head_dim, config.hidden_size, bias=False)

    def forward(self, x, attention_mask, angle):
        qkv = split(self.query_key_value(x), self.heads + 2 * self.kv)
        q, k, v = qkv.split([self.heads, self.kv, self.kv], dim=1)
        q, k = self.query_layernorm(q), self.key_layernorm(k)
        return self.dense(attend(rotate(q, angle), rotate(k, angle), v, attention_mask))


class LLaDA2MoeDecoderLayer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        dense = layer_idx < config.first_k_dense_replace
        self.attention = LLaDA2MoeAttention(config)
        self.mlp = (
            MLP(config.hidden_size, config.intermediate_size) if dense else Experts(config, LLaDA2MoeGate(config), shared=True)
        )
        self.input_layernorm = RMSNorm(config.hidden_size)
        self.post_attention_layernorm = RMSNorm(config.hidden_size)

    def forward(self, hidden_states, attention_mask=None, position_embeddings=None):
        x = hidden_states + self.attention(self.input_layernorm(hidden_states), attention_mask, position_embeddings)
        return (x + self.mlp(self.post_attention_layernorm(x)),)


class LLaDA2MoePreTrainedModel(PreTrainedModel):
    config_class = LLaDA2MoeConfig
    base_model_prefix = "model"

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.data.normal_(mean=0.0, std=0.02)


class LLaDA2MoeModel(LLaDA2MoePreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(LLaDA2MoeDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size)
        self.rotary_emb = RotaryEmbedding(config)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, use_cache=None):
        x = self.word_embeddings(input_ids)
        B, S, _ = x.shape
        if attention_mask is None or attention_mask.dim() == 2:
            attention_mask = torch.ones(S, S, dtype=torch.bool, device=x.device).tril()
        elif attention_mask.shape != (B, 1, S, S):
            raise ValueError(f"attention_mask must be (batch, 1, seq_len, kv_len), got {attention_mask.shape}")
        angle = self.rotary_emb(S, x.device, position_ids)
        for layer in self.layers:
            x = layer(x, attention_mask=attention_mask, position_embeddings=angle)[0]
        return MoeModelOutputWithPast(last_hidden_state=self.norm(x))


class LLaDA2MoeModelLM(LLaDA2MoePreTrainedModel):
    _tied_weights_keys = ["lm_head.weight"]  # noqa: RUF012 (as published)

    def __init__(self, config):
        super().__init__(config)
        self.model = LLaDA2MoeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.word_embeddings

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, labels=None, use_cache=None, **kwargs):
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache)
        return MoeCausalLMOutputWithPast(logits=self.lm_head(outputs[0]).float())
