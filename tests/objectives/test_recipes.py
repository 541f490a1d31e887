"""What the package lists of its algorithms fits together."""

import inspect

import pytest
import torch

from dllm_kernels import objectives
from dllm_kernels.masks.laws import LAWS
from dllm_kernels.objectives.advantages import KINDS
from tests.objectives import loops
from tests.objectives.plans_and_batches import plan_of


def loss_of(name):
    return getattr(objectives, name.removesuffix("_sa"))  # EGSPO-SA is EGSPO's loss of other advantages


@pytest.mark.parametrize("name", objectives.RECIPES)
def test_a_recipe_makes_its_objective(name):
    recipe = objectives.RECIPES[name]
    objective = recipe.make()
    assert recipe.name == objective.name == name
    assert callable(loss_of(name))
    entries = {*objective.per_sequence, *objective.per_sample, *objective.per_token}
    assert recipe.needs_reference == any("ref" in entry for entry in entries) or "weights" in entries
    assert objective.old_scores is None or objective.old_scores in entries
    assert (objective.old_scores is not None) <= recipe.needs_old


ENTRIES = {
    "dmpo": ("weights", "baseline"),
    "espo": ("advantages", "old_elbo", "ref_elbo"),
    "gdpo": ("advantages", "old_elbo"),
    "rspo": ("advantages", "ref_elbo"),
    "vrpo": ("ref_elbo",),
    "wd1": ("weights",),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_the_entries_of_a_batch_are_detached(name):
    recipe = objectives.RECIPES[name]
    plan = plan_of(recipe.law, recipe.samples, **recipe.law_options)
    g = torch.Generator().manual_seed(0)
    entries = {entry: torch.randn(6, generator=g, dtype=torch.float64, requires_grad=True) for entry in ENTRIES[name]}
    ids = {"group_ids": torch.tensor([1, 1, 2, 2, 3, 3]), "chosen": torch.tensor([True, False] * 3)} if name == "vrpo" else {}
    logp = loops.row_logps(plan)
    recipe.make().contributions(logp, plan, objectives.Batch(entries | ids)).backward()
    assert (logp.grad != 0).any()
    assert all(tensor.grad is None for tensor in entries.values())


@pytest.mark.parametrize("name", objectives.RECIPES)
def test_a_recipe_is_of_a_law_and_an_advantage_that_exist_and_says_what_was_verified(name):
    recipe = objectives.RECIPES[name]
    assert recipe.law in LAWS
    assert set(recipe.law_options) <= set(LAWS[recipe.law].options)
    assert recipe.advantage is None or recipe.advantage in KINDS
    assert recipe.status in ("verified against the paper", "verified against the code", "unverified")
    assert recipe.notes
    assert len(recipe.arxiv) == 10
    assert recipe.needs_trajectory == (recipe.law in ("trace", "segments"))
    assert recipe.inner_iterations >= 1


@pytest.mark.parametrize("name", objectives.RECIPES)
def test_hyperparameters_are_keywords_with_the_names_and_defaults_of_the_loss(name):
    """A factory's epsilon is the function's; what one of them has alone says how it gets its tensors."""
    of_factory = inspect.signature(objectives.RECIPES[name].objective).parameters
    of_loss = inspect.signature(loss_of(name)).parameters
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in of_factory.values())
    for shared in set(of_factory) & set(of_loss):
        assert of_factory[shared].default == of_loss[shared].default, shared
