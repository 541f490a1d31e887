"""Samplers as data: the candidates of a denoising step, their order, and how many are committed.

Published samplers are rows of one table, refined by options. `denoising.py` runs them.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

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
    # how many: known beforehand; all above a threshold, or above one that depends on how many; while the accumulated entropy
    # is small; random
    commit: Literal["schedule", "threshold", "factor", "entropy", "chance"]
    # minimum per step: as scheduled, or one token
    least: Literal["schedule", "one"] = "schedule"
    strict: bool = False  # above the threshold; else at or above
    most: Literal["schedule", "share"] | None = None  # maximum: what the schedule has asked for so far, or a share of the masks
    top_p_first: bool = False
    opening: bool = False  # the first step of a block decides its first token alone
    # decided tokens become masks again: the least trusted, those that a look at them from masks does not confirm, by chance
    take_back: Literal["trust", "verified", "chance"] | None = None
    options: Options = field(default_factory=dict)

    @property
    def static(self) -> bool:
        """Whether the tokens committed per step are known beforehand, so that no host sync is needed."""
        return self.commit == "schedule" and self.blocks != "sequence" and not self.opening and self.take_back is None

    @property
    def scheduled(self) -> bool:
        """Whether it takes a number of steps."""
        return self.least == "schedule" or self.most == "schedule"

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
        options={"remasking": "low_confidence", "renormalise": False},
    ),
    Sampler(
        "dream",
        "Dream, arXiv 2508.15487 (Dream-v0 generation_utils.py)",
        None,
        "drawn_logp",
        "schedule",
        top_p_first=True,
        options={"alg": "origin", "alg_temp": None, "eps": 1e-3, "threshold": 0.9},
    ),
    Sampler(
        "roar",
        "DMPO, arXiv 2510.08233 (its dmpo_trainer.py): random order, one token a step",
        "completion",
        "random",
        "schedule",
        least="one",
    ),
    Sampler(
        "fast_dllm",
        "Fast-dLLM, arXiv 2505.22618",
        "completion",
        "confidence",
        "threshold",
        least="one",
        options={"threshold": 0.9, "factor": None},
    ),
    Sampler(
        "fast_dream",
        "Fast-dLLM for Dream, arXiv 2505.22618 (its dream/model/generation_utils_block.py)",
        "completion",
        "drawn_logp",
        "threshold",
        least="one",
        top_p_first=True,
        opening=True,
        options={"alg": "confidence_threshold", "alg_temp": None, "eps": 1e-3, "threshold": 0.9},
    ),
    Sampler(
        "rcr",
        "MDPO, arXiv 2508.13148 (autonomousvision/mdpo mdlm_generation_utils.py): running confidence remasking",
        "completion",
        "drawn_logp",
        "schedule",
        top_p_first=True,
        take_back="trust",
        options={"alg": "maskgit_plus"},
    ),
    Sampler(
        "wino",
        "WINO, arXiv 2507.18578 (Feng-Hong/WINO-DLLM decoding.py): wide in, narrow out",
        "completion",
        "confidence",
        "threshold",
        least="one",
        strict=True,
        most="share",
        take_back="verified",
        options={"threshold": 0.6, "threshold_back": 0.9},
    ),
    Sampler(
        "remdm",
        "ReMDM, arXiv 2503.00307 (kuleshov-group/remdm diffusion.py)",
        None,
        "position",
        "chance",
        top_p_first=True,
        take_back="chance",
        options={"strategy": "cap", "eta": 0.02, "eps": 1e-5, "t_on": 0.55, "t_off": 0.05, "alpha_on": 0.9},
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
    for option in ("threshold", "threshold_back"):
        if option in full and checks.number(option, full[option], least=0) > 1:
            raise ValueError(f"{option} must be in [0, 1], got {full[option]}")
    if "bound" in full:
        checks.number("bound", full["bound"], least=0)
    sampler = replace(sampler, options=full)
    return _APPLY[name](sampler, full) if name in _APPLY else sampler


def _llada(sampler: Sampler, options: Options) -> Sampler:
    checks.choice("remasking", options["remasking"], ("low_confidence", "random"))
    if not isinstance(options["renormalise"], bool) or (options["renormalise"] and options["remasking"] == "random"):
        raise ValueError(f"renormalise must be False with remasking='random', else a bool, got {options['renormalise']!r}")
    return replace(sampler, rank="random") if options["remasking"] == "random" else sampler


_DREAM_RANKS: dict[str, Rank] = {"maskgit_plus": "drawn_logp", "topk_margin": "margin", "entropy": "drawn_entropy"}


def _check_dream(options: Options, algorithms: tuple[str, ...]) -> None:
    alg = options["alg"]
    checks.choice("alg", alg, algorithms)
    if checks.number("eps", options["eps"], above=0) >= 1:
        raise ValueError(f"eps must be in (0, 1), got {options['eps']}")
    if options["alg_temp"] is not None:
        checks.number("alg_temp", options["alg_temp"], least=0)
    if options["alg_temp"] and alg in ("origin", "confidence_threshold"):
        raise ValueError(f"alg_temp must be None with alg={alg!r}, which draws no order, got {options['alg_temp']}")


def _dream(sampler: Sampler, options: Options) -> Sampler:
    alg = options["alg"]
    _check_dream(options, ("origin", *_DREAM_RANKS, "confidence_threshold"))
    if alg == "origin":
        return replace(sampler, commit="chance", rank="position")
    if alg == "confidence_threshold":
        return replace(sampler, commit="threshold", least="one", most="schedule")
    return replace(sampler, rank=_DREAM_RANKS[alg])


def _fast_dream(sampler: Sampler, options: Options) -> Sampler:
    _check_dream(options, ("confidence_threshold", "entropy"))
    if options["alg"] == "entropy":
        return replace(sampler, rank="drawn_entropy", commit="schedule", least="schedule")
    return sampler


def _fast_dllm(sampler: Sampler, options: Options) -> Sampler:
    if options["factor"] is None:
        return sampler
    checks.number("factor", options["factor"], above=0)
    return replace(sampler, commit="factor")


def _rcr(sampler: Sampler, options: Options) -> Sampler:
    checks.choice("alg", options["alg"], tuple(_DREAM_RANKS))
    return replace(sampler, rank=_DREAM_RANKS[options["alg"]])


def _remdm(sampler: Sampler, options: Options) -> Sampler:
    checks.choice("strategy", options["strategy"], ("cap", "rescale", "conf", "loop"))
    for name in ("eps", "t_on", "t_off", "alpha_on"):
        if checks.number(name, options[name], above=0) >= 1:
            raise ValueError(f"{name} must be in (0, 1), got {options[name]}")
    if checks.number("eta", options["eta"], least=0) > 1:
        raise ValueError(f"eta must be in [0, 1], got {options['eta']}")
    if options["strategy"] == "loop" and not options["t_off"] < options["t_on"]:
        raise ValueError(f"t_off must be below t_on={options['t_on']}, got {options['t_off']}")
    if options["strategy"] == "loop" and options["eta"] * options["alpha_on"] > 1 - options["alpha_on"]:
        most = (1 - options["alpha_on"]) / options["alpha_on"]
        raise ValueError(
            f"eta must be at most {most:.3g} with strategy='loop' and alpha_on={options['alpha_on']}, got {options['eta']}"
        )
    return sampler


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


_APPLY: dict[str, Callable[[Sampler, Options], Sampler]] = {
    "llada": _llada,
    "dream": _dream,
    "fast_dllm": _fast_dllm,
    "fast_dream": _fast_dream,
    "sdar": _sdar,
    "llada2": _llada2,
    "rcr": _rcr,
    "remdm": _remdm,
}


def check_steps(
    sampler: Sampler, length: int, steps: int | None, block_length: int | None, *, whole: bool = True
) -> tuple[int | None, int]:
    """(steps, block length) of a rollout, checked. Raises ValueError or TypeError naming the argument.

    `whole`: blocks divide the length. Else, where lengths differ, `length` is the longest and last blocks may be short.
    """
    if sampler.blocks is None:
        if block_length is not None:
            raise ValueError(f"block_length must be None for sampler={sampler.name!r}, which has no blocks, got {block_length}")
        block_length = length
    elif block_length is None:
        raise ValueError(f"block_length must be given for sampler={sampler.name!r}, got None")
    checks.count("block_length", block_length)
    if not sampler.scheduled:
        if steps is not None:
            raise ValueError(f"steps must be None for sampler={sampler.name!r}, which takes as many as it needs, got {steps}")
    else:
        if steps is None:
            raise ValueError(f"steps must be given for sampler={sampler.name!r}, got None")
        checks.count("steps", steps)
    if sampler.blocks == "completion" and whole and length % block_length:
        raise ValueError(f"block_length must divide length={length}, got {block_length}")
    if sampler.blocks == "sequence":
        if steps is not None and steps > block_length:
            raise ValueError(f"steps (of a block) must be at most block_length={block_length}, got {steps}")
    elif sampler.blocks == "completion":
        blocks = -(-length // block_length)
        most = blocks * block_length
        if sampler.commit == "schedule" and not sampler.scheduled:
            steps = most  # a token each
        if steps is not None and (steps % blocks or steps > most):
            raise ValueError(f"steps must be a multiple of the {blocks} blocks and at most length={most}, got {steps}")
        if sampler.opening and steps == blocks:
            raise ValueError(f"steps must be at least 2 in each of {blocks} blocks for sampler={sampler.name!r}, got {steps}")
    return steps, block_length


def committed(
    sampler: Sampler, rank_AR: Tensor, entropy_AR: Tensor, least: int | Tensor, most_A: Tensor | None, count_A: Tensor | None
) -> Tensor:
    """bool `[A, R]`: which of the candidates, sorted by rank, are committed.

    At least `least` of a row (an int, or int64 `[A]`), at most `most_A`; the first `count_A` are candidates at all (None: all).
    """
    place_R = torch.arange(rank_AR.shape[1], device=rank_AR.device)
    first_AR = (place_R < (least[:, None] if isinstance(least, Tensor) else least)).expand_as(rank_AR)
    if sampler.commit == "entropy":  # the last of the set has its largest entropy
        within_AR = entropy_AR.cumsum(-1) - entropy_AR <= sampler.options["bound"]
        # at 1e30 the difference of sums cancels, so tokens that are trusted last are excluded by their rank
        return first_AR | within_AR & (rank_AR > TRUSTED_LAST)
    if sampler.commit not in ("threshold", "factor"):
        return first_AR
    probability_AR = rank_AR.exp() if sampler.rank == "drawn_logp" else rank_AR
    if sampler.commit == "factor":  # n tokens at once need a confidence of 1 - factor / (n + 1) of the last
        enough_AR = first_AR | (probability_AR >= 1 - sampler.options["factor"] / (place_R + 2.0))
        number_A = enough_AR.long().cumprod(-1).sum(-1)
        count_A = torch.full_like(number_A, rank_AR.shape[1]) if count_A is None else count_A
        number_A = torch.minimum(number_A, count_A)
        # as published: where all but one are sure enough, that one is taken too
        number_A = number_A + ((number_A == count_A - 1) & (number_A > 0)).long()
        return place_R < number_A[:, None]
    bound = sampler.options["threshold"]
    sure_AR = probability_AR > bound if sampler.strict else probability_AR >= bound
    if most_A is not None:
        sure_AR = sure_AR & (place_R < most_A[:, None])
    return first_AR | sure_AR
