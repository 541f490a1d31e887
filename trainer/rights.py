"""Who may allow a run to execute more than this package: the command line and the user's own config.

A checkpoint's folder describes a run (`config.yaml` beside it); nothing that it says runs code, reads the environment or
asks a server. Keys of
it that would are refused by name unless the user gives them too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from .errors import ConfigError

FUNCTIONS = ("task.correct", "rl.reward")  # a user's `module:function`, which is imported
TRUST = "model.trust_remote_code"
SERVER = "rollout.url"


def without_rights(values: Mapping[str, Any], given: Collection[str], used: Collection[str], source: str) -> dict[str, Any]:
    """`values` of a config beside a checkpoint, without the trust in its code that it may claim.

    given: dotted keys that the user gives. used: those of `FUNCTIONS` that the command calls. Raises ConfigError for a key that
    the user does not give and that would run a function or ask a server, or is to be filled in (`${...}`).
    """

    def visit(node: Any, key: str) -> Any:
        if isinstance(node, Mapping):
            inner = {name: f"{key}.{name}" if key else str(name) for name in node}
            return {name: visit(value, inner[name]) for name, value in node.items() if inner[name] != TRUST}
        if isinstance(node, list):
            return [visit(item, key) for item in node]
        if isinstance(node, str) and key not in given:
            if "${" in node:
                raise _not_allowed(key, node, source, "is to be filled in here")
            if key == SERVER and "rollout.engine" not in given:
                raise _not_allowed(key, node, source, "would send prompts and weights there")
            if key in used and ":" in node:
                raise _not_allowed(key, node, source, "would run that function")
        return node

    return visit(values, "")  # type: ignore[no-any-return]


def _not_allowed(key: str, value: str, source: str, why: str) -> ConfigError:
    return ConfigError(f"{source} says {key}={value}, which {why}; give {key} on the command line if you want that")
