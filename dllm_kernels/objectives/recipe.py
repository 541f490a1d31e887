"""What it takes to train with an algorithm as its authors did: its file's declaration to the engine and to a trainer."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, make_dataclass
from types import NoneType, UnionType
from typing import Any, Literal

from torch import Tensor

from dllm_kernels.accumulation.objective import Batch, Objective
from dllm_kernels.objectives.update import Rewards, Signal, States, Update, advantage_signal
from dllm_kernels.rollouts.rollout import Rollout

Status = Literal["verified against the paper", "verified against the code", "unverified"]
WINDOWS = ("eos", "completion")
_KINDS = {bool: "true or false", int: "an integer", float: "a finite number", str: "a text", NoneType: "null"}


@dataclass(frozen=True)
class Clip:
    """Which ratio an objective of ELBOs clips, and where: for a run's figures alone."""

    low: float = math.inf  # the ratio is clipped to [1 - low, 1 + high]
    high: float = math.inf
    per_token: bool = False  # the ratio is of ELBOs over the completion's length


@dataclass(frozen=True, eq=False)
class Trajectory:
    """How rollouts become the states that are trained on, and what that costs."""

    states: Callable[[Rollout, Any, int], States]  # (rollout, options, seed)
    tokens: Callable[[Any, int, int], int]  # (options, L, denoising steps) -> about how many tokens a state decides
    number: Callable[[Any, int, int], int] | None = None  # of states, where some are chosen; None: all tokens are decided


@dataclass(frozen=True, eq=False)
class Recipe:
    """One algorithm: where it was published, how surely it is that, and what it makes of rollouts and rewards.

    A new algorithm that learns from group advantages and from scores under drawn masks needs no callable but `objective`. What
    is typed `Any` here is the run's options, an instance of `option_type`.
    """

    name: str  # of the function and of `dllm-kernels rl --algorithm`
    title: str
    arxiv: str  # number
    status: Status  # notes says what was read, and what was not
    objective: Callable[..., Objective]  # the factory: its keywords are options of the same names
    law: str  # of `make_mask_plan`
    law_options: Mapping[str, object]
    samples: int | None  # K of an inner iteration; None where the trajectory says it
    advantage: str | None  # kind of `group_advantages`; None for what makes its own weights of the rewards
    needs_old: bool
    needs_reference: bool  # as published; see `wants_reference`
    inner_iterations: int  # optimizer steps per rollout
    # a frozen dataclass of bool, int, float, str or None, as published; None: the factory's keywords are all options
    options: type[Any] | None = None
    from_run: Callable[[int, int], Mapping[str, object]] | None = None  # options that (L, denoising steps) of a run give
    signal: Callable[[Rewards, Objective, Any], Signal] = advantage_signal
    pairs: bool = False  # learns from one chosen and one rejected completion of a prompt: given pairs will do
    trajectory: Trajectory | None = None  # None: masks are drawn by the law
    # tokens that are scored, and that lengths and denominators count: up to the first EOS, inclusive, or all
    window: Literal["eos", "completion"] = "completion"
    # what the model sees of the tokens after it; None: the law's own, see `make_mask_plan`
    tail: Literal["shown", "hidden", "removed"] | None = None
    teacher: bool = False  # its reference is another model, that a run must name
    blocks: bool = True  # trains block-causal models too
    greedy: bool = False  # wants the greedy completion of every state of a rollout
    entries: Callable[[Update, Any], dict[str, Tensor]] | None = None  # beyond the signal's and old and reference scores
    figures: Callable[[Update, Batch, Any], dict[str, float]] | None = None  # to log, of each optimizer step
    clip: Callable[[Any], Clip] | None = None
    notes: str = ""  # a sentence on the status, then the published group size, learning rate and the like

    def __post_init__(self) -> None:
        if self.window not in WINDOWS:
            raise ValueError(f"window must be one of {', '.join(WINDOWS)}, got {self.window!r}")
        if self.tail is not None and self.window != "eos":
            raise ValueError(f"tail must be None with window='completion', which leaves no tail, got {self.tail!r}")

    @property
    def needs_trajectory(self) -> bool:
        return self.trajectory is not None

    def wants_reference(self, given: Mapping[str, Any]) -> bool:
        """Whether a reference policy is needed with these options."""
        made = self.make(self.check(given))
        return self.needs_reference or any(
            name.startswith("ref_") for name in (*made.per_sequence, *made.per_sample, *made.per_token)
        )

    @functools.cached_property
    def option_type(self) -> type[Any]:
        if self.options is not None:
            return self.options
        kinds, keywords = typing.get_type_hints(self.objective), inspect.signature(self.objective).parameters
        made = [(name, kinds[name], field(default=keyword.default)) for name, keyword in keywords.items()]
        return make_dataclass("Options", made, frozen=True)

    @property
    def option_names(self) -> list[str]:
        return [option.name for option in fields(self.option_type)]

    @property
    def defaults(self) -> dict[str, object]:
        """Keywords of the objective's factory, as published."""
        return self._keywords(self.option_type())

    def choose(self, given: Mapping[str, Any]) -> Any:
        """The options with these in place of the published ones.

        Raises ValueError or TypeError naming an option that does not exist, or whose value the algorithm refuses.
        """
        kinds = typing.get_type_hints(self.option_type)
        known = self.option_names
        for name, value in given.items():
            if name not in known:
                if not known:
                    raise ValueError(f"{name} is unknown: {self.name} has no options")
                near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)[0]
                raise ValueError(f"{name} is unknown: the nearest is {near}; allowed: {', '.join(known)}")
            # `float | None` is a typing.Union too: where it is written so, and on Python 3.10 where None is a keyword's default
            union = typing.get_origin(kinds[name]) in (UnionType, typing.Union)
            allowed = typing.get_args(kinds[name]) if union else (kinds[name],)
            if not any(_is(value, kind) for kind in allowed):
                raise TypeError(f"{name} must be {' or '.join(_KINDS[kind] for kind in allowed)}, got {value!r}")
        options = self.option_type(**given)
        self.make(options)  # refuses what is out of bounds
        return options

    def check(self, given: Mapping[str, Any]) -> Any:
        """`choose` before it is known how long a run's completions are: what a run gives stands in by some value."""
        of_run = {} if self.from_run is None else self.from_run(1, 1)
        return self.choose({**of_run, **given})

    def make(self, options: Any = None) -> Objective:
        """The objective for the engine, as published or with other options."""
        return self.objective(**self._keywords(self.option_type() if options is None else options))

    def _keywords(self, options: Any) -> dict[str, object]:
        return {name: getattr(options, name) for name in inspect.signature(self.objective).parameters}


def _is(value: object, kind: type) -> bool:
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
