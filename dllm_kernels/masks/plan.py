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
from dllm_kernels.masks import draws, files, laws
from dllm_kernels.masks.laws import Law
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
    tail_mask_BS: Tensor | None = None  # hidden but never scored: tokens after the first EOS, for some laws
    state_BS: Tensor | None = None  # of a given trace: the state of each token, -1 none
    state_BK: Tensor | None = None  # of a given trace: the state of each sample, -1 none

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
    def level(self) -> draws.Level:
        """How much each sample hides, for laws that draw it."""
        return draws.level(self.rule, self.options, self._keys, self.lengths_B)

    @cached_property
    def masked(self) -> Tensor:
        """bool `[K, B, S]`: hidden in this sample, in completion or prompt."""
        hidden_KBS = self._hidden_KBS
        if self.tail_mask_BS is not None:
            hidden_KBS = hidden_KBS | self._hidden_tail_KBS
        if self.prompt_mask_BS is not None:
            bits_KBS = self._keys.bits(Stream.PROMPT, self.sample_K, draws.ordinals(self.prompt_mask_BS))
            hidden_KBS = hidden_KBS | self.prompt_mask_BS & noise.bernoulli(bits_KBS, self.prompt_noise)
        return hidden_KBS

    @cached_property
    def _hidden_KBS(self) -> Tensor:
        """bool `[K, B, S]`: the hidden ones of the tokens that may be scored."""
        if self.rule.level == "steps":
            return self.completion_mask_BS & self._after_KBS
        if self.rule.level == "block":
            return draws.block(self.options, self._keys, self.completion_mask_BS, self.lengths_B, self.prompt_noise)
        return draws.hidden(self.rule, self._keys, self.level, self.completion_mask_BS)

    @property
    def _hidden_tail_KBS(self) -> Tensor:
        assert self.tail_mask_BS is not None
        return self.tail_mask_BS & self._after_KBS if self.rule.level == "steps" else self.tail_mask_BS

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
        """bool `[K, B, S]`: the hidden tokens whose log-probs this sample counts."""
        if self.rule.level == "steps":
            return self._hidden_KBS & (self.state_BS == self._state_KB1)
        return self._hidden_KBS

    @property
    def noisy_ids(self) -> Tensor:
        """Ids `[K, B, S]` with the mask id at hidden positions."""
        return torch.where(self.masked, self.mask_id, self.input_ids_BS)

    @cached_property
    def counts(self) -> Tensor:
        """Scored tokens per sample and sequence, int64 `[K, B]`."""
        return self.scored.sum(-1)

    @property
    def p_mask_KB(self) -> Tensor:
        """Probability of hiding a completion token at the level, fp32: t, or n / L (1 if the completion is
        empty).

        For `block`, `trace` and `segments`, which do not treat all tokens alike: the hidden share.
        """
        if self.rule.level not in ("block", "steps"):
            return self.level.own_t().float()
        return torch.where(self.lengths_B > 0, self._hidden_KBS.sum(-1).double() / self.lengths_B, 1.0).float()

    @cached_property
    def weight_KB(self) -> Tensor:
        """Weight of each scored token of a sample, fp32, as published: 1 / t, L / n ..., see `laws.LAWS`."""
        scored_KB = self.counts if self.rule.weight in draws.REALISED else None
        level = None if self.rule.level in ("block", "steps") else self.level
        return draws.weights(self.rule, self.options, self._keys, level, self.lengths_B, scored_KB).float()

    @property
    def share_K(self) -> Tensor:
        """Weight of each sample in its sequence's score, fp32 `[K]`; mostly 1 / (samples of the plan)."""
        return self._share_K.float()

    @property
    def _share_K(self) -> Tensor:
        return laws.shares(self.rule, self.options, self.sample_K, self.samples)

    @cached_property
    def rows(self) -> Rows:
        """The rows to score, by (sample, sequence, position); the one place where the shift is resolved."""
        K, B, S = self.shape
        flat_N = self.scored.reshape(-1).nonzero()[:, 0]
        # one-dimensional lookups: indexing by (sample, sequence, position) takes twice as long
        pair_N = torch.repeat_interleave(self.counts.reshape(-1), output_size=len(flat_N))
        pairs = torch.arange(K * B, device=flat_N.device)
        sample_N, sequence_N = (pairs // B).index_select(0, pair_N), (pairs % B).index_select(0, pair_N)
        return Rows(
            index=flat_N - self.shift,
            target=self.input_ids_BS.reshape(-1).index_select(0, flat_N - sample_N * (B * S)).long(),
            sequence=sequence_N,
            sample=sample_N,
            weight=self.weight_KB.reshape(-1).index_select(0, pair_N),
        )

    def elbo(self, logp_N: Tensor) -> Tensor:
        """Per-sample ELBOs `[B, K]`: `weight * sum of logp`; differentiable, whatever the order of rows."""
        K, B, S = self.shape
        checks.shape("logp_N", logp_N, [len(self.rows.index)])
        scattered = logp_N.new_zeros(K * B * S).index_copy(0, self.rows.index + self.shift, logp_N * self.rows.weight)
        return scattered.view(K, B, S).sum(-1).t()

    def score(self, logp_N: Tensor) -> Tensor:
        """Scores `[B]`: the estimate `sum_k share_k elbo_bk`. Scores of cuts along the samples add up."""
        elbo_BK = self.elbo(logp_N)
        return (elbo_BK * self._share_K.to(elbo_BK.dtype)).sum(-1)

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
        return _describe(self, hidden_size, vocabulary, dtype)

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


def expected_rows(plan: MaskPlan) -> float:
    """Expected number of scored tokens; the actual number where it is not random, and for `block`."""
    rule, options, lengths_B = plan.rule, plan.options, plan.lengths_B.double()
    if rule.level in ("all", "nodes", "steps", "block"):
        return float(plan.counts.sum())
    if rule.level == "t":
        low, high = (options["t_low"], options["t_high"]) if rule.reduction == "coupled" else (options["t_min"], 1.0)
        first = lengths_B.sum() * ((low + high) / 2 if options.get("t") is None else options["t"])
    else:
        first = ((lengths_B + (rule.level == "count from 1")) / 2 * (lengths_B > 0)).sum()
    if rule.pairs_from is None:
        return float(plan.shape[0] * first)
    whole = int((plan.sample_K < rule.pairs_from).sum())
    seconds = int(plan.level.second_K1.sum())
    firsts = plan.shape[0] - whole - seconds
    return float(firsts * first + seconds * (lengths_B.sum() - first) + whole * lengths_B.sum())


def _describe(plan: MaskPlan, hidden_size: int | None, vocabulary: int | None, dtype: torch.dtype) -> str:
    """See `MaskPlan.describe`."""
    rule, (K, B, S) = plan.rule, plan.shape
    N = expected_rows(plan)
    options = ", ".join(f"{name}={value}" for name, value in plan.options.items() if value is not None) or "none"
    draws = (
        "given" if rule.level == "steps" else f"{rule.pairing}{', in complementary pairs' if rule.pairs_from is not None else ''}"
    )
    plan_bytes = sum(tensor.nbytes for tensor in plan.tensors().values())
    lines = [
        f"law         {rule.name} ({rule.source}); options {options}",
        f"            level {rule.level}, samples {draws}, weight {rule.weight}, "
        + ("unbiased for the ELBO" if rule.unbiased else "no unbiased estimate of the ELBO"),
        f"size        {K} samples x {B} sequences x {S} tokens, {int(plan.lengths_B.sum())} of them scored; "
        f"seed {plan.seed}, iteration {plan.iteration}, prompt noise {plan.prompt_noise:g}, shift {plan.shift}",
        f"rows        {N:,.0f} expected, {N / max(1, K * B * S):.1%} of the positions",
        f"memory      plan {_size(plan_bytes)}, noisy ids {_size(K * B * S * plan.input_ids_BS.element_size())}, "
        f"masks {_size(K * B * S)}, rows {_size(N * _ROW_BYTES)}",
    ]
    if hidden_size is None or vocabulary is None:
        lines.append(f"head        2 N H V = {2 * N:,.0f} H V FLOPs forward; hidden_size and vocabulary make it a number")
    else:
        H, V = checks.count("hidden_size", hidden_size), checks.count("vocabulary", vocabulary)
        flops = 2.0 * N * H * V
        lines.append(
            f"head        {flops:.3g} FLOPs forward (2 N H V; H={H}, V={V}), {2.0 * K * B * S * H * V:.3g} for every position"
        )
        lines.append(
            f"            logits that are never built, {dtype}: {_size(N * V * dtype.itemsize)} for the rows, "
            f"{_size(K * B * S * V * dtype.itemsize)} for every position"
        )
    return "\n".join(lines)


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"


_ROW_BYTES = 4 * 8 + 4  # index, target, sequence, sample; weight
