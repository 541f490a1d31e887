"""Each preset draws what its paper says: levels, pairs, nodes, blocks and states, weights and shares; options
checked.
"""

import itertools
import math

import pytest
import torch

from dllm_kernels import make_mask_plan
from dllm_kernels.masks import draws, laws
from tests import oracle
from tests.plans import PRESETS, plan_of, preset


def level_of(plan):
    return draws.level(plan.rule, plan.options, plan._keys, plan.lengths_B)


# --- the table ----------------------------------------------------------------------------------------------


def test_the_laws_are_the_ten_published_ones():
    assert list(laws.LAWS) == [
        "bernoulli",
        "exact",
        "exact_zero",
        "antithetic",
        "coupled",
        "quadrature",
        "full",
        "block",
        "trace",
        "segments",
    ]
    assert all(law.name == name and "arXiv" in law.source for name, law in laws.LAWS.items())
    assert laws.LAWS["block"].options == {"block_length": 32}  # facebookresearch/SPG, its configs


@pytest.mark.parametrize("name", PRESETS)
def test_shares_add_up_to_the_reduction_of_the_law(name):
    plan = preset(name, [5, 3])
    K = plan.shape[0]
    want = {
        "coupled": torch.tensor([0.5] + [1 / 6] * 6),
        "quadrature": torch.full((K,), 3 / K),
        "quadrature, rounded": torch.full((K,), 2 / K),
        **dict.fromkeys(("trace", "trace, shrunk", "segments"), torch.ones(K)),
    }.get(name, torch.full((K,), 1 / K))
    assert plan.share_K.dtype == torch.float64
    torch.testing.assert_close(plan.share_K, want.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", PRESETS)
def test_a_score_is_the_share_weighted_sum_and_adds_up_over_cuts(name):
    plan = preset(name, [5, 0, 3])
    K, B, _ = plan.shape
    logp = -torch.rand(len(plan.rows), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    want = torch.zeros(B, dtype=torch.float64)
    for n, (k, b, _) in enumerate(plan.scored.nonzero().tolist()):
        want[b] += float(plan.share_K[k]) * float(plan.weight_KB[k, b]) * float(logp[n])
    torch.testing.assert_close(plan.score(logp), want, rtol=1e-6, atol=1e-9)
    parts = torch.zeros(B, dtype=torch.float64)
    for k in range(K):
        parts += plan.cut(samples=slice(k, k + 1)).score(logp[plan.rows.sample == k])
    torch.testing.assert_close(plan.score(logp), parts, rtol=1e-12, atol=1e-12)


# --- counts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "samples"), [(4, 5), (5, 2), (5, 3), (6, 4), (4, 7), (3, 12)])
@pytest.mark.parametrize("law", ["exact", "exact_zero"])
def test_floor_strata_see_every_count_and_rounded_ones_half_of_them(law, length, samples):
    """ALGORITHMS.md 0.2: `round(linspace)` rounds half to even, so at a half-integer stratum about half of
    the counts is never drawn. By enumeration of the offsets; the plan's own counts are those of one offset.
    """
    choices = length + (law == "exact_zero")
    counts = plan_of([length] * 400, law=law, samples=samples).counts
    seen = [set(counts[k].tolist()) for k in range(samples)]
    assert all(s == set(range(length + 1 - choices, length + 1)) for s in seen)
    half = [k for k in range(samples) if (2 * k * choices) % (2 * samples) == samples]  # k L / K is a half-integer
    for k in range(samples):
        rounded = {int(torch.tensor(c + k * choices / samples).double().round()) % choices for c in range(choices)}
        floored = {(c + k * choices // samples) % choices for c in range(choices)}
        assert floored == set(range(choices))
        assert (len(rounded) < choices) == (k in half and choices > 1)


def test_the_half_integer_rows_of_others_see_129_of_257_counts():
    """ESPO with L = 256: row 1 of 2, row 2 of 4, row 3 of 6 (ALGORITHMS.md 0.2); ours sees all 257
    everywhere.
    """
    for batch, row in ((2, 1), (4, 2), (6, 3)):
        offset = torch.arange(257).double()
        assert len((offset + row * 257 / batch).round().remainder(257).unique()) == 129
        ours = (torch.arange(257) + row * 257 // batch) % 257
        assert len(ours.unique()) == 257


@pytest.mark.parametrize("law", ["exact", "exact_zero"])
def test_independent_counts_of_two_samples_fill_the_square(law):
    choices = 4 if law == "exact" else 5
    counts = plan_of([4] * 4000, law=law, samples=2, pairing="independent").counts - (5 - choices)
    observed = torch.bincount(counts[0] * choices + counts[1], minlength=choices**2).double()
    expected = torch.full_like(observed, 4000 / choices**2)
    assert oracle.chi_square(observed, expected) < oracle.chi_square_limit(choices**2 - 1)


def test_exact_zero_has_an_empty_mask_of_weight_0():
    plan = plan_of([3] * 200, law="exact_zero", samples=4)
    assert torch.equal(plan.counts.sort(0).values, torch.arange(4)[:, None].expand(4, 200))
    want = torch.where(plan.counts > 0, 4 / plan.counts.clamp(min=1), 0.0)
    torch.testing.assert_close(plan.weight_KB, want)


# --- pairs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["antithetic", "antithetic, independent", "dmpo", "coupled"])
def test_the_second_of_a_pair_hides_what_the_first_shows(name):
    plan = preset(name, [5, 0, 8, 1])
    first = plan.rule.pairs_from
    masked, completion = plan.masked[first:], plan.completion_mask_BS
    assert torch.equal(masked[::2] ^ masked[1::2], completion.expand(3, *completion.shape))
    assert torch.equal(plan.counts[first::2] + plan.counts[first + 1 :: 2], plan.lengths_B.expand(3, -1))


@pytest.mark.parametrize("name", ["antithetic", "antithetic, independent"])
def test_antithetic_weights_are_espo_s(name):
    plan = preset(name, [5] * 300)
    want = torch.where(plan.counts > 0, 6 / plan.counts.clamp(min=1), 0.0)
    torch.testing.assert_close(plan.weight_KB, want)
    assert set(plan.counts[0].tolist()) == set(range(6))


def test_antithetic_strata_run_over_the_pairs():
    plan = plan_of([5] * 100, law="antithetic", samples=12)
    assert torch.equal(plan.counts[::2].sort(0).values, torch.arange(6)[:, None].expand(6, 100))


def test_dmpo_weights_are_of_the_realised_counts_and_levels_uniform_above_a_tenth():
    plan = plan_of([6] * 2000, law="antithetic", weight="dmpo", samples=4)
    want = torch.where(plan.counts > 0, 6 / plan.counts.clamp(min=1), 0.0)
    torch.testing.assert_close(plan.weight_KB, want)
    t = plan.p_mask_KB[::2]
    torch.testing.assert_close(t + plan.p_mask_KB[1::2], torch.ones_like(t))
    observed = torch.histc(t, 9, 0.1, 1.0).double()
    assert observed.sum() == 4000
    assert oracle.chi_square(observed, torch.full_like(observed, 4000 / 9)) < oracle.chi_square_limit(8)


def test_coupled_is_everything_and_pairs_of_weights_1_over_t_and_1_over_1_minus_t():
    plan = plan_of([6, 4], law="coupled", samples=5)
    assert torch.equal(plan.masked[0], plan.completion_mask_BS)
    assert (plan.weight_KB[0] == 1).all()
    t = level_of(plan).t_KB[1::2]
    torch.testing.assert_close(plan.weight_KB[1::2], (1 / t).float())
    torch.testing.assert_close(plan.weight_KB[2::2], (1 / (1 - t)).float())


def test_coupled_score_of_one_pair_is_diffucoder_s():
    """`sum_l (logp(l; all) + w_l logp(l; the mask that hides it)) / 2`, w_l = 1/t or 1/(1-t)."""
    plan = plan_of([6, 4], law="coupled", samples=3, prompt=0)
    logp_KBS = -torch.rand(3, 2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t_B = level_of(plan).t_KB[1]
    want = torch.zeros(2, dtype=torch.float64)
    for b, s in plan.completion_mask_BS.nonzero().tolist():
        coupled = logp_KBS[1, b, s] / t_B[b] if plan.masked[1, b, s] else logp_KBS[2, b, s] / (1 - t_B[b])
        want[b] += (logp_KBS[0, b, s] + coupled) / 2
    torch.testing.assert_close(plan.score(logp_KBS[plan.scored]), want, rtol=1e-6, atol=1e-6)


def test_coupled_levels_vary_with_pair_sequence_seed_and_iteration():
    """DARE's port draws `random.uniform(0.2, 0.8)` after seeding with a default of 42: every ratio is
    0.58366.
    """
    levels = [level_of(plan_of([6] * 500, law="coupled", samples=5, **o)).t_KB[1::2] for o in ({}, {"seed": 1}, {"iteration": 1})]
    t = torch.cat([level.flatten() for level in levels])
    assert len(t.unique()) == 3 * 2 * 500
    observed = torch.histc(t, 12, 0.2, 0.8)
    assert observed.sum() == 3000
    assert oracle.chi_square(observed, torch.full_like(observed, 250)) < oracle.chi_square_limit(11)


def test_masks_of_one_level_still_differ_by_sample():
    """The same port reseeds before every mask, so that all samples hide the same tokens."""
    masked = plan_of([40] * 20, law="bernoulli", t=0.5, samples=8).masked
    for first, second in itertools.combinations(range(8), 2):
        assert 0.35 < float((masked[first] ^ masked[second])[:, 2:].float().mean()) < 0.65


# --- quadrature ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "counts"), [(1, [128]), (2, [54, 201]), (3, [28, 128, 227]), (4, [17, 84, 171, 238]), (5, [12, 59, 128, 196, 243])]
)
def test_quadrature_hides_int_t_l_tokens_at_every_node(nodes, counts):
    """The table of ALGORITHMS.md section 3 for L = 256; nodes 4 and 5 from the Legendre polynomials' roots."""
    plan = plan_of([256], law="quadrature", nodes=nodes, samples=2 * nodes)
    assert plan.counts[:, 0].tolist() == counts * 2
    rounded = plan_of([256], law="quadrature", nodes=nodes, samples=nodes, counts="round")
    t, w = draws.gauss_legendre(nodes)
    assert rounded.counts[:, 0].tolist() == [math.floor(256 * x + 0.5) for x in t]
    torch.testing.assert_close(plan.weight_KB[:nodes, 0].double(), torch.tensor(w).double() / torch.tensor(t).double())
    counted = plan_of([256], law="quadrature", nodes=nodes, samples=nodes, weight="wL/count")
    want = torch.tensor(w).double() * 256 / torch.tensor(counts)
    torch.testing.assert_close(counted.weight_KB[:, 0].double(), want)


@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 5])
def test_the_rule_integrates_polynomials_up_to_degree_2n_minus_1(nodes):
    t, w = draws.gauss_legendre(nodes)
    for degree in range(2 * nodes):
        assert math.fsum(b * a**degree for a, b in zip(t, w, strict=True)) == pytest.approx(1 / (degree + 1), abs=1e-14)
    assert math.fsum(b * a ** (2 * nodes) for a, b in zip(t, w, strict=True)) != pytest.approx(1 / (2 * nodes + 1), abs=1e-9)


def test_a_node_without_a_token_contributes_nothing():
    plan = plan_of([4], law="quadrature", samples=3, weight="wL/count")
    assert plan.counts[:, 0].tolist() == [0, 2, 3]
    assert plan.weight_KB[0, 0] == 0
    assert float(plan.elbo(torch.full((5,), -1.0))[0, 0]) == 0


def test_masks_of_one_node_differ_by_sample():
    plan = plan_of([20] * 50, law="quadrature", nodes=1, samples=4)
    assert (plan.counts == 10).all()
    assert (plan.masked[0] != plan.masked[1]).any(-1).float().mean() > 0.95


# --- given masks --------------------------------------------------------------------------------------------


def test_full_hides_the_completion_and_15_percent_of_the_prompt():
    plan = plan_of([5] * 400, law="full", samples=3, prompt=10)
    assert torch.equal(plan.scored, plan.completion_mask_BS.expand(plan.shape))
    assert (plan.weight_KB == 1).all()
    noisy = plan.masked[:, :, :10].double()
    assert abs(float(noisy.mean()) - 0.15) < 5 * math.sqrt(0.15 * 0.85 / noisy.numel())
    assert not torch.equal(noisy[0], noisy[1])
    assert not plan_of([5], law="full", samples=3, prompt_noise=0.0).masked[:, :, :2].any()


def test_block_hides_a_part_of_one_block_and_all_later_ones():
    plan = plan_of([10] * 900, law="block", samples=1, block_length=4, prompt_noise=0.0, prompt=0)
    masked = plan.masked[0]
    first = masked.long().argmax(-1) // 4
    for block in range(3):
        here = masked[first == block]
        assert abs(len(here) - 300) < 5 * math.sqrt(900 * 2 / 9)
        assert not here[:, : 4 * block].any()
        assert here[:, 4 * block + 4 :].all()
        inside = here[:, 4 * block : 4 * block + 4].sum(-1)
        size = min(4, 10 - 4 * block)
        observed = torch.bincount(inside - 1, minlength=size).double()
        assert len(observed) == size
        assert oracle.chi_square(observed, torch.full_like(observed, len(here) / size)) < oracle.chi_square_limit(size - 1)
    torch.testing.assert_close(plan.weight_KB, 1 / plan.counts.float())


def test_block_takes_every_block_once_before_one_returns():
    plan = plan_of([9] * 60, law="block", samples=6, block_length=4, prompt_noise=0.0, prompt=0)  # the last of one token
    block = plan.masked.long().argmax(-1) // 4
    for turn in (block[:3], block[3:]):
        assert torch.equal(turn.sort(0).values, torch.arange(3)[:, None].expand(3, 60))
    again = plan_of([9] * 60, law="block", samples=6, block_length=4, prompt_noise=0.0, prompt=0, iteration=1)
    assert not torch.equal(block[:3], again.masked.long().argmax(-1)[:3] // 4)


def test_block_treats_earlier_tokens_as_the_prompt_and_scores_what_it_hides():
    plan = plan_of([40] * 200, law="block", samples=2, block_length=10, prompt=5, prompt_noise=0.2)
    assert torch.equal(plan.scored, plan.masked & plan.completion_mask_BS)
    last = plan.masked[:, :, 5:].clone()
    clean = plan_of([40] * 200, law="block", samples=2, block_length=10, prompt=5, prompt_noise=0.0).masked[:, :, 5:]
    extra = last & ~clean
    block = clean.long().argmax(-1) // 10
    earlier = torch.arange(40) < 10 * block[..., None]
    assert not (extra & ~earlier).any()
    share = float(extra[earlier].double().mean())
    assert abs(share - 0.2) < 5 * math.sqrt(0.16 / int(earlier.sum()))


step_map = torch.tensor([[-1, 2, 0, 2, 5, 0], [-1, -1, 1, 0, -1, -1]])


def trace(law="trace", samples=None, **options):
    ids = torch.arange(12).reshape(2, 6)
    sequence_ids = torch.tensor([1, 2])
    return make_mask_plan(
        ids,
        step_map >= 0,
        law=law,
        samples=samples,
        seed=0,
        sequence_ids=sequence_ids,
        mask_id=99,
        step_map_BS=step_map,
        **options,
    )


def test_trace_hides_what_is_to_come_and_scores_what_comes_next():
    plan = trace()
    assert plan.shape == (6, 2, 6)
    for s in range(6):
        assert torch.equal(plan.masked[s], step_map >= s)
        assert torch.equal(plan.scored[s], step_map == s)
    assert plan.counts.tolist() == [[2, 1], [0, 1], [2, 0], [0, 0], [0, 0], [1, 0]]
    assert torch.equal(plan.score(torch.full((7,), -1.0)), torch.tensor([-5.0, -2.0]))
    assert (plan.weight_KB == 1).all()


def test_trace_of_chosen_steps_is_ragged():
    plan = trace(steps_BJ=torch.tensor([[5, 0], [1, -1]]))
    assert torch.equal(plan.masked[0], torch.stack([step_map[0] >= 5, step_map[1] >= 1]))
    assert torch.equal(plan.scored[1], torch.stack([step_map[0] == 0, torch.zeros(6, dtype=torch.bool)]))
    assert not plan.masked[1, 1].any()
    cut = plan.cut(samples=slice(1, 2), sequences=slice(0, 1))
    assert torch.equal(cut.scored[0, 0], step_map[0] == 0)


def test_trace_merges_consecutive_steps_that_committed_something():
    """TraceRL: unique steps 0, 2, 5 of the first sequence; two to a state; what has an order >= the state is
    hidden.
    """
    plan = trace(shrink=2)
    assert plan.shape[0] == 2
    assert plan.masked[:, 0].tolist() == [(step_map[0] >= 0).tolist(), (step_map[0] >= 5).tolist()]
    assert plan.scored[:, 0].tolist() == [((step_map[0] >= 0) & (step_map[0] <= 2)).tolist(), (step_map[0] == 5).tolist()]
    assert plan.scored[:, 1].tolist() == [(step_map[1] >= 0).tolist(), [False] * 6]


@pytest.mark.parametrize("total", [None, 6, 9])
def test_segments_score_each_token_once_at_the_start_of_its_segment(total):
    plan = trace("segments", segments=3, total_steps=total, prompt_noise=0.0)
    assert torch.equal(plan.scored.sum(0), (step_map >= 0).long())
    bounds = {None: [0, 2, 4], 6: [0, 2, 4], 9: [0, 3, 6]}[total]
    for k, start in enumerate(bounds):
        assert torch.equal(plan.masked[k, 0], step_map[0] >= start)
        end = [*bounds, 99][k + 1]
        assert torch.equal(plan.scored[k, 0], (step_map[0] >= start) & (step_map[0] < end))


# --- standard errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bernoulli", "exact, independent", "antithetic, independent", "dmpo", "coupled", "quadrature"])
def test_standard_errors_are_those_of_the_scores(name):
    """Mean squared standard error against the variance of the score over 3000 sequences of one toy model."""
    plan = preset(name, [6] * 3000, prompt=0)
    table = -torch.rand(64, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    code = (plan.masked.long() << torch.arange(6)).sum(-1)
    logp = table[code][plan.scored]
    error = plan.standard_error(plan.elbo(logp))
    variance = float(plan.score(logp).var())
    assert float(error.square().mean()) == pytest.approx(variance, rel=0.15)


def test_strata_make_the_standard_error_an_upper_bound():
    """A token is the less probable the more are hidden, as in every trained model; strata then cancel the
    counts' part.
    """
    plan = plan_of([6] * 2000, samples=6, prompt=0)
    logp = -(plan.counts[:, :, None].expand(plan.shape) ** 2)[plan.scored].double()
    assert float(plan.standard_error(plan.elbo(logp)).square().mean()) > 100 * float(plan.score(logp).var())


@pytest.mark.parametrize(
    ("law", "samples", "options"),
    [("exact", 1, {}), ("antithetic", 2, {}), ("coupled", 3, {}), ("quadrature", 3, {}), ("full", 4, {}), ("trace", None, {})],
)
def test_what_has_no_two_draws_has_no_standard_error(law, samples, options):
    plan = plan_of([5, 3], law=law, samples=samples, **options)
    error = plan.standard_error(torch.zeros(2, plan.shape[0]))
    assert error.shape == (2,)
    assert error.isnan().all()


def test_a_standard_error_needs_all_samples_in_any_order():
    plan = plan_of([5, 3], law="quadrature", samples=6)
    elbo = -torch.rand(2, 6, generator=torch.Generator().manual_seed(0))
    order = torch.tensor([5, 2, 0, 1, 4, 3])
    torch.testing.assert_close(plan.cut(samples=order).standard_error(elbo[:, order]), plan.standard_error(elbo))
    with pytest.raises(ValueError, match=r"elbo_BK.*6.*3"):
        plan.cut(samples=slice(0, 3)).standard_error(elbo[:, :3])


# --- options ------------------------------------------------------------------------------------------------


EVENTS = {name: torch.full((2, 1, 6), -1) for name in ("shown_BKS", "event_steps_BKS", "event_ids_BKS")}


@pytest.mark.parametrize(
    ("law", "samples", "options", "error", "words"),
    [
        ("exact", 4, {"paring": "stratified"}, ValueError, ["paring", "exact", "pairing", "did you mean"]),
        ("full", 4, {"t": 0.5}, ValueError, ["t is", "full", "none"]),
        ("exact", 4, {"pairing": "both"}, ValueError, ["pairing", "both", "stratified"]),
        ("bernoulli", 4, {"weight": "L/n"}, ValueError, ["weight", "L/n", "1/t"]),
        ("bernoulli", 4, {"t": "0.5"}, TypeError, ["t ", "str"]),
        ("antithetic", 3, {}, ValueError, ["samples", "even", "3"]),
        ("antithetic", 4, {"t_min": 0.2}, ValueError, ["t_min", "dmpo"]),
        ("antithetic", 4, {"weight": "dmpo", "t_min": 1.0}, ValueError, ["t_min", "1.0"]),
        ("antithetic", 4, {"weight": "dmpo", "pairing": "stratified"}, ValueError, ["pairing", "independent"]),
        ("coupled", 4, {}, ValueError, ["samples", "odd", "4"]),
        ("coupled", 1, {}, ValueError, ["samples", "3", "1"]),
        ("coupled", 3, {"t_low": 0.9}, ValueError, ["t_low", "0.9", "0.8"]),
        ("coupled", 3, {"t_high": 1.0}, ValueError, ["t_high", "1.0"]),
        ("coupled", 3, {"t": 1.0}, ValueError, ["t ", "1"]),
        ("quadrature", 4, {}, ValueError, ["samples", "nodes=3", "4"]),
        ("quadrature", 6, {"nodes": 6}, ValueError, ["nodes", "1..5", "6"]),
        ("quadrature", 6, {"counts": "ceil"}, ValueError, ["counts", "ceil", "floor"]),
        ("quadrature", 6, {"weight": "w"}, ValueError, ["weight", "w/t"]),
        ("block", 2, {"block_length": 0}, ValueError, ["block_length", "0"]),
        ("trace", None, {}, ValueError, ["step_map_BS", "trace"]),
        ("trace", 3, {"step_map_BS": step_map}, ValueError, ["samples", "6", "3"]),
        ("trace", None, {"step_map_BS": step_map.float()}, TypeError, ["step_map_BS", "float32"]),
        ("trace", None, {"step_map_BS": step_map[:, :3]}, ValueError, ["step_map_BS", "3"]),
        ("trace", None, {"step_map_BS": step_map - 1}, ValueError, ["step_map_BS", "-1"]),
        ("trace", None, {"step_map_BS": step_map, "shrink": 0}, ValueError, ["shrink", "0"]),
        ("trace", None, {"step_map_BS": step_map, "shrink": 2, "steps_BJ": step_map}, ValueError, ["steps_BJ", "shrink"]),
        ("trace", None, {"step_map_BS": step_map, "steps_BJ": step_map[:1]}, ValueError, ["steps_BJ", "2"]),
        ("trace", None, {**EVENTS, "shrink": 2}, ValueError, ["shrink must be 1 where shown_BKS gives the states, got 2"]),
        ("segments", None, {"step_map_BS": step_map}, TypeError, ["segments"]),
        ("segments", None, {"step_map_BS": step_map, "segments": 4, "total_steps": 3}, ValueError, ["total_steps", "3"]),
        ("segments", None, {"step_map_BS": step_map, "segments": 2, "total_steps": 4}, ValueError, ["step_map_BS", "4", "5"]),
        ("segments", 3, {"step_map_BS": step_map, "segments": 2}, ValueError, ["samples", "2", "3"]),
        ("exact", None, {}, TypeError, ["samples", "NoneType"]),
    ],
)
def test_an_option_error_names_option_law_and_what_is_allowed(law, samples, options, error, words):
    ids = torch.arange(12).reshape(2, 6)
    arguments = {"seed": 0, "sequence_ids": torch.tensor([1, 2]), "mask_id": 99}
    with pytest.raises(error) as caught:
        make_mask_plan(ids, step_map >= 0, law=law, samples=samples, **arguments, **options)
    for word in words:
        assert word in str(caught.value)
