"""The third part of the head suite, for every backend: what callers bring, and what they change before backward."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch

from dllm_kernels import Rows, head_backward, score_tokens
from dllm_kernels.backends import for_device
from tests.head_suite import F64, LATE_PLANS, PLANS, as_rows, make_case

DTYPES = pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16], ids=str)


@DTYPES
def test_what_has_coefficient_0_adds_nothing_to_the_sum_beside_a_target_of_minus_infinity(backend, dtype):
    """0 * -inf is NaN: with entropy coefficients alone, and at a row whose own coefficient is 0."""
    case = make_case(dtype, backend.device, bias=True)
    case.options["bias"][5] = -math.inf
    case.target[2] = 5
    scores = case.score(want=("logp", "entropy"))
    alone = case.score(entropy_coef=case.entropy_coef).weighted_sum
    torch.testing.assert_close(alone.double(), (case.entropy_coef * scores.entropy).sum(), rtol=1e-5, atol=1e-5)
    case.coef[2] = 0.0
    want = (case.coef * scores.logp)[torch.arange(11) != 2].sum()
    torch.testing.assert_close(case.score(coef=case.coef).weighted_sum.double(), want, rtol=1e-5, atol=1e-5)


# --- buffers of the caller --------------------------------------------------------------------------------------------

LAYOUTS = {
    "transposed": lambda *size: torch.zeros(size[::-1]).t(),
    "padded rows": lambda *size: torch.zeros(*size[:-1], size[-1] + 3)[..., 1:-2],
    "every other column": lambda *size: torch.zeros(*size[:-1], 2 * size[-1])[..., ::2],
    "every other row": lambda *size: torch.zeros(2 * size[0], *size[1:])[1::2],
    "columns of a stack": lambda *size: torch.zeros(size[-1], 2, size[0])[:, 1].t() if len(size) == 2 else torch.zeros(size),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@DTYPES
def test_head_backward_adds_to_buffers_of_any_layout_and_leaves_their_neighbours_alone(backend, layout, dtype):
    case = make_case(dtype, backend.device, bias=True)
    statistics = F64 if dtype == F64 else torch.float32

    def added(make):
        views, storages = [], []
        for size in ((13, 6), (13,)):
            like = make(*size)
            storages.append(torch.full((like.untyped_storage().nbytes() // 4,), 7.0, dtype=statistics, device=backend.device))
            views.append(storages[-1].as_strided(like.shape, like.stride(), like.storage_offset()))
        head_backward(
            case.hidden, case.weight, as_rows(case), case.coef, dweight_out=views[0], dbias_out=views[1], **case.options
        )
        return views, storages

    dense, _ = added(torch.zeros)
    strided, storages = added(LAYOUTS[layout])
    for got, want, storage in zip(strided, dense, storages, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
        assert int((storage != 7.0).sum()) == int((want != 7.0).sum()), "nothing beside the view has changed"


def test_head_backward_refuses_a_buffer_whose_elements_coincide(backend):
    case = make_case(torch.float32, backend.device)
    one = torch.zeros(1, 1, device=backend.device)
    for name, buffer in (("dweight_out", one.expand(13, 6)), ("dbias_out", one[0].expand(13))):
        with pytest.raises(ValueError, match=f"{name} must not overlap itself"):
            head_backward(case.hidden, case.weight, as_rows(case), case.coef, **{name: buffer})


def test_head_backward_may_add_to_the_columns_of_one_buffer_and_to_the_weight_itself(backend):
    """Both gradients of an augmented matrix; a step of plain gradient descent in place."""
    case = make_case(torch.float32, backend.device, bias=True)

    def run(weight, **buffers):
        return head_backward(case.hidden, weight, as_rows(case), case.coef, **buffers, **case.options)

    dweight, dbias = torch.zeros(13, 6, device=backend.device), torch.zeros(13, device=backend.device)
    dhidden = run(case.weight, dweight_out=dweight, dbias_out=dbias)
    joint = torch.zeros(13, 7, device=backend.device)
    run(case.weight, dweight_out=joint[:, :6], dbias_out=joint[:, 6])
    torch.testing.assert_close(joint, torch.cat([dweight, dbias[:, None]], 1))
    weight = case.weight.clone()
    assert torch.equal(run(weight, dweight_out=weight), dhidden)
    torch.testing.assert_close(weight, case.weight + dweight)


def test_autograd_hears_of_a_buffer_that_head_backward_wrote_to(backend, monkeypatch):
    """Which the backend does itself, where rows are dense: without another one to add up in."""
    case = make_case(torch.float32, backend.device)
    dweight = torch.ones(13, 6, device=backend.device)
    module, written = for_device(backend.device), []
    monkeypatch.setattr(module, "run", lambda *a, run=module.run, **kw: written.append(kw["dweight_VH"]) or run(*a, **kw))
    x = torch.ones(6, device=backend.device, requires_grad=True)
    product = (dweight * x).sum()
    head_backward(case.hidden, case.weight, as_rows(case), case.coef, dweight_out=dweight)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    assert written[0].data_ptr() == dweight.data_ptr()


# --- changed in place -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", LATE_PLANS)
@pytest.mark.parametrize("which", ["rows", "target", "temperature"])
def test_rows_targets_and_temperatures_changed_before_backward_raise(backend, plan, which):
    """Else the gradient would be that of another problem, without a word."""
    case = make_case(torch.float32, backend.device, temperature="row", trainable_head=plan != "unit").fresh()
    case.options["temperature"] = case.options["temperature"].float()
    logp = case.score(plan, want=("logp",)).logp
    changed = {"rows": case.rows, "target": case.target, "temperature": case.options["temperature"]}[which]
    changed.copy_(changed.flip(0))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logp.sum().backward()


@pytest.mark.parametrize("plan", PLANS)
def test_coefficients_may_change_once_they_are_used(backend, plan):
    case = make_case(torch.float32, backend.device, trainable_head=plan != "unit").fresh()
    want = case.run(plan)[1]
    if plan == "coef":
        loss = case.score(plan, coef=case.coef, entropy_coef=case.entropy_coef).weighted_sum
        case.coef.zero_()
        case.entropy_coef.zero_()
    else:
        scores = case.score(plan)
        loss = case.loss(scores.logp, scores.entropy)
    loss.backward()
    for name, gradient in want.items():
        assert torch.equal(case.grads[name], gradient), name


# --- what the head cannot differentiate -------------------------------------------------------------------------------


def test_forward_mode_and_the_transforms_of_torch_func_are_refused_by_name(backend):
    case = make_case(torch.float32, backend.device)

    def logp(hidden):
        return score_tokens(hidden, case.weight, case.target, rows=case.rows).logp

    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(case.hidden, torch.ones_like(case.hidden))
        with pytest.raises(TypeError, match="hidden must not carry a forward-mode tangent"):
            logp(dual)
        logp(case.hidden)  # a plain tensor beside
    for transformed in (
        lambda: torch.func.jvp(logp, (case.hidden,), (case.hidden,)),
        lambda: torch.func.grad(lambda hidden: logp(hidden).sum())(case.hidden),
        lambda: torch.func.vmap(logp)(case.hidden[None]),
    ):
        with pytest.raises(TypeError, match=r"hidden must be a plain tensor, got one inside a transform of torch\.func"):
            transformed()


# --- odd arguments ----------------------------------------------------------------------------------------------------


def test_suppress_takes_any_sequence_or_tensor_of_ints(backend):
    case = make_case(torch.float32, backend.device, suppress=(2, 3, 4))
    want = case.score().logp
    for suppress in (range(2, 5), [2, 3, 4], {2, 3, 4}, torch.arange(2, 5), np.arange(2, 5), (np.int32(2), 3, np.int64(4))):
        case.options["suppress"] = suppress
        assert torch.equal(case.score().logp, want)
    wrong = ((2, "be a sequence of ids, got int"), ("2", "be a sequence of ids, got str"), ((2.0,), "hold ints, got float"))
    for suppress, words in wrong:
        case.options["suppress"] = suppress
        with pytest.raises(TypeError, match=f"suppress must {words}"):
            case.score()


def test_hints_say_what_to_write_instead(backend):
    case = make_case(torch.float32, backend.device)
    a_mask = torch.ones(11, dtype=torch.bool, device=backend.device)
    for changes, words in (
        ({"want": "entropy"}, "want must be a sequence of names, like ('entropy',), got the string 'entropy'"),
        ({"rows": a_mask}, "got torch.bool: the indices of a mask are mask.flatten().nonzero()[:, 0]"),
        ({"target": case.target * 0 - 100}, "target must hold ids in 0..12, got -100: leave rows without a target out"),
    ):
        arguments = {"target": case.target, "rows": case.rows} | changes
        with pytest.raises((TypeError, ValueError), match=re.escape(words)):
            score_tokens(case.hidden, case.weight, **arguments)


def test_rows_need_an_index_and_a_target(backend):
    case = make_case(torch.float32, backend.device)
    rows = Rows(case.rows, case.target)
    got, want = (head_backward(case.hidden, case.weight, r, case.coef) for r in (rows, as_rows(case)))
    assert torch.equal(got, want)
    assert not rows.sequence.any()
    assert not rows.sample.any()
    assert (rows.weight == 1).all()
