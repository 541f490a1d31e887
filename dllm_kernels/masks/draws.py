"""The draws of a law: levels, hidden tokens and weights, as pure functions of (law, options, keys)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dllm_kernels import noise
from dllm_kernels.masks.laws import Law, Options
from dllm_kernels.noise import Stream

REALISED = ("L/count", "1/count")  # weights that divide by the realised number of scored tokens


@dataclass(frozen=True, eq=False)
class Keys:
    """Everything that the draws of a cut depend on."""

    seed: int
    iteration: int
    samples: int  # K of the whole plan: number of strata, and stride of iterations
    sample_K: Tensor  # of this cut, 0..samples-1
    sequence_ids_B: Tensor

    def bits(self, stream: Stream, sample_K: Tensor, position: Tensor) -> Tensor:
        """int64 `[K, B, *]` for positions `[B, *]`, `[K, B]` for a scalar; inner iterations have samples of
        their own.
        """
        dims = [1] * (position.dim() - 1)
        index_K1 = (sample_K + self.iteration * self.samples).view(-1, 1, *dims)
        return noise.row_bits(self.seed, stream, self.sequence_ids_B.view(-1, *dims), index_K1, position)


@dataclass(frozen=True, eq=False)
class Level:
    """How much each sample hides: by probability, or by count if `count_KB` is given.

    The second sample of a pair hides what the first shows, and therefore uses the draws of the first.
    """

    t_KB: Tensor  # float64: probability that a token is hidden; of pairs, in the first
    count_KB: Tensor | None  # int64, likewise
    lead_K: Tensor  # int64: the sample itself, or the first of its pair
    second_K1: Tensor  # bool

    def own_t(self) -> Tensor:
        return torch.where(self.second_K1, 1.0 - self.t_KB, self.t_KB)


def gauss_legendre(nodes: int) -> tuple[list[float], list[float]]:
    """Nodes t and weights w of the Gauss-Legendre rule on [0, 1]; w sums to 1.

    Example:
        >>> gauss_legendre(1)
        ([0.5], [1.0])
    """
    t, w = np.polynomial.legendre.leggauss(nodes)
    return ((t + 1) / 2).tolist(), (w / 2).tolist()


def _at_nodes(values: list[float], sample_K: Tensor) -> Tensor:
    """float64 `[K, 1]`: sample k belongs to node k mod nodes."""
    # filled on the device, as a copy from the host would stall a GPU's stream
    table = torch.stack([torch.full((), value, dtype=torch.float64, device=sample_K.device) for value in values])
    return table[sample_K % len(values)][:, None]


def level(law: Law, options: Options, keys: Keys, lengths_B: Tensor, block_B: Tensor | None = None) -> Level:
    """The levels of a cut, for laws with a probability, a count, nodes, or all.

    `block_B`: where B are blocks of sequences, the ordinal of each within its sequence, which keys its level.
    """
    k_K, B = keys.sample_K, len(lengths_B)
    place = torch.zeros((), dtype=torch.int64, device=k_K.device) if block_B is None else block_B
    if law.pairs_from is None:
        second_K, stratum_K, strata = torch.zeros_like(k_K, dtype=torch.bool), k_K, keys.samples
    else:
        second_K = (k_K >= law.pairs_from) & ((k_K - law.pairs_from) % 2 == 1)
        stratum_K, strata = (k_K - law.pairs_from) // 2, (keys.samples - law.pairs_from) // 2
    lead_K = k_K - second_K.long()
    count_KB = None
    if law.level == "t":
        t_KB = _probability(law, options, keys, lead_K, B, place)
    elif law.level == "all":
        t_KB = torch.ones(len(k_K), B, dtype=torch.float64, device=k_K.device)
    else:
        if law.level == "nodes":
            half = 0.5 if options["counts"] == "round" else 0.0
            count_KB = (_at_nodes(gauss_legendre(options["nodes"])[0], k_K) * lengths_B + half).floor().long()
        else:
            smallest = 1 if law.level == "count from 1" else 0
            choices_B = lengths_B + 1 - smallest
            if law.pairing == "stratified":
                offset_KB = noise.below(keys.bits(Stream.LEVEL, torch.zeros_like(k_K[:1]), place), choices_B)
                # floor: rounding half to even would reach only half of the counts in some strata
                offset_KB = offset_KB + stratum_K[:, None] * choices_B // strata
            else:
                offset_KB = noise.below(keys.bits(Stream.LEVEL, lead_K, place), choices_B)
            count_KB = torch.where(lengths_B > 0, smallest + offset_KB % choices_B.clamp(min=1), 0)
        t_KB = torch.where(lengths_B > 0, count_KB.double() / lengths_B, 1.0)
    return Level(t_KB, count_KB, lead_K, second_K[:, None])


def _probability(law: Law, options: Options, keys: Keys, lead_K: Tensor, B: int, place: Tensor) -> Tensor:
    low, high = (options["t_low"], options["t_high"]) if law.reduction == "coupled" else (options["t_min"], 1.0)
    if options.get("t") is not None:
        t_KB = torch.full((len(lead_K), B), options["t"], dtype=torch.float64, device=lead_K.device)
    else:
        t_KB = low + (high - low) * noise.uniform(keys.bits(Stream.LEVEL, lead_K, place))
    if law.reduction == "coupled":  # the first sample hides everything
        t_KB = torch.where((lead_K == 0)[:, None], 1.0, t_KB)
    return t_KB


def hidden(law: Law, keys: Keys, level: Level, completion_BS: Tensor, ordinal_BS: Tensor | None = None) -> Tensor:
    """bool `[K, B, S]`: completion tokens hidden at a level; keyed by the ordinal within the completion.

    `ordinal_BS`: that ordinal, where B are blocks of sequences.
    """
    if law.level == "all":
        return completion_BS.expand(len(keys.sample_K), *completion_BS.shape)
    bits_KBS = keys.bits(Stream.MASK, level.lead_K, ordinals(completion_BS) if ordinal_BS is None else ordinal_BS)
    if level.count_KB is None:
        hidden_KBS = completion_BS & noise.bernoulli(bits_KBS, level.t_KB[:, :, None])
    else:
        hidden_KBS = noise.smallest(bits_KBS, completion_BS, level.count_KB)
    return hidden_KBS if law.pairs_from is None else completion_BS & (hidden_KBS ^ level.second_K1[:, :, None])


def ordinals(mask_BS: Tensor) -> Tensor:
    """int64 `[B, S]`: the number of True before each position (0 before the first)."""
    return (mask_BS.cumsum(-1) - 1).clamp(min=0)


def block(options: Options, keys: Keys, completion_BS: Tensor, lengths_B: Tensor, prompt_noise: float) -> Tensor:
    """bool `[K, B, S]` of SPG's block-random law: one block partly hidden, later ones fully, earlier ones as
    the prompt.
    """
    size, k_K = options["block_length"], keys.sample_K
    zero = torch.zeros((), dtype=torch.int64, device=completion_BS.device)
    blocks_B = (lengths_B + size - 1) // size
    candidates_J = torch.arange(-(-completion_BS.shape[1] // size), device=completion_BS.device)
    position_BJ = (1 + candidates_J).expand(len(lengths_B), -1)  # position 0 is the count's
    bits_BJ = keys.bits(Stream.LEVEL, torch.zeros_like(k_K[:1]), position_BJ)[0]
    order_BJ = torch.argsort(bits_BJ.masked_fill(candidates_J >= blocks_B[:, None], torch.iinfo(torch.int64).max), stable=True)
    chosen_KB = order_BJ.gather(1, (k_K % blocks_B.clamp(min=1)[:, None])).t()
    inside_KB = (lengths_B - chosen_KB * size).clamp(0, size)
    count_KB = torch.where(inside_KB > 0, 1 + noise.below(keys.bits(Stream.LEVEL, k_K, zero), inside_KB), 0)
    ordinal_BS = ordinals(completion_BS)
    bits_KBS = keys.bits(Stream.MASK, k_K, ordinal_BS)
    block_BS, chosen_KB1 = ordinal_BS // size, chosen_KB[:, :, None]
    hidden_KBS = noise.smallest(bits_KBS, completion_BS & (block_BS == chosen_KB1), count_KB) | (block_BS > chosen_KB1)
    if prompt_noise > 0.0:  # the bits of earlier blocks are still unused
        hidden_KBS = hidden_KBS | (block_BS < chosen_KB1) & noise.bernoulli(bits_KBS, prompt_noise)
    return completion_BS & hidden_KBS


def weights(law: Law, options: Options, keys: Keys, level: Level | None, lengths_B: Tensor, scored_KB: Tensor | None) -> Tensor:
    """float64 `[K, B]`: the weight of a sample's sum of log-probs, as published.

    `scored_KB`: number of scored tokens, for the weights in `REALISED`. A sample without a scored token
        contributes nothing; weights that divide by its count are 0.
    """
    if scored_KB is not None:
        return _over(lengths_B if law.weight == "L/count" else torch.ones_like(lengths_B), scored_KB)
    if level is None or law.weight == "1":
        return torch.ones(len(keys.sample_K), len(lengths_B), dtype=torch.float64, device=lengths_B.device)
    if law.weight == "1/t":
        return 1.0 / level.own_t()
    assert level.count_KB is not None
    if law.level == "nodes":
        t, w = (_at_nodes(values, keys.sample_K) for values in gauss_legendre(options["nodes"]))
        return (w / t).expand(-1, len(lengths_B)) if law.weight == "w/t" else _over(w * lengths_B, level.count_KB)
    own_KB = torch.where(level.second_K1, lengths_B - level.count_KB, level.count_KB)
    return _over(lengths_B if law.weight == "L/n" else lengths_B + 1, own_KB)


def _over(numerator: Tensor, count_KB: Tensor) -> Tensor:
    return torch.where(count_KB > 0, numerator.double() / count_KB.clamp(min=1), 0.0)


def standard_error(law: Law, options: Options, elbo_BK: Tensor) -> Tensor:
    """`[B]`, see `MaskPlan.standard_error`; `elbo_BK` holds all samples in their order."""
    if law.level == "nodes":
        draws_BnD = elbo_BK.unflatten(1, (-1, options["nodes"])).transpose(1, 2)
    elif law.pairs_from is not None:
        draws_BnD = elbo_BK[:, law.pairs_from :].unflatten(1, (-1, 2)).mean(-1)[:, None]
    else:
        draws_BnD = elbo_BK[:, None]
    D = draws_BnD.shape[-1]
    if law.level in ("all", "steps") or D < 2:
        return torch.full_like(elbo_BK[:, 0], math.nan)
    return (draws_BnD.var(-1).sum(-1) / D).sqrt()
