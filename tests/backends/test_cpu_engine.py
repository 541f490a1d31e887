"""The C++ head engine against the float64 reference on every instruction set, and against itself: threads, chunks, rows."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_kernels import noise
from dllm_kernels.backends import contract, cpu, reference
from dllm_kernels.backends.contract import LOW, STATISTICS, HeadOptions, HeadProblem, LowRank
from tests.backends.problems import to_float64
from tests.tiny import relative_error

if not cpu.available():
    if not any(shutil.which(name.split()[0]) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        pytest.skip(f"no C++ compiler on this machine: {cpu.why_unavailable()}", allow_module_level=True)
    raise RuntimeError(f"run `python setup.py build_ext --inplace` first: {cpu.why_unavailable()}")

from dllm_kernels import _C  # type: ignore[attr-defined]

ISAS = _C.supported_isas()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 1, 1), (2, 3, 2), (5, 1, 33), (31, 17, 16), (33, 64, 15), (40, 16, 97), (70, 1100, 129), (97, 40, 2000))
OPTIONS = ("bias", "softcap", "temperature", "temperature_N", "excluded", "index", "low_rank", "low_rank_fp32")
KINDS = ("normal", "wide", "offset", "below_100", "flat", "certain")
LATE = ("unit", "entropy_unit", "operand", "entropy_operand")


@pytest.fixture(autouse=True)
def _restore():
    """Every call finds NaN all over its workspace."""
    threads, isa = torch.get_num_threads(), _C.isa()
    _C.poison_workspace(math.nan)
    yield
    _C.poison_workspace(None)
    torch.set_num_threads(threads)
    _C.set_isa(isa)


def make(rows, width, vocabulary, dtype=torch.float32, kind="normal", options=(), seed=0) -> HeadProblem:
    """A problem whose last hidden column meets a last weight column of ones: it shifts or scales the logits by kind."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=g)
    weight = torch.randn(vocabulary, width, generator=g) * 2.5 / width**0.5
    target = torch.randint(0, vocabulary, (rows,), generator=g)
    if kind == "wide":
        weight *= 30
    elif kind in ("offset", "below_100"):
        weight[:, -1], hidden[:, -1] = 1.0, {"offset": 2.0**12, "below_100": -200.0}[kind]
    elif kind == "flat":
        weight[:] = weight[:1]
    elif kind == "certain":
        hidden[:] = weight[target] * 100
    kw: dict = {}
    index = None
    if "bias" in options:
        kw["bias"] = torch.randn(vocabulary, generator=g)
        if vocabulary > 2:
            kw["bias"][int(target[0] + 1) % vocabulary] = -math.inf
    if "softcap" in options:
        kw["softcap"] = 3.0
    if "temperature" in options:
        kw["temperature"] = 0.7
    if "temperature_N" in options:
        kw["temperature"] = torch.rand(rows, generator=g) + 0.5
    if "excluded" in options:
        excluded = torch.rand(vocabulary, generator=g) < 0.2
        excluded[target] = False
        kw["suppress"] = tuple(excluded.nonzero()[:, 0].tolist())
    hidden = hidden.to(dtype)
    if "index" in options:
        index = torch.randperm(rows + 3, generator=g)[:rows]
        hidden = torch.full((rows + 3, width), math.nan, dtype=dtype).index_copy(0, index, hidden)
    low = None
    if {"low_rank", "low_rank_fp32"} & {*options}:  # the second in the numbers that bfloat16 engines split, in two tiles
        wide, R = "low_rank_fp32" in options, 17 if "low_rank_fp32" in options else 3
        u_NR, b_VR = torch.randn(rows, R, generator=g), torch.randn(vocabulary, R, generator=g) / R**0.5
        if index is not None:
            u_NR = torch.full((rows + 3, R), math.nan).index_copy(0, index, u_NR)
        low = LowRank(u_NR, b_VR if wide else b_VR.to(dtype))
    return HeadProblem(hidden, weight.to(dtype), target, index, HeadOptions(**kw), low)


def coefficients(rows, seed=1):
    return torch.randn(2, rows, generator=torch.Generator().manual_seed(seed)).unbind()


def everything(backend, p: HeadProblem) -> dict[str, torch.Tensor]:
    """Every output a plan may ask for: statistics, late vectors and operands, gradients from both, dW, db."""
    dtype = p.statistics_dtype
    coef, entropy_coef = (c.to(dtype) for c in coefficients(p.rows))
    V, H = p.weight_VH.shape
    out = dict(backend.run(p, (*STATISTICS, *LATE)))
    for name, overwrite in (("", True), ("kept_", False)):
        start = 7.0 if overwrite else 0.0
        dweight, dbias = torch.full((V, H), start, dtype=dtype), torch.full((V,), start, dtype=dtype)
        buffers = {"dweight_VH": dweight, "dbias_V": dbias}
        if p.low_rank is not None:
            buffers["dlow_VR"] = out[name + "dlow"] = torch.full(p.low_rank.weight_VR.shape, start, dtype=dtype)
        if name:
            pairs = [(out["operand"], coef), (out["entropy_operand"], entropy_coef)]
            got = backend.from_operands(p, pairs, dhidden=True, **buffers)
        else:
            got = backend.run(p, ("dhidden",), coef_N=coef, entropy_coef_N=entropy_coef, overwrite=True, **buffers)
        out |= {name + gradient: value for gradient, value in got.items()}
        out[name + "dweight"], out[name + "dbias"] = dweight, dbias
    return out


def paired(p: HeadProblem) -> bool:
    return "bf16" in _C.isa() and p.hidden_MH.dtype == torch.bfloat16


def check(p: HeadProblem) -> None:
    truth, twin, ours = everything(reference, to_float64(p)), everything(reference, p), everything(cpu, p)
    assert ours.keys() == truth.keys()
    assert (ours["logp"] <= 0).all()
    largest = float(truth["lse"].abs().max()) + float(truth["top_logp"].abs().max()) + 30
    rounding = 2.0**-23 * largest * (2 + math.log2(1 + p.weight_VH.shape[1]))
    for name in ours.keys() - {"top_id"}:
        want, got, same = truth[name].double(), ours[name].double(), twin[name].double()
        assert not got.isnan().any(), name
        assert torch.equal(got.isinf(), want.isinf()), name
        finite = want.isfinite()
        want, got, same = want[finite], got[finite], same[finite]
        scale = 1.0 + (float(want.abs().max()) if want.numel() else 0.0)
        bound = 1.5 * float((same - want).abs().max() if want.numel() else 0) + 4 * rounding * scale
        if paired(p) and name not in STATISTICS:
            bound += 2.0**-7 * scale  # the operand of the pair engine has 8 bits
        error = float((got - want).abs().max() if want.numel() else 0)
        assert error <= bound, f"{name}: error {error:.3g}, bound {bound:.3g}"
    picked = to_float64(p)
    scores = reference.run(picked, ("top_logp",))["top_logp"]
    by_id = reference.run(replace(picked, target_N=ours["top_id"]), ("logp",))["logp"]
    assert float((scores - by_id).max()) <= 4 * rounding  # the id found is one of the largest


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 15, 17])
def test_pitfall_what_an_earlier_call_left_in_the_workspace_does_not_matter(isa, dtype, rows):
    """Lanes past the last row are paired with it: NaN there would reach dW, though their coefficient is 0."""
    _C.set_isa(isa)

    _C.poison_workspace(None)

    def gradients(p: HeadProblem) -> tuple[torch.Tensor, torch.Tensor]:
        dweight = torch.empty(33, 48)
        coef = coefficients(p.rows)[0]
        dhidden = cpu.run(p, ("lse", "dhidden"), coef_N=coef, dweight_VH=dweight, overwrite=True)["dhidden"]
        return dhidden, dweight

    p, whole = make(rows, 48, 33, dtype), make(32, 48, 33, dtype)  # the workspace of one panel of rows, filled or not
    for left in (math.nan, 1e30):
        gradients(replace(whole, hidden_MH=torch.full((32, 48), left).to(dtype)))
        assert all(bool(found.isfinite().all()) for found in gradients(p)), left


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_output_agrees_with_the_float64_reference_on_every_isa(isa, dtype, shape):
    _C.set_isa(isa)
    check(make(*shape, dtype))
    check(make(*shape, dtype, options=("bias", "softcap", "temperature_N", "excluded", "index", "low_rank")))
    check(make(*shape, dtype, options=("low_rank_fp32",)))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
def test_extreme_logits_stay_accurate(isa, kind):
    _C.set_isa(isa)
    check(make(37, 24, 301, kind=kind))
    check(make(37, 24, 301, kind=kind, options=("temperature", "excluded")))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 70),
    st.integers(1, 40),
    st.integers(1, 300),
    st.sampled_from(DTYPES),
    st.sampled_from(KINDS),
    st.sets(st.sampled_from(OPTIONS)),
    st.integers(0, 2**16),
    st.sampled_from(ISAS),
)
def test_any_shape_any_options(rows, width, vocabulary, dtype, kind, options, seed, isa):
    _C.set_isa(isa)
    p = make(max(rows, 1), width, vocabulary, dtype, kind, options, seed)
    if rows:
        check(p)
    else:
        empty = HeadProblem(p.hidden_MH, p.weight_VH, p.target_N[:0], index_N=torch.zeros(0, dtype=torch.int64))
        assert all(v.numel() == 0 or not v.any() for v in everything(cpu, empty).values())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_run_and_every_thread_count_give_the_same_bits(isa, dtype):
    _C.set_isa(isa)
    p = make(130, 1200, 3001, dtype, options=("softcap", "bias", "low_rank_fp32"))
    key = noise.row_bits(0, noise.Stream.TOKEN, torch.tensor(5), torch.tensor(0), torch.arange(130))
    torch.set_num_threads(1)
    want, tokens = everything(cpu, p), cpu.sample(p, key, step=1, temperature=0.8)
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        got = everything(cpu, p)
        for name in want:
            assert torch.equal(got[name], want[name]), (threads, name)
        again = cpu.sample(p, key, step=1, temperature=0.8)
        for name in tokens:
            assert torch.equal(again[name], tokens[name]), (threads, name)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [1, 2, 7, 31, 33, 257, 1100])
def test_a_rows_bits_depend_on_no_other_row(isa, rows):
    """Any number of rows, any place among them, one chunk or several: the same statistics, vectors and tokens."""
    _C.set_isa(isa)
    whole = make(1100, 33, 700, torch.bfloat16, options=("low_rank_fp32",))
    pick = torch.randperm(1100, generator=torch.Generator().manual_seed(rows))[:rows]
    part = replace(whole, target_N=whole.target_N[pick], index_N=pick)
    a, b = (cpu.run(p, (*STATISTICS, "unit", "entropy_unit")) for p in (whole, part))
    assert {*a} >= {LOW + "unit", LOW + "entropy_unit"}
    for name in a:
        assert torch.equal(a[name][pick], b[name]), name
    key = torch.arange(1100) * 0x9E3779B97F4A7C15 >> 1
    a, b = cpu.sample(whole, key, step=0, temperature=1.0), cpu.sample(part, key[pick], step=0, temperature=1.0)
    for name in a:
        assert torch.equal(a[name][pick], b[name]), name


def test_the_workspace_budget_changes_no_bit_of_a_row(monkeypatch):
    p = make(900, 20, 1500)
    want = cpu.run(p, (*STATISTICS, "unit"))
    how = {
        "gradient": True,
        "dhidden": True,
        "second": False,
        "dweight": False,
        "several": None,
        "best": 0,
        "low": contract.NO_LOW,
    }
    large = cpu.workspace_bytes(900, 20, 1500, torch.float32, **how)
    monkeypatch.setitem(contract.WORKSPACE_BYTES, "cpu", 1 << 20)
    assert cpu.workspace_bytes(900, 20, 1500, torch.float32, **how) < large
    got = cpu.run(p, (*STATISTICS, "unit"))
    for name in want:
        assert torch.equal(got[name], want[name]), name


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_pattern_is_read_as_torch_reads_it(isa, dtype):
    """65536 patterns as weights of a one-dimensional head: the logits are these values, NaN and infinity apart."""
    _C.set_isa(isa)
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    patterns = patterns[patterns.isfinite() & (patterns.float().abs() < 80)]
    V = len(patterns)
    hidden = torch.ones(2, 1, dtype=dtype)
    target = torch.tensor([3, V - 5])
    got = cpu.run(HeadProblem(hidden, patterns[:, None], target), ("lse", "top_id"))
    want = reference.run(HeadProblem(hidden.double(), patterns[:, None].double(), target), ("lse", "top_id"))
    torch.testing.assert_close(got["lse"].double(), want["lse"], rtol=3e-6, atol=0)
    assert torch.equal(got["top_id"], want["top_id"])
    small = patterns[patterns.float().abs() < 1e-3]  # subnormals too
    logits = torch.stack([small, torch.zeros_like(small)], 1)  # rows of hidden: one pattern each, against weights 1000 and 0
    weight = torch.tensor([[1000.0, 0.0], [0.0, 1.0]]).to(dtype)
    got = cpu.run(HeadProblem(logits, weight, torch.zeros(len(small), dtype=torch.int64)), ("logp",))["logp"]
    z = small.double() * 1000
    torch.testing.assert_close(got.double(), -torch.nn.functional.softplus(-z), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e5])
def test_16_bit_results_are_the_fp32_ones_rounded_as_torch_rounds(isa, dtype, scale):
    _C.set_isa(isa)
    p = make(70, 40, 90, dtype)
    if paired(p):
        pytest.skip("the pair engine rounds its operands too")
    same = HeadProblem(p.hidden_MH.float(), p.weight_VH.float(), p.target_N)
    coef = coefficients(70)[0] * scale
    got = cpu.run(p, ("dhidden",), coef_N=coef)["dhidden"]
    want = cpu.run(same, ("dhidden",), coef_N=coef)["dhidden"].to(dtype)
    assert torch.equal(got, want)


@pytest.mark.parametrize("isa", ISAS)
def test_strided_weights_and_hidden_states(isa):
    _C.set_isa(isa)
    p = make(40, 30, 77)
    want = everything(cpu, p)
    wide = torch.randn(77, 64)
    wide[:, 5:35] = p.weight_VH
    views = {
        "columns of a wider matrix": (p.hidden_MH, wide[:, 5:35]),
        "a transposed weight": (p.hidden_MH, p.weight_VH.t().contiguous().t()),
        "transposed hidden states": (p.hidden_MH.t().contiguous().t(), p.weight_VH),
        "every second row": (p.hidden_MH, torch.stack([p.weight_VH, torch.randn(77, 30)], 1).flatten(0, 1)[::2]),
    }
    for what, (hidden, weight) in views.items():
        got = everything(cpu, HeadProblem(hidden, weight, p.target_N))
        for name in want:
            assert torch.equal(got[name], want[name]), (what, name)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.5])
@pytest.mark.parametrize("options", [(), ("excluded", "bias"), ("softcap", "temperature")], ids=str)
def test_screened_draws_are_those_of_the_unscreened_reference(isa, temperature, options):
    """300 rows x 1999 ids: the token is the reference's, unless its two best perturbed logits are within 1e-5."""
    _C.set_isa(isa)
    p = make(300, 16, 1999, options=options)
    zero = torch.zeros((), dtype=torch.int64)
    key = noise.row_bits(3, noise.Stream.TOKEN, zero, zero, torch.arange(300))
    got = cpu.sample(p, key, step=4, temperature=temperature)
    want = reference.sample(to_float64(p), key, step=4, temperature=temperature)
    differs = got["token"] != want["token"]
    if differs.any():
        z = reference_logits(to_float64(p)) + temperature * noise.gumbel(key, 1999, step=4)
        top = z.topk(2, -1).values
        assert (top[differs, 0] - top[differs, 1]).max() < 1e-5 * max(1.0, temperature)
    assert differs.sum() <= 1
    for name in ("logp", "entropy", "lse"):
        torch.testing.assert_close(got[name][~differs].double(), want[name][~differs], rtol=2e-5, atol=2e-5)


def reference_logits(p: HeadProblem) -> torch.Tensor:
    hidden = p.hidden_MH if p.index_N is None else p.hidden_MH[p.index_N]
    z = hidden @ p.weight_VH.t()
    reference._transform_(z, p.options)
    return z


@pytest.mark.parametrize("isa", ISAS)
def test_temperature_0_takes_the_largest_logit_and_the_smallest_id_of_equals(isa):
    _C.set_isa(isa)
    p = make(50, 8, 333, kind="flat")
    key = torch.arange(50)
    assert not cpu.sample(p, key, step=0, temperature=0.0)["token"].any()
    p = make(50, 8, 333)
    assert torch.equal(cpu.sample(p, key, step=0, temperature=0.0)["token"], cpu.run(p, ("top_id",))["top_id"])


def test_concurrent_calls_do_not_share_a_workspace_and_leave_the_gil():
    p = make(600, 64, 4001)
    want = cpu.run(p, (*STATISTICS, "unit"))
    ticks, done = 0, threading.Event()
    failures: list[str] = []

    def call():
        for _ in range(3):
            got = cpu.run(p, (*STATISTICS, "unit"))
            failures.extend(name for name in want if not torch.equal(got[name], want[name]))

    callers = [threading.Thread(target=call) for _ in range(3)]
    for thread in callers:
        thread.start()
    while any(thread.is_alive() for thread in callers):
        ticks += 1
        time.sleep(0.001)
    done.set()
    assert not failures
    assert ticks > 5, "other Python threads did not run while the engine did"


@pytest.mark.slow
def test_the_environment_forces_an_isa_and_names_the_allowed_ones():
    code = "from dllm_kernels.backends import cpu; print(cpu.isa())"
    for isa in ISAS:
        env = {**os.environ, "DLLM_KERNELS_ISA": isa}
        assert subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout.strip() == isa
    wrong = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "DLLM_KERNELS_ISA": "sse9"}, capture_output=True, text=True
    )
    assert wrong.returncode == 0
    assert "'sse9', this machine allows" in wrong.stderr
    assert ISAS[-1] in wrong.stderr


def test_threads_are_torchs_own():
    """Two pools would compete for the cores; torch's OpenMP runtime is found in the process."""
    assert _C.thread_runtime() == "openmp"


def test_float64_goes_to_the_reference():
    p = make(9, 5, 11)
    p = to_float64(p)
    got, want = cpu.run(p, ("logp", "unit")), reference.run(p, ("logp", "unit"))
    assert got["logp"].dtype == torch.float64
    assert torch.equal(got["logp"], want["logp"])
    assert torch.equal(got["unit"], want["unit"])


@pytest.mark.parametrize("isa", ISAS)
def test_16_bit_gradients_are_no_worse_than_eager_with_fp32_logits(isa):
    _C.set_isa(isa)
    p = make(64, 96, 3000, torch.bfloat16)
    coef = coefficients(64)[0]
    dweight = torch.empty(3000, 96)
    got = cpu.run(p, ("dhidden",), coef_N=coef, dweight_VH=dweight, overwrite=True)
    exact_dweight = torch.zeros(3000, 96, dtype=torch.float64)
    exact = reference.run(to_float64(p), ("dhidden",), coef_N=coef.double(), dweight_VH=exact_dweight)
    hidden, weight = (x.clone().requires_grad_() for x in (p.hidden_MH, p.weight_VH))
    logits = torch.nn.functional.linear(hidden, weight).float()
    (-(coef * torch.nn.functional.cross_entropy(logits, p.target_N, reduction="none"))).sum().backward()
    assert relative_error(got["dhidden"], exact["dhidden"]) <= 1.5 * relative_error(hidden.grad, exact["dhidden"])
    assert relative_error(dweight.to(torch.bfloat16), exact_dweight) <= 1.5 * relative_error(weight.grad, exact_dweight)


@pytest.mark.parametrize("isa", ISAS)
def test_where_terms_cancel_dw_is_off_by_what_rounding_its_operands_does_and_no_more(isa):
    """The pair instruction takes operands of 16 bits; eager, which rounds the sum alone, may be 270 times nearer by luck."""
    _C.set_isa(isa)
    p = make(11, 1, 2, torch.bfloat16)
    coef = coefficients(11)[0]
    h_NH, unit_NV = p.hidden_MH.double(), reference.run(to_float64(p), ("operand",))["operand"]
    terms_N = coef.double() * unit_NV[:, 0] * h_NH[:, 0]
    coef[-1] *= float(-0.95 * terms_N[:-1].sum() / terms_N[-1])
    operand_NV = coef.double()[:, None] * unit_NV
    exact, size = operand_NV.t() @ h_NH, operand_NV.t().abs() @ h_NH.abs()
    assert (size > 20 * exact.abs()).all()
    dweight = torch.empty(2, 1)
    cpu.run(p, ("dhidden",), coef_N=coef, dweight_VH=dweight, overwrite=True)
    if "bf16" not in isa:
        assert ((dweight - exact).abs() <= 1e-6 * size).all()
        return
    of_rounded = operand_NV.to(torch.bfloat16).double().t() @ h_NH
    assert ((dweight - of_rounded).abs() <= 1e-6 * size).all()
    assert ((dweight - exact).abs() <= 2.0**-8 * size).all()
    assert ((dweight - exact).abs() > 1e-3 * exact.abs()).all()  # of the sum itself that is much
