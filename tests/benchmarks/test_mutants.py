"""`benchmarks/mutants.py`: what it changes, and that a test that notices kills."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.mutants import AREAS, drawn, mutants

ROOT = Path(__file__).resolve().parents[2]
SOURCE = '''"""Ünits of 1 < 2."""
def scaled(x: "int | None", flag=True, *, dim: int = -1):
    if x is None or not flag:
        raise ValueError(f"x must be above {1 + 1}")
    return (x - 1) * 0.5 if 0 < x <= 9 else x @ x
'''


def test_operators_comparisons_constants_and_flags_change_but_no_text_type_or_message() -> None:
    found = {mutant.described(SOURCE).split(maxsplit=1)[1] for mutant in mutants("x.py", SOURCE)}
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


def test_every_mutant_of_the_tree_is_another_program_and_the_draw_is_the_seed_s() -> None:
    chosen = drawn(ROOT, list(AREAS), 120, seed=3)
    assert {area for area, _ in chosen} == set(AREAS)
    for _, mutant in chosen:
        source = (ROOT / mutant.file).read_text()
        assert ast.dump(ast.parse(mutant.applied(source))) != ast.dump(ast.parse(source)), mutant.described(source)
    assert drawn(ROOT, list(AREAS), 120, seed=3) == chosen
    assert all(list(ROOT.glob(pattern)) for area in AREAS.values() for pattern in (*area.sources, *area.tests))


@pytest.mark.timeout(300)
def test_a_test_that_notices_kills_and_one_that_does_not_lets_live(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "half.py").write_text("def half(x):\n    return x / 2\n")
    (tmp_path / "tests" / "test_half.py").write_text("from half import half\ndef test_half():\n    assert half(0) == 0\n")
    (tmp_path / "tests" / "test_more.py").write_text("from half import half\ndef test_more():\n    assert half(3) > 1.2\n")
    program = """
import sys
from pathlib import Path
from benchmarks.mutants import Area, Judge, mutants
root = Path(sys.argv[1])
judge = Judge(root, {"half": Area(("half.py",), ("tests",)), "weak": Area(("half.py",), ("tests/test_half.py",))})
source = (root / "half.py").read_text()
for area in ("half", "weak"):
    seconds = judge.in_peace(area)
    print([judge.verdict(area, mutant, seconds) for mutant in mutants("half.py", source)])
assert (judge.tree / "half.py").read_text() == source
judge.close()
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines() == ["['survived', 'killed']", "['survived', 'survived']"]
