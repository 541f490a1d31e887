"""d2 against loops over tokens: one segment, all segments, cuts, errors. Clipping itself is tested with diffu-GRPO."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllm_kernels import make_mask_plan
from dllm_kernels.accumulation.objective import Batch
from dllm_kernels.objectives.d2 import RECIPE, d2, d2_objective
from dllm_kernels.objectives.diffu_grpo import diffu_grpo
from tests.objectives import loops
from tests.objectives.loops import F64, ragged
from tests.plans import plan_of

ADVANTAGES = torch.tensor([1.0, -0.5, 0.0, -2.0], dtype=F64)


def by_loops(logp, old, ref, advantages, mask, segment, segments, epsilon=0.5, beta=0.04):
    B, L = logp.shape
    logp = logp.detach()
    count = max(1, sum(map(sum, mask.tolist())))
    total, gradient = 0.0, [[0.0] * L for _ in range(B)]
    for b in range(B):
        for position in range(L):
            at = b, position
            if mask[at] and segment[at]:
                term = loops.token_term(
                    float(logp[at]), float(old[at]), float(ref[at]), float(advantages[b]), epsilon, epsilon, beta
                )
                total += segments * term[0] / count
                gradient[b][position] = segments * term[1] / count
    return total, gradient


@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    seed=st.integers(0, 99),
    segments=st.integers(1, 8),
    epsilon=st.floats(0, 0.9),
    beta=st.floats(0, 2),
)
def test_loss_and_gradient_of_a_segment_equal_loops_over_tokens(lengths, seed, segments, epsilon, beta):
    logp, old, ref = loops.logps(len(lengths), 5, seed=seed)
    g = torch.Generator().manual_seed(seed)
    advantages = torch.randn(len(lengths), generator=g, dtype=F64)
    mask, segment = ragged(lengths, 5), torch.rand(len(lengths), 5, generator=g) < 0.5
    loss = d2(logp, old, ref, advantages, mask, segment, segments=segments, epsilon=epsilon, beta=beta)
    loops.check(loss, logp, *by_loops(logp, old, ref, advantages, mask, segment, segments, epsilon, beta))


def test_the_mean_over_the_segments_is_the_token_mean_over_the_completion():
    logp, old, ref = loops.logps(4, 6)
    mask = ragged([6, 3, 2, 0], 6)
    segment_of = torch.arange(6) % 3
    losses = [d2(logp, old, ref, ADVANTAGES, mask, (segment_of == k).expand(4, 6), segments=3) for k in range(3)]
    loops.same(sum(losses) / 3, diffu_grpo(logp, old, ref, ADVANTAGES, mask), logp)


def test_an_empty_segment_is_a_loss_of_0_with_gradient_0():
    logp, old, ref = loops.logps(4, 6)
    loss = d2(logp, old, ref, ADVANTAGES, ragged([6] * 4, 6), ragged([0] * 4, 6), segments=8)
    loops.check(loss, logp, 0.0, [[0.0] * 6] * 4)


def test_on_policy_the_gradient_is_minus_the_advantage_even_with_epsilon_0():
    logp = torch.tensor([[-1.0, -2.0]] * 4, dtype=F64, requires_grad=True)
    loss = d2(logp, logp, None, ADVANTAGES, ragged([2] * 4, 2), ragged([1] * 4, 2), segments=2, epsilon=0.0, beta=0.0)
    want = torch.stack([-ADVANTAGES / 4, torch.zeros(4, dtype=F64)], 1)
    loops.check(loss, logp, -float(ADVANTAGES.mean()), want)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_scored_may_hold_anything(bad):
    logp, old, ref = loops.logps(4, 6)
    mask, segment = ragged([6, 3, 2, 0], 6), ragged([2, 6, 0, 1], 6)
    want = by_loops(logp, old, ref, ADVANTAGES, mask, segment, 4)
    policy = logp.detach().masked_fill(~(mask & segment), bad).requires_grad_()
    padded = [tensor.masked_fill(~mask, bad) for tensor in (old, ref)]
    loops.check(d2(policy, *padded, ADVANTAGES, mask, segment, segments=4), policy, *want)


def test_finite_differences_agree():
    logp, old, ref = loops.logps(4, 3, seed=1)
    with torch.no_grad():
        logp.add_(0.013)
    masks = ragged([3, 3, 2, 1], 3), ragged([1, 3, 2, 0], 3)
    assert torch.autograd.gradcheck(lambda x: d2(x, old, ref, ADVANTAGES, *masks, segments=2, epsilon=0.3), logp)


def test_everything_but_the_policy_is_detached():
    logp, old, ref = loops.logps(4, 6)
    others = [tensor.clone().requires_grad_() for tensor in (old, ref, ADVANTAGES)]
    d2(logp, *others, ragged([6] * 4, 6), ragged([3] * 4, 6), segments=2).backward()
    assert logp.grad is not None
    assert all(tensor.grad is None for tensor in others)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"logp_BL": torch.zeros(4)}, ["logp_BL", "4"]),
        ({"old_logp_BL": torch.zeros(4, 2)}, ["old_logp_BL", "4, 2"]),
        ({"ref_logp_BL": None}, ["ref_logp_BL", "beta", "0.04"]),
        ({"advantages_B": torch.zeros(3)}, ["advantages_B", "3"]),
        ({"completion_mask_BL": torch.ones(4, 3)}, ["completion_mask_BL", "float32"]),
        ({"segment_mask_BL": torch.ones(4, 3)}, ["segment_mask_BL", "float32"]),
        ({"segment_mask_BL": ragged([1] * 3, 3)}, ["segment_mask_BL", "3, 3"]),
        ({"segments": 0}, ["segments", "0"]),
        ({"segments": 2.0}, ["segments", "float"]),
        ({"epsilon": -0.1}, ["epsilon", "-0.1"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_an_error_names_the_argument(changes, words):
    arguments = {name: torch.zeros(4, 3) for name in ("logp_BL", "old_logp_BL", "ref_logp_BL")}
    arguments |= {"advantages_B": torch.ones(4), "completion_mask_BL": ragged([3] * 4, 3)}
    loops.refuses(d2, arguments | {"segment_mask_BL": ragged([3] * 4, 3), "segments": 2}, changes, words)


# --- in the engine ----------------------------------------------------------------------------------------------------

LENGTHS = [5, 0, 3, 4]


@pytest.mark.parametrize("cut", [(1, 1), (None, 3), (2, 2)], ids=str)
def test_contributions_of_any_cut_sum_to_the_mean_over_the_segments(cut):
    plan = plan_of(LENGTHS, law="segments", segments=3)
    logp_N = loops.row_logps(plan)
    g = torch.Generator().manual_seed(5)
    dense = loops.at_positions(plan, logp_N)
    old, ref = (dense + 0.4 * torch.randn(dense.shape, generator=g, dtype=F64) for _ in range(2))
    batch = Batch({"advantages": ADVANTAGES}, {"old_logp": old, "ref_logp": ref})
    objective = d2_objective(epsilon=0.3, beta=0.1)
    objective.check(batch, plan)
    total = loops.summed_over_cuts(objective, logp_N, plan, batch, samples=cut[0], sequences=cut[1])
    dense_KBS = torch.zeros(plan.shape, dtype=F64).masked_scatter(plan.scored, logp_N)
    masks = plan.completion_mask_BS, plan.scored
    losses = [
        d2(dense_KBS[k], old[:, k], ref[:, k], ADVANTAGES, masks[0], masks[1][k], segments=3, epsilon=0.3, beta=0.1)
        for k in range(3)
    ]
    loops.same(total / sum(LENGTHS), sum(losses) / 3, logp_N)


def test_what_it_declares():
    objective = d2_objective()
    assert (objective.name, objective.coupling, objective.on_policy_coupling, objective.denominator) == (
        "d2",
        "token",
        "token",
        "tokens",
    )
    assert d2_objective(beta=0.0).on_policy_coupling == "none"
    assert (RECIPE.name, RECIPE.arxiv, RECIPE.law, RECIPE.law_options) == ("d2", "2509.21474", "segments", {"segments": 8})
    assert (RECIPE.status, RECIPE.needs_trajectory, RECIPE.advantage) == ("verified against the code", True, "mean")
    assert d2_objective(**RECIPE.defaults).per_token == ("old_logp", "ref_logp")


@pytest.mark.parametrize(("total", "segments"), [(7, 3), (16, 5), (10, 4), (8, 8), (9, 2)])
def test_a_segment_begins_where_the_code_has_it_also_where_the_parts_are_uneven(total, segments):
    """By going through the steps as a rollout does: the next segment begins once int(k T / N) steps are done."""
    boundaries, of_step = [k * total // segments for k in range(1, segments)], []
    for step in range(total):
        of_step.append(sum(step >= boundary for boundary in boundaries))
    ids, completion = torch.arange(total + 1)[None], torch.arange(total + 1)[None] > 0
    made = {"samples": None, "seed": 0, "sequence_ids": torch.tensor([1]), "mask_id": 99}
    step_map = torch.arange(-1, total)[None]
    plan = make_mask_plan(ids, completion, law="segments", segments=segments, step_map_BS=step_map, **made)
    assert plan.scored[:, 0, 1:].long().argmax(0).tolist() == of_step
    assert torch.equal(plan.scored.sum(0), completion.long())


def test_prompt_tokens_are_hidden_with_15_percent_anew_in_every_iteration_as_published():
    ids = torch.arange(600).expand(2, -1)
    completion = ids >= 596
    made = {"samples": None, "seed": 0, "sequence_ids": torch.tensor([1, 2]), "mask_id": 999, "segments": 2}
    step_map = torch.where(completion, ids - 596, -1)
    plans = [
        make_mask_plan(ids, completion, law="segments", step_map_BS=step_map, iteration=iteration, **made) for iteration in (0, 1)
    ]
    share = plans[0].masked[:, :, :596].double().mean()
    assert abs(float(share) - 0.15) < 5 * (0.15 * 0.85 / (4 * 596)) ** 0.5
    assert not torch.equal(plans[0].masked[:, :, :596], plans[1].masked[:, :, :596])
    assert torch.equal(plans[0].masked[:, :, 596:], plans[1].masked[:, :, 596:])
