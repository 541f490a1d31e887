"""The `variance` suite against closed forms: a table of sums of log-probs stands in for the model."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from benchmarks import registry
from benchmarks.studies import statistics, variance
from benchmarks.studies.moments import Moments
from benchmarks.studies.variance import Estimator, L, Scored

ROOT = Path(__file__).resolve().parents[2]

CODES = torch.arange(2**L)
COUNTS_C = sum((CODES >> p) % 2 for p in range(L))
N_L = torch.arange(1, L + 1, dtype=torch.float64)


@pytest.fixture(scope="module")
def toy() -> Scored:
    """Three sequences whose every sum is known, likelier the more the model sees; no model is called."""
    generator = torch.Generator().manual_seed(0)
    noise_BC = torch.rand(3, 2**L, generator=generator, dtype=torch.float64)
    table_BC = -COUNTS_C * (0.2 + 2 * COUNTS_C / L) - COUNTS_C.sqrt() * noise_BC * torch.tensor([[0.5], [1.0], [4.0]])
    return Scored("toy", torch.nn.Identity(), torch.ones(3, L + 1, dtype=torch.int64), 9, table_BC)


@pytest.fixture(scope="module")
def exact(toy: Scored) -> Moments:
    groups = [toy.table_BC[:, COUNTS_C.eq(n)] for n in range(1, L + 1)]
    return Moments(torch.stack([g.mean(-1) for g in groups], 1), torch.stack([g.var(-1, correction=0) for g in groups], 1), 10**9)


def test_the_reference_has_the_exact_moments(toy: Scored, exact: Moments) -> None:
    found = variance.reference(toy, 4096)
    assert found.draws == 256
    assert_close(found.mean_BL[:, -1], toy.table_BC[:, -1], msg="one mask has all tokens")
    assert ((found.elbo_B - exact.elbo_B).abs() < 5 * found.standard_error_B).all()
    assert_close(found.exact_count().total, exact.exact_count().total, rtol=0.05, atol=0.01)
    assert_close(found.exact_count().level, exact.exact_count().level, rtol=0.05, atol=0.01)


def test_the_shares_of_the_count_are_those_of_all_masks(toy: Scored, exact: Moments) -> None:
    """Each mask of count n has probability 1 / (L C(L, n)): all masks directly, and between counts."""
    probability_C = 1 / (L * torch.tensor([math.comb(L, int(n)) for n in COUNTS_C]))
    probability_C[0] = 0
    x_BC = torch.where(COUNTS_C > 0, L / COUNTS_C.clamp(min=1) * toy.table_BC, 0)
    mean_B = (x_BC * probability_C).sum(-1)
    all_B = ((x_BC - mean_B[:, None]) ** 2 * probability_C).sum(-1)
    assert_close(mean_B, exact.elbo_B)
    assert_close(exact.exact_count().total, all_B)
    assert_close(exact.exact_count().level, ((L / N_L * exact.mean_BL - mean_B[:, None]) ** 2).mean(-1))


def test_the_shares_of_t_are_those_of_an_integral_over_t(exact: Moments) -> None:
    """Trapezoids over a fine grid of log t, binomial probabilities from math.comb."""
    grid = torch.linspace(math.log(variance.T_MIN), 0, 20001, dtype=torch.float64).exp()
    choose_L = torch.tensor([math.comb(L, n) for n in range(1, L + 1)], dtype=torch.float64)
    p_TL = choose_L * grid[:, None] ** N_L * (1 - grid[:, None]) ** (L - N_L)

    def mean_over_t(values_BT: torch.Tensor) -> torch.Tensor:
        return torch.trapezoid(values_BT, grid) / (1 - variance.T_MIN)

    first_BT = exact.mean_BL @ p_TL.t() / grid
    by_count_BT = (exact.mean_BL**2) @ p_TL.t() / grid**2
    second_BT = (exact.mean_BL**2 + exact.variance_BL) @ p_TL.t() / grid**2
    mean_B = mean_over_t(first_BT)
    found = exact.bernoulli(variance.T_MIN)
    assert_close(found.mean, mean_B, rtol=1e-5, atol=0)
    assert_close(found.total, mean_over_t(second_BT) - mean_B**2, rtol=1e-5, atol=0)
    assert_close(found.level, mean_over_t(first_BT**2) - mean_B**2, rtol=1e-4, atol=0)
    assert_close(found.count, mean_over_t(by_count_BT - first_BT**2), rtol=1e-5, atol=0)


@pytest.mark.parametrize("budget", [1, 4])
def test_independent_estimates_have_the_closed_form_s_mean_and_variance(toy: Scored, exact: Moments, budget: int) -> None:
    R = 4000
    for estimator, whole_B in (
        (Estimator("light tails", "bernoulli", {"t_min": 0.1}), exact.bernoulli(0.1).total),
        (variance.ESTIMATORS[1], exact.exact_count().total),
    ):
        found_BR = variance.estimates(toy, estimator, budget, R)
        assert found_BR.shape == (3, R)
        if estimator.law == "exact":
            assert ((found_BR.mean(-1) - exact.elbo_B).abs() < 5 * (whole_B / budget / R).sqrt()).all()
        assert_close(found_BR.var(-1), whole_B / budget, rtol=0.1, atol=0)


@pytest.mark.parametrize("budget", [1, 3, 4, 16, 20])
def test_stratified_estimates_have_the_closed_form_s_variance(toy: Scored, exact: Moments, budget: int) -> None:
    found_BR = variance.estimates(toy, variance.ESTIMATORS[2], budget, 4000)
    assert_close(found_BR.var(-1), exact.stratified(budget), rtol=0.1, atol=0)


@pytest.mark.parametrize("nodes", [2, 3, 4])
@pytest.mark.parametrize("counted", [False, True])
def test_quadrature_s_bias_and_variance_are_those_of_its_nodes(toy: Scored, exact: Moments, counted: bool, nodes: int) -> None:
    estimator = next(e for e in variance.ESTIMATORS if e.name == variance.quadrature_name(nodes, counted))
    mean_B, variance_B = exact.quadrature(nodes, counted=counted)
    found_BR = variance.estimates(toy, estimator, 2 * nodes, 2000)
    assert ((found_BR.mean(-1) - mean_B).abs() < 5 * (variance_B / 2 / 2000).sqrt()).all()
    assert_close(found_BR.var(-1), variance_B / 2, rtol=0.15, atol=0)


@pytest.mark.parametrize("parts", [[0], [0, 1], [1, 1, 0]])
def test_a_longer_completion_has_the_moments_of_all_its_masks(parts: list[int]) -> None:
    """Two tokens a part, every mask of the whole: the sum over the parts, at each count."""
    table_BC = -torch.rand(2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * torch.tensor([0, 1, 1, 2])
    masks = torch.tensor([bin(code).count("1") for code in range(4)])
    of_parts = Moments(
        torch.stack([table_BC[:, masks == n].mean(-1) for n in (1, 2)], 1),
        torch.stack([table_BC[:, masks == n].var(-1, correction=0) for n in (1, 2)], 1),
        1,
    )
    whole: dict[int, list[float]] = {n: [] for n in range(1, 2 * len(parts) + 1)}
    for codes in itertools.product(range(4), repeat=len(parts)):
        if any(codes):
            total = sum(float(table_BC[part, code]) for part, code in zip(parts, codes, strict=True))
            whole[sum(int(masks[code]) for code in codes)].append(total)
    joined = of_parts.joined(torch.tensor([parts]))
    assert joined.mean_BL[0].tolist() == pytest.approx([float(np.mean(v)) for v in whole.values()], abs=1e-12)
    assert joined.variance_BL[0].tolist() == pytest.approx([float(np.var(v)) for v in whole.values()], abs=1e-12)


def test_strata_and_pairs_cut_the_variance_where_the_level_is_what_varies(toy: Scored) -> None:
    smooth = Scored("smooth", toy.model, toy.ids_BS, 9, (-COUNTS_C * (0.2 + 2 * COUNTS_C / L)).expand(3, -1).contiguous())
    independent, stratified = (variance.estimates(smooth, variance.ESTIMATORS[i], 4, 500).var(-1) for i in (1, 2))
    assert (stratified < 0.3 * independent).all()


def test_intervals_are_bootstraps_over_the_sequences() -> None:
    values = torch.randn(64, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 3
    found = statistics.ratio(values)
    assert found["value"] == pytest.approx(float(values.mean()))
    half = 1.96 * float(values.std()) / 8
    assert found["low"] == pytest.approx(found["value"] - half, abs=0.15 * half)
    assert found["high"] == pytest.approx(found["value"] + half, abs=0.15 * half)
    ratio = statistics.ratio(2 * values, values)
    assert ratio == pytest.approx({"value": 2.0, "low": 2.0, "high": 2.0}), "paired: what all sequences share does not vary"
    assert statistics.ratio(values) == found


@pytest.mark.slow
def test_without_a_checkpoint_the_trained_model_is_listed_as_absent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(variance, "ROOT", tmp_path)
    monkeypatch.setattr(variance, "DEFAULT_MODEL", tmp_path / "runs" / "demo" / "checkpoint")
    monkeypatch.setattr(variance, "ESTIMATORS", (*variance.ESTIMATORS[:3], Estimator("quadrature 3 (GDPO)", "quadrature", {}, 3)))
    entry = variance.measure(registry.Settings(tiny=True, threads=1))
    (row,) = (row for row in entry["rows"] if row["model"] != "random")
    assert (row["status"], row["role"]) == ("absent", "ours")
    assert row["reason"] == "no runs/demo/checkpoint: train it with `dllm-kernels demo`, or give --model FOLDER"
    assert any(row["status"] == "ok" for row in entry["rows"])
    json.dumps(entry)
