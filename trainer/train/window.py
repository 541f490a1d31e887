"""What of each completion an algorithm scores, and what the model sees of the rest: the one place that says so."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from dllm_kernels import Rollout
from dllm_kernels.masks.tails import eos_tail

from ..config import RlConfig
from ..errors import ConfigError
from ..facts import Facts


@dataclass(frozen=True)
class Window:
    """Of one run: its recipe's, unless the config says otherwise."""

    eos_id: int | None  # of the token that ends a completion; None: all tokens are scored
    tail: str | None  # of `make_mask_plan`

    @property
    def plan_options(self) -> dict[str, Any]:
        """Keywords of `make_mask_plan`."""
        return {"eos_id": self.eos_id, "tail": self.tail}

    def lengths(self, ids_BS: Tensor, completion_BS: Tensor) -> Tensor:
        """int64 `[B]`: scored tokens of each completion."""
        if self.eos_id is not None:
            completion_BS = completion_BS & ~eos_tail(ids_BS, completion_BS, self.eos_id)
        return completion_BS.sum(-1)

    def attention(self, ids_BS: Tensor, completion_BS: Tensor, attention_BS: Tensor | None) -> Tensor | None:
        """The attention mask of scoring passes: without the tails, where they are removed."""
        if self.eos_id is None or self.tail != "removed":
            return attention_BS
        tail_BS = eos_tail(ids_BS, completion_BS, self.eos_id)
        return ~tail_BS if attention_BS is None else (attention_BS != 0) & ~tail_BS

    def of_trajectory(self, rollout: Rollout) -> Rollout:
        """The rollout as `trajectory_rows` shall read it: where it ended early, what was filled up was never drawn."""
        return rollout if self.eos_id is None else replace(rollout, settings={**rollout.settings, "eos_id": self.eos_id})


def window_of(config: RlConfig, facts: Facts) -> Window:
    """Raises ConfigError for tails that this model cannot do without."""
    window, tail = config.scored()
    if window == "completion" or facts.eos_id is None:
        return Window(None, None)
    if tail == "removed" and facts.attention_mask == "none" and facts.block_length is None:
        raise ConfigError(
            "rl.tail must be shown or hidden for a model that takes no attention mask, which would take the tail out, got removed"
        )
    return Window(facts.eos_id, tail)
