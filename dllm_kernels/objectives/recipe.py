"""What it takes to train with an algorithm as its authors did, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Status = Literal["verified against the paper", "verified against the code", "unverified"]


@dataclass(frozen=True)
class Recipe:
    """One algorithm: where it was published, how surely it is that, and what it wants of the data."""

    name: str  # of the function and of `dllm-kernels rl --algorithm`
    title: str
    arxiv: str  # number
    status: Status  # notes says what was read, and what was not
    law: str  # of `make_mask_plan`
    law_options: Mapping[str, object]
    samples: int | None  # K of an inner iteration; None where the trajectory says it
    advantage: str | None  # kind of `group_advantages`; None for what makes its own weights of the rewards
    needs_old: bool
    needs_reference: bool
    needs_trajectory: bool
    inner_iterations: int  # optimizer steps per rollout
    defaults: Mapping[str, object] = field(default_factory=dict)  # keywords of the objective's factory
    notes: str = ""  # a sentence on the status, then the published group size, learning rate and the like
