"""dW of 16 bits is rounded once from fp32 sums, and is added up in one place over several calls."""

import pytest
import torch

from dllm_kernels import Rows, head_backward, score_tokens
from dllm_kernels.backends import contract
from dllm_kernels.head.options import HeadOptions
from dllm_kernels.head.scoring import score
from dllm_kernels.head.weight_sum import WeightSum
from tests.head_suite import make_case

PLANS = ("coef", "keep", "recompute")
H, V = 40, 50  # H: a whole panel and an edge; V: whole strips and an edge
OPTIONS = [{}, {"bias": True, "low_rank": 3}]


def gradients(case, plan, taker=None):
    """Of hidden, weight and the rest through `score`, for coefficients that are known or arrive late."""
    case = case.fresh()
    coef = case.coef if plan == "coef" else None
    options = HeadOptions(**case.options)
    found = score(case.hidden, case.weight, case.target, case.rows, options, coef, plan=plan, take_dweight=taker)
    (found.weighted_sum if plan == "coef" else torch.dot(found.logp, case.coef.to(found.logp))).backward()
    return case.grads


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "bias, adapter"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("rows", [70, 600], ids=["one chunk", "chunks"])
def test_16_bit_gradients_are_the_fp32_ones_rounded_once(backend, plan, dtype, rows, options, monkeypatch):
    """Bit for bit, where one chunk holds all rows and where they are added up over chunks: of 256, of stored operands of 1024."""
    monkeypatch.setitem(contract.WORKSPACE_BYTES, "cpu", 1)
    rows = 1100 if plan == "keep" and rows == 600 else rows
    case = make_case(dtype, backend.device, shape=(2, rows), H=H, V=V, rows=rows, **options)
    taken = []
    gradients(case, plan, taken.append)
    assert taken[0].dtype == torch.float32
    assert torch.equal(gradients(case, plan)["weight"], taken[0].to(dtype))


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "bias, adapter"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("plan", PLANS)
def test_calls_add_to_one_sum_and_hand_autograd_none(backend, plan, dtype, options):
    case = make_case(dtype, backend.device, H=H, V=V, **options)
    alone, taken = gradients(case, plan), []
    gradients(case, plan, taken.append)
    leaf = case.weight.clone().requires_grad_(True)
    sums = WeightSum(leaf)
    for call in range(1, 4):
        got = gradients(case, plan, sums)
        assert got.pop("weight") is None
        assert all(torch.equal(got[name], alone[name]) for name in got), "the other gradients are overwritten, not added to"
        assert torch.allclose(sums.tensor, call * taken[0], rtol=1e-5, atol=1e-6)
        assert (leaf.grad is sums.tensor) == (dtype != torch.bfloat16)
    total = sums.tensor.clone()
    sums.finish()
    assert torch.equal(leaf.grad, total.to(dtype))
    if dtype == torch.bfloat16:  # later sums are added to what is there, and rounded with it
        gradients(case, plan, sums)
        one = sums.tensor.clone()
        sums.finish()
        assert torch.equal(leaf.grad, (total.to(dtype).float() + one).to(dtype))


def test_a_gradient_of_other_strides_or_with_a_graph_is_left_to_autograd():
    case = make_case(torch.float32, H=H, V=V)
    want = gradients(case, "coef")["weight"]
    for there in (torch.zeros(H, V).t(), torch.zeros(V, H).requires_grad_(True) * 1.0):
        leaf = case.weight.clone().requires_grad_(True)
        leaf.grad = there
        assert torch.equal(gradients(case, "coef", WeightSum(leaf))["weight"], want)


def test_a_gradient_that_is_replaced_between_calls_is_the_one_that_is_added_to():
    case = make_case(torch.float32, H=H, V=V)
    want = gradients(case, "coef")["weight"]
    leaf = case.weight.clone().requires_grad_(True)
    sums = WeightSum(leaf)
    for replaced in (None, torch.ones(V, H), None):
        leaf.grad = replaced
        gradients(case, "coef", sums)
        assert torch.allclose(leaf.grad, want if replaced is None else want + 1, atol=1e-6)


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="torch has no gradients of a dtype of their own")
@pytest.mark.parametrize(("own", "of_grad"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_a_gradient_has_the_dtype_that_its_parameter_asks_for(own, of_grad):
    case = make_case(own, H=H, V=V)
    taken = []
    gradients(case, "coef", taken.append)
    leaf = case.weight.clone().requires_grad_(True)
    leaf.grad_dtype = of_grad
    sums = WeightSum(leaf)
    gradients(case, "coef", sums)
    sums.finish()
    assert torch.equal(leaf.grad, taken[0].to(of_grad))
    assert leaf.grad.dtype == of_grad


def test_autograd_notices_that_a_sum_has_changed():
    """A graph that saved `.grad` must not be walked with other numbers."""
    case = make_case(torch.float32, H=H, V=V)
    leaf = case.weight.clone().requires_grad_(True)
    leaf.grad = torch.ones(V, H)
    saved = (leaf.grad * torch.ones(V, H, requires_grad=True)).sum()
    gradients(case, "coef", WeightSum(leaf))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()


def test_a_non_finite_row_leaves_a_first_sum_unwritten():
    case = make_case(torch.float32, H=H, V=V)
    leaf = case.weight.clone().requires_grad_(True)
    sums = WeightSum(leaf)
    case.hidden[0, 0] = float("nan")
    case.rows = None
    case.target, case.coef = case.target.new_zeros(case.hidden.shape[:-1].numel()), torch.ones(case.hidden.shape[:-1].numel())
    with pytest.raises(ValueError, match="hidden"):
        gradients(case, "coef", sums)
    assert not sums.written
    assert leaf.grad is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_row_does_not_reach_what_earlier_calls_added_up(value):
    """A caller may leave the bad batch out and step with the gradient so far."""
    case = make_case(torch.float32, H=H, V=V)
    leaf = case.weight.clone().requires_grad_(True)
    sums = WeightSum(leaf)
    gradients(case, "coef", sums)
    before, place = leaf.grad.clone(), int(case.rows[2])
    case.hidden.view(-1, H)[place, 3] = value
    with pytest.raises(ValueError, match=f"hidden must be finite .* at row {place}"):
        gradients(case, "coef", sums)
    assert torch.equal(leaf.grad, before)


def test_head_backward_adds_in_fp32_for_16_bit_heads_too():
    case = make_case(torch.bfloat16, H=H, V=V)
    rows, dweight = Rows(index=case.rows, target=case.target), torch.zeros(V, H)
    for _ in range(2):
        head_backward(case.hidden, case.weight, rows, case.coef.float(), dweight_out=dweight)
    case = case.fresh()
    score_tokens(case.hidden, case.weight, case.target, rows=case.rows, coef=2 * case.coef).weighted_sum.backward()
    assert torch.allclose(dweight, case.weight.grad.float(), rtol=2**-8, atol=1e-4)
