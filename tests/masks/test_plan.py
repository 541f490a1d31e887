"""Mask plans: the laws exactly, the bits under every cut, rows and shift, ELBOs."""

import itertools
import math
from collections import Counter
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllm_kernels import make_mask_plan
from tests import oracle
from tests.plans import PRESETS, plan_of, preset

# --- the laws -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 5, 16])
def test_exact_with_as_many_samples_as_tokens_has_every_count_once(length):
    plan = plan_of([length] * 50, samples=length)
    for b in range(50):
        assert sorted(plan.counts[:, b].tolist()) == list(range(1, length + 1))


@pytest.mark.parametrize(("length", "samples"), [(5, 1), (5, 2), (5, 3), (6, 4), (4, 7), (7, 14)])
def test_exact_counts_are_one_offset_plus_the_strata(length, samples):
    """Every sequence's counts are `1 + (c + floor(k L / K)) mod L` for one c, and every c occurs equally
    often.
    """
    sequences = 4000
    counts = plan_of([length] * sequences, samples=samples).counts
    offset = counts[0] - 1
    strata = torch.tensor([k * length // samples for k in range(samples)])
    assert torch.equal(counts, 1 + (offset[None] + strata[:, None]) % length)
    observed = torch.bincount(offset, minlength=length).double()
    assert oracle.chi_square(observed, torch.full_like(observed, sequences / length)) < oracle.chi_square_limit(length - 1)


@pytest.mark.parametrize(("length", "samples"), [(5, 2), (6, 4), (7, 3)])
def test_exact_every_sample_sees_every_count_equally_often(length, samples):
    """Rounding half to even would leave some strata with half of the counts (ALGORITHMS.md 0.2)."""
    counts = plan_of([length] * 4000, samples=samples).counts
    for k in range(samples):
        observed = torch.bincount(counts[k] - 1, minlength=length).double()
        assert oracle.chi_square(observed, torch.full_like(observed, 4000 / length)) < oracle.chi_square_limit(length - 1)


def test_exact_masks_are_uniform_given_the_count():
    length = 5
    masked = plan_of([length] * 6000, samples=length, prompt=0).masked.flatten(0, 1)
    by_count = Counter(tuple(row.nonzero()[:, 0].tolist()) for row in masked)
    for n in range(1, length + 1):
        subsets = list(itertools.combinations(range(length), n))
        observed = torch.tensor([by_count[s] for s in subsets]).double()
        assert observed.sum() == 6000
        if len(subsets) > 1:
            expected = torch.full_like(observed, 6000 / len(subsets))
            assert oracle.chi_square(observed, expected) < oracle.chi_square_limit(len(subsets) - 1)


def table(length, seed=0):
    """A toy model: a log-prob of token l under mask m for every (m, l), summed over m."""
    g = torch.Generator().manual_seed(seed)
    masks = [m for n in range(1, length + 1) for m in itertools.combinations(range(length), n)]
    return {m: -sum(torch.rand(len(m), generator=g, dtype=torch.float64).tolist()) * 3 for m in masks}


@pytest.mark.parametrize(("length", "samples"), [(1, 1), (3, 2), (5, 3), (5, 5), (4, 6)])
def test_exact_is_unbiased_for_the_any_order_bound(length, samples):
    """Probability x weight over all offsets, samples and subsets, with the plan's own counts and weights."""
    scores = table(length)
    drawn = plan_of([length] * 300, samples=samples)
    weight = {int(n): float(w.double()) for n, w in zip(drawn.counts.flatten(), drawn.weight_KB.flatten(), strict=True)}
    assert weight.keys() == set(range(1, length + 1))
    by_offset = {int(drawn.counts[0, b]) - 1: drawn.counts[:, b].tolist() for b in range(300)}
    assert by_offset.keys() == set(range(length))  # each offset has probability 1 / L
    estimate = 0.0
    for counts, n in ((c, n) for c in by_offset.values() for n in c):
        subsets = list(itertools.combinations(range(length), n))
        mean = math.fsum(scores[m] for m in subsets) / len(subsets)
        assert len(counts) == samples
        estimate += (round(weight[n] * n) / n) * mean / (length * samples)
        assert weight[n] == pytest.approx(length / n, rel=1e-7)  # fp32 of an exact L / n
    assert estimate == pytest.approx(oracle.any_order_elbo(scores, length), abs=1e-12)


@pytest.mark.parametrize("length", [1, 3, 5])
def test_bernoulli_is_unbiased_for_the_any_order_bound(length):
    """The integral over t of t^n (1 - t)^(L - n) / t is a rational number for every subset."""
    scores = table(length)
    estimate = 0.0
    for mask, score in scores.items():
        n = len(mask)
        coefficient = sum(  # of the expanded polynomial, integrated term by term
            Fraction((-1) ** j * math.comb(length - n, j), n + j) for j in range(length - n + 1)
        )
        estimate += float(coefficient) * score
    assert estimate == pytest.approx(oracle.any_order_elbo(scores, length), abs=1e-12)


@pytest.mark.parametrize("law", ["exact", "bernoulli"])
def test_the_drawn_masks_and_weights_have_that_expectation(law):
    """Mean over draws of weight x [mask = m] against 1 / (n C(L, n)), subset by subset."""
    length, draws = 4, 20000
    plan = plan_of([length] * (draws // 4), law=law, samples=4, prompt=0, **({"t_min": 1e-3} if law == "bernoulli" else {}))
    code = (plan.masked.long() << torch.arange(length)).sum(-1)
    for n in range(1, length + 1):
        for m in itertools.combinations(range(length), n):
            hit = (code == sum(1 << p for p in m)).double() * plan.weight_KB.double()
            per_sequence = hit.mean(0)  # the K samples of a sequence are dependent
            error = float(per_sequence.std()) / math.sqrt(len(per_sequence))
            assert abs(float(per_sequence.mean()) - 1 / (n * math.comb(length, n))) <= 5 * error + 2e-3 * (law == "bernoulli")


def test_bernoulli_masks_each_token_with_probability_t_independently():
    t = 0.3
    masked = plan_of([6] * 5000, law="bernoulli", samples=2, t=t, prompt=0).masked.flatten(0, 1)
    observed = torch.bincount((masked.long() << torch.arange(6)).sum(-1), minlength=64).double()
    count = torch.tensor([code.bit_count() for code in range(64)])
    expected = 10000 * t ** count.double() * (1 - t) ** (6 - count.double())
    assert oracle.chi_square(observed, expected) < oracle.chi_square_limit(63)


def test_bernoulli_levels_are_uniform_above_t_min_and_differ_by_sample_and_sequence():
    plan = plan_of([3] * 2000, law="bernoulli", samples=5, t_min=0.2)
    t = plan.p_mask_KB
    assert ((t > 0.2) & (t <= 1.0)).all()
    observed = torch.histc(t, 16, 0.2, 1.0).double()
    assert oracle.chi_square(observed, torch.full_like(observed, 10000 / 16)) < oracle.chi_square_limit(15)
    assert len(t.unique()) > 9900


def test_bernoulli_at_t_1_masks_everything():
    assert torch.equal(plan_of([4, 2], law="bernoulli", t=1.0).counts, torch.tensor([[4, 2]] * 4))


@pytest.mark.parametrize("options", [{"law": "exact"}, {"law": "bernoulli"}, {"law": "bernoulli", "t": 0.25}], ids=str)
def test_weight_times_p_mask_is_1(options):
    plan = plan_of([7, 3, 5], samples=6, **options)
    torch.testing.assert_close(plan.weight_KB * plan.p_mask_KB, torch.ones(6, 3), rtol=3e-7, atol=0)
    assert plan.weight_KB.dtype == plan.p_mask_KB.dtype == torch.float32
    assert torch.equal(plan.rows.weight, plan.weight_KB[plan.rows.sample, plan.rows.sequence])


# --- what is masked -----------------------------------------------------------------------------------------


@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    prompt=st.integers(0, 4),
    samples=st.integers(1, 8),
    name=st.sampled_from(list(PRESETS)),
    noise=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_prompt_and_padding_are_never_scored_nor_masked_without_being_asked(lengths, prompt, samples, name, noise, seed):
    changes = {"samples": samples} if PRESETS[name][0] in ("exact", "bernoulli", "exact_zero", "full", "block") else {}
    plan = preset(name, lengths, S=12, prompt=prompt, seed=seed, prompt_noise=noise, attention=True, left_padding=1, **changes)
    assert plan.masked.shape == plan.shape == (plan.samples, len(lengths), 12)
    for b, length in enumerate(lengths):
        assert not plan.masked[:, b, 0].any()
        assert not plan.masked[:, b, 1 + prompt + length :].any()
        assert plan.masked[:, b, 1 : 1 + prompt].float().mean() == noise or noise == 0.5 or not prompt or not length
    assert not (plan.scored & ~plan.completion_mask_BS).any()
    assert not (plan.scored & ~plan.masked).any()
    assert torch.equal(plan.lengths_B, torch.tensor(lengths))
    if PRESETS[name][0] == "exact":
        assert ((plan.counts >= 1) == (torch.tensor(lengths) > 0)).all()
    assert (plan.counts <= torch.tensor(lengths)).all()
    assert torch.equal(plan.noisy_ids == 99, plan.masked)
    assert torch.equal(plan.noisy_ids[~plan.masked], plan.input_ids_BS.expand(plan.shape)[~plan.masked])


def test_a_completion_may_have_holes():
    completion = torch.tensor([[True, False, True, False, True, True]])
    ids = torch.arange(6)[None]
    plan = make_mask_plan(ids, completion, law="exact", samples=64, seed=0, sequence_ids=torch.tensor([5]), mask_id=9)
    assert not plan.masked[:, :, [1, 3]].any()
    assert plan.masked.any(0)[0, [0, 2, 4, 5]].all()
    dense = make_mask_plan(
        ids[:, :4], torch.ones(1, 4, dtype=torch.bool), law="exact", samples=64, seed=0, sequence_ids=torch.tensor([5]), mask_id=9
    )
    assert torch.equal(plan.masked[:, :, [0, 2, 4, 5]], dense.masked)  # keyed by the ordinal in the completion


@pytest.mark.parametrize("name", PRESETS)
def test_an_empty_completion_is_legal(name):
    plan = preset(name, [0, 3, 0])
    K = plan.shape[0]
    assert (plan.counts[:, [0, 2]] == 0).all()
    assert torch.isfinite(plan.weight_KB).all()
    assert torch.isfinite(plan.p_mask_KB).all()
    elbo = plan.elbo(torch.full((len(plan.rows),), -1.0))
    assert (elbo[[0, 2]] == 0).all()
    assert len(plan.rows) == int(plan.counts[:, 1].sum())
    nothing = preset(name, [0, 0], S=5)
    assert len(nothing.rows) == 0
    assert torch.equal(nothing.elbo(torch.zeros(0)), torch.zeros(2, nothing.shape[0]))
    assert nothing.shape[0] in (1, K)  # a trace without a step has one empty state


# --- the same bits under every cut --------------------------------------------------------------------------


PARTS = ("masked", "scored", "noisy_ids", "counts", "weight_KB", "p_mask_KB")


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("iteration", [0, 3])
def test_a_cut_keeps_every_bit(name, iteration):
    plan = preset(name, [5, 0, 7, 3, 6], iteration=iteration, prompt_noise=0.3)
    K = plan.shape[0]
    for k, b in itertools.product(((0, K), (0, 1), (2, K - 1), (K - 1, K)), ((0, 5), (1, 2), (2, 4), (4, 5))):
        samples, sequences = slice(*k), slice(*b)
        cut = plan.cut(samples=samples, sequences=sequences)
        assert cut.shape == (k[1] - k[0], b[1] - b[0], plan.shape[2])
        for name in PARTS:
            assert torch.equal(getattr(cut, name), getattr(plan, name)[samples, sequences]), name
        assert torch.equal(cut.share_K, plan.share_K[samples])
    twice = plan.cut(samples=slice(0, 3)).cut(samples=slice(1, 2), sequences=slice(1, 4)).cut(sequences=slice(1, 2))
    assert torch.equal(twice.masked, plan.masked[1:2, 2:3])
    picked = plan.cut(samples=torch.tensor([2, 1]), sequences=torch.tensor([3, 0]))
    assert torch.equal(picked.masked, plan.masked[[2, 1]][:, [3, 0]])


def test_a_cut_after_reading_the_whole_is_not_stale():
    plan = plan_of([4, 5], samples=3)
    whole = plan.masked, plan.rows, plan.lengths_B
    cut = plan.cut(samples=slice(1, 2), sequences=slice(1, 2))
    assert cut.masked.shape == (1, 1, whole[0].shape[2])
    assert cut.lengths_B.tolist() == [5]
    assert len(cut.rows) == int(cut.counts.sum())


@pytest.mark.parametrize("name", PRESETS)
def test_batch_order_and_company_change_nothing(name):
    lengths, ids = [5, 2, 7, 4], torch.tensor([11, -22, 2**60, 44])
    noisy = {"prompt_noise": 0.3, "iteration": 1}
    plan = preset(name, lengths, ids=ids, **noisy)
    K, order = plan.shape[0], [2, 0, 3, 1]
    permuted = preset(name, [lengths[b] for b in order], ids=ids[order], **noisy)
    assert torch.equal(permuted.masked, plan.masked[:, order])
    assert torch.equal(permuted.scored, plan.scored[:, order])
    for b, length in enumerate(lengths):
        alone = preset(name, [length], S=9, ids=ids[b : b + 1], **noisy)
        shared = min(K, alone.shape[0])  # alone, a trace has only the states of its own sequence
        assert torch.equal(alone.masked[:shared, 0], plan.masked[:shared, b])
        assert torch.equal(alone.weight_KB[:shared, 0], plan.weight_KB[:shared, b])
        assert not plan.masked[shared:, b, 2:].any()


@pytest.mark.parametrize("name", PRESETS)
def test_padding_on_either_side_and_prompt_length_change_nothing(name):
    plain = preset(name, [5, 3])
    completion = [plain.masked[:, b, 2 : 2 + n] for b, n in enumerate((5, 3))]
    for options in ({"left_padding": 3}, {"S": 20}, {"prompt": 7}):
        moved = preset(name, [5, 3], **options)
        for b, want in enumerate(completion):
            assert torch.equal(moved.masked[:, b][:, moved.completion_mask_BS[b]], want)


def test_more_samples_of_bernoulli_extend_the_fewer():
    few, many = (plan_of([5, 3], law="bernoulli", samples=k).masked for k in (2, 6))
    assert torch.equal(many[:2], few)


def test_seeds_iterations_and_sequences_give_unrelated_masks():
    def bits(**options):
        return plan_of([40] * 30, law="bernoulli", t=0.5, samples=2, **options).masked[:, :, 2:].double()

    base = bits()
    assert torch.equal(base, bits())
    others = [bits(seed=1), bits(iteration=1), bits(iteration=2), bits(ids=torch.arange(7, 37)), base.roll(1, 1), base.roll(1, 0)]
    for other in others:
        correlation = float(torch.corrcoef(torch.stack([base.flatten(), other.flatten()]))[0, 1])
        assert abs(correlation) < 5 / math.sqrt(base.numel())


def test_exact_offsets_of_two_iterations_are_independent():
    a, b = (plan_of([4] * 3000, samples=1, iteration=i).counts[0] - 1 for i in (0, 1))
    observed = torch.bincount(4 * a + b, minlength=16).double()
    assert oracle.chi_square(observed, torch.full_like(observed, 3000 / 16)) < oracle.chi_square_limit(15)


def test_the_level_and_the_places_are_independent():
    plan = plan_of([4] * 6000, samples=1, prompt=0)
    first, count = plan.masked[0, :, 0], plan.counts[0]
    for n in range(1, 5):
        share = float(first[count == n].double().mean())
        assert abs(share - n / 4) < 5 * math.sqrt(0.25 / 1500)


# --- rows and ELBOs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0, 1])
def test_rows_are_the_masked_tokens_and_shift_moves_only_their_row(shift):
    plan = plan_of([4, 0, 6], samples=3, shift=shift)
    K, B, S = plan.shape
    want = []
    for k, b, s in itertools.product(range(K), range(B), range(S)):
        if plan.masked[k, b, s]:
            want.append(((k * B + b) * S + s - shift, int(plan.input_ids_BS[b, s]), b, k))
    rows = plan.rows
    assert list(zip(*(t.tolist() for t in (rows.index, rows.target, rows.sequence, rows.sample)), strict=True)) == want
    assert len(rows.index.unique()) == len(rows) == len(want)
    assert rows.weight.dtype == torch.float32
    unshifted = plan_of([4, 0, 6], samples=3)
    assert torch.equal(plan.masked, unshifted.masked)
    assert torch.equal(rows.index + shift, unshifted.rows.index)


def test_a_shift_refuses_position_0_which_no_row_predicts():
    assert plan_of([3], prompt=0).shape[1] == 1
    with pytest.raises(ValueError, match=r"completion_mask_BS.*shift=1"):
        plan_of([3], prompt=0, shift=1)


@pytest.mark.parametrize("law", ["exact", "bernoulli"])
@pytest.mark.parametrize("shift", [0, 1])
def test_elbo_equals_a_plain_loop_and_is_differentiable(law, shift):
    plan = plan_of([4, 0, 6, 1], samples=5, law=law, shift=shift)
    logp = -torch.rand(len(plan.rows), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logp.requires_grad_()
    want = torch.zeros(4, 5, dtype=torch.float64)
    for n, (k, b, _) in enumerate(plan.masked.nonzero().tolist()):
        want[b, k] += float(plan.weight_KB[k, b]) * float(logp[n].detach())
    got = plan.elbo(logp)
    torch.testing.assert_close(got.detach(), want)
    upstream = torch.randn(4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got.backward(upstream)
    torch.testing.assert_close(logp.grad, upstream[plan.rows.sequence, plan.rows.sample] * plan.rows.weight.double())


def test_elbo_of_a_cut_is_the_cut_of_the_elbo():
    plan = plan_of([4, 2, 6], samples=4, shift=1)
    logp = -torch.rand(len(plan.rows), generator=torch.Generator().manual_seed(0))
    whole = plan.elbo(logp)
    for k, b in itertools.product(range(4), range(3)):
        cut = plan.cut(samples=slice(k, k + 1), sequences=slice(b, b + 1))
        here = (plan.rows.sample == k) & (plan.rows.sequence == b)
        assert torch.equal(cut.elbo(logp[here]), whole[b : b + 1, k : k + 1])


def test_elbo_refuses_another_number_of_rows():
    plan = plan_of([4])
    with pytest.raises(ValueError, match="logp_N"):
        plan.elbo(torch.zeros(len(plan.rows) + 1))


def test_int32_ids_are_taken_as_they_are():
    ids = torch.arange(6, dtype=torch.int32)[None]
    plan = make_mask_plan(
        ids, torch.ones(1, 6, dtype=torch.bool), law="exact", samples=2, seed=0, sequence_ids=torch.tensor([1]), mask_id=9
    )
    assert plan.rows.target.dtype == torch.int64
    assert plan.noisy_ids.dtype == torch.int32


# --- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"law": "uniform"}, ValueError, ["law", "uniform", "exact", "bernoulli"]),
        ({"samples": 0}, ValueError, ["samples", "0"]),
        ({"samples": 2.0}, TypeError, ["samples", "float"]),
        ({"seed": -1}, ValueError, ["seed", "-1"]),
        ({"mask_id": -1}, ValueError, ["mask_id", "-1"]),
        ({"shift": -1}, ValueError, ["shift", "-1"]),
        ({"iteration": -1}, ValueError, ["iteration", "-1"]),
        ({"t": 0.5}, ValueError, ["t ", "exact", "pairing"]),
        ({"law": "bernoulli", "t": 0.0}, ValueError, ["t ", "0"]),
        ({"law": "bernoulli", "t": 1.5}, ValueError, ["t ", "1.5"]),
        ({"law": "bernoulli", "t": math.nan}, ValueError, ["t ", "nan"]),
        ({"law": "bernoulli", "t_min": 1.0}, ValueError, ["t_min", "1"]),
        ({"input_ids_BS": torch.zeros(2, 5)}, TypeError, ["input_ids_BS", "float32"]),
        ({"input_ids_BS": torch.zeros(5, dtype=torch.int64)}, ValueError, ["input_ids_BS", "5"]),
        ({"input_ids_BS": torch.zeros(0, 5, dtype=torch.int64)}, ValueError, ["input_ids_BS", "0"]),
        ({"completion_mask_BS": torch.ones(2, 4, dtype=torch.bool)}, ValueError, ["completion_mask_BS", "4", "5"]),
        ({"completion_mask_BS": torch.ones(2, 5)}, TypeError, ["completion_mask_BS", "bool"]),
        ({"sequence_ids": torch.tensor([1])}, ValueError, ["sequence_ids", "1", "2"]),
        ({"sequence_ids": torch.tensor([1, 1])}, ValueError, ["sequence_ids", "distinct"]),
        ({"sequence_ids": torch.tensor([1.0, 2.0])}, TypeError, ["sequence_ids", "float32"]),
        ({"mask_id": 3}, ValueError, ["mask_id", "3", "input_ids_BS"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_an_error_names_the_argument_and_what_came(changes, error, words):
    arguments = {
        "input_ids_BS": torch.arange(10).reshape(2, 5),
        "completion_mask_BS": torch.ones(2, 5, dtype=torch.bool),
        "law": "exact",
        "samples": 2,
        "seed": 0,
        "sequence_ids": torch.tensor([1, 2]),
        "mask_id": 99,
    } | changes
    with pytest.raises(error) as caught:
        make_mask_plan(arguments.pop("input_ids_BS"), arguments.pop("completion_mask_BS"), **arguments)
    for word in words:
        assert word in str(caught.value)


def test_a_plan_says_its_law_with_the_options_that_it_has():
    said = plan_of([9, 3], law="block", block_length=4).describe()
    assert said.startswith("law         block (SPG, arXiv 2510.09541); options block_length=4\n")
    assert "4 samples x 2 sequences x" in said
    assert "; options none\n" in plan_of([9], law="full", samples=1).describe()
