"""`sample_tokens` restricted by top_k and top_p: the published filters, with the noise of the unrestricted draw."""

import math

import pytest
import torch

from dllm_kernels import backends, noise, sample_tokens
from dllm_kernels.noise import Stream

ROWS, V = 64, 37


@pytest.fixture(params=backends.names(), autouse=True)
def backend(request, monkeypatch):
    monkeypatch.setenv("DLLM_KERNELS_BACKEND", request.param)


def inputs(seed=0, rows=ROWS):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(rows, 8, generator=generator), torch.randn(V, 8, generator=generator)
    zero = torch.zeros((), dtype=torch.int64)
    return hidden, weight, noise.row_bits(seed, Stream.TOKEN, zero, zero, torch.arange(rows))


def allowed(
    logits: torch.Tensor, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None
) -> torch.Tensor:
    """Row by row, in the order of the published samplers: temperature, top_k, top_p, min_p."""
    keep = torch.zeros_like(logits, dtype=torch.bool)
    for row, z in enumerate(logits.tolist()):
        order = sorted(range(len(z)), key=lambda v: (-z[v], v))[:top_k]
        mass = [math.exp((z[v] - z[order[0]]) / temperature) for v in order]
        reached = 0.0
        for v, m in zip(order, mass, strict=True):
            if top_p is not None and reached / sum(mass) >= top_p:
                break
            keep[row, v] = min_p is None or m >= min_p
            reached += m
    return keep


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(1, None, None), (3, None, None), (V, None, None), (100, None, None), (None, 0.5, None), (None, 1.0, None), (5, 0.8, None),
     (None, None, 0.3), (None, 0.6, 0.3), (9, 0.8, 0.5)],
)  # fmt: skip
def test_draws_are_the_largest_perturbed_logits_among_the_ids_left(temperature, top_k, top_p, min_p):
    hidden, weight, key = inputs()
    drawn = sample_tokens(hidden, weight, key, step=2, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    logits = (hidden.double() @ weight.double().t()).float()
    keep = allowed(logits, temperature, top_k, top_p, min_p)
    perturbed = (logits.double() / temperature + noise.gumbel(key, V, step=2)).masked_fill(~keep, -math.inf)
    assert torch.equal(drawn.token, perturbed.argmax(-1))
    logps = logits.double().log_softmax(-1)
    want = logps.gather(1, drawn.token[:, None])[:, 0]
    torch.testing.assert_close(drawn.logp.double(), want, rtol=1e-5, atol=1e-5)  # of the whole distribution at temperature 1


def test_filters_that_leave_everything_change_no_token():
    hidden, weight, key = inputs()
    whole = sample_tokens(hidden, weight, key)
    for options in ({"top_k": V}, {"top_p": 1.0}, {"top_k": V + 5, "top_p": 1.0}):
        assert torch.equal(sample_tokens(hidden, weight, key, **options).token, whole.token)


def test_equal_logits_leave_exactly_k_the_smallest_ids():
    key = inputs(rows=2000)[2]
    drawn = sample_tokens(torch.zeros(2000, 8), torch.ones(V, 8), key, top_k=3).token
    assert drawn.unique().tolist() == [0, 1, 2]
    half = sample_tokens(torch.zeros(2000, 8), torch.ones(4, 8), key, top_p=0.5).token
    assert half.unique().tolist() == [0, 1], "the shortest run that reaches the mass"


def test_suppressed_ids_and_other_rows_stay_out_and_temperature_0_takes_the_largest():
    hidden, weight, key = inputs()
    free = sample_tokens(hidden, weight, key, temperature=0.0, top_k=2, top_p=0.1).token
    assert torch.equal(free, sample_tokens(hidden, weight, key, temperature=0.0).token)
    banned = int(free[0])
    assert banned not in sample_tokens(hidden, weight, key, top_k=4, suppress=(banned,)).token
    few = torch.tensor([5, 60])
    part = sample_tokens(hidden, weight, key[few], rows=few, top_k=4, top_p=0.9).token
    assert torch.equal(part, sample_tokens(hidden, weight, key, top_k=4, top_p=0.9).token[few])


@pytest.mark.parametrize("options", [{"top_k": 0}, {"top_k": 1.5}, {"top_p": 0.0}, {"top_p": 1.01}, {"top_p": math.nan}])
def test_bad_filters_name_the_argument(options):
    with pytest.raises((ValueError, TypeError), match=next(iter(options))):
        sample_tokens(*inputs(), **options)


def test_a_compiled_call_draws_the_same_tokens():
    hidden, weight, key = inputs()
    compiled = torch.compile(lambda h: sample_tokens(h, weight, key, top_k=5, top_p=0.9).token, backend="eager", fullgraph=True)
    assert torch.equal(compiled(hidden), sample_tokens(hidden, weight, key, top_k=5, top_p=0.9).token)
