"""What a call of `accumulate` did: passes, rows, FLOPs by formula or counted, seconds, peak memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dllm_kernels.model.headless import Body

# of one N x H x V product, 2NHV: `score_tokens` with a gradient, by its plan and whether the head trains
_HEAD_FACTORS = {"forward": 2, "unit": 4, "keep": 6, "recompute": 8}


@dataclass(frozen=True)
class Report:
    """What `accumulate` did. Tensors are detached; nothing here was read back from the device."""

    loss: Tensor  # scalar: this call's share of the step's loss
    sample_elbo_BK: Tensor  # per-sample ELBOs under the policy, nats; NaN where the sample was dropped and not scored
    passes: int
    forwards: int
    backwards: int
    rows: int  # rows through the head, both passes
    seconds: float
    flops: int  # 2NHV per product of the head, 2 x parameters x tokens for the body, three times that with backward
    counted_flops: int | None = None  # where asked for: by FlopCounterMode, with attention, without products that are not torch's
    peak_memory: int | None = None  # bytes, where asked for: the allocator's on a GPU, resident ones on Linux


class Meter:
    """Counts as the engine runs. `running` times it, and measures what was asked for."""

    def __init__(self, body: Body) -> None:
        self._head = body.parameter
        self._others = 0
        self.device = body.parameter.device
        embeddings = {id(module.weight) for module in body.model.modules() if isinstance(module, torch.nn.Embedding)}
        left_out = {id(body.parameter), *embeddings}  # looked up, or counted by rows
        self._parameters = sum(p.numel() for p in body.model.parameters() if id(p) not in left_out)
        self.forwards = self.backwards = self.rows = self.flops = 0
        self.seconds = 0.0
        self.counted_flops: int | None = None
        self.peak_memory: int | None = None

    def ran(self, tokens: int, rows: int, plan: str, *, backward: bool) -> None:
        """One call of the model, and of the head under `plan` ("coef" too)."""
        vocabulary, hidden = self._head.shape
        factor = (6 if self._head.requires_grad else 4) if plan == "coef" else _HEAD_FACTORS[plan]
        self.forwards, self.backwards, self.rows = self.forwards + 1, self.backwards + backward, self.rows + rows
        self.flops += factor * rows * hidden * vocabulary + (6 if backward else 2) * self._parameters * tokens

    @contextmanager
    def running(self, *, count_flops: bool, measure_memory: bool) -> Iterator[None]:
        if measure_memory:
            _reset_peak(self.device)
        started = time.perf_counter()
        if count_flops:
            from torch.utils.flop_counter import FlopCounterMode, addmm_flop  # imports triton where there is one

            with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_flop}) as counter:
                yield
            self.counted_flops = int(counter.get_total_flops())
        else:
            yield
        self.seconds = time.perf_counter() - started
        self.peak_memory = _peak(self.device) if measure_memory else None


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif (file := Path("/proc/self/clear_refs")).exists():
        file.write_text("5")  # Linux: the peak of the resident set starts anew


def _peak(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    file = Path("/proc/self/status")
    if device.type != "cpu" or not file.exists():
        return None
    return int(file.read_text().split("VmHWM:")[1].split()[0]) * 1024
