"""How many tokens the steps of a rollout commit, and with which probability, where that is known beforehand."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dllm_kernels.rollouts.samplers import Options, Sampler


class Step(NamedTuple):
    """One step of a static schedule."""

    number: int  # counts all steps of the schedule, also those without a commit
    block: int
    remaining: int  # masked tokens of the block before the step
    commit: int


def commits_per_step(block_length: int, steps: int) -> list[int]:
    """Tokens per step of a block: as even as possible, remainders in the earliest steps."""
    base, extra = divmod(block_length, steps)
    return [base + (step < extra) for step in range(steps)]


def schedule(sampler: Sampler, length: int, steps: int, block_length: int) -> list[Step]:
    """The steps of a static sampler that commit a token."""
    if sampler.blocks is None:
        counts = [times_commit(length, steps, sampler.options["eps"])]
    else:
        blocks = length // block_length
        counts = [commits_per_step(block_length, steps // blocks)] * blocks
    plan = []
    number = 0
    for block, of_block in enumerate(counts):
        remaining = sum(of_block)
        for commit in of_block:
            if commit:
                plan.append(Step(number, block, remaining, commit))
            remaining -= commit
            number += 1
    return plan


def transfer_shares(steps: int, eps: float) -> Tensor:
    """Dream's share of masked tokens per step, fp32 `[steps]`: `1 - s / t`, t from 1 to eps; 1 at the end."""
    t = torch.linspace(1, eps, steps + 1)
    shares = 1 - t[1:] / t[:-1]
    shares[-1] = 1.0
    return shares


def times_commit(length: int, steps: int, eps: float, *, first: int = 0) -> list[int]:
    """Tokens per step of Dream's ranked algorithms: the share of masked tokens, rounded down in fp32; without the first steps."""
    remaining, counts = length, []
    for share in transfer_shares(steps, eps)[first:]:
        counts.append(int(remaining * share))
        remaining -= counts[-1]
    return counts


def counts_of_block(sampler: Sampler, size: int, steps: int | None, block_length: int) -> list[int] | None:
    """Tokens per step of a block (or completion) of `size` masks in so many steps; None: as many steps as needed.

    For samplers that draw who is decided, `size` in every step; for those with a maximum, that.
    """
    if steps is None:
        return None
    if sampler.take_back == "chance":
        return [size] * (steps + 1)  # what is masked in the end is decided in one step
    if sampler.commit == "chance":
        return [size] * steps
    if sampler.take_back == "trust":
        return _maskgit_commit(size, steps)
    if sampler.opening:
        return [1, *times_commit(size - 1, steps, sampler.options["eps"], first=1)]
    if sampler.blocks is None and sampler.most is None:
        return times_commit(size, steps, sampler.options["eps"])
    # a block of the sequence that holds some of the prompt commits as many a step as a whole one
    return commits_per_step(block_length if sampler.blocks == "sequence" else size, steps)


def _maskgit_commit(size: int, steps: int) -> list[int]:
    """MDPO's linear schedule: what is undecided after each step, rounded down in fp32."""
    ratio_T = torch.tensor([1 - (step + 1) / steps for step in range(steps)])
    left = torch.floor(size * ratio_T).long().tolist()
    return [before - after for before, after in zip([size, *left], left, strict=False)]


def chances(options: Options, steps: int) -> list[tuple[float, float]]:
    """ReMDM's probabilities, for each step: that a masked token is decided, that a decided one is taken back.

    With `strategy="conf"` the second is the most that a token may have; what it has is its share by confidence, and the first
    is that without any taking back. alpha_t = 1 - t, t from 1 to eps.
    """
    eta, eps, strategy = options["eta"], options["eps"], options["strategy"]
    times = torch.linspace(1, eps, steps + 1)[:-1].tolist()
    dt, found = (1 - eps) / steps, []
    for t in times:
        if strategy == "loop":
            found.append(_loop(t, dt, options))
            continue
        alpha_t, alpha_s = 1 - t, 1 - t + dt
        largest = min(1.0, (1 - alpha_s) / alpha_t) if alpha_t > 0 else 1.0
        sigma = {"cap": min(eta, largest), "rescale": eta * largest, "conf": largest}[strategy]
        kept = alpha_t if strategy == "conf" else (1 - sigma) * alpha_t
        found.append(((alpha_s - kept) / (1 - alpha_t), sigma))
    return found


def _loop(t: float, dt: float, options: Options) -> tuple[float, float]:
    """Ordinary steps up to alpha_on, taking back at a constant level between t_on and t_off, ordinary steps to the end."""
    on, off, alpha = options["t_on"], options["t_off"], options["alpha_on"]
    if off < t <= on:
        return options["eta"] * alpha / (1 - alpha), options["eta"]
    if t > on:
        moved, hidden = dt * alpha / (1 - on), 1 - (1 - t) * alpha / (1 - on)
        return min(1.0, moved / hidden), 0.0
    return min(1.0, dt / t), 0.0
