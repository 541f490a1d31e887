"""diffu-GRPO against loops over tokens: value, gradient, edges, cuts, errors."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllm_kernels.accumulation.objective import Batch
from dllm_kernels.objectives.diffu_grpo import RECIPE, diffu_grpo, diffu_grpo_objective
from tests.objectives import loops
from tests.objectives.loops import F64, ragged
from tests.plans import plan_of

ADVANTAGES = torch.tensor([1.0, -0.5, 0.0, -2.0], dtype=F64)


def by_loops(logp, old, ref, advantages, mask, epsilon=0.5, beta=0.04):
    B, L = logp.shape
    logp = logp.detach()
    count = sum(map(sum, mask.tolist()))
    total, gradient = 0.0, [[0.0] * L for _ in range(B)]
    for b in range(B):
        for position in range(L):
            if mask[b, position]:
                at = b, position
                term = loops.token_term(
                    float(logp[at]), float(old[at]), float(ref[at]), float(advantages[b]), epsilon, epsilon, beta
                )
                total += term[0] / max(count, 1)
                gradient[b][position] = term[1] / max(count, 1)
    return total, gradient


@pytest.mark.parametrize(("epsilon", "beta"), [(0.5, 0.04), (0.1, 0.0), (0.0, 1.0)])
def test_loss_and_gradient_equal_loops_over_tokens(epsilon, beta):
    logp, old, ref = loops.logps(4, 6)
    mask = ragged([6, 3, 2, 0], 6)
    loss = diffu_grpo(logp, old, ref, ADVANTAGES, mask, epsilon=epsilon, beta=beta)
    loops.check(loss, logp, *by_loops(logp, old, ref, ADVANTAGES, mask, epsilon, beta))


@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    seed=st.integers(0, 99),
    epsilon=st.floats(0, 0.9),
    beta=st.floats(0, 2),
)
def test_any_shape_equals_the_loops(lengths, seed, epsilon, beta):
    logp, old, ref = loops.logps(len(lengths), 5, seed=seed)
    advantages = torch.randn(len(lengths), generator=torch.Generator().manual_seed(seed), dtype=F64)
    mask = ragged(lengths, 5)
    loss = diffu_grpo(logp, old, ref, advantages, mask, epsilon=epsilon, beta=beta)
    loops.check(loss, logp, *by_loops(logp, old, ref, advantages, mask, epsilon, beta))


def test_the_defaults_are_the_paper_s():
    logp, old, ref = loops.logps(4, 6)
    mask = ragged([6, 3, 2, 1], 6)
    torch.testing.assert_close(
        diffu_grpo(logp, old, ref, ADVANTAGES, mask), diffu_grpo(logp, old, ref, ADVANTAGES, mask, epsilon=0.5, beta=0.04)
    )


def test_gradient_equals_autograd_through_the_definition_and_finite_differences():
    logp, old, ref = loops.logps(4, 6, seed=3)
    with torch.no_grad():
        logp.add_(0.01)  # off the kinks
    mask = ragged([6, 3, 2, 1], 6)
    ratio = (logp - old).exp()
    a = ADVANTAGES[:, None]
    definition = -torch.minimum(ratio * a, ratio.clamp(0.7, 1.3) * a) + 0.1 * ((ref - logp).exp() - (ref - logp) - 1)
    got = diffu_grpo(logp, old, ref, ADVANTAGES, mask, epsilon=0.3, beta=0.1)
    loops.same(got, (definition * mask).sum() / mask.sum(), logp)
    assert torch.autograd.gradcheck(lambda x: diffu_grpo(x, old, ref, ADVANTAGES, mask, epsilon=0.3, beta=0.1), logp)


@pytest.mark.parametrize("epsilon", [0.0, 0.5])
def test_on_policy_the_gradient_is_minus_the_advantage_even_with_epsilon_0(epsilon):
    logp = torch.tensor([[-1.0, -2.0]] * 4, dtype=F64, requires_grad=True)
    loss = diffu_grpo(logp, logp, logp, ADVANTAGES, ragged([2] * 4, 2), epsilon=epsilon)
    loops.check(loss, logp, -float(ADVANTAGES.mean()), (-ADVANTAGES[:, None] / 8).expand(4, 2))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_padding_may_hold_anything(bad):
    logp, old, ref = loops.logps(4, 6)
    mask = ragged([6, 3, 2, 0], 6)
    want = by_loops(logp, old, ref, ADVANTAGES, mask)
    filled = [tensor.detach().masked_fill(~mask, bad) for tensor in (logp, old, ref)]
    filled[0].requires_grad_()
    loops.check(diffu_grpo(*filled, ADVANTAGES, mask), filled[0], *want)


def test_no_token_at_all_is_a_loss_of_0_with_gradient_0():
    logp, old, ref = loops.logps(4, 6)
    loops.check(diffu_grpo(logp, old, ref, ADVANTAGES, ragged([0] * 4, 6)), logp, 0.0, [[0.0] * 6] * 4)


def test_a_ratio_that_would_overflow_is_clipped():
    logp = torch.tensor([[0.0]], requires_grad=True)
    old = torch.tensor([[-1e4]])
    loss = diffu_grpo(logp, old, logp, torch.tensor([1.0]), ragged([1], 1))
    assert loss.item() == -1.5
    assert torch.autograd.grad(loss, logp)[0].item() == 0


def test_a_nan_in_a_scored_token_is_not_hidden():
    logp, old, ref = loops.logps(4, 6)
    logp = logp.detach()
    logp[0, 0] = math.nan
    assert torch.isnan(diffu_grpo(logp, old, ref, ADVANTAGES, ragged([6, 3, 2, 0], 6)))


def test_everything_but_the_policy_is_detached():
    logp, old, ref = loops.logps(4, 6)
    others = [tensor.clone().requires_grad_() for tensor in (old, ref, ADVANTAGES)]
    diffu_grpo(logp, *others, ragged([6, 3, 2, 1], 6)).backward()
    assert logp.grad is not None
    assert all(tensor.grad is None for tensor in others)


def test_no_reference_is_needed_without_kl():
    logp, old, ref = loops.logps(4, 6)
    mask = ragged([6, 3, 2, 1], 6)
    got = diffu_grpo(logp, old, None, ADVANTAGES, mask, beta=0.0)
    torch.testing.assert_close(got, diffu_grpo(logp, old, ref, ADVANTAGES, mask, beta=0.0))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"logp_BL": torch.zeros(4)}, ["logp_BL", "4"]),
        ({"old_logp_BL": torch.zeros(4, 2)}, ["old_logp_BL", "4, 3", "4, 2"]),
        ({"old_logp_BL": None}, ["old_logp_BL", "NoneType"]),
        ({"ref_logp_BL": torch.zeros(3, 4)}, ["ref_logp_BL", "3, 4"]),
        ({"ref_logp_BL": None}, ["ref_logp_BL", "beta", "0.04"]),
        ({"advantages_B": torch.zeros(3)}, ["advantages_B", "3"]),
        ({"completion_mask_BL": torch.ones(4, 3)}, ["completion_mask_BL", "bool", "float32"]),
        ({"completion_mask_BL": ragged([1] * 3, 3)}, ["completion_mask_BL", "3, 3"]),
        ({"old_logp_BL": torch.full((4, 3), math.nan)}, ["old_logp_BL", "nan"]),
        ({"logp_BL": torch.zeros(4, 3, dtype=torch.bfloat16)}, ["logp_BL", "bfloat16"]),
        ({"advantages_B": torch.full((4,), math.inf)}, ["advantages_B", "inf"]),
        ({"epsilon": -0.1}, ["epsilon", "-0.1"]),
        ({"epsilon": 1.5}, ["epsilon", "1.5"]),
        ({"beta": -1.0}, ["beta", "-1"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_an_error_names_the_argument(changes, words):
    arguments = {
        "logp_BL": torch.zeros(4, 3),
        "old_logp_BL": torch.zeros(4, 3),
        "ref_logp_BL": torch.zeros(4, 3),
        "advantages_B": torch.ones(4),
        "completion_mask_BL": ragged([3] * 4, 3),
    }
    loops.refuses(diffu_grpo, arguments, changes, words)


# --- in the engine ----------------------------------------------------------------------------------------------------

LENGTHS = [5, 0, 3, 4]


def scored(samples=1):
    plan = plan_of(LENGTHS, law="full", samples=samples)
    logp_N = loops.row_logps(plan)
    g = torch.Generator().manual_seed(5)
    dense = loops.at_positions(plan, logp_N)
    old, ref = (dense + 0.4 * torch.randn(dense.shape, generator=g, dtype=F64) for _ in range(2))
    return plan, logp_N, old, ref


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("cut", [(1, 1), (None, 2), (2, 3)], ids=str)
def test_contributions_of_any_cut_sum_to_the_loss(samples, cut):
    plan, logp_N, old, ref = scored(samples)
    objective = diffu_grpo_objective(epsilon=0.3, beta=0.1)
    batch = Batch({"advantages": ADVANTAGES}, {"old_logp": old, "ref_logp": ref})
    objective.check(batch, plan)
    total = loops.summed_over_cuts(objective, logp_N, plan, batch, samples=cut[0], sequences=cut[1])
    dense_KBS = torch.zeros(plan.shape, dtype=F64).masked_scatter(plan.scored, logp_N)
    want = sum(
        diffu_grpo(dense_KBS[k], old[:, k], ref[:, k], ADVANTAGES, plan.scored[k], epsilon=0.3, beta=0.1) / samples
        for k in range(samples)
    )
    loops.same(total / sum(LENGTHS), want, logp_N)


def test_on_policy_old_is_the_policy_itself_and_without_kl_no_score_is_needed_beforehand():
    plan, logp_N, _, ref = scored()
    batch = Batch({"advantages": ADVANTAGES})
    free = diffu_grpo_objective(beta=0.0)
    assert free.is_on_policy(batch)
    assert (free.coupling, free.on_policy_coupling, free.denominator) == ("token", "none", "tokens")
    free.check(batch, plan)
    own = free.contributions(logp_N, plan, batch)
    given_old = free.contributions(logp_N, plan, Batch(batch.per_sequence, {"old_logp": loops.at_positions(plan, logp_N)}))
    loops.same(own, given_old, logp_N)
    with_kl = diffu_grpo_objective()
    assert with_kl.on_policy_coupling == "token"
    with pytest.raises(ValueError, match="ref_logp"):
        with_kl.check(batch, plan)
    assert torch.isfinite(with_kl.contributions(logp_N, plan, Batch(batch.per_sequence, {"ref_logp": ref})))


def test_the_recipe_says_what_the_paper_used():
    recipe = RECIPE
    assert (recipe.name, recipe.arxiv, recipe.law, recipe.samples, recipe.advantage) == (
        "diffu_grpo",
        "2504.12216",
        "full",
        1,
        "mean",
    )
    assert recipe.status == "verified against the code"
    assert (recipe.needs_old, recipe.needs_reference, recipe.needs_trajectory) == (True, True, False)
    assert diffu_grpo_objective(**recipe.defaults).name == "diffu_grpo"
