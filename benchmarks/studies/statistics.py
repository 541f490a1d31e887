"""Means, ratios and variances, with 95 % bootstrap intervals over what is drawn independently."""

from __future__ import annotations

import torch
from torch import Tensor

RESAMPLES = 2000

Figure = dict[str, float]  # value, low, high


def ratio(numerator_U: Tensor, denominator_U: Tensor | None = None, seed: int = 0) -> Figure:
    """The mean over units, or the ratio of two sums over them, with its bootstrap over the units."""
    weight_XU = resampled(len(numerator_U), seed)
    top, bottom = numerator_U.double(), torch.ones(len(numerator_U)).double() if denominator_U is None else denominator_U.double()
    return spread(float(top.sum() / bottom.sum()), (weight_XU @ top) / (weight_XU @ bottom))


def resampled(units: int, seed: int = 0, resamples: int = RESAMPLES) -> Tensor:
    """float64 `[X, U]`: how often each unit is in each resample; one seed gives paired resamples."""
    generator = torch.Generator().manual_seed(seed)
    index_XU = torch.randint(units, (resamples, units), generator=generator)
    ones_XU = torch.ones(index_XU.shape, dtype=torch.float64)
    return torch.zeros(resamples, units, dtype=torch.float64).scatter_add_(1, index_XU, ones_XU)


def spread(value: float, resampled_X: Tensor) -> Figure:
    """The value with its resamples' 2.5 and 97.5 % quantiles; those that are not finite are left out."""
    finite = resampled_X.double()[resampled_X.isfinite()]
    if len(finite) < len(resampled_X) / 2 or value != value or value in (float("inf"), float("-inf")):
        return {"value": 0.0, "low": -1e9, "high": 1e9}  # nothing can be said, and no rule decides
    low, high = torch.quantile(finite, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"value": value, "low": low, "high": high}


def moments(gradient_RP: Tensor) -> tuple[float, float]:
    """(total variance of a draw, squared norm of the expectation) from R independent draws, unbiased."""
    mean_P = gradient_RP.double().mean(0)
    variance = float((gradient_RP.double() - mean_P).square().sum() / (len(gradient_RP) - 1))
    return variance, float(mean_P.square().sum()) - variance / len(gradient_RP)


def moments_of_sums(weight_RN: Tensor, gram_NN: Tensor) -> tuple[float, float]:
    """`moments` of R weighted sums of the same N vectors, from the inner products of these."""
    mean_N = weight_RN.mean(0)
    norm = float(mean_N @ gram_NN @ mean_N)
    squares = float(((weight_RN @ gram_NN) * weight_RN).sum())
    variance = (squares - len(weight_RN) * norm) / (len(weight_RN) - 1)
    return variance, norm - variance / len(weight_RN)
