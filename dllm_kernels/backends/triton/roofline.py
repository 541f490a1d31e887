"""The least time that a head call can take on a GPU: its phases as operations and bytes, against what datasheets promise.

The phases are those of the Triton backend. Each takes the longer of its arithmetic and its traffic, and they run one after
the other, since every one reads what the one before wrote. These are predictions, and lower bounds: no launch, no cache miss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dllm_kernels import checks
from dllm_kernels.backends.triton.configs import SEGMENT, chunk_rows, spans

SECOND_READ = 4 + 4  # bytes per logit: the row kernel reads fp32 for the statistics, and again for the operand


@dataclass(frozen=True)
class Device:
    """Datasheet rates: dense 16-bit and fp32 TFLOP/s, memory in GB/s."""

    name: str
    tflops_16bit: float
    tflops_fp32: float
    gbytes: float


DEVICES = {
    "A100": Device("A100 SXM 80 GB", 312.0, 19.5, 2039.0),
    "H100": Device("H100 SXM", 989.4, 66.9, 3350.0),
    "H200": Device("H200 SXM", 989.4, 66.9, 4800.0),
    "MI300": Device("MI300X", 1307.4, 163.4, 5300.0),
}


@dataclass(frozen=True)
class Phase:
    """Matrix operations and bytes of device memory that one kernel, or one walk over all chunks of it, needs."""

    name: str
    flops: int
    traffic: int


@dataclass(frozen=True)
class Bound:
    """Seconds: of all arithmetic, of all traffic, and of the phases one after the other, each the longer of its two."""

    arithmetic: float
    traffic: float
    seconds: float


def bound(phases: Sequence[Phase], device: str, itemsize: int) -> Bound:
    """Against a device of DEVICES. Raises ValueError for another one."""
    checks.choice("device", device, list(DEVICES))
    rates = DEVICES[device]
    flops, bytes_ = (rates.tflops_16bit if itemsize == 2 else rates.tflops_fp32) * 1e12, rates.gbytes * 1e9
    return Bound(
        sum(phase.flops for phase in phases) / flops,
        sum(phase.traffic for phase in phases) / bytes_,
        sum(max(phase.flops / flops, phase.traffic / bytes_) for phase in phases),
    )


def phases(
    plan: str,
    rows: int,
    hidden_size: int,
    vocabulary: int,
    itemsize: int,
    *,
    dhidden: bool,
    dweight: bool,
    vectors: int,
    rank: int = 0,
    dlow: bool = False,
) -> tuple[Phase, ...]:
    """What a plan of `dllm_kernels.head.plans` runs, forward and backward; `vectors` as of `plans.late_vectors`.

    rank, dlow: of an adapter, whose product goes over each chunk of logits once more, and whether its B gets a gradient.
    """
    N, H, V, item = rows, hidden_size, vocabulary, itemsize
    flops = 2 * N * H * V
    second = vectors > 1 and plan in ("unit", "keep")
    cuts = spans(N, chunk_rows(V, 4 + item * second, "cuda"))
    walks = len(cuts)  # each reads the whole weight once per product
    low = 2 * N * rank * V
    logits: tuple[Phase, ...] = (Phase("logits", flops, N * H * item + walks * V * H * item + 4 * N * V),)
    logits += (Phase("logits of the adapter", low, 8 * N * V),) * (rank > 0)
    statistics = Phase("row kernel", 0, 4 * N * V)
    operands = Phase("row kernel", 0, N * V * (SECOND_READ + item * (1 + second)))
    vector: tuple[Phase, ...] = (Phase("dH", flops, N * V * item + walks * V * H * item + 4 * N * H),)
    vector += (Phase("dH by the adapter", low, N * V * item),) * (rank > 0)
    weight = Phase("dW", flops, N * V * item + N * H * item + 4 * V * H * max(2 * walks - 1, 0))
    gradients = vector * dhidden + (weight,) * dweight + (Phase("dB", low, N * V * item),) * dlow
    if plan == "forward" or plan == "recompute":
        parts = -(-V // SEGMENT) * 28 * N
        fused = (Phase("fused", flops + 3 * low, (N + V) * H * item + parts), Phase("merge", 0, parts))
        once = fused if item == 2 else (*logits, statistics)
        return once if plan == "forward" else (*once, *logits, operands, *gradients)
    if plan == "unit":
        return (*logits, operands, *(vector * (vectors * dhidden)))
    if plan == "coef":
        return (*logits, operands if gradients else statistics, *gradients)
    stored = Phase("operand to memory", 0, 2 * N * V * item * vectors)
    combined = Phase("operands times coefficients", 0, N * V * item * (vectors + 1))
    return (*logits, operands, stored, combined, *gradients)
