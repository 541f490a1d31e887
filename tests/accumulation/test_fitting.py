"""`fit_passes`: the largest cut within a memory budget, by what autograd saves; one pass where it fits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllm_kernels import accumulate, fit_passes, headless, make_mask_plan
from dllm_kernels.accumulation.fitting import Saved
from dllm_kernels.objectives import BGPO, GDPO, RSPO, Batch
from tests.accumulation.runs import run
from tests.accumulation.test_accumulation import ADVANTAGES, CENTRED, RATIO, batch_of, old_scores, plan_of
from tests.tiny import eurobert, worst_gradient_error


def really_saved(model, plan, samples, sequences) -> int:
    """Bytes of a forward of the first cut, by hooks around the whole call."""
    cut = plan.cut(samples=slice(0, samples), sequences=slice(0, sequences))
    saved = Saved()
    with headless(model) as body, saved.counted():
        kept = body(cut.noisy_ids.flatten(0, 1))
    del kept
    return saved.bytes(model)


def test_what_a_cut_saves_is_what_was_said():
    model, plan = eurobert(), plan_of(4)
    for budget in (1 << 14, 1 << 16, 1 << 20):
        fit = fit_passes(model, plan, BGPO, memory_budget=max(budget, least(model, plan, BGPO)))
        measured = really_saved(model, plan, fit.samples_per_pass, fit.sequences_per_pass)
        # what does not grow with the batch, such as rotary tables, is counted for each of its sequences
        assert measured <= fit.saved_bytes <= 1.1 * measured + 4096 * fit.samples_per_pass * fit.sequences_per_pass


def test_padding_of_any_sequence_is_counted():
    """Models drop the mask of a batch without padding, and the longest completion may have none."""
    model, plan = eurobert(), plan_of(4)
    mask = torch.ones(plan.shape[1:], dtype=torch.int64)
    mask[1, :2] = 0
    found, real = [], []
    for shown in (mask, torch.ones_like(mask)):
        found.append(fit_passes(model, plan, BGPO, memory_budget=1 << 30, model_kwargs={"attention_mask": shown}).saved_bytes)
        saved = Saved()
        with headless(model) as body, saved.counted():
            body(plan.noisy_ids, attention_mask=shown)
        real.append(saved.bytes(model))
    assert found[0] - found[1] == real[0] - real[1] > 0


def test_a_look_draws_no_random_number():
    model, plan = eurobert(attention_dropout=0.5).train(), plan_of(4)
    before = torch.get_rng_state()
    fit_passes(model, plan, BGPO, memory_budget=1 << 30)
    assert torch.equal(before, torch.get_rng_state())
    with headless(model) as body:
        body(plan.noisy_ids)
    assert not torch.equal(before, torch.get_rng_state()), "a forward draws some"


def least(model, plan, objective) -> int:
    """The smallest budget, as its error names it."""
    with pytest.raises(ValueError, match="memory_budget must be at least") as refused:
        fit_passes(model, plan, objective, memory_budget=1)
    return int(str(refused.value).split("at least ")[1].split(" ")[0].replace(",", ""))


def ladder(model, plan, objective, batch):
    """(budget, what fits) for budgets from the least on, a tenth more each."""
    budget, most = least(model, plan, objective), 1 << 24
    while budget < most:
        yield budget, fit_passes(model, plan, objective, batch, memory_budget=budget)
        budget = budget * 11 // 10


def test_all_samples_in_one_pass_where_they_fit_and_the_most_in_two_where_not():
    model, plan = eurobert(hidden=64, layers=3), plan_of(8)
    batch = batch_of(RATIO, model, plan)
    _, want = run(model, plan, RATIO, batch)
    seen = {}
    for budget, fit in ladder(model, plan, RATIO, batch):
        assert fit.saved_bytes + fit.head_bytes <= budget
        assert (fit.passes == 1) == (fit.samples_per_pass == 8)
        assert fit.passes == 1 or fit.sequences_per_pass == 1
        seen[fit.samples_per_pass, fit.sequences_per_pass] = fit
    assert len({samples for samples, _ in seen}) > 3
    assert {sequences for samples, sequences in seen if samples == 8} == {1, 2, 3}
    for (samples, sequences), fit in seen.items():
        report, got = run(model, plan, RATIO, batch, samples_per_pass=samples, sequences_per_pass=sequences)
        assert report.passes == fit.passes
        assert worst_gradient_error(got, want) < 1e-10


def test_what_couples_nothing_takes_sequences_first():
    model, plan = eurobert(hidden=64, layers=3), plan_of(8)
    batch = Batch({"advantages": ADVANTAGES})
    fits = [fit for _, fit in ladder(model, plan, BGPO, batch)]
    assert {fit.passes for fit in fits} == {1}
    assert {fit.sequences_per_pass for fit in fits if fit.samples_per_pass > 1} == {3}
    assert {(1, 1), (1, 2), (8, 3)} <= {(fit.samples_per_pass, fit.sequences_per_pass) for fit in fits}


def test_a_batch_in_a_single_cut_takes_one_pass():
    model, plan = eurobert(), plan_of(4)
    batch = batch_of(CENTRED, model, plan)
    two, want = run(model, plan, CENTRED, batch, denominator=3.0)
    fit = fit_passes(model, plan, CENTRED, batch, memory_budget=1 << 30)
    assert (fit.samples_per_pass, fit.sequences_per_pass, fit.passes) == (4, 3, 1)
    one, got = run(model, plan, CENTRED, batch, denominator=3.0, samples_per_pass=4)
    assert (two.passes, one.passes) == (2, 1)
    assert float(one.loss) == pytest.approx(float(two.loss), rel=1e-10)
    assert worst_gradient_error(got, want) < 1e-10


@given(st.integers(0, 4), st.integers(0, 4), st.sampled_from([BGPO, GDPO, RSPO]))
def test_a_larger_budget_never_gives_a_smaller_cut(small, more, objective):
    model, plan = eurobert(hidden=8, layers=1), plan_of(4)
    base = 1 << 20
    cuts = [fit_passes(model, plan, objective, memory_budget=base << size) for size in (small, small + more)]
    first, second = (fit.samples_per_pass * fit.sequences_per_pass for fit in cuts)
    assert first <= second


def test_samples_of_blocks_share_a_clean_copy_and_are_counted_so():
    model = eurobert(layers=1)
    ids = torch.randint(3, 10, (2, 12), generator=torch.Generator().manual_seed(0))
    completion = torch.zeros_like(ids, dtype=torch.bool)
    completion[:, 4:] = True
    plan = make_mask_plan(
        ids, completion, law="exact", samples=8, seed=1, sequence_ids=torch.arange(2), mask_id=10, causal_block=4
    )
    fits = [fit_passes(model, plan, GDPO, memory_budget=budget) for budget in (1 << 26, 2 * least(model, plan, GDPO))]
    assert (fits[0].samples_per_pass, fits[0].sequences_per_pass) == (8, 2)
    assert fits[1].samples_per_pass < 8
    sizes = []
    hook = model.register_forward_pre_hook(lambda _, __, kwargs: sizes.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    fit_passes(model, plan, GDPO, memory_budget=least(model, plan, GDPO))
    hook.remove()
    assert max(sizes) == 12 + 2 * 8, "no more than the first cut above the budget is tried"
    assert fits[0].saved_bytes / 2 < 8 * fits[1].saved_bytes / fits[1].samples_per_pass, "the clean copy is there once"


def test_an_error_names_the_argument():
    model, plan = eurobert(), plan_of(2)
    with pytest.raises(TypeError, match="memory_budget"):
        fit_passes(model, plan, BGPO, memory_budget=1e9)
    with pytest.raises(TypeError, match="objective"):
        fit_passes(model, plan, "bgpo", memory_budget=1 << 20)
    assert old_scores(model, plan).shape == (3, 2)
    accumulate(model, plan, BGPO, Batch({"advantages": ADVANTAGES}))
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    fit_passes(model, plan, BGPO, memory_budget=1 << 20)
    assert all(torch.equal(before[name], p.grad) for name, p in model.named_parameters() if p.grad is not None)
