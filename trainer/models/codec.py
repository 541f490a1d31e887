"""Between texts and ids: prompts of any length, answers and completions of a fixed one."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dllm_kernels.model.headless import context_length

from ..config import PromptConfig
from ..errors import UserError
from ..tasks import Example, Task
from .loading import Loaded

_LOOKED_AT = 8  # longest texts of each set


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
        self._context = context_length(loaded.model)
        # whether completions fill the middle of a text, not its end
        self.infills = any(example.suffix for part in (task.train, *task.tests.values()) for example in part)
        if not config.chat_template:
            self._tokenizer.chat_template = None

    def prompts(self, examples: Sequence[Example]) -> list[Tensor]:
        """int64 `[P_b]` each. Raises UserError for a prompt that is empty, holds the mask token or is too
        long.
        """
        encoded = encode(self._tokenizer, examples, **self._options)
        for example, ids in zip(examples, encoded, strict=True):
            what = f"the prompt of example {example.id}"
            if not ids:
                raise UserError(f"{what} is empty")
            if self._mask_id in ids:
                raise UserError(f"{what} holds the mask token, which marks what is to be written")
            more = len(self._suffix(example)) if self.infills else 0
            if self._context is not None and len(ids) + self.length + more > self._context:
                raise UserError(
                    f"{what} has {len(ids) + more} tokens, with a completion of {self.length} more than the model's context of "
                    f"{self._context}; nothing is ever cut"
                )
        return [torch.tensor(ids) for ids in encoded]

    def asked(self, examples: Sequence[Example]) -> list[Tensor]:
        """What `generate` is given: prompts, or, where completions fill the middle, canvases. Raises as `prompts`."""
        prompts = self.prompts(examples)
        if not self.infills:
            return prompts
        middle = torch.full((self.length,), self._mask_id)
        suffixes = self.suffixes(examples) or []
        return [torch.cat([p, middle, s]) for p, s in zip(prompts, suffixes, strict=True)]

    def suffixes(self, examples: Sequence[Example]) -> list[Tensor] | None:
        """int64 `[Q_b]` each, which follow the completions; None where nothing does."""
        if not self.infills:
            return None
        return [torch.tensor(self._suffix(example), dtype=torch.int64) for example in examples]

    def _suffix(self, example: Example) -> list[int]:
        ids = _ids(self._tokenizer, example.suffix, example, "suffix") if example.suffix else []
        if self._mask_id in ids:
            raise UserError(f"the suffix of example {example.id} holds the mask token, which marks what is to be written")
        return ids

    def answers(self, examples: Sequence[Example]) -> Tensor:
        """int64 `[B, L]`: the demonstrations, filled up with EOS."""
        encoded = encode_answers(self._tokenizer, examples, length=self.length, eos_id=self._eos)
        for example, ids in zip(examples, encoded, strict=True):
            if self._mask_id in ids:
                raise UserError(f"the answer of example {example.id} holds the mask token, which marks what is to be written")
        return torch.tensor(encoded)

    def look_ahead(self, task: Task, *, shown: bool) -> None:
        """Raises UserError for what training would stumble over hours later: the longest texts, what is missing.

        `shown`: whether there is supervised training.
        """
        levels = [task.train] if task.curriculum is None else task.curriculum.levels
        for examples in (*levels, *task.tests.values()):
            self.prompts(heapq.nlargest(_LOOKED_AT, examples, key=lambda example: len(example.prompt) + len(example.suffix)))
            self.prompts(heapq.nsmallest(1, examples, key=lambda example: len(example.prompt)))
        if shown:
            self.answers([example for example in task.demonstrations if not example.answer][:1])
            self.answers(heapq.nlargest(_LOOKED_AT, task.demonstrations, key=lambda example: len(example.answer)))

    def texts(self, completions_BL: Tensor) -> list[str]:
        return decode(self._tokenizer, completions_BL.cpu(), eos_id=self._eos)


def joined(
    prompts: Sequence[Tensor], answers_BL: Tensor, pad_id: int, suffixes: Sequence[Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Prompts, answers and what follows them, padded on the right: ids `[B, S]`, mask of answers, mask of real tokens or None."""
    suffixes = [answers_BL.new_zeros(0)] * len(prompts) if suffixes is None else suffixes
    rows = [torch.cat(parts) for parts in zip(prompts, answers_BL, suffixes, strict=True)]
    ids_BS = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id)
    first_B1 = torch.tensor([len(prompt) for prompt in prompts])[:, None]
    place_S = torch.arange(ids_BS.shape[1])
    end_B1 = first_B1 + answers_BL.shape[1]
    real_BS = place_S < end_B1 + torch.tensor([len(suffix) for suffix in suffixes])[:, None]
    return ids_BS, (place_S >= first_B1) & (place_S < end_B1), None if bool(real_BS.all()) else real_BS


def encode(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    system: str = "",
    shots: Sequence[Example] = (),
    longest: int | None = None,
) -> list[list[int]]:
    """Token ids of each prompt: `system`, the solved `shots`, and the example's prompt.

    With a chat template they become turns of a chat, `system` at the start of the first; without one, plain
    text separated by blank lines. Raises UserError for a prompt of more than `longest` tokens (nothing is
    ever cut) and for characters that the tokenizer does not know.

    Example:
        >>> from dllm_trainer.models.tokenizer import make_tokenizer
        >>> encode(make_tokenizer("01234="), [Example("0", "1230=")])
        [[1, 2, 3, 0, 5]]
    """
    encoded = []
    for example in examples:
        if tokenizer.chat_template is not None:
            text = _chat(tokenizer, _turns(example, system, shots), add_generation_prompt=True)
        else:
            solved = [f"{shot.prompt}\n{shot.answer}" for shot in shots]
            text = "\n\n".join([*([system] if system else []), *solved, example.prompt])
        ids = _ids(tokenizer, text, example, "prompt")
        if longest is not None and len(ids) > longest:
            raise UserError(f"the prompt of example {example.id} has {len(ids)} tokens, more than {longest}; nothing is ever cut")
        encoded.append(ids)
    return encoded


def encode_answers(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], *, length: int, eos_id: int | None = None
) -> list[list[int]]:
    """Token ids of each demonstration: answer, the chat template's end of turn, `eos_id` up to `length`.

    An answer may fill the length without an EOS; a longer one raises UserError, as does an empty one, and one that goes on after
    an EOS of its own, where completions are read no further.
    """
    end = tokenizer.eos_token_id if eos_id is None else eos_id
    encoded = []
    for example in examples:
        if not example.answer:
            raise UserError(f"example {example.id} has no answer to be shown in supervised training")
        ids = _ids(tokenizer, example.answer + _end_of_turn(tokenizer, example), example, "answer")
        if end in ids and set(_after(end, _ids(tokenizer, example.answer, example, "answer"))) - {end}:
            raise UserError(f"the answer of example {example.id} goes on after the token that ends a text ({end})")
        if len(ids) > length:
            raise UserError(f"the answer of example {example.id} has {len(ids)} tokens, more than the completion's {length}")
        if len(ids) < length and end is None:
            raise UserError("the tokenizer has no EOS token to fill the completions with; give model.facts.eos_id")
        encoded.append(ids + [end] * (length - len(ids)))
    return encoded


def _after(token: int | None, ids: list[int]) -> list[int]:
    return ids[ids.index(token) :] if token in ids else []


def decode(tokenizer: PreTrainedTokenizerBase, completions: Tensor, *, eos_id: int | None = None) -> list[str]:
    """Texts of completions `[B, L]`: up to the first EOS, without special tokens."""
    end = tokenizer.eos_token_id if eos_id is None else eos_id
    rows = [row[: row.index(end)] if end in row else row for row in completions.tolist()]
    return list(tokenizer.batch_decode(rows, skip_special_tokens=True))


def _turns(example: Example, system: str, shots: Sequence[Example]) -> list[dict[str, str]]:
    turns = []
    for shot in shots:
        turns += [{"role": "user", "content": shot.prompt}, {"role": "assistant", "content": shot.answer}]
    turns.append({"role": "user", "content": example.prompt})
    if system:
        turns[0]["content"] = f"{system}\n\n{turns[0]['content']}"
    return turns


def _chat(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], **options: Any) -> str:
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, **options))
    except Exception as error:  # a template may raise anything
        raise UserError(f"the tokenizer's chat template failed: {' '.join(str(error).split())}") from error


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, example: Example) -> str:
    """What the chat template writes after an answer, without trailing white space."""
    if tokenizer.chat_template is None:
        return ""
    turns = [*_turns(example, "", ()), {"role": "assistant", "content": example.answer}]
    return _chat(tokenizer, turns).rpartition(example.answer.strip())[2].strip()


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, example: Example, what: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
        known = tokenizer.get_vocab()
        unknown = sorted({character for character in text if character not in known}) or [text]
        raise UserError(f"the {what} of example {example.id} has what the tokenizer does not know: {unknown[0]!r}")
    return ids
