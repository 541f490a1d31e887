"""LLaDA-MoE: published under LLaDA's model_type, with a router that is a linear layer and bidirectional attention."""

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast

from .layers import Experts, RMSNorm, RotaryEmbedding, attend, rotate, split


class LLaDAMoEConfig(PretrainedConfig):
    model_type = "llada"

    def __init__(
        self,
        vocab_size=64,
        hidden_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        rope_theta=50000.0,
        rope_scaling=None,
        use_cache=False,
        tie_word_embeddings=False,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.moe_intermediate_size = moe_intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.rope_theta = rope_theta
        self.rope_scaling = rope_scaling
        self.use_cache = use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)


class LLaDAMoEAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(config.hidden_size, config.hidden_size, bias=False) for _ in range(4)
        )

    def forward(self, x, attention_mask, angle):
        q, k, v = (split(projection(x), self.heads) for projection in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(attend(rotate(q, angle), rotate(k, angle), v, attention_mask))


class LLaDAMoEDecoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn = LLaDAMoEAttention(config)
        self.mlp = Experts(config, nn.Linear(config.hidden_size, config.num_experts, bias=False), shared=False)
        self.input_layernorm = RMSNorm(config.hidden_size)
        self.post_attention_layernorm = RMSNorm(config.hidden_size)

    def forward(self, hidden_states, attention_mask=None, position_embeddings=None):
        x = hidden_states + self.self_attn(self.input_layernorm(hidden_states), attention_mask, position_embeddings)
        return (x + self.mlp(self.post_attention_layernorm(x)),)


class LLaDAMoEPreTrainedModel(PreTrainedModel):
    config_class = LLaDAMoEConfig
    base_model_prefix = "model"

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.data.normal_(mean=0.0, std=0.02)


class LLaDAMoEModel(LLaDAMoEPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(LLaDAMoEDecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size)
        self.rotary_emb = RotaryEmbedding(config)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, position_ids=None):
        x = self.embed_tokens(input_ids)
        if attention_mask is not None:
            attention_mask = attention_mask.bool()[:, None, None, :]
        angle = self.rotary_emb(x.shape[1], x.device)
        for layer in self.layers:
            x = layer(x, attention_mask=attention_mask, position_embeddings=angle)[0]
        return MoeModelOutputWithPast(last_hidden_state=self.norm(x))


class LLaDAMoEModelLM(LLaDAMoEPreTrainedModel):
    _tied_weights_keys = ["lm_head.weight"]  # noqa: RUF012 (as published)

    def __init__(self, config):
        super().__init__(config)
        self.model = LLaDAMoEModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, labels=None, **kwargs):
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)
        return MoeCausalLMOutputWithPast(logits=self.lm_head(outputs[0]))
