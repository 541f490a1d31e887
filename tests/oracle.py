"""Independent computations from the formulas: plain autograd in float64, Python integers, exact enumeration.

Nothing here calls dllm_kernels.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor


def logits(
    hidden, weight, rows=None, *, bias=None, softcap=None, temperature=1.0, suppress=(), valid_vocab=None, low_rank=None
) -> Tensor:
    """Final logits `[N, V]` of the selected rows, full size, differentiable."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    z = (flat if rows is None else flat[rows]) @ weight.t()
    if low_rank is not None:
        down, up, scale = low_rank
        z = z + scale * ((flat if rows is None else flat[rows]) @ down.t()) @ up.t()
    if bias is not None:
        z = z + bias
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z / (temperature[:, None].to(z.dtype) if isinstance(temperature, Tensor) else temperature)
    excluded = torch.zeros(weight.shape[0], dtype=torch.bool)
    excluded[list(suppress)] = True
    if valid_vocab is not None:
        excluded[valid_vocab:] = True
    return z.masked_fill(excluded.to(z.device), -math.inf)


def head(hidden, weight, target, rows=None, **options) -> dict[str, Tensor]:
    """logp, entropy, lse, top_logp, top_id of the rows by log_softmax over all V columns."""
    z = logits(hidden, weight, rows, **options)
    logp = z.log_softmax(-1)
    finite = logp.masked_fill(logp == -math.inf, 0.0)
    top_logp, top_id = logp.max(-1)
    return {
        "logp": logp.gather(1, target[:, None])[:, 0],
        "entropy": -(finite.exp() * finite).masked_fill(logp == -math.inf, 0.0).sum(-1),
        "lse": z.logsumexp(-1),
        "top_logp": top_logp,
        "top_id": top_id,
    }


# Known answers of Random123 (kat_vectors, philox4x32 10): counter, key, words
PHILOX_VECTORS = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF, 0xFFFFFFFF), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 in Python integers (Salmon et al. 2011, section 4.3)."""
    c, (k0, k1) = list(counter), key
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k0, b % 2**32, (a >> 32) ^ c[3] ^ k1, a % 2**32]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return tuple(c)


def llada_pretraining_loss(logits, input_ids, masked, p_mask) -> Tensor:
    """LLaDA, GUIDELINES.md, "Pre-training": token loss over p_mask, divided by B x L."""
    token_loss = F.cross_entropy(logits[masked], input_ids[masked], reduction="none") / p_mask[masked]
    return token_loss.sum() / (input_ids.shape[0] * input_ids.shape[1])


def llada_sft_loss(logits, input_ids, masked, p_mask, answer_lengths) -> Tensor:
    """LLaDA, GUIDELINES.md, "SFT": token loss over p_mask, over the answer's length, over the number of sequences."""
    token_loss = F.cross_entropy(logits[masked], input_ids[masked], reduction="none") / p_mask[masked]
    return torch.sum(token_loss / answer_lengths[masked]) / input_ids.shape[0]


def bgpo(elbo_BK, old_BK, advantages) -> Tensor:
    """BGPO's bound (arXiv 2510.11683) term by term: `-mean_b sum_j g_bj`."""
    B, K = elbo_BK.shape
    total = 0.0
    for b, j in itertools.product(range(B), range(K)):
        d = elbo_BK[b, j] - old_BK[b, j].detach()
        a = float(advantages[b])
        total = total + (a / K) * (1 + d if a >= 0 else torch.exp(d))
    return -total / B


def any_order_elbo(table: dict[tuple[int, ...], float], length: int) -> float:
    """`sum_n (1/n) E_{|m|=n} score(m)`, where score(m) is the sum of log-probs of the masked positions `m`."""
    return sum(
        table[m] / (n * math.comb(length, n)) for n in range(1, length + 1) for m in itertools.combinations(range(length), n)
    )


def plan_logps(model, plan) -> Tensor:
    """Row log-probs of a mask plan from the model's own full logits, differentiable."""
    K, B, S = plan.masked.shape
    noisy = torch.where(plan.masked, plan.mask_id, plan.input_ids_BS)
    logp = model(noisy.reshape(K * B, S)).logits.reshape(K, B, S, -1).log_softmax(-1)
    k, b, s = plan.scored.nonzero(as_tuple=True)
    return logp[k, b, s - plan.shift, plan.input_ids_BS[b, s]]


def chi_square_limit(degrees: int) -> float:
    """An upper bound of the chi-square quantile at 1 - 1e-6 (Laurent and Massart 2000, lemma 1)."""
    x = 6 * math.log(10)
    return degrees + 2 * math.sqrt(degrees * x) + 2 * x


def chi_square(observed: Tensor, expected: Tensor) -> float:
    return float(((observed - expected) ** 2 / expected).sum())


def divergence(student_logits, teacher_logits, kind, beta=0.5) -> Tensor:
    """`[N]` of two sets of final logits: KL of P || Q, of Q || P, or b KL(P || M) + (1 - b) KL(Q || M); -inf in both counts 0."""

    def finite(logp):
        return logp.masked_fill(logp == -math.inf, 0.0)

    q, p = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    if kind == "forward_kl":
        return (p.exp() * (finite(p) - finite(q))).sum(-1)
    if kind == "reverse_kl":
        return (q.exp() * (finite(q) - finite(p))).sum(-1)
    m = torch.logaddexp(math.log(beta) + finite(p), math.log(1 - beta) + finite(q))
    return (beta * p.exp() * (finite(p) - m) + (1 - beta) * q.exp() * (finite(q) - m)).sum(-1)
