"""Adapters for training loops and tools of others: one file each, imported only when asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import nn

from dllm_kernels.model.headless import Body, headless

_Result = TypeVar("_Result")


@contextmanager
def needs(package: str, command: str = "pip install 'dllm-kernels[integrations]'") -> Iterator[None]:
    """Around the import of a foreign package: says what to install where it is missing.

    Example:
        >>> with needs("json"):
        ...     import json
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise ModuleNotFoundError(f"{error.name} is missing; {command} brings it", name=error.name) from None


def with_body(model: nn.Module, function: Callable[[Body], _Result]) -> _Result:
    """`function` of the headless body of what a loop holds, a model or a wrapper of it."""
    with headless(model) as body:
        return function(body)
