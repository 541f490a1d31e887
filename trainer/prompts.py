"""From texts to token ids and back: instructions, few-shot examples, the tokenizer's chat template, answers of one length."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trainer.errors import UserError
from trainer.tasks import Example

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

TAGS = """Think first, then answer, in this layout:
<reasoning>
your steps
</reasoning>
<answer>
the final answer alone
</answer>"""
_ANSWER = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)


def tagged(reasoning: str, answer: str) -> str:
    """A demonstration in the layout that `TAGS` asks for."""
    return f"<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n{answer}\n</answer>"


def final_answer(text: str) -> str | None:
    """What the last closed `<answer>` holds, stripped; None where there is none: one that was cut off is no answer."""
    found = _ANSWER.findall(text)
    return found[-1].strip() if found else None


def encode(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    system: str = "",
    shots: Sequence[Example] = (),
    longest: int | None = None,
) -> list[list[int]]:
    """Token ids of each prompt: `system`, the solved `shots`, and what the user says.

    A tokenizer with a chat template gets them as turns of a chat, `system` before the first; one without gets them as plain
    text with a blank line between them, and a prompt alone as it is. Raises UserError for a prompt of more than `longest`
    tokens, which would have to be cut, and for characters that the tokenizer does not know.

    Example:
        >>> from trainer.tokenizer import make_tokenizer
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
    """Token ids of each demonstration, with its end of turn where there is a chat template, then `eos_id` up to `length`.

    An answer may fill the length, with no room for an end; one that is longer raises UserError, as does an empty one.
    """
    end = tokenizer.eos_token_id if eos_id is None else eos_id
    encoded = []
    for example in examples:
        if not example.answer:
            raise UserError(f"example {example.id} has no answer to be shown in supervised training")
        ids = _ids(tokenizer, example.answer + _end_of_turn(tokenizer, example), example, "answer")
        if len(ids) > length:
            raise UserError(f"the answer of example {example.id} has {len(ids)} tokens, more than the completion's {length}")
        if len(ids) < length and end is None:
            raise UserError("the tokenizer has no EOS token to fill the completions with; give model.facts.eos_id")
        encoded.append(ids + [end] * (length - len(ids)))
    return encoded


def decode(tokenizer: PreTrainedTokenizerBase, completions: Tensor, *, eos_id: int | None = None) -> list[str]:
    """Texts of completions `[B, L]`: up to the first EOS, without special tokens."""
    end = tokenizer.eos_token_id if eos_id is None else eos_id
    rows = [row[: row.index(end)] if end in row else row for row in completions.tolist()]
    return list(tokenizer.batch_decode(rows, skip_special_tokens=True))


def left_padded(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor | None]:
    """Prompts `[B, P]` and their attention mask, bool `[B, P]`; no mask where all are equally long."""
    import torch

    longest = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    mask = torch.arange(longest) >= longest - lengths[:, None]
    return ids, None if bool(mask.all()) else mask


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
    except Exception as error:  # a template may raise what it likes
        raise UserError(f"the tokenizer's chat template failed: {' '.join(str(error).split())}") from error


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, example: Example) -> str:
    """What the chat template writes after an answer, without the white space before the next turn."""
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
