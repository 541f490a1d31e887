"""Adapters for training loops and tools of others: one file each, imported only when asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

EXTRA = "integrations"


@contextmanager
def needs(package: str, extra: str = EXTRA) -> Iterator[None]:
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
        raise ModuleNotFoundError(f"{package} is missing; pip install 'dllm-kernels[{extra}]' brings it", name=package) from None
