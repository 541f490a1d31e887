"""What a call of `expected_embedding` costs, from sizes alone, for `explain` and for the FLOP formulas of its ops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dllm_kernels.backends.expectation import walk
from dllm_kernels.backends.triton.roofline import Phase
from dllm_kernels.head.expectation import Wants

_WHY = {
    "forward": "nothing wants a gradient",
    "recompute": "backward makes the logits again, from two numbers of a row and its expectation",
}


@dataclass(frozen=True)
class Sizes:
    """Of a call: N rows of M positions, widths of head and embedding, the adapter's rank, V ids of which `walked` have a
    probability."""

    rows: int
    positions: int
    width: int
    embedding_width: int
    rank: int
    vocabulary: int
    walked: int
    dtype: torch.dtype
    embedding_dtype: torch.dtype | None  # None: tied
    low_dtype: torch.dtype | None
    wants: Wants
    indexed: bool
    device: torch.device

    @property
    def gradient(self) -> bool:
        return self.wants.logits or self.wants.embedding

    @property
    def statistics_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def out_dtype(self) -> torch.dtype:
        return self.dtype if self.embedding_dtype is None else self.embedding_dtype

    @property
    def to_table(self) -> bool:
        """Whether an embedding gets a gradient, be it the weight."""
        return self.wants.embedding or (self.embedding_dtype is None and self.wants.head.weight)

    def flops(self, *, backward: bool) -> int:
        """Of the matrix products of one half of the call."""
        logits = self.width + self.rank
        if not backward:
            return 2 * self.rows * self.walked * (logits + self.embedding_width)
        needs = self.wants.head
        gradients = self.width * (needs.hidden + needs.weight) + self.rank * (needs.low_hidden + needs.low_weight)
        of_table = self.embedding_width * (self.wants.logits + self.to_table)
        return 2 * self.rows * self.walked * (logits + gradients + of_table)

    def products(self) -> tuple[int, int]:
        """Forward and backward, each of some 2 N H V operations."""
        needs = self.wants.head
        gradients = needs.vectors + (needs.weight or needs.low_weight)
        return 2, (1 + self.wants.logits + gradients + self.to_table if self.gradient else 0)

    def workspace(self, *, backward: bool) -> int:
        """Bytes beside results and what is stored: slabs of logits and of weights, and the rows where they are copied."""
        N, D, wide, needs = self.rows, self.embedding_width, self.statistics_dtype.itemsize, self.wants.head
        widest = max(self.width, D, self.rank)
        ids = walk.slab_ids(N, widest, self.walked, self.device)
        tables = [(self.width, self.dtype)]
        if self.embedding_dtype is not None:
            tables.append((D, self.embedding_dtype))
        if self.low_dtype is not None:
            tables.append((self.rank, self.low_dtype))
        copies = {width for width, dtype in tables if dtype.itemsize != wide}
        size = ids * N * wide * (1 + (backward and self.wants.logits))
        size += ids * sum(width for width, dtype in tables if dtype.itemsize != wide) * wide
        rows = sum(
            width for width, narrow in ((self.width, self.dtype.itemsize != wide), (self.rank, False)) if narrow or self.indexed
        )
        size += N * rows * wide
        if backward:
            written = {self.width} if needs.weight else set()
            written |= {D} if self.wants.embedding else set()
            size += ids * sum(copies & written) * wide
            size += N * D * wide * (self.wants.logits + 2 * (self.out_dtype.itemsize != wide))
        return size

    def cost(self, backend: str) -> dict[str, Any]:
        """The fields of `explain`'s result that are not given."""
        wants, needs = self.wants, self.wants.head
        N, H, V, D, R = self.rows, self.width, self.vocabulary, self.embedding_width, self.rank
        item, wide = self.dtype.itemsize, self.statistics_dtype.itemsize
        low_item = 0 if self.low_dtype is None else self.low_dtype.itemsize
        out = N * D * self.out_dtype.itemsize
        outputs = out + self.positions * R * wide
        head = needs.weight * V * H * item + needs.low_weight * V * R * low_item + needs.bias * V * wide
        head += wants.embedding * V * D * self.out_dtype.itemsize
        compact = N * (needs.hidden * H + needs.low_hidden * R) * wide
        scattered = self.positions * (needs.hidden * H * item + needs.low_hidden * R * wide)
        stored = self.gradient * (N * D + 2 * N) * wide
        spaces = self.workspace(backward=False), self.workspace(backward=True) if self.gradient else 0
        kept = stored if self.gradient else N * D * wide * (self.out_dtype.itemsize != wide)
        peak = outputs + kept + spaces[0]
        if self.gradient:
            peak = max(peak, outputs + stored + out + spaces[1] + compact + scattered + head)
        plan = "recompute" if self.gradient else "forward"
        flops = self.flops(backward=False), self.flops(backward=True) if self.gradient else 0
        forward, backward = self.products()
        phases = self._phases()
        return {
            "plan": plan,
            "why": _WHY[plan],
            "backend": backend,
            "rows": N,
            "hidden_size": H,
            "vocabulary": V,
            "dtype": self.dtype,
            "forward_gemms": forward,
            "backward_gemms": backward,
            "flops": sum(flops),
            "passes": 1 + self.gradient,
            "traffic_bytes": self._traffic() + outputs + head + scattered,
            "workspace_bytes": max(spaces),
            "stored_bytes": stored,
            "gradient_bytes": head + scattered,
            "output_bytes": outputs,
            "peak_bytes": peak,
            "phases": phases,
        }

    def _traffic(self) -> int:
        """What the products must read at least."""
        head = (self.rows + self.walked) * self.width * self.dtype.itemsize
        table = (self.rows + self.walked) * self.embedding_width * self.out_dtype.itemsize
        needs = self.wants.head
        backward = head * (1 + needs.vectors + needs.weight) + table * (self.wants.logits + self.to_table)
        return head + table + self.gradient * backward

    def _phases(self) -> tuple[Phase, ...]:
        N, V, H, D, item, out = (
            self.rows,
            self.walked,
            self.width,
            self.embedding_width,
            self.dtype.itemsize,
            self.out_dtype.itemsize,
        )
        logits = Phase("logits", 2 * N * H * V, (N + V) * H * item + 4 * N * V)
        mean = Phase("expectation", 2 * N * D * V, N * V * out + V * D * out + 8 * N * D)
        forward = (logits, Phase("exponentials", 0, (8 + out) * N * V), mean)
        if not self.gradient:
            return forward
        needs = self.wants.head
        upstream = Phase("upstream by id", 2 * N * D * V, (N + V) * D * out + 4 * N * V)
        operand = Phase("operand", 0, (4 + 4 * self.wants.logits + item * self.wants.logits + out * self.to_table) * N * V)
        vector = Phase("dH", 2 * N * H * V, N * V * item + V * H * item + 8 * N * H)
        weight = Phase("dW", 2 * N * H * V, N * (V + H) * item + V * H * item)
        table = Phase("dE", 2 * N * D * V, N * (V + D) * out + V * D * out)
        gradients = (*(vector,) * needs.hidden, *(weight,) * needs.weight, *(table,) * self.to_table)
        return (*forward, logits, *(upstream,) * self.wants.logits, operand, *gradients)
