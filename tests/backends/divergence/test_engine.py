"""The C++ passes over two slabs of logits against the float64 reference, on every instruction set and number of threads."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dllm_kernels.backends import cpu
from dllm_kernels.backends.contract import HeadOptions
from dllm_kernels.backends.divergence import engine, reference
from dllm_kernels.backends.divergence.problem import KINDS, Slab, Statistics

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the extension was not built")
SIZES = ((1, 1), (5, 37), (16, 64), (37, 300), (300, 130))  # rows, ids


@pytest.fixture(autouse=True)
def _restore():
    threads, isa = torch.get_num_threads(), cpu.isa()
    yield
    torch.set_num_threads(threads)
    cpu._C.set_isa(isa)


def slabs(rows, ids, kind, seed=0):
    """Logits of two models that are alike, two ids of them excluded, and the same in float64."""
    g = torch.Generator().manual_seed(seed)
    student = 3 * torch.randn(ids, rows, generator=g)
    teacher = student + 0.3 * torch.randn(ids, rows, generator=g)
    if ids > 30:
        student[3:5] = teacher[3:5] = float("-inf")
    problem = SimpleNamespace(kind=kind, beta=0.3)
    return Slab(problem, student, teacher), Slab(problem, student.double(), teacher.double()), g


@pytest.mark.parametrize("isa", cpu._C.supported_isas() if cpu.available() else ())
def test_passes_have_the_errors_of_fp32_on_every_instruction_set(isa):
    cpu._C.set_isa(isa)
    for rows, ids in SIZES:
        for kind in KINDS:
            mine, exact, g = slabs(rows, ids, kind)
            got, want = (reference.joined(passes.look(slab), kind) for passes, slab in ((engine, mine), (reference, exact)))
            both = [reference.joined(passes.look(x, passes.look(x)), kind) for passes, x in ((engine, mine), (reference, exact))]
            torch.testing.assert_close(both[0][(1, 3), :], 2 * want[(1, 3), :], rtol=5e-7, atol=0)  # of two equal slabs
            torch.testing.assert_close(both[1], want * torch.tensor([1, 2, 1, 2, 2])[:, None])
            assert torch.equal(got[(0, 2), :], want[(0, 2), :])
            torch.testing.assert_close(got[(1, 3), :], want[(1, 3), :], rtol=5e-7, atol=0)
            torch.testing.assert_close(got[4], want[4], rtol=1e-6, atol=5e-7 * float(want[3].max()))
            levels = [(want[k] + want[k + 1].log()).float() for k in (0, 2)]
            if kind == "jsd":
                sums = engine.mix(mine, *levels).sum(0)
                torch.testing.assert_close(sums, reference.mix(exact, *(x.double() for x in levels))[0], rtol=0, atol=2e-6)
            mean, factor, squeeze = torch.randn(3, rows, generator=g).unbind()
            for of_softcap in (None, 0.03 * squeeze):
                out, true = torch.full((ids, rows), float("nan")), torch.empty(ids, rows, dtype=torch.float64)
                found = Statistics(mean, *levels, mean)
                engine.operand(mine, found, factor, of_softcap, out)
                wide = None if of_softcap is None else of_softcap.double()
                reference.operand(exact, Statistics(*(x.double() for x in found)), factor.double(), wide, true)
                assert float((out - true).abs().max()) <= 2e-6 * float(true.abs().max())


@pytest.mark.parametrize("isa", cpu._C.supported_isas() if cpu.available() else ())
def test_raw_logits_become_final_ones(isa):
    cpu._C.set_isa(isa)
    g = torch.Generator().manual_seed(1)
    for rows, ids in SIZES:
        whole = torch.randn(ids, rows + 3, generator=g)
        suppress = tuple(range(2, ids, 7))
        for options in (
            HeadOptions(),
            HeadOptions(torch.randn(ids + 9, generator=g), 2.0, torch.rand(rows, generator=g) + 0.5, suppress),
            HeadOptions(temperature=0.3),
        ):
            got, span = whole.clone(), slice(0, ids)
            want = whole.double()
            engine.finish_(got[:, 1:-2], options, span, ids)
            reference.finish_(want[:, 1:-2], options, span, ids)
            torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)


def test_no_bit_depends_on_the_number_of_threads():
    for kind in KINDS:
        mine, _, g = slabs(300, 1000, kind)
        levels, factor = torch.full((300,), 9.0), torch.randn(300, generator=g)
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            out = torch.empty(1000, 300)
            engine.operand(mine, Statistics(levels, levels, levels, levels), factor, None, out)
            results.append((engine.look(mine), engine.mix(mine, levels, levels), out))
        assert all(torch.equal(a, b) for a, b in zip(*results))
