"""The C++ passes over a slab of logits against the float64 reference, on every instruction set and number of threads."""

from __future__ import annotations

import pytest
import torch

from dllm_kernels.backends import cpu
from dllm_kernels.backends.expectation import engine, reference
from dllm_kernels.backends.expectation.problem import Pull, Seen

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the extension was not built")
SIZES = ((1, 1), (5, 37), (16, 64), (37, 300), (300, 130))  # rows, ids


@pytest.fixture(autouse=True)
def _restore():
    threads, isa = torch.get_num_threads(), cpu.isa()
    yield
    torch.set_num_threads(threads)
    cpu._C.set_isa(isa)


def slab(rows, ids, generator):
    """Logits of which two ids are excluded, and in the first row all."""
    z = 3 * torch.randn(ids, rows, generator=generator)
    if ids > 30:
        z[3:5] = float("-inf")
        z[:, 0] = float("-inf")
    return z


def nothing_seen(rows, dtype):
    return Seen(torch.full((rows,), float("-inf"), dtype=dtype), torch.zeros(rows, dtype=torch.float64))


@pytest.mark.parametrize("isa", cpu._C.supported_isas() if cpu.available() else ())
def test_passes_have_the_errors_of_fp32_on_every_instruction_set(isa):
    cpu._C.set_isa(isa)
    g = torch.Generator().manual_seed(0)
    for rows, ids in SIZES:
        mine, exact = nothing_seen(rows, torch.float32), nothing_seen(rows, torch.float64)
        for shift in (0.0, 2.0, -1.0):  # three slabs: the largest logit rises, then stays
            z = slab(rows, ids, g) + shift
            out, true = torch.full_like(z, float("nan")), torch.empty(ids, rows, dtype=torch.float64)
            scales = engine.soften(z, mine, out), reference.soften(z.double(), exact, true)
            torch.testing.assert_close(scales[0].double(), scales[1], rtol=2e-7, atol=0)
            assert torch.equal(mine.top_N, exact.top_N.float())
            torch.testing.assert_close(mine.sum_N, exact.sum_N, rtol=5e-7, atol=0)
            torch.testing.assert_close(out.double(), true, rtol=2e-6, atol=1e-37)
        top, inverse = mine.top_N.masked_fill(mine.top_N == float("-inf"), 0.0), (1 / mine.sum_N.clamp(min=1e-3)).float()
        mean, factor, squeeze = torch.randn(3, rows, generator=g).unbind()
        pull = torch.randn(ids, rows, generator=g)
        for of_softcap in (None, 0.03 * squeeze):
            p, out = torch.full((2, ids, rows), float("nan")).unbind()
            engine.pull(z, pull, top, inverse, Pull(mean, factor, of_softcap), p, out)
            true = torch.empty(2, ids, rows, dtype=torch.float64)
            wide = Pull(mean.double(), factor.double(), None if of_softcap is None else of_softcap.double())
            reference.pull(z.double(), pull.double(), top.double(), inverse.double(), wide, *true)
            for got, want in zip((p, out), true):
                assert float((got - want).abs().max()) <= 2e-6 * float(want.abs().max())
        alone = z.clone()
        engine.pull(alone, None, top, inverse, None, alone, None)  # in place
        assert torch.equal(alone, p)


def test_a_logit_that_is_no_number_ends_in_the_sum():
    for passes, dtype in ((engine, torch.float32), (reference, torch.float64)):
        for value in (float("nan"), float("inf")):
            for place in (0, 7, 36):
                z = torch.randn(37, 5).to(dtype)
                z[place, 2] = value
                seen = nothing_seen(5, dtype)
                passes.soften(z, seen, z)
                assert seen.log_sum_exp().isfinite().tolist() == [True, True, False, True, True]


def test_no_bit_depends_on_the_number_of_threads():
    g = torch.Generator().manual_seed(0)
    z, pull, of_rows = slab(300, 1000, g), torch.randn(1000, 300, generator=g), torch.rand(4, 300, generator=g)
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        seen, out = nothing_seen(300, torch.float32), torch.empty_like(z)
        scale = engine.soften(z, seen, out)
        p, operand = torch.empty(2, 1000, 300).unbind()
        engine.pull(z, pull, of_rows[0], of_rows[1], Pull(of_rows[2], of_rows[3], None), p, operand)
        results.append((scale, *seen, out, p, operand))
    assert all(torch.equal(a, b) for a, b in zip(*results))
