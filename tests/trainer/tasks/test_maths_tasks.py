"""GSM8K and MATH: answers found and compared as a reader would, and d1's rewards with the defects that they
have.
"""

import doctest
import json
import time
from pathlib import Path

import math_verify
import pytest
from dllm_trainer.errors import UserError
from dllm_trainer.tasks import Example, arithmetic, d1_compat, gsm8k, make_task, math, math_scores, shaping
from dllm_trainer.tasks.config import Gsm8kConfig, MathConfig
from dllm_trainer.tasks.tags import final_answer, tagged

DATA = Path("/work/shared/data")
GSM8K = Example("0", "", "", {"answer": "1,000"})
HALF = Example("0", "", "", {"answer": "\\frac{1}{2}", "solution": "so $\\boxed{\\frac{1}{2}}$"})
PERFECT = tagged("First\nthen", "1,000")


@pytest.mark.parametrize("module", [math_scores, arithmetic])
def test_examples_in_docstrings_are_right(module: object) -> None:
    result = doctest.testmod(module)  # type: ignore[arg-type]
    assert result.attempted
    assert not result.failed


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<answer>\n18\n</answer>", "18"),
        ("<answer>1</answer> no <answer> 2 </answer>", "2"),
        ("<answer><answer>3</answer>", "3"),
        ("<answer>4</answer><answer>5", "4"),
        ("<answer>4", None),
        ("4", None),
    ],
)
def test_the_final_answer_is_in_the_last_closed_tags(text: str, expected: str | None) -> None:
    assert final_answer(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        PERFECT,
        "<answer>$1000</answer>",
        "<answer>1,000.00 dollars.</answer>",
        "<answer>The answer is 1000.</answer>",
        "steps: 3 + 4\n#### 1000",
        "so \\boxed{1000}.",
        "<answer>\\boxed{1,000}</answer>",
    ],
)
def test_the_same_number_is_right_however_it_is_written(text: str) -> None:
    assert gsm8k.exact([GSM8K], [text]) == [1.0]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1000",
        "<answer>-1000</answer>",
        "<answer>1000 or 2000</answer>",
        "<answer>1000",
        "<answer>1000.5</answer>",
        "<answer>1,0000</answer>",
        "<answer>" + "9" * 10_000 + "</answer>",
    ],
)
def test_another_number_or_no_answer_is_wrong(text: str) -> None:
    assert gsm8k.exact([GSM8K], [text]) == [0.0]


@pytest.mark.skipif(not DATA.is_dir(), reason="the data sets are not here")
def test_all_of_gsm8k_is_read_and_its_demonstrations_are_right() -> None:
    config = Gsm8kConfig(train=str(DATA / "gsm8k_train.jsonl"), test=str(DATA / "gsm8k_test.jsonl"))
    task = make_task(config, seed=0)
    assert (len(task.train), len(task.tests["test"])) == (7473, 1319)
    assert "<<" not in "".join(example.answer for example in task.train)
    demonstrations = [example.answer for example in task.train]
    assert task.correct(task.train, demonstrations) == [1.0] * len(task.train)
    assert task.metrics["layout"](task.train, demonstrations) == [1.0] * len(task.train)
    assert min(task.rewards["shaped"](task.train, demonstrations)) >= 3.5  # all but 0.5 for an integer
    few = make_task(config.model_copy(update={"train_rows": 5, "test_rows": 3}), seed=0)
    assert (len(few.train), len(few.tests["test"])) == (5, 3)


def test_a_row_of_gsm8k_without_its_answer_is_named(tmp_path: Path) -> None:
    file = tmp_path / "g.jsonl"
    file.write_text(
        json.dumps({"question": "?", "answer": "#### 3"}) + "\n" + json.dumps({"question": "?", "answer": "many"}) + "\n"
    )
    with pytest.raises(UserError, match=r"g\.jsonl:2: an answer must end in '#### number', got 'many'"):
        make_task(Gsm8kConfig(train=str(file), test=str(file)), seed=0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{3}", "3"),
        (r"\boxed{\frac{1}{2}} then \boxed{\sqrt{\frac{a}{b}}}", r"\sqrt{\frac{a}{b}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed 5$ and", "5"),
        (r"\fbox{7}", "7"),
        (r"\boxed{3} and \boxed{4", None),
        ("3", None),
    ],
)
def test_the_last_box_with_its_braces(text: str, expected: str | None) -> None:
    assert math_scores.last_boxed(text) == expected


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"\frac12", r"\dfrac{1}{2}"),
        (r"\frac1{72}", r"\frac{1}{72}"),
        ("0.5", "1/2"),
        (".5", r"\frac{1}{2}"),
        (r"-\frac{3}{4}", "-0.75"),
        (r"1\frac{1}{2}", "1.5"),
        (r"\sqrt3", r"\sqrt{3}"),
        ("10,000", "10000"),
        (r"\$5", "5"),
        (r"50\%", "50"),
        (r"90^\circ", "90"),
        (r"5\text{ cm}", "5"),
        (r"5 \mbox{ cm}^2", "5"),
        ("x = 5", "5"),
        (r"\text{Monday}", "Monday"),
        (r"\left(1, \frac12\right)", "(1,0.5)"),
        ("3, 1/2", "3,0.5"),
        ("5.", "5"),
        (r"2\pi r", r"2\pi\,r"),
    ],
)
def test_answers_written_differently_are_equal(one: str, other: str) -> None:
    assert math_scores.equal(one, other)
    assert math_scores.equal(other, one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1", "2"),
        ("(1,2)", "[1,2]"),
        ("(1,2)", "(2,1)"),
        ("1,2", "12"),
        (r"\frac{1}{0}", "0"),
        (r"\sqrt{3}", "3"),
        ("x", "y"),
        ("", "0"),
        ("9" * 5000, "9" * 4999 + "8"),
    ],
)
def test_different_answers_are_not(one: str, other: str) -> None:
    assert not math_scores.equal(one, other)
    assert not math_scores.equal(other, one)


@pytest.mark.parametrize(
    "text", ["\\boxed" * 1000, "{" * 10_000, "\\boxed{" + "{" * 10_000, "\\frac" * 300, "(" * 999, "\\text{" * 300]
)
def test_hostile_answers_are_only_wrong(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(math_scores, "_SECONDS", 1.0)
    for completion in (text, f"<answer>{text}</answer>", f"\\boxed{{{text}}}"):
        assert math_scores.exact([HALF], [completion]) == [0.0]
        assert d1_compat.MATH_PARTS["correct"]([HALF], [completion]) == [0.0]


def test_an_answer_that_ran_out_of_time_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(*_: object, **__: object) -> None:
        while True:
            pass

    with monkeypatch.context() as slow:
        slow.setattr(math_scores, "_SECONDS", 0.05)
        slow.setattr(math_verify, "parse", endless)
        assert not math_scores.equal("1/17", "2/34")
    assert math_scores.equal("1/17", "2/34")


def test_time_on_the_wall_costs_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine that does something else meanwhile."""
    assert math_scores.equal("1/3", "2/6"), "what is imported at the first use is"
    monkeypatch.setattr(math_scores, "_SECONDS", 0.5)
    for name in ("parse", "verify"):
        real = getattr(math_verify, name)
        monkeypatch.setattr(math_verify, name, lambda *a, real=real, **k: (time.sleep(0.6), real(*a, **k))[1])
    assert math_scores.equal("1/7", "2/14")


def test_math_is_read_and_graded(tmp_path: Path) -> None:
    file = tmp_path / "m.jsonl"
    rows = [{"problem": "p", "solution": "thus $\\boxed{\\frac{1}{2}}$."}, {"problem": "q", "solution": "-", "answer": "7"}]
    file.write_text("\n".join(map(json.dumps, rows)))
    task = make_task(MathConfig(train=str(file), test=str(file)), seed=0)
    assert [example.facts["answer"] for example in task.train] == ["\\frac{1}{2}", "7"]
    demonstrations = [example.answer for example in task.train]
    assert task.correct(task.train, demonstrations) == [1.0, 1.0]
    assert task.rewards["shaped"](task.train, demonstrations) == [3.0, 3.0]
    assert task.rewards["shaped"](task.train, ["nothing", "<answer>7</answer>"]) == [0.25, 2.75]
    file.write_text(json.dumps({"problem": "p", "solution": "no box"}))
    with pytest.raises(UserError, match=r"m\.jsonl:1: a solution must hold a closed"):
        make_task(MathConfig(train=str(file), test=str(file)), seed=0)


def test_defect_of_d1_the_box_bonus_never_comes_while_ours_does() -> None:
    both = ["<answer>\\boxed{\\frac{1}{2}}</answer>", "<answer>1/2</answer>", "\\boxed{\\frac{1}{2}}", "none"]
    assert d1_compat.MATH_PARTS["format"]([HALF] * 4, both) == [0.75, 0.75, 0.25, 0.25]
    assert d1_compat.MATH_PARTS["format"]([HALF], ["<answer>\boxed{3}</answer>"]) == [1.0]  # a backspace and "oxed"
    assert d1_compat.math([HALF] * 4, both) == [2.75, 0.75, 2.25, 0.25]
    assert math.shaped(math_scores.exact)([HALF] * 4, both) == [3.0, 2.75, 2.25, 0.25]


def test_defect_of_d1_its_layout_rewards_do_not_see_more_than_a_line() -> None:
    one_line = "<reasoning>\nx\n</reasoning>\n<answer>\n1,000\n</answer>\n"
    same_line = "<reasoning>x</reasoning><answer>1,000</answer>"
    texts = [PERFECT + "\n", one_line, same_line]
    assert d1_compat.GSM8K_PARTS["strict"]([GSM8K] * 3, texts) == [0.0, 0.5, 0.0]
    assert d1_compat.GSM8K_PARTS["soft"]([GSM8K] * 3, texts) == [0.0, 0.0, 0.5]
    assert shaping.layout([GSM8K] * 3, texts) == [1.0, 1.0, pytest.approx(2 / 3)]


def test_defect_of_d1_numbers_are_compared_as_texts() -> None:
    texts = ["<answer>1,000</answer>", "<answer>1000</answer>", "1,000"]
    assert d1_compat.GSM8K_PARTS["correct"]([GSM8K] * 3, texts) == [2.0, 0.0, 2.0]
    assert d1_compat.GSM8K_PARTS["integer"]([GSM8K] * 3, texts) == [0.0, 0.5, 0.0]
    assert gsm8k.exact([GSM8K] * 3, texts) == [1.0, 1.0, 0.0]


def test_defect_of_d1_the_tags_of_a_long_completion_cost_it_more_than_they_earn() -> None:
    long = tagged("word " * 200, "1,000")
    counted = d1_compat.GSM8K_PARTS["tags"]([GSM8K] * 2, [long, long + "\n"])
    assert counted[0] == pytest.approx(0.5 - 0.001 * len(long) + 0.001)
    assert counted[1] == pytest.approx(0.5)
    assert d1_compat.gsm8k([GSM8K], [long + "\n"]) == [pytest.approx(0.5 + 0.5 + 0.0 + 2.0)]
    assert shaping.layout([GSM8K], [long]) == [1.0]


def test_defects_of_d1s_countdown() -> None:
    problem = Example("0", "", "", {"numbers": [1, 2, 5], "target": 3})
    cases = {
        "<answer>5-2*1</answer>": 1.0,
        "<answer>1.5*2</answer>": 1.0,  # 1 and 5 are taken for the numbers
        "<answer>5//2+1</answer>": 1.0,
        "<answer>I do not know</answer>": 0.1,
        "<answer>5**2**1</answer>": 0.1,
        "5-2*1": 0.0,
    }
    assert d1_compat.countdown([problem] * len(cases), list(cases)) == list(cases.values())
    huge = Example("0", "", "", {"numbers": [9, 9, 9], "target": 3})
    assert d1_compat.countdown([huge] * 2, ["<answer>9**9**9</answer>", "<answer>(9**9)**-9</answer>"]) == [0.1, 0.1]


def test_defects_of_d1s_sudoku() -> None:
    puzzle = Example("0", "", "", {"puzzle": "1234341221430000", "solution": "1234341221434321"})
    texts = [
        f"<answer>{answer}</answer>" for answer in ("1234341221434321", "4444444444444321", "123434122143", "12343412214343219")
    ]
    assert d1_compat.sudoku([puzzle] * 4, texts) == [1.0, 1.0, 0.0, 1.0]  # the second changes given cells
    assert d1_compat.sudoku([puzzle] * 2, ["1234341221434321", "<answer>1234341221434111</answer>"]) == [0.0, 0.5]
