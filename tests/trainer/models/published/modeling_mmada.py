"""MMaDA: LLaDA with image tokens after the text in its vocabulary."""

from transformers import PretrainedConfig

from .modeling_llada import LLaDAModelLM


class MMadaConfig(PretrainedConfig):
    model_type = "mmada"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        for key in ("vocab_size", "llm_vocab_size", "codebook_size", "num_vq_tokens", "new_vocab_size"):
            if key in kwargs:
                setattr(self, key, kwargs[key])


class MMadaModelLM(LLaDAModelLM):
    config_class = MMadaConfig

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
