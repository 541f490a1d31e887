"""The C++ row kernel against the float64 reference, its float32 PyTorch twin, and itself on other instruction sets."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_kernels.backends import cpu, reference
from dllm_kernels.backends.reference import HeadProblem

if not cpu.available():
    if not any(shutil.which(name.split()[0]) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        pytest.skip(f"no C++ compiler on this machine: {cpu.why_unavailable()}", allow_module_level=True)
    raise RuntimeError(f"run `python setup.py build_ext --inplace` first: {cpu.why_unavailable()}")

from dllm_kernels import _C  # type: ignore[attr-defined]

EPS = 2.0**-23
ISAS = _C.supported_isas()
VOCABULARIES = (1, 2, 3, 15, 16, 17, 31, 33, 1000, 50257)
KINDS = ("normal", "wide", "huge", "minus_huge", "offset", "below_100", "holes", "one_finite", "flat", "certain")
OPTIONS = ("bias", "softcap", "temperature", "temperature_N", "excluded", "coef", "entropy_coef", "entropy_operand")


@pytest.fixture(autouse=True)
def _restore():
    threads, isa = torch.get_num_threads(), _C.isa()
    yield
    torch.set_num_threads(threads)
    _C.set_isa(isa)


def make(rows: int, vocabulary: int, kind: str = "normal", options=(), seed: int = 0):
    """float32 logits, targets and keyword arguments of the row kernel."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocabulary, generator=g) * 3
    target = torch.randint(0, vocabulary, (rows,), generator=g)
    if kind == "wide":
        logits *= 30
    elif kind == "huge":
        logits += 1e4
    elif kind == "minus_huge":
        logits = logits * 1e3 - 1e4
    elif kind == "offset":
        logits = logits.round() * 2 + 2.0**24
    elif kind == "below_100":
        logits -= 200
    elif kind == "holes":
        logits[torch.rand(rows, vocabulary, generator=g) < 0.3] = -math.inf
        logits.scatter_(1, torch.randint(0, vocabulary, (rows, 1), generator=g), 1.0)
    elif kind == "one_finite":
        logits[:] = -math.inf
        logits.scatter_(1, torch.randint(0, vocabulary, (rows, 1), generator=g), -7.0)
    elif kind == "flat":
        logits[:] = 0.3
    elif kind == "certain":
        logits -= 25
        logits.scatter_(1, target[:, None], 5.0)
    kw: dict = {"gradient": True, "entropy": True, "top": True}
    if "bias" in options:
        kw["bias_V"] = torch.randn(vocabulary, generator=g)
    if "softcap" in options:
        kw["softcap"] = 30.0
    if "temperature" in options:
        kw["temperature"] = 0.7
    if "temperature_N" in options:
        kw["temperature"] = torch.rand(rows, generator=g) + 0.5
    if "excluded" in options:
        excluded = torch.rand(vocabulary, generator=g) < 0.2
        excluded[target] = False
        if vocabulary > 1 and len(target) > 1:  # one row's target is excluded: logp = -inf
            excluded[target[0]] = not bool((target[1:] == target[0]).any())
        kw["excluded_V"] = excluded
    if "coef" in options:
        kw["coef_N"] = torch.randn(rows, generator=g)
    if "entropy_coef" in options:
        kw["entropy_coef_N"] = torch.randn(rows, generator=g)
    if "entropy_operand" in options:
        kw["entropy_operand_NV"] = torch.full((rows, vocabulary), 7.0)
    return logits, target, kw


def call(kernel, logits, target, kw, dtype=torch.float32):
    """Every result by name, the operands included; the inputs stay as they are."""

    def cast(x):
        return x.to(dtype, copy=True) if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    buffer, kw = cast(logits), {k: cast(v) for k, v in kw.items()}
    out = dict(kernel(buffer, target, **kw))
    if kw.get("gradient"):
        out["operand"] = buffer
    if kw.get("entropy_operand_NV") is not None:
        out["entropy_operand"] = kw["entropy_operand_NV"]
    return out


def largest_logit(logits, kw) -> float:
    z = logits.double()
    reference._transform_(z, None if "bias_V" not in kw else kw["bias_V"].double(), kw.get("softcap"), 1.0, None)
    finite = z[z.isfinite()].abs()
    return float(finite.max()) / (0.5 if "temperature" in kw else 1.0) if finite.numel() else 0.0


def check_accuracy(logits, target, kw):
    truth = call(reference.row_kernel_, logits, target, kw, torch.float64)
    twin = call(reference.row_kernel_, logits, target, kw)
    ours = call(cpu.row_kernel_, logits, target, kw)
    assert ours.keys() == twin.keys()
    transformed = any(name in kw for name in ("bias_V", "softcap", "temperature"))
    # a transformed logit is rounded once or thrice, which moves logp by as much, and probabilities relatively
    rounding = EPS * (1 + (largest_logit(logits, kw) if transformed else 0.0))
    assert (ours["logp"] <= 0).all()
    if not transformed:
        assert torch.equal(ours["top_id"], truth["top_id"])
    for name in ours.keys() - {"top_id"}:
        want, got, same = truth[name], ours[name].double(), twin[name].double()
        assert not got.isnan().any(), name
        assert torch.equal(got.isinf(), want.isinf()), name
        finite = want.isfinite()
        if not finite.any():
            continue
        want, got, same = want[finite], got[finite], same[finite]
        scale = float(want.abs().max()) if "operand" in name else 1 + float(want.abs().max())
        amplified = 1 + (float(truth["entropy"].max()) if "entropy" in name or "entropy_coef_N" in kw else 0.0)
        bound = 1.5 * float((same - want).abs().max()) + 4 * (EPS + rounding) * scale * amplified
        error = float((got - want).abs().max())
        assert error <= bound, f"{name}: error {error:.3g}, the float32 twin's {float((same - want).abs().max()):.3g}"


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("rows", [1, 5])
def test_error_against_float64_over_shapes(rows, vocabulary):
    for options in ((), ("coef",), OPTIONS[:3], OPTIONS[3:], ("softcap", "coef"), ("excluded",)):
        check_accuracy(*make(rows, vocabulary, options=options, seed=vocabulary))


@pytest.mark.parametrize("kind", KINDS)
def test_error_against_float64_on_extreme_logits(kind):
    for vocabulary in (2, 17, 1000):
        check_accuracy(*make(5, vocabulary, kind))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 5),
    vocabulary=st.sampled_from(VOCABULARIES[:-1]),
    kind=st.sampled_from(("normal", "wide", "below_100", "flat", "holes")),
    options=st.sets(st.sampled_from(OPTIONS)),
    seed=st.integers(0, 2**20),
)
def test_error_against_float64_over_options(rows, vocabulary, kind, options, seed):
    check_accuracy(*make(rows, vocabulary, kind, options, seed))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 5),
    vocabulary=st.sampled_from(VOCABULARIES[:-1]),
    kind=st.sampled_from(KINDS),
    options=st.sets(st.sampled_from(OPTIONS)),
    gradient=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_bits_are_equal_on_every_instruction_set(rows, vocabulary, kind, options, gradient, seed):
    logits, target, kw = make(rows, vocabulary, kind, options, seed)
    kw["gradient"] = gradient
    results = []
    for isa in ISAS:
        _C.set_isa(isa)
        assert cpu.isa() == isa
        results.append(call(cpu.row_kernel_, logits, target, kw))
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value.nan_to_num(nan=9.0), other[name].nan_to_num(nan=9.0)), name


@pytest.mark.parametrize("options", [(), OPTIONS])
def test_bits_depend_neither_on_threads_nor_on_the_other_rows(options):
    logits, target, kw = make(7, 131_077, "normal", options)
    torch.set_num_threads(1)
    one = call(cpu.row_kernel_, logits, target, kw)
    torch.set_num_threads(3)
    three = call(cpu.row_kernel_, logits, target, kw)
    per_row = {"coef_N", "entropy_coef_N", "entropy_operand_NV", "temperature"}
    last = {k: v[6:] if k in per_row and isinstance(v, torch.Tensor) else v for k, v in kw.items()}
    alone = call(cpu.row_kernel_, logits[6:], target[6:], last)
    for name, value in one.items():
        assert torch.equal(value, three[name]), name
        assert torch.equal(value[6:], alone[name]), name


@pytest.mark.parametrize("vocabulary", [3, 16, 37])
def test_row_stride_is_honoured_and_guard_columns_are_neither_read_nor_written(vocabulary):
    logits, target, kw = make(4, vocabulary, options=("bias", "excluded", "entropy_coef", "entropy_operand"))
    plain = call(cpu.row_kernel_, logits, target, kw)
    wide, wide_entropy = torch.full((2, 4, vocabulary + 9), math.nan)
    wide[:, 5:-4] = logits
    operand = wide_entropy[:, 5:-4]
    stats = cpu.row_kernel_(wide[:, 5:-4], target, **{**kw, "entropy_operand_NV": operand})
    for name, value in stats.items():
        assert torch.equal(value, plain[name]), name
    assert torch.equal(wide[:, 5:-4], plain["operand"])
    assert torch.equal(operand, plain["entropy_operand"])
    for buffer in (wide, wide_entropy):
        assert buffer[:, :5].isnan().all()
        assert buffer[:, -4:].isnan().all()


@pytest.mark.parametrize("vocabulary", [16, 17, 1000])
def test_a_certain_true_class_keeps_its_relative_precision(vocabulary):
    logits, target, kw = make(5, vocabulary, "certain", ("coef",))
    truth = call(reference.row_kernel_, logits, target, kw, torch.float64)
    ours = call(cpu.row_kernel_, logits, target, kw)
    column = target[:, None]
    assert float(truth["logp"].abs().max()) < 1e-6  # p = 1 in float32
    torch.testing.assert_close(ours["operand"].gather(1, column).double(), truth["operand"].gather(1, column), rtol=2e-6, atol=0)
    others = (logits.double() - logits.double().gather(1, column)).exp().scatter(1, column, 0.0).sum(-1)
    torch.testing.assert_close(ours["logp"].double(), -torch.log1p(others), rtol=2e-6, atol=0)


@pytest.mark.parametrize("below", [0.0, 0.1, 1.2, 5.0, 11.0])
def test_a_sum_over_262144_classes_is_exact_to_2e6(below):
    """Equal terms round alike, the worst case of a running sum; the operand of the largest class is -1 / sum."""
    for spread in (0.0, 1.0):
        logits = torch.rand(1, 262_144, generator=torch.Generator().manual_seed(0)) * spread - below - spread
        logits[0, 5] = 0.0
        truth = (logits[0].double()).exp().sum()
        cpu.row_kernel_(logits, torch.tensor([77]), gradient=True)
        assert abs(-1 / float(logits[0, 5]) / float(truth) - 1) <= 2e-6


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("vocabulary", [1, 16, 37])
def test_a_nan_row_gives_nan_and_leaves_its_neighbours_alone(isa, vocabulary):
    _C.set_isa(isa)
    for bad in (math.nan, math.inf):
        logits, target, kw = make(3, vocabulary, options=("entropy_coef",))
        clean = call(cpu.row_kernel_, logits, target, kw)
        logits[1, vocabulary // 2] = bad
        for chosen in (target, torch.full_like(target, vocabulary // 2)):
            dirty = call(cpu.row_kernel_, logits, chosen, kw)
            assert dirty["lse"][1].isnan()
            assert dirty["logp"][1].isnan()
            assert 0 <= int(dirty["top_id"][1]) < vocabulary
        dirty = call(cpu.row_kernel_, logits, target, kw)
        for name in clean:
            assert torch.equal(dirty[name][0], clean[name][0])
            assert torch.equal(dirty[name][2], clean[name][2])


@pytest.mark.parametrize("vocabulary", [1, 16, 19])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_row_without_any_class_is_nan_or_minus_infinity(vocabulary, softcap):
    logits, target, _ = make(2, vocabulary)
    out = cpu.row_kernel_(
        logits,
        target,
        excluded_V=torch.ones(vocabulary, dtype=torch.bool),
        softcap=softcap,
        top=True,
        entropy=True,
        gradient=True,
    )
    assert (out["lse"].isnan() | (out["lse"] == -math.inf)).all()
    assert ((out["top_id"] >= 0) & (out["top_id"] < vocabulary)).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("ids", [(0, 1), (3, 16), (15, 16, 31), (33, 17), (16, 36), (36,)])
def test_ties_go_to_the_smallest_id(isa, ids):
    _C.set_isa(isa)
    logits, target, _ = make(2, 37)
    logits[0, list(ids)] = 50.0
    logits[1] = 2.0
    out = cpu.row_kernel_(logits, target, top=True)
    assert out["top_id"].tolist() == [min(ids), 0]


def test_excluded_classes_get_no_gradient_under_a_softcap():
    logits, target, kw = make(4, 40, options=("softcap", "excluded", "entropy_coef", "entropy_operand"))
    kw["excluded_V"] = kw["excluded_V"].to(torch.uint8)
    kw["excluded_V"][target] = 0
    out = call(cpu.row_kernel_, logits, target, kw)
    gone = kw["excluded_V"].bool()
    assert gone.any()
    assert (out["operand"][:, gone] == 0).all()
    assert (out["entropy_operand"][:, gone] == 0).all()


def test_no_rows_and_results_on_request_only():
    out = cpu.row_kernel_(torch.empty(0, 5), torch.empty(0, dtype=torch.int64), gradient=True, top=True, entropy=True)
    assert {name: tuple(value.shape) for name, value in out.items()} == dict.fromkeys(reference.STATISTICS, (0,))
    logits, target, _ = make(2, 9)
    assert set(cpu.row_kernel_(logits.clone(), target)) == {"logp", "lse"}
    assert set(cpu.row_kernel_(logits.clone(), target, entropy_coef_N=torch.ones(2))) == {"logp", "lse", "entropy"}


def test_float64_goes_to_the_reference():
    logits, target, kw = make(3, 20, options=("bias", "temperature", "entropy_coef"))
    want = call(reference.row_kernel_, logits, target, kw, torch.float64)
    got = call(cpu.row_kernel_, logits, target, kw, torch.float64)
    assert all(torch.equal(want[name], got[name]) for name in want)


def test_non_contiguous_vectors_are_read_by_value():
    logits, target, kw = make(4, 20)
    want = call(cpu.row_kernel_, logits, target, {**kw, "coef_N": torch.full((4,), 2.5)})
    got = call(lambda x, t, **k: cpu.row_kernel_(x, t, coef_N=torch.tensor(2.5).expand(4), **k), logits, target, kw)
    assert torch.equal(want["operand"], got["operand"])


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"logits_NV": torch.zeros(3, 8, dtype=torch.bfloat16)}, TypeError),
        ({"logits_NV": torch.zeros(8, 3).t()}, ValueError),
        ({"logits_NV": torch.zeros(1, 8).expand(3, 8)}, ValueError),
        ({"logits_NV": torch.zeros(3, 0)}, ValueError),
        ({"logits_NV": torch.zeros(8)}, ValueError),
        ({"target_N": torch.zeros(3, dtype=torch.int32)}, TypeError),
        ({"target_N": torch.zeros(2, dtype=torch.int64)}, ValueError),
        ({"target_N": torch.tensor([0, 8, 0])}, IndexError),
        ({"target_N": torch.tensor([0, -1, 0])}, IndexError),
        ({"bias_V": torch.zeros(8, dtype=torch.float64)}, TypeError),
        ({"bias_V": torch.zeros(7)}, ValueError),
        ({"excluded_V": torch.zeros(8)}, TypeError),
        ({"temperature": torch.ones(8)}, ValueError),
        ({"softcap": 0.0}, ValueError),
        ({"coef_N": torch.ones(3, 1)}, ValueError),
        ({"entropy_coef_N": torch.ones(3, dtype=torch.float64)}, TypeError),
        ({"entropy_operand_NV": torch.zeros(3, 7)}, ValueError),
        ({"entropy_operand_NV": torch.zeros(3, 8, dtype=torch.float64)}, TypeError),
    ],
)
def test_wrong_arguments_raise_and_name_themselves(change, error):
    arguments = {"logits_NV": torch.zeros(3, 8), "target_N": torch.zeros(3, dtype=torch.int64), **change}
    with pytest.raises(error, match=next(iter(change))):
        cpu.row_kernel_(gradient=True, **arguments)


def test_run_agrees_with_the_reference_head():
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(40, 24, generator=g), torch.randn(50, 24, generator=g)
    problem = HeadProblem(hidden, weight, torch.randint(0, 50, (40,), generator=g), softcap=20.0)
    outputs = (*reference.STATISTICS, "unit", "entropy_unit")
    want, got = reference.run(problem, outputs), cpu.run(problem, outputs)
    for name in outputs:
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-5)


def test_unknown_instruction_set():
    with pytest.raises(ValueError, match=r"isa: got 'mmx', this machine allows .*baseline"):
        _C.set_isa("mmx")


@pytest.mark.parametrize(
    ("code", "forced"),
    [
        ("from dllm_kernels.backends import cpu; assert cpu.isa() == 'baseline'", "baseline"),
        (
            "import warnings; warnings.simplefilter('ignore')\nfrom dllm_kernels.backends import cpu; assert cpu.available()",
            "mmx",
        ),
        (
            "import sys; sys.modules['dllm_kernels._C'] = None\n"
            "from dllm_kernels.backends import cpu\n"
            "assert not cpu.available() and cpu.isa() is None and 'compiler' in cpu.why_unavailable()",
            "",
        ),
    ],
)
def test_import_with_a_forced_instruction_set_or_without_the_extension(code, forced):
    environment = {**os.environ, "DLLM_KERNELS_ISA": forced}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
