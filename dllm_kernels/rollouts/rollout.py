"""Rollouts: what was committed when, with what confidence, and the states between.

States are not stored: they follow from the final ids and the step map, or from events.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from dllm_kernels import checks
from dllm_kernels.rollouts import files, foreign
from dllm_kernels.rollouts.events import Events


@dataclass(frozen=True)
class Rollout:
    """B completions of up to L tokens and their history; all tensors are small and detached.

    A completion is what was masked: the tokens after a prompt, or holes in a canvas, in the order of their columns. `[B, L]`
    tensors have a place for each; a completion of fewer than L tokens has none in the last places: step -1, log-prob 0.
    Steps of a sequence count the model calls that it took part in, from 0. T is the largest number of steps.
    """

    # int64: prompts and completions, padded as the prompts were: on the left, or on the right where ragged
    ids_BS: Tensor
    completion_mask_BS: Tensor  # bool: the tokens of each completion
    commit_step_BL: Tensor  # int32: the step that committed each token; -1 if failed or filled up after EOS
    commit_logp_BL: Tensor  # log-probability at its commit, at temperature 1, nats; NaN where `unscored`
    commit_entropy_BL: Tensor  # entropy of its row at its commit, at temperature 1, nats; likewise
    masked_entropy_BT: Tensor  # mean entropy of a step's candidate tokens; NaN where there was no step, or nothing told it
    steps_B: Tensor  # int64: model calls per sequence
    failed_B: Tensor  # bool: hidden states were not finite; the completion is mask ids
    sequence_ids_B: Tensor
    mask_id: int
    attention_mask_BS: Tensor | None = None  # bool, False at padding; None where there is none
    # int64: the step of each token between the completion and the end of its last block, which later steps of the block saw, -1
    # elsewhere; None where there is none
    overhang_step_BS: Tensor | None = None
    recorded: Events | None = None  # where the commit tensors above do not hold all `events`
    # int32, on request: the likeliest completion before each step, decided tokens kept
    greedy_BTL: Tensor | None = None
    # int32, where `generate` kept keys and values: steps since those outside the active block were computed, 0 where all were, -1
    # where there was no step
    kept_age_BT: Tensor | None = None
    unscored: bool = False  # another engine's, which did not tell log-probs
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_steps(
        cls,
        prompts: Sequence[foreign.Ids],
        completions: Sequence[foreign.Ids],
        step_map: Sequence[foreign.Ids] | None,
        *,
        mask_id: int,
        logp: Sequence[foreign.Values | None] | None = None,
        entropy: Sequence[foreign.Values | None] | None = None,
        edits: Sequence[Sequence[foreign.Edit]] | None = None,
        lengths: Sequence[int] | None = None,
        sequence_ids: Tensor | None = None,
        shift: int = 0,
        causal_block: int | None = None,
        eos_id: int | None = None,
        temperature: float = 1.0,
        approximate: bool = False,
    ) -> Rollout:
        """A rollout that another engine made (SGLang, LMDeploy, dInfer, vLLM ...), from its ids and step maps.

        Everything is a sequence of B lists of numbers, or of tensors `[n_b]`; lengths may differ.

        Args:
            prompts: ids. With mask_id in one, its completion fills those places first, and goes on after its end.
            completions: ids, without mask_id.
            step_map: the model call that last set each token, from 0, without gaps: every call from 0 to the last set
                something, in `step_map` or `edits`. Engines that count from 1 need 1 subtracted. -1, from the first EOS on,
                for tokens that no call set (needs eos_id). None where the engine does not tell: the rollout then holds
                ids alone, for algorithms that draw their own masks; what replays its states raises.
            logp: log-probability of each token in the state before its step, at temperature 1, in nats; None where the
                engine did not tell. `integrations.foreign_rollouts.score_rollout` fills what is missing, and compares the
                rest. entropy: of its row, likewise.
            edits: what tokens were before: (step, place, id) or (step, place, id, log-prob), places counting the
                completion's tokens, mask_id where a token was taken back.
            lengths: tokens of each completion that count; what follows lies between them and the end of its last block,
                which later steps of the block saw. None: all.
            sequence_ids: int64 `[B]`, distinct; None counts them.
            shift, causal_block, eos_id: as in `trajectory_rows`, which takes them from here. temperature: that of
                sampling, for the record.
            approximate: whether log-probs are those of a cache of earlier states (Fast-dLLM's, dInfer's): they are
                refused as old scores.

        Raises ValueError or TypeError naming the argument and the sequence.

        Example:
            >>> rollout = Rollout.from_steps([[3, 4]], [[5, 6, 7]], [[0, 1, 0]], mask_id=9, logp=[[-0.1, -0.5, -0.2]])
            >>> rollout.state_at(1)
            tensor([[3, 4, 5, 9, 7]])
        """
        options: dict[str, Any] = {"shift": shift, "causal_block": causal_block, "eos_id": eos_id, "temperature": temperature}
        checked = foreign.check(
            prompts,
            completions,
            step_map,
            mask_id=mask_id,
            logp=logp,
            entropy=entropy,
            edits=edits,
            lengths=lengths,
            **options,
        )
        found = foreign.tensors(checked, mask_id, sequence_ids)
        settings = {**options, "sampler": "given", "length": found["commit_step_BL"].shape[1], "approximate": approximate}
        settings["stepless"] = step_map is None
        return cls(**found, mask_id=mask_id, settings=settings)

    @classmethod
    def from_jsonl(cls, path: str | os.PathLike[str], *, mask_id: int | None = None) -> Rollout:
        """Rollouts from a file with one of them a line, as `to_jsonl` writes it.

        Keys of a line: `prompt_ids`, `completion_ids`, `step_map`; optional `logp`, `entropy`, `edits` and `length` (of
        `lengths`), `sequence_id`, and, the same in all lines, `mask_id`, `shift`, `causal_block`, `eos_id`, `temperature`
        and `approximate`: the arguments of `from_steps`. `meta` may hold anything and is not read.

        Raises FileNotFoundError, or ValueError naming file, line and key.
        """
        return cls.from_steps(**files.read(path, mask_id))

    def to_jsonl(self, path: str | os.PathLike[str]) -> None:
        """Write a line for each rollout, atomically; `from_jsonl` gives it back, padded on the right.

        Entropies of steps, greedy completions and ages of a cache are left out. Raises ValueError for failed sequences, and
        without a step map.
        """
        self.need_steps()
        if bool(self.failed_B.any()):
            raise ValueError(f"rollout must not hold failed sequences, got {self.failed_B.nonzero()[:, 0].tolist()}")
        known = {name: self.settings.get(name) for name in ("causal_block", "eos_id")}
        same = {**known, **{name: self.settings.get(name, default) for name, default in (("shift", 0), ("temperature", 1.0))}}
        same |= {"mask_id": self.mask_id, "approximate": self.approximate}
        generated_BS, real_BS = self.completion_mask_BS, self.attention_mask_BS
        if self.overhang_step_BS is not None:
            generated_BS = generated_BS | (self.overhang_step_BS >= 0)
        real_BS = torch.ones_like(generated_BS) if real_BS is None else real_BS.bool()
        own = self.ids_BS, generated_BS, real_BS, self.completion_mask_BS, self.sequence_ids_B
        files.write(path, foreign.lines(*own, self.events, same))

    @property
    def stepless(self) -> bool:
        """Whether another engine gave ids without a step map: nothing says which states it went through."""
        return bool(self.settings.get("stepless"))

    def need_steps(self) -> None:
        """Raises ValueError where states cannot be replayed."""
        if self.stepless:
            raise ValueError("rollout must have a step map, got one whose engine gave ids alone: its states are not known")

    @property
    def approximate(self) -> bool:
        """Whether steps saw keys and values of earlier states (`cache="prefix"` or `"dual"`): scoring gives other log-probs."""
        return self.kept_age_BT is not None or bool(self.settings.get("approximate"))

    def stale_at(self, step: int) -> Tensor:
        """bool `[B, S]`: the positions whose keys and values `step` saw as an earlier step had made them."""
        checks.count("step", step, 0)
        stale_BS = torch.zeros_like(self.completion_mask_BS)
        if self.kept_age_BT is None or step >= self.kept_age_BT.shape[1]:
            return stale_BS
        L, size = self.commit_step_BL.shape[1], self.settings["block_length"]
        place_L = torch.arange(L, device=stale_BS.device)
        there_BL = self.commit_step_BL == step  # every step commits a token of its block
        first_B1 = torch.where(there_BL, place_L, L).min(-1, keepdim=True).values // size * size
        begin_B1 = self.column_BL.gather(1, first_B1.clamp(max=L - 1)) - self.settings["shift"]
        column_S = torch.arange(stale_BS.shape[1], device=stale_BS.device)
        stale_BS = column_S < begin_B1
        if self.settings["cache"] == "dual":
            stale_BS = stale_BS | (column_S >= begin_B1 + self.settings["shift"] + size)
        if self.attention_mask_BS is not None:
            stale_BS = stale_BS & self.attention_mask_BS
        return stale_BS & (self.kept_age_BT[:, step, None] > 0)

    @property
    def place_BL(self) -> Tensor:
        """bool: the places that a completion has, all but the last ones of the shorter."""
        L = self.commit_step_BL.shape[1]
        return torch.arange(L, device=self.ids_BS.device) < self.completion_mask_BS.sum(-1, keepdim=True)

    @property
    def column_BL(self) -> Tensor:
        """int64: the column of each place; where there is none, a column of something else."""
        order_BS = self.completion_mask_BS.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
        return order_BS[:, : self.commit_step_BL.shape[1]]

    def spread(self, value_BL: Tensor, into_BS: Tensor) -> Tensor:
        """`[B, S]` with the values at the completion's tokens, `into_BS` elsewhere."""
        column_BL = self.column_BL
        return into_BS.scatter(1, column_BL, torch.where(self.place_BL, value_BL, into_BS.gather(1, column_BL)))

    @property
    def completion_BL(self) -> Tensor:
        """int64: the tokens of each completion, mask_id in places that it does not have."""
        return torch.where(self.place_BL, self.ids_BS.gather(1, self.column_BL), self.mask_id)

    @property
    def step_map_BS(self) -> Tensor:
        """int64: the step of each generated token, -1 elsewhere; tokens filled up after EOS get the last step."""
        steps_BL = torch.where(self.commit_step_BL < 0, self.steps_B[:, None] - 1, self.commit_step_BL.long())
        beyond_BS = torch.full_like(self.ids_BS, -1) if self.overhang_step_BS is None else self.overhang_step_BS
        return self.spread(steps_BL, beyond_BS)

    @property
    def text_mask_BS(self) -> Tensor | None:
        """bool: prompts and completions, without what lies between a completion and the end of its block; None: all.

        The attention mask of masks drawn by a law; that of the rollout's own states is `attention_mask_BS`.
        """
        if self.overhang_step_BS is None:
            return self.attention_mask_BS
        own_BS = self.overhang_step_BS < 0
        return own_BS if self.attention_mask_BS is None else self.attention_mask_BS & own_BS

    def state_at(self, step: int | Tensor) -> Tensor:
        """Ids `[B, S]` before `step`, an int or int64 `[B]`: what the model saw in that step."""
        self.need_steps()
        if isinstance(step, Tensor):
            checks.dtype("step", step, [torch.int64])
            checks.shape("step", step, [len(self.ids_BS)])
            step = step[:, None]
        else:
            checks.count("step", step, 0)
        if self.edited:
            before_B = step if isinstance(step, Tensor) else torch.full((len(self.ids_BS), 1), step, device=self.ids_BS.device)
            return self.states(before_B[:, None].expand(-1, 1, self.ids_BS.shape[1]))[:, 0]
        return torch.where(self.step_map_BS >= step, self.mask_id, self.ids_BS)

    def states(self, before_BKS: Tensor) -> Tensor:
        """Ids `[B, K, S]` before the given step of each token, replayed from the events."""
        events, never_BS = self.events, self.step_map_BS >= 0
        never_BS[events.sequence_E, events.position_E] = False  # filled up after EOS, when the last step was over
        masked_BKS = never_BS[:, None] & (before_BKS < self.steps_B[:, None, None])
        return torch.where(masked_BKS, self.mask_id, events.states(self.ids_BS, before_BKS))

    @property
    def events(self) -> Events:
        """Every change of a token, by sequence, step and position; the commit tensors hold the last of each token."""
        if self.recorded is not None:
            return self.recorded
        there_BL = (self.commit_step_BL >= 0) & ~self.failed_B[:, None]
        sequence_E, place_E = there_BL.nonzero(as_tuple=True)
        at = sequence_E, place_E
        old_E, new_E = torch.full_like(sequence_E, self.mask_id), self.completion_BL[at].long()
        step_E, position_E = self.commit_step_BL[at].long(), self.column_BL[at]
        found = Events(sequence_E, step_E, position_E, old_E, new_E, self.commit_logp_BL[at], self.commit_entropy_BL[at])
        return found.ordered(self.ids_BS.shape[1])

    @property
    def edited(self) -> bool:
        """Whether a decided token was replaced or taken back."""
        return self.recorded is not None and bool((self.recorded.old_id_E != self.mask_id).any())

    def to(self, device: torch.device | str) -> Rollout:
        """The rollouts with all tensors on a device."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        parts: dict[str, Any] = {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}
        if self.recorded is not None:
            parts["recorded"] = Events(*(tensor.to(device) for tensor in self.recorded.tensors()))
        return replace(self, **parts)

    def kept(self, index_N: Tensor) -> Rollout:
        """The rollouts at these indices."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        parts: dict[str, Any] = {name: value[index_N] for name, value in values.items() if isinstance(value, Tensor)}
        if self.recorded is not None:
            parts["recorded"] = self.recorded.kept(index_N, len(self.ids_BS))
        return replace(self, **parts)
