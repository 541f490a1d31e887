"""What the fuzzer draws: a head problem and the call that is made of it, from a seed and a number alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CALLS = ("forward", "unit", "coef", "keep", "recompute", "head_backward", "sample", "elbo_loss", "bgpo_loss")


@dataclass
class Problem:
    """`hidden` is `[..., H]`; `options` are keywords of `score_tokens`; `more` is what one kind of call alone takes."""

    call: str
    hidden: Tensor
    weight: Tensor
    target: Tensor
    rows: Tensor | None
    options: dict[str, Any]
    coef: Tensor | None
    entropy_coef: Tensor | None
    at_end: bool  # of its memory, see `guards`
    threads: int
    budget: int | None  # bytes of the workspace, None for the default
    bad: str = ""  # what is wrong with it, if a call must refuse it
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        return self.hidden.dtype

    @property
    def shape(self) -> str:
        """Sizes and options, for a complaint."""
        sizes = f"hidden {list(self.hidden.shape)}, V {len(self.weight)}, rows {len(self.target)}"
        return f"{sizes}, {', '.join(self.options) or 'no options'}"

    @property
    def index(self) -> Tensor:
        """Flat rows of hidden that are scored."""
        return torch.arange(self.hidden.numel() // self.hidden.shape[-1]) if self.rows is None else self.rows


def _sizes(rng: random.Random) -> tuple[int, int, int]:
    """N, H, V: mostly a few tiles and their edges, now and then several blocks, depths or chunks of the engine."""
    kind = rng.random()
    if kind < 0.75:
        return rng.randint(1, 20), rng.randint(1, 40), rng.randint(1, 70)
    if kind < 0.95:
        return rng.randint(1, 70), rng.randint(1, 100), rng.randint(1, 500)
    if kind < 0.98:
        return rng.randint(1, 24), rng.randint(1, 24), rng.randint(450, 3000)
    if kind < 0.99:
        return rng.randint(1, 40), rng.randint(1000, 1100), rng.randint(1, 40)
    return rng.randint(250, 1100), rng.randint(1, 12), rng.randint(1, 40)


_LAYOUTS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: x,
    lambda x: x,
    lambda x: x,
    lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    lambda x: x.repeat_interleave(2, -2)[..., ::2, :],
    lambda x: x.repeat_interleave(2, -1)[..., ::2],
)


def draw(seed: int, number: int) -> Problem:
    """Problem `number` of a seed, whatever was drawn before."""
    rng = random.Random(f"{seed}:{number}")
    g = torch.Generator().manual_seed(rng.getrandbits(62))
    call = rng.choices(CALLS, (2, 2, 3, 2, 2, 3, 2, 2, 2))[0]
    dtype = rng.choices(DTYPES, (6, 8, 4, 1))[0]
    N, H, V = _sizes(rng)
    loss = call.endswith("_loss")
    options = _options(rng, g, N, V, loss, call)
    scale = rng.choice((0.0, 0.01, 1.0, 1.0, 1.0, 4.0))
    weight = torch.randn(V, H, generator=g) * (2.5 / H**0.5)
    limit = options.get("valid_vocab") or V
    allowed = torch.tensor(sorted(set(range(limit)) - set(options.get("suppress", ()))))
    M = N if loss or rng.random() < 0.4 else N + rng.randint(0, 5)
    hidden = torch.randn(M, H, generator=g) * scale
    target = allowed[torch.randint(len(allowed), (N,), generator=g)]
    if call == "coef" and rng.random() < 0.1:
        hidden[:N] = weight[target] * 20  # probabilities near 1
    rows = None if M == N and rng.random() < 0.5 else torch.randperm(M, generator=g)[:N]
    if not loss and rng.random() < 0.02:
        rows, target = torch.zeros(0, dtype=torch.int64), target[:0]
        options.pop("temperature", None)
    hidden, weight = rng.choice(_LAYOUTS)(hidden.to(dtype)), rng.choice(_LAYOUTS)(weight.to(dtype))
    coef, entropy_coef = _coefficients(rng, g, len(target))
    if call in ("coef", "head_backward") and rng.random() < 0.3:
        if call == "coef" and rng.random() < 0.3:
            coef = None
        else:
            entropy_coef = None
    problem = Problem(call, hidden, weight, target, rows, options, coef, entropy_coef, rng.random() < 0.7, 1, None)
    if N > 256:
        problem.budget = rng.choice((None, 1))
    if N * H * V > 1 << 22:
        problem.threads = rng.choice((1, 2, 3))
    if call == "head_backward":
        problem.more = {"buffers": [rng.choice(_LAYOUTS), rng.choice(_LAYOUTS[:4])], "bias_grad": rng.random() < 0.6}
    elif call == "sample":
        problem.more = {
            "temperature": rng.choice((0.0, 0.3, 1.0, 1.0, 2.5)),
            "step": rng.randint(0, 5),
            "key": torch.randint(-(2**62), 2**62, (len(target),), generator=g),
            "top_k": rng.choice((None,) * 9 + (3,)),
        }
    elif loss:
        _loss(problem, rng, g)
    elif rng.random() < 0.05 and len(target):
        _spoil(problem, rng)
    if not problem.bad:
        _enrich(problem, allowed, random.Random(f"{seed}:{number}:more"))
    return problem


def _enrich(problem: Problem, allowed: Tensor, rng: random.Random) -> None:
    """Options drawn after all else and from numbers of their own: an adapter, several ids of a row, other draws."""
    p, g = problem, torch.Generator().manual_seed(rng.getrandbits(62))
    N, (V, H) = len(p.target), p.weight.shape
    wide = torch.float64 if p.dtype == torch.float64 else torch.float32
    if rng.random() < 0.25:
        R, dtype = rng.choice((1, 2, 3, 5, 8, 14, 17, 33)), rng.choice((p.dtype, p.dtype, wide, torch.float16))
        down, up = torch.randn(R, H, generator=g) / H**0.5, torch.randn(V, R, generator=g)
        p.options["low_rank"] = down.to(dtype), up.to(dtype), rng.choice((0.5, -1.0, 2.0))
    if p.call in ("forward", "coef", "keep", "recompute") and rng.random() < 0.5:
        if rng.random() < 0.7:
            ids = allowed[torch.randint(len(allowed), (N, rng.choice((0, 1, 2, 5, 17))), generator=g)]
            if ids.shape[1] > 1 and rng.random() < 0.5:
                ids[:, rng.randrange(ids.shape[1])] = p.target  # twice in a row
            p.more["ids"] = ids
        if p.call != "keep" and rng.random() < 0.4:
            p.more["want_top"] = rng.randint(1, min(len(allowed), rng.choice((1, 3, 40))))
        p.more["lse"] = rng.random() < 0.5
    ids, k = p.more.get("ids", torch.zeros(N, 0)), p.more.get("want_top", 0)
    for name, size in (("ids_coef", ids.shape), ("best_coef", (N, k)), ("lse_coef", (N,))):
        p.more[name] = torch.randn(size, generator=g) * rng.choice((0.0, 1.0, 1.0, 10.0))
    if p.call == "sample":
        if rng.random() < 0.3:
            p.more["temperature"] = torch.tensor((0.0, 0.3, 1.0, 2.5))[torch.randint(4, (N,), generator=g)]
        p.more["min_p"] = rng.choice((None,) * 8 + (0.0, 0.2, 1.0))
    if p.call == "coef" and p.coef is not None and N and "softcap" not in p.options and "bias" in p.options:
        never = allowed[p.options["bias"][allowed] == -torch.inf]
        if len(never) and rng.random() < 0.5:  # a target of probability 0, whose coefficient is 0
            row = rng.randrange(N)
            p.target, p.coef = p.target.clone(), p.coef.clone()
            p.target[row], p.coef[row] = never[0], 0.0


def _options(rng: random.Random, g: torch.Generator, N: int, V: int, loss: bool, call: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if rng.random() < 0.4:
        bias = torch.randn(V, generator=g) * rng.choice((0.0, 1.0, 1.0, 10.0))
        if V > 2 and not loss and rng.random() < 0.3:
            bias[rng.randrange(V)] = -torch.inf
        options["bias"] = bias
    if rng.random() < 0.3:
        options["softcap"] = rng.choice((0.5, 3.0, 30.0))
    if rng.random() < 0.4:
        by_row = not loss and call != "sample" and rng.random() < 0.5
        options["temperature"] = torch.rand(N, generator=g) + 0.3 if by_row else rng.choice((0.3, 0.7, 1.7))
    if not loss and rng.random() < 0.3:
        options["valid_vocab"] = rng.randint(1, V)
    if rng.random() < 0.4:
        limit = options.get("valid_vocab", V)
        ids = tuple(rng.sample(range(V), min(V, rng.choice((1, 1, 2, V // 3)))))
        if len(set(ids) & set(range(limit))) < limit:
            options["suppress"] = ids
    bias = options.get("bias")
    if bias is not None and "softcap" not in options:  # an id of finite logit must be left
        left = set(range(options.get("valid_vocab", V))) - set(options.get("suppress", ()))
        if all(bias[v] == -torch.inf for v in left):
            options.pop("bias")
    return options


def _coefficients(rng: random.Random, g: torch.Generator, N: int) -> tuple[Tensor, Tensor]:
    coef, entropy_coef = torch.randn(2, N, generator=g).unbind()
    if rng.random() < 0.3:
        coef = coef * (torch.rand(N, generator=g) < 0.5)
        entropy_coef = entropy_coef * (coef != 0)
    return coef * rng.choice((1.0, 1.0, 1e-4, 30.0)), entropy_coef


def _loss(problem: Problem, rng: random.Random, g: torch.Generator) -> None:
    """Sequences in place of rows: which tokens are masked, how they weigh, and the factor of each log-prob."""
    N, H = problem.hidden.shape
    B = rng.choice([b for b in range(1, 5) if N % b == 0])
    L = N // B
    shift = rng.choice((0, 0, 1)) if L > 1 else 0
    masked = torch.rand(B, L, generator=g) < rng.choice((0.0, 0.3, 0.6, 1.0))
    masked[:, :shift] = False
    wide = torch.float64 if problem.dtype == torch.float64 else torch.float32  # coefficients are as exact as what they come from
    p_mask = torch.rand(B, 1 if rng.random() < 0.5 else L, generator=g, dtype=wide) * 0.9 + 0.1
    position = masked.flatten().nonzero()[:, 0]
    weight_N = 1.0 / p_mask.double().expand(B, L).flatten()[position]
    if p_mask.shape[1] == L:
        p_mask = torch.where(masked, p_mask, rng.choice((0.0, float("nan"), 1.0)))
    more: dict[str, Any] = {"shift": shift, "masked": masked, "p_mask": p_mask, "labels": problem.target.view(B, L)}
    if problem.call == "elbo_loss":
        kind = rng.choice(("mean", "sft", "sequence"))
        factor = torch.full((B,), 1.0 if kind == "sequence" else 1.0 / (B * L), dtype=torch.float64)
        if kind == "sft":
            more["lengths"] = torch.randint(1, 9, (B,), generator=g)
            factor = 1.0 / (B * more["lengths"].double())
        if kind == "sequence":
            more["upstream"] = torch.randn(B, generator=g, dtype=wide)
            factor = more["upstream"].double()
        problem.coef = -factor[position // L] * weight_N
        more["kind"] = kind
    else:
        more["advantages"], more["samples"] = torch.randn(B, generator=g, dtype=wide), rng.randint(1, 8)
        more["old"] = rng.choice((None, torch.randn(B, generator=g) * 0.3))  # less the current ELBO, where not None
        more["weight_N"] = weight_N
        problem.coef = -more["advantages"].double()[position // L] * weight_N / (more["samples"] * B)
    problem.entropy_coef, problem.rows = None, position - shift
    problem.target, problem.hidden = problem.target[position], problem.hidden.reshape(B, L, H)
    more["sequence"] = position // L
    problem.more = more


def _spoil(problem: Problem, rng: random.Random) -> None:
    """Something that every call must refuse, and that must do no harm to the calls after it."""
    index, n = problem.index, rng.randrange(len(problem.target))
    kinds = ["hidden", "target", "tangent"] + ["rows"] * (problem.rows is not None and len(problem.target) > 1)
    if problem.call in ("unit", "keep", "recompute"):  # between forward and backward, in place
        kinds += ["changed target", "changed target"] + ["changed rows"] * 2 * (problem.rows is not None)
        copied = problem.dtype == torch.float64  # a float32 temperature is: changes after that do no harm
        kinds += ["changed temperature"] * 2 * (isinstance(problem.options.get("temperature"), Tensor) and not copied)
    problem.bad = rng.choice(kinds)
    if problem.bad == "hidden":
        infinite = "softcap" not in problem.options and rng.random() < 0.5  # a softcap makes an infinity a legal logit
        problem.hidden[int(index[n])] = float("inf") if infinite else float("nan")
    elif problem.bad == "target":
        problem.target = problem.target.clone()
        problem.target[n] = rng.choice((-1, -100, len(problem.weight)))
    elif problem.bad == "rows" and problem.rows is not None:
        problem.rows = problem.rows.clone()
        problem.rows[n] = problem.rows[n - 1]
