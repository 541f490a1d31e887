"""Transformers' schedules of a learning rate by name, each with the options that it takes.

A rate is a function of (config, step, total) alone, see `train.optimization.learning_rates`, so that a resumed run goes on with
the same bits and nothing of a schedule is in a checkpoint. Schedules that follow a measured figure (reduce_lr_on_plateau,
greedy) are not such functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, ValidationError

from .layers import sentence
from .sections import Count, NotNegative, Positive, Section, Share

Schedule = Literal[
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
    "warmup_stable_decay",
]
_Shape = Literal["linear", "cosine", "1-sqrt"]
_Waves = Annotated[float, Field(gt=0.0)]


class _NoOptions(Section):
    pass


class _Cosine(Section):
    num_cycles: _Waves = 0.5


class _Restarts(Section):
    num_cycles: Positive = 1


class _MinLr(_Cosine):
    min_lr: NotNegative | None = None
    min_lr_rate: Share | None = None


class _WarmupMinLr(_MinLr):
    warmup_lr_rate: Share | None = None


class _Polynomial(Section):
    lr_end: NotNegative = 1e-7
    power: Annotated[float, Field(gt=0.0)] = 1.0


class _InverseSqrt(Section):
    timescale: Positive | None = None


class _WarmupStableDecay(Section):
    num_decay_steps: Positive
    num_stable_steps: Count | None = None
    warmup_type: _Shape = "linear"
    decay_type: _Shape = "cosine"
    min_lr_ratio: Share = 0.0
    num_cycles: _Waves = 0.5


OPTIONS: dict[str, type[Section]] = dict.fromkeys(get_args(Schedule), _NoOptions) | {
    "cosine": _Cosine,
    "cosine_with_min_lr": _MinLr,
    "cosine_warmup_with_min_lr": _WarmupMinLr,
    "cosine_with_restarts": _Restarts,
    "polynomial": _Polynomial,
    "inverse_sqrt": _InverseSqrt,
    "warmup_stable_decay": _WarmupStableDecay,
}


def check_options(name: str, options: Mapping[str, Any], lr: float) -> None:
    """Raises ValueError for an option that the schedule does not have, lacks, or cannot use."""
    known = OPTIONS[name].model_fields
    if unknown := sorted(options.keys() - known):
        there_are = f"there are {', '.join(known)}" if known else "it has none"
        raise ValueError(f"schedule_options of {name} have no {unknown[0]}: {there_are}")
    try:
        found = OPTIONS[name].model_validate(dict(options))
    except ValidationError as error:
        raise ValueError("; ".join(f"schedule_options.{sentence(detail)}" for detail in error.errors())) from error
    if isinstance(found, _MinLr) and (found.min_lr is None) == (found.min_lr_rate is None):
        given = "both" if found.min_lr is not None else "neither"
        raise ValueError(f"schedule_options of {name} must have min_lr or min_lr_rate, got {given}")
    for key in ("lr_end", "min_lr"):
        end = getattr(found, key, None)
        if end is not None and not (end < lr or (key == "min_lr" and end == lr)):
            raise ValueError(f"schedule_options.{key} must be below lr={lr}, got {end}")
