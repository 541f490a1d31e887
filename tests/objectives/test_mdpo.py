"""MDPO: against loops over tokens and steps, the drafts that its states score, and the steps that it trains on."""

import math

import pytest
import torch

from dllm_kernels import generate
from dllm_kernels.accumulation.objective import Batch
from dllm_kernels.objectives import Rewards, Update
from dllm_kernels.objectives.mdpo import RECIPE, mdpo, mdpo_step_values
from tests.objectives import loops
from tests.objectives.loops import F64, ragged
from tests.tiny import eurobert

ADVANTAGES = torch.tensor([1.0, -2.0, 0.0, 0.5], dtype=F64)


@pytest.mark.parametrize(("epsilon", "beta"), [(0.2, 0.0), (0.0, 0.5)])
def test_equals_loops_over_tokens(epsilon, beta):
    logp, old, ref = loops.logps(4, 5)
    lengths, sure = [5, 2, 3, 0], old.exp()
    total, gradient = 0.0, [[0.0] * 5 for _ in range(4)]
    for b, n in enumerate(lengths):
        for token in range(n):
            difference = float(logp[b, token] - ref[b, token])
            value, slope = loops.surrogate(float(logp[b, token] - old[b, token]), float(ADVANTAGES[b]), epsilon, epsilon)
            weight = float(sure[b, token]) / n / 4
            total += weight * (-value * 5 / n + beta * difference**2 / 2)
            gradient[b][token] = weight * (-slope * 5 / n + beta * difference)
    mask = ragged(lengths, 5)
    loops.check(mdpo(logp, old, ref, ADVANTAGES, mask, sure, epsilon=epsilon, beta=beta), logp, total, gradient)
    filled = [tensor.detach().masked_fill(~mask, math.nan) for tensor in (logp, old, ref, sure)]
    filled[0].requires_grad_()
    loss = mdpo(*filled[:3], ADVANTAGES, mask, filled[3], epsilon=epsilon, beta=beta)
    loops.check(loss, filled[0], total, gradient)


@pytest.mark.parametrize("T", [1, 2, 5])
def test_a_step_is_worth_its_gain_and_the_mean_of_what_follows(T):
    rewards = torch.rand(3, T, generator=torch.Generator().manual_seed(0), dtype=F64)
    for row, values in zip(rewards.tolist(), mdpo_step_values(rewards).tolist(), strict=True):
        for t in range(T):
            later = row[t + 1 :] or row[-1:]
            assert values[t] == pytest.approx(row[t] - (row[t - 1] if t else 0.0) + 1 + sum(later) / len(later))


def test_states_score_the_drafts_of_what_is_hidden_and_each_rollouts_own_largest_advantages_are_trained_on():
    model = eurobert(vocab=12)
    prompts = torch.tensor([[1, 2, 3]] * 3 + [[4, 5, 6]] * 2)
    rollout = generate(model, prompts, length=4, steps=4, block_length=4, mask_id=11, greedy=True, temperature=0.0)
    options = RECIPE.choose({"selected_steps": 2})
    states = RECIPE.trajectory.states(rollout, options, 0)
    assert states.old_scores("old_logp") is None  # what is scored was not written
    plan = states.plan
    for k in range(4):
        assert torch.equal(plan.noisy_ids[k], rollout.state_at(k))
        assert torch.equal(plan.scored[k], plan.noisy_ids[k] == 11)
        for b in range(5):
            logits = model(plan.noisy_ids[k, b][None]).logits[0, 3:]
            logits[:, 11] = -math.inf  # the rollout's
            drafts = [int(logits[place].argmax()) for place in range(4) if plan.scored[k, b, 3 + place]]
            of_pair = (plan.rows.sample == k) & (plan.rows.sequence == b)
            assert plan.rows.target[of_pair].tolist() == drafts
    values, groups = torch.zeros(5), torch.tensor([1, 1, 1, 2, 2])
    rewards_BT = torch.tensor([[0.0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1], [1, 1, 0, 1]], dtype=F64)
    seen = []

    def reward(drafts_BTL):
        seen.append(drafts_BTL)
        return rewards_BT

    none = {"old": None, "ref": None, "fresh_plan": None}
    gather = lambda x: (x, slice(0, 5))  # noqa: E731
    update = Update(Rewards(values, groups, torch.full([5], 4)), torch.arange(5), states, reward=reward, gather=gather, **none)
    entries = RECIPE.entries(update, options)
    assert torch.equal(seen[0][:, 0].int(), rollout.greedy_BTL[:, 0])
    worth = mdpo_step_values(rewards_BT)
    chosen = []
    for group in ((0, 1, 2), (3, 4)):
        values_GT = worth[list(group)]
        advantages = (values_GT - values_GT.mean(0)) / (values_GT.std(0) + 1e-4)
        torch.testing.assert_close(entries["step_advantages"][list(group)], advantages)
        for b, own in zip(group, advantages.abs().tolist(), strict=True):
            chosen.append(sorted(sorted(range(4), key=lambda t: (-own[t], t))[:2]))
            assert entries["step_weights"][b].tolist() == [0.5 if t in chosen[-1] else 0.0 for t in range(4)]
    assert chosen[0] != chosen[1], "all members of a group would train on the same steps"
    logp_N, old_N = (x[0] for x in loops.logps(1, len(plan.rows))[:2])
    old_BKS = plan.dense(old_N).transpose(0, 1)
    got = RECIPE.make(options).contributions(logp_N, plan, Batch({}, {**entries, "old_logp": old_BKS}))
    dense = plan.dense(logp_N)[:, :, 3:]
    want = 0.0
    for k in range(4):
        for b in range(5):
            scores = dense[k, b : b + 1], old_BKS[b : b + 1, k, 3:]
            mask = plan.scored[k, b : b + 1, 3:]
            loss = mdpo(*scores, None, entries["step_advantages"][b : b + 1, k], mask, scores[1].exp())
            want = want + loss * float(entries["step_weights"][b, k])
    loops.same(got, want, logp_N)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"beta": 0.1}, ["ref_logp_BL", "beta"]),
        ({"confidence_BL": torch.zeros(4, 2)}, ["confidence_BL", "4, 2"]),
        ({"hidden_mask_BL": torch.ones(4, 3)}, ["hidden_mask_BL", "float32"]),
        ({"epsilon": 2.0}, ["epsilon", "2"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_an_error_names_the_argument(changes, words):
    given = {name: torch.zeros(4, 3) for name in ("logp_BL", "old_logp_BL", "confidence_BL")}
    given |= {"ref_logp_BL": None, "advantages_B": torch.ones(4), "hidden_mask_BL": ragged([3] * 4, 3)}
    loops.refuses(mdpo, given, changes, words)
