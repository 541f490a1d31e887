"""What the cost study counts, and what its committed figures say."""

from __future__ import annotations

from benchmarks import documents
from benchmarks.studies import block_cost


def test_tokens_are_a_clean_copy_and_k_noisy_ones_beside_k_doubled_sequences():
    """Losses and gradients of the three ways are equal, or it raises."""
    for k in (1, 3):
        row = block_cost.of_samples("0.1M", 8, k, 0)
        S, C = row["S"], row["C"]
        assert row["tokens"] == {"doubled": k * (S + C), "dense": S + k * C, "parts": S + k * C}


def test_a_trajectory_in_one_pass_has_the_gradient_of_a_round_a_pass():
    row = block_cost.of_trajectory("0.1M", 0, {"P": 8, "C": 8})
    assert row["states"] == 4
    assert list(row["tokens"].values()) == [4 * (16 + 8), 4 * (16 + 8), 16 + 4 * 8]


def test_the_committed_costs_are_counted_exactly_and_a_trajectory_is_as_fast_as_the_page_says():
    result = documents.result_of("block-cost-cpu")
    assert [(row["body"], row["C"], row["k"]) for row in result["rows"]] == [
        (body, C, k) for body in block_cost.BODIES for C in block_cost.COMPLETIONS for k in block_cost.SAMPLES
    ]
    for row in result["rows"]:
        k, S, C = row["k"], row["S"], row["C"]
        assert row["tokens"] == {"doubled": k * (S + C), "dense": S + k * C, "parts": S + k * C}
    for row in result["trajectories"]:
        best = {name: min(seconds["cpu"]) for name, seconds in row["seconds"].items()}
        ours = best.pop(block_cost.ROUNDS_OF_STATES[-1])
        assert min(best.values()) > 1.5 * ours
