"""Unbiasedness by exact enumeration: every outcome of the noise, times its probability, through the library's
own laws.

The noise is replaced by a table. Sequence b of a batch is outcome b: its level bits and its mask bits are
given, and its probability is known, so that levels, pairing, masks, weights and shares are those of
`dllm_kernels.masks.laws` and `draws`, in float64. Continuous levels are integrated by a Gauss-Legendre rule,
which is exact for these polynomials.
"""

import itertools
import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
import torch

from dllm_kernels import make_mask_plan, noise
from dllm_kernels.masks import draws, laws
from dllm_kernels.noise import Stream
from tests import oracle

TOLERANCE = {"rel": 0, "abs": 1e-12}
LENGTHS = (1, 2, 3, 5)


def bits_of(u):
    """64-bit patterns, as int64, whose `noise.uniform` is u to 2^-53."""
    high = (np.asarray(u, dtype=np.float64) * 2.0**52).astype(np.int64)
    return torch.from_numpy((high.astype(np.uint64) << np.uint64(12)).view(np.int64))


@dataclass(frozen=True)
class Outcomes:
    """Every outcome of one sequence's noise: bits, and probabilities that sum to 1."""

    level_bits_B: torch.Tensor
    mask_bits_BL: torch.Tensor
    probability_B: torch.Tensor

    def row_bits(self, seed, stream, sequence_id, sample, position):
        """Stands in for `noise.row_bits`; the samples of a sequence share their outcome, as an expectation
        may.
        """
        sequence_id, _, position = torch.broadcast_tensors(sequence_id, sample, position)
        if stream == Stream.LEVEL:
            return self.level_bits_B[sequence_id]
        assert stream == Stream.MASK
        return self.mask_bits_BL[sequence_id, position]


def by_counts(length, choices):
    """A level of `choices` equal parts and a random order of the tokens: for laws that draw a count, or none."""
    orders = list(itertools.permutations(range(length)))
    level = [(c + 0.5) / choices for c in range(choices) for _ in orders]
    mask = [[(rank + 0.5) / length for rank in order] for order in orders] * choices
    return Outcomes(bits_of(level), bits_of(mask), torch.full((len(level),), 1 / len(level), dtype=torch.float64))


def by_t(length, low, high):
    """A level uniform on (low, high) and every mask of independent tokens: for laws that draw a probability."""
    node, weight = np.polynomial.legendre.leggauss(length + 3)  # exact to degree 2 L + 5
    patterns = list(itertools.product((False, True), repeat=length))
    level, mask, probability = [], [], []
    for u, w in zip((node + 1) / 2, weight / 2, strict=True):
        t = low + (high - low) * u
        for pattern in patterns:
            level.append(u)
            mask.append([0.0 if hidden else 1 - 2.0**-52 for hidden in pattern])
            probability.append(w * t ** sum(pattern) * (1 - t) ** (length - sum(pattern)))
    return Outcomes(bits_of(level), bits_of(mask), torch.tensor(probability, dtype=torch.float64))


def outcomes_of(law, options, length):
    if law.level == "t":
        low, high = (options["t_low"], options["t_high"]) if law.name == "coupled" else (options["t_min"], 1.0)
        return by_t(length, low, high)
    return by_counts(length, {"count from 1": length, "count from 0": length + 1}.get(law.level, 1))


def table(length, seed=0):
    """A toy denoiser: a log-prob of token l under mask m for every (m, l); `scores[code of m]` is their sum,
    float64.
    """
    generator = torch.Generator().manual_seed(seed)
    logp_ML = -3 * torch.rand(2**length, length, generator=generator, dtype=torch.float64)
    hidden_ML = (torch.arange(2**length)[:, None] >> torch.arange(length)) % 2 == 1
    return torch.where(hidden_ML, logp_ML, 0.0)


def mean_at_count(scores_ML, n):
    """`E_{|m|=n} sum_{l in m} logp`."""
    length = scores_ML.shape[1]
    codes = [sum(1 << p for p in m) for m in itertools.combinations(range(length), n)]
    return float(scores_ML.sum(-1)[codes].mean())


def exact_elbo(scores_ML):
    length = scores_ML.shape[1]
    total = {
        m: float(scores_ML.sum(-1)[sum(1 << p for p in m)])
        for n in range(length + 1)
        for m in itertools.combinations(range(length), n)
    }
    return oracle.any_order_elbo(total, length)


def expectations(name, options, samples, scores_ML, monkeypatch):
    """(score, each sample's own weighted sum `[K]`), averaged over every outcome, by the library's laws in
    float64.
    """
    length = scores_ML.shape[1]
    law, full = laws.resolve(name, options)
    laws.check_samples(law, full, samples)
    outcomes = outcomes_of(law, full, length)
    B = len(outcomes.probability_B)
    assert float(outcomes.probability_B.sum()) == pytest.approx(1.0, **TOLERANCE)
    monkeypatch.setattr(noise, "row_bits", outcomes.row_bits)
    keys = draws.Keys(seed=0, iteration=0, samples=samples, sample_K=torch.arange(samples), sequence_ids_B=torch.arange(B))
    lengths_B = torch.full((B,), length)
    level = draws.level(law, full, keys, lengths_B)
    hidden_KBL = draws.hidden(law, keys, level, torch.ones(B, length, dtype=torch.bool))
    scored_KB = hidden_KBL.sum(-1) if law.weight in draws.REALISED else None
    weight_KB = draws.weights(law, full, keys, level, lengths_B, scored_KB)
    assert weight_KB.dtype == torch.float64
    monkeypatch.undo()
    score_KB = scores_ML.sum(-1)[(hidden_KBL.long() << torch.arange(length)).sum(-1)]
    sample_K = (weight_KB * score_KB * outcomes.probability_B).sum(-1)
    return float((laws.shares(law, full, torch.arange(samples), samples) * sample_K).sum()), sample_K


CLAIMS = [
    ("bernoulli", {}, 1),
    ("bernoulli", {}, 3),
    ("exact", {}, 1),
    ("exact", {}, 4),
    ("exact", {"pairing": "independent"}, 2),
    ("exact_zero", {}, 1),
    ("exact_zero", {}, 4),
    ("exact_zero", {"pairing": "independent"}, 2),
    ("antithetic", {}, 2),
    ("antithetic", {}, 6),
    ("antithetic", {"pairing": "independent"}, 4),
]
BIASED = [
    ("bernoulli", {"t_min": 0.1}, 1),
    ("bernoulli", {"weight": "L/count"}, 1),
    ("antithetic", {"weight": "dmpo"}, 2),
    ("coupled", {}, 3),
    ("quadrature", {}, 3),
    ("quadrature", {"nodes": 2}, 4),
    ("full", {}, 1),
]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("name", "options", "samples"), CLAIMS, ids=str)
def test_every_law_that_claims_it_is_unbiased(name, options, samples, length, monkeypatch):
    scores = table(length)
    assert laws.resolve(name, options)[0].unbiased
    score, _ = expectations(name, options, samples, scores, monkeypatch)
    assert score == pytest.approx(exact_elbo(scores), **TOLERANCE)


@pytest.mark.parametrize(("name", "options", "samples"), BIASED, ids=str)
def test_every_law_that_is_biased_says_so(name, options, samples, monkeypatch):
    scores = table(5)
    assert not laws.resolve(name, options)[0].unbiased
    score, _ = expectations(name, options, samples, scores, monkeypatch)
    assert abs(score - exact_elbo(scores)) > 1e-3


def test_no_law_of_a_drawn_level_was_forgotten():
    drawn = {name for name, law in laws.LAWS.items() if law.level not in ("block", "steps")}
    assert {name for name, _, _ in CLAIMS + BIASED} == drawn
    assert {name for name, law in laws.LAWS.items() if law.unbiased} == {name for name, _, _ in CLAIMS}


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("name", "options", "samples"), CLAIMS, ids=str)
def test_every_single_sample_is_unbiased(name, options, samples, length, monkeypatch):
    """Also the complement of an antithetic pair, and every stratum: rounding half to even would hide counts
    from some.
    """
    scores = table(length, seed=1)
    _, sample_K = expectations(name, options, samples, scores, monkeypatch)
    assert sample_K.tolist() == pytest.approx([exact_elbo(scores)] * samples, **TOLERANCE)


@pytest.mark.parametrize("mutation", ["weights", "levels", "masks", "shares"])
def test_a_wrong_law_would_be_found(mutation, monkeypatch):
    scores, broken = table(5), pytest.MonkeyPatch()
    weights, below, smallest, shares = draws._over, noise.below, noise.smallest, laws.shares
    if mutation == "weights":
        broken.setattr(draws, "_over", lambda numerator, count: weights(numerator, count) * (1 + 1e-9))
    elif mutation == "levels":
        broken.setattr(noise, "below", lambda bits, bound: below(bits, bound).clamp(max=3))
    elif mutation == "masks":
        broken.setattr(noise, "smallest", lambda bits, mask, count: smallest(bits, mask, (count + 1).clamp(max=5)))
    else:
        broken.setattr(laws, "shares", lambda *args: shares(*args) * (1 + 1e-9))
    with broken.context():
        for name in ("exact", "exact_zero", "antithetic"):
            score, _ = expectations(name, {}, 2, scores, monkeypatch)
            assert score != pytest.approx(exact_elbo(scores), **TOLERANCE)
    broken.undo()


# --- documented biases --------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", LENGTHS)
def test_bernoulli_over_its_realised_count_is_l_over_l_plus_1_of_the_bound(length, monkeypatch):
    """No count 0..L is likelier than another, and the empty mask gives 0 (ALGORITHMS.md 0.2)."""
    scores = table(length)
    score, _ = expectations("bernoulli", {"weight": "L/count"}, 1, scores, monkeypatch)
    assert score == pytest.approx(length / (length + 1) * exact_elbo(scores), **TOLERANCE)


def count_law(length, n, low, high, *, power=0):
    """`1 / (high - low) * integral from low to high of t^-power C(L, n) t^n (1 - t)^(L - n)`, a rational
    number.
    """
    terms = (
        Fraction((-1) ** j * math.comb(length - n, j), n - power + j + 1)
        * (high ** (n - power + j + 1) - low ** (n - power + j + 1))
        for j in range(length - n + 1)
    )
    return math.comb(length, n) * sum(terms, Fraction(0)) / (high - low)


@pytest.mark.parametrize("t_min", [Fraction(1, 1000), Fraction(1, 10)])
@pytest.mark.parametrize("length", LENGTHS)
def test_bernoulli_above_t_min_lacks_the_levels_below(length, t_min, monkeypatch):
    scores = table(length)
    score, _ = expectations("bernoulli", {"t_min": float(t_min)}, 1, scores, monkeypatch)
    closed = sum(float(count_law(length, n, t_min, 1, power=1)) * mean_at_count(scores, n) for n in range(1, length + 1))
    assert score == pytest.approx(closed, **TOLERANCE)


@pytest.mark.parametrize("length", LENGTHS)
def test_dmpo_s_realised_counts_reweight_the_noise_levels(length, monkeypatch):
    """lambda is uniform on [0.1, 1]: count n comes with probability q_n instead of 1 / L; in the complement,
    q_{L - n}.
    """
    scores = table(length)
    score, (first, complement) = expectations("antithetic", {"weight": "dmpo"}, 2, scores, monkeypatch)
    q = [count_law(length, n, Fraction(1, 10), Fraction(1)) for n in range(length + 1)]
    assert sum(q) == 1
    by_count = {n: length / n * mean_at_count(scores, n) for n in range(1, length + 1)}
    closed_first = sum(float(q[n]) * by_count[n] for n in by_count)
    closed_complement = sum(float(q[length - n]) * by_count[n] for n in by_count)
    assert float(first) == pytest.approx(closed_first, **TOLERANCE)
    assert float(complement) == pytest.approx(closed_complement, **TOLERANCE)
    assert score == pytest.approx((closed_first + closed_complement) / 2, **TOLERANCE)
    assert abs(score) < abs(exact_elbo(scores)), "part of the probability goes to empty masks"


def test_dmpo_s_first_half_prefers_high_levels_and_its_complement_low_ones():
    q = [count_law(5, n, Fraction(1, 10), Fraction(1)) for n in range(6)]
    assert q == sorted(q)
    assert q[0] < Fraction(1, 6) < q[5]


@pytest.mark.parametrize("length", LENGTHS)
def test_coupled_is_half_the_full_mask_and_half_a_middle_of_the_bound(length, monkeypatch):
    """DiffuCoder's sum of s_l: `S(all) / 2` plus the mean over t in [0.2, 0.8] of `S(m) / t` (its
    complement's mean is equal).
    """
    scores = table(length)
    score, sample_K = expectations("coupled", {}, 5, scores, monkeypatch)
    low, high = Fraction(2, 10), Fraction(8, 10)
    middle = sum(float(count_law(length, n, low, high, power=1)) * mean_at_count(scores, n) for n in range(1, length + 1))
    everything = mean_at_count(scores, length)
    assert sample_K.tolist() == pytest.approx([everything, *[middle] * 4], **TOLERANCE)
    assert score == pytest.approx(everything / 2 + middle, **TOLERANCE)


@pytest.mark.parametrize("draws", [1, 2])
@pytest.mark.parametrize("weight", ["w/t", "wL/count"])
@pytest.mark.parametrize("counts", ["floor", "round"])
@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("length", LENGTHS)
def test_quadrature_is_the_sum_over_its_nodes(length, nodes, counts, weight, draws, monkeypatch):
    """`sum_i w_i / t_i E_{|m| = int(t_i L)} S(m)`: a rule for the integral, and a node without a token gives
    nothing.
    """
    scores = table(length)
    options = {"nodes": nodes, "counts": counts, "weight": weight}
    score, _ = expectations("quadrature", options, nodes * draws, scores, monkeypatch)
    closed = 0.0
    for x, w in zip(*np.polynomial.legendre.leggauss(nodes), strict=True):
        t = (x + 1) / 2
        n = int(t * length) if counts == "floor" else math.floor(t * length + 0.5)
        if n:
            closed += w / 2 * (1 / t if weight == "w/t" else length / n) * mean_at_count(scores, n)
    assert score == pytest.approx(closed, **TOLERANCE)


def test_quadrature_s_bias_at_the_published_nodes():
    """GDPO's tables (ALGORITHMS.md section 3): nodes, weights and the counts at L = 256."""
    t, w = draws.gauss_legendre(2)
    assert t == pytest.approx([0.211324865, 0.788675135], abs=1e-9)
    assert w == pytest.approx([0.5, 0.5])
    t, w = draws.gauss_legendre(3)
    assert t == pytest.approx([0.112701665, 0.5, 0.887298335], abs=1e-9)
    assert w == pytest.approx([0.277777778, 0.444444444, 0.277777778], abs=1e-9)
    assert [int(x * 256) for x in draws.gauss_legendre(2)[0]] == [54, 201]
    assert [int(x * 256) for x in t] == [28, 128, 227]
    assert [sum(draws.gauss_legendre(n)[1]) for n in range(1, 6)] == pytest.approx([1.0] * 5)


# --- the whole plan -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options", "samples"), CLAIMS, ids=str)
def test_a_plan_s_score_has_that_expectation(name, options, samples, monkeypatch):
    """`make_mask_plan` to `plan.score` over every outcome, prompt and padding included; fp32 weights, so to
    1e-6.
    """
    length, prompt = 4, 2
    scores = table(length)
    law, full = laws.resolve(name, options)
    outcomes = outcomes_of(law, full, length)
    B = len(outcomes.probability_B)
    monkeypatch.setattr(noise, "row_bits", outcomes.row_bits)
    ids_BS = torch.arange(B * 8).reshape(B, 8) % 90
    completion_BS = ((torch.arange(8) >= prompt) & (torch.arange(8) < prompt + length)).expand(B, -1)
    plan = make_mask_plan(
        ids_BS, completion_BS, law=name, samples=samples, seed=0, sequence_ids=torch.arange(B), mask_id=99, **options
    )
    code_KB = (plan.masked[:, :, prompt : prompt + length].long() << torch.arange(length)).sum(-1)
    logp_KBS = torch.zeros(samples, B, 8, dtype=torch.float64)
    logp_KBS[:, :, prompt : prompt + length] = scores[code_KB]
    score_B = plan.score(logp_KBS[plan.scored])
    monkeypatch.undo()
    assert float((score_B.double() * outcomes.probability_B).sum()) == pytest.approx(exact_elbo(scores), rel=1e-6)


# --- blocks -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockOutcomes:
    """Every pair of outcomes of two blocks: a block's level is keyed by its ordinal, tokens by the completion's."""

    blocks: tuple[Outcomes, Outcomes]
    lengths: tuple[int, int]

    @property
    def probability_B(self):
        first, second = (block.probability_B for block in self.blocks)
        return (first[:, None] * second).flatten()

    def row_bits(self, seed, stream, sequence_id, sample, position):
        sequence_id, _, position = torch.broadcast_tensors(sequence_id, sample, position)
        first, second = self.blocks
        one, two = sequence_id // len(second.probability_B), sequence_id % len(second.probability_B)
        if stream == Stream.LEVEL:
            return torch.where(position == 0, first.level_bits_B[one], second.level_bits_B[two])
        assert stream == Stream.MASK
        place, later = position.clamp(max=self.lengths[0] - 1), (position - self.lengths[0]).clamp(0, self.lengths[1] - 1)
        return torch.where(position < self.lengths[0], first.mask_bits_BL[one, place], second.mask_bits_BL[two, later])


@pytest.mark.parametrize(("name", "options", "samples"), CLAIMS, ids=str)
def test_every_law_that_claims_it_is_unbiased_for_the_bound_of_blocks(name, options, samples, monkeypatch):
    """A prompt token shares the first block; L, n and t in a token's weight are those of its own block."""
    lengths, scores = (2, 3), (table(2), table(3, seed=1))
    law, full = laws.resolve(name, options)
    outcomes = BlockOutcomes(tuple(outcomes_of(law, full, length) for length in lengths), lengths)
    B = len(outcomes.probability_B)
    monkeypatch.setattr(noise, "row_bits", outcomes.row_bits)
    completion = torch.arange(6).expand(B, -1) >= 1
    plan = make_mask_plan(
        torch.arange(6).expand(B, -1),
        completion,
        law=name,
        samples=samples,
        seed=0,
        sequence_ids=torch.arange(B),
        mask_id=9,
        causal_block=3,
        **options,
    )
    hidden_KBS = plan.masked
    assert torch.equal(hidden_KBS, plan.scored)
    assert len(plan.rows) == int(hidden_KBS.sum())
    monkeypatch.undo()
    logp_KBS = torch.zeros(hidden_KBS.shape, dtype=torch.float64)
    for first, length, scores_ML in ((1, 2, scores[0]), (3, 3, scores[1])):
        inside = hidden_KBS[:, :, first : first + length].long()
        code_KB = (inside << torch.arange(length)).sum(-1)
        logp_KBS[:, :, first : first + length] = scores_ML[code_KB]
    estimate = float((plan.score(logp_KBS[plan.scored]) * outcomes.probability_B).sum())
    want = exact_elbo(scores[0]) + exact_elbo(scores[1])
    assert estimate == pytest.approx(want, rel=2e-6 if name == "bernoulli" else 2e-7)  # weights of a plan are fp32
