"""The law of `sample_tokens`: what is drawn, what is told of it, and what is refused."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllm_kernels import noise, sample_tokens
from dllm_kernels.noise import Stream
from tests import oracle

F64 = torch.float64


def draw(logits, rows, **options):
    """`rows` draws from one row of logits."""
    key = noise.row_bits(1, Stream.TOKEN, torch.arange(rows), torch.tensor(0), torch.tensor(0))
    eye = torch.eye(len(logits), dtype=logits.dtype)
    return sample_tokens(logits.expand(rows, -1), eye, key, **options)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_tokens_follow_the_softmax_at_the_temperature(backend, temperature):
    rows, logits = 15000, torch.tensor([0.3, -1.0, 2.0, 0.0, 1.1, -3.0, 0.5])
    drawn = draw(logits, rows, temperature=temperature, suppress=(4,))
    p = (logits / temperature).double()
    p[4] = -math.inf
    expected = rows * p.softmax(-1)
    observed = torch.bincount(drawn.token, minlength=7).double()
    assert observed[4] == 0
    live = expected > 0
    assert oracle.chi_square(observed[live], expected[live]) < oracle.chi_square_limit(5)


def test_draws_of_two_steps_are_independent(backend):
    logits = torch.tensor([0.5, 0.0, -0.5])
    a, b = (draw(logits, 8000, step=step).token for step in (0, 1))
    p = logits.double().softmax(-1)
    observed = torch.bincount(3 * a + b, minlength=9).double()
    assert oracle.chi_square(observed, 8000 * torch.outer(p, p).flatten()) < oracle.chi_square_limit(8)


def test_logp_confidence_and_entropy_are_at_temperature_1(backend):
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0])
    logp = logits.double().log_softmax(-1)
    for temperature in (0.0, 0.3, 5.0):
        drawn = draw(logits, 64, temperature=temperature)
        torch.testing.assert_close(drawn.logp.double(), logp[drawn.token], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(drawn.confidence.double(), logp.exp()[drawn.token], rtol=1e-5, atol=1e-6)
        entropy = (-(logp.exp() * logp).sum()).expand(64)
        torch.testing.assert_close(drawn.entropy.double(), entropy, rtol=1e-5, atol=1e-6)
    assert (draw(logits, 500, temperature=0.0).token == 2).all()
    assert len(draw(logits, 500, temperature=5.0).token.unique()) == 4


@pytest.mark.parametrize("vocabulary", [2, 9, 33, 1000])
def test_ties_at_temperature_0_go_to_the_smallest_id(backend, vocabulary):
    logits = torch.zeros(vocabulary)
    assert (draw(logits, 3, temperature=0.0).token == 0).all()
    logits[[vocabulary // 2, vocabulary - 1]] = 1.0
    assert (draw(logits, 3, temperature=0.0).token == vocabulary // 2).all()
    assert (draw(logits, 3, temperature=0.0, suppress=(vocabulary // 2,)).token == vocabulary - 1).all() or vocabulary == 2


@given(
    N=st.integers(0, 6),
    H=st.integers(1, 5),
    vocabulary=st.integers(1, 40),
    temperature=st.sampled_from([0.0, 0.1, 1.0]),
    seed=st.integers(0, 999),
    softcap=st.sampled_from([None, 2.0]),
    bias=st.booleans(),
)
def test_any_shape_equals_argmax_of_full_logits_plus_noise(backend, N, H, vocabulary, temperature, seed, softcap, bias):
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(9, H, generator=g, dtype=F64), torch.randn(vocabulary, H, generator=g, dtype=F64)
    rows = torch.randperm(9, generator=g)[:N]
    key = noise.row_bits(seed, Stream.TOKEN, torch.arange(N), torch.tensor(3), torch.tensor(1))
    options = {"softcap": softcap, "bias": torch.randn(vocabulary, generator=g, dtype=F64) if bias else None}
    valid = max(1, vocabulary - 2)
    got = sample_tokens(hidden, weight, key, rows=rows, step=2, temperature=temperature, valid_vocab=valid, **options)
    z = oracle.logits(hidden, weight, rows, valid_vocab=valid, **options)
    score = z if temperature == 0 else z / temperature + noise.gumbel(key, vocabulary, step=2)
    assert torch.equal(got.token, score.argmax(-1))
    torch.testing.assert_close(got.logp, z.log_softmax(-1).gather(1, got.token[:, None])[:, 0])


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("more", [{}, {"min_p": 0.05, "top_p": 0.9}, {"want": ("drawn_logp", "drawn_entropy")}])
def test_temperatures_of_the_rows_draw_as_each_would_alone(backend, dtype, more):
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(60, 16, generator=g).to(dtype), torch.randn(300, 16, generator=g).to(dtype)
    key = noise.row_bits(0, Stream.TOKEN, torch.arange(60), torch.tensor(0), torch.tensor(0))
    levels = torch.tensor([0.0, 0.3, 1.0, 2.5])
    temperature = levels[torch.arange(60) % 4]
    mixed = sample_tokens(hidden, weight, key, temperature=temperature, suppress=(3,), **more)
    for level in levels.tolist():
        rows = (temperature == level).nonzero()[:, 0]
        alone = sample_tokens(hidden, weight, key[rows], rows=rows, temperature=level, suppress=(3,), **more)
        assert torch.equal(alone.token, mixed.token[rows]), level
        for name in ("logp", "entropy", *more.get("want", ())):
            torch.testing.assert_close(getattr(alone, name), getattr(mixed, name)[rows], rtol=1e-6, atol=1e-6)
    assert (mixed.token != sample_tokens(hidden, weight, key, suppress=(3,)).token).any()


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_min_p_leaves_out_what_is_so_much_less_probable_than_the_likeliest_id(backend, temperature):
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.1, -3.0, 0.5])
    drawn = draw(logits, 12000, temperature=temperature, min_p=0.2, want=("drawn_logp",))
    p = (logits.double() / (temperature or 1.0)).softmax(-1)
    p[p < 0.2 * p.max()] = 0.0
    p /= p.sum()
    torch.testing.assert_close(drawn.drawn_logp.double(), p[drawn.token].log(), rtol=1e-5, atol=1e-6)
    observed = torch.bincount(drawn.token, minlength=7).double()
    assert not observed[p == 0].any()
    if temperature == 0:
        assert observed[2] == 12000
    else:
        assert oracle.chi_square(observed[p > 0], 12000 * p[p > 0]) < oracle.chi_square_limit(int((p > 0).sum()) - 1)
    key = noise.row_bits(1, Stream.TOKEN, torch.arange(12000), torch.tensor(0), torch.tensor(0))
    eye = torch.eye(7)
    for none, most in ((0.0, None), (None, 1.0)):  # 0 leaves all, 1 the likeliest alone
        got = sample_tokens(logits.expand(12000, -1), eye, key, min_p=1.0 if most else none).token
        assert torch.equal(got, torch.full_like(got, 2) if most else draw(logits, 12000).token)


def test_a_row_s_token_does_not_depend_on_its_company(backend):
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(600, 16, generator=g), torch.randn(50, 16, generator=g)
    key = noise.row_bits(0, Stream.TOKEN, torch.arange(600), torch.tensor(0), torch.tensor(0))
    whole = sample_tokens(hidden, weight, key)
    for count in (1, 255, 257):
        chosen = backend.some_rows(count, 600, g)
        part = sample_tokens(hidden, weight, key[chosen], rows=chosen)
        for name in ("token", "logp", "confidence", "entropy"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[chosen]), name


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"temperature": -0.1}, ValueError, ["temperature", "-0.1"]),
        ({"temperature": torch.tensor([1.0, 0.0, -0.5, 1.0])}, ValueError, ["temperature", "at every row", "-0.5"]),
        ({"temperature": torch.tensor([1.0, 0.0, math.nan, 1.0])}, ValueError, ["temperature", "finite"]),
        ({"temperature": torch.ones(3)}, ValueError, ["temperature", "[4]", "[3]"]),
        ({"temperature": torch.ones(4, dtype=torch.int64)}, TypeError, ["temperature", "int64"]),
        ({"min_p": 1.5}, ValueError, ["min_p", "1.5"]),
        ({"min_p": -0.1}, ValueError, ["min_p", "-0.1"]),
        ({"logit_temperature": 0.0}, ValueError, ["logit_temperature", "0"]),
        ({"step": -1}, ValueError, ["step", "-1"]),
        ({"key": torch.zeros(4)}, TypeError, ["key", "float32"]),
        ({"key": torch.zeros(3, dtype=torch.int64)}, ValueError, ["3", "4"]),
        ({"key": torch.zeros(4, 1, dtype=torch.int64)}, ValueError, ["key", "4, 1"]),
        ({"suppress": tuple(range(5))}, ValueError, ["suppress"]),
        ({"hidden": torch.full((4, 3), math.nan)}, ValueError, ["hidden"]),
        ({"weight": torch.zeros(5, 2)}, ValueError, ["hidden", "2", "3"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_sampling_error_names_the_argument(changes, error, words):
    arguments = {
        "hidden": torch.zeros(4, 3),
        "weight": torch.zeros(5, 3),
        "key": torch.zeros(4, dtype=torch.int64),
    } | changes
    with pytest.raises(error) as caught:
        sample_tokens(**arguments)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("more", [{}, {"top_k": 3, "want": ("margin",)}, {"temperature": 0.0}, {"temperature": 0.7}])
def test_an_adapter_draws_as_the_weight_that_it_makes(backend, more):
    g = torch.Generator().manual_seed(0)
    hidden, weight, down, up = (torch.randn(*size, generator=g, dtype=F64) for size in ((40, 8), (23, 8), (2, 8), (23, 2)))
    key = noise.row_bits(1, Stream.TOKEN, torch.arange(20), torch.tensor(0), torch.tensor(0))
    rows = torch.randperm(40, generator=g)[:20]
    ours = sample_tokens(hidden, weight, key, rows=rows, low_rank=(down, up, -1.5), **more)
    want = sample_tokens(hidden, weight - 1.5 * up @ down, key, rows=rows, **more)
    assert torch.equal(ours.token, want.token)
    torch.testing.assert_close(ours.logp, want.logp, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(ours.entropy, want.entropy, rtol=1e-11, atol=1e-11)
    low = {"rows": rows, **more}
    got = sample_tokens(hidden.float(), weight.float(), key, low_rank=(down.float(), up.float(), -1.5), **low)
    assert torch.equal(got.token, want.token)


@pytest.mark.parametrize(
    ("low_rank", "error", "words"),
    [
        ([1, 2, 3], TypeError, r"low_rank must be a tuple \(A, B, scale\), got list"),
        ((torch.ones(2, 7), torch.ones(5, 2), 1.0), ValueError, "low_rank A must have shape"),
        ((torch.ones(2, 3), torch.ones(4, 2), 1.0), ValueError, "low_rank B must have shape"),
        ((torch.ones(2, 3), torch.ones(5, 1), 1.0), ValueError, "low_rank A must have shape"),
        ((torch.ones(5, 3), torch.ones(5), 1.0), ValueError, "low_rank B must have shape"),
        ((torch.ones(0, 3), torch.ones(5, 0), 1.0), ValueError, "rank of at least 1"),
        ((torch.ones(2, 3), torch.ones(5, 2), math.inf), ValueError, "low_rank scale must be finite"),
        ((torch.ones(2, 3), torch.ones(5, 2).int(), 1.0), TypeError, "low_rank B"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_by_name(low_rank, error, words):
    key = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(error, match=words):
        sample_tokens(torch.ones(1, 3), torch.ones(5, 3), key, low_rank=low_rank)
