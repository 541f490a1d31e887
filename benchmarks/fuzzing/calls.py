"""One call of the head on a drawn problem, judged: a sentence for what is wrong, nothing where all is well.

The instruction sets get the same inputs, copied between forbidden pages once, which no call may change.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from benchmarks.fuzzing.guards import Guarded
from benchmarks.fuzzing.problems import Problem
from benchmarks.fuzzing.truth import Bounded, Terms, Truth
from dllm_kernels import Rows, bgpo_loss, elbo_loss, head_backward, sample_tokens, score_tokens
from dllm_kernels.backends import contract, cpu
from dllm_kernels.head.scoring import Scores
from dllm_kernels.noise import gumbel

STATISTICS = ("logp", "lse", "entropy", "top_logp", "top_id")
RESULTS = (*STATISTICS, "ids_logp", "best_logp", "best_id")
REFERENCE = "reference"
Found = dict[str, Tensor]


class Inputs:
    """What the calls of one problem are given, each tensor between forbidden pages."""

    def __init__(self, problem: Problem, guarded: Guarded) -> None:
        self._guarded = guarded
        self._changes = "changed" in problem.bad  # each call then gets copies of its own
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}
        guarded.at_end = problem.at_end

    def copy(self, tensor: Tensor) -> Tensor:
        """A leaf with the values of one of the problem's tensors."""
        if self._changes:
            return self._guarded.copy(tensor)
        if id(tensor) not in self._copies:
            self._copies[id(tensor)] = tensor, self._guarded.copy(tensor)
        return self._copies[id(tensor)][1].detach()

    def release(self) -> list[str]:
        """Take the memory back; a sentence where a call wrote into it."""
        changed = [like for like, copy in self._copies.values() if not torch.equal(like, copy) and not _same(like, copy)]
        self._copies.clear()
        self._guarded.release()
        return [f"an input of shape {list(like.shape)} was changed" for like in changed]


def _same(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | ((a != a) & (b != b))).all())


@contextlib.contextmanager
def surroundings(problem: Problem, engine: str, poison: float | None, guarded: Guarded) -> Iterator[None]:
    """An instruction set, what its workspace holds before, and results between forbidden pages too."""
    allocate, budget = contract.allocate, contract.WORKSPACE_BYTES["cpu"]

    def between_pages(p: contract.HeadProblem, outputs: Any) -> Found:
        fill = {True: float("nan"), False: -7}
        return {name: guarded.empty_like(x, fill[x.is_floating_point()]) for name, x in allocate(p, outputs).items()}

    guarded.at_end = problem.at_end
    contract.allocate = between_pages
    contract.WORKSPACE_BYTES["cpu"] = problem.budget or budget
    torch.set_num_threads(problem.threads)
    if engine != REFERENCE:
        cpu._C.set_isa(engine)
        cpu._C.poison_workspace(poison)
    try:
        yield
    finally:
        contract.allocate, contract.WORKSPACE_BYTES["cpu"] = allocate, budget
        guarded.release()


def gradient_errors(
    problem: Problem, truth: Truth, engine: str, inputs: Inputs, guarded: Guarded
) -> dict[str, tuple[float, float]]:
    """Errors of each gradient, ours and that of plain PyTorch in the same dtype, as root of summed squares over that of the
    sums of the absolute values of the terms: what a rounding of each term may do, however far the terms cancel.
    """
    with surroundings(problem, engine, None, guarded):
        found = _run(problem, inputs, guarded)
        late = _late(problem, found)
        baseline, exact = eager(problem, truth, *late), truth.gradients(problem.coef, problem.entropy_coef, *late)
        errors = {}
        for name in ("dhidden", "dweight"):
            want = exact[name[1:]]
            size = 0.0 if want.size is None else float(want.size.norm())
            if name not in found or not truth.N or size < 1e-30:
                continue
            if name == "dhidden":
                rows = [x[name].reshape(-1, truth.H)[problem.index] for x in (found, baseline)]
            else:
                rows = [x[name] for x in (found, baseline)]
            ours, other = (float((x.detach().double() - want.exact).norm()) / size for x in rows)
            errors[name] = ours, other
        return errors


def judge(
    problem: Problem, truth: Truth | None, engine: str, poison: float | None, inputs: Inputs, guarded: Guarded
) -> list[str]:
    """What is wrong with the call on one instruction set. `truth` is None for a problem that must be refused."""
    with surroundings(problem, engine, poison, guarded):
        if truth is None:
            try:
                _run(problem, inputs, guarded)
            except (ValueError, TypeError, RuntimeError) as error:
                refused = {"tangent": TypeError}.get(problem.bad, RuntimeError if "changed" in problem.bad else ValueError)
                return [] if type(error) is refused else [f"a bad {problem.bad} raised {error!r}"]
            return [f"a bad {problem.bad} was not refused"]
        if problem.call == "bgpo_loss":  # its old ELBOs are told from the exact ones
            truth.once("bgpo", lambda: _bgpo(problem, truth))
        found = _run(problem, inputs, guarded)
        late = _late(problem, found)
        wanted, complaints = _wanted(problem, truth, found, late, engine)
        if poor := [name for name, value in found.items() if not _within(value, wanted[name])]:
            baseline = eager(problem, truth, *late)
            for name in poor:
                exact, bound, _ = wanted[name]
                other = baseline.get(name)
                slack = 0.0 if other is None else 2 * float((other.double() - exact).abs().nan_to_num(0.0).max())
                if not _within(found[name], Bounded(exact, bound + slack)):
                    complaints.append(_complaint(name, found[name], wanted[name]))
        return complaints


def _within(value: Tensor, wanted: Bounded) -> bool:
    exact, bound, _ = wanted
    value = value.detach().double()
    if value.shape != exact.shape:
        return False
    if bool(((value - exact).abs() <= bound).all()):
        return True
    finite = exact.isfinite()
    same = (value == exact) | (value.isnan() & exact.isnan())  # opposite infinities of two rows sum to NaN
    return bool(torch.where(finite, (value - exact).abs() <= bound, same).all())


def _complaint(name: str, value: Tensor, wanted: Bounded) -> str:
    error = (value.detach().double() - wanted.exact).abs()
    excess = torch.where(error == 0, 0.0, error / wanted.bound).nan_to_num(torch.inf)
    place = int(excess.argmax())
    flat = [float(x.detach().double().expand(wanted.exact.shape).reshape(-1)[place]) for x in (value, wanted.exact, wanted.bound)]
    return f"{name}[{place}] is {flat[0]:.9g}, exactly {flat[1]:.9g}, allowed +- {flat[2]:.2g}"


# --- running ------------------------------------------------------------------------------------------------------------


def _options(problem: Problem, inputs: Inputs, leaves: dict[str, Tensor]) -> dict[str, Any]:
    options = dict(problem.options)
    for name in ("bias", "temperature"):
        if isinstance(options.get(name), Tensor):
            options[name] = inputs.copy(options[name])
    if "bias" in options and problem.call not in ("forward", "unit", "head_backward", "sample"):
        leaves["bias"] = options["bias"] = options["bias"].requires_grad_()
    if "low_rank" in options:
        down, up, scale = options["low_rank"]
        down, up = inputs.copy(down), inputs.copy(up)
        if problem.call not in ("forward", "head_backward", "sample"):
            leaves["low_rank_A"] = down.requires_grad_()
            if problem.call != "unit":
                leaves["low_rank_B"] = up.requires_grad_()
        options["low_rank"] = down, up, scale
    return options


def _run(problem: Problem, inputs: Inputs, guarded: Guarded) -> Found:
    """Results by name; gradients as "d" + the input's name."""
    p, leaves = problem, {}
    hidden, weight = inputs.copy(p.hidden), inputs.copy(p.weight)
    if p.bad == "tangent":
        with forward_ad.dual_level():
            return {"logp": score_tokens(forward_ad.make_dual(hidden, hidden), weight, p.target, rows=p.rows).logp}
    wants = p.call not in ("forward", "head_backward", "sample")
    if wants:
        leaves["hidden"] = hidden.requires_grad_()
        if p.call != "unit":
            leaves["weight"] = weight.requires_grad_()
    options = _options(p, inputs, leaves)
    target, rows = inputs.copy(p.target), None if p.rows is None else inputs.copy(p.rows)
    coef, entropy_coef = (None if c is None else inputs.copy(c) for c in (p.coef, p.entropy_coef))
    found: Found = {}
    ids = inputs.copy(p.more["ids"]) if "ids" in p.more else None
    several: dict[str, Any] = {"ids": ids, "want_top": p.more.get("want_top", 0)}
    if p.call == "forward":
        scores = score_tokens(hidden, weight, target, rows=rows, want=STATISTICS, **several, **options)
        found = _found(scores)
        return found | _alone(p, hidden, weight, found, options)
    if p.call == "coef":
        coef = _joint(p, coef)
        scores = score_tokens(
            hidden, weight, target, rows=rows, coef=coef, entropy_coef=entropy_coef, want=STATISTICS, **several, **options
        )
        found = _found(scores) | {"sum": scores.weighted_sum}
        loss = scores.weighted_sum
    elif p.call in ("unit", "keep", "recompute"):
        want = [name for name in STATISTICS if name != "lse" or p.more.get("lse")]
        scores = score_tokens(hidden, weight, target, rows=rows, plan=p.call, want=want, **several, **options)
        found = _found(scores)
        if p.bad.startswith("changed"):
            changed = {"target": target, "rows": rows, "temperature": options.get("temperature")}[p.bad.split()[1]]
            changed.copy_(changed.flip(0))
        upstream = {"logp": coef, "entropy": entropy_coef}
        upstream |= {name: p.more.get(f"{name.split('_')[0]}_coef") for name in ("ids_logp", "best_logp", "lse")}
        late = [name for name in upstream if name in found]
        torch.autograd.backward([found[name] for name in late], [upstream[name].to(scores.logp.dtype) for name in late])
        loss = None
    elif p.call == "head_backward":
        return _head_backward(p, hidden, weight, target, rows, coef, entropy_coef, options, guarded)
    elif p.call == "sample":
        more = {name: p.more[name] for name in ("temperature", "step", "top_k", "min_p")}
        options["logit_temperature"] = options.pop("temperature", 1.0)
        drawn = sample_tokens(hidden, weight, inputs.copy(p.more["key"]), rows=rows, **more, **options)
        return {"token": drawn.token, "drawn": drawn.logp, "entropy": drawn.entropy}
    else:
        loss = _loss(p, hidden, weight, options, inputs)
        found = {"loss": loss}
        loss = (loss * p.more.get("upstream", torch.ones(()))).sum()
    if loss is not None:
        loss.backward()
    return found | {"d" + name: leaf.grad for name, leaf in leaves.items()}


def _found(scores: Scores) -> Found:
    return {name: value for name in RESULTS if (value := getattr(scores, name)) is not None}


def _joint(p: Problem, coef: Tensor | None) -> Tensor | None:
    """Coefficients of the target and of the ids beside it."""
    return coef if coef is None or "ids" not in p.more else torch.cat((coef[:, None], p.more["ids_coef"].to(coef)), 1)


def _alone(p: Problem, hidden: Tensor, weight: Tensor, whole: Found, options: dict[str, Any]) -> Found:
    """Whether the last row's bits are those that it has without the others; not claimed of PyTorch's products."""
    if p.dtype == torch.float64 or not len(p.target):
        return {}
    if isinstance(options.get("temperature"), Tensor):
        options = options | {"temperature": options["temperature"][-1:]}
    ids, k = p.more.get("ids"), p.more.get("want_top", 0)
    more: dict[str, Any] = {"ids": None if ids is None else ids[-1:], "want_top": k}
    one = score_tokens(hidden, weight, p.target[-1:], rows=p.index[-1:], want=STATISTICS, **more, **options)
    return {"alone": torch.stack([(getattr(one, name) == value[-1:]).all() for name, value in whole.items()])}


def _head_backward(
    p: Problem,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    rows: Tensor | None,
    coef: Tensor | None,
    entropy_coef: Tensor | None,
    options: dict[str, Any],
    guarded: Guarded,
) -> Found:
    """Buffers of odd layouts that hold 1 before, with a sentinel between their elements that must stay."""
    dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
    layout = p.more["buffers"][0]
    like = layout(torch.zeros(p.weight.shape, dtype=dtype))
    dweight = guarded.empty_like(like, 777.0).fill_(1.0)
    dbias = guarded.empty_like(torch.zeros(len(p.weight), dtype=dtype)).fill_(1.0) if p.more["bias_grad"] else None
    index = p.index if rows is None else rows
    if coef is None:
        coef = torch.zeros(len(target))
    low = options.get("low_rank")
    dlow = (None, None) if low is None else tuple(guarded.empty_like(x.to(dtype)).fill_(1.0) for x in low[:2])
    dhidden = head_backward(
        hidden,
        weight,
        Rows(index, target),
        coef,
        entropy_coef=entropy_coef,
        dweight_out=dweight,
        dbias_out=dbias,
        dlow_rank_out=dlow,
        **options,
    )
    found = {"dhidden": dhidden, "dweight": dweight - 1.0}
    if dbias is not None:
        found["dbias"] = dbias - 1.0
    if low is not None:
        found |= {"dlow_rank_A": dlow[0] - 1.0, "dlow_rank_B": dlow[1] - 1.0}
    span = 1 + sum((size - 1) * stride for size, stride in zip(dweight.shape, dweight.stride()))
    if span > dweight.numel():
        whole = dweight.as_strided((span,), (1,)).clone()
        whole.as_strided(dweight.shape, dweight.stride()).fill_(777.0)
        found["neighbours"] = whole
    return found


def _loss(p: Problem, hidden: Tensor, weight: Tensor, options: dict[str, Any], inputs: Inputs) -> Tensor:
    m = p.more
    labels, masked, p_mask = (inputs.copy(m[name]) for name in ("labels", "masked", "p_mask"))
    if p.call == "elbo_loss":
        reduction = "sequence" if m["kind"] == "sequence" else "mean"
        return elbo_loss(
            hidden, weight, labels, masked, p_mask, lengths=m.get("lengths"), shift=m["shift"], reduction=reduction, **options
        )
    token_weight = 1.0 / torch.where(masked, p_mask.expand(masked.shape), 1.0)
    old = m.get("old_elbo")
    return bgpo_loss(
        hidden, weight, labels, masked, token_weight, old, m["advantages"], m["samples"], shift=m["shift"], **options
    )


# --- what must come out -------------------------------------------------------------------------------------------------


def _late(p: Problem, found: Found) -> tuple[Terms, Tensor | None]:
    """What has coefficients beside target and entropy: several ids of a row, and lse."""
    if p.call == "coef":  # without coefficients of the target the ids have none
        return ((p.more["ids"], p.more["ids_coef"]),) if p.coef is not None and "ids" in p.more else (), None
    terms: Terms = ((p.more["ids"], p.more["ids_coef"]),) if "ids_logp" in found else ()
    if "best_id" in found:
        terms += ((found["best_id"].clamp(0, len(p.weight) - 1), p.more["best_coef"]),)
    return terms, p.more.get("lse_coef") if "lse" in found else None


def _wanted(
    p: Problem, truth: Truth, found: Found, late: tuple[Terms, Tensor | None], engine: str
) -> tuple[dict[str, Bounded], list[str]]:
    """What is found has bounds for, and what is wrong with the rest, which leaves `found`."""
    extra, coef, complaints = 0.0, p.coef, []
    if p.call == "bgpo_loss":
        extra, coef = truth.once("bgpo", lambda: _bgpo(p, truth))
    wanted: dict[str, Bounded] = dict(truth.statistics)
    if "ids_logp" in found:
        wanted["ids_logp"] = truth.logp_of(p.more["ids"])
    if "best_id" in found:
        best_id = found.pop("best_id")
        complaints += _likeliest(truth, best_id, found["best_logp"])
        wanted["best_logp"] = truth.logp_of(best_id.clamp(0, truth.V - 1))
    if "top_id" in found:
        ids, logits = found.pop("top_id"), truth.z_NV
        if truth.N and bool((logits.gather(1, ids[:, None])[:, 0] < logits.amax(-1) - 2 * truth.logit_error_N).any()):
            complaints.append("top_id is none of the likeliest")
    if "token" in found:
        complaints += _drawn(p, truth, found, wanted)
    if "sum" in found:
        joint = p.entropy_coef, p.more.get("ids")
        wanted["sum"] = truth.once("sum", lambda: truth.weighted_sum(_joint(p, coef), *joint))
    if "loss" in found:
        found["loss"], wanted["loss"] = _loss_value(p, truth, coef, found["loss"])
    if any(name in found for name in ("dhidden", "dweight", "dbias")):
        stores = p.call == "keep" or ("old_elbo" in p.more or p.more.get("kind") == "sequence")
        narrow = p.dtype.itemsize == 2
        pairs = "bf16" in engine and p.dtype == torch.bfloat16
        exact = truth.gradients(
            coef,
            p.entropy_coef,
            *late,
            rounded=torch.finfo(p.dtype).eps / 2 * (pairs + (narrow and stores)),
            flushed=2.0**-24 if p.dtype == torch.float16 and (stores or p.call == "unit") else 0.0,
            extra=extra,
        )
        wanted["dhidden"] = truth.once(("whole", id(exact["hidden"])), lambda: _scattered(p, exact["hidden"]))
        wanted |= {"d" + name: bounded for name, bounded in exact.items() if name != "hidden"}
        if p.call == "head_backward":  # the buffers held 1, and each chunk of rows is added to them
            adds = 4 + truth.N / 64
            for name in exact.keys() - {"hidden"}:
                value, bound, _ = exact[name]
                wanted["d" + name] = Bounded(value, bound + adds * truth.eps * (1 + value.abs()))
    if "alone" in found:
        wanted["alone"] = Bounded(torch.ones(len(found["alone"])).double(), torch.zeros(len(found["alone"])).double())
    if "neighbours" in found:
        whole = torch.full_like(found["neighbours"], 777.0).double()
        wanted["neighbours"] = Bounded(whole, torch.zeros_like(whole))
    for name in [name for name, value in found.items() if value is None]:
        complaints.append(f"no {name}")
        del found[name]
    return wanted, complaints


def _scattered(p: Problem, of_rows: Bounded) -> Bounded:
    zero = torch.zeros(p.hidden.numel() // p.hidden.shape[-1], p.hidden.shape[-1]).double()
    exact, bound = (zero.index_copy(0, p.index, part).view(p.hidden.shape) for part in of_rows[:2])
    return Bounded(exact, bound)


def _bgpo(p: Problem, truth: Truth) -> tuple[float, Tensor]:
    """Relative error of the coefficients, and these: with an old policy they depend on the ELBOs."""
    m = p.more
    if m["old"] is None:
        return 0.0, p.coef
    B = len(m["advantages"])
    terms_N = m["weight_N"] * truth.at(p.target)
    elbo_B = torch.zeros(B).double().index_add(0, m["sequence"], terms_N)
    m["old_elbo"] = (elbo_B - m["old"].double()).float()
    m["d"] = elbo_B - m["old_elbo"].double()
    error_N = m["weight_N"] * truth.statistics["logp"].bound + truth.eps * 8 * terms_N.abs()
    m["error"] = torch.zeros(B).double().index_add(0, m["sequence"], error_N) + 8 * truth.eps * elbo_B.abs()
    factor_B = torch.where(m["advantages"] >= 0, 1.0, m["d"].exp())
    return float(m["error"].max()) * 2, p.coef * factor_B[m["sequence"]]


def _loss_value(p: Problem, truth: Truth, coef: Tensor, value: Tensor) -> tuple[Tensor, Bounded]:
    """Of the reduction that was asked for; the upstream factors of a loss by sequence are in the coefficients."""
    m, eps = p.more, max(truth.eps, torch.finfo(torch.float32).eps)
    if p.call == "elbo_loss":
        if "upstream" in m:
            value = (value.detach().double() * m["upstream"].double()).sum()
        exact, bound, _ = truth.weighted_sum(coef, None)
        return value, Bounded(exact, bound + 16 * eps * (coef * truth.at(p.target)).abs().sum())
    advantages = m["advantages"].double()
    scale = m["samples"] * len(advantages)
    if m["old"] is None:
        terms_B, error_B = advantages, torch.zeros_like(advantages)
        spread = float((coef * truth.at(p.target)).abs().sum()) * eps * 4  # the value is the difference of two equal sums
    else:
        terms_B = advantages * torch.where(advantages >= 0, 1 + m["d"], m["d"].exp())
        error_B, spread = advantages.abs() * m["error"] * torch.where(advantages >= 0, 1.0, m["d"].exp()) * 2, 0.0
    return value, Bounded(-terms_B.sum() / scale, (error_B + 16 * eps * terms_B.abs()).sum() / scale + spread)


def _drawn(p: Problem, truth: Truth, found: Found, wanted: dict[str, Bounded]) -> list[str]:
    """The token is the largest perturbed logit, unless another one is within the rounding of both."""
    token_N, temperature = found.pop("token"), p.more["temperature"]
    by_row = isinstance(temperature, Tensor)
    T_N = temperature.double() if by_row else torch.full((truth.N,), float(temperature)).double()
    if truth.N and not bool(((token_N >= 0) & (token_N < truth.V)).all()):
        return ["token is no id"]
    e_N = 2 * truth.logit_error_N + 8 * truth.eps
    logp_N = truth.at(token_N)
    wanted["drawn"] = Bounded(logp_N, e_N + 4 * truth.eps * logp_N.abs())
    z_NV, top_k = truth.z_NV.clone(), p.more["top_k"]
    sure_NV = torch.ones_like(z_NV, dtype=torch.bool)
    least = []  # logits from which on an id takes part, where only some do
    if top_k is not None and top_k < truth.V and truth.N:
        least.append(z_NV.topk(top_k, -1).values[:, -1])
    if p.more["min_p"]:
        least.append(z_NV.amax(-1) + torch.where(T_N == 0, 1.0, T_N) * math.log(p.more["min_p"]) if truth.N else T_N)
    for least_N in least:  # at temperature 0 the likeliest id is drawn, which is never left out
        limit_N = torch.minimum(least_N, truth.z_NV.amax(-1)) if truth.N else least_N
        z_NV = z_NV.masked_fill(z_NV < (limit_N - e_N)[:, None], -torch.inf)
        sure_NV &= z_NV > (limit_N + e_N)[:, None]  # what may be left out by rounding proves nothing
    z_NV = torch.where(T_N[:, None] == 0, truth.z_NV, z_NV)
    sure_NV |= T_N[:, None] == 0
    z_NV = z_NV + T_N[:, None] * gumbel(p.more["key"], truth.V, step=p.more["step"])
    slack_N = e_N + 2e-5 * torch.where(T_N == 0, 0.0, T_N.clamp(min=1.0))
    chosen_N = z_NV.gather(1, token_N[:, None])[:, 0]
    best_N = z_NV.masked_fill(~sure_NV, -torch.inf).amax(-1) if truth.N else chosen_N
    return ["token is not the largest perturbed logit"] if bool((chosen_N < best_N - slack_N).any()) else []


def _likeliest(truth: Truth, best_id: Tensor, best_logp: Tensor) -> list[str]:
    """Distinct ids, none of which is less likely than one that is missing, by more than rounding, in falling order."""
    if not truth.N:
        return []
    if bool(((best_id < 0) | (best_id >= truth.V)).any()) or bool((best_id.sort(1).values.diff(dim=1) == 0).any()):
        return ["best_id holds no distinct ids"]
    e_N1 = (2 * truth.logit_error_N)[:, None]
    chosen_NK, sorted_NK = truth.z_NV.gather(1, best_id), truth.z_NV.topk(best_id.shape[1], -1).values
    wrong = bool((chosen_NK < sorted_NK - e_N1).any())
    rising = bool((best_logp[:, 1:] > best_logp[:, :-1]).any())
    return ["best_id is not of the likeliest"] * wrong + ["best_logp rises"] * rising


# --- PyTorch in the same dtype ------------------------------------------------------------------------------------------


def eager(problem: Problem, truth: Truth, terms: Terms, lse_coef: Tensor | None) -> Found:
    """Plain PyTorch on the same inputs: 16-bit operands, float32 logits; statistics, and gradients of the weighted sum."""
    p = problem
    wide = torch.float64 if p.dtype == torch.float64 else torch.float32
    hidden, weight = p.hidden.detach().clone().requires_grad_(), p.weight.detach().clone().requires_grad_()
    options = dict(p.options)
    bias = options["bias"].clone().requires_grad_() if "bias" in options else None
    z_NV = hidden.reshape(-1, hidden.shape[-1])[p.index].to(wide) @ weight.to(wide).t()
    low = [x.to(wide).requires_grad_() for x in options["low_rank"][:2]] if "low_rank" in options else []
    if low:
        h_NH = hidden.reshape(-1, hidden.shape[-1])[p.index].to(wide)
        z_NV = z_NV + options["low_rank"][2] * (h_NH @ low[0].t()) @ low[1].t()
    if bias is not None:
        z_NV = z_NV + bias
    if cap := options.get("softcap"):
        z_NV = cap * torch.tanh(z_NV / cap)
    temperature = options.get("temperature", 1.0)
    z_NV = z_NV / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)
    z_NV = z_NV.masked_fill(truth.excluded_V, -torch.inf)  # not those of bias -inf, whose slope stays
    logp_NV = z_NV.log_softmax(-1)
    finite_NV = logp_NV.masked_fill(logp_NV == -torch.inf, 0.0)
    entropy_N = -(finite_NV.exp() * finite_NV).masked_fill(logp_NV == -torch.inf, 0.0).sum(-1)
    logp_N = logp_NV.gather(1, p.target[:, None])[:, 0] if p.call != "sample" else entropy_N
    total = sum(
        (torch.where(c == 0, 0.0, c * v)).sum() for c, v in ((p.coef, logp_N), (p.entropy_coef, entropy_N)) if c is not None
    )
    for ids_NM, c_NM in terms:
        total = total + torch.where(c_NM == 0, 0.0, c_NM * logp_NV.gather(1, ids_NM)).sum()
    if lse_coef is not None:
        total = total + (lse_coef * z_NV.logsumexp(-1)).sum()
    leaves = {"dhidden": hidden, "dweight": weight} | ({"dbias": bias} if bias is not None else {})
    leaves |= dict(zip(("dlow_rank_A", "dlow_rank_B"), low))
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    found = {"logp": logp_N, "entropy": entropy_N, "lse": z_NV.logsumexp(-1), "top_logp": logp_NV.amax(-1), "sum": total}
    found |= {name: g for name, g in zip(leaves, gradients) if g is not None}
    return {name: value.detach() for name, value in found.items()}
