"""What the package lists of its algorithms fits together."""

import dataclasses
import inspect
import re
from typing import Optional

import pytest
import torch

from dllm_kernels import generate, objectives
from dllm_kernels.masks.laws import LAWS
from dllm_kernels.objectives.advantages import KINDS
from dllm_kernels.objectives.recipe import Clip
from tests.objectives import loops
from tests.objectives.plans_and_batches import plan_of
from tests.tiny import eurobert


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


def test_a_union_may_be_written_the_old_way():
    """As `typing.get_type_hints` gives it on Python 3.10 of every keyword whose default is None."""
    options = dataclasses.make_dataclass("Options", [("margin", Optional[float], None)])  # noqa: UP045
    recipe = dataclasses.replace(objectives.RECIPES["bgpo"], options=options, objective=lambda margin=None: objectives.BGPO)
    assert recipe.choose({"margin": 0.5}).margin == 0.5
    assert recipe.choose({"margin": None}).margin is None
    with pytest.raises(TypeError, match=r"margin must be a finite number or null, got 'a'"):
        recipe.choose({"margin": "a"})


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


@pytest.fixture(scope="module")
def model():
    return eurobert(layers=1, vocab=12)


def shown_and_scored(plan, b, columns):
    """What each state with something scored shows of a sequence, and what it scores where."""
    found = []
    for k in range(plan.shape[0]):
        scored_S = plan.scored[k, b]
        if bool(scored_S.any()):
            target_S = plan.input_ids_BS[b] if plan.target_BKS is None else plan.target_BKS[b, k]
            found.append(
                (plan.noisy_ids[k, b, :columns].tolist(), scored_S.nonzero()[:, 0].tolist(), target_S[scored_S].tolist())
            )
    return sorted(found)


@pytest.fixture(scope="module")
def uneven(model):
    """Rollouts of completions of different lengths, together and each alone: behind prompts, in holes, and with take-backs."""
    ids, behind, lengths = torch.arange(4), [torch.arange(1, 4 + n) for n in range(4)], [2, 6, 3, 5]
    canvases = [torch.tensor(c) for c in ([1, 11, 3, 11, 5], [11] * 7 + [4], [2, 11, 2], [1, 2, 11, 11, 11, 6])]
    found = {}
    for kind, prompts, own in (("lengths", behind, lengths), ("holes", canvases, None), ("taken back", canvases, None)):
        options = {"steps": 3, "mask_id": 11, "temperature": 1.0, "greedy": True}
        options |= {"sampler": "remdm", "eta": 0.5} if kind == "taken back" else {"sampler": "dream", "alg": "maskgit_plus"}
        parts = [slice(0, 4), *(slice(b, b + 1) for b in range(4))]
        found[kind] = [
            generate(model, prompts[part], length=own and own[part], sequence_ids=ids[part], **options) for part in parts
        ]
    assert found["taken back"][0].edited
    return found


TRAJECTORIES = [name for name, recipe in objectives.RECIPES.items() if recipe.trajectory is not None]


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_states_do_not_depend_on_the_lengths_of_other_completions(uneven, name):
    recipe = objectives.RECIPES[name]
    for kind, (together, *alone) in uneven.items():
        if kind == "taken back" and name in ("d2", "trace_rl"):
            with pytest.raises(ValueError, match="edited"):
                recipe.trajectory.states(together, recipe.choose({}), 0)
            continue
        plan = recipe.trajectory.states(together, recipe.choose({}), 0).plan
        for b, one in enumerate(alone):
            assert torch.equal(one.completion_BL[0], together.completion_BL[b][together.place_BL[b]])
            want = shown_and_scored(recipe.trajectory.states(one, recipe.choose({}), 0).plan, 0, one.ids_BS.shape[1])
            assert shown_and_scored(plan, b, one.ids_BS.shape[1]) == want
            assert want


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_no_state_shows_what_lies_between_a_completion_and_the_end_of_its_block_too_early(model, name):
    prompts = [torch.tensor([1, 2, 3]), torch.tensor([4, 5])]
    options = {"sampler": "sdar", "steps": 4, "block_length": 4, "remasking": "sequential", "temperature": 1.0, "greedy": True}
    rollout = generate(model, prompts, length=4, mask_id=11, sequence_ids=torch.arange(2), **options)
    recipe = objectives.RECIPES[name]
    plan = recipe.trajectory.states(rollout, recipe.choose({}), 0).plan
    for b, prompt in enumerate(prompts):
        for shown, _, _ in shown_and_scored(plan, b, 8):
            assert shown[len(prompt) + 4 :] == [11] * (4 - len(prompt)), "from left to right, it is written last"


@pytest.mark.parametrize(
    ("name", "tokens", "states"),
    [  # of 9 tokens in 4 steps
        ("egspo", 3, 4),  # the steps' tokens are whole, and no more states than steps
        ("egspo_sa", 3, 4),
        ("justgrpo", 1, None),
        ("mdpo", 5, 4),  # half of the tokens are hidden, on average
        ("on_policy_distillation", 3, None),
        ("rldf", 5, 4),
    ],
)
def test_a_plan_is_told_how_many_tokens_a_state_decides_and_of_how_many_states(name, tokens, states):
    trajectory, options = objectives.RECIPES[name].trajectory, objectives.RECIPES[name].choose({})
    assert trajectory.tokens(options, 9, 4) == tokens
    assert (trajectory.number and trajectory.number(options, 9, 4)) == states


def test_a_clip_of_a_ratio_per_token_is_said_to_be_one():
    recipes = [recipe for recipe in objectives.RECIPES.values() if recipe.clip is not None]
    per_token = {recipe.name for recipe in recipes if recipe.clip(recipe.choose({})).per_token}
    assert per_token == {"espo", "gdpo"}, "these divide ELBOs by the completion's length"
    assert not Clip().per_token
    gdpo = objectives.RECIPES["gdpo"]
    assert not gdpo.clip(gdpo.choose({"mode": "paper"})).per_token
