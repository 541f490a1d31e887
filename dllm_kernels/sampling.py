"""Hidden states x LM head -> the next tokens, their confidence and entropy, without a `[N, V]` tensor that outlives a chunk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dllm_kernels import backends, checks
from dllm_kernels.scoring import check_finite, head_problem


@dataclass(frozen=True)
class Samples:
    """What `sample_tokens` returns, `[N]` each; floats are fp32 (fp64 for fp64 inputs)."""

    token: Tensor  # int64
    logp: Tensor  # of the token, at temperature 1, nats
    confidence: Tensor  # its probability at temperature 1
    entropy: Tensor  # of the row's distribution at temperature 1, nats


@torch.no_grad()
def sample_tokens(
    hidden: Tensor,
    weight: Tensor,
    key: Tensor,
    *,
    step: int = 0,
    rows: Tensor | None = None,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_temperature: float = 1.0,
    suppress: Sequence[int] = (),
    valid_vocab: int | None = None,
) -> Samples:
    """Draw one token per selected row: `argmax_v z_v / temperature + g_v`, with g Gumbel noise of `(key, token, step)`.

    Args:
        hidden: `[..., H]`. weight: `[V, H]`. rows, bias, softcap, suppress, valid_vocab: as in `score_tokens`.
        key: int64 `[N]`, row keys from `noise.row_bits(seed, Stream.TOKEN, sequence, sample, position)`.
        step: denoising step; draws of different steps are independent.
        temperature: >= 0; 0 takes the largest logit, ties go to the smallest id.
        logit_temperature: > 0, divides the logits before everything else (models with a logit scale).

    Not differentiable. Raises ValueError or TypeError naming the argument.

    Example:
        >>> from dllm_kernels.noise import Stream, row_bits, sequence_ids
        >>> key = row_bits(0, Stream.TOKEN, sequence_ids(["a"]), torch.tensor(0), torch.arange(4))
        >>> sample_tokens(torch.randn(4, 8), torch.randn(11, 8), key).token.shape
        torch.Size([4])
    """
    checks.number("temperature", temperature, least=0)
    checks.count("step", step, 0)
    checks.dtype("key", key, [torch.int64])
    checks.shape("key", key, [None])
    checks.same_device("key", key, "hidden", hidden)
    checks.number("logit_temperature", logit_temperature, above=0)
    problem = head_problem(
        hidden,
        weight,
        None if rows is None else rows,
        key.numel(),
        bias,
        softcap,
        logit_temperature,
        suppress,
        valid_vocab,
    )
    result = backends.select(problem).sample(problem, key, step=step, temperature=float(temperature))
    check_finite(result["lse"], problem)
    return Samples(result["token"], result["logp"], result["logp"].exp(), result["entropy"])
