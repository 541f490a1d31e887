"""RSPO: against loops, against the regression it is, the edges, and the engine's form."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllm_kernels.accumulation.objective import Batch
from dllm_kernels.objectives.rspo import RECIPE, rspo, rspo_objective
from tests.objectives import loops
from tests.objectives.plans_and_batches import plan_of, scores

F64 = torch.float64


def by_loops(elbo, ref, advantages, lengths, lam):
    delta = [(e - r) / max(n, 1) for e, r, n in zip(elbo, ref, lengths, strict=True)]
    centre = math.fsum(delta) / len(delta)
    residual = [a - lam * (d - centre) for a, d in zip(advantages, delta, strict=True)]
    loss = -math.fsum(w * (d - centre) for w, d in zip(residual, delta, strict=True)) / len(delta)
    return loss, [-w / max(n, 1) / len(delta) for w, n in zip(residual, lengths, strict=True)]


@pytest.mark.parametrize("lam", [0.0, 0.01, 3.0])
def test_equals_loops_over_the_formula(lam):
    elbo, _, ref, advantages, lengths = scores()
    lists = [tensor.tolist() for tensor in (elbo, ref, advantages, lengths)]
    loops.check(rspo(elbo, ref, advantages, lengths, lam=lam), elbo, *by_loops(*lists, lam))


sequence = st.tuples(st.floats(-9, 0), st.floats(-5, 5), st.floats(-3, 3), st.integers(0, 9))


@given(st.lists(sequence, min_size=1, max_size=7), st.floats(0, 2))
def test_equals_loops_for_any_batch(rows, lam):
    ref, moved, advantages, lengths = (list(column) for column in zip(*rows, strict=True))
    elbo = torch.tensor(ref, dtype=F64) + torch.tensor(moved, dtype=F64)
    leaf = elbo.requires_grad_()
    loss = rspo(leaf, torch.tensor(ref, dtype=F64), torch.tensor(advantages, dtype=F64), torch.tensor(lengths), lam=lam)
    loops.check(loss, leaf, *by_loops(elbo.tolist(), ref, advantages, lengths, lam), tolerance=1e-10)


@pytest.mark.parametrize("lam", [0.01, 0.7])
def test_the_gradient_is_lambda_times_that_of_the_regression_onto_a_over_lambda(lam):
    elbo, _, ref, advantages, lengths = scores()
    (got,) = torch.autograd.grad(rspo(elbo, ref, advantages, lengths, lam=lam), elbo)
    delta = (elbo - ref) / lengths.clamp(min=1)
    regression = ((delta - delta.mean().detach() - advantages / lam) ** 2).mean() / 2
    (want,) = torch.autograd.grad(regression, elbo)
    torch.testing.assert_close(got, lam * want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("lam", [0.01, 0.7])
def test_finite_differences_of_the_regression(lam):
    """The loss itself holds residuals still; differences of the regression with its centre held still see its gradient."""
    elbo, _, ref, advantages, lengths = scores()
    (got,) = torch.autograd.grad(rspo(elbo, ref, advantages, lengths, lam=lam), elbo)
    length = [max(n, 1) for n in lengths.tolist()]
    centre = float(((elbo.detach() - ref) / torch.tensor(length)).mean())

    def regression(values):
        terms = zip(values, ref.tolist(), length, advantages.tolist(), strict=True)
        return math.fsum(((e - r) / n - centre - a / lam) ** 2 for e, r, n, a in terms) / 2 / 6

    for b in range(6):
        up, down = elbo.tolist(), elbo.tolist()
        up[b], down[b] = up[b] + 1e-4, down[b] - 1e-4
        assert float(got[b]) == pytest.approx(lam * (regression(up) - regression(down)) / 2e-4, rel=1e-6, abs=1e-9)


def test_without_lambda_it_is_reinforce_on_the_elbo_per_token():
    elbo, _, ref, advantages, lengths = scores()
    (got,) = torch.autograd.grad(rspo(elbo, ref, advantages, lengths, lam=0.0), elbo)
    torch.testing.assert_close(got, -advantages / lengths.clamp(min=1) / 6)


def test_a_policy_at_its_target_does_not_move():
    """Log-ratios of A / lambda, whose mean is 0 as that of the advantages of a group is."""
    advantages, lengths = torch.tensor([1.0, -2.0, 1.0], dtype=F64), torch.tensor([3, 1, 5])
    ref = torch.tensor([-3.0, -1.0, -2.0], dtype=F64)
    elbo = (ref + lengths * advantages / 0.5).requires_grad_()
    (gradient,) = torch.autograd.grad(rspo(elbo, ref, advantages, lengths, lam=0.5), elbo)
    torch.testing.assert_close(gradient, torch.zeros(3, dtype=F64), rtol=0, atol=1e-15)


def test_the_centre_is_the_batch_s_and_another_sequence_changes_every_coefficient():
    elbo, _, ref, advantages, lengths = scores()
    (whole,) = torch.autograd.grad(rspo(elbo, ref, advantages, lengths, lam=0.7) * 6, elbo)
    (part,) = torch.autograd.grad(rspo(elbo[:3], ref[:3], advantages[:3], lengths[:3], lam=0.7) * 3, elbo)
    assert ((whole - part)[:3].abs() > 1e-4).all()


def test_everything_but_the_policy_is_detached():
    elbo, _, *others = scores()
    others = [tensor.double().requires_grad_() for tensor in others]
    rspo(elbo, *others).backward()
    assert all(tensor.grad is None for tensor in others)
    assert elbo.grad is not None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"elbo_B": torch.zeros(2, 3)}, ["elbo_B", "2, 3"]),
        ({"elbo_B": torch.zeros(2, dtype=torch.float16)}, ["elbo_B", "float16"]),
        ({"ref_elbo_B": torch.zeros(3)}, ["ref_elbo_B", "3"]),
        ({"advantages_B": torch.tensor([0.0, math.nan])}, ["advantages_B", "nan"]),
        ({"lengths_B": torch.tensor([-1, 1])}, ["lengths_B", "-1"]),
        ({"lam": -0.1}, ["lam", "-0.1"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_an_error_names_the_argument(changes, words):
    arguments = {name: torch.zeros(2) for name in ("elbo_B", "ref_elbo_B", "advantages_B")} | {"lengths_B": torch.ones(2)}
    loops.refuses(rspo, arguments, changes, words)


def test_contributions_of_the_whole_are_the_function_s_sum():
    plan = plan_of("bernoulli", 4, weight="L/count")
    logp = loops.row_logps(plan)
    elbo, ref, advantages = plan.score(logp), scores()[2], scores()[3]
    objective, batch = rspo_objective(lam=0.3), Batch({"advantages": advantages, "ref_elbo": ref})
    objective.check(batch, plan)
    loops.same(objective.contributions(logp, plan, batch) / 6, rspo(elbo, ref, advantages, plan.lengths_B, lam=0.3), logp)
    assert (objective.coupling, objective.on_policy_coupling, objective.denominator) == ("batch", "batch", "sequences")
    assert not objective.is_on_policy(batch)


def test_recipe():
    assert rspo_objective(**RECIPE.defaults).name == RECIPE.name
    assert RECIPE.status == "unverified"
    assert plan_of(RECIPE.law, RECIPE.samples, **RECIPE.law_options).shape[0] == 4
    with pytest.raises(ValueError, match="lam"):
        rspo_objective(lam=-1.0)
