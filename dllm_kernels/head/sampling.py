"""Hidden states x LM head -> the next tokens, their confidence and entropy, without a `[N, V]` tensor that outlives a chunk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from dllm_kernels import backends, checks
from dllm_kernels.backends.contract import HeadOptions, HeadProblem
from dllm_kernels.head import forward_backward, ops, shards, split_draws
from dllm_kernels.head import low_rank as adapter
from dllm_kernels.head.options import autocast_operands, check_arguments, check_finite, make_problem
from dllm_kernels.head.scoring import score
from dllm_kernels.head.split_draws import Filters

DRAWN = ("drawn_logp", "drawn_entropy", "margin")


@dataclass(frozen=True)
class Samples:
    """What `sample_tokens` returns, `[N]` each; floats are fp32 (fp64 for fp64 inputs)."""

    token: Tensor  # int64
    logp: Tensor  # of the token, at temperature 1, nats
    confidence: Tensor  # its probability at temperature 1
    entropy: Tensor  # of the row's distribution at temperature 1, nats
    # of the distribution that the token was drawn from, where asked for: restricted, and at the sampling temperature
    drawn_logp: Tensor | None = None
    drawn_entropy: Tensor | None = None
    margin: Tensor | None = None  # probability of its likeliest id less that of the next


@torch.no_grad()
def sample_tokens(
    hidden: Tensor,
    weight: Tensor,
    key: Tensor,
    *,
    step: int = 0,
    rows: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    top_p_first: bool = False,
    want: Sequence[str] = (),
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_temperature: float = 1.0,
    suppress: Sequence[int] = (),
    valid_vocab: int | None = None,
    low_rank: tuple[Tensor, Tensor, float] | None = None,
    vocab_group: dist.ProcessGroup | None = None,
) -> Samples:
    """Draw one token per selected row: `argmax_v z_v / temperature + g_v`, with g Gumbel noise of `(key, token, step)`.

    Args:
        hidden: `[..., H]`. weight: `[V, H]`. rows, bias, softcap, suppress, valid_vocab, low_rank: as in `score_tokens`.
        key: int64 `[N]`, row keys from `noise.row_bits(seed, Stream.TOKEN, sequence, sample, position)`.
        step: denoising step; draws of different steps are independent.
        temperature: >= 0, a number or `[N]`; 0 takes the largest logit, ties go to the smallest id.
        top_k: at least 1, draws among the k largest logits only. top_p: in (0, 1], draws among the most probable ids only, at
            `temperature` and after top_k, as few as reach that probability. The same noise, an exact but slower route: all
            logits of a chunk of rows at once, sorted. At temperature 0 they change no token. top_p_first: the nucleus is
            that of all ids (Dream's order), top_k applies after it. min_p: in [0, 1], leaves out what is less than min_p times
            as probable as the likeliest id at `temperature`, on the same route; 0 is none.
        want: any of "drawn_logp", "drawn_entropy", "margin": of the distribution drawn from, with these three, at
            `temperature` (at temperature 0: at 1). "margin" takes the slower route too; the other two are free at
            temperatures 0 and 1, and one more pass of the head at another.
        logit_temperature: > 0, divides the logits before everything else (models with a logit scale).
        vocab_group: as in `score_tokens`; tokens are those of the unsplit head. Noise is then drawn for every id, in float64:
            slower. Not with want.

    Not differentiable. Raises ValueError or TypeError naming the argument.

    Example:
        >>> from dllm_kernels.noise import Stream, row_bits, sequence_ids
        >>> key = row_bits(0, Stream.TOKEN, sequence_ids(["a"]), torch.tensor(0), torch.arange(4))
        >>> sample_tokens(torch.randn(4, 8), torch.randn(11, 8), key).token.shape
        torch.Size([4])
    """
    checks.number("logit_temperature", logit_temperature, above=0)
    options = HeadOptions(bias, softcap, logit_temperature, suppress, valid_vocab, low_rank)
    return sample(
        hidden,
        weight,
        key,
        rows,
        options,
        step=step,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        top_p_first=top_p_first,
        want=want,
        vocab_group=vocab_group,
    )


@torch.no_grad()
def sample(
    hidden: Tensor,
    weight: Tensor,
    key: Tensor,
    rows: Tensor | None,
    options: HeadOptions,
    *,
    step: int = 0,
    temperature: float | Tensor = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    top_p_first: bool = False,
    want: Sequence[str] = (),
    vocab_group: dist.ProcessGroup | None = None,
) -> Samples:
    """`sample_tokens` with its options in one piece; their temperature, a number, is its `logit_temperature`."""
    filters = Filters(top_k, None if top_p == 1 else top_p, None if min_p == 0 else min_p, top_p_first)
    given = (hidden, key, step, temperature, filters, want)
    if vocab_group is not None:
        return _sample_split(weight, rows, options, *given, vocab_group)
    _check_draw(*given)
    temperature = temperature.detach() if isinstance(temperature, Tensor) else float(temperature)
    hidden, weight = autocast_operands(hidden, weight)
    check_arguments(hidden, weight, rows, key.numel(), options)
    pair = adapter.pair(hidden, options)
    top_p, min_p = filters.top_p, filters.min_p
    whole = top_k is top_p is min_p is None  # nothing is left out of what is drawn from
    if "margin" in want or (want and not whole) or (top_p_first and top_k is not None and top_p is not None):
        problem = make_problem(hidden, weight, key, rows, options, pair)
        result = forward_backward.sample_drawn(problem, key, step, temperature, top_k, top_p, min_p, top_p_first=top_p_first)
        return Samples(
            result["token"],
            result["logp"],
            result["logp"].exp(),
            result["entropy"],
            **{name: result[name] for name in want},
        )
    if ops.observed(hidden, weight, options.bias, key, pair[1]):
        token, logp, entropy = ops.run_sample(hidden, weight, key, rows, options, pair, step, temperature, top_k, top_p, min_p)
    else:
        problem = make_problem(hidden, weight, key, rows, options, pair)
        result = forward_backward.sample(problem, key, step, temperature, top_k, top_p, min_p)
        token, logp, entropy = result["token"], result["logp"], result["entropy"]
    drawn: dict[str, Tensor | None] = {}
    by_row = isinstance(temperature, Tensor)
    if want and not by_row and temperature in (0, 1):
        drawn = {"drawn_logp": logp, "drawn_entropy": entropy}
    elif want:
        own = torch.where(temperature == 0, 1.0, temperature) if isinstance(temperature, Tensor) else temperature
        tempered = replace(options, temperature=options.temperature * own)
        scores = score(hidden, weight, token, rows, tempered, want=("logp", "entropy"))
        drawn = {"drawn_logp": scores.logp, "drawn_entropy": scores.entropy}
    return Samples(token, logp, logp.exp(), entropy, **{name: drawn[name] for name in want})


def _check_draw(
    hidden: Tensor, key: Tensor, step: int, temperature: float | Tensor, filters: Filters, want: Sequence[str]
) -> None:
    if not isinstance(temperature, Tensor):
        checks.number("temperature", temperature, least=0)
    checks.count("step", step, 0)
    checks.dtype("key", key, [torch.int64])
    checks.shape("key", key, [None])
    checks.require_tensor("hidden", hidden)
    checks.same_device("key", key, "hidden", hidden)
    top_k, top_p, min_p, _ = filters
    if top_k is not None:
        checks.count("top_k", top_k)
    if top_p is not None and checks.number("top_p", top_p, above=0) > 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    if min_p is not None and checks.number("min_p", min_p, least=0) > 1:
        raise ValueError(f"min_p must be in [0, 1], got {min_p}")
    checks.names("want", want, DRAWN)
    if isinstance(temperature, Tensor):
        checks.dtype("temperature", temperature, checks.FLOATS)
        checks.shape("temperature", temperature, [key.numel()])
        checks.same_device("temperature", temperature, "hidden", hidden)


def _sample_split(
    weight: Tensor,
    rows: Tensor | None,
    options: HeadOptions,
    hidden: Tensor,
    key: Tensor,
    step: int,
    temperature: float | Tensor,
    filters: Filters,
    want: Sequence[str],
    group: dist.ProcessGroup,
) -> Samples:
    """A draw from a head that is split over a group."""

    def check() -> int:
        _check_draw(hidden, key, step, temperature, filters, want)
        if want:
            raise ValueError(f"want must be empty with vocab_group, got {want}: it is of all logits of a row in one place")
        return key.numel()

    weight, shard = shards.locate(weight, hidden, check, options, group)

    def stated() -> tuple[HeadProblem | None, float | Tensor]:
        if shard.some_id is None:
            return None, temperature
        wide, own = autocast_operands(hidden, weight)
        check_arguments(wide, own, rows, key.numel(), shard.options)
        problem = make_problem(wide, own, key, rows, shard.options, adapter.pair(wide, shard.options))
        forward_backward._check_values(backends.reference, problem, targets=False)
        return problem, forward_backward._check_sampling(problem, temperature)

    found, error = shards.attempt(stated)
    shards.agree(error, hidden, group)
    problem, drawn_at = found
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    result = split_draws.sample(problem, key, shard, filters, step=step, temperature=drawn_at, dtype=dtype)
    check_finite(result["lse"], HeadProblem(hidden, weight, key, rows))
    return Samples(result["token"], result["logp"], result["logp"].exp(), result["entropy"])
