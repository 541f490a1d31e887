"""GDPO (arXiv 2510.08554): quadrature beats double Monte Carlo at tight budgets; most variance comes from t.

Source: the paper's figures at second hand, its code read (`dllm_kernels/objectives/gdpo.py`). Both are
measured by `benchmarks/run.py --suite variance` in closed form from 4096 samples; the figures are taken from
that run's committed result, not measured again. The first is decided by the ratio of squared errors at as
many passes as nodes, the second by the share of one pass's variance that the level t explains, on the two
trained models; docs/estimators.md has all of it.
"""

from __future__ import annotations

import json
from typing import Any

from benchmarks.report import percent
from benchmarks.studies import common
from benchmarks.studies.common import RESULTS, Claim, Figures, Settings

SOURCE = RESULTS / "estimators-cpu.json"
MONTE_CARLO, STRATIFIED = "double Monte Carlo", "exact, stratified"
CLAIMED_SHARE, ABOUT = 0.96, 0.06  # "about 96 %": from 90 % on


def _entry() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(SOURCE.read_text())
    return found


def quadrature(_: Settings) -> Figures:
    result = _entry()
    rows: dict[tuple[str, int, int], dict[str, Any]] = {}
    for x in result["suites"]["variance"]["quadrature_over_monte_carlo"]:
        nodes = int(x["estimator"].split()[1].rstrip(","))
        if x["estimator"].endswith("(GDPO)") and x["budget"] == nodes and x["over"] in (MONTE_CARLO, STRATIFIED):
            key = x["model"], x["L"], nodes
            rows.setdefault(key, {"model": x["model"], "tokens": x["L"], "nodes": nodes})[x["over"]] = x["mse_ratio"]
    return {"source": SOURCE.name, "source_command": result["command"], "rows": list(rows.values())}


def quadrature_verdict(figures: Figures) -> str:
    found = [row[MONTE_CARLO] for row in figures["rows"]]
    return common.decide(all(x["high"] < 1 for x in found), all(x["low"] > 1 for x in found))


quadrature_table = common.table(
    {
        "model": "model",
        "tokens": "tokens",
        "nodes = passes": "nodes",
        "over double Monte Carlo": MONTE_CARLO,
        "over stratified exact counts": STRATIFIED,
    }
)


def level(_: Settings) -> Figures:
    result = _entry()
    rows = [
        {"model": x["model"], "tokens": x["L"], "t": x["level"], "count given t": x["count"], "masks": x["masks"]}
        for x in result["suites"]["variance"]["shares_of_variance"]
        if x["estimator"] == MONTE_CARLO
    ]
    return {"source": SOURCE.name, "source_command": result["command"], "rows": rows}


def level_verdict(figures: Figures) -> str:
    found = [row["t"] for row in figures["rows"] if row["model"] != "random"]
    least = CLAIMED_SHARE - ABOUT
    return common.decide(all(x["high"] >= least for x in found), all(x["high"] < least for x in found))


level_table = common.table(
    {
        "model": "model",
        "tokens": "tokens",
        "share of t": lambda row: percent(row["t"]),
        "share of the count given t": lambda row: percent(row["count given t"]),
        "share of which tokens are hidden": lambda row: percent(row["masks"]),
    }
)


CLAIMS = (
    Claim(
        "gdpo-quadrature",
        "GDPO",
        "quadrature over t has less squared error than double Monte Carlo at equal, tight budgets",
        "confirmed if the ratio of squared errors lies below 1 with its interval, for all models, lengths and numbers of nodes",
        lambda _: {"B": 64, "R": 32, "M": 4096},
        quadrature,
        quadrature_verdict,
        quadrature_table,
    ),
    Claim(
        "gdpo-level",
        "GDPO",
        "about 96 % of Monte-Carlo variance comes from the random t",
        "refuted if every interval of the share of t ends below 90 %, for both trained models and all lengths",
        lambda _: {"B": 64, "R": 32, "M": 4096},
        level,
        level_verdict,
        level_table,
        caveat="at 16 to 256 tokens, where the share grows with the length; the figure is known at second hand",
    ),
)
