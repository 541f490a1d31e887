"""The study of RL on cached rollouts runs, goes on where it stopped, and tells every run."""

from __future__ import annotations

import json
import math

import pytest

from benchmarks.documents import result_of
from benchmarks.studies import cached_rl


def test_committed_runs_are_whole_and_their_arms_differ_in_their_rollouts_alone():
    rows = {(row["seed"], row["arm"]): row for row in result_of("cached-rl-cpu")["rows"]}
    assert len(rows) == len(cached_rl.SEEDS) * len(cached_rl.ARMS)
    for seed in cached_rl.SEEDS:
        exact, dual = rows[seed, "exact"], rows[seed, "dual"]
        assert exact["largest gap"] < 1e-5 < dual["largest gap"]
        for way in ("rollout", "greedy"):
            assert exact[f"before {way}"] == dual[f"before {way}"], "both begin with one model"
        for row in (exact, dual):
            assert len(row["reward"]) == row["updates"] == 30
            assert math.isfinite(row["largest gradient"])


@pytest.mark.slow
def test_both_kinds_of_rollouts_are_trained_on_and_told(tmp_path, monkeypatch):
    cached_rl.main(["run", "--tiny", "--out", str(tmp_path / "runs")])
    trained = []
    monkeypatch.setattr(cached_rl.Run, "execute", lambda self: trained.append(self))
    cached_rl.main(["run", "--tiny", "--out", str(tmp_path / "runs")])
    assert not trained, "what is finished is not trained again"
    cached_rl.main(["collect", str(tmp_path / "runs"), "--out", str(tmp_path / "all.json")])
    result = json.loads((tmp_path / "all.json").read_text())
    assert [(row["arm"], row["updates"]) for row in result["rows"]] == [("exact", 2), ("dual", 2)]
    exact, dual = result["rows"]
    assert exact["largest gap"] < 1e-6 < dual["largest gap"]
    assert exact["before greedy"] == dual["before greedy"], "both begin with one model"
    assert len(cached_rl.table(result).splitlines()) == 4
