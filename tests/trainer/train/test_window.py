"""What is scored of completions that end early, and what the model sees of the rest: as each recipe was published."""

from typing import Any

import pytest
import torch
from dllm_trainer.config import load_config
from dllm_trainer.distributed import Ranks
from dllm_trainer.errors import ConfigError
from dllm_trainer.facts import Facts
from dllm_trainer.tasks import make_task
from dllm_trainer.train import rl
from dllm_trainer.train.optimization import make_optimizer
from dllm_trainer.train.run import prepare
from dllm_trainer.train.window import Window, window_of

from dllm_kernels import Rollout
from dllm_kernels.masks.plan import MaskPlan
from dllm_kernels.objectives import RECIPES, Recipe
from tests.trainer.conftest import TINY, rollouts_through

# read in the published code; vrpo's and ebpo's are the port's; of the last two no code is public: our choice
PUBLISHED = {
    "diffu_grpo": ("eos", "hidden"),
    "coupled_grpo": ("eos", "hidden"),
    "wd1": ("eos", "hidden"),
    "spg": ("eos", "hidden"),
    "d2": ("eos", "hidden"),
    "on_policy_distillation": ("eos", "hidden"),  # ours too: the papers' models are autoregressive
    "trace_rl": ("eos", "hidden"),
    "bgpo": ("eos", "removed"),
    "vrpo": ("eos", "removed"),
    "ebpo": ("eos", "removed"),
    "gdpo": ("completion", None),
    "espo": ("completion", None),
    "egspo": ("completion", None),
    "egspo_sa": ("completion", None),
    "dmpo": ("completion", None),
    "gdsd": ("completion", None),
    "cj_grpo": ("completion", None),
    "mdpo": ("completion", None),
    "rldf": ("eos", "hidden"),
    "justgrpo": ("completion", None),
    "rspo": ("completion", None),
    "unigrpo": ("completion", None),
}
ENDS = [3, 16, 7, 1]  # tokens up to and with the first EOS, of the completions below, in turns


def test_every_recipe_says_what_was_published() -> None:
    assert {name: (recipe.window, recipe.tail) for name, recipe in RECIPES.items()} == PUBLISHED


class _LearntError(Exception):
    """Ends an update where its optimizer step would begin; what is tested has happened by then."""


def step_of(name: str, monkeypatch: pytest.MonkeyPatch, *keys: str) -> tuple[Rollout, MaskPlan, dict[str, Any], int]:
    """An update's rollouts, of which most end early, then its plan and the keywords of `accumulate`."""
    overrides = [*(k for k in TINY if not k.startswith("rl.samples")), f"rl.algorithm={name}", "rl.prompts=2", "rl.gap_every=0"]
    config = load_config(overrides=[*overrides, *keys])
    setup = prepare(config, make_task(config.task, seed=config.seed), Ranks())
    if RECIPES[name].needs_reference:
        setup.reference = setup.model
    eos, rollouts, steps = setup.facts.eos_id, [], []

    def ending_early(rollout: Rollout) -> Rollout:
        completion_BL = rollout.completion_BL.clone()
        completion_BL[completion_BL == eos] = 5  # of the digits
        for b, row_L in enumerate(completion_BL):
            row_L[min(ENDS[b % 4], len(row_L)) - 1 :: 2] = eos  # other tokens lie behind the first
        rollout.ids_BS.masked_scatter_(rollout.completion_mask_BS, completion_BL)
        rollouts.append(rollout)
        return rollout

    def caught(model: Any, plan: MaskPlan, *args: Any, **kwargs: Any) -> None:
        steps.append((plan, kwargs))
        raise _LearntError

    rollouts_through(monkeypatch, ending_early)
    monkeypatch.setattr(rl, "accumulate", caught)
    monkeypatch.setattr(rl, "guard_rollouts", lambda *_: None)
    with pytest.raises(_LearntError):
        list(rl.rl_updates(setup, make_optimizer(setup.trained, config.rl)))
    (plan, kwargs), (rollout,) = steps[0], rollouts
    return rollout, plan, kwargs, eos


def lengths_of(ids_BS: torch.Tensor, completion_BS: torch.Tensor, eos: int) -> list[int]:
    """By counting tokens one after another."""
    found = []
    for ids, where in zip(ids_BS.tolist(), completion_BS.tolist(), strict=True):
        tokens = [token for token, inside in zip(ids, where, strict=True) if inside]
        found.append(tokens.index(eos) + 1 if eos in tokens else len(tokens))
    return found


@pytest.mark.parametrize("name", list(RECIPES))
def test_a_completion_that_ends_early_is_scored_as_published(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe: Recipe = RECIPES[name]
    rollout, plan, kwargs, eos = step_of(name, monkeypatch)
    check(recipe.window, recipe.tail, recipe, rollout, plan, kwargs, eos)
    flipped = "completion" if recipe.window == "eos" else "eos"
    with pytest.raises(AssertionError):
        check(flipped, None, recipe, rollout, plan, kwargs, eos)
    with monkeypatch.context() as again:
        check(flipped, None, recipe, *step_of(name, again, f"rl.window={flipped}"))


def check(
    window: str, tail: str | None, recipe: Recipe, rollout: Rollout, plan: MaskPlan, kwargs: dict[str, Any], eos: int
) -> None:
    index = [rollout.sequence_ids_B.tolist().index(i) for i in plan.sequence_ids_B.tolist()]
    whole_BS = rollout.completion_mask_BS[index]
    lengths = lengths_of(plan.input_ids_BS, whole_BS, eos) if window == "eos" else whole_BS.sum(-1).tolist()
    assert plan.lengths_B.tolist() == lengths
    first_B = whole_BS.long().argmax(-1)
    tail_BS = whole_BS & (torch.arange(whole_BS.shape[1]) >= (first_B + torch.tensor(lengths))[:, None])
    assert not plan.scored[:, tail_BS].any()
    if recipe.make().denominator == "tokens":
        everyone = rollout.completion_mask_BS  # those that the objective learns nothing from included
        tokens = sum(lengths_of(rollout.ids_BS, everyone, eos)) if window == "eos" else int(everyone.sum())
        assert kwargs["denominator"] == tokens
    seen_BS = (kwargs["model_kwargs"] or {}).get("attention_mask", torch.ones_like(whole_BS)) != 0
    assert bool(seen_BS[tail_BS].any()) == (tail != "removed" and bool(tail_BS.any()))
    if tail == "hidden" and recipe.name == "coupled_grpo":
        assert (plan.masked[1] ^ plan.masked[2])[tail_BS].all()
    elif tail == "hidden" and not recipe.needs_trajectory:
        assert plan.masked[:, tail_BS].all()
    elif tail == "removed":
        assert not plan.masked[:, tail_BS].any()


def test_pairs_and_the_window_of_a_model_that_takes_no_attention_mask() -> None:
    config = load_config(overrides=["rl.algorithm=bgpo"]).rl
    facts = Facts("tiny", mask_id=9, eos_id=7, attention_mask="none")
    with pytest.raises(ConfigError, match=r"rl\.tail must be shown or hidden.*got removed"):
        window_of(config, facts)
    shown = load_config(overrides=["rl.algorithm=bgpo", "rl.tail=shown"]).rl
    assert window_of(shown, facts) == Window(7, "shown")
    assert window_of(config, Facts("tiny", mask_id=9)) == Window(None, None)
    with pytest.raises(ConfigError, match="tail must be null with window completion"):
        load_config(overrides=["rl.algorithm=espo", "rl.tail=shown"])
