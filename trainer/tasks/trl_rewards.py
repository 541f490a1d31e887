"""Rewards of TRL's form, `reward(prompts, completions, **columns)`, where ours are `reward(examples, completions)`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from .task import Example, Reward


def as_reward(function: Callable[..., Any]) -> Reward:
    """The function itself, or one that calls it by keyword, chosen by whether its signature names `prompts`.

    The columns are the examples' facts, `answer` and `id` as well; of a function without `**columns` those it names.

    Example:
        >>> reward = as_reward(lambda prompts, completions, answer: [float(c == a) for c, a in zip(completions, answer)])
        >>> reward([Example("0", "1+1=", "2")], ["2"])
        [1.0]
    """
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # of a builtin
        return function
    if "prompts" not in parameters:
        return function
    takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())

    def call(examples: Sequence[Example], completions: Sequence[str]) -> Any:
        rows = [{"answer": e.answer, "id": e.id, **e.facts} for e in examples]
        names = {name for row in rows for name in row} - {"prompts", "completions"}
        columns = {name: [row.get(name) for row in rows] for name in names}
        given = columns if takes_all else {name: values for name, values in columns.items() if name in parameters}
        return function(prompts=[e.prompt for e in examples], completions=list(completions), **given)

    return call
