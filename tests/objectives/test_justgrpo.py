"""JustGRPO: against loops over tokens, its states, and the exact likelihood of a denoiser read from left to right."""

import pytest
import torch

from dllm_kernels import generate
from dllm_kernels.accumulation.objective import Batch
from dllm_kernels.accumulation.scores import score_samples
from dllm_kernels.objectives import Rewards
from dllm_kernels.objectives.justgrpo import RECIPE, justgrpo
from tests.objectives import loops
from tests.objectives.loops import F64, ragged
from tests.tiny import eurobert

ADVANTAGES = torch.tensor([1.0, -2.0, 0.0, 0.5], dtype=F64)


@pytest.mark.parametrize("epsilon", [0.2, 0.0])
@pytest.mark.parametrize("lengths", [[5, 5, 5, 5], [1, 2, 3, 0]])
def test_equals_loops_over_tokens(epsilon, lengths):
    logp, old, _ = loops.logps(4, 5)
    total, gradient = 0.0, [[0.0] * 5 for _ in range(4)]
    for b, length in enumerate(lengths):
        for token in range(length):
            value, slope = loops.surrogate(float(logp[b, token] - old[b, token]), float(ADVANTAGES[b]), epsilon, epsilon)
            total -= value / length / 3  # three of the four have an advantage
            gradient[b][token] = -slope / length / 3
    loops.check(justgrpo(logp, old, ADVANTAGES, ragged(lengths, 5), epsilon=epsilon), logp, total, gradient)


def test_without_an_advantage_the_loss_is_0():
    logp, old, _ = loops.logps(4, 5)
    loops.check(justgrpo(logp, old, torch.zeros(4, dtype=F64), ragged([5] * 4, 5)), logp, 0.0, [[0.0] * 5] * 4)


def test_what_is_not_scored_may_hold_anything():
    logp, old, _ = loops.logps(4, 5)
    mask = ragged([5, 2, 3, 1], 5)
    want = torch.autograd.grad(justgrpo(logp, old, ADVANTAGES, mask), logp)[0]
    filled = logp.detach().masked_fill(~mask, torch.inf).requires_grad_()
    got = torch.autograd.grad(justgrpo(filled, old.masked_fill(~mask, torch.nan), ADVANTAGES, mask), filled)[0]
    assert torch.equal(got, want)


def test_states_read_from_left_to_right_whatever_the_rollout_s_order_and_give_the_published_loss():
    model = eurobert(vocab=12).double()
    rollout = generate(
        model, torch.tensor([[1, 2, 3], [4, 5, 6], [1, 3, 5], [2, 2, 2]]), length=4, steps=2, block_length=4, mask_id=11
    )
    plan = RECIPE.trajectory.states(rollout, RECIPE.option_type(), 0).plan
    logp = torch.zeros(4, 4, dtype=F64)
    for token in range(4):  # as in the code: one pass a token, the rest of the window hidden
        ids = rollout.ids_BS.clone()
        ids[:, 3 + token :] = 11
        assert torch.equal(plan.noisy_ids[token], ids)
        assert plan.scored[token].nonzero().tolist() == [[b, 3 + token] for b in range(4)]
        logits = model(ids).logits[:, 3 + token]
        logp[:, token] = logits.log_softmax(-1).gather(1, rollout.completion_BL[:, token, None].long())[:, 0]
    scores_BKS = score_samples(model, plan, per_token=True)
    torch.testing.assert_close(scores_BKS.sum(1)[:, 3:].double(), logp.detach(), atol=1e-5, rtol=1e-5)
    old = logp.detach() + 0.3 * torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=F64)
    leaf = logp.detach().flatten().requires_grad_()
    rows = plan.rows
    logp_N = leaf[rows.sequence * 4 + rows.sample]
    old_BKS = torch.diag_embed(old).new_zeros(4, *plan.shape[::2])
    old_BKS[:, range(4), range(3, 7)] = old
    loss = RECIPE.make().contributions(logp_N, plan, Batch({"advantages": ADVANTAGES}, {"old_logp": old_BKS})) / 3
    want = justgrpo(leaf.view(4, 4), old, ADVANTAGES, torch.ones(4, 4, dtype=torch.bool))
    loops.check(loss, leaf, want.item(), torch.autograd.grad(want, leaf)[0])


def test_a_step_divides_by_the_sequences_with_an_advantage():
    values, groups = torch.tensor([1.0, 0.0, 0.5, 0.5]), torch.tensor([1, 1, 2, 2])
    found = RECIPE.signal(Rewards(values, groups, torch.full([4], 8), "std"), RECIPE.make(), RECIPE.option_type())
    assert (found.kept_N.tolist(), found.denominator) == ([0, 1], 2.0)
    assert (RECIPE.name, RECIPE.arxiv, RECIPE.law) == ("justgrpo", "2601.15165", "segments")
