"""The documents are true: their code runs, their figures are those of the committed results, their files are there."""

import ast
import json
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from dllm_trainer.commands import compare_report
from torch.testing import assert_close

import dllm_kernels
from benchmarks import documents, report
from benchmarks.studies import tasks, variance
from dllm_kernels.objectives import RECIPES
from tests.accumulation.test_all_algorithms import gradient_moments

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
README = " ".join((ROOT / "README.md").read_text().split())
RESULTS = " ".join((ROOT / "docs" / "results.md").read_text().split())
TEXT = (ROOT / "docs" / "estimators.md").read_text()
PROSE = " ".join(TEXT.split())
ENTRY = json.loads((ROOT / "benchmarks" / "results" / "estimators-cpu.json").read_text())["suites"]["variance"]
SFT, RL = "demo/checkpoint_sft", "demo/checkpoint"


# --- every page -------------------------------------------------------------------------------------------------------


def code(page: Path, language: str = "python") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def run_blocks(page: Path) -> dict[str, object]:
    """The page's Python blocks, one after the other; returns their names."""
    names: dict[str, object] = {}
    for block in code(page):
        exec(compile(block, str(page), "exec"), names)
    return names


def written_by_hand(page: Path) -> Iterator[tuple[int, str]]:
    """Lines with their numbers, without those between the markers of a generated block."""
    generated = False
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        if line.startswith("<!-- "):
            generated = not line.startswith("<!-- end of ")
        elif not generated:
            yield number, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_have_at_most_110_columns_but_for_tables_and_urls(page):
    long = {n: line for n, line in written_by_hand(page) if len(line) > 110 and not line.startswith("|") and "://" not in line}
    assert not long


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_that_a_page_names_are_there(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)(?:#[\w-]+)?\)", text):
        assert "://" in target or (page.parent / target).exists(), target
    for path in re.findall(r"`((?:benchmarks|trainer|tests|csrc|dllm_kernels|docs|examples|\.github)/[\w./-]*)`", text):
        assert (ROOT / path).exists(), path


def test_links_into_a_page_find_their_heading():
    for page in PAGES:
        for target, anchor in re.findall(r"\]\(([^)#]*)#([\w-]+)\)", page.read_text()):
            headings = re.findall(r"^#+ (.*)$", (page.parent / target if target else page).read_text(), flags=re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings], anchor


def test_the_index_leads_to_every_page():
    index = (ROOT / "docs" / "README.md").read_text()
    assert set(re.findall(r"\(([a-z_]+\.md)\)", index)) == {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}


def test_the_loop_of_your_own_runs_and_its_ways_agree():
    names = run_blocks(ROOT / "docs" / "loop.md")
    report, model, elbo = names["report"], names["model"], names["elbo"]
    assert (report.passes, report.forwards, report.backwards) == (1, 16, 16)
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in model.parameters())
    assert_close(elbo, report.sample_elbo_BK, atol=1e-4, rtol=1e-4)
    assert names["blocks"].layout(4).ids_RT.shape == (8, 24 + 4 * 16)
    assert names["report_of_blocks"].forwards == 2
    assert (names["estimate"].elbo_B - elbo.mean(-1)).abs().max() < 8 * names["estimate"].standard_error_B.max()
    hidden, weight = names["hidden"].detach().requires_grad_(), names["weight"].clone().requires_grad_()
    scores = dllm_kernels.score_tokens(hidden, weight, names["plan"].rows.target, rows=names["plan"].rows.index, suppress=(63,))
    (0.5 * scores.logp.sum()).backward()
    assert_close(names["dhidden"], hidden.grad, atol=1e-5, rtol=1e-4)
    assert_close(names["dweight"], weight.grad, atol=1e-5, rtol=1e-4)
    assert names["drawn"].token.shape == (24,)
    assert not (names["drawn"].token == names["mask_id"]).any()


def test_the_rollouts_of_the_page_are_replayed():
    names = run_blocks(ROOT / "docs" / "rollouts.md")
    assert names["entropy"].shape == (8, 3)
    assert names["old"].shape == (3, 3)
    assert bool((names["old"] < 0).all())


def test_every_python_block_is_run_by_a_test():
    assert [page.name for page in PAGES if code(page)] == ["CONTRIBUTING.md", "loop.md", "rollouts.md"]


def test_every_public_function_is_shown():
    blocks = "".join("".join(code(ROOT / "docs" / name)) for name in ("loop.md", "rollouts.md"))
    (diff,) = code(ROOT / "README.md", "diff")
    shown = {a.name for node in ast.walk(ast.parse(blocks)) if isinstance(node, ast.ImportFrom) for a in node.names}
    functions = {name for name in dllm_kernels.__all__ if callable(getattr(dllm_kernels, name)) and name.islower()}
    assert functions <= shown | set(re.findall(r"\w+", diff))


# --- estimators.md ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", variance.TABLES)
def test_each_table_is_that_of_the_committed_run(name):
    assert documents.in_document(TEXT, name) == variance.TABLES[name](ENTRY)


def test_the_verdict_on_the_share_of_t_is_that_of_the_results():
    found = {(x["model"], x["L"], x["estimator"]): f"{100 * x['level']['value']:.0f} %" for x in ENTRY["shares_of_variance"]}
    t, count = (lambda m, n, e=e: found[m, n, e] for e in ("double Monte Carlo", "exact, independent"))
    assert f"t makes {t(RL, 16)} of the variance of double Monte Carlo on 16 tokens" in PROSE
    assert f"the count {count(RL, 16)} of that of exact counts; after SFT {t(SFT, 16)} and {count(SFT, 16)}" in PROSE
    assert f"to {t(RL, 256)} and {count(RL, 256)} (after SFT {t(SFT, 256)} and {count(SFT, 256)}) on 256 tokens" in PROSE
    assert f"({t(RL, 16)} of it after RL, not 96 %)" in RESULTS
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
    assert "({} to {} of its squared error on the trained models)".format(*ratios("double Monte Carlo", trained)) in RESULTS
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


def test_what_the_page_says_of_the_fuzzed_calls_is_what_was_committed():
    state = documents.result_of("fuzz")
    loop = (ROOT / "docs" / "loop.md").read_text()
    for name, block in documents.blocks("fuzz").items():
        assert documents.in_document(loop, name) == block
    newest = state["sources"][state["source"]]
    assert "changed" not in state["source"]
    assert set(state["isas"]) <= set(newest["by_engine"])
    assert state["cases"] == sum(x["cases"] for x in state["sources"].values())
    assert sum(newest["by_engine"].values()) == newest["cases"]


# --- algorithms.md ------------------------------------------------------------------------------------------

ALGORITHMS = (ROOT / "docs" / "algorithms.md").read_text()


@pytest.mark.parametrize("document", documents.DOCUMENTS["algorithms"])
def test_the_list_of_algorithms_is_that_of_their_recipes(document):
    assert documents.in_document((ROOT / document).read_text(), "algorithms") == documents.algorithms()
    assert len(RECIPES) == 22
    assert "Twenty-two" in README


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


@pytest.mark.parametrize("task", documents.TASKS)
def test_the_comparison_is_that_of_the_committed_cells(task):
    result = documents.result_of(f"compare-{task}")
    text = documents.in_document(COMPARISON, task)
    assert text == documents.comparison(result)
    assert ("Not complete" in text) == bool(compare_report.missing(result)), "what has not run is told"
    for entry in (entry for entry in result["cells"] if entry["failed"] is None):
        asked = result["validation" if entry["phase"] == "sweep" else "examples"]
        assert entry["right"]["rollout"]["examples"] == asked
        assert sum(entry["curve"]["forwards"]) == entry["forwards"]
        if entry["updates"]:
            budget = result["sweep_budget" if entry["phase"] == "sweep" else "budget"]
            assert abs(entry["forwards"] - budget) <= max(entry["curve"]["forwards"]), "equal forwards, to an update"
    assert (documents.RESULTS / f"compare-{task}.png").read_bytes().startswith(b"\x89PNG")


def test_what_the_comparison_tells_of_rates_is_in_its_cells():
    result = documents.result_of("compare-sudoku")
    rows = {row["algorithm"]: row for row in compare_report.rows(result)}
    sft = 100 * statistics.fmean(rows["bgpo"]["rollout"]["sft"])
    ran = {}
    for cell in result["cells"]:
        if cell["phase"] == "final":
            ran.setdefault((cell["algorithm"], cell["rate"]), []).append(100 * cell["right"]["rollout"]["correct"] - sft)
    assert {len(gains) for gains in ran.values()} == {5}
    gain = {key: statistics.fmean(gains) for key, gains in ran.items()}
    taken = {name: gain[name, row["rate"]] for name, row in rows.items()}
    assert len(taken) == 21
    assert sum(row["improves"] for row in rows.values()) == 16
    assert {name for name, points in taken.items() if points < 0} == {"unigrpo", "dmpo"}
    assert set(sorted(taken, key=taken.__getitem__)[-5:]) == {"d2", "egspo", "egspo_sa", "gdpo", "vrpo"}
    lower = {name: points for (name, rate), points in gain.items() if rate == 1.5e-4}
    assert (len(lower), min(lower, key=lower.__getitem__), max(lower, key=lower.__getitem__)) == (17, "mdpo", "trace_rl")
    told = {"trace_rl": 20.5, "justgrpo": 5.2, "unigrpo": 8.9, "dmpo": 10.5, "bgpo": 15.7}
    assert {name: round(lower[name], 1) for name in told} == told
    assert sorted(lower.values())[1] == lower["justgrpo"]
    both = {name for name in lower if rows[name]["rate"] == 5e-4}
    assert {name for name in both if taken[name] > lower[name]} == {"diffu_grpo"}
    lowest = {name for name in rows if rows[name]["rate"] == 5e-5}
    assert len(lowest) == 5
    assert {name for name in lowest if lower[name] < taken[name] + 1} == {"mdpo"}
    assert rows["ebpo"]["rollout"] == rows["bgpo"]["rollout"]
    countdown = {row["algorithm"]: row for row in compare_report.rows(documents.result_of("compare-countdown"))}
    assert {name for name, row in countdown.items() if row["improves"]} == {"bgpo", "ebpo", "gdsd", "gdpo", "trace_rl"}


# --- the blocks of all documents ----------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["demo", "head", "algorithms", "blocks", "loops"])
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


def test_every_committed_picture_is_there_as_png_and_as_svg():
    pictures = {file.with_suffix("") for kind in ("png", "svg") for file in documents.RESULTS.glob(f"*.{kind}")}
    assert pictures
    assert [str(p) for p in pictures if not (p.with_suffix(".png").is_file() and p.with_suffix(".svg").is_file())] == []


# --- tasks.md -----------------------------------------------------------------------------------------------


def test_the_table_of_tasks_is_that_of_the_committed_runs():
    result = documents.result_of("tasks-cpu")
    assert documents.in_document((ROOT / "docs" / "tasks.md").read_text(), "tasks table") == tasks.table(result)
    seeds = {(run["task"], run["seed"]) for run in result["runs"] if run["updates"]}
    assert len(seeds) == 12, "four tasks, three seeds"
    assert seeds == {(run["task"], run["seed"]) for run in result["runs"] if not run["updates"]}, "each with its control"
