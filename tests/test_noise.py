"""Noise is a pure function of (seed, stream, sequence, sample, position, token, step), and of good quality."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dllm_kernels as dk
from dllm_kernels import noise
from dllm_kernels.noise import Stream
from dllm_kernels.objectives import BGPO, Batch
from tests import oracle
from tests.tiny import eurobert

WORDS = st.integers(0, 2**32 - 1)
ONES = 0xFFFFFFFF


def philox(counter, key):
    words = noise.philox4x32(tuple(torch.tensor(c) for c in counter), tuple(torch.tensor(k) for k in key))
    return tuple(int(w) for w in words)


def test_philox_gives_the_published_vectors():
    """Known answers of Random123 (kat_vectors, philox4x32 10)."""
    for counter, key, answer in (
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ):
        assert philox(counter, key) == answer
        assert oracle.philox(counter, key) == answer


@given(counter=st.tuples(WORDS, WORDS, WORDS, WORDS), key=st.tuples(WORDS, WORDS))
def test_philox_equals_python_integers(counter, key):
    assert philox(counter, key) == oracle.philox(counter, key)


@given(seed=WORDS, stream=st.sampled_from(Stream), sequence=st.integers(-(2**63), 2**63 - 1), sample=WORDS, position=WORDS)
def test_the_row_key_has_the_layout_of_the_contract(seed, stream, sequence, sample, position):
    pattern = sequence % 2**64
    want = oracle.philox((pattern % 2**32, pattern >> 32, sample, position), (seed, int(stream)))
    got = int(noise.row_bits(seed, stream, torch.tensor(sequence), torch.tensor(sample), torch.tensor(position)))
    assert got % 2**64 == want[1] << 32 | want[0]


@given(key=st.integers(-(2**63), 2**63 - 1), tokens=st.integers(1, 11), step=st.integers(0, 2**20), tag=st.sampled_from([0, 1]))
def test_element_bits_have_the_layout_of_the_contract(key, tokens, step, tag):
    row_key = (key % 2**32, key % 2**64 >> 32)
    want = [oracle.philox((v >> 2, step, 0, tag), row_key)[v & 3] for v in range(tokens)]
    assert noise.element_bits(torch.tensor([key]), tokens, step=step, tag=tag).tolist() == [want]


def test_steps_may_differ_by_row():
    keys = noise.row_bits(3, Stream.TOKEN, torch.tensor([1, 2]), torch.tensor(0), torch.tensor(0))
    both = noise.element_bits(keys, 7, step=torch.tensor([4, 9]))
    assert torch.equal(both[0], noise.element_bits(keys[:1], 7, step=4)[0])
    assert torch.equal(both[1], noise.element_bits(keys[1:], 7, step=9)[0])


def test_the_streams_keep_their_numbers():
    """Masks and samples of finished runs depend on them."""
    assert {s.name: int(s) for s in Stream} == {"MASK": 1, "LEVEL": 2, "TOKEN": 3, "PROMPT": 4, "DATA": 5, "REMASK": 6}


def test_sequence_id_is_stable_across_machines_and_versions():
    assert noise.sequence_id("gsm8k/17", epoch=2, member=5) == 1185736637412413289
    ids = {
        noise.sequence_id(data, epoch=epoch, member=member)
        for data in ("a", "b", 7, "7", "a1")
        for epoch in (0, 1, 11)
        for member in (0, 1, 11)
    }
    assert len(ids) == 5 * 3 * 3
    assert all(-(2**63) <= i < 2**63 for i in ids)
    assert noise.sequence_ids(["a", "b"], epoch=1, members=[2, 3]).tolist() == [
        noise.sequence_id("a", epoch=1, member=2),
        noise.sequence_id("b", epoch=1, member=3),
    ]


def uniforms(stream=Stream.MASK, *, seed=0, count=40000, axis="position"):
    indices = torch.arange(count)
    zero = torch.zeros((), dtype=torch.int64)
    place = {"sequence": zero, "sample": zero, "position": zero, axis: indices}
    return noise.uniform(noise.row_bits(seed, stream, place["sequence"], place["sample"], place["position"]).expand(count))


@pytest.mark.parametrize("axis", ["sequence", "sample", "position"])
def test_uniforms_are_uniform_along_every_axis(axis):
    u = uniforms(axis=axis)
    counts = torch.histc(u.float(), 64, 0.0, 1.0).double()
    assert oracle.chi_square(counts, torch.full_like(counts, len(u) / 64)) < oracle.chi_square_limit(63)
    assert len(u.unique()) == len(u)


def test_uniform_stays_inside_the_open_interval_at_the_extreme_patterns():
    u = noise.uniform(torch.tensor([0, -1, 2**63 - 1, -(2**63)]))
    assert ((u > 0) & (u < 1)).all()
    assert u[0] == 2.0**-53
    assert u[1] == 1 - 2.0**-53


def test_below_is_uniform_and_inside_its_bound():
    values = noise.below(noise.row_bits(1, Stream.LEVEL, torch.arange(30000), torch.tensor(0), torch.tensor(0)), torch.tensor(7))
    counts = torch.bincount(values, minlength=7).double()
    assert len(counts) == 7
    assert oracle.chi_square(counts, torch.full_like(counts, 30000 / 7)) < oracle.chi_square_limit(6)
    assert int(noise.below(torch.tensor(-1), torch.tensor(5))) == 4


def test_gumbel_noise_has_gumbel_moments_and_tail():
    keys = noise.row_bits(5, Stream.TOKEN, torch.tensor(1), torch.tensor(0), torch.arange(500))
    g = noise.gumbel(keys, 1000).flatten()
    n = g.numel()
    variance = math.pi**2 / 6
    assert abs(float(g.mean()) - 0.5772156649) < 5 * math.sqrt(variance / n)
    assert abs(float(g.var()) - variance) < 5 * variance * math.sqrt(4.4 / n)  # kurtosis 5.4
    for threshold in (2.0, 5.0, 8.0):  # upper tail: P(g > x) = 1 - exp(-e^-x)
        p = -math.expm1(-math.exp(-threshold))
        assert abs(float((g > threshold).double().mean()) - p) < 5 * math.sqrt(p / n)
    p = math.exp(-math.exp(2.0))  # lower tail
    assert abs(float((g < -2.0).double().mean()) - p) < 5 * math.sqrt(p / n)


def test_gumbel_noise_reaches_far_into_the_tail_and_is_always_finite(monkeypatch):
    """32-bit uniforms end at 22; here the extreme 64-bit patterns give 45 and -3.6."""

    def extreme(word):
        monkeypatch.setattr(noise, "element_bits", lambda key, tokens, **_: torch.full((len(key), tokens), word))
        return float(noise.gumbel(torch.tensor([0]), 1)[0, 0])

    assert extreme(0) == pytest.approx(65 * math.log(2), rel=1e-12)
    assert extreme(ONES) == pytest.approx(-math.log(53 * math.log(2)), rel=1e-12)


def test_gumbel_argmax_is_an_exact_sample():
    """P(argmax g = v) = 1 / V: what sampling rests on."""
    keys = noise.row_bits(9, Stream.TOKEN, torch.arange(20000), torch.tensor(0), torch.tensor(0))
    counts = torch.bincount(noise.gumbel(keys, 6).argmax(-1), minlength=6).double()
    assert oracle.chi_square(counts, torch.full_like(counts, 20000 / 6)) < oracle.chi_square_limit(5)


def test_streams_seeds_and_neighbouring_keys_are_pairwise_uncorrelated():
    n = 20001
    series = [uniforms(stream, count=n) for stream in Stream] + [uniforms(seed=1, count=n), uniforms(seed=2**31, count=n)]
    series += [uniforms(axis="sequence", count=n), uniforms(axis="sample", count=n)]
    series = [s[1:] for s in series] + [uniforms(count=n)[:-1]]  # index 0 of different axes is the same draw
    off_diagonal = torch.corrcoef(torch.stack(series)).fill_diagonal_(0.0)
    assert off_diagonal.abs().max() < 5.5 / math.sqrt(n)


def test_steps_and_tags_and_tokens_are_uncorrelated():
    keys = noise.row_bits(0, Stream.TOKEN, torch.tensor(4), torch.tensor(0), torch.arange(200))
    first = noise.element_bits(keys, 100).double()
    others = [noise.element_bits(keys, 100, step=1), noise.element_bits(keys, 100, tag=1)]
    for other in (*(o.double() for o in others), first.roll(1, 1), first.roll(1, 0)):
        assert abs(float(torch.corrcoef(torch.stack([first.flatten(), other.flatten()]))[0, 1])) < 5 / math.sqrt(20000)


def test_permutation_is_one_and_depends_on_seed_epoch_and_stream():
    base = noise.permutation(3, 1000)
    assert torch.equal(base.sort().values, torch.arange(1000))
    assert torch.equal(base, noise.permutation(3, 1000))
    for other in (
        noise.permutation(4, 1000),
        noise.permutation(3, 1000, epoch=1),
        noise.permutation(3, 1000, stream=Stream.PROMPT),
    ):
        assert torch.equal(other.sort().values, torch.arange(1000))
        assert (other == base).sum() < 20
    assert noise.permutation(0, 0).tolist() == []
    first = torch.bincount(torch.tensor([int(noise.permutation(0, 5, epoch=e)[0]) for e in range(500)]), minlength=5)
    assert oracle.chi_square(first.double(), torch.full((5,), 100.0).double()) < oracle.chi_square_limit(4)


def test_no_public_function_touches_a_global_random_state():
    """d1 and ESPO reseed Python, NumPy and torch inside the loss; whatever is sampled after that repeats."""
    model = eurobert()
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    ids = torch.full((2, 6), 3)
    sequences = torch.tensor([1, 2])
    completion = torch.ones_like(ids, dtype=torch.bool)
    for law in ("exact", "bernoulli"):
        plan = dk.make_mask_plan(ids, completion, law=law, samples=4, seed=0, sequence_ids=sequences, mask_id=10)
        report = dk.accumulate(model, plan, BGPO, Batch({"advantages": torch.tensor([1.0, -1.0])}))
        dk.accumulate(
            model, plan, BGPO, Batch({"advantages": torch.tensor([1.0, -1.0])}, {"old_sample_elbo": report.sample_elbo_BK})
        )
    dk.generate(
        model, ids, length=4, steps=2, block_length=2, mask_id=10, temperature=1.0, sequence_ids=sequences, remasking="random"
    )
    hidden, weight = torch.ones(2, 6, 8, requires_grad=True), torch.ones(11, 8)
    dk.score_tokens(hidden, weight, torch.arange(3), rows=torch.arange(3)).logp.sum().backward()
    dk.sample_tokens(hidden, weight, torch.arange(12))
    dk.elbo_loss(hidden, weight, ids, completion, torch.tensor(0.5)).backward()
    dk.bgpo_loss(hidden, weight, ids, completion, torch.tensor(2.0), None, torch.ones(2), 4).backward()
    noise.permutation(0, 9)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, True, "0"])
def test_a_seed_beyond_one_key_word_is_an_error(seed):
    with pytest.raises((ValueError, TypeError), match="seed"):
        noise.row_bits(seed, Stream.MASK, torch.tensor(0), torch.tensor(0), torch.tensor(0))


def test_sequence_ids_need_one_member_each():
    with pytest.raises(ValueError, match="members"):
        noise.sequence_ids(["a", "b"], members=[1])
