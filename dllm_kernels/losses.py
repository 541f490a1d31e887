"""ELBO losses for any training loop."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dllm_kernels import checks
from dllm_kernels.backends.contract import HeadOptions, WeightGradient
from dllm_kernels.head import single_logits, vocab_parallel
from dllm_kernels.head.options import autocast_operands, check_arguments
from dllm_kernels.head.scoring import score

_REDUCTIONS = ("mean", "sum", "sequence", "none")


def elbo_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    masked: Tensor,
    p_mask: Tensor | float,
    *,
    lengths: Tensor | float | None = None,
    shift: int = 0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    suppress: Sequence[int] = (),
    valid_vocab: int | None = None,
    low_rank: tuple[Tensor, Tensor, float] | None = None,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    take_dweight: WeightGradient | None = None,
    vocab_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The masked-diffusion loss, `-sum over masked tokens of logp / p_mask`, from hidden states: logits are never kept.

    A drop-in for the lines that start with `F.cross_entropy(logits[masked], target[masked], reduction="none") / p_mask[masked]`.

    Args:
        hidden: `[..., L, H]`, the hidden states of the noisy sequence; leading dimensions are any of `[K, B]`.
        weight: `[V, H]`, the LM head.
        target: int64 `[..., L]`, the clean ids; its leading dimensions broadcast to hidden's.
        masked: bool `[..., L]`, the hidden tokens.
        p_mask: a number or broadcastable to `[..., L]`: the probability with which each token was hidden, in (0, 1] at
            the masked ones; what it says of the others is not read.
        lengths: a number or broadcastable to `[...]`, above 0, the answer lengths.
        shift: 1 where position i is predicted by row i - 1.
        bias, softcap, temperature, suppress, valid_vocab, low_rank, take_dweight, vocab_group: as in `score_tokens`.
        reduction: "mean": the sum divided by (number of sequences x L), LLaDA's pre-training loss; with `lengths` each
            sequence is divided by its own answer length and the result averaged over the sequences, its SFT loss
            (arXiv 2502.09992, eq. 3 and 5; github ML-GSAI/LLaDA, GUIDELINES.md). "sequence": the plain sum of each, `[...]`,
            in float64, since ratios are of differences of such sums.
            "sum": the plain sum of all. "none": `-logp / p_mask` of each token, `[..., L]`, 0 where it is not masked.
        ignore_index: tokens with this target count as not masked; the divisors of "mean" stay as they are.
        label_smoothing: e in [0, 1): in place of -logp stands `-(1 - e) logp - e mean_v logp_v`, the mean over the ids that
            are not excluded (as `F.cross_entropy` has it over all); not with a softcap.

    Returns float32 (float64 for float64 inputs, and of "sequence"), differentiable in hidden, weight and bias. No masked token
    is legal: loss 0, zero gradients. Raises ValueError or TypeError naming the argument.

    Example:
        >>> hidden, weight = torch.randn(2, 6, 8, requires_grad=True), torch.randn(11, 8)
        >>> target, masked = torch.randint(11, (2, 6)), torch.rand(2, 6) < 0.5
        >>> elbo_loss(hidden, weight, target, masked, torch.tensor(0.5)).backward()
    """
    checks.choice("reduction", reduction, _REDUCTIONS)
    smoothing = checks.number("label_smoothing", label_smoothing, least=0)
    if smoothing >= 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    if ignore_index is not None:
        masked = _without(masked, target, ignore_index)
    sequences, L, rows, target_N, position_N = _masked_rows(hidden, target, masked, shift)
    factor_N = 1.0 / _at_rows("p_mask", p_mask, masked.shape, position_N, upper=1.0)
    sequence_N = position_N // L
    leading = masked.shape[:-1]
    options = HeadOptions(bias, softcap, temperature, suppress, valid_vocab, low_rank)
    if reduction != "mean" and lengths is not None:
        raise ValueError(f"lengths divides only under reduction='mean', got reduction={reduction!r}")
    added_N = smoothing * _above_mean(hidden, weight, target_N, rows, options, vocab_group) if smoothing else None
    if reduction in ("sequence", "none"):
        logp_N = score(hidden, weight, target_N, rows, options, take_dweight=take_dweight, vocab_group=vocab_group).logp
        assert logp_N is not None
        loss_N = -logp_N if added_N is None else added_N - logp_N
        if reduction == "sequence":
            return _by_position(loss_N.double() * factor_N, position_N, sequences, L).sum(-1).view(leading)
        return _by_position(loss_N * factor_N.to(logp_N.dtype), position_N, sequences, L).view(masked.shape)
    if reduction == "sum":
        pass
    elif lengths is None:
        factor_N = factor_N / (sequences * L)
    else:
        length_N = _at_rows("lengths", lengths, leading, sequence_N)
        factor_N = factor_N / (length_N * sequences)
    total = score(
        hidden, weight, target_N, rows, options, coef=-factor_N, take_dweight=take_dweight, vocab_group=vocab_group
    ).weighted_sum
    assert total is not None
    return total if added_N is None else total + (added_N * factor_N.to(added_N.dtype)).sum()


def _without(masked: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """`masked`, False where the target is to be ignored; what cannot be compared is refused later by name."""
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}")
    checks.dtype("masked", masked, [torch.bool])
    checks.dtype("target", target, [torch.int64])
    try:
        counts = (target != ignore_index).expand(masked.shape)
    except RuntimeError:
        raise ValueError(f"target must be broadcastable to {list(masked.shape)}, got {list(target.shape)}") from None
    return masked & counts


def _above_mean(
    hidden: Tensor, weight: Tensor, target_N: Tensor, rows: Tensor, options: HeadOptions, vocab_group: dist.ProcessGroup | None
) -> Tensor:
    """`logp_y - mean_v logp_v`, a difference of logits, of which label smoothing adds e times to -logp."""
    if vocab_group is not None:
        return vocab_parallel.above_mean(hidden, weight, target_N, rows, options, vocab_group)
    hidden, weight = autocast_operands(hidden, weight)
    check_arguments(hidden, weight, rows, len(target_N), options)
    of_target_N = single_logits.target_logits(hidden, weight, target_N, rows, options)
    return of_target_N - single_logits.mean_logits(hidden, weight, rows, options)


def bgpo_terms(elbo: Tensor, old_elbo: Tensor, advantages: Tensor) -> Tensor:
    """`A (1 + d)` where A >= 0, `A e^d` where A < 0, with `d = elbo - old_elbo`: BGPO's linear bound terms times n_t.

    Their mean over the Monte-Carlo samples bounds `A exp(mean d)` from below, with equal value and gradient at d = 0
    (arXiv 2510.11683, lemmas 1 and 2). All arguments broadcast; old_elbo and advantages are detached. `1 + d` is computed
    directly: the published code's `exp(log(1 + d))` is NaN for d < -1 and poisons the other branch.
    """
    advantages = advantages.detach()
    d = elbo - old_elbo.detach()
    positive = advantages >= 0
    safe_d = torch.where(positive, 0.0, d)  # an overflowing exp in the branch not taken would turn its zero gradient into NaN
    return advantages * torch.where(positive, 1.0 + d, torch.exp(safe_d))


def bgpo_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    masked: Tensor,
    token_weight: Tensor | float,
    old_elbo: Tensor | None,
    advantages: Tensor,
    samples: int,
    *,
    sequences: int | None = None,
    shift: int = 0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    suppress: Sequence[int] = (),
    valid_vocab: int | None = None,
    low_rank: tuple[Tensor, Tensor, float] | None = None,
    take_dweight: WeightGradient | None = None,
    vocab_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """BGPO's bound terms of one Monte-Carlo sample: call backward on each of the `samples` in turn.

    `loss_j = -(1 / sequences) sum_b g_bj`, `g_bj = (A_b / samples) (1 + d_bj)` if A_b >= 0 else `(A_b / samples) e^{d_bj}`,
    `d_bj = elbo_bj - old_elbo_bj`, `elbo_bj = sum over masked of token_weight * logp` (arXiv 2510.11683). Summed over
    the samples this is the whole loss, and so are the gradients: memory does not grow with their number.

    Args:
        hidden: `[B, L, H]` of this sample's noisy sequences. weight: `[V, H]`. target: int64 `[B, L]`. masked: bool `[B, L]`.
        token_weight: a number or broadcastable to `[B, L]`, above 0 at the masked tokens: L / n for exact counts, 1 / t for
            Bernoulli masks.
        old_elbo: `[B]`, this sample's ELBO under the old policy with the same masks; None when the old policy is the
            current one, then d = 0 and the coefficients A / samples are known before the forward pass, which is cheaper.
        advantages: `[B]`. samples: n_t >= 1.
        sequences: the denominator, the number of sequences of the whole optimizer step; default B.
        shift, bias, softcap, temperature, suppress, valid_vocab, low_rank, take_dweight, vocab_group: as in `elbo_loss`.

    old_elbo and advantages are detached. Returns a float32 scalar (float64 for float64 inputs). Raises as `elbo_loss`.

    Example:
        >>> hidden, weight = torch.randn(2, 6, 8, requires_grad=True), torch.randn(11, 8)
        >>> target, masked = torch.randint(11, (2, 6)), torch.rand(2, 6) < 0.5
        >>> loss = bgpo_loss(hidden, weight, target, masked, torch.tensor(2.0), None, torch.tensor([1.0, -1.0]), samples=16)
        >>> loss.backward()
    """
    checks.count("samples", samples)
    B, L, rows, target_N, position_N = _masked_rows(hidden, target, masked, shift)
    checks.shape("masked", masked, [None, None])
    checks.shape("advantages", advantages, [B])
    checks.same_device("advantages", advantages, "hidden", hidden)
    advantages = checks.between("advantages", advantages.detach())
    divisor = samples * (B if sequences is None else checks.count("sequences", sequences))
    factor_N = _at_rows("token_weight", token_weight, masked.shape, position_N)
    options = HeadOptions(bias, softcap, temperature, suppress, valid_vocab, low_rank)
    if old_elbo is None:
        coef_N = -advantages.to(factor_N.dtype)[position_N // L] * factor_N / divisor
        scores = score(hidden, weight, target_N, rows, options, coef=coef_N, take_dweight=take_dweight, vocab_group=vocab_group)
        assert scores.weighted_sum is not None
        # value of the loss at d = 0 with the gradient of the weighted sum
        return scores.weighted_sum - scores.weighted_sum.detach() - (advantages.sum() / divisor).to(scores.weighted_sum.dtype)
    checks.shape("old_elbo", old_elbo, [B])
    checks.same_device("old_elbo", old_elbo, "hidden", hidden)
    old_elbo = checks.between("old_elbo", old_elbo.detach())
    logp_N = score(hidden, weight, target_N, rows, options, take_dweight=take_dweight, vocab_group=vocab_group).logp
    assert logp_N is not None
    elbo_B = _by_position(logp_N.double() * factor_N, position_N, B, L).sum(-1)
    return (-bgpo_terms(elbo_B, old_elbo, advantages).sum() / divisor).to(logp_N.dtype)


def _masked_rows(hidden: Tensor, target: Tensor, masked: Tensor, shift: int) -> tuple[int, int, Tensor, Tensor, Tensor]:
    """Number of sequences, L, and per masked token: row of hidden (shift resolved), target id, flat position."""
    checks.dtype("hidden", hidden, checks.FLOATS)
    checks.count("shift", shift, 0)
    checks.dtype("masked", masked, [torch.bool])
    if hidden.dim() < 2:
        raise ValueError(f"hidden must have shape [..., L, H], got {list(hidden.shape)}")
    checks.shape("masked", masked, list(hidden.shape[:-1]))
    if masked.numel() == 0:
        raise ValueError(f"masked must hold at least one sequence and one token, got shape {list(masked.shape)}")
    checks.dtype("target", target, [torch.int64])
    if target.dim() == 0 or target.shape[-1] != masked.shape[-1]:
        raise ValueError(
            f"target must be broadcastable to {list(masked.shape)} in its leading dimensions, got {list(target.shape)}"
        )
    try:
        target = target.expand(masked.shape)
    except RuntimeError:
        raise ValueError(f"target must be broadcastable to {list(masked.shape)}, got {list(target.shape)}") from None
    checks.same_device("target", target, "hidden", hidden)
    checks.same_device("masked", masked, "hidden", hidden)
    L = masked.shape[-1]
    position_N = (_positions_op if torch.compiler.is_compiling() else _positions)(masked, shift)
    return masked.numel() // L, L, position_N - shift, target.reshape(-1)[position_N], position_N


def _positions(masked: Tensor, shift: int) -> Tensor:
    """Flat positions of the masked tokens. Reads values: an op of its own in a compiled graph, for their number varies."""
    if shift and checks.may_read(masked) and bool(masked[..., :shift].any()):
        raise ValueError(f"masked must be False at the first {shift} position(s) when shift={shift}: no row predicts them")
    return masked.reshape(-1).nonzero()[:, 0]


_positions_op = torch.library.custom_op(
    "dllm_kernels::positions", _positions, mutates_args=(), schema="(Tensor masked, SymInt shift) -> Tensor"
)


@_positions_op.register_fake
def _(masked: Tensor, _: int) -> Tensor:
    return masked.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


def _at_rows(name: str, values: Tensor | float, shape: Sequence[int], index_N: Tensor, *, upper: float = math.inf) -> Tensor:
    """Positive values, broadcast to `shape`, at flat indices; detached, in float64 where they are, else float32."""
    if type(values) in (int, float):
        values = torch.ones((), dtype=torch.float64, device=index_N.device) * values
    values = checks.as_tensor(name, values)
    if values.is_complex() or values.dtype == torch.bool:
        raise TypeError(f"{name} must hold real numbers, got {values.dtype}")
    try:
        broadcast = values.detach().expand(tuple(shape))
    except RuntimeError:
        raise ValueError(f"{name} must be broadcastable to {list(shape)}, got {list(values.shape)}") from None
    checks.same_device(name, values, "hidden", index_N)
    picked_N = checks.between(name, broadcast.reshape(-1)[index_N], above=0.0, most=upper)
    return picked_N if picked_N.dtype == torch.float64 else picked_N.float()


def _by_position(values_N: Tensor, position_N: Tensor, sequences: int, L: int) -> Tensor:
    """`[sequences, L]`; positions are unique, so the order of a summation is fixed on every device."""
    return values_N.new_zeros(sequences * L).index_copy(0, position_N, values_N).view(sequences, L)
