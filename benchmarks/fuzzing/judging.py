"""What `distillation` and `expectation` are judged by: a call beside its bounds, on one instruction set."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.fuzzing.calls import REFERENCE, Inputs, _complaint, _within
from benchmarks.fuzzing.guards import Guarded
from benchmarks.fuzzing.truth import Bounded
from dllm_kernels.backends import cpu

_TOLD = ("value", "dhidden", "dweight", "dembedding")  # whose errors are told


class Judge:
    """Of a source of problems: a module with `run`, `eager` (plain PyTorch on the same inputs) and `surroundings`."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def judge(self, problem: Any, truth: Any, engine: str, poison: float | None, inputs: Inputs, guarded: Guarded) -> list[str]:
        """What is wrong with the call on one instruction set. `truth` is None for a problem that must be refused."""
        run, eager = self.source.run, self.source.eager
        with self.source.surroundings(problem, engine, poison, guarded):
            if truth is None:
                try:
                    run(problem, inputs)
                except ValueError as error:
                    return [] if problem.bad in str(error) else [f"a bad {problem.bad} raised {error!r}"]
                return [f"a bad {problem.bad} was not refused"]
            found, wanted, complaints = run(problem, inputs), truth.wanted(), []
            poor = [name for name, value in found.items() if not _within(value, wanted[name])]
            baseline = eager(problem) if poor else {}
            for name in poor:
                exact, bound, _ = wanted[name]
                slack = 2 * float((baseline[name].double() - exact).abs().nan_to_num(0.0).max())
                if not _within(found[name], Bounded(exact, bound + slack)):
                    complaints.append(_complaint(name, found[name], wanted[name]))
            return complaints

    def gradient_errors(
        self, problem: Any, truth: Any, engine: str, inputs: Inputs, guarded: Guarded
    ) -> dict[str, tuple[float, float]]:
        """Errors of value and gradients, relative to the root of summed squares: ours, and plain PyTorch's in the same dtype."""
        with self.source.surroundings(problem, engine, None, guarded):
            found, baseline, errors = self.source.run(problem, inputs), self.source.eager(problem), {}
            for name, (exact, _, _) in truth.wanted().items():
                if name in _TOLD and name in found and float(exact.norm()) > 0:
                    ours, other = (float((x[name].detach().double() - exact).norm() / exact.norm()) for x in (found, baseline))
                    errors[name] = ours, other
            return errors


def arguments(p: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Of a problem's call, with these tensors."""
    given: dict[str, Any] = {**p.options, **tensors}
    if "low_rank_A" in given:
        given["low_rank"] = given.pop("low_rank_A"), given.pop("low_rank_B"), given.pop("scale")
    return given


def copies(p: Any, inputs: Inputs) -> dict[str, Tensor]:
    """Copies of a problem's tensors between forbidden pages."""
    floating = {name: inputs.copy(x).requires_grad_(name in p.trains) for name, x in p.tensors.items() if x.is_floating_point()}
    return floating | {name: inputs.copy(x) for name, x in p.tensors.items() if not x.is_floating_point()}


def fresh(p: Any, names: Sequence[str]) -> dict[str, Tensor]:
    """Copies of some of a problem's tensors, in PyTorch's own memory."""
    return {name: p.tensors[name].detach().clone().requires_grad_(name in p.trains) for name in names if name in p.tensors}


@contextlib.contextmanager
def machine(p: Any, engine: str, poison: float | None, guarded: Guarded) -> Iterator[None]:
    """An instruction set, a problem's threads, and NaN in what PyTorch allocates."""
    filled = torch.utils.deterministic.fill_uninitialized_memory
    guarded.at_end = p.at_end
    torch.set_num_threads(p.threads)
    if engine != REFERENCE:
        cpu._C.set_isa(engine)
    torch.use_deterministic_algorithms(poison is not None)  # and with it NaN in fresh memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = filled
        guarded.release()
