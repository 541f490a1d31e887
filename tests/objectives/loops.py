"""What the tests of the objectives share: scalar terms with derivatives written by hand, in Python floats, and cuts of a plan.

Nothing here calls the losses under test.
"""

from __future__ import annotations

import math

import pytest
import torch

F64 = torch.float64


def surrogate(delta: float, advantage: float, low: float, high: float) -> tuple[float, float]:
    """PPO's `min(r A, clip(r, 1 - low, 1 + high) A)`, `r = e^delta`, and its derivative: `A r` unless strictly clipped."""
    ratio = math.exp(delta)
    value = min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
    clipped = (advantage > 0 and ratio > 1 + high) or (advantage < 0 and ratio < 1 - low)
    return value, 0.0 if clipped else advantage * ratio


def k3(difference: float) -> tuple[float, float]:
    """`e^-D - 1 + D` and its derivative."""
    return math.exp(-difference) - 1 + difference, 1 - math.exp(-difference)


def token_term(logp, old, ref, advantage, low, high, beta) -> tuple[float, float]:
    """`-min(r A, clip(r) A) + beta k3(logp, ref)` of one token and its derivative in logp."""
    value, slope = surrogate(logp - old, advantage, low, high)
    kl, kl_slope = k3(logp - ref)
    return -value + beta * kl, -slope + beta * kl_slope


def check(loss, leaf, value, gradient, tolerance=1e-12) -> None:
    """Loss and gradient equal those of the loops."""
    (got,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(loss.detach(), torch.tensor(value, dtype=F64), rtol=tolerance, atol=tolerance)
    want = gradient if isinstance(gradient, torch.Tensor) else torch.tensor(gradient, dtype=F64)
    torch.testing.assert_close(got, want.reshape(got.shape), rtol=tolerance, atol=tolerance)


def logps(*shape, seed=0, spread=0.4):
    """(policy, old, reference) log-probs; some tokens beyond any usual clip, some equal."""
    g = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(*shape, generator=g, dtype=F64)
    logp = old + spread * torch.randn(*shape, generator=g, dtype=F64)
    ref = old + spread * torch.randn(*shape, generator=g, dtype=F64)
    logp.view(-1)[::5] = old.view(-1)[::5]
    return logp.requires_grad_(), old, ref


def ragged(lengths, L):
    """Mask `[B, L]`, True at the first lengths[b] tokens."""
    return torch.arange(L)[None] < torch.tensor(lengths)[:, None]


def row_logps(plan, seed=0):
    """A log-prob per row of a plan, differentiable."""
    g = torch.Generator().manual_seed(seed)
    return (-3 * torch.rand(len(plan.rows.index), generator=g, dtype=F64)).requires_grad_()


def at_positions(plan, logp_N):
    """`[B, K, S]`, 0 where nothing is scored."""
    K, B, S = plan.shape
    dense = [[[0.0] * S for _ in range(K)] for _ in range(B)]
    position = (plan.rows.index + plan.shift) % S
    for value, b, k, s in zip(
        logp_N.tolist(), plan.rows.sequence.tolist(), plan.rows.sample.tolist(), position.tolist(), strict=True
    ):
        dense[b][k][s] = value
    return torch.tensor(dense, dtype=F64)


def summed_over_cuts(objective, logp_N, plan, batch, *, samples=None, sequences=1):
    """The sum of the contributions of cuts of at most so many samples (None: all) and sequences."""
    K, B, _ = plan.shape
    total = torch.zeros((), dtype=F64)
    step = samples or K
    for b in range(0, B, sequences):
        for k in range(0, K, step):
            cut = {"samples": slice(k, k + step), "sequences": slice(b, b + sequences)}
            rows = plan.rows
            here = (rows.sample >= k) & (rows.sample < k + step) & (rows.sequence >= b) & (rows.sequence < b + sequences)
            total = total + objective.contributions(logp_N[here], plan.cut(**cut), batch.cut(**cut))
    return total


def same(got, want, leaf, tolerance=1e-12) -> None:
    """Two scalars agree in value and in gradient."""
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    pair = [torch.autograd.grad(scalar, leaf, retain_graph=True)[0] for scalar in (got, want)]
    torch.testing.assert_close(*pair, rtol=tolerance, atol=tolerance)


def refuses(function, arguments, changes, words, error=(TypeError, ValueError)) -> None:
    """A call with the changed arguments raises, and the message has all the words."""
    with pytest.raises(error) as caught:
        function(**(arguments | changes))
    for word in words:
        assert word in str(caught.value), (word, str(caught.value))
