"""The fifth part of the head suite, for every backend: divergences of two heads against float64 over full logits."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dllm_kernels import distillation_loss, explain
from dllm_kernels.backends.divergence import problem, walk
from tests import oracle
from tests.tiny import relative_error

KINDS = problem.KINDS
REDUCTIONS = ("mean", "sum", "none")


@dataclass
class Case:
    """A student and a teacher of other widths; N `rows` of M positions."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    rows: Tensor
    coef: Tensor
    options: dict[str, Any] = field(default_factory=dict)
    teacher_options: dict[str, Any] = field(default_factory=dict)

    def exact(self) -> Case:
        """The same values in float64, with leaves of their own."""

        def wide(tensor: Any) -> Any:
            if isinstance(tensor, tuple):
                return tuple(wide(part) for part in tensor)
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                return tensor
            return tensor.detach().double().requires_grad_(tensor.requires_grad)

        changed = {name: wide(getattr(self, name)) for name in ("hidden", "weight", "teacher_hidden", "teacher_weight", "coef")}
        options = [{name: wide(value) for name, value in x.items()} for x in (self.options, self.teacher_options)]
        return replace(self, **changed, options=options[0], teacher_options=options[1])

    @property
    def leaves(self) -> list[Tensor]:
        found = [self.hidden, self.weight, self.options.get("bias"), *self.options.get("low_rank", ())[:2]]
        return [tensor for tensor in found if tensor is not None and tensor.requires_grad]

    def loss(self, kind: str, **more: Any) -> Tensor:
        teacher = {f"teacher_{name}": value for name, value in self.teacher_options.items()}
        operands = self.hidden, self.weight, self.teacher_hidden, self.teacher_weight
        return distillation_loss(*operands, kind=kind, rows=self.rows, **self.options, **teacher, **more)

    def true(self, kind: str, beta: float = 0.5) -> Tensor:
        common = {name: self.options[name] for name in ("temperature", "suppress", "valid_vocab") if name in self.options}
        student = oracle.logits(self.hidden, self.weight, self.rows, **self.options)
        teacher = oracle.logits(
            self.teacher_hidden.to(student.dtype),
            self.teacher_weight.to(student.dtype),
            self.rows,
            **common,
            **self.teacher_options,
        )
        return oracle.divergence(student, teacher, kind, beta)


def make_case(
    dtype=torch.float64, *, N=7, H=8, V=300, M=12, trains=True, options=False, spread=1.0, seed=0, device="cpu"
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def draw(*size, train=False):
        return torch.randn(size, generator=generator, dtype=torch.float64).mul_(spread).to(device, dtype).requires_grad_(train)

    case = Case(
        draw(3, M // 3, H, train=True),
        draw(V, H, train=trains),
        draw(3, M // 3, 5),
        draw(V, 5),
        torch.randperm(M, generator=generator)[:N].to(device),
        torch.randn(N, generator=generator, dtype=torch.float64).to(device),
    )
    if options:
        adapter = draw(3, H, train=True), draw(V, 3, train=trains), 0.7
        temperature = (torch.rand(N, generator=generator, dtype=torch.float64) + 0.5).to(device)
        case.options = {"bias": draw(V, train=trains), "softcap": 5.0, "low_rank": adapter, "temperature": temperature}
        case.options |= {"suppress": (3, 64), "valid_vocab": V - 10}
        case.teacher_options = {"bias": draw(V), "softcap": 6.0}
    return case


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_divergences_and_their_gradients_are_those_of_full_logits(backend, kind, reduction, monkeypatch):
    """One slab that is kept whole, and many of which some rows are kept; whole groups of sixteen rows, and parts of one."""
    for slabs, N, H, options, trains in (
        ("one", 37, 80, False, True),
        ("one", 7, 8, True, False),
        ("many", 37, 80, True, True),
        ("many", 19, 8, False, reduction != "none"),
    ):
        with monkeypatch.context() as patch:
            if slabs == "many":
                patch.setattr(walk, "SLAB_ELEMENTS", {"cpu": 1, "cuda": 1})
                patch.setattr(walk, "SMALL_BYTES", 0)
            where = {"M": 39, "device": backend.device}
            case = make_case(torch.float32, N=N, H=H, trains=trains, options=options, spread=0.35, **where)
            got = case.loss(kind, reduction=reduction, coef=case.coef)
            exact = case.exact()
            true_N = exact.true(kind) * case.coef
            true = {"mean": true_N.mean(), "sum": true_N.sum(), "none": true_N}[reduction]
            assert float((got.detach().double() - true.detach()).abs().max()) < 5e-6 * float(
                true_N.detach().abs().max().clamp(min=1.0)
            )
            upstream = torch.linspace(0.5, 2, got.numel(), device=backend.device).view(got.shape)
            gradients = torch.autograd.grad((got * upstream).sum(), case.leaves)
            for mine, truth in zip(gradients, torch.autograd.grad((true * upstream).sum(), exact.leaves), strict=True):
                assert relative_error(mine, truth) < 2e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_divergences_of_low_precision_have_the_errors_of_their_inputs(backend, kind, dtype):
    """Values from fp32 logits; 16 bits round nothing but inputs and finished gradients, and on a GPU the operand."""
    case = make_case(dtype, H=64, V=1500, spread=0.4, device=backend.device)
    exact = case.exact()
    got, true = case.loss(kind), exact.true(kind).mean()
    assert got.dtype == torch.float32
    assert abs(float(got.detach()) - float(true.detach())) < 2e-6
    got.backward()
    true.backward()
    for name in ("hidden", "weight"):
        mine, truth = getattr(case, name).grad, getattr(exact, name).grad
        assert mine.dtype == dtype
        assert relative_error(mine, truth) < (1e-5 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_distributions_that_are_far_apart_neither_overflow_nor_lose_digits(backend, kind):
    """Divergences of a hundred nats; and of equal models, whose divergence is 0. A gradient's scale is that of a weight's row."""
    mine = make_case(torch.float32, spread=5.0, device=backend.device)
    exact = mine.exact()
    true, got = exact.true(kind).sum(), mine.loss(kind, reduction="sum")
    assert torch.allclose(got.double(), true, rtol=1e-5)
    true.backward()
    got.backward()
    error = float((mine.hidden.grad - exact.hidden.grad).abs().max())
    assert error < 1e-5 * float(exact.weight.detach().abs().max()) * (100 if kind == "reverse_kl" else 1)
    same = distillation_loss(mine.hidden, mine.weight, mine.hidden, mine.weight, kind=kind, reduction="none")
    assert float(same.detach().abs().max()) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_an_id_of_minus_infinity_in_the_student_counts_as_one_of_probability_0(backend, kind):
    """A weight of -1e30 has no probability either: KL to it is infinite, the other divergences finite, with finite gradients."""
    case = make_case(torch.float32, H=80, spread=0.3, device=backend.device)
    with torch.no_grad():
        case.hidden[..., 0] = 1.0
        case.weight[3] = 0.0
        case.weight[3, 0] = -1e30
    got = case.loss(kind, reduction="none")
    if kind == "forward_kl":
        assert float(got.detach().min()) > 1e20
        return
    assert torch.allclose(got.double(), case.exact().true(kind), rtol=1e-5, atol=1e-5)
    got.sum().backward()
    assert bool(case.weight.grad.isfinite().all())
    assert float(case.weight.grad[3].abs().max()) == 0


def test_a_compiled_graph_does_not_break_and_flops_are_those_that_explain_says(backend):
    """The compiled call has the bits of the eager one; its products are four, and two more where backward makes logits again."""
    torch._dynamo.reset()
    for reduction, options, products in (("mean", False, 4), ("none", False, 6), ("sum", True, None)):
        case = make_case(torch.float32, H=64, options=options, spread=0.3, device=backend.device)
        case.teacher_hidden, case.teacher_weight = torch.randn(3, 4, 64), torch.randn(300, 64)
        case.teacher_hidden, case.teacher_weight = (x.to(backend.device) for x in (case.teacher_hidden, case.teacher_weight))
        if options:
            case.options.pop("temperature")  # a number, which may vary

        def loss(hidden, weight, temperature, case=case, reduction=reduction):
            case = replace(case, hidden=hidden, weight=weight, options={**case.options, "temperature": temperature})
            return case.loss("jsd", reduction=reduction, coef=case.coef.float()).sum()

        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        for temperature in (1.0, 0.7):
            with FlopCounterMode(display=False) as counter:
                wanted = torch.autograd.grad(loss(case.hidden, case.weight, temperature), case.leaves)
            got = torch.autograd.grad(compiled(case.hidden, case.weight, temperature), case.leaves)
            for mine, other in zip(got, wanted, strict=True):
                assert torch.equal(mine, other)
            cost = explain(
                case.hidden,
                case.weight,
                rows=case.rows,
                teacher_hidden=case.teacher_hidden,
                teacher_weight=case.teacher_weight,
                kind="jsd",
                reduction=reduction,
                **case.options,
            )
            assert cost.flops == counter.get_total_flops()
            assert products is None or cost.flops == products * 2 * 7 * 64 * 300
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            loss(case.hidden, case.weight, 1.0)
        assert options or counter.get_total_flops() == 2 * 2 * 7 * 64 * 300, "the logits of both heads and no gradient"
