"""VRPO: against loops over pairs, the lengths of the port, finite differences, the edges, and the engine's pairs."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllm_kernels.accumulation.objective import Batch
from dllm_kernels.objectives.vrpo import RECIPE, vrpo, vrpo_objective
from tests.objectives import loops
from tests.objectives.plans_and_batches import COMPLETIONS, plan_of

F64 = torch.float64


def by_loops(chosen, chosen_ref, rejected, rejected_ref, beta, lengths):
    """Loss and its derivatives in chosen and in rejected."""
    B = len(chosen)
    total, up, down = 0.0, [], []
    for c, cr, r, rr, (lc, lr) in zip(chosen, chosen_ref, rejected, rejected_ref, lengths, strict=True):
        margin = beta * ((c - cr) / lc - (r - rr) / lr)
        total += math.log1p(math.exp(-margin)) / B if margin > -500 else -margin / B
        doubt = 1 / (1 + math.exp(margin)) if margin < 500 else 0.0  # the sigmoid of -margin
        up.append(-beta * doubt / lc / B)
        down.append(beta * doubt / lr / B)
    return total, up, down


def check(tensors, beta, lengths=None, divisors=None, tolerance=1e-12):
    chosen, rejected = tensors[0], tensors[2]
    loss = vrpo(*tensors, beta=beta, lengths=lengths)
    value, up, down = by_loops(*(tensor.tolist() for tensor in tensors), beta, divisors or [(1, 1)] * len(chosen))
    torch.testing.assert_close(loss.detach(), torch.tensor(value, dtype=F64), rtol=tolerance, atol=tolerance)
    for got, want in zip(torch.autograd.grad(loss, [chosen, rejected]), (up, down), strict=True):
        torch.testing.assert_close(got, torch.tensor(want, dtype=F64), rtol=tolerance, atol=tolerance)


def pairs(seed=0):
    g = torch.Generator().manual_seed(seed)
    tensors = [-9 * torch.rand(5, generator=g, dtype=F64) for _ in range(4)]
    tensors[0][1] = tensors[1][1]  # a pair that did not move
    tensors[2][1] = tensors[3][1]
    return [tensors[0].requires_grad_(), tensors[1], tensors[2].requires_grad_(), tensors[3]]


@pytest.mark.parametrize("beta", [0.1, 0.2, 3.0])
def test_equals_loops_over_the_formula(beta):
    check(pairs(), beta)


def test_lengths_of_both_or_of_each_divide_the_elbos():
    one, other = torch.tensor([3, 1, 0, 7, 2]), torch.tensor([2.0, 2.0, 5.0, 0.0, 1.0], dtype=F64)
    check(pairs(), 0.2, one, [(3, 3), (1, 1), (1, 1), (7, 7), (2, 2)])
    check(pairs(), 0.2, (one, other), [(3, 2), (1, 2), (1, 5), (7, 1), (2, 1)])


@given(st.lists(st.tuples(*[st.floats(-50, 0)] * 4), min_size=1, max_size=6), st.floats(0.01, 5))
def test_equals_loops_for_any_batch(rows, beta):
    tensors = [torch.tensor(column, dtype=F64) for column in zip(*rows, strict=True)]
    tensors[0].requires_grad_()
    tensors[2].requires_grad_()
    check(tensors, beta, tolerance=1e-9)


def test_finite_differences():
    chosen, chosen_ref, rejected, rejected_ref = pairs()
    assert torch.autograd.gradcheck(lambda c, r: vrpo(c, chosen_ref, r, rejected_ref, beta=0.3), (chosen, rejected))


def test_an_unmoved_policy_has_loss_log_2_and_gradient_half_beta():
    chosen, _, rejected, _ = pairs()
    loss = vrpo(chosen, chosen.detach(), rejected, rejected.detach(), beta=0.4)
    up, down = torch.autograd.grad(loss, [chosen, rejected])
    assert float(loss.detach()) == pytest.approx(math.log(2))
    torch.testing.assert_close(up, torch.full_like(up, -0.04))
    torch.testing.assert_close(down, -up)


@pytest.mark.parametrize("margin", [1e4, -1e4])
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_margins_far_off_do_not_overflow(margin, dtype):
    chosen = torch.tensor([margin], dtype=dtype, requires_grad=True)
    zeros = torch.zeros(1, dtype=dtype)
    loss = vrpo(chosen, zeros, zeros, zeros, beta=1.0)
    assert float(loss.detach()) == max(0.0, -margin)
    assert float(torch.autograd.grad(loss, chosen)[0]) == (0.0 if margin > 0 else -1.0)


def test_the_references_are_detached():
    chosen, chosen_ref, rejected, rejected_ref = pairs()
    lengths = torch.ones(5, dtype=F64, requires_grad=True)
    vrpo(chosen, chosen_ref.requires_grad_(), rejected, rejected_ref.requires_grad_(), beta=0.3, lengths=lengths).backward()
    assert chosen_ref.grad is None
    assert rejected_ref.grad is None
    assert lengths.grad is None
    assert chosen.grad is not None
    assert rejected.grad is not None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"chosen_elbo_B": torch.zeros(2, 3)}, ["chosen_elbo_B", "2, 3"]),
        ({"rejected_elbo_B": torch.zeros(3)}, ["rejected_elbo_B", "3"]),
        ({"rejected_elbo_B": torch.zeros(2, dtype=torch.bfloat16)}, ["rejected_elbo_B", "bfloat16"]),
        ({"chosen_ref_B": torch.tensor([0.0, math.nan])}, ["chosen_ref_B", "nan"]),
        ({"rejected_ref_B": torch.zeros(1)}, ["rejected_ref_B", "1"]),
        ({"beta": 0.0}, ["beta", "0"]),
        ({"lengths": torch.ones(3)}, ["lengths", "3"]),
        ({"lengths": (torch.ones(2),)}, ["lengths", "pair", "1"]),
        ({"lengths": (torch.ones(2), -torch.ones(2))}, ["lengths", "-1"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_an_error_names_the_argument(changes, words):
    names = ("chosen_elbo_B", "chosen_ref_B", "rejected_elbo_B", "rejected_ref_B")
    loops.refuses(vrpo, {name: torch.zeros(2) for name in names} | {"beta": 0.1}, changes, words)


# --- the engine's form: pairs by id, in any order --------------------------------------------------------------------------

PAIR_IDS, CHOSEN = [7, 3, 3, -1, 7, -1], [True, False, True, False, False, True]


def test_beta_has_no_default():
    with pytest.raises(TypeError, match="beta"):
        vrpo_objective()


@pytest.mark.parametrize("normalize", [False, True])
def test_contributions_of_the_whole_and_of_any_pair_sum_to_the_function(normalize):
    plan = plan_of("exact", 4)
    logp = loops.row_logps(plan)
    ref = plan.score(logp).detach() + torch.randn(6, generator=torch.Generator().manual_seed(0), dtype=F64)
    batch = Batch({"ref_elbo": ref, "group_ids": torch.tensor(PAIR_IDS), "chosen": torch.tensor(CHOSEN)})
    objective = vrpo_objective(beta=0.7, normalize=normalize)
    objective.check(batch, plan)
    assert (objective.coupling, objective.on_policy_coupling, objective.denominator) == ("batch", "batch", "pairs")
    elbo, chosen, rejected = plan.score(logp), [0, 2, 5], [4, 1, 3]
    lengths = torch.tensor(COMPLETIONS)
    divide = (lengths[chosen], lengths[rejected]) if normalize else None
    want = vrpo(elbo[chosen], ref[chosen], elbo[rejected], ref[rejected], beta=0.7, lengths=divide)
    loops.same(objective.contributions(logp, plan, batch) / 3, want, logp)
    total = torch.zeros((), dtype=F64)
    for c, r in zip(chosen, rejected, strict=True):
        pair = {"sequences": torch.tensor([c, r])}
        here = [((plan.rows.sequence == b).nonzero()[:, 0]) for b in (c, r)]
        rows = torch.cat([index[plan.rows.sample[index] == k] for k in range(4) for index in here])
        part = Batch({name: tensor[pair["sequences"]] for name, tensor in batch.per_sequence.items()})
        total = total + objective.contributions(logp[rows], plan.cut(**pair), part)
    loops.same(total / 3, want, logp)


@pytest.mark.parametrize(
    ("ids", "chosen", "words"),
    [
        ([7, 3, 3, -1, 7, -2], CHOSEN, "pairs"),
        ([7, 3, 3, 7, 7, 7], [True, False, True, True, False, False], "pairs.*id 7"),
        (PAIR_IDS, [False, False, True, False, False, True], "pairs.*id 7"),
        ([7, 7, 7, 3, 3, 3], [True, True, False, True, True, False], "pairs.*id 7"),
        ([7, 7, 7, 3, 3, 3], [True, False, False, True, False, False], "pairs.*id 7"),
        (PAIR_IDS, [float(c) for c in CHOSEN], "chosen.*bool"),
        ([float(i) for i in PAIR_IDS], CHOSEN, "group_ids.*int64"),
    ],
)
def test_what_is_no_pair_is_refused(ids, chosen, words):
    plan = plan_of("exact", 2)
    batch = Batch({"ref_elbo": torch.zeros(6), "group_ids": torch.tensor(ids), "chosen": torch.tensor(chosen)})
    with pytest.raises((TypeError, ValueError), match=words):
        vrpo_objective(beta=0.1).contributions(loops.row_logps(plan), plan, batch)


def test_recipe():
    assert vrpo_objective(**RECIPE.defaults).name == RECIPE.name
    assert RECIPE.status == "unverified"
    assert plan_of(RECIPE.law, RECIPE.samples, **RECIPE.law_options).shape[0] == 4
