"""samples.jsonl: what a run answered to a few fixed examples at every evaluation, and how; shown in report.md."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import visible

NAME = "samples.jsonl"
_SHOWN = 2  # of the solved and of the failed examples, in the report
_LONGEST = 400  # characters of a text in the report

Sample = dict[str, Any]
_FIELDS = {"phase", "step", "set", "id", "prompt", "answer", "completion", "correct", "reward", "tokens", "steps"}


def read(file: Path) -> list[Sample]:
    """The records of a file; lines that are damaged are left out."""
    found = []
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] if file.is_file() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and record.keys() >= _FIELDS and isinstance(record["step"], int):
            found.append(record)
    return found


def as_text(samples: Iterable[Sample]) -> str:
    """For TensorBoard: one block of Markdown."""
    return "\n\n".join("    " + "\n    ".join(_lines(sample)) for sample in samples)


def chosen(samples: Sequence[Sample]) -> list[Sample]:
    """Solved and failed examples of the last evaluation, each once: a look in between may have been at the same step."""
    last = {(s["set"], s["id"]): s for s in samples if (s["phase"], s["step"]) == (samples[-1]["phase"], samples[-1]["step"])}
    solved, failed = ([s for s in last.values() if bool(s["correct"]) is right][:_SHOWN] for right in (True, False))
    return [*solved, *failed]


def section(samples: Sequence[Sample]) -> list[str]:
    """Lines of report.md; none without samples."""
    if not samples:
        return []
    lines = ["## Examples", "", "Greedy answers of the last model; the number above each token is the step that wrote it.", ""]
    for sample in chosen(samples):
        lines += ["```", *_lines(sample), "```", ""]
    return [*lines, f"![order of unmasking](unmasking.png)\n\nMore of them, at every evaluation: `{NAME}`.", ""]


def _lines(sample: Sample) -> list[str]:
    reward = "" if sample["reward"] is None else f", reward {sample['reward']:g}"
    head = f"{'solved' if sample['correct'] else 'failed'}: example {sample['id']} of {sample['set']}{reward}"
    texts = {"prompt": sample["prompt"], "answer": sample["completion"], "shown in the data": sample["answer"]}
    lines = [head]
    for name, text in texts.items():
        if text:
            cut = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
            first, *rest = visible(cut).replace("```", "'''").split("\n")
            lines += [f"{name}: {first}", *(f"  {line}" for line in rest)]
    tokens, steps = _cells(sample)
    if len(tokens) <= 40:
        widths = [max(len(token), len(step)) for token, step in zip(tokens, steps, strict=True)]
        for row in (steps, tokens):
            lines.append("  " + " ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    return lines


def _cells(sample: Sample) -> tuple[list[str], list[str]]:
    tokens = [visible(token).replace("\n", "⏎").replace("`", "'") or "·" for token in sample["tokens"]]
    return tokens, [str(step + 1) for step in sample["steps"]]
