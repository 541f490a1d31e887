"""Sizes of published models, for a plan without the hub: each is a Llama without the causal mask.

Figures are those of the published configurations. What else is true of a family is in `facts.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..facts import FAMILIES, Facts
from . import compat


@dataclass(frozen=True)
class Sizes:
    family: str  # of the table in facts.py
    hidden_size: int
    layers: int
    heads: int
    key_value_heads: int
    intermediate_size: int
    vocabulary: int
    idle: int = 0  # parameters of the experts that a token does not go through; the others are one wide layer

    def facts(self) -> Facts:
        row = next(row for row in FAMILIES if row.name == self.family)
        return Facts(**{"family": row.name, **row.facts, "attention_mask": "int"})

    def model(self) -> tuple[Any, Any]:
        """Class and configuration of transformers' EuroBERT of these sizes, which has the same matrices."""
        EuroBertConfig, EuroBertForMaskedLM = compat.eurobert()

        return EuroBertForMaskedLM, EuroBertConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            tie_word_embeddings=False,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
            mask_token_id=0,
        )


LLADA = Sizes("llada", 4096, 32, 32, 32, 12288, 126464)
DREAM = Sizes("dream", 3584, 28, 28, 4, 18944, 152064)

SDAR = Sizes("sdar", 4096, 36, 32, 8, 12288, 151936)
# 8 of 256 experts of 512 and one that is shared, in 19 of the 20 layers
LLADA2 = Sizes("llada2", 2048, 20, 16, 4, 9 * 512, 157184, idle=19 * 248 * 3 * 2048 * 512)

# ids of the hub in lower case
PUBLISHED = {
    "gsai-ml/llada-8b-base": LLADA,
    "gsai-ml/llada-8b-instruct": LLADA,
    "gsai-ml/llada-1.5": LLADA,
    "dream-org/dream-v0-base-7b": DREAM,
    "dream-org/dream-v0-instruct-7b": DREAM,
    "apple/diffucoder-7b-base": DREAM,
    "apple/diffucoder-7b-instruct": DREAM,
    "apple/diffucoder-7b-cpgrpo": DREAM,
    "jetlm/sdar-8b-chat": SDAR,
    "gen-verse/trado-8b-instruct": SDAR,
    "inclusionai/llada2.0-mini": LLADA2,
    "inclusionai/llada2.1-mini": LLADA2,
}
