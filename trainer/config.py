"""The run's configuration: YAML files and dotted overrides, checked key by key."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from yaml import YAMLError

from trainer.errors import ConfigError

if TYPE_CHECKING:
    from dllm_kernels.objectives import Recipe

CELLS = 16
MAX_THREADS = 4 * (os.cpu_count() or 1)  # torch crashes where it cannot start as many as it was told to

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Rate = Annotated[float, Field(gt=0.0, lt=1.0)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class TaskConfig(Section):
    clues_min: Annotated[int, Field(ge=4, le=15)]
    clues_max: Annotated[int, Field(ge=4, le=15)]
    held_out_grids: Annotated[int, Field(ge=1, le=287)]
    train_puzzles: Positive
    test_puzzles: Annotated[int, Field(ge=2)]
    careless_share: Share
    careless_forget: Literal["boxes", "columns", "columns_and_boxes"]
    careless_pick: Literal["first", "random"]

    @model_validator(mode="after")
    def _check(self) -> TaskConfig:
        if self.clues_min > self.clues_max:
            raise ValueError(f"clues_min must not exceed clues_max={self.clues_max}, got {self.clues_min}")
        return self


class ModelConfig(Section):
    hidden_size: Positive
    layers: Positive
    heads: Positive
    intermediate_size: Positive
    rope_theta: Annotated[float, Field(gt=1.0)]

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.hidden_size % (2 * self.heads):
            raise ValueError(f"hidden_size must be a multiple of 2 x heads = {2 * self.heads}, got {self.hidden_size}")
        return self


class OptimizerConfig(Section):
    lr: Rate
    warmup: Count
    schedule: Literal["constant", "linear", "cosine"]
    final_lr_share: Share
    betas: Annotated[list[Beta], Field(min_length=2, max_length=2)]
    weight_decay: Annotated[float, Field(ge=0.0)]
    max_grad_norm: Annotated[float, Field(gt=0.0)]
    t_min: Annotated[float, Field(ge=0.0, lt=1.0)]
    save_every: Positive


class SftConfig(OptimizerConfig):
    law: Literal["exact", "bernoulli"]
    steps: Count
    batch: Positive

    def law_options(self) -> dict[str, Any]:
        """What `make_mask_plan` takes beside the law's name: the exact-count law has no `t_min`."""
        return {"t_min": self.t_min} if self.law == "bernoulli" else {}


class RlConfig(OptimizerConfig):
    algorithm: str = "bgpo"  # what the runs trained that do not name one
    law: Literal["exact", "bernoulli", "exact_zero", "antithetic", "coupled", "quadrature", "full", "block"]
    updates: Count
    prompts: Positive
    group: Annotated[int, Field(ge=2)]
    samples: Positive
    inner_iterations: Positive
    advantage: Literal["mean", "loo", "std", "population_std"]
    positive_only: bool
    reward: Literal["valid", "rules", "reference_cells"]

    @model_validator(mode="after")
    def _check(self) -> RlConfig:
        from dllm_kernels import laws

        recipes = _recipes()
        if self.algorithm not in recipes:
            near = difflib.get_close_matches(self.algorithm, recipes, n=1, cutoff=0.0)[0]
            raise ValueError(f"algorithm {self.algorithm} is unknown: the nearest is {near}; there are {', '.join(recipes)}")
        if recipes[self.algorithm].needs_trajectory:
            raise ValueError(
                f"algorithm {self.algorithm} needs the trajectories of rollouts, which `generate` does not give the trainer yet"
            )
        options = laws.resolve(self.law, self.law_options())
        laws.check_samples(*options, self.samples)
        return self

    def law_options(self) -> dict[str, Any]:
        """What `make_mask_plan` takes beside the law's name and samples: the recipe's for its own law."""
        recipe = _recipes()[self.algorithm]
        options = dict(recipe.law_options) if self.law == recipe.law else {}
        return {**options, "t_min": self.t_min} if self.law == "bernoulli" else options


def _recipes() -> dict[str, Recipe]:
    from dllm_kernels.objectives import RECIPES  # with torch, which `--help` does without

    return RECIPES


class RolloutConfig(Section):
    temperature: Annotated[float, Field(ge=0.0)]
    steps: Annotated[int, Field(ge=1, le=CELLS)]
    block_length: Annotated[int, Field(ge=1, le=CELLS)]
    remasking: Literal["low_confidence", "random"]

    @model_validator(mode="after")
    def _check(self) -> RolloutConfig:
        if CELLS % self.block_length:
            raise ValueError(f"block_length must divide {CELLS}, got {self.block_length}")
        blocks = CELLS // self.block_length
        if self.steps % blocks:
            raise ValueError(f"steps must be a multiple of the {blocks} blocks, got {self.steps}")
        return self


class EvaluationConfig(Section):
    probe_every_sft: Count
    probe_every_rl: Count
    probe_puzzles: Positive
    batch: Positive


class RunConfig(Section):
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)]
    out: Annotated[str, Field(min_length=1)]
    threads: Annotated[int, Field(ge=1, le=MAX_THREADS)]
    task: TaskConfig
    model: ModelConfig
    sft: SftConfig
    rl: RlConfig
    rollout: RolloutConfig
    evaluation: EvaluationConfig

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        for name, wanted in (("sft.batch", self.sft.batch), ("rl.prompts", self.rl.prompts)):
            if wanted > self.task.train_puzzles:
                raise ValueError(f"{name} must be at most task.train_puzzles={self.task.train_puzzles}, got {wanted}")
        if self.rollout.temperature == 0 and self.rl.updates:
            raise ValueError("rollout.temperature must be above 0 for reinforcement learning: greedy groups are identical")
        return self

    def to_yaml(self) -> str:
        return OmegaConf.to_yaml(OmegaConf.create(self.model_dump()))


def default_config_text() -> str:
    return files("trainer").joinpath("configs/demo.yaml").read_text()


def load_config(file: Path | None = None, overrides: Sequence[str] = (), *, base: str | None = None) -> RunConfig:
    """The demo's defaults (or `base`, a YAML text), then `file`, then `overrides` such as `rl.updates=10`.

    Where file or overrides choose `rl.algorithm`, its recipe's law, samples and advantages come right after the base.

    Raises ConfigError naming the key, what came and what is allowed.
    """
    try:
        layers = [_mapping(default_config_text() if base is None else base, "the config of the run")]
        if file is not None:
            layers.append(_mapping(file.read_text(encoding="utf-8"), f"config file {file}"))
        for override in overrides:
            if "=" not in override:
                raise ConfigError(f"an override has the form key=value (such as rl.updates=10), got {override!r}")
        layers.append(OmegaConf.from_dotlist(list(overrides)))
        _reject_unknown(layers)
        layers.insert(1, _defaults_of_algorithm(layers[1:]))
        values = OmegaConf.to_container(OmegaConf.merge(*layers), resolve=True)
    except OSError as error:
        raise ConfigError(f"config file {file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"config file {file} cannot be read: it is not UTF-8 text") from error
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"config is not readable: {' '.join(str(error).split())}") from error
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError("; ".join(_sentence(detail) for detail in error.errors())) from error


def _defaults_of_algorithm(layers: Sequence[DictConfig]) -> DictConfig:
    """The recipe of an algorithm that these layers choose: its law, samples and advantages, which their other keys override."""
    chosen = OmegaConf.select(OmegaConf.merge(*layers), "rl.algorithm")
    recipe = _recipes().get(chosen)
    if recipe is None or recipe.needs_trajectory:  # nothing chosen, or an error later
        return OmegaConf.create({})
    keys = {"law": recipe.law, "samples": recipe.samples, "advantage": recipe.advantage}
    return OmegaConf.create({"rl": {key: value for key, value in keys.items() if value is not None}})


def _mapping(text: str, name: str) -> DictConfig:
    plain = yaml.safe_load(text)
    if plain is not None and not isinstance(plain, dict):
        kinds = {list: "a list", int: "a number", float: "a number", bool: "a truth value"}
        raise ConfigError(f"{name} must hold a mapping of keys, got {kinds.get(type(plain), 'text')}")
    return OmegaConf.create(text if plain else {})


def allowed_keys(section: type[BaseModel] = RunConfig, prefix: str = "") -> list[str]:
    """Every dotted key, sections included."""
    keys: list[str] = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += allowed_keys(field.annotation, f"{prefix}{name}.")
    return keys


def _reject_unknown(layers: Sequence[DictConfig]) -> None:
    """Before merging, so that a key that does not exist is reported rather than what it would have replaced."""
    allowed = allowed_keys()

    def visit(node: Any, prefix: str) -> None:
        for name, value in node.items_ex(resolve=False) if isinstance(node, DictConfig) else ():
            key = f"{prefix}{name}"
            if key not in allowed:
                raise ConfigError(_unknown(key, allowed))
            if isinstance(value, DictConfig):
                visit(value, f"{key}.")
            elif any(other.startswith(f"{key}.") for other in allowed):
                raise ConfigError(f"{key} is a section and takes keys such as {_children(key, allowed)}, got {value!r}")

    for layer in layers:
        visit(layer, "")


def _unknown(key: str, allowed: list[str]) -> str:
    section, _, name = key.rpartition(".")
    same_name = [other for other in allowed if other.rpartition(".")[2] == name]  # the right name, the wrong section
    near = (same_name or difflib.get_close_matches(key, allowed, n=1, cutoff=0.0))[0]
    while section and not _children(section, allowed):
        section = section.rpartition(".")[0]
    where = f"in {section}" if section else "at the top level"
    return f"unknown config key {key}: the nearest is {near}; allowed {where}: {_children(section, allowed)}"


def _children(section: str, allowed: list[str]) -> str:
    prefix = f"{section}." if section else ""
    return ", ".join(k for k in allowed if k.startswith(prefix) and "." not in k[len(prefix) :])


def _sentence(detail: Any) -> str:
    key = ".".join(str(part) for part in detail["loc"])
    message = detail["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    if detail["type"] == "value_error":  # written above: names key and value itself
        return f"{key}: {message}" if key else message
    if detail["type"] == "missing":
        return f"{key} is missing"
    if detail["type"] in ("too_short", "too_long"):
        wanted = detail["ctx"].get("min_length") or detail["ctx"].get("max_length")
        return f"{key} must have {wanted} entries, got {detail['input']!r}"
    return f"{key} {message}, got {detail['input']!r}"
