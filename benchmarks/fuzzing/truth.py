"""What a call must return, in float64 from the formulas alone, and how far rounding may take it.

A bound is first-order error analysis for each element: the sum of absolute values behind it, times a few units in the last
place. Where a result exceeds it, `calls` allows twice what PyTorch's own result in the same dtype is off.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from benchmarks.fuzzing.problems import Problem

TINY = 1e-36  # exponentials below 1e-38 are 0 by design
_T = TypeVar("_T")


class Bounded(NamedTuple):
    exact: Tensor
    bound: Tensor
    size: Tensor | None = None  # of gradients: the sum of the absolute values of the terms


Terms = tuple[tuple[Tensor, Tensor], ...]  # ids and their coefficients, [N, M] each


class Truth:
    """Of one problem."""

    def __init__(self, problem: Problem) -> None:
        self.problem = p = problem
        self._known: dict[Any, Any] = {}
        self.eps = torch.finfo(torch.float64 if p.dtype == torch.float64 else torch.float32).eps
        self.h_NH = p.hidden.double().reshape(-1, p.hidden.shape[-1])[p.index]
        self.W_VH = p.weight.double()
        self.N, self.V, self.H = len(self.h_NH), *self.W_VH.shape
        options = p.options
        z_NV, size_NV = self.h_NH @ self.W_VH.t(), self.h_NH.abs() @ self.W_VH.abs().t()
        self.low: tuple[Tensor, Tensor, float] | None = None
        if "low_rank" in options:
            down_RH, up_VR, scale = options["low_rank"]
            self.low = down_RH.double(), up_VR.double(), scale
            z_NV = z_NV + scale * (self.h_NH @ self.low[0].t()) @ self.low[1].t()
            size_NV = size_NV + 2 * abs(scale) * (self.h_NH.abs() @ self.low[0].abs().t()) @ self.low[1].abs().t()
        bias = options.get("bias")
        if bias is not None:
            z_NV = z_NV + bias.double()
            size_NV = size_NV + bias.double().abs().masked_fill(bias == -torch.inf, 0.0)
        temperature = options.get("temperature", 1.0)
        T_N1 = (
            temperature.double()[:, None]
            if isinstance(temperature, Tensor)
            else torch.tensor(float(temperature), dtype=torch.float64)
        )
        slope_NV, flat_NV = torch.ones_like(z_NV), torch.zeros_like(z_NV)
        if cap := options.get("softcap"):
            tanh_NV = torch.tanh(z_NV / cap)
            slope_NV, z_NV = 1 - tanh_NV**2, cap * tanh_NV
            flat_NV = 4 * self.eps * (1 + size_NV / cap)  # a slope near 0 is the difference of two numbers near 1
        self.excluded_V = excluded_V = torch.zeros(self.V, dtype=torch.bool)
        excluded_V[list(options.get("suppress", ()))] = True
        excluded_V[options.get("valid_vocab", self.V) :] = True
        self.z_NV = (z_NV / T_N1).masked_fill(excluded_V, -torch.inf)
        self.lse_N = self.z_NV.logsumexp(-1)
        self.logp_NV = self.z_NV - self.lse_N[:, None]
        self.p_NV = self.logp_NV.exp()
        self.finite_NV = self.logp_NV.masked_fill(self.p_NV == 0, 0.0)
        self.entropy_N = -(self.p_NV * self.finite_NV).sum(-1)
        self.slope_NV, self.flat_NV = slope_NV / T_N1, flat_NV / T_N1
        largest_N = (size_NV / T_N1).masked_fill(excluded_V, 0.0).amax(-1) if self.N else size_NV.sum(-1)
        self.logit_error_N = self.eps * (4 + math.sqrt(self.H)) * (largest_N + self.z_NV.amax(-1).abs() if self.N else largest_N)

    def once(self, key: Any, make: Callable[[], _T]) -> _T:
        """What `make` returns, made at the first call with this key: every instruction set is held to the same numbers."""
        if key not in self._known:
            self._known[key] = make()
        found: _T = self._known[key]
        return found

    # --- statistics -----------------------------------------------------------------------------------------------

    def at(self, ids_N: Tensor) -> Tensor:
        return self.logp_NV.gather(1, ids_N[:, None])[:, 0]

    @functools.cached_property
    def others_NV(self) -> Tensor:
        """1 - p, of the likeliest id as the sum of the others: it may be less than float64 resolves beside 1."""
        others_NV = 1 - self.p_NV
        if self.N:
            best_N1 = self.p_NV.argmax(1, keepdim=True)
            others_NV.scatter_(1, best_N1, self.p_NV.scatter(1, best_N1, 0.0).sum(1, keepdim=True))
        return others_NV

    @functools.cached_property
    def statistics(self) -> dict[str, Bounded]:
        e_N = 2 * self.logit_error_N + 8 * self.eps
        logp_N, top_N = self.at(self.problem.target), self.logp_NV.amax(-1) if self.N else self.lse_N
        log_V = math.log(self.V)
        return {
            "logp": Bounded(logp_N, e_N + 4 * self.eps * logp_N.abs().clamp(max=1e30)),
            "lse": Bounded(self.lse_N, e_N + 4 * self.eps * self.lse_N.abs()),
            "top_logp": Bounded(top_N, e_N + 4 * self.eps * top_N.abs()),
            "entropy": Bounded(self.entropy_N, e_N * (2 + 2 * log_V) + self.eps * (16 + 4 * log_V)),
        }

    def logp_of(self, ids: Tensor) -> Bounded:
        """Of ids `[N, M]`."""
        return self.once(("logp", _bytes(ids)), lambda: self._logp_of(ids))

    def _logp_of(self, ids: Tensor) -> Bounded:
        logp_NM, e_N = self.logp_NV.gather(1, ids), 2 * self.logit_error_N + 8 * self.eps
        return Bounded(logp_NM, e_N[:, None] + 4 * self.eps * logp_NM.abs().clamp(max=1e30))

    def weighted_sum(self, coef: Tensor | None, entropy_coef: Tensor | None, ids: Tensor | None = None) -> Bounded:
        """With `ids` the coefficients are `[N, 1 + M]`, the target's first."""
        statistics, exact, bound = self.statistics, torch.zeros(()).double(), torch.zeros(()).double()
        targets = self.problem.target[:, None] if ids is None else torch.cat((self.problem.target[:, None], ids), 1)
        logp = self.logp_of(targets) if coef is not None and coef.dim() == 2 else statistics["logp"]
        for (value_N, error_N, _), c in ((logp, coef), (statistics["entropy"], entropy_coef)):
            if c is None:
                continue
            terms_N = torch.where(c == 0, 0.0, c.double() * value_N)
            exact = exact + terms_N.sum()
            bound = bound + (c.double().abs() * error_N).sum() + self.eps * (4 + c.numel() ** 0.5) * terms_N.abs().sum()
        return Bounded(exact, bound)

    # --- gradients ------------------------------------------------------------------------------------------------

    def gradients(
        self,
        coef: Tensor | None,
        entropy_coef: Tensor | None,
        terms: Terms = (),
        lse_coef: Tensor | None = None,
        *,
        rounded: float = 0.0,
        flushed: float = 0.0,
        extra: float = 0.0,
    ) -> dict[str, Bounded]:
        """Of hidden, weight, bias and an adapter, of a problem's own coefficients and those of `terms`: ids and coefficients
        `[N, M]`. `rounded`, `flushed`: relative and absolute rounding of stored operands; `extra`: relative error of the
        coefficients.
        """
        of_terms = tuple(_bytes(ids) for ids, _ in terms)
        key = "gradients", rounded, flushed, extra, of_terms, coef is None, lse_coef is None
        return self.once(key, lambda: self._gradients(coef, entropy_coef, terms, lse_coef, rounded, flushed, extra))

    def _gradients(
        self,
        coef: Tensor | None,
        entropy_coef: Tensor | None,
        terms: Terms,
        lse_coef: Tensor | None,
        rounded: float,
        flushed: float,
        extra: float,
    ) -> dict[str, Bounded]:
        zero_N, p_NV = torch.zeros(self.N).double(), self.p_NV
        c_N1, e_N1 = ((zero_N if c is None else c.double())[:, None] for c in (coef, entropy_coef))
        raw_NV = -e_N1 * p_NV * (self.finite_NV + self.entropy_N[:, None])
        size_NV = e_N1.abs() * p_NV * (self.finite_NV.abs() + self.entropy_N[:, None] + 1)
        # of each id its coefficients together, and those of all
        pairs = [(self.problem.target[:, None], c_N1), *((ids, c.double()) for ids, c in terms)]
        ids_NM, c_NM = (torch.cat(parts, 1) for parts in zip(*pairs))
        own_NV, own_size_NV = (torch.zeros_like(p_NV).scatter_add_(1, ids_NM, c) for c in (c_NM, c_NM.abs()))
        c_N1, size_N1 = c_NM.sum(1, keepdim=True), c_NM.abs().sum(1, keepdim=True)
        others_NV = self.others_NV
        raw_NV += own_NV * others_NV - (c_N1 - own_NV) * p_NV
        size_NV += own_size_NV * others_NV + (size_N1 - own_size_NV) * p_NV
        all_N1 = e_N1.abs() + size_N1
        if lse_coef is not None:
            given_N1 = lse_coef.double()[:, None]
            raw_NV, size_NV, all_N1 = raw_NV + given_N1 * p_NV, size_NV + given_N1.abs() * p_NV, all_N1 + given_N1.abs()
        relative_N1 = (3 * self.logit_error_N + 16 * self.eps)[:, None] + rounded + extra
        operand_NV, whole_NV = raw_NV * self.slope_NV, size_NV * self.slope_NV
        lost = (TINY + flushed) * all_N1
        error_NV = whole_NV * relative_N1 + size_NV * self.flat_NV + lost
        out = torch.finfo(self.problem.dtype).eps
        least = torch.finfo(self.problem.dtype).smallest_normal * out

        biggest = float(all_N1.max()) if self.N else 0.0
        absolute_W, absolute_h = self.W_VH.abs(), self.h_NH.abs()
        grow_H, grow_W = out + self.eps * (8 + self.V**0.5), out + self.eps * (8 + self.N**0.5)
        size_NH, size_VH = whole_NV @ absolute_W, whole_NV.t() @ absolute_h
        exact_NH, bound_NH = operand_NV @ self.W_VH, error_NV @ absolute_W + grow_H * size_NH
        found = {}
        if self.low is not None:
            down_RH, up_VR, scale = self.low
            low_NR, whole_NR = operand_NV @ up_VR, whole_NV @ up_VR.abs()
            error_NR = error_NV @ up_VR.abs() + grow_H * whole_NR + least * (1 + biggest)
            exact_NH = exact_NH + scale * low_NR @ down_RH
            bound_NH = bound_NH + abs(scale) * (error_NR + grow_H * whole_NR) @ down_RH.abs() + 2 * out * exact_NH.abs()
            projected_NR, absolute_NR = scale * self.h_NH @ down_RH.t(), abs(scale) * absolute_h @ down_RH.abs().t()
            narrow = max(torch.finfo(x.dtype).eps for x in self.problem.options["low_rank"][:2])
            dA, size_A = scale * low_NR.t() @ self.h_NH, abs(scale) * whole_NR.t() @ absolute_h
            error_A = abs(scale) * error_NR.t() @ absolute_h + (narrow + grow_W) * size_A
            dB, size_B = operand_NV.t() @ projected_NR, whole_NV.t() @ absolute_NR
            error_B = error_NV.t() @ absolute_NR + (narrow + grow_W + self.eps * self.H**0.5) * size_B
            for name, exact, error, x in zip(
                "AB", (dA, dB), (error_A, error_B), self.problem.options["low_rank"][:2], strict=False
            ):
                kind = torch.finfo(x.dtype)
                bound = error + 1e-30 + kind.smallest_normal * kind.eps
                # what a float16 leaf cannot hold may be infinite
                found["low_rank_" + name] = Bounded(exact, bound.masked_fill(exact.abs() + bound > kind.max, torch.inf))
        dhidden = Bounded(exact_NH, bound_NH + least * (1 + biggest), size_NH)
        dweight = Bounded(operand_NV.t() @ self.h_NH, error_NV.t() @ absolute_h + grow_W * size_VH + least, size_VH)
        # the bias is in float32 whatever the dtype of hidden
        single = torch.finfo(torch.float32).eps
        dbias = Bounded(operand_NV.sum(0), error_NV.sum(0) + single * (8 + self.N**0.5) * whole_NV.sum(0) + TINY)
        return found | {"hidden": dhidden, "weight": dweight, "bias": dbias}


def _bytes(ids: Tensor) -> tuple[int, bytes]:
    return ids.shape[1], ids.contiguous().numpy().tobytes()
