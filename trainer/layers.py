"""The layers of a configuration, YAML texts and dotted overrides: read, checked key by key, and told in sentences."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from pydantic import BaseModel

from .errors import ConfigError
from .tasks import MODULES

if TYPE_CHECKING:
    from dllm_kernels.objectives import Recipe


def recipes_by_name() -> Mapping[str, Recipe]:
    from dllm_kernels.objectives import RECIPES  # loads torch, which `--help` does without

    return RECIPES


def from_environment(values: Any, written: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], tuple[Any, str]]]:
    if isinstance(written, dict):
        for name, text in written.items():
            yield from from_environment(values[name], text, (*path, name))
    elif isinstance(written, str) and "${oc.env:" in written:
        yield path, (values, written)


def drop_others(layers: Sequence[DictConfig], choice: str, first: str, section: str) -> None:
    """Empties the section of layers whose choice, at first `first`, is not the one that is made in the end."""
    choices = [OmegaConf.select(layer, choice) for layer in layers]
    last = next((made for made in reversed(choices) if made is not None), first)
    current = first
    for layer, made in zip(layers, choices, strict=True):
        current = current if made is None else made
        if current != last and OmegaConf.select(layer, section) is not None:
            OmegaConf.update(layer, section, {}, merge=False)


def drop_keys_of_others(layers: Sequence[DictConfig], choice: str, first: str, keys: Mapping[str, Sequence[str]]) -> None:
    """Takes from the section of a choice the keys of what layers chose, at first `first`, and is not chosen in the end."""
    section = choice.rpartition(".")[0]
    choices = [OmegaConf.select(layer, choice) for layer in layers]
    last = next((made for made in reversed(choices) if made is not None), first)
    current = first
    for layer, made in zip(layers, choices, strict=True):
        current = current if made is None else made
        node = OmegaConf.select(layer, section)
        if current != last and isinstance(current, str) and isinstance(node, DictConfig):
            for key in set(keys.get(current, ())) & set(node):
                del node[key]


def defaults_of_algorithm(layers: Sequence[DictConfig]) -> DictConfig:
    """The recipe of an algorithm that these layers choose: its law, samples and advantages, which their other keys override."""
    name = OmegaConf.select(OmegaConf.merge(*layers), "rl.algorithm")
    recipe = recipes_by_name().get(name) if isinstance(name, str) else None
    if recipe is None:  # nothing chosen, or an error later
        return OmegaConf.create({})
    keys = {"law": recipe.law, "samples": recipe.samples, "advantage": recipe.advantage}
    return OmegaConf.create({"rl": {key: value for key, value in keys.items() if value is not None}})


def mapping(text: str, name: str) -> DictConfig:
    try:
        plain = yaml.safe_load(text)
    except RecursionError as error:
        raise ConfigError(f"{name} is nested too deeply") from error
    if plain is not None and not isinstance(plain, dict):
        kinds = {list: "a list", int: "a number", float: "a number", bool: "a truth value"}
        raise ConfigError(f"{name} must hold a mapping of keys, got {kinds.get(type(plain), 'text')}")
    return OmegaConf.create(text if plain else {})


def _parts(annotation: Any) -> Iterator[Any]:
    """The types that a field may have: those of a union, annotations taken off."""
    if typing.get_origin(annotation) is Annotated:
        yield from _parts(typing.get_args(annotation)[0])
    elif typing.get_args(annotation) and typing.get_origin(annotation) not in (dict, list, Literal):
        for part in typing.get_args(annotation):
            yield from _parts(part)
    else:
        yield annotation


def keys_of(section: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key, sections included; `key.*` for one whose own keys are free."""
    keys: dict[str, None] = {}
    for name, field in section.model_fields.items():
        keys[prefix + name] = None
        for part in _parts(field.annotation):
            if isinstance(part, type) and issubclass(part, BaseModel):
                keys |= dict.fromkeys(keys_of(part, f"{prefix}{name}."))
            elif typing.get_origin(part) is dict:
                keys[f"{prefix}{name}.*"] = None
    return list(keys)


def reject_unknown(layers: Sequence[DictConfig], allowed: list[str]) -> None:
    """Before merging, so that a key that does not exist is reported rather than what it would have replaced."""

    def visit(node: Any, prefix: str) -> None:
        for name, value in node.items_ex(resolve=False) if isinstance(node, DictConfig) else ():
            key = f"{prefix}{name}"
            if f"{prefix}*" in allowed:
                continue
            if key not in allowed:
                raise ConfigError(_unknown(key, [other for other in allowed if not other.endswith("*")]))
            free = f"{key}.*" in allowed
            section = free or any(other.startswith(f"{key}.") for other in allowed)
            if isinstance(value, ListConfig) and free:
                raise ConfigError(f"{key} is a mapping of names to values, got the list {value}")
            if isinstance(value, DictConfig) and not section and not value:  # else its first key is told
                raise ConfigError(f"{key} is a single value or a list, got the mapping {value}")
            if isinstance(value, DictConfig):
                visit(value, f"{key}.")
            elif section and not free:
                raise ConfigError(f"{key} is a section and takes keys such as {_children(key, allowed)}, got {value!r}")

    for layer in layers:
        visit(layer, "")


# what transformers and earlier versions call it: what it is here
_RENAMED = {
    "final_lr_share": "schedule_options.min_lr_rate, of the schedules cosine_with_min_lr and cosine_warmup_with_min_lr",
    "lr_scheduler": "schedule",
    "lr_scheduler_type": "schedule",
    "lr_scheduler_kwargs": "schedule_options",
    "warmup_steps": "warmup",
}


def _unknown(key: str, allowed: list[str]) -> str:
    section, _, name = key.rpartition(".")
    if section in ("sft", "rl") and name in _RENAMED:
        return f"unknown config key {key}: it is {section}.{_RENAMED[name]}"
    if section == "rl" and (those := [recipe.name for recipe in recipes_by_name().values() if name in recipe.option_names]):
        return f"unknown config key {key}: it is rl.options.{name}, of {', '.join(those)}"
    same_name = [other for other in allowed if other.rpartition(".")[2] == name]  # the right name, the wrong section
    near = (same_name or difflib.get_close_matches(key, allowed, n=1, cutoff=0.0))[0]
    while section and not _children(section, allowed):
        section = section.rpartition(".")[0]
    where = f"in {section}" if section else "at the top level"
    return f"unknown config key {key}: the nearest is {near}; allowed {where}: {_children(section, allowed)}"


def _children(section: str, allowed: list[str]) -> str:
    prefix = f"{section}." if section else ""
    return ", ".join(k for k in allowed if k.startswith(prefix) and "." not in k[len(prefix) :])


def sentence(detail: Any) -> str:
    key = ".".join(
        str(part)
        for place, part in enumerate(detail["loc"])
        if not (place == 1 and detail["loc"][0] == "task" and part in MODULES)
    )
    message = detail["msg"].removeprefix("Value error, ").replace("Input should", "must").replace("String should", "must")
    message = re.sub(r" or instance of \w+", "", message)
    if detail["type"] == "value_error":  # written above: names key and value itself
        return f"{key}: {message}" if key else message
    if detail["type"] == "extra_forbidden":
        return f"{key} is no key of this kind of {key.partition('.')[0]}, got {detail['input']!r}"
    if detail["type"] == "union_tag_invalid":
        *most, last = map(repr, MODULES)
        return f"{key}.kind must be {', '.join(most)} or {last}, got {detail['input'].get('kind')!r}"
    if detail["type"] == "missing":
        return f"{key} is missing"
    if detail["type"] in ("too_short", "too_long"):
        wanted = detail["ctx"].get("min_length") or detail["ctx"].get("max_length")
        return f"{key} must have {wanted} entries, got {detail['input']!r}"
    return f"{key} {message}, got {detail['input']!r}"
