"""`benchmarks/mutants.py`: what it changes, and that a test that notices kills."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.mutation.judge import carried_over
from benchmarks.mutation.sources import AREAS, drawn, mutants

ROOT = Path(__file__).resolve().parents[2]
SOURCE = '''"""Ünits of 1 < 2."""
Maybe = int | None
def scaled(x: "int | None", flag=True, *, dim: int = -1, more=zip((), (), strict=True)):
    if x is None or not flag:
        raise ValueError(f"x must be above {1 + 1}")
    return (x - 1) * 0.5 if 0 < x <= 9 else x @ x
'''
HALVES = """
TWO = 2.0
def half(x):
    return x / TWO
def more(x):
    return x + 1
def countdown(n):
    while n > 0:
        n = n - 1
    return n
"""
TESTS_OF_HALVES = """
import subprocess
import sys
from dllm_kernels import half
def test_by_import():
    assert half.TWO == 2
def test_half():
    assert half.half(3) == 1.5
def test_in_a_subprocess():
    program = "from dllm_kernels.half import more; assert more(1) == 2"
    subprocess.run([sys.executable, "-c", program], check=True)
def test_countdown():
    assert half.countdown(2) == 0
"""
LINES_THAT_NO_WEAK_TEST_RUNS = ("x + 1 -> (x - 1)", "1 -> 2", "n > 0 -> (n >= 0)", "0 -> 1", "n - 1 -> (n + 1)", "1 -> 2")


def test_operators_comparisons_constants_and_flags_change_but_no_text_type_or_message() -> None:
    found = {mutant.change for mutant in mutants("x.py", SOURCE)}
    assert found == {
        "True -> False",
        "-1 -> 1",
        "1 -> 2",
        "x is None or not flag -> (x is None and (not flag))",
        "x is None -> (x is not None)",
        "not flag -> (flag)",
        "(x - 1) * 0.5 -> ((x - 1) / 0.5)",
        "x - 1 -> (x + 1)",
        "0.5 -> 1.0",
        "0 < x <= 9 -> (0 <= x <= 9)",
        "0 < x <= 9 -> (0 < x < 9)",
        "0 -> 1",
        "9 -> 10",
    }


def test_what_was_recorded_is_carried_over_to_edited_lines() -> None:
    recorded = {"a.py:1": [0], "a.py:2": [1], "a.py:3": [2], "b.py:1": [3], "gone.py:1": [4]}
    before = {"a.py": "x\ny\nz\n", "b.py": "b\n", "gone.py": "g\n"}
    now = {"a.py": "x\nyy\nmore\nz\n", "b.py": "b\n", "new.py": "n\n"}
    found = carried_over(recorded, before, now)
    assert found == {"a.py:1": [0], "a.py:2": [0, 1, 2], "a.py:3": [0, 1, 2], "a.py:4": [2], "b.py:1": [3]}
    assert carried_over(recorded, before, {**now, "a.py": "x\nY\nz\n"})["a.py:2"] == [1]


def test_an_axis_is_not_changed_into_itself() -> None:
    source = "y = x_BS.sum(-1) + self.x_BS.sum(-1) + x_KBS.sum(-1) + x_BS.fill_(-1) + x_BS.gather(-1, x.sum(-1))"
    found = [mutant.change for mutant in mutants("x.py", source)]
    assert found.count("1 -> 2") == 6, "-2 is another axis"
    assert found.count("-1 -> 1") == 3, "of three axes, of a value, of an unknown tensor"


def test_every_mutant_of_the_tree_is_another_program_and_the_draw_is_the_seed_s() -> None:
    chosen = drawn(ROOT, list(AREAS), 120, seed=3)
    assert {area for area, _ in chosen} == set(AREAS)
    for _, mutant in chosen:
        source = (ROOT / mutant.file).read_text()
        assert ast.dump(ast.parse(mutant.applied(source))) != ast.dump(ast.parse(source)), mutant.name
    assert drawn(ROOT, list(AREAS), 120, seed=3) == chosen
    assert 120 <= len(chosen) == len({mutant.name for _, mutant in chosen}) <= 130
    assert all(list(ROOT.glob(pattern)) for area in AREAS.values() for pattern in (*area.sources, *area.tests))


def test_an_edit_elsewhere_leaves_the_names_of_mutants() -> None:
    names = [mutant.name for mutant in mutants("x.py", SOURCE)]
    assert len(set(names)) == len(names)
    assert [mutant.name for mutant in mutants("x.py", "import math\n\n" + SOURCE)][: len(names)] == names
    twice = [mutant.name for mutant in mutants("x.py", SOURCE + SOURCE)]
    assert twice == [*names, *(f"{name} #2" for name in names)]


@pytest.mark.slow  # a toy package, its nursery and its rounds: 10 s
def test_a_test_that_notices_kills_and_one_that_does_not_lets_live(tmp_path: Path) -> None:
    """In the process, by a subprocess, at import, and by the clock; a test that runs no line of it is not asked."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "dllm_kernels").mkdir()
    (tmp_path / "dllm_kernels" / "__init__.py").write_text("")
    (tmp_path / "dllm_kernels" / "half.py").write_text(HALVES)
    (tmp_path / "tests" / "test_half.py").write_text(TESTS_OF_HALVES)
    (tmp_path / "tests" / "test_weak.py").write_text(
        "from dllm_kernels.half import half\ndef test_half():\n    assert half(0) == 0\n"
    )
    program = """
import sys
from pathlib import Path
from benchmarks.mutation.judge import Judge
from benchmarks.mutation.sources import Area, mutants
root, file = Path(sys.argv[1]), "dllm_kernels/half.py"
areas = {"half": Area((file,), ("tests",)), "weak": Area((file,), ("tests/test_weak.py",))}
judge = Judge(root, areas)
source = (root / file).read_text()
for area in areas:
    for mutant in mutants(file, source):
        reply = judge.verdict(area, mutant)
        print(area, mutant.change, reply.verdict, reply.test.partition("::")[2] or reply.test)
assert (judge.tree / file).read_text() == source
judge.close()
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=800)
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines() == [
        "half 2.0 -> 4.0 killed test_by_import",
        "half x / TWO -> (x * TWO) killed test_half",
        "half x + 1 -> (x - 1) killed test_in_a_subprocess",
        "half 1 -> 2 killed test_in_a_subprocess",
        "half n > 0 -> (n >= 0) killed test_countdown",
        "half 0 -> 1 killed test_countdown",
        "half n - 1 -> (n + 1) killed, by the clock a crash",
        "half 1 -> 2 survived ",
        "weak 2.0 -> 4.0 survived ",
        "weak x / TWO -> (x * TWO) survived ",
        *[f"weak {change} survived no test runs this line" for change in LINES_THAT_NO_WEAK_TEST_RUNS],
    ]
