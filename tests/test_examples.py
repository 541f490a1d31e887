"""Each example runs by the launch line that it opens with."""

import importlib.util
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import checkpoint

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.timeout(1000)  # minutes where others use the cores
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def launch(name: str, **words: str) -> str:
    """What the launch line prints, some of its words replaced."""
    (line,) = re.findall(r"^    python (examples/.*)$", (ROOT / "examples" / name).read_text(), flags=re.MULTILINE)
    command = [words.get(word, word) for word in shlex.split(line)]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_loop_of_one_s_own_raises_its_reward() -> None:
    rewards = [float(word) for word in re.findall(r"reward (\S+)", launch("rl_loop.py"))]
    assert len(rewards) == 12
    assert sum(rewards[-3:]) / 3 > rewards[0] + 0.2


def test_a_text_has_a_score_with_its_standard_error(tmp_path: Path) -> None:
    folder = str(checkpoint(tmp_path / "model", alphabet="01234="))
    said = launch("score_sequences.py", **{"runs/demo/checkpoint": folder})
    elbo, error = (float(number) for number in re.fullmatch(r".*: (\S+) \+- (\S+) nats\n", said).groups())
    assert -16 * math.log(10) - 8 < elbo < -16 * math.log(10) + 8, "16 tokens of ten, by random weights"
    assert 0 < error < 1


@pytest.mark.slow
def test_a_trainer_of_transformers_learns_to_repeat_digits() -> None:
    before, after = map(float, re.search(r"before (\S+) after (\S+)", launch("sft_with_transformers.py")).groups())
    assert before > 2.0
    assert after < before - 0.3


@pytest.mark.slow
def test_an_actor_s_two_ways_agree() -> None:
    said = launch("dare_actor.py")
    error, forwards = re.search(r"difference (\S+); (\d+) calls", said).groups()
    assert float(error) < 1e-5
    assert forwards == "8"


def foreign(package: str) -> pytest.MarkDecorator:
    why = f"{package} is not installed: pip install 'dllm-kernels[integrations]'"
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=why)


@foreign("trl")
@pytest.mark.slow
def test_a_trainer_of_trl_raises_its_reward(tmp_path: Path) -> None:
    folder = str(checkpoint(tmp_path / "model"))
    rewards = [
        float(word) for word in re.findall(r"reward (\S+)", launch("grpo_with_trl.py", **{"runs/demo/checkpoint": folder}))
    ]
    assert len(rewards) == 12
    assert sum(rewards[-3:]) / 3 > rewards[0] + 0.15


@foreign("lm_eval")
@pytest.mark.slow
def test_the_harness_scores_answers(tmp_path: Path) -> None:
    folder = str(checkpoint(tmp_path / "model"))
    said = launch("evaluate_with_lm_eval.py", **{"runs/demo/checkpoint": folder})
    elbos = [float(word) for word in re.findall(r": (\S+) nats", said)]
    assert elbos[1] > elbos[2] > elbos[0], "by random weights the shortest answer is the likeliest"
    assert "largest" in said


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_every_example_is_run_by_a_test(example: Path) -> None:
    assert f'launch("{example.name}"' in Path(__file__).read_text()
