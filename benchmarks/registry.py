"""What a benchmark is: suites of cases, each with one setup that feeds time, memory and accuracy of every contestant.

A new suite is one file in `suites/` with a `SUITE`, and one row in `SUITE_MODULES`. What is no race of contestants but
statistics is a `Study`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from rich.table import Table
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
SUITE_MODULES = {name: f"benchmarks.suites.{name}" for name in ("head", "bgpo", "rollout", "variance")}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Role = Literal["ours", "peer", "floor"]
Result = dict[str, Tensor]
Runner = Callable[[], Result]
Row = dict[str, Any]  # one line of a result file: plain values, see `execution.measure_case`


@dataclass(frozen=True)
class Settings:
    """What a run measures; travels to the memory subprocesses."""

    dtype: str = "float32"
    shape: Mapping[str, int] = field(default_factory=dict)  # overrides a suite's default sizes
    tiny: bool = False  # every case at its warm-up sizes: checks the benchmark, not the library
    threads: int = 1
    cases: tuple[str, ...] = ()  # only cases of these names; all where empty
    contestants: tuple[str, ...] = ()  # only these; all where empty
    models: Sequence[str] = ()  # checkpoint folders, for suites that score a trained model
    device: str = "cpu"
    minutes: float = 0.0  # after which no further case starts; 0 for no limit

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


@dataclass(frozen=True)
class Contestant:
    """One way to do a case's work.

    `make` builds its state and returns the function that is timed; that function returns its outputs, for `errors`. A
    contestant that cannot run says why in `absent` and is listed with that reason. `note` is printed beside the figures;
    a function, where only the made contestant knows.
    """

    name: str
    role: Role
    make: Callable[[], Runner] | None = None
    absent: str = ""
    note: str | Callable[[], str] = ""


@dataclass(frozen=True)
class Prepared:
    """A case at one size: `errors` judges any contestant's outputs against float64 on the same inputs."""

    contestants: tuple[Contestant, ...]
    errors: Callable[[Result], dict[str, float]]
    output_bytes: int  # what any contestant must allocate: gradients and row vectors


@dataclass(frozen=True)
class Case:
    name: str
    sizes: Mapping[str, int]
    tiny: Mapping[str, int]  # the same work at a size that only warms up code, threads and library buffers
    setup: Callable[[Mapping[str, int]], Prepared]
    flops: float  # of the matrix products; 0 where they are not counted
    tolerance: Mapping[str, float]  # largest error of ours; see `execution.PEER_SLACK` for the others

    @property
    def label(self) -> str:
        return f"{self.name} {','.join(f'{key}={value}' for key, value in self.sizes.items())}"


@dataclass(frozen=True)
class Suite:
    name: str
    title: str
    cases: Callable[[Settings], Sequence[Case]]
    baseline: str  # the contestant that `to_baseline` divides by
    error_columns: tuple[str, ...]
    shape_keys: tuple[str, ...]
    summary: Callable[[Sequence[Row]], str]
    plot: Callable[[Sequence[Row], Path], None]
    required_shape: tuple[str, ...] = ()  # keys that --shape must give together; the others keep their defaults
    arithmetic: Callable[[], list[dict[str, Any]]] = list  # figures that are computed, not measured
    arithmetic_title: str = ""
    preload: tuple[str, ...] = ()  # modules that its memory subprocesses find imported

    def case(self, label: str, settings: Settings) -> Case:
        return next(case for case in self.cases(settings) if case.label == label)


@dataclass(frozen=True)
class Study:
    """A suite of statistics: `measure` returns its entry of the result file, with `rows` and a `summary`; nothing is timed."""

    name: str
    title: str
    check: Callable[[Settings], None]  # raises ValueError for settings that do not fit, before anything is measured
    measure: Callable[[Settings], dict[str, Any]]
    listing: Callable[[Settings], Sequence[str]]  # a line per case
    table: Callable[[Sequence[Row]], Table]
    shape_keys: tuple[str, ...]
    plot: Callable[[Sequence[Row], Path], None]
    required_shape: tuple[str, ...] = ()
    preload: tuple[str, ...] = ()


def load(name: str) -> Suite | Study:
    """The suite of that name. Raises ValueError naming the known ones."""
    if name not in SUITE_MODULES:
        raise ValueError(f"--suite must be one of {', '.join(SUITE_MODULES)}, got {name!r}")
    return importlib.import_module(SUITE_MODULES[name]).SUITE


def relative_error(got: Sequence[Tensor], true: Sequence[Tensor]) -> float:
    """`|got - true| / |true|` over all entries of all tensors, in float64."""
    difference = sum(float((g.double() - t.double()).square().sum()) for g, t in zip(got, true, strict=True))
    size = sum(float(t.double().square().sum()) for t in true)
    return (difference / size) ** 0.5 if size else difference**0.5
