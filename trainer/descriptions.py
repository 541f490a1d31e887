"""The JSON schema of the config, each key with what its comment in the source says."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

from .config import RunConfig
from .sections import Section


def schema() -> dict[str, Any]:
    """Of every key, with `description`."""
    found = RunConfig.model_json_schema()
    classes = {cls.__name__: cls for cls in _sections(Section)}
    for name, part in [*found["$defs"].items(), ("RunConfig", found)]:
        said: dict[str, str] = {}
        for cls in reversed(classes[name].__mro__) if name in classes else ():
            if issubclass(cls, Section):
                said |= _comments(cls)
        for key, value in part.get("properties", {}).items():
            if key in said:
                value["description"] = said[key]
    return found


def _sections(cls: type[Section]) -> Iterator[type[Section]]:
    for child in cls.__subclasses__():
        yield child
        yield from _sections(child)


def _comments(cls: type[Section]) -> dict[str, str]:
    """Of each field: the comment behind it, else those in the lines right above it."""
    source = textwrap.dedent(inspect.getsource(cls))
    lines, found = source.split("\n"), {}
    for field in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        _, _, behind = lines[(field.end_lineno or field.lineno) - 1].partition("  # ")
        above: list[str] = []
        for line in reversed(lines[: field.lineno - 1]):
            if not line.strip().startswith("# "):
                break
            above.insert(0, line.strip().removeprefix("# "))
        if text := behind or " ".join(above):
            found[field.target.id] = text
    return found
