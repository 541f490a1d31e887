"""The suite `entropy`: its contestants agree, its judgement can fail, and ours keeps no probability rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import execution, measure, registry, report
from benchmarks.suites import entropy, rollout

pytestmark = pytest.mark.xdist_group("benchmarks")  # one worker: the memory server is started once

SUITE = entropy.SUITES["entropy"]
TINY = registry.Settings(tiny=True, threads=1)
SMALL = registry.Settings(threads=1, shape={"V": 20000, "T": 64, "H": 16})


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No subprocess for each figure, no measurement of the machine, no timing."""
    monkeypatch.setattr(execution, "peak_memory", lambda *_: measure.Memory(1.0, "none"))
    monkeypatch.setattr(execution, "gflops_per_s", lambda *_: 100.0)
    monkeypatch.setattr(execution, "interleave", lambda runners, *_: {name: measure.Timing((1.0,) * 7) for name in runners})


def rows_of(number: int) -> dict[str, registry.Row]:
    return {row["contestant"]: row for row in execution.measure_case(SUITE, entropy.cases(TINY)[number], TINY)}


def test_every_row_of_the_tiny_run_is_right(tmp_path: Path) -> None:
    rows = execution.measure(SUITE, TINY)["rows"]
    assert {row["status"] for row in rows} == {"ok"}, [row for row in rows if row["status"] != "ok"]
    assert [row["contestant"] for row in rows] == [
        "ours",
        "ours (step by step)",
        "published",
        "limit",
        "ours",
        "published",
        "limit",
    ]
    for row in rows:
        if row["role"] != "floor":
            assert row["errors"]["steps"] == 0.0
            assert row["errors"].get("tokens", 0.0) == 0.0
            assert row["flops_by_formula"] == pytest.approx(row["flops_counted"], rel=0.02)
    assert "rows: 1 x published's time" in report.summary(SUITE, rows)
    SUITE.plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("number", [0, 1])
def test_a_wrong_entropy_is_wrong(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = entropy.step_entropy
    monkeypatch.setattr(entropy, "step_entropy", lambda *args, **options: honest(*args, **options) + 0.01)
    rows = rows_of(number)
    assert (rows["ours"]["status"], rows["published"]["status"]) == ("wrong", "ok")
    assert rows["ours"]["reason"].startswith("entropy error 1.0e-02")


@pytest.mark.parametrize("number", [0, 1])
def test_another_choice_of_steps_is_wrong(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = entropy.select_steps
    monkeypatch.setattr(entropy, "select_steps", lambda entropy_TB, k: honest(-entropy_TB, k))
    assert rows_of(number)["ours"]["reason"].startswith("steps error")


def test_other_tokens_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = rollout.generate
    monkeypatch.setattr(rollout, "generate", lambda *args, **options: honest(*args, **options, temperature=5.0))
    row = rows_of(1)["ours"]
    assert row["status"] == "wrong"
    assert row["reason"].startswith("tokens error"), "entropies are judged in the contestant's own states"


def test_the_published_epsilon_shows() -> None:
    """Where all probabilities are far above it, `-sum p log(p + 1e-8)` misses the entropy by V x 1e-8."""
    V = 20000
    probs_TBnV = torch.full((3, 1, 1, V), 1.0 / V, dtype=torch.float64)
    found = entropy.published_choice(probs_TBnV, 2)
    true_TB = torch.full((3, 1), V, dtype=torch.float64).log()
    assert entropy.errors_of(found, true_TB)["entropy"] == pytest.approx(V * 1e-8, rel=1e-3)


def test_the_published_epsilon_is_nothing_in_half_precision() -> None:
    for case in entropy.cases(registry.Settings(tiny=True, dtype="float16")):
        published = case.contestants[-1]
        assert published.name == "published"
        assert published.applies(case.inputs(case.sizes)).startswith("1e-8 is 0 in float16")
    probs_TBnV = torch.zeros(1, 1, 1, 4, dtype=torch.float16)
    probs_TBnV[..., 0] = 1.0
    assert entropy.published_choice(probs_TBnV, 1)["entropy"].isnan().all()


def test_bad_sizes_are_told() -> None:
    with pytest.raises(ValueError, match="J of at most T steps, got J=99 and T=32"):
        entropy.cases(registry.Settings(shape={"J": 99}))
    with pytest.raises(ValueError, match="R a multiple of n"):
        entropy.cases(registry.Settings(shape={"R": 3}))


@pytest.mark.parametrize(("number", "factor"), [(0, 8), (1, 5)])
def test_ours_keeps_no_probability_rows(number: int, factor: float) -> None:
    measure.start_memory_server(SUITE.preload)
    case = entropy.cases(SMALL)[number]
    ours, published = (measure.peak_memory("entropy", case.label, name, SMALL).extra_mib for name in ("ours", "published"))
    kept = case.sizes["T"] * case.sizes["B"] * case.sizes["n"] * case.sizes["V"] * 4 / measure.MIB
    assert published > 2 * kept, "the rows of the steps, and their stack"
    assert published > factor * max(ours, 1.0)
