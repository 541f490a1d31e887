"""Rollouts of an engine beside the model: what it did not tell is scored, and a gap says where it comes from."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dllm_kernels import Rollout, generate
from dllm_kernels.integrations.foreign_rollouts import score_rollout
from tests.rollouts.compare import IDS, MASK, RAGGED
from tests.rollouts.test_events import EDITING, SDAR, rollout_of
from tests.rollouts.test_layouts import causal
from tests.tiny import eurobert

FAST = {"sampler": "fast_dllm", "threshold": 0.3, "block_length": 4}


@pytest.fixture(scope="module")
def model():
    return eurobert(layers=2, hidden=16)


def told(rollout, **changes):
    """What an engine would tell of a rollout: lists; `changes` in place of its own."""
    real = [torch.ones(rollout.ids_BS.shape[1], dtype=torch.bool)] * len(rollout.ids_BS)
    real = real if rollout.attention_mask_BS is None else list(rollout.attention_mask_BS)
    given = {
        "prompts": [
            ids[r & ~done].tolist() for ids, r, done in zip(rollout.ids_BS, real, rollout.completion_mask_BS, strict=True)
        ],
        "completions": rollout.completion_BL.tolist(),
        "step_map": rollout.commit_step_BL.tolist(),
        "logp": rollout.commit_logp_BL.tolist(),
        "mask_id": MASK,
    }
    return Rollout.from_steps(**{**given, **changes})


@pytest.mark.parametrize("recipe", [FAST, {**FAST, "eos_id": 7}], ids=["whole", "ended"])
def test_what_the_engine_did_not_tell_is_what_it_saw(model, recipe):
    made = generate(model, RAGGED, length=8, mask_id=MASK, temperature=1.0, sequence_ids=IDS, **recipe)
    eos = {"eos_id": recipe.get("eos_id")}
    rollout, gap = score_rollout(model, told(made, logp=None, **eos))
    assert (gap.tokens, gap.sequence) == (0, -1)
    torch.testing.assert_close(rollout.commit_logp_BL, made.commit_logp_BL, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rollout.commit_entropy_BL, made.commit_entropy_BL, rtol=1e-5, atol=1e-6)
    assert not rollout.unscored
    mixed = [row.tolist() if b != 1 else None for b, row in enumerate(made.commit_logp_BL)]
    rollout, gap = score_rollout(model, told(made, logp=mixed, **eos), samples_per_pass=3)
    assert gap.tokens == int((made.commit_step_BL[[0, 2]] >= 0).sum())
    assert gap.worst < 1e-6
    torch.testing.assert_close(rollout.commit_logp_BL, made.commit_logp_BL, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("recipe", [EDITING, SDAR], ids=["editing", "sdar"])
def test_and_of_block_causal_models_with_edits(tmp_path, recipe):
    model = causal("Qwen3", dtype=torch.float32)
    made = rollout_of(model, recipe)
    made.to_jsonl(tmp_path / "rollouts.jsonl")
    read = Rollout.from_jsonl(tmp_path / "rollouts.jsonl")
    _, gap = score_rollout(model, read)
    assert gap.tokens >= read.commit_step_BL.numel()
    assert gap.worst < 1e-5
    inside_E = read.completion_mask_BS[read.recorded.sequence_E, read.recorded.position_E]
    nothing = torch.full_like(read.recorded.logp_E, torch.nan)
    silent = replace(read, recorded=replace(read.recorded, logp_E=nothing, entropy_E=nothing), unscored=True)
    silent = replace(silent, commit_logp_BL=torch.full_like(read.commit_logp_BL, torch.nan))
    rollout, _ = score_rollout(model, silent)
    torch.testing.assert_close(rollout.recorded.logp_E[inside_E], read.recorded.logp_E[inside_E], rtol=0, atol=1e-5)
    torch.testing.assert_close(rollout.commit_logp_BL, read.commit_logp_BL, rtol=0, atol=1e-5)
    assert rollout.recorded.logp_E[~inside_E].isnan().all()


def gapped(model, **changes):
    made = generate(model, RAGGED, length=8, mask_id=MASK, temperature=0.5, sequence_ids=IDS, **{**FAST, **changes})
    return made


def test_the_cause_of_a_gap_is_named(model):
    made = gapped(model)
    at_half = score_rollout(model, told(made, logp=None))[0]
    # an engine that tells what it drew from
    tempered = torch.stack([drawn_logp(model, at_half, b, temperature=0.5) for b in range(3)])
    with pytest.raises(ValueError, match=r"off by .* nats a token in sequence .*told at temperature 0\.5"):
        score_rollout(model, told(made, logp=tempered.tolist(), temperature=0.5))
    allowed = torch.stack([drawn_logp(model, at_half, b, suppress=()) for b in range(3)])
    with pytest.raises(ValueError, match=r"draws from all ids, and here \[10\] have probability 0"):
        score_rollout(model, told(made, logp=allowed.tolist()), bound=1e-3)
    assert score_rollout(model, told(made, logp=allowed.tolist()), suppress=(), bound=1e-3)[1].worst < 1e-6
    dream = gapped(model, shift=1)
    with pytest.raises(ValueError, match="fit shift=1, and the rollout says shift=0"):
        score_rollout(model, told(dream))
    other = eurobert(layers=2, hidden=16, seed=5)
    with pytest.raises(ValueError, match=r"the first step are off too.*other weights.*another prompt"):
        score_rollout(other, told(made))
    prompts = [[4, *prompt.tolist()] for prompt in RAGGED]
    with pytest.raises(ValueError, match="the first step are off too"):
        score_rollout(model, told(made, prompts=prompts))


def drawn_logp(model, rollout, b, *, temperature=1.0, suppress=(MASK,)):
    real = rollout.attention_mask_BS[b]
    found = torch.zeros(rollout.commit_step_BL.shape[1])
    for step in range(int(rollout.steps_B[b])):
        z = model(rollout.state_at(step)[b][real][None]).logits[0].detach()
        z[:, list(suppress)] = -torch.inf
        z = z[rollout.column_BL[b]]
        now = rollout.commit_step_BL[b] == step
        logp = (z / temperature).log_softmax(-1).gather(1, rollout.completion_BL[b][:, None])[:, 0]
        found[now] = logp[now].float()
    return found


def test_steps_that_saw_other_states_are_told_from_other_weights(model):
    made = gapped(model, threshold=1.0)
    swapped = made.commit_step_BL.clone()
    for b in range(3):  # two tokens of later steps change places
        a, c = (int((made.commit_step_BL[b] == step).nonzero()) for step in (2, 7))
        swapped[b, [a, c]] = made.commit_step_BL[b, [c, a]]
    with pytest.raises(ValueError, match=r"those of the first step fit .*later ones do not"):
        score_rollout(model, told(made, step_map=swapped.tolist()), bound=1e-3)
    stale = generate(model, RAGGED, length=8, steps=8, block_length=4, mask_id=MASK, cache="dual")
    with pytest.raises(ValueError, match=r"first step fit.*approximate=True"):
        score_rollout(model, told(stale), bound=1e-4)
    known = told(stale, approximate=True)
    with pytest.raises(ValueError, match="cache of earlier states; keep=False"):
        score_rollout(model, known, bound=1e-4)
    exact, gap = score_rollout(model, known, bound=None, keep=False)
    assert not exact.approximate
    assert gap.worst > 1e-4
    assert score_rollout(model, exact, bound=1e-6)[1].worst < 1e-6


def test_the_bound_is_checked(model):
    with pytest.raises(ValueError, match="bound"):
        score_rollout(model, told(gapped(model)), bound=0.0)
