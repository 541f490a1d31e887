"""What benchmarks are made of: suites are rows of data; measuring, judging and reporting are written once.

A `Case` is one piece of work at given sizes: its inputs, the contestants, and one oracle that judges all of
them. A `Suite` is a race of such cases, a `Study` is statistics. A new one is an entry in the `SUITES` of its
module and a row in `MODULES`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
MODULES = {
    "head": "benchmarks.suites.head",
    "distillation": "benchmarks.suites.distillation",
    "expectation": "benchmarks.suites.expectation",
    "elbo": "benchmarks.suites.elbo",
    "bgpo": "benchmarks.suites.bgpo",
    "entropy": "benchmarks.suites.entropy",
    "rollout": "benchmarks.suites.rollout",
    "step": "benchmarks.suites.step",
    "accuracy": "benchmarks.suites.head",
    "variance": "benchmarks.studies.variance",
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EUROBERT = "transformers.models.eurobert.modeling_eurobert"  # of `small_model`, for `preload`

# "reference": the library's own PyTorch specification of every op, which its tests hold the other backends
# against
Role = Literal["ours", "reference", "peer", "floor"]
Result = dict[str, Tensor]
Runner = Callable[[], Result]
Oracle = Callable[[Result], dict[str, float]]
Row = dict[str, Any]  # one line of a result file: plain values, see `execution.measure_case`


@dataclass(frozen=True)
class Settings:
    """What a run measures; travels to the memory subprocesses."""

    dtype: str = "float32"
    shape: Mapping[str, int] = field(default_factory=dict)  # overrides a suite's default sizes
    tiny: bool = False  # every case at its warm-up sizes: checks the benchmark, not the library
    # the sizes of the published bounds, and every case
    full: bool = False
    threads: int = 1
    cases: tuple[str, ...] = ()  # only cases of these names; all where empty
    peers: tuple[str, ...] | None = None  # of those beside ours and the floor only these; None for all
    models: Sequence[str] = ()  # checkpoint folders, for suites that score a trained model
    device: str = "cpu"
    # of the whole run: fewer rounds and cases where they do not fit (with `full` fewer cases alone); None for no limit
    minutes: float | None = None

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def runs(self, contestant: Contestant) -> bool:
        return contestant.role in ("ours", "floor") or self.peers is None or contestant.name in self.peers


@dataclass(frozen=True)
class Sizes:
    """Sizes of a case by tier."""

    tiny: Mapping[str, int]
    usual: Mapping[str, int]
    full: Mapping[str, int]

    def of(self, settings: Settings) -> dict[str, int]:
        """The run's tier, with what --shape says of these sizes."""
        base = self.tiny if settings.tiny else self.full if settings.full else self.usual
        return {**base, **{key: value for key, value in settings.shape.items() if key in base}}


@dataclass
class Work:
    """What a contestant's set-up returns. `run` is timed, and returns the outputs that the oracle judges.

    The rest is read after it has run, so that `run` may set it: operations of one call by formula (0 where
    there is none), a note for the table, seconds of a call's parts.
    """

    run: Runner
    flops: float = 0.0
    note: str = ""
    phases: Callable[[], Mapping[str, float]] | None = None
    first_s: float = 0.0  # seconds of the first call, by who judged it


def applies_always(_: Any) -> str:
    return ""


@dataclass(frozen=True)
class Contestant:
    """One way to do a case's work: the same set-up feeds time, memory, operations and errors.

    Both functions take the case's inputs. `applies` says why it cannot run and is listed with that; "" where
    it can.
    """

    name: str
    role: Role
    setup: Callable[[Any], Work]
    applies: Callable[[Any], str] = applies_always


@dataclass(frozen=True)
class Case:
    """`inputs` makes what all contestants are given; `oracle` judges their outputs against float64."""

    name: str
    sizes: Mapping[str, int]
    tiny: Mapping[str, int]  # the same work at a size that only warms up code, threads and library buffers
    inputs: Callable[[Mapping[str, int]], Any]
    contestants: tuple[Contestant, ...]
    oracle: Callable[[Any], Oracle]
    tolerance: Mapping[str, float]  # largest error of ours; see `execution.PEER_SLACK` for the others
    # the least that the work takes: the row "limit" where no contestant is the floor; 0 for none
    flops: float = 0.0
    # what any contestant must allocate: gradients and row vectors
    output_bytes: Callable[[Any], int] = lambda _: 0
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
    plot: Callable[[Sequence[Row], Path], None]
    # keys that --shape must give together; the others keep their defaults
    required_shape: tuple[str, ...] = ()
    measured_floor: bool = False  # a contestant, not arithmetic: worth a word in the summary
    arithmetic: Callable[[], list[dict[str, Any]]] = list  # figures that are computed, not measured
    arithmetic_title: str = ""
    preload: tuple[str, ...] = ()  # modules that its memory subprocesses find imported


@dataclass(frozen=True)
class Study:
    """Statistics, nothing timed: `measure` returns the result file's entry, with `rows` and a `summary`."""

    name: str
    title: str
    # raises ValueError for settings that do not fit, before anything is measured
    check: Callable[[Settings], None]
    measure: Callable[[Settings], dict[str, Any]]
    listing: Callable[[Settings], Sequence[str]]  # a line per case
    label: Callable[[Row], str]  # of a row's case in the table
    columns: Mapping[str, Callable[[Row], str]]  # of the table
    shape_keys: tuple[str, ...]
    plot: Callable[[Sequence[Row], Path], None]
    required_shape: tuple[str, ...] = ()
    preload: tuple[str, ...] = ()


def load(name: str) -> Suite | Study:
    """The suite of that name. Raises ValueError naming the known ones."""
    if name not in MODULES:
        raise ValueError(f"--suite must be one of {', '.join(MODULES)}, got {name!r}")
    found: Suite | Study = importlib.import_module(MODULES[name]).SUITES[name]
    return found


def small_model(
    *, V: int, H: int, layers: int, dtype: torch.dtype, device: str = "cpu", expand: int = 4, sharpen: float = 1.0
) -> nn.Module:
    """A random EuroBERT (LLaDA's architecture) in eval mode; mask id V - 1; `sharpen` scales the head."""
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
    """Parameters that every token is multiplied with: without the embedding (looked up) and the head."""
    skipped = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}  # type: ignore[operator]
    return sum(p.numel() for p in model.parameters() if p.dim() > 1 and id(p) not in skipped)


def gradients(model: nn.Module) -> Result:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def relative_error(got: Sequence[Tensor], true: Sequence[Tensor]) -> float:
    """`|got - true| / |true|` over all entries of all tensors, in float64."""
    difference = sum(float((g.double() - t.double()).square().sum()) for g, t in zip(got, true, strict=True))
    size = sum(float(t.double().square().sum()) for t in true)
    return (difference / size) ** 0.5 if size else difference**0.5


def gradient_error(result: Result, true: Result, *values: str) -> float:
    """`relative_error` of all parameters' gradients: all of a result but `values`.

    Raises ValueError where one is missing.
    """
    if result.keys() != true.keys():
        raise ValueError(f"gradients of {sorted(result.keys() ^ true.keys())} are missing or unexpected")
    names = [name for name in true if name not in values]
    return relative_error([result[n] for n in names], [true[n] for n in names])


def body_parameters(sizes: Mapping[str, int], expand: int = 4) -> float:
    """`multiplied_parameters` of `small_model`: four H x H and three H x expand H matrices a layer."""
    return float(sizes["layers"] * (4 + 3 * expand) * sizes["H"] ** 2)


def operations(parameters: float, tokens: float, rows: float, sizes: Mapping[str, int], *, gradients: bool = False) -> float:
    """Of the body on `tokens` and the head on `rows`; three times as many with a backward pass.

    Attention's own products are left out.
    """
    return (6.0 if gradients else 2.0) * (parameters * tokens + rows * sizes["H"] * sizes["V"])
