"""Checkpoint folders as published, at toy size: remote code, configuration, tokenizer and random weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from dllm_trainer.models import compat
from dllm_trainer.models.loading import _model_class
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerFast

CODE = Path(__file__).parent / "published"
TEXT = 50  # ids below are characters
PAD, EOS, UNK, MASK = 56, 57, 58, 59
VOCABULARY = 64  # rows of the head, more than the tokenizer has tokens


@dataclass(frozen=True)
class Published:
    """`config` is what the published config.json holds beside sizes."""

    family: str
    architecture: str
    files: tuple[str, ...]
    config: dict[str, Any]
    auto_config: str = ""  # of auto_map; none for what transformers knows itself
    auto_class: str = "AutoModelForCausalLM"
    other_classes: tuple[tuple[str, str], ...] = ()  # what else auto_map names
    mask_in_tokenizer: bool = True


IDS = {"eos_token_id": EOS, "pad_token_id": PAD, "vocab_size": VOCABULARY}
MASKED = IDS | {"mask_token_id": MASK}
NATIVE = MASKED | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "bos_token_id": None,
}
SHARED = ("layers.py",)
LLADA_FILES = ("modeling_llada.py", "configuration_llada.py", *SHARED)
LLADA = {"model_type": "llada", "use_cache": False, "weight_tying": False}

PUBLISHED = {
    "llada": Published(
        "llada",
        "LLaDAModelLM",
        LLADA_FILES,
        MASKED | LLADA,
        "configuration_llada.LLaDAConfig",
        "AutoModel",
        mask_in_tokenizer=False,
    ),
    "llada_tied": Published(
        "llada",
        "LLaDAModelLM",
        LLADA_FILES,
        MASKED | LLADA | {"weight_tying": True},
        "configuration_llada.LLaDAConfig",
        "AutoModel",
    ),
    "mmada": Published(
        "mmada",
        "MMadaModelLM",
        ("modeling_mmada.py", *LLADA_FILES),
        MASKED
        | LLADA
        | {"model_type": "mmada", "llm_vocab_size": 60, "new_vocab_size": VOCABULARY, "embedding_size": VOCABULARY}
        | {"d_model": 32, "n_heads": 2, "n_kv_heads": 2, "n_layers": 2, "mlp_hidden_size": 48, "rope_theta": 5e5},
        "modeling_mmada.MMadaConfig",
    ),
    "dream": Published(
        "dream",
        "DreamModel",
        ("modeling_dream.py", *SHARED),
        MASKED | {"model_type": "Dream", "rope_scaling": None, "rope_theta": 1e6, "use_cache": True},
        "modeling_dream.DreamConfig",
        "AutoModel",
    ),
    "dream_tied": Published(
        "dream",
        "DreamModel",
        ("modeling_dream.py", *SHARED),
        MASKED | {"model_type": "Dream", "rope_scaling": None, "rope_theta": 1e6, "tie_word_embeddings": True},
        "modeling_dream.DreamConfig",
        "AutoModel",
    ),
    "sdar": Published(
        "sdar",
        "SDARForCausalLM",
        ("modeling_sdar.py", *SHARED),
        MASKED | {"model_type": "sdar", "rope_scaling": None, "rope_theta": 1e6, "block_size": 4},
        "modeling_sdar.SDARConfig",
        other_classes=(("AutoModel", "modeling_sdar.SDARModel"),),
    ),
    "llada2": Published(
        "llada2",
        "LLaDA2MoeModelLM",
        ("modeling_llada2_moe.py", *SHARED),
        {"model_type": "llada2_moe", "rope_scaling": None, "rope_theta": 6e5, "vocab_size": VOCABULARY, "pad_token_id": PAD},
        "modeling_llada2_moe.LLaDA2MoeConfig",
        other_classes=(("AutoModel", "modeling_llada2_moe.LLaDA2MoeModel"),),
    ),
    "llada_moe": Published(
        "llada-moe",
        "LLaDAMoEModelLM",
        ("modeling_lladamoe.py", *SHARED),
        IDS | {"model_type": "llada", "rope_scaling": None, "rope_theta": 5e4, "num_experts": 4},
        "modeling_lladamoe.LLaDAMoEConfig",
        other_classes=(("AutoModel", "modeling_lladamoe.LLaDAMoEModelLM"),),
    ),
    "modernbert": Published(
        "modernbert",
        "ModernBertForMaskedLM",
        (),
        NATIVE
        | {"model_type": "modernbert", "cls_token_id": UNK, "sep_token_id": EOS, "decoder_bias": True, "local_attention": 8},
    ),
    "eurobert": Published("eurobert", "EuroBertForMaskedLM", (), NATIVE | {"model_type": "eurobert", "num_key_value_heads": 2}),
}


TIED = {"modernbert": "decoder.weight", "dream_tied": "lm_head.weight"}  # published under the embedding's name alone


def make_tokenizer(*, mask: bool) -> PreTrainedTokenizerFast:
    """Characters, with the mask token among the special ones, or only as an added token that nobody calls the
    mask (LLaDA).
    """
    special = {PAD: "[PAD]", EOS: "[EOS]", UNK: "[UNK]"}
    vocabulary = {special.get(i, chr(48 + i) if i < TEXT else f"<{i}>"): i for i in range(MASK)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken("<|mdm_mask|>", special=True)])
    names = {"pad_token": "[PAD]", "eos_token": "[EOS]", "unk_token": "[UNK]"} | ({"mask_token": "<|mdm_mask|>"} if mask else {})
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def write(kind: str, folder: Path, *, seed: int = 0, scale: float = 0.3, **config: Any) -> PreTrainedModel:
    """Fill `folder`; returns the model with its weights, built and not loaded, in eval mode and fp64."""
    published = PUBLISHED[kind]
    folder.mkdir(parents=True, exist_ok=True)
    for name in published.files:
        shutil.copy(CODE / name, folder)
    settings = published.config | {"architectures": [published.architecture]} | config
    if published.auto_config:
        module = published.files[0].removesuffix(".py")
        settings["auto_map"] = {
            "AutoConfig": published.auto_config,
            **dict(published.other_classes),
            published.auto_class: f"{module}.{published.architecture}",
        }
    (folder / "config.json").write_text(json.dumps(settings))
    make_tokenizer(mask=published.mask_in_tokenizer).save_pretrained(folder)
    with compat.removed_names():
        loaded_config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = _model_class(loaded_config, str(folder), None, trusted=True)(loaded_config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale
    if alias := TIED.get(kind):
        model.tie_weights()
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != alias}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return model
