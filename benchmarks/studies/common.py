"""What the claims' studies share: a claim and its rule, a trained model's completions, gradients, tables.

Intervals are 95 % bootstraps over prompts (or what a study says): all completions of a prompt are drawn
together.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from dllm_trainer.config import load_config
from dllm_trainer.distributed import Ranks
from dllm_trainer.tasks import Example, make_task
from dllm_trainer.train.optimization import make_optimizer
from dllm_trainer.train.rl import rl_updates
from dllm_trainer.train.run import prepare
from dllm_trainer.train.setup import Setup
from torch import Tensor, nn

from benchmarks.registry import ROOT
from benchmarks.report import interval, markdown
from dllm_kernels import MaskPlan, Rollout, accumulate, generate, make_mask_plan, noise
from dllm_kernels.accumulation.objective import Batch, Objective
from dllm_kernels.accumulation.report import Report

CONFIRMED, REFUTED, UNDECIDED = "confirmed", "refuted", "undecided"
RESULTS = ROOT / "benchmarks" / "results"

Figures = dict[str, Any]


class Parts:
    """What the parts of experiments found, a line each in a file, so that a stopped run goes on where it was.

    Without a file nothing is kept. A part is known by all that it is a function of; the checkpoint counts by
    its bytes.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self._found: dict[str, Any] = {}
        if file is not None and file.is_file():
            # the process that wrote a line without an end was killed
            whole = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
            file.write_text("".join(whole))
            self._found = {json.dumps(entry["key"]): entry["found"] for entry in map(json.loads, whole)}

    def get(self, settings: Settings, claim: str, key: Mapping[str, Any], make: Callable[[], Any]) -> Any:
        """What `make()` returns, as JSON gives it back, or what it returned in an earlier run."""
        about = {"claim": claim, "checkpoint": digest(settings.checkpoint), "tiny": settings.tiny, "seed": settings.seed, **key}
        name = json.dumps(about)
        if name not in self._found:
            found = json.loads(json.dumps(make(), allow_nan=False))
            if self._file is not None:
                self._file.parent.mkdir(parents=True, exist_ok=True)
                with self._file.open("a") as lines:
                    lines.write(json.dumps({"key": about, "found": found}) + "\n")
            self._found[name] = found
        return self._found[name]


@functools.lru_cache
def digest(checkpoint: str | None) -> str | None:
    if checkpoint is None:
        return None
    return hashlib.sha256((Path(checkpoint) / "model.safetensors").read_bytes()).hexdigest()[:16]


@dataclass(frozen=True)
class Settings:
    # a folder; None: the demo's architecture with random weights, as --tiny takes
    checkpoint: str | None = None
    tiny: bool = False
    seed: int = 0
    large: bool = False  # the sizes that undecided claims asked for
    characters: str | None = None  # a character model's folder, see gdpo.py
    parts: Parts = field(default_factory=Parts, compare=False)

    def part(self, claim: str, make: Callable[[], Any], **key: Any) -> Any:
        return self.parts.get(self, claim, key, make)

    @property
    def reward(self) -> str:
        """A random model solves nothing: at --tiny it is rewarded at whim, so that groups have signal."""
        return "whim" if self.tiny else "valid"


@dataclass(frozen=True)
class Tiers:
    """Sizes of an experiment: the smallest, those of its figures, and those that were found to be needed."""

    tiny: Mapping[str, int]
    usual: Mapping[str, int]
    large: Mapping[str, int] | None = None

    def __call__(self, settings: Settings) -> Mapping[str, int]:
        if settings.tiny:
            return self.tiny
        return self.large if settings.large and self.large is not None else self.usual


@dataclass(frozen=True)
class Claim:
    """What a paper says, how it is measured here, and the rule by which figures decide.

    `verdict` sees the figures alone, so that other figures give another verdict; `rule` is that function in
    words.
    """

    name: str
    paper: str
    says: str
    rule: str
    sizes: Callable[[Settings], Mapping[str, int]]
    measure: Callable[[Settings], Figures]
    verdict: Callable[[Figures], str]
    table: Callable[[Figures], str]
    caveat: str = ""


def decide(confirmed: bool, refuted: bool) -> str:
    """One of the three words. Both at once is no finding."""
    return UNDECIDED if confirmed == refuted else CONFIRMED if confirmed else REFUTED


# --- the model and its completions --------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """The G completions that the policy drew for one prompt."""

    rollout: Rollout
    rewards_B: Tensor
    greedy_rewards_BT: Tensor | None  # of the greedy completion seen before each step
    empty_L: Tensor  # bool: the cells that the puzzle leaves open; the others are copied

    @property
    def group_ids_B(self) -> Tensor:
        return torch.zeros(len(self.rewards_B), dtype=torch.int64)

    @property
    def has_signal(self) -> bool:
        return bool((self.rewards_B != self.rewards_B[0]).any())


@dataclass
class Subject:
    setup: Setup
    seed: int
    reward: str

    @property
    def model(self) -> nn.Module:
        return self.setup.model

    def examples(self, count: int) -> Sequence[Example]:
        """Unseen puzzles: no update that moves the policy has them."""
        return self.setup.task.tests["unseen_puzzles"][:count]

    def groups(self, prompts: int, size: int, *, model: nn.Module | None = None, greedy: bool = False) -> list[Group]:
        """`size` completions for each of so many unseen prompts, by the demo's sampler at temperature 1."""
        return [self.group(example, size, model=model, greedy=greedy) for example in self.examples(prompts)]

    def group(self, example: Example, size: int, *, model: nn.Module | None = None, greedy: bool = False) -> Group:
        setup, several = self.setup, [example] * size
        rollout = generate(
            model or self.model,
            setup.codec.prompts(several),
            seed=self.seed,
            sequence_ids=noise.sequence_ids([f"claims/{example.id}"] * size, members=range(size)),
            **setup.generate_options(greedy=greedy),
        )
        empty_L = torch.tensor([cell == "0" for cell in example.facts["puzzle"]])
        return self.judged(Group(rollout, torch.empty(0), None, empty_L), example, self.reward)

    def judged(self, group: Group, example: Example, reward: str) -> Group:
        """The same completions under a reward of that name."""
        rollout, seen_BT = group.rollout, None
        rewards_B = self.rewards([example] * len(rollout.completion_BL), rollout.completion_BL, reward)
        if rollout.greedy_BTL is not None:
            B, T, L = rollout.greedy_BTL.shape
            seen_BT = self.rewards([example] * (B * T), rollout.greedy_BTL.view(B * T, L), reward).view(B, T)
        return replace(group, rewards_B=rewards_B, greedy_rewards_BT=seen_BT)

    def with_signal(self, prompts: int, size: int, **options: Any) -> list[Group]:
        """The groups whose rewards differ. Raises ValueError if there are none: nothing could be measured."""
        found = [group for group in self.groups(prompts, size, **options) if group.has_signal]
        if not found:
            raise ValueError(
                f"--checkpoint must be a model that solves some puzzles and not all, {prompts} prompts had no signal"
            )
        return found

    def rewards(self, examples: Sequence[Example], completion_BL: Tensor, reward: str | None = None) -> Tensor:
        return torch.tensor(self.setup.task.rewards[reward or self.reward](examples, self.setup.codec.texts(completion_BL)))

    def plan(self, rollout: Rollout, samples: int, seed: int, law: str = "exact", **options: Any) -> MaskPlan:
        return make_mask_plan(
            rollout.ids_BS,
            rollout.completion_mask_BS,
            law=law,
            samples=samples,
            seed=seed,
            sequence_ids=rollout.sequence_ids_B,
            mask_id=rollout.mask_id,
            **options,
        )

    def rollout_options(self) -> dict[str, Any]:
        """For trajectories: scored without the mask id, as they were drawn."""
        return {"suppress": self.setup.scoring_options(None, self.setup.config.rl, as_rolled_out=True)["suppress"]}


def gradient(
    model: nn.Module, plan: MaskPlan, objective: Objective, batch: Batch, denominator: float = 1.0, **options: Any
) -> tuple[Tensor, Report]:
    """The flat gradient `[P]` of all parameters by `accumulate`, all samples in one pass."""
    model.zero_grad(set_to_none=True)
    options = {"samples_per_pass": plan.shape[0], **options}
    report = accumulate(model, plan, objective, batch, denominator=denominator, **options)
    # all samples of no weight: nothing reached the model, and the gradient is 0
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    flat_P = torch.cat([part.flatten() for part in parts])
    model.zero_grad(set_to_none=True)
    return flat_P, report


def load(settings: Settings, *overrides: str) -> Subject:
    """Raises UserError for a checkpoint that cannot be read."""
    source = [] if settings.checkpoint is None else [f"model.checkpoint={json.dumps(settings.checkpoint)}"]
    config = load_config(overrides=[*source, "threads=1", *overrides])
    setup = prepare(config, _task(config.task, config.task_seed), Ranks())
    setup.trained.eval()
    return Subject(setup, settings.seed, settings.reward)


@functools.lru_cache(maxsize=1)
def _task_of(text: str, seed: int) -> Any:
    from dllm_trainer.tasks.config import AnyTaskConfig
    from pydantic import TypeAdapter

    task = make_task(TypeAdapter(AnyTaskConfig).validate_json(text), seed=seed)
    return replace(task, rewards={**task.rewards, "whim": _whim})


def _whim(_: Sequence[Example], texts: Sequence[str]) -> list[float]:
    return [float(sum(map(ord, text)) % 2) for text in texts]


def _task(config: Any, seed: int) -> Any:
    return _task_of(config.model_dump_json(), seed)


def moved(settings: Settings, snapshots: Sequence[int]) -> Iterator[tuple[int, nn.Module]]:
    """Copies of the policy after so many BGPO updates, at the demo's learning rate held constant."""
    subject = load(
        settings,
        f"rl.updates={max(1, *snapshots)}",
        f"rl.prompts={2 if settings.tiny else 8}",
        "rl.schedule=constant",
        "rl.warmup=0",
        f"rl.reward={settings.reward}",
    )
    updates = rl_updates(subject.setup, make_optimizer(subject.setup.trained, subject.setup.config.rl))
    done = 0
    for snapshot in snapshots:
        while done < snapshot:
            next(updates)
            done += 1
        yield snapshot, copy.deepcopy(subject.model).eval()


# --- tables -------------------------------------------------------------------------------------------------

Column = str | Callable[[Figures], object]


def shown(value: Any) -> str:
    """A figure with its interval; numbers and words as they are."""
    return interval(value) if isinstance(value, dict) else str(value)


def lines_of(rows: Sequence[Figures], columns: Mapping[str, Column]) -> str:
    """A line per row; a column, by its heading, is a key of the row or a function of it."""
    cells = [[shown(c(row) if callable(c) else row[c]) for c in columns.values()] for row in rows]
    return markdown(list(columns), cells)


def table(columns: Mapping[str, Column]) -> Callable[[Figures], str]:
    """Of the rows of figures."""
    return lambda figures: lines_of(figures["rows"], columns)
