"""`expected_embedding` fuzzed: a drawn problem, its value and gradients in float64 with bounds of rounding.

Bounds are those of `distillation`: first-order, of which a tenth is allowed.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.fuzzing import distillation
from benchmarks.fuzzing.calls import Found, Inputs
from benchmarks.fuzzing.guards import Guarded
from benchmarks.fuzzing.judging import arguments, copies, fresh, machine
from benchmarks.fuzzing.problems import _LAYOUTS, DTYPES
from benchmarks.fuzzing.truth import TINY, Bounded
from dllm_kernels import expected_embedding
from dllm_kernels.backends.divergence import walk as slabs
from dllm_kernels.backends.expectation import walk

_LEAVES = ("hidden", "weight", "embedding", "bias", "low_rank_A", "low_rank_B")


@dataclass
class Problem:
    """A call: tensors by argument, Python options, which tensors want a gradient, and what arrives upstream."""

    tensors: dict[str, Tensor]
    options: dict[str, Any]
    trains: tuple[str, ...]
    at_end: bool
    threads: int
    many_slabs: bool
    upstream: Tensor
    bad: str = ""

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors["hidden"].dtype

    @property
    def wide(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def call(self) -> str:
        return "apart" if "embedding" in self.tensors else "tied"

    @property
    def index(self) -> Tensor:
        hidden = self.tensors["hidden"]
        return self.tensors.get("rows", torch.arange(hidden.numel() // hidden.shape[-1]))

    @property
    def shape(self) -> str:
        t = self.tensors
        sizes = f"hidden {list(t['hidden'].shape)}, V {len(t['weight'])}, D {self.upstream.shape[1]}"
        names = [*(name for name in t if name not in ("hidden", "weight")), *self.options]
        return f"{sizes}, {', '.join(names)}, trains {' '.join(self.trains)}"


def draw(seed: int, number: int) -> Problem:
    """Problem `number` of a seed, whatever was drawn before."""
    rng = random.Random(f"expectation:{seed}:{number}")
    g = torch.Generator().manual_seed(rng.getrandbits(62))
    dtype = rng.choices(DTYPES, (8, 6, 3, 2))[0]
    size = rng.random()
    N, V = (rng.randint(1, 36), rng.randint(1, 150)) if size < 0.9 else (rng.randint(1, 300), rng.randint(1, 40))
    if size > 0.95:
        N, V = rng.randint(1, 40), rng.randint(200, 2500)
    H, D = rng.randint(1, 40), rng.randint(1, 40)
    M = N if rng.random() < 0.4 else N + rng.randint(1, 5)

    def normal(*sizes: int, by: float = 1.0) -> Tensor:
        return torch.randn(sizes, generator=g) * by

    weight, hidden = normal(V, H, by=1.5 / H**0.5), normal(M, H, by=rng.choice((0.0, 0.01, 0.5, 1.0, 1.0, 4.0)))
    tensors = {"hidden": rng.choice(_LAYOUTS)(hidden.to(dtype)), "weight": rng.choice(_LAYOUTS)(weight.to(dtype))}
    if rng.random() < 0.6:
        other = dtype if rng.random() < 0.7 else rng.choice([x for x in DTYPES if x != torch.float64 or dtype == torch.float64])
        tensors["embedding"] = rng.choice(_LAYOUTS)(normal(V, D, by=rng.choice((0.02, 1.0))).to(other))
    if M != N or rng.random() < 0.3:
        tensors["rows"] = torch.randperm(M, generator=g)[: 0 if rng.random() < 0.03 else N]
        N = len(tensors["rows"])
    else:
        N = M
    options: dict[str, Any] = {}
    if rng.random() < 0.3:
        tensors["bias"] = normal(V, by=rng.choice((0.0, 1.0, 5.0)))
    if rng.random() < 0.25:
        options["softcap"] = rng.choice((1.0, 3.0, 30.0))
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
        R, low = rng.randint(1, 4), rng.choice((dtype, torch.float64 if dtype == torch.float64 else torch.float32))
        tensors |= {"low_rank_A": normal(R, H, by=H**-0.5).to(low), "low_rank_B": normal(V, R).to(low)}
        options["scale"] = rng.choice((0.5, -1.0))
    if rng.random() < 0.3:  # what has no probability may hold anything
        for name in ("weight", "embedding"):
            if name in tensors:
                tensors[name][[*options.get("suppress", ()), *range(limit, V)]] = rng.choice((float("nan"), float("inf")))
    there = [name for name in _LEAVES if name in tensors]
    trains = tuple(rng.choice(([], there, there, there, ["hidden"], [x for x in there if rng.random() < 0.5])))
    table = tensors.get("embedding", tensors["weight"])
    upstream = normal(N, table.shape[1]).to(table.dtype)
    p = Problem(tensors, options, trains, rng.random() < 0.7, rng.choice((1, 1, 2, 3)), rng.random() < 0.6, upstream)
    if N and rng.random() < 0.05:
        _spoil(p, rng, N)
    return p


def _spoil(p: Problem, rng: random.Random, N: int) -> None:
    """Something that a call must refuse."""
    t = p.tensors
    p.bad = rng.choice(["hidden", *(name for name in ("temperature",) if name in t)] + ["rows"] * ("rows" in t and N > 1))
    if p.bad == "rows":
        t["rows"] = torch.cat((t["rows"][:-1], t["rows"][:1]))
    else:
        t[p.bad] = t[p.bad].clone()
        t[p.bad][int(p.index[rng.randrange(N)]) if p.bad == "hidden" else rng.randrange(N)] = float("nan")


class Truth(distillation.Truth):
    """Value and gradients of one problem by the formulas, in float64, with bounds."""

    def __init__(self, p: Problem) -> None:
        self.p, t, o = p, p.tensors, p.options  # type: ignore[assignment]
        self.margin = distillation.MARGIN if p.wide == torch.float32 else 4.0  # the truth itself is rounded to float64
        self.eps = eps = torch.finfo(p.wide).eps
        self.T_N1 = t["temperature"].double()[:, None] if "temperature" in t else torch.tensor(float(o.get("temperature", 1.0)))
        self.alive_V = alive(p)
        self.h_NH, self.W_VH = self._rows(t["hidden"]), t["weight"].double()[self.alive_V]
        self.E_VD = t["embedding"].double()[self.alive_V] if "embedding" in t else self.W_VH
        z, e, self.slope, self.flat = self._logits("", self.h_NH, self.W_VH)
        self.P, self.e = z.softmax(-1), 2 * e + 16 * eps
        self.out = self.P @ self.E_VD
        away = self.P @ self.E_VD.abs() + self.out.abs()  # at least sum p |E - out|
        self.out_error = (self.e + eps * (8 + z.shape[1] ** 0.5)) * away

    def wanted(self) -> dict[str, Bounded]:
        """The result, and gradients of the sum of its product with what arrives."""
        p, eps, P, E = self.p, self.eps, self.P, self.E_VD
        table = p.tensors.get("embedding", p.tensors["weight"])
        unit, g = torch.finfo(table.dtype), p.upstream.double()  # type: ignore[attr-defined]
        rounded = 2 * unit.eps * self.out.abs() + float(unit.smallest_normal) * unit.eps + TINY
        found = {"value": Bounded(self.out, self.margin * self.out_error + rounded)}
        pull, mean = g @ E.t(), (g * self.out).sum(-1, True)
        error = eps * (8 + g.shape[1] ** 0.5) * (g.abs() @ E.abs().t() + (g.abs() * self.out.abs()).sum(-1, True))
        error = error + (g.abs() * self.out_error).sum(-1, True)
        op_error = P * (self.e * (pull - mean).abs() + error)
        found |= self._gradients(P * (pull - mean), op_error, torch.ones(len(g), 1, dtype=torch.float64))
        of_table = self._of_ids(self._product(P.t(), (self.e * P).t(), g, len(g), table.dtype))
        if "embedding" in p.tensors:
            return found | {"dembedding": of_table}
        both = found["dweight"]
        return found | {"dweight": Bounded(both.exact + of_table.exact, 2 * (both.bound + of_table.bound))}


def alive(p: Problem) -> Tensor:
    """Ids that have a probability."""
    dead_V = torch.zeros(len(p.tensors["weight"]), dtype=torch.bool)
    dead_V[list(p.options.get("suppress", ()))] = True
    return (~dead_V)[: p.options.get("valid_vocab", len(dead_V))].nonzero()[:, 0]


@contextlib.contextmanager
def surroundings(p: Problem, engine: str, poison: float | None, guarded: Guarded) -> Iterator[None]:
    """An instruction set, few ids in a slab, slabs between forbidden pages, and NaN in what PyTorch allocates."""
    elements, like = slabs.SLAB_ELEMENTS, walk._Walker.slab_like
    if p.many_slabs:
        slabs.SLAB_ELEMENTS = {"cpu": 1}
    walk._Walker.slab_like = lambda walker, dtype: guarded.empty_like(like(walker, dtype), float("nan"))  # type: ignore[method-assign]
    try:
        with machine(p, engine, poison, guarded):
            yield
    finally:
        slabs.SLAB_ELEMENTS, walk._Walker.slab_like = elements, like  # type: ignore[method-assign]


def run(p: Problem, inputs: Inputs) -> Found:
    """The value, and gradients as "d" + the input's name."""
    tensors = copies(p, inputs)
    value = expected_embedding(**arguments(p, tensors))
    found: Found = {"value": value}
    if p.trains:
        value.backward(p.upstream)
        found |= {f"d{name}": tensors[name].grad for name in p.trains}
    return found


def eager(p: Problem) -> Found:
    """Plain PyTorch on the same inputs: 16-bit operands, float32 logits and softmax, its product in the embedding's dtype."""
    t: dict[str, Any] = {**p.tensors, **fresh(p, _LEAVES)}
    o, ids = p.options, alive(p)
    rows = t["hidden"].reshape(-1, t["hidden"].shape[-1])[p.index].to(p.wide)
    z = rows @ t["weight"].to(p.wide)[ids].t()
    if "low_rank_A" in t:
        z = z + o["scale"] * (rows @ t["low_rank_A"].to(p.wide).t()) @ t["low_rank_B"].to(p.wide)[ids].t()
    if "bias" in t:
        z = z + t["bias"].to(p.wide)[ids]
    if cap := o.get("softcap"):
        z = cap * torch.tanh(z / cap)
    z = z / (t["temperature"].to(p.wide)[:, None] if "temperature" in t else o.get("temperature", 1.0))
    table = t.get("embedding", t["weight"])[ids]
    value = z.softmax(-1).to(table.dtype) @ table
    found: Found = {"value": value.detach()}
    if p.trains:
        leaves = [t[name] for name in p.trains]
        gradients = torch.autograd.grad(value, leaves, p.upstream, allow_unused=True)
        found |= {f"d{name}": torch.zeros_like(x) if g is None else g for name, x, g in zip(p.trains, leaves, gradients)}
    return found
