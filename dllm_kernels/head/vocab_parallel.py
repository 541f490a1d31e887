"""A head split over ranks by rows of its weight: `vocab_group`. A layer above the backends, which know nothing of it.

Rank r of the group holds the ids that follow those of rank r - 1, any number of them, none included. Every rank scores its
own ids as a head of their own: `logp_r`, `lse_r`, `H_r` of the distribution over them. With `w_r = e^(lse_r - lse)`,

    lse = logsumexp_r lse_r,    logp = logp_o - log(1 + sum_(r != o) e^(lse_r - lse_o)) at the rank o that holds the target,
    H = sum_r w_r (H_r - log w_r),

so three numbers per row and shard are exchanged. Their gradients need no exchange: what arrives is equal on all ranks, and a
rank's share of it depends on its own ids alone. Only the gradient of hidden states, and of an adapter's A, is summed over the
group. A target that another rank holds is replaced by an id of one's own, whose log-probability nobody uses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from dllm_kernels import checks
from dllm_kernels.backends import reference
from dllm_kernels.backends.contract import ROW_BLOCK, HeadOptions, HeadProblem
from dllm_kernels.head import single_logits
from dllm_kernels.noise import gumbel
from dllm_kernels.rows import Rows

_SIZES = WeakTensorKeyDictionary()  # of weights met before: their group and its ranks' numbers of rows


@dataclass(frozen=True)
class Shard:
    """The ids `first .. first + count - 1` of a head of `vocabulary` ids, which this rank holds."""

    group: Any  # dist.ProcessGroup
    first: int
    count: int
    vocabulary: int
    options: HeadOptions  # in ids of this rank
    some_id: int | None  # the smallest of its ids that is not excluded; None where all are

    def holds(self, ids_N: Tensor) -> Tensor:
        return (ids_N >= self.first) & (ids_N < self.first + self.count)

    def own(self, ids_N: Tensor) -> Tensor:
        """Ids as this rank counts them, those of others replaced by one of its own."""
        assert self.some_id is not None
        return torch.where(self.holds(ids_N), ids_N - self.first, self.some_id)


def local_weight(weight: Tensor, group: Any) -> Tensor:
    """The rows of this rank as a plain tensor, differentiable. Raises TypeError or ValueError for what is split otherwise."""
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"vocab_group must be a torch.distributed.ProcessGroup, got {type(group).__name__}")
    if type(weight).__name__ != "DTensor":
        return weight
    mesh, placements = weight.device_mesh, weight.placements  # type: ignore[attr-defined]
    if mesh.ndim != 1 or not placements[0].is_shard(0) or mesh.get_group() is not group:
        raise ValueError(
            "weight must be a plain tensor, this rank's rows, or a DTensor of placement Shard(0) on the one-dimensional mesh of "
            f"vocab_group, got {list(placements)} on {mesh}: on a mesh of more dimensions pass the local rows, "
            "whose gradient your data-parallel dimension reduces"
        )
    return weight.to_local()  # type: ignore[attr-defined, no-any-return]


def locate(weight: Tensor, hidden: Tensor, rows: int, options: HeadOptions, group: Any) -> tuple[Tensor, Shard]:
    """This rank's rows of the weight, where its ids lie, and the options in its own ids. A collective.

    The sizes of a weight are exchanged at its first call; that ranks agree, in shapes and in the first row of hidden states,
    is checked where values may be read.
    """
    if torch.compiler.is_compiling():
        raise ValueError("vocab_group must be None under torch.compile: its collectives are not traced")
    given, weight = weight, local_weight(weight, group)
    checks.shape("weight", weight, [None, None])
    checks.dtype("hidden", hidden, checks.FLOATS)
    if hidden.dim() == 0 or not weight.shape[1] or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"hidden must have shape [..., {weight.shape[1]}] to match weight, got {list(hidden.shape)}")
    sizes = _sizes(given, len(weight), hidden, rows, group)
    first, count, vocabulary = sum(sizes[: dist.get_rank(group)]), len(weight), sum(sizes)
    limit = vocabulary if options.valid_vocab is None else checks.count("valid_vocab", options.valid_vocab)
    if limit > vocabulary:
        raise ValueError(f"valid_vocab must be in 1..{vocabulary}, got {options.valid_vocab}")
    for token in options.suppress:
        if not 0 <= token < vocabulary:
            raise ValueError(f"suppress must hold ids in 0..{vocabulary - 1}, got {token}")
    if len({token for token in options.suppress if token < limit}) == limit:
        raise ValueError("suppress and valid_vocab must leave at least one id, got all of them excluded")
    mine = tuple(token - first for token in options.suppress if first <= token < first + count)
    valid = min(max(limit - first, 0), count)
    some_id = next((token for token in range(valid) if token not in set(mine)), None)
    own = replace(options, suppress=mine, valid_vocab=valid if 0 < valid < count else None)
    return weight, Shard(group, first, count, vocabulary, own, some_id)


def _sizes(weight: Tensor, count: int, hidden: Tensor, rows: int, group: Any) -> list[int]:
    """Rows of the weight on each rank, `count` here, in the order of ranks."""
    known = _SIZES.get(weight)
    read = checks.may_read(hidden)
    if known is not None and known[0] is group and not read:
        return list(known[1])
    flat = hidden.detach().reshape(-1, hidden.shape[-1])
    bits = flat[:1].to(torch.float64).view(torch.int64) if read else flat.new_zeros(1, 1, dtype=torch.int64)
    places = torch.arange(1, bits.shape[1] + 1, device=bits.device) * 2 + 1
    said = torch.tensor([count, len(flat), rows, hidden.shape[-1], 0], dtype=torch.int64, device=hidden.device)
    said[4] = (bits * places).sum()
    heard = [torch.empty_like(said) for _ in range(dist.get_world_size(group))]
    dist.all_gather(heard, said, group=group)
    table = torch.stack(heard).tolist()
    for place, what in ((1, "the same number of rows"), (2, "the same number of targets or keys"), (3, "the same width")):
        if len({row[place] for row in table}) > 1:
            raise ValueError(f"hidden must have {what} on every rank of vocab_group, got {[row[place] for row in table]}")
    if len({row[4] for row in table}) > 1:
        raise ValueError(
            "hidden must be equal on all ranks of vocab_group, got different first rows: the batch is not split over it"
        )
    sizes = [row[0] for row in table]
    _SIZES[weight] = (group, sizes)
    return sizes


class _Enter(torch.autograd.Function):
    """The tensors themselves, whose gradients are summed over the group, always in this order."""

    @staticmethod
    def forward(ctx: Any, group: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        wanted = zip(gradients, ctx.needs_input_grad[1:])
        return None, *[summed(gradient, ctx.group) if needed else None for gradient, needed in wanted]


def enter(group: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors that all ranks hold alike, on their way into what each computes with its own ids."""
    entered: tuple[Tensor, ...] = _Enter.apply(group, *tensors)
    return entered


def summed(gradient: Tensor, group: Any) -> Tensor:
    """Over the ranks; 16-bit gradients are added in fp32."""
    wide = gradient.float() if gradient.dtype in (torch.bfloat16, torch.float16) else gradient.clone()
    dist.all_reduce(wide, group=group)
    return wide.to(gradient.dtype)


def _gathered(vector_N: Tensor, group: Any) -> Tensor:
    """`[R, N]`, the vectors of all ranks in their order."""
    vectors = [torch.empty_like(vector_N) for _ in range(dist.get_world_size(group))]
    dist.all_gather(vectors, vector_N.contiguous(), group=group)
    return torch.stack(vectors)


@dataclass(frozen=True)
class Whole:
    """What one row's numbers from all ranks say of the whole head; floats `[N]`."""

    logp: Tensor
    lse: Tensor
    entropy: Tensor
    share: Tensor  # w of this rank's ids
    excess: Tensor  # H_r - log w_r - H of this rank, 0 where w is


def merge(shard: Shard, target_N: Tensor, logp_N: Tensor, lse_N: Tensor, entropy_N: Tensor) -> Whole:
    """From this rank's numbers to those of the whole head. Two collectives."""
    lse_RN, entropy_RN = _gathered(torch.cat((lse_N, entropy_N)), shard.group).chunk(2, 1)
    lse = lse_RN.logsumexp(0)
    log_w_RN = lse_RN - lse
    w_RN = log_w_RN.exp()
    surprise_RN = torch.where(w_RN > 0, entropy_RN - log_w_RN, 0.0)
    entropy = (w_RN * surprise_RN).sum(0)
    rank = dist.get_rank(shard.group)
    others_RN = lse_RN.clone()
    others_RN[rank] = float("-inf")
    # log-probability near 0 keeps its digits: minus the sum of the others
    own_N = logp_N - torch.log1p((others_RN.logsumexp(0) - lse_N).exp())
    logp = torch.where(shard.holds(target_N), own_N, 0.0)
    dist.all_reduce(logp, group=shard.group)
    excess_N = torch.where(w_RN[rank] > 0, surprise_RN[rank] - entropy, 0.0)
    return Whole(logp, lse, entropy, w_RN[rank], excess_N)


class _Merge(torch.autograd.Function):
    """`logp`, `entropy` and `lse` of the whole head from this rank's; gradients that arrive are equal on all ranks."""

    @staticmethod
    def forward(
        ctx: Any, logp_N: Tensor, lse_N: Tensor, entropy_N: Tensor, target_N: Tensor, shard: Shard
    ) -> tuple[Tensor, Tensor, Tensor]:
        whole = merge(shard, target_N, logp_N, lse_N, entropy_N)
        ctx.save_for_backward(whole.share, whole.excess, shard.holds(target_N))
        ctx.set_materialize_grads(False)
        return whole.logp, whole.entropy, whole.lse

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, dlogp_N: Tensor | None, dentropy_N: Tensor | None, dlse_N: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        share_N, excess_N, held_N = ctx.saved_tensors
        of_logp_N, of_lse_N, of_entropy_N = _shares(share_N, excess_N, held_N, dlogp_N, dentropy_N, dlse_N)
        return of_logp_N, of_lse_N, of_entropy_N, None, None


def _shares(
    share_N: Tensor, excess_N: Tensor, held_N: Tensor, dlogp_N: Tensor | None, dentropy_N: Tensor | None, dlse_N: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of this rank's logp, lse and entropy. Where it holds the target, `logp = logp_r + lse_r - lse`."""
    of_logp_N, of_lse_N, of_entropy_N = (torch.zeros_like(share_N) for _ in range(3))
    if dlogp_N is not None:
        of_logp_N = torch.where(held_N, dlogp_N, 0.0)
        of_lse_N = of_logp_N - dlogp_N * share_N
    if dentropy_N is not None:
        of_entropy_N = dentropy_N * share_N
        of_lse_N = of_lse_N + of_entropy_N * excess_N
    if dlse_N is not None:
        of_lse_N = of_lse_N + dlse_N * share_N
    return of_logp_N, of_lse_N, of_entropy_N


def score(
    score_own: Callable[..., Any],
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    rows: Tensor | None,
    options: HeadOptions,
    coef: Tensor | None,
    entropy_coef: Tensor | None,
    want: Sequence[str],
    plan: str | None,
    group: Any,
) -> Any:
    """`scoring.score`, given as `score_own`, of a split head: plan, the five vectors and the weighted sum, alike on all ranks.

    Known coefficients wait for the other ranks' sums, so the plans are those of late ones.
    """
    if plan == "coef":
        raise ValueError("plan must not be 'coef' with vocab_group, whose ranks need each other's sums before any gradient")
    weight, shard = locate(weight, hidden, target.numel(), options, group)
    _check_targets(target, shard, options)
    low, own, N = options.low_rank, shard.options, target.numel()
    entered, *down = enter(group, hidden, *(() if low is None else low[:1]))
    if low is not None:
        own = replace(own, low_rank=(down[0], *low[1:]))
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    known = coef is not None or entropy_coef is not None
    entropy_needed = "entropy" in want or entropy_coef is not None
    tops = [name for name in ("top_logp", "top_id") if name in want]
    if shard.some_id is None:  # takes part in what the ranks do together, with nothing of its own
        nothing = torch.zeros(N, dtype=dtype, device=hidden.device) + 0.0 * entered.reshape(-1)[:1].sum().to(dtype)
        logp_N, lse_N, entropy_N, chosen = nothing, nothing - torch.inf, nothing, "forward"
        top_N, id_N = nothing.detach(), torch.zeros(N, dtype=torch.int64, device=hidden.device)
    else:
        own_target = shard.own(target)
        wanted = ("logp", "lse", *(("entropy",) if entropy_needed else ()), *(("top_logp", "top_id") if tops else ()))
        found = score_own(entered, weight, own_target, rows, own, None, None, wanted, plan)
        chosen, logp_N, lse_N, top_N, id_N = found.plan, found.logp, found.lse, found.top_logp, found.top_id
        entropy_N = found.entropy if entropy_needed else torch.zeros_like(lse_N)
    own_lse_N = lse_N.detach()
    logp_N, entropy_N, lse_N = _Merge.apply(logp_N, lse_N, entropy_N, target, shard)
    values = {"logp": logp_N, "entropy": entropy_N, "lse": lse_N}
    if tops:
        values |= _top(shard, top_N, id_N, own_lse_N, lse_N.detach())
    weighted_sum = None
    if known:
        weighted_sum = logp_N.new_zeros(())
        for name, given, vector_N in (("coef", coef, logp_N), ("entropy_coef", entropy_coef, entropy_N)):
            if given is not None:
                checks.shape(name, given, [N])
                checks.finite(name, given)
                given_N = given.detach().to(vector_N.dtype)
                weighted_sum = weighted_sum + (given_N * vector_N.masked_fill(given_N == 0, 0.0)).sum()
        values = {name: vector_N.detach() for name, vector_N in values.items()}
    fields = ("logp", "entropy", "lse", "top_logp", "top_id")
    return chosen, [values[name] if name in want else None for name in fields], weighted_sum


def _top(shard: Shard, top_N: Tensor, id_N: Tensor, own_lse_N: Tensor, lse_N: Tensor) -> dict[str, Tensor]:
    """The largest logit of all ranks; the smallest id where several have it."""
    z_RN, id_RN = _gathered(top_N + own_lse_N, shard.group), _gathered(id_N + shard.first, shard.group)
    best_N = z_RN.argmax(0, keepdim=True)  # the first of equal ones: ranks are in the order of their ids
    return {"top_logp": (z_RN.gather(0, best_N)[0] - lse_N).clamp(max=0.0), "top_id": id_RN.gather(0, best_N)[0]}


def _check_targets(target: Tensor, shard: Shard, options: HeadOptions) -> None:
    checks.in_range("target", target, 0, shard.vocabulary)
    if target.numel() and checks.may_read(target) and (options.suppress or options.valid_vocab is not None):
        out_N = target >= (shard.vocabulary if options.valid_vocab is None else options.valid_vocab)
        if options.suppress:
            out_N = out_N | torch.isin(target, torch.tensor(options.suppress, device=target.device))
        if bool(out_N.any()):
            raise ValueError(
                f"target must not hold a suppressed id or one beyond valid_vocab: id {int(target[out_N][0])} has probability 0"
            )


def add_gradient(
    backward_own: Callable[..., Tensor],
    score_own: Callable[..., Any],
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
    """`scoring.head_backward`, given as `backward_own`, of a split head: buffers of weight, bias and B hold this rank's ids."""
    weight, shard = locate(weight, hidden, len(rows), options, group)
    target, index, own = rows.target, rows.index, shard.options
    _check_targets(target, shard, options)
    dtype, dead = torch.float64 if hidden.dtype == torch.float64 else torch.float32, shard.some_id is None
    logp_N = torch.zeros(len(rows), dtype=dtype, device=hidden.device)
    lse_N, entropy_N = logp_N - torch.inf, logp_N
    if not dead:
        want = ("logp", "lse") if entropy_coef is None else ("logp", "lse", "entropy")
        found = score_own(hidden, weight, shard.own(target), index, own, None, None, want, None)
        logp_N, lse_N = found.logp, found.lse
        entropy_N = entropy_N if entropy_coef is None else found.entropy
    whole = merge(shard, target, logp_N, lse_N, entropy_N)
    known_N, entropy_known_N = (None if c is None else c.detach().to(dtype) for c in (coef, entropy_coef))
    shares = _shares(whole.share, whole.excess, shard.holds(target), known_N, entropy_known_N, None)
    of_logp_N, of_lse_N, of_entropy_N = shares
    down_out, up_out = dlow_rank_out
    ddown = None if down_out is None else torch.zeros_like(down_out)
    if dead:
        dhidden = torch.zeros_like(hidden)
    else:  # lse = z_y - logp
        own_rows = Rows(index, shard.own(target))
        outs = dweight_out, dbias_out, (ddown, up_out)
        entropy_share = None if entropy_coef is None else of_entropy_N
        dhidden = backward_own(hidden, weight, own_rows, of_logp_N - of_lse_N, own, entropy_share, *outs)
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


# --- draws --------------------------------------------------------------------------------------------------------------


def sample(
    problem: HeadProblem | None, key_N: Tensor, shard: Shard, *, step: int, temperature: float | Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Token, its logp and the row's entropy of the whole head, equal on all ranks; `problem` is None where this rank has no id.

    The noise of an id is that of the unsplit head, so tokens are the same. It is computed in float64 for every id, in
    PyTorch: exact, and slower than the backends' own.
    """
    N, device = key_N.numel(), key_N.device
    best_N = torch.full((N,), -torch.inf, dtype=torch.float64, device=device)
    z_N = torch.zeros(N, dtype=dtype, device=device)
    lse_N, entropy_N = z_N - torch.inf, z_N.clone()
    token_N = torch.zeros(N, dtype=torch.int64, device=device)
    if problem is not None:
        size = max(1, ROW_BLOCK // 8)
        for start in range(0, N, size):
            span = slice(start, min(start + size, N))
            z_NV = _final_logits(problem, span)
            perturbed_NV = z_NV.double()
            if isinstance(temperature, Tensor) or temperature > 0:
                noise_NV = gumbel(key_N[span], shard.first + shard.count, step=step)[:, shard.first :]
                scale = temperature[span, None].double() if isinstance(temperature, Tensor) else temperature
                perturbed_NV = perturbed_NV + scale * noise_NV
            best_N[span] = perturbed_NV.amax(-1)
            token_N[span] = perturbed_NV.argmax(-1)  # torch: the first of equal ones
            z_N[span] = z_NV.gather(1, token_N[span, None])[:, 0]
            logp_NV = z_NV.log_softmax(-1)
            lse_N[span] = z_NV.logsumexp(-1)
            entropy_N[span] = -torch.where(logp_NV > -torch.inf, logp_NV.exp() * logp_NV, 0.0).sum(-1)
    best_RN = _gathered(best_N, shard.group)
    of_N = best_RN.argmax(0, keepdim=True)  # ties: the smallest id, as ranks are in the order of their ids
    token_N = _gathered(token_N + shard.first, shard.group).gather(0, of_N)[0]
    drawn_N = _gathered(z_N, shard.group).gather(0, of_N)[0]
    whole = merge(shard, token_N, drawn_N - lse_N if problem is not None else z_N, lse_N, entropy_N)
    return {"token": token_N, "logp": whole.logp, "entropy": whole.entropy, "lse": whole.lse}


def _final_logits(problem: HeadProblem, span: slice) -> Tensor:
    p = problem
    rows_NH = p.hidden_MH[span] if p.index_N is None else p.hidden_MH[p.index_N[span]]
    z_NV = torch.empty(len(rows_NH), len(p.weight_VH), dtype=p.statistics_dtype, device=rows_NH.device)
    reference._matmul_nt_(z_NV, rows_NH.to(p.statistics_dtype), p.weight_VH)
    adapter = reference.Adapter(p, len(rows_NH))
    adapter.add_logits_(z_NV, span)
    reference._transform_(z_NV, p.options.of_rows(span))
    return z_NV
