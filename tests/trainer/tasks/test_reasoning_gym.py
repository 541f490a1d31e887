"""reasoning-gym as a task: mixtures, levels, held-out sets, its own scores, and what is refused."""

import dataclasses
import importlib.util
import re
import shutil
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
from dllm_trainer.config import load_config
from dllm_trainer.errors import ConfigError, UserError
from dllm_trainer.tasks import Example, Task, gym_scores, make_task, reasoning_gym
from dllm_trainer.tasks.config import ReasoningGymConfig
from dllm_trainer.tasks.gym_draws import draw

HERE = importlib.util.find_spec("reasoning_gym") is not None
if not HERE and any(shutil.which(name) for name in ("cc", "gcc", "clang")):
    raise RuntimeError("reasoning-gym is not installed: pip install '.[gym]'")
packaged = pytest.mark.skipif(not HERE, reason="reasoning-gym needs a C compiler for its pycosat, and there is none")

SMALL = {"train_problems": 60, "test_problems": 12}


def config(datasets: dict[str, Any], **more: Any) -> ReasoningGymConfig:
    return ReasoningGymConfig.model_validate({"datasets": datasets, **SMALL, **more})


@pytest.fixture(scope="module")
def mixture() -> Task:
    """Two data sets, three to one, at two levels."""
    datasets = {"chain_sum": {"weight": 3.0}, "spell_backward": {"options": {"min_word_len": 3, "max_word_len": 4}}}
    return make_task(config(datasets, levels=2, style="characters", question="short", demonstrations=20), seed=0)


@packaged
def test_a_mixture_has_its_weights_options_and_levels(mixture: Task) -> None:
    counts = Counter(example.facts["dataset"] for example in mixture.train)
    assert counts["chain_sum"] > 1.5 * counts["spell_backward"] > 0
    assert {len(e.answer) for e in mixture.train if e.facts["dataset"] == "spell_backward"} <= {3, 4}
    assert mixture.curriculum is not None
    easy, hard = ([e for e in level if e.facts["dataset"] == "chain_sum"] for level in mixture.curriculum.levels)
    digits = [sum(sum(map(str.isdigit, e.prompt)) for e in level) / len(level) for level in (easy, hard)]
    assert digits[1] > digits[0], "the package's own curriculum makes the second level harder"
    assert list(mixture.tests) == ["level_0", "level_1"]
    assert len(mixture.demonstrations) == 20


@packaged
def test_a_model_from_scratch_can_read_all_of_it(mixture: Task) -> None:
    assert mixture.curriculum is not None
    for example in (*mixture.curriculum.levels[0], *mixture.curriculum.levels[1], *mixture.tests["level_1"]):
        assert set(example.prompt + example.answer) <= set(mixture.alphabet or "")
        assert len(example.answer) <= mixture.completion_length
        assert example.prompt.startswith(f"{example.facts['dataset']}: "), "several data sets: the name says which is asked"
        assert "final answer" not in example.prompt, "what all questions share is left out"


@packaged
def test_scores_are_the_packages_own(mixture: Task) -> None:
    examples = [e for e in mixture.train if e.facts["dataset"] == "spell_backward"][:2]
    texts = [e.answer for e in examples]
    assert mixture.correct(examples, texts) == [1.0, 1.0]
    assert mixture.correct(examples, [f" <answer>{text}</answer>" for text in texts]) == [1.0, 1.0]
    assert mixture.correct(examples, texts[::-1]) == [0.0, 0.0]
    part = mixture.rewards["score"](examples[:1], [f"{texts[0][:-1]}?"])[0]
    assert 0 < part < 1, "a word that is nearly right gets part of the credit"
    assert mixture.rewards["solved"](examples[:1], [f"{texts[0][:-1]}?"]) == [0.0]


@packaged
def test_nothing_held_out_is_trained_on_and_tests_are_the_same_for_every_seed() -> None:
    wanted = config({"gcd": {"options": {"min_value": 1, "max_value": 12}}}, train_problems=300)
    drawn = [draw(wanted, seed) for seed in (0, 1)]
    (tests, (train,), left_out), (same, (other,), _) = drawn
    assert tests == same
    assert train != other
    held = [example.prompt for example in tests["unseen"]]
    assert len(set(held)) == len(held) == 12
    assert not {example.prompt for example in (*train, *other)} & set(held)
    assert left_out > 0, "12 of 78 questions are held out, so that a draw of 300 meets them"


@packaged
def test_what_was_held_out_is_told_and_so_is_what_was_not(mixture: Task) -> None:
    (note,) = mixture.notes()
    assert re.match(r"\d+ of 120 training questions are distinct; \d+ more were drawn and left out, as they are held out", note)
    leaking = dataclasses.replace(mixture, note="", tests={"unseen": mixture.train[:1], "other": mixture.tests["level_1"]})
    (warning,) = leaking.notes()
    assert re.match(r"warning: [1-9]\d* of 120 training examples ask a question of the test set unseen$", warning)


def test_short_questions_stay_different_where_their_ends_overlap() -> None:
    examples = [Example(str(n), " ".join(["a"] * n), "", {"dataset": "x"}) for n in (2, 3, 4)]
    cut = reasoning_gym._constant_ends(examples)
    assert len({cut(example).prompt for example in examples}) == 3


@packaged
@pytest.mark.slow
def test_examples_do_not_depend_on_the_hash_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """isomorphic_strings walks through sets of texts: drawn in this process, every rank would have its own."""
    wanted = config({"isomorphic_strings": {}}, train_problems=8, test_problems=2)
    found = []
    for seed in ("1", "2"):
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        found.append(reasoning_gym._drawn(wanted, 0))
    assert found[0] == found[1]


@packaged
@pytest.mark.parametrize(
    ("datasets", "more", "sentence"),
    [
        ({"chain_sums": {}}, {}, r"has no data set chain_sums: the nearest is chain_sum; there are "),
        ({"gcd": {"options": {"most": 3}}}, {}, r"task\.datasets\.gcd\.options has no most; there are .*max_value"),
        ({"gcd": {"options": {"seed": 3}}}, {}, r"options has no seed"),
        ({"gcd": {"options": {"max_value": 0}}}, {}, r"task\.datasets\.gcd\.options: reasoning-gym refuses .*max_value"),
        ({"gcd": {"options": {"min_value": 1, "max_value": 2}}}, {}, r"gave only \d of the 12 test problems at level 0"),
        ({"gcd": {}}, {"levels": 40}, r"task\.levels must be at most \d, the levels of reasoning-gym's gcd, got 40"),
        ({"composite": {}}, {"levels": 2}, r"task\.levels must be 1 for reasoning-gym's composite"),
    ],
)
def test_what_the_package_does_not_have_is_a_sentence(datasets: dict[str, Any], more: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        draw(config(datasets, **more), 0)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        (["task.datasets.gcd.weight=0"], "task.datasets.gcd.weight must be greater than 0"),
        (["task.datasets.gcd.wieght=2"], "task.datasets.gcd.wieght is no key"),
        (["task.datasets={}"], "task.datasets must"),
        (["task.datasets.gcd.weight=1", "task.levels=0"], "task.levels must be greater than or equal to 1"),
        (["task.datasets.gcd.weight=1", "task.rise_at=1.5"], "task.rise_at must be less than or equal to 1"),
        (["task.datasets.gcd.weight=1", "task.question=long"], "task.question must be 'whole' or 'short'"),
        (["task.datasets.gcd.weight=1", "task.vocabulary=100"], "task.vocabulary must be greater than or equal to 300"),
        (["task.datasets.gcd.weight=1", "task.demonstrations=0"], "task.demonstrations must be greater than or equal to 1"),
    ],
)
def test_wrong_keys_are_named(keys: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load_config(overrides=["task.kind=reasoning_gym", *keys])


def test_without_the_package_there_is_a_sentence_and_no_other_task_imports_it() -> None:
    code = (
        "import sys; sys.modules['reasoning_gym'] = None\n"
        "from dllm_trainer.config import load_config\n"
        "from dllm_trainer.tasks import make_task\n"
        "from dllm_trainer.tasks.gym_draws import draw\n"
        "make_task(load_config(overrides=['task.train_puzzles=4', 'task.test_puzzles=2']).task, seed=0)\n"
        "try: draw(load_config(overrides=['task.kind=reasoning_gym', 'task.datasets.gcd.weight=1']).task, 0)\n"
        "except Exception as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "task.kind=reasoning_gym needs the package reasoning-gym" in done.stdout
    assert "pip install 'dllm-kernels[gym]'" in done.stdout


class _Scorer:
    """Of a data set whose scorer does what this says."""

    def __init__(self, does: str):
        self._does = does

    def score_answer(self, text: str, entry: dict[str, Any]) -> float:
        if self._does == "raise":
            raise ZeroDivisionError
        while self._does == "hang":
            pass
        return float(self._does)


@pytest.mark.parametrize(("does", "score"), [("raise", 0.0), ("hang", 0.0), ("nan", 0.0), ("7", 1.0), ("-3", 0.0), ("0.5", 0.5)])
def test_a_scorer_that_stumbles_or_hangs_gives_0(does: str, score: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gym_scores, "SECONDS", 0.2)
    monkeypatch.setattr(gym_scores, "_dataset", lambda name, options: _Scorer(does))
    assert gym_scores.score([Example("0", "", "", {"dataset": "x", "options": {}, "entry": {}})], ["text"]) == [score]


def test_a_package_that_rejects_its_own_answers_is_told() -> None:
    def nothing(examples: object, completions: list[str]) -> list[float]:
        return [0.0] * len(completions)

    with pytest.raises(UserError, match="takes none of its own answers for right, the first of them '4'"):
        reasoning_gym._check_scores(nothing, [Example("0", "2+2", "4")])
