"""The demo's model: EuroBERT (Llama without the causal mask, LLaDA's architecture) at toy size; checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    EuroBertConfig,
    EuroBertForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from trainer.config import ModelConfig
from trainer.errors import UserError, first_line

transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def build_model(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> EuroBertForMaskedLM:
    """Random weights, a function of (config, seed) alone; the global random state is left as it was."""
    settings = EuroBertConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        mask_token_id=tokenizer.mask_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return EuroBertForMaskedLM(settings).eval()


def parameter_count(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def load_checkpoint(directory: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model (eval mode, fp32) and tokenizer of a checkpoint folder; only local files are read."""
    if not (directory / "config.json").is_file():
        raise UserError(f"checkpoint: {directory} holds no config.json; give the folder of a saved model")
    try:
        with torch.random.fork_rng(devices=[]):
            model = AutoModelForMaskedLM.from_pretrained(directory, local_files_only=True, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # whatever the libraries raise over a damaged file
        raise UserError(
            f"checkpoint: {directory} cannot be loaded ({first_line(error)}); give the folder of a whole saved model"
        ) from error
    return model.eval(), tokenizer
