"""The shared pieces: clipped ratios, KL estimators, sums under a mask, statistics by group, checks, declared entries."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllm_kernels import make_mask_plan
from dllm_kernels.accumulation.objective import Batch, Objective
from dllm_kernels.objectives import surrogates

F64 = torch.float64


def scalar(value):
    return torch.tensor(value, dtype=F64, requires_grad=True)


def ppo(delta, advantage, low, high):
    """Value and derivative of min(rho A, clip(rho) A), by cases."""
    rho = math.exp(delta)
    if (advantage > 0 and rho > 1 + high) or (advantage < 0 and rho < 1 - low):
        return min(rho * advantage, min(max(rho, 1 - low), 1 + high) * advantage), 0.0
    return min(rho * advantage, min(max(rho, 1 - low), 1 + high) * advantage), advantage * rho


@given(
    delta=st.floats(-30, 30), advantage=st.floats(-3, 3), low=st.sampled_from([0.0, 0.2, 0.99]), high=st.sampled_from([0.0, 0.5])
)
def test_the_clipped_ratio_is_ppo_s_in_value_and_gradient(delta, advantage, low, high):
    leaf = scalar(delta)
    term = surrogates.clipped_ratio_term(leaf, torch.tensor(advantage, dtype=F64), low, high)
    (gradient,) = torch.autograd.grad(term, leaf)
    value, derivative = ppo(delta, advantage, low, high)
    assert float(term.detach()) == pytest.approx(value, rel=1e-12, abs=1e-300)
    near = min(abs(math.exp(delta) - 1 - high), abs(math.exp(delta) - 1 + low)) < 1e-12 and delta != 0
    assert near or float(gradient) == pytest.approx(derivative, rel=1e-12, abs=1e-300)


@pytest.mark.parametrize("advantage", [2.0, -2.0])
@pytest.mark.parametrize("epsilon", [0.0, 0.2])
def test_ratio_1_keeps_the_whole_gradient_even_with_epsilon_0(advantage, epsilon):
    leaf = scalar(0.0)
    term = surrogates.clipped_ratio_term(leaf, torch.tensor(advantage), epsilon, epsilon)
    assert float(term.detach()) == advantage
    assert float(torch.autograd.grad(term, leaf)[0]) == advantage


@pytest.mark.parametrize("dtype", surrogates.SCORES, ids=str)
@pytest.mark.parametrize("delta", [-1e5, -1000.0, 1000.0, 1e5, math.inf, -math.inf])
@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
def test_ratios_do_not_overflow(dtype, delta, advantage):
    leaf = torch.tensor([delta, 0.1], dtype=dtype, requires_grad=True)
    term = surrogates.clipped_ratio_term(leaf, torch.tensor(advantage, dtype=dtype), 0.2, 0.2)
    (gradient,) = torch.autograd.grad(term.sum(), leaf)
    assert not torch.isnan(gradient).any()
    if math.isfinite(delta):
        assert torch.isfinite(term).all()
        assert torch.isfinite(gradient).all()
    kl = surrogates.k3(leaf)
    (gradient,) = torch.autograd.grad(kl.sum(), leaf)
    if math.isfinite(delta):
        assert torch.isfinite(kl).all()
        assert torch.isfinite(gradient).all()
        assert (kl >= 0).all()


def test_beyond_the_range_the_ratio_and_k3_continue_along_their_tangents():
    limit = math.log(torch.finfo(torch.float32).max) / 2
    for sign, piece in (
        (1, lambda x: surrogates.clipped_ratio_term(x, torch.tensor(-1.0), 0.2, 0.2)),
        (-1, lambda x: -surrogates.k3(x)),
    ):
        leaf = torch.tensor([sign * limit, sign * (limit + 3)], requires_grad=True)
        value = piece(leaf)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
        assert float((value[1] - value[0]).detach()) == pytest.approx(-3 * math.exp(limit), rel=1e-4)
        assert gradient.tolist() == pytest.approx([-sign * math.exp(limit)] * 2, rel=1e-4)


def test_a_nan_is_not_hidden_by_the_clip():
    for advantage in (1.0, -1.0):
        assert torch.isnan(surrogates.clipped_ratio_term(torch.tensor(math.nan), torch.tensor(advantage), 0.2, 0.2))
    assert torch.isnan(surrogates.k3(torch.tensor(math.nan)))


@given(delta=st.floats(-20, 20))
def test_kl_estimators(delta):
    for estimator, value, derivative in (
        (surrogates.k1, delta, 1.0),
        (surrogates.k2, delta**2 / 2, delta),
        (surrogates.k3, math.expm1(-delta) + delta, -math.expm1(-delta)),
    ):
        leaf = scalar(delta)
        got = estimator(leaf)
        assert float(got.detach()) == pytest.approx(value, rel=1e-12, abs=1e-15)
        assert float(torch.autograd.grad(got, leaf)[0]) == pytest.approx(derivative, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("rubbish", [math.inf, -math.inf, math.nan])
def test_padded_rows_of_rubbish_give_exact_zeros(rubbish):
    logp = torch.tensor([-1.0, rubbish, -2.0], dtype=F64, requires_grad=True)
    old = torch.tensor([-1.5, rubbish, -2.0], dtype=F64, requires_grad=True)
    mask = torch.tensor([True, False, True])
    delta = surrogates.masked_difference(logp, old, mask)
    total = surrogates.masked_sum(surrogates.clipped_ratio_term(delta, torch.tensor(1.0), 0.9, 0.9), mask)
    total.backward()
    assert float(total.detach()) == pytest.approx(math.exp(0.5) + 1)
    assert logp.grad.tolist() == pytest.approx([math.exp(0.5), 0.0, 1.0])
    assert old.grad is None
    assert surrogates.masked_sum(torch.full((2, 3), rubbish), torch.zeros(2, 3, dtype=torch.bool), 1).tolist() == [0.0, 0.0]


groups_of_scores = st.lists(
    st.tuples(st.integers(-2, 2), st.sampled_from([-800.0, -1.0, 0.0, 0.5, 30.0])), min_size=1, max_size=9
)


@given(groups_of_scores)
def test_statistics_by_group_equal_loops(pairs):
    ids, values = torch.tensor([p[0] for p in pairs]), torch.tensor([p[1] for p in pairs], dtype=F64)
    softmax = surrogates.group_softmax(values, ids)
    for i, (group, value) in enumerate(pairs):
        members = [v for g, v in pairs if g == group]
        top = max(members)
        share = math.exp(value - top) / math.fsum(math.exp(v - top) for v in members)
        assert float(softmax[i]) == pytest.approx(share, rel=1e-12, abs=1e-300)
        assert float(surrogates.group_sum(values, ids)[i]) == pytest.approx(math.fsum(members))
        assert float(surrogates.group_mean(values, ids)[i]) == pytest.approx(math.fsum(members) / len(members))
    torch.testing.assert_close(surrogates.group_mean(surrogates.group_sum(softmax, ids), ids), torch.ones_like(softmax))


def plan_of(law="exact", samples=3, shift=0):
    completion = torch.tensor([[False, True, True, True, True], [False, True, True, False, False], [False] * 5])
    ids = torch.arange(15).reshape(3, 5)
    return make_mask_plan(
        ids, completion, law=law, samples=samples, seed=0, sequence_ids=torch.arange(3), mask_id=99, shift=shift, prompt_noise=0.0
    )


@pytest.mark.parametrize("shift", [0, 1])
def test_dense_logp_puts_every_row_at_its_token(shift):
    plan = plan_of(shift=shift)
    logp = -torch.arange(1.0, len(plan.rows) + 1, dtype=F64).requires_grad_()
    dense = surrogates.dense_logp(logp, plan)
    assert torch.equal(dense != 0, plan.scored)
    torch.testing.assert_close(dense[plan.scored], logp)
    torch.testing.assert_close(torch.autograd.grad(dense.sum(), logp)[0], torch.ones_like(logp))
    with pytest.raises(ValueError, match="logp_N"):
        surrogates.dense_logp(logp[1:], plan)


def test_checks_name_the_argument():
    policy = torch.zeros(2, 3)
    for error, words, call in (
        (TypeError, "score.*bfloat16", lambda: surrogates.check_policy("score", policy.bfloat16(), 2)),
        (ValueError, "score", lambda: surrogates.check_policy("score", policy, 1)),
        (ValueError, "score.*0, 3", lambda: surrogates.check_policy("score", policy[:0], 2)),
        (ValueError, "old", lambda: surrogates.check_values("old", policy, [2, 4], policy)),
        (TypeError, "old.*bool", lambda: surrogates.check_values("old", policy > 0, [2, 3], policy)),
        (ValueError, "old.*nan", lambda: surrogates.check_values("old", policy * math.nan, [2, 3], policy)),
        (ValueError, "old.*device", lambda: surrogates.check_values("old", policy.to("meta"), [2, 3], policy)),
        (TypeError, "mask.*float32", lambda: surrogates.check_mask("mask", policy, [2, 3], policy)),
        (TypeError, "group_ids_B", lambda: surrogates.check_group_ids(policy[:, 0], [2], policy)),
        (ValueError, "group_ids_B", lambda: surrogates.check_group_ids(torch.zeros(3, dtype=torch.int64), [2], policy)),
        (ValueError, "epsilon.*1.5", lambda: surrogates.check_clip(1.5, 0.2)),
        (ValueError, "epsilon.*-0.1", lambda: surrogates.check_clip(-0.1, 0.2)),
        (ValueError, "epsilon_high.*nan", lambda: surrogates.check_clip(0.1, math.nan, ("epsilon_low", "epsilon_high"))),
        (ValueError, "lengths.*-1", lambda: surrogates.divisors("lengths", torch.tensor([-1, 2]), [2], policy)),
    ):
        with pytest.raises(error, match=words):
            call()
    surrogates.check_values("old", policy * math.nan, [2, 3], policy, where=torch.zeros(2, 3, dtype=torch.bool))
    assert surrogates.divisors("lengths", torch.tensor([0, 7]), [2], policy).tolist() == [1.0, 7.0]


# --- entries that an objective declares ----------------------------------------------------------------------------------


def test_declared_entries_are_required_and_their_sizes_checked():
    plan = plan_of()
    (B, S), K = plan.input_ids_BS.shape, 3
    objective = Objective("o", lambda *_: torch.zeros(()), "token", "token", "tokens", "old", (), ("scores",), ("old", "ref"))
    good = {"scores": torch.zeros(B, K), "ref": torch.zeros(B, K, S)}
    objective.check(Batch({}, good), plan)
    assert objective.is_on_policy(Batch({}, good))
    objective.check(Batch({}, {**good, "old": torch.zeros(B, K, S)}), plan)
    for change, words in (
        ({"scores": torch.zeros(B, K, S)}, "scores must have 2 dimension"),
        ({"ref": torch.zeros(B, K)}, "ref must have 3 dimension"),
        ({"ref": torch.zeros(B, K, S + 1)}, "ref must have shape"),
        ({"rest": torch.zeros(B, K)}, "per_sample holds 'rest'"),
    ):
        with pytest.raises(ValueError, match=words):
            objective.check(Batch({}, {**good, **change}), plan)
    with pytest.raises(ValueError, match="per_sample must hold 'ref' for o"):
        objective.check(Batch({}, {"scores": torch.zeros(B, K)}), plan)
    cut = {"samples": slice(1, 2), "sequences": slice(0, 2)}
    objective.check(Batch({}, good).cut(**cut), plan.cut(**cut))
