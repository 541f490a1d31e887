"""wd1: against loops over groups and tokens, the edges, and the engine's cuts."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllm_kernels.accumulation.objective import Batch
from dllm_kernels.objectives.wd1 import RECIPE, wd1, wd1_objective, wd1_weights
from tests.objectives import loops
from tests.objectives.plans_and_batches import COMPLETIONS, GROUPS, plan_of

F64 = torch.float64
ADVANTAGES = (0.7, -0.3, -0.2, 0.3, -0.5, 0.0)


def coefficients(advantages, groups):
    """`-w+ + w-` of each sequence."""
    out = []
    for a, group in zip(advantages, groups, strict=True):
        members = [x for x, g in zip(advantages, groups, strict=True) if g == group]
        pull = math.exp(a) / math.fsum(math.exp(x) for x in members)
        push = math.exp(-a) / math.fsum(math.exp(-x) for x in members)
        out.append(push - pull)
    return out


def by_loops(logp, advantages, mask, groups):
    factors = coefficients(advantages, groups)
    total = math.fsum(
        f * x for f, row, seen in zip(factors, logp, mask, strict=True) for x, c in zip(row, seen, strict=True) if c
    )
    return total, [[f if c else 0.0 for c in seen] for f, seen in zip(factors, mask, strict=True)]


@pytest.mark.parametrize("groups", [GROUPS, (1,) * 6, (1, 2, 3, 4, 5, 6)], ids=str)
def test_equals_loops_over_the_formula(groups):
    logp, _, _ = loops.logps(6, 7)
    mask = loops.ragged(COMPLETIONS, 7)
    advantages = torch.tensor(ADVANTAGES, dtype=F64)
    loss = wd1(logp, advantages, mask, torch.tensor(groups))
    loops.check(loss, logp, *by_loops(logp.tolist(), ADVANTAGES, mask.tolist(), groups))


sequence = st.tuples(
    st.floats(-3, 3), st.lists(st.tuples(st.floats(-9, 0), st.booleans()), min_size=4, max_size=4), st.integers(0, 2)
)


@given(st.lists(sequence, min_size=1, max_size=6))
def test_equals_loops_for_any_batch(rows):
    advantages, groups = [row[0] for row in rows], [row[2] for row in rows]
    logp, mask = ([[cell[i] for cell in row[1]] for row in rows] for i in (0, 1))
    leaf = torch.tensor(logp, dtype=F64).requires_grad_()
    loss = wd1(leaf, torch.tensor(advantages, dtype=F64), torch.tensor(mask), torch.tensor(groups))
    loops.check(loss, leaf, *by_loops(logp, advantages, mask, groups))


def test_finite_differences():
    logp, _, _ = loops.logps(6, 7)
    mask, advantages = loops.ragged(COMPLETIONS, 7), torch.tensor(ADVANTAGES, dtype=F64)
    assert torch.autograd.gradcheck(lambda x: wd1(x, advantages, mask, torch.tensor(GROUPS)), logp)


def test_other_prompts_do_not_mix_in():
    """The code takes the local batch for one group."""
    logp, _, _ = loops.logps(6, 7)
    mask, advantages, groups = loops.ragged(COMPLETIONS, 7), torch.tensor(ADVANTAGES, dtype=F64), torch.tensor(GROUPS)
    parts = [wd1(logp[groups == g], advantages[groups == g], mask[groups == g], groups[groups == g]) for g in (4, 9)]
    torch.testing.assert_close(wd1(logp, advantages, mask, groups), parts[0] + parts[1])


def test_weights_sum_to_0_and_are_exactly_0_for_equal_advantages():
    advantages = torch.tensor([0.5, 0.5, 0.1, -2.0, 1.0, -0.7], dtype=F64)
    weights = wd1_weights(advantages, torch.tensor([1, 1, 2, 3, 3, 3]))
    assert (weights[:3] == 0).all()
    assert float(weights[3:].sum()) == pytest.approx(0.0, abs=1e-15)
    assert weights.abs().max() < 1
    assert not wd1_weights(advantages.requires_grad_(), torch.zeros(6, dtype=torch.int64)).requires_grad


@pytest.mark.parametrize("rubbish", [math.inf, -math.inf, math.nan])
def test_rubbish_at_padded_tokens_is_not_seen(rubbish):
    logp, _, _ = loops.logps(6, 7)
    mask, groups = loops.ragged(COMPLETIONS, 7), torch.tensor(GROUPS)
    advantages = torch.tensor(ADVANTAGES, dtype=F64)
    spoilt = torch.where(mask, logp.detach(), rubbish).requires_grad_()
    loss = wd1(spoilt, advantages, mask, groups)
    assert loss == wd1(logp, advantages, mask, groups)
    (gradient,) = torch.autograd.grad(loss, spoilt)
    assert (gradient[~mask] == 0).all()
    assert torch.isfinite(gradient).all()


def test_advantages_are_detached_and_may_be_large():
    logp = torch.full((2, 1), -1.0, requires_grad=True)
    advantages = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = wd1(logp, advantages, torch.ones(2, 1, dtype=torch.bool), torch.tensor([0, 0]))
    loss.backward()
    assert advantages.grad is None
    assert logp.grad.tolist() == [[-1.0], [1.0]]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"logp_BL": torch.zeros(2)}, ["logp_BL"]),
        ({"logp_BL": torch.zeros(2, 3, dtype=torch.bfloat16)}, ["logp_BL", "bfloat16"]),
        ({"advantages_B": torch.zeros(3)}, ["advantages_B", "3"]),
        ({"advantages_B": torch.tensor([0.0, math.nan])}, ["advantages_B", "nan"]),
        ({"completion_mask_BL": torch.ones(2, 3)}, ["completion_mask_BL", "float32"]),
        ({"completion_mask_BL": torch.ones(2, 4, dtype=torch.bool)}, ["completion_mask_BL", "2, 4"]),
        ({"group_ids_B": torch.zeros(3, dtype=torch.int64)}, ["group_ids_B", "3"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_an_error_names_the_argument(changes, words):
    arguments = {
        "logp_BL": torch.zeros(2, 3),
        "advantages_B": torch.zeros(2),
        "completion_mask_BL": torch.ones(2, 3, dtype=torch.bool),
        "group_ids_B": torch.zeros(2, dtype=torch.int64),
    }
    loops.refuses(wd1, arguments, changes, words)


@pytest.mark.parametrize("samples", [1, 3])
def test_contributions_of_any_cut_sum_to_the_function(samples):
    """Of several samples, which differ in their prompt noise, the mean."""
    plan = plan_of("full", samples)
    logp = loops.row_logps(plan)
    advantages, groups = torch.tensor(ADVANTAGES, dtype=F64), torch.tensor(GROUPS)
    dense = torch.zeros(plan.shape, dtype=F64).masked_scatter(plan.scored, logp)
    want = sum(wd1(dense[k], advantages, plan.completion_mask_BS, groups) for k in range(samples)) / samples
    objective, batch = wd1_objective(), Batch({"weights": wd1_weights(advantages, groups)})
    objective.check(batch, plan)
    assert (objective.coupling, objective.on_policy_coupling, objective.denominator) == ("none", "none", "groups")
    for cut in ({}, {"samples": 1}, {"sequences": 4}):
        loops.same(loops.summed_over_cuts(objective, logp, plan, batch, **cut), want, logp)


def test_recipe():
    assert wd1_objective(**RECIPE.defaults).name == RECIPE.name
    assert plan_of(RECIPE.law, RECIPE.samples, **RECIPE.law_options).shape[0] == 1
