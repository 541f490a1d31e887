"""Rollouts of other engines: what their step maps mean, what a file keeps, and what is refused."""

from __future__ import annotations

import json
import math

import pytest
import torch

from dllm_kernels import Rollout, generate, trajectory_logp, trajectory_rows
from dllm_kernels.accumulation.scores import score_samples
from tests.rollouts.compare import IDS, MASK, RAGGED, left_padded
from tests.rollouts.test_events import EDITING, SDAR, rollout_of
from tests.rollouts.test_layouts import causal
from tests.tiny import eurobert

TENSORS = ("commit_step_BL", "commit_logp_BL", "commit_entropy_BL", "steps_B", "sequence_ids_B")


def unpadded(ids_BS, rollout):
    real_BS = torch.ones_like(ids_BS, dtype=torch.bool) if rollout.attention_mask_BS is None else rollout.attention_mask_BS
    return [ids[real].tolist() for ids, real in zip(ids_BS, real_BS, strict=True)]


def same(a, b, *, steps=True):
    """Two rollouts that hold the same sequences, however they are padded, and the same events of them."""
    assert unpadded(a.ids_BS, a) == unpadded(b.ids_BS, b)
    assert torch.equal(a.completion_BL, b.completion_BL)
    for name in TENSORS if steps else TENSORS[1:3]:
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert unpadded(a.completion_mask_BS, a) == unpadded(b.completion_mask_BS, b)
    for name in ("old_id_E", "new_id_E", "logp_E", "sequence_E"):
        assert torch.equal(getattr(a.events, name), getattr(b.events, name)), name
    for step in range(int(min(a.steps_B.max(), b.steps_B.max())) + 1 if steps else 0):
        assert unpadded(a.state_at(step), a) == unpadded(b.state_at(step), b)


@pytest.mark.parametrize("layout", ["left", "ragged"])
def test_a_file_gives_back_the_rollout_and_its_log_probs_to_the_bit(model, tmp_path, layout):
    prompts, mask = left_padded(RAGGED) if layout == "left" else (RAGGED, None)
    options = {"length": 8, "mask_id": MASK, "sequence_ids": IDS, "temperature": 1.0, "sampler": "fast_dllm", "threshold": 0.3}
    made = generate(model, prompts, attention_mask=mask, block_length=4, shift=1, eos_id=7, **options)
    assert (made.commit_step_BL < 0).any(), "some are filled up"
    made.to_jsonl(tmp_path / "rollouts.jsonl")
    read = Rollout.from_jsonl(tmp_path / "rollouts.jsonl", mask_id=MASK)
    same(made, read)
    with pytest.raises(ValueError, match=f"mask_id must be the {MASK} of .*rollouts.jsonl, got {MASK + 1}"):
        Rollout.from_jsonl(tmp_path / "rollouts.jsonl", mask_id=MASK + 1)
    assert (read.settings["shift"], read.settings["eos_id"], read.settings["temperature"]) == (1, 7, 1.0)
    ours, theirs = trajectory_rows(made), trajectory_rows(read)
    assert torch.equal(trajectory_logp(made, ours), trajectory_logp(read, theirs))
    assert not read.unscored


@pytest.mark.parametrize("recipe", [EDITING, SDAR], ids=["editing", "sdar"])
def test_a_file_keeps_edits_and_what_lies_beyond_the_completion(tmp_path, recipe):
    """Steps that changed nothing are left out, so the same states have other numbers: scores in the model tell."""
    model = causal("Qwen3", dtype=torch.float32)
    made = rollout_of(model, recipe)
    made.to_jsonl(tmp_path / "rollouts.jsonl")
    read = Rollout.from_jsonl(tmp_path / "rollouts.jsonl")
    same(made, read, steps=recipe is SDAR)
    assert read.edited == (recipe is EDITING)
    assert read.overhang_step_BS is not None
    plans = [trajectory_rows(rollout, score="all_events") for rollout in (made, read)]
    a, b = (score_samples(model, plan, suppress=(MASK,)) for plan in plans)
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(trajectory_logp(read, plans[1]), trajectory_logp(made, plans[0]))
    again = tmp_path / "again.jsonl"
    read.to_jsonl(again)
    assert again.read_text() == (tmp_path / "rollouts.jsonl").read_text()


def test_step_maps_edits_and_holes_mean_what_the_states_show():
    rollout = Rollout.from_steps(
        [[3, MASK, 4], [5]],
        [[6, 7], [8, 9, 6]],
        [[1, 0], [2, 0, 1]],
        mask_id=MASK,
        edits=[[(0, 0, 2, -0.5)], [(0, 0, 1), (1, 0, MASK)]],
        logp=[[-0.1, -0.2], None],
    )
    assert unpadded(rollout.ids_BS, rollout) == [[3, 6, 4, 7], [5, 8, 9, 6]]
    states = [unpadded(rollout.state_at(step), rollout) for step in range(4)]
    assert [state[0] for state in states] == [[3, MASK, 4, MASK], [3, 2, 4, 7], [3, 6, 4, 7], [3, 6, 4, 7]]
    assert [state[1] for state in states] == [[5, MASK, MASK, MASK], [5, 1, 9, MASK], [5, MASK, 9, 6], [5, 8, 9, 6]]
    assert rollout.completion_BL.tolist() == [[6, 7, MASK], [8, 9, 6]]
    assert rollout.steps_B.tolist() == [2, 3]
    assert rollout.unscored
    order = torch.stack([getattr(rollout.events, f"{name}_E") for name in ("sequence", "step", "position")], 1).tolist()
    assert order == sorted(order) != []
    plan = trajectory_rows(rollout, score="all_events")
    assert plan.counts.sum() == 7 == len(rollout.events) - 1, "an event that takes a token back is scored nowhere"
    with pytest.raises(ValueError, match="rollout must have log-probs"):
        trajectory_logp(rollout, plan)


def test_completions_of_other_lengths_are_scored_where_they_are(model):
    """Beside the states by hand, in the model itself."""
    prompts, completions, steps = [[3, 9], [5, 6, 3]], [[4, 7, 8, 1], [2, 8]], [[0, 1, 1, 2], [1, 0]]
    rollout = Rollout.from_steps(prompts, completions, steps, mask_id=MASK)
    scored = score_samples(model, trajectory_rows(rollout), model_kwargs={"attention_mask": rollout.attention_mask_BS.long()})
    for b in range(2):
        for step in range(max(steps[b]) + 1):
            state = prompts[b] + [t if s < step else MASK for t, s in zip(completions[b], steps[b], strict=True)]
            logp = model(torch.tensor([state])).logits[0].detach().log_softmax(-1)[len(prompts[b]) :]
            want = sum(float(logp[n, t]) for n, (t, s) in enumerate(zip(completions[b], steps[b], strict=True)) if s == step)
            assert float(scored[b, step]) == pytest.approx(want, abs=1e-6)


GOOD = {
    "prompts": [[1, 2], [3]],
    "completions": [[4, 5, 6], [7, 8]],
    "step_map": [[0, 1, 2], [1, 0]],
    "mask_id": MASK,
    "logp": [[-0.1] * 3, [-0.1] * 2],
}


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"step_map": [[0, 2, 3], [1, 0]]}, ValueError, ["step_map[0]", "gaps", "step 1 of 0..3"]),
        ({"step_map": [[1, 2, 3], [1, 0]]}, ValueError, ["step_map[0]", "gaps", "count from 0"]),
        ({"step_map": [[0, 1, 2], [1, 2]]}, ValueError, ["step_map[1]", "step 0 of 0..2"]),
        ({"step_map": [[0, 1], [1, 0]]}, ValueError, ["step_map[0]", "3 tokens", "got 2"]),
        ({"step_map": [[0, 1, 2]]}, ValueError, ["step_map", "2 prompts", "got 1"]),
        ({"step_map": None}, ValueError, ["logp must be None where step_map is None"]),
        ({"step_map": [[0, 1, -1], [1, 0]]}, ValueError, ["step_map[0]", "eos_id", "place 2"]),
        ({"step_map": [[0, -1, 1], [1, 0]], "eos_id": 4}, ValueError, ["step_map[0]", "place 1"]),
        ({"step_map": [[0, 1.0, 2], [1, 0]]}, TypeError, ["step_map[0]", "1.0"]),
        ({"step_map": [[-1, -1, -1], [1, 0]]}, ValueError, ["step_map[0]", "-1"]),
        ({"step_map": [[0, 1, 0], [1, 0]], "causal_block": 2}, ValueError, ["step_map[0]", "block", "step 0"]),
        ({"logp": [[-0.1] * 2, [-0.1] * 2]}, ValueError, ["logp[0]", "3 tokens", "got 2"]),
        ({"logp": [[-0.1] * 3, [-0.1] * 3]}, ValueError, ["logp[1]", "2 tokens", "got 3"]),
        ({"logp": [[-0.1] * 3]}, ValueError, ["logp", "2 prompts"]),
        ({"logp": [[-0.1, 0.9, -0.1], None]}, ValueError, ["logp[0]", "0.9", "nats"]),
        ({"logp": [[-0.1, math.nan, -0.1], None]}, ValueError, ["logp[0]", "nan"]),
        ({"entropy": [[-0.1] * 3, None]}, ValueError, ["entropy[0]", "at least 0"]),
        ({"completions": [[4, 5, MASK], [7, 8]]}, ValueError, ["completions[0]", f"mask_id={MASK}"]),
        ({"completions": [[], [7, 8]]}, ValueError, ["completions[0]", "got 0"]),
        ({"completions": ["456", [7, 8]]}, TypeError, ["completions[0]", "str"]),
        ({"prompts": [[1, MASK, MASK, MASK, MASK], [3]]}, ValueError, ["completions[0]", "4 masks", "got 3"]),
        ({"prompts": [[1, -2], [3]]}, ValueError, ["prompts[0]", "-2"]),
        ({"prompts": []}, ValueError, ["prompts", "none"]),
        ({"prompts": [[MASK, 2], [3]], "shift": 1}, ValueError, ["prompts[0]", "shift=1"]),
        ({"lengths": [4, 2]}, ValueError, ["lengths[0]", "1..3", "4"]),
        ({"edits": [[(0, 0, 7)], []]}, ValueError, ["edits[0]", "before step 0"]),
        ({"edits": [[(0, 2, 6)], []]}, ValueError, ["edits[0]", "place 2", "6"]),
        ({"edits": [[(0, 2, MASK)], []]}, ValueError, ["edits[0]", "place 2"]),
        ({"edits": [[(0, 2, 3), (0, 2, 4)], []]}, ValueError, ["edits[0]", "at most once", "place 2"]),
        ({"edits": [[(0, 5, 3)], []]}, ValueError, ["edits[0]", "0..2", "5"]),
        ({"edits": [[(0, 2)], []]}, ValueError, ["edits[0]", "(0, 2)"]),
        ({"sequence_ids": torch.tensor([1, 1])}, ValueError, ["sequence_ids", "distinct"]),
        ({"mask_id": -1}, ValueError, ["mask_id", "-1"]),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_an_error_names_the_argument_and_what_came(changes, error, words):
    Rollout.from_steps(**GOOD)
    with pytest.raises(error) as caught:
        Rollout.from_steps(**{**GOOD, **changes})
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([], ["has none"]),
        (["{"], [":1", "JSON"]),
        (["[1]"], [":1", "object", "list"]),
        ([{"completion_ids": [1], "step_map": [0]}], [":1", "prompt_ids", "None"]),
        ([{}, {"step_mop": [0]}], [":2", "step_mop", "did you mean 'step_map'"]),
        ([{"mask_id": 9}, {"mask_id": 8}], ["mask_id", "8 and 9"]),
        ([{"mask_id": None}], ["mask_id", "None"]),
        ([{"sequence_id": 3}, {}], ["sequence_id"]),
        ([{"step_map": [1]}], ["count from 0", "step_map[0]"]),
    ],
)
def test_a_damaged_file_is_an_error_in_one_sentence(tmp_path, lines, words):
    good = {"prompt_ids": [1], "completion_ids": [2], "step_map": [0], "mask_id": 9}
    file = tmp_path / "rollouts.jsonl"
    whole = [{**good, **line} if isinstance(line, dict) and "completion_ids" not in line else line for line in lines]
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in whole))
    with pytest.raises(ValueError, match=words[0]) as caught:
        Rollout.from_jsonl(file)
    for word in words:
        assert word in str(caught.value)


def test_a_rollout_of_a_cache_stays_one_in_a_file(tmp_path):
    model = eurobert(layers=1, hidden=16)
    made = generate(model, RAGGED, length=8, steps=4, block_length=4, mask_id=MASK, cache="dual")
    made.to_jsonl(tmp_path / "rollouts.jsonl")
    read = Rollout.from_jsonl(tmp_path / "rollouts.jsonl")
    assert read.approximate
    with pytest.raises(ValueError, match="rollout must be exact"):
        trajectory_logp(read, trajectory_rows(read))
