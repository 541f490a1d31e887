"""`dllm-kernels rl --algorithm NAME`: each trains on the demo's task, on its own masks or its rollouts' states."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dllm_trainer.cli import app
from dllm_trainer.config import load_config
from dllm_trainer.distributed import Ranks
from dllm_trainer.errors import ConfigError, GuardError, UserError
from dllm_trainer.records.run_dir import RunDir
from dllm_trainer.tasks import make_task
from dllm_trainer.train import algorithms, engines, guards, rl
from dllm_trainer.train.guards import on_policy_gap
from dllm_trainer.train.optimization import make_optimizer
from dllm_trainer.train.rl import rl_updates
from dllm_trainer.train.run import Run, prepare
from dllm_trainer.train.setup import Setup
from rich.console import Console
from torch import Tensor, nn
from typer.testing import CliRunner

from dllm_kernels.accumulation.objective import Batch
from dllm_kernels.accumulation.scores import score_samples
from dllm_kernels.objectives import RECIPES, Signal, States, Update, effective_sample_size, wd1_weights
from tests.plans import plan_of
from tests.tiny import eurobert
from tests.trainer.conftest import TINY

KEYS = [key for key in TINY if not key.startswith(("rl.samples", "rl.updates"))]
TRACED = [name for name, recipe in RECIPES.items() if recipe.needs_trajectory]
UNTRACED = [name for name in RECIPES if name not in TRACED]
F64 = torch.float64


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sft") / "run"
    config = load_config(overrides=[*KEYS, "sft.steps=3", "rl.updates=0", "task.test_puzzles=2", f"out={json.dumps(str(out))}"])
    Run(RunDir.create(out), config, Console(quiet=True)).execute()
    return out / "checkpoint_sft"


def setup_of(checkpoint: Path, *keys: str) -> Setup:
    """What a run from this checkpoint works with, and the frozen policy that it began with."""
    config = load_config(overrides=[*KEYS, f"model.checkpoint={json.dumps(str(checkpoint))}", *keys])
    task = make_task(config.task, seed=config.seed)
    setup = prepare(config, task, Ranks())
    if RECIPES[config.rl.algorithm].needs_reference:
        setup.reference = prepare(config, task, Ranks()).model.requires_grad_(False)
    if RECIPES[config.rl.algorithm].teacher:  # of itself there is nothing to learn
        generator = torch.Generator().manual_seed(0)
        for parameter in setup.reference.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return setup


def train(setup: Setup) -> list[dict[str, float]]:
    return list(rl_updates(setup, make_optimizer(setup.trained, setup.config.rl)))


@pytest.mark.parametrize("inner", [1, 2])
@pytest.mark.parametrize("name", list(RECIPES))
def test_every_algorithm_trains(name: str, inner: int, checkpoint: Path) -> None:
    setup = setup_of(checkpoint, "rl.updates=2", "rl.prompts=2", f"rl.inner_iterations={inner}", f"rl.algorithm={name}")
    config = setup.config.rl
    assert config.law == RECIPES[name].law
    assert name in TRACED or config.samples == RECIPES[name].samples
    before = [parameter.detach().clone() for parameter in setup.model.parameters()]
    kept = None if setup.reference is None else [parameter.clone() for parameter in setup.reference.parameters()]
    records = train(setup)
    assert len(records) == 2
    learnt = [record for record in records if "loss" in record]
    assert learnt, "no update had a signal"
    assert all(math.isfinite(record["loss"]) and 0 < record["grad_norm"] < 1e4 for record in learnt)
    assert all(("ess" in record) == (name == "dmpo") and 0 < record.get("ess", 1.0) <= 1 for record in learnt)
    assert 0 <= records[0]["on_policy_gap"] < 1e-5, "a model with neither cache nor dropout, in fp32"
    assert any(not torch.equal(a, b) for a, b in zip(before, setup.model.parameters(), strict=True))
    if kept is not None:
        assert all(torch.equal(a, b) for a, b in zip(kept, setup.reference.parameters(), strict=True)), "the reference moved"


def test_a_kl_that_an_option_adds_gets_its_reference(tmp_path: Path) -> None:
    keys = ["rl.algorithm=gdpo", "rl.options.beta=0.1", "sft.steps=2", "rl.updates=1", "task.test_puzzles=2"]
    out = tmp_path / "run"
    config = load_config(overrides=[*KEYS, *keys, f"out={json.dumps(str(out))}"])
    Run(RunDir.create(out), config, Console(quiet=True)).execute()
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert any("kl" in record for record in records)


def test_the_command_trains_the_algorithm_that_it_names(checkpoint: Path, tmp_path: Path) -> None:
    arguments = [
        "rl",
        "--checkpoint",
        checkpoint,
        "--algorithm",
        "gdpo",
        "--out",
        tmp_path / "run",
        "rl.updates=1",
        "rl.samples=6",
    ]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    config = load_config(tmp_path / "run" / "config.yaml")
    assert (config.rl.algorithm, config.rl.law, config.rl.samples, config.rl.advantage) == ("gdpo", "quadrature", 6, "mean")


def test_a_recipe_s_defaults_give_way_to_keys_and_only_come_where_an_algorithm_is_chosen() -> None:
    assert (load_config().rl.algorithm, load_config().rl.samples, load_config(overrides=["rl.samples=3"]).rl.samples) == (
        "bgpo",
        16,
        3,
    )
    chosen = load_config(overrides=["rl.advantage=std", "rl.algorithm=espo", "rl.samples=2"])
    assert (chosen.rl.law, chosen.rl.samples, chosen.rl.advantage) == ("antithetic", 2, "std")
    again = load_config(base=chosen.to_yaml(), overrides=["rl.updates=1"])
    assert again.rl.samples == 2, "a run's own config is taken as it is"
    assert load_config(overrides=["rl.algorithm=wd1", "rl.law=exact"]).rl.law_options() == {}
    assert load_config(overrides=["rl.law=bernoulli"]).rl.law_options() == {"t_min": 0.001}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["rl.algorithm=gdop"], r"rl: algorithm gdop is unknown: the nearest is gdpo; there are bgpo, "),
        (["rl.algorithm=gdpo", "rl.samples=4"], r"rl: samples must be a multiple of nodes=3 for law='quadrature', got 4"),
        (["rl.law=blocks"], r"rl\.law must be 'exact'"),
        (["rl.algorithm=d2", "rl.law=exact"], r"rl: law must be segments for algorithm d2, got exact"),
    ],
)
def test_a_mistake_names_the_key(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(overrides=overrides)


def test_the_list_shows_every_algorithm() -> None:
    result = CliRunner().invoke(app, ["algorithms"])
    assert result.exit_code == 0
    for name, recipe in RECIPES.items():
        (row,) = [line for line in result.output.splitlines() if f" {name} " in line]
        assert recipe.arxiv in row
        assert recipe.law in row
        assert ("trajectory" in row) == recipe.needs_trajectory or "trajec" in result.output


# --- what is made of rewards -------------------------------------------------------------------------------------------


REWARDS, GROUPS = torch.tensor([1.0, 0.0, 0.5, 0.5, 0.0, 1.0, 1.0, 0.0]), torch.tensor([3, 3, 5, 5, 9, 9, 9, 9])


def chosen(name: str, *keys: str) -> algorithms.Algorithm:
    return algorithms.choose_algorithm(load_config(overrides=[f"rl.algorithm={name}", *keys]).rl, 16, 8)


def signal_of(name: str) -> Signal:
    algorithm = chosen(name)
    return algorithm.signal(algorithm.rewards(REWARDS, GROUPS, torch.full([8], 16)))


def test_groups_of_equal_rewards_are_dropped_where_nothing_else_is_learnt() -> None:
    for name in ("bgpo", "gdpo", "wd1", "spg"):
        assert signal_of(name).kept_N.tolist() == [0, 1, 4, 5, 6, 7], name
    for name in ("diffu_grpo", "espo", "rspo", "dmpo"):  # a KL, a regression, weights of ELBOs
        assert len(signal_of(name).kept_N) == 8, name
    assert [signal_of(name).denominator for name in ("bgpo", "spg", "wd1", "dmpo")] == [8, 128, 3, 3]
    torch.testing.assert_close(signal_of("wd1").entries["weights"][:2], wd1_weights(torch.tensor([0.5, -0.5]), GROUPS[:2]))


def test_pairs_are_the_best_and_the_worst_of_a_group() -> None:
    found = signal_of("vrpo")
    assert found.kept_N.tolist() == [0, 5, 1, 4]
    assert found.entries["chosen"].tolist() == [True, True, False, False]
    assert found.entries["group_ids"].tolist() == [0, 1, 0, 1]
    assert found.denominator == 2


def test_dmpo_s_weights_are_of_the_policy_and_the_reference_and_sum_to_1_in_a_group() -> None:
    algorithm = chosen("dmpo")
    model, reference = eurobert(vocab=100), eurobert(vocab=100, seed=1)
    plan, groups = plan_of([5, 4, 6, 7], samples=2), torch.tensor([1, 1, 2, 2])
    rewards = torch.tensor([0.1, 0.0, 0.0, 0.1])
    scores = algorithms.Scores(model, reference, {})
    update = Update(
        algorithm.rewards(rewards, groups, 8),
        torch.arange(4),
        None,
        scores.old,
        scores.ref,
        fresh_plan=lambda: plan,
        reward=lambda _: rewards[:, None],
        gather=Ranks().gather,
    )
    (batch,) = algorithms.make_batches(algorithm.objective, [plan], algorithm.entries(update), scores.old, scores.ref)
    assert set(batch.per_sequence) == {"weights", "baseline"}
    weights = batch.per_sequence["weights"]
    torch.testing.assert_close(weights.view(2, 2).sum(1), torch.ones(2, dtype=F64))
    assert scores.passes == 2
    delta = (score_samples(reference, plan) - score_samples(model, plan)).mean(1) + rewards / 0.04
    torch.testing.assert_close(weights.view(2, 2), delta.view(2, 2).softmax(1))
    assert (effective_sample_size(weights, groups) >= 0.5).all()


@pytest.mark.parametrize("mode", ["code", "paper"])
def test_figures_of_a_step_are_those_of_what_it_scored(mode: str) -> None:
    algorithm = chosen("gdpo", f"rl.options.mode={mode}", "rl.options.beta=0.1", "rl.options.epsilon=0.2")
    plan, ranks = plan_of([5, 4, 0, 8], samples=2), Ranks()
    elbo = [[-6.0, -4.0], [-3.0, math.nan], [0.0, 0.0], [-9.0, -5.0]]  # a sample was dropped
    old, ref, lengths = [-5.5, -2.0, -0.1, -7.9], [-8.0, -1.0, 0.5, -7.0], [5, 4, 1, 8]  # an empty one counts as 1
    report: Any = SimpleNamespace(sample_elbo_BK=torch.tensor(elbo, dtype=F64))
    batch = Batch({"old_elbo": torch.tensor(old, dtype=F64), "ref_elbo": torch.tensor(ref, dtype=F64)})
    found = algorithms.step_figures(algorithm, report, plan, batch, ranks)
    score = [sum(x for x in row if x == x) / 2 for row in elbo]
    delta = [(s - o) / (n if mode == "code" else 1) for s, o, n in zip(score, old, lengths)]
    known = [x for row in elbo for x in row if x == x]
    assert found == pytest.approx(
        {
            "elbo": sum(known) / len(known),
            "mask_ratio": sum(int(plan.counts[k, b]) / lengths[b] for k in range(2) for b in range(4)) / 8,
            "kl": sum((s - r) / n for s, r, n in zip(score, ref, lengths)) / 4,
            "largest_ratio": math.exp(max(map(abs, delta))),
            "clip_fraction": sum(not 0.8 <= math.exp(d) <= 1.2 for d in delta) / 4,
        },
        rel=1e-6,
    )
    old_BK = torch.tensor([[-5.5, -4.5], [-3.0, 0.0], [0.0, 0.0], [-9.0, -5.25]], dtype=F64)
    for old_elbo in (old_BK, old_BK[:, :, None] * torch.tensor([0.25, 0.75])):  # of samples, and of each step of one
        by_sample = algorithms.step_figures(chosen("bgpo"), report, plan, Batch({}, {"old_sample_elbo": old_elbo}), ranks)
        assert by_sample["largest_ratio"] == pytest.approx(math.exp(0.5))
    nothing: Any = SimpleNamespace(sample_elbo_BK=torch.full([4, 2], math.nan, dtype=F64))
    samples = Batch({}, {"old_sample_elbo": torch.zeros(4, 2, dtype=F64)})
    none = algorithms.step_figures(chosen("bgpo"), nothing, plan, samples, ranks)
    assert none == {"largest_ratio": 1.0, "elbo": 0.0, "mask_ratio": pytest.approx(found["mask_ratio"]), "clip_fraction": 0.0}


@pytest.mark.parametrize("baseline", ["none", "mean", "unbias"])
def test_dmpo_trains_with_every_baseline(baseline: str, checkpoint: Path) -> None:
    keys = ["rl.algorithm=dmpo", f"rl.options.baseline={baseline}", "rl.prompts=2", "rl.inner_iterations=2"]
    (record,) = train(setup_of(checkpoint, *keys, "rl.updates=1"))
    assert math.isfinite(record["loss"])
    assert record["grad_norm"] > 0
    assert 0 < record["ess"] <= 1
    assert "largest_ratio" not in record, "it has no ratio"


# --- trajectories ------------------------------------------------------------------------------------------------------


class Spy:
    """What training made of each rollout: the states, the entries of each optimizer step, rewards of states, scoring passes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.states: list[States] = []
        self.batches: list[list[Batch]] = []
        self.updates: list[Update] = []
        self.rewards: list[Tensor] = []
        self.old: list[str] = []
        self.fresh: list[Tensor] = []
        entries, make, old = algorithms.Algorithm.entries, rl.make_batches, algorithms.Scores.old

        def spy_entries(algorithm: algorithms.Algorithm, update: Update) -> dict[str, Tensor]:
            def reward(completion_BJL: Tensor) -> Tensor:
                self.rewards.append(update.reward(completion_BJL))
                return self.rewards[-1]

            self.updates.append(update)
            if update.states is not None:
                self.states.append(update.states)
            name = algorithm.objective.old_scores
            if name in ("old_sample_elbo", "old_logp"):  # before the first step: the policy as it rolled out
                self.fresh.append(update.old(update.fresh_plan() if update.states is None else update.states.plan, name))
                self.old.pop()
            return entries(algorithm, replace(update, reward=reward))

        def spy_make(*arguments: Any, **keywords: Any) -> list[Batch]:
            self.batches.append(make(*arguments, **keywords))
            return self.batches[-1]

        def spy_old(scores: algorithms.Scores, plan: Any, name: str) -> Tensor:
            self.old.append(name)
            return old(scores, plan, name)

        monkeypatch.setattr(algorithms.Algorithm, "entries", spy_entries)
        monkeypatch.setattr(rl, "make_batches", spy_make)
        monkeypatch.setattr(algorithms.Scores, "old", spy_old)


@pytest.mark.parametrize("selection", ["entropy", "uniform"])
def test_egspo_trains_at_the_steps_of_highest_entropy_and_at_no_other(
    selection: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Spy(monkeypatch)
    keys = ["rollout.steps=8", "rl.options.selected_steps=3", f"rl.options.step_selection={selection}"]
    train(setup_of(checkpoint, "rl.algorithm=egspo", "rl.updates=1", *keys))
    (states,) = spy.states
    rollout, plan = states.rollout, states.plan
    assert plan.counts.shape == (3, len(rollout.ids_BS))
    for b in range(len(rollout.ids_BS)):
        entropy, steps = rollout.commit_entropy_BL[b].tolist(), rollout.commit_step_BL[b].tolist()
        means = {k: sum(e for e, s in zip(entropy, steps, strict=True) if s == k) / steps.count(k) for k in set(steps)}
        assert len(means) == 8
        ranked = sorted(means, key=lambda k: -means[k])[:3]
        assert states.steps_BJ is not None
        steps_J = states.steps_BJ[b].tolist()
        assert steps_J == (ranked if selection == "entropy" else [1, 4, 7])
        for j, step in enumerate(steps_J):
            assert torch.equal(plan.noisy_ids[j][b], rollout.state_at(step)[b])
            assert torch.equal(plan.scored[j][b], rollout.step_map_BS[b] == step)


@pytest.mark.parametrize("name", ["egspo", "egspo_sa", "trace_rl"])
def test_old_scores_of_later_iterations_come_from_the_rollout_without_a_pass(
    name: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Spy(monkeypatch)
    keys = ["rl.options.shrink=1"] if "shrink" in RECIPES[name].option_names else []
    train(setup_of(checkpoint, f"rl.algorithm={name}", "rl.updates=2", "rl.inner_iterations=2", *keys))
    assert len(spy.batches) == 2
    assert spy.old == [], "the old policy was scored again"
    for batches, fresh in zip(spy.batches, spy.fresh, strict=True):
        assert len(batches) == 2
        for batch in batches:
            known = batch.per_sample.get("old_sample_elbo", batch.per_sample.get("old_logp"))
            assert known is not None
            assert known.abs().sum() > 1
            torch.testing.assert_close(known, fresh, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("keys", [["rl.algorithm=trace_rl", "rl.options.shrink=2"], ["rl.algorithm=d2", "rl.options.segments=2"]])
def test_states_of_several_steps_are_scored_once_an_iteration_since_the_rollout_saw_later_ones(
    keys: list[str], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Spy(monkeypatch)
    train(setup_of(checkpoint, *keys, "rl.updates=1", "rl.inner_iterations=2"))
    assert len(spy.old) == 2
    (states,) = spy.states
    assert len(states.plan.counts) == 2  # four steps in twos, or in two segments
    assert torch.equal(states.plan.counts.sum(0), states.plan.lengths_B), "a scored token is scored in one of the states"
    assert states.plan.lengths_B.max() == 16
    (batches,) = spy.batches
    known = batches[0].per_sample.get("old_sample_elbo", batches[0].per_sample.get("old_logp"))
    assert known is not None
    torch.testing.assert_close(known, spy.fresh[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("keys", [[], ["rollout.sampler=fast_dllm", "rollout.threshold=0.4", "rollout.steps=null"]])
def test_step_rewards_are_those_of_the_greedy_completion_of_each_chosen_state(
    keys: list[str], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a threshold, rollouts differ in their number of steps, and some choices are of none."""
    spy = Spy(monkeypatch)
    keys = ["rl.options.selected_steps=12", "rl.lr=1e-12", "rollout.steps=16", *keys]
    setup = setup_of(checkpoint, "rl.algorithm=egspo_sa", "rl.updates=1", *keys)
    with torch.no_grad():
        setup.model.lm_head.weight.mul_(30.0)  # a policy that is surer of some tokens than of others
    records = train(setup)
    (states,), (update,), (batches,), (got_BJ,) = spy.states, spy.updates, spy.batches, spy.rewards
    rollout, steps_BJ = states.rollout, states.steps_BJ
    assert steps_BJ is not None
    reward, found = setup.task.rewards["rules"], torch.zeros(steps_BJ.shape)
    group_examples = {text: e for e in setup.task.train for text in [e.prompt]}
    for b, steps_J in enumerate(steps_BJ.tolist()):
        prompt_ids = rollout.ids_BS[b][~rollout.completion_mask_BS[b]]
        example = group_examples["".join("01234="[i] for i in prompt_ids.tolist())]
        for j, step in enumerate(steps_J):
            if step < 0:
                continue
            state = rollout.state_at(step)[b : b + 1]
            logits = setup.model(state).logits[0].detach()
            logits[:, setup.facts.mask_id] = -math.inf
            best = torch.where(state[0] == setup.facts.mask_id, logits.argmax(-1), state[0])
            (text,) = setup.codec.texts(best[rollout.completion_mask_BS[b]][None])
            (found[b, j],) = reward([example], [text])
    torch.testing.assert_close(torch.where(steps_BJ < 0, 0.0, got_BJ), found)
    assert found.std() > 0
    missing = (steps_BJ < 0).sum(-1)
    assert ("rollout.sampler=fast_dllm" in keys) == (int(missing.max()) > int(missing.min()))
    final = update.rewards.values_B
    returns = torch.where(steps_BJ < 0, final[:, None], (1.5 * final[:, None] - 0.5 * found) / 1.5)
    grouped = returns.view(-1, 4, returns.shape[1])
    centred = (grouped - grouped.mean(1, keepdim=True)).flatten(0, 1)
    torch.testing.assert_close(batches[0].per_sample["step_advantages"], centred, atol=1e-6, rtol=1e-5)
    assert math.isfinite(records[0]["loss"])


def test_trajectories_train_as_a_whole_run_from_the_command_line(checkpoint: Path, tmp_path: Path) -> None:
    arguments = [
        "rl",
        "--checkpoint",
        checkpoint,
        "--algorithm",
        "egspo",
        "--out",
        tmp_path / "run",
        "rl.updates=2",
        "rl.samples=4",
    ]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(record["loss"]) and record["grad_norm"] > 0 for record in records)
    assert "egspo" in (tmp_path / "run" / "report.md").read_text()


# --- the on-policy gap -------------------------------------------------------------------------------------------------


def rolled_out(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The rollouts of one update, before anything is learnt from them."""
    kept: list[Any] = []

    class Enough(Exception):  # noqa: N818 - nothing went wrong
        pass

    def keep(_: Setup, sampled: Any) -> float:
        kept.append(sampled)
        raise Enough

    with monkeypatch.context() as patch:
        patch.setattr(engines, "on_policy_gap", keep)
        with pytest.raises(Enough):
            train(setup)
    return kept[0]


def test_the_gap_of_a_healthy_model_is_rounding_and_noise_in_scoring_stops_the_run(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = setup_of(checkpoint, "rl.updates=1")
    sampled = rolled_out(setup, monkeypatch)
    assert on_policy_gap(setup, sampled) < 2e-6
    weight = setup.model.lm_head.weight
    with torch.no_grad():
        weight += 0.005 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        small = on_policy_gap(setup, sampled)
        assert 1e-4 < small < 0.05, "far above rounding, below the bound"
        weight += 1.0 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    with pytest.raises(GuardError, match=r"scoring differs from the rollout by .* nats a token.*rl\.gap_bound=0\.05"):
        on_policy_gap(setup, sampled)


def test_a_body_that_answers_differently_when_it_is_scored_stops_the_run_before_it_learns(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a cache that the rollout had and scoring has not."""
    setup = setup_of(checkpoint, "rl.updates=1")
    before = [parameter.detach().clone() for parameter in setup.model.parameters()]
    score = guards.score_samples

    def noisy(model: nn.Module, *arguments: Any, **options: Any) -> Tensor:
        def scale(_: nn.Module, __: Any, output: Any) -> Any:
            output.last_hidden_state.mul_(3.0)
            return output

        with model.model.register_forward_hook(scale):  # type: ignore[operator, union-attr]
            return score(model, *arguments, **options)

    monkeypatch.setattr(guards, "score_samples", noisy)
    with pytest.raises(GuardError, match="though both are the same policy"):
        train(setup)
    assert all(torch.equal(a, b) for a, b in zip(before, setup.model.parameters(), strict=True))


def test_the_gap_looks_at_states_of_all_stages_and_as_often_as_it_is_told(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden: list[float] = []
    score = guards.score_samples

    def spy(model: nn.Module, plan: Any, **options: Any) -> Tensor:
        hidden.extend((plan.noisy_ids[0] == plan.mask_id).sum(-1).tolist())
        return score(model, plan, **options)

    monkeypatch.setattr(guards, "score_samples", spy)
    records = train(setup_of(checkpoint, "rl.updates=3", "rl.gap_every=2", "rollout.steps=8"))
    assert ["on_policy_gap" in record for record in records] == [True, False, True]
    assert set(hidden) == {4, 6, 8, 10, 12, 14, 16}, "every step but the last, which hides two"
    assert "on_policy_gap" not in train(setup_of(checkpoint, "rl.updates=1", "rl.gap_every=0"))[0]


def test_a_teacher_is_loaded_in_the_reference_s_place_and_must_be_one(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The objective gets its scores; without one, or with one of another vocabulary, the run says what is missing."""
    setup = setup_of(checkpoint, "rl.algorithm=on_policy_distillation")
    assert setup.reference is not None
    setup.reference.save_pretrained(tmp_path / "teacher")
    setup.loaded.tokenizer.save_pretrained(tmp_path / "teacher")
    spy = Spy(monkeypatch)
    keys = [*KEYS, "rl.algorithm=on_policy_distillation", "rl.updates=1", "sft.steps=0", "task.test_puzzles=2"]
    keys += [f"model.checkpoint={json.dumps(str(checkpoint))}"]

    def run(name: str, *more: str) -> None:
        out = tmp_path / name
        config = load_config(overrides=[*keys, *more, f"out={json.dumps(str(out))}"])
        Run(RunDir.create(out), config, Console(quiet=True)).execute()

    with pytest.raises(UserError, match=r"rl\.teacher must name the checkpoint that on_policy_distillation learns from"):
        run("none")
    run("taught", f"rl.teacher={json.dumps(str(tmp_path / 'teacher'))}")
    (batch,) = spy.batches[-1]
    gap = batch.per_sample["ref_logp"].sum((1, 2)) - spy.fresh[-1].sum((1, 2))
    assert bool((gap.abs() > 1e-3).any()), "the teacher is another model"
    tokenizer = setup.loaded.tokenizer
    tokenizer.add_tokens(["<one more>"])
    tokenizer.save_pretrained(tmp_path / "teacher")
    with pytest.raises(UserError, match=r"rl\.teacher must have the vocabulary of the model that is trained"):
        run("other", f"rl.teacher={json.dumps(str(tmp_path / 'teacher'))}")
    with pytest.raises(UserError, match="teacher must be null for algorithm bgpo"):
        load_config(overrides=["rl.algorithm=bgpo", "rl.teacher=somewhere"])


def test_with_keys_and_values_kept_the_gap_is_logged_old_scores_are_exact_and_a_bound_names_the_cache(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from transformers import AutoConfig, AutoTokenizer, EuroBertForMaskedLM

    # the keys and values of a first layer depend on nothing but their own token
    config = AutoConfig.from_pretrained(checkpoint)
    config.num_hidden_layers, config.initializer_range = 2, 0.3
    with torch.random.fork_rng():
        torch.manual_seed(0)
        EuroBertForMaskedLM(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path)
    checkpoint = tmp_path
    asked: list[Tensor | None] = []
    old_scores = States.old_scores

    def spy(states: States, name: str) -> Tensor | None:
        asked.append(old_scores(states, name))
        return asked[-1]

    monkeypatch.setattr(States, "old_scores", spy)
    keys = ("rl.updates=1", "rl.gap_every=1", "rl.algorithm=egspo", "rl.inner_iterations=2", "rl.gap_bound=100.0")
    kept = ("rollout.cache=dual", "rollout.steps=8", "rollout.block_length=8")
    assert train(setup_of(checkpoint, *keys, *kept))[0]["on_policy_gap"] > 1e-5
    assert asked
    assert all(scores is None for scores in asked), "they come from a pass of the model"
    train(setup_of(checkpoint, *keys))
    assert asked[-1] is not None
    with pytest.raises(GuardError, match=r"rollout\.cache=dual makes of them"):
        train(setup_of(checkpoint, *keys, *kept, "rl.gap_bound=1e-9"))
