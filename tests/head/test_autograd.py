"""How the head behaves inside PyTorch's machinery: autocast, activation checkpointing, double backward, DTensor, tied weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from dllm_kernels import head_backward, sample_tokens, score_tokens
from dllm_kernels.noise import Stream, row_bits
from tests.head_suite import PLANS, as_rows, make_case

BOTH = ("logp", "entropy")


def loss(case, plan, hidden=None, weight=None):
    hidden, weight = case.hidden if hidden is None else hidden, case.weight if weight is None else weight
    common = {"rows": case.rows, "bias": case.options.get("bias"), "plan": plan, "want": BOTH}
    if plan == "coef":
        return score_tokens(hidden, weight, case.target, coef=case.coef, entropy_coef=case.entropy_coef, **common).weighted_sum
    scores = score_tokens(hidden, weight, case.target, **common)
    return case.loss(scores.logp, scores.entropy)


def case_of(plan, dtype=torch.float32):
    case = make_case(dtype, bias=True, trainable_head=plan != "unit")
    case.coef, case.entropy_coef = case.coef.float(), case.entropy_coef.float()
    return case


# --- autocast ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", PLANS)
def test_under_autocast_the_head_computes_as_linear_does_with_its_statistics_in_fp32(backend, plan):
    """hidden and weight are rounded to autocast's dtype; nothing else is. Gradients come back in the parameters' dtype."""
    cast, by_hand = case_of(plan).fresh(), case_of(plan).fresh()
    with torch.autocast("cpu", torch.bfloat16):
        got = loss(cast, plan)
    got.backward()
    want = loss(by_hand, plan, by_hand.hidden.bfloat16(), by_hand.weight.bfloat16())
    want.backward()
    assert got.dtype == torch.float32
    assert torch.equal(got, want)
    for name, gradient in by_hand.grads.items():
        assert cast.grads[name].dtype == torch.float32
        assert torch.equal(cast.grads[name], gradient), name


def test_autocast_makes_one_dtype_of_a_16_bit_body_and_an_fp32_head_and_leaves_float64_alone(backend):
    case = make_case(torch.float32)
    with pytest.raises(TypeError, match="weight must have hidden's dtype"):
        score_tokens(case.hidden.bfloat16(), case.weight, case.target, rows=case.rows)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = score_tokens(case.hidden.bfloat16(), case.weight, case.target, rows=case.rows).logp
        double = score_tokens(case.hidden.double(), case.weight.double(), case.target, rows=case.rows).logp
    assert torch.equal(mixed, score_tokens(case.hidden.bfloat16(), case.weight.bfloat16(), case.target, rows=case.rows).logp)
    assert double.dtype == torch.float64


def test_backward_inside_autocast_is_that_outside(backend):
    for plan in PLANS:
        inside, outside = case_of(plan).fresh(), case_of(plan).fresh()
        with torch.autocast("cpu", torch.bfloat16):
            loss(inside, plan).backward()
            total = loss(outside, plan)
        total.backward()
        for name, gradient in outside.grads.items():
            assert torch.equal(inside.grads[name], gradient), (plan, name)


def test_sampling_and_head_backward_under_autocast(backend):
    case = make_case(torch.float32)
    key = row_bits(0, Stream.TOKEN, torch.arange(11), torch.tensor(0), torch.tensor(0))
    low_hidden, low_weight = case.hidden.bfloat16(), case.weight.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        drawn = sample_tokens(case.hidden, case.weight, key, rows=case.rows)
        dhidden = head_backward(case.hidden, case.weight, as_rows(case), case.coef)
    assert torch.equal(drawn.logp, sample_tokens(low_hidden, low_weight, key, rows=case.rows).logp)
    assert torch.equal(dhidden, head_backward(low_hidden, low_weight, as_rows(case), case.coef).float())
    assert dhidden.dtype == torch.float32


# --- activation checkpointing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("plan", PLANS)
def test_a_checkpointed_head_has_the_same_gradients(backend, plan, reentrant):
    plain, saved = case_of(plan).fresh(), case_of(plan).fresh()
    loss(plain, plan).backward()
    checkpoint(lambda hidden: loss(saved, plan, hidden), saved.hidden, use_reentrant=reentrant).backward()
    for name, gradient in plain.grads.items():
        assert torch.equal(saved.grads[name], gradient), name


@pytest.mark.parametrize("plan", PLANS)
def test_tensors_saved_for_backward_may_be_offloaded(backend, plan):
    plain, packed = case_of(plan).fresh(), case_of(plan).fresh()
    loss(plain, plan).backward()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        total = loss(packed, plan)
    total.backward()
    for name, gradient in plain.grads.items():
        assert torch.equal(packed.grads[name], gradient), name


# --- double backward --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counted", [False, True], ids=["eager", "as_an_op"])
@pytest.mark.parametrize("plan", PLANS)
def test_double_backward_says_that_there_is_none(backend, plan, counted):
    case = case_of(plan).fresh()
    if counted:
        with FlopCounterMode(display=False):
            total = loss(case, plan) ** 2
            (gradient,) = torch.autograd.grad(total, case.hidden, create_graph=True)
    else:
        (gradient,) = torch.autograd.grad(loss(case, plan) ** 2, case.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|no autograd formula"):
        gradient.sum().backward()


@pytest.mark.parametrize("plan", PLANS)
def test_create_graph_alone_is_harmless(backend, plan):
    plain, graphed = case_of(plan).fresh(), case_of(plan).fresh()
    loss(plain, plan).backward()
    gradients = torch.autograd.grad(loss(graphed, plan), list(graphed.leaves.values()), create_graph=True)
    for gradient, want in zip(gradients, plain.grads.values(), strict=True):
        assert torch.equal(gradient, want)


def test_an_upstream_gradient_of_one_does_not_expose_what_is_saved(backend):
    """The plan `coef` hands its saved gradients on uncopied when they are to be multiplied by 1."""
    case = case_of("coef").fresh()
    total = loss(case, "coef")
    total.backward(retain_graph=True)
    first = {name: gradient.clone() for name, gradient in case.grads.items()}
    for leaf in case.leaves.values():
        leaf.grad.mul_(3.0)  # as clipping does
    total.backward()
    for name, gradient in case.grads.items():
        torch.testing.assert_close(gradient, 4.0 * first[name])


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", ["keep", "recompute", "coef"])
def test_a_parameter_that_is_embedding_and_head_at_once(backend, plan):
    def gradient(head):
        generator = torch.Generator().manual_seed(0)
        embedding = nn.Embedding(13, 6, _weight=torch.randn(13, 6, generator=generator))
        layer = nn.Linear(6, 6)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(6, 6, generator=generator))
            layer.bias.zero_()
        ids = torch.randint(13, (2, 9), generator=generator)
        head(torch.tanh(layer(embedding(ids))), embedding.weight, ids.flatten().flip(0)).backward()
        return embedding.weight.grad

    def ours(hidden, weight, target):
        if plan == "coef":
            return score_tokens(hidden, weight, target, coef=torch.full((18,), 0.5)).weighted_sum
        return (score_tokens(hidden, weight, target, plan=plan).logp * 0.5).sum()

    want = gradient(
        lambda hidden, weight, target: (
            -0.5 * nn.functional.cross_entropy((hidden @ weight.t()).flatten(0, 1), target, reduction="sum")
        )
    )
    torch.testing.assert_close(gradient(ours), want)


def test_a_sharded_weight_is_refused_with_a_sentence(backend):
    distributed = torch.distributed
    if not distributed.is_available():
        pytest.skip("this PyTorch has no torch.distributed")
    from torch.distributed.tensor import Shard, distribute_tensor

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
        case = make_case(torch.float32)
        weight = distribute_tensor(case.weight, mesh, [Shard(0)])
        for arguments in (
            {"hidden": case.hidden, "weight": weight},
            {"hidden": case.hidden, "weight": nn.Parameter(weight)},
        ):
            with pytest.raises(TypeError, match=r"weight must be a plain tensor, got a DTensor.*weight\.full_tensor\(\)"):
                score_tokens(**arguments, target=case.target, rows=case.rows)
        gathered = score_tokens(case.hidden, weight.full_tensor(), case.target, rows=case.rows).logp
        assert torch.equal(gathered, score_tokens(case.hidden, case.weight, case.target, rows=case.rows).logp)
    finally:
        distributed.destroy_process_group()


def test_a_subclass_of_parameter_works_as_a_weight(backend):
    class Tagged(nn.Parameter):
        pass

    case = make_case(torch.float32, trainable_head=True).fresh()
    tagged = Tagged(case.weight.detach().clone())
    score_tokens(case.hidden, tagged, case.target, rows=case.rows).logp.sum().backward()
    want = make_case(torch.float32).fresh()
    want.score("keep", want=("logp",)).logp.sum().backward()
    assert torch.equal(tagged.grad, want.weight.grad)


def test_inference_tensors_are_refused_where_a_gradient_is_wanted(backend):
    case = make_case(torch.float32).fresh()
    with torch.inference_mode():
        hidden = case.hidden.detach() * 1.0
        assert torch.isfinite(score_tokens(hidden, case.weight, case.target, rows=case.rows).logp).all()
    with pytest.raises(ValueError, match="inference_mode"):
        score_tokens(hidden, case.weight, case.target, rows=case.rows)


def test_masks_of_excluded_ids_made_in_inference_mode_serve_a_later_backward(backend):
    case = make_case(torch.float32, V=17, suppress=(3, 16)).fresh()
    with torch.inference_mode():
        case.score()
    case.score("recompute").logp.sum().backward()
    assert case.weight.grad[3].abs().max() == 0


def test_a_list_of_suppressed_ids_that_changes_before_backward_changes_nothing(backend):
    gradients = []
    for changes in (False, True):
        suppress = [2]
        case = make_case(torch.float32, trainable_head=True).fresh()
        case.target = case.target.masked_fill(case.target == 2, 3)
        scores = score_tokens(case.hidden, case.weight, case.target, rows=case.rows, suppress=suppress, plan="recompute")
        if changes:
            suppress.append(4)
        scores.logp.sum().backward()
        gradients.append(case.weight.grad)
    assert torch.equal(*gradients)
