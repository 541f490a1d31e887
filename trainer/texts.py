"""Between a task's texts and a model's ids: prompts of any length, answers and completions of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.config import PromptConfig
from trainer.errors import UserError
from trainer.models import Loaded
from trainer.prompts import decode, encode, encode_answers
from trainer.tasks import Example, Task

_CONTEXT = ("max_position_embeddings", "max_sequence_length")  # as `generate` looks for it


class Codec:
    """`length` is L, the tokens of a completion."""

    def __init__(self, loaded: Loaded, task: Task, config: PromptConfig, length: int | None):
        self.length = length or task.completion_length
        self._tokenizer, self._eos = loaded.tokenizer, loaded.facts.eos_id
        if config.few_shot > len(task.train):
            raise UserError(f"prompt.few_shot must be at most the {len(task.train)} training examples, got {config.few_shot}")
        system = task.system if config.instructions else ""
        self._options: dict[str, Any] = {"system": system, "shots": task.train[: config.few_shot], "longest": config.max_length}
        self._mask_id = loaded.facts.mask_id
        stated = loaded.model.config.get_text_config()
        self._context = next((getattr(stated, name) for name in _CONTEXT if getattr(stated, name, None)), None)
        if not config.chat_template:
            self._tokenizer.chat_template = None

    def prompts(self, examples: Sequence[Example]) -> list[Tensor]:
        """int64 `[P_b]` each. Raises UserError for one that is empty, holds the mask token, or leaves a completion no room."""
        encoded = encode(self._tokenizer, examples, **self._options)
        for example, ids in zip(examples, encoded, strict=True):
            what = f"the prompt of example {example.id}"
            if not ids:
                raise UserError(f"{what} is empty")
            if self._mask_id in ids:
                raise UserError(f"{what} holds the mask token, which marks what is to be written")
            if self._context is not None and len(ids) + self.length > self._context:
                raise UserError(
                    f"{what} has {len(ids)} tokens, with a completion of {self.length} more than the model's context of "
                    f"{self._context}; nothing is ever cut"
                )
        return [torch.tensor(ids) for ids in encoded]

    def answers(self, examples: Sequence[Example]) -> Tensor:
        """int64 `[B, L]`: the demonstrations, filled up with EOS."""
        return torch.tensor(encode_answers(self._tokenizer, examples, length=self.length, eos_id=self._eos))

    def texts(self, completions_BL: Tensor) -> list[str]:
        return decode(self._tokenizer, completions_BL.cpu(), eos_id=self._eos)


def joined(prompts: Sequence[Tensor], answers_BL: Tensor, pad_id: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Ids `[B, S]`, which of them are completion, and which are real (None: all): prompts and answers, padded on the right."""
    rows = [torch.cat([prompt, answer]) for prompt, answer in zip(prompts, answers_BL, strict=True)]
    ids_BS = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id)
    first_B1 = torch.tensor([len(prompt) for prompt in prompts])[:, None]
    place_S = torch.arange(ids_BS.shape[1])
    real_BS = place_S < first_B1 + answers_BL.shape[1]
    return ids_BS, real_BS & (place_S >= first_B1), None if bool(real_BS.all()) else real_BS
