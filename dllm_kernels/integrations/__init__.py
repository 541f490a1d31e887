"""Adapters for training loops and tools of others: one file each, imported only when asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


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
        if error.name != package:
            raise
        raise ModuleNotFoundError(f"{package} is missing; {command} brings it", name=package) from None
