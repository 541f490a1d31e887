"""Samplers as data: the candidates of a denoising step, their order, and how many are committed.

Published samplers are rows of one table, refined by options. `denoising.py` runs them.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dllm_kernels import checks

Options = Mapping[str, Any]
TRUSTED_LAST = -1e30  # below any rank, above the rank of places that are no candidates
Rank = Literal["confidence", "drawn_logp", "drawn_entropy", "margin", "random", "position"]


@dataclass(frozen=True)
class Sampler:
    """One row of the table."""

    name: str
    source: str
    # "completion": blocks count from its first token; "sequence": from the prompt's; None: no blocks
    blocks: Literal["completion", "sequence"] | None
    # order of commits: probability of the token drawn (under the model, or under the sampling distribution),
    # lowest entropy or largest top-2 margin of the sampling distribution, random, left to right
    rank: Rank
    # how many: known beforehand; all above a threshold; while the accumulated entropy is small; random
    commit: Literal["schedule", "threshold", "entropy", "chance"]
    # minimum per step: as scheduled, or one token
    least: Literal["schedule", "one"] = "schedule"
    strict: bool = False  # above the threshold; else at or above
    top_p_first: bool = False
    options: Options = field(default_factory=dict)

    @property
    def static(self) -> bool:
        """Whether the tokens committed per step are known beforehand, so that no host sync is needed."""
        return self.commit == "schedule" and self.blocks != "sequence"

    @property
    def edits(self) -> float | None:
        """The probability above which a decided token of the active block is replaced; None: never."""
        return self.options.get("editing_threshold")

    @property
    def post_steps(self) -> int:
        """The most steps of a block that has no mask left."""
        return 0 if self.edits is None else self.options["max_post_steps"]

    @property
    def stochastic(self) -> bool:
        """Whether it draws anything but tokens."""
        return self.rank == "random" or self.commit == "chance" or bool(self.options.get("alg_temp"))


_TABLE = (
    Sampler(
        "llada",
        "LLaDA, arXiv 2502.09992 (ML-GSAI/LLaDA generate.py)",
        "completion",
        "confidence",
        "schedule",
        options={"remasking": "low_confidence"},
    ),
    Sampler(
        "dream",
        "Dream, arXiv 2508.15487 (Dream-v0 generation_utils.py)",
        None,
        "drawn_logp",
        "schedule",
        top_p_first=True,
        options={"alg": "origin", "alg_temp": None, "eps": 1e-3},
    ),
    Sampler(
        "fast_dllm",
        "Fast-dLLM, arXiv 2505.22618",
        "completion",
        "confidence",
        "threshold",
        least="one",
        options={"threshold": 0.9},
    ),
    Sampler(
        "sdar",
        "SDAR, arXiv 2510.06303 (JetAstra/SDAR generate.py)",
        "sequence",
        "drawn_logp",
        "threshold",
        strict=True,
        options={"remasking": "low_confidence_dynamic", "threshold": 0.85, "bound": 0.1},
    ),
    Sampler(
        "llada2",
        "LLaDA2.0 and, with editing_threshold, LLaDA2.1, arXiv 2602.08676 (its modeling_llada2_moe.py)",
        "sequence",
        "drawn_logp",
        "threshold",
        least="one",
        strict=True,
        options={"threshold": 0.95, "editing_threshold": None, "max_post_steps": 16},
    ),
    Sampler(
        "entropy_bound",
        "EB-Sampler, arXiv 2505.24857",
        "completion",
        "drawn_entropy",
        "entropy",
        least="one",
        options={"bound": 0.1},
    ),
)
SAMPLERS: dict[str, Sampler] = {sampler.name: sampler for sampler in _TABLE}


def resolve(name: str, options: Options) -> Sampler:
    """The sampler with its options applied. Raises ValueError or TypeError naming the option."""
    checks.choice("sampler", name, tuple(SAMPLERS))
    sampler = SAMPLERS[name]
    for option in options:
        if option not in sampler.options:
            near = difflib.get_close_matches(option, sampler.options, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{option} is no option of sampler={name!r}, whose options are {', '.join(sampler.options)}{hint}")
    full = {**sampler.options, **options}
    if "threshold" in full and checks.number("threshold", full["threshold"], least=0) > 1:
        raise ValueError(f"threshold must be in [0, 1], got {full['threshold']}")
    if "bound" in full:
        checks.number("bound", full["bound"], least=0)
    sampler = replace(sampler, options=full)
    return _APPLY[name](sampler, full) if name in _APPLY else sampler


def _llada(sampler: Sampler, options: Options) -> Sampler:
    checks.choice("remasking", options["remasking"], ("low_confidence", "random"))
    return replace(sampler, rank="random") if options["remasking"] == "random" else sampler


_DREAM_RANKS: dict[str, Rank] = {"maskgit_plus": "drawn_logp", "topk_margin": "margin", "entropy": "drawn_entropy"}


def _dream(sampler: Sampler, options: Options) -> Sampler:
    alg = options["alg"]
    checks.choice("alg", alg, ("origin", *_DREAM_RANKS))
    if not 0 < checks.number("eps", options["eps"], above=0) < 1:
        raise ValueError(f"eps must be in (0, 1), got {options['eps']}")
    if options["alg_temp"] is not None:
        checks.number("alg_temp", options["alg_temp"], least=0)
    if alg == "origin":
        if options["alg_temp"]:
            raise ValueError(f"alg_temp must be None with alg='origin', which ranks nothing, got {options['alg_temp']}")
        return replace(sampler, commit="chance", rank="position")
    return replace(sampler, rank=_DREAM_RANKS[alg])


def _sdar(sampler: Sampler, options: Options) -> Sampler:
    kinds = ("low_confidence_dynamic", "low_confidence_static", "sequential", "entropy_bounded")
    checks.choice("remasking", options["remasking"], kinds)
    if options["remasking"] == "entropy_bounded":
        return replace(sampler, commit="entropy", rank="drawn_entropy", least="one")
    if options["remasking"] == "low_confidence_dynamic":
        return sampler
    rank: Rank = "position" if options["remasking"] == "sequential" else "drawn_logp"
    return replace(sampler, commit="schedule", rank=rank)


def _llada2(sampler: Sampler, options: Options) -> Sampler:
    checks.count("max_post_steps", options["max_post_steps"])
    if options["editing_threshold"] is not None and checks.number("editing_threshold", options["editing_threshold"], least=0) > 1:
        raise ValueError(f"editing_threshold must be None or in [0, 1], got {options['editing_threshold']}")
    return sampler


_APPLY: dict[str, Callable[[Sampler, Options], Sampler]] = {"llada": _llada, "dream": _dream, "sdar": _sdar, "llada2": _llada2}


class Step(NamedTuple):
    """One step of a static schedule."""

    number: int  # counts all steps of the schedule, also those without a commit
    block: int
    remaining: int  # masked tokens of the block before the step
    commit: int


def check_steps(sampler: Sampler, length: int, steps: int | None, block_length: int | None) -> tuple[int | None, int]:
    """(steps, block length) of a rollout, checked. Raises ValueError or TypeError naming the argument."""
    if sampler.blocks is None:
        if block_length is not None:
            raise ValueError(f"block_length must be None for sampler={sampler.name!r}, which has no blocks, got {block_length}")
        block_length = length
    elif block_length is None:
        raise ValueError(f"block_length must be given for sampler={sampler.name!r}, got None")
    checks.count("block_length", block_length)
    if sampler.least == "one":
        if steps is not None:
            raise ValueError(f"steps must be None for sampler={sampler.name!r}, which takes as many as it needs, got {steps}")
    else:
        if steps is None:
            raise ValueError(f"steps must be given for sampler={sampler.name!r}, got None")
        checks.count("steps", steps)
    if sampler.blocks == "completion" and length % block_length:
        raise ValueError(f"block_length must divide length={length}, got {block_length}")
    if sampler.blocks == "sequence":
        if steps is not None and steps > block_length:
            raise ValueError(f"steps (of a block) must be at most block_length={block_length}, got {steps}")
    elif steps is not None and sampler.blocks == "completion":
        blocks = length // block_length
        if steps % blocks or steps > length:
            raise ValueError(f"steps must be a multiple of the {blocks} blocks and at most length={length}, got {steps}")
    return steps, block_length


def commits_per_step(block_length: int, steps: int) -> list[int]:
    """Tokens per step of a block: as even as possible, remainders in the earliest steps."""
    base, extra = divmod(block_length, steps)
    return [base + (step < extra) for step in range(steps)]


def schedule(sampler: Sampler, length: int, steps: int, block_length: int) -> list[Step]:
    """The steps of a static sampler that commit a token."""
    if sampler.blocks is None:
        counts = [times_commit(length, steps, sampler.options["eps"])]
    else:
        blocks = length // block_length
        counts = [commits_per_step(block_length, steps // blocks)] * blocks
    plan = []
    number = 0
    for block, of_block in enumerate(counts):
        remaining = sum(of_block)
        for commit in of_block:
            if commit:
                plan.append(Step(number, block, remaining, commit))
            remaining -= commit
            number += 1
    return plan


def transfer_shares(steps: int, eps: float) -> Tensor:
    """Dream's share of masked tokens per step, fp32 `[steps]`: `1 - s / t`, t from 1 to eps; 1 at the end."""
    t = torch.linspace(1, eps, steps + 1)
    shares = 1 - t[1:] / t[:-1]
    shares[-1] = 1.0
    return shares


def times_commit(length: int, steps: int, eps: float) -> list[int]:
    """Tokens per step of Dream's ranked algorithms: the share of masked tokens, rounded down in fp32."""
    remaining, counts = length, []
    for share in transfer_shares(steps, eps):
        counts.append(int(remaining * share))
        remaining -= counts[-1]
    return counts


def committed(sampler: Sampler, rank_AR: Tensor, entropy_AR: Tensor, least: int) -> Tensor:
    """bool `[A, R]`: which of the candidates, sorted by rank, are committed; at least `least`."""
    place_R = torch.arange(rank_AR.shape[1], device=rank_AR.device)
    first_R = place_R < least
    if sampler.commit == "threshold":
        bound = sampler.options["threshold"]
        probability_AR = rank_AR.exp() if sampler.rank == "drawn_logp" else rank_AR
        return first_R | (probability_AR > bound if sampler.strict else probability_AR >= bound)
    if sampler.commit == "entropy":  # the last of the set has its largest entropy
        within_AR = entropy_AR.cumsum(-1) - entropy_AR <= sampler.options["bound"]
        # at 1e30 the difference of sums cancels, so tokens that are trusted last are excluded by their rank
        return first_R | within_AR & (rank_AR > TRUSTED_LAST)
    return first_R.expand_as(rank_AR)
