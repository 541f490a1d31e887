"""SPG against loops over sequences, samples and positions: both bounds, their gradient as a softmax, edges, cuts, errors."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllm_kernels.accumulation.objective import Batch
from dllm_kernels.objectives.spg import NEGATIVES, RECIPE, spg, spg_objective
from tests.objectives import loops
from tests.objectives.loops import F64, ragged
from tests.plans import plan_of

ADVANTAGES = torch.tensor([1.0, -0.5, 0.0, -2.0], dtype=F64)


def bounds_by_loops(logp, masked, length, beta):
    """(lower, upper) of one sequence and their gradients `[K][L]`; logp and masked are lists `[K][L]`."""
    K, L = len(logp), len(logp[0])
    lower, upper = 0.0, 0.0
    d_lower, d_upper = ([[0.0] * L for _ in range(K)] for _ in range(2))
    counts = [sum(line) for line in masked]
    for j in range(K):
        for position in range(L):
            if masked[j][position]:
                lower += logp[j][position] / counts[j] / K
                d_lower[j][position] = 1 / counts[j] / K
    positions = [position for position in range(L) if any(masked[j][position] for j in range(K))]
    for position in positions:
        terms = {j: math.exp(logp[j][position]) ** beta / (counts[j] / length) / K for j in range(K) if masked[j][position]}
        a = math.fsum(terms.values())
        upper += math.log(a) / beta / len(positions)
        for j, term in terms.items():
            d_upper[j][position] = term / a / len(positions)  # a softmax over the samples, the beta cancels
    return lower, upper, d_lower, d_upper


def by_loops(logp, mask, advantages, completion, omega=0.5, beta=1.5, negative="mix"):
    B, K, L = logp.shape
    values = logp.detach().tolist()
    total, gradient, all_tokens = 0.0, [], max(1, int(completion.sum()))
    for b in range(B):
        masked = [[bool(mask[b, j, i]) and bool(completion[b, i]) for i in range(L)] for j in range(K)]
        length = int(completion[b].sum())
        lower, upper, d_lower, d_upper = bounds_by_loops(values[b], masked, length, beta)
        share = {"mix": omega, "elbo": 0.0, "eubo": 1.0, "zero": 0.0}[negative]
        weight = 0.0 if negative == "zero" else 1.0
        a = float(advantages[b])
        if a > 0:
            share, weight = 0.0, 1.0
        factor = -a * length / all_tokens * weight
        total += factor * (share * upper + (1 - share) * lower)
        gradient.append([[factor * (share * d_upper[j][i] + (1 - share) * d_lower[j][i]) for i in range(L)] for j in range(K)])
    return total, gradient


def case(lengths, K=3, L=6, seed=0, density=0.5):
    g = torch.Generator().manual_seed(seed)
    logp = (-3 * torch.rand(len(lengths), K, L, generator=g, dtype=F64)).requires_grad_()
    return logp, torch.rand(len(lengths), K, L, generator=g) < density, ragged(lengths, L)


@pytest.mark.parametrize("negative", NEGATIVES)
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    K=st.integers(1, 4),
    seed=st.integers(0, 99),
    omega=st.floats(0, 1),
    beta=st.floats(0.5, 3),
    density=st.sampled_from([0.1, 0.5, 1.0]),
)
def test_loss_and_gradient_equal_loops(negative, lengths, K, seed, omega, beta, density):
    logp, mask, completion = case(lengths, K, seed=seed, density=density)
    advantages = torch.randn(len(lengths), generator=torch.Generator().manual_seed(seed), dtype=F64)
    advantages[seed % len(lengths)] = 0.0
    loss = spg(logp, mask, advantages, completion, omega=omega, eubo_beta=beta, negative=negative)
    loops.check(loss, logp, *by_loops(logp, mask, advantages, completion, omega, beta, negative))


def test_the_defaults_are_those_of_the_code():
    logp, mask, completion = case([6, 3, 2, 0])
    loops.check(spg(logp, mask, ADVANTAGES, completion), logp, *by_loops(logp, mask, ADVANTAGES, completion))


@pytest.mark.parametrize("beta", [1.0, 1.5, 2.0])
def test_the_upper_bound_s_weights_sum_to_1_over_the_samples_and_are_a_softmax(beta):
    logp, mask, completion = case([6, 4], seed=2, density=0.6)
    a = torch.tensor([-1.0, -1.0], dtype=F64)
    (gradient,) = torch.autograd.grad(spg(logp, mask, a, completion, eubo_beta=beta, negative="eubo"), logp)
    masked = mask & completion[:, None]
    for b, length in enumerate([6, 4]):
        positions = [i for i in range(6) if masked[b, :, i].any()]
        weights = gradient[b] * len(positions) * 10 / length  # undo len_b over the 10 tokens, and the mean over positions
        for i in range(6):
            if i not in positions:
                assert (weights[:, i] == 0).all()
                continue
            assert float(weights[:, i].sum()) == pytest.approx(1.0, abs=1e-12)
            inside = [j for j in range(3) if masked[b, j, i]]
            scores = [beta * logp[b, j, i].item() - math.log(int(masked[b, j].sum()) / length) for j in inside]
            top = max(scores)
            total = math.fsum(math.exp(s - top) for s in scores)
            for j, score in zip(inside, scores, strict=True):
                assert float(weights[j, i]) == pytest.approx(math.exp(score - top) / total, abs=1e-12)


def test_the_upper_bound_is_above_the_lower_where_everything_is_masked():
    """Jensen, from beta = 1 on and at tau = 1; the mixture lies between."""
    logp, _, completion = case([6, 6, 6, 6], seed=4)
    mask = torch.ones(4, 3, 6, dtype=torch.bool)
    a = torch.full((4,), -1.0, dtype=F64)
    lower, mix, upper = (spg(logp, mask, a, completion, negative=kind).item() for kind in ("elbo", "mix", "eubo"))
    assert lower < mix < upper
    assert mix == pytest.approx((lower + upper) / 2)


def test_gradient_equals_autograd_through_the_definition_and_finite_differences():
    logp, mask, completion = case([6, 3, 2, 1], seed=7)
    c = (mask & completion[:, None]).double()
    counts, lengths = c.sum(-1), completion.sum(-1)
    lower = ((logp * c).sum(-1) / counts.clamp(min=1)).mean(-1)
    a_BL = (logp.exp() ** 1.5 * c / (counts.clamp(min=1) / lengths[:, None])[:, :, None]).mean(1)
    positive = a_BL > 0
    log_a = torch.where(positive, torch.where(positive, a_BL, 1.0).log(), 0.0)
    upper = log_a.sum(-1) / positive.sum(-1).clamp(min=1) / 1.5
    value = torch.where(ADVANTAGES > 0, lower, 0.3 * upper + 0.7 * lower)
    loops.same(spg(logp, mask, ADVANTAGES, completion, omega=0.3), -(ADVANTAGES * value * lengths).sum() / 12, logp)
    assert torch.autograd.gradcheck(lambda x: spg(x, mask, ADVANTAGES, completion), logp)


def test_no_probability_underflows():
    """p^beta of bf16 or fp32 probabilities is 0 here; the log-sum-exp is not."""
    logp = torch.full((1, 2, 3), -500.0, requires_grad=True)
    mask = torch.ones(1, 2, 3, dtype=torch.bool)
    loss = spg(logp, mask, torch.tensor([-1.0]), mask[:, 0], negative="eubo")
    assert loss.item() == pytest.approx(-500.0)
    torch.testing.assert_close(torch.autograd.grad(loss, logp)[0], torch.full((1, 2, 3), 1 / 6))


def test_a_probability_of_0_under_one_sample_leaves_the_others():
    """And under all samples the position is left out, as `a_l > 0` says."""
    logp = torch.tensor([[[-1.0, -math.inf, -2.0], [-1.0, -math.inf, -math.inf]]], dtype=F64, requires_grad=True)
    mask = torch.ones(1, 2, 3, dtype=torch.bool)
    loss = spg(logp, mask, torch.tensor([-1.0], dtype=F64), mask[:, 0], eubo_beta=2.0, negative="eubo")
    want = (-1.0 + (-2.0 + math.log(0.5) / 2)) / 2
    loops.check(loss, logp, want, [[[0.25, 0.0, 0.5], [0.25, 0.0, 0.0]]])


@pytest.mark.parametrize("negative", NEGATIVES)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_scored_may_hold_anything(bad, negative):
    logp, mask, completion = case([6, 3, 2, 0], seed=3)
    want = by_loops(logp, mask, ADVANTAGES, completion, negative=negative)
    filled = logp.detach().masked_fill(~(mask & completion[:, None]), bad).requires_grad_()
    loops.check(spg(filled, mask, ADVANTAGES, completion, negative=negative), filled, *want)


@pytest.mark.parametrize("negative", NEGATIVES)
@pytest.mark.parametrize(("lengths", "density"), [([0, 0, 0, 0], 1.0), ([6, 3, 2, 1], 0.0)], ids=["no tokens", "no masks"])
def test_nothing_to_score_is_a_loss_of_0_with_gradient_0(negative, lengths, density):
    logp, mask, completion = case(lengths, density=density)
    loops.check(spg(logp, mask, ADVANTAGES, completion, negative=negative), logp, 0.0, torch.zeros(4, 3, 6, dtype=F64))


def test_negatives_of_zero_leave_only_the_positive():
    logp, mask, completion = case([6, 3, 2, 5])
    (gradient,) = torch.autograd.grad(spg(logp, mask, ADVANTAGES, completion, negative="zero"), logp)
    assert (gradient[1:] == 0).all()
    assert (gradient[0] != 0).any()


def test_advantages_are_detached():
    logp, mask, completion = case([6, 3, 2, 5])
    advantages = ADVANTAGES.clone().requires_grad_()
    spg(logp, mask, advantages, completion).backward()
    assert advantages.grad is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sample_logp_BKL": torch.zeros(4, 6)}, ["sample_logp_BKL", "4, 6"]),
        ({"sample_logp_BKL": torch.zeros(0, 3, 6)}, ["sample_logp_BKL", "0, 3, 6"]),
        ({"sample_logp_BKL": torch.zeros(4, 3, 6, dtype=torch.bfloat16)}, ["sample_logp_BKL", "bfloat16"]),
        ({"sample_mask_BKL": torch.ones(4, 3, 6)}, ["sample_mask_BKL", "float32"]),
        ({"sample_mask_BKL": torch.ones(3, 4, 6, dtype=torch.bool)}, ["sample_mask_BKL", "3, 4, 6"]),
        ({"completion_mask_BL": ragged([1] * 4, 5)}, ["completion_mask_BL", "4, 5"]),
        ({"advantages_B": torch.zeros(3)}, ["advantages_B", "3"]),
        ({"omega": 1.5}, ["omega", "1.5"]),
        ({"omega": -0.5}, ["omega", "-0.5"]),
        ({"eubo_beta": 0.0}, ["eubo_beta", "0"]),
        ({"negative": "none"}, ["negative", "none", "eubo"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_an_error_names_the_argument(changes, words):
    arguments = {
        "sample_logp_BKL": torch.zeros(4, 3, 6),
        "sample_mask_BKL": torch.ones(4, 3, 6, dtype=torch.bool),
        "advantages_B": torch.ones(4),
        "completion_mask_BL": ragged([6] * 4, 6),
    }
    loops.refuses(spg, arguments, changes, words)


# --- in the engine ----------------------------------------------------------------------------------------------------

LENGTHS = [7, 0, 3, 4]


@pytest.mark.parametrize("negative", NEGATIVES)
@pytest.mark.parametrize("law", ["block", "exact"])
@pytest.mark.parametrize("sequences", [1, 3])
def test_contributions_of_any_cut_of_whole_sequences_sum_to_the_loss(negative, law, sequences):
    options = {"block_length": 3} if law == "block" else {}
    plan = plan_of(LENGTHS, law=law, samples=4, **options)
    logp_N = loops.row_logps(plan)
    objective, batch = spg_objective(negative=negative), Batch({"advantages": ADVANTAGES})
    objective.check(batch, plan)
    total = loops.summed_over_cuts(objective, logp_N, plan, batch, sequences=sequences)
    dense_KBS = torch.zeros(plan.shape, dtype=F64).masked_scatter(plan.scored, logp_N)
    masks = plan.scored.transpose(0, 1), plan.completion_mask_BS
    want = spg(dense_KBS.transpose(0, 1), masks[0], ADVANTAGES, masks[1], negative=negative)
    loops.same(total / sum(LENGTHS), want, logp_N)


def test_a_cut_of_samples_is_refused():
    plan = plan_of(LENGTHS, law="block", samples=4, block_length=3).cut(samples=slice(0, 2))
    with pytest.raises(ValueError, match="all 4 samples"):
        spg_objective().contributions(loops.row_logps(plan), plan, Batch({"advantages": ADVANTAGES}))


def test_what_it_declares():
    objective = spg_objective()
    assert (objective.name, objective.coupling, objective.denominator) == ("spg", "sequence", "tokens")
    assert objective.old_scores is None
    assert not objective.is_on_policy(Batch({"advantages": ADVANTAGES}))
    assert (RECIPE.name, RECIPE.arxiv, RECIPE.law, RECIPE.samples) == ("spg", "2510.09541", "block", 2)
    assert (RECIPE.status, RECIPE.advantage) == ("verified against the code", "mean")
    assert (RECIPE.needs_old, RECIPE.needs_reference, RECIPE.needs_trajectory) == (False, False, False)
    assert spg_objective(**RECIPE.defaults).name == "spg"
    with pytest.raises(ValueError, match="omega"):
        spg_objective(omega=2.0)
