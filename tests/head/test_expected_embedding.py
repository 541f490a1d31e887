"""`expected_embedding` in float64 and inside PyTorch's machinery; what every backend must do is in `head_expectation`."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dllm_kernels import expected_embedding, explain
from dllm_kernels.backends.contract import HeadOptions
from dllm_kernels.backends.divergence import walk
from dllm_kernels.head import expectation
from dllm_kernels.head.expectation import Wants
from dllm_kernels.head.expectation_autograd import Expect
from dllm_kernels.head.forward_backward import Needs
from dllm_kernels.head.options import make_problem
from tests.head.head_expectation import make_expectation


@pytest.mark.parametrize("slabs", ["one slab", "many slabs"])
@pytest.mark.parametrize("options", [False, True], ids=["plain", "options"])
@pytest.mark.parametrize("D", [None, 5], ids=["tied", "embedding"])
def test_value_and_gradients_are_those_of_full_logits(slabs, options, D, monkeypatch):
    if slabs == "many slabs":
        monkeypatch.setattr(walk, "SLAB_ELEMENTS", {"cpu": 1})
    for trains in (True, False):
        case = make_expectation(D=D, options=options, trains=trains)
        got, true = case.expected(), case.true()
        assert torch.allclose(got, true, rtol=1e-11, atol=1e-12)
        upstream = torch.linspace(-1, 2, got.numel(), dtype=torch.float64).view(got.shape)
        gradients = torch.autograd.grad(got, case.leaves, upstream)
        for mine, truth in zip(gradients, torch.autograd.grad(true, case.leaves, upstream), strict=True):
            assert torch.allclose(mine, truth, rtol=1e-9, atol=1e-11)


def test_gradcheck():
    case = make_expectation(N=3, H=4, V=70, D=3, options=True)
    adapter, bias = case.options.pop("low_rank"), case.options.pop("bias")

    def expected(hidden, weight, embedding, bias, down, up):
        options = {**case.options, "bias": bias, "low_rank": (down, up, adapter[2])}
        return expected_embedding(hidden, weight, embedding, rows=case.rows, **options)

    leaves = case.hidden, case.weight, case.embedding, bias, *adapter[:2]
    assert torch.autograd.gradcheck(expected, leaves, fast_mode=True)


def test_each_gradient_alone_is_the_one_among_all():
    """What is not wanted is not computed, and the others do not notice."""
    case = make_expectation(torch.float32, D=5, options=True)
    upstream = torch.randn(7, 5)
    every = torch.autograd.grad(case.expected(), case.leaves, upstream)
    leaves = case.leaves
    for place, leaf in enumerate(leaves):
        for other in leaves:
            other.requires_grad_(other is leaf)
        (alone,) = torch.autograd.grad(case.expected(), leaf, upstream)
        assert torch.allclose(alone, every[place], rtol=1e-5, atol=1e-6)


def test_without_rows_all_positions_come_in_order_and_without_any_nothing_does():
    case = make_expectation(torch.float32, D=5)
    whole = expected_embedding(case.hidden, case.weight, case.embedding)
    assert whole.shape == (12, 5)
    torch.testing.assert_close(whole[case.rows], case.expected())
    case.rows = torch.zeros(0, dtype=torch.int64)
    none = case.expected()
    assert none.shape == (0, 5)
    none.sum().backward()
    assert all(not leaf.grad.any() for leaf in case.leaves)


def test_the_weight_given_as_embedding_is_the_tied_one_and_another_copy_gets_its_own_part():
    case = make_expectation(torch.float32)
    tied, named = (expected_embedding(case.hidden, case.weight, *more) for more in ((), (case.weight,)))
    assert torch.equal(tied, named)
    both = [torch.autograd.grad(x.square().sum(), case.weight)[0] for x in (tied, named)]
    assert torch.equal(*both)
    copy = case.weight.detach().clone().requires_grad_()
    apart = expected_embedding(case.hidden, case.weight, copy)
    of_weight, of_copy = torch.autograd.grad(apart.square().sum(), (case.weight, copy))
    torch.testing.assert_close(of_weight + of_copy, both[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_tensors_have_the_values_of_dense_ones(dtype):
    case = make_expectation(dtype, N=12, D=5)
    upstream = torch.randn(5, 12).to(dtype).t()
    strided = [
        torch.empty(*x.shape[:-1], 2 * x.shape[-1], dtype=dtype)[..., ::2].copy_(x.detach()).requires_grad_()
        for x in (case.hidden, case.weight)
    ]
    strided.append(case.embedding.detach().t().contiguous().t().requires_grad_())
    dense = case.expected()
    other = expected_embedding(*strided, rows=case.rows)
    torch.testing.assert_close(other, dense)
    found = torch.autograd.grad(other, strided, upstream)
    for mine, wanted in zip(found, torch.autograd.grad(dense, case.leaves, upstream), strict=True):
        torch.testing.assert_close(mine, wanted)


# --- inside PyTorch's machinery ---------------------------------------------------------------------------------------


def test_the_result_may_be_scaled_in_place_and_a_second_backward_finds_what_the_first_one_found():
    case = make_expectation(torch.float32, D=5)
    scaled = 3 * case.expected()
    in_place = case.expected().mul_(3)
    first = torch.autograd.grad(in_place.square().sum(), case.leaves, retain_graph=True)
    for wanted in (
        torch.autograd.grad(scaled.square().sum(), case.leaves),
        torch.autograd.grad(in_place.square().sum(), case.leaves),
    ):
        assert all(torch.equal(a, b) for a, b in zip(first, wanted, strict=True))


@pytest.mark.parametrize("name", ["hidden", "weight", "embedding", "rows"])
def test_what_backward_reads_again_must_not_change(name):
    case = make_expectation(torch.float32, D=5)
    loss = case.expected().sum()
    with torch.no_grad():
        getattr(case, name).mul_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_double_backward_is_refused():
    case = make_expectation(torch.float32, D=5)
    (gradient,) = torch.autograd.grad(case.expected().square().sum(), case.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_nothing_is_recorded_under_no_grad_and_inference_mode(monkeypatch):
    case = make_expectation(torch.float32)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            out = case.expected()
        assert not out.requires_grad
        assert torch.equal(out, case.expected().detach())
    frozen = make_expectation(torch.float32, trains=False)
    for operand in (frozen.hidden, frozen.weight):
        operand.requires_grad_(False)
    monkeypatch.setattr(Expect, "apply", None)  # which adds up, and keeps, what a backward would read
    assert torch.equal(frozen.expected(), out)


def test_under_autocast_operands_are_cast_and_gradients_come_back_in_their_own_dtypes():
    case = make_expectation(torch.float32, D=5)
    with torch.autocast("cpu", torch.bfloat16):
        cast = case.expected()
        cast.sum().backward()
    assert cast.dtype == torch.bfloat16
    bf16 = [x.detach().bfloat16() for x in (case.hidden, case.weight, case.embedding)]
    assert torch.equal(cast, expected_embedding(*bf16, rows=case.rows))
    assert all(leaf.grad.dtype == torch.float32 for leaf in case.leaves)


class _Largest(TorchDispatchMode):
    """The most bytes that a tensor of a call has in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        found = function(*arguments, **(named or {}))
        for x in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(x, torch.Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return found


def test_no_tensor_has_the_size_of_the_logits():
    """With 64 times the ids nothing grows, where no gradient has the size of the weight, nor the weight itself."""
    most = []
    for V in (1 << 14, 1 << 20):
        hidden, weight = torch.zeros(64, 2), torch.zeros(1, 2).expand(V, 2)
        problem = make_problem(hidden, weight, torch.empty(64), None, HeadOptions())
        with _Largest() as seen:
            out, levels, summed = expectation.forward(problem, None, True)
            expectation.backward(problem, None, hidden.shape, levels, summed, out, Wants(Needs(True, False, False), False))
        most.append(seen.bytes)
    assert most[0] == most[1] <= 4 * 64 * walk.MOST_SLAB


PROBE = """
import sys
import torch
from dllm_kernels import expected_embedding

N, H, V = 128, 256, 128000
torch.set_num_threads(1)
hidden, weight = torch.ones(N, H, dtype=torch.bfloat16), torch.ones(V, H, dtype=torch.bfloat16)
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024

def run(rows, ids):
    leaf = hidden[:rows].detach().requires_grad_()
    if sys.argv[1] == "eager":
        out = (leaf @ weight[:ids].t()).float().softmax(-1).to(weight.dtype) @ weight[:ids]
    else:
        out = expected_embedding(leaf, weight[:ids])
    out.sum().backward()

run(8, 1024)
before = peak()
run(N, V)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/status is Linux's")
def test_memory_beyond_the_operands_is_a_tenth_of_eager_s():
    extra = {}
    for how in ("ours", "eager"):
        done = subprocess.run([sys.executable, "-c", PROBE, how], capture_output=True, text=True, timeout=800)
        assert done.returncode == 0, done.stderr
        extra[how] = int(done.stdout)
    assert extra["ours"] * 10 <= extra["eager"], extra


def test_explain_says_what_a_call_with_an_embedding_costs():
    hidden, weight = (torch.empty(size, 64, device="meta", dtype=torch.bfloat16) for size in (512, 100000))
    frozen = explain(hidden, weight, embedding=weight)
    assert (frozen.plan, frozen.forward_gemms, frozen.backward_gemms, frozen.stored_bytes) == ("forward", 2, 0, 0)
    assert frozen.peak_bytes < 4 * 512 * 100000 / 10
    hidden.requires_grad_()
    late = explain(hidden, weight, embedding=weight)
    assert (late.plan, late.backward_gemms, late.stored_bytes) == ("recompute", 3, 4 * 512 * 66)
    assert late.flops == 5 * 2 * 512 * 64 * 100000
    numbers = explain(rows=512, hidden_size=64, vocabulary=100000, dtype=torch.bfloat16, embedding_size=32, trainable_head=True)
    assert (numbers.forward_gemms, numbers.backward_gemms) == (2, 5)
    assert numbers.flops == 2 * 512 * 100000 * (64 + 32 + 64 + 32 + 64 + 64 + 32)
    assert numbers.on("H100").seconds > 0
    with pytest.raises(TypeError, match="plan, ids and want_top go with a target, got an embedding"):
        explain(hidden, weight, embedding=weight, want_top=2)
    with pytest.raises(TypeError, match="a teacher and an embedding are of two calls"):
        explain(hidden, weight, embedding=weight, teacher_hidden=hidden, teacher_weight=weight)
    with pytest.raises(TypeError, match="embedding_size goes with numbers"):
        explain(hidden, weight, embedding_size=3)
    with pytest.raises(ValueError, match=r"embedding must have shape \[100000, any\], got \[3, 4\]"):
        explain(hidden, weight, embedding=torch.empty(3, 4, device="meta"))


# --- bad input --------------------------------------------------------------------------------------------------------

BAD = {
    "another vocabulary": (
        {"embedding": torch.ones(299, 5)},
        ValueError,
        r"embedding must have shape \[300, any\], got \[299, 5\]",
    ),
    "one dimension": ({"embedding": torch.ones(300)}, ValueError, r"embedding must have shape \[300, any\], got \[300\]"),
    "no columns": ({"embedding": torch.ones(300, 0)}, ValueError, "embedding must have at least one column"),
    "float64": ({"embedding": torch.ones(300, 5).double()}, TypeError, "embedding may be float64 only where hidden is"),
    "ids": ({"embedding": torch.ones(300, 5).long()}, TypeError, "embedding must be of dtype"),
    "list": ({"embedding": [1.0]}, TypeError, "embedding must be a torch.Tensor, got list"),
    "device": ({"embedding": torch.ones(300, 5, device="meta")}, ValueError, "embedding must be on the device of hidden"),
    "hidden": ({"hidden": None}, TypeError, "hidden must be a torch.Tensor, got NoneType"),
    "width": ({"hidden": torch.ones(2, 9)}, ValueError, r"hidden must have shape \[..., 8\] to match weight"),
    "rows twice": ({"rows": torch.tensor([1, 1])}, ValueError, "rows must be unique"),
    "rows beyond": ({"rows": torch.tensor([12])}, ValueError, "rows must hold ids in 0..11"),
    "temperature": ({"temperature": 0.0}, ValueError, "temperature must be finite and above 0"),
    "temperatures": ({"temperature": torch.ones(3)}, ValueError, r"temperature must have shape \[12\]"),
    "all suppressed": ({"suppress": range(300)}, ValueError, "must leave at least one id"),
    "not a number": ({"hidden": torch.full((2, 8), float("nan"))}, ValueError, "must give finite logits .* at row 0 of hidden"),
    "nothing left": ({"bias": torch.full((300,), float("-inf"))}, ValueError, "must give finite logits"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_named(name):
    arguments, error, words = BAD[name]
    case = make_expectation(torch.float32)
    operands = {"hidden": case.hidden, "weight": case.weight}
    with pytest.raises(error, match=words):
        expected_embedding(**{**operands, **arguments})


def test_a_sharded_tensor_and_a_transform_are_refused_by_name():
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    case = make_expectation(torch.float32, D=5)
    plain = {"hidden": case.hidden.detach(), "weight": case.weight.detach(), "embedding": case.embedding.detach()}
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        mesh = init_device_mesh("cpu", (1,))
        for name in plain:
            sharded = {**plain, name: distribute_tensor(plain[name], mesh, [Shard(0)])}
            with pytest.raises(TypeError, match=f"{name} must be a plain tensor, got a DTensor"):
                expected_embedding(**sharded)
    finally:
        dist.destroy_process_group()
    with pytest.raises(TypeError, match="embedding must be a plain tensor, got one inside a transform"):
        torch.func.vmap(lambda e: expected_embedding(plain["hidden"], plain["weight"], e))(plain["embedding"][None])
