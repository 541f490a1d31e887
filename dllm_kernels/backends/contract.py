"""What every backend of the head is given, and what it must return."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dllm_kernels import checks

ROW_BLOCK = 256  # rows of every GEMM: one shape, hence one summation order, whatever N is
WORKSPACE_BYTES = {"cpu": 256 << 20}
GPU_WORKSPACE_BYTES = 512 << 20
STATISTICS = ("logp", "lse", "entropy", "top_logp", "top_id")


@dataclass(frozen=True)
class HeadProblem:
    """One head call after validation: `N` rows of `hidden_MH` (all of them where `index_N` is None) against `weight_VH`.

    `z = softcap * tanh((h W^T + b) / softcap) / temperature`, excluded ids at -inf, then log-softmax over V.
    """

    hidden_MH: Tensor
    weight_VH: Tensor
    target_N: Tensor
    index_N: Tensor | None = None
    bias_V: Tensor | None = None
    softcap: float | None = None
    temperature: float | Tensor = 1.0
    excluded_V: Tensor | None = None

    @property
    def rows(self) -> int:
        return self.target_N.numel()

    @property
    def statistics_dtype(self) -> torch.dtype:
        return torch.float64 if self.hidden_MH.dtype == torch.float64 else torch.float32

    def select(self, keep_N: Tensor) -> HeadProblem:
        """The same problem on the rows that `keep_N` (int64) names."""
        index_N = keep_N if self.index_N is None else self.index_N[keep_N]
        temperature = self.temperature[keep_N] if isinstance(self.temperature, Tensor) else self.temperature
        return HeadProblem(
            self.hidden_MH,
            self.weight_VH,
            self.target_N[keep_N],
            index_N,
            self.bias_V,
            self.softcap,
            temperature,
            self.excluded_V,
        )


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
        checks.in_range("target", p.target_N, 0, len(p.weight_VH))
        if p.excluded_V is not None and checks.may_read(p.target_N):
            forbidden_N = p.excluded_V[p.target_N]
            if bool(forbidden_N.any()):
                offender = int(p.target_N[forbidden_N][0])
                raise ValueError(
                    f"target must not hold a suppressed id or one beyond valid_vocab: id {offender} has probability 0"
                )


def chunk_rows(rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device, buffers: int = 1) -> int:
    """Rows per chunk: a multiple of ROW_BLOCK that keeps `buffers` chunks of logits inside the workspace budget."""
    budget = WORKSPACE_BYTES.get(device.type, GPU_WORKSPACE_BYTES)
    fit = budget // (vocabulary * dtype.itemsize * buffers) // ROW_BLOCK * ROW_BLOCK
    return min(max(fit, ROW_BLOCK), -(-rows // ROW_BLOCK) * ROW_BLOCK)
