"""Recipes give the loss and the gradient that the authors' own functions gave on the same numbers (docs/published.md)."""

import math

import pytest
from dllm_trainer.errors import ConfigError

from benchmarks import documents
from dllm_kernels.objectives import RECIPES
from tests.objectives.published import case

FOUND = documents.result_of("published")["recipes"]
NO_CODE = {"rspo", "unigrpo", "on_policy_distillation"}


def agree(got, want):
    """Losses and gradients by three numbers; row weights are fp32, and a loss may be 0."""
    return all(math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9) for a, b in zip(got, want, strict=True))


def test_every_recipe_with_public_code_was_run_beside_it():
    assert set(FOUND) == set(RECIPES) - NO_CODE
    assert all(row["gradient_error"] < 1e-7 and row["loss_error"] < 2e-7 for row in FOUND.values())


@pytest.mark.parametrize("name", FOUND)
def test_a_recipe_gives_what_the_published_function_gives_and_not_so_with_its_window_flipped(name):
    assert agree(case(name).figures, FOUND[name]["figures"])
    flipped = "eos" if RECIPES[name].window == "completion" else "completion"
    assert not agree(case(name, f"window={flipped}").figures, FOUND[name]["figures"])


TAILED = [name for name in FOUND if RECIPES[name].tail is not None]


@pytest.mark.parametrize("name", TAILED)
def test_nor_with_its_tail_shown(name):
    if RECIPES[name].needs_trajectory:  # whose states are the rollout's
        with pytest.raises(ConfigError, match=rf"rl: tail must be null or hidden for algorithm {name}.*got shown"):
            case(name, "tail=shown")
    else:
        assert not agree(case(name, "tail=shown").figures, FOUND[name]["figures"])
