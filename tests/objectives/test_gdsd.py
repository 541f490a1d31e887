"""GDSD: against loops over pairs of masks, finite differences, its clamp, and the engine's plans of pairs."""

import math

import pytest
import torch

from dllm_kernels.accumulation.objective import Batch
from dllm_kernels.objectives.gdsd import RECIPE, gdsd, gdsd_objective
from tests.objectives import loops
from tests.objectives.plans_and_batches import F64, plan_of

ADVANTAGES, LENGTHS = [1.0, -0.5, 0.0], [4, 7, 0]


def scores(spread):
    g = torch.Generator().manual_seed(0)
    old = -9 * torch.rand(3, 2, generator=g, dtype=F64)
    return [(old + spread * torch.randn(3, 2, generator=g, dtype=F64)).requires_grad_(), old, old + 0.3]


def by_loops(score, old, ref, low, high, psi, beta):
    total, gradient = 0.0, [[0.0, 0.0] for _ in range(3)]
    for b, (advantage, length) in enumerate(zip(ADVANTAGES, LENGTHS, strict=True)):
        L = max(1, length)
        for m in range(2):
            delta = float(score[b, m] - old[b, m])
            held = min(max(delta, math.log(1 - low)), math.log(1 + high))
            rest, distance = held / L - psi * advantage, float(score[b, m] - ref[b, m])
            total += (rest**2 + beta * distance**2 / 2 / L / 2) / 3
            gradient[b][m] = ((2 * rest / L if held == delta else 0.0) + beta * distance / L / 2) / 3
    return total, gradient


@pytest.mark.parametrize("spread", [0.01, 3.0])
@pytest.mark.parametrize(("psi", "beta"), [(1.0, 0.0), (0.3, 0.2)])
def test_equals_loops_over_the_formula(spread, psi, beta):
    score, old, ref = scores(spread)
    advantages, lengths = torch.tensor(ADVANTAGES, dtype=F64), torch.tensor(LENGTHS)
    loss = gdsd(score, old, ref, advantages, lengths, psi=psi, epsilon_low=0.2, epsilon_high=0.4, beta=beta)
    loops.check(loss, score, *by_loops(score.detach(), old, ref, 0.2, 0.4, psi, beta))


def test_finite_differences_agree():
    score, old, ref = scores(0.1)
    arguments = torch.tensor(ADVANTAGES, dtype=F64), torch.tensor(LENGTHS)
    assert torch.autograd.gradcheck(lambda x: gdsd(x, old, ref, *arguments, epsilon_low=0.9, epsilon_high=9.0, beta=0.1), score)


def test_where_the_ratio_per_token_is_the_advantage_nothing_is_learnt():
    old = torch.full((1, 1), -8.0, dtype=F64)
    score = (old + 0.02 * 4).requires_grad_()
    loss = gdsd(score, old, None, torch.tensor([0.02], dtype=F64), torch.tensor([4]), epsilon_high=0.2, beta=0.0)
    loops.check(loss, score, 0.0, [[0.0]])


@pytest.mark.parametrize(
    ("options", "words"),
    [({"epsilon_low": 1.0}, "epsilon_low"), ({"epsilon_high": -0.1}, "epsilon_high"), ({"beta": -1.0}, "beta")],
)
def test_what_is_out_of_bounds_is_named(options, words):
    score, old, ref = scores(0.1)
    with pytest.raises(ValueError, match=words):
        gdsd(score, old, ref, torch.tensor(ADVANTAGES, dtype=F64), torch.tensor(LENGTHS), **options)
    with pytest.raises(ValueError, match=words):
        gdsd_objective(**options)


def test_without_a_reference_a_kl_is_refused():
    score, old, _ = scores(0.1)
    with pytest.raises(ValueError, match="ref_score_BM must be given"):
        gdsd(score, old, None, torch.tensor(ADVANTAGES, dtype=F64), torch.tensor(LENGTHS))


def test_the_engine_s_scores_take_each_token_once_in_a_pair_at_half_its_log_prob():
    plan = plan_of("antithetic", 4)
    policy, old_N, ref_N = loops.logps(len(plan.rows.index))
    advantages = torch.linspace(-1, 1, 6, dtype=F64)

    def dense(logp_N):
        return logp_N.new_zeros(plan.shape).masked_scatter(plan.scored, logp_N)

    def pairs(logp_N):
        score = torch.zeros(6, 2, dtype=F64)
        for value, b, k in zip(logp_N, plan.rows.sequence, plan.rows.sample, strict=True):
            score = score.index_put((b, k // 2), value / 2, accumulate=True)
        return score

    entries = {"old_logp": dense(old_N).transpose(0, 1), "ref_logp": dense(ref_N).transpose(0, 1)}
    options = {"epsilon_low": 0.5, "epsilon_high": 2.0, "beta": 0.3}
    loss = gdsd_objective(**options).contributions(policy, plan, Batch({"advantages": advantages}, entries)) / 6
    want = gdsd(pairs(policy), pairs(old_N), pairs(ref_N), advantages, plan.lengths_B, **options)
    (gradient,) = torch.autograd.grad(want, policy)
    loops.check(loss, policy, want.item(), gradient)


def test_plans_without_pairs_and_half_a_pair_are_refused():
    objective, batch = gdsd_objective(beta=0.0), Batch({"advantages": torch.zeros(6, dtype=F64)})
    for plan in (plan_of("exact", 4), plan_of("antithetic", 4).cut(samples=slice(0, 1))):
        with pytest.raises(ValueError, match="plan must hold all samples of a law of pairs"):
            objective.contributions(torch.zeros(len(plan.rows.index), dtype=F64), plan, batch)


def test_recipe():
    assert (RECIPE.name, RECIPE.arxiv, RECIPE.law, RECIPE.samples) == ("gdsd", "2605.29398", "antithetic", 2)
    assert RECIPE.make().scale is None, "without an advantage the ratio is still drawn to 1"
