"""What a rollout keeps of its steps against replayed states and brute force: entropies, logps, greedy ids,
chosen steps.
"""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllm_kernels import Rollout, generate, select_steps, step_entropy, trajectory_logp, trajectory_rows
from dllm_kernels.accumulation.scores import score_samples
from tests.rollouts.compare import IDS, MASK, RAGGED, left_padded
from tests.rollouts.test_samplers import RECIPES, each_recipe
from tests.tiny import eurobert

F64 = torch.float64


def rollout_of(model, recipe="llada", *, layout="ragged", **options):
    options = {"length": 8, "mask_id": MASK, "temperature": 0.9, "sequence_ids": IDS, **options}
    options |= RECIPES[recipe] if isinstance(recipe, str) else recipe
    if layout == "ragged":
        return generate(model, RAGGED, **options)
    ids, attention_mask = left_padded(RAGGED)
    return generate(model, ids, attention_mask=attention_mask, **options)


@torch.no_grad()
def replayed(model, rollout, step):
    """Log-softmax `[B, L, V]` in fp64 of the state before a step, the mask id ruled out; shift as the
    rollout's.
    """
    z = model(rollout.state_at(step), attention_mask=rollout.attention_mask_BS.long()).logits.double()
    z[..., MASK] = -math.inf
    shift = rollout.settings["shift"]
    here = torch.roll(rollout.completion_mask_BS, -shift, 1)
    return z[here].view(*rollout.commit_step_BL.shape, -1).log_softmax(-1)


def entropies(logp):
    return -(logp.exp() * logp.masked_fill(logp == -math.inf, 0.0)).sum(-1)


@pytest.mark.parametrize("layout", ["ragged", "left"])
@each_recipe
def test_replayed_states_give_every_stored_figure(model, recipe, layout):
    rollout = rollout_of(model, recipe, layout=layout, greedy=True)
    completion_BL, steps_BL = rollout.completion_BL, rollout.commit_step_BL.long()
    of_step = step_entropy(rollout.commit_entropy_BL, rollout.commit_step_BL, steps=int(rollout.steps_B.max()))
    for step in range(int(rollout.steps_B.max())):
        logp_BLV = replayed(model, rollout, step)
        now_BL = steps_BL == step
        chosen = logp_BLV.gather(-1, completion_BL[..., None])[..., 0][now_BL]
        torch.testing.assert_close(rollout.commit_logp_BL[now_BL].double(), chosen, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(rollout.commit_logp_BL[now_BL].exp().double(), chosen.exp(), rtol=1e-5, atol=1e-6)
        H_BL = entropies(logp_BLV)
        torch.testing.assert_close(rollout.commit_entropy_BL[now_BL].double(), H_BL[now_BL], rtol=1e-5, atol=1e-6)
        for b in range(3):
            if step >= int(rollout.steps_B[b]):
                assert of_step[step, b].isnan()
                assert (rollout.greedy_BTL[b, step:] == MASK).all()
                continue
            if not now_BL[b].any():  # a step of SDAR's beyond the completion
                assert of_step[step, b].isnan()
                continue
            want = H_BL[b][now_BL[b]].mean()
            torch.testing.assert_close(of_step[step, b].double(), want, rtol=1e-5, atol=1e-6)
            masked_L = steps_BL[b] >= step
            greedy_L = torch.where(masked_L, logp_BLV[b].argmax(-1), completion_BL[b])
            assert rollout.greedy_BTL[b, step].tolist() == greedy_L.tolist()


def test_the_entropy_of_all_masked_tokens_is_that_of_the_rows_a_step_may_commit(model):
    rollout = rollout_of(model, {"block_length": 4, "steps": 6})
    for step in range(6):
        H_BL = entropies(replayed(model, rollout, step))
        block = slice(0, 4) if step < 3 else slice(4, 8)
        for b in range(3):
            masked_L = rollout.commit_step_BL[b, block] >= step
            torch.testing.assert_close(
                rollout.masked_entropy_BT[b, step].double(), H_BL[b, block][masked_L].mean(), rtol=1e-5, atol=1e-6
            )


@each_recipe
def test_states_run_from_all_masked_to_the_end_and_may_differ_by_sequence(model, recipe):
    rollout = rollout_of(model, recipe)
    first = rollout.state_at(0)
    assert (first[rollout.completion_mask_BS] == MASK).all()
    written_BS = rollout.step_map_BS >= 0  # SDAR's last block goes on beyond the completion
    assert (first[written_BS] == MASK).all()
    assert torch.equal(first[~written_BS], rollout.ids_BS[~written_BS])
    assert torch.equal(rollout.state_at(int(rollout.steps_B.max())), rollout.ids_BS)
    steps_B = torch.tensor([0, 2, 1])
    mixed = rollout.state_at(steps_B)
    for b in range(3):
        assert torch.equal(mixed[b], rollout.state_at(int(steps_B[b]))[b])


def test_storage_is_a_few_floats_per_token_and_step_and_no_row_of_the_vocabulary(model):
    rollout = rollout_of(model, {"length": 32, "block_length": 32, "steps": 16})
    B, L, T = 3, 32, 16
    tensors = {f.name: getattr(rollout, f.name) for f in fields(Rollout) if isinstance(getattr(rollout, f.name), torch.Tensor)}
    floats = sum(t.numel() for t in tensors.values() if t.is_floating_point())
    assert floats == B * (2 * L + T)
    assert step_entropy(rollout.commit_entropy_BL, rollout.commit_step_BL).numel() == T * B
    assert step_entropy(torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.int64)).shape == (1, 2), "no token, no step"
    assert sum(t.numel() for t in tensors.values()) < 12 * B * (L + 5)


# --- the choice of steps ------------------------------------------------------------------------------------


@given(
    B=st.integers(1, 4),
    L=st.integers(1, 9),
    T=st.integers(1, 6),
    seed=st.integers(0, 999),
    dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_step_entropy_is_the_mean_over_what_a_step_revealed(B, L, T, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    step_BL = torch.randint(-1, T, (B, L), generator=generator).to(dtype)
    H_BL = torch.rand(B, L, generator=generator, dtype=F64)
    got = step_entropy(H_BL, step_BL, steps=T)
    assert got.shape == (T, B)
    assert got.dtype == torch.float32
    for t in range(T):
        for b in range(B):
            revealed = [float(H_BL[b, i]) for i in range(L) if int(step_BL[b, i]) == t]
            if revealed:
                assert float(got[t, b]) == pytest.approx(sum(revealed) / len(revealed), rel=1e-6)
            else:
                assert math.isnan(float(got[t, b]))


@st.composite
def tables(draw):
    """Entropies `[T, B]` with many ties and with NaN where a sequence had no step."""
    T, B = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    values = st.sampled_from([math.nan, 0.0, 0.5, 1.0, 2.0])
    return torch.tensor(draw(st.lists(st.lists(values, min_size=B, max_size=B), min_size=T, max_size=T)))


@given(tables(), st.integers(1, 11))
def test_the_k_largest_entropies_in_descending_order_earlier_steps_first_among_equals(table, k):
    chosen = select_steps(table, k)
    assert chosen.shape == (table.shape[1], k)
    assert chosen.dtype == torch.int64
    for b in range(table.shape[1]):
        there = [t for t in range(len(table)) if not math.isnan(float(table[t, b]))]
        want = sorted(there, key=lambda t: (-float(table[t, b]), t))[:k]
        assert chosen[b].tolist() == want + [-1] * (k - len(want))


@given(tables(), st.integers(1, 11), st.integers(0, 5), st.sampled_from(["uniform", "random"]))
def test_uniform_and_random_steps_ascend_without_repeats_and_hold_the_last(table, k, seed, how):
    ids = torch.arange(table.shape[1])
    chosen = select_steps(table, k, how, seed=seed, sequence_ids=ids)
    assert torch.equal(chosen, select_steps(table, k, how, seed=seed, sequence_ids=ids))
    for b in range(table.shape[1]):
        there = [t for t in range(len(table)) if not math.isnan(float(table[t, b]))]
        got = chosen[b].tolist()
        kept = [t for t in got if t >= 0]
        assert got == kept + [-1] * (k - len(kept))
        assert len(kept) == min(k, len(there))
        assert kept == sorted(set(kept))
        assert set(kept) <= set(there)
        if there:
            assert kept[-1] == there[-1]
        if how == "uniform" and len(there) >= k:
            gaps = [b - a for a, b in zip([-1, *(there.index(t) for t in kept)], (there.index(t) for t in kept), strict=False)]
            assert max(gaps) - min(gaps) <= 1, "as even as can be"


def test_random_steps_are_uniform_and_a_sequence_s_own():
    table = torch.zeros(6, 3000)
    chosen = select_steps(table, 3, "random", sequence_ids=torch.arange(3000))
    drawn = torch.bincount(chosen[:, :2].flatten(), minlength=6)
    assert drawn[5] == 0
    expected = 3000 * 2 / 5
    assert float(((drawn[:5] - expected) ** 2 / expected).sum()) < 30
    reversed_ids = torch.arange(2999, -1, -1)
    assert torch.equal(select_steps(table, 3, "random", sequence_ids=reversed_ids), chosen.flip(0))
    assert not torch.equal(select_steps(table, 3, "random", seed=1, sequence_ids=torch.arange(3000)), chosen)


# --- rows to score ------------------------------------------------------------------------------------------


def rows_by_loop(rollout, steps_BJ, shift):
    """(state ids, {(b, place): target}) of every chosen step, from the ids and the step map alone."""
    found = []
    for j in range(steps_BJ.shape[1]):
        state, rows = rollout.ids_BS.clone(), {}
        for b in range(len(state)):
            columns = (rollout.step_map_BS[b] >= 0).nonzero()[:, 0].tolist()
            for column in columns:
                committed, step = int(rollout.step_map_BS[b, column]), int(steps_BJ[b, j])
                if step >= 0 and committed >= step:
                    state[b, column] = MASK
                if step >= 0 and committed == step and rollout.completion_mask_BS[b, column]:
                    rows[b, column - shift] = int(rollout.ids_BS[b, column])
        found.append((state, rows))
    return found


@pytest.mark.parametrize("how", ["entropy", "uniform", "random", None])
@pytest.mark.parametrize("recipe", ["llada", "dream maskgit_plus", "dream origin", "fast_dllm", "sdar dynamic"])
def test_trajectory_rows_equal_a_loop_over_sequences_and_steps(model, recipe, how):
    rollout = rollout_of(model, recipe)
    if how is None:
        chosen = None
        every = torch.arange(int(rollout.steps_B.max())).expand(3, -1)
        steps_BJ = torch.where(every < rollout.steps_B[:, None], every, -1)
    else:
        table = step_entropy(rollout.commit_entropy_BL, rollout.commit_step_BL)
        chosen = steps_BJ = select_steps(table, 4, how, sequence_ids=IDS)
    plan = trajectory_rows(rollout, chosen)
    assert plan.shape == (steps_BJ.shape[1], 3, rollout.ids_BS.shape[1])
    shift = rollout.settings["shift"]
    assert plan.shift == shift
    total = 0
    for k, (state, rows) in enumerate(rows_by_loop(rollout, steps_BJ, shift)):
        there_B = steps_BJ[:, k] >= 0
        assert torch.equal(plan.noisy_ids[k][there_B], state[there_B])
        one = plan.cut(samples=slice(k, k + 1)).rows
        S = rollout.ids_BS.shape[1]
        got = {(int(i) // S % 3, int(i) % S): int(t) for i, t in zip(one.index, one.target, strict=True)}
        assert got == rows
        assert len(one) == len(rows)
        total += len(rows)
    assert total == len(plan.rows) > 0


@pytest.mark.parametrize("layout", ["ragged", "left"])
@each_recipe
def test_logps_kept_by_the_rollout_equal_a_scoring_pass(model, recipe, layout):
    """On-policy, so the gap is rounding: fp32 storage against fp64 scores."""
    rollout = rollout_of(model, recipe, layout=layout)
    table = step_entropy(rollout.commit_entropy_BL, rollout.commit_step_BL)
    for chosen in (None, select_steps(table, 3)):
        plan = trajectory_rows(rollout, chosen)
        kept = trajectory_logp(rollout, plan)
        scored = score_samples(model, plan, suppress=(MASK,), model_kwargs={"attention_mask": rollout.attention_mask_BS.long()})
        assert kept.shape == scored.shape
        assert float(scored.abs().max()) > 0.1
        gap = float((kept.double() - scored).abs().max() / scored.abs().max())
        assert gap < 1e-6


def test_what_follows_eos_is_neither_scored_nor_seen(model):
    prompts, ids = [RAGGED[b % 3] for b in range(8)], torch.arange(8) + 16
    options = {"block_length": 4, "steps": 12, "temperature": 1.0, "eos_id": 3, "sequence_ids": ids}
    rollout = generate(model, prompts, length=12, mask_id=MASK, **options)
    filled_BL = rollout.commit_step_BL < 0
    assert filled_BL.any()
    plan = trajectory_rows(rollout)
    scored_BL = plan.scored.any(0)[rollout.completion_mask_BS].view(8, 12)
    ends_BL = rollout.completion_BL == 3
    after_BL = ends_BL.cumsum(-1) - ends_BL.long() > 0
    assert torch.equal(scored_BL, ~after_BL)
    for step in range(int(rollout.steps_B.max())):
        for b in range(8):
            if step < int(rollout.steps_B[b]):
                state = rollout.state_at(step)[b][rollout.completion_mask_BS[b]]
                assert (state[filled_BL[b]] == MASK).all(), "the model never saw what was filled up"


@pytest.mark.parametrize("score", ["last", "all_events"])
@pytest.mark.parametrize(
    "recipe",
    [
        {"sampler": "llada", "steps": 12, "block_length": 4},
        {"sampler": "sdar", "steps": 5, "block_length": 5, "threshold": 0.3},
        {"sampler": "llada2", "block_length": 5, "threshold": 0.3, "editing_threshold": 0.3},
    ],
    ids=["llada", "sdar", "llada2-editing"],
)
def test_what_was_filled_up_after_eos_was_masked_in_every_state(recipe, score, tmp_path):
    """Also in the last block beyond the completion, and read from a file."""
    model = eurobert(layers=1, hidden=16)
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.5)  # what a state shows matters
    options = {**recipe, "length": 12, "temperature": 1.0, "sequence_ids": torch.arange(12), "mask_id": MASK}
    prompts = [torch.arange(2, 5 + n % 3) for n in range(12)]
    eos = int(generate(model, prompts, **options).completion_BL[:, :3].flatten().mode().values)
    made = generate(model, prompts, eos_id=eos, **options)
    assert (made.commit_step_BL < 0).any(-1).sum() > 1
    made.to_jsonl(tmp_path / "rollouts.jsonl")
    for rollout in (made, Rollout.from_jsonl(tmp_path / "rollouts.jsonl")):
        plan = trajectory_rows(rollout, score=score)
        kwargs = {"attention_mask": rollout.attention_mask_BS.long()}
        scored = score_samples(model, plan, suppress=(MASK,), model_kwargs=kwargs)
        torch.testing.assert_close(scored, trajectory_logp(rollout, plan), rtol=0, atol=1e-5)
        for step in range(int(made.steps_B.max())):
            filled_BL = (rollout.commit_step_BL < 0) & (step < rollout.steps_B[:, None])
            shown_BL = rollout.state_at(step).gather(1, rollout.column_BL)
            assert (shown_BL[filled_BL] == MASK).all()


@pytest.mark.parametrize("segments", [1, 2, 3, 6])
def test_segments_and_shrunk_steps_are_scored_in_their_first_state(model, segments):
    rollout = rollout_of(model, {"length": 12, "block_length": 12, "steps": 6})
    for plan in (trajectory_rows(rollout, segments=segments, prompt_noise=0.0), trajectory_rows(rollout, shrink=6 // segments)):
        assert plan.shape[0] == segments
        for k in range(segments):
            first = k * (6 // segments)
            assert torch.equal(plan.noisy_ids[k], rollout.state_at(first))
            inside = (rollout.commit_step_BL >= first) & (rollout.commit_step_BL < first + 6 // segments)
            assert torch.equal(plan.scored[k][rollout.completion_mask_BS].view(3, 12), inside)


def test_rollouts_can_be_taken_apart(model):
    rollout = rollout_of(model, greedy=True)
    index = torch.tensor([2, 0])
    part = rollout.kept(index)
    for f in fields(Rollout):
        value = getattr(rollout, f.name)
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(part, f.name).nan_to_num(9), value[index].nan_to_num(9)), f.name
    assert torch.equal(trajectory_logp(part, trajectory_rows(part)), trajectory_logp(rollout, trajectory_rows(rollout))[index])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda r: r.state_at(-1), ValueError, ["step", "-1"]),
        (lambda r: r.state_at(torch.tensor([1, 2])), ValueError, ["step", "2", "3"]),
        (lambda r: r.state_at(torch.ones(3)), TypeError, ["step", "float32"]),
        (lambda r: step_entropy(r.commit_entropy_BL, r.commit_step_BL, steps=2), ValueError, ["commit_step_BL", "5"]),
        (lambda r: step_entropy(r.commit_step_BL, r.commit_step_BL), TypeError, ["commit_entropy_BL", "int32"]),
        (lambda r: step_entropy(r.commit_entropy_BL, r.commit_step_BL[:2]), ValueError, ["commit_step_BL"]),
        (lambda r: step_entropy(r.commit_entropy_BL, r.commit_step_BL.float()), TypeError, ["commit_step_BL", "float32"]),
        (lambda r: select_steps(torch.zeros(4, 3), 0), ValueError, ["k", "0"]),
        (lambda r: select_steps(torch.zeros(4, 3), 2, "least"), ValueError, ["how", "least", "entropy"]),
        (lambda r: select_steps(torch.zeros(4, 3), 2, "random"), ValueError, ["sequence_ids", "None"]),
        (lambda r: select_steps(torch.zeros(4, 3), 2, "random", sequence_ids=IDS[:2]), ValueError, ["sequence_ids", "2", "3"]),
        (lambda r: select_steps(torch.zeros(4), 2), ValueError, ["entropy_TB", "4"]),
        (lambda r: trajectory_rows(r.ids_BS), TypeError, ["rollout", "Tensor"]),
        (lambda r: trajectory_rows(r, segments=2, shrink=2), ValueError, ["segments", "shrink"]),
        (lambda r: trajectory_rows(r, torch.zeros(2, 2, dtype=torch.int64)), ValueError, ["steps_BJ", "2", "3"]),
        (lambda r: trajectory_rows(r, torch.zeros(3, 2)), TypeError, ["steps_BJ", "float32"]),
        (lambda r: trajectory_rows(r, torch.full((3, 2), 99)), ValueError, ["steps_BJ", "99"]),
        (lambda r: trajectory_logp(r, trajectory_rows(r, shrink=2)), ValueError, ["plan", "shrink"]),
        (lambda r: trajectory_logp(r, trajectory_rows(r, segments=2)), ValueError, ["plan", "segments"]),
    ],
)
def test_an_error_names_the_argument_and_what_came(model, call, error, words):
    with pytest.raises(error) as caught:
        call(rollout_of(model))
    for word in words:
        assert word in str(caught.value)
