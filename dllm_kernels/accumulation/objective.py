"""What an objective declares for `accumulate` to compute its exact gradient at constant memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from dllm_kernels import checks
from dllm_kernels.masks import steps
from dllm_kernels.masks.plan import MaskPlan

Coupling = Literal["none", "token", "sample", "sequence", "batch"]
# steps: pairs (sequence, state) with a scored token
Denominator = Literal["tokens", "sequences", "groups", "pairs", "steps"]


@dataclass(frozen=True)
class Batch:
    """Small tensors beside a `MaskPlan`: `[B, ...]` per sequence, `[B, K, ...]` per Monte-Carlo sample."""

    per_sequence: Mapping[str, Tensor] = field(default_factory=dict)
    per_sample: Mapping[str, Tensor] = field(default_factory=dict)

    def check(self, plan: MaskPlan) -> None:
        """Raises ValueError naming an entry that is not finite or not of the plan's size and device."""
        K, B, _ = plan.shape
        for entries, sizes in ((self.per_sequence, (B,)), (self.per_sample, (B, K))):
            for name, tensor in entries.items():
                checks.require_tensor(name, tensor)
                if tuple(tensor.shape[: len(sizes)]) != sizes:
                    raise ValueError(f"{name} must have leading sizes {list(sizes)}, got shape {list(tensor.shape)}")
                checks.same_device(name, tensor, "the plan", plan.input_ids_BS)
                checks.finite(name, tensor)

    def cut(self, *, samples: slice = slice(None), sequences: slice | Tensor = slice(None)) -> Batch:
        return Batch(
            {name: tensor[sequences] for name, tensor in self.per_sequence.items()},
            {name: tensor[sequences, samples] for name, tensor in self.per_sample.items()},
        )


@dataclass(frozen=True)
class Objective:
    """A loss of the row log-probs of a mask plan.

    `contributions(logp_N, plan, batch)` returns the *sum* of contributions of a cut; `accumulate` divides it
    by the denominator of the whole optimizer step, so the loss does not depend on the micro-batches.
    `coupling` is the smallest unit that determines the coefficients of its log-probs: `none` (data only),
    `token`, `sample` (one Monte-Carlo sample of a sequence), `sequence` (its K samples), `batch`.
    `on_policy_coupling` holds where no old scores are given and the old policy is the current one.

    `scale` names the entry that multiplies the whole contribution of a sequence (or, if `[B, K]`, of a
    sample): where it is 0 the model need not run.

    An objective of `batch` coupling may be split into `reduce(logp_N, plan)`, numbers `[B]` that are linear
    in logp and additive over samples, and `couple(numbers_B, lengths_B, entries)`, the contributions as a
    function of them. Then only these numbers are kept between the passes and exchanged between ranks.
    """

    name: str
    contributions: Callable[[Tensor, MaskPlan, Batch], Tensor]
    coupling: Coupling
    on_policy_coupling: Coupling
    denominator: Denominator
    old_scores: str | None  # entry of Batch; given, the update is off-policy
    per_sequence: tuple[str, ...] = ()  # required entries [B], except old scores
    per_sample: tuple[str, ...] = ()  # required entries [B, K], except old scores
    per_token: tuple[str, ...] = ()  # required entries [B, K, S], except old scores
    scale: str | None = None
    # entries per sample are of step groups: with blocks, where a sample holds a step of each, [B, K, blocks]
    of_steps: bool = False
    reduce: Callable[[Tensor, MaskPlan], Tensor] | None = None
    couple: Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor] | None = None

    def is_on_policy(self, batch: Batch) -> bool:
        return self.old_scores is not None and self.old_scores not in {**batch.per_sequence, **batch.per_sample}

    def check(self, batch: Batch, plan: MaskPlan) -> None:
        """Raises ValueError for a missing, unknown (a misspelt old score would train on-policy) or misshapen
        entry.
        """
        batch.check(plan)
        if self.denominator == "steps":
            steps.check_blocks(plan)
        K, B, S = plan.shape
        sizes = {"per_sequence": {name: [B] for name in self.per_sequence}}
        of_sample = steps.shape(plan) if self.of_steps else [B, K]
        sizes["per_sample"] = dict.fromkeys(self.per_sample, of_sample) | {name: [B, K, S] for name in self.per_token}
        optional = {self.old_scores}
        if self.denominator == "groups" and "group_ids" not in self.per_sequence:  # only to count them
            sizes["per_sequence"]["group_ids"] = [B]
            optional.add("group_ids")
        for where, entries in (("per_sequence", batch.per_sequence), ("per_sample", batch.per_sample)):
            known = sizes[where]
            if missing := set(known) - optional - set(entries):
                raise ValueError(f"batch.{where} must hold {min(missing)!r} for {self.name}, got {sorted(entries)}")
            for name, tensor in entries.items():
                if name not in known:
                    raise ValueError(f"batch.{where} holds {name!r}, but {self.name} takes {list(known)} there")
                if tensor.dim() != len(known[name]):
                    raise ValueError(f"{name} must have {len(known[name])} dimension(s), got shape {list(tensor.shape)}")
                checks.shape(name, tensor, known[name])


def _negative_elbo(logp_N: Tensor, plan: MaskPlan, batch: Batch) -> Tensor:
    return -(plan.score(logp_N) / plan.lengths_B.clamp(min=1)).sum()


# supervised fine-tuning: the negative ELBO of each completion over its length (LLaDA, arXiv 2502.09992, eq. 5; with
# blocks BD3-LM, arXiv 2503.09573)
NEGATIVE_ELBO = Objective(
    name="negative_elbo",
    contributions=_negative_elbo,
    coupling="none",
    on_policy_coupling="none",
    denominator="sequences",
    old_scores=None,
)
