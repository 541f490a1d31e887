"""A character tokenizer for Sudoku, saved and loaded as an ordinary Hugging Face tokenizer, and its digits.

A sequence is the 16 cells of the puzzle (0 is empty), a separator, and the 16 cells of the answer.
"""

from __future__ import annotations

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

SEPARATOR = "="
CHARACTERS = ["0", "1", "2", "3", "4", SEPARATOR]
SPECIAL = {"unk_token": "[UNK]", "mask_token": "[MASK]", "pad_token": "[PAD]", "eos_token": "[EOS]"}


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: index for index, token in enumerate([*CHARACTERS, *SPECIAL.values()])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL["unk_token"]))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **SPECIAL)


class Codec:
    """Between digit grids and token ids; `digits` gives -1 for an id that is no digit, so the rules call it wrong."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        ids = tokenizer.convert_tokens_to_ids(CHARACTERS)
        unknown = [c for c, i in zip(CHARACTERS, ids, strict=True) if i is None or i == tokenizer.unk_token_id]
        if unknown:
            raise ValueError(f"tokenizer must know {', '.join(CHARACTERS)}; it lacks {', '.join(unknown)}")
        self._id_of_digit = torch.tensor(ids[:5])
        self._digit_of_id = torch.full((len(tokenizer),), -1)
        self._digit_of_id[self._id_of_digit] = torch.arange(5)
        self._separator = int(ids[5])
        self.mask_id = int(tokenizer.mask_token_id)

    def prompt_ids(self, puzzles_N16: Tensor) -> Tensor:
        """int64 `[N, 17]`: the puzzle and the separator."""
        separator = torch.full((len(puzzles_N16), 1), self._separator)
        return torch.cat([self._id_of_digit[puzzles_N16], separator], dim=1)

    def answer_ids(self, grids_N16: Tensor) -> Tensor:
        return self._id_of_digit[grids_N16]

    def digits(self, ids: Tensor) -> Tensor:
        return self._digit_of_id[ids]
