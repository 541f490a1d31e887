"""`distillation_loss` in float64 and inside PyTorch's machinery; what every backend must do is in `head_distillation`."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dllm_kernels import distillation_loss
from dllm_kernels.backends.divergence import walk
from tests import oracle
from tests.head.head_distillation import KINDS, REDUCTIONS, make_case


@pytest.fixture(params=["one slab", "many slabs"])
def slabs(request, monkeypatch):
    """The smallest case is one slab, kept whole; five of them, kept where the gradient has room, must give the same."""
    if request.param == "many slabs":
        monkeypatch.setattr(walk, "SLAB_ELEMENTS", {"cpu": 1})
        monkeypatch.setattr(walk, "SMALL_BYTES", 0)


@pytest.mark.parametrize("options", [False, True], ids=["plain", "options"])
@pytest.mark.parametrize("trains", [True, False], ids=["trainable", "frozen"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradients_are_those_of_full_logits(slabs, kind, reduction, trains, options):
    """With H = 8 the weight's gradient has room for the logits of four of the seven rows, with H = 80 for all."""
    for H in (8, 80):
        case = make_case(H=H, trains=trains, options=options, spread=1.0 if H == 8 else 0.3)
        got = case.loss(kind, reduction=reduction, coef=case.coef)
        true_N = case.true(kind) * case.coef
        true = {"mean": true_N.mean(), "sum": true_N.sum(), "none": true_N}[reduction]
        assert torch.allclose(got, true, rtol=1e-10, atol=1e-12)
        upstream = torch.linspace(0.5, 2, got.numel(), dtype=torch.float64).view(got.shape)
        gradients = torch.autograd.grad((got * upstream).sum(), case.leaves)
        for mine, truth in zip(gradients, torch.autograd.grad((true * upstream).sum(), case.leaves), strict=True):
            assert torch.allclose(mine, truth, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    case = make_case(N=3, H=4, V=70, options=True)
    adapter = case.options.pop("low_rank")

    def loss(hidden, weight, bias, down, up):
        options = {**case.options, "bias": bias, "low_rank": (down, up, adapter[2])}
        teacher = case.teacher_hidden, case.teacher_weight
        return distillation_loss(hidden, weight, *teacher, kind=kind, rows=case.rows, reduction="none", **options)

    assert torch.autograd.gradcheck(loss, (case.hidden, case.weight, case.options.pop("bias"), *adapter[:2]), fast_mode=True)


@pytest.mark.parametrize("beta", [0.1, 0.9])
def test_the_weight_of_the_mixture_is_the_teacher_s_share(beta):
    case = make_case()
    got = case.loss("jsd", beta=beta, reduction="none")
    assert torch.allclose(got, case.true("jsd", beta), rtol=1e-10, atol=1e-12)


def test_frozen_rows_in_many_chunks_are_those_in_one(monkeypatch):
    case = make_case(torch.float32, trains=False, N=12)
    whole = case.loss("reverse_kl", reduction="none")
    (gradient,) = torch.autograd.grad(whole.sum(), case.hidden)
    monkeypatch.setattr(walk.contract, "WORKSPACE_BYTES", {"cpu": 5 * 8 * 300})
    monkeypatch.setattr(walk.contract, "ROW_BLOCK", 4)
    cut = case.loss("reverse_kl", reduction="none")
    assert torch.allclose(cut, whole, rtol=1e-5, atol=1e-6)
    assert torch.allclose(torch.autograd.grad(cut.sum(), case.hidden)[0], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_of_its_likeliest_ids_is_compared_on_these_and_the_rest(kind, reduction):
    """Value and gradients are those of k + 1 events; they are never more than the whole, and the whole where the ids are all."""
    case = make_case(options=True)
    case.options["softcap"], kept = None, 5
    teacher = oracle.logits(
        case.teacher_hidden,
        case.teacher_weight,
        case.rows,
        temperature=case.options["temperature"],
        suppress=(3, 64),
        valid_vocab=290,
    ).log_softmax(-1)
    student = oracle.logits(case.hidden, case.weight, case.rows, **case.options).log_softmax(-1)
    logp, ids = teacher.topk(kept)
    case.teacher_options = {"ids": ids, "logp": logp}
    case.teacher_hidden = case.teacher_weight = None
    got = case.loss(kind, reduction=reduction, coef=case.coef)

    def events(whole):
        few = whole.gather(1, ids)
        return torch.cat((few, torch.log1p(-few.exp().sum(-1, keepdim=True))), -1)

    true_N = oracle.divergence(events(student), events(teacher), kind) * case.coef
    true = {"mean": true_N.mean(), "sum": true_N.sum(), "none": true_N}[reduction]
    assert torch.allclose(got, true, rtol=1e-9, atol=1e-11)
    for mine, truth in zip(
        torch.autograd.grad(got.sum(), case.leaves), torch.autograd.grad(true.sum(), case.leaves), strict=True
    ):
        assert torch.allclose(mine, truth, rtol=1e-7, atol=1e-9)
    whole_N = oracle.divergence(student, teacher, kind)
    assert bool((oracle.divergence(events(student), events(teacher), kind) <= whole_N + 1e-12).all())
    everything = torch.tensor([token for token in range(290) if token not in (3, 64)]).expand(7, -1)
    case.teacher_options = {"ids": everything, "logp": teacher.gather(1, everything)}
    assert torch.allclose(case.loss(kind, reduction="none"), whole_N, rtol=1e-5, atol=1e-5)


def test_no_rows_give_zero_and_zero_gradients():
    case = make_case(N=7)
    case.rows = case.rows[:0]
    loss = case.loss("jsd")
    loss.backward()
    assert float(loss.detach()) == 0
    assert not case.hidden.grad.any()
    assert not case.weight.grad.any()


def test_vocabularies_that_are_padded_differently_share_their_valid_ids():
    case = make_case()
    short = distillation_loss(
        case.hidden, case.weight, case.teacher_hidden, case.teacher_weight[:280], valid_vocab=280, reduction="none"
    )
    same = distillation_loss(
        case.hidden, case.weight, case.teacher_hidden, case.teacher_weight, valid_vocab=280, reduction="none"
    )
    assert torch.equal(short, same)


# --- inside PyTorch's machinery ---------------------------------------------------------------------------------------


def test_under_autocast_operands_are_cast_and_statistics_stay_in_fp32():
    case = make_case(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        cast = case.loss("forward_kl")
        cast.backward()
    bf16 = [getattr(case, name).detach().bfloat16() for name in ("hidden", "weight", "teacher_hidden", "teacher_weight")]
    assert torch.equal(cast, distillation_loss(*bf16, rows=case.rows))
    assert case.weight.grad.dtype == torch.float32


def test_what_backward_reads_again_must_not_change():
    case = make_case(torch.float32)
    loss = case.loss("forward_kl", reduction="none").sum()
    with torch.no_grad():
        case.teacher_weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    bias = torch.zeros(len(case.teacher_weight))
    with FlopCounterMode(display=False):  # the op that a compiler sees, of a plan whose backward reads no operand
        loss = case.loss("forward_kl", reduction="mean", teacher_bias=bias)
        bias.add_(1)
        loss.backward()


def test_a_second_backward_finds_what_the_first_one_found():
    for reduction in REDUCTIONS:
        case = make_case(torch.float32)
        loss = 3 * case.loss("jsd", reduction=reduction).sum()
        first = torch.autograd.grad(loss, case.leaves, retain_graph=True)
        for one, other in zip(first, torch.autograd.grad(loss, case.leaves), strict=True):
            assert torch.equal(one, other)


def test_take_dweight_gets_the_gradient_in_fp32():
    case, taken = make_case(torch.bfloat16), []
    case.loss("forward_kl", take_dweight=taken.append).backward()
    assert case.weight.grad is None
    other = make_case(torch.bfloat16)
    other.loss("forward_kl").backward()
    assert taken[0].dtype == torch.float32
    assert torch.equal(taken[0].bfloat16(), other.weight.grad)


# --- memory -----------------------------------------------------------------------------------------------------------

PROBE = """
import sys
import torch
from dllm_kernels import distillation_loss

N, H, V = 128, 512, 64000
torch.set_num_threads(1)
make = lambda *size: torch.ones(size, dtype=torch.bfloat16)
hidden, weight = make(N, H).requires_grad_(), make(V, H).requires_grad_()
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024

def run(rows, ids):
    if sys.argv[1] == "eager":
        q = (hidden[:rows] @ weight[:ids].t()).float().log_softmax(-1)
        p = q.detach().clone()
        torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean").backward()
    else:
        student, teacher = hidden[:rows].detach().requires_grad_(), hidden[:rows].detach()
        distillation_loss(student, weight, teacher, weight, valid_vocab=ids).backward()

run(8, 2048)
weight.grad.fill_(1)
before = peak()
run(N, V)
print(peak() - before - weight.nbytes)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/status is Linux's")
def test_memory_beyond_the_gradients_is_a_tenth_of_eager_s():
    extra = {}
    for how in ("ours", "eager"):
        done = subprocess.run([sys.executable, "-c", PROBE, how], capture_output=True, text=True, timeout=800)
        assert done.returncode == 0, done.stderr
        extra[how] = int(done.stdout)
    assert extra["ours"] * 10 <= extra["eager"], extra


# --- bad input --------------------------------------------------------------------------------------------------------

BAD = {
    "kind": ({"kind": "kl"}, ValueError, "kind must be one of"),
    "reduction": ({"reduction": "batchmean"}, ValueError, "reduction must be one of"),
    "beta without jsd": ({"beta": 0.5}, ValueError, "beta goes with kind='jsd'"),
    "beta at an end": ({"kind": "jsd", "beta": 1.0}, ValueError, r"beta must be in \(0, 1\), got 1.0"),
    "coef shape": ({"coef": torch.ones(3)}, ValueError, r"coef must have shape \[12\]"),
    "coef nan": ({"coef": torch.full((12,), float("nan"))}, ValueError, "coef must be finite"),
    "rows twice": ({"rows": torch.tensor([1, 1])}, ValueError, "rows must be unique"),
    "rows beyond": ({"rows": torch.tensor([12])}, ValueError, "rows must hold ids in 0..11"),
    "positions": ({"teacher_hidden": torch.ones(3, 5, 5)}, ValueError, r"teacher_hidden must have shape \[3, 4, any\]"),
    "width": (
        {"teacher_weight": torch.ones(300, 6)},
        ValueError,
        r"teacher_hidden must have shape \[..., 6\] to match teacher_weight",
    ),
    "vocabulary": ({"teacher_weight": torch.ones(299, 5)}, ValueError, "teacher_weight must have weight's 300 rows, got 299"),
    "valid_vocab": ({"teacher_weight": torch.ones(9, 5), "valid_vocab": 10}, ValueError, "at least valid_vocab=10 rows"),
    "float64": (
        {"teacher_hidden": torch.ones(3, 4, 5).double()},
        TypeError,
        "teacher_weight must have teacher_hidden's dtype torch.float64",
    ),
    "teacher_bias": ({"teacher_bias": torch.ones(299)}, ValueError, r"teacher_bias must have shape \[300\]"),
    "teacher_softcap": ({"teacher_softcap": 0.0}, ValueError, "teacher_softcap must be finite and above 0"),
    "bias": ({"bias": torch.full((300,), float("-inf"))}, ValueError, "bias must be finite"),
    "teacher": (
        {"teacher_hidden": torch.full((3, 4, 5), float("nan"))},
        ValueError,
        "teacher_hidden, teacher_weight must give finite",
    ),
    "both teachers": ({"teacher_ids": torch.ones(12, 1).long()}, TypeError, "teacher_ids and teacher_logp go together, in place"),
    "no teacher": ({"teacher_hidden": None}, TypeError, "teacher_hidden and teacher_weight must be given, or teacher_ids"),
    "list": ({"teacher_hidden": [1.0]}, TypeError, "teacher_hidden must be a torch.Tensor, got list"),
}


BAD_TOP = {
    "ids of other rows": ((3, 2), torch.zeros(3, 2), ValueError, r"teacher_ids must have shape \[7, any\]"),
    "shape": ((7, 2), torch.zeros(7, 3), ValueError, r"teacher_logp must have shape \[7, 2\]"),
    "no ids": ((7, 0), torch.zeros(7, 0), ValueError, "at least one id of each row"),
    "more than 1": ((7, 2), torch.zeros(7, 2), ValueError, "a row whose probabilities add up to 2"),
    "infinite": ((7, 2), torch.full((7, 2), float("-inf")), ValueError, "teacher_logp must be finite"),
}


@pytest.mark.parametrize("name", BAD_TOP)
def test_what_is_wrong_with_given_ids_is_named(name):
    sizes, logp, error, words = BAD_TOP[name]
    case, ids = make_case(torch.float32), torch.arange(max(1, sizes[1]))[: sizes[1]].expand(sizes)
    with pytest.raises(error, match=words):
        distillation_loss(case.hidden, case.weight, rows=case.rows, teacher_ids=ids, teacher_logp=logp)
    if name == "shape":
        with pytest.raises(ValueError, match="teacher_ids must be distinct within a row"):
            distillation_loss(
                case.hidden,
                case.weight,
                rows=case.rows,
                teacher_ids=torch.ones(7, 2).long(),
                teacher_logp=torch.full((7, 2), -1.0),
            )


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_named(name):
    arguments, error, words = BAD[name]
    case = make_case(torch.float32)
    operands = {key: getattr(case, key) for key in ("hidden", "weight", "teacher_hidden", "teacher_weight")}
    with pytest.raises(error, match=words):
        distillation_loss(**{**operands, **arguments})
