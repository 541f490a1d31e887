"""`benchmarks/run.py` end to end at its smallest sizes, and that its judgements can fail."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import execution, measure, registry, report
from benchmarks import run as runner
from benchmarks.suites import bgpo, head

pytestmark = pytest.mark.xdist_group("benchmarks")  # one worker: what its fixtures make is made once
ROOT = Path(__file__).resolve().parents[2]

HEAD, BGPO = head.SUITES["head"], bgpo.SUITES["bgpo"]
TINY = registry.Settings(tiny=True, threads=1)


@pytest.fixture(scope="session")  # of the group's files, tests of which may take turns
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    out = tmp_path_factory.mktemp("bench") / "new" / "result.json"
    command = [sys.executable, "benchmarks/run.py", "--tiny", "--threads", "1", "--out", str(out)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=800), out


def test_tiny_run_writes_every_figure(finished: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    process, out = finished
    assert process.returncode == 0, process.stdout + process.stderr
    results = json.loads(out.read_text())
    assert results["schema"] == 1
    assert results["command"].startswith("python benchmarks/run.py --tiny")
    environment = results["environment"]
    assert {"cpu", "threads", "python", "torch", "dllm_kernels", "git_commit", "head", "backend"} <= environment.keys()
    assert {"clocks", "transformers", "product_gflops_per_s", "copy_gbytes_per_s", "load_average"} <= environment.keys()
    assert environment["versions"].keys() >= {"triton", "liger-kernel", "trl", "cut-cross-entropy", "quack-kernels"}
    assert results["environment"]["threads"] == 1
    assert results["suites"].keys() == registry.MODULES.keys()
    for name, suite in results["suites"].items():
        assert f"{name}: {suite['summary']}" in " ".join(process.stdout.split()), "the summary is on the screen"
        assert out.with_name(f"result-{name}.png").read_bytes().startswith(b"\x89PNG")
        for row in suite["rows"]:
            assert row["status"] in ("ok", "absent"), row
            if row["status"] == "absent":
                assert row["reason"]
                continue
            if name == "accuracy":  # errors, not times
                assert row["errors"].keys() <= {"logp", "elbo256", "entropy", "gradient"}
                assert row["role"] == "peer" or max(row["errors"].values()) < 5e-3
                continue
            if name == "variance":  # statistics, not times
                assert all(f["low"] <= f["value"] <= f["high"] for f in row["figures"].values())
                assert row["figures"].keys() == {"bias", "variance", "mse"}
                continue
            if row["contestant"] == "limit":  # computed
                assert row["time_ms"]["runs"] == 0
                assert row["flops_by_formula"] > 0
                assert row["to_floor"] == 1.0
                continue
            assert row["time_ms"]["runs"] >= 7
            assert row["flops_counted"] is not None, row["flops_reason"]
            if row["role"] in ("ours", "reference") and name == "head":
                assert row["flops_counted"] == row["flops_by_formula"] > 0
            assert row["time_ms"]["min"] <= row["time_ms"]["q1"] <= row["time_ms"]["median"] <= row["time_ms"]["q3"]
            assert row["memory_mib"] is not None, row["memory_method"]
            assert row["to_baseline"] is None or row["to_baseline"] >= 0
            assert row["to_baseline"] is not None
            assert row["to_floor"] is not None or name in ("entropy", "rollout"), "the physical limit"
            assert row["errors"] or row["role"] == "floor"
    names = {row["case"].split()[0] for row in results["suites"]["head"]["rows"]}
    assert names == {"forward", "unit", "coef", "keep", "recompute", "sample", "ids", "want_top", "z_loss", "adapter"}
    assert {row["contestant"] for row in results["suites"]["bgpo"]["rows"]} >= {"ours", "ours (loop)", "full graph", "limit"}
    assert results["suites"]["bgpo"]["arithmetic"]
    assert {row["case"].split()[0] for row in results["suites"]["rollout"]["rows"]} == {
        "argmax",
        "drawn",
        "completion",
        "old_scores",
    }
    for row in results["suites"]["rollout"]["rows"]:
        assert row["errors"].get("tokens", 0.0) == 0.0, "the same tokens"
    assert {row["model"] for row in results["suites"]["variance"]["rows"]} >= {"random"}


def test_peers_choose_who_runs_beside_ours_and_the_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    _without_memory(monkeypatch)
    case = HEAD.cases(TINY)[0]
    for peers, expected in (((), {"ours", "floor"}), (("eager",), {"ours", "floor", "eager"})):
        rows = execution.measure_case(HEAD, case, replace(TINY, peers=peers))
        assert {row["contestant"] for row in rows} == expected


def test_operations_are_counted_beside_the_formula_and_a_counter_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    _without_memory(monkeypatch)
    N, V, H = 16, 64, 16
    for name, products in (("forward", 1), ("unit", 2), ("coef", 3), ("keep", 3), ("recompute", 4), ("sample", 1)):
        case = next(case for case in HEAD.cases(TINY) if case.name == name)
        (row,) = (r for r in execution.measure_case(HEAD, case, replace(TINY, peers=())) if r["contestant"] == "ours")
        assert row["flops_counted"] == row["flops_by_formula"] == 2 * products * N * V * H

    def raises() -> registry.Result:
        raise RuntimeError("no dispatch mode")

    assert execution._counted(raises) == {"flops_counted": None, "flops_reason": "RuntimeError: no dispatch mode"}


def test_a_limit_shrinks_rounds_then_memory_then_cases_and_the_result_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    _without_memory(monkeypatch)
    settings, cases = replace(TINY, peers=()), HEAD.cases(TINY)
    whole = execution.measure(HEAD, replace(settings, cases=("sample",)), 600.0)
    assert whole["cut"] == []
    assert all(row["time_ms"]["runs"] == measure.ROUNDS for row in whole["rows"] if row["time_ms"])
    entry = execution.measure(HEAD, settings, 0.0)
    first = {row["case"] for row in entry["rows"]}
    assert first == {cases[0].label}, "each suite appears with a case"
    assert all(row["time_ms"]["runs"] == execution.LEAST_ROUNDS for row in entry["rows"])
    assert entry["cut"][0].startswith(f"{len(cases) - 1} of {len(cases)} cases: ")
    assert entry["cut"][1:] == ["rounds of 2 of 2 rows, down to 2 from 7", "memory of 1 rows"]


def test_list_names_cases_and_absent_peers(capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.main(["--list"]) == 0
    printed = capsys.readouterr().out
    for expected in ("head", "bgpo", "recompute N=256", "n_t=16", "full graph", "does not sample", "quadrature 3 (GDPO)"):
        assert expected in printed


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (
            ["--suite", "heads"],
            "--suite must be one of head, distillation, expectation, elbo, bgpo, entropy, rollout, step, accuracy, variance, "
            "got 'heads'",
        ),
        (["--full", "--tiny"], "--full and --tiny exclude each other"),
        (["--suite", "head", "--peers", "ligre"], "--peers must name one of"),
        (["--dtype", "int8"], "--dtype must be one of"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--shape", "N=1"], "--shape needs exactly one --suite"),
        (["--suite", "head", "--shape", "N=1,Q=2"], "--shape of head takes N, M, H, V, cap"),
        (["--suite", "bgpo", "--shape", "V=zero"], "--shape must be like"),
        (["--suite", "variance", "--model", "/nowhere"], "--model must be the folder of a checkpoint, got /nowhere"),
        (["--suite", "variance", "--shape", "M=100"], "M a multiple of 16 from 32"),
        (["--suite", "variance", "--tiny", "--shape", "B=9999"], "takes B in 2..512, the unseen puzzles, got 9999"),
        (["--suite", "head", "--model", "/nowhere"], "--model is for suites that score a trained model, got --suite head"),
        (["--compare", "/nowhere.json"], "--compare must name a result file"),
        (["--out", "/dev/null/x.json"], "--out must be a writable file"),
    ],
)
def test_bad_arguments_are_one_sentence_and_code_2(argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.main(argv) == 2
    captured = capsys.readouterr()
    assert expected in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out


def _without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "peak_memory", lambda *_: measure.Memory(1.0, "none"))


@pytest.mark.parametrize(("suite", "number"), [(BGPO, 1), (HEAD, 2)])
def test_unequal_gradients_fail_the_run(suite: registry.Suite, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _without_memory(monkeypatch)
    case = suite.cases(TINY)[number]

    ours = case.contestants[0]

    def off_by_a_thousandth(x: Any) -> registry.Work:
        honest = ours.setup(x).run
        return registry.Work(lambda: {name: value * 1.001 if value.dim() > 1 else value for name, value in honest().items()})

    def breaks(_: Any) -> registry.Work:
        raise RuntimeError("no such library")

    wrong = replace(ours, name="wrong", setup=off_by_a_thousandth)
    contestants = (*case.contestants, wrong, replace(ours, name="broken", setup=breaks))
    rows = {row["contestant"]: row for row in execution.measure_case(suite, replace(case, contestants=contestants), TINY)}
    assert rows["ours"]["status"] == "ok"
    assert rows["wrong"]["status"] == "wrong"
    assert "gradient error 1.0e-03" in rows["wrong"]["reason"]
    assert (rows["broken"]["status"], rows["broken"]["reason"]) == ("failed", "RuntimeError: no such library")


def test_a_wrong_row_gives_exit_code_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _without_memory(monkeypatch)
    honest = bgpo.WRITTEN["bgpo"]
    # the baseline and the oracle change sign, ours does not
    monkeypatch.setitem(bgpo.WRITTEN, "bgpo", lambda *args: -honest(*args))
    argv = ["--suite", "bgpo", "--tiny", "--threads", "1", "--shape", "K=1", "--out", str(tmp_path / "a.json")]
    threads = torch.get_num_threads()
    try:
        assert runner.main(argv) == 1
    finally:
        torch.set_num_threads(threads)


def test_a_setup_that_fails_is_a_row() -> None:
    def broken(_: Any) -> Any:
        raise ImportError("No module named 'transformers'")

    rows = execution.measure_case(BGPO, replace(bgpo.cases(TINY)[0], inputs=broken), TINY)
    assert [(row["status"], row["reason"]) for row in rows] == [("failed", "set-up: ImportError: No module named 'transformers'")]


def test_compare_flags_a_regression(finished: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    base = json.loads(finished[1].read_text())
    assert report.compare(base, base)[1] == 0
    slower = copy.deepcopy(base)
    row = next(row for row in slower["suites"]["head"]["rows"] if row["contestant"] == "ours")
    row["time_ms"] = {key: value * (1 if key == "runs" else 2) for key, value in row["time_ms"].items()}
    fatter = next(row for row in slower["suites"]["bgpo"]["rows"] if row["contestant"] == "ours")
    fatter["memory_mib"] += 100.0
    fatter["errors"]["gradient"] = 1.0
    # quartiles of this noisy tiny run may overlap their own double
    original = next(r for r in base["suites"]["head"]["rows"] if r["contestant"] == "ours")["time_ms"]
    row["time_ms"]["q1"] = max(row["time_ms"]["q1"], 1.01 * original["q3"])
    lines, worse = report.compare(base, slower)
    assert worse == 3
    assert any(line.startswith("WORSE") and "(x2.00)" in line for line in lines)
    assert any("extra memory" in line for line in lines)
    assert report.compare(slower, base)[1] == 0, "an improvement is no regression"


def test_memory_of_a_known_size_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    grown = measure._growth(lambda: {"x": torch.ones(64 << 18)})  # 64 MiB
    assert 60 < grown.extra_mib < 70
    assert "reset" not in grown.method or "cannot be reset" in grown.method


def test_interleaving_is_fair_and_survives_a_failure() -> None:
    calls: list[str] = []

    def breaks_later() -> registry.Result:
        calls.append("c")
        if calls.count("c") > 2:
            raise RuntimeError("third")
        return {}

    def note(name: str) -> registry.Runner:
        def call() -> registry.Result:
            calls.append(name)
            return {}

        return call

    runners = {"a": note("a"), "b": note("b"), "c": breaks_later}
    found = measure.interleave(runners, dict.fromkeys(runners, 1.0), rounds=7)
    assert isinstance(found["a"], measure.Timing)
    assert len(found["a"].runs) == len(found["b"].runs) == 7  # type: ignore[union-attr]
    assert isinstance(found["c"], RuntimeError)
    assert calls[:7] == ["a", "b", "c", "b", "c", "a", "c"], "every round starts with another one"
