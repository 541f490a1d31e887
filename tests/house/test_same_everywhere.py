"""What a test draws is the same alone, in any order and in every process of pytest-xdist."""

import random
import sys
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st


def examples() -> list[int]:
    found: list[int] = []

    @settings(settings(), max_examples=300, database=None)
    @given(st.integers())
    def note(number: int) -> None:
        found.append(number)

    note()
    return found


@pytest.mark.skipif(not settings().derandomize, reason="this profile looks for new examples")
def test_examples_do_not_depend_on_what_was_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = examples()
    (tmp_path / "many_constants.py").write_text(f"numbers = {list(range(10**6, 10**6 + 500))}\n")
    monkeypatch.syspath_prepend(tmp_path)
    __import__("many_constants")
    assert examples() == before
    del sys.modules["many_constants"]


@pytest.mark.parametrize("time", [1, 2])
def test_a_test_does_not_go_on_where_the_one_before_it_left_the_global_random_state(time: int) -> None:
    draw = random.Random(1), numpy.random.RandomState(1), torch.Generator().manual_seed(1)
    assert (random.random(), numpy.random.rand()) == (draw[0].random(), draw[1].rand())
    assert torch.equal(torch.rand(3), torch.rand(3, generator=draw[2]))
