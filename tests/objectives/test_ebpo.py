"""EBPO: against a loop over the formula, at its clips, on plans of blocks, and at the edges."""

import math

import pytest
import torch

from dllm_kernels.accumulation.objective import Batch
from dllm_kernels.objectives.ebpo import ebpo, ebpo_objective
from tests.plans import plan_of

F64 = torch.float64


def by_loops(elbo, old, advantages, low, high, weights, valid):
    total, gradient = 0.0, []
    for b in range(len(elbo)):
        d = sum(w * (x - o) for w, x, o in zip(weights, elbo[b], old[b], strict=True))
        bound = math.log(1 + high) if advantages[b] >= 0 else math.log(1 - low)
        clipped = d > bound if advantages[b] >= 0 else d < bound
        ratio = math.exp(bound if clipped else d)
        total += -advantages[b] * ratio * valid[b]
        gradient.append([0.0 if clipped else -advantages[b] * ratio * w * valid[b] / sum(valid) for w in weights])
    return total / sum(valid), gradient


@pytest.mark.parametrize("weights", [None, [0.5, 0.2, 0.1]])
@pytest.mark.parametrize(("low", "high"), [(0.2, 0.3), (0.0, 0.0), (0.05, 2.0)])
def test_equals_a_loop_over_the_formula(low, high, weights):
    generator = torch.Generator().manual_seed(0)
    old = -5 * torch.rand(7, 3, generator=generator, dtype=F64)
    elbo = (old + torch.randn(7, 3, generator=generator, dtype=F64)).requires_grad_()
    advantages = torch.randn(7, generator=generator, dtype=F64)
    valid = torch.tensor([True, True, False, True, True, True, True])
    w = None if weights is None else torch.tensor(weights, dtype=F64)
    loss = ebpo(elbo, old, advantages, epsilon_low=low, epsilon_high=high, weights_K=w, valid_B=valid)
    loss.backward()
    want, gradient = by_loops(elbo.tolist(), old.tolist(), advantages.tolist(), low, high, weights or [1 / 3] * 3, valid.tolist())
    assert float(loss) == pytest.approx(want, rel=1e-12)
    torch.testing.assert_close(elbo.grad, torch.tensor(gradient, dtype=F64))


def test_the_clipped_side_cannot_overflow_and_a_sequence_without_a_token_cannot_poison():
    elbo = torch.tensor([[1e4], [-1e4], [math.nan]], requires_grad=True)
    old = torch.zeros(3, 1)
    loss = ebpo(elbo, old, torch.tensor([1.0, -1.0, 1.0]), valid_B=torch.tensor([True, True, False]))
    loss.backward()
    assert float(loss) == pytest.approx((-1.2 + 0.8) / 2)
    assert elbo.grad.tolist() == [[0.0], [0.0], [0.0]]


def test_the_ratio_of_a_plan_of_blocks_is_that_of_the_sum_over_blocks_and_the_mean_over_samples():
    plan = plan_of([7, 3, 0], samples=4, causal_block=4)
    generator = torch.Generator().manual_seed(1)
    logp = -torch.rand(len(plan.rows), generator=generator, dtype=F64)
    rows, elbo, lengths = plan.rows, torch.zeros(3, 4, dtype=F64), {}
    for n in range(len(rows)):  # L_j / n_j of its block, in words of the definition
        b, k = int(rows.sequence[n]), int(rows.sample[n])
        position = int(rows.index[n]) - (k * 3 + b) * plan.shape[2]
        inside = (plan.block_BS[b] == plan.block_BS[b, position]) & plan.completion_mask_BS[b]
        lengths[n] = float(inside.sum()) / float((inside & plan.masked[k, b]).sum())
        elbo[b, k] += lengths[n] * logp[n]
    advantages = torch.tensor([1.0, -2.0, 5.0], dtype=F64)
    old = elbo.mean(1) + torch.tensor([0.1, 0.05, 0.0], dtype=F64)
    batch = Batch({"advantages": advantages, "old_elbo": old})
    got = ebpo_objective().contributions(logp, plan, batch)
    want = 2 * ebpo(elbo, old[:, None].expand(3, 4), advantages, valid_B=torch.tensor([True, True, False]))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)  # weights of a plan are fp32


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"epsilon_low": 1.0}, r"epsilon_low must be in \[0, 1\), got 1.0"),
        ({"epsilon_high": -0.1}, "epsilon_high must be finite and at least 0, got -0.1"),
        ({"weights_K": torch.ones(3)}, r"weights_K must have shape \[2\], got \[3\]"),
        ({"valid_B": torch.ones(2, dtype=torch.bool)}, r"valid_B must have shape \[1\], got \[2\]"),
    ],
)
def test_bad_input_is_told_in_a_sentence(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        ebpo(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1), **changes)
