"""The report of a call of `accumulate`: loss, scores, passes, rows, FLOPs by formula, seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from dllm_kernels.head.plans import gemms
from dllm_kernels.model.headless import Body


@dataclass(frozen=True)
class Report:
    """The result of `accumulate`. Tensors are float64, detached, and stay on the device."""

    loss: Tensor  # scalar: this call's share of the step's loss
    sample_elbo_BK: Tensor  # under the policy, nats; NaN for skipped samples
    passes: int
    forwards: int
    backwards: int
    rows: int  # through the head, over both passes
    seconds: float
    # 2NHV per product of the head, 2 x parameters x tokens for the body, three times that with backward
    flops: int


class Meter:
    """Counts as the passes run; `running` times it."""

    def __init__(self, body: Body) -> None:
        self._head = body.parameter
        embeddings = {id(module.weight) for module in body.model.modules() if isinstance(module, torch.nn.Embedding)}
        left_out = {id(body.parameter), *embeddings}  # embeddings are looked up; the head is counted by rows
        self._parameters = sum(p.numel() for p in body.model.parameters() if id(p) not in left_out)
        self.forwards = self.backwards = self.rows = self.flops = 0
        self.seconds = 0.0

    def ran(self, tokens: int, rows: int, plan: str, *, backward: bool) -> None:
        """Count one call of the model, and one of the head under `plan`."""
        vocabulary, hidden = self._head.shape
        products = sum(gemms(plan, need_dhidden=True, need_dweight=self._head.requires_grad))
        self.forwards, self.backwards, self.rows = self.forwards + 1, self.backwards + backward, self.rows + rows
        self.flops += 2 * products * rows * hidden * vocabulary + (6 if backward else 2) * self._parameters * tokens

    @contextmanager
    def running(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds = time.perf_counter() - started
