"""The documents are true: tables and figures are those of the committed results, files are there."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import documents, report
from benchmarks.studies import variance
from dllm_kernels.objectives import RECIPES
from tests.accumulation.test_all_algorithms import gradient_moments

ROOT = Path(__file__).parent.parent
README = " ".join((ROOT / "README.md").read_text().split())
TEXT = (ROOT / "docs" / "estimators.md").read_text()
PROSE = " ".join(TEXT.split())
ENTRY = json.loads((ROOT / "benchmarks" / "results" / "estimators-cpu.json").read_text())["suites"]["variance"]
SFT, RL = "demo/checkpoint_sft", "demo/checkpoint"


@pytest.mark.parametrize("name", variance.TABLES)
def test_each_table_is_that_of_the_committed_run(name):
    assert documents.in_document(TEXT, name) == variance.TABLES[name](ENTRY)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"(?:\.\./)?((?:benchmarks|tests)/[\w./-]+\w)", TEXT))))
def test_every_file_it_names_is_there(path):
    assert (ROOT / path).exists()


def test_the_verdict_on_the_share_of_t_is_that_of_the_results():
    found = {(x["model"], x["L"], x["estimator"]): f"{100 * x['level']['value']:.0f} %" for x in ENTRY["shares_of_variance"]}
    t, count = (lambda m, n, e=e: found[m, n, e] for e in ("double Monte Carlo", "exact, independent"))
    assert f"t makes {t(RL, 16)} of the variance of double Monte Carlo on 16 tokens" in PROSE
    assert f"the count {count(RL, 16)} of that of exact counts; after SFT {t(SFT, 16)} and {count(SFT, 16)}" in PROSE
    assert f"to {t(RL, 256)} and {count(RL, 256)} (after SFT {t(SFT, 256)} and {count(SFT, 256)}) on 256 tokens" in PROSE
    assert f"({t(RL, 16)} of it after RL, not 96 %)" in README
    assert max(x["level"]["high"] for x in ENTRY["shares_of_variance"]) < 0.7, "far from 96 %"


def ratios(over, models, *, L=16, budget=None, nodes=(2, 3, 4), form="(GDPO)"):
    """Smallest and largest ratio of squared errors, as printed."""
    values = [
        x["mse_ratio"]["value"]
        for x in ENTRY["quadrature_over_monte_carlo"]
        for n in nodes
        if x["model"] in models and x["L"] == L and x["over"] == over and x["estimator"] == f"quadrature {n} {form}"
        if x["budget"] == (budget or n)
    ]
    assert len(values) == len(models) * len(nodes)
    return tuple(report.two_digits(value) for value in (min(values), max(values)))


def test_the_verdict_on_quadrature_is_that_of_the_results():
    trained = (SFT, RL)
    assert (
        "error is {} to {} of double Monte Carlo's on the trained models".format(*ratios("double Monte Carlo", trained)) in PROSE
    )
    assert "({} to {} of its squared error on the trained models)".format(*ratios("double Monte Carlo", trained)) in README
    assert "over exact-count Monte Carlo it is {} to {}".format(*ratios("exact, independent", trained)) in PROSE
    two_or_three = ratios("exact, stratified", trained, nodes=(2, 3))
    assert "which is unbiased, {} to {} with 2 or 3 nodes".format(*two_or_three) in PROSE
    assert ratios("exact, stratified", trained, nodes=(4,)) == ("1.1", "1.1")
    low, high = ratios("exact, stratified", trained, budget=12)
    assert f"nothing is left ({float(low):.1f} to {high})" in PROSE
    assert "it has {} to {} of the stratified law's error".format(*ratios("exact, stratified", trained, L=256)) in PROSE
    assert float(ratios("double Monte Carlo", ("random",))[1]) < 1, "confirmed on all three models"
    assert (
        "{} to {} times the squared error of exact-count Monte Carlo".format(*ratios("exact, independent", ("random",))) in PROSE
    )


def test_the_biases_are_those_of_the_results():
    def biases(models, form):
        rows = [r for r in ENTRY["rows"] if r["model"] in models and r["sizes"].get("K") == 12 and r["contestant"].endswith(form)]
        assert len(rows) == 3 * len(models)
        values = sorted(abs(r["figures"]["bias"]["value"]) for r in rows)
        return report.two_digits(values[0]), report.two_digits(values[-1])

    assert "random model {} to {} nats too high".format(*biases(("random",), "(GDPO)")) in PROSE
    assert float(biases(("random",), "L/count")[1]) <= 0.04
    low, high = biases((SFT, RL), "L/count")
    assert f"{float(low):.2f} to {high} nats instead of {' to '.join(biases((SFT, RL), '(GDPO)'))}" in PROSE
    antithetic, exact = (
        next(r["figures"]["mse"]["value"] for r in ENTRY["rows"] if (r["model"], r["sizes"]["K"], r["contestant"]) == key)
        for key in (("random", 4, "antithetic (ESPO)"), ("random", 4, "exact, stratified"))
    )
    assert f"({report.two_digits(antithetic)} against {report.two_digits(exact)} at 4 passes)" in PROSE


def test_the_table_of_the_cpu_engine_is_that_of_the_committed_run():
    result = documents.result_of("head-cpu")
    assert documents.in_document((ROOT / "docs" / "cpu_engine.md").read_text(), "head table") == documents.head(result)
    assert all(row["status"] in ("ok", "absent") for run in result["runs"] for row in run["suites"]["head"]["rows"])


# --- algorithms.md ------------------------------------------------------------------------------------------

ALGORITHMS = (ROOT / "docs" / "algorithms.md").read_text()


@pytest.mark.parametrize("document", documents.DOCUMENTS["algorithms"])
def test_the_list_of_algorithms_is_that_of_their_recipes(document):
    assert documents.in_document((ROOT / document).read_text(), "algorithms") == documents.algorithms()
    assert len(RECIPES) == 15
    assert "Fifteen" in README


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:dllm_kernels|tests|docs)/[\w./-]+\w)", ALGORITHMS))))
def test_every_file_that_the_algorithms_name_is_there(path):
    assert (ROOT / path).exists()


def test_dmpo_s_variances_are_those_that_are_measured():
    found = {
        (kind, group): f"{gradient_moments(kind, group)[1]:.3f}" for kind in ("none", "neg", "mean", "unbias") for group in (2, 4)
    }
    prose = " ".join(ALGORITHMS.split())
    for kind in ("mean", "unbias"):
        assert f"{found[kind, 2]} with" in prose
        assert f"{found[kind, 4]} against {found['none', 4]}" in prose
    assert f"against {found['none', 2]} without a baseline" in prose
    assert f"with it {found['neg', 2]} and {found['neg', 4]}" in prose


# --- comparison.md ------------------------------------------------------------------------------------------

COMPARISON = (ROOT / "docs" / "comparison.md").read_text()
OF_THE_MISSION = {"gdpo", "dmpo", "bgpo", "egspo", "egspo_sa", "rspo"}


@pytest.mark.parametrize("task", documents.TASKS)
def test_the_comparison_is_that_of_the_committed_runs(task):
    result = documents.result_of(f"compare-{task}")
    assert documents.in_document(COMPARISON, task) == documents.comparison(result)
    names = {row["algorithm"] for row in result["algorithms"]}
    assert names == (set(RECIPES) if task == "sudoku" else OF_THE_MISSION)
    for row in result["algorithms"]:
        assert len(row["forwards"]) >= 3
        made = sum(row["forwards"]) / len(row["forwards"])
        assert abs(made / result["budget"] - 1) <= 0.03, "equal forwards, to the 3 % that the page says"
        assert row["improves"], "the page says that all do"
    assert (documents.RESULTS / f"compare-{task}.png").read_bytes().startswith(b"\x89PNG")


def test_the_order_that_the_comparison_tells_is_that_of_the_runs():
    def order(task):
        rows = documents.result_of(f"compare-{task}")["algorithms"]
        return [row["algorithm"] for row in sorted(rows, key=lambda row: -sum(row["rollout"]["rl"]))]

    sudoku, countdown = order("sudoku"), order("countdown")
    assert set(sudoku[:4]) == {"d2", "trace_rl", "egspo", "egspo_sa"}
    assert set(sudoku[4:9]) == {"bgpo", "espo", "diffu_grpo", "dmpo", "rspo"}
    assert set(sudoku[-5:]) == {"wd1", "unigrpo", "vrpo", "spg", "gdpo"}
    assert [name for name in sudoku if name in OF_THE_MISSION][-1] == countdown[0] == "gdpo"


# --- the blocks of all documents ----------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["demo", "head", "algorithms"])
def test_writing_changes_what_stands_between_markers_and_nothing_else(table):
    for document in documents.DOCUMENTS[table]:
        text = (ROOT / document).read_text()
        assert documents.filled(text, documents.blocks(table)) == text, "it is what the committed results say"
        (name, block), *_ = documents.blocks(table).items()
        changed = documents.filled(text, {name: "another"})
        assert changed == text.replace(block, "another")
    with pytest.raises(ValueError, match=f"the markers '<!-- {name}: benchmarks/documents.py -->' and"):
        documents.filled(text.replace(f"<!-- end of {name} -->", ""), {name: block})


def test_a_table_that_is_not_there_is_told(capsys):
    assert documents.main(["write", "everything"]) == 2
    assert "a table must be one of measured, every row" in capsys.readouterr().err
