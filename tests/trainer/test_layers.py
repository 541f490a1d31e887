"""Layers of a configuration; what users meet of them is in test_config.py."""

import pytest
from dllm_trainer.errors import ConfigError
from dllm_trainer.layers import drop_others, mapping, reject_unknown


def test_what_is_said_of_another_choice_is_left_out() -> None:
    layers = [mapping(text, "x") for text in ("a: {x: 1}", "kind: two", "kind: one\na: {y: 2}", "kind: two\na: {z: 3}")]
    drop_others(layers, "kind", "one", "a")
    assert layers == [{"a": {}}, {"kind": "two"}, {"kind": "one", "a": {}}, {"kind": "two", "a": {"z": 3}}]


def test_an_unknown_key_is_refused_with_the_nearest_and_free_sections_take_any() -> None:
    reject_unknown([mapping("a: {x: 1}\nfree: {whatever: 2}", "x")], ["a", "a.x", "free", "free.*"])
    with pytest.raises(ConfigError, match=r"unknown config key a.xx: the nearest is a.x; allowed in a: a.x"):
        reject_unknown([mapping("a: {xx: 1}", "x")], ["a", "a.x"])
    with pytest.raises(ConfigError, match=r"a is a section and takes keys such as a.x, got 3"):
        reject_unknown([mapping("a: 3", "x")], ["a", "a.x"])
    with pytest.raises(ConfigError, match=r"^free is a mapping of names to values, got the list \[3\]$"):
        reject_unknown([mapping("free: [3]", "x")], ["free", "free.*"])
    with pytest.raises(ConfigError, match=r"^a is a single value or a list, got the mapping \{\}$"):
        reject_unknown([mapping("a: {}", "x")], ["a"])
