"""Countdown: problems that can be solved, texts that cannot hurt, and rewards by the rules."""

import itertools
import time
from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path

import pytest
from dllm_trainer.errors import ConfigError, UserError
from dllm_trainer.tasks import Example, Task, arithmetic, countdown, make_task
from dllm_trainer.tasks.config import CountdownConfig
from hypothesis import given
from hypothesis import strategies as st

from tests.trainer.conftest import global_random_states

D1 = Path("/work/shared/data/countdown_cd3_test.jsonl")
SMALL = {"train_problems": 300, "test_problems": 40}


def key(example: Example) -> tuple[tuple[int, ...], int]:
    return tuple(sorted(example.facts["numbers"])), example.facts["target"]


def solve(numbers: Sequence[int], target: int, operations: str = "+-*/") -> str | None:
    """An expression that solves the problem, by trying all; None if there is none."""

    @cache
    def reach(indices: frozenset[int]) -> dict[Fraction, countdown.Term]:
        if len(indices) == 1:
            (only,) = indices
            return {Fraction(numbers[only]): countdown.Term.number(numbers[only], only)}
        found: dict[Fraction, countdown.Term] = {}
        for size in range(1, len(indices)):
            for part in map(frozenset, itertools.combinations(sorted(indices), size)):
                pairs = itertools.product(reach(part).values(), operations, reach(indices - part).values())
                for term in itertools.starmap(countdown.combine, pairs):
                    if term is not None:
                        found.setdefault(term.value, term)
        return found

    term = reach(frozenset(range(len(numbers)))).get(Fraction(target))
    return None if term is None else term.text


@pytest.fixture(scope="module")
def task() -> Task:
    before = global_random_states()
    made = make_task(CountdownConfig(**SMALL, numbers=[3, 4], number_max=12, operations="+-*/"), seed=1)
    assert global_random_states() == before
    return made


def test_every_problem_is_in_range_and_its_witness_solves_it(task: Task) -> None:
    assert task.correct(task.tests["unseen"], [e.answer for e in task.tests["unseen"]]) == [1.0] * 40
    careful = make_task(CountdownConfig(**SMALL, numbers=[3, 4], number_max=12, operations="+-*/", careless_share=0.0), seed=1)
    assert careful.correct(careful.train, [e.answer for e in careful.train]) == [1.0] * 300
    assert {len(e.facts["numbers"]) for e in careful.train} == {3, 4}
    for example in (*careful.train, *careful.tests["unseen"]):
        assert all(1 <= number <= 12 for number in example.facts["numbers"])
        assert 1 <= example.facts["target"] <= CountdownConfig().target_max
        assert len(example.answer) <= careful.completion_length
        assert set(example.prompt + example.answer) <= set(careful.alphabet or "")
    # the same problems: carelessness changes demonstrations alone
    assert [e.prompt for e in careful.train] == [e.prompt for e in task.train]


def test_careless_demonstrations_leave_out_parentheses_and_nothing_else(task: Task) -> None:
    careful = make_task(CountdownConfig(**SMALL, numbers=[3, 4], number_max=12, operations="+-*/", careless_share=0.0), seed=1)
    all_careless = make_task(
        CountdownConfig(**SMALL, numbers=[3, 4], number_max=12, operations="+-*/", careless_share=1.0), seed=1
    )
    for right, careless in zip(careful.train, all_careless.train, strict=True):
        assert careless.answer == right.answer.replace("(", "").replace(")", "")
    right = sum(all_careless.correct(all_careless.train, [e.answer for e in all_careless.train]))
    assert 0 < right < 300
    assert right < sum(task.correct(task.train, [e.answer for e in task.train])) < 300


def test_train_and_tests_share_no_problem_in_any_order_of_its_numbers(task: Task) -> None:
    train, unseen = {key(e) for e in task.train}, {key(e) for e in task.tests["unseen"]}
    assert not train & unseen
    other = make_task(CountdownConfig(**SMALL, numbers=[3, 4], number_max=12, operations="+-*/"), seed=2)
    assert not {key(e) for e in other.train} & unseen, "another seed trains on what this one tests"
    assert [e.prompt for e in other.train] != [e.prompt for e in task.train]


def test_problems_are_a_function_of_the_seed_and_more_of_them_begin_alike(task: Task) -> None:
    longer = make_task(
        CountdownConfig(**SMALL | {"train_problems": 350}, numbers=[3, 4], number_max=12, operations="+-*/"), seed=1
    )
    assert list(longer.train[:300]) == list(task.train)


def test_a_range_with_too_few_problems_is_said() -> None:
    with pytest.raises(ConfigError, match=r"only \d+ of 256 problems for unseen found with numbers up to 3"):
        make_task(CountdownConfig(train_problems=5000, number_max=3), seed=0)


def test_the_solver_finds_a_solution_exactly_where_there_is_one(task: Task) -> None:
    for example in task.tests["unseen"][:15]:
        found = solve(example.facts["numbers"], example.facts["target"])
        assert found is not None
        assert countdown.exact([example], [found]) == [1.0]
    assert solve([1, 1, 1], 30) is None
    assert solve([3, 3, 8, 8], 24) == "8/(3-8/3)"
    assert solve([2, 4], 2, operations="+*") is None


@pytest.mark.skipif(not D1.is_file(), reason="the data sets are not here")
def test_d1s_test_file_is_read_and_all_of_it_can_be_solved() -> None:
    task = make_task(CountdownConfig(**SMALL, style="words", test_file=str(D1)), seed=0)
    problems = task.tests["file"]
    assert len(problems) == 256
    assert problems[0].facts == {"numbers": [30, 100, 93], "target": 23}
    assert "30, 100, 93" in problems[0].prompt
    solutions = [solve(e.facts["numbers"], e.facts["target"]) for e in problems]
    assert task.correct(problems, [str(solution) for solution in solutions]) == [1.0] * 256


@pytest.mark.parametrize(
    "row", ['{"input": "1,2,x", "output": "3"}', '{"input": "1,2", "output": "3.5"}', '{"input": "", "output": "3"}']
)
def test_a_wrong_row_of_d1s_format_is_named(tmp_path: Path, row: str) -> None:
    file = tmp_path / "test.jsonl"
    file.write_text('{"input": "1,2,3", "output": "6"}\n' + row + "\n")
    with pytest.raises(UserError, match=r"test\.jsonl:2: input must be numbers with commas"):
        countdown.read_d1(str(file), "words")


PROBLEM = Example("0", "", "", {"numbers": [3, 7, 7], "target": 24})


@pytest.mark.parametrize(
    ("text", "exact", "partial"),
    [
        ("(3+3/7)*7", 0.0, 0.1),  # the value, not the numbers
        ("3*7+7", 0.0, 0.1),
        ("7+7+3", 0.0, 0.1),
        ("24", 0.0, 0.1),
        ("<answer>\n3*7+7-4\n</answer>", 0.0, 0.1),
        ("3*7+7=28", 0.0, 0.0),
        ("3**7+7", 0.0, 0.0),
        ("7//3*7", 0.0, 0.0),
        ("7/(3-3)+7", 0.0, 0.1),
        ("7.0+7+3", 0.0, 0.0),
        ("７+7+3", 0.0, 0.0),
        ("007+7+3", 0.0, 0.0),
        ("7 7 3", 0.0, 0.0),
        ("7(7)3", 0.0, 0.0),
        ("abs(7)+7+3", 0.0, 0.0),
        ("()", 0.0, 0.0),
        ("", 0.0, 0.0),
        ("7+7+3;1", 0.0, 0.0),
        ("7+7\n+3", 0.0, 0.0),
    ],
)
def test_what_is_wrong_earns_at_most_the_credit_of_an_expression(text: str, exact: float, partial: float) -> None:
    assert countdown.exact([PROBLEM], [text]) == [exact]
    assert countdown.partial([PROBLEM], [text]) == [partial]


@pytest.mark.parametrize("text", ["7+7+10", " 10 + (7+7) ", "<answer>7+10+7</answer> and more", "-(-7-7)+10", "(10+7)+7"])
def test_what_is_right_earns_all(text: str) -> None:
    problem = Example("0", "", "", {"numbers": [10, 7, 7], "target": 24})
    assert countdown.exact([problem], [text]) == countdown.partial([problem], [text]) == [1.0]


def test_arithmetic_is_exact() -> None:
    problem = Example("0", "", "", {"numbers": [3, 3, 8, 8], "target": 24})
    assert countdown.exact([problem], ["8/(3-8/3)"]) == [1.0]
    assert eval("8/(3-8/3)") != 24, "floats would have done as well"
    large = Example("0", "", "", {"numbers": [10**15, 1, 3, 3], "target": 10**15})
    assert countdown.exact([large], ["1000000000000000+1/3-3"]) == [0.0]


@pytest.mark.parametrize(
    "text",
    [
        "(" * 100_000,
        "9" * 100_000,
        "-" * 190 + "7",
        "(" * 95 + "7" + ")" * 95,
        "1/" * 90 + "0",
        "9*" * 99 + "9",
        "1+" * 50_000,
        "\0",
    ],
)
def test_a_hostile_answer_is_graded_at_once(text: str) -> None:
    started = time.process_time()
    assert countdown.exact([PROBLEM], [text]) == [0.0]
    assert time.process_time() - started < 0.5


@given(st.text(alphabet="0123456789+-*/() ", max_size=30))
def test_values_are_those_of_python_in_fractions(text: str) -> None:
    tree = arithmetic.parse(text)
    if tree is None:
        return
    compiled = compile(text.strip(), "", "eval")
    assert compiled is not None
    fractions = "".join(f"F({part})" if part.isdigit() else part for part in _split(text))
    try:
        expected = eval(fractions, {"F": Fraction})
    except ZeroDivisionError:
        expected = None
    assert arithmetic.value(tree) == expected


def _split(text: str) -> list[str]:
    parts: list[str] = []
    for character in text.strip():
        if character.isdigit() and parts and parts[-1].isdigit():
            parts[-1] += character
        else:
            parts.append(character)
    return parts


def test_a_chat_model_is_asked_in_words() -> None:
    task = make_task(CountdownConfig(**SMALL, style="words", careless_share=0.0), seed=0)
    assert task.alphabet is None
    assert str(task.train[0].facts["target"]) in task.train[0].prompt
    for name in ("exact", "partial", "d1"):
        assert task.rewards[name](task.train, [e.answer for e in task.train]) == [1.0] * 300
