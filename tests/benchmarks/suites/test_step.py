"""The suite `step`: both ways give the same tokens, loss and gradients, and what differs is called wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from benchmarks import execution, measure, registry
from benchmarks.suites import step, step_inputs, step_published
from dllm_kernels.accumulation.objective import Batch
from dllm_kernels.objectives import RECIPES

pytestmark = pytest.mark.xdist_group("benchmarks")

TINY = registry.Settings(tiny=True, full=True, threads=1)  # every algorithm


def _case(algorithm: str, settings: registry.Settings = TINY) -> registry.Case:
    return next(case for case in step.cases(settings) if case.name == algorithm)


def _inputs(algorithm: str, dtype: torch.dtype = torch.float32) -> step_inputs.Inputs:
    return step_inputs.make_inputs(algorithm, _case(algorithm).sizes, dtype, "cpu")


@pytest.mark.parametrize("algorithm", RECIPES)
def test_ours_and_the_published_step_agree(algorithm: str) -> None:
    case = _case(algorithm)
    x = case.inputs(case.sizes)
    oracle = case.oracle(x)
    assert [c.name for c in case.contestants] == ["ours", "published"]
    for contestant in case.contestants:
        work = contestant.setup(x)
        errors = oracle(work.run())
        assert errors["tokens"] == 0
        # a teacher's advantage is a difference of log-probs, of which their fp32 errors are a larger part
        assert errors["gradient"] < (4e-5 if RECIPES[algorithm].teacher else 2e-5), contestant.name
        assert errors["loss"] < 2e-5, contestant.name
        assert work.flops > 0


@pytest.mark.parametrize("algorithm", step_published.WRITTEN)
def test_the_written_losses_are_the_librarys_in_float64(algorithm: str) -> None:
    """Old and reference scores far from the policy's: clips and distances are at work."""
    x = _inputs(algorithm)
    x = x.double(step_published.complete(x))
    scores, clock = step_published.FullScores(x.behaviour, x.reference, {}), step_inputs.Clock("cpu")
    clock.start()
    assert x.agreed is not None
    lesson = step_inputs.make_lesson(x, x.agreed, scores, clock)
    prompt, L = x.sizes["P"], x.sizes["L"]
    samples = range(lesson.plan.shape[0])
    logps = torch.stack([step_published.token_logps(x.model, lesson.plan, k, prompt) for k in samples]).detach()
    scored_KBL = lesson.plan.scored[:, :, -L:]
    for far in (0.0, 0.1):
        logp_KBL = logps + far * torch.randn(logps.shape, generator=torch.Generator().manual_seed(0)).double()
        found = []
        for way in (
            lambda logp_KBL: step_published.WRITTEN[algorithm](logp_KBL, lesson),
            lambda logp_KBL: x.objective.contributions(logp_KBL[scored_KBL], lesson.plan, lesson.batch) / lesson.denominator,
        ):
            leaf = logp_KBL.clone().requires_grad_(True)
            loss = way(torch.where(scored_KBL, leaf, 0.0))
            found.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
        torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-9)


def _other_advantages(lesson: step_inputs.Lesson) -> step_inputs.Lesson:
    entries = dict(lesson.batch.per_sequence)
    entries["advantages"] = entries["advantages"] * 1.001
    return replace(lesson, batch=Batch(entries, lesson.batch.per_sample))


def _other_masks(lesson: step_inputs.Lesson) -> step_inputs.Lesson:
    return replace(lesson, plan=replace(lesson.plan, seed=lesson.plan.seed + 1))


@pytest.mark.parametrize("algorithm", ["bgpo", "espo"])
@pytest.mark.parametrize("change", [_other_advantages, _other_masks])
def test_another_advantage_or_mask_is_wrong(
    algorithm: str, change: Callable[[step_inputs.Lesson], step_inputs.Lesson], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution, "peak_memory", lambda *_: measure.Memory(1.0, "none"))
    # ours alone
    monkeypatch.setattr(step, "make_lesson", lambda *arguments: change(step_inputs.make_lesson(*arguments)))
    rows = {row["contestant"]: row for row in execution.measure_case(step.SUITES["step"], _case(algorithm), TINY)}
    assert rows["published"]["status"] == "ok"
    assert rows["ours"]["status"] == "wrong"
    assert "gradient error" in rows["ours"]["reason"]
    assert rows["ours"]["phases_s"].keys() == set(step_inputs.PHASES)
    assert "rollout 0." in rows["ours"]["note"]
    assert sum(rows["ours"]["phases_s"].values()) < 2e-3 * rows["ours"]["time_ms"]["median"]
    assert rows["limit"]["time_ms"]["median"] < rows["ours"]["time_ms"]["min"]


def test_a_step_leaves_weights_and_random_state_as_they_were() -> None:
    x = _inputs("espo")
    before, state = {name: p.clone() for name, p in x.model.named_parameters()}, torch.get_rng_state()
    clock = step_inputs.Clock("cpu")
    results = [step.our_step(x, clock)()["loss"], step_published.published_step(x, clock)()["loss"]]
    results.append(step.our_step(x, clock)()["loss"])
    assert all(torch.equal(p, before[name]) for name, p in x.model.named_parameters())
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(results[0], results[2])
    assert results[0] != 0


def test_all_policies_differ_and_ratios_are_not_one() -> None:
    x = _inputs("bgpo")
    rollout, clock = step_published.complete(x), step_inputs.Clock("cpu")
    clock.start()
    scores = step_published.FullScores(x.behaviour, x.reference, {})
    old = step_inputs.make_lesson(x, rollout, scores, clock).batch.per_sample["old_sample_elbo"]
    x = replace(x, behaviour=x.model)
    scores = step_published.FullScores(x.model, x.reference, {})
    current = step_inputs.make_lesson(x, rollout, scores, clock).batch.per_sample["old_sample_elbo"]
    assert 1e-4 < float((current - old).abs().mean()) < 1.0


def test_16_bits_learn_from_one_rollout() -> None:
    settings = replace(TINY, dtype="bfloat16")
    case = _case("gdpo", settings)
    x = case.inputs(case.sizes)
    oracle = case.oracle(x)
    for contestant in case.contestants:
        assert oracle(contestant.setup(x).run())["gradient"] < step.TOLERANCE["bfloat16"]["gradient"]


def test_full_has_every_algorithm_and_the_bound() -> None:
    names = [case.name for case in step.cases(registry.Settings(full=True))]
    assert set(names) == {*RECIPES, *(f"{name}_bound" for name in step.AT_THE_BOUND)}
    assert {case.name for case in step.cases(registry.Settings())} == set(step.DEFAULT)
    bound = _case("gdpo_bound", registry.Settings(full=True)).sizes
    assert {key: bound[key] for key in ("layers", "H", "V", "B", "L", "K")} == {
        "layers": 4, "H": 512, "V": 126464, "B": 8, "L": 128, "K": 8,
    }  # fmt: skip


@pytest.mark.slow
def test_memory_at_a_reduced_size() -> None:
    settings = registry.Settings(threads=1, shape={"V": 16384, "K": 8})
    label = _case("gdpo", settings).label
    measure.start_memory_server(step.SUITES["step"].preload)
    ours, published = (measure.peak_memory("step", label, name, settings).extra_mib for name in ("ours", "published"))
    assert published > 5 * ours
