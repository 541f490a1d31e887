"""`distillation_loss` fuzzed: a drawn problem, its value and gradients in float64 with bounds of rounding.

Bounds are first-order, of which a tenth is allowed: e is by how much a row's logits may be off, 2 e what that does to a
log-probability.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.fuzzing.calls import Found, Inputs
from benchmarks.fuzzing.guards import Guarded
from benchmarks.fuzzing.judging import arguments, copies, fresh, machine
from benchmarks.fuzzing.problems import _LAYOUTS, DTYPES
from benchmarks.fuzzing.truth import TINY, Bounded
from dllm_kernels import distillation_loss
from dllm_kernels.backends import contract
from dllm_kernels.backends.divergence import engine as passes
from dllm_kernels.backends.divergence import walk
from dllm_kernels.backends.divergence.problem import KINDS

MARGIN = 0.1  # of the worst case by first order: roundings have both signs
_LEAVES = ("hidden", "weight", "bias", "low_rank_A", "low_rank_B")


@dataclass
class Problem:
    """A call: tensors by argument, Python options, and which of the tensors want a gradient."""

    kind: str
    reduction: str
    tensors: dict[str, Tensor]
    options: dict[str, Any]
    trains: tuple[str, ...]
    at_end: bool
    threads: int
    many_slabs: bool
    budget: int | None
    bad: str = ""
    upstream: Tensor = field(default_factory=lambda: torch.ones(()))

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors["hidden"].dtype

    @property
    def wide(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def call(self) -> str:
        return f"{self.kind} {self.reduction}"

    @property
    def index(self) -> Tensor:
        hidden = self.tensors["hidden"]
        return self.tensors.get("rows", torch.arange(hidden.numel() // hidden.shape[-1]))

    @property
    def shape(self) -> str:
        t = self.tensors
        sizes = f"hidden {list(t['hidden'].shape)}, teacher {list(t['teacher_hidden'].shape)}, V {len(t['weight'])}"
        names = [*(name for name in t if name not in ("hidden", "weight", "teacher_hidden", "teacher_weight")), *self.options]
        return f"{sizes}, {', '.join(names)}, trains {' '.join(self.trains)}"


def draw(seed: int, number: int) -> Problem:
    """Problem `number` of a seed, whatever was drawn before."""
    rng = random.Random(f"distillation:{seed}:{number}")
    g = torch.Generator().manual_seed(rng.getrandbits(62))
    dtype = rng.choices(DTYPES, (8, 6, 3, 2))[0]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    size = rng.random()
    N, V = (rng.randint(1, 36), rng.randint(1, 150)) if size < 0.9 else (rng.randint(1, 300), rng.randint(1, 40))
    if size > 0.95:
        N, V = rng.randint(1, 40), rng.randint(200, 2500)
    H, K = rng.randint(1, 40), rng.randint(1, 40)
    M = N if rng.random() < 0.4 else N + rng.randint(1, 5)
    scale = rng.choice((0.0, 0.01, 0.5, 1.0, 1.0, 4.0))

    def normal(*sizes: int, by: float = 1.0) -> Tensor:
        return torch.randn(sizes, generator=g) * by

    other = dtype if rng.random() < 0.7 else rng.choice([x for x in DTYPES if x != torch.float64 or dtype == torch.float64])
    weight, teacher_weight = normal(V, H, by=1.5 / H**0.5), normal(V, K, by=1.5 / K**0.5)
    hidden, teacher_hidden = normal(M, H, by=scale), normal(M, K, by=scale)
    if K == H and rng.random() < 0.5:  # nearly the same model
        teacher_weight, teacher_hidden = weight + 1e-3 * teacher_weight, hidden.clone()
    layout = rng.choice(_LAYOUTS)
    tensors = {"hidden": layout(hidden.to(dtype)), "weight": rng.choice(_LAYOUTS)(weight.to(dtype))}
    tensors |= {"teacher_hidden": teacher_hidden.to(other), "teacher_weight": rng.choice(_LAYOUTS)(teacher_weight.to(other))}
    if M != N or rng.random() < 0.3:
        tensors["rows"] = torch.randperm(M, generator=g)[: 0 if rng.random() < 0.03 else N]
        N = len(tensors["rows"])
    else:
        N = M
    options: dict[str, Any] = {}
    for side in ("", "teacher_"):
        if rng.random() < 0.3:
            tensors[side + "bias"] = normal(V, by=rng.choice((0.0, 1.0, 5.0)))
        if rng.random() < 0.25:
            options[side + "softcap"] = rng.choice((1.0, 3.0, 30.0))
    if rng.random() < 0.4:
        if rng.random() < 0.5:
            tensors["temperature"] = torch.rand(N, generator=g) + 0.3
        else:
            options["temperature"] = rng.choice((0.5, 2.0))
    limit = V
    if rng.random() < 0.25:
        limit = options["valid_vocab"] = rng.randint(1, V)
    if rng.random() < 0.35:
        ids = tuple(rng.sample(range(V), min(V, rng.choice((1, 2, V // 3)))))
        if len(set(ids) & set(range(limit))) < limit:
            options["suppress"] = ids
    if rng.random() < 0.15:
        R = rng.randint(1, 4)
        low = rng.choice((dtype, wide))
        tensors |= {"low_rank_A": normal(R, H, by=H**-0.5).to(low), "low_rank_B": normal(V, R).to(low)}
        options["scale"] = rng.choice((0.5, -1.0))
    if rng.random() < 0.5:
        tensors["coef"] = normal(N)
    kind, reduction = rng.choice(KINDS), rng.choice(("mean", "sum", "none"))
    if kind == "jsd" and rng.random() < 0.5:
        options["beta"] = rng.choice((0.1, 0.9, 0.999))
    there = [name for name in _LEAVES if name in tensors]
    trains = tuple(rng.choice(([], there, there, there, ["hidden"], [x for x in there if rng.random() < 0.5])))
    upstream = normal(N).to(wide) if reduction == "none" else torch.tensor(rng.choice((1.0, 1.0, 0.3)), dtype=wide)
    threads, many, budget = rng.choice((1, 1, 2, 3)), rng.random() < 0.6, rng.choice((None, 1))
    p = Problem(kind, reduction, tensors, options, trains, rng.random() < 0.7, threads, many, budget, "", upstream)
    if N and rng.random() < 0.05:
        _spoil(p, rng, N)
    return p


def _spoil(p: Problem, rng: random.Random, N: int) -> None:
    """Something that a call must refuse."""
    n, t = int(p.index[rng.randrange(N)]), p.tensors
    kinds = ["hidden", "teacher_hidden", *(name for name in ("coef", "bias", "teacher_bias", "temperature") if name in t)]
    p.bad = rng.choice(kinds + ["rows"] * ("rows" in t and N > 1))
    if p.bad == "rows":
        t["rows"] = torch.cat((t["rows"][:-1], t["rows"][:1]))
    elif p.bad in ("hidden", "teacher_hidden"):
        t[p.bad] = t[p.bad].clone()
        t[p.bad][n] = float("nan")
    else:
        t[p.bad] = t[p.bad].clone()
        t[p.bad][rng.randrange(len(t[p.bad]))] = 0.0 if p.bad == "temperature" else float("inf")


class Truth:
    """Value and gradients of one problem by the formulas, in float64, with bounds."""

    def __init__(self, p: Problem) -> None:
        self.p, t, o = p, p.tensors, p.options
        self.margin = MARGIN if p.wide == torch.float32 else 4.0  # the truth itself is rounded to float64
        self.eps = eps = torch.finfo(p.wide).eps
        V, limit = len(t["weight"]), o.get("valid_vocab", len(t["weight"]))
        dead_V = torch.zeros(V, dtype=torch.bool)
        dead_V[list(o.get("suppress", ()))] = True
        self.alive_V = (~dead_V)[:limit].nonzero()[:, 0]
        self.T_N1 = t["temperature"].double()[:, None] if "temperature" in t else torch.tensor(float(o.get("temperature", 1.0)))
        self.h_NH, self.W_VH = self._rows(t["hidden"]), t["weight"].double()[self.alive_V]
        s, self.e_s, self.slope, self.flat = self._logits("", self.h_NH, self.W_VH)
        u, self.e_t, _, _ = self._logits("teacher_", self._rows(t["teacher_hidden"]), t["teacher_weight"].double()[self.alive_V])
        q, p_ = s.log_softmax(-1), u.log_softmax(-1)
        Q, P, beta = q.exp(), p_.exp(), o.get("beta", 0.5)
        e = self.e_s + self.e_t  # [N, 1]
        big = s.abs().amax(-1, True) + u.abs().amax(-1, True) + q.amin(-1, True).abs() * 0 if len(s) else e
        if p.kind == "forward_kl":
            x, weigh, share = p_ - q, P, 1.0
            D = (P * x).sum(-1, True)
            self.op, error = Q - P, (2 * e + 8 * eps) * (Q + P)
        elif p.kind == "reverse_kl":
            x, weigh, share = q - p_, Q, 1.0
            D = (Q * x).sum(-1, True)
            self.op = Q * (x - D)
            error = Q * ((2 * e + 16 * eps) * ((x - D).abs() + 2) + 8 * eps * (x.abs() + D.abs() + big))
        else:
            m = torch.logaddexp(math.log(beta) + p_, math.log1p(-beta) + q)
            x, weigh, share = q - m, Q, 1.0 - beta
            mean = (Q * x).sum(-1, True)
            D = beta * (P * (p_ - m)).sum(-1, True) + share * mean
            self.op = share * Q * (x - mean)
            error = share * Q * ((2 * e + 16 * eps) * ((x - mean).abs() + 4) + 8 * eps * (x.abs() + mean.abs() + big))
        spread = (weigh * (x - (weigh * x).sum(-1, True)).abs()).sum(-1, True)
        self.D_N = D[:, 0]
        self.error_N = ((2 * e + 16 * eps) * (2 + spread + (weigh * x.abs()).sum(-1, True)) + 8 * eps * big)[:, 0]
        spread_error = self.error_N[:, None] if p.kind != "forward_kl" else torch.zeros_like(D)
        self.op_error = error + share * Q * spread_error
        coef_N = t["coef"].double() if "coef" in t else torch.ones(len(s), dtype=torch.float64)
        self.factor_N = coef_N / (max(1, len(s)) if p.reduction == "mean" else 1)

    def _rows(self, hidden: Tensor) -> Tensor:
        return hidden.double().reshape(-1, hidden.shape[-1])[self.p.index]

    def _logits(self, side: str, h: Tensor, W: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        t, o = self.p.tensors, self.p.options
        z, size = h @ W.t(), h.abs() @ W.abs().t()
        if not side and "low_rank_A" in t:
            down, up, scale = t["low_rank_A"].double(), t["low_rank_B"].double()[self.alive_V], o["scale"]
            z = z + scale * (h @ down.t()) @ up.t()
            size = size + 2 * abs(scale) * (h.abs() @ down.abs().t()) @ up.abs().t()
        if side + "bias" in t:
            bias = t[side + "bias"].double()[self.alive_V]
            z, size = z + bias, size + bias.abs()
        slope, flat = torch.ones_like(z), torch.zeros_like(z)
        if cap := o.get(side + "softcap"):
            tanh = torch.tanh(z / cap)
            slope, z = 1 - tanh**2, cap * tanh
            flat = 4 * self.eps * (1 + size / cap)
        z, size = z / self.T_N1, size / self.T_N1
        largest = size.amax(-1, True) + z.abs().amax(-1, True) if len(z) else size[:, :1]
        return z, self.eps * (4 + h.shape[1] ** 0.5) * largest, slope / self.T_N1, flat / self.T_N1

    def wanted(self) -> dict[str, Bounded]:
        """Results as `distillation_loss` gives them, and gradients of their product with the upstream factor."""
        p, eps = self.p, self.eps
        value_N, error_N = self.factor_N * self.D_N, self.factor_N.abs() * (self.error_N + 8 * eps * self.D_N.abs())
        value, error = (value_N, error_N) if p.reduction == "none" else (value_N.sum(), error_N.sum())
        if p.reduction != "none":
            error = error + 8 * eps * (1 + len(value_N) ** 0.5) * value_N.abs().sum()
        found = {"value": Bounded(value, self.margin * error + TINY)}
        return found | self._gradients(self.op, self.op_error, (self.factor_N * p.upstream.double())[:, None])

    def _gradients(self, op: Tensor, op_error: Tensor, by_N1: Tensor) -> dict[str, Bounded]:
        """Of the head's operands, from `by * op`, the gradient by the final logits, and its error."""
        p, t, eps, found = self.p, self.p.tensors, self.eps, {}
        op_error = by_N1.abs() * (op_error * self.slope.abs() + op.abs() * (self.flat + 8 * eps * self.slope.abs()))
        op = by_N1 * op * self.slope

        N, V = op.shape
        dhidden = self._product(op, op_error, self.W_VH, V, p.dtype)
        if "low_rank_A" in t:
            down, up, scale = t["low_rank_A"].double(), t["low_rank_B"].double()[self.alive_V], p.options["scale"]
            low, low_up = t["low_rank_A"].dtype, up.abs() * abs(scale)
            through = self._product(op @ up * scale, (op_error + 16 * eps * op.abs()) @ low_up, down, up.shape[1] + V, p.dtype)
            more = eps * (8 + V**0.5) * self.margin * (op.abs() @ low_up @ down.abs())
            dhidden = Bounded(dhidden.exact + through.exact, 2 * (dhidden.bound + through.bound) + more)
            rest = eps * (8 + V**0.5) * self.margin * ((op.abs() @ low_up).t() @ self.h_NH.abs())
            ddown = self._product((op @ up * scale).t(), (op_error @ low_up).t(), self.h_NH, N, low)
            found["dlow_rank_A"] = Bounded(ddown.exact, ddown.bound + rest)
            through_N = scale * self.h_NH @ down.t()
            dup = self._product(op.t(), op_error.t(), through_N, N, low)
            lost = eps * (8 + self.h_NH.shape[1] ** 0.5) * self.margin * (op.abs().t() @ (self.h_NH.abs() @ down.abs().t()))
            found["dlow_rank_B"] = self._of_ids(Bounded(dup.exact, dup.bound + lost * abs(scale)))
        positions = t["hidden"].numel() // t["hidden"].shape[-1]
        zero = torch.zeros(positions, t["hidden"].shape[-1]).double()
        spread = [zero.index_copy(0, p.index, part).view(t["hidden"].shape) for part in dhidden[:2]]
        found["dhidden"] = Bounded(*spread)
        found["dweight"] = self._of_ids(self._product(op.t(), op_error.t(), self.h_NH, N, p.dtype))
        single = self._product(op.t(), op_error.t(), torch.ones(N, 1).double(), N, torch.float32)
        found["dbias"] = self._of_ids(Bounded(*(x[:, 0] for x in single[:2])))
        return found

    def _product(self, left: Tensor, left_error: Tensor, right: Tensor, deep: int, narrow: torch.dtype) -> Bounded:
        exact, whole = left @ right, left.abs() @ right.abs()
        error = left_error @ right.abs() + self.eps * (8 + deep**0.5) * whole
        unit = torch.finfo(narrow)
        return Bounded(
            exact, self.margin * error + 2 * unit.eps * exact.abs() + 2 * float(unit.smallest_normal) * unit.eps + TINY
        )

    def _of_ids(self, part: Bounded) -> Bounded:
        many = len(self.p.tensors["weight"])
        return Bounded(*(torch.zeros(many, *x.shape[1:]).double().index_copy(0, self.alive_V, x) for x in part[:2]))


@contextlib.contextmanager
def surroundings(p: Problem, engine: str, poison: float | None, guarded: Guarded) -> Iterator[None]:
    """An instruction set, few ids in a slab, slabs and sums between forbidden pages, and NaN in what PyTorch allocates."""
    elements, small, budget, like = walk.SLAB_ELEMENTS, walk.SMALL_BYTES, contract.WORKSPACE_BYTES["cpu"], walk._Walker.slab_like
    sums, block = passes._sums, contract.ROW_BLOCK
    if p.many_slabs:
        walk.SLAB_ELEMENTS, walk.SMALL_BYTES = {"cpu": 1}, 0
    if p.budget is not None:
        contract.WORKSPACE_BYTES["cpu"] = p.budget
    walk._Walker.slab_like = lambda walker: guarded.empty_like(like(walker), float("nan"))  # type: ignore[method-assign]
    passes._sums = lambda slab, count: guarded.copy(sums(slab, count))
    try:
        with machine(p, engine, poison, guarded):
            yield
    finally:
        walk.SLAB_ELEMENTS, walk.SMALL_BYTES, contract.WORKSPACE_BYTES["cpu"] = elements, small, budget
        walk._Walker.slab_like, passes._sums, contract.ROW_BLOCK = like, sums, block  # type: ignore[method-assign]


def run(p: Problem, inputs: Inputs) -> Found:
    """The value, and gradients as "d" + the input's name."""
    tensors = copies(p, inputs)
    value = distillation_loss(kind=p.kind, reduction=p.reduction, **arguments(p, tensors))
    found: Found = {"value": value}
    if p.trains:
        (value * p.upstream).sum().backward()
        found |= {f"d{name}": tensors[name].grad for name in p.trains}
    return found


def eager(p: Problem) -> Found:
    """Plain PyTorch on the same inputs: 16-bit operands, float32 logits and log-softmax."""
    t, o = {**p.tensors, **fresh(p, _LEAVES)}, p.options
    limit = o.get("valid_vocab", len(t["weight"]))

    def logp(side: str) -> Tensor:
        hidden = t[side + "hidden"]
        rows = hidden.reshape(-1, hidden.shape[-1])[p.index].to(p.wide)
        z = rows @ t[side + "weight"].to(p.wide)[:limit].t()
        if not side and "low_rank_A" in t:
            z = z + o["scale"] * (rows @ t["low_rank_A"].to(p.wide).t()) @ t["low_rank_B"].to(p.wide)[:limit].t()
        if side + "bias" in t:
            z = z + t[side + "bias"].to(p.wide)[:limit]
        if cap := o.get(side + "softcap"):
            z = cap * torch.tanh(z / cap)
        z = z / (t["temperature"].to(p.wide)[:, None] if "temperature" in t else o.get("temperature", 1.0))
        alive = [v for v in range(limit) if v not in set(o.get("suppress", ()))]
        return z[:, alive].log_softmax(-1)

    q, p_ = logp(""), logp("teacher_").detach()
    if p.kind == "forward_kl":
        D = (p_.exp() * (p_ - q)).sum(-1)
    elif p.kind == "reverse_kl":
        D = (q.exp() * (q - p_)).sum(-1)
    else:
        beta = o.get("beta", 0.5)
        m = torch.logaddexp(math.log(beta) + p_, math.log1p(-beta) + q)
        D = beta * (p_.exp() * (p_ - m)).sum(-1) + (1 - beta) * (q.exp() * (q - m)).sum(-1)
    value = D * t["coef"].to(p.wide) if "coef" in t else D
    value = {"none": value, "sum": value.sum(), "mean": value.sum() / max(1, len(D))}[p.reduction]
    found: Found = {"value": value.detach()}
    if p.trains:
        names = [name for name in _LEAVES if name in p.trains]
        gradients = torch.autograd.grad((value * p.upstream).sum(), [t[name] for name in names], allow_unused=True)
        found |= {f"d{name}": torch.zeros_like(t[name]) if g is None else g for name, g in zip(names, gradients)}
    return found
