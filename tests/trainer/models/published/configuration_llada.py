"""LLaDA's configuration keys, OLMo's names."""

from transformers import PretrainedConfig


class LLaDAConfig(PretrainedConfig):
    model_type = "llada"

    def __init__(
        self,
        d_model=32,
        n_heads=2,
        n_kv_heads=2,
        n_layers=2,
        mlp_hidden_size=48,
        vocab_size=64,
        embedding_size=64,
        rope_theta=500000.0,
        weight_tying=False,
        mask_token_id=59,
        **kwargs,
    ):
        self.d_model = d_model
        self.n_heads = n_heads
        self.n_kv_heads = n_kv_heads
        self.n_layers = n_layers
        self.mlp_hidden_size = mlp_hidden_size
        self.vocab_size = vocab_size
        self.embedding_size = embedding_size
        self.rope_theta = rope_theta
        self.weight_tying = weight_tying
        self.mask_token_id = mask_token_id
        super().__init__(**kwargs)
