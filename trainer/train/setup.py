"""What every phase of a run works with: model, task, texts and ids, ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from dllm_kernels import fit_passes
from dllm_kernels.accumulation.objective import Batch, Objective
from dllm_kernels.masks.plan import MaskPlan

from ..config import RlConfig, RolloutConfig, RunConfig
from ..distributed import Ranks
from ..errors import ConfigError
from ..facts import Facts
from ..models.codec import Codec
from ..models.loading import Loaded
from ..tasks import Reward, Task
from ..tasks.rewards import choose
from .served import Served


@dataclass
class Setup:
    config: RunConfig
    loaded: Loaded
    task: Task
    codec: Codec
    ranks: Ranks
    trained: nn.Module  # the model, or the adapters around it
    curriculum: dict[str, Any] = field(default_factory=dict)  # state of `curriculum.Climb`
    passes: dict[str, int] = field(default_factory=dict)  # what `fit` found, for rl.samples_per_pass=auto
    reference: nn.Module | None = None  # a frozen second model; None: the model with its adapters off
    served: Served | None = None  # the server that samples; None: this process does

    @property
    def model(self) -> PreTrainedModel:
        return self.trained  # type: ignore[return-value]

    def weights_changed(self) -> None:
        """After an optimizer step: what samples elsewhere has old weights."""
        if self.served is not None:
            self.served.changed()

    @cached_property
    def reward(self) -> Reward:
        """The one that RL is to learn from. Raises UserError where there is none of that name."""
        return choose(self.config.rl.reward, self.task.rewards, timeout=self.config.rl.reward_timeout)

    @property
    def facts(self) -> Facts:
        return self.loaded.facts

    @property
    def length(self) -> int:
        """L, tokens of a completion."""
        return self.codec.length

    @property
    def steps(self) -> int:
        """Denoising steps of a rollout, where they are known beforehand; else one a token."""
        rollout, sampler = self.config.rollout, self.config.rollout.resolved()
        if rollout.steps is None:
            return self.length
        blocks = -(-self.length // (rollout.block_length or self.length)) if sampler.blocks == "sequence" else 1
        return min(self.length, rollout.steps * blocks)

    def generate_options(
        self, *, greedy: bool = False, rollout: RolloutConfig | None = None, canvas: bool | None = None
    ) -> dict[str, Any]:
        """Keywords of `generate`, the model and the noise apart; `rollout` in place of the run's.

        `canvas`: for what `codec.asked` gives where completions fill the middle; None: where they do.
        """
        rollout = rollout or self.config.rollout
        own = rollout.generate_options(self.length, self.facts.eos_id)
        if self.codec.infills if canvas is None else canvas:
            own["length"] = None
            if rollout.resolved().blocks == "completion" and own["steps"] is not None:  # of canvases they are those of a block
                own["steps"] //= self.length // own["block_length"]
        return {
            **own,
            "mask_id": self.facts.mask_id,
            "shift": self.facts.shift,
            "suppress": self.loaded.suppressed,
            "greedy": greedy,
        }

    def scoring_options(self, attention_mask_BS: Tensor | None, config: RlConfig, *, as_rolled_out: bool) -> dict[str, Any]:
        """Keywords of `accumulate` and `score_samples`. `as_rolled_out`: without the mask id, as the rollout draws."""
        suppressed, fitted = self.loaded.suppressed, config.samples_per_pass == "auto"
        return {
            "suppress": (*suppressed, self.facts.mask_id) if as_rolled_out else suppressed,
            "model_kwargs": self.loaded.call_kwargs(attention_mask_BS) or None,
            "sequences_per_pass": self.passes.get("sequences", 1) if fitted else config.micro_batch,
            "samples_per_pass": self.passes.get("samples", 1) if fitted else config.samples_per_pass,
        }

    def fit(self, plan: MaskPlan, objective: Objective, attention_mask_BS: Tensor | None, *, off_policy: bool) -> None:
        """For rl.samples_per_pass=auto: find the micro-batch that fits rl.memory_budget, once in a run and on all ranks."""
        config = self.config.rl
        if config.samples_per_pass != "auto" or self.passes.get("budget") == config.memory_budget:
            return
        assert config.memory_budget is not None
        try:
            found = fit_passes(
                self.model,
                plan,
                objective,
                None if off_policy else Batch(),
                memory_budget=config.memory_budget << 20,
                model_kwargs=self.loaded.call_kwargs(attention_mask_BS) or None,
                group=self.ranks.group,
            )
        except ValueError as error:
            raise ConfigError(f"rl.{error}") from error
        told = {"budget": config.memory_budget, "samples": found.samples_per_pass, "sequences": found.sequences_per_pass}
        self.passes.update(told)
