"""CJ-GRPO: against loops over tokens, and its states: every event of a rollout, edits included, in the state before it."""

import math

import pytest
import torch

from dllm_kernels import Rollout, accumulate, generate, trajectory_rows
from dllm_kernels.accumulation.objective import Batch
from dllm_kernels.objectives.cj_grpo import RECIPE, cj_grpo
from dllm_kernels.rollouts.events import Events
from tests.objectives import loops
from tests.objectives.loops import F64, ragged
from tests.tiny import eurobert

ADVANTAGES = torch.tensor([1.0, -2.0, 0.0, 0.5], dtype=F64)


@pytest.mark.parametrize(("epsilon", "beta"), [(0.5, 0.04), (0.2, 0.0), (0.0, 1.0)])
def test_equals_loops_over_tokens(epsilon, beta):
    logp, old, ref = loops.logps(4, 5)
    lengths, total, gradient = [5, 2, 3, 0], 0.0, [[0.0] * 5 for _ in range(4)]
    for b, length in enumerate(lengths):
        for token in range(length):
            scores = (float(x[b, token]) for x in (logp, old, ref))
            value, slope = loops.token_term(*scores, float(ADVANTAGES[b]), epsilon, epsilon, beta)
            total += value / length / 4
            gradient[b][token] = slope / length / 4
    mask = ragged(lengths, 5)
    loops.check(cj_grpo(logp, old, ref, ADVANTAGES, mask, epsilon=epsilon, beta=beta), logp, total, gradient)
    filled = [tensor.detach().masked_fill(~mask, math.nan) for tensor in (logp, old, ref)]
    filled[0].requires_grad_()
    loops.check(cj_grpo(*filled, ADVANTAGES, mask, epsilon=epsilon, beta=beta), filled[0], total, gradient)


def edited() -> Rollout:
    """Two tokens in two steps, and a third that replaces the first token."""
    ids = torch.tensor([[1, 2, 5, 4]])
    written = [(0, 2, 9, 3), (1, 3, 9, 4), (2, 2, 3, 5)]  # step, position, old and new id
    step, position, old, new = (torch.tensor(column) for column in zip(*written, strict=True))
    events = Events(torch.zeros(3, dtype=torch.int64), step, position, old, new, torch.zeros(3), torch.zeros(3))
    common = {"commit_logp_BL": torch.zeros(1, 2), "commit_entropy_BL": torch.zeros(1, 2), "masked_entropy_BT": torch.ones(1, 3)}
    return Rollout(
        ids_BS=ids,
        completion_mask_BS=torch.tensor([[False, False, True, True]]),
        commit_step_BL=torch.tensor([[2, 1]], dtype=torch.int32),
        steps_B=torch.tensor([3]),
        failed_B=torch.tensor([False]),
        sequence_ids_B=torch.tensor([7]),
        mask_id=9,
        recorded=events,
        **common,
    )


def test_every_event_is_replayed_where_tokens_were_edited_and_every_step_weighs_the_same():
    plan = RECIPE.trajectory.states(edited(), RECIPE.option_type(), 0).plan
    assert plan.noisy_ids[:, 0].tolist() == [[1, 2, 9, 9], [1, 2, 3, 9], [1, 2, 3, 4]]
    assert plan.rows.target.tolist() == [3, 4, 5]
    logp, old, ref = loops.logps(1, 3)
    at = torch.zeros(1, *plan.shape[::2], dtype=F64)
    old_BKS, ref_BKS = (at.masked_scatter(plan.scored.transpose(0, 1), x) for x in (old, ref))
    batch = Batch({"advantages": torch.ones(1, dtype=F64)}, {"old_logp": old_BKS, "ref_logp": ref_BKS})
    got = RECIPE.make().contributions(logp[0], plan, batch) / 3
    want = cj_grpo(logp.t(), old.t(), ref.t(), torch.ones(3, dtype=F64), torch.ones(3, 1, dtype=torch.bool))
    loops.same(got, want, logp)


def test_a_rollout_without_edits_is_its_step_map_and_its_scores_need_no_pass():
    model = eurobert(vocab=12)
    rollout = generate(model, torch.tensor([[1, 2, 3], [4, 5, 6]]), length=4, steps=2, block_length=4, mask_id=11)
    states = RECIPE.trajectory.states(rollout, RECIPE.option_type(), 0)
    assert torch.equal(states.plan.noisy_ids, trajectory_rows(rollout).noisy_ids)
    torch.testing.assert_close(states.old_scores("old_logp").sum((1, 2)), rollout.commit_logp_BL.sum(1))
    batch = Batch({"advantages": torch.tensor([1.0, -1.0])}, {"ref_logp": states.old_scores("old_logp").double()})
    assert accumulate(model, states.plan, RECIPE.make(), batch).rows == 8


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ref_logp_BL": None}, ["ref_logp_BL", "beta"]),
        ({"old_logp_BL": torch.zeros(4, 2)}, ["old_logp_BL", "4, 2"]),
        ({"step_mask_BL": torch.ones(4, 3)}, ["step_mask_BL", "float32"]),
        ({"epsilon": 2.0}, ["epsilon", "2"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_an_error_names_the_argument(changes, words):
    scores = {name: torch.zeros(4, 3) for name in ("logp_BL", "old_logp_BL", "ref_logp_BL")}
    loops.refuses(cj_grpo, scores | {"advantages_B": torch.ones(4), "step_mask_BL": ragged([3] * 4, 3)}, changes, words)
