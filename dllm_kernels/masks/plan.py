"""Mask plans: which tokens each Monte-Carlo sample hides and scores, and with which weights.

A plan is made once and shared by all policies. It stores law, keys and ids; masks, rows and weights are
computed on access, for the cut at hand. The laws and their formulas are in `laws.py`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dllm_kernels import checks, noise
from dllm_kernels.masks import blocks, describe, draws, files, laws, layout
from dllm_kernels.masks.laws import Law
from dllm_kernels.masks.layout import Layout
from dllm_kernels.noise import Stream
from dllm_kernels.rows import Rows


@dataclass(frozen=True, eq=False)
class MaskPlan:
    """K masks for each of B sequences; made by `make_mask_plan`, `cut` into micro-batches.

    Token noise is keyed by the ordinal within completion or prompt, so padding and batching change no bit.
    """

    input_ids_BS: Tensor
    completion_mask_BS: Tensor  # the tokens that may be scored
    sequence_ids_B: Tensor
    sample_K: Tensor  # index within the iteration, 0..samples-1
    law: str
    options: Mapping[str, Any]  # of the law, numbers and names only
    samples: int  # K of the whole iteration: strata, pairs and nodes need it after a cut
    seed: int
    mask_id: int
    shift: int
    iteration: int
    prompt_noise: float
    prompt_mask_BS: Tensor | None = None  # real prompt tokens, where prompt_noise > 0
    tail_mask_BS: Tensor | None = None  # tokens after the first EOS, where they are hidden; never scored
    removed_BS: Tensor | None = None  # those tokens, where the model must not see them; None with blocks, whose grid lacks them
    state_BS: Tensor | None = None  # of a given trace: the state of each token, -1 none
    state_BK: Tensor | None = None  # of a given trace: the state of each sample, -1 none
    # of block diffusion: tokens per block, where blocks begin, and which row predicts a block's first token with shift
    causal_block: int | None = None
    block_origin: str = "sequence"
    edge: str = "clean"
    block_BS: Tensor | None = None  # the block of each token, -1 at padding
    step_BS: Tensor | None = None  # of a given trace in blocks: the rollout's step of each scored token, -1 none
    # of given events: what each sample shows, the step of what it scores (-1 nothing), and the token that the step wrote
    shown_BKS: Tensor | None = None
    step_BKS: Tensor | None = None
    target_BKS: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(K, B, S) of this cut."""
        return (len(self.sample_K), *self.input_ids_BS.shape)  # type: ignore[return-value]

    @cached_property
    def rule(self) -> Law:
        """The law with its options applied."""
        return laws.resolve(self.law, self.options)[0]

    @cached_property
    def lengths_B(self) -> Tensor:
        """Tokens per sequence that may be scored, int64 `[B]`."""
        return self.completion_mask_BS.sum(-1)

    @property
    def _keys(self) -> draws.Keys:
        return draws.Keys(self.seed, self.iteration, noise_stride(self.rule, self.samples), self.sample_K, self.sequence_ids_B)

    @cached_property
    def units(self) -> blocks.Units:
        """What a law draws over: completions, or their blocks."""
        if self.block_BS is None or self.causal_block is None:
            return blocks.whole(self.completion_mask_BS, self.lengths_B)
        return blocks.by_block(self.completion_mask_BS, self.block_BS, self.causal_block)

    @property
    def _unit_keys(self) -> draws.Keys:
        keys, repeats = self._keys, len(self.units.lengths_U) // max(1, len(self.lengths_B))
        return replace(keys, sequence_ids_B=keys.sequence_ids_B.repeat_interleave(repeats)) if repeats > 1 else keys

    @cached_property
    def level(self) -> draws.Level:
        """How much each sample hides of each unit, for laws that draw it."""
        return draws.level(self.rule, self.options, self._unit_keys, self.units.lengths_U, self.units.block_U)

    @cached_property
    def masked(self) -> Tensor:
        """bool `[K, B, S]`: hidden in this sample, in completion or prompt."""
        if self.shown_BKS is not None:
            return self._of_samples(self.shown_BKS) == self.mask_id
        hidden_KBS = self._hidden_KBS
        if self.tail_mask_BS is not None:
            hidden_KBS = hidden_KBS | self._hidden_tail_KBS
        if self.prompt_mask_BS is not None:
            # the states of a rollout share theirs
            drawn_K = torch.zeros_like(self.sample_K) if self.rule.level == "steps" else self.sample_K
            bits_KBS = self._keys.bits(Stream.PROMPT, drawn_K, draws.ordinals(self.prompt_mask_BS))
            hidden_KBS = hidden_KBS | self.prompt_mask_BS & noise.bernoulli(bits_KBS, self.prompt_noise)
        return hidden_KBS

    @cached_property
    def _hidden_KBS(self) -> Tensor:
        """bool `[K, B, S]`: the hidden ones of the tokens that may be scored."""
        if self.rule.level == "steps":
            return self.completion_mask_BS & (self._after_KBS if self.shown_BKS is None else self.masked)
        if self.rule.level == "block":
            return draws.block(self.options, self._keys, self.completion_mask_BS, self.lengths_B, self.prompt_noise)
        return self.hidden_at(self.level)

    def hidden_at(self, level: draws.Level) -> Tensor:
        """bool `[K, B, S]`: what the plan's noise hides of the tokens that may be scored, at a level that may be another's."""
        units = self.units
        hidden_KUW = draws.hidden(self.rule, self._unit_keys, level, units.mask_UW, units.token_UW)
        return hidden_KUW if units.slot_BS is None else units.spread(hidden_KUW) & self.completion_mask_BS

    @property
    def _hidden_tail_KBS(self) -> Tensor:
        assert self.tail_mask_BS is not None
        if self.rule.level == "steps":
            return self.tail_mask_BS & self._after_KBS
        if self.rule.level == "t":  # each token has its own draw, so those of the others stay as they are
            window = replace(self, completion_mask_BS=self.completion_mask_BS | self.tail_mask_BS, tail_mask_BS=None)
            return self.tail_mask_BS & window._hidden_KBS
        return self.tail_mask_BS

    def _of_samples(self, given_BKS: Tensor) -> Tensor:
        return given_BKS.transpose(0, 1)[self.sample_K]

    @property
    def step_KBS(self) -> Tensor | None:
        """The rollout's step of each scored token, broadcastable to `[K, B, S]`; None but for traces in blocks."""
        if self.block_BS is None or (self.step_BS is None and self.step_BKS is None):
            return None
        return self.step_BS if self.step_BKS is None else self._of_samples(self.step_BKS)

    @property
    def _state_KB1(self) -> Tensor:
        assert self.state_BK is not None
        return self.state_BK.t()[self.sample_K][:, :, None]

    @property
    def _after_KBS(self) -> Tensor:
        """Tokens that the trace commits in a sample's state or later."""
        assert self.state_BS is not None
        return (self._state_KB1 >= 0) & (self.state_BS >= self._state_KB1)

    @cached_property
    def scored(self) -> Tensor:
        """bool `[K, B, S]`: the hidden (or, in given events, edited) tokens whose log-probs this sample counts."""
        if self.step_BKS is not None:
            return self._of_samples(self.step_BKS) >= 0
        if self.rule.level == "steps":
            decided_KBS = self._hidden_KBS & (self.state_BS == self._state_KB1)
            return decided_KBS if self.step_BS is None else decided_KBS & (self.step_BS >= 0)
        return self._hidden_KBS

    @property
    def noisy_ids(self) -> Tensor:
        """Ids `[K, B, S]` with the mask id at hidden positions."""
        if self.shown_BKS is not None:
            return self._of_samples(self.shown_BKS)
        return torch.where(self.masked, self.mask_id, self.input_ids_BS)

    @cached_property
    def counts(self) -> Tensor:
        """Scored tokens per sample and sequence, int64 `[K, B]`."""
        return self.scored.sum(-1)

    @property
    def p_mask_KB(self) -> Tensor:
        """Probability of hiding a completion token at the level, fp32: t, or n / L (1 if the completion is
        empty).

        For `block`, `trace` and `segments`, which do not treat all tokens alike: the hidden share. Raises
        ValueError for plans of blocks, whose levels differ: `p_mask_KBS` has them.
        """
        self._refuse_blocks("p_mask_KB", "p_mask_KBS")
        return self._p_mask_KU

    @property
    def p_mask_KBS(self) -> Tensor:
        """The same for each token, fp32 `[K, B, S]`, or `[K, B, 1]` where all tokens of a completion have one; arbitrary
        where nothing can be scored.
        """
        return self.units.at_tokens(self._p_mask_KU)

    @property
    def _p_mask_KU(self) -> Tensor:
        if self.rule.level not in ("block", "steps"):
            return self.level.own_t().float()
        lengths_U = self.units.lengths_U
        return torch.where(lengths_U > 0, self.units.collect(self._hidden_KBS).double() / lengths_U, 1.0).float()

    @property
    def weight_KB(self) -> Tensor:
        """Weight of each scored token of a sample, fp32, as published: 1 / t, L / n ..., see `laws.LAWS`.

        Raises ValueError for plans of blocks, whose weights differ: `rows.weight` has them.
        """
        self._refuse_blocks("weight_KB", "rows.weight")
        return self._weight_KU

    @cached_property
    def _weight_KU(self) -> Tensor:
        scored_KU = self.units.collect(self.scored) if self.rule.weight in draws.REALISED else None
        level = None if self.rule.level in ("block", "steps") else self.level
        return draws.weights(self.rule, self.options, self._unit_keys, level, self.units.lengths_U, scored_KU).float()

    def _refuse_blocks(self, name: str, instead: str) -> None:
        if self.block_BS is not None:
            raise ValueError(f"{name} must not be read of a plan with causal_block, whose blocks differ: take {instead}")

    @property
    def share_K(self) -> Tensor:
        """Weight of each sample in its sequence's score, float64 `[K]`; mostly 1 / (samples of the plan)."""
        return laws.shares(self.rule, self.options, self.sample_K, self.samples)

    @cached_property
    def rows(self) -> Rows:
        """The rows to score, by (sample, sequence, position); the one place where the shift is resolved (of plans
        of blocks: in `layout`).
        """
        K, B, S = self.shape
        flat_N = self.scored.reshape(-1).nonzero()[:, 0]
        # one-dimensional lookups: indexing by (sample, sequence, position) takes twice as long
        pair_N = torch.repeat_interleave(self.counts.reshape(-1), output_size=len(flat_N))
        pairs = torch.arange(K * B, device=flat_N.device)
        sample_N, sequence_N = (pairs // B).index_select(0, pair_N), (pairs % B).index_select(0, pair_N)
        token_N = flat_N - sample_N * (B * S)
        if self.units.slot_BS is None:
            weight_N = self.weight_KB.reshape(-1).index_select(0, pair_N)
        else:
            weight_N = self.units.at_tokens(self._weight_KU).reshape(-1).index_select(0, flat_N)
        target_N = self.input_ids_BS.reshape(-1).index_select(0, token_N).long()
        state_BS = self.state_BS if self.step_BS is None else self.step_BS
        state_N = None if state_BS is None else state_BS.reshape(-1).index_select(0, token_N)
        if self.step_BKS is not None and self.target_BKS is not None:
            target_N, state_N = (self._of_samples(t).reshape(-1)[flat_N] for t in (self.target_BKS, self.step_BKS))
        return Rows(flat_N - self._row_shift, target_N, sequence_N, sample_N, weight_N, state_N)

    @property
    def _row_shift(self) -> int:
        """By how much `rows.index` lies before the token."""
        return self.shift if self.block_BS is None else 0

    def layout(self, copies: int | None = None, *, keep_N: Tensor | None = None) -> Layout:
        """The input `[clean S | noisy_1 C' | ... | noisy_k C']` of a block-causal model, and where the rows lie in it.

        Args:
            copies: k, the most samples beside a clean sequence; a sequence with more gets several inputs. None:
                all samples of this cut.
            keep_N: bool `[N]`, the rows to score; None: all. A sample without one gets no copy, a sequence
                without one no input.

        The shift is resolved here: a block's first token is predicted by the clean row before it, or with
        edge="noisy" by the noisy one where there is one. Raises ValueError for a plan without `causal_block`.

        Example:
            >>> from dllm_kernels import make_mask_plan
            >>> ids = torch.arange(8)[None]
            >>> plan = make_mask_plan(ids, ids > 3, law="exact", samples=2, seed=0, causal_block=2,
            ...                       sequence_ids=torch.tensor([1]), mask_id=9)
            >>> plan.layout().ids_RT.shape  # S + 2 C'
            torch.Size([1, 16])
        """
        if self.block_BS is None or self.causal_block is None:
            raise ValueError("layout is of plans of blocks: make the plan with causal_block, the model's block length")
        given = self.noisy_ids, self.input_ids_BS, self.completion_mask_BS, self.block_BS
        options: dict[str, Any] = {"length": self.causal_block, "copies": copies, "shift": self.shift}
        return layout.make(self.rows, keep_N, *given, edge=self.edge, **options)

    def dense(self, values_N: Tensor) -> Tensor:
        """Values of the rows at their tokens, `[K, B, S]`, 0 where nothing is scored; differentiable."""
        checks.shape("values_N", values_N, [len(self.rows.index)])
        flat = values_N.new_zeros(self.scored.numel())
        return flat.index_copy(0, self.rows.index + self._row_shift, values_N).view(self.shape)

    def elbo(self, logp_N: Tensor) -> Tensor:
        """Per-sample ELBOs `[B, K]`: the sum of `weight * logp`; differentiable, whatever the order of rows.

        Summed and returned in float64: a ratio is of differences of sums, of hundreds of nats that fp32 holds to 1e-5.
        """
        checks.shape("logp_N", logp_N, [len(self.rows.index)])
        return self.dense(logp_N.double() * self.rows.weight).sum(-1).t()

    def score(self, logp_N: Tensor) -> Tensor:
        """Scores `[B]`, float64: the estimate `sum_k share_k elbo_bk`. Scores of cuts along the samples add up."""
        return (self.elbo(logp_N) * self.share_K).sum(-1)

    def standard_error(self, elbo_BK: Tensor) -> Tensor:
        """Standard errors `[B]` of the scores, from the per-sample ELBOs of all K samples.

        The standard deviation of independent draws over the square root of their number. A draw is a sample;
        for complementary pairs (`antithetic`, `coupled`) the mean of a pair; for `quadrature` a sample of a
        node, and the variances of the nodes add up (the error of the quadrature rule itself is not included).
        With strata (`exact`, `exact_zero`, `antithetic`) and with the distinct blocks of `block`, the true
        error is smaller. NaN for a single draw, and for `full`, `trace` and `segments`, which draw nothing.
        """
        K, B, _ = self.shape
        checks.shape("elbo_BK", elbo_BK, [B, K])
        if self.samples != K:
            raise ValueError(f"elbo_BK must hold all {self.samples} samples of the plan, got {K} of a cut")
        return draws.standard_error(self.rule, self.options, elbo_BK[:, torch.argsort(self.sample_K)])

    def cut(self, *, samples: slice | Tensor = slice(None), sequences: slice | Tensor = slice(None)) -> MaskPlan:
        """The plan of a subset of samples and sequences, with the same bits as in the whole plan."""
        for name, part in (("samples", samples), ("sequences", sequences)):
            if not isinstance(part, slice) and not (isinstance(part, Tensor) and part.dim() == 1):
                raise TypeError(f"{name} must be a slice or a 1-d tensor of indices, got {part!r}")
        parts: dict[str, Any] = {name: tensor[sequences] for name, tensor in self.tensors().items() if name != "sample_K"}
        return replace(self, **parts, sample_K=self.sample_K[samples])

    def to(self, device: torch.device | str) -> MaskPlan:
        """The same plan with the same masks on another device."""
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return replace(self, **moved)

    def tensors(self) -> dict[str, Tensor]:
        """The plan's tensors by field, without those that are None."""
        return {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}

    def describe(
        self, *, hidden_size: int | None = None, vocabulary: int | None = None, dtype: torch.dtype = torch.bfloat16
    ) -> str:
        """Law, expected rows and memory in words; with H and V also the head's FLOPs and the logits avoided.

        Example:
            >>> from dllm_kernels import make_mask_plan
            >>> ids = torch.arange(8)[None]
            >>> plan = make_mask_plan(ids, ids > 3, law="exact", samples=2, seed=0,
            ...                       sequence_ids=torch.tensor([1]), mask_id=9)
            >>> print(plan.describe(hidden_size=16, vocabulary=100).splitlines()[3])
            rows        5 expected, 31.2% of the positions
        """
        return describe.describe(self, hidden_size, vocabulary, dtype)

    def state_dict(self) -> dict[str, Any]:
        """Plain values, and copies of the tensors on the CPU."""
        state: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        state |= {name: tensor.cpu().clone(memory_format=torch.contiguous_format) for name, tensor in self.tensors().items()}
        return {**state, "options": dict(self.options), "format": files.FORMAT}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> MaskPlan:
        """The plan of a `state_dict`, on the CPU. Raises ValueError for missing, unknown or wrong fields."""
        values = dict(state)
        if (found := values.pop("format", None)) != files.FORMAT:
            raise ValueError(f"state must be a mask plan of format {files.FORMAT}, got format {found!r}")
        names = {f.name for f in fields(cls)}
        if wrong := names.symmetric_difference(values):
            raise ValueError(f"state must hold the fields of a mask plan, missing or unknown: {', '.join(sorted(wrong))}")
        plan = cls(**values)
        check_tensors(plan.input_ids_BS, plan.completion_mask_BS, plan.sequence_ids_B, None)
        laws.check_samples(plan.rule, plan.options, checks.count("samples", plan.samples))
        return plan

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to a file; a crash leaves the old file whole."""
        files.write(self.state_dict(), path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> MaskPlan:
        """A saved plan, on the CPU; runs no code from the file. Raises ValueError for any other or damaged
        file.
        """
        try:
            return cls.from_state_dict(files.read(path))
        except (TypeError, AttributeError) as error:  # a field of another type
            raise ValueError(f"path must name a saved mask plan, but {os.fspath(path)} holds {error}") from error


def check_tensors(
    input_ids_BS: Tensor, completion_mask_BS: Tensor, sequence_ids: Tensor, attention_mask_BS: Tensor | None
) -> None:
    checks.dtype("input_ids_BS", input_ids_BS, INTEGERS)
    checks.shape("input_ids_BS", input_ids_BS, [None, None])
    B, S = input_ids_BS.shape
    if B == 0 or S == 0:
        raise ValueError(f"input_ids_BS must hold at least one sequence and one token, got shape {[B, S]}")
    checks.dtype("completion_mask_BS", completion_mask_BS, [torch.bool])
    checks.shape("completion_mask_BS", completion_mask_BS, [B, S])
    checks.dtype("sequence_ids", sequence_ids, [torch.int64])
    checks.shape("sequence_ids", sequence_ids, [B])
    checks.same_device("completion_mask_BS", completion_mask_BS, "input_ids_BS", input_ids_BS)
    checks.same_device("sequence_ids", sequence_ids, "input_ids_BS", input_ids_BS)
    if attention_mask_BS is not None:
        checks.dtype("attention_mask_BS", attention_mask_BS, (torch.bool, *INTEGERS))
        checks.shape("attention_mask_BS", attention_mask_BS, [B, S])
        checks.same_device("attention_mask_BS", attention_mask_BS, "input_ids_BS", input_ids_BS)


INTEGERS = (torch.int64, torch.int32)


def noise_stride(rule: Law, samples: int) -> int:
    """Noise samples per iteration; constant for traces, whose number of samples depends on the batch."""
    return 1 << 16 if rule.level == "steps" else samples
