"""Noise is a pure function of (seed, stream, sequence, sample, position, token, step), and of good quality."""

import ast
import contextlib
import importlib
import inspect
import math
import os
import pkgutil
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dllm_kernels as dk
from dllm_kernels import noise
from dllm_kernels.accumulation.scores import adapters_off, score_samples
from dllm_kernels.masks import steps
from dllm_kernels.masks.layout import input_tokens
from dllm_kernels.noise import Stream
from dllm_kernels.objectives import BGPO, Batch
from tests import oracle
from tests.plans import PRESETS, preset
from tests.tiny import eurobert

WORDS = st.integers(0, 2**32 - 1)
ONES = 0xFFFFFFFF


# every form that runs here: the PyTorch specification, and what the library takes on the CPU, which is C++ if it was built
ROW_BITS = (noise._row_bits, noise.row_bits)
ELEMENT_BITS = (noise._element_bits, lambda key, tokens, step, tag: noise.element_bits(key, tokens, step=step, tag=tag))


def philox(counter, key):
    words = noise.philox4x32(tuple(torch.tensor(c) for c in counter), tuple(torch.tensor(k) for k in key))
    return tuple(int(w) for w in words)


@pytest.mark.parametrize(("counter", "key", "answer"), oracle.PHILOX_VECTORS)
def test_philox_gives_the_published_vectors(counter, key, answer):
    """Known answers of Random123 in PyTorch, Python, and, as far as its interface shows the words, C++."""
    assert philox(counter, key) == answer
    assert oracle.philox(counter, key) == answer
    sequence = torch.tensor(((counter[1] << 32 | counter[0]) + 2**63) % 2**64 - 2**63)
    for row_bits in ROW_BITS:
        got = int(row_bits(key[0], key[1], sequence, torch.tensor(counter[2]), torch.tensor(counter[3]))) % 2**64
        assert (got % 2**32, got >> 32) == answer[:2]
    if counter == (0, 0, 0, 0):  # an element's counter is (quad, step, 0, tag)
        for element_bits in ELEMENT_BITS:
            assert tuple(element_bits(torch.tensor([0]), 4, torch.tensor(0), 0)[0].tolist()) == answer


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


@given(
    shape=st.lists(st.integers(0, 9), max_size=4),
    kept=st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=3, max_size=3),
    seed=WORDS,
    large=st.booleans(),
)
def test_row_bits_in_cpp_are_those_in_torch_for_any_broadcast(shape, kept, seed, large):
    g = torch.Generator().manual_seed(seed)
    shape = [*shape, 70] if large else shape  # more than the lanes of one call
    tensors = []
    for keeps, low in zip(kept, (-(2**63), 0, 0), strict=True):
        sizes = [n if keep else 1 for n, keep in zip(shape, [*keeps, True], strict=False)]
        values = torch.randint(low, 2**63 - 1 if low else 2**32, sizes, generator=g)
        tensors.append(values.transpose(0, -1).contiguous().transpose(0, -1) if shape else values)
    want = noise._row_bits(seed, Stream.MASK, *tensors)
    got = noise.row_bits(seed, Stream.MASK, *tensors)
    assert got.shape == want.shape
    assert torch.equal(got, want)


@given(rows=st.integers(0, 4), tokens=st.integers(0, 600), tag=st.sampled_from([0, 1]), by_row=st.booleans(), seed=WORDS)
def test_element_bits_in_cpp_are_those_in_torch(rows, tokens, tag, by_row, seed):
    g = torch.Generator().manual_seed(seed)
    keys = torch.randint(-(2**63), 2**63 - 1, (2 * rows,), generator=g)[::2]
    step = torch.randint(2**31, (rows,), generator=g) if by_row else torch.tensor(seed)
    got = noise.element_bits(keys, tokens, step=step, tag=tag)
    assert torch.equal(got, noise._element_bits(keys, tokens, step, tag))


@given(K=st.integers(1, 3), B=st.integers(1, 3), S=st.integers(0, 40), ties=st.booleans(), by_sample=st.booleans(), seed=WORDS)
def test_smallest_takes_the_first_of_the_order_of_bits_and_positions(K, B, S, ties, by_sample, seed):
    g = torch.Generator().manual_seed(seed)
    extremes = torch.tensor([-(2**63), -1, 0, 1, 2**63 - 1])
    bits = (
        extremes[torch.randint(5, (K, B, S), generator=g)] if ties else torch.randint(-(2**63), 2**63 - 1, (K, B, S), generator=g)
    )
    among = torch.rand((K, B, S) if by_sample else (B, S), generator=g) < 0.7
    count = torch.randint(-1, S + 2, (K, B), generator=g)
    want = torch.zeros(K, B, S, dtype=torch.bool)
    for k in range(K):
        for b in range(B):
            inside = [i for i in range(S) if among.expand(K, B, S)[k, b, i]]
            for i in sorted(inside, key=lambda i: (int(bits[k, b, i]), i))[: max(0, int(count[k, b]))]:
                want[k, b, i] = True
    assert torch.equal(noise.smallest(bits, among, count), want)
    assert torch.equal(noise._smallest(bits, among, count), want)


def test_the_extension_is_not_asked_about_tensors_without_memory():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        bits = noise.row_bits(0, Stream.MASK, torch.arange(3), torch.tensor(0), torch.tensor(0))
        assert bits.shape == (3,)
    compiled = torch.compile(lambda ids: noise.row_bits(0, Stream.MASK, ids, ids, ids), backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.arange(3)), noise.row_bits(0, Stream.MASK, *[torch.arange(3)] * 3))


def run_with_triton(code, tmp_path, **environment):
    paths = {"PYTHONPATH": str(Path(__file__).parents[1]), "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *code], env={**os.environ, **paths, **environment}, capture_output=True, text=True, timeout=800
    )


def test_noise_in_triton_has_the_same_bits_and_the_published_vectors(tmp_path):
    done = run_with_triton(["-m", "tests.backends.triton_noise"], tmp_path, TRITON_INTERPRET="1")
    assert done.stdout == "equal bits\n", done.stderr


def test_noise_in_triton_compiles_for_a_gpu_that_is_not_here(tmp_path):
    """Interpreted code need not compile: to machine code, for compute capability 9.0."""
    code = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dllm_kernels.backends.triton import noise
rows = dict.fromkeys(("sequence", "sample", "position", "out"), "*i64") | dict.fromkeys(("total", "size1", "size2"), "i64")
rows |= dict.fromkeys(("a0", "a1", "a2", "b0", "b1", "b2", "c0", "c1", "c2", "seed", "stream"), "i64") | {"BLOCK": "constexpr"}
elements = dict.fromkeys(("key", "step", "out"), "*i64") | dict.fromkeys(("step_stride", "tokens", "tag"), "i64")
elements |= {"BLOCK": "constexpr"}
for kernel, signature in ((noise._row_bits_kernel, rows), (noise._element_bits_kernel, elements)):
    compiled = triton.compile(ASTSource(kernel, signature, {"BLOCK": 1024}), target=GPUTarget("cuda", 90, 32))
    print(len(compiled.asm["cubin"]) > 0)
"""
    done = run_with_triton(["-c", code], tmp_path)
    assert done.stdout == "True\nTrue\n", done.stderr


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


@given(
    bits=st.one_of(st.integers(-(2**63), 2**63 - 1), st.sampled_from([0, 4095, 4096, -1, -4096, -4097, 2**63 - 1, -(2**63)])),
    p=st.one_of(st.floats(0.0, 1.0), st.sampled_from([0.0, 1.0, 2.0**-53, 2.0**-54, 1 - 2.0**-53, 1.5 * 2.0**-52, 5e-324])),
    near=st.booleans(),
)
def test_bernoulli_is_a_uniform_below_p(bits, p, near):
    bits = torch.tensor(bits)
    p = float(noise.uniform(bits)) if near else p  # the boundary itself
    for q in (p, math.nextafter(p, 0.0), math.nextafter(p, 1.0)):
        assert bool(noise.bernoulli(bits, q)) == (float(noise.uniform(bits)) < q)
        assert torch.equal(noise.bernoulli(bits, torch.tensor([q], dtype=torch.float64)), noise.uniform(bits)[None] < q)


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


@pytest.mark.parametrize(("position", "token", "value"), [(71670, 36473, 25.2702), (76209, 48416, 23.2159)])
def test_gumbel_noise_beyond_what_32_bits_reach_is_really_drawn(position, token, value):
    """`-log(-log(u))` of a uniform that is floored at 2^-31 ends at 21.5; these are draws with a high word of 0."""
    key = noise.row_bits(0, Stream.TOKEN, torch.tensor([0]), torch.tensor(0), torch.tensor(position))
    assert float(noise.gumbel(key, token + 1)[0, token]) == pytest.approx(value, abs=1e-4)


def test_gumbel_noise_fills_equally_likely_cells():
    """Chi-square of 2 million draws in 512 cells of equal probability, by the distribution function exp(-e^-g)."""
    keys = noise.row_bits(8, Stream.TOKEN, torch.tensor(1), torch.tensor(0), torch.arange(20))
    u = torch.exp(-torch.exp(-noise.gumbel(keys, 100000))).flatten()
    observed = torch.histc(u, 512, 0.0, 1.0)
    assert oracle.chi_square(observed, torch.full_like(observed, len(u) / 512)) < oracle.chi_square_limit(511)


def test_the_far_tail_of_the_gumbel_noise_has_its_distribution(monkeypatch):
    """Given a high word of 0, that is g > 22, the survival function at g is uniform on (0, 2^-32): the low words' doing."""
    words = noise.element_bits

    def high_words_are_0(key, tokens, *, step=0, tag=0):
        return words(key, tokens, step=step, tag=tag) * tag

    monkeypatch.setattr(noise, "element_bits", high_words_are_0)
    g = noise.gumbel(noise.row_bits(2, Stream.TOKEN, torch.tensor(1), torch.tensor(0), torch.arange(10)), 50000).flatten()
    assert g.min() > 22.18
    survival = -torch.expm1(-torch.exp(-g)) * 2.0**32
    observed = torch.histc(survival, 256, 0.0, 1.0)
    assert oracle.chi_square(observed, torch.full_like(observed, len(g) / 256)) < oracle.chi_square_limit(255)


@pytest.mark.parametrize("stream", [Stream.MASK, Stream.LEVEL])
def test_uniforms_have_both_tails(stream):
    """Of 2 million draws those within 2^-j of either end are a Poisson number: within 5 standard deviations."""
    u = uniforms(stream, count=1 << 21)
    for j in (4, 8, 12, 16):
        for tail in (u, 1.0 - u):
            expected = len(u) * 2.0**-j
            assert abs(int((tail < 2.0**-j).sum()) - expected) < 5 * math.sqrt(expected)
    assert u.min() < 1e-5
    assert u.max() > 1 - 1e-5


@pytest.mark.parametrize("axis", ["sample", "sequence", "position"])
def test_draws_at_different_indices_are_independent(axis):
    """Pairs along one axis of a `[K, B, S]` block of row keys, consecutive integers as ids: the worst case.

    At lags 1, 2, 3 and 7: the correlation of each of the 64 bits with itself, of the uniforms, and the joint distribution of
    the uniforms in 16 x 16 cells. 66 normal statistics per lag at 5.5 standard deviations and a chi-square at 1e-6:
    a false alarm in one of 1e5 choices of the keys, which are fixed.
    """
    ids = torch.arange(1000, 1064)
    bits = noise.row_bits(3, Stream.MASK, ids[:, None], torch.arange(64)[:, None, None], torch.arange(64))
    dim = ("sample", "sequence", "position").index(axis)
    for lag in (1, 2, 3, 7):
        first = bits.narrow(dim, 0, 64 - lag).flatten()
        second = bits.narrow(dim, lag, 64 - lag).flatten()
        n = len(first)
        agreement = first ^ second
        for bit in range(64):
            ones = int((agreement >> bit & 1).sum())
            assert abs(ones - n / 2) < 5.5 * math.sqrt(n / 4), (lag, bit)
        u, v = noise.uniform(first), noise.uniform(second)
        assert abs(float(((u - 0.5) * (v - 0.5)).mean())) < 5.5 / 12 / math.sqrt(n)
        cells = torch.bincount((u * 16).long() * 16 + (v * 16).long(), minlength=256).double()
        assert oracle.chi_square(cells, torch.full_like(cells, n / 256)) < oracle.chi_square_limit(255)


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


def public_functions():
    """Name and code of what `dllm_kernels` exports, and of every public function and method that makes noise or plans."""
    found = {}
    for info in pkgutil.walk_packages(dk.__path__, "dllm_kernels."):
        if info.name.endswith("._C") or "triton" in info.name or ".integrations." in info.name:  # need packages of others
            continue
        module = importlib.import_module(info.name)
        for name, value in vars(module).items():
            members = {name: value} if inspect.isfunction(value) else vars(value) if inspect.isclass(value) else {}
            for member, function in members.items():
                function = getattr(function, "__func__", getattr(function, "fget", getattr(function, "func", function)))
                function = inspect.unwrap(function) if callable(function) else None
                if not inspect.isfunction(function) or member.startswith("_") or function.__module__ != module.__name__:
                    continue
                found[f"{function.__module__}.{function.__qualname__}"] = function.__code__
    return {
        name: code
        for name, code in found.items()
        if "._" not in name and (name.startswith(NOISY_MODULES) or name.split(".")[-1] in dk.__all__)
    }


NOISY_MODULES = tuple(
    f"dllm_kernels.{name}."
    for name in (
        "noise",
        "masks",
        "accumulation.estimation",
        "accumulation.loop",
        "accumulation.scores",
        "rollouts.generation",
    )
)
# what reads or writes a global random state
OF_TORCH = "manual_seed seed set_rng_state random rand randn randint randperm rand_like randn_like randint_like normal poisson"
OF_TENSORS = "uniform_ normal_ random_ exponential_ bernoulli_ geometric_ cauchy_ log_normal_ multinomial dropout alpha_dropout"
MODULES = ("random", "numpy.random", "torch.random")


def uses_of_global_random_states(source):
    """Calls and imports, by syntax: `torch.rand(...)`, `x.uniform_()`, `np.random`, `import random`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            if owner == "torch" and node.attr in (*OF_TORCH.split(), "bernoulli"):
                found.append(f"torch.{node.attr}")
            elif node.attr in OF_TENSORS.split() or (owner in ("np", "numpy") and node.attr == "random"):
                found.append(f"{owner}.{node.attr}")
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [f"{getattr(node, 'module', None) or ''}.{alias.name}".strip(".") for alias in node.names]
            found += [name for name in names if any(f"{name}.".startswith(f"{bad}.") for bad in MODULES)]
    return found


@pytest.mark.parametrize(
    "line",
    [
        "torch.rand(3)",
        "torch.bernoulli(p)",
        "torch.manual_seed(0)",
        "torch.random.fork_rng()",
        "x.uniform_()",
        "p.multinomial(1)",
        "F.dropout(x)",
        "np.random.rand()",
        "import random",
        "from random import shuffle",
        "from numpy import random",
    ],
)
def test_the_scan_finds_uses_of_global_random_states(line):
    assert len(uses_of_global_random_states(line)) == 1


def test_no_line_of_the_package_uses_a_global_random_state():
    # one draws as the trainer that it stands in for, one puts the state back as it was after a model with dropout was looked at
    named = (("integrations", "dllm.py"), ("accumulation", "fitting.py"))
    files = [file for file in sorted(Path(dk.__file__).parent.rglob("*.py")) if file.parts[-2:] not in named]
    assert len(files) > 20
    assert {str(file): found for file in files if (found := uses_of_global_random_states(file.read_text()))} == {}


def test_no_public_function_touches_a_global_random_state(tmp_path):
    """d1 and ESPO reseed Python, NumPy and torch inside the loss; whatever is sampled after that repeats.

    What is exported, and what makes noise and plans, is called here, and a profile of the calls says so. The lines of every
    function are scanned above.
    """
    model = eurobert()
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    functions, called = public_functions(), set()
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    sys.setprofile(lambda frame, event, _: called.add(frame.f_code) if event == "call" else None)
    try:
        use_everything(model, tmp_path)
    finally:
        sys.setprofile(None)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])
    assert [name for name, code in functions.items() if code not in called] == []
    assert len(functions) > 50


def use_everything(model, tmp_path):
    ids, sequences = torch.full((2, 6), 3), torch.tensor([1, 2])
    completion = torch.ones_like(ids, dtype=torch.bool)
    for name in PRESETS:
        plan = preset(name, [5, 3], prompt_noise=0.2, iteration=1, ids=sequences)
        plan.save(tmp_path / "plan.pt")
        dk.MaskPlan.load(tmp_path / "plan.pt").to("cpu").describe(hidden_size=8, vocabulary=11)
        plan.standard_error(plan.elbo(torch.zeros(len(plan.rows))))
        plan.score(torch.zeros(len(plan.rows)))
        plan.noisy_ids, plan.p_mask_KB, plan.share_K  # noqa: B018
    plan = dk.make_mask_plan(ids, completion, law="exact", samples=4, seed=0, sequence_ids=sequences, mask_id=10)
    ends = {"seed": 0, "sequence_ids": sequences, "mask_id": 10, "eos_id": 3}
    dk.make_mask_plan(ids, completion, law="coupled", samples=3, tail="hidden", **ends).noisy_ids  # noqa: B018
    first = completion & (torch.arange(6) < 1)
    given = dk.make_mask_plan(ids, completion, law="given", samples=None, masked_KBS=first[None], **ends)
    given.rows, given.rule, given.weight_KB  # noqa: B018
    for name in ("bernoulli", "exact", "coupled", "trace", "segments"):  # as block-causal models are scored
        plan_of_blocks = preset(name, [5, 3], causal_block=8, ids=sequences)
        plan_of_blocks.layout(2).extended(plan_of_blocks.completion_mask_BS)
        plan_of_blocks.layout(2).sees, plan_of_blocks.layout(2).copies, plan_of_blocks.layout(2).spans, plan_of_blocks.p_mask_KBS
        input_tokens((2, *ids.shape), plan_of_blocks.completion_mask_BS, plan_of_blocks.block_BS, 2)
        steps.sums(plan_of_blocks, plan_of_blocks.dense(torch.zeros(len(plan_of_blocks.rows))))
        if name in ("trace", "segments"):
            steps.states(plan_of_blocks)
        steps.number(plan_of_blocks), steps.sizes(plan_of_blocks)
    advantages = dk.objectives.group_advantages(torch.tensor([1.0, 0.0]), torch.tensor([0, 0]))
    report = dk.accumulate(model, plan, BGPO, Batch({"advantages": advantages}))
    dk.fit_passes(model, plan, BGPO, memory_budget=1 << 30)
    model.disable_adapter = contextlib.nullcontext  # as peft's models have it
    with adapters_off(model):
        old = score_samples(model, plan)
        score_samples(model, plan, per_token=True)
    dk.accumulate(model, plan, BGPO, Batch({"advantages": advantages}, {"old_sample_elbo": old}))
    dk.objectives.bgpo(report.sample_elbo_BK, old, advantages, lengths=torch.ones(2))
    dk.estimate_elbo(model, ids, completion, samples=4, mask_id=10)
    for remasking in ("random", "low_confidence"):
        options = {"length": 4, "steps": 2, "block_length": 2, "mask_id": 10, "temperature": 1.0, "sequence_ids": sequences}
        rollout = dk.generate(model, ids, remasking=remasking, **options)
    entropy = dk.step_entropy(rollout.commit_entropy_BL, rollout.commit_step_BL)
    chosen = dk.select_steps(entropy, 1, "random", sequence_ids=sequences)
    dk.trajectory_logp(rollout, dk.trajectory_rows(rollout, chosen))
    options = {"length": 4, "block_length": 2, "mask_id": 10, "temperature": 1.0, "sequence_ids": sequences}
    edited = dk.generate(model, ids, sampler="llada2", editing_threshold=0.1, **options)
    dk.trajectory_logp(edited, dk.trajectory_rows(edited, score="all_events"))
    hidden, weight = torch.ones(2, 6, 8, requires_grad=True), torch.ones(11, 8)
    dk.score_tokens(hidden, weight, torch.arange(3), rows=torch.arange(3)).logp.sum().backward()
    dk.head_backward(hidden.detach().expand(4, 2, 6, 8), weight, plan.rows, torch.ones(len(plan.rows)))
    dk.sample_tokens(hidden, weight, torch.arange(12))
    dk.explain(hidden, weight, torch.arange(12))
    dk.elbo_loss(hidden, weight, ids, completion, torch.tensor(0.5)).backward()
    dk.distillation_loss(hidden, weight, hidden, weight, rows=torch.arange(2)).backward()
    dk.expected_embedding(hidden, weight).sum().backward()
    dk.bgpo_loss(hidden, weight, ids, completion, torch.tensor(2.0), None, torch.ones(2), 4).backward()
    noise.permutation(0, 9)
    noise.sequence_ids(["a"])
    noise.philox4x32((ids, ids, ids, ids), (ids, ids))


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, True, "0"])
def test_a_seed_beyond_one_key_word_is_an_error(seed):
    with pytest.raises((ValueError, TypeError), match="seed"):
        noise.row_bits(seed, Stream.MASK, torch.tensor(0), torch.tensor(0), torch.tensor(0))


def test_sequence_ids_need_one_member_each():
    with pytest.raises(ValueError, match="members"):
        noise.sequence_ids(["a", "b"], members=[1])
