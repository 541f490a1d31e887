"""Mask laws as data: level x pairing x weight, with the published names as presets; checks of options.

Of the L scorable tokens of a sequence, a sample hides n. An `unbiased` law estimates the any-order bound
`ELBO = sum_{n=1..L} (1/n) E_{|m|=n} sum_{l in m} log p(y_l | y^m)`. The draws are in `draws.py`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from dllm_kernels import checks

Options = Mapping[str, Any]
TAILS = ("shown", "hidden", "removed")  # what a model sees of the tokens after the first EOS


@dataclass(frozen=True, eq=False)
class Law:
    """One row of the table: level, pairing and weight, and how the K samples combine into a score."""

    name: str
    # what is drawn: a probability t; a count in 1..L or 0..L; a node in [0, 1]; or nothing, masks are given
    level: Literal["t", "count from 1", "count from 0", "nodes", "all", "block", "steps"]
    # whether the K levels are drawn independently or stratified over their range
    pairing: Literal["independent", "stratified"]
    # of a sample's sum of log-probs; n is the number of hidden tokens, "count" the same where t was drawn
    weight: Literal["1/t", "L/n", "(L+1)/n", "L/count", "w/t", "wL/count", "1/count", "1"]
    # of the K samples: mean; sum over nodes of their means; half the first plus half the mean pair; sum
    reduction: Literal["mean", "nodes", "coupled", "sum"]
    unbiased: bool  # for the ELBO above
    source: str
    options: Options = field(default_factory=dict)  # options of make_mask_plan, with defaults
    # from this sample on, every second sample hides what the one before it shows
    pairs_from: int | None = None
    prompt_noise: float = 0.0
    # tokens after the first EOS, if eos_id is given and tail is not; never scored
    tail: Literal["shown", "hidden"] = "shown"


_TABLE = (
    Law(
        "bernoulli",
        "t",
        "independent",
        "1/t",
        "mean",
        True,
        "LLaDA, arXiv 2502.09992, eq. 3",
        {"t": None, "t_min": 0.0, "weight": "1/t"},
    ),
    Law("exact", "count from 1", "stratified", "L/n", "mean", True, "LLaDA, arXiv 2502.09992, eq. 6", {"pairing": "stratified"}),
    Law("exact_zero", "count from 0", "stratified", "(L+1)/n", "mean", True, "ESPO, arXiv 2512.03759", {"pairing": "stratified"}),
    Law(
        "antithetic",
        "count from 0",
        "stratified",
        "(L+1)/n",
        "mean",
        True,
        "ESPO, arXiv 2512.03759; weight='dmpo': DMPO, arXiv 2510.08233",
        {"weight": "espo", "pairing": None, "t_min": None},
        pairs_from=0,
    ),
    Law(
        "coupled",
        "t",
        "independent",
        "1/t",
        "coupled",
        False,
        "DiffuCoder, arXiv 2506.20639",
        {"t": None, "t_low": 0.2, "t_high": 0.8},
        pairs_from=1,
    ),
    Law(
        "quadrature",
        "nodes",
        "independent",
        "w/t",
        "nodes",
        False,
        "GDPO, arXiv 2510.08554",
        {"nodes": 3, "counts": "floor", "weight": "w/t"},
    ),
    Law(
        "full",
        "all",
        "independent",
        "1",
        "mean",
        False,
        "d1, arXiv 2504.12216; wd1, arXiv 2507.08838",
        prompt_noise=0.15,
        tail="hidden",
    ),
    Law(
        "block",
        "block",
        "independent",
        "1/count",
        "mean",
        False,
        "SPG, arXiv 2510.09541",
        {"block_length": 32},
        prompt_noise=0.15,
        tail="hidden",
    ),
    Law(
        "trace",
        "steps",
        "independent",
        "1",
        "sum",
        False,
        "TraceRL, arXiv 2509.06949; EGSPO, arXiv 2603.12554",
        {"step_map_BS": None, "steps_BJ": None, "shrink": 1, "shown_BKS": None, "event_steps_BKS": None, "event_ids_BKS": None},
        tail="hidden",
    ),
    Law(
        "segments",
        "steps",
        "independent",
        "1",
        "sum",
        False,
        "d2, arXiv 2509.21474",
        {"step_map_BS": None, "segments": None, "total_steps": None},
        prompt_noise=0.15,
        tail="hidden",
    ),
)
LAWS: dict[str, Law] = {law.name: law for law in _TABLE}


def resolve(name: str, options: Options) -> tuple[Law, dict[str, Any]]:
    """The law with its options applied, and all options. Raises ValueError or TypeError naming the option."""
    checks.choice("law", name, tuple(LAWS))
    law = LAWS[name]
    for option in options:
        if option not in law.options:
            allowed = ", ".join(law.options) or "none"
            near = difflib.get_close_matches(option, law.options, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{option} is no option of law={name!r}, whose options are {allowed}{hint}")
    full = {**law.options, **options}
    return _APPLY[name](law, full) if name in _APPLY else law, full


def _apply_bernoulli(law: Law, options: dict[str, Any]) -> Law:
    checks.choice("weight", options["weight"], ("1/t", "L/count"))
    _check_t(options)
    if checks.number("t_min", options["t_min"], least=0) >= 1.0:
        raise ValueError(f"t_min must be in [0, 1), got {options['t_min']}")
    exact = options["weight"] == "1/t" and options["t"] is None and options["t_min"] == 0.0
    return replace(law, weight=options["weight"], unbiased=exact)


def _apply_pairing(law: Law, options: dict[str, Any]) -> Law:
    checks.choice("pairing", options["pairing"], ("stratified", "independent"))
    return replace(law, pairing=options["pairing"])


def _apply_antithetic(law: Law, options: dict[str, Any]) -> Law:
    checks.choice("weight", options["weight"], ("espo", "dmpo"))
    if options["weight"] == "espo":
        if options["t_min"] is not None:
            raise ValueError(f"t_min is an option of weight='dmpo', got t_min={options['t_min']} with weight='espo'")
        options["pairing"] = options["pairing"] or "stratified"
        return _apply_pairing(law, options)
    if options["pairing"] not in (None, "independent"):
        raise ValueError(f"pairing must be 'independent' with weight='dmpo', got {options['pairing']!r}")
    options["pairing"] = "independent"
    options["t_min"] = 0.1 if options["t_min"] is None else options["t_min"]
    if checks.number("t_min", options["t_min"], least=0) >= 1.0:
        raise ValueError(f"t_min must be in [0, 1), got {options['t_min']}")
    return replace(law, level="t", pairing="independent", weight="L/count", unbiased=False)


def _apply_coupled(law: Law, options: dict[str, Any]) -> Law:
    low, high = checks.number("t_low", options["t_low"], above=0), checks.number("t_high", options["t_high"], above=0)
    if not low <= high < 1.0:
        raise ValueError(f"t_low and t_high must satisfy 0 < t_low <= t_high < 1, got {low} and {high}")
    _check_t(options)
    if options["t"] == 1.0:
        raise ValueError("t must be below 1 for law='coupled', whose second mask is drawn with 1 - t, got 1.0")
    return law


def _apply_quadrature(law: Law, options: dict[str, Any]) -> Law:
    if checks.count("nodes", options["nodes"]) > 5:
        raise ValueError(f"nodes must be in 1..5, got {options['nodes']}")
    checks.choice("counts", options["counts"], ("floor", "round"))
    checks.choice("weight", options["weight"], ("w/t", "wL/count"))
    return replace(law, weight=options["weight"])


def _apply_block(law: Law, options: dict[str, Any]) -> Law:
    checks.count("block_length", options["block_length"])
    return law


def _apply_trace(law: Law, options: dict[str, Any]) -> Law:
    checks.count("shrink", options["shrink"])
    if options["shrink"] > 1 and options["steps_BJ"] is not None:
        raise ValueError(f"steps_BJ selects single steps, so shrink must be 1 with it, got {options['shrink']}")
    return law


def _apply_segments(law: Law, options: dict[str, Any]) -> Law:
    checks.count("segments", options["segments"])
    if options["total_steps"] is not None:
        checks.count("total_steps", options["total_steps"], options["segments"])
    return law


_APPLY = {
    "bernoulli": _apply_bernoulli,
    "exact": _apply_pairing,
    "exact_zero": _apply_pairing,
    "antithetic": _apply_antithetic,
    "coupled": _apply_coupled,
    "quadrature": _apply_quadrature,
    "block": _apply_block,
    "trace": _apply_trace,
    "segments": _apply_segments,
}


def _check_t(options: Options) -> None:
    if options["t"] is not None and checks.number("t", options["t"], above=0) > 1.0:
        raise ValueError(f"t must be in (0, 1], got {options['t']}")


def check_samples(law: Law, options: Options, samples: int) -> None:
    """Raises ValueError if the law cannot have this number of samples."""
    if law.pairs_from is not None and (samples - law.pairs_from) % 2:
        raise ValueError(f"samples must be {'odd' if law.pairs_from else 'even'} for law={law.name!r}, got {samples}")
    if law.name == "coupled" and samples < 3:
        raise ValueError(f"samples must be at least 3 for law='coupled' (everything hidden, and a pair), got {samples}")
    if law.level == "nodes" and samples % options["nodes"]:
        raise ValueError(f"samples must be a multiple of nodes={options['nodes']} for law={law.name!r}, got {samples}")


def shares(law: Law, options: Options, sample_K: Tensor, samples: int) -> Tensor:
    """Weight of each sample in its sequence's score, float64 `[K]`."""
    if law.reduction == "sum":
        value = 1.0
    elif law.reduction == "nodes":
        value = options["nodes"] / samples
    elif law.reduction == "coupled":
        return torch.where(sample_K == 0, 0.5, 1.0 / (samples - 1)).to(torch.float64)
    else:
        value = 1.0 / samples
    return torch.full(sample_K.shape, value, dtype=torch.float64, device=sample_K.device)
