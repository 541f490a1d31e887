"""Events: any state of a rollout is replayed from them, and scored as the rollout saw it, edits included."""

from __future__ import annotations

import pytest
import torch

from dllm_kernels import generate, trajectory_logp, trajectory_rows
from dllm_kernels.accumulation.scores import score_samples
from dllm_kernels.masks import steps
from dllm_kernels.rollouts.trajectories import rollout_logp
from tests.rollouts.compare import MASK
from tests.rollouts.test_layouts import LENGTHS, causal

BLOCK = 4
EDITING = {"sampler": "llada2", "threshold": 0.5, "editing_threshold": 0.3, "max_post_steps": 3}
SDAR = {"sampler": "sdar", "steps": 3, "threshold": 0.4}


@pytest.fixture(scope="module")
def model():
    return causal("Qwen3", dtype=torch.float32)


def rollout_of(model, recipe, **options):
    ids = torch.arange(len(LENGTHS))
    options = {"length": 7, "temperature": 0.7, "block_length": BLOCK, "cache": True, **recipe, **options}
    return generate(model, LENGTHS, mask_id=MASK, sequence_ids=ids, **options)


@pytest.mark.parametrize("score", ["last", "all_events"])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("recipe", [EDITING, SDAR], ids=["editing", "sdar"])
def test_log_probs_at_rollout_with_the_cache_are_those_of_the_layout(model, recipe, shift, score):
    """Whole trajectories, all prompts modulo the block, the last block to its end, in fp32."""
    rollout = rollout_of(model, recipe, shift=shift)
    assert rollout.edited == (recipe is EDITING)
    plan = trajectory_rows(rollout, score=score)
    kept = rollout_logp(rollout, plan)
    for k in (1, 8):
        scored = score_samples(model, plan, suppress=(MASK,), per_token=True, samples_per_pass=k).transpose(0, 1)
        torch.testing.assert_close(scored, kept, rtol=0, atol=1e-5)
    torch.testing.assert_close(trajectory_logp(rollout, plan), kept.double().sum(-1).t())
    per_token = plan.counts.sum() if score == "last" else len(plan.rows)
    inside = rollout.completion_mask_BS[rollout.events.sequence_E, rollout.events.position_E]
    assert int(per_token) == (rollout.commit_step_BL.numel() if score == "last" else int(inside.sum()))
    assert plan.shape[0] < int(rollout.steps_B.max()), "a sample holds a state of every block"


@pytest.mark.parametrize("length", [1, 2, 3])
def test_editing_near_the_end_is_scored_as_it_was_rolled_out(model, length):
    """Completions that end inside their first block, beside others that go on."""
    rollout = rollout_of(model, EDITING, length=length, shift=1)
    assert rollout.edited
    plan = trajectory_rows(rollout)
    scored = score_samples(model, plan, suppress=(MASK,), per_token=True, samples_per_pass=3).transpose(0, 1)
    torch.testing.assert_close(scored, rollout_logp(rollout, plan), rtol=0, atol=1e-5)


def test_replayed_states_are_what_the_model_was_given(model):
    """The ids of every call, caught on the way, without the cache."""
    seen = []
    hook = model.register_forward_pre_hook(lambda m, a, kw: seen.append(kw["input_ids"].clone()), with_kwargs=True)
    rollout = rollout_of(model, EDITING, cache=False, micro_batch=1)
    hook.remove()
    for b, prompt in enumerate(LENGTHS):
        real = rollout.attention_mask_BS[b]
        for step in range(int(rollout.steps_B[b])):
            ids = seen.pop(0)[0]
            assert torch.equal(rollout.state_at(step)[b][real], ids[: int(real.sum())])
        assert torch.equal(rollout.ids_BS[b, : len(prompt)], prompt)
    assert torch.equal(rollout.state_at(10**6), rollout.ids_BS)


def test_the_last_events_are_the_final_tokens_and_each_replaces_the_one_before(model):
    rollout = rollout_of(model, EDITING)
    events = rollout.events
    last = events.at(events.last(rollout.ids_BS.shape))
    assert torch.equal(rollout.ids_BS[last.sequence_E, last.position_E], last.new_id_E)
    assert (rollout.completion_BL != MASK).all()
    assert len(last) == int((rollout.step_map_BS >= 0).sum())
    before = {}
    for b, position, old, new in zip(
        *(getattr(events, f"{name}_E").tolist() for name in ("sequence", "position", "old_id", "new_id")), strict=True
    ):
        assert before.get((b, position), MASK) == old != new
        before[b, position] = new
    kept = rollout.kept(torch.tensor([4, 1]))
    assert torch.equal(kept.state_at(3), rollout.state_at(3)[[4, 1]])


def test_a_step_of_an_edited_rollout_is_still_what_one_state_decides(model):
    rollout = rollout_of(model, EDITING)
    plan = trajectory_rows(rollout, score="all_events")
    assert int(steps.present(plan).sum()) == steps.number(plan)
    sizes = steps.sizes(plan).expand(plan.shape)[plan.scored]
    rows = plan.rows
    for n in range(0, len(rows), 5):
        assert int(sizes[n]) == int(((rows.sequence == rows.sequence[n]) & (rows.state == rows.state[n])).sum())


def test_llada2_ends_a_block_when_nothing_is_left_to_edit(model):
    """Without edits no step is wasted; with them a last look at each block finds nothing, or the bound is reached."""
    plain = rollout_of(model, {"sampler": "llada2", "threshold": 0.5}, temperature=0.0)
    assert not plain.edited
    sure = rollout_of(model, {**EDITING, "editing_threshold": 1.0}, temperature=0.0)
    assert torch.equal(sure.ids_BS, plain.ids_BS)
    blocks_B = torch.tensor([-(-(len(p) % BLOCK + 7) // BLOCK) for p in LENGTHS])
    assert torch.equal(sure.steps_B, plain.steps_B + blocks_B)
