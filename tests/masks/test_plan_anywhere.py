"""A plan is one thing wherever it is read: cut, moved, saved, on other ranks; EOS tails, prompts, and what
others got wrong.
"""

import itertools
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dllm_kernels import MaskPlan, make_mask_plan, noise, score_tokens
from dllm_kernels.masks.tails import check_removed
from dllm_kernels.noise import Stream
from dllm_kernels.objectives import BGPO, Batch
from tests.masks import masks_on_ranks
from tests.plans import MASK, PRESETS, plan_of, preset

PARTS = ("masked", "scored", "noisy_ids", "counts", "weight_KB", "p_mask_KB", "lengths_B", "share_K")


def assert_same(got: MaskPlan, want: MaskPlan):
    for name in PARTS:
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    for name in ("index", "target", "sequence", "sample", "weight"):
        assert torch.equal(getattr(got.rows, name), getattr(want.rows, name)), name


# --- EOS and prompt -----------------------------------------------------------------------------------------

EOS = 7
TAILED = torch.tensor([[1, 2, 3, EOS, EOS, EOS], [1, 2, 3, 4, 5, EOS], [EOS, 2, EOS, 4, 5, 6], [1, 2, 3, 4, 5, 6]])
TAILED_COMPLETION = torch.tensor([[False] * 2 + [True] * 4] * 4)


def tailed(law, samples, **options):
    ids = torch.arange(4)
    if law in ("trace", "segments"):
        options["step_map_BS"] = torch.where(TAILED_COMPLETION, torch.arange(6) - 2, -1)
    options = {"prompt_noise": 0.0, **options}
    arguments = {"law": law, "samples": samples, "seed": 0, "sequence_ids": ids, "mask_id": MASK}
    return make_mask_plan(TAILED, TAILED_COMPLETION, **arguments, **options)


@pytest.mark.parametrize("name", PRESETS)
def test_the_eos_tail_is_scored_unless_an_eos_id_is_given(name):
    law, samples, options = PRESETS[name]
    kept = tailed(law, samples, **options)
    assert kept.lengths_B.tolist() == [4, 4, 4, 4]
    dropped = tailed(law, samples, eos_id=EOS, **options)
    assert dropped.lengths_B.tolist() == [2, 4, 1, 4]  # up to and with the first EOS of the completion
    tail = TAILED_COMPLETION & torch.tensor([[False] * 4 + [True] * 2, [False] * 6, [False] * 3 + [True] * 3, [False] * 6])
    assert not (dropped.scored & tail).any()
    if law in ("full", "block"):  # as published: hidden, never scored
        assert dropped.masked[:, tail].all()
    elif law in ("trace", "segments"):  # the states of the rollout
        assert torch.equal(dropped.masked, kept.masked)
    else:
        assert not (dropped.masked & tail).any()
    shared = dropped.masked[:, [1, 3]] if law != "trace" else dropped.masked[: len(kept.sample_K), [1, 3]]
    assert torch.equal(shared, kept.masked[:, [1, 3]])  # sequences without a tail are as before


TAIL = TAILED_COMPLETION & torch.tensor([[False] * 4 + [True] * 2, [False] * 6, [False] * 3 + [True] * 3, [False] * 6])


@pytest.mark.parametrize("name", PRESETS)
def test_a_tail_is_shown_hidden_or_removed_and_never_changes_what_is_scored(name):
    law, samples, options = PRESETS[name]
    plans = {tail: tailed(law, samples, eos_id=EOS, tail=tail, **options) for tail in ("shown", "hidden", "removed")}
    for tail, plan in plans.items():
        for part in ("scored", "weight_KB", "lengths_B", "counts"):
            assert torch.equal(getattr(plan, part), getattr(plans["shown"], part)), (tail, part)
        if tail != "hidden":
            assert not plan.masked[:, TAIL].any(), tail
    hidden = plans["hidden"].masked[:, TAIL]
    if law in ("bernoulli", "coupled") or options.get("weight") == "dmpo":  # each token by itself, as without an EOS
        assert torch.equal(hidden, tailed(law, samples, **options).masked[:, TAIL])
        assert not hidden.all()
    elif law not in ("trace", "segments"):
        assert hidden.all()


def test_a_hidden_tail_of_coupled_masks_is_hidden_once_in_each_pair_as_published():
    plan = tailed("coupled", 3, eos_id=EOS, tail="hidden")
    assert plan.masked[0][TAILED_COMPLETION].all()
    assert (plan.masked[1] ^ plan.masked[2])[TAILED_COMPLETION].all()
    assert not plan.scored[:, TAIL].any()


def test_what_a_model_must_not_see_of_a_removed_tail():
    removed = torch.tensor([[False, False, True], [False, False, False]])
    sees = (~removed)[:, None, :].expand(2, 3, 3).clone()
    sees[0, 2] = True  # what is removed may see itself
    heads = torch.stack([sees, sees], 1)
    additive = torch.zeros(2, 3, 3).masked_fill(~sees, -1e4)
    for hides in (~removed, (~removed).long(), sees, sees.long(), heads, additive, additive[:, None]):
        check_removed(removed, hides)
    check_removed(None, None)
    one_head = heads.clone()
    one_head[0, 1, 0, 2] = True
    for shows in (None, torch.ones(2, 3), one_head, one_head[:, 1].long(), additive.clamp(min=-9999.0), additive[:, None] / 2):
        with pytest.raises(ValueError, match=r"that shows 1 token\(s\)"):
            check_removed(removed, shows)
    for shape in ([2], [3, 2], [2, 2, 3], [3, 3, 3], [2, 1, 1, 3, 3]):
        with pytest.raises(ValueError, match="attention_mask must have shape"):
            check_removed(removed, torch.ones(shape))


def test_removed_tails_are_padding_of_plans_of_blocks():
    plan = tailed("exact", 2, eos_id=EOS, tail="removed", causal_block=2)
    assert (plan.block_BS[TAIL] == -1).all()
    assert (plan.block_BS[~TAIL] >= 0).all()


def test_prompt_noise_hides_real_prompt_tokens_independently_and_scores_none():
    plan = plan_of([3] * 500, law="full", samples=4, prompt=8, left_padding=2, prompt_noise=0.4, attention=True)
    prompt = plan.masked[:, :, 2:10]
    n = prompt.numel()
    assert abs(float(prompt.double().mean()) - 0.4) < 5 * math.sqrt(0.24 / n)
    for axis in range(3):
        first, second = (prompt.narrow(axis, start, prompt.shape[axis] - 1).double() - 0.4 for start in (0, 1))
        assert abs(float((first * second).mean())) < 5 * 0.24 / math.sqrt(first.numel())
    assert not plan.scored[:, :, :10].any()
    assert not plan.masked[:, :, :2].any()


def test_the_states_of_a_rollout_share_their_prompt_noise_and_samples_of_a_law_do_not():
    states, later = (preset("segments", [4] * 50, prompt=6, prompt_noise=0.5, iteration=i).masked[..., :6] for i in (0, 1))
    assert states.any()
    assert (states == states[:1]).all()
    assert not torch.equal(states, later)
    drawn = preset("exact", [4] * 50, prompt=6, prompt_noise=0.5).masked[..., :6]
    assert not (drawn == drawn[:1]).all()


def test_prompt_noise_is_keyed_by_the_place_among_real_prompt_tokens():
    plan = plan_of([3, 2], prompt=5, prompt_noise=0.5, attention=True)
    padded = plan_of([3, 2], prompt=5, prompt_noise=0.5, attention=True, left_padding=4)
    assert torch.equal(padded.masked[:, :, 4:], plan.masked)
    assert plan.masked[:, :, :5].any()


def test_prompt_noise_does_not_change_what_the_law_hides():
    for name in PRESETS:
        if name != "block":  # which hides earlier completion tokens as the prompt
            clean, noisy = preset(name, [5, 3], prompt_noise=0.0), preset(name, [5, 3], prompt_noise=0.7)
            assert torch.equal(clean.scored, noisy.scored)
            assert torch.equal(clean.masked[:, :, 2:], noisy.masked[:, :, 2:])


def test_without_an_attention_mask_everything_before_the_completion_is_prompt_and_nothing_after_it():
    plan = plan_of([3, 0], S=8, prompt=4, prompt_noise=1.0)
    assert plan.masked[:, 0, :4].all()
    assert not plan.masked[:, 0, 7:].any()
    assert not plan.masked[:, 1].any()  # no completion, so nothing is before it


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"prompt_noise": 1.5}, ValueError, "prompt_noise.*1.5"),
        ({"prompt_noise": -0.1}, ValueError, "prompt_noise.*-0.1"),
        ({"eos_id": -1}, ValueError, "eos_id.*-1"),
        ({"eos_id": 1, "tail": "dropped"}, ValueError, "tail.*dropped"),
        ({"tail": "shown"}, ValueError, "tail must be None without eos_id.*shown"),
        ({"attention_mask_BS": torch.ones(2, 4)}, TypeError, "attention_mask_BS.*float32"),
        ({"attention_mask_BS": torch.ones(2, 4, dtype=torch.bool)}, ValueError, "attention_mask_BS.*4"),
        ({"attention_mask_BS": torch.zeros(2, 5, dtype=torch.int64)}, ValueError, "completion_mask_BS.*attention_mask_BS"),
    ],
)
def test_bad_noise_eos_and_attention_masks_are_named(changes, error, words):
    arguments = {"law": "exact", "samples": 2, "seed": 0, "sequence_ids": torch.tensor([1, 2]), "mask_id": MASK}
    with pytest.raises(error, match=words):
        make_mask_plan(torch.arange(10).reshape(2, 5), torch.ones(2, 5, dtype=torch.bool), **arguments, **changes)


# --- the same plan elsewhere --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_moved_saved_and_loaded_a_plan_is_the_same(name, tmp_path):
    plan = preset(name, [5, 0, 7], prompt_noise=0.3, iteration=1, shift=1, eos_id=11)
    assert_same(plan.to("cpu"), plan)
    assert_same(MaskPlan.from_state_dict(plan.state_dict()), plan)
    plan.save(tmp_path / "plan.pt")
    loaded = MaskPlan.load(tmp_path / "plan.pt")
    assert_same(loaded, plan)
    cut = {"samples": slice(1, 2), "sequences": slice(1, 3)}
    plan.cut(**cut).save(tmp_path / "plan.pt")  # over the other
    assert_same(MaskPlan.load(tmp_path / "plan.pt"), plan.cut(**cut))
    assert [file.name for file in tmp_path.iterdir()] == ["plan.pt"]


def test_a_saved_cut_holds_no_more_than_itself(tmp_path):
    plan = plan_of([400] * 64, samples=4)
    plan.save(tmp_path / "whole")
    plan.cut(sequences=slice(0, 1)).save(tmp_path / "one")
    assert (tmp_path / "one").stat().st_size < (tmp_path / "whole").stat().st_size / 16


def test_a_file_that_is_no_plan_says_so_in_one_sentence(tmp_path):
    plan = plan_of([5, 3])
    plan.save(tmp_path / "plan.pt")
    whole = (tmp_path / "plan.pt").read_bytes()
    state = plan.state_dict()
    bad = {
        "half": whole[: len(whole) // 2],
        "empty": b"",
        "text": b"not a plan",
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    for name, content in {
        "list": [1, 2],
        "format": {**state, "format": 1},
        "missing": {k: v for k, v in state.items() if k != "seed"},
        "unknown": {**state, "temperature": 1.0},
        "law": {**state, "law": "uniform"},
        "type": {**state, "input_ids_BS": "ids"},
        "shape": {**state, "sequence_ids_B": torch.arange(3)},
    }.items():
        torch.save(content, tmp_path / name)
    for path in sorted(tmp_path.iterdir()):
        if path.name != "plan.pt":
            with pytest.raises(ValueError, match=r"path must|state must|law must|input_ids_BS|sequence_ids") as caught:
                MaskPlan.load(path)
            assert "\n" not in str(caught.value), path
    with pytest.raises(FileNotFoundError):
        MaskPlan.load(tmp_path / "nothing")


def test_loading_runs_no_code_of_the_file(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    torch.save({**plan_of([2]).state_dict(), "law": Evil()}, tmp_path / "plan.pt")
    with pytest.raises(ValueError, match="cannot be read"):
        MaskPlan.load(tmp_path / "plan.pt")
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("name", PRESETS)
def test_without_the_extension_the_bits_are_the_same(name, monkeypatch):
    """What every other device and an install without a compiler take."""
    lengths = [5, 0, 7, 40]
    plan = preset(name, lengths, prompt_noise=0.3)
    masked = plan.masked
    monkeypatch.setattr(noise, "_C", None)
    assert torch.equal(preset(name, lengths, prompt_noise=0.3).masked, masked)


def test_on_1_2_and_4_processes_the_masks_are_identical(tmp_path):
    command = [sys.executable, "-m", "tests.masks.masks_on_ranks"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    subprocess.run([*command, str(tmp_path / "store"), str(tmp_path / "out.pt")], env=environment, timeout=800, check=True)
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert len(found) == 3 * len(PRESETS)
    for (world, name), shares in found.items():
        whole = masks_on_ranks.masks(name, list(range(8)))
        for rank, parts in enumerate(shares):
            for got, want in zip(parts, (whole.masked, whole.scored, whole.weight_KB), strict=True):
                states = got.shape[0]  # of a trace: as many as the sequences at hand have
                assert torch.equal(got, want[:states, rank::world])
                assert states == want.shape[0] or not whole.masked[states:, rank::world, 2:].any()


# --- micro-batches ------------------------------------------------------------------------------------------


def bitwise_body(seed=0):
    """Hidden states that depend on a token and its place alone, bit by bit, and a head: what is left is the
    library's.
    """
    g = torch.Generator().manual_seed(seed)
    embedding, position, weight = (torch.randn(n, 16, generator=g) for n in (MASK + 1, 16, MASK + 1))
    return lambda ids_KBS: embedding[ids_KBS] + position[: ids_KBS.shape[-1]], weight


@pytest.mark.parametrize("name", PRESETS)
def test_micro_batches_of_any_size_give_the_same_bits_of_loss_terms(name):
    body, weight = bitwise_body()
    plan = preset(name, [5, 0, 7, 3, 6], prompt_noise=0.2, shift=1)
    K, B, _ = plan.shape
    advantages = torch.linspace(-1.0, 1.0, B)
    old = -torch.rand(B, K, generator=torch.Generator().manual_seed(2)) * 40
    batch = Batch({"advantages": advantages}, {"old_sample_elbo": old})

    def terms(cut):
        logp = score_tokens(body(cut.noisy_ids), weight, cut.rows.target, rows=cut.rows.index).logp
        return logp, logp * cut.rows.weight, cut.elbo(logp)

    logp, term, elbo = terms(plan)
    for samples, sequences in ((1, 1), (1, B), (K, 1), (2, 3), (3, 2), (K, 2), (K, B)):
        contributions = torch.zeros((), dtype=torch.float64)
        for k, b in itertools.product(range(0, K, samples), range(0, B, sequences)):
            part = {"samples": slice(k, k + samples), "sequences": slice(b, b + sequences)}
            cut = plan.cut(**part)
            inside = (plan.rows.sample // samples == k // samples) & (plan.rows.sequence // sequences == b // sequences)
            got = terms(cut)
            assert torch.equal(got[0], logp[inside])
            assert torch.equal(got[1], term[inside])
            assert torch.equal(got[2], elbo[part["sequences"], part["samples"]])
            contributions += BGPO.contributions(got[0], cut, batch.cut(**part)).double()
        want = BGPO.contributions(logp, plan, batch).double()
        torch.testing.assert_close(contributions, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PRESETS)
def test_policy_old_and_reference_see_the_same_masks(name):
    """A plan is read by each; one made anew from the same keys, as after a resume, is the same too."""
    plan, again = (preset(name, [5, 3, 7], iteration=4, prompt_noise=0.3) for _ in range(2))
    policy = plan.noisy_ids.clone()
    torch.rand(100)  # another user of the global generator
    plan.cut(samples=slice(0, 1)).rows  # noqa: B018
    assert torch.equal(plan.noisy_ids, policy)
    assert_same(again, plan)


# --- what others got wrong (PITFALLS.md, "In dLLM training code") -------------------------------------------


def test_a_micro_batch_planned_alone_has_the_masks_of_the_whole_batch():
    """unturtle #40: micro-batch masks differed from those of the rollout; dllm #109: the iteration index
    advanced per micro-batch under gradient accumulation, so old and new scores had different masks.
    """
    ids = torch.arange(40, 46)
    whole = plan_of([5, 3, 7, 2, 6, 4], samples=4, ids=ids, iteration=2)
    for b in range(0, 6, 2):
        alone = plan_of([5, 3, 7, 2, 6, 4][b : b + 2], S=9, samples=4, ids=ids[b : b + 2], iteration=2)
        cut = whole.cut(sequences=slice(b, b + 2))
        assert torch.equal(alone.masked, whole.masked[:, b : b + 2])
        assert cut.iteration == whole.iteration == 2
        assert torch.equal(cut.masked, alone.masked)


def test_iterations_are_numbered_without_a_gap_or_an_overlap():
    """unturtle #40: the iteration index was off by one. Sample k of iteration i is noise sample i K + k."""
    t, ids = 0.5, torch.tensor([5, 6])
    for iteration in range(3):
        plan = plan_of([6, 4], law="bernoulli", t=t, samples=4, ids=ids, iteration=iteration, prompt=0)
        for k in range(4):
            bits = noise.row_bits(0, Stream.MASK, ids[:, None], torch.tensor(4 * iteration + k), torch.arange(6))
            assert torch.equal(plan.masked[k], (noise.uniform(bits) < t) & plan.completion_mask_BS)
    twice = plan_of([6, 4], law="bernoulli", t=t, samples=8, ids=ids, prompt=0).masked
    halves = [plan_of([6, 4], law="bernoulli", t=t, samples=4, ids=ids, iteration=i, prompt=0).masked for i in (0, 1)]
    assert torch.equal(twice, torch.cat(halves))


@pytest.mark.parametrize("name", [n for n in PRESETS if not n.startswith(("trace", "segments", "full", "quadrature"))])
def test_every_iteration_has_its_own_masks_under_every_law(name):
    first, second = (preset(name, [30] * 20, iteration=i, block_length=16).masked if name == "block" else
                     preset(name, [30] * 20, iteration=i).masked for i in (0, 1))  # fmt: skip
    random = slice(1, None) if name == "coupled" else slice(None)  # its first sample hides everything
    assert (first[random] != second[random]).any(-1).float().mean() > 0.8


def test_scores_belong_to_their_own_sequence_and_sample():
    """unturtle #40: log-probs were sliced on the wrong dimension. Three sizes that differ, and a log-prob
    that names its row.
    """
    plan = plan_of([5, 3, 7], samples=4)
    rows = plan.rows
    logp = (100 * rows.sequence + rows.sample).double() / rows.weight.double()
    want = torch.tensor([[(100.0 * b + k) * int(plan.counts[k, b]) for k in range(4)] for b in range(3)], dtype=torch.float64)
    torch.testing.assert_close(plan.elbo(logp), want)


def test_a_weight_is_what_the_law_says_and_no_hidden_floor_bounds_it():
    """Pitfall 12: 1 / t explodes near 0 and repositories clip it silently. Here t_min, or counts, bound it;
    weights are out.
    """
    tiny = plan_of([4], law="bernoulli", t=1e-12, samples=2)
    assert tiny.weight_KB.tolist() == [[pytest.approx(1e12)], [pytest.approx(1e12)]]
    floored = plan_of([4] * 5000, law="bernoulli", t_min=0.05, samples=4)
    assert 15 < float(floored.weight_KB.max()) <= 20
    for name in ("exact", "exact_zero", "antithetic", "bernoulli, counted"):
        weights = preset(name, [30] * 200).weight_KB
        assert float(weights.max()) <= 31
        assert torch.isfinite(weights).all()


# --- describe, cost -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_describe_says_law_rows_flops_and_memory(name):
    plan = preset(name, [6] * 400, prompt_noise=0.0)
    text = plan.describe(hidden_size=64, vocabulary=1000)
    law = PRESETS[name][0]
    assert law in text.splitlines()[0]
    assert plan.rule.source in text
    expected = int(re.search(r"rows\s+([\d,]+) expected", text)[1].replace(",", ""))
    assert expected == pytest.approx(int(plan.counts.sum()), rel=0.05)
    flops = float(re.search(r"head\s+([\d.e+]+) FLOPs", text)[1])
    assert flops == pytest.approx(2 * expected * 64 * 1000, rel=6e-3)
    assert f"2 N H V = {2 * expected:,} H V FLOPs" in plan.describe()
    cut = plan.cut(samples=slice(0, 1))
    first = int(re.search(r"rows\s+([\d,]+) expected", cut.describe())[1].replace(",", ""))
    assert first == pytest.approx(int(cut.counts.sum()), rel=0.12, abs=40)


def test_describe_counts_the_logits_that_are_avoided():
    plan = plan_of([512] * 2, law="full", samples=1, prompt=0)
    text = plan.describe(hidden_size=4096, vocabulary=126464, dtype=torch.bfloat16)
    assert "1024 expected" in text.replace(",", "")
    assert f"{2 * 1024 * 4096 * 126464:.3g} FLOPs" in text
    assert f"{1024 * 126464 * 2 / 2**20:.4g} MiB" in text
    assert "noisy ids 8 KiB, masks 1 KiB, rows 36 KiB" in text, "four int64 and an fp32 a row"


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", PRESETS)
def test_no_python_loop_runs_over_sequences_or_samples(name):
    def operations(B):
        law, samples, options = PRESETS[name]
        ids = torch.arange(B * 9).reshape(B, 9) % 90
        if law in ("trace", "segments"):
            options = {**options, "step_map_BS": torch.arange(9).expand(B, 9)}
        sequence_ids, completion = torch.arange(B), torch.ones(B, 9, dtype=torch.bool)
        with Operations() as counted:
            plan = make_mask_plan(
                ids, completion, law=law, samples=samples, seed=0, sequence_ids=sequence_ids, mask_id=MASK, **options
            )
            plan.rows, plan.noisy_ids, plan.counts  # noqa: B018
        return counted.count

    assert operations(3) == operations(96)


@pytest.mark.slow
def test_a_plan_takes_less_than_a_twentieth_of_one_forward_pass_of_the_demo_model():
    """B = 64, K = 16, L = 512: the whole plan, with rows and weights, against one forward of one of its 16
    samples.
    """
    from transformers import EuroBertConfig, EuroBertForMaskedLM

    config = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = EuroBertForMaskedLM(
        EuroBertConfig(**config, vocab_size=18, num_key_value_heads=4, max_position_embeddings=512, pad_token_id=0)
    ).eval()
    ids = torch.arange(64 * 512).reshape(64, 512) % 17
    sequence_ids = noise.sequence_ids(list(range(64)))

    def plan(law):
        plan = make_mask_plan(
            ids, torch.ones_like(ids, dtype=torch.bool), law=law, samples=16, seed=0, sequence_ids=sequence_ids, mask_id=17
        )
        return plan.noisy_ids, plan.rows, plan.counts, plan.weight_KB

    def seconds(function, runs):
        times = []
        for _ in range(runs):
            started = time.perf_counter()
            function()
            times.append(time.perf_counter() - started)
        return min(times)

    with torch.no_grad():
        forward = seconds(lambda: model(input_ids=ids), 4)
    for law in ("exact", "bernoulli", "block"):  # of the laws the last is the slowest
        assert seconds(lambda: plan(law), 8) < 0.05 * forward, law  # noqa: B023
