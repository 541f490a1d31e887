"""EGSPO and EGSPO-SA against loops over sequences and steps: surrogate, exact KL, stepwise returns, cuts of a trace, errors."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllm_kernels.accumulation.objective import Batch
from dllm_kernels.objectives import group_advantages
from dllm_kernels.objectives.egspo import RECIPE, RECIPE_SA, egspo, egspo_objective, egspo_sa_objective, stepwise_returns
from tests.objectives import loops
from tests.objectives.loops import F64
from tests.plans import plan_of

ADVANTAGES = torch.tensor([1.0, -0.5, 0.0, -2.0], dtype=F64)


def by_loops(step, old, ref, advantages, tokens, low=0.2, high=0.5, beta=0.04):
    total, gradient = 0.0, []
    for s, o, r, a in zip(step.tolist(), old.tolist(), ref.tolist(), advantages.tolist(), strict=True):
        value, slope = loops.token_term(s, o, r, a, low, high, beta)
        total += value / len(step) / tokens
        gradient.append(slope / len(step) / tokens)
    return total, gradient


@given(
    B=st.integers(1, 8),
    seed=st.integers(0, 99),
    low=st.floats(0, 0.9),
    high=st.floats(0, 2),
    beta=st.floats(0, 2),
    tokens=st.sampled_from([1, 2, 2.5]),
)
def test_loss_and_gradient_equal_a_loop_over_sequences(B, seed, low, high, beta, tokens):
    step, old, ref = loops.logps(B, seed=seed)
    advantages = torch.randn(B, generator=torch.Generator().manual_seed(seed), dtype=F64)
    loss = egspo(step, old, ref, advantages, epsilon_low=low, epsilon_high=high, beta=beta, tokens_per_step=tokens)
    loops.check(loss, step, *by_loops(step, old, ref, advantages, tokens, low, high, beta))


def test_the_defaults_are_those_of_the_code():
    step, old, ref = loops.logps(4)
    loss = egspo(step, old, ref, ADVANTAGES, tokens_per_step=2)
    loops.check(loss, step, *by_loops(step, old, ref, ADVANTAGES, 2))


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "share"),
    [
        (1.4, 1.0, 1.4, 1.0),
        (1.6, 1.0, 1.5, 0.0),
        (0.1, 1.0, 0.1, 1.0),
        (0.9, -1.0, 0.9, 1.0),
        (0.7, -1.0, 0.8, 0.0),
        (3.0, -1.0, 3.0, 1.0),
    ],
)
def test_the_two_clips_bind_where_they_should(ratio, advantage, value, share):
    step = torch.tensor([math.log(ratio)], dtype=F64, requires_grad=True)
    loss = egspo(step, torch.zeros(1, dtype=F64), None, torch.tensor([advantage], dtype=F64), beta=0.0, tokens_per_step=1)
    loops.check(loss, step, -advantage * value, [-advantage * ratio * share])


def test_on_policy_the_gradient_is_minus_the_advantage_even_with_epsilon_0():
    step = torch.tensor([-1.0, -2.0, -3.0, -4.0], dtype=F64, requires_grad=True)
    loss = egspo(step, step, step, ADVANTAGES, epsilon_low=0.0, epsilon_high=0.0, beta=3.0, tokens_per_step=2)
    loops.check(loss, step, -float(ADVANTAGES.mean()) / 2, -ADVANTAGES / 8)


def test_an_exact_kl_takes_the_place_of_k3_and_keeps_its_gradient():
    step, old, ref = loops.logps(4)
    logits = torch.randn(4, 2, 7, generator=torch.Generator().manual_seed(2), dtype=F64, requires_grad=True)
    ref_logp = torch.randn(4, 2, 7, generator=torch.Generator().manual_seed(3), dtype=F64).log_softmax(-1)
    logp = logits.log_softmax(-1)
    kl = (logp.exp() * (logp - ref_logp)).sum((-1, -2))
    loss = egspo(step, old, None, ADVANTAGES, beta=0.3, tokens_per_step=2, kl_B=kl)
    free, _ = by_loops(step, old, ref, ADVANTAGES, 2, beta=0.0)
    assert loss.item() == pytest.approx(free + 0.3 * kl.mean().item() / 2, rel=1e-12)
    gradient, want = (torch.autograd.grad(s, logits, retain_graph=True)[0] for s in (loss, 0.3 * kl.sum() / 8))
    torch.testing.assert_close(gradient, want)


def test_finite_differences_agree():
    step, old, ref = loops.logps(6, seed=1)
    with torch.no_grad():
        step.add_(0.013)
    advantages = torch.randn(6, generator=torch.Generator().manual_seed(1), dtype=F64)
    assert torch.autograd.gradcheck(lambda x: egspo(x, old, ref, advantages, tokens_per_step=2), step)


def test_a_policy_far_off_stays_finite():
    step = torch.tensor([1e4, 1e4, -1e4, -1e4], requires_grad=True)
    zero = torch.zeros(4)
    loss = egspo(step, zero, zero, torch.tensor([1.0, -1.0, 1.0, -1.0]), tokens_per_step=2)
    (gradient,) = torch.autograd.grad(loss, step)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()


def test_everything_but_the_policy_is_detached():
    step, old, ref = loops.logps(4)
    others = [tensor.clone().requires_grad_() for tensor in (old, ref, ADVANTAGES)]
    egspo(step, *others, tokens_per_step=2).backward()
    assert step.grad is not None
    assert all(tensor.grad is None for tensor in others)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"step_logp_B": torch.zeros(4, 1)}, ["step_logp_B", "4, 1"]),
        ({"step_logp_B": torch.zeros(0)}, ["step_logp_B", "0"]),
        ({"old_step_logp_B": torch.zeros(3)}, ["old_step_logp_B", "3"]),
        ({"ref_step_logp_B": torch.zeros(3)}, ["ref_step_logp_B", "3"]),
        ({"ref_step_logp_B": None}, ["ref_step_logp_B", "beta", "0.04"]),
        ({"advantages_B": torch.zeros(3)}, ["advantages_B", "3"]),
        ({"advantages_B": torch.full((4,), math.nan)}, ["advantages_B", "nan"]),
        ({"kl_B": torch.zeros(3)}, ["kl_B", "3"]),
        ({"epsilon_low": 1.5}, ["epsilon_low", "1.5"]),
        ({"epsilon_high": -0.5}, ["epsilon_high", "-0.5"]),
        ({"beta": -0.5}, ["beta", "-0.5"]),
        ({"tokens_per_step": 0}, ["tokens_per_step", "0"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_an_error_names_the_argument(changes, words):
    arguments = {name: torch.zeros(4) for name in ("step_logp_B", "old_step_logp_B", "ref_step_logp_B")}
    loops.refuses(egspo, arguments | {"advantages_B": torch.ones(4), "tokens_per_step": 2}, changes, words)


# --- returns ----------------------------------------------------------------------------------------------------------


@given(
    rewards=st.lists(st.floats(-3, 3), min_size=1, max_size=5),
    J=st.integers(0, 3),
    lam=st.floats(0, 3),
    normalize=st.booleans(),
    seed=st.integers(0, 9),
)
def test_returns_equal_a_loop(rewards, J, lam, normalize, seed):
    shape = (len(rewards), J) if J else (len(rewards),)
    steps = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
    got = stepwise_returns(torch.tensor(rewards, dtype=F64), steps, lam=lam, normalize=normalize)
    assert got.shape == steps.shape
    divisor = 1 + lam if normalize else 1
    for b, reward in enumerate(rewards):
        for value, step in zip(got[b].reshape(-1).tolist(), steps[b].reshape(-1).tolist(), strict=True):
            assert value == pytest.approx((reward + lam * (reward - step)) / divisor, abs=1e-12)


def test_without_lambda_the_returns_are_the_rewards_and_the_defaults_are_those_of_the_paper():
    rewards, steps = torch.tensor([1.0, -2.0]), torch.tensor([[5.0, 1.0], [0.0, -2.0]])
    torch.testing.assert_close(stepwise_returns(rewards, steps, lam=0.0), rewards[:, None].expand(2, 2))
    torch.testing.assert_close(stepwise_returns(rewards, steps), stepwise_returns(rewards, steps, lam=0.5, normalize=True))


def test_advantages_are_centred_by_group_and_rank():
    rewards = torch.tensor([1.0, 0.0, 0.5, 0.5, 1.0], dtype=F64)
    steps = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    groups = [7, 7, 9, 9, 7]
    got = group_advantages(stepwise_returns(rewards, steps), torch.tensor(groups), "mean")
    for k in range(3):
        returns = [(float(rewards[b]) + 0.5 * (float(rewards[b]) - float(steps[b, k]))) / 1.5 for b in range(5)]
        for b in range(5):
            peers = [returns[i] for i in range(5) if groups[i] == groups[b]]
            assert float(got[b, k]) == pytest.approx(returns[b] - sum(peers) / len(peers), abs=1e-12)


def test_returns_are_detached():
    rewards = torch.ones(2, requires_grad=True)
    assert not stepwise_returns(rewards, torch.ones(2, requires_grad=True)).requires_grad


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rewards_B": torch.zeros(4, 1)}, ["rewards_B", "4, 1"]),
        ({"rewards_B": torch.zeros(4, dtype=torch.int64)}, ["rewards_B", "int64"]),
        ({"rewards_B": torch.full((4,), math.nan)}, ["rewards_B", "nan"]),
        ({"step_rewards": torch.zeros(3)}, ["step_rewards", "3"]),
        ({"step_rewards": torch.zeros(3, 2)}, ["step_rewards", "3, 2"]),
        ({"step_rewards": torch.zeros(4, 2, 1)}, ["step_rewards", "4, 2, 1"]),
        ({"step_rewards": [0.0] * 4}, ["step_rewards", "list"]),
        ({"step_rewards": torch.full((4,), math.inf)}, ["step_rewards", "inf"]),
        ({"lam": -0.5}, ["lam", "-0.5"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_an_error_of_the_returns_names_the_argument(changes, words):
    loops.refuses(stepwise_returns, {"rewards_B": torch.zeros(4), "step_rewards": torch.zeros(4, 2)}, changes, words)


# --- in the engine ----------------------------------------------------------------------------------------------------

LENGTHS = [5, 1, 3, 4]


def chosen_steps():
    """Three steps of each sequence in any order; some sequences have fewer."""
    plan = plan_of(LENGTHS, law="trace", samples=None, steps_BJ=torch.tensor([[4, 0, 2], [0, -1, -1], [1, 2, -1], [3, 0, 1]]))
    logp_N = loops.row_logps(plan)
    return plan, logp_N


def step_scores(plan, logp_N):
    """Joint log-probs `[B, K]` by a loop over rows, differentiable; and which (sequence, step) there are."""
    K, B, _ = plan.shape
    scores, there = [[torch.zeros((), dtype=F64) for _ in range(K)] for _ in range(B)], set()
    for n, (b, k) in enumerate(zip(plan.rows.sequence.tolist(), plan.rows.sample.tolist(), strict=True)):
        scores[b][k] = scores[b][k] + logp_N[n]
        there.add((b, k))
    return scores, sorted(there)


@pytest.mark.parametrize("stepwise", [False, True])
@pytest.mark.parametrize("cut", [(1, 1), (None, 3), (2, 2)], ids=str)
def test_contributions_of_any_cut_sum_to_the_mean_over_the_steps_there_are(stepwise, cut):
    plan, logp_N = chosen_steps()
    g = torch.Generator().manual_seed(5)
    elbo_BK = plan.elbo(logp_N).detach()
    old, ref = (elbo_BK + 0.4 * torch.randn(4, 3, generator=g, dtype=F64) for _ in range(2))
    entries = {"old_sample_elbo": old, "ref_sample_elbo": ref}
    advantages = torch.randn(4, 3, generator=g, dtype=F64) if stepwise else ADVANTAGES[:, None].expand(4, 3)
    if stepwise:
        objective, batch = egspo_sa_objective(tokens_per_step=2), Batch({}, entries | {"step_advantages": advantages})
    else:
        objective, batch = egspo_objective(tokens_per_step=2), Batch({"advantages": ADVANTAGES}, entries)
    objective.check(batch, plan)
    total = loops.summed_over_cuts(objective, logp_N, plan, batch, samples=cut[0], sequences=cut[1])
    scores, there = step_scores(plan, logp_N)
    assert len(there) == 7  # a step may be absent, or commit nothing
    want = egspo(
        torch.stack([scores[b][k] for b, k in there]),
        *(torch.stack([tensor[b, k] for b, k in there]) for tensor in (old, ref, advantages)),
        tokens_per_step=2,
    )
    assert int((plan.counts > 0).sum()) == len(there)
    loops.same(total / len(there), want, logp_N)


def test_on_policy_old_is_the_policy_itself():
    plan, logp_N = chosen_steps()
    objective = egspo_objective(beta=0.0, tokens_per_step=2)
    batch = Batch({"advantages": ADVANTAGES})
    objective.check(batch, plan)
    given_old = Batch(batch.per_sequence, {"old_sample_elbo": plan.elbo(logp_N).detach()})
    loops.same(objective.contributions(logp_N, plan, batch), objective.contributions(logp_N, plan, given_old), logp_N)


def test_what_they_declare():
    for factory, recipe, name in ((egspo_objective, RECIPE, "egspo"), (egspo_sa_objective, RECIPE_SA, "egspo_sa")):
        objective = factory(**recipe.defaults)
        assert objective.name == recipe.name == name
        assert (objective.coupling, objective.on_policy_coupling, objective.denominator) == ("sample", "sample", "steps")
        assert factory(beta=0.0, tokens_per_step=2).on_policy_coupling == "none"
        assert (recipe.arxiv, recipe.law, recipe.status) == ("2603.12554", "trace", "verified against the code")
        assert (recipe.needs_old, recipe.needs_reference, recipe.needs_trajectory) == (True, True, True)
    plan, _ = chosen_steps()
    with pytest.raises(ValueError, match="step_advantages"):
        egspo_sa_objective(beta=0.0, tokens_per_step=2).check(Batch(), plan)
    with pytest.raises(ValueError, match="tokens_per_step"):
        egspo_objective(tokens_per_step=-1)
