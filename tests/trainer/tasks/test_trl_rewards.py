"""A reward of TRL's form trains here as it trains there: called by keyword, with the data's columns."""

import sys
from pathlib import Path

import pytest
from dllm_trainer.errors import UserError
from dllm_trainer.tasks import Example
from dllm_trainer.tasks.rewards import load_reward
from dllm_trainer.tasks.trl_rewards import as_reward

EXAMPLES = [Example("a", "1+1=", "", {"answer": "2", "level": 1}), Example("b", "1+2=", "3", {"level": 2})]

SOURCE = """
def theirs(prompts, completions, answer, level, **columns):
    assert set(columns) == {"id"}
    return [float(c == a) + n + len(p) for p, c, a, n in zip(prompts, completions, answer, level)]
def some(completions, prompts, level): return [float(n) for n in level]
def unscored(prompts, completions, **columns): return [1.0, None]
def ours(examples, completions): return [float(len(e.prompt)) for e in examples]
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "trl_style.py").write_text(SOURCE)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return "trl_style"


def test_the_form_is_chosen_by_the_signature(module: str) -> None:
    def values(name: str) -> object:
        return load_reward(f"{module}:{name}", timeout=30.0)(EXAMPLES, ["2", "3"])

    assert values("theirs") == [6.0, 7.0]
    assert values("some") == [1.0, 2.0]
    assert values("ours") == [4.0, 4.0]
    with pytest.raises(UserError, match="must return finite numbers, got None for example b"):
        values("unscored")


def test_what_names_no_prompts_is_left_as_it_is() -> None:
    for function in (lambda examples, completions: [0.0], dict, print):
        assert as_reward(function) is function
