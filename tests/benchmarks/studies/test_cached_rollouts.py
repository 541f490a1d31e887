"""What kept keys and values save: the study at toy size, and its committed figures beside their bounds."""

import pytest

from benchmarks import documents
from benchmarks.studies import cached_rollouts


def test_all_ways_take_as_many_calls_and_the_exact_ones_have_no_gap():
    sizes = {"V": 40, "H": 32, "layers": 2, "P": 5, "L": 16, "block": 8}
    rows = {(row["way"], row["tokens_a_step"]): row for row in cached_rollouts.fixed(sizes, 4, {1: 1, 4: 1})}
    for tokens_a_step in cached_rollouts.TOKENS_A_STEP:
        for way in cached_rollouts.WAYS:
            assert rows[way, tokens_a_step]["calls"] == 16 // tokens_a_step
        # the first step of a block computes 21 tokens; later ones those of the block, and with a prefix what follows
        later = 8 // tokens_a_step - 1
        assert rows["none", tokens_a_step]["token_forwards"] == 2 * (later + 1) * 21
        assert rows["prefix", tokens_a_step]["token_forwards"] == 2 * 21 + later * (16 + 8)
        assert rows["dual", tokens_a_step]["token_forwards"] == 2 * 21 + later * (8 + 8)
        for way in ("none", "dual, refreshed every step"):
            assert rows[way, tokens_a_step]["gap"] < 1e-6
            assert rows[way, tokens_a_step]["same_tokens"] == 1.0
        assert rows["dual", tokens_a_step]["gap"] > 1e-4


@pytest.mark.parametrize(("tokens_a_step", "bound"), [(1, 3.0), (4, 2.5)])
def test_committed_dual_is_as_much_faster_as_it_must_be(tokens_a_step, bound):
    found = documents.result_of("cached-rollouts-cpu")["fixed"]
    seconds = {row["way"]: cached_rollouts.middle(row["cpu_seconds"]) for row in found if row["tokens_a_step"] == tokens_a_step}
    assert seconds["none"] >= bound * seconds["dual"]
