"""Dream-7B: a Qwen2 whose attention mask goes straight into scaled_dot_product_attention, and whose logits are shifted."""

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput

from .layers import MLP, RMSNorm, RotaryEmbedding, attend, rotate, split


class DreamConfig(PretrainedConfig):
    model_type = "Dream"

    def __init__(
        self,
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        rope_theta=1000000.0,
        rope_scaling=None,
        initializer_range=0.02,
        mask_token_id=59,
        use_cache=False,
        tie_word_embeddings=False,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.rope_theta = rope_theta
        self.rope_scaling = rope_scaling
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
        self.mask_token_id = mask_token_id


class DreamAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        head = config.hidden_size // config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=True)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * head, bias=True)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * head, bias=True)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x, attention_mask, angle, cache):
        c = self.config
        q, k = split(self.q_proj(x), c.num_attention_heads), split(self.k_proj(x), c.num_key_value_heads)
        q, k, v = rotate(q, angle), rotate(k, angle), split(self.v_proj(x), c.num_key_value_heads)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        return self.o_proj(attend(q, k, v, attention_mask))


class DreamDecoderLayer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.self_attn = DreamAttention(config, layer_idx)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size)
        self.post_attention_layernorm = RMSNorm(config.hidden_size)

    def forward(self, hidden_states, attention_mask=None, position_embeddings=None, past_key_value=None):
        h = self.input_layernorm(hidden_states)
        x = hidden_states + self.self_attn(h, attention_mask, position_embeddings, past_key_value)
        return (x + self.mlp(self.post_attention_layernorm(x)),)


class DreamPreTrainedModel(PreTrainedModel):
    config_class = DreamConfig
    base_model_prefix = "model"

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.data.normal_(mean=0.0, std=self.config.initializer_range)


class DreamBaseModel(DreamPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(DreamDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size)
        self.rotary_emb = RotaryEmbedding(config)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, use_cache=None):
        x = self.embed_tokens(input_ids)
        angle = self.rotary_emb(x.shape[1], x.device, position_ids)
        use_cache = use_cache if use_cache is not None else self.config.use_cache
        cache = DynamicCache() if use_cache else None
        for layer in self.layers:
            x = layer(x, attention_mask=attention_mask, position_embeddings=angle, past_key_value=cache)[0]
        return BaseModelOutput(last_hidden_state=self.norm(x))


class DreamModel(DreamPreTrainedModel):
    _tied_weights_keys = ["lm_head.weight"]  # noqa: RUF012 (as published)

    def __init__(self, config):
        super().__init__(config)
        self.model = DreamBaseModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, use_cache=None, num_logits_to_keep=0, **loss_kwargs
    ):
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)
        return MaskedLMOutput(logits=self.lm_head(outputs[0][:, -num_logits_to_keep:, :]))
