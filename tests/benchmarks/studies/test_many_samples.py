"""K from 1 to 1024: what the study measures on a small model, and what its committed figures say."""

import math

import pytest

from benchmarks import documents
from benchmarks.studies import many_samples


def test_errors_fall_with_samples_and_the_gradients_are_those_of_one_call(monkeypatch):
    monkeypatch.setattr(many_samples, "PLANS", 64)
    monkeypatch.setitem(many_samples.MODELS, "demo", (16, 1, 15, 3, 6))
    rows = many_samples.of_model("demo", (1, 64))
    assert [row["K"] for row in rows] == [1, 64]
    assert rows[1]["elbo_se"] < rows[0]["elbo_se"] / 3
    assert rows[1]["elbo_se_said"] == pytest.approx(rows[1]["elbo_se"], rel=0.6)
    assert rows[1]["gradient"] < rows[0]["gradient"]


@pytest.mark.parametrize("model", list(many_samples.MODELS))
def test_committed_memory_is_flat_time_linear_and_errors_fall_as_the_root(model):
    rows = {row["K"]: row for row in documents.result_of("many-samples-cpu")["rows"] if row["model"] == model}
    assert list(rows) == list(many_samples.COUNTS)
    assert rows[1024]["memory_mib"] < 1.1 * rows[4]["memory_mib"] + 2
    seconds = {K: many_samples.middle(row["cpu_seconds"]) for K, row in rows.items()}
    assert 0.7 < seconds[1024] / (64 * seconds[16]) < 1.4
    for key in ("elbo_se", "gradient"):
        slope = math.log(rows[256][key] / rows[4][key]) / math.log(64)
        assert -0.65 < slope < -0.38, key
    for K in (16, 64, 256):
        assert 0.6 < rows[K]["elbo_se_said"] / rows[K]["elbo_se"] < 1.6
