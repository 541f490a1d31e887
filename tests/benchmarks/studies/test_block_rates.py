"""The sweep of learning rates tries every one, goes on where it was cut short, and its table has a line for each."""

from __future__ import annotations

import json

import pytest

from benchmarks.studies import block_rates


@pytest.mark.slow
def test_every_rate_is_tried_once_and_has_a_line(tmp_path):
    out = tmp_path / "rates.json"
    block_rates.main(["--tiny", "--out", str(out)])
    found = json.loads(out.read_text())
    tried = [(name, lr) for name in block_rates.ALGORITHMS for lr in block_rates.LEARNING_RATES]
    assert [(row["algorithm"], row["lr"]) for row in found["rl"]] == tried
    assert len(found["first updates"]) == len(block_rates.ALGORITHMS) * len(block_rates.FIRST_UPDATES)
    assert all(row["rms"] > 0 for row in found["first updates"])
    last = found["rl"].pop()
    out.write_text(json.dumps(found))
    block_rates.main(["--tiny", "--out", str(out)])
    again = json.loads(out.read_text())
    assert again["rl"][:-1] == found["rl"], "what it has tried it leaves alone"
    assert again["rl"][-1]["rewards"] == last["rewards"]
    table = block_rates.table(again)
    assert len([line for line in table.splitlines() if line.startswith("|")]) == 2 + len(found["first updates"])
