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
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dllm_kernels import backends, checks
from dllm_kernels.backends.reference import STATISTICS, HeadProblem

PLANS = ("forward", "unit", "coef", "keep", "recompute")
WANTED = STATISTICS
KEEP_BYTES = 256 << 20  # a stored operand [N, V] up to this size is cheaper than a second pass


@dataclass(frozen=True)
class Rows:
    """N selected rows of hidden states `[K, B, S, H]` seen as `[K * B * S, H]`. Indices are unique."""

    index: Tensor  # int64 [N], flat row of the hidden states, shift resolved
    target: Tensor  # int64 [N]
    sequence: Tensor  # int64 [N], 0..B-1
    sample: Tensor  # int64 [N], 0..K-1
    weight: Tensor  # fp32 [N]

    def __len__(self) -> int:
        return self.index.numel()


@dataclass(frozen=True)
class Scores:
    """What `score_tokens` returns: fp32 `[N]` vectors (fp64 for fp64 inputs), None where not asked for."""

    plan: str
    logp: Tensor | None = None
    entropy: Tensor | None = None
    lse: Tensor | None = None
    top_logp: Tensor | None = None
    top_id: Tensor | None = None
    weighted_sum: Tensor | None = None


def score_tokens(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    suppress: Sequence[int] = (),
    valid_vocab: int | None = None,
    coef: Tensor | None = None,
    entropy_coef: Tensor | None = None,
    want: Sequence[str] = ("logp",),
    plan: str | None = None,
) -> Scores:
    """Log-probability of a target token at each selected row, and what else one pass can tell.

    `z = softcap * tanh((h W^T + b) / softcap) / temperature`, suppressed ids and ids >= valid_vocab at -inf,
    `logp = z_y - logsumexp(z)`, `entropy = -sum_v p_v log p_v` in nats.

    Args:
        hidden: `[..., H]`, float32, bfloat16, float16 or float64.
        weight: `[V, H]` in hidden's dtype; may be strided or tied.
        target: int64 `[N]`, ids below V that are neither suppressed nor beyond `valid_vocab`.
        rows: int64 `[N]`, unique flat indices into `hidden.reshape(-1, H)`; None means all rows in order.
        bias: `[V]`. softcap: > 0. temperature: > 0, a number or `[N]` (no gradient flows to it).
        suppress: ids that get probability 0 (the mask id). valid_vocab: ids from here on get probability 0.
        coef, entropy_coef: `[N]` finite coefficients known beforehand, detached. Then `weighted_sum = sum coef * logp +
            sum entropy_coef * entropy` carries the gradient and the vectors are detached; entropy_coef alone is allowed.
        want: any of "logp", "entropy", "lse", "top_logp", "top_id".
        plan: forces one of "forward", "unit", "coef", "keep", "recompute"; None chooses from static facts.

    Without coefficients, `logp` and `entropy` are differentiable in hidden, weight and bias; `lse` and `top_*` never are.
    Statistics come from fp32 accumulators. Raises ValueError or TypeError naming the argument; a non-finite row of
    `hidden` is reported on the CPU always, on a GPU under DLLM_KERNELS_VALIDATE=1. Double backward is not supported.

    Example:
        >>> hidden, weight = torch.randn(2, 5, 8, requires_grad=True), torch.randn(11, 8)
        >>> scores = score_tokens(hidden, weight, torch.tensor([3, 7]), rows=torch.tensor([1, 8]), want=("logp", "entropy"))
        >>> scores.plan, tuple(scores.logp.shape)
        ('unit', (2,))
        >>> scores.logp.sum().backward()
    """
    for name in want:
        checks.choice("want", name, WANTED)
    problem = _problem(hidden, weight, target, rows, bias, softcap, temperature, suppress, valid_vocab)
    coef = _coefficient("coef", coef, problem)
    entropy_coef = _coefficient("entropy_coef", entropy_coef, problem)
    known = coef is not None or entropy_coef is not None
    chosen = _choose_plan(plan, hidden, weight, bias, problem, known)
    outputs = tuple(name for name in WANTED if name in want or name == "lse")
    if known:
        if coef is None:
            coef = torch.zeros(problem.rows, dtype=problem.statistics_dtype, device=hidden.device)
        weighted_sum, *vectors = _CoefScore.apply(hidden, weight, bias, problem, outputs, coef, entropy_coef)
    elif chosen == "forward":
        vectors = list(_select(backends.select(problem).run(problem, outputs), outputs))
        weighted_sum = None
    else:
        weighted_sum, vectors = None, list(_LateScore.apply(hidden, weight, bias, problem, outputs, chosen))
    values = dict(zip(outputs, vectors, strict=True))
    check_finite(values["lse"], problem)
    return Scores(plan=chosen, weighted_sum=weighted_sum, **{name: value for name, value in values.items() if name in want})


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
    dweight_out: Tensor | None = None,
    dbias_out: Tensor | None = None,
) -> Tensor:
    """Gradient of `sum coef * logp + sum entropy_coef * entropy` for callers that run their own loop.

    Returns dH in hidden's shape and dtype (zero outside `rows`), and adds dW `[V, H]` and db `[V]` to the caller's
    buffers `dweight_out`, `dbias_out` (float32; float64 for float64 inputs) where given. `rows` is a `Rows`, for instance
    `plan.rows`; `coef`, `entropy_coef` are `[N]`; the other arguments and the errors are those of `score_tokens`.
    Nothing is differentiable.

    Example:
        >>> hidden, weight = torch.randn(4, 8), torch.randn(11, 8)
        >>> zero, one = torch.zeros(1, dtype=torch.int64), torch.ones(1)
        >>> rows = Rows(index=torch.tensor([2]), target=torch.tensor([5]), sequence=zero, sample=zero, weight=one)
        >>> dweight = torch.zeros(11, 8)
        >>> head_backward(hidden, weight, rows, one, dweight_out=dweight).shape
        torch.Size([4, 8])
    """
    if not isinstance(rows, Rows):
        raise TypeError(f"rows must be a dllm_kernels.scoring.Rows, got {type(rows).__name__}")
    checks.require_tensor("coef", coef)
    problem = _problem(hidden, weight, rows.target, rows.index, bias, softcap, temperature, suppress, valid_vocab)
    dtype = problem.statistics_dtype
    for name, buffer, like in (("dweight_out", dweight_out, weight), ("dbias_out", dbias_out, weight[:, 0])):
        if buffer is not None:
            checks.dtype(name, buffer, [dtype])
            checks.shape(name, buffer, like.shape)
            checks.same_device(name, buffer, "hidden", hidden)
    result = backends.select(problem).run(
        problem,
        ("dhidden", "lse"),
        coef_N=_coefficient("coef", coef, problem),
        entropy_coef_N=_coefficient("entropy_coef", entropy_coef, problem),
        dweight_VH=dweight_out,
        dbias_V=dbias_out,
    )
    check_finite(result["lse"], problem)
    return _scatter(result["dhidden"], problem.index_N, hidden)


def head_problem(
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor | None,
    count: int,
    bias: Tensor | None,
    softcap: float | None,
    temperature: float | Tensor,
    suppress: Sequence[int],
    valid_vocab: int | None,
) -> HeadProblem:
    """The checked problem of `count` rows, without targets; shared by `score_tokens` and `sample_tokens`."""
    checks.dtype("hidden", hidden, checks.FLOATS)
    checks.dtype("weight", weight, checks.FLOATS)
    if type(weight).__name__ == "DTensor":
        raise TypeError(
            "weight must be a plain tensor, got a DTensor: gather it first, once per optimizer step, with weight.full_tensor()"
        )
    checks.shape("weight", weight, [None, None])
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden must have shape [..., {weight.shape[1]}] to match weight {list(weight.shape)}, got {list(hidden.shape)}"
        )
    if weight.dtype != hidden.dtype:
        raise TypeError(f"weight must have hidden's dtype {hidden.dtype}, got {weight.dtype}")
    vocabulary = weight.shape[0]
    if vocabulary == 0 or weight.shape[1] == 0:
        raise ValueError(f"weight must have at least one row and one column, got {list(weight.shape)}")
    available = hidden.numel() // weight.shape[1]
    if rows is None:
        if count != available:
            raise ValueError(f"rows may be left out only for all {available} rows of hidden, got {count} targets or keys")
    else:
        checks.dtype("rows", rows, [torch.int64])
        checks.shape("rows", rows, [count])
        checks.in_range("rows", rows, 0, available)
        if checks.may_read(rows) and bool((rows.bincount(minlength=1) > 1).any()):
            raise ValueError(f"rows must be unique, got {int(rows.bincount().argmax())} more than once")
    if bias is not None:
        checks.dtype("bias", bias, checks.FLOATS)
        checks.shape("bias", bias, [vocabulary])
    if softcap is not None:
        checks.number("softcap", softcap, above=0)
    if isinstance(temperature, Tensor):
        checks.shape("temperature", temperature, [count])
        checks.finite("temperature", temperature)
        if checks.may_read(temperature) and not bool((temperature > 0).all()):
            raise ValueError("temperature must be above 0 at every row")
        temperature = temperature.detach().to(torch.float64 if hidden.dtype == torch.float64 else torch.float32)
    else:
        checks.number("temperature", temperature, above=0)
    for name, tensor in (("weight", weight), ("rows", rows), ("bias", bias), ("temperature", temperature)):
        if isinstance(tensor, Tensor):
            checks.same_device(name, tensor, "hidden", hidden)
    return HeadProblem(
        hidden_MH=hidden.detach().reshape(-1, weight.shape[1]),
        weight_VH=weight.detach(),
        target_N=torch.empty(count, dtype=torch.int64, device=hidden.device),
        index_N=rows,
        bias_V=None if bias is None else bias.detach(),
        softcap=None if softcap is None else float(softcap),
        temperature=temperature if isinstance(temperature, Tensor) else float(temperature),
        excluded_V=_excluded(suppress, valid_vocab, vocabulary, hidden.device),
    )


def _problem(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    temperature: float | Tensor,
    suppress: Sequence[int],
    valid_vocab: int | None,
) -> HeadProblem:
    checks.dtype("target", target, [torch.int64])
    checks.shape("target", target, [None if rows is None else rows.numel()])
    problem = head_problem(hidden, weight, rows, target.numel(), bias, softcap, temperature, suppress, valid_vocab)
    checks.same_device("target", target, "hidden", hidden)
    checks.in_range("target", target, 0, weight.shape[0])
    excluded_V = problem.excluded_V
    if excluded_V is not None and checks.may_read(target) and bool(excluded_V[target].any()):
        offender = int(target[excluded_V[target]][0])
        raise ValueError(f"target must not hold a suppressed id or one beyond valid_vocab: id {offender} has probability 0")
    return replace(problem, target_N=target)


def _excluded(suppress: Sequence[int], valid_vocab: int | None, vocabulary: int, device: torch.device) -> Tensor | None:
    if valid_vocab is not None and checks.count("valid_vocab", valid_vocab) > vocabulary:
        raise ValueError(f"valid_vocab must be in 1..{vocabulary}, got {valid_vocab}")
    if not isinstance(suppress, (tuple, list)):
        raise TypeError(f"suppress must be a tuple or list of ids, got {type(suppress).__name__}")
    for token in suppress:
        if isinstance(token, bool) or not isinstance(token, int):
            raise TypeError(f"suppress must hold ints, got {type(token).__name__}")
        if not 0 <= token < vocabulary:
            raise ValueError(f"suppress must hold ids in 0..{vocabulary - 1}, got {token}")
    limit = vocabulary if valid_vocab is None else valid_vocab
    if len(suppress) == 0 and limit == vocabulary:
        return None
    excluded_V = torch.arange(vocabulary, device=device) >= limit
    for token in suppress:
        excluded_V[token] = True
    if len({token for token in suppress if token < limit}) == limit:
        raise ValueError("suppress and valid_vocab must leave at least one id, got all of them excluded")
    return excluded_V


def _coefficient(name: str, coef: Tensor | None, problem: HeadProblem) -> Tensor | None:
    if coef is None:
        return None
    checks.dtype(name, coef, checks.FLOATS)
    checks.shape(name, coef, [problem.rows])
    checks.same_device(name, coef, "hidden", problem.hidden_MH)
    checks.finite(name, coef)
    return coef.detach().to(problem.statistics_dtype)


def _choose_plan(plan: str | None, hidden: Tensor, weight: Tensor, bias: Tensor | None, problem: HeadProblem, known: bool) -> str:
    head_trains = weight.requires_grad or (bias is not None and bias.requires_grad)
    wants_gradient = torch.is_grad_enabled() and (hidden.requires_grad or head_trains)
    if wants_gradient and (hidden.is_inference() or weight.is_inference()):
        raise ValueError("hidden and weight must not come from torch.inference_mode() where a gradient is wanted")
    operand_bytes = problem.rows * weight.shape[0] * hidden.dtype.itemsize
    if known:
        automatic = "coef"
    elif not wants_gradient:
        automatic = "forward"
    elif not head_trains:
        automatic = "unit"
    else:
        automatic = "keep" if operand_bytes <= KEEP_BYTES else "recompute"
    if plan is None:
        return automatic
    checks.choice("plan", plan, PLANS)
    if (plan == "coef") != known:
        raise ValueError(
            f"plan='coef' and coefficients go together, got plan={plan!r} {'with' if known else 'without'} coef or entropy_coef"
        )
    if plan == "unit" and head_trains and torch.is_grad_enabled():
        raise ValueError("plan='unit' needs a frozen head: weight (and bias) must not require a gradient")
    if plan == "forward" and wants_gradient:
        raise ValueError("plan='forward' has no backward: use torch.no_grad() or inputs that require no gradient")
    return plan if wants_gradient or known else "forward"


def check_finite(lse_N: Tensor, problem: HeadProblem) -> None:
    if checks.may_read(lse_N) and not bool(torch.isfinite(lse_N).all()):
        row = int((~torch.isfinite(lse_N)).nonzero()[0, 0])
        place = row if problem.index_N is None else int(problem.index_N[row])
        raise ValueError(
            f"hidden, weight, bias must give finite logits (or -inf), got logsumexp {float(lse_N[row])} at row {place} of hidden"
        )


def _select(result: dict[str, Tensor], outputs: Sequence[str]) -> tuple[Tensor, ...]:
    return tuple(result[name] for name in outputs)


def _scatter(compact_NH: Tensor, index_N: Tensor | None, like: Tensor) -> Tensor:
    """The selected rows' values among all rows of `like`, zero elsewhere, in its shape and dtype."""
    compact_NH = compact_NH.to(like.dtype)
    if index_N is None:
        return compact_NH.view(like.shape)
    rows = like.numel() // like.shape[-1]
    return compact_NH.new_zeros(rows, like.shape[-1]).index_copy_(0, index_N, compact_NH).view(like.shape)


def _buffer(needed: bool, shape: Sequence[int], problem: HeadProblem) -> Tensor | None:
    return torch.zeros(*shape, dtype=problem.statistics_dtype, device=problem.hidden_MH.device) if needed else None


def _cast(gradient: Tensor | None, like: Tensor | None) -> Tensor | None:
    return None if gradient is None or like is None else gradient.to(like.dtype)


def _shape_only(hidden: Tensor) -> Tensor:
    """A tensor of hidden's shape and dtype that holds no memory."""
    return hidden.new_empty(()).expand(hidden.shape)


class _CoefScore(torch.autograd.Function):
    """All gradients in the forward pass; backward multiplies them by the upstream scalar, out of place."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        problem: HeadProblem,
        outputs: tuple[str, ...],
        coef_N: Tensor,
        entropy_coef_N: Tensor | None,
    ) -> tuple[Tensor, ...]:
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        dweight_VH = _buffer(need_weight, weight.shape, problem)
        dbias_V = _buffer(need_bias, weight.shape[:1], problem)
        wanted = {*outputs, "logp"}
        if entropy_coef_N is not None:
            wanted.add("entropy")
        if need_hidden:
            wanted.add("dhidden")
        result = backends.select(problem).run(
            problem, wanted, coef_N=coef_N, entropy_coef_N=entropy_coef_N, dweight_VH=dweight_VH, dbias_V=dbias_V
        )
        weighted_sum = torch.dot(coef_N, result["logp"])
        if entropy_coef_N is not None:
            weighted_sum = weighted_sum + torch.dot(entropy_coef_N, result["entropy"])
        ctx.save_for_backward(result.get("dhidden"), _cast(dweight_VH, weight), _cast(dbias_V, bias), problem.index_N)
        ctx.like = _shape_only(hidden)
        vectors = _select(result, outputs)
        ctx.mark_non_differentiable(*vectors)
        return weighted_sum, *vectors

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        dhidden_NH, dweight_VH, dbias_V, index_N = ctx.saved_tensors
        dhidden = None if dhidden_NH is None else _scatter(dhidden_NH * upstream.to(dhidden_NH.dtype), index_N, ctx.like)
        scaled = [None if g is None else g * upstream.to(g.dtype) for g in (dweight_VH, dbias_V)]
        return dhidden, *scaled, None, None, None, None


class _LateScore(torch.autograd.Function):
    """The plans `unit`, `keep` and `recompute`: coefficients are the upstream gradients of logp and entropy."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        problem: HeadProblem,
        outputs: tuple[str, ...],
        plan: str,
    ) -> tuple[Tensor, ...]:
        stored = {"unit": "unit", "keep": "operand", "recompute": ""}[plan]
        prefixes = [p for p, name in (("", "logp"), ("entropy_", "entropy")) if name in outputs and stored]
        extra = [prefix + stored for prefix in prefixes]
        result = backends.select(problem).run(problem, (*outputs, *extra))
        # `unit` needs neither hidden states nor weight again; what the others save, autograd guards against changes in place
        inputs = (None, None, None) if plan == "unit" else (hidden, weight, bias)
        ctx.save_for_backward(*inputs, *(result[name] for name in extra))
        ctx.set_materialize_grads(False)
        ctx.problem = replace(problem, hidden_MH=hidden.new_empty(0), weight_VH=weight.new_empty(0), bias_V=None)
        ctx.like, ctx.outputs, ctx.plan, ctx.prefixes = _shape_only(hidden), outputs, plan, prefixes
        vectors = _select(result, outputs)
        ctx.mark_non_differentiable(*(v for name, v in zip(outputs, vectors, strict=True) if name not in ("logp", "entropy")))
        return vectors

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, *stored = ctx.saved_tensors
        by_name = dict(zip(ctx.outputs, upstream, strict=True))
        coefficients = {"": by_name.get("logp"), "entropy_": by_name.get("entropy")}
        if coefficients[""] is None and coefficients["entropy_"] is None:  # autograd may pass no gradient at all
            return None, None, None, None, None, None
        pairs = [(s, c) for s, p in zip(stored, ctx.prefixes, strict=True) if (c := coefficients[p]) is not None]
        if ctx.plan == "unit":
            terms = [vectors_NH.to(coef_N.dtype) * coef_N[:, None] for vectors_NH, coef_N in pairs]
            return _scatter(sum(terms[1:], terms[0]), ctx.problem.index_N, ctx.like), None, None, None, None, None

        problem = replace(
            ctx.problem,
            hidden_MH=hidden.detach().reshape(-1, hidden.shape[-1]),
            weight_VH=weight.detach(),
            bias_V=None if bias is None else bias.detach(),
        )
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        dweight_VH = _buffer(need_weight, weight.shape, problem)
        dbias_V = _buffer(need_bias, weight.shape[:1], problem)
        index_N = problem.index_N
        if ctx.plan == "keep":
            compact_NH = backends.select(problem).from_operands(
                problem, pairs, dhidden=need_hidden, dweight_VH=dweight_VH, dbias_V=dbias_V
            )
        else:
            compact_NH, index_N = _recompute(
                problem, coefficients[""], coefficients["entropy_"], need_hidden, dweight_VH, dbias_V
            )
        dhidden = None if compact_NH is None else _scatter(compact_NH, index_N, ctx.like)
        return dhidden, _cast(dweight_VH, weight), _cast(dbias_V, bias), None, None, None


def _recompute(
    problem: HeadProblem,
    coef_N: Tensor | None,
    entropy_coef_N: Tensor | None,
    need_hidden: bool,
    dweight_VH: Tensor | None,
    dbias_V: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients from a second pass over the rows whose coefficients are not 0, and the flat indices of these rows."""
    if coef_N is None:
        coef_N = torch.zeros(problem.rows, dtype=problem.statistics_dtype, device=problem.hidden_MH.device)
    if problem.hidden_MH.device.type == "cpu":  # on a GPU the count of live rows would stall the stream
        keep_N = (coef_N if entropy_coef_N is None else coef_N.abs() + entropy_coef_N.abs()).nonzero()[:, 0]
        if len(keep_N) < problem.rows:
            problem, coef_N = problem.select(keep_N), coef_N[keep_N]
            entropy_coef_N = None if entropy_coef_N is None else entropy_coef_N[keep_N]
    result = backends.select(problem).run(
        problem,
        ("dhidden",) if need_hidden else (),
        coef_N=coef_N,
        entropy_coef_N=entropy_coef_N,
        dweight_VH=dweight_VH,
        dbias_V=dbias_V,
    )
    return result.get("dhidden"), problem.index_N
