"""Rewards written by users: what is wrong with them is said in a sentence, and none can stop the run's
process.
"""

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from dllm_trainer.errors import UserError
from dllm_trainer.tasks import Example, Task, countdown, make_task
from dllm_trainer.tasks.config import CountdownConfig
from dllm_trainer.tasks.rewards import _Process, checked, choose, exact_match, load_reward

EXAMPLES = [Example("a", "", "", {"answer": "1"}), Example("b", "", "", {"answer": "2"})]

SOURCE = """
import re, sys, time
number = 3
calls = 0
def length(examples, completions):
    global calls
    calls += 1
    print("printed by a reward")
    return [len(text) + calls for text in completions]
def slow(examples, completions):
    if completions[0] == "slow": time.sleep(60)
    return [0.0 for _ in completions]
def stuck(examples, completions):
    return [float(bool(re.fullmatch("(a+)+b", "a" * 40))) for _ in completions]  # hours in C, the interpreter's lock held
def raises(examples, completions): return [1 / 0]
def none(examples, completions): return [1.0, None]
def nan(examples, completions): return [1.0, float("nan")]
def text(examples, completions): return ["1", "2"]
def short(examples, completions): return [1.0]
def single(examples, completions): return 1.0
def lazy(examples, completions): return (1.0 for _ in completions)
def leaves(examples, completions): sys.exit(3)
def truth(examples, completions): return [text == e.facts["answer"] for e, text in zip(examples, completions)]
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_rewards.py").write_text(SOURCE)
    (tmp_path / "broken.py").write_text("import nowhere_to_be_found\n")
    (tmp_path / "worse.py").write_text("raise RuntimeError('at import\\nand more')\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return "my_rewards"


def test_a_function_is_called_in_one_process_for_the_whole_run(module: str) -> None:
    reward = load_reward(f"{module}:length", timeout=30.0)
    assert reward(EXAMPLES, ["x", "yy"]) == [2.0, 3.0]
    assert reward(EXAMPLES, ["x", "yy"]) == [3.0, 4.0], "the module was imported again"
    assert module not in sys.modules, "it ran in the trainer's own process"
    truth = choose(f"{module}:truth", {}, timeout=30.0)
    assert truth(EXAMPLES, ["1", "1"]) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("my_rewards", "is unknown: this task has exact_match; one of your own is written module:function"),
        (":length", "is written module:function, got ':length'"),
        ("my_rewards:a:b", "is written module:function"),
        ("no_such_module:f", "cannot be loaded: there is no module no_such_module"),
        ("my_rewards.inner:f", "cannot be loaded: there is no module my_rewards.inner"),
        ("my_rewards:missing", "cannot be loaded: module my_rewards has no missing"),
        ("my_rewards:number", "is not a function but int"),
        ("broken:f", "there is no module nowhere_to_be_found, which broken imports"),
        ("worse:f", "importing worse raised RuntimeError: at import"),
    ],
)
def test_what_cannot_be_loaded_is_said(module: str, spec: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        choose(spec, {"exact_match": exact_match}, timeout=30.0)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("raises", "raised ZeroDivisionError: division by zero (my_rewards.py, line 15)"),
        ("none", "must return finite numbers, got None for example b"),
        ("nan", "must return finite numbers, got nan for example b"),
        ("text", "must return finite numbers, got '1' for example a"),
        ("short", "must return one number per completion (2), got 1"),
        ("single", "must return one number per completion, got float"),
        ("lazy", "must return one number per completion, got generator"),
        ("leaves", "its process ended before it had scored 2 completions"),
    ],
)
def test_what_a_call_does_wrong_is_said(module: str, name: str, said: str) -> None:
    reward = load_reward(f"{module}:{name}", timeout=30.0)
    with pytest.raises(UserError) as caught:
        reward(EXAMPLES, ["1", "2"])
    assert said in str(caught.value)
    assert f"{module}:{name}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["slow", "stuck"])
def test_a_reward_that_takes_too_long_is_ended_with_its_process(module: str, name: str) -> None:
    reward = _Process(f"{module}:{name}", 0.5)
    started = time.monotonic()
    with pytest.raises(UserError, match=r"had not scored 2 completions after 0\.5 s; its process was ended"):
        reward(EXAMPLES, ["slow", "1"])
    assert time.monotonic() - started < 30, "the function takes a minute, or hours"
    if name == "slow":  # a new process serves the next call, with the time that a busy machine needs
        reward._timeout = 30.0
        assert reward(EXAMPLES, ["1", "1"]) == [0.0, 0.0]


@pytest.mark.parametrize(
    "values",
    [[1.0, math.inf], [1.0, -math.inf], [1.0, math.nan], [1.0, None], [1.0, 1j], "ab", {"a": 1, "b": 2}, None, [1.0], [1.0] * 3],
)
def test_rewards_of_our_own_are_checked_too(values: object) -> None:
    reward: Callable = checked(lambda examples, completions: values, "mine")  # type: ignore[arg-type, return-value]
    with pytest.raises(UserError, match="reward mine must return"):
        reward(EXAMPLES, ["1", "2"])


def test_a_checked_reward_returns_floats_and_says_what_it_raised() -> None:
    assert checked(exact_match, "exact_match")(EXAMPLES, [" 1\n", "x"]) == [1.0, 0.0]
    with pytest.raises(UserError, match=r"reward exact_match raised KeyError: 'answer' \(rewards\.py, line \d+\)"):
        checked(exact_match, "exact_match")([Example("c", "")], ["x"])


def test_all_rewards_of_a_task_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(config: object, *, seed: int) -> Task:
        def nothing(examples: object, completions: object) -> list[float]:
            return []

        return Task("x", EXAMPLES, {}, {"r": nothing}, nothing, {"m": nothing}, 4)

    monkeypatch.setattr(countdown, "make", make)
    task = make_task(CountdownConfig(), seed=0)
    for reward in (choose("r", task.rewards, timeout=1.0), task.correct, task.metrics["m"]):
        with pytest.raises(UserError, match=r"must return one number per completion \(2\), got 0"):
            reward(EXAMPLES, ["1", "2"])
