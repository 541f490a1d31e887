"""What the package lists of its algorithms fits together."""

import inspect
import re

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


PORT_S = {("vrpo", "normalize")}  # the function's default is the paper's


@pytest.mark.parametrize("name", objectives.RECIPES)
def test_every_keyword_of_the_factory_is_an_option_with_its_default(name):
    recipe = objectives.RECIPES[name]
    for keyword, parameter in inspect.signature(recipe.objective).parameters.items():
        assert keyword in recipe.option_names
        if parameter.default is not parameter.empty and (name, keyword) not in PORT_S:
            assert recipe.defaults[keyword] == parameter.default, keyword


@pytest.mark.parametrize(
    ("given", "error", "sentence"),
    [
        ({"segmets": 3}, ValueError, "segmets is unknown: the nearest is segments; allowed: epsilon, beta, segments"),
        ({"segments": True}, TypeError, "segments must be an integer, got True"),
        ({"beta": True}, TypeError, "beta must be a finite number, got True"),
        ({"beta": float("nan")}, TypeError, "beta must be a finite number, got nan"),
        ({"beta": -1}, ValueError, "beta must be finite and at least 0, got -1"),
        ({"epsilon": "0.2"}, TypeError, "epsilon must be a finite number, got '0.2'"),
    ],
)
def test_a_wrong_option_is_told_in_a_sentence(given, error, sentence):
    with pytest.raises(error, match=re.escape(sentence)):
        objectives.RECIPES["d2"].choose(given)


def test_an_option_may_be_of_several_kinds():
    recipe = objectives.RECIPES["trace_rl"]
    assert recipe.choose({"mode": "sdar", "window": 8}).window == 8
    assert recipe.choose({"window": None}).window is None
    with pytest.raises(TypeError, match=r"window must be an integer or null, got 2\.5"):
        recipe.choose({"window": 2.5})


@pytest.mark.parametrize("name", objectives.RECIPES)
def test_hyperparameters_are_keywords_with_the_names_and_defaults_of_the_loss(name):
    """A factory's epsilon is the function's; what one of them has alone says how it gets its tensors."""
    of_factory = inspect.signature(objectives.RECIPES[name].objective).parameters
    of_loss = inspect.signature(loss_of(name)).parameters
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in of_factory.values())
    for shared in set(of_factory) & set(of_loss):
        assert of_factory[shared].default == of_loss[shared].default, shared


def test_options_that_add_a_kl_want_a_reference():
    assert not objectives.RECIPES["gdpo"].wants_reference({})
    assert objectives.RECIPES["gdpo"].wants_reference({"beta": 0.1})
    assert objectives.RECIPES["espo"].wants_reference({})


def test_trace_rl_s_window_is_the_run_s_length_unless_it_is_given():
    recipe = objectives.RECIPES["trace_rl"]
    of_run = recipe.from_run(24, 8)
    assert recipe.choose({**of_run, "mode": "sdar"}).window == 24
    assert recipe.choose({**of_run, "mode": "sdar", "window": 7}).window == 7
    assert recipe.choose(of_run).window is None
    recipe.check({"mode": "sdar"})  # before a run's length is known
    assert not recipe.wants_reference({"mode": "sdar"})


def test_every_objective_as_published_goes_by_its_name_in_capitals():
    from dllm_kernels import objectives

    for name, recipe in objectives.RECIPES.items():
        assert getattr(objectives, name.upper()).name == recipe.make().name
    with pytest.raises(AttributeError, match="GPDO"):
        _ = objectives.GPDO
