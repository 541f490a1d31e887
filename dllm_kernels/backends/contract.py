"""What every backend of the head is given, and what it must return."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from dllm_kernels import checks

ROW_BLOCK = 256  # rows of every GEMM: one shape, hence one summation order, whatever N is
WORKSPACE_BYTES = {"cpu": 256 << 20}
GPU_WORKSPACE_BYTES = 512 << 20
STATISTICS = ("logp", "lse", "entropy", "top_logp", "top_id")
BEST = ("best_logp", "best_id")  # [N, best]
OPERANDS = ("operand", "entropy_operand")  # what the plan "keep" stores
VECTORS = ("unit", "dhidden", "entropy_unit")  # [N, H]
LOW = "low_"  # before a vector's name: what the adapter's operand of the rows gets, in the statistics' dtype

WeightGradient = Callable[[Tensor], None]  # takes the weight's gradient, in fp32 where the weight has 16 bits
_Run = TypeVar("_Run", bound=Callable[..., dict[str, Tensor]])


@dataclass(frozen=True, eq=False)
class HeadOptions:
    """What turns raw logits into final ones: `softcap * tanh((z + bias) / softcap) / temperature`, some ids excluded.

    Made once from a user's arguments and handed on whole. `**options` passes those that are set as keywords.
    """

    bias: Tensor | None = None  # [V]
    softcap: float | None = None
    temperature: float | Tensor = 1.0  # a number or [N]
    suppress: Sequence[int] = ()  # ids of probability 0, kept as a tuple
    valid_vocab: int | None = None  # ids from here on have probability 0
    low_rank: tuple[Tensor, Tensor, float] | None = None  # (A [R, H], B [V, R], s): the weight is W + s B A

    def __post_init__(self) -> None:
        if type(self.suppress) is not tuple or self.suppress:
            object.__setattr__(self, "suppress", checks.ids("suppress", self.suppress))

    def keys(self) -> Iterator[str]:
        """Names of the options that differ from their default."""
        return (f.name for f in fields(self) if getattr(self, f.name) is not f.default)

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def normalised(self, dtype: torch.dtype) -> HeadOptions:
        """As a problem holds them: no gradient, numbers as floats, a per-row temperature in `dtype`.

        `low_rank` is left out: a problem holds it as a second pair of operands, see `LowRank`.
        """
        bias, softcap, temperature = self.bias, self.softcap, self.temperature
        if type(temperature) is float and bias is softcap is self.low_rank is None:  # the common case
            return self
        return replace(
            self,
            bias=None if bias is None else bias.detach(),
            softcap=None if softcap is None else float(softcap),
            temperature=temperature.detach().to(dtype) if isinstance(temperature, Tensor) else float(temperature),
            low_rank=None,
        )

    def of_rows(self, rows: slice | Tensor) -> HeadOptions:
        """Those of some rows: a per-row temperature is indexed."""
        return replace(self, temperature=self.temperature[rows]) if isinstance(self.temperature, Tensor) else self

    def excluded(self, vocabulary: int, device: torch.device) -> Tensor | None:
        """bool `[V]`, True where the probability is 0; None where no id is excluded. Must not be written to."""
        if not self.suppress and self.valid_vocab is None:
            return None
        return _excluded(tuple(self.suppress), self.valid_vocab, vocabulary, device)


@functools.lru_cache(maxsize=16)
def _excluded(suppress: tuple[int, ...], valid_vocab: int | None, vocabulary: int, device: torch.device) -> Tensor | None:
    limit = vocabulary if valid_vocab is None else valid_vocab
    if not suppress and limit == vocabulary:
        return None
    with torch.inference_mode(False):  # a later call outside inference mode gets the same tensor
        excluded_V = torch.arange(vocabulary, device=device) >= limit
        if suppress:
            excluded_V[torch.tensor(suppress, device=device)] = True
    return excluded_V


class LowRank(NamedTuple):
    """The operands of a head's adapter: `hidden_MR weight_VR^T` is added to the raw logits. Any floating dtypes."""

    hidden_MR: Tensor  # s h A^T of every row of hidden
    weight_VR: Tensor  # B

    @staticmethod
    def of(hidden: Tensor | None = None, weight_VR: Tensor | None = None) -> LowRank | None:
        """The operands, where there are any; `hidden` is `[..., R]`. No gradient is recorded."""
        return None if hidden is None or weight_VR is None else LowRank(flat(hidden), weight_VR.detach())


class Low(NamedTuple):
    """What a workspace's size needs to know of an adapter: R, the dtype of B, and whether B gets a gradient."""

    rank: int = 0
    dtype: torch.dtype = torch.float32
    gradient: bool = False


NO_LOW = Low()


@dataclass(frozen=True)
class HeadProblem:
    """One head call after validation: `N` rows of `hidden_MH` (all of them where `index_N` is None) against `weight_VH`.

    The final logits are those of `options`, then log-softmax over V. A bias is detached, a per-row temperature in the
    statistics' dtype. `target_N` may be `[N, M]`: several targets per row, see `targets.py`; then `best` may be above 0, and
    so many of the likeliest ids come with the statistics.
    """

    hidden_MH: Tensor
    weight_VH: Tensor
    target_N: Tensor
    index_N: Tensor | None = None
    options: HeadOptions = HeadOptions()
    low_rank: LowRank | None = None
    best: int = 0

    @property
    def rows(self) -> int:
        return len(self.target_N)

    @property
    def several(self) -> bool:
        return self.target_N.dim() == 2

    @property
    def statistics_dtype(self) -> torch.dtype:
        return torch.float64 if self.hidden_MH.dtype == torch.float64 else torch.float32

    @property
    def excluded_V(self) -> Tensor | None:
        """bool `[V]`, True where the probability is 0."""
        return self.options.excluded(self.weight_VH.shape[0], self.hidden_MH.device)

    def select(self, keep_N: Tensor) -> HeadProblem:
        """The same problem on the rows that `keep_N` (int64) names."""
        index_N = keep_N if self.index_N is None else self.index_N[keep_N]
        return replace(self, target_N=self.target_N[keep_N], index_N=index_N, options=self.options.of_rows(keep_N))

    def of_rows(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Its tensors with an entry for each row: targets, indices, temperatures where they differ by row."""
        temperature = self.options.temperature
        return self.target_N, self.index_N, temperature if isinstance(temperature, Tensor) else None

    def without_tensors(self) -> HeadProblem:
        """The problem as it is kept for backward: its tensors are for autograd to save, which notices changes in place."""
        options = self.options if self.options.bias is None else replace(self.options, bias=None)
        if isinstance(options.temperature, Tensor):
            options = replace(options, temperature=1.0)
        return HeadProblem(_NOTHING, _NOTHING, _NOTHING, None, options, best=self.best)

    def with_tensors(
        self,
        of_rows: tuple[Tensor, Tensor | None, Tensor | None],
        hidden: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        *pair: Tensor | None,
    ) -> HeadProblem:
        """What `without_tensors` left out, put back. `hidden` may have any leading dimensions."""
        target_N, index_N, temperature_N = of_rows
        options = self.options if bias is None else replace(self.options, bias=bias.detach())
        if temperature_N is not None:
            options = replace(options, temperature=temperature_N)
        if hidden is None or weight is None:
            return HeadProblem(_NOTHING, _NOTHING, target_N, index_N, options, best=self.best)
        return HeadProblem(flat(hidden), weight.detach(), target_N, index_N, options, LowRank.of(*pair), self.best)


_NOTHING = torch.empty(0, 0)


def flat(hidden: Tensor) -> Tensor:
    """`[..., H]` as `[M, H]`."""
    return hidden if hidden.dim() == 2 else hidden.detach().reshape(-1, hidden.shape[-1])


def check(problem: HeadProblem, *, targets: bool) -> None:
    """Raise ValueError for row indices, and with `targets` for target ids, that the problem does not have.

    Reads values: always on the CPU, on a GPU under DLLM_KERNELS_VALIDATE=1 alone.
    """
    p = problem
    if p.index_N is not None:
        checks.in_range("rows", p.index_N, 0, len(p.hidden_MH))
        if checks.may_read(p.index_N) and bool((p.index_N.bincount(minlength=1) > 1).any()):
            raise ValueError(f"rows must be unique, got {int(p.index_N.bincount().argmax())} more than once")
    if targets:
        name = "target or ids" if p.several else "target"
        checks.in_range(name, p.target_N, 0, len(p.weight_VH))
        excluded_V = p.excluded_V
        if excluded_V is not None and checks.may_read(p.target_N):
            forbidden_N = excluded_V[p.target_N]
            if bool(forbidden_N.any()):
                offender = int(p.target_N[forbidden_N][0])
                raise ValueError(
                    f"{name} must not hold a suppressed id or one beyond valid_vocab: id {offender} has probability 0"
                )


def chunk_rows(rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device, buffers: int = 1) -> int:
    """Rows per chunk: a multiple of ROW_BLOCK that keeps `buffers` chunks of logits inside the workspace budget."""
    budget = WORKSPACE_BYTES.get(device.type, GPU_WORKSPACE_BYTES)
    fit = budget // (vocabulary * dtype.itemsize * buffers) // ROW_BLOCK * ROW_BLOCK
    return min(max(fit, ROW_BLOCK), -(-rows // ROW_BLOCK) * ROW_BLOCK)


def allocate(problem: HeadProblem, outputs: Collection[str]) -> dict[str, Tensor]:
    """Uninitialised results of `run`: statistics `[N]` (logp `[N, M]` of several targets), BEST `[N, best]`, kept operands
    `[N, V]`, all else `[N, H]` in hidden's dtype, beside which with an adapter lies LOW + its name, `[N, R]`."""
    p, rows, dtype = problem, problem.rows, problem.statistics_dtype
    vocabulary = len(p.weight_VH)
    where: dict[str, Any] = (
        {} if p.hidden_MH.is_cpu else {"device": p.hidden_MH.device}
    )  # naming the CPU costs as much as the tensor
    result = {}
    for name in outputs:
        if name in STATISTICS or name in BEST:
            shape = p.target_N.shape if name == "logp" else (rows, p.best) if name in BEST else (rows,)
            result[name] = torch.empty(shape, dtype=torch.int64 if name in ("top_id", "best_id") else dtype, **where)
        elif name in OPERANDS:
            result[name] = empty_operand(p.hidden_MH, rows, vocabulary)
        else:
            result[name] = p.hidden_MH.new_empty(p.rows, p.hidden_MH.shape[1])
            if p.low_rank is not None:
                result[LOW + name] = torch.empty(rows, p.low_rank.hidden_MR.shape[1], dtype=dtype, **where)
    return result


def empty_operand(like: Tensor, rows: int, vocabulary: int) -> Tensor:
    """A kept operand `[N, V]`, which lies in memory as `[V, N]` on every backend: the products of backward read it so."""
    return like.new_empty(vocabulary, rows).t()


def rounded_once(run: _Run) -> _Run:
    """A backend's `run` or `from_operands` that adds the weight's gradient up in the statistics' dtype, for a `dweight_VH` of
    16 bits too (with `overwrite` then): it is rounded into that once, from a buffer beside it."""

    @functools.wraps(run)
    def called(problem: HeadProblem, *more: Any, dweight_VH: Tensor | None = None, **named: Any) -> dict[str, Tensor]:
        if dweight_VH is None or dweight_VH.dtype == problem.statistics_dtype:
            return run(problem, *more, dweight_VH=dweight_VH, **named)
        sums_VH = torch.empty(dweight_VH.shape, dtype=problem.statistics_dtype, device=dweight_VH.device)
        result = run(problem, *more, dweight_VH=sums_VH, **named)
        dweight_VH.copy_(sums_VH)
        return result

    return cast(_Run, called)


def weight_sum_bytes(rows: int, hidden_size: int, vocabulary: int, dtype: torch.dtype, *, stored: bool = False) -> int:
    """What `rounded_once` takes beside a weight's gradient. `stored`: with `from_operands`."""
    return 4 * vocabulary * hidden_size if dtype.itemsize == 2 else 0


def zero(*buffers: Tensor | None) -> None:
    """Clear the gradient buffers that are there: the result of a call without rows."""
    for buffer in buffers:
        if buffer is not None:
            buffer.zero_()
