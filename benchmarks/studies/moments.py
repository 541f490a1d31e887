"""Closed forms for the `variance` suite, from moments of `S(m) = sum_{l in m} log p(y_l | y^m)`.

A completion has L tokens, a mask hides n of them. The mean and variance of S at each n say everything about
an estimator that draws its passes independently: its bias, its variance, and what share of that comes from
the level (t, or the count) rather than from which tokens are hidden. A longer completion is a row of G parts
that do not see each other, scored as one: given the parts' moments, those of the whole follow from the
hypergeometric law of how many hidden tokens fall into each part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

T_NODES = 200


@dataclass(frozen=True)
class Variance:
    """Of one forward pass, each float64 `[X]`; the three sources add up to `total`."""

    mean: Tensor
    level: Tensor  # of t, or of the count
    count: Tensor  # of the count given t; 0 where the count is the level
    masks: Tensor  # of the choice of tokens given the count

    @property
    def total(self) -> Tensor:
        return self.level + self.count + self.masks


@dataclass(frozen=True)
class Moments:
    """Of S at each count n = 1..L in each of B sequences."""

    mean_BL: Tensor  # float64
    variance_BL: Tensor  # float64, unbiased
    draws: int  # masks per count

    @property
    def length(self) -> int:
        return self.mean_BL.shape[1]

    @property
    def elbo_B(self) -> Tensor:
        return (self.mean_BL / counts(self.length)).sum(-1)

    @property
    def standard_error_B(self) -> Tensor:
        return (self.variance_BL / counts(self.length) ** 2).sum(-1).div(self.draws).sqrt()

    def joined(self, parts_XG: Tensor) -> Moments:
        """Of X completions, each a row of G of these sequences; G = 1 is the sequences themselves."""
        L, G = self.length, parts_XG.shape[1]
        n_N, j = counts(L * G), torch.arange(L + 1, dtype=torch.float64)
        mean, second = (torch.nn.functional.pad(x, (1, 0)) for x in (self.mean_BL, self.variance_BL + self.mean_BL**2))
        # how many of n hidden tokens fall into one part, and into two
        one_NJ = (choose(L, j) + choose(L * (G - 1), n_N[:, None] - j) - choose(L * G, n_N)[:, None]).exp()
        part_mean_BN, part_second_BN = mean @ one_NJ.t(), second @ one_NJ.t()
        mean_XN = part_mean_BN[parts_XG].sum(1)
        second_XN = part_second_BN[parts_XG].sum(1)
        if G > 1:
            both_IJ = choose(L, j)[:, None] + choose(L, j)
            sums_XJ = mean[parts_XG].sum(1)
            for column, n in enumerate(n_N):
                two_IJ = (both_IJ + choose(L * (G - 2), n - j[:, None] - j) - choose(L * G, n)).exp()
                own_B = ((mean @ two_IJ) * mean).sum(-1)
                second_XN[:, column] += ((sums_XJ @ two_IJ) * sums_XJ).sum(-1) - own_B[parts_XG].sum(1)
        return Moments(mean_XN, (second_XN - mean_XN**2).clamp(min=0), self.draws)

    def exact_count(self) -> Variance:
        """`L / n S(m)` with n uniform on 1..L."""
        weight_L = self.length / counts(self.length)
        level_B = (weight_L * self.mean_BL).var(-1, correction=0)
        return Variance(self.elbo_B, level_B, torch.zeros_like(level_B), (weight_L**2 * self.variance_BL).mean(-1))

    def stratified(self, samples: int) -> Tensor:
        """Variance `[B]` of a mean of exact-count passes, at counts of one random offset plus the strata."""
        L = self.length
        n_CK = 1 + (torch.arange(L)[:, None] + torch.arange(samples) * L // samples) % L
        mean_BC = (L / n_CK * self.mean_BL[:, n_CK - 1]).mean(-1)
        masks_BC = ((L / n_CK) ** 2 * self.variance_BL[:, n_CK - 1]).sum(-1) / samples**2
        return mean_BC.var(-1, correction=0) + masks_BC.mean(-1)

    def bernoulli(self, t_min: float) -> Variance:
        """`S(m) / t` with t uniform on (t_min, 1] and every token hidden with probability t."""
        x, w = np.polynomial.legendre.leggauss(T_NODES)
        log_t = torch.from_numpy((1 - x) / 2 * math.log(t_min))  # in log t: 1 / t^2 is steep
        t_T = log_t.exp()
        weight_T = torch.from_numpy(w / 2) * -math.log(t_min) * t_T / (1 - t_min)
        n_L = counts(self.length)
        binomial_TL = (choose(self.length, n_L) + n_L * log_t[:, None] + (self.length - n_L) * torch.log1p(-t_T)[:, None]).exp()
        mean_BT = self.mean_BL @ binomial_TL.t() / t_T
        by_count_BT = self.mean_BL**2 @ binomial_TL.t() / t_T**2
        masks_BT = self.variance_BL @ binomial_TL.t() / t_T**2
        mean_B = mean_BT @ weight_T
        level_B = (mean_BT - mean_B[:, None]) ** 2 @ weight_T
        return Variance(mean_B, level_B, (by_count_BT - mean_BT**2) @ weight_T, masks_BT @ weight_T)

    def quadrature(self, nodes: int, *, counted: bool) -> tuple[Tensor, Tensor]:
        """(mean, variance), each `[B]`, with one mask per Gauss-Legendre node.

        GDPO's form, `int(t L)` tokens and weight w / t; `counted`: rounded, and w L / count.
        """
        mean_B = variance_B = torch.zeros(len(self.mean_BL), dtype=torch.float64)
        for x, w in zip(*np.polynomial.legendre.leggauss(nodes), strict=True):
            t = (x + 1) / 2
            n = math.floor(t * self.length + (0.5 if counted else 0.0))
            if n:
                weight = w / 2 * (self.length / n if counted else 1 / t)
                mean_B = mean_B + weight * self.mean_BL[:, n - 1]
                variance_B = variance_B + weight**2 * self.variance_BL[:, n - 1]
        return mean_B, variance_B


def counts(length: int) -> Tensor:
    return torch.arange(1, length + 1, dtype=torch.float64)


def choose(n: int, k: Tensor) -> Tensor:
    """log of the binomial coefficient, -inf where there is none."""
    inside = (k >= 0) & (k <= n)
    k = k.clamp(0, n)
    found = math.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    return torch.where(inside, found, -math.inf)
