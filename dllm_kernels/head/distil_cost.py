"""What a call of `distillation_loss` costs, from sizes alone, for `explain` and for the FLOP formulas of its ops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dllm_kernels.backends.divergence import walk
from dllm_kernels.backends.triton.roofline import Phase
from dllm_kernels.head.forward_backward import Needs

_WHY = {
    "forward": "nothing wants a gradient",
    "coef": "the rows' coefficients are known, so all gradients come with the forward pass",
    "unit": "the head is frozen: a gradient vector of each row is stored, and a late coefficient multiplies it",
    "recompute": "the head trains and coefficients come late: backward makes the logits of both heads again",
}


@dataclass(frozen=True)
class Sizes:
    """Of a call: N rows of M positions, both heads' widths, the adapter's rank, V ids of which `walked` have a probability."""

    rows: int
    positions: int
    width: int
    teacher_width: int
    rank: int
    vocabulary: int
    walked: int
    dtype: torch.dtype
    teacher_dtype: torch.dtype
    low_dtype: torch.dtype | None
    needs: Needs
    indexed: bool
    device: torch.device
    kind: str
    plan: str

    @property
    def statistics_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def course(self) -> walk.Course:
        """That of the forward pass."""
        of_weights = []
        if self.plan == "coef" and self.needs.weight:
            of_weights.append(self.width * self.dtype.itemsize)
        if self.plan == "coef" and self.needs.low_weight and self.low_dtype is not None:
            of_weights.append(self.rank * self.low_dtype.itemsize)
        trains = self.plan == "coef" and (self.needs.bias or bool(of_weights))
        gradient = self.plan in ("coef", "unit")
        widest = max(width for width, _ in self.products)
        sizes = self.rows, self.walked, widest, self.statistics_dtype, self.device
        return walk.course(*sizes, self.kind, gradient, of_weights if trains else None)

    def flops(self, *, backward: bool) -> int:
        """Of the matrix products of one half of the call."""
        if backward:  # where nothing is made again, operands come empty
            logit_rows = self.rows if self.plan == "recompute" else 0
        else:
            logit_rows = self.course.logit_rows(self.rows)
        logits = logit_rows * (self.width + self.rank + self.teacher_width)
        needs, gradients = self.needs, 0
        if self.plan == "recompute" if backward else self.plan in ("coef", "unit"):
            gradients = self.width * (needs.hidden + needs.weight) + self.rank * (needs.low_hidden + needs.low_weight)
        return 2 * self.walked * (logits + self.rows * gradients)

    def workspace(self) -> int:
        """Bytes beside results: slabs, one of a weight, gathered rows, and the room where logits wait."""
        way, wide = self.course, self.statistics_dtype.itemsize
        chunk = min(way.chunk, self.rows)
        gradient = self.plan != "forward"
        slabs = 2 * (way.kept < way.chunk or way.walks == 1 or self.plan == "recompute") + gradient
        size = slabs * way.slab * chunk * wide
        converted = [width for width, dtype in self.products if dtype.itemsize != wide]
        size += way.slab * max(converted, default=0) * wide
        copied = sum(width for width, dtype in self.products if dtype.itemsize != wide or self.indexed)
        size += self.rows * copied * wide
        return size + (2 * way.kept * self.walked * wide if way.own_room else 0)

    @property
    def products(self) -> list[tuple[int, torch.dtype]]:
        found = [(self.width, self.dtype), (self.teacher_width, self.teacher_dtype)]
        return found if self.low_dtype is None else [*found, (self.rank, self.low_dtype)]

    def cost(self, backend: str) -> dict[str, Any]:
        """The fields of `explain`'s result that are not given."""
        needs, plan, way = self.needs, self.plan, self.course
        N, H, V, R = self.rows, self.width, self.vocabulary, self.rank
        item, wide = self.dtype.itemsize, self.statistics_dtype.itemsize
        gradients = needs.vectors + (needs.weight or needs.low_weight)
        late = plan == "recompute"
        again = 2 * (way.walks - 1) * (way.kept < way.chunk)
        low_item = 0 if self.low_dtype is None else self.low_dtype.itemsize
        compact = N * (needs.hidden * H + needs.low_hidden * R) * wide
        head = needs.weight * V * H * item + needs.low_weight * V * R * low_item + needs.bias * V * wide
        scattered = self.positions * (needs.hidden * H * item + needs.low_hidden * R * wide)
        outputs = (1 + N) * wide + (self.positions * R * wide if R else 0)
        space = self.workspace()
        stored = {"forward": 0, "coef": compact + head, "unit": compact, "recompute": 3 * N * wide}[plan]
        flops = self.flops(backward=False), self.flops(backward=True)
        return {
            "plan": plan,
            "why": _WHY[plan],
            "backend": backend,
            "rows": N,
            "hidden_size": H,
            "vocabulary": V,
            "dtype": self.dtype,
            "forward_gemms": 2 + again + (gradients if plan in ("coef", "unit") else 0),
            "backward_gemms": 2 + gradients if late else 0,
            "flops": sum(flops),
            "passes": way.walks + late,
            "traffic_bytes": self._traffic() + outputs + (head + scattered if plan != "forward" else 0),
            "workspace_bytes": space,
            "stored_bytes": stored,
            "gradient_bytes": 0 if plan == "forward" else head + scattered,
            "output_bytes": outputs,
            "peak_bytes": outputs + space + (0 if plan == "forward" else compact + head * (plan != "unit") + scattered),
            "phases": self._phases(),
        }

    def _traffic(self) -> int:
        """What the products must read at least."""
        student = (self.rows + self.walked) * self.width * self.dtype.itemsize
        teacher = (self.rows + self.walked) * self.teacher_width * self.teacher_dtype.itemsize
        makes = 1 + (self.plan == "recompute")
        gradients = 0 if self.plan == "forward" else self.needs.vectors + self.needs.weight
        return makes * (student + teacher) + gradients * student

    def _phases(self) -> tuple[Phase, ...]:
        N, V, item = self.rows, self.walked, self.dtype.itemsize
        logits = tuple(
            Phase(f"logits of the {who}", 2 * N * width * V, (N + V) * width * kind.itemsize + 4 * N * V)
            for who, width, kind in (("student", self.width, self.dtype), ("teacher", self.teacher_width, self.teacher_dtype))
        )
        look, mix = Phase("statistics", 0, 8 * N * V), (Phase("mixture", 0, 8 * N * V),) * (self.kind == "jsd")
        flops = 2 * N * self.width * V
        vector = Phase("dH", flops, N * V * item + V * self.width * item + 8 * N * self.width)
        weight = Phase("dW", flops, N * (V + self.width) * item + V * self.width * item)
        gradients = (Phase("operand", 0, (8 + item) * N * V), *(vector,) * self.needs.hidden, *(weight,) * self.needs.weight)
        first = (*logits, look, *mix)
        if self.plan == "forward":
            return first
        return (*first, *(logits if self.plan == "recompute" else ()), *gradients)
