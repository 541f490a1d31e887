"""`dllm-kernels generate`: prompts in, completions out, and the text as it is unmasked."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text
from torch import Tensor

from dllm_kernels import generate, noise

from ..errors import UserError, visible
from ..models.codec import decode
from ..models.self_tests import check_rollout
from ..tasks import Example
from ..tasks.files import read_rows, text_of
from ..train.setup import Setup

UNDECIDED = "░"


def read_prompts(file: Path) -> list[tuple[str, str]]:
    """The "prompt" of each line of a JSONL file, and the "suffix" where it has one. Raises UserError naming file and line."""
    rows = read_rows(str(file))
    return [(text_of(row, "prompt", where), text_of(row, "suffix", where) if "suffix" in row else "") for where, row in rows]


def write_completions(setup: Setup, prompts: Sequence[tuple[str, str]], out: Path | None, console: Console) -> None:
    """Complete the prompts, up to their suffixes; print the texts, or write them with their history as JSONL."""
    tokenizer, facts = setup.loaded.tokenizer, setup.facts
    examples = [Example(str(index), prompt, suffix=suffix) for index, (prompt, suffix) in enumerate(prompts)]
    if any(suffix for _, suffix in prompts) and not setup.codec.infills:
        check_rollout(setup.config.rollout, setup.loaded, setup.codec.length, infills=True)
        setup.codec.infills = True
    batch, members = setup.config.evaluation.batch, _times_before(prompts)
    lines = []
    with Live(console=console, transient=True) if console.is_terminal else _Silent() as live:
        for first in range(0, len(examples), batch):
            part = examples[first : first + batch]

            def show(step: int, completion_BL: Tensor, asked: Sequence[Example] = part) -> None:
                live.update(Text("\n".join(_unmasked(tokenizer, row, facts.mask_id) for row in completion_BL[: len(asked)])))

            rollout = generate(
                setup.model,
                [prompt.to(setup.ranks.device) for prompt in setup.codec.asked(part)],
                seed=setup.config.seed,
                sequence_ids=noise.sequence_ids(
                    [f"generate/{e.prompt}" + (f"\0{e.suffix}" if e.suffix else "") for e in part],
                    members=members[first : first + batch],
                ).to(setup.ranks.device),
                on_step=show if console.is_terminal else None,
                **setup.generate_options(),
            )
            texts = decode(tokenizer, rollout.completion_BL.cpu(), eos_id=facts.eos_id)
            for index, example in enumerate(part):
                lines.append(
                    {
                        "prompt": example.prompt,
                        **({"suffix": example.suffix} if example.suffix else {}),
                        "completion": texts[index],
                        "failed": bool(rollout.failed_B[index]),
                        "model_calls": int(rollout.steps_B[index]),
                        "commit_step": rollout.commit_step_BL[index].tolist(),
                        "commit_logp": [round(value, 4) for value in rollout.commit_logp_BL[index].tolist()],
                        "decoding": rollout.settings,
                    }
                )
    if not setup.ranks.is_first:
        return
    for line in lines:
        print(visible(line["completion"]))
    if out is not None:
        try:
            out.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        except OSError as error:
            raise UserError(f"--out: {out} cannot be written ({error.strerror})") from error


def _times_before(prompts: Sequence[tuple[str, str]]) -> list[int]:
    """How often each came already: what is asked twice is answered twice, and else as if it were alone."""
    seen: Counter[tuple[str, str]] = Counter()
    times = []
    for prompt in prompts:
        times.append(seen[prompt])
        seen[prompt] += 1
    return times


class _Silent:
    """Stands in for the live display where there is no terminal."""

    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, _: Text) -> None:
        pass


def _unmasked(tokenizer: object, ids_L: Tensor, mask_id: int) -> str:
    """The text so far, a shade for each token that is not decided."""
    pieces = []
    for token in ids_L.tolist():
        pieces.append(UNDECIDED if token == mask_id else tokenizer.decode([token]))  # type: ignore[attr-defined]
    return "".join(pieces)
