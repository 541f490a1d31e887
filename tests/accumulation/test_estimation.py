"""`estimate_elbo`: the direct computation, any cut, equal masks for every model, flat memory, refusals."""

import functools
import math
import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

from dllm_kernels import estimate_elbo, make_mask_plan
from dllm_kernels.accumulation.estimation import content_ids
from tests.tiny import eurobert

MB = 2**20
V, MASK = 11, 10
LAWS = [
    ("exact", 4, {}),
    ("bernoulli", 3, {"t_min": 0.1}),
    ("exact_zero", 4, {"pairing": "independent"}),
    ("antithetic", 4, {}),
    ("antithetic", 4, {"weight": "dmpo"}),
    ("coupled", 5, {}),
    ("quadrature", 6, {}),
    ("full", 2, {}),
    ("block", 4, {"block_length": 2}),
    ("segments", None, {"segments": 3}),
]


def inputs(B=3, S=10, prompt=3, seed=0):
    ids = torch.randint(3, MASK, (B, S), generator=torch.Generator().manual_seed(seed))
    completion = torch.zeros(B, S, dtype=torch.bool)
    for b in range(B):
        completion[b, prompt : S - b] = True  # ragged ends
    return ids, completion


def options_of(options, completion):
    if "segments" not in options:
        return options
    step = torch.where(completion, (completion.cumsum(-1) * 7) % 6, -1)
    return {**options, "step_map_BS": step}


# --- what it computes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize(("law", "samples", "options"), LAWS, ids=str)
def test_it_is_the_weighted_sum_of_log_probs_from_full_logits(law, samples, options, shift):
    model, (ids, completion) = eurobert(vocab=V), inputs()
    arguments = {"law": law, "samples": samples, "seed": 5, "mask_id": MASK, "shift": shift, **options_of(options, completion)}
    found = estimate_elbo(model, ids, completion, **arguments)
    plan = make_mask_plan(ids, completion, sequence_ids=content_ids(ids, completion), **arguments)
    K, B, S = plan.shape
    logp = model(plan.noisy_ids.view(K * B, S)).logits.detach().log_softmax(-1).view(K, B, S, V)
    for b in range(B):
        direct = [
            float(plan.weight_KB[k, b]) * sum(float(logp[k, b, s - shift, ids[b, s]]) for s in range(S) if plan.scored[k, b, s])
            for k in range(K)
        ]
        assert found.sample_elbo_BK[b].tolist() == pytest.approx(direct, rel=1e-6, abs=1e-12)
        shares = plan.share_K.tolist()
        assert float(found.elbo_B[b]) == pytest.approx(sum(w * x for w, x in zip(shares, direct, strict=True)), rel=1e-6)
    assert found.rows == int(plan.scored.sum())
    assert_close(found.standard_error_B, plan.standard_error(found.sample_elbo_BK), equal_nan=True)
    assert not found.elbo_B.requires_grad


def test_it_is_near_the_bound_by_enumeration_and_its_error_is_as_stated():
    """Sequences of 4 scored tokens: the bound over all 15 masks, against many samples."""
    model = eurobert(vocab=V)
    B, L = 200, 4
    ids = torch.randint(3, MASK, (B, L + 1), generator=torch.Generator().manual_seed(1))
    completion = torch.arange(L + 1).expand(B, -1) >= 1
    hidden_M = torch.tensor([[False] + [code >> p & 1 == 1 for p in range(L)] for code in range(1, 2**L)])
    with torch.no_grad():
        logits = model(ids[:, None].masked_fill(hidden_M, MASK).view(-1, L + 1)).logits
    logp = (
        logits.log_softmax(-1).view(B, len(hidden_M), L + 1, V).gather(-1, ids[:, None, :, None].expand(-1, len(hidden_M), -1, 1))
    )
    n_M = hidden_M.sum(-1)
    weight_M = 1 / (n_M * torch.tensor([math.comb(L, int(n)) for n in n_M]))
    bound_B = ((logp[..., 0] * hidden_M).sum(-1) * weight_M).sum(-1)
    found = estimate_elbo(
        model, ids, completion, samples=32, law="exact", pairing="independent", mask_id=MASK, samples_per_pass=32
    )
    z_B = (found.elbo_B - bound_B) / found.standard_error_B
    assert float(z_B.mean().abs()) < 0.3
    assert 0.8 < float(z_B.std()) < 1.3


@pytest.mark.parametrize(("samples_per_pass", "sequences_per_pass"), [(1, 1), (1, 3), (2, 2), (3, None), (64, 64)])
@pytest.mark.parametrize(("law", "samples", "options"), LAWS, ids=str)
def test_the_cut_changes_neither_result_nor_rows(law, samples, options, samples_per_pass, sequences_per_pass):
    model, (ids, completion) = eurobert(vocab=V), inputs()
    arguments = {"law": law, "samples": samples, "mask_id": MASK, **options_of(options, completion)}
    whole = estimate_elbo(model, ids, completion, **arguments, samples_per_pass=64)
    parts = estimate_elbo(
        model, ids, completion, **arguments, samples_per_pass=samples_per_pass, sequences_per_pass=sequences_per_pass
    )
    assert_close(parts.sample_elbo_BK, whole.sample_elbo_BK, rtol=1e-12, atol=1e-12)
    assert_close(parts.elbo_B, whole.elbo_B, rtol=1e-12, atol=1e-12)
    assert parts.rows == whole.rows
    assert whole.forwards == 1


def test_a_cut_with_nothing_to_score_costs_no_forward():
    model, (ids, completion) = eurobert(vocab=V), inputs(B=1)
    step = torch.where(completion, 5, -1)
    step[0, 3] = 0  # states 1 to 4 commit nothing
    found = estimate_elbo(model, ids, completion, law="trace", samples=None, step_map_BS=step, mask_id=MASK)
    assert (found.forwards, found.rows, found.sample_elbo_BK.shape) == (2, int(completion.sum()), (1, 6))


# --- masks and ids ------------------------------------------------------------------------------------------


def noisy_ids_seen(model, *arguments, **options):
    seen = []
    hook = model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"].clone()), with_kwargs=True)
    estimate_elbo(model, *arguments, **options)
    hook.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("law", ["exact", "bernoulli", "antithetic"])
def test_policy_and_reference_see_equal_masks(law):
    ids, completion = inputs()
    options = {"law": law, "samples": 4, "seed": 3, "mask_id": MASK}
    policy, reference = eurobert(vocab=V, seed=0), eurobert(vocab=V, seed=1, hidden=16)
    seen = noisy_ids_seen(policy, ids, completion, **options)
    assert torch.equal(seen, noisy_ids_seen(reference, ids, completion, **options))
    assert not torch.equal(seen, noisy_ids_seen(policy, ids, completion, **{**options, "seed": 4}))
    assert not torch.equal(seen, noisy_ids_seen(policy, ids, completion, **options, iteration=1))


def test_a_sequence_s_estimate_does_not_depend_on_its_batch_or_padding():
    model, (ids, completion) = eurobert(vocab=V), inputs()
    options = {"samples": 4, "mask_id": MASK}
    real = torch.arange(10) < torch.tensor([[10], [9], [8]])
    whole = estimate_elbo(model, ids, completion, **options, model_kwargs={"attention_mask": real.long()})
    flipped = estimate_elbo(
        model, ids.flip(0), completion.flip(0), **options, model_kwargs={"attention_mask": real.flip(0).long()}
    )
    assert_close(flipped.elbo_B.flip(0), whole.elbo_B, rtol=1e-12, atol=1e-12)
    alone = estimate_elbo(model, ids[2:, :8], completion[2:, :8], **options, model_kwargs={"attention_mask": real[2:, :8].long()})
    assert_close(alone.elbo_B, whole.elbo_B[2:], rtol=1e-9, atol=1e-9)


def test_content_ids_tell_rows_apart_and_see_nothing_else():
    ids = torch.tensor([[4, 5, 6], [4, 6, 5], [4, 5, 7], [4, 5, 6], [4, 5, 6]])
    completion = torch.tensor([[False, True, True]] * 3 + [[False, False, True], [False, True, True]])
    found = content_ids(ids, completion)
    assert len(set(found.tolist())) == 5, "order, token, what is scored, and how many equal rows came before"
    assert torch.equal(content_ids(ids[:4], completion[:4]), found[:4])
    padded = torch.cat([torch.full((4, 2), 9), ids[:4]], 1)
    attention = torch.tensor([[0, 0, 1, 1, 1]] * 4)
    wider = torch.cat([torch.zeros(4, 2, dtype=torch.bool), completion[:4]], 1)
    assert torch.equal(content_ids(padded, wider, attention), found[:4])
    assert not torch.equal(content_ids(padded, wider), found[:4])
    many = torch.randint(0, 50, (20000, 8), generator=torch.Generator().manual_seed(0))
    assert len(content_ids(many, torch.ones_like(many, dtype=torch.bool)).unique()) == 20000
    assert content_ids(torch.tensor([[1, 2]]), torch.tensor([[False, True]])).tolist() == [4341688242830997316]


def test_given_sequence_ids_are_used():
    model, (ids, completion) = eurobert(vocab=V), inputs()
    options = {"samples": 3, "mask_id": MASK}
    mine = noisy_ids_seen(model, ids, completion, **options, sequence_ids=torch.tensor([7, 8, 9]))
    plan = make_mask_plan(ids, completion, law="exact", seed=0, sequence_ids=torch.tensor([7, 8, 9]), **options)
    assert torch.equal(mine, plan.noisy_ids.flatten(0, 1))


# --- refusals, progress, state ------------------------------------------------------------------------------


def test_active_dropout_is_refused_and_the_mode_is_left_alone():
    ids, completion = inputs()
    model = eurobert(vocab=V, attention_dropout=0.1).train()
    with pytest.raises(ValueError, match="dropout is active"):
        estimate_elbo(model, ids, completion, samples=2, mask_id=MASK)
    assert model.training
    trained = eurobert(vocab=V).train()
    random_state = torch.get_rng_state()
    estimate_elbo(trained, ids, completion, samples=2, mask_id=MASK)
    assert trained.training
    assert all(p.grad is None for p in trained.parameters())
    assert torch.equal(random_state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"law": "exacts"}, "law must be one of"),
        ({"t_min": 0.1}, "t_min is no option of law='exact'"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"samples_per_pass": 0}, "samples_per_pass must be at least 1"),
        ({"sequences_per_pass": 0}, "sequences_per_pass must be at least 1"),
        ({"seed": -1}, "seed must be in"),
        ({"progress": "yes"}, "progress must be True, False or a function"),
        ({"model_kwargs": {"attention_mask": torch.ones(2, 10)}}, "attention_mask must have shape"),
        ({"sequence_ids": torch.tensor([1, 1, 2])}, "sequence_ids must be distinct"),
        ({"mask_id": 5}, "input_ids_BS must not hold mask_id=5"),
        ({"suppress": (99,)}, "suppress"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(change, expected):
    ids, completion = inputs()
    ids[0, 4] = 5
    with pytest.raises((ValueError, TypeError), match=expected):
        estimate_elbo(eurobert(vocab=V), ids, completion, **{"samples": 2, "mask_id": MASK, **change})


def test_bad_tensors_and_models_are_named():
    ids, completion = inputs()
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        estimate_elbo("model", ids, completion, mask_id=MASK)
    with pytest.raises(TypeError, match="input_ids_BS must be"):
        estimate_elbo(eurobert(vocab=V), ids.float(), completion, mask_id=MASK)
    with pytest.raises(ValueError, match="completion_mask_BS must have shape"):
        estimate_elbo(eurobert(vocab=V), ids, completion[:2], mask_id=MASK)
    with pytest.raises(ValueError, match="input_ids_BS must hold at least one sequence"):
        estimate_elbo(eurobert(vocab=V), ids[:0], completion[:0], mask_id=MASK)


def test_progress_is_told_after_every_cut_and_only_if_asked(capsys):
    model, (ids, completion) = eurobert(vocab=V), inputs()
    calls = []
    options = {"samples": 4, "mask_id": MASK, "samples_per_pass": 3, "sequences_per_pass": 2}
    estimate_elbo(model, ids, completion, **options, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(6, 12), (9, 12), (11, 12), (12, 12)]
    assert capsys.readouterr() == ("", "")
    estimate_elbo(model, ids, completion, **options, progress=True)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.endswith("\restimate_elbo: 12 of 12 masked sequences\n")


def test_one_sample_has_no_standard_error():
    model, (ids, completion) = eurobert(vocab=V), inputs()
    assert estimate_elbo(model, ids, completion, samples=1, mask_id=MASK).standard_error_B.isnan().all()


# --- memory -------------------------------------------------------------------------------------------------

PROBE = """
import sys
import torch
from dllm_kernels import estimate_elbo
from tests.tiny import eurobert

torch.set_num_threads(1)
B, S, V = 4, 512, 64
model = eurobert(vocab=V, hidden=64, layers=1, dtype=torch.float32)
ids = torch.randint(3, V - 1, (B, S), generator=torch.Generator().manual_seed(0))
completion = torch.arange(S).expand(B, -1) >= 8
# not ru_maxrss: a child starts with its parent's, so that in a large pytest nothing would seem to grow
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024

def run(K):
    at_once = K if sys.argv[1] == "at_once" else 1
    estimate_elbo(model, ids, completion, law="bernoulli", t=1.0, samples=K, mask_id=V - 1, samples_per_pass=at_once)

run(4)
run(4)
before = peak()
run(64)
print(peak() - before)
"""


@functools.cache
def growth(case):
    """Bytes by which the peak resident set of a fresh process grows from K = 4 to K = 64."""
    done = subprocess.run([sys.executable, "-c", PROBE, case], capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/status is Linux's")
def test_memory_is_flat_in_the_number_of_samples():
    assert growth("one_by_one") < 8 * MB
    assert growth("at_once") > 100 * MB
