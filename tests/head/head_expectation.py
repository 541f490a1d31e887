"""The sixth part of the head suite, for every backend: expected embeddings against float64 over full logits."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dllm_kernels import expected_embedding, explain
from dllm_kernels.backends.divergence import walk
from tests import oracle
from tests.tiny import relative_error

# of inputs and results in these dtypes; products of 16 bits, which a GPU has, round their operands too
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}


@dataclass
class Expectation:
    """A head, an embedding of another width or None, N `rows` of M positions."""

    hidden: Tensor
    weight: Tensor
    embedding: Tensor | None
    rows: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def leaves(self) -> list[Tensor]:
        found = [self.hidden, self.weight, self.embedding, self.options.get("bias"), *self.options.get("low_rank", ())[:2]]
        return [tensor for tensor in found if tensor is not None and tensor.requires_grad]

    def exact(self) -> Expectation:
        """The same values in float64, with leaves of their own."""

        def wide(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(wide(part) for part in value)
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            return value.detach().double().requires_grad_(value.requires_grad)

        changed = {name: wide(getattr(self, name)) for name in ("hidden", "weight", "embedding")}
        return replace(self, **changed, options={name: wide(value) for name, value in self.options.items()})

    def expected(self) -> Tensor:
        return expected_embedding(self.hidden, self.weight, self.embedding, rows=self.rows, **self.options)

    def true(self) -> Tensor:
        p = oracle.logits(self.hidden, self.weight, self.rows, **self.options).softmax(-1)
        return p @ (self.weight if self.embedding is None else self.embedding)


def make_expectation(
    dtype=torch.float64, *, N=7, H=8, V=300, M=12, D=None, trains=True, options=False, spread=1.0, seed=0, device="cpu"
) -> Expectation:
    """With D an embedding of that width, else a tied one."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size, train=False):
        return torch.randn(size, generator=generator, dtype=torch.float64).mul_(spread).to(device, dtype).requires_grad_(train)

    hidden, weight = draw(3, M // 3, H, train=True), draw(V, H, train=trains)
    rows = torch.randperm(M, generator=generator)[:N].to(device)
    made = Expectation(hidden, weight, None if D is None else draw(V, D, train=trains), rows)
    if options:
        adapter = draw(3, H, train=True), draw(V, 3, train=trains), 0.7
        temperature = (torch.rand(N, generator=generator, dtype=torch.float64) + 0.5).to(device)
        made.options = {"bias": draw(V, train=trains), "softcap": 5.0, "low_rank": adapter, "temperature": temperature}
        made.options |= {"suppress": (3, 64), "valid_vocab": V - 10}
    return made


def gradients_agree(mine: Expectation, tolerance: float) -> None:
    exact = mine.exact()
    got, true = mine.expected(), exact.true()
    assert relative_error(got.detach(), true.detach()) < tolerance
    upstream = torch.linspace(-1, 2, got.numel(), device=got.device).view(got.shape).to(got.dtype)
    gradients = torch.autograd.grad(got, mine.leaves, upstream)
    for gradient, truth in zip(gradients, torch.autograd.grad(true, exact.leaves, upstream.double()), strict=True):
        assert relative_error(gradient, truth) < tolerance


@pytest.mark.parametrize("slabs", ["one", "many"])
def test_expected_embeddings_and_their_gradients_are_those_of_full_logits(backend, slabs, monkeypatch):
    """Tied and not, frozen and not; whole groups of sixteen rows, and parts of one."""
    if slabs == "many":
        monkeypatch.setattr(walk, "SLAB_ELEMENTS", {"cpu": 1, "cuda": 1})
    for N, H, D, options, trains in ((37, 80, None, False, True), (7, 8, 21, True, True), (19, 8, None, True, False)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            case = make_expectation(dtype, N=N, H=H, D=D, M=39, options=options, trains=trains, spread=0.5, device=backend.device)
            assert case.expected().dtype == dtype
            gradients_agree(case, TOLERANCE[dtype] + backend.device.type.count("cuda") * backend.operand_error(dtype))


def test_an_embedding_of_another_dtype_is_added_up_in_its_own(backend):
    for of_head, of_embedding in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        case = make_expectation(of_head, D=5, spread=0.5, device=backend.device)
        case.embedding = case.embedding.detach().to(of_embedding).requires_grad_()
        got = case.expected()
        assert got.dtype == of_embedding
        assert relative_error(got.detach(), case.exact().true().detach()) < (1e-6 if of_embedding == torch.float32 else 4e-3)
        gradients_agree(
            case, TOLERANCE[torch.bfloat16] + backend.device.type.count("cuda") * backend.operand_error(torch.bfloat16)
        )
        assert [g.dtype for g in torch.autograd.grad(got.sum(), case.leaves)] == [of_head, of_head, of_embedding]


def test_logits_in_the_hundreds_and_rising_from_slab_to_slab_lose_no_digits(backend, monkeypatch):
    """What was added up before the largest logit came must count less, at last nothing."""
    monkeypatch.setattr(walk, "SLAB_ELEMENTS", {"cpu": 1, "cuda": 1})
    case = make_expectation(torch.float32, D=5, device=backend.device)
    case.hidden.data[..., 0] = 1.0
    rising = torch.linspace(-600, 600, len(case.weight), device=backend.device)
    for largest in (rising, rising.flip(0)):
        case.weight.data[:, 0] = largest
        gradients_agree(case, 2e-4)  # an exponential has the absolute error of its logit: 3e-5 at 600


def test_ids_without_probability_may_hold_anything(backend):
    """Suppressed ids of NaN and infinity, in weight and embedding, and an id whose logit is -inf: nothing of them is seen."""
    for D in (None, 5):
        clean = make_expectation(torch.float32, N=19, M=39, D=D, options=True, spread=0.5, device=backend.device)
        clean.options["bias"].data[7] = -math.inf
        clean.options.pop("softcap")  # which would make it finite
        spoiled = replace(clean, weight=clean.weight.detach().clone().requires_grad_())
        tensors = [spoiled.weight]
        if D is not None:
            spoiled.embedding = clean.embedding.detach().clone().requires_grad_()
            tensors.append(spoiled.embedding)
        for tensor in tensors:
            tensor.data[3], tensor.data[64], tensor.data[-1] = math.nan, math.inf, math.nan
        one, other = clean.expected(), spoiled.expected()
        assert torch.equal(one, other)
        of_clean, of_spoiled = (
            torch.autograd.grad(x.square().sum(), case.leaves) for x, case in ((one, clean), (other, spoiled))
        )
        for a, b in zip(of_clean, of_spoiled, strict=True):
            assert torch.equal(a, b)
            assert bool(a.isfinite().all())
        for k, tensor in enumerate(tensors, start=1):
            assert float(of_spoiled[k][[3, 64, len(tensor) - 1]].abs().max()) == 0


def test_a_compiled_expectation_does_not_break_and_flops_are_those_that_explain_says(backend):
    """The compiled call has the bits of the eager one: of hidden states alone, of a tied weight too, and of everything."""
    torch._dynamo.reset()
    for D, options, which, products in (
        (None, False, ("hidden",), 5),
        (None, False, ("hidden", "weight"), 7),
        (5, True, ("hidden", "weight", "embedding"), None),
    ):
        case = make_expectation(torch.float32, H=16, D=D, options=options, spread=0.5, device=backend.device)
        case.options.pop("temperature", None)  # a number, which may vary
        for name in ("hidden", "weight", "embedding"):
            if getattr(case, name) is not None:
                getattr(case, name).requires_grad_(name in which)

        def expected(hidden, weight, embedding, temperature, case=case):
            options = {**case.options, "temperature": temperature}
            return replace(case, hidden=hidden, weight=weight, embedding=embedding, options=options).expected()

        compiled = torch.compile(expected, fullgraph=True, backend="aot_eager")
        operands = case.hidden, case.weight, case.embedding
        for temperature in (1.0, 0.7):
            with FlopCounterMode(display=False) as counter:
                one = expected(*operands, temperature)
                wanted = torch.autograd.grad(one.square().sum(), case.leaves)
            other = compiled(*operands, temperature)
            assert torch.equal(one, other)
            for mine, truth in zip(torch.autograd.grad(other.square().sum(), case.leaves), wanted, strict=True):
                assert torch.equal(mine, truth)
            table = case.weight if D is None else case.embedding
            cost = explain(case.hidden, case.weight, embedding=table, rows=case.rows, **case.options)
            assert cost.flops == counter.get_total_flops()
            assert products is None or cost.flops == products * 2 * 7 * 16 * 300
        eager = expected(*operands, 0.7)
        with FlopCounterMode(display=False) as counter:
            late = torch.autograd.grad(eager.square().sum(), case.leaves)
        assert all(map(torch.equal, late, wanted))
        assert products is None or counter.get_total_flops() == (products - 2) * 2 * 7 * 16 * 300, "a counter over backward alone"
