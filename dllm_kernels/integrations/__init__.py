"""Adapters for training loops and tools of others: one file each, imported only when asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

from torch import nn
from torch.nn.parallel import DistributedDataParallel

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


class _Called:
    """A module that is called by its forward alone, without the hooks that have run."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self._module, self.forward = module, forward

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self.forward(*arguments, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def around_step(model: nn.Module) -> AbstractContextManager[object]:
    """Around the forward and the backward of a step: a sharded head is gathered and reduced once."""
    return nullcontext() if isinstance(model, DistributedDataParallel) else headless(model)


def with_body(model: nn.Module, function: Callable[[Body], _Result]) -> _Result:
    """`function` of the headless body of what a loop holds, a model or a wrapper of it.

    Under DDP it runs inside the wrapper's forward and its result is the wrapper's: the reducer then knows which parameters,
    the head's among them, took part, whatever its options.
    """
    if not isinstance(model, DistributedDataParallel):
        with headless(model) as body:
            return function(body)
    module = model.module
    patched, own = "forward" in module.__dict__, module.forward

    def forward() -> _Result:
        with headless(module) as body:
            body.model = _Called(module, own)  # type: ignore[assignment]  # the wrapper is on its way through it already
            return function(body)

    module.forward = forward
    try:
        return model()
    finally:
        if patched:
            module.forward = own
        else:
            del module.forward
