"""One suite of claims about `score_tokens` and `head_backward`, for every backend.

A test module imports everything from here and has a fixture `backend` that yields a `Target` and forces that backend.
Every claim is checked against `tests.oracle`: full logits, plain autograd, float64.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from dllm_kernels import head_backward, score_tokens
from dllm_kernels.backends import contract, cpu
from dllm_kernels.backends import select as select_backend
from dllm_kernels.rows import Rows
from tests import oracle
from tests.tiny import relative_error

F64 = torch.float64
LATE_PLANS = ("unit", "keep", "recompute")
PLANS = (*LATE_PLANS, "coef")
ALL = ("logp", "entropy", "lse", "top_logp", "top_id")


@dataclass(frozen=True)
class Target:
    """A backend and the device that it runs on."""

    name: str
    device: torch.device

    def operand_error(self, dtype: torch.dtype) -> float:
        """Rounding of the gradient operand before the product with the hidden states, which the design allows.

        Triton rounds it to the inputs' 16 bits; so does the C++ engine where the processor multiplies pairs of bfloat16.
        """
        pairs = self.name == "cpu" and dtype == torch.bfloat16 and "bf16" in str(cpu.isa())
        rounds = (self.name == "triton" and dtype.itemsize == 2) or pairs
        return torch.finfo(dtype).eps if rounds else 0.0

    def some_rows(self, count: int, of: int, generator: torch.Generator) -> Tensor:
        """Any of them in any order; the first, each in its place, where this backend's bits depend on the place in a block."""
        drawn = torch.randperm(of, generator=generator)[:count].to(self.device)
        return torch.arange(count) if self.name == "reference" and not equal_rows_have_equal_products() else drawn


@functools.cache
def equal_rows_have_equal_products() -> bool:
    """Those of MKL do not without AVX-512: the last rows of one of its panels have other last bits. The reference takes them."""
    g = torch.Generator().manual_seed(0)
    for H, V in ((16, 50), (40, 131)):
        z = torch.randn(1, H, generator=g).repeat(contract.ROW_BLOCK, 1) @ torch.randn(V, H, generator=g).t()
        back = z[:1].repeat(contract.ROW_BLOCK, 1) @ torch.randn(V, H, generator=g)
        if not ((z == z[:1]).all() and (back == back[:1]).all()):
            return False
    return True


@dataclass
class Case:
    """Inputs of one head call, with one late coefficient per row for logp and one for entropy."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    rows: Tensor | None
    options: dict
    coef: Tensor
    entropy_coef: Tensor
    trainable_head: bool = True
    leaves: dict[str, Tensor] = field(default_factory=dict)

    def fresh(self, dtype=None) -> Case:
        """Leaves of their own, in another dtype if wanted (the values stay those of the original dtype)."""

        def leaf(tensor, wants):
            return tensor.detach().clone().to(dtype or tensor.dtype).requires_grad_(wants)

        hidden, weight = leaf(self.hidden, True), leaf(self.weight, self.trainable_head)
        leaves, options = {"hidden": hidden}, dict(self.options)
        if self.trainable_head:
            leaves["weight"] = weight
        if options.get("bias") is not None:
            options["bias"] = leaf(options["bias"], self.trainable_head)
            if self.trainable_head:
                leaves["bias"] = options["bias"]
        if options.get("low_rank") is not None:  # A needs no trainable head: it acts on hidden states alone
            down, up, scale = options["low_rank"]
            leaves["low_rank_A"], up = leaf(down, True), leaf(up, self.trainable_head)
            options["low_rank"] = leaves["low_rank_A"], up, scale
            if self.trainable_head:
                leaves["low_rank_B"] = up
        case = Case(hidden, weight, self.target, self.rows, options, self.coef, self.entropy_coef, self.trainable_head, leaves)
        return case

    @property
    def grads(self) -> dict[str, Tensor]:
        return {name: leaf.grad for name, leaf in self.leaves.items()}

    def score(self, plan=None, want=("logp", "entropy"), **more):
        return score_tokens(self.hidden, self.weight, self.target, rows=self.rows, plan=plan, want=want, **self.options, **more)

    def oracle(self) -> dict[str, Tensor]:
        return oracle.head(self.hidden, self.weight, self.target, self.rows, **self.options)

    def loss(self, logp, entropy, coef=1.0, entropy_coef=1.0) -> Tensor:
        return coef * (logp * self.coef.to(logp)).sum() + entropy_coef * (entropy * self.entropy_coef.to(logp)).sum()

    def run(self, plan) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and gradients of `sum coef * logp + sum entropy_coef * entropy` through one plan."""
        case = self.fresh()
        if plan == "coef":
            loss = case.score("coef", coef=self.coef, entropy_coef=self.entropy_coef).weighted_sum
        else:
            scores = case.score(plan)
            loss = case.loss(scores.logp, scores.entropy)
        loss.backward()
        return loss.detach(), case.grads

    def run_oracle(self, dtype=F64) -> tuple[Tensor, dict[str, Tensor]]:
        case = self.fresh(dtype)
        want = case.oracle()
        loss = case.loss(want["logp"], want["entropy"])
        loss.backward()
        return loss.detach(), case.grads


def make_case(
    dtype=F64,
    device="cpu",
    *,
    seed=0,
    shape=(3, 7),
    H=6,
    V=13,
    rows: int | None = 11,
    scale=1.0,
    bias=False,
    softcap=None,
    temperature=None,
    suppress=(),
    valid_vocab=None,
    low_rank=None,
    trainable_head=True,
) -> Case:
    """Random inputs. `rows`: how many of the `shape` rows are scored, in random order; None for all. `temperature`: a
    number, or "row" for one each. `low_rank`: the rank of an adapter on the head."""
    g = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=g, dtype=F64)

    M = math.prod(shape)
    N = M if rows is None else rows
    allowed = [v for v in range(V if valid_vocab is None else valid_vocab) if v not in suppress]
    target = torch.tensor(allowed)[torch.randint(len(allowed), (N,), generator=g)]
    options = {"softcap": softcap, "suppress": suppress, "valid_vocab": valid_vocab}
    if bias:
        options["bias"] = normal(V).to(device, dtype)
    if temperature is not None:
        row_temperature = torch.rand(N, generator=g, dtype=F64) + 0.5
        options["temperature"] = row_temperature.to(device) if temperature == "row" else temperature
    if low_rank is not None:
        options["low_rank"] = normal(low_rank, H).to(device, dtype), normal(V, low_rank).to(device, dtype), 0.5
    return Case(
        hidden=(normal(*shape, H) * scale).to(device, dtype),
        weight=normal(V, H).to(device, dtype),
        target=target.to(device),
        rows=None if rows is None else torch.randperm(M, generator=g)[:N].to(device),
        options=options,
        coef=normal(N).to(device),
        entropy_coef=normal(N).to(device),
        trainable_head=trainable_head,
    )


VARIANTS = {
    "plain": {},
    "all_rows": {"rows": None},
    "bias": {"bias": True},
    "softcap": {"softcap": 3.0},
    "temperature": {"temperature": 0.7},
    "row_temperature": {"temperature": "row"},
    "suppress": {"suppress": (0, 5)},
    "valid_vocab": {"valid_vocab": 9},
    "low_rank": {"low_rank": 2},
    "everything": {"bias": True, "softcap": 4.0, "temperature": "row", "suppress": (2,), "valid_vocab": 11, "low_rank": 3},
}


# --- exactness in float64 ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_equals_plain_autograd_in_float64(backend, plan, variant):
    case = make_case(device=backend.device, trainable_head=plan != "unit", **VARIANTS[variant])
    loss, grads = case.run(plan)
    want_loss, want_grads = case.run_oracle()
    torch.testing.assert_close(loss, want_loss, rtol=1e-12, atol=1e-12)
    assert grads.keys() == want_grads.keys()
    for name, want in want_grads.items():
        torch.testing.assert_close(grads[name], want, rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_statistics_equal_the_oracle_in_float64(backend, variant):
    case = make_case(device=backend.device, **VARIANTS[variant])
    with torch.no_grad():
        scores, want = case.score(want=ALL), case.oracle()
    assert scores.plan == "forward"
    for name in ALL:
        torch.testing.assert_close(getattr(scores, name), want[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("plan", PLANS)
def test_gradcheck_by_finite_differences(backend, plan):
    case = make_case(
        device=backend.device, shape=(2, 2), H=3, V=5, rows=3, trainable_head=plan != "unit", **VARIANTS["bias"]
    ).fresh()
    options = {"rows": case.rows, "softcap": 4.0, "suppress": (int(next(v for v in range(5) if v not in case.target)),)}

    def function(hidden, weight, bias):
        if plan == "coef":
            return score_tokens(
                hidden, weight, case.target, bias=bias, coef=case.coef, entropy_coef=case.entropy_coef, **options
            ).weighted_sum
        scores = score_tokens(hidden, weight, case.target, bias=bias, plan=plan, want=("logp", "entropy"), **options)
        return scores.logp, scores.entropy

    assert torch.autograd.gradcheck(function, (case.hidden, case.weight, case.options["bias"]), fast_mode=False)


@pytest.mark.parametrize("plan", LATE_PLANS)
@pytest.mark.parametrize("which", ["logp", "entropy"])
def test_logp_and_entropy_alone_have_their_gradients(backend, plan, which):
    case = make_case(device=backend.device, trainable_head=plan != "unit", **VARIANTS["everything"])
    ours, want = case.fresh(), case.fresh()
    (getattr(ours.score(plan, want=(which,)), which) * case.coef).sum().backward()
    (want.oracle()[which] * case.coef).sum().backward()
    for name in want.grads:
        torch.testing.assert_close(ours.grads[name], want.grads[name], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("plan", LATE_PLANS)
def test_one_of_two_wanted_vectors_may_stay_out_of_the_loss(backend, plan):
    case = make_case(device=backend.device, trainable_head=plan != "unit")
    for which in ("logp", "entropy"):
        ours, want = case.fresh(), case.fresh()
        getattr(ours.score(plan), which).sum().backward()
        want.oracle()[which].sum().backward()
        for name in want.grads:
            torch.testing.assert_close(ours.grads[name], want.grads[name], rtol=1e-11, atol=1e-11)


def test_coef_alone_and_entropy_coef_alone(backend):
    for use in ({"coef"}, {"entropy_coef"}):
        case = make_case(device=backend.device)
        ours, want = case.fresh(), case.fresh()
        ours.score("coef", **{name: getattr(case, name) for name in use}).weighted_sum.backward()
        vectors = want.oracle()
        want.loss(vectors["logp"], vectors["entropy"], float("coef" in use), float("entropy_coef" in use)).backward()
        for name in want.grads:
            torch.testing.assert_close(ours.grads[name], want.grads[name], rtol=1e-11, atol=1e-11)


def test_rows_shifted_by_one_score_position_i_by_row_i_minus_1(backend):
    case = make_case(device=backend.device, shape=(2, 6), rows=None)
    positions = torch.tensor([1, 3, 5, 7, 11], device=backend.device)  # of a [2, 6] batch, none of them position 0
    targets = case.target[positions]
    with torch.no_grad():
        got = score_tokens(case.hidden, case.weight, targets, rows=positions - 1).logp
        logp = (case.hidden @ case.weight.t()).log_softmax(-1)
    want = torch.stack([logp[p // 6, p % 6 - 1, t] for p, t in zip(positions.tolist(), targets.tolist(), strict=True)])
    torch.testing.assert_close(got, want)


# --- accuracy in working precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", ["plain", "everything"])
@pytest.mark.parametrize("plan", PLANS)
def test_error_is_that_of_fp32_statistics_and_no_more_than_eager_pytorch(backend, plan, dtype, variant):
    options = {**VARIANTS[variant]}
    options |= {"valid_vocab": 290} if "valid_vocab" in options else {}
    case = make_case(dtype, backend.device, shape=(4, 90), H=64, V=301, rows=300, trainable_head=plan != "unit", **options)
    case.coef, case.entropy_coef = case.coef.float(), case.entropy_coef.float()
    with torch.no_grad():
        scores, want = case.score(want=ALL), case.fresh(F64).oracle()
    tolerance = 2e-5 * want["lse"].abs().clamp(min=1.0)
    for name, limit in (("logp", tolerance), ("lse", tolerance), ("top_logp", tolerance), ("entropy", 1e-4)):
        value = getattr(scores, name)
        assert value.dtype == torch.float32, name
        assert ((value.double() - want[name]).abs() <= limit).all(), name
    _, grads = case.run(plan)
    _, want_grads = case.run_oracle()
    _, fp32_grads = case.run_oracle(torch.float32)  # eager PyTorch with fp32 logits; gradients rounded to the dtype
    for name, exact in want_grads.items():
        assert grads[name].dtype == dtype
        baseline = relative_error(fp32_grads[name].to(dtype), exact)
        assert relative_error(grads[name], exact) <= 1.5 * baseline + 0.25 * torch.finfo(dtype).eps, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_pitfall_16_bit_never_enters_the_statistics(backend, dtype):
    """bf16 logits cost half a nat on a 256-token ELBO sum; the sum here is right to a thousandth."""
    case = make_case(dtype, backend.device, shape=(256,), H=64, V=257, rows=None)
    with torch.no_grad():
        got, want = case.score().logp, case.fresh(F64).oracle()["logp"]
        in_16_bit = (case.hidden @ case.weight.t()).log_softmax(-1).gather(1, case.target[:, None])[:, 0]
    assert abs(float(got.double().sum() - want.sum())) < 1e-3
    assert abs(float(in_16_bit.double().sum() - want.sum())) > 1e-2  # what the claim is about does happen here


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_pitfall_an_adapter_in_float32_beside_a_16_bit_head_keeps_its_digits(backend, dtype):
    """peft keeps LoRA's weights in float32: neither they, nor `s h A^T`, nor what their gradients come from has 16 bits."""
    case = make_case(dtype, backend.device, shape=(40,), H=32, V=131, rows=33, low_rank=19)
    down, up, scale = case.options["low_rank"]
    case.options["low_rank"] = down.float() / 3, up.float() / 3, scale  # thirds: no 16-bit numbers
    case.weight.mul_(0.5)
    with torch.no_grad():
        got, want = case.score().logp.double(), case.fresh(F64).oracle()["logp"]
        case.options["low_rank"] = (down / 3).to(dtype), (up / 3).to(dtype), scale
        rounded = case.fresh(F64).oracle()["logp"]
        case.options["low_rank"] = down.float() / 3, up.float() / 3, scale
    assert float((got - want).abs().max()) < 2e-5
    assert float((rounded - want).abs().max()) > 1e-3  # what the claim is about does happen here
    for plan in ("coef", "recompute"):
        _, grads = case.run(plan)
        _, exact = case.run_oracle()
        for name in ("low_rank_A", "low_rank_B"):
            assert grads[name].dtype == torch.float32
            assert relative_error(grads[name], exact[name]) < 5e-6 + backend.operand_error(dtype) / 2, name


# --- head_backward and coefficients known beforehand ------------------------------------------------------------------


def as_rows(case: Case) -> Rows:
    zero = torch.zeros_like(case.target)
    return Rows(case.rows, case.target, zero, zero, torch.ones(len(case.target), device=case.target.device))


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16], ids=str)
def test_head_backward_equals_autograd_and_adds_into_its_buffers(backend, dtype):
    case = make_case(dtype, backend.device, **VARIANTS["everything"])
    statistics = F64 if dtype == F64 else torch.float32
    dweight = torch.full(case.weight.shape, 2.0, dtype=statistics, device=backend.device)
    dbias = torch.full(case.weight.shape[:1], 3.0, dtype=statistics, device=backend.device)
    dlow = [torch.full(x.shape, 4.0, dtype=statistics, device=backend.device) for x in case.options["low_rank"][:2]]
    for _ in range(2):
        dhidden = head_backward(
            case.hidden,
            case.weight,
            as_rows(case),
            case.coef,
            entropy_coef=case.entropy_coef,
            dweight_out=dweight,
            dbias_out=dbias,
            dlow_rank_out=tuple(dlow),
            **case.options,
        )
    _, want = case.run_oracle()
    limit = 1e-11 if dtype == F64 else 1e-5
    assert dhidden.shape == case.hidden.shape
    assert dhidden.dtype == dtype
    assert relative_error(dhidden, want["hidden"]) < max(limit, torch.finfo(dtype).eps)
    limit += backend.operand_error(dtype)
    assert relative_error(dweight - 2.0, 2 * want["weight"]) < limit  # fp32 buffers for a 16-bit head too
    assert relative_error(dbias - 3.0, 2 * want["bias"]) < limit
    assert relative_error(dlow[1] - 4.0, 2 * want["low_rank_B"]) < limit
    assert relative_error(dlow[0] - 4.0, 2 * want["low_rank_A"]) < max(limit, torch.finfo(dtype).eps)
    untouched = torch.ones(case.hidden[..., 0].numel(), dtype=torch.bool)
    untouched[case.rows.cpu()] = False
    assert (dhidden.reshape(-1, dhidden.shape[-1])[untouched.to(dhidden.device)] == 0).all()


def test_rows_that_nobody_scores_may_hold_nan(backend):
    """As padding that attends to nothing does: no gradient reads them, that of an adapter's A included."""
    case = make_case(torch.float32, backend.device, **VARIANTS["low_rank"])
    padded = torch.ones(case.hidden.shape[:-1], dtype=torch.bool, device=backend.device)
    padded.view(-1)[case.rows] = False
    assert padded.any()
    down, up, scale = case.options["low_rank"]
    found = []
    for anything in (0.0, math.nan):
        hidden = case.hidden.detach().masked_fill(padded[..., None], anything)
        leaves = [x.detach().clone().requires_grad_() for x in (hidden, case.weight, down, up)]
        adapter = (*leaves[2:], scale)
        score_tokens(*leaves[:2], case.target, rows=case.rows, low_rank=adapter).logp.sum().backward()
        found.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_head_backward_without_buffers_returns_dhidden_alone(backend):
    case = make_case(device=backend.device, rows=5)
    dhidden = head_backward(case.hidden.requires_grad_(), case.weight, as_rows(case), case.coef)
    want = case.fresh()
    (want.oracle()["logp"] * case.coef).sum().backward()
    torch.testing.assert_close(dhidden, want.hidden.grad)
    assert not dhidden.requires_grad


def test_head_backward_refuses_buffers_that_it_cannot_add_to(backend):
    case = make_case(torch.float32, backend.device)
    for name, buffer, error in (
        ("dweight_out", torch.zeros(13, 6, dtype=torch.bfloat16), TypeError),
        ("dweight_out", torch.zeros(6, 13), ValueError),
        ("dbias_out", torch.zeros(12), ValueError),
    ):
        with pytest.raises(error, match=name):
            head_backward(case.hidden, case.weight, as_rows(case), case.coef, **{name: buffer.to(backend.device)})
    with pytest.raises(TypeError, match="rows"):
        head_backward(case.hidden, case.weight, case.rows, case.coef)


def test_with_coef_the_gradient_flows_through_weighted_sum_alone(backend):
    case = make_case(device=backend.device).fresh()
    scores = case.score(want=ALL, coef=case.coef)
    assert scores.plan == "coef"
    assert scores.weighted_sum.requires_grad
    for name in ALL:
        assert not getattr(scores, name).requires_grad, name
    torch.testing.assert_close(scores.weighted_sum, torch.dot(case.coef, scores.logp))


def test_the_likeliest_id_and_its_log_probability_are_never_differentiable(backend):
    case = make_case(device=backend.device).fresh()
    scores = case.score(want=ALL)
    for name in ALL:
        assert getattr(scores, name).requires_grad == (name in ("logp", "entropy", "lse")), name


def test_coef_carries_no_gradient_to_the_coefficients(backend):
    case = make_case(device=backend.device).fresh()
    coef = case.coef.clone().requires_grad_()
    case.score(coef=coef).weighted_sum.backward()
    assert coef.grad is None


def test_weighted_sum_scales_with_its_upstream_gradient(backend):
    case = make_case(device=backend.device)
    one, three = case.fresh(), case.fresh()
    one.score(coef=case.coef).weighted_sum.backward()
    (3 * three.score(coef=case.coef).weighted_sum).backward()
    for name in one.grads:
        torch.testing.assert_close(3 * one.grads[name], three.grads[name])


# --- which plan runs --------------------------------------------------------------------------------------------------


def test_the_plan_follows_from_what_wants_a_gradient(backend):
    case = make_case(device=backend.device)
    frozen = make_case(device=backend.device, trainable_head=False)
    assert case.score().plan == "forward"
    assert frozen.fresh().score().plan == "unit"
    assert case.fresh().score().plan == "keep"
    assert case.fresh().score(coef=case.coef).plan == "coef"
    with torch.no_grad():
        assert case.fresh().score().plan == "forward"


def test_a_plan_that_cannot_run_is_refused(backend):
    case = make_case(device=backend.device).fresh()
    with pytest.raises(ValueError, match="unit"):
        case.score("unit")
    with pytest.raises(ValueError, match="forward"):
        case.score("forward")
    with pytest.raises(ValueError, match="coef"):
        case.score("coef")
    with pytest.raises(ValueError, match="coef"):
        case.score("keep", coef=case.coef)
    with pytest.raises(ValueError, match="plan"):
        case.score("fast")


# --- bits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("plan", PLANS)
def test_the_bits_of_a_row_depend_neither_on_how_many_rows_there_are_nor_on_its_place(backend, plan, dtype):
    case = make_case(dtype, backend.device, shape=(600,), H=40, V=131, rows=None, trainable_head=False)
    case.trainable_head = plan in ("keep", "recompute")
    case.coef, case.entropy_coef = case.coef.float(), case.entropy_coef.float()
    told = [name for name in ALL if plan == "coef" or name != "lse"]  # it would make the target one of several

    def run(chosen):
        part = case.fresh()
        part.rows, part.target = chosen, case.target[chosen]
        part.coef, part.entropy_coef = case.coef[chosen], case.entropy_coef[chosen]
        if plan == "coef":
            scores = part.score(want=told, coef=part.coef, entropy_coef=part.entropy_coef)
            scores.weighted_sum.backward()
        else:
            scores = part.score(plan, want=told)
            part.loss(scores.logp, scores.entropy).backward()
        return {name: getattr(scores, name).detach() for name in told} | {"dhidden": part.hidden.grad[chosen]}

    whole = run(torch.arange(600, device=backend.device))
    g = torch.Generator().manual_seed(1)
    for count in (1, 2, 7, 255, 256, 257, 599):
        chosen = backend.some_rows(count, 600, g)
        for name, value in run(chosen).items():
            assert torch.equal(value, whole[name][chosen]), f"{name} of {count} rows"


@pytest.mark.parametrize("plan", PLANS)
def test_the_bits_of_a_row_do_not_depend_on_the_chunk_size(backend, plan, monkeypatch):
    case = make_case(torch.float32, backend.device, shape=(700,), H=24, V=67, rows=None, trainable_head=plan != "unit")
    case.coef, case.entropy_coef = case.coef.float(), case.entropy_coef.float()
    large, large_grads = case.run(plan)
    monkeypatch.setitem(contract.WORKSPACE_BYTES, "cpu", 1)
    monkeypatch.setattr(contract, "GPU_WORKSPACE_BYTES", 1)
    small, small_grads = case.run(plan)
    assert torch.equal(large, small)
    assert torch.equal(large_grads["hidden"], small_grads["hidden"])
    for name in large_grads:  # sums over rows may be cut differently
        torch.testing.assert_close(large_grads[name], small_grads[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("plan", PLANS)
def test_the_same_call_gives_the_same_bits(backend, plan):
    case = make_case(torch.bfloat16, backend.device, shape=(300,), H=24, V=67, rows=280, trainable_head=plan != "unit")
    first, second = case.run(plan), case.run(plan)
    assert torch.equal(first[0], second[0])
    for name in first[1]:
        assert torch.equal(first[1][name], second[1][name]), name


@pytest.mark.parametrize("rows", [0, 1, 300])
@pytest.mark.parametrize("dtype", [F64, torch.bfloat16], ids=str)
def test_overwriting_a_buffer_ignores_what_it_held(backend, dtype, rows, monkeypatch):
    monkeypatch.setitem(contract.WORKSPACE_BYTES, "cpu", 1)  # several chunks: only the first may overwrite
    case = make_case(dtype, backend.device, shape=(600,), rows=rows)
    problem = contract.HeadProblem(case.hidden, case.weight, case.target, case.rows)
    module, statistics = select_backend(problem), problem.statistics_dtype
    coef = case.coef.to(statistics)
    operand = module.run(problem, ("operand",))["operand"]

    def buffers(run, fill, overwrite):
        dweight = torch.full(case.weight.shape, fill, dtype=statistics, device=backend.device)
        dbias = torch.full(case.weight.shape[:1], fill, dtype=statistics, device=backend.device)
        run(dweight_VH=dweight, dbias_V=dbias, overwrite=overwrite)
        return dweight, dbias

    for run in (
        lambda **out: module.run(problem, ("lse",), coef_N=coef, **out),
        lambda **out: module.from_operands(problem, [(operand, coef)], dhidden=False, **out),
    ):
        for got, want in zip(buffers(run, math.nan, True), buffers(run, 0.0, False), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


# --- odd shapes and layouts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", PLANS)
def test_no_rows_is_legal_and_gives_zero_gradients(backend, plan):
    case = make_case(torch.float32, backend.device, rows=0, bias=True, trainable_head=plan != "unit")
    loss, grads = case.run(plan)
    assert loss == 0
    for name, gradient in grads.items():
        assert torch.equal(gradient, torch.zeros_like(gradient)), name


def test_no_rows_has_empty_statistics(backend):
    case = make_case(torch.float32, backend.device, rows=0)
    scores = case.score(want=ALL)
    assert all(getattr(scores, name).shape == (0,) for name in ALL)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
def test_a_vocabulary_of_one_has_logp_0_entropy_0_and_no_gradient(backend, plan, dtype):
    case = make_case(dtype, backend.device, V=1, bias=True, trainable_head=plan != "unit")
    scores = case.score(want=ALL)
    assert (scores.logp == 0).all()
    assert (scores.entropy == 0).all()
    assert (scores.top_id == 0).all()
    loss, grads = case.run(plan)
    assert loss == 0
    for gradient in grads.values():
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("plan", PLANS)
def test_one_allowed_id_among_many_has_probability_one(backend, plan):
    case = make_case(torch.float32, backend.device, V=7, suppress=(0, 1, 2, 4, 5, 6), trainable_head=plan != "unit")
    scores = case.score(want=ALL)
    assert (scores.logp == 0).all()
    assert (scores.entropy == 0).all()
    _, grads = case.run(plan)
    for gradient in grads.values():
        assert torch.equal(gradient, torch.zeros_like(gradient))


WEIGHT_LAYOUTS = {
    "transposed": lambda w: w.t().contiguous().t(),
    "padded_rows": lambda w: torch.cat([w, w], 1)[:, : w.shape[1]],
    "every_other_row": lambda w: w.repeat_interleave(2, 0)[::2],
    "every_other_column": lambda w: w.repeat_interleave(2, 1)[:, ::2],
    "offset": lambda w: torch.cat([w[:1], w])[1:],
}


@pytest.mark.parametrize("layout", WEIGHT_LAYOUTS)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_layout_of_the_weight_does_not_matter(backend, plan, layout, dtype):
    case = make_case(dtype, backend.device, trainable_head=plan != "unit")
    _, want = case.run_oracle()
    strided = case.fresh()
    view = WEIGHT_LAYOUTS[layout](strided.weight)
    assert torch.equal(view, strided.weight)
    strided.weight = view
    if plan == "coef":
        strided.score("coef", coef=case.coef, entropy_coef=case.entropy_coef).weighted_sum.backward()
    else:
        scores = strided.score(plan)
        strided.loss(scores.logp, scores.entropy).backward()
    for name in want:
        assert relative_error(strided.grads[name], want[name]) < 3 * torch.finfo(dtype).eps, name


@pytest.mark.parametrize("plan", ["keep", "recompute", "coef"])
def test_a_tied_weight_gets_the_sum_of_both_gradients(backend, plan):
    case = make_case(device=backend.device, shape=(12,), rows=None)
    ids = torch.arange(12, device=backend.device)

    def gradient(score):
        weight = case.weight.clone().requires_grad_()
        score(torch.tanh(weight[ids]), weight).backward()
        return weight.grad

    def ours(hidden, weight):
        if plan == "coef":
            return score_tokens(hidden, weight, case.target, coef=case.coef).weighted_sum
        return (score_tokens(hidden, weight, case.target, plan=plan).logp * case.coef).sum()

    want = gradient(lambda hidden, weight: (oracle.head(hidden, weight, case.target)["logp"] * case.coef).sum())
    torch.testing.assert_close(gradient(ours), want)


@pytest.mark.parametrize("plan", PLANS)
def test_hidden_states_may_be_strided(backend, plan):
    case = make_case(device=backend.device, trainable_head=plan != "unit")
    _, want = case.run_oracle()
    strided = case.fresh()
    strided.hidden = strided.hidden.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.hidden.is_contiguous()
    if plan == "coef":
        strided.score("coef", coef=case.coef, entropy_coef=case.entropy_coef).weighted_sum.backward()
    else:
        scores = strided.score(plan)
        strided.loss(scores.logp, scores.entropy).backward()
    torch.testing.assert_close(strided.leaves["hidden"].grad, want["hidden"])


@pytest.mark.parametrize("plan", LATE_PLANS)
@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
def test_upstream_gradients_may_be_expanded_or_strided(backend, plan, dtype):
    case = make_case(dtype, backend.device, trainable_head=plan != "unit")
    want = case.fresh(F64)
    vectors = want.oracle()
    (vectors["logp"].sum() * 2 + (vectors["entropy"] * case.coef).sum()).backward()
    ours = case.fresh()
    scores = ours.score(plan)
    expanded = torch.full((), 2.0, dtype=dtype, device=backend.device).expand(11)
    strided = case.coef.to(dtype).repeat_interleave(3)[::3]
    torch.autograd.backward([scores.logp, scores.entropy], [expanded, strided])
    for name in want.grads:
        assert relative_error(ours.grads[name], want.grads[name]) < 5e-6, name


def test_coefficients_may_be_expanded_strided_or_of_another_float_dtype(backend):
    case = make_case(torch.float32, backend.device)
    want = case.fresh()
    want.score(coef=torch.full_like(case.coef, 0.5, dtype=torch.float32)).weighted_sum.backward()
    for coef in (torch.tensor(0.5).expand(11), torch.full((22,), 0.5)[::2], torch.full((11,), 0.5, dtype=torch.bfloat16)):
        ours = case.fresh()
        ours.score(coef=coef.to(backend.device)).weighted_sum.backward()
        for name in want.grads:
            assert torch.equal(ours.grads[name], want.grads[name])


# --- autograd's rules -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", [F64, torch.bfloat16], ids=str)
def test_pitfall_a_second_backward_gives_the_same_gradient(backend, plan, dtype):
    """Scaling a saved gradient in place makes the second backward wrong."""
    case = make_case(dtype, backend.device, bias=True, trainable_head=plan != "unit").fresh()
    if plan == "coef":
        loss = 3 * case.score("coef", coef=case.coef, entropy_coef=case.entropy_coef).weighted_sum
    else:
        scores = case.score(plan)
        loss = 3 * case.loss(scores.logp, scores.entropy)
    leaves = list(case.leaves.values())
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("plan", PLANS)
def test_backward_through_a_freed_graph_raises(backend, plan):
    case = make_case(device=backend.device, trainable_head=plan != "unit").fresh()
    loss = case.score(coef=case.coef).weighted_sum if plan == "coef" else case.score(plan).logp.sum()
    loss.backward()
    with pytest.raises(RuntimeError):
        loss.backward()


@pytest.mark.parametrize("plan", PLANS)
def test_double_backward_raises_instead_of_being_wrong(backend, plan):
    case = make_case(device=backend.device, trainable_head=plan != "unit").fresh()
    loss = case.score(coef=case.coef).weighted_sum ** 2 if plan == "coef" else (case.score(plan).logp ** 2).sum()
    (gradient,) = torch.autograd.grad(loss, case.hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


@pytest.mark.parametrize("plan", ["keep", "recompute"])
def test_a_weight_changed_in_place_between_forward_and_backward_raises(backend, plan):
    case = make_case(device=backend.device).fresh()
    loss = case.score(plan).logp.sum()
    with torch.no_grad():
        case.weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation"):
        loss.backward()


def test_inputs_are_not_changed(backend):
    for plan in PLANS:
        case = make_case(torch.float32, backend.device, trainable_head=plan != "unit", **VARIANTS["everything"])
        before = [t.clone() for t in (case.hidden, case.weight, case.options["bias"], case.target, case.rows, case.coef)]
        case.run(plan)
        head_backward(case.hidden, case.weight, as_rows(case), case.coef, **case.options)
        after = (case.hidden, case.weight, case.options["bias"], case.target, case.rows, case.coef)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


# --- metamorphic relations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
def test_a_constant_added_to_all_logits_changes_nothing_but_lse(backend, dtype):
    case = make_case(dtype, backend.device, bias=True)
    moved = make_case(dtype, backend.device, bias=True)
    moved.options["bias"] = moved.options["bias"] + 4.0
    a, b = case.score(want=ALL), moved.score(want=ALL)
    limit = {"rtol": 1e-12, "atol": 1e-12} if dtype == F64 else {"rtol": 1e-5, "atol": 1e-5}
    for name in ("logp", "entropy", "top_logp", "top_id"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), **limit)
    torch.testing.assert_close(a.lse + 4.0, b.lse, **limit)
    for plan in ("keep", "recompute", "coef"):
        for got, want in zip(moved.run(plan)[1].values(), case.run(plan)[1].values(), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 if dtype == torch.float32 else 1e-11)


@pytest.mark.parametrize("plan", PLANS)
def test_permuting_rows_permutes_the_vectors_and_leaves_the_gradients(backend, plan):
    case = make_case(device=backend.device, trainable_head=plan != "unit", temperature="row")
    order = torch.randperm(11, generator=torch.Generator().manual_seed(2)).to(backend.device)
    permuted = make_case(device=backend.device, trainable_head=plan != "unit", temperature="row")
    permuted.rows, permuted.target = case.rows[order], case.target[order]
    permuted.options["temperature"] = case.options["temperature"][order]
    permuted.coef, permuted.entropy_coef = case.coef[order], case.entropy_coef[order]
    assert torch.equal(permuted.score().logp, case.score().logp[order])
    for got, want in zip(permuted.run(plan)[1].values(), case.run(plan)[1].values(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("plan", PLANS)
def test_permuting_the_vocabulary_permutes_the_weight_gradient_alone(backend, plan):
    case = make_case(device=backend.device, trainable_head=plan != "unit", bias=True, suppress=(4,))
    permuted = make_case(device=backend.device, trainable_head=plan != "unit", bias=True, suppress=(4,))
    order = torch.randperm(13, generator=torch.Generator().manual_seed(3)).to(backend.device)
    place = order.argsort()
    permuted.weight, permuted.options["bias"] = case.weight[order], case.options["bias"][order]
    permuted.options["suppress"], permuted.target = (int(place[4]),), place[case.target]
    loss, grads = permuted.run(plan)
    want_loss, want = case.run(plan)
    torch.testing.assert_close(loss, want_loss)
    torch.testing.assert_close(grads["hidden"], want["hidden"], rtol=1e-11, atol=1e-11)
    for name in want.keys() - {"hidden"}:
        torch.testing.assert_close(grads[name], want[name][order], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("plan", PLANS)
def test_gradients_are_linear_in_the_coefficients(backend, plan):
    case = make_case(device=backend.device, trainable_head=plan != "unit")
    one, two, mixed = (make_case(device=backend.device, trainable_head=plan != "unit") for _ in range(3))
    two.coef, two.entropy_coef = case.entropy_coef, case.coef
    mixed.coef, mixed.entropy_coef = 2 * one.coef - 5 * two.coef, 2 * one.entropy_coef - 5 * two.entropy_coef
    grads = [c.run(plan)[1] for c in (one, two, mixed)]
    for name in grads[0]:
        torch.testing.assert_close(grads[2][name], 2 * grads[0][name] - 5 * grads[1][name], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_equal_content_have_equal_bits(backend, dtype):
    case = make_case(dtype, backend.device, shape=(300,), rows=None)
    case.hidden[1::2], case.target[1::2] = case.hidden[::2].clone(), case.target[::2].clone()
    scores = case.score(want=ALL)
    for name in ALL:
        assert torch.equal(getattr(scores, name)[::2], getattr(scores, name)[1::2]), name


def test_temperature_per_row_equals_one_call_per_row(backend):
    case = make_case(device=backend.device, temperature="row")
    whole = case.score(want=ALL)
    for n, temperature in enumerate(case.options["temperature"].tolist()):
        one = score_tokens(
            case.hidden, case.weight, case.target[n : n + 1], rows=case.rows[n : n + 1], temperature=temperature, want=ALL
        )
        for name in ALL:
            torch.testing.assert_close(getattr(one, name)[0], getattr(whole, name)[n])


def test_suppressed_columns_equal_a_smaller_vocabulary(backend):
    """An id of probability 0 is as good as absent: values, hidden gradient, and a weight gradient of exactly 0."""
    for plan in ("keep", "recompute", "coef"):
        case = make_case(device=backend.device, V=13, bias=True, softcap=2.0, valid_vocab=9)
        small = make_case(device=backend.device, V=13, bias=True, softcap=2.0, valid_vocab=9)
        small.weight, small.options = case.weight[:9], {"bias": case.options["bias"][:9], "softcap": 2.0}
        loss, grads = case.run(plan)
        want_loss, want = small.run(plan)
        torch.testing.assert_close(loss, want_loss)
        torch.testing.assert_close(grads["hidden"], want["hidden"])
        assert (grads["weight"][9:] == 0).all()
        assert (grads["bias"][9:] == 0).all()


# --- what broke in others (PITFALLS.md, "In heads and losses") --------------------------------------------------------


@pytest.mark.parametrize("V", [1, 2, 3, 7, 15, 17, 31, 33, 63, 65, 127, 129, 1000, 1536, 1537])
def test_pitfall_phantom_columns_of_a_vocabulary_that_is_no_multiple_of_anything(backend, V):
    """A lane beyond V with logit 0 adds log1p(n e^-lse) to lse: visible at logits of -8, certain at -30."""
    for offset in (-8.0, -30.0):
        case = make_case(torch.float32, backend.device, V=V, bias=True)
        case.options["bias"] = case.options["bias"] + offset
        scores, want = case.score(want=ALL), case.fresh(F64).oracle()
        for name in ("logp", "lse", "entropy", "top_logp"):
            torch.testing.assert_close(getattr(scores, name).double(), want[name], rtol=1e-5, atol=2e-5)
        assert (scores.top_id == want["top_id"]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64], ids=str)
def test_pitfall_softcap_must_not_revive_suppressed_columns(backend, dtype):
    """tanh maps -inf to -1, so exclusion before softcap would count the excluded columns at -cap."""
    case = make_case(dtype, backend.device, V=64, softcap=0.5, suppress=tuple(range(32, 60)), valid_vocab=60)
    small = make_case(dtype, backend.device, V=64, softcap=0.5)
    small.weight, small.target = case.weight[:32], case.target
    a, b = case.score(want=ALL), small.score(want=ALL)
    for name in ALL:
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-5, atol=1e-5)
    assert (a.entropy <= math.log(32) + 1e-5).all()


@pytest.mark.parametrize("offset", [-101.0, -1000.0, -30000.0])
def test_pitfall_running_max_starts_at_minus_infinity(backend, offset):
    """A maximum initialised to 0 makes exp underflow and logp infinite once all logits are below -100."""
    case = make_case(torch.float32, backend.device, bias=True)
    case.options["bias"] = case.options["bias"] * 0 + offset
    scores, want = case.score(want=ALL), case.fresh(F64).oracle()
    for name in ("logp", "entropy", "lse"):
        assert torch.isfinite(getattr(scores, name)).all()
        torch.testing.assert_close(getattr(scores, name).double(), want[name], rtol=1e-5, atol=2e-6 * abs(offset))
    for plan in ("keep", "recompute", "coef"):
        for name, gradient in case.run(plan)[1].items():
            assert torch.isfinite(gradient).all(), name


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
def test_pitfall_minus_infinity_logits_add_exactly_0_to_entropy_and_gradients(backend, plan, dtype):
    """0 * -inf is NaN. Suppressed ids and a bias of -inf are both legal."""
    case = make_case(dtype, backend.device, bias=True, suppress=(3,), trainable_head=plan != "unit")
    case.options["bias"][5] = -math.inf
    case.target[case.target == 5] = 6
    want = make_case(dtype, backend.device, bias=True, suppress=(3, 5), trainable_head=plan != "unit")
    want.target = case.target
    a, b = case.score(want=ALL), want.score(want=ALL)
    for name in ALL:
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    grads, want_grads = case.run(plan)[1], want.run(plan)[1]
    for name in want_grads:
        assert torch.isfinite(grads[name]).all(), name
        torch.testing.assert_close(grads[name], want_grads[name])


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_pitfall_the_true_class_gradient_survives_p_near_1(backend, plan, dtype):
    """`p - 1` cancels: in fp32 nothing is left from 1 - p = 1e-8 on, in bf16 from 4e-3 on."""
    H, V = 4, 5
    hidden = torch.zeros(6, H)
    hidden[:, 0] = torch.tensor([4.0, 6.0, 8.0, 12.0, 16.0, 20.0])  # logit gaps, so 1 - p from 7e-2 to 8e-9
    weight = torch.zeros(V, H)
    weight[2, 0] = 1.0
    weight[:, 1:] = torch.randn(V, H - 1, generator=torch.Generator().manual_seed(0))
    weight[2, 1:] = 2.0
    scale = 1.0 if dtype != torch.float16 else 512.0  # keeps 1e-8 out of half precision's subnormals
    case = Case(
        hidden.to(backend.device, dtype),
        weight.to(backend.device, dtype),
        torch.full((6,), 2, device=backend.device),
        None,
        {},
        torch.full((6,), scale, device=backend.device),
        torch.zeros(6, device=backend.device),
        plan != "unit",
    )
    _, grads = case.run(plan)
    _, want = case.run_oracle()
    limit = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    rows = slice(None) if dtype != torch.float16 else slice(0, 4)  # the stored unit of the last two is below 6e-8
    assert ((grads["hidden"].double() - want["hidden"])[rows].abs() <= limit * want["hidden"][rows].abs().amax(-1, True)).all()
    if plan != "unit":
        assert relative_error(grads["weight"][2], want["weight"][2]) < limit


def test_pitfall_a_common_offset_of_2_to_24_costs_no_digits(backend):
    """logsumexp(z) - z_y at z near 2^24 has no digits left unless both terms are shifted by the maximum."""
    case = make_case(torch.float32, backend.device, bias=True)
    case.hidden, case.weight = (case.hidden * 2).round(), (case.weight * 2).round() * 2  # even logits: exact at 2^24
    case.options["bias"] = torch.zeros_like(case.options["bias"])
    plain = case.score(want=ALL)
    grads = case.run("keep")[1]
    case.options["bias"] = case.options["bias"] + 2.0**24
    offset = case.score(want=ALL)
    for name in ("logp", "entropy", "top_logp", "top_id"):
        assert torch.equal(getattr(plain, name), getattr(offset, name)), name
    for name, gradient in case.run("keep")[1].items():
        torch.testing.assert_close(gradient, grads[name])


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16], ids=str)
def test_pitfall_the_entropy_gradient_is_not_dropped(backend, plan, dtype):
    case = make_case(dtype, backend.device, trainable_head=plan != "unit")
    case.coef = torch.zeros_like(case.coef)
    _, grads = case.run(plan)
    _, want = case.run_oracle()
    for name in want:
        assert want[name].abs().max() > 1e-3
        assert relative_error(grads[name], want[name]) < max(1e-5, 3 * torch.finfo(dtype).eps), name


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_pitfall_logp_is_never_above_0(backend, dtype):
    for seed, scale in itertools.product(range(3), (0.1, 3.0, 30.0)):
        case = make_case(dtype, backend.device, seed=seed, shape=(200,), rows=None, V=97, scale=scale)
        case.target = case.score(want=("top_id",)).top_id  # the likeliest ids, where rounding could exceed 0
        scores = case.score(want=ALL)
        assert (scores.logp <= 0).all()
        assert torch.equal(scores.logp, scores.top_logp)
        assert (scores.entropy >= -1e-6).all()


@pytest.mark.parametrize("plan", LATE_PLANS)
def test_pitfall_upstream_gradients_that_differ_by_row_are_used(backend, plan):
    """A fused loss that assumes the gradient of a mean gives every row the same coefficient."""
    case = make_case(device=backend.device, shape=(11,), rows=None, trainable_head=plan != "unit").fresh()
    upstream = torch.zeros(11, dtype=F64, device=backend.device)
    upstream[4] = -7.0
    case.score(plan).logp.backward(upstream)
    nonzero = case.hidden.grad.abs().amax(-1) > 0
    assert nonzero.nonzero()[:, 0].tolist() == [4]
    want = case.fresh()
    want.oracle()["logp"].backward(upstream)
    torch.testing.assert_close(case.hidden.grad, want.hidden.grad)


@pytest.mark.parametrize("plan", [None, "unit", "keep", "recompute", "coef"])
def test_pitfall_a_frozen_head_works_and_gets_no_gradient(backend, plan):
    case = make_case(device=backend.device, bias=True, trainable_head=False).fresh()
    more = {"coef": case.coef} if plan == "coef" else {}
    scores = case.score(plan, **more)
    (scores.weighted_sum if plan == "coef" else (scores.logp * case.coef).sum()).backward()
    want = case.fresh()
    (want.oracle()["logp"] * case.coef).sum().backward()
    torch.testing.assert_close(case.hidden.grad, want.hidden.grad)
    assert case.weight.grad is None
    assert case.options["bias"].grad is None


@pytest.mark.parametrize("plan", ["keep", "recompute", "coef"])
def test_a_frozen_body_works_and_the_head_gets_its_gradient(backend, plan):
    case = make_case(device=backend.device, bias=True).fresh()
    case.hidden.requires_grad_(False)
    more = {"coef": case.coef} if plan == "coef" else {}
    scores = case.score(plan, **more)
    (scores.weighted_sum if plan == "coef" else (scores.logp * case.coef).sum()).backward()
    want = case.fresh()
    (want.oracle()["logp"] * case.coef).sum().backward()
    assert case.hidden.grad is None
    torch.testing.assert_close(case.weight.grad, want.weight.grad)
    torch.testing.assert_close(case.options["bias"].grad, want.options["bias"].grad)


def test_a_bias_may_be_the_only_thing_that_trains(backend):
    case = make_case(device=backend.device, bias=True).fresh()
    case.hidden.requires_grad_(False)
    case.weight.requires_grad_(False)
    case.score().logp.sum().backward()
    want = case.fresh()
    want.oracle()["logp"].sum().backward()
    torch.testing.assert_close(case.options["bias"].grad, want.options["bias"].grad)


def test_pitfall_the_sign_of_entropy(backend):
    """It is -sum p log p: log V for equal logits, 0 for a certain row, positive between."""
    hidden = torch.tensor([[0.0], [1000.0], [1.0]], device=backend.device)
    weight = torch.tensor([[1.0], [0.0], [0.0], [0.0]], device=backend.device)
    entropy = score_tokens(hidden, weight, torch.zeros(3, dtype=torch.int64, device=backend.device), want=("entropy",)).entropy
    assert entropy[0] == pytest.approx(math.log(4), abs=1e-6)
    assert entropy[1] == 0
    assert 0 < entropy[2] < math.log(4)


def test_pitfall_row_offsets_beyond_2_to_31(backend, tmp_path):
    """The second row of these hidden states lies 2^31 + 64 elements behind the first: a 32-bit offset would miss it.

    The matrix is a sparse file mapped into memory, of which two rows exist."""
    path, H, V = tmp_path / "hidden", 64, 19
    last = 2**31 // H + 1
    with open(path, "wb") as file:
        os.truncate(file.fileno(), 4 * (last + 1) * H)
    hidden = torch.from_file(str(path), shared=True, size=(last + 1) * H, dtype=torch.float32).view(-1, H)
    dense = torch.randn(2, H, generator=torch.Generator().manual_seed(0))
    hidden[0], hidden[last] = dense
    weight, target = torch.randn(V, H, generator=torch.Generator().manual_seed(1)), torch.tensor([3, 7])
    got = score_tokens(hidden, weight, target, rows=torch.tensor([0, last]), want=ALL)
    want = score_tokens(dense, weight, target, want=ALL)
    for name in ALL:
        assert torch.equal(getattr(got, name), getattr(want, name)), name


# --- hypothesis -------------------------------------------------------------------------------------------------------


@st.composite
def cases(draw):
    B, S, H, V = (draw(st.integers(1, top)) for top in (3, 9, 9, 40))
    valid = draw(st.one_of(st.none(), st.integers(1, V)))
    limit = V if valid is None else valid
    suppress = draw(st.lists(st.integers(0, V - 1), max_size=3, unique=True))
    if len({s for s in suppress if s < limit}) == limit:
        suppress = []
    return {
        "seed": draw(st.integers(0, 2**16)),
        "shape": (B, S),
        "H": H,
        "V": V,
        "rows": draw(st.one_of(st.none(), st.integers(0, B * S))),
        "scale": draw(st.sampled_from([0.0, 1e-3, 1.0, 30.0])),
        "bias": draw(st.booleans()),
        "softcap": draw(st.sampled_from([None, 0.5, 30.0])),
        "temperature": draw(st.sampled_from([None, 0.05, 3.0, "row"])),
        "suppress": tuple(suppress),
        "valid_vocab": valid,
    }


@given(options=cases(), plan=st.sampled_from(PLANS))
@example(options={"shape": (1, 1), "H": 1, "V": 1, "rows": 1}, plan="keep")
def test_any_shape_equals_plain_autograd_in_float64(backend, options, plan):
    case = make_case(device=backend.device, trainable_head=plan != "unit", **options)
    loss, grads = case.run(plan)
    want_loss, want = case.run_oracle()
    torch.testing.assert_close(loss, want_loss, rtol=1e-9, atol=1e-9)
    for name in want:
        torch.testing.assert_close(grads[name], want[name], rtol=1e-8, atol=1e-8)


@given(options=cases(), plan=st.sampled_from(PLANS), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_any_shape_and_dtype_is_finite_and_close(backend, options, plan, dtype):
    case = make_case(dtype, backend.device, trainable_head=plan != "unit", **options)
    with torch.no_grad():
        scores, want = case.score(want=ALL), case.fresh(F64).oracle()
    temperature = options["temperature"] if isinstance(options["temperature"], float) else 1.0
    size = 1 + want["lse"].abs() + want["logp"].abs() + 50.0 / min(temperature, 1.0) * (options["scale"] > 1)
    for name in ("logp", "lse", "top_logp"):
        assert ((getattr(scores, name).double() - want[name]).abs() <= 2e-5 * size).all(), name
    assert (scores.logp <= 0).all()
    assert (scores.entropy >= -1e-5).all()
    assert (scores.entropy <= math.log(options["V"]) + 1e-4).all()
    _, grads = case.run(plan)
    _, want_grads = case.run_oracle()
    for name, gradient in grads.items():
        assert torch.isfinite(gradient).all(), name
        size = want_grads[name].abs().max() + options["scale"] / min(temperature, 1.0)
        assert (gradient.double() - want_grads[name]).abs().max() <= (8 * torch.finfo(dtype).eps + 1e-3) * size + 1e-6, name


@given(extreme=st.sampled_from([1e4, 1e8, 1e30, -1e4, -1e30]), seed=st.integers(0, 99), plan=st.sampled_from(PLANS))
def test_extreme_logits_give_finite_scores_and_gradients(backend, extreme, seed, plan):
    case = make_case(torch.float32, backend.device, seed=seed, bias=True, trainable_head=plan != "unit")
    case.options["bias"][seed % 13] = extreme
    scores, want = case.score(want=ALL), case.fresh(F64).oracle()
    for name in ("logp", "lse", "entropy"):
        torch.testing.assert_close(getattr(scores, name).double(), want[name], rtol=1e-5, atol=1e-4)
    for name, gradient in case.run(plan)[1].items():
        assert torch.isfinite(gradient).all(), name


# --- bad input --------------------------------------------------------------------------------------------------------


def bad(**changes):
    """`score_tokens` on a good float32 problem with some arguments replaced."""
    good = make_case(torch.float32)
    arguments = {"hidden": good.hidden, "weight": good.weight, "target": good.target, "rows": good.rows, **changes}
    hidden, weight, target = (arguments.pop(name) for name in ("hidden", "weight", "target"))
    return score_tokens(hidden, weight, target, **arguments)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"hidden": torch.zeros(3, 7, 5)}, ValueError, ["hidden", "5", "6"]),
        ({"hidden": torch.zeros(3, 7, 6, dtype=torch.int64)}, TypeError, ["hidden", "int64"]),
        ({"hidden": [1.0]}, TypeError, ["hidden", "list"]),
        ({"weight": torch.zeros(13, 6, dtype=torch.float64)}, TypeError, ["weight", "float64", "float32"]),
        ({"weight": torch.zeros(13)}, ValueError, ["weight", "13"]),
        ({"weight": torch.zeros(0, 6)}, ValueError, ["weight"]),
        ({"target": torch.zeros(11, dtype=torch.int32)}, TypeError, ["target", "int32", "int64"]),
        ({"target": torch.zeros(10, dtype=torch.int64)}, ValueError, ["target", "10", "11"]),
        ({"target": torch.full((11,), 13)}, ValueError, ["target", "13", "12"]),
        ({"target": torch.full((11,), -100)}, ValueError, ["target", "-100"]),
        ({"rows": torch.full((11,), 21)}, ValueError, ["rows", "21", "20"]),
        ({"rows": torch.full((11,), -1)}, ValueError, ["rows", "-1"]),
        ({"rows": torch.zeros(11)}, TypeError, ["rows", "float32"]),
        ({"rows": None}, ValueError, ["rows", "21", "11"]),
        ({"bias": torch.zeros(12)}, ValueError, ["bias", "12", "13"]),
        ({"softcap": 0.0}, ValueError, ["softcap", "0"]),
        ({"softcap": -1.0}, ValueError, ["softcap", "-1"]),
        ({"temperature": 0.0}, ValueError, ["temperature", "0"]),
        ({"temperature": math.nan}, ValueError, ["temperature", "nan"]),
        ({"temperature": torch.zeros(11)}, ValueError, ["temperature"]),
        ({"temperature": torch.ones(10)}, ValueError, ["temperature", "10"]),
        ({"suppress": (13,)}, ValueError, ["suppress", "13"]),
        ({"suppress": (-1,)}, ValueError, ["suppress", "-1"]),
        ({"suppress": tuple(range(13))}, ValueError, ["suppress", "all"]),
        ({"valid_vocab": 0}, ValueError, ["valid_vocab", "0"]),
        ({"valid_vocab": 14}, ValueError, ["valid_vocab", "14"]),
        ({"coef": torch.zeros(10)}, ValueError, ["coef", "10"]),
        ({"coef": torch.zeros(11, dtype=torch.int64)}, TypeError, ["coef", "int64"]),
        ({"entropy_coef": torch.zeros(11, 1)}, ValueError, ["entropy_coef"]),
        ({"want": ("logits",)}, ValueError, ["want", "logits", "logp"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_an_error_names_the_argument_and_what_came(backend, changes, error, words):
    with pytest.raises(error) as caught:
        bad(**changes)
    for word in words:
        assert word in str(caught.value)


def test_a_bias_that_trains_alone_gets_its_gradient(backend):
    case = make_case(torch.float32, backend.device, bias=True)
    bias = case.options["bias"].clone().requires_grad_()
    options = {**case.options, "bias": bias}
    score_tokens(case.hidden, case.weight, case.target, rows=case.rows, coef=case.coef.float(), **options).weighted_sum.backward()
    logp = oracle.logits(case.hidden, case.weight, case.rows, **options).log_softmax(-1).gather(1, case.target[:, None])[:, 0]
    (want,) = torch.autograd.grad((logp * case.coef.float()).sum(), bias)
    torch.testing.assert_close(bias.grad, want, rtol=1e-4, atol=1e-5)


def test_a_temperature_may_be_an_integer(backend):
    case = make_case(torch.float32, backend.device)
    whole, same = (score_tokens(case.hidden, case.weight, case.target, rows=case.rows, temperature=t).logp for t in (1, 1.0))
    assert torch.equal(whole, same)


def test_a_suppressed_target_is_an_error_that_names_the_id(backend):
    for changes in ({"suppress": (5,)}, {"valid_vocab": 5}):
        with pytest.raises(ValueError, match=r"target.*\b5\b"):
            bad(target=torch.full((11,), 5), **changes)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_hidden_state_is_reported_with_its_row(backend, value):
    hidden = torch.zeros(3, 7, 6)
    hidden[1, 2, 0] = value  # flat row 9
    rows = torch.tensor([0, 3, 9])
    with pytest.raises(ValueError, match=r"hidden.*\b9\b"):
        bad(hidden=hidden, rows=rows, target=torch.zeros(3, dtype=torch.int64))
    other = bad(hidden=hidden, rows=torch.tensor([0, 3]), target=torch.zeros(2, dtype=torch.int64))
    assert torch.isfinite(other.logp).all()  # a bad row that nobody scores does no harm


def test_repeated_rows_are_an_error_because_their_gradients_would_be_lost(backend):
    with pytest.raises(ValueError, match="rows"):
        bad(rows=torch.tensor([0, 3, 3]), target=torch.zeros(3, dtype=torch.int64))
