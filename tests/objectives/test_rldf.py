"""RLDF: against loops over tokens, the states that it draws, and what of them counts."""

import math
from dataclasses import replace

import pytest
import torch

from dllm_kernels import generate
from dllm_kernels.accumulation.objective import Batch
from dllm_kernels.accumulation.scores import score_samples
from dllm_kernels.objectives.rldf import RECIPE, rldf, weighted_steps
from tests.objectives import loops
from tests.objectives.loops import F64, ragged
from tests.tiny import eurobert

ADVANTAGES = torch.tensor([1.0, -2.0, 0.0, 0.5], dtype=F64)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("epsilon", "beta"), [(0.2, 0.01), (0.0, 0.0)])
def test_equals_loops_over_tokens(threshold, epsilon, beta):
    logp, old, ref = loops.logps(4, 5)
    hidden, decided = ragged([5, 2, 3, 0], 5), ragged([1, 1, 3, 0], 5)
    total, gradient = 0.0, [[0.0] * 5 for _ in range(4)]
    for b in range(4):
        kept = [t for t in range(5) if hidden[b, t] and (decided[b, t] or math.exp(old[b, t]) >= threshold)]
        for token in kept:
            scores = (float(x[b, token]) for x in (logp, old, ref))
            value, slope = loops.token_term(*scores, float(ADVANTAGES[b]), epsilon, epsilon, beta)
            total += value / len(kept) / 4
            gradient[b][token] = slope / len(kept) / 4
    options = {"epsilon": epsilon, "beta": beta, "threshold": threshold}
    loops.check(rldf(logp, old, ref, ADVANTAGES, hidden, decided, **options), logp, total, gradient)
    filled = [tensor.detach().masked_fill(~hidden, math.nan) for tensor in (logp, old, ref)]
    filled[0].requires_grad_()
    loops.check(rldf(*filled, ADVANTAGES, hidden, decided, **options), filled[0], total, gradient)


def test_steps_are_drawn_without_replacement_by_the_softmax_of_their_surprise():
    surprise = torch.tensor([[0.5, 2.0, 1.0, math.nan]]).expand(20000, -1)
    ids = torch.arange(20000)
    drawn = weighted_steps(surprise, 2, temperature=0.7, sequence_ids=ids)
    p = torch.softmax(surprise[0, :3].double() / 0.7, 0)
    first = torch.bincount(drawn[:, 0], minlength=4).double() / 20000
    assert (first[:3] - p).abs().max() < 5 * math.sqrt(0.25 / 20000)
    pairs = {(i, j): float(p[i] * p[j] / (1 - p[i])) for i in range(3) for j in range(3) if i != j}
    for (i, j), want in pairs.items():
        got = float(((drawn[:, 0] == i) & (drawn[:, 1] == j)).double().mean())
        assert abs(got - want) < 5 * math.sqrt(0.25 / 20000), (i, j)
    assert torch.equal(weighted_steps(surprise[5:6], 2, temperature=0.7, sequence_ids=ids[5:6])[0], drawn[5])
    uniform = weighted_steps(surprise, 1, temperature=math.inf, sequence_ids=ids)
    assert (torch.bincount(uniform[:, 0], minlength=4)[:3] / 20000 - 1 / 3).abs().max() < 0.02
    assert weighted_steps(surprise[:1], 5, temperature=0.0).tolist() == [[1, 2, 0, -1, -1]]
    with pytest.raises(ValueError, match="sequence_ids must be given"):
        weighted_steps(surprise, 2)
    with pytest.raises(ValueError, match="temperature must be at least 0, got -1"):
        weighted_steps(surprise, 2, temperature=-1)


def test_a_state_scores_all_that_is_hidden_up_to_the_eos_and_filters_by_the_old_policy():
    model = eurobert(vocab=12)
    prompts = torch.tensor([[1, 2, 3], [4, 5, 6]])
    rollout = generate(model, prompts, length=6, steps=3, block_length=6, mask_id=11, temperature=0.0)
    rollout.ids_BS[0, 5] = 8  # the end, after three tokens
    rollout = replace(rollout, settings={**rollout.settings, "eos_id": 8})
    options = RECIPE.choose({"selected_steps": 2, "temperature": 0.0})
    states = RECIPE.trajectory.states(rollout, options, 0)
    assert states.old_scores("old_logp") is None  # the rollout saw other states
    plan, window = states.plan, [3, 6]
    for b in range(2):
        steps = rollout.commit_step_BL[b].tolist()
        if 8 in rollout.completion_BL[b].tolist():
            window[b] = rollout.completion_BL[b].tolist().index(8) + 1
        surprise = [-float(x) for x in rollout.commit_logp_BL[b]]
        of_step = {s: [x for x, t in zip(surprise[: window[b]], steps, strict=False) if t == s] for s in range(3)}
        ranked = sorted((s for s in of_step if of_step[s]), key=lambda s: -sum(of_step[s]) / len(of_step[s]))[:2]
        assert [s for s in states.steps_BJ[b].tolist() if s >= 0] == ranked
        for k, step in enumerate(ranked):
            hidden = [3 + place for place, t in enumerate(steps) if t >= step]
            assert plan.noisy_ids[k, b].tolist() == [11 if s in hidden else i for s, i in enumerate(rollout.ids_BS[b].tolist())]
            assert plan.scored[k, b].nonzero()[:, 0].tolist() == [s for s in hidden if s < 3 + window[b]]
    old_BKS = score_samples(model, plan, per_token=True) - 0.1 * plan.scored.transpose(0, 1)
    logp_N = (old_BKS.transpose(0, 1)[plan.scored] + 0.05).requires_grad_()
    batch = Batch({"advantages": torch.tensor([1.0, -1.0], dtype=F64)}, {"old_logp": old_BKS, "ref_logp": old_BKS + 0.2})
    got = RECIPE.make(RECIPE.choose({"threshold": 0.15})).contributions(logp_N, plan, batch)
    dense = plan.dense(logp_N)
    decided = torch.zeros_like(plan.scored)
    steps_BS = rollout.step_map_BS
    for k in range(plan.shape[0]):
        decided[k] = plan.scored[k] & (steps_BS == states.steps_BJ[:, k : k + 1])
    want, advantages_B = 0.0, batch.per_sequence["advantages"]
    for k in range(plan.shape[0]):
        old_BS, masks = old_BKS[:, k], (plan.scored[k], decided[k])
        want = want + 2 * rldf(dense[k], old_BS, old_BS + 0.2, advantages_B, *masks, threshold=0.15)
    loops.same(got, want, logp_N)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ref_logp_BL": None}, ["ref_logp_BL", "beta"]),
        ({"decided_mask_BL": torch.ones(4, 3)}, ["decided_mask_BL", "float32"]),
        ({"threshold": 1.5}, ["threshold", "1.5"]),
        ({"advantages_B": torch.zeros(3)}, ["advantages_B", "3"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_an_error_names_the_argument(changes, words):
    scores = {name: torch.zeros(4, 3) for name in ("logp_BL", "old_logp_BL", "ref_logp_BL")}
    masks = {name: ragged([3] * 4, 3) for name in ("hidden_mask_BL", "decided_mask_BL")}
    loops.refuses(rldf, scores | masks | {"advantages_B": torch.ones(4)}, changes, words)
