"""GDPO: against loops over sequences, finite differences, both modes, the edges, and the engine's cuts."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllm_kernels.accumulation.objective import Batch
from dllm_kernels.objectives.gdpo import RECIPE, gdpo, gdpo_objective
from tests.objectives import loops
from tests.objectives.plans_and_batches import plan_of, scores

F64 = torch.float64


def by_loops(elbo, old, ref, advantages, lengths, epsilon, beta, mode):
    total, gradient = 0.0, []
    for b in range(len(elbo)):
        length = max(lengths[b], 1)
        inner, outer = (length, 1) if mode == "code" else (1, length)
        value, slope = loops.surrogate((elbo[b] - old[b]) / inner, advantages[b], epsilon, epsilon)
        kl, kl_slope = loops.k3(elbo[b] - ref[b])
        total += -value / outer + beta * kl
        gradient.append((-slope / inner / outer + beta * kl_slope) / len(elbo))
    return total / len(elbo), gradient


@pytest.mark.parametrize("mode", ["paper", "code"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.5, 1.0])
def test_equals_loops_over_the_formula(mode, beta, epsilon):
    elbo, old, ref, advantages, lengths = scores()
    loss = gdpo(elbo, old, advantages, lengths, epsilon=epsilon, ref_elbo=ref, beta=beta, mode=mode)
    lists = [tensor.tolist() for tensor in (elbo, old, ref, advantages, lengths)]
    loops.check(loss, elbo, *by_loops(*lists, epsilon, beta, mode))


sequence = st.tuples(st.floats(-9, 0), st.floats(-2, 2), st.floats(-2, 2), st.floats(-3, 3), st.integers(0, 9))


@given(st.lists(sequence, min_size=1, max_size=6), st.sampled_from(["paper", "code"]), st.sampled_from([0.0, 0.2]))
def test_equals_loops_for_any_batch(rows, mode, beta):
    old, moved, off, advantages, lengths = (list(column) for column in zip(*rows, strict=True))
    elbo = torch.tensor(old, dtype=F64) + torch.tensor(moved, dtype=F64)
    ref = torch.tensor(old, dtype=F64) + torch.tensor(off, dtype=F64)
    arguments = torch.tensor(old, dtype=F64), torch.tensor(advantages, dtype=F64), torch.tensor(lengths)
    leaf = elbo.requires_grad_()
    loss = gdpo(leaf, *arguments, epsilon=0.37, ref_elbo=ref, beta=beta, mode=mode)
    want = by_loops(elbo.tolist(), old, ref.tolist(), advantages, lengths, 0.37, beta, mode)
    loops.check(loss, leaf, *want, tolerance=1e-10)


@pytest.mark.parametrize("mode", ["paper", "code"])
def test_finite_differences(mode):
    elbo, old, ref, advantages, lengths = scores()
    leaf = (elbo + 0.003).detach().requires_grad_()  # off the kinks
    assert torch.autograd.gradcheck(
        lambda e: gdpo(e, old, advantages, lengths, epsilon=0.2, ref_elbo=ref, beta=0.1, mode=mode), leaf
    )


@pytest.mark.parametrize("mode", ["paper", "code"])
@pytest.mark.parametrize("epsilon", [0.0, 0.5])
def test_on_policy_the_gradient_is_the_advantage_s_even_with_epsilon_0(mode, epsilon):
    elbo, _, _, advantages, lengths = scores()
    loss = gdpo(elbo, elbo.detach(), advantages, lengths, epsilon=epsilon, mode=mode)
    (gradient,) = torch.autograd.grad(loss, elbo)
    torch.testing.assert_close(gradient, -advantages / lengths.clamp(min=1) / 6, rtol=1e-14, atol=0)


def test_the_modes_differ_off_policy_alone():
    elbo, old, _, advantages, lengths = scores(0.3)
    paper = torch.autograd.grad(gdpo(elbo, old, advantages, lengths, mode="paper"), elbo)[0]
    code = torch.autograd.grad(gdpo(elbo, old, advantages, lengths, mode="code"), elbo)[0]
    differ = (paper - code).abs() > 1e-9
    assert differ.tolist() == [True, False, True, False, False, True]


@pytest.mark.parametrize("mode", ["paper", "code"])
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_a_policy_far_off_does_not_overflow(mode, dtype):
    elbo = torch.tensor([1000.0, 1000.0, -1000.0, -1000.0], dtype=dtype, requires_grad=True)
    zeros, lengths = torch.zeros(4, dtype=dtype), torch.ones(4)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=dtype)
    loss = gdpo(elbo, zeros, advantages, lengths, ref_elbo=zeros, beta=0.1, mode=mode)
    (gradient,) = torch.autograd.grad(loss, elbo)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()
    free = torch.autograd.grad(gdpo(elbo, zeros, advantages, lengths, mode=mode), elbo)[0]
    assert free[0] == 0
    assert free[1] > 1e15
    assert free[3] == 0


def test_equal_rewards_and_completions_without_tokens():
    elbo, old, _, advantages, lengths = scores()
    loss = gdpo(elbo, old, 0 * advantages, 0 * lengths)
    assert loss == 0
    assert (torch.autograd.grad(loss, elbo)[0] == 0).all()


def test_everything_but_the_policy_is_detached():
    elbo, old, ref, advantages, lengths = scores()
    others = [old.requires_grad_(), advantages.requires_grad_(), ref.requires_grad_(), lengths.double().requires_grad_()]
    gdpo(elbo, others[0], others[1], others[3], ref_elbo=others[2], beta=0.1).backward()
    assert all(tensor.grad is None for tensor in others)
    assert elbo.grad is not None


def test_a_reference_without_beta_changes_nothing():
    elbo, old, ref, advantages, lengths = scores()
    assert gdpo(elbo, old, advantages, lengths, ref_elbo=ref) == gdpo(elbo, old, advantages, lengths)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"elbo_B": torch.zeros(2, 3)}, ["elbo_B", "2, 3"]),
        ({"elbo_B": torch.zeros(0)}, ["elbo_B", "0"]),
        ({"elbo_B": torch.zeros(2, dtype=torch.bfloat16)}, ["elbo_B", "bfloat16"]),
        ({"old_elbo_B": torch.zeros(3)}, ["old_elbo_B", "2", "3"]),
        ({"old_elbo_B": torch.tensor([0.0, math.nan])}, ["old_elbo_B", "nan"]),
        ({"advantages_B": torch.zeros(1)}, ["advantages_B"]),
        ({"lengths_B": torch.tensor([1, -2])}, ["lengths_B", "-2"]),
        ({"epsilon": 1.5}, ["epsilon", "1.5"]),
        ({"beta": -1.0}, ["beta", "-1"]),
        ({"beta": 0.1}, ["ref_elbo", "None", "0.1"]),
        ({"beta": 0.1, "ref_elbo": torch.zeros(3)}, ["ref_elbo", "3"]),
        ({"mode": "codes"}, ["mode", "codes", "paper"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_an_error_names_the_argument(changes, words):
    arguments = {name: torch.zeros(2) for name in ("elbo_B", "old_elbo_B", "advantages_B")} | {"lengths_B": torch.tensor([3, 4])}
    loops.refuses(gdpo, arguments, changes, words)


# --- the engine's form ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["paper", "code"])
@pytest.mark.parametrize("beta", [0.0, 0.2])
@pytest.mark.parametrize("policy", ["on", "off"])
def test_contributions_of_any_cut_sum_to_the_function(mode, beta, policy):
    plan = plan_of("quadrature", 6, nodes=3)
    logp = loops.row_logps(plan)
    elbo = plan.score(logp)
    _, noise, ref, advantages, _ = scores(0.3)
    old = elbo.detach() + 0.1 * noise if policy == "off" else elbo.detach()
    objective = gdpo_objective(epsilon=0.3, beta=beta, mode=mode)
    entries = {"advantages": advantages} | ({"old_elbo": old} if policy == "off" else {}) | ({"ref_elbo": ref} if beta else {})
    batch = Batch(entries)
    objective.check(batch, plan)
    want = gdpo(elbo, old, advantages, plan.lengths_B, epsilon=0.3, ref_elbo=ref, beta=beta, mode=mode)
    for sequences in (1, 4):
        loops.same(loops.summed_over_cuts(objective, logp, plan, batch, sequences=sequences) / 6, want, logp)


def test_without_a_kl_the_coefficients_come_from_data_on_policy_and_not_with_one():
    """What `none` promises: the gradient is the same wherever the policy stands, and additive over samples."""
    plan, advantages = plan_of("quadrature", 6, nodes=3), scores()[3]
    objective = gdpo_objective()
    assert (objective.coupling, objective.on_policy_coupling, objective.denominator) == ("sequence", "none", "sequences")
    assert gdpo_objective(beta=0.1).on_policy_coupling == "sequence"
    gradients = []
    for seed in (0, 1):
        logp = loops.row_logps(plan, seed)
        whole = torch.autograd.grad(objective.contributions(logp, plan, Batch({"advantages": advantages})), logp)[0]
        cut = loops.summed_over_cuts(objective, logp, plan, Batch({"advantages": advantages}), samples=1)
        gradients += [whole, torch.autograd.grad(cut, logp)[0]]
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-13, atol=1e-15)


def test_recipe():
    assert gdpo_objective(**RECIPE.defaults).name == RECIPE.name
    assert plan_of(RECIPE.law, RECIPE.samples, **RECIPE.law_options).shape[0] == 3
    with pytest.raises(ValueError, match="epsilon"):
        gdpo_objective(epsilon=-1.0)
