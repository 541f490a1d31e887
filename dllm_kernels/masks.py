"""Mask plans: which tokens each Monte-Carlo sample hides, at which weight; made once and shared by every policy.

A law is level x pairing x weight. The published names are presets of these:

    exact       count n uniform on 1..L, stratified over the K samples; n tokens at random; weight L / n
    bernoulli   t uniform on (t_min, 1] or given, independent; every token with probability t; weight 1 / t

Both are unbiased for the any-order bound  ELBO = sum_{n=1..L} (1/n) E_{|m|=n} sum_{l in m} log p(y_l | y^m).
A plan stores law, keys and ids; masks, rows and weights are computed where they are read, for the cut that is read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from dllm_kernels import checks, noise
from dllm_kernels.noise import Stream
from dllm_kernels.scoring import Rows

LAWS = ("exact", "bernoulli")
_INTEGERS = (torch.int64, torch.int32)


@dataclass(frozen=True)
class MaskPlan:
    """K masks for each of B sequences. Make it with `make_mask_plan`; read the properties; `cut` it into micro-batches.

    Position noise is keyed by a token's ordinal inside its completion, so padding and batching do not change a bit.
    """

    input_ids_BS: Tensor
    completion_mask_BS: Tensor
    sequence_ids_B: Tensor
    sample_K: Tensor  # index within the iteration, 0..samples-1
    law: str
    samples: int  # K of the whole iteration: the stratification needs it after a cut
    seed: int
    mask_id: int
    shift: int
    iteration: int
    t: float | None
    t_min: float

    @property
    def shape(self) -> tuple[int, int, int]:
        """(K, B, S) of this cut."""
        return (len(self.sample_K), *self.input_ids_BS.shape)  # type: ignore[return-value]

    @cached_property
    def lengths_B(self) -> Tensor:
        """Scored tokens per sequence, int64 `[B]`."""
        return self.completion_mask_BS.sum(-1)

    @property
    def _noise_sample_K1(self) -> Tensor:
        return (self.sample_K + self.iteration * self.samples)[:, None]

    def _level_bits(self, sample: Tensor) -> Tensor:
        zero = torch.zeros((), dtype=torch.int64, device=sample.device)
        return noise.row_bits(self.seed, Stream.LEVEL, self.sequence_ids_B, sample, zero)

    @cached_property
    def _level_KB(self) -> Tensor:
        """The count n (int64) for `exact`, the probability t (float64) for `bernoulli`."""
        K, B, _ = self.shape
        if self.law == "exact":
            first_sample = torch.full((), self.iteration * self.samples, device=self.sample_K.device)
            length_B = self.lengths_B
            # floor, not round: half to even would see only half of the counts at some strata
            stratum_KB = self.sample_K[:, None] * length_B // self.samples
            offset_B = noise.below(self._level_bits(first_sample), length_B)
            count_KB = 1 + (offset_B + stratum_KB) % length_B.clamp(min=1)
            return torch.where(length_B > 0, count_KB, 0)
        if self.t is not None:
            return torch.full((K, B), self.t, dtype=torch.float64, device=self.sample_K.device)
        return self.t_min + (1.0 - self.t_min) * noise.uniform(self._level_bits(self._noise_sample_K1))

    @property
    def p_mask_KB(self) -> Tensor:
        """Probability that a token is masked given the level, fp32: t, or n / L (1 for an empty completion)."""
        if self.law == "exact":
            return torch.where(self.lengths_B > 0, self._level_KB / self.lengths_B, 1.0).float()
        return self._level_KB.float()

    @property
    def weight_KB(self) -> Tensor:
        """Weight of each masked token of a sample, fp32: L / n or 1 / t."""
        if self.law == "exact":
            return self.lengths_B / self._level_KB.clamp(min=1).float()
        return (1.0 / self._level_KB).float()

    @cached_property
    def masked(self) -> Tensor:
        """bool `[K, B, S]`: hidden in this sample."""
        completion_BS = self.completion_mask_BS
        ordinal_BS = (completion_BS.cumsum(-1) - 1).clamp(min=0)
        bits_KBS = noise.row_bits(
            self.seed, Stream.MASK, self.sequence_ids_B[:, None], self._noise_sample_K1[:, :, None], ordinal_BS
        )
        if self.law == "bernoulli":
            return completion_BS & (noise.uniform(bits_KBS) < self._level_KB[:, :, None])
        bits_KBS = bits_KBS.masked_fill(~completion_BS, torch.iinfo(torch.int64).max)
        order_KBS = torch.argsort(bits_KBS, dim=-1, stable=True)
        rank_KBS = torch.empty_like(order_KBS)
        rank_KBS.scatter_(-1, order_KBS, torch.arange(order_KBS.shape[-1], device=order_KBS.device).expand_as(order_KBS))
        return completion_BS & (rank_KBS < self._level_KB[:, :, None])

    @property
    def noisy_ids(self) -> Tensor:
        """Ids `[K, B, S]` with the mask id at hidden positions."""
        return self.input_ids_BS.masked_fill(self.masked, self.mask_id)

    @property
    def counts(self) -> Tensor:
        """Hidden tokens per sample and sequence, int64 `[K, B]`."""
        return self.masked.sum(-1)

    @cached_property
    def rows(self) -> Rows:
        """The rows to score, ordered by (sample, sequence, position); the logit shift is resolved here and nowhere else."""
        _, B, S = self.shape
        sample_N, sequence_N, position_N = self.masked.nonzero(as_tuple=True)
        return Rows(
            index=(sample_N * B + sequence_N) * S + position_N - self.shift,
            target=self.input_ids_BS[sequence_N, position_N].long(),
            sequence=sequence_N,
            sample=sample_N,
            weight=self.weight_KB[sample_N, sequence_N],
        )

    def elbo(self, logp_N: Tensor) -> Tensor:
        """Per-sample ELBOs `[K, B]`: `weight * sum of logp` over the rows of each; differentiable, order-independent."""
        K, B, S = self.shape
        checks.shape("logp_N", logp_N, [len(self.rows.index)])
        scattered = logp_N.new_zeros(K * B * S).index_copy(0, self.rows.index + self.shift, logp_N * self.rows.weight)
        return scattered.view(K, B, S).sum(-1)

    def cut(self, *, samples: slice | Tensor = slice(None), sequences: slice | Tensor = slice(None)) -> MaskPlan:
        """The plan of some samples and sequences, with the very bits they have in the whole."""
        for name, part in (("samples", samples), ("sequences", sequences)):
            if not isinstance(part, slice) and not (isinstance(part, Tensor) and part.dim() == 1):
                raise TypeError(f"{name} must be a slice or a 1-d tensor of indices, got {part!r}")
        return replace(
            self,
            input_ids_BS=self.input_ids_BS[sequences],
            completion_mask_BS=self.completion_mask_BS[sequences],
            sequence_ids_B=self.sequence_ids_B[sequences],
            sample_K=self.sample_K[samples],
        )

    def to(self, device: torch.device | str) -> MaskPlan:
        """The same plan, the same masks, on another device."""
        return replace(
            self,
            input_ids_BS=self.input_ids_BS.to(device),
            completion_mask_BS=self.completion_mask_BS.to(device),
            sequence_ids_B=self.sequence_ids_B.to(device),
            sample_K=self.sample_K.to(device),
        )


def make_mask_plan(
    input_ids_BS: Tensor,
    completion_mask_BS: Tensor,
    *,
    law: str,
    samples: int,
    seed: int,
    sequence_ids: Tensor,
    mask_id: int,
    shift: int = 0,
    iteration: int = 0,
    t: float | None = None,
    t_min: float = 0.0,
) -> MaskPlan:
    """Plan `samples` masks of each sequence's completion.

    Args:
        input_ids_BS: clean ids, int `[B, S]`.
        completion_mask_BS: bool `[B, S]`, the tokens that may be hidden and are scored; never the prompt or padding.
        law: `"exact"` or `"bernoulli"` (see the module's head for level, pairing and weight).
        samples: K, at least 1.
        seed: 32-bit key word; equal seeds and sequence ids give equal masks anywhere.
        sequence_ids: int64 `[B]` from `noise.sequence_ids`, distinct.
        mask_id: the id written at hidden positions; it must not occur among the scored tokens.
        shift: 1 where position i is predicted by row i - 1 (Dream), else 0.
        iteration: inner iteration; the samples of different iterations are independent.
        t: fixes the level of `bernoulli`, in (0, 1].
        t_min: lower end of the uniform level of `bernoulli`, in [0, 1); LLaDA's training uses 1e-3.

    Raises ValueError or TypeError naming the argument. Laws: LLaDA (arXiv 2502.09992), BGPO (arXiv 2510.11683).

    Example:
        >>> ids = torch.tensor([[5, 6, 7, 8]])
        >>> completion = torch.tensor([[False, True, True, True]])
        >>> plan = make_mask_plan(ids, completion, law="exact", samples=3, seed=0, sequence_ids=torch.tensor([1]), mask_id=9)
        >>> sorted(plan.counts[:, 0].tolist())
        [1, 2, 3]
    """
    checks.choice("law", law, LAWS)
    checks.count("samples", samples)
    checks.count("shift", shift, 0)
    checks.count("iteration", iteration, 0)
    checks.count("mask_id", mask_id, 0)
    noise.check_seed(seed)
    checks.dtype("input_ids_BS", input_ids_BS, _INTEGERS)
    checks.shape("input_ids_BS", input_ids_BS, [None, None])
    B, S = input_ids_BS.shape
    if B == 0 or S == 0:
        raise ValueError(f"input_ids_BS must hold at least one sequence and one token, got shape {[B, S]}")
    checks.dtype("completion_mask_BS", completion_mask_BS, [torch.bool])
    checks.shape("completion_mask_BS", completion_mask_BS, [B, S])
    checks.dtype("sequence_ids", sequence_ids, [torch.int64])
    checks.shape("sequence_ids", sequence_ids, [B])
    for name, tensor in (("completion_mask_BS", completion_mask_BS), ("sequence_ids", sequence_ids)):
        checks.same_device(name, tensor, "input_ids_BS", input_ids_BS)
    if law != "bernoulli" and (t is not None or t_min != 0.0):
        raise ValueError(f"t and t_min are options of law='bernoulli', got law={law!r}")
    if t is not None and checks.number("t", t, above=0) > 1.0:
        raise ValueError(f"t must be in (0, 1], got {t}")
    if checks.number("t_min", t_min, least=0) >= 1.0:
        raise ValueError(f"t_min must be in [0, 1), got {t_min}")
    if checks.may_read(input_ids_BS):
        if bool(completion_mask_BS[:, :shift].any()):
            raise ValueError(
                f"completion_mask_BS must be False at the first {shift} position(s) when shift={shift}, which no row predicts"
            )
        if bool(((input_ids_BS == mask_id) & completion_mask_BS).any()):
            raise ValueError(f"input_ids_BS must not hold mask_id={mask_id} where completion_mask_BS is True")
        if len(torch.unique(sequence_ids)) != B:
            raise ValueError("sequence_ids must be distinct: equal ids would share their noise")
    return MaskPlan(
        input_ids_BS=input_ids_BS,
        completion_mask_BS=completion_mask_BS,
        sequence_ids_B=sequence_ids,
        sample_K=torch.arange(samples, device=input_ids_BS.device),
        law=law,
        samples=samples,
        seed=seed,
        mask_id=mask_id,
        shift=shift,
        iteration=iteration,
        t=t,
        t_min=t_min,
    )
