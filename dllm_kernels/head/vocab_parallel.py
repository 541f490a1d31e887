"""Scores of a head split over ranks by rows of its weight: `vocab_group`. Above the backends, which know nothing of it.

Rank r of the group holds the ids that follow those of rank r - 1, any number of them, none included. Every rank scores its
own ids as a head of their own: `logp_r`, `lse_r`, `H_r` of the distribution over them. With `w_r = e^(lse_r - lse)`,

    lse = logsumexp_r lse_r,    logp = logp_o - log(1 + sum_(r != o) e^(lse_r - lse_o)) at the rank o that holds the id,
    H = sum_r w_r (H_r - log w_r),

so a few numbers per row and shard are exchanged. Their gradients need no exchange: what arrives is equal on all ranks, and a
rank's share of it depends on its own ids alone. Only the gradient of hidden states, and of an adapter's A, is summed over the
group. An id that another rank holds is replaced by one of one's own, whose log-probability nobody uses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dllm_kernels import checks
from dllm_kernels.backends.contract import STATISTICS, HeadOptions
from dllm_kernels.head import several, single_logits
from dllm_kernels.head.options import autocast_operands, check_arguments
from dllm_kernels.head.shards import agree, attempt, enter, gathered, largest, leave, locate, summed
from dllm_kernels.rows import Rows

_ELEMENTS_AT_ONCE = 1 << 22  # of weight rows whose logits are computed one by one


@dataclass(frozen=True)
class Whole:
    """What one row's numbers from all ranks say of the whole head; floats `[N]`, logp `[N, T]`."""

    logp: Tensor
    lse: Tensor
    entropy: Tensor
    share: Tensor  # w of this rank's ids
    excess: Tensor  # H_r - log w_r - H of this rank, 0 where w is


def merge(group: Any, held_NT: Tensor, logp_NT: Tensor, lse_N: Tensor, entropy_N: Tensor) -> Whole:
    """From this rank's numbers to those of the whole head. Two collectives. `held`: whose logp this rank knows."""
    lse_RN, entropy_RN = gathered(torch.cat((lse_N, entropy_N)), group).chunk(2, 1)
    lse = lse_RN.logsumexp(0)
    log_w_RN = lse_RN - lse
    w_RN = log_w_RN.exp()
    surprise_RN = torch.where(w_RN > 0, entropy_RN - log_w_RN, 0.0)
    entropy = (w_RN * surprise_RN).sum(0)
    rank = dist.get_rank(group)
    others_RN = lse_RN.clone()
    others_RN[rank] = float("-inf")
    # log-probability near 0 keeps its digits: minus the sum of the others
    own_NT = logp_NT - torch.log1p((others_RN.logsumexp(0) - lse_N).exp())[:, None]
    logp = summed(torch.where(held_NT, own_NT, 0.0), group)
    excess_N = torch.where(w_RN[rank] > 0, surprise_RN[rank] - entropy, 0.0)
    return Whole(logp, lse, entropy, w_RN[rank], excess_N)


class _Merge(torch.autograd.Function):
    """`logp`, `entropy` and `lse` of the whole head from this rank's; gradients that arrive are equal on all ranks.

    Columns of logp from `falling` on are of the likeliest ids: no rounding makes one of them larger than the one before.
    """

    @staticmethod
    def forward(
        ctx: Any, logp_NT: Tensor, lse_N: Tensor, entropy_N: Tensor, held_NT: Tensor, falling: int, group: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        whole = merge(group, held_NT, logp_NT, lse_N, entropy_N)
        ctx.save_for_backward(whole.share, whole.excess, held_NT)
        ctx.set_materialize_grads(False)
        if falling < held_NT.shape[1]:
            whole.logp[:, falling:] = whole.logp[:, falling:].cummin(1).values
        return whole.logp, whole.entropy, whole.lse

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, dlogp_NT: Tensor | None, dentropy_N: Tensor | None, dlse_N: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        share_N, excess_N, held_NT = ctx.saved_tensors
        of_logp_NT, of_lse_N, of_entropy_N = _shares(share_N, excess_N, held_NT, dlogp_NT, dentropy_N, dlse_N)
        return of_logp_NT, of_lse_N, of_entropy_N, None, None, None


def _shares(
    share_N: Tensor,
    excess_N: Tensor,
    held_NT: Tensor,
    dlogp_NT: Tensor | None,
    dentropy_N: Tensor | None,
    dlse_N: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of this rank's logp, lse and entropy. Where it holds an id, `logp = logp_r + lse_r - lse`."""
    of_lse_N, of_entropy_N = torch.zeros_like(share_N), torch.zeros_like(share_N)
    if dlogp_NT is None:
        of_logp_NT = share_N.new_zeros(held_NT.shape)
    else:
        of_logp_NT = torch.where(held_NT, dlogp_NT, 0.0)
        of_lse_N = of_logp_NT.sum(1) - dlogp_NT.sum(1) * share_N
    if dentropy_N is not None:
        of_entropy_N = dentropy_N * share_N
        of_lse_N = of_lse_N + of_entropy_N * excess_N
    if dlse_N is not None:
        of_lse_N = of_lse_N + dlse_N * share_N
    return of_logp_NT, of_lse_N, of_entropy_N


def score(
    score_own: Callable[..., Any],
    check_coefficient: Callable[..., Any],
    hidden: Tensor,
    weight: Tensor,
    target: Tensor | None,
    rows: Tensor | None,
    options: HeadOptions,
    coef: Tensor | None,
    entropy_coef: Tensor | None,
    want: Sequence[str],
    plan: str | None,
    ids: Tensor | None,
    want_top: int,
    group: Any,
) -> dict[str, Any]:
    """`scoring.score`, given as `score_own`, of a split head: the fields of `Scores`, alike on all ranks.

    Known coefficients wait for the other ranks' sums, so the plans are those of late ones.
    """

    def check() -> int:
        checks.names("want", want, STATISTICS)
        if plan == "coef":
            raise ValueError("plan must not be 'coef' with vocab_group, whose ranks need each other's sums before any gradient")
        count = several.check(hidden, target, ids, rows)
        if target is ids is None and (not want_top or coef is not None):
            raise TypeError("score_tokens needs target, ids or want_top, got none of them, or coefficients of none")
        shape = (count,) if ids is None else (count, ids.shape[1] + (target is not None))
        for name, given, allowed in (("coef", coef, shape), ("entropy_coef", entropy_coef, (count,))):
            if check_coefficient(name, given, allowed, hidden) is not None:
                checks.finite(name, given)  # type: ignore[arg-type]
        return count

    weight, shard = locate(weight, hidden, check, options, group)
    N = several.check(hidden, target, ids, rows)
    low, own = options.low_rank, shard.options
    entered, *down = enter(group, hidden, *(() if low is None else low[:1]))
    if low is not None:
        own = replace(own, low_rank=(down[0], *low[1:]))
    target_NT = several.joined(target, ids, N, hidden.device)
    tops = "top_logp" in want or "top_id" in want
    count = max(want_top, int(tops))  # candidates of each rank
    dead, alone = shard.some_id is None, ids is None and count == 0
    entropy_needed = "entropy" in want or entropy_coef is not None
    wanted = ("logp", "lse", *(("entropy",) if entropy_needed else ()))

    def scored() -> Any:
        several.check_want_top(want_top, shard.vocabulary, options)
        shard.check_ids("target" if ids is None else "target or ids", target_NT)
        if dead:
            return None
        own_NT = shard.own(target_NT)
        if alone:
            return score_own(entered, weight, own_NT[:, 0], rows, own, None, None, wanted, plan)
        found = score_own(
            entered, weight, None, rows, own, None, None, wanted, plan, ids=own_NT, want_top=min(count, shard.allowed)
        )
        key_NK = _logits(entered, weight, found.best_id, rows, own) if count else None
        return found, key_NK

    found, error = attempt(scored)
    agree(error, hidden, group)
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    key_NK, id_NK = (
        torch.zeros(N, 0, dtype=dtype, device=hidden.device),
        torch.zeros(N, 0, dtype=torch.int64, device=hidden.device),
    )
    chosen, best_NK = "forward", None
    if dead:  # takes part in what the ranks do together, with nothing of its own
        nothing = key_NK.new_zeros(N) + _zero(entered, weight, options.bias, *(low or ())[1:2]).to(dtype)
        logp_NT, lse_N, entropy_N = nothing[:, None].expand(N, target_NT.shape[1]), nothing - torch.inf, nothing
    else:
        if not alone:
            found, key = found
            key_NK, id_NK, best_NK = (key, found.best_id, found.best_logp) if count else (key_NK, id_NK, None)
        chosen, lse_N, logp_NT = found.plan, found.lse, found.logp[:, None] if alone else found.ids_logp
        entropy_N = found.entropy if entropy_needed else torch.zeros_like(lse_N)
    held_NT, best_id = shard.holds(target_NT), None
    if count:
        _, best_id, held_NK, column_NK = largest(shard, key_NK, id_NK, count)
        of_best = logp_NT.new_zeros(N, count) if best_NK is None else best_NK.gather(1, column_NK)
        logp_NT, held_NT = torch.cat((logp_NT, of_best), 1), torch.cat((held_NT, held_NK), 1)
    T = target_NT.shape[1]
    logp_NT, entropy_N, lse_N = _Merge.apply(logp_NT, lse_N, entropy_N, held_NT, T, group)
    logp, ids_logp = several.parted(logp_NT[:, :T], target, ids, "logp" in want)
    values = {"logp": logp, "ids_logp": ids_logp, "entropy": entropy_N, "lse": lse_N}
    if tops:
        assert best_id is not None
        values |= {"top_logp": logp_NT[:, T].detach().clamp(max=0.0), "top_id": best_id[:, 0]}
    if want_top:
        values |= {"best_logp": logp_NT[:, T:], "best_id": best_id}
    weighted_sum = None
    if coef is not None or entropy_coef is not None:
        weighted_sum = lse_N.new_zeros(())
        for given, vectors in ((coef, logp_NT[:, :T]), (entropy_coef, entropy_N)):
            if given is not None:
                known = given.detach().to(vectors.dtype).view(vectors.shape)
                weighted_sum = weighted_sum + (known * vectors.masked_fill(known == 0, 0.0)).sum()
        values = {name: None if vector is None else vector.detach() for name, vector in values.items()}
    kept = {"ids_logp", "best_logp", "best_id", *want}
    return {"plan": chosen, "weighted_sum": weighted_sum} | {name: value for name, value in values.items() if name in kept}


def _zero(*tensors: Tensor | None) -> Tensor:
    """0, whose backward pass goes through all tensors as on the other ranks. Reads no value: 0 times infinity is none."""
    empty = [tensor.reshape(-1)[:0].sum() for tensor in tensors if tensor is not None]
    return torch.stack([each.to(empty[0].dtype) for each in empty]).sum()


@torch.no_grad()
def _logits(hidden: Tensor, weight: Tensor, id_NK: Tensor, rows: Tensor | None, options: HeadOptions) -> Tensor:
    """`[N, K]`: the logits of a rank's candidates, of which those of equal rows of the weight are equal on any rank."""
    hidden, weight = autocast_operands(hidden, weight)
    N, K = id_NK.shape
    z_NK = torch.empty(N, K, dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32, device=hidden.device)
    index_N = torch.arange(N, device=hidden.device) if rows is None else rows
    size = max(1, _ELEMENTS_AT_ONCE // (K * weight.shape[1]))
    for start in range(0, N, size):
        span = slice(start, min(start + size, N))
        row_C = torch.arange(span.start, span.stop, device=hidden.device).repeat_interleave(K)
        z_C = single_logits.target_logits(hidden, weight, id_NK[span].flatten(), index_N[row_C], options.of_rows(row_C))
        z_NK[span] = z_C.view(-1, K)
    return z_NK


def above_mean(hidden: Tensor, weight: Tensor, target_N: Tensor, rows: Tensor, options: HeadOptions, group: Any) -> Tensor:
    """`z_y - mean_v z_v` of a split head, `[N]`, differentiable: each rank's share of both is linear in its own logits."""

    def check() -> int:
        single_logits.refuse_softcap(options)
        return len(target_N)

    weight, shard = locate(weight, hidden, check, options, group)
    low, own = options.low_rank, shard.options
    entered, *down = enter(group, hidden, *(() if low is None else low[:1]))
    if low is not None:
        own = replace(own, low_rank=(down[0], *low[1:]))

    def share() -> Tensor:
        shard.check_ids("target", target_N)
        if shard.some_id is None:
            return _zero(entered, weight, options.bias, *(low or ())[1:2]).expand(len(target_N))
        h, w = autocast_operands(entered, weight)
        check_arguments(h, w, rows, len(target_N), own)
        of_target_N = single_logits.target_logits(h, w, shard.own(target_N), rows, own)
        mean_N = single_logits.mean_logits(h, w, rows, own) * (shard.allowed / shard.allowed_whole)
        return torch.where(shard.holds(target_N), of_target_N, 0.0) - mean_N

    part, error = attempt(share)
    agree(error, hidden, group)
    return leave(group, part.to(torch.float64 if hidden.dtype == torch.float64 else torch.float32))


def add_gradient(
    backward_own: Callable[..., Tensor],
    score_own: Callable[..., Any],
    check: Callable[[Tensor], None],
    hidden: Tensor,
    weight: Tensor,
    rows: Rows,
    options: HeadOptions,
    coef: Tensor,
    entropy_coef: Tensor | None,
    dweight_out: Tensor | None,
    dbias_out: Tensor | None,
    dlow_rank_out: tuple[Tensor | None, Tensor | None],
    group: Any,
) -> Tensor:
    """`scoring.head_backward`, given as `backward_own`, of a split head: buffers of weight, bias and B hold this rank's ids.

    `check` looks at coefficients and buffers, given this rank's rows of the weight.
    """
    weight, shard = locate(weight, hidden, lambda: len(rows), options, group)
    target, index, own = rows.target, rows.index, shard.options
    dtype, dead = torch.float64 if hidden.dtype == torch.float64 else torch.float32, shard.some_id is None

    def scored() -> Any:
        check(weight)
        shard.check_ids("target", target)
        want = ("logp", "lse") if entropy_coef is None else ("logp", "lse", "entropy")
        return None if dead else score_own(hidden, weight, shard.own(target), index, own, None, None, want, None)

    found, error = attempt(scored)
    agree(error, hidden, group)
    logp_N = torch.zeros(len(rows), dtype=dtype, device=hidden.device)
    lse_N, entropy_N = logp_N - torch.inf, logp_N
    if not dead:
        logp_N, lse_N = found.logp, found.lse
        entropy_N = entropy_N if entropy_coef is None else found.entropy
    held_N1 = shard.holds(target)[:, None]
    whole = merge(group, held_N1, logp_N[:, None], lse_N, entropy_N)
    known_N1 = coef.detach().to(dtype)[:, None]
    entropy_known_N = None if entropy_coef is None else entropy_coef.detach().to(dtype)
    of_logp_N1, of_lse_N, of_entropy_N = _shares(whole.share, whole.excess, held_N1, known_N1, entropy_known_N, None)
    down_out, up_out = dlow_rank_out
    ddown = None if down_out is None else torch.zeros_like(down_out)
    if dead:
        dhidden = torch.zeros_like(hidden)
    else:  # lse = z_y - logp
        own_rows = Rows(index, shard.own(target))
        outs = dweight_out, dbias_out, (ddown, up_out)
        entropy_share = None if entropy_coef is None else of_entropy_N
        dhidden = backward_own(hidden, weight, own_rows, of_logp_N1[:, 0] - of_lse_N, own, entropy_share, *outs)
        dhidden = _add_target_gradient(dhidden, hidden, weight, own_rows, own, of_lse_N, outs)
    if ddown is not None:
        assert down_out is not None
        down_out += summed(ddown, group)
    return summed(dhidden, group)


def _add_target_gradient(
    dhidden: Tensor,
    hidden: Tensor,
    weight: Tensor,
    rows: Rows,
    options: HeadOptions,
    coef_N: Tensor,
    outs: tuple[Tensor | None, Tensor | None, tuple[Tensor | None, Tensor | None]],
) -> Tensor:
    """Add the gradient of `sum coef * z_y`, of few vectors, to dH, which is returned, and to the buffers."""
    y, dtype, low = rows.target, coef_N.dtype, options.low_rank
    bias = coef_N.new_zeros(len(weight)) if options.bias is None else options.bias  # its gradient may be wanted all the same
    leaves = [hidden.reshape(-1, hidden.shape[-1])[rows.index], weight[y], bias[y]]
    leaves += [] if low is None else [low[0], low[1][y]]
    wide = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
    rows_NH, weight_NH, bias_N, *of_low = wide
    with torch.enable_grad():
        pair = None if low is None else (of_low[0], of_low[1], low[2])
        here = replace(options, bias=bias_N, low_rank=pair)
        z_N = single_logits.target_logits(rows_NH, weight_NH, torch.arange(len(y), device=y.device), None, here)
        gradients = iter(torch.autograd.grad((coef_N * z_N).sum(), wide))
    dweight_out, dbias_out, (down_out, up_out) = outs
    drows_NH = next(gradients)
    for out in (dweight_out, dbias_out):
        found = next(gradients)
        if out is not None:
            out.index_put_((y,), found, accumulate=True)
    if of_low:
        ddown, dup = next(gradients), next(gradients)
        if down_out is not None:
            down_out += ddown
        if up_out is not None:
            up_out.index_put_((y,), dup, accumulate=True)
    flat = dhidden.reshape(-1, dhidden.shape[-1])
    flat[rows.index] += drows_NH.to(flat.dtype)
    return flat.view(dhidden.shape)
