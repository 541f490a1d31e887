"""Mask plans: which tokens each Monte-Carlo sample hides and scores, at which weight; made once, shared by every policy.

A plan stores law, keys and ids; masks, rows and weights are computed where they are read, for the cut that is read. The
laws and their formulas are in `laws.py`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dllm_kernels import checks, draws, laws, noise, plan_report, traces
from dllm_kernels.laws import LAWS, Law
from dllm_kernels.noise import Stream
from dllm_kernels.scoring import Rows

__all__ = ["LAWS", "MaskPlan", "make_mask_plan"]

_INTEGERS = (torch.int64, torch.int32)


def _stride(rule: Law, samples: int) -> int:
    """Noise samples per iteration. A trace has as many samples as its batch's longest has states: no noise may depend on it."""
    return 1 << 16 if rule.level == "steps" else samples


@dataclass(frozen=True, eq=False)
class MaskPlan:
    """K masks for each of B sequences. Make it with `make_mask_plan`; read the properties; `cut` it into micro-batches.

    Noise on tokens is keyed by their ordinal inside completion or prompt, so padding and batching do not change a bit.
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
    tail_mask_BS: Tensor | None = None  # hidden and never scored: what follows the first EOS, for some laws
    state_BS: Tensor | None = None  # of a given trace: when each token was committed, -1 never
    state_BK: Tensor | None = None  # of a given trace: the state of each of the `samples`, -1 none

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
        return draws.Keys(self.seed, self.iteration, _stride(self.rule, self.samples), self.sample_K, self.sequence_ids_B)

    @cached_property
    def level(self) -> draws.Level:
        """How much each sample hides; for laws whose hidden tokens are not given."""
        return draws.level(self.rule, self.options, self._keys, self.lengths_B)

    @cached_property
    def masked(self) -> Tensor:
        """bool `[K, B, S]`: hidden in this sample, be it completion or prompt."""
        hidden_KBS = self._hidden_KBS
        if self.tail_mask_BS is not None:
            hidden_KBS = hidden_KBS | self._hidden_tail_KBS
        if self.prompt_mask_BS is not None:
            bits_KBS = self._keys.bits(Stream.PROMPT, self.sample_K, draws.ordinals(self.prompt_mask_BS))
            hidden_KBS = hidden_KBS | self.prompt_mask_BS & noise.bernoulli(bits_KBS, self.prompt_noise)
        return hidden_KBS

    @cached_property
    def _hidden_KBS(self) -> Tensor:
        """Of the tokens that may be scored."""
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
        """Tokens that the given trace commits in a sample's state or later."""
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
        """Probability that a completion token is hidden given the level, fp32: t, or n / L (1 for an empty completion).

        For `block`, `trace` and `segments`, which do not treat all tokens alike: the share that is hidden.
        """
        if self.rule.level not in ("block", "steps"):
            return self.level.own_t().float()
        return torch.where(self.lengths_B > 0, self._hidden_KBS.sum(-1).double() / self.lengths_B, 1.0).float()

    @cached_property
    def weight_KB(self) -> Tensor:
        """Weight of each scored token of a sample, fp32, as published: 1 / t, L / n and so on, see `laws.LAWS`."""
        scored_KB = self.counts if self.rule.weight in draws.REALISED else None
        level = None if self.rule.level in ("block", "steps") else self.level
        return draws.weights(self.rule, self.options, self._keys, level, self.lengths_B, scored_KB).float()

    @property
    def share_K(self) -> Tensor:
        """Weight of each sample in its sequence's score, fp32 `[K]`: 1 / samples of the whole plan for most laws."""
        return self._share_K.float()

    @property
    def _share_K(self) -> Tensor:
        return laws.shares(self.rule, self.options, self.sample_K, self.samples)

    @cached_property
    def rows(self) -> Rows:
        """The rows to score, ordered by (sample, sequence, position); the logit shift is resolved here and nowhere else."""
        K, B, S = self.shape
        flat_N = self.scored.reshape(-1).nonzero()[:, 0]
        # one-dimensional look-ups: indexing by (sample, sequence, position) takes twice as long
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
        """Per-sample ELBOs `[B, K]`: `weight * sum of logp` over the rows of each; differentiable, order-independent."""
        K, B, S = self.shape
        checks.shape("logp_N", logp_N, [len(self.rows.index)])
        scattered = logp_N.new_zeros(K * B * S).index_copy(0, self.rows.index + self.shift, logp_N * self.rows.weight)
        return scattered.view(K, B, S).sum(-1).t()

    def score(self, logp_N: Tensor) -> Tensor:
        """Scores `[B]`: `sum_k share_k elbo_bk`, the law's estimate. The scores of cuts along the samples add up."""
        elbo_BK = self.elbo(logp_N)
        return (elbo_BK * self._share_K.to(elbo_BK.dtype)).sum(-1)

    def standard_error(self, elbo_BK: Tensor) -> Tensor:
        """Standard errors `[B]` of the scores, from the per-sample ELBOs of all K samples; NaN where K does not tell.

        The standard deviation of the independent draws over the root of their number. A draw is a sample; for pairs of
        complements (`antithetic`, `coupled`) the mean of a pair; for `quadrature` the draws of each node, whose variances
        add up, so that the rule's own error is not in it. Strata (`exact`, `exact_zero`, `antithetic`) and the
        distinct blocks of `block` make the true error smaller than what is returned. `full`, `trace` and `segments` have no
        draws to compare: NaN.
        """
        K, B, _ = self.shape
        checks.shape("elbo_BK", elbo_BK, [B, K])
        if self.samples != K:
            raise ValueError(f"elbo_BK must hold all {self.samples} samples of the plan, got {K} of a cut")
        return draws.standard_error(self.rule, self.options, elbo_BK[:, torch.argsort(self.sample_K)])

    def cut(self, *, samples: slice | Tensor = slice(None), sequences: slice | Tensor = slice(None)) -> MaskPlan:
        """The plan of some samples and sequences, with the very bits they have in the whole."""
        for name, part in (("samples", samples), ("sequences", sequences)):
            if not isinstance(part, slice) and not (isinstance(part, Tensor) and part.dim() == 1):
                raise TypeError(f"{name} must be a slice or a 1-d tensor of indices, got {part!r}")
        parts: dict[str, Any] = {name: tensor[sequences] for name, tensor in self.tensors().items() if name != "sample_K"}
        return replace(self, **parts, sample_K=self.sample_K[samples])

    def to(self, device: torch.device | str) -> MaskPlan:
        """The same plan, the same masks, on another device."""
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return replace(self, **moved)

    def tensors(self) -> dict[str, Tensor]:
        """The plan's tensors by field; what is not there is None."""
        return {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}

    def describe(
        self, *, hidden_size: int | None = None, vocabulary: int | None = None, dtype: torch.dtype = torch.bfloat16
    ) -> str:
        """Law, expected rows and memory in words; with the head's H and V also its FLOPs, and the logits it never builds.

        Example:
            >>> ids = torch.arange(8)[None]
            >>> plan = make_mask_plan(ids, ids > 3, law="exact", samples=2, seed=0, sequence_ids=torch.tensor([1]), mask_id=9)
            >>> print(plan.describe(hidden_size=16, vocabulary=100).splitlines()[3])
            rows        5 expected, 31.2% of the positions
        """
        return plan_report.describe(self, hidden_size, vocabulary, dtype)

    def state_dict(self) -> dict[str, Any]:
        """Plain values, and tensors on the CPU that share no memory with the plan's."""
        state: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        state |= {name: tensor.cpu().clone(memory_format=torch.contiguous_format) for name, tensor in self.tensors().items()}
        return {**state, "options": dict(self.options), "format": plan_report.FORMAT}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> MaskPlan:
        """The plan that gave this state, on the CPU. Raises ValueError naming what is missing, unknown or does not fit."""
        values = dict(state)
        if (found := values.pop("format", None)) != plan_report.FORMAT:
            raise ValueError(f"state must be a mask plan of format {plan_report.FORMAT}, got format {found!r}")
        names = {f.name for f in fields(cls)}
        if wrong := names.symmetric_difference(values):
            raise ValueError(f"state must hold the fields of a mask plan, missing or unknown: {', '.join(sorted(wrong))}")
        plan = cls(**values)
        _check_tensors(plan.input_ids_BS, plan.completion_mask_BS, plan.sequence_ids_B, None)
        laws.check_samples(plan.rule, plan.options, checks.count("samples", plan.samples))
        return plan

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to a file; a crash leaves the old file whole."""
        plan_report.write(self.state_dict(), path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> MaskPlan:
        """A saved plan, on the CPU; no code of the file is run. Raises ValueError for a file that is none or damaged."""
        try:
            return cls.from_state_dict(plan_report.read(path))
        except (TypeError, AttributeError) as error:  # a field of another type
            raise ValueError(f"path must name a saved mask plan, but {os.fspath(path)} holds {error}") from error


def make_mask_plan(
    input_ids_BS: Tensor,
    completion_mask_BS: Tensor,
    *,
    law: str,
    samples: int | None,
    seed: int,
    sequence_ids: Tensor,
    mask_id: int,
    shift: int = 0,
    prompt_noise: float | None = None,
    iteration: int = 0,
    attention_mask_BS: Tensor | None = None,
    eos_id: int | None = None,
    **options: Any,
) -> MaskPlan:
    """Plan `samples` masks of each sequence's completion.

    Args:
        input_ids_BS: clean ids, int `[B, S]`.
        completion_mask_BS: bool `[B, S]`, the tokens that may be hidden and are scored; never the prompt or padding.
        law: see below. samples: K; None where the given trace or the segments say it.
        seed: 32-bit key word; equal seeds and sequence ids give equal masks anywhere.
        sequence_ids: int64 `[B]` from `noise.sequence_ids`, distinct.
        mask_id: the id written at hidden positions; it must not occur among the completion's tokens.
        shift: 1 where position i is predicted by row i - 1 (Dream), else 0.
        prompt_noise: probability with which each prompt token is hidden, never scored. None: the law's own, 0.15 for
            `full` and `block`, else 0.
        iteration: inner iteration; the samples of different iterations are independent.
        attention_mask_BS: bool or int `[B, S]`, False at padding. Without it every token before the completion is prompt.
        eos_id: None scores the whole completion, its EOS tail included. Given: what follows a completion's first EOS is
            never scored and stays visible, or, for `full`, `block`, `trace` and `segments`, is hidden as published.
        options: of the law, any other is an error.

    Laws (L scored tokens, n of them hidden in a sample; the score of a sequence is the mean over its K samples unless
    said otherwise; `unbiased` is for `ELBO = sum_{n=1..L} (1/n) E_{|m|=n} sum_{l in m} log p(y_l | y^m)`):

        bernoulli   each token with probability t ~ U(t_min, 1], or with the `t` given; weight 1/t, unbiased but for t_min.
                    weight="L/count": biased, L / (L + 1) times the ELBO. (LLaDA, arXiv 2502.09992, eq. 3)
        exact       n ~ U{1..L}, stratified over the samples or pairing="independent"; L/n; unbiased. (LLaDA eq. 6, BGPO)
        exact_zero  n ~ U{0..L}, same; (L+1)/n, 0 for n = 0; unbiased. (ESPO, arXiv 2512.03759)
        antithetic  pairs: such a mask, then its complement with weight (L+1)/(L-n); unbiased. weight="dmpo": Bernoulli with
                    t ~ U(t_min = 0.1, 1] and L/count; biased. K even. (ESPO; DMPO, arXiv 2510.08233)
        coupled     all tokens, then pairs of Bernoulli(t) and its complement, t ~ U(t_low = 0.2, t_high = 0.8) or given, of
                    weights 1/t, 1/(1-t); half the first plus the mean half-sum of a pair: no ELBO, DiffuCoder's score
                    summed over tokens. K odd. (arXiv 2506.20639)
        quadrature  Gauss-Legendre `nodes` (1..5) t with weights w on [0, 1], K / nodes masks of int(t L) tokens at each
                    (counts="round": rounded half up); w/t, or weight="wL/count"; summed over nodes; biased, nodes without
                    a token contribute 0. Sample k belongs to node k mod nodes. (GDPO, arXiv 2510.08554)
        full        all tokens; 1; no ELBO. (d1, arXiv 2504.12216; wd1, arXiv 2507.08838)
        block       one block of `block_length` = 32 tokens, from a random order of the blocks: n ~ U{1..its size} of it, all
                    later tokens, earlier ones as the prompt; all hidden tokens are scored; 1 / their number; no ELBO.
                    (SPG, arXiv 2510.09541)
        trace       the states of a rollout: `step_map_BS` (int64, the step that committed each token, -1 outside). Sample s
                    hides the tokens of steps >= s, scores those of step s; 1; the score is the sum. `steps_BJ` (int64, -1
                    none) picks steps; `shrink` merges that many consecutive steps. (TraceRL, arXiv 2509.06949; EGSPO)
        segments    the same for `segments` = N parts of T = `total_steps` steps (default: the sequence's own last + 1): step
                    s is in part s N // T; each is scored in its first state. (d2, arXiv 2509.21474)

    Raises ValueError or TypeError naming the argument.

    Example:
        >>> ids = torch.tensor([[5, 6, 7, 8]])
        >>> completion = torch.tensor([[False, True, True, True]])
        >>> plan = make_mask_plan(ids, completion, law="exact", samples=3, seed=0, sequence_ids=torch.tensor([1]), mask_id=9)
        >>> sorted(plan.counts[:, 0].tolist())
        [1, 2, 3]
    """
    rule, options = laws.resolve(law, options)
    checks.count("shift", shift, 0)
    checks.count("iteration", iteration, 0)
    checks.count("mask_id", mask_id, 0)
    noise.check_seed(seed)
    prompt_noise = rule.prompt_noise if prompt_noise is None else checks.number("prompt_noise", prompt_noise, least=0)
    if prompt_noise > 1.0:
        raise ValueError(f"prompt_noise must be in [0, 1], got {prompt_noise}")
    _check_tensors(input_ids_BS, completion_mask_BS, sequence_ids, attention_mask_BS)
    if checks.may_read(input_ids_BS):
        _check_values(input_ids_BS, completion_mask_BS, sequence_ids, attention_mask_BS, mask_id, shift)
    given = completion_mask_BS
    tail_BS = None
    if eos_id is not None:
        eos_BS = given & (input_ids_BS == checks.count("eos_id", eos_id, 0))
        tail_BS = given & (eos_BS.cumsum(-1) - eos_BS.long() > 0)
        completion_mask_BS = given & ~tail_BS
    prompt_BS = None
    if prompt_noise > 0.0:
        prompt_BS = (given.cumsum(-1) == 0) & given.any(-1, keepdim=True)
        if attention_mask_BS is not None:
            prompt_BS = prompt_BS & (attention_mask_BS != 0)
    state_BS = state_BK = None
    if rule.level == "steps":
        state_BS, state_BK = traces.states(law, options, given, samples)
        options = {name: value for name, value in options.items() if name not in traces.TENSORS}
        samples = state_BK.shape[1]
    samples = checks.count("samples", samples)
    laws.check_samples(rule, options, samples)
    if samples > (stride := _stride(rule, samples)) or (iteration + 1) * stride > 1 << 32:
        raise ValueError(f"samples and iteration must number at most 2^32 noise samples, got {samples} and {iteration}")
    return MaskPlan(
        input_ids_BS=input_ids_BS,
        completion_mask_BS=completion_mask_BS,
        sequence_ids_B=sequence_ids,
        sample_K=torch.arange(samples, device=input_ids_BS.device),
        law=law,
        options=options,
        samples=samples,
        seed=seed,
        mask_id=mask_id,
        shift=shift,
        iteration=iteration,
        prompt_noise=prompt_noise,
        prompt_mask_BS=prompt_BS,
        tail_mask_BS=tail_BS if rule.tail == "hidden" else None,
        state_BS=state_BS,
        state_BK=state_BK,
    )


def _check_tensors(
    input_ids_BS: Tensor, completion_mask_BS: Tensor, sequence_ids: Tensor, attention_mask_BS: Tensor | None
) -> None:
    checks.dtype("input_ids_BS", input_ids_BS, _INTEGERS)
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
        checks.dtype("attention_mask_BS", attention_mask_BS, (torch.bool, *_INTEGERS))
        checks.shape("attention_mask_BS", attention_mask_BS, [B, S])
        checks.same_device("attention_mask_BS", attention_mask_BS, "input_ids_BS", input_ids_BS)


def _check_values(
    input_ids_BS: Tensor,
    completion_mask_BS: Tensor,
    sequence_ids: Tensor,
    attention_mask_BS: Tensor | None,
    mask_id: int,
    shift: int,
) -> None:
    if bool(completion_mask_BS[:, :shift].any()):
        raise ValueError(
            f"completion_mask_BS must be False at the first {shift} position(s) when shift={shift}, which no row predicts"
        )
    if attention_mask_BS is not None and bool((completion_mask_BS & (attention_mask_BS == 0)).any()):
        raise ValueError("completion_mask_BS must be False at padding, where attention_mask_BS is")
    if bool(((input_ids_BS == mask_id) & completion_mask_BS).any()):
        raise ValueError(f"input_ids_BS must not hold mask_id={mask_id} where completion_mask_BS is True")
    if len(torch.unique(sequence_ids)) != len(sequence_ids):
        raise ValueError("sequence_ids must be distinct: equal ids would share their noise")
