"""coupled-GRPO against loops over tokens: scores of a full mask and a pair of complements, loss, gradient, cuts, errors."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllm_kernels.accumulation.objective import Batch
from dllm_kernels.objectives.coupled_grpo import RECIPE, coupled_grpo, coupled_grpo_objective, coupled_scores
from tests.objectives import loops
from tests.objectives.loops import F64, ragged
from tests.plans import plan_of

ADVANTAGES = torch.tensor([1.0, -0.5, 0.0, -2.0], dtype=F64)


def scores_by_loops(full, pair, first, t):
    B, L = full.shape
    full, pair = full.detach(), pair.detach()
    out = [[0.0] * L for _ in range(B)]
    for b in range(B):
        for position in range(L):
            at = b, position
            share = t[b] if first[at] else 1 - t[b]
            out[b][position] = 0.5 * (float(full[at]) + float(pair[at]) / share)
    return torch.tensor(out, dtype=F64)


@given(t=st.lists(st.floats(0.05, 0.95), min_size=3, max_size=3), seed=st.integers(0, 99))
def test_scores_and_their_gradient_equal_loops(t, seed):
    full, pair, _ = loops.logps(3, 5, seed=seed)
    pair.requires_grad_()
    first = torch.rand(3, 5, generator=torch.Generator().manual_seed(seed)) < 0.5
    got = coupled_scores(full, pair, first, torch.tensor(t, dtype=F64))
    torch.testing.assert_close(got.detach(), scores_by_loops(full, pair, first, t))
    gradients = torch.autograd.grad(got.sum(), (full, pair))
    torch.testing.assert_close(gradients[0], torch.full((3, 5), 0.5, dtype=F64))
    weight = [[0.5 / (t[b] if first[b, i] else 1 - t[b]) for i in range(5)] for b in range(3)]
    torch.testing.assert_close(gradients[1], torch.tensor(weight, dtype=F64))


def test_one_t_serves_the_whole_batch_as_a_number_or_a_tensor():
    full, pair, _ = loops.logps(3, 5)
    first = ragged([2, 0, 5], 5)
    want = scores_by_loops(full, pair, first, [0.3] * 3)
    for t in (0.3, torch.tensor(0.3, dtype=F64), torch.full((3,), 0.3, dtype=F64)):
        torch.testing.assert_close(coupled_scores(full, pair, first, t).detach(), want)


@pytest.mark.parametrize("t", [0.3, 1 / 7])
def test_float64_scores_have_float64_weights(t):
    logp = torch.tensor([[-1.0, -2.0]], dtype=F64)
    scores = coupled_scores(logp, logp, torch.tensor([[True, False]]), t)
    want = torch.tensor([[-0.5 - 0.5 / t, -1.0 - 1.0 / (1.0 - t)]], dtype=F64)
    torch.testing.assert_close(scores, want, rtol=0, atol=1e-15)


def test_at_t_of_a_half_a_score_is_one_and_a_half_log_probs():
    logp = torch.tensor([[-1.0, -2.0]], dtype=F64)
    torch.testing.assert_close(coupled_scores(logp, logp, ragged([1], 2), 0.5), 1.5 * logp)


def by_loops(score, old, ref, advantages, mask, epsilon=0.5, beta=0.01):
    B, L = score.shape
    score = score.detach()
    count = max(1, sum(map(sum, mask.tolist())))
    total, gradient = 0.0, [[0.0] * L for _ in range(B)]
    for b in range(B):
        for position in range(L):
            if mask[b, position]:
                at = b, position
                term = loops.token_term(
                    float(score[at]), float(old[at]), float(ref[at]), float(advantages[b]), epsilon, epsilon, beta
                )
                total += term[0] / count
                gradient[b][position] = term[1] / count
    return total, gradient


@pytest.mark.parametrize("options", [{}, {"epsilon": 0.1, "beta": 0.0}, {"epsilon": 0.0, "beta": 1.0}], ids=str)
@pytest.mark.parametrize("lengths", [[6, 3, 2, 0], [0, 0, 0, 0], [1, 1, 1, 1]], ids=str)
def test_loss_and_gradient_equal_loops_over_tokens(options, lengths):
    score, old, ref = loops.logps(4, 6)
    mask = ragged(lengths, 6)
    loss = coupled_grpo(score, old, ref, ADVANTAGES, mask, **options)
    loops.check(loss, score, *by_loops(score, old, ref, ADVANTAGES, mask, **options))


def test_gradient_through_the_scores_equals_finite_differences():
    full, pair, old = loops.logps(4, 3, seed=1)
    with torch.no_grad():
        full.add_(0.013)
    first, mask = ragged([1, 0, 3, 2], 3), ragged([3, 3, 2, 1], 3)
    old, ref = 1.5 * old, 1.5 * old + 0.1

    def loss(a, b):
        return coupled_grpo(coupled_scores(a, b, first, 0.4), old, ref, ADVANTAGES, mask, epsilon=0.3, beta=0.1)

    assert torch.autograd.gradcheck(loss, (full, pair.detach().requires_grad_()))


def test_on_policy_the_gradient_is_minus_the_advantage_even_with_epsilon_0():
    score = torch.tensor([[-1.0, -2.0]] * 4, dtype=F64, requires_grad=True)
    loss = coupled_grpo(score, score, score, ADVANTAGES, ragged([2] * 4, 2), epsilon=0.0)
    loops.check(loss, score, -float(ADVANTAGES.mean()), (-ADVANTAGES[:, None] / 8).expand(4, 2))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_padding_may_hold_anything(bad):
    score, old, ref = loops.logps(4, 6)
    mask = ragged([6, 3, 2, 0], 6)
    want = by_loops(score, old, ref, ADVANTAGES, mask)
    filled = [tensor.detach().masked_fill(~mask, bad) for tensor in (score, old, ref)]
    filled[0].requires_grad_()
    loops.check(coupled_grpo(*filled, ADVANTAGES, mask), filled[0], *want)


def test_everything_but_the_policy_is_detached():
    score, old, ref = loops.logps(4, 6)
    others = [tensor.clone().requires_grad_() for tensor in (old, ref, ADVANTAGES)]
    coupled_grpo(score, *others, ragged([6, 3, 2, 1], 6)).backward()
    assert score.grad is not None
    assert all(tensor.grad is None for tensor in others)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"score_BL": torch.zeros(4)}, ["score_BL", "4"]),
        ({"old_score_BL": torch.zeros(4, 2)}, ["old_score_BL", "4, 2"]),
        ({"ref_score_BL": torch.zeros(4, 2)}, ["ref_score_BL", "4, 2"]),
        ({"ref_score_BL": None}, ["ref_score_BL", "beta", "0.01"]),
        ({"advantages_B": torch.zeros(3)}, ["advantages_B", "3"]),
        ({"completion_mask_BL": torch.ones(4, 3)}, ["completion_mask_BL", "float32"]),
        ({"epsilon": -0.1}, ["epsilon", "-0.1"]),
        ({"beta": math.nan}, ["beta", "nan"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_an_error_names_the_argument(changes, words):
    arguments = {name: torch.zeros(4, 3) for name in ("score_BL", "old_score_BL", "ref_score_BL")}
    arguments |= {"advantages_B": torch.ones(4), "completion_mask_BL": ragged([3] * 4, 3)}
    loops.refuses(coupled_grpo, arguments, changes, words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"logp_full_BL": torch.zeros(4)}, ["logp_full_BL", "4"]),
        ({"logp_pair_BL": torch.zeros(4, 2)}, ["logp_pair_BL", "4, 2"]),
        ({"first_mask_BL": torch.ones(4, 3)}, ["first_mask_BL", "float32"]),
        ({"first_mask_BL": ragged([1], 3)}, ["first_mask_BL", "1, 3"]),
        ({"t": 0.0}, ["t ", "0"]),
        ({"t": 1.0}, ["t ", "1"]),
        ({"t": torch.full((3,), 0.5)}, ["t ", "3"]),
        ({"t": torch.tensor([0.5, 0.5, 1.5, 0.5])}, ["t ", "1.5"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_an_error_of_the_scores_names_the_argument(changes, words):
    arguments = {"logp_full_BL": torch.zeros(4, 3), "logp_pair_BL": torch.zeros(4, 3), "first_mask_BL": ragged([1] * 4, 3)}
    loops.refuses(coupled_scores, arguments | {"t": 0.5}, changes, words)


# --- in the engine ----------------------------------------------------------------------------------------------------

LENGTHS = [5, 0, 3, 4]


def whole(plan, dense_KBS):
    """Scores `[B, S]` of the plan's first mask and the mean of its pairs, by the pure function."""
    K, _, _ = plan.shape
    scores = []
    for k in range(1, K, 2):
        pair_BS = dense_KBS[k] + dense_KBS[k + 1]
        t_B = plan.p_mask_KB[k].double()
        scores.append(coupled_scores(dense_KBS[0], pair_BS, plan.scored[k], t_B))
    return sum(scores) / len(scores)


@pytest.mark.parametrize("samples", [3, 5])
@pytest.mark.parametrize("sequences", [1, 3])
def test_contributions_of_any_cut_of_whole_sequences_sum_to_the_loss(samples, sequences):
    plan = plan_of(LENGTHS, law="coupled", samples=samples)
    logp_N = loops.row_logps(plan)
    dense_KBS = torch.zeros(plan.shape, dtype=F64).masked_scatter(plan.scored, logp_N)
    g = torch.Generator().manual_seed(5)
    old, ref = (loops.at_positions(plan, logp_N) + 0.2 * torch.randn(4, samples, plan.shape[2], generator=g) for _ in range(2))
    batch = Batch({"advantages": ADVANTAGES}, {"old_logp": old, "ref_logp": ref})
    objective = coupled_grpo_objective(epsilon=0.3, beta=0.1)
    objective.check(batch, plan)
    total = loops.summed_over_cuts(objective, logp_N, plan, batch, sequences=sequences)
    clean = [tensor.transpose(0, 1).masked_fill(~plan.scored, 0.0) for tensor in (old, ref)]
    score, old_score, ref_score = (whole(plan, dense) for dense in (dense_KBS, *clean))
    want = coupled_grpo(score, old_score, ref_score, ADVANTAGES, plan.completion_mask_BS, epsilon=0.3, beta=0.1)
    # the plan keeps its weights in fp32
    loops.same(total / sum(LENGTHS), want, logp_N, 1e-6)


def test_on_policy_old_is_the_policy_itself():
    plan = plan_of(LENGTHS, law="coupled", samples=3)
    logp_N = loops.row_logps(plan)
    free = coupled_grpo_objective(beta=0.0)
    batch = Batch({"advantages": ADVANTAGES})
    assert free.is_on_policy(batch)
    assert (free.coupling, free.on_policy_coupling, free.denominator) == ("sequence", "none", "tokens")
    given_old = Batch(batch.per_sequence, {"old_logp": loops.at_positions(plan, logp_N)})
    loops.same(free.contributions(logp_N, plan, batch), free.contributions(logp_N, plan, given_old), logp_N)
    with_kl = coupled_grpo_objective()
    assert with_kl.on_policy_coupling == "sequence"
    with pytest.raises(ValueError, match="ref_logp"):
        with_kl.check(batch, plan)


def test_the_recipe_says_what_the_paper_used():
    assert (RECIPE.name, RECIPE.arxiv, RECIPE.law, RECIPE.samples) == ("coupled_grpo", "2506.20639", "coupled", 3)
    assert (RECIPE.advantage, RECIPE.status) == ("loo", "verified against the code")
    assert (RECIPE.needs_old, RECIPE.needs_reference, RECIPE.needs_trajectory) == (True, True, False)
    assert coupled_grpo_objective(**RECIPE.defaults).name == "coupled_grpo"
