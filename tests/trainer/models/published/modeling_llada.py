"""LLaDA-8B's modules, names and signatures: an OLMo, without post_init(), checkpointing or a default for `use_cache`."""

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_llada import LLaDAConfig
from .layers import RMSNorm, attend, rotate, split


class LLaDAOutput(NamedTuple):
    logits: torch.Tensor
    attn_key_values: Any
    hidden_states: Any


class RotaryEmbedding(nn.Module):
    """Of each block: it counts the columns of the queries and keys that it turns."""

    def __init__(self, config):
        super().__init__()
        self.theta = config.rope_theta

    def forward(self, q, k):
        size = q.shape[-1]
        frequency = self.theta ** (-torch.arange(0, size, 2, device=q.device).float() / size)
        angle = torch.outer(torch.arange(q.shape[2], device=q.device).float(), frequency).repeat(1, 2)
        return rotate(q, angle), rotate(k, angle)


class LLaDALlamaBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        head, kv = config.d_model // config.n_heads, config.n_kv_heads
        self.attn_norm = RMSNorm(config.d_model)
        self.ff_norm = RMSNorm(config.d_model)
        self.q_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.k_proj = nn.Linear(config.d_model, kv * head, bias=False)
        self.v_proj = nn.Linear(config.d_model, kv * head, bias=False)
        self.rotary_emb = RotaryEmbedding(config)
        self.attn_out = nn.Linear(config.d_model, config.d_model, bias=False)
        self.ff_proj = nn.Linear(config.d_model, config.mlp_hidden_size, bias=False)
        self.up_proj = nn.Linear(config.d_model, config.mlp_hidden_size, bias=False)
        self.ff_out = nn.Linear(config.mlp_hidden_size, config.d_model, bias=False)

    def forward(self, x, attention_bias=None, layer_past=None, use_cache=False):
        h = self.attn_norm(x)
        q, k, v = self.q_proj(h), self.k_proj(h), self.v_proj(h)
        q, k, v = split(q, self.config.n_heads), split(k, self.config.n_kv_heads), split(v, self.config.n_kv_heads)
        q, k = self.rotary_emb(q, k)
        x = x + self.attn_out(attend(q, k, v, attention_bias))
        h = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(h)) * self.up_proj(h)), None


class LLaDAModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        modules = {
            "wte": nn.Embedding(config.embedding_size, config.d_model),
            "emb_drop": nn.Dropout(0.0),
            "ln_f": RMSNorm(config.d_model),
            "blocks": nn.ModuleList(LLaDALlamaBlock(config) for _ in range(config.n_layers)),
        }
        if not config.weight_tying:
            modules["ff_out"] = nn.Linear(config.d_model, config.embedding_size, bias=False)
        self.transformer = nn.ModuleDict(modules)

    def forward(self, input_ids, input_embeddings=None, attention_mask=None, attention_bias=None, use_cache=False):
        x = self.transformer.wte(input_ids) if input_embeddings is None else input_embeddings
        x = self.transformer.emb_drop(x)
        if attention_mask is not None and 0.0 in attention_mask:  # OLMo's default, which some copies of LLaDA's code kept
            mask = attention_mask.to(torch.float).view(len(x), -1)[:, None, None, :]
            size, least = x.shape[1], torch.finfo(torch.float).min
            causal = torch.full((1, 1, size, size), least).triu(1)
            attention_bias = ((1.0 - mask) * least + (causal if attention_bias is None else attention_bias)).clamp(min=least)
        if attention_bias is not None:
            attention_bias = attention_bias.to(x.dtype)
        for block in self.transformer.blocks:
            x, _ = block(x, attention_bias=attention_bias, use_cache=use_cache)
        x = self.transformer.ln_f(x)
        logits = F.linear(x, self.transformer.wte.weight, None) if self.config.weight_tying else self.transformer.ff_out(x)
        return LLaDAOutput(logits, None, None)


class LLaDAModelLM(PreTrainedModel):
    config_class = LLaDAConfig
    base_model_prefix = "model"
    _no_split_modules = ("LLaDALlamaBlock",)

    def __init__(self, config, model=None, init_params=False):
        super().__init__(config)
        self.model = model or LLaDAModel(config)

    def forward(
        self,
        input_ids=None,
        inputs_embeds=None,
        attention_mask=None,
        attention_bias=None,
        past_key_values=None,
        labels=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
        cache_position=None,
    ):
        if use_cache is None:
            use_cache = self.config.use_cache
        outputs = self.model.forward(
            input_ids=input_ids,
            input_embeddings=inputs_embeds,
            attention_mask=attention_mask,
            attention_bias=attention_bias,
            use_cache=use_cache,
        )
        return CausalLMOutputWithPast(logits=outputs.logits, past_key_values=outputs.attn_key_values)

    def can_generate(self):
        return True

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, **kwargs):
        return {"input_ids": input_ids, "past_key_values": past_key_values, **kwargs}

    def get_input_embeddings(self):
        return self.model.transformer.wte

    def set_input_embeddings(self, value):
        self.model.transformer.wte = value

    def get_output_embeddings(self):
        return self.model.transformer.wte if self.config.weight_tying else self.model.transformer.ff_out

    def set_output_embeddings(self, value):
        if self.config.weight_tying:
            self.model.transformer.wte = value
        else:
            self.model.transformer.ff_out = value

    def tie_weights(self):
        if self.config.weight_tying:
            self.model.transformer.ff_out = self.model.transformer.wte
