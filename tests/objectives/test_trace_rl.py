"""TraceRL against loops over rows and tokens: both modes, edges, cuts of a trace, errors."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllm_kernels.accumulation.objective import Batch
from dllm_kernels.objectives.trace_rl import RECIPE, trace_rl, trace_rl_objective
from tests.objectives import loops
from tests.objectives.loops import F64, ragged
from tests.plans import plan_of

ADVANTAGES = torch.tensor([1.0, -0.5, 0.0, -2.0], dtype=F64)


def by_loops(logp, old, advantages, mask, epsilon=0.2, beta=0.01, mode="llada", window=None):
    B, L = logp.shape
    logp = logp.detach()
    total, gradient = 0.0, [[0.0] * L for _ in range(B)]
    for b in range(B):
        tokens = [position for position in range(L) if mask[b, position]]
        for position in tokens:
            delta = float(logp[b, position]) - float(old[b, position])
            inside = mode == "llada" or -10 <= delta <= 10
            beyond = delta  # the code bounds the exponents, not the KL's linear term
            delta = delta if mode == "llada" else min(max(delta, -10.0), 10.0)
            beyond -= delta
            a = float(advantages[b]) if advantages.dim() == 1 else float(advantages[b, position])
            value, slope = loops.surrogate(delta, a, epsilon, epsilon)
            kl, kl_slope = loops.k3(delta)
            if mode == "llada":
                total += (-value / len(tokens) + beta * kl) / B
                gradient[b][position] = (-slope / len(tokens) + beta * kl_slope) / B
            else:
                total += (-value + beta * (kl + beyond)) / (window or L) / B
                slope = -slope + beta * kl_slope if inside else beta
                gradient[b][position] = slope / (window or L) / B
    return total, gradient


@given(
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    seed=st.integers(0, 99),
    epsilon=st.floats(0, 0.9),
    beta=st.floats(0, 2),
    mode=st.sampled_from(["llada", "sdar"]),
)
def test_loss_and_gradient_equal_loops_over_rows_and_tokens(counts, seed, epsilon, beta, mode):
    logp, old, _ = loops.logps(len(counts), 5, seed=seed)
    advantages = torch.randn(len(counts), generator=torch.Generator().manual_seed(seed), dtype=F64)
    mask = ragged(counts, 5).flip(-1)
    loss = trace_rl(logp, old, advantages, mask, epsilon=epsilon, beta=beta, mode=mode)
    loops.check(loss, logp, *by_loops(logp, old, advantages, mask, epsilon, beta, mode))


def test_the_defaults_are_those_of_the_code():
    logp, old, _ = loops.logps(4, 6)
    mask = ragged([6, 3, 2, 0], 6)
    loops.check(trace_rl(logp, old, ADVANTAGES, mask), logp, *by_loops(logp, old, ADVANTAGES, mask))


def test_sdar_takes_an_advantage_per_token():
    logp, old, _ = loops.logps(4, 6)
    mask = ragged([6, 3, 2, 0], 6)
    advantages = torch.randn(4, 6, generator=torch.Generator().manual_seed(1), dtype=F64)
    want = by_loops(logp, old, advantages, mask, mode="sdar")
    filled = advantages.masked_fill(~mask, math.nan)
    loops.check(trace_rl(logp, old, filled, mask, mode="sdar"), logp, *want)
    with pytest.raises(ValueError, match="advantages_B"):
        trace_rl(logp, old, advantages, mask)


def test_sdar_clamps_the_difference_to_10():
    logp = torch.tensor([[12.0, 9.0, -12.0, -9.0]], dtype=F64, requires_grad=True)
    old, mask = torch.zeros(1, 4, dtype=F64), ragged([4], 4)
    for advantage in (1.0, -1.0):
        a = torch.tensor([advantage], dtype=F64)
        loss = trace_rl(logp, old, a, mask, mode="sdar")
        loops.check(loss, logp, *by_loops(logp, old, a, mask, mode="sdar"))
        (gradient,) = torch.autograd.grad(trace_rl(logp, old, a, mask, mode="sdar"), logp)
        assert gradient[0, 0] == gradient[0, 2] == pytest.approx(0.01 / 4)  # of the KL alone
        assert gradient[0, 1] != 0


def test_the_two_modes_weigh_the_terms_as_published():
    """llada: surrogate a mean over the step, KL a sum. sdar: both over the window."""
    logp = torch.full((1, 10), -1.0, dtype=F64)
    old, mask, a = logp - 0.1, ragged([4], 10), torch.tensor([1.0], dtype=F64)
    kl = math.exp(-0.1) - 1 + 0.1
    assert trace_rl(logp, old, a, mask, beta=1.0).item() == pytest.approx(-math.exp(0.1) + 4 * kl)
    assert trace_rl(logp, old, a, mask, beta=1.0, mode="sdar").item() == pytest.approx(4 * (-math.exp(0.1) + kl) / 10)


@pytest.mark.parametrize("mode", ["llada", "sdar"])
def test_on_policy_the_gradient_is_minus_the_advantage_even_with_epsilon_0_and_any_kl(mode):
    logp = torch.tensor([[-1.0, -2.0]] * 4, dtype=F64, requires_grad=True)
    loss = trace_rl(logp, logp, ADVANTAGES, ragged([2] * 4, 2), epsilon=0.0, beta=5.0, mode=mode)
    loops.check(loss, logp, -float(ADVANTAGES.mean()), (-ADVANTAGES[:, None] / 8).expand(4, 2))


@pytest.mark.parametrize("mode", ["llada", "sdar"])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_scored_may_hold_anything(bad, mode):
    logp, old, _ = loops.logps(4, 6)
    mask = ragged([6, 3, 2, 0], 6)
    want = by_loops(logp, old, ADVANTAGES, mask, mode=mode)
    filled = [tensor.detach().masked_fill(~mask, bad) for tensor in (logp, old)]
    filled[0].requires_grad_()
    loops.check(trace_rl(*filled, ADVANTAGES, mask, mode=mode), filled[0], *want)


@pytest.mark.parametrize("mode", ["llada", "sdar"])
def test_no_token_at_all_is_a_loss_of_0_with_gradient_0(mode):
    logp, old, _ = loops.logps(4, 6)
    loops.check(trace_rl(logp, old, ADVANTAGES, ragged([0] * 4, 6), mode=mode), logp, 0.0, [[0.0] * 6] * 4)


@pytest.mark.parametrize("mode", ["llada", "sdar"])
def test_finite_differences_agree(mode):
    logp, old, _ = loops.logps(4, 3, seed=1)
    with torch.no_grad():
        logp.add_(0.013)
    mask = ragged([3, 2, 1, 3], 3)
    assert torch.autograd.gradcheck(lambda x: trace_rl(x, old, ADVANTAGES, mask, beta=0.3, mode=mode), logp)


def test_everything_but_the_policy_is_detached():
    logp, old, _ = loops.logps(4, 6)
    others = [tensor.clone().requires_grad_() for tensor in (old, ADVANTAGES)]
    trace_rl(logp, *others, ragged([6] * 4, 6)).backward()
    assert logp.grad is not None
    assert all(tensor.grad is None for tensor in others)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"logp_BL": torch.zeros(4)}, ["logp_BL", "4"]),
        ({"old_logp_BL": torch.zeros(4, 2)}, ["old_logp_BL", "4, 2"]),
        ({"old_logp_BL": torch.full((4, 3), math.inf)}, ["old_logp_BL", "inf"]),
        ({"advantages_B": torch.zeros(3)}, ["advantages_B", "3"]),
        ({"advantages_B": [1.0] * 4, "mode": "sdar"}, ["advantages_B", "list"]),
        ({"step_mask_BL": torch.ones(4, 3)}, ["step_mask_BL", "float32"]),
        ({"step_mask_BL": ragged([1] * 3, 3)}, ["step_mask_BL", "3, 3"]),
        ({"mode": "dream"}, ["mode", "dream", "sdar"]),
        ({"epsilon": 2.0}, ["epsilon", "2"]),
        ({"beta": -0.1}, ["beta", "-0.1"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_an_error_names_the_argument(changes, words):
    arguments = {"logp_BL": torch.zeros(4, 3), "old_logp_BL": torch.zeros(4, 3), "advantages_B": torch.ones(4)}
    loops.refuses(trace_rl, arguments | {"step_mask_BL": ragged([3] * 4, 3)}, changes, words)


# --- in the engine ----------------------------------------------------------------------------------------------------

LENGTHS = [5, 0, 3, 4]


@pytest.mark.parametrize("mode", ["llada", "sdar"])
@pytest.mark.parametrize("shrink", [1, 2])
@pytest.mark.parametrize("cut", [(1, 1), (None, 3), (2, 2)], ids=str)
def test_contributions_of_any_cut_sum_to_the_mean_over_the_rows_that_have_a_token(mode, shrink, cut):
    plan = plan_of(LENGTHS, law="trace", samples=None, shrink=shrink)
    logp_N = loops.row_logps(plan)
    dense = loops.at_positions(plan, logp_N)
    old = dense + 0.4 * torch.randn(dense.shape, generator=torch.Generator().manual_seed(5), dtype=F64)
    batch = Batch({"advantages": ADVANTAGES}, {"old_logp": old})
    objective = trace_rl_objective(beta=0.3, mode=mode, window=plan.shape[2] if mode == "sdar" else None)
    objective.check(batch, plan)
    total = loops.summed_over_cuts(objective, logp_N, plan, batch, samples=cut[0], sequences=cut[1])
    dense_KBS = torch.zeros(plan.shape, dtype=F64).masked_scatter(plan.scored, logp_N)
    there = [(k, b) for k in range(plan.shape[0]) for b in range(4) if plan.counts[k, b] > 0]
    assert len(there) < plan.counts.numel()  # the trace is ragged
    rows = [torch.stack(list(column)) for column in zip(*((dense_KBS[k, b], old[b, k]) for k, b in there), strict=True)]
    advantages = torch.stack([ADVANTAGES[b] for _, b in there])
    masks = torch.stack([plan.scored[k, b] for k, b in there])
    want = trace_rl(*rows, advantages, masks, beta=0.3, mode=mode)
    loops.same(total / int((plan.counts > 0).sum()), want, logp_N)


def test_what_it_declares():
    objective = trace_rl_objective()
    assert (objective.name, objective.coupling, objective.on_policy_coupling, objective.denominator) == (
        "trace_rl",
        "token",
        "none",
        "steps",
    )
    assert (RECIPE.name, RECIPE.arxiv, RECIPE.law, RECIPE.law_options) == ("trace_rl", "2509.06949", "trace", {"shrink": 8})
    assert (RECIPE.status, RECIPE.advantage) == ("verified against the code", "population_std")
    assert (RECIPE.needs_old, RECIPE.needs_reference, RECIPE.needs_trajectory) == (True, False, True)
    assert trace_rl_objective(**RECIPE.defaults).per_token == ("old_logp",)


@pytest.mark.parametrize("options", [{"mode": "sdar"}, {"window": 4}, {"mode": "sdar", "window": 0}], ids=str)
def test_the_window_is_sdar_s(options):
    with pytest.raises(ValueError, match="window"):
        trace_rl_objective(**options)


def test_on_policy_old_is_the_policy_itself():
    plan = plan_of(LENGTHS, law="trace", samples=None)
    logp_N = loops.row_logps(plan)
    objective = trace_rl_objective()
    batch = Batch({"advantages": ADVANTAGES})
    given_old = Batch(batch.per_sequence, {"old_logp": loops.at_positions(plan, logp_N)})
    assert objective.is_on_policy(batch)
    loops.same(objective.contributions(logp_N, plan, batch), objective.contributions(logp_N, plan, given_old), logp_N)
