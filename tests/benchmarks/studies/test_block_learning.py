"""Every way of training of the learning study runs, and its table has a line for each."""

from __future__ import annotations

import json
import math

import pytest

from benchmarks.studies import block_learning


@pytest.mark.slow
def test_every_way_of_training_runs_and_the_table_has_a_line_for_each(tmp_path):
    out = tmp_path / "seed.json"
    block_learning.main(["run", "--seed", "3", "--tiny", "--out", str(out)])
    run = json.loads(out.read_text())
    ways = [(row["sft"], row["scoring"], row["algorithm"]) for row in run["rl"]]
    assert ways == [(sft, scoring, name) for sft, scoring, names in block_learning.RUNS for name in names]
    assert all(math.isfinite(value) for row in run["rl"] for value in (*row["rewards"], *row["grad_norms"]))
    assert all(row["tokens"] > 0 for row in run["rl"])
    old, blocks = run["sft"][block_learning.NOISY_HISTORY], run["sft"][block_learning.BLOCKS]
    assert old["tokens"] == pytest.approx(blocks["tokens"], rel=0.1), "as many tokens, or the nearest number of steps"
    assert blocks["gap"]["mean difference"] > 1e-3, "the old score is another"
    assert old["states gap"] < 1e-5, "but for the states of a rollout, which have no noise before a block"
    block_learning.main(["collect", str(out), str(out), "--out", str(tmp_path / "all.json")])
    table = block_learning.table(json.loads((tmp_path / "all.json").read_text()))
    assert len([line for line in table.splitlines() if line.startswith("|")]) == 2 + 2 + len(ways)
