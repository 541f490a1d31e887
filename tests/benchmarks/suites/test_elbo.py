"""The suite `elbo`: contestants agree, its oracle can fail, our memory does not grow with K."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from torch.testing import assert_close

from benchmarks import execution, measure, registry, report
from benchmarks.suites import elbo
from dllm_kernels.masks.laws import LAWS

pytestmark = pytest.mark.xdist_group("benchmarks")  # one worker: the memory server is started once

SUITE = elbo.SUITES["elbo"]
TINY = registry.Settings(tiny=True, threads=1)
SMALL = registry.Settings(threads=1, shape={"B": 2, "S": 32, "L": 28, "H": 16, "V": 20000})


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No subprocess for each figure, and no measurement of the machine."""
    monkeypatch.setattr(execution, "peak_memory", lambda *_: measure.Memory(1.0, "none"))
    monkeypatch.setattr(execution, "gflops_per_s", lambda *_: 100.0)


def case_of(name: str, settings: registry.Settings = TINY, K: int | None = None) -> registry.Case:
    return next(case for case in elbo.cases(settings) if case.name == name and K in (None, case.sizes["K"]))


def test_every_row_of_the_tiny_run_is_right(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # as often as it takes to have a figure: times are not looked at
    monkeypatch.setattr(execution, "interleave", lambda runners, *_: {name: measure.Timing((1.0,) * 7) for name in runners})
    rows = execution.measure(SUITE, TINY)["rows"]
    assert {row["status"] for row in rows} == {"ok"}, [row for row in rows if row["status"] != "ok"]
    assert {row["case"].rpartition(" ")[0] for row in rows} == {"score", "train", *(f"law {law}" for law in LAWS)}
    for row in rows:
        if row["role"] != "floor":
            judged = ("elbo", "gradient") if row["case"].startswith("train") else ("elbo",)
            assert tuple(row["errors"]) == judged
            # norms, rotary angles and attention are the difference
            assert row["flops_by_formula"] == pytest.approx(row["flops_counted"], rel=0.02)
    ours = [row for row in rows if row["contestant"] == "ours"]
    limits = [row for row in rows if row["contestant"] == "limit"]
    for row, limit in zip(ours, limits, strict=True):
        assert row["flops_by_formula"] == pytest.approx(limit["flops_by_formula"], rel=0.02)
    text = report.summary(SUITE, rows)
    assert "law: 1 x one pass per sample's time" in text
    assert "from K =" not in text, "the tiny run has one K above 1"
    assert "our largest gradient error" in text
    SUITE.plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_all_contestants_give_the_same_numbers() -> None:
    for name in ("score", "train"):
        results = []
        case = case_of(name, K=4)
        x = case.inputs({**elbo.TINY, "K": 4})
        for contestant in case.contestants:
            results.append({key: value.clone() for key, value in contestant.setup(x).run().items()})
        assert len(results) == 3
        for other in results[1:]:
            assert_close(other, results[0], rtol=1e-4, atol=1e-5, check_dtype=False)


def test_the_weights_of_another_law_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = elbo.estimate_elbo
    monkeypatch.setattr(elbo, "estimate_elbo", lambda *args, **options: honest(*args, **{**options, "law": "exact_zero"}))
    rows = {row["contestant"]: row for row in execution.measure_case(SUITE, case_of("score"), TINY)}
    assert rows["ours"]["status"] == "wrong"
    assert "elbo error" in rows["ours"]["reason"]
    assert rows["full logits"]["status"] == "ok"


def test_a_gradient_off_by_a_thousandth_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        elbo, "MINUS_ELBO", replace(elbo.MINUS_ELBO, contributions=lambda logp_N, plan, _: -1.001 * plan.score(logp_N).sum())
    )
    rows = {row["contestant"]: row for row in execution.measure_case(SUITE, case_of("train"), TINY)}
    assert rows["ours"]["status"] == "wrong"
    assert "gradient error 1.0e-03" in rows["ours"]["reason"]


def test_what_does_not_fit_is_listed_with_the_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elbo, "FITS", 1)
    case = case_of("score", K=4)
    x = case.inputs({**elbo.TINY, "K": 4})
    why = {contestant.name: contestant.applies(x) for contestant in case.contestants}
    assert why["full logits"] == "fp32 logits [8, 12, 64] and two of the completion take 0 GiB"
    assert why["one pass per sample"] == ""


def test_the_limit_counts_the_parameters_of_the_model() -> None:
    sizes = {**elbo.LAW_SIZES.usual, "K": 4}
    model = registry.small_model(V=sizes["V"], H=sizes["H"], layers=sizes["layers"], dtype=TINY.torch_dtype)
    read = 4 * sizes["B"] * sizes["S"]  # `full` hides and scores every token of every sample
    rows = 4 * sizes["B"] * sizes["L"]
    expected = 2.0 * (registry.multiplied_parameters(model) * read + rows * sizes["H"] * sizes["V"])
    assert elbo.least(sizes, "full") == expected


def test_sizes_follow_the_settings() -> None:
    def samples(settings: registry.Settings) -> list[int]:
        return [case.sizes["K"] for case in elbo.cases(settings) if case.name == "train"]

    assert samples(registry.Settings()) == [1, 4, 16]
    assert samples(registry.Settings(full=True)) == [1, 4, 16, 64, 256]
    assert samples(registry.Settings(shape={"K": 64})) == [1, 4, 16, 64]
    assert case_of("train", SMALL).sizes["V"] == 20000
    with pytest.raises(ValueError, match="L of at most S"):
        elbo.cases(registry.Settings(shape={"L": 99}))


@pytest.mark.parametrize(("name", "factor"), [("score", 50), ("train", 10)])
def test_memory_is_flat_in_samples_and_far_below_full_logits(name: str, factor: float) -> None:
    measure.start_memory_server(SUITE.preload)

    def extra(contestant: str, K: int) -> float:
        return measure.peak_memory("elbo", case_of(name, SMALL, K).label, contestant, SMALL).extra_mib

    few, many = extra("ours", 4), extra("ours", 16)
    assert many < 1.05 * few + 3
    assert extra("full logits", 16) > factor * max(many, 1.0)
