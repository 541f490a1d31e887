"""The layout of answers that a task may ask for: reasoning and the answer in tags."""

from __future__ import annotations

import re

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
    """What the last closed `<answer>` holds, stripped; None where there is none: one that was cut off is no
    answer.
    """
    found = _ANSWER.findall(text)
    return found[-1].strip() if found else None
