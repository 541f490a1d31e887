"""ESPO: against loops over sequences, finite differences, epsilon 0, the edges, and the engine's cuts."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllm_kernels.accumulation.objective import Batch
from dllm_kernels.objectives.espo import RECIPE, espo, espo_objective
from tests.objectives import loops
from tests.objectives.plans_and_batches import plan_of, scores

F64 = torch.float64


def by_loops(elbo, old, ref, advantages, lengths, low, high, beta):
    total, gradient = 0.0, []
    for b in range(len(elbo)):
        length = max(lengths[b], 1)
        value, slope = loops.surrogate((elbo[b] - old[b]) / length, advantages[b], low, high)
        total += -value + beta * (elbo[b] - ref[b]) ** 2 / 2 / length
        gradient.append((-slope / length + beta * (elbo[b] - ref[b]) / length) / len(elbo))
    return total / len(elbo), gradient


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.0), (0.2, 0.2), (0.05, 0.4), (1.0, 3.0)])
@pytest.mark.parametrize("beta", [0.0, 0.01, 2.0])
def test_equals_loops_over_the_formula(low, high, beta):
    elbo, old, ref, advantages, lengths = scores()
    loss = espo(elbo, old, ref, advantages, lengths, epsilon_low=low, epsilon_high=high, beta=beta)
    lists = [tensor.tolist() for tensor in (elbo, old, ref, advantages, lengths)]
    loops.check(loss, elbo, *by_loops(*lists, low, high, beta))


def test_published_defaults():
    elbo, old, ref, advantages, lengths = scores()
    loss = espo(elbo, old, ref, advantages, lengths)
    assert loss == espo(elbo, old, ref, advantages, lengths, epsilon_low=0.2, epsilon_high=0.2, beta=0.01)


sequence = st.tuples(st.floats(-9, 0), st.floats(-5, 5), st.floats(-2, 2), st.floats(-3, 3), st.integers(0, 9))


@given(st.lists(sequence, min_size=1, max_size=6))
def test_equals_loops_for_any_batch(rows):
    old, moved, off, advantages, lengths = (list(column) for column in zip(*rows, strict=True))
    elbo = torch.tensor(old, dtype=F64) + torch.tensor(moved, dtype=F64)
    ref = torch.tensor(old, dtype=F64) + torch.tensor(off, dtype=F64)
    leaf = elbo.requires_grad_()
    arguments = torch.tensor(old, dtype=F64), ref, torch.tensor(advantages, dtype=F64), torch.tensor(lengths)
    loss = espo(leaf, *arguments, epsilon_low=0.13, epsilon_high=0.37)
    want = by_loops(elbo.tolist(), old, ref.tolist(), advantages, lengths, 0.13, 0.37, 0.01)
    loops.check(loss, leaf, *want, tolerance=1e-10)


def test_finite_differences():
    elbo, old, ref, advantages, lengths = scores()
    leaf = (elbo + 0.003).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda e: espo(e, old, ref, advantages, lengths, beta=0.3), leaf)


@pytest.mark.parametrize("epsilon", [0.0, 4e-4, 0.2])
def test_on_policy_the_gradient_is_the_advantage_s_even_with_epsilon_0(epsilon):
    elbo, _, _, advantages, lengths = scores()
    loss = espo(elbo, elbo.detach(), elbo.detach(), advantages, lengths, epsilon_low=epsilon, epsilon_high=epsilon)
    (gradient,) = torch.autograd.grad(loss, elbo)
    torch.testing.assert_close(gradient, -advantages / lengths.clamp(min=1) / 6, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_a_policy_far_off_does_not_overflow(dtype):
    elbo = torch.tensor([1e4, 1e4, -1e4, -1e4], dtype=dtype, requires_grad=True)
    zeros, advantages = torch.zeros(4, dtype=dtype), torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=dtype)
    loss = espo(elbo, zeros, zeros, advantages, torch.ones(4))
    assert torch.isfinite(loss)
    assert torch.isfinite(torch.autograd.grad(loss, elbo)[0]).all()


def test_everything_but_the_policy_is_detached():
    elbo, *others = scores()
    others = [tensor.double().requires_grad_() for tensor in others]
    espo(elbo, *others).backward()
    assert all(tensor.grad is None for tensor in others)
    assert elbo.grad is not None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"elbo_B": torch.zeros(2, 3)}, ["elbo_B", "2, 3"]),
        ({"old_elbo_B": torch.zeros(3)}, ["old_elbo_B", "3"]),
        ({"ref_elbo_B": torch.tensor([0.0, math.inf])}, ["ref_elbo_B", "inf"]),
        ({"advantages_B": torch.zeros(1)}, ["advantages_B"]),
        ({"lengths_B": torch.zeros(1)}, ["lengths_B"]),
        ({"epsilon_low": -0.1}, ["epsilon_low", "-0.1"]),
        ({"epsilon_high": -0.1}, ["epsilon_high", "-0.1"]),
        ({"beta": math.nan}, ["beta", "nan"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_an_error_names_the_argument(changes, words):
    names = ("elbo_B", "old_elbo_B", "ref_elbo_B", "advantages_B")
    arguments = {name: torch.zeros(2) for name in names} | {"lengths_B": torch.tensor([3, 4])}
    loops.refuses(espo, arguments, changes, words)


# --- the engine's form ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.2])
@pytest.mark.parametrize("policy", ["on", "off"])
def test_contributions_of_any_cut_sum_to_the_function(beta, policy):
    plan = plan_of("antithetic", 4, shift=1)
    logp = loops.row_logps(plan)
    elbo = plan.score(logp)
    _, noise, ref, advantages, _ = scores()
    old = elbo.detach() + 0.2 * noise if policy == "off" else elbo.detach()
    objective = espo_objective(epsilon_low=0.1, epsilon_high=0.3, beta=beta)
    entries = {"advantages": advantages} | ({"old_elbo": old} if policy == "off" else {}) | ({"ref_elbo": ref} if beta else {})
    objective.check(Batch(entries), plan)
    want = espo(elbo, old, ref, advantages, plan.lengths_B, epsilon_low=0.1, epsilon_high=0.3, beta=beta)
    for sequences in (1, 4):
        loops.same(loops.summed_over_cuts(objective, logp, plan, Batch(entries), sequences=sequences) / 6, want, logp)


def test_couplings():
    plan, advantages = plan_of("antithetic", 4), scores()[3]
    objective = espo_objective(beta=0.0)
    assert (objective.coupling, objective.on_policy_coupling, objective.denominator) == ("sequence", "none", "sequences")
    assert espo_objective().on_policy_coupling == "sequence"
    batch, gradients = Batch({"advantages": advantages}), []
    for seed in (0, 1):
        logp = loops.row_logps(plan, seed)
        total = loops.summed_over_cuts(objective, logp, plan, batch, samples=1)
        gradients.append(torch.autograd.grad(total, logp)[0])
        gradients.append(torch.autograd.grad(objective.contributions(logp, plan, batch), logp)[0])
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-13, atol=1e-15)


def test_recipe():
    assert espo_objective(**RECIPE.defaults).name == RECIPE.name
    assert plan_of(RECIPE.law, RECIPE.samples, **RECIPE.law_options).shape[0] == 4
    with pytest.raises(ValueError, match="epsilon_low"):
        espo_objective(epsilon_low=-1.0)
