"""Where the gradient of a head's weight is added up over several calls, so that none of them makes a `[V, H]` of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_kernels import checks

_WIDE = (torch.float32, torch.float64)
_ROWS_AT_ONCE = 4096  # of sums that are rounded into a gradient


class WeightSum:
    """Sums of the gradient of one parameter: its `.grad` where that has at least 32 bits, else a buffer in fp32.

    A head call with one adds dW to `tensor`, and hands autograd none. `written`: whether `tensor` holds something; before, it is
    overwritten. With the plan "coef" the sums grow in the forward pass, so its backward has to follow, with an upstream
    gradient of 1.
    """

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = parameter
        self._kind = getattr(parameter, "grad_dtype", None) or parameter.dtype  # of a new `.grad`
        self.in_grad = self._kind in _WIDE
        self._fresh(self._kind if self.in_grad else torch.float32)

    def _fresh(self, dtype: torch.dtype) -> None:
        shape, device = self.parameter.shape, self.parameter.device
        grad = self.parameter.grad if self.in_grad else None
        self.written = grad is not None
        self.tensor = torch.empty(shape, dtype=dtype, device=device) if grad is None else grad

    def takes(self, dtype: torch.dtype) -> bool:
        """Whether the next call, whose sums are in `dtype`, can add to it: a `.grad` may have any strides, or a graph."""
        if self.in_grad and self.parameter.grad is not (self.tensor if self.written else None):
            self._fresh(self.tensor.dtype)
        sums = self.tensor
        if sums.dtype != dtype or sums.layout != torch.strided or sums.requires_grad:
            return False
        return sums.stride(1) == 1 and sums.stride(0) >= sums.shape[1] and not checks.may_overlap(sums, self.parameter)

    def added(self) -> None:
        """A call has added to the tensor, behind autograd's back."""
        torch.autograd.graph.increment_version(self.tensor)
        self.written = True
        if self.in_grad and self.parameter.grad is None:
            self.parameter.grad = self.tensor

    def finish(self) -> None:
        """Add the sums to `.grad` where they are not there: rounded once, after all calls."""
        if self.in_grad or not self.written:
            return
        grad = self.parameter.grad
        with torch.no_grad():
            if grad is None:
                self.parameter.grad = self.tensor.to(self._kind)
            else:
                for start in range(0, len(grad), _ROWS_AT_ONCE):
                    grad[start : start + _ROWS_AT_ONCE] += self.tensor[start : start + _ROWS_AT_ONCE]
        self.written = False
