"""The run's configuration: YAML files and dotted overrides, checked key by key."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Collection, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, PrivateAttr, ValidationError, model_validator
from yaml import YAMLError

from .decoding import ENGINE_KEYS, RolloutConfig
from .errors import ConfigError, telling_of_algorithms
from .layers import (
    defaults_of_algorithm,
    drop_keys_of_others,
    drop_others,
    from_environment,
    keys_of,
    mapping,
    recipes_by_name,
    reject_unknown,
    sentence,
)
from .rights import without_rights
from .schedules import Schedule, check_options
from .sections import Beta, Count, NotNegative, Positive, Rate, Section, Share, Text
from .tasks.config import AnyTaskConfig

MAX_THREADS = 4 * (os.cpu_count() or 1)  # torch crashes where it cannot start as many as it was told to

Dtype = Literal["float32", "bfloat16"]


class PromptConfig(Section):
    few_shot: Count = 0  # training examples shown before each question
    instructions: bool = True  # the task's system text, where it has one
    chat_template: bool = True  # the tokenizer's, where it has one
    max_length: Positive | None = None  # tokens; a longer prompt is an error, never cut


class LoraConfig(Section):
    rank: Count = 0  # 0: all weights are trained
    alpha: Annotated[float, Field(gt=0.0)] = 64.0  # the adapters' product is scaled by alpha / rank
    dropout: Share = 0.0  # of the adapters' input; 0 where scores are to be repeated
    targets: Annotated[list[Text], Field(min_length=1)] | None = None  # None: every linear layer of the blocks


class ModelConfig(Section):
    checkpoint: Text | None = None  # folder or hub id; None: EuroBERT of the sizes below, random
    revision: Text | None = None  # branch, tag or commit of a hub checkpoint
    trust_remote_code: bool = False  # run the modelling code that the checkpoint brings
    dtype: Dtype = "float32"  # of the weights that are trained
    four_bit: bool = False  # QLoRA: the frozen weights in 4 bits (bitsandbytes)
    facts: dict[str, Any] = Field(default_factory=dict)  # over what the table and the checkpoint say: mask_id, shift, ...
    gradient_checkpointing: bool = False  # recompute each block in backward: less memory, a third more time
    lora: LoraConfig = LoraConfig()  # adapters instead of training all weights
    hidden_size: Positive = 64  # from here on: of a model from scratch
    layers: Positive = 4  # transformer blocks
    heads: Positive = 4  # attention heads
    intermediate_size: Positive = 128  # width of the blocks' MLP
    rope_theta: Annotated[float, Field(gt=1.0)] = 100.0  # base of the rotary positions
    context: Positive = 64  # most tokens of prompt and completion together

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.hidden_size % (2 * self.heads):
            raise ValueError(f"hidden_size must be a multiple of 2 x heads = {2 * self.heads}, got {self.hidden_size}")
        if self.facts and self.checkpoint is None:
            raise ValueError(
                f"facts are those of a checkpoint, a model built from scratch has its own; got {', '.join(self.facts)}"
            )
        if self.four_bit and self.checkpoint is None:
            raise ValueError("four_bit is for a checkpoint: a model built from scratch has no weights to quantise")
        if self.four_bit and not self.lora.rank:
            raise ValueError("four_bit needs lora.rank above 0: quantised weights are not trained")
        return self


class ParallelConfig(Section):
    replicas: Positive = 1  # HSDP: copies of the model, each sharded over ranks / replicas
    dtype: Dtype | None = None  # of parameters in forward and backward; None: their own
    reshard_after_forward: bool = True  # FSDP frees gathered layers after forward: less memory, more traffic
    patience: Annotated[float, Field(ge=5.0)] = 600.0  # seconds that a rank may stand still before the first step; then fewer


class CheckpointsConfig(Section):
    keep_last: Positive = 1  # newest checkpoints that stay
    keep_best: Count = 0  # best ones that stay beside them, by `metric`
    metric: Text = "probe_greedy"  # of metrics.jsonl, the higher the better; only steps that have it can be best
    every_minutes: Annotated[float, Field(gt=0.0)] | None = None  # beside save_every: by the clock
    background: bool = False  # checksums and the flush to disk, most of a save's time, while training goes on


class OptimizerConfig(Section):
    lr: Rate  # learning rate of AdamW, after the warm-up
    warmup: Count  # steps of linear warm-up
    schedule: Schedule  # of the learning rate, by transformers' get_scheduler; constant: after the warm-up
    schedule_options: dict[str, Any] = Field(default_factory=dict)  # its scheduler_specific_kwargs: min_lr_rate, num_cycles ...
    betas: Annotated[list[Beta], Field(min_length=2, max_length=2)]  # of AdamW
    weight_decay: NotNegative  # of AdamW, on matrices alone: neither norms and biases nor embeddings
    max_grad_norm: Annotated[float, Field(gt=0.0)]  # gradients are clipped to it
    t_min: Annotated[float, Field(ge=0.0, lt=1.0)]  # lowest mask level of the bernoulli law
    save_every: Positive  # steps between checkpoints
    micro_batch: Positive | None = None  # sequences per forward and backward of a rank; None: all at once

    @model_validator(mode="after")
    def _check_schedule(self) -> OptimizerConfig:
        check_options(self.schedule, self.schedule_options, self.lr)
        return self


class SftConfig(OptimizerConfig):
    law: Literal["exact", "bernoulli"]  # of masks: exactly n of L tokens, n uniform, or each with probability t
    steps: Count  # of supervised fine-tuning; 0: none
    batch: Positive  # demonstrations of a step, of all ranks

    def law_options(self) -> dict[str, Any]:
        """What `make_mask_plan` takes beside the law's name: the exact-count law has no `t_min`."""
        return {"t_min": self.t_min} if self.law == "bernoulli" else {}


TRACES = ("trace", "segments")  # laws of given trajectories


class RlConfig(OptimizerConfig):
    algorithm: str = "bgpo"  # what the runs trained that do not name one
    # of the masks of scoring; the recipe's unless given
    law: Literal["exact", "bernoulli", "exact_zero", "antithetic", "coupled", "quadrature", "full", "block", "trace", "segments"]
    updates: Count  # of reinforcement learning; 0: none
    prompts: Positive  # of an update, of all ranks
    group: Annotated[int, Field(ge=2)]  # rollouts of a prompt
    samples: Positive  # Monte-Carlo samples K; the laws of trajectories have as many as there are states
    # of them at once; in a block-causal model they share one clean copy. auto: as many, and sequences, as the budget holds
    samples_per_pass: Positive | Literal["auto"] = 1
    memory_budget: Positive | None = None  # MiB of activations and head, for samples_per_pass=auto
    inner_iterations: Positive  # optimizer steps on one set of rollouts
    # reward minus the group's mean, also divided by its spread, or leave-one-out
    advantage: Literal["mean", "loo", "std", "population_std"]
    positive_only: bool  # rollouts with a negative advantage are left out
    window: Literal["eos", "completion"] | None = None  # scored tokens: up to the first EOS, or all; None: as published
    tail: Literal["shown", "hidden", "removed"] | None = None  # what the model sees of the rest; None: as published
    reward: Text  # one of the task's, or module:function
    reward_timeout: Annotated[float, Field(gt=0.0)] = 60.0  # seconds that module:function may take for one batch
    options: dict[str, Any] = Field(default_factory=dict)  # the algorithm's own, over those of its recipe: beta, epsilon ...
    teacher: Text | None = None  # a checkpoint as the reference policy; None: the model as RL begins
    gap_every: Count = 10  # updates between checks that scoring gives what the rollout saw; 0 is never
    gap_bound: Annotated[float, Field(gt=0.0)] = 0.05  # nats per token, beyond which the run stops

    @model_validator(mode="after")
    def _check(self) -> RlConfig:
        from dllm_kernels.masks import laws

        recipes = recipes_by_name()
        if self.algorithm not in recipes:
            near = difflib.get_close_matches(self.algorithm, recipes, n=1, cutoff=0.0)[0]
            raise ValueError(f"algorithm {self.algorithm} is unknown: the nearest is {near}; there are {', '.join(recipes)}")
        recipe = recipes[self.algorithm]
        if infinite := [name for name, value in self.options.items() if isinstance(value, float) and not math.isfinite(value)]:
            raise ValueError(f"options.{infinite[0]} must be finite, got {self.options[infinite[0]]}")
        if recipe.needs_trajectory and self.law != recipe.law:
            raise ValueError(f"law must be {recipe.law} for algorithm {self.algorithm}, got {self.law}")
        if self.law in TRACES and not recipe.needs_trajectory:
            those = ", ".join(name for name, other in recipes.items() if other.needs_trajectory)
            raise ValueError(f"law {self.law} is for the trajectories of {those}, got algorithm {self.algorithm}")
        if self.teacher is not None and not recipe.wants_reference(self.options):
            raise ValueError(
                f"teacher must be null for algorithm {self.algorithm}, which has no reference policy, got {self.teacher}"
            )
        if (self.samples_per_pass == "auto") != (self.memory_budget is not None):
            raise ValueError("memory_budget must be given with samples_per_pass=auto, and only then")
        if self.samples_per_pass == "auto" and self.micro_batch is not None:
            raise ValueError(f"micro_batch must be null with samples_per_pass=auto, which chooses it, got {self.micro_batch}")
        window, _ = self.scored()
        if self.tail is not None and window != "eos":
            raise ValueError(f"tail must be null with window completion, which leaves no tail, got {self.tail}")
        if self.tail not in (None, "hidden") and recipe.needs_trajectory:
            raise ValueError(
                f"tail must be null or hidden for algorithm {self.algorithm}, which scores the states of its rollouts: they hide "
                f"of the tail what the rollout had not decided, got {self.tail}"
            )
        if self.law not in TRACES:
            options = laws.resolve(self.law, self.law_options())
            laws.check_samples(*options, self.samples)
        return self

    def scored(self) -> tuple[str, str | None]:
        """(window, tail): the recipe's, where the config does not say."""
        recipe = recipes_by_name()[self.algorithm]
        window = self.window or recipe.window
        return window, self.tail or (recipe.tail if window == recipe.window else None)

    def law_options(self) -> dict[str, Any]:
        """What `make_mask_plan` takes beside the law's name and samples: the recipe's for its own law."""
        recipe = recipes_by_name()[self.algorithm]
        options = dict(recipe.law_options) if self.law == recipe.law else {}
        return {**options, "t_min": self.t_min} if self.law == "bernoulli" else options


class EvaluationConfig(Section):
    probe_every_sft: Count  # steps between looks at unseen examples; 0: never
    probe_every_rl: Count  # the same, in updates
    probe_examples: Positive  # of the first test set, for such a look
    batch: Positive  # examples per call of generate, of all ranks
    samples: Count = 8  # examples whose answers are kept in samples.jsonl, at every evaluation; 0: none


class GuardConfig(Section):
    no_signal: Positive | None = None  # updates in a row without a gradient, as all rewards of a group are equal, that end a run
    warn_after: Positive = 5  # of such updates a warning comes
    shift_test: bool = True  # the alignment of a checkpoint is tested on the task's text


class RunConfig(Section):
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)]  # of weights, data order, masks and rollouts
    data_seed: Annotated[int, Field(ge=0, le=2**32 - 1)] | None = None  # of the task's examples; None: seed
    out: Text  # folder of the run
    threads: Annotated[int, Field(ge=1, le=MAX_THREADS)]  # of torch
    tensorboard: bool = True  # write its event files into the folder
    wandb: Text | None = None  # project
    task: AnyTaskConfig  # what is learned
    prompt: PromptConfig = PromptConfig()  # how prompts are written
    model: ModelConfig  # a checkpoint, or sizes
    parallel: ParallelConfig = ParallelConfig()  # several GPUs
    sft: SftConfig  # supervised fine-tuning
    rl: RlConfig  # reinforcement learning
    rollout: RolloutConfig  # how completions are sampled
    evaluation: EvaluationConfig  # accuracy on examples that are not trained on
    guard: GuardConfig = GuardConfig()  # what stops a run
    checkpoints: CheckpointsConfig = CheckpointsConfig()  # what a run keeps, and when
    _from_environment: dict[tuple[str, ...], tuple[Any, str]] = PrivateAttr(default_factory=dict)  # path: value, as written

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        if self.rollout.temperature == 0 and self.rl.updates:
            raise ValueError("rollout.temperature must be above 0 for reinforcement learning: greedy groups are identical")
        try:
            recipes_by_name()[self.rl.algorithm].check(self.rl.options)
        except (TypeError, ValueError) as error:
            raise ValueError(f"rl.options of {self.rl.algorithm}: {error}") from error
        if self.rollout.engine == "sglang":
            self._check_server()
        return self

    def _check_server(self) -> None:
        recipe, rl = recipes_by_name()[self.rl.algorithm], self.rl
        if self.model.lora.rank:
            raise ValueError(
                f"model.lora.rank must be 0 with rollout.engine=sglang, which loads whole models, got {self.model.lora.rank}"
            )
        if self.task.kind == "pairs" or not rl.updates:
            return
        if recipe.greedy:
            raise ValueError(
                f"rl.algorithm must be another than {rl.algorithm} with rollout.engine=sglang: it asks for the likeliest "
                "completion before each step, which the server does not tell"
            )
        if not self.rollout.step_maps and recipe.needs_trajectory:
            raise ValueError(
                f"rollout.step_maps must be true for rl.algorithm {rl.algorithm}, which replays the states of rollouts"
            )
        if not self.rollout.step_maps and rl.gap_every:
            raise ValueError(
                f"rl.gap_every must be 0 with rollout.step_maps=false, without which nothing can be compared, got {rl.gap_every}"
            )

    @property
    def task_seed(self) -> int:
        return self.seed if self.data_seed is None else self.data_seed

    def written(self) -> dict[str, Any]:
        """Plain values for a file; those read from the environment as they were written, `${oc.env:NAME}`."""
        values = self.model_dump()
        for (*sections, name), (value, text) in self._from_environment.items():
            section = values
            for part in sections:
                section = section[part]
            if section[name] == value:
                section[name] = text
        return values

    def to_yaml(self) -> str:
        return OmegaConf.to_yaml(OmegaConf.create(self.written()))


def shipped_configs() -> dict[str, Path]:
    """Name -> file of the configs that come with the trainer; `demo` is what every other one is laid over."""
    folder = Path(str(files(__package__))) / "configs"
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def allowed_keys() -> list[str]:
    """Every dotted key, sections included; `key.*` for one whose own keys are free."""
    return keys_of(RunConfig)


@telling_of_algorithms()
def load_config(
    file: Path | None = None,
    overrides: Sequence[str] = (),
    *,
    base: str | None = None,
    base_name: str = "the config of the run",
    base_calls: Collection[str] | None = None,
) -> RunConfig:
    """The demo's defaults (or `base`, a YAML text), then `file`, then `overrides` such as `rl.updates=10`.

    base_calls: None where `base` is the user's own; else it lay beside a checkpoint and may not grant rights (`rights.py`),
    and these are the keys that name functions which will be called.

    `file` may be the name of a shipped config. Where a layer chooses another `task.kind`, the task's keys below it are left
    out, `schedule_options` where one chooses another `schedule`, and `rl.options` where one chooses another `rl.algorithm`;
    whose recipe's law, samples and advantages come right after the base. So are the keys of another `rollout.engine`.

    Raises ConfigError naming the key, what came and what is allowed.
    """
    try:
        shipped = shipped_configs()
        layers = [mapping(shipped["demo"].read_text() if base is None else base, base_name)]
        if file is not None:
            file = shipped.get(str(file), file)
            layers.append(mapping(file.read_text(encoding="utf-8"), f"config file {file}"))
        for override in overrides:
            if "=" not in override:
                raise ConfigError(f"an override has the form key=value (such as rl.updates=10), got {override!r}")
        layers.append(OmegaConf.from_dotlist(list(overrides)))
        reject_unknown(layers, allowed_keys())
        if base_calls is not None:
            given = {key for key in allowed_keys() if any(OmegaConf.select(layer, key) is not None for layer in layers[1:])}
            plain: Any = OmegaConf.to_container(layers[0])
            layers[0] = OmegaConf.create(without_rights(plain, given, base_calls, base_name))
        drop_others(layers, "task.kind", "sudoku", "task")
        for phase in ("sft", "rl"):
            drop_others(layers, f"{phase}.schedule", "", f"{phase}.schedule_options")
        drop_keys_of_others(layers, "rollout.engine", "ours", ENGINE_KEYS)
        drop_others(layers, "rl.algorithm", RlConfig.model_fields["algorithm"].default, "rl.options")
        layers.insert(1, defaults_of_algorithm(layers[1:]))
        merged = OmegaConf.merge(*layers)
        values, written = OmegaConf.to_container(merged, resolve=True), OmegaConf.to_container(merged)
    except OSError as error:
        near = difflib.get_close_matches(str(file), shipped, n=1)
        hint = f"; of those that come along the nearest is {near[0]}" if near else ""
        hint = hint or f"; those that come along are {', '.join(shipped)}"
        raise ConfigError(f"config file {file} cannot be read: {error.strerror}{hint}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"config file {file} cannot be read: it is not UTF-8 text") from error
    except ConfigError:
        raise
    except RecursionError as error:
        raise ConfigError("config is not readable: a value is nested too deeply") from error
    # ValueError: an integer of thousands of digits; TypeError: a list in one file and a mapping in another
    except (YAMLError, OmegaConfBaseException, ValueError, TypeError) as error:
        raise ConfigError(f"config is not readable: {' '.join(str(error).split())}") from error
    try:
        config = RunConfig.model_validate(values)
        config._from_environment.update(from_environment(values, written, ()))
        return config
    except ValidationError as error:
        raise ConfigError("; ".join(sentence(detail) for detail in error.errors())) from error
