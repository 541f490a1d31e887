"""`dllm-kernels generate`: JSONL of any number of prompts, and on a terminal the text as it is unmasked."""

import io
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from dllm_trainer.cli import app
from dllm_trainer.commands import generate as generating
from dllm_trainer.commands.generate import UNDECIDED, read_prompts, write_completions
from dllm_trainer.config import load_config
from dllm_trainer.distributed import Ranks
from dllm_trainer.errors import UserError
from dllm_trainer.tasks import make_task
from dllm_trainer.train.run import prepare
from dllm_trainer.train.setup import Setup
from rich.console import Console
from typer.testing import CliRunner, Result

from dllm_kernels import generate

PROMPTS = ["1234341221434321=", "0103020400103000=", "12="]


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["generate", *map(str, arguments)])


def test_prompts_of_arguments_and_of_a_file_are_completed_in_their_order(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS[1:]))
    options = ["--checkpoint", finished / "checkpoint", "--prompt", PROMPTS[0], "--input", tmp_path / "in.jsonl"]
    result = call(*options, "--out", tmp_path / "out.jsonl")
    assert result.exit_code == 0, result.output
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in written] == PROMPTS
    assert result.stdout.splitlines() == [line["completion"] for line in written]
    for line in written:
        assert 0 < len(line["completion"]) <= 16
        assert sorted(set(line["commit_step"])) == list(range(line["model_calls"])) == list(range(4))
        assert len(line["commit_logp"]) == 16
        assert all(logp < 0 for logp in line["commit_logp"])
        assert line["failed"] is False
        assert (line["decoding"]["temperature"], line["decoding"]["steps"]) == (0.0, 4)


def test_a_completion_does_not_depend_on_what_is_completed_beside_it(finished: Path, tmp_path: Path) -> None:
    def completions(*keys: str) -> list[str]:
        asked = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
        result = call("--checkpoint", finished / "checkpoint", *asked, *keys)
        assert result.exit_code == 0, result.output
        return result.stdout.splitlines()

    assert completions() == completions("evaluation.batch=1")
    drawn = completions("rollout.temperature=1.0")
    assert drawn != completions()
    assert drawn == completions("rollout.temperature=1.0", "evaluation.batch=1")
    assert drawn != completions("rollout.temperature=1.0", "seed=1")


def test_what_follows_a_prompt_is_seen_and_left_as_it_is(finished: Path, setup: Setup, tmp_path: Path) -> None:
    """A suffix of an option or of a file, beside prompts without one, on a model that was trained without."""
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": "34=", "suffix": "4321"}) + "\n")
    asked = ["--prompt", "12=", "--prompt", "1=", "--suffix", "3412", "--input", tmp_path / "in.jsonl"]
    result = call("--checkpoint", finished / "checkpoint", *asked, "--out", tmp_path / "out.jsonl", "rollout.block_length=8")
    assert result.exit_code == 0, result.output
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(line["prompt"], line.get("suffix")) for line in written] == [("12=", "3412"), ("1=", None), ("34=", "4321")]
    code, mask = setup.loaded.tokenizer, setup.facts.mask_id
    texts = [("12=", "3412"), ("1=", ""), ("34=", "4321")]
    ids = [[code(text, add_special_tokens=False)["input_ids"] if text else [] for text in pair] for pair in texts]
    canvases = [torch.tensor([*prompt, *[mask] * 16, *suffix]) for prompt, suffix in ids]
    rollout = generate(
        setup.model, canvases, length=None, steps=2, block_length=8, mask_id=mask, suppress=setup.loaded.suppressed
    )
    assert [line["commit_step"] for line in written] == rollout.commit_step_BL.tolist()
    assert [line["completion"] for line in written] == setup.codec.texts(rollout.completion_BL)
    refused = call("--checkpoint", finished / "checkpoint", "--suffix", "3412")
    assert "--suffix must come after the --prompt that it belongs to, got 1 of them" in refused.output


def test_what_is_asked_twice_is_drawn_twice(finished: Path) -> None:
    asked = ["--prompt", PROMPTS[0]] * 3
    result = call("--checkpoint", finished / "checkpoint", *asked, "rollout.temperature=1.0", "evaluation.batch=2")
    assert len(set(result.stdout.splitlines())) == 3


@pytest.fixture(scope="module")
def setup(finished: Path) -> Setup:
    keys = [f"model.checkpoint={json.dumps(str(finished / 'checkpoint'))}", "rollout.temperature=0", "rl.updates=0"]
    config = load_config(finished / "config.yaml", keys)
    return prepare(config, make_task(config.task, seed=0), Ranks())


def test_a_terminal_shows_every_step_with_fewer_undecided_places(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []

    class Screen(generating.Live):
        def update(self, text: Any, *arguments: Any, **options: Any) -> None:
            shown.append(text.plain)
            super().update(text, *arguments, **options)

    monkeypatch.setattr(generating, "Live", Screen)
    monkeypatch.setenv("TERM", "xterm")  # on a dumb one nothing is drawn in place
    screen = io.StringIO()
    write_completions(setup, [(prompt, "") for prompt in PROMPTS], None, Console(file=screen, force_terminal=True, width=80))
    undecided = [[line.count(UNDECIDED) for line in text.split("\n")] for text in shown]
    assert undecided == [[12] * 3, [8] * 3, [4] * 3, [0] * 3]
    for before, after in itertools.pairwise(shown):
        plain = [re.sub(r"\[\w+\]", "#", text) for text in (before, after)]
        pairs = [pair for lines in zip(*(text.split("\n") for text in plain), strict=True) for pair in zip(*lines, strict=True)]
        assert all(b in (UNDECIDED, a) for b, a in pairs), "a decided place changed"
    assert "\x1b[" in screen.getvalue(), "it is drawn in place"
    shown.clear()
    write_completions(setup, [(prompt, "") for prompt in PROMPTS], None, Console(file=io.StringIO(), force_terminal=False))
    assert not shown


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "in.jsonl: cannot be read (No such file or directory)"),
        (b"", "in.jsonl: there is no row in it"),
        (b'{"prompt": "1="}\n{"prompt": ', "in.jsonl:2: not JSON (Expecting value at column 12)"),
        (b'["1="]\n', "in.jsonl:1: a line must hold a JSON object, got list"),
        (b'{"text": "1="}\n', "in.jsonl:1: there is no column 'prompt'; there are 'text'"),
        (b'{"prompt": null}\n', "in.jsonl:1: column 'prompt' must be a text, got NoneType"),
        (b'{"prompt": "\xff"}\n', "in.jsonl:1: not UTF-8 text (byte 13 is 0xff)"),
    ],
)
def test_a_file_of_prompts_that_is_wrong_is_named_by_its_line(tmp_path: Path, content: bytes | None, said: str) -> None:
    if content is not None:
        (tmp_path / "in.jsonl").write_bytes(content)
    result = call("--checkpoint", "/nonexistent", "--input", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl")
    assert result.exit_code == 2
    assert said in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert not (tmp_path / "out.jsonl").exists()
    with pytest.raises(UserError):
        read_prompts(tmp_path / "in.jsonl")


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        (["12x="], "the prompt of example 0 has what the tokenizer does not know: 'x'"),
        (["12=", "1[MASK]="], "the prompt of example 1 holds the mask token"),
        (["1" * 60], "the prompt of example 0 has 60 tokens, with a completion of 16 more than the model's context of 64"),
        ([""], "the prompt of example 0 is empty"),
    ],
)
def test_a_prompt_that_cannot_be_completed_is_a_sentence(finished: Path, prompts: list[str], said: str) -> None:
    asked = [part for prompt in prompts for part in ("--prompt", prompt)]
    result = call("--checkpoint", finished / "checkpoint", *asked)
    assert result.exit_code == 2, (result.output, result.exception)
    assert said in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_a_sentence_is_said_where_the_result_cannot_be_written(finished: Path) -> None:
    result = call("--checkpoint", finished / "checkpoint", "--prompt", PROMPTS[0], "--out", "/dev/null/out.jsonl")
    assert result.exit_code == 2
    assert "--out: /dev/null/out.jsonl cannot be written (Not a directory)" in result.output
    assert torch.get_num_threads() == 1
