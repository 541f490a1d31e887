"""Hidden states x LM head -> log-probabilities, entropy and gradients, without a `[N, V]` tensor that outlives a chunk.

For one scalar coefficient per row the gradient is a vector that the scalar multiplies,
`d logp / d h = W_y - sum_v p_v W_v`, so the order of work depends on who knows the coefficient, and when:

    forward    nothing wants a gradient
    unit       head frozen, coefficients arrive in backward: stores that vector, backward has no GEMM
    coef       coefficients known beforehand: all gradients in the forward pass
    keep       head trainable, late coefficients: stores the 16-bit gradient operand [N, V]
    recompute  head trainable, late coefficients: stores nothing, repeats the logits in backward
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dllm_kernels import checks
from dllm_kernels.backends.contract import BEST, STATISTICS, HeadOptions, WeightGradient
from dllm_kernels.head import forward_backward, ops, plans, several, vocab_parallel
from dllm_kernels.head import low_rank as adapter
from dllm_kernels.head.autograd import Score
from dllm_kernels.head.options import autocast_operands, check_arguments, coefficient, make_problem
from dllm_kernels.head.weight_sum import WeightSum
from dllm_kernels.rows import Rows

_FIELDS = ("logp", "entropy", "lse", "top_logp", "top_id")  # in the order of `Scores`


@dataclass(frozen=True)
class Scores:
    """What `score_tokens` returns: fp32 (fp64 for fp64 inputs), `[N]` where not said otherwise, None where not asked for."""

    plan: str
    logp: Tensor | None = None
    entropy: Tensor | None = None
    lse: Tensor | None = None
    top_logp: Tensor | None = None
    top_id: Tensor | None = None
    weighted_sum: Tensor | None = None
    ids_logp: Tensor | None = None  # [N, M], of `ids`
    best_logp: Tensor | None = None  # [N, k], of `want_top`: the likeliest ids, best first
    best_id: Tensor | None = None  # int64 [N, k]


def score_tokens(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor | None = None,
    *,
    ids: Tensor | None = None,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    suppress: Sequence[int] = (),
    valid_vocab: int | None = None,
    low_rank: tuple[Tensor, Tensor, float] | None = None,
    coef: Tensor | None = None,
    entropy_coef: Tensor | None = None,
    want: Sequence[str] = ("logp",),
    want_top: int = 0,
    plan: str | None = None,
    take_dweight: WeightGradient | None = None,
    vocab_group: dist.ProcessGroup | None = None,
) -> Scores:
    """Log-probability of a target token at each selected row, and what else one pass can tell.

    `z = softcap * tanh((h W^T + b) / softcap) / temperature`, suppressed ids and ids >= valid_vocab at -inf,
    `logp = z_y - logsumexp(z)`, `entropy = -sum_v p_v log p_v` in nats.

    Args:
        hidden: `[..., H]`, float32, bfloat16, float16 or float64.
        weight: `[V, H]` in hidden's dtype; may be strided or tied.
        target: int64 `[N]`, ids below V that are neither suppressed nor beyond `valid_vocab`. May be left out where `ids` or
            `want_top` is given; then "logp" in `want` means theirs.
        ids: int64 `[N, M]`, M more such ids of each row, in any order and equal ones too: `ids_logp`.
        rows: int64 `[N]`, unique flat indices into `hidden.reshape(-1, H)`; None means all rows in order.
        bias: `[V]`. softcap: > 0. temperature: > 0, a number or `[N]` (no gradient flows to it).
        suppress: ids that get probability 0 (the mask id): a sequence or tensor of ints. valid_vocab: ids from here on too.
        low_rank: `(A, B, s)` of an adapter on the head, `[R, H]` and `[V, R]` of any float dtypes and a number: the weight is
            `W + s B A`, which is never built; both products and their sums are in fp32.
        coef, entropy_coef: `[N]` finite coefficients known beforehand, detached. Then `weighted_sum = sum coef * logp +
            sum entropy_coef * entropy` carries the gradient and the vectors are detached; entropy_coef alone is allowed.
            With `ids` alone coef is `[N, M]`, with target and `ids` `[N, 1 + M]`, the target's first.
        want: any of "logp", "entropy", "lse", "top_logp", "top_id".
        want_top: k, at most 1024 and the number of ids that are not excluded: `best_id` and `best_logp`, the k likeliest ids of
            each row, best first, of equal ones the smaller id first. No gradient flows to the choice.
        plan: forces one of "forward", "unit", "coef", "keep", "recompute"; None chooses from static facts.
        take_dweight: a function that is called with the weight's gradient, in fp32 (fp64 for fp64) whatever the
            weight's dtype, in place of autograd. `body.take_dweight` is one for a head that `headless` gathered. Not under
            torch.compile, where autograd delivers the gradient.
        vocab_group: the ranks over which the head is split by rows of the weight, in the order of its ids, any number on each:
            weight, bias and B are then this rank's rows (or a DTensor of placement Shard(0) over just this group), everything
            else is alike on all ranks, ids are those of the whole head, and so are the results. A loss of them is computed
            on every rank alike; gradients of hidden and A are summed over the group, those of weight, bias and B stay here.
            Plans are those of late coefficients of logp and lse. What one rank refuses, every rank raises, with that rank's
            sentence (on a GPU, where no value is read, at a weight's first call and under DLLM_KERNELS_VALIDATE=1). Not under
            torch.compile, not with take_dweight. None: the head is whole, and a Shard(0) DTensor is data-parallel.

    Without coefficients, `logp`, `ids_logp`, `best_logp`, `entropy` and, where wanted, `lse` (z-loss) are differentiable in
    hidden, weight, bias, A and B; `top_*` never are. Coefficients of several log-probabilities of a row, or of lse, make no
    plan "unit": "keep" or "recompute" run, with a frozen head too, and for `want_top` "recompute".
    What backward reads again (rows, target, a per-row temperature; hidden, weight and bias under "keep" and "recompute") must
    not change in place until then: PyTorch raises. vmap, jvp and tensors with a forward-mode tangent are refused.
    Statistics come from fp32 accumulators. Raises ValueError or TypeError naming the argument; a non-finite row of
    `hidden` is reported on the CPU always, on a GPU under DLLM_KERNELS_VALIDATE=1. Double backward is not supported.

    Under torch.autocast hidden and weight are cast as for `F.linear`, at every call. torch.compile and FlopCounterMode see
    one custom op with one more for its backward (`dllm_kernels.head.ops`), with the same bits and the same checks of values.

    Example:
        >>> hidden, weight = torch.randn(2, 5, 8, requires_grad=True), torch.randn(11, 8)
        >>> scores = score_tokens(hidden, weight, torch.tensor([3, 7]), rows=torch.tensor([1, 8]), want=("logp", "entropy"))
        >>> scores.plan, tuple(scores.logp.shape)
        ('unit', (2,))
        >>> scores.logp.sum().backward()
        >>> best = score_tokens(hidden, weight, rows=torch.tensor([1, 8]), want_top=3)
        >>> best.plan, tuple(best.best_id.shape)
        ('recompute', (2, 3))
    """
    options = HeadOptions(bias, softcap, temperature, suppress, valid_vocab, low_rank)
    return score(hidden, weight, target, rows, options, coef, entropy_coef, want, plan, take_dweight, ids, want_top, vocab_group)


def score(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor | None,
    rows: Tensor | None,
    options: HeadOptions,
    coef: Tensor | None = None,
    entropy_coef: Tensor | None = None,
    want: Sequence[str] = ("logp",),
    plan: str | None = None,
    take_dweight: WeightGradient | WeightSum | None = None,
    ids: Tensor | None = None,
    want_top: int = 0,
    vocab_group: dist.ProcessGroup | None = None,
) -> Scores:
    """`score_tokens` with its options in one piece; `take_dweight` may be a sum that the weight's gradient is added to."""
    if vocab_group is not None:
        if take_dweight is not None:
            raise ValueError("take_dweight must be None with vocab_group: each rank's gradient is its own")
        given = hidden, weight, target, rows, options, coef, entropy_coef, want, plan, ids, want_top
        return Scores(**vocab_parallel.score(score, coefficient, *given, vocab_group))
    checks.names("want", want, STATISTICS)
    checks.require_tensor("hidden", hidden)
    hidden, weight = autocast_operands(hidden, weight)
    count = several.check(hidden, target, ids, rows)
    check_arguments(hidden, weight, rows, count, options)
    several.check_want_top(want_top, len(weight), options)
    if target is ids is None and (not want_top or coef is not None):
        needed = "target or ids where coef is given" if want_top else "target, ids or want_top"
        raise TypeError(f"score_tokens needs {needed}, got none of them")
    known = coef is not None or entropy_coef is not None
    bias = options.bias
    if options.low_rank is not None:
        ops.observed(hidden)  # a counter at work learns the formula of the adapter's product before it runs
    pair = low_hidden, low_weight = adapter.pair(hidden, options)
    of_rows, of_head = (hidden, low_hidden), (weight, bias, low_weight)
    wants = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*of_rows, *of_head))
    # coefficients of more than one vector of a row arrive late
    more = ids is not None or want_top > 0
    late = more or ("lse" in want and wants and not known)
    targets = several.joined(target, ids, count, hidden.device) if late or target is None else target
    coef = coefficient("coef", coef, targets.shape if ids is not None else (count,), hidden)
    entropy_coef = coefficient("entropy_coef", entropy_coef, (count,), hidden)
    coef = coef if coef is None else coef.view(targets.shape)

    wants_gradient = wants and plans.recorded(want, known, more)
    head_trains = wants_gradient and any(x is not None and x.requires_grad for x in of_head)
    chosen = plans.choose(
        plan,
        wants_gradient=wants_gradient,
        head_trains=head_trains,
        coef_known=known,
        operand_bytes=count * weight.shape[0] * hidden.dtype.itemsize,
        several=late,
        best=want_top,
    )
    outputs = tuple([name for name in STATISTICS if name in want or name == "lse" or (name == "logp" and ids is not None)])
    outputs += BEST if want_top else ()
    values: dict[str, Tensor]
    weighted_sum = None
    if ops.observed(hidden, weight, bias, targets, low_weight):
        weighted_sum, values = ops.run_score(
            hidden, weight, targets, rows, options, pair, coef, entropy_coef, want_top, outputs, chosen, wants_gradient
        )
    else:
        problem = make_problem(hidden, weight, targets, rows, options, pair, want_top)
        if wants_gradient or known:
            if wants_gradient and (hidden.is_inference() or weight.is_inference()):
                raise ValueError("hidden and weight must not come from torch.inference_mode() where a gradient is wanted")
            if isinstance(take_dweight, WeightSum) and not take_dweight.takes(problem.statistics_dtype):
                take_dweight = None
            weighted_sum, *vectors = Score.apply(
                hidden, weight, bias, *pair, problem, outputs, chosen, coef, entropy_coef, take_dweight
            )
            values = dict(zip(outputs, vectors))
        else:
            values = forward_backward.forward(problem, outputs, chosen).vectors
    logp, entropy, lse, top_logp, top_id = [values[name] if name in want else None for name in _FIELDS]
    ids_logp = None
    if targets.dim() == 2:
        logp, ids_logp = several.parted(values.get("logp"), target, ids, logp is not None)
    best_logp, best_id = [values[name] if want_top else None for name in BEST]
    return Scores(chosen, logp, entropy, lse, top_logp, top_id, weighted_sum, ids_logp, best_logp, best_id)


def head_backward(
    hidden: Tensor,
    weight: Tensor,
    rows: Rows,
    coef: Tensor,
    *,
    entropy_coef: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    suppress: Sequence[int] = (),
    valid_vocab: int | None = None,
    low_rank: tuple[Tensor, Tensor, float] | None = None,
    dweight_out: Tensor | None = None,
    dbias_out: Tensor | None = None,
    dlow_rank_out: tuple[Tensor | None, Tensor | None] = (None, None),
    vocab_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Gradient of `sum coef * logp + sum entropy_coef * entropy` for callers that run their own loop.

    Returns dH in hidden's shape and dtype (zero outside `rows`), and adds dW `[V, H]` and db `[V]` to the caller's
    buffers `dweight_out`, `dbias_out` (float32; float64 for float64 inputs) where given, likewise dA `[R, H]` and dB `[V, R]`
    of `low_rank` to the pair `dlow_rank_out`. These may have any strides under
    which no two elements coincide; one whose rows are not dense, or that shares memory with another argument, costs a
    second buffer of its size. They are changed in place, and autograd is told so. With `vocab_group`, as in
    `score_tokens`, those of weight, bias and B hold this rank's rows. Of `rows`, a `Rows`, for instance
    `plan.rows`, index and target are read; `coef`, `entropy_coef` are `[N]`; the other arguments and the errors are those
    of `score_tokens`.
    Nothing is differentiable.

    Example:
        >>> hidden, weight = torch.randn(4, 8), torch.randn(11, 8)
        >>> rows, dweight = Rows(index=torch.tensor([2]), target=torch.tensor([5])), torch.zeros(11, 8)
        >>> head_backward(hidden, weight, rows, torch.ones(1), dweight_out=dweight).shape
        torch.Size([4, 8])
    """
    if not isinstance(rows, Rows):
        raise TypeError(f"rows must be a dllm_kernels.Rows(index, target), got {type(rows).__name__}")
    checks.require_tensor("coef", coef)
    target, index = rows.target, rows.index
    checks.dtype("target", target, [torch.int64])
    checks.shape("target", target, [index.numel()])
    checks.require_tensor("hidden", hidden)
    if vocab_group is not None:
        options = HeadOptions(bias, softcap, temperature, suppress, valid_vocab, low_rank)
        outs = dweight_out, dbias_out, dlow_rank_out
        return _split_backward(hidden, weight, rows, coef, entropy_coef, options, outs, vocab_group)
    like = hidden
    hidden, weight = (tensor.detach() for tensor in autocast_operands(hidden, weight))
    options = HeadOptions(bias, softcap, temperature, suppress, valid_vocab, low_rank)
    check_arguments(hidden, weight, index, target.numel(), options)
    checks.same_device("target", target, "hidden", hidden)
    known = coefficient("coef", coef, target.shape, hidden)
    entropy_coef = coefficient("entropy_coef", entropy_coef, target.shape, hidden)
    assert known is not None
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    down_out, up_out = dlow_rank_out
    _check_buffers(hidden, weight, low_rank, dweight_out, dbias_out, dlow_rank_out)
    with torch.no_grad():
        pair = adapter.pair(hidden, options)
        if ops.observed(hidden, weight, bias, target, pair[1]):
            dhidden, dlow = ops.run_add_gradient(
                hidden, weight, target, index, options, pair, known, entropy_coef, dweight_out, dbias_out, up_out
            )
        else:
            problem = make_problem(hidden, weight, target, index, options, pair)
            dhidden, dlow = forward_backward.add_gradient(
                problem, hidden.shape, known, entropy_coef, dweight_out, dbias_out, up_out
            )
        if dlow is not None and low_rank is not None:
            more, ddown = adapter.project_backward(
                dlow, hidden, low_rank[0].to(dtype), float(low_rank[2]), True, down_out is not None
            )
            dhidden += more
            if down_out is not None:
                down_out += ddown
    return dhidden.to(like.dtype)


def _check_buffers(
    hidden: Tensor,
    weight: Tensor,
    low_rank: tuple[Tensor, Tensor, float] | None,
    dweight_out: Tensor | None,
    dbias_out: Tensor | None,
    dlow_rank_out: tuple[Tensor | None, Tensor | None],
) -> None:
    down_out, up_out = dlow_rank_out
    if low_rank is None and (down_out is not None or up_out is not None):
        raise ValueError("dlow_rank_out needs low_rank, got None")
    down, up, _ = low_rank or (weight, weight, 1.0)
    buffers = {"dweight_out": (dweight_out, weight.shape), "dbias_out": (dbias_out, weight.shape[:1])}
    buffers |= {"dlow_rank_out A": (down_out, down.shape), "dlow_rank_out B": (up_out, up.shape)}
    for name, (buffer, shape) in buffers.items():
        if buffer is not None:
            checks.dtype(name, buffer, [torch.float64 if hidden.dtype == torch.float64 else torch.float32])
            checks.shape(name, buffer, shape)
            checks.same_device(name, buffer, "hidden", hidden)
            checks.distinct(name, buffer)


def _split_backward(
    hidden: Tensor,
    weight: Tensor,
    rows: Rows,
    coef: Tensor,
    entropy_coef: Tensor | None,
    options: HeadOptions,
    outs: tuple[Tensor | None, Tensor | None, tuple[Tensor | None, Tensor | None]],
    group: dist.ProcessGroup,
) -> Tensor:
    """`head_backward` of a head that is split over a group."""
    like = hidden
    hidden, weight = (tensor.detach() for tensor in autocast_operands(hidden, weight))

    def check(own: Tensor) -> None:
        for name, given in (("coef", coef), ("entropy_coef", entropy_coef)):
            if coefficient(name, given, rows.target.shape, hidden) is not None:
                checks.finite(name, given)  # type: ignore[arg-type]
        _check_buffers(hidden, own, options.low_rank, *outs)

    def of_shard(
        hidden: Tensor, weight: Tensor, rows: Rows, coef: Tensor, own: HeadOptions, entropy_coef: Tensor | None, *outs: Any
    ) -> Tensor:
        names = ("dweight_out", "dbias_out", "dlow_rank_out")
        return head_backward(hidden, weight, rows, coef, entropy_coef=entropy_coef, **own, **dict(zip(names, outs)))

    with torch.no_grad():
        dhidden = vocab_parallel.add_gradient(
            of_shard, score, check, hidden, weight, rows, options, coef, entropy_coef, *outs, group
        )
    return dhidden.to(like.dtype)
