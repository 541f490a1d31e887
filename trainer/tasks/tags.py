"""The answer layout that tasks may ask for: reasoning and answer in tags."""

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
    """A demonstration in the layout of `TAGS`."""
    return f"<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n{answer}\n</answer>"


def final_answer(text: str) -> str | None:
    """The stripped content of the last closed `<answer>`; None if there is none or it is cut off."""
    found = _ANSWER.findall(text)
    return found[-1].strip() if found else None
