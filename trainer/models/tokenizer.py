"""A character tokenizer for models built from scratch, saved and loaded like any Hugging Face tokenizer."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = {"unk_token": "[UNK]", "mask_token": "[MASK]", "pad_token": "[PAD]", "eos_token": "[EOS]"}


def make_tokenizer(alphabet: str) -> PreTrainedTokenizerFast:
    """Ids are positions in the alphabet, followed by the special tokens."""
    vocabulary = {token: index for index, token in enumerate([*alphabet, *SPECIAL.values()])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL["unk_token"]))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **SPECIAL)
