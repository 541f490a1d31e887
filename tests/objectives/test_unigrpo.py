"""UniGRPO (unverified) against loops over samples: value, gradient, edges, cuts, errors."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllm_kernels.accumulation.objective import Batch
from dllm_kernels.objectives.unigrpo import RECIPE, unigrpo, unigrpo_objective
from tests.objectives import loops
from tests.objectives.loops import F64
from tests.plans import plan_of

ADVANTAGES = torch.tensor([1.0, -0.5, 0.0, -2.0], dtype=F64)


def by_loops(scores, old, ref, advantages, epsilon=0.2, beta=0.01):
    B, K = scores.shape
    scores = scores.detach()
    total, gradient = 0.0, [[0.0] * K for _ in range(B)]
    for b in range(B):
        for k in range(K):
            at = b, k
            term = loops.token_term(
                float(scores[at]), float(old[at]), float(ref[at]), float(advantages[b]), epsilon, epsilon, beta
            )
            total += term[0] / (B * K)
            gradient[b][k] = term[1] / (B * K)
    return total, gradient


@given(
    B=st.integers(1, 4),
    K=st.integers(1, 4),
    seed=st.integers(0, 99),
    epsilon=st.floats(0, 0.9),
    beta=st.floats(0, 2),
)
def test_loss_and_gradient_equal_loops_over_samples(B, K, seed, epsilon, beta):
    scores, old, ref = loops.logps(B, K, seed=seed)
    advantages = torch.randn(B, generator=torch.Generator().manual_seed(seed), dtype=F64)
    loss = unigrpo(scores, old, ref, advantages, epsilon=epsilon, beta=beta)
    loops.check(loss, scores, *by_loops(scores, old, ref, advantages, epsilon, beta))


def test_the_defaults():
    scores, old, ref = loops.logps(4, 3)
    loops.check(unigrpo(scores, old, ref, ADVANTAGES), scores, *by_loops(scores, old, ref, ADVANTAGES))


def test_on_policy_the_gradient_is_minus_the_advantage_even_with_epsilon_0():
    scores = torch.tensor([[-1.0, -2.0]] * 4, dtype=F64, requires_grad=True)
    loss = unigrpo(scores, scores, scores, ADVANTAGES, epsilon=0.0, beta=3.0)
    loops.check(loss, scores, -float(ADVANTAGES.mean()), (-ADVANTAGES[:, None] / 8).expand(4, 2))


def test_finite_differences_agree():
    scores, old, ref = loops.logps(4, 3, seed=1)
    with torch.no_grad():
        scores.add_(0.013)
    assert torch.autograd.gradcheck(lambda x: unigrpo(x, old, ref, ADVANTAGES, beta=0.3), scores)


def test_a_policy_far_off_stays_finite():
    scores = torch.tensor([[1e4], [1e4], [-1e4], [-1e4]], requires_grad=True)
    zero = torch.zeros(4, 1)
    loss = unigrpo(scores, zero, zero, torch.tensor([1.0, -1.0, 1.0, -1.0]))
    (gradient,) = torch.autograd.grad(loss, scores)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()


def test_everything_but_the_policy_is_detached():
    scores, old, ref = loops.logps(4, 3)
    others = [tensor.clone().requires_grad_() for tensor in (old, ref, ADVANTAGES)]
    unigrpo(scores, *others).backward()
    assert scores.grad is not None
    assert all(tensor.grad is None for tensor in others)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mean_logp_BK": torch.zeros(4)}, ["mean_logp_BK", "4"]),
        ({"mean_logp_BK": torch.zeros(0, 3)}, ["mean_logp_BK", "0, 3"]),
        ({"old_mean_logp_BK": torch.zeros(4, 2)}, ["old_mean_logp_BK", "4, 2"]),
        ({"ref_mean_logp_BK": torch.zeros(4, 2)}, ["ref_mean_logp_BK", "4, 2"]),
        ({"ref_mean_logp_BK": None}, ["ref_mean_logp_BK", "beta", "0.01"]),
        ({"advantages_B": torch.zeros(3)}, ["advantages_B", "3"]),
        ({"epsilon": -0.1}, ["epsilon", "-0.1"]),
        ({"beta": -0.1}, ["beta", "-0.1"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_an_error_names_the_argument(changes, words):
    arguments = {name: torch.zeros(4, 3) for name in ("mean_logp_BK", "old_mean_logp_BK", "ref_mean_logp_BK")}
    loops.refuses(unigrpo, arguments | {"advantages_B": torch.ones(4)}, changes, words)


# --- in the engine ----------------------------------------------------------------------------------------------------

LENGTHS = [5, 0, 3, 4]


def means_by_loops(plan, logp_N):
    """Mean log-prob of the masked tokens of each sample, `[B, K]`, differentiable."""
    K, B, _ = plan.shape
    rows = [[[] for _ in range(K)] for _ in range(B)]
    for n, (b, k) in enumerate(zip(plan.rows.sequence.tolist(), plan.rows.sample.tolist(), strict=True)):
        rows[b][k].append(logp_N[n])
    zero = torch.zeros((), dtype=F64)
    return torch.stack([torch.stack([sum(r, zero) / max(1, len(r)) for r in line]) for line in rows])


@pytest.mark.parametrize("law", [{"law": "bernoulli", "weight": "L/count"}, {"law": "exact"}, {"law": "exact_zero"}], ids=str)
@pytest.mark.parametrize("cut", [(1, 1), (None, 3), (2, 2)], ids=str)
def test_contributions_of_any_cut_sum_to_the_loss(law, cut):
    plan = plan_of(LENGTHS, samples=4, **law)
    logp_N = loops.row_logps(plan)
    g = torch.Generator().manual_seed(5)
    elbo_BK = plan.elbo(logp_N).detach()
    old, ref = (elbo_BK + 0.4 * torch.randn(4, 4, generator=g, dtype=F64) for _ in range(2))
    batch = Batch({"advantages": ADVANTAGES}, {"old_sample_elbo": old, "ref_sample_elbo": ref})
    objective = unigrpo_objective(beta=0.3)
    objective.check(batch, plan)
    total = loops.summed_over_cuts(objective, logp_N, plan, batch, samples=cut[0], sequences=cut[1])
    means = means_by_loops(plan, logp_N)
    times = (plan.weight_KB * plan.counts).t().double()
    old_means, ref_means = (torch.where(times > 0, s / times.clamp(min=1e-9), 0.0) for s in (old, ref))
    # the plan keeps its weights in fp32
    loops.same(total / 4, unigrpo(means, old_means, ref_means, ADVANTAGES, beta=0.3), logp_N, 1e-6)


def test_on_policy_old_is_the_policy_itself():
    plan = plan_of(LENGTHS, law="bernoulli", samples=3, weight="L/count")
    logp_N = loops.row_logps(plan)
    objective = unigrpo_objective(beta=0.0)
    batch = Batch({"advantages": ADVANTAGES})
    given_old = Batch(batch.per_sequence, {"old_sample_elbo": plan.elbo(logp_N).detach()})
    loops.same(objective.contributions(logp_N, plan, batch), objective.contributions(logp_N, plan, given_old), logp_N)
    assert (objective.on_policy_coupling, unigrpo_objective().on_policy_coupling) == ("none", "sample")


def test_what_it_declares_and_that_it_is_unverified():
    objective = unigrpo_objective()
    assert (objective.name, objective.coupling, objective.denominator) == ("unigrpo", "sample", "sequences")
    assert (RECIPE.name, RECIPE.arxiv, RECIPE.law, RECIPE.status) == ("unigrpo", "2505.15809", "bernoulli", "unverified")
    assert (RECIPE.needs_old, RECIPE.needs_reference, RECIPE.needs_trajectory) == (True, True, False)
    assert unigrpo_objective(**RECIPE.defaults).name == "unigrpo"
    assert "nverified" in unigrpo.__doc__


def test_a_nan_is_not_hidden():
    scores = torch.tensor([[math.nan]])
    assert torch.isnan(unigrpo(scores, torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1)))
