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
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
SUITE_MODULES = {
    name: f"benchmarks.suites.{name}" for name in ("head", "elbo", "bgpo", "entropy", "rollout", "step", "accuracy", "variance")
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# "reference": the library's own PyTorch specification of every op, which its tests hold the other backends against
Role = Literal["ours", "reference", "peer", "floor"]
Result = dict[str, Tensor]
Runner = Callable[[], Result]
Row = dict[str, Any]  # one line of a result file: plain values, see `execution.measure_case`


@dataclass(frozen=True)
class Settings:
    """What a run measures; travels to the memory subprocesses."""

    dtype: str = "float32"
    shape: Mapping[str, int] = field(default_factory=dict)  # overrides a suite's default sizes
    tiny: bool = False  # every case at its warm-up sizes: checks the benchmark, not the library
    full: bool = False  # the sizes of the published bounds, and every case; else what fits into three minutes in all
    threads: int = 1
    cases: tuple[str, ...] = ()  # only cases of these names; all where empty
    peers: tuple[str, ...] | None = None  # of those beside ours and the floor only these; None for all
    models: Sequence[str] = ()  # checkpoint folders, for suites that score a trained model
    device: str = "cpu"
    minutes: float = 0.0  # after which no further case starts; 0 for no limit

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def runs(self, contestant: Contestant) -> bool:
        return contestant.role in ("ours", "floor") or self.peers is None or contestant.name in self.peers


@dataclass(frozen=True)
class Contestant:
    """One way to do a case's work.

    `make` builds its state and returns the function that is timed; that function returns its outputs, for `errors`. A
    contestant that cannot run says why in `absent` and is listed with that reason. `note` is printed beside the figures;
    a function, where only the made contestant knows. `flops` is what a formula says of one call's operations, beside those
    that are counted while it runs; 0 where there is none.
    """

    name: str
    role: Role
    make: Callable[[], Runner] | None = None
    absent: str = ""
    note: str | Callable[[], str] = ""
    flops: float | Callable[[], float] = 0.0
    phases: Callable[[], Mapping[str, float]] | None = None  # seconds of a call's parts, asked after all timing


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
    flops: float  # the least operations that the work takes: the row "limit" where no contestant is the floor; 0 for none
    tolerance: Mapping[str, float]  # largest error of ours; see `execution.PEER_SLACK` for the others
    dtype: str = ""  # where it is not the run's

    @property
    def label(self) -> str:
        sizes = ",".join(f"{key}={value}" for key, value in self.sizes.items())
        return f"{self.name} {sizes} {self.dtype}".rstrip()


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


def small_model(
    *, V: int, H: int, layers: int, dtype: torch.dtype, device: str = "cpu", expand: int = 4, sharpen: float = 1.0
) -> nn.Module:
    """A random EuroBERT (LLaDA's architecture) in evaluation mode; its mask id is V - 1. `sharpen` scales the head."""
    from transformers import EuroBertConfig, EuroBertForMaskedLM

    heads = max(1, H // 64)
    config = EuroBertConfig(
        vocab_size=V,
        hidden_size=H,
        intermediate_size=expand * H,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        mask_token_id=V - 1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = EuroBertForMaskedLM(config)
    model.get_output_embeddings().weight.data.mul_(sharpen)
    return model.to(device=device, dtype=dtype).eval()


def multiplied_parameters(model: nn.Module) -> int:
    """Parameters that every token is multiplied with: neither the embedding, which is looked up, nor the head."""
    skipped = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}  # type: ignore[operator]
    return sum(p.numel() for p in model.parameters() if p.dim() > 1 and id(p) not in skipped)


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
