"""Objectives as pure functions of small tensors: BGPO's bound and its options, group-relative advantages."""

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllm_kernels import make_mask_plan
from dllm_kernels.objectives import BGPO, RECIPES, Batch, bgpo, group_advantages
from tests import oracle

F64 = torch.float64


def scores(B=4, K=5, seed=0, spread=0.5):
    g = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(B, K, generator=g, dtype=F64)
    elbo = (old + spread * torch.randn(B, K, generator=g, dtype=F64)).requires_grad_()
    return elbo, old, torch.randn(B, generator=g, dtype=F64)


def value_and_gradient(loss, leaf):
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


# --- BGPO -------------------------------------------------------------------------------------------------------------


def test_bgpo_equals_its_formula_in_value_and_gradient():
    elbo, old, advantages = scores()
    assert (advantages > 0).any()
    assert (advantages < 0).any()
    got = value_and_gradient(bgpo(elbo, old, advantages), elbo)
    want = value_and_gradient(oracle.bgpo(elbo, old, advantages), elbo)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-14)


def test_bgpo_gradient_is_a_constant_for_positive_and_the_ratio_for_negative_advantages():
    elbo, old, advantages = scores()
    _, gradient = value_and_gradient(bgpo(elbo, old, advantages), elbo)
    d = (elbo - old).detach()
    B, K = elbo.shape
    kappa = torch.where(advantages[:, None] >= 0, 1.0, d.exp()) * advantages[:, None] / K
    torch.testing.assert_close(gradient, -kappa / B)


differences = st.lists(st.floats(-4, 4), min_size=1, max_size=8)


@given(d=differences, advantage=st.floats(-3, 3))
def test_bgpo_bounds_the_elbo_ratio_objective_from_below_for_both_signs(d, advantage):
    d = torch.tensor([d], dtype=F64)
    bound = -bgpo(d, torch.zeros_like(d), torch.tensor([advantage], dtype=F64))
    assert float(bound) <= advantage * math.exp(float(d.mean())) + 1e-12 * (1 + abs(float(bound)))


@given(elbo=differences, advantage=st.floats(-3, 3))
def test_bgpo_on_policy_equals_the_ratio_objective_in_value_and_gradient(elbo, advantage):
    elbo = torch.tensor([elbo], dtype=F64).requires_grad_()
    a = torch.tensor([advantage], dtype=F64)
    value, gradient = value_and_gradient(bgpo(elbo, elbo.detach(), a), elbo)
    ratio = -a * torch.exp((elbo - elbo.detach()).mean())
    want_value, want_gradient = value_and_gradient(ratio.sum(), elbo)
    torch.testing.assert_close(value, want_value)
    torch.testing.assert_close(gradient, want_gradient)


def test_bgpo_bound_is_not_tight_off_policy():
    """Otherwise the two tests above would prove nothing."""
    d = torch.tensor([[1.0, -1.0]], dtype=F64)
    for advantage in (1.0, -1.0):
        a = torch.tensor([advantage], dtype=F64)
        shifted = d + (1.0 if advantage > 0 else 0.0)
        assert float(-bgpo(shifted, torch.zeros_like(d), a)) < advantage * math.exp(float(shifted.mean())) - 0.1


@pytest.mark.parametrize("d", [-1.0, -1.5, -50.0, -1e6])
@pytest.mark.parametrize("options", [{}, {"clip": (0.2, 0.2)}, {"dual_clip": 3.0}, {"lengths": torch.tensor([1.0])}], ids=str)
def test_bgpo_is_finite_at_d_of_minus_1_and_below(d, options):
    """The published `exp(log(1 + d))` is NaN there, and poisons the branch not taken."""
    for advantage in (2.0, -2.0):
        elbo = torch.tensor([[d]], dtype=F64, requires_grad=True)
        value, gradient = value_and_gradient(
            bgpo(elbo, torch.zeros(1, 1, dtype=F64), torch.tensor([advantage], dtype=F64), **options), elbo
        )
        assert torch.isfinite(value)
        assert torch.isfinite(gradient).all()
        if advantage > 0:
            assert value == pytest.approx(-2.0 * (1 + d))
            assert gradient.item() == -2.0


@pytest.mark.parametrize("options", [{}, {"clip": (0.2, 0.2)}, {"dual_clip": 3.0}], ids=str)
def test_bgpo_does_not_overflow_where_a_is_positive_or_zero(options):
    elbo = torch.tensor([[1000.0], [1000.0]], dtype=F64, requires_grad=True)
    value, gradient = value_and_gradient(
        bgpo(elbo, torch.zeros(2, 1, dtype=F64), torch.tensor([1.0, 0.0], dtype=F64), **options), elbo
    )
    assert torch.isfinite(value)
    assert torch.isfinite(gradient).all()
    assert gradient[0].item() == (0.0 if "clip" in options else -0.5)
    assert gradient[1] == 0


def test_bgpo_clip_and_dual_clip_bound_the_gradient_of_a_policy_far_off_where_a_is_negative():
    for options in ({"dual_clip": 3.0}, {"clip": (0.2, 0.2), "dual_clip": 3.0}):
        elbo = torch.tensor([[1000.0]], dtype=F64, requires_grad=True)
        value, gradient = value_and_gradient(
            bgpo(elbo, torch.zeros(1, 1, dtype=F64), torch.tensor([-1.0], dtype=F64), **options), elbo
        )
        assert value == pytest.approx(3.0)
        assert gradient.item() == 0.0


def test_a_nan_elbo_is_not_hidden_by_a_clip():
    elbo = torch.tensor([[math.nan]], dtype=F64)
    for options in ({}, {"clip": (0.2, 0.2)}, {"clip": (0.2, 0.2), "dual_clip": 3.0}):
        for advantage in (1.0, -1.0):
            loss = bgpo(elbo, torch.zeros(1, 1, dtype=F64), torch.tensor([advantage], dtype=F64), **options)
            assert torch.isnan(loss), (options, advantage)


def ratio_at(d, advantage, **options):
    """Value of the bound term and its gradient relative to the unclipped one."""
    elbo = torch.tensor([[d]], dtype=F64, requires_grad=True)
    arguments = elbo, torch.zeros(1, 1, dtype=F64), torch.tensor([advantage], dtype=F64)
    value, gradient = value_and_gradient(bgpo(*arguments, **options), elbo)
    _, free = value_and_gradient(bgpo(*arguments), elbo)
    return float(-value / advantage), float(gradient / free)


@pytest.mark.parametrize(
    ("d", "advantage", "value", "share"),
    [
        (0.1, 1.0, 1.1, 1.0),
        (0.25, 1.0, 1.25, 1.0),  # at the bound: whole
        (0.3, 1.0, 1.25, 0.0),
        (-0.9, 1.0, 0.1, 1.0),  # below 1 - low: PPO's minimum takes the unclipped
        (0.5, -1.0, math.exp(0.5), 1.0),  # above 1 + high: the minimum takes the unclipped
        (math.log(0.85), -1.0, 0.85, 1.0),
        (math.log(0.75), -1.0, 0.8, 0.0),
        (math.log(4.0), -1.0, 4.0, 1.0),
    ],
)
def test_bgpo_clip_is_ppo_s(d, advantage, value, share):
    got_value, got_share = ratio_at(d, advantage, clip=(0.2, 0.25))
    assert got_value == pytest.approx(value)
    assert got_share == pytest.approx(share)


@pytest.mark.parametrize(("d", "value", "share"), [(math.log(2.9), 2.9, 1.0), (math.log(3.1), 3.0, 0.0)])
def test_bgpo_dual_clip_bounds_the_ratio_of_negative_advantages_alone(d, value, share):
    got_value, got_share = ratio_at(d, -1.0, clip=(0.2, 0.25), dual_clip=3.0)
    assert got_value == pytest.approx(value)
    assert got_share == share
    assert ratio_at(5.0, 1.0, dual_clip=3.0) == (6.0, 1.0)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_bgpo_with_epsilon_0_keeps_the_whole_gradient_at_ratio_1(advantage):
    """ESPO's Countdown runs use epsilon = 0: on-policy the gradient is -A, neither 0 nor half."""
    assert ratio_at(0.0, advantage, clip=(0.0, 0.0)) == (1.0, 1.0)


def test_bgpo_lengths_divide_the_difference():
    elbo, old, advantages = scores()
    lengths = torch.tensor([3.0, 1.0, 7.0, 2.0])
    got = value_and_gradient(bgpo(elbo, old, advantages, lengths=lengths), elbo)
    want = value_and_gradient(oracle.bgpo(elbo / lengths[:, None], old / lengths[:, None], advantages), elbo)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


def test_bgpo_detaches_old_scores_and_advantages():
    elbo, old, advantages = scores()
    old.requires_grad_()
    advantages.requires_grad_()
    bgpo(elbo, old, advantages, clip=(0.2, 0.2), dual_clip=3.0).backward()
    assert old.grad is None
    assert advantages.grad is None
    assert elbo.grad is not None


def test_bgpo_is_the_mean_over_sequences_and_samples():
    elbo, old, advantages = scores()
    doubled = bgpo(elbo.repeat(2, 3), old.repeat(2, 3), advantages.repeat(2))
    torch.testing.assert_close(doubled, bgpo(elbo, old, advantages))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sample_elbo_BK": torch.zeros(4)}, ["sample_elbo_BK", "4"]),
        ({"sample_elbo_BK": torch.zeros(0, 5)}, ["sample_elbo_BK", "0"]),
        ({"old_sample_elbo_BK": torch.zeros(5, 4)}, ["old_sample_elbo_BK", "4, 5", "5, 4"]),
        ({"advantages_B": torch.zeros(5)}, ["advantages_B", "4", "5"]),
        ({"clip": (-0.1, 0.2)}, ["clip", "-0.1"]),
        ({"clip": (1.0, 0.2)}, ["clip", "1.0"]),
        ({"clip": (0.2, -0.2)}, ["clip", "-0.2"]),
        ({"dual_clip": 1.0}, ["dual_clip", "1"]),
        ({"lengths": torch.ones(5)}, ["lengths", "4", "5"]),
        ({"lengths": torch.tensor([1.0, 0.0, 2.0, 3.0])}, ["lengths", "0"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_bgpo_error_names_the_argument(changes, words):
    arguments = {
        "sample_elbo_BK": torch.zeros(4, 5),
        "old_sample_elbo_BK": torch.zeros(4, 5),
        "advantages_B": torch.ones(4),
    } | changes
    with pytest.raises(ValueError, match=words[0]) as caught:
        bgpo(**arguments)
    for word in words:
        assert word in str(caught.value)


def test_the_objective_s_contributions_are_the_function_s_sum_whatever_the_cut():
    plan = make_mask_plan(
        torch.arange(20).reshape(4, 5),
        torch.ones(4, 5, dtype=torch.bool),
        law="exact",
        samples=5,
        seed=0,
        sequence_ids=torch.arange(4),
        mask_id=99,
    )
    logp = -torch.rand(len(plan.rows), generator=torch.Generator().manual_seed(0), dtype=F64)
    elbo_BK = plan.elbo(logp)
    old, advantages = elbo_BK + 0.2, torch.tensor([1.0, -1.0, 2.0, -0.5], dtype=F64)
    batch = Batch({"advantages": advantages}, {"old_sample_elbo": old})
    want = 4 * bgpo(elbo_BK, old, advantages)
    torch.testing.assert_close(BGPO.contributions(logp, plan, batch), want)
    parts = 0.0
    for k in range(5):
        for b in range(4):
            cut = {"samples": slice(k, k + 1), "sequences": slice(b, b + 1)}
            here = (plan.rows.sample == k) & (plan.rows.sequence == b)
            parts = parts + BGPO.contributions(logp[here], plan.cut(**cut), batch.cut(**cut))
    torch.testing.assert_close(parts, want)


@pytest.mark.parametrize("far", [0.1, 2.0])
def test_bgpo_as_the_port_runs_it_by_loops_over_the_tokens_of_its_response_mask(far):
    """Each sample's ratio stands at every token of the window, is clipped there, and the mask's tokens are averaged."""
    elbo, old, advantages = scores(spread=far)
    window, ends, low, high, bound = 8, [3, 8, 1, 5], 0.2, 0.28, 1.2
    total = 0.0
    for b, end in enumerate(ends):
        for k in range(5):
            delta, a = (elbo[b, k] - old[b, k]) / window, advantages[b]
            ratio = 1 + delta if a > 0 else delta.exp()
            loss = torch.maximum(-a * ratio, -a * ratio.clamp(1 - low, 1 + high))
            if a < 0:
                loss = torch.minimum(loss, -a * bound)
            total = total + sum(loss for _ in range(end)) / 5
    want = value_and_gradient(total / sum(ends), elbo)
    tokens = torch.tensor(ends)
    port = {"lengths": torch.full([4], window), "clip": (low, high), "dual_clip": bound}
    got = value_and_gradient(bgpo(elbo, old, advantages, **port, tokens=tokens), elbo)
    torch.testing.assert_close(got, want)
    assert float((bgpo(elbo.detach(), old, advantages, **port) - want[0]).abs()) > 1e-3, "the mean over sequences is another"


def test_the_engine_s_bgpo_takes_what_the_port_adds():
    ids, g = torch.arange(20).view(2, 10), torch.Generator().manual_seed(0)
    completion = torch.zeros(2, 10, dtype=torch.bool)
    completion[0, 2:9] = completion[1, 6:] = True
    made = {"law": "exact", "samples": 3, "seed": 0, "sequence_ids": torch.tensor([1, 2]), "mask_id": 99}
    plan = make_mask_plan(ids, completion, **made)
    logp = (-3 * torch.rand(len(plan.rows.index), generator=g, dtype=F64)).requires_grad_()
    old = plan.elbo(logp).detach() + 3 * torch.randn(2, 3, generator=g, dtype=F64)
    advantages, port = torch.tensor([1.0, -2.0], dtype=F64), {"window": 8, "clip_low": 0.2, "clip_high": 0.28, "dual_clip": 1.3}
    objective = RECIPES["bgpo"].make(RECIPES["bgpo"].choose({**port, "aggregate": "tokens"}))
    assert objective.denominator == "tokens"
    got = objective.contributions(logp, plan, Batch({"advantages": advantages}, {"old_sample_elbo": old})) / 11
    options = {"lengths": torch.tensor([8, 8]), "clip": (0.2, 0.28), "dual_clip": 1.3, "tokens": torch.tensor([7, 4])}
    want = bgpo(plan.elbo(logp), old, advantages, **options)
    torch.testing.assert_close(value_and_gradient(got, logp), value_and_gradient(want, logp))
    for options in ({"clip_low": 0.2}, {"dual_clip": 1.0}, {"aggregate": "groups"}, {"window": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            RECIPES["bgpo"].choose(options)


def test_bgpo_declares_what_the_engine_needs():
    assert RECIPES["bgpo"].make() is BGPO
    assert (BGPO.coupling, BGPO.on_policy_coupling, BGPO.denominator) == ("sample", "none", "sequences")
    assert BGPO.is_on_policy(Batch({"advantages": torch.ones(2)}))
    assert not BGPO.is_on_policy(Batch({"advantages": torch.ones(2)}, {"old_sample_elbo": torch.ones(2, 3)}))


# --- advantages -------------------------------------------------------------------------------------------------------


def loop(rewards, groups, kind):
    out = []
    for reward, group in zip(rewards, groups, strict=True):
        members = [r for r, g in zip(rewards, groups, strict=True) if g == group]
        G, mean = len(members), math.fsum(members) / len(members)
        if kind == "mean":
            out.append(reward - mean)
        elif kind == "loo":
            out.append(reward - (math.fsum(members) - reward) / (G - 1) if G > 1 else 0.0)
        elif kind == "std":
            out.append((reward - mean) / (statistics.stdev(members) + 1e-4) if G > 1 else 0.0)
        else:
            std = statistics.pstdev(members)
            out.append((reward - mean) / std if std > 0 else 0.0)
    return out


KINDS = ("mean", "loo", "std", "population_std")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", [[0, 0, 0, 1, 1, 1], [5, -1, 5, 5, 2**40, -1], [1, 2, 3, 4, 5, 6], [7] * 6], ids=str)
def test_advantages_equal_a_plain_loop_over_groups_of_any_size_and_order(kind, groups):
    rewards = torch.tensor([1.0, 0.25, -2.0, 3.5, 0.0, 1.0], dtype=F64)
    got = group_advantages(rewards, torch.tensor(groups), kind)
    torch.testing.assert_close(got, torch.tensor(loop(rewards.tolist(), groups, kind), dtype=F64))


@given(
    pairs=st.lists(st.tuples(st.integers(-3, 3), st.sampled_from([0.0, 0.1, 0.3, 1.0, -7.25])), min_size=1, max_size=12),
    kind=st.sampled_from(KINDS),
)
def test_advantages_of_any_grouping_equal_the_loop(pairs, kind):
    groups, rewards = [p[0] for p in pairs], [p[1] for p in pairs]
    got = group_advantages(torch.tensor(rewards, dtype=F64), torch.tensor(groups), kind)
    want = torch.tensor(loop(rewards, groups, kind), dtype=F64)
    equal = torch.tensor([len({r for r, g in zip(rewards, groups, strict=True) if g == group}) == 1 for group in groups])
    assert (got[equal] == 0).all()
    torch.testing.assert_close(got[~equal], want[~equal], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64], ids=str)
@pytest.mark.parametrize("reward", [0.1, 1 / 3, -1e6, 1e-30])
def test_a_group_of_equal_rewards_gets_exactly_0(kind, dtype, reward):
    """A mean rounded by one ulp over a std of 1e-4 would train on noise."""
    rewards = torch.full((7,), reward, dtype=dtype)
    assert (group_advantages(rewards, torch.zeros(7, dtype=torch.int64), kind) == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_columns_are_treated_one_by_one(kind):
    rewards = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    rewards[:, 1] = 0.7
    groups = torch.tensor([1, 1, 2, 2, 2, 1])
    got = group_advantages(rewards, groups, kind)
    for j in range(3):
        torch.testing.assert_close(got[:, j], group_advantages(rewards[:, j], groups, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_another_group_changes_nothing(kind):
    rewards, groups = torch.tensor([1.0, 0.0, 3.0, 1e6, -1e6]), torch.tensor([0, 0, 0, 1, 1])
    alone = group_advantages(rewards[:3], groups[:3], kind)
    torch.testing.assert_close(group_advantages(rewards, groups, kind)[:3], alone)


def test_advantages_are_detached_and_keep_their_dtype():
    rewards = torch.tensor([1.0, 2.0], requires_grad=True)
    got = group_advantages(rewards, torch.tensor([0, 0]))
    assert not got.requires_grad
    assert got.dtype == torch.float32
    assert group_advantages(rewards.detach().double(), torch.tensor([0, 0])).dtype == F64


@pytest.mark.parametrize(
    ("rewards", "groups", "kind", "error", "words"),
    [
        ([1.0, math.nan], [0, 0], "mean", ValueError, ["rewards", "nan"]),
        ([1.0, math.inf], [0, 0], "mean", ValueError, ["rewards", "inf"]),
        ([1, 2], [0, 0], "mean", TypeError, ["rewards", "int64"]),
        ([1.0, 2.0], [0.0, 0.0], "mean", TypeError, ["group_ids", "float32"]),
        ([1.0, 2.0], [0, 0, 0], "mean", ValueError, ["group_ids", "3", "2"]),
        ([[[1.0]]], [0], "mean", ValueError, ["rewards", "1, 1, 1"]),
        ([1.0, 2.0], [0, 0], "median", ValueError, ["kind", "median", "loo"]),
    ],
)
def test_an_advantage_error_names_the_argument(rewards, groups, kind, error, words):
    with pytest.raises(error) as caught:
        group_advantages(torch.tensor(rewards), torch.tensor(groups), kind)
    for word in words:
        assert word in str(caught.value)
