"""Masks drawn by another loop: their plan gives the rows, weights and scores that the loop itself would."""

import pytest
import torch
from torch.testing import assert_close

from dllm_kernels import accumulate, estimate_elbo, make_mask_plan
from dllm_kernels.masks.given_masks import GivenPlan
from dllm_kernels.objectives import BGPO, Batch
from tests.tiny import eurobert, gradients, worst_gradient_error

K, B, S, MASK = 4, 3, 9, 10
IDS = torch.randint(3, 10, (B, S), generator=torch.Generator().manual_seed(0))
COMPLETION = torch.arange(S).expand(B, S) >= torch.tensor([[2], [3], [4]])
KEYS = {"seed": 0, "sequence_ids": torch.arange(B), "mask_id": MASK}


def given(masked, weight=None, *, ids=IDS, completion=COMPLETION, **options):
    return make_mask_plan(ids, completion, law="given", samples=None, masked_KBS=masked, weight_KB=weight, **KEYS, **options)


@pytest.mark.parametrize("law", ["bernoulli", "exact"])
def test_the_masks_of_a_law_given_again_are_that_law(law):
    drawn = make_mask_plan(IDS, COMPLETION, law=law, samples=K, **KEYS)
    again = given(drawn.scored, drawn.weight_KB)
    model = eurobert()
    batch = Batch({"advantages": torch.tensor([1.0, -0.5, 0.3])})
    found = []
    for plan in (drawn, again):
        for name in ("noisy_ids", "masked", "scored", "weight_KB", "share_K", "counts"):
            assert torch.equal(getattr(plan, name), getattr(drawn, name)), name
        model.zero_grad()
        report = accumulate(model, plan, BGPO, batch)
        found.append((report.loss, gradients(model)))
    assert_close(found[0][0], found[1][0])
    assert worst_gradient_error(found[0][1], found[1][1]) < 1e-12


@pytest.mark.parametrize("law", ["bernoulli", "exact"])
def test_the_masks_of_blocks_given_again_are_those_of_blocks(law, tmp_path):
    """As a trainer of a block-causal model draws them: a level and a weight for each block."""
    drawn = make_mask_plan(IDS, COMPLETION, law=law, samples=K, causal_block=4, **KEYS)
    weight_KBS = drawn.dense(drawn.rows.weight)
    again = given(drawn.scored, weight_KBS=weight_KBS, causal_block=4)
    again.save(tmp_path / "plan")
    batch, model, found = Batch({"advantages": torch.tensor([1.0, -0.5, 0.3])}), eurobert(), []
    for plan in (drawn, again, GivenPlan.load(tmp_path / "plan")):
        for name in ("index", "target", "weight", "sequence", "sample"):
            assert torch.equal(getattr(plan.rows, name), getattr(drawn.rows, name)), name
        assert torch.equal(plan.layout(2).ids_RT, drawn.layout(2).ids_RT)
        model.zero_grad()
        report = accumulate(model, plan, BGPO, batch, samples_per_pass=3)
        found.append((report.loss, gradients(model)))
    for loss, gradient in found[1:]:
        assert_close(loss, found[0][0])
        assert worst_gradient_error(gradient, found[0][1]) < 1e-12
    part = again.cut(samples=slice(1, 3), sequences=torch.tensor([2, 0]))
    assert_close(part.dense(part.rows.weight), weight_KBS[1:3][:, [2, 0]])
    one = given(drawn.scored, torch.arange(1.0, K * B + 1).view(K, B), causal_block=4)
    assert torch.equal(one.rows.weight, (one.rows.sample * B + one.rows.sequence + 1).float())
    with pytest.raises(ValueError, match=r"^weight_KBS must be the same at all tokens that a sample hides in a block"):
        given(COMPLETION[None], weight_KBS=torch.rand(1, B, S), causal_block=4)
    for options in ({"weight_KBS": weight_KBS}, {"weight_KBS": weight_KBS, "weight": torch.ones(K, B), "causal_block": 4}):
        with pytest.raises(ValueError, match=r"^weight_KBS must be None without causal_block, and where weight_KB is given"):
            given(drawn.scored, **options)


def test_cuts_files_and_devices_keep_the_masks(tmp_path):
    masked = COMPLETION & (torch.rand(K, B, S, generator=torch.Generator().manual_seed(1)) < 0.5)
    weight = torch.rand(K, B) + 0.5
    plan = given(masked, weight, shift=1)
    part = plan.cut(samples=slice(1, 3), sequences=torch.tensor([2, 0]))
    assert torch.equal(part.scored, masked[1:3][:, [2, 0]])
    assert_close(part.weight_KB, weight[1:3][:, [2, 0]])
    plan.save(tmp_path / "plan")
    assert torch.equal(GivenPlan.load(tmp_path / "plan").rows.index, plan.rows.index)
    assert (plan.rows.index == plan.scored.reshape(-1).nonzero()[:, 0] - 1).all()
    assert "given" in plan.describe()


def test_the_estimate_of_given_masks_is_the_sum_by_hand():
    masked = COMPLETION & (torch.rand(K, B, S, generator=torch.Generator().manual_seed(2)) < 0.5)
    weight = torch.arange(1.0, K * B + 1).view(K, B)
    model = eurobert()
    estimate = estimate_elbo(model, IDS, COMPLETION, law="given", samples=None, mask_id=MASK, masked_KBS=masked, weight_KB=weight)
    logp = model(input_ids=IDS.masked_fill(masked, MASK).view(K * B, S)).logits.log_softmax(-1).view(K, B, S, -1)
    picked = logp.gather(-1, IDS.expand(K, B, S)[..., None])[..., 0].detach()
    assert_close(estimate.elbo_B, ((picked * masked).sum(-1) * weight).mean(0), rtol=1e-9, atol=1e-9)


def test_wrong_masks_are_told():
    for masked, said in (
        (None, r"^masked_KBS must be given"),
        (COMPLETION, r"^masked_KBS must have shape \[any, 3, 9\], got \[3, 9\]"),
        (torch.ones(K, B, S, dtype=torch.bool), "^masked_KBS must be False where completion_mask_BS is"),
        (COMPLETION[None][:0], "^masked_KBS must hold at least one sample"),
    ):
        with pytest.raises(ValueError, match=said):
            given(masked)
    with pytest.raises(ValueError, match=r"^weight_KB must have shape \[1, 3\], got \[2, 3\]"):
        given(COMPLETION[None], torch.ones(2, B))
    with pytest.raises(ValueError, match=r"^samples must be None or the number of masks, 1, for law='given', got 2"):
        make_mask_plan(IDS, COMPLETION, law="given", samples=2, masked_KBS=COMPLETION[None], **KEYS)
