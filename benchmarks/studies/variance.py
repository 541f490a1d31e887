"""How exact ELBOs are at a given number of forward passes: bias, variance, squared error of every estimator.

A model scores its own completions of unseen 4x4 puzzles, as RL does, by each estimator at each budget, many
times over with fresh masks. The truth is a stratified exact-count estimate from 4096 samples; sums of
log-probs are kept per mask, so a mask that comes again costs nothing. Intervals are 95 % bootstraps over the
sequences. From the reference's moments at each count follows (`moments.py`) what share of one pass's variance
comes from its level (t, or the count) and what from the masks, here and in longer completions made of several
of these as parts that do not see each other.

    random      the demo's architecture, not trained
    trained     a checkpoint of `dllm-kernels`: runs/demo/checkpoint if there, or --model FOLDER (several make
                several cases)

Sizes: B sequences, R replicates of every estimate, M samples of the reference (a multiple of the 16 counts).
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import plots
from benchmarks.registry import ROOT, Row, Settings, Sizes, Study
from benchmarks.report import interval, markdown, percent
from benchmarks.studies.moments import Moments
from benchmarks.studies.statistics import ratio
from dllm_kernels import MaskPlan, generate, headless, make_mask_plan, noise, score_tokens

BUDGETS = (1, 2, 3, 4, 6, 8, 12, 16)
USUAL = {"B": 8, "R": 32, "M": 4096}
SIZES = Sizes({"B": 2, "R": 2, "M": 32}, USUAL, USUAL)
L = 16  # cells of an answer, all of them scored
BATCH = 1024  # masked sequences per model call
DEFAULT_MODEL = ROOT / "runs" / "demo" / "checkpoint"
T_MIN = 1e-3
PARTS = (1, 4, 16)  # completions of 16, 64 and 256 tokens, of so many parts that do not see each other
GROUPS = 64  # of such completions
REFERENCE_SAMPLES_AT_ONCE = 256


@dataclass(frozen=True)
class Estimator:
    """A law with its options, and how many passes one draw of it takes."""

    name: str
    law: str
    options: Mapping[str, Any] = field(default_factory=dict)
    multiple: int = 1


TITLE = "ELBO estimators at equal numbers of forward passes, in nats of a 16-token completion [95 %]"
RANDOM = "random"
TIGHT = ("quadrature 3 (GDPO)", 3)
MONTE_CARLO, EXACT_MONTE_CARLO, STRATIFIED = "double Monte Carlo", "exact, independent", "exact, stratified"
COMMON_BUDGET = 12  # which every estimator permits
ESTIMATORS = (
    Estimator(MONTE_CARLO, "bernoulli", {"t_min": T_MIN}),
    Estimator(EXACT_MONTE_CARLO, "exact", {"pairing": "independent"}),
    Estimator(STRATIFIED, "exact"),
    Estimator("antithetic (ESPO)", "antithetic", multiple=2),
    *(Estimator(f"quadrature {n} (GDPO)", "quadrature", {"nodes": n}, n) for n in (2, 3, 4)),
    *(
        Estimator(f"quadrature {n}, L/count", "quadrature", {"nodes": n, "counts": "round", "weight": "wL/count"}, n)
        for n in (2, 3, 4)
    ),
)


@dataclass(frozen=True)
class Scored:
    """A model and its completions; `sums` gives `sum_{l in m} log p(y_l | y^m)` for codes of masks m."""

    name: str
    model: nn.Module
    ids_BS: Tensor
    mask_id: int
    table_BC: Tensor  # float64 [B, 2^L], NaN where not asked for yet

    def sums(self, codes_KB: Tensor, sequence_B: Tensor) -> Tensor:
        """float64 `[K, B']` for codes of sequences `sequence_B`: bit l of a code hides answer token l."""
        flat_KB = codes_KB + sequence_B * self.table_BC.shape[1]
        wanted = torch.unique(flat_KB)
        wanted = wanted[self.table_BC.view(-1)[wanted].isnan()]
        if len(wanted):
            self._score(wanted)
        return self.table_BC.view(-1)[flat_KB]

    def _score(self, index_N: Tensor) -> None:
        """Fill in entries of the table, given by flat index."""
        S = self.ids_BS.shape[1]
        with torch.no_grad(), headless(self.model) as body:
            for part_N in index_N.split(BATCH):
                ids_NS, code_N = self.ids_BS[part_N // self.table_BC.shape[1]], part_N % self.table_BC.shape[1]
                hidden_NS = torch.zeros_like(ids_NS, dtype=torch.bool)
                hidden_NS[:, S - L :] = (code_N[:, None] >> torch.arange(L)) % 2 == 1
                rows = hidden_NS.view(-1).nonzero()[:, 0]
                noisy_NS = ids_NS.masked_fill(hidden_NS, self.mask_id)
                logp = score_tokens(body(noisy_NS), body.weight, ids_NS.reshape(-1)[rows], rows=rows, **body.options).logp
                assert logp is not None
                sums_N = torch.zeros(len(part_N), dtype=torch.float64).index_add_(0, rows // S, logp.double())
                self.table_BC.view(-1)[part_N] = sums_N

    def plan(self, law: str, samples: int, replicates: int, seed: int, options: Mapping[str, Any]) -> tuple[MaskPlan, Tensor]:
        """A plan of `replicates` times the sequences, each with its own masks; and each one's sequence."""
        B = len(self.ids_BS)
        sequence_B = torch.arange(B).repeat(replicates)
        names = [f"{b}/{r}" for r in range(replicates) for b in range(B)]
        completion_BS = (torch.arange(self.ids_BS.shape[1]) >= self.ids_BS.shape[1] - L).expand(len(sequence_B), -1)
        plan = make_mask_plan(
            self.ids_BS[sequence_B],
            completion_BS,
            law=law,
            samples=samples,
            seed=seed,
            sequence_ids=noise.sequence_ids(names),
            mask_id=self.mask_id,
            **options,
        )
        return plan, sequence_B


def codes_of(plan: MaskPlan) -> Tensor:
    return (plan.scored[:, :, -L:].long() << torch.arange(L)).sum(-1)


def estimates(scored: Scored, estimator: Estimator, budget: int, replicates: int) -> Tensor:
    """float64 `[B, R]`: independent estimates by `budget` forward passes each."""
    plan, sequence_B = scored.plan(estimator.law, budget, replicates, 1 + budget, estimator.options)
    samples_KB = plan.weight_KB.double() * scored.sums(codes_of(plan), sequence_B)
    return (samples_KB * plan.share_K.double()[:, None]).sum(0).view(replicates, -1).t()


def reference(scored: Scored, samples: int) -> Moments:
    plan, sequence_B = scored.plan("exact", samples, 1, 0, {})
    B, sums = len(sequence_B), []
    counts = []
    for first in range(0, samples, REFERENCE_SAMPLES_AT_ONCE):
        cut = plan.cut(samples=slice(first, first + REFERENCE_SAMPLES_AT_ONCE))
        sums.append(scored.sums(codes_of(cut), sequence_B))
        counts.append(cut.counts)
    draws = samples // L
    # stratified: every count comes `draws` times
    order_MB = torch.argsort(torch.cat(counts), dim=0, stable=True)
    sums_BLn = torch.cat(sums).gather(0, order_MB).t().reshape(B, L, draws)
    return Moments(sums_BLn.mean(-1), sums_BLn.var(-1), draws)


def check(settings: Settings) -> None:
    from dllm_trainer.config import load_config

    sizes, puzzles = SIZES.of(settings), load_config().task.test_puzzles
    if not 2 <= sizes["B"] <= puzzles:
        raise ValueError(f"--shape of variance takes B in 2..{puzzles}, the unseen puzzles, got {sizes['B']}")
    if sizes["R"] < 2 or sizes["M"] < 2 * L or sizes["M"] % L:
        raise ValueError(f"--shape of variance takes R from 2 and M a multiple of {L} from {2 * L}, got {sizes}")
    for folder in settings.models:
        if not (Path(folder) / "config.json").is_file():
            raise ValueError(f"--model must be the folder of a checkpoint, got {folder}, which holds no config.json")


def models(settings: Settings) -> list[tuple[str, Path | None]]:
    """Name and checkpoint folder of each case; None is the model that was not trained."""
    folders = [Path(text) for text in settings.models] or [DEFAULT_MODEL]
    return [(RANDOM, None), *((f"{folder.parent.name}/{folder.name}", folder) for folder in folders)]


def load(name: str, folder: Path | None, sequences: int) -> Scored:
    """The model, and its completions of that many unseen puzzles with the demo's sampler."""
    from dllm_trainer.config import load_config
    from dllm_trainer.distributed import Ranks
    from dllm_trainer.errors import UserError
    from dllm_trainer.tasks import make_task
    from dllm_trainer.train.run import prepare

    config = load_config(overrides=[] if folder is None else [f"model.checkpoint={json.dumps(str(folder))}"])
    task = make_task(config.task, seed=config.seed)
    try:
        setup = prepare(config, task, Ranks())
    except UserError as error:
        raise ValueError(f"--model cannot be used: {error}") from error
    examples = task.tests["unseen_puzzles"][:sequences]
    ids = noise.sequence_ids([f"unseen_puzzles/{e.id}" for e in examples])
    options = setup.generate_options()
    rollout = generate(setup.model, setup.codec.prompts(examples), seed=config.seed, sequence_ids=ids, **options)
    nothing = torch.full((sequences, 2**L), math.nan, dtype=torch.float64)
    return Scored(name, setup.model, rollout.ids_BS, setup.facts.mask_id, nothing)


def measure(settings: Settings) -> dict[str, Any]:
    """The entry of a result file: a row per model, budget and estimator, and what follows from them."""
    sizes, cases = SIZES.of(settings), models(settings)
    rows: list[Row] = []
    shares: list[dict[str, Any]] = []
    against: list[dict[str, Any]] = []
    for name, folder in cases:
        if folder is not None and not (folder / "config.json").is_file():
            reason = f"no {folder.relative_to(ROOT)}: train it with `dllm-kernels demo`, or give --model FOLDER"
            rows.append(_row(name, sizes, "all", status="absent", reason=reason))
            continue
        scored = load(name, folder, sizes["B"])
        truth = reference(scored, sizes["M"])
        for estimator in ESTIMATORS:
            for budget in BUDGETS[:4] if settings.tiny else BUDGETS:
                if budget % estimator.multiple == 0:
                    found_BR = estimates(scored, estimator, budget, sizes["R"])
                    error_BR = found_BR - truth.elbo_B[:, None]
                    figures = {
                        "bias": ratio(error_BR.mean(-1)),
                        "variance": ratio(found_BR.var(-1)),
                        "mse": ratio(error_BR.square().mean(-1)),
                    }
                    rows.append(_row(name, {**sizes, "K": budget}, estimator.name, figures=figures))
            print(f"[variance] {name}: {estimator.name}", file=sys.stderr, flush=True)
        shares += decomposition(name, truth)
        against += comparisons(name, truth)
    entry = {"rows": rows, "shares_of_variance": shares, "quadrature_over_monte_carlo": against}
    return {**entry, "summary": summary(shares, against)}


def _row(model: str, sizes: Mapping[str, int], contestant: str, **values: Any) -> Row:
    label = f"{model} {','.join(f'{key}={value}' for key, value in sizes.items())}"
    row = {"case": label, "model": model, "sizes": dict(sizes), "contestant": contestant, "role": "ours", "status": "ok"}
    # the columns of the other suites: nothing here is timed
    return {**row, "reason": "", "note": "", "time_ms": None, "memory_mib": None, "errors": {}, "figures": {}, **values}


def decomposition(model: str, truth: Moments) -> list[dict[str, Any]]:
    """Shares of one forward pass's variance, by the law of total variance, also for longer completions.

    These come from the reference's moments, not from the replicates: the tails of 1 / t make a sample
    variance unsteady.
    """
    found = []
    for parts in PARTS:
        joined = truth.joined(groups(truth, parts))
        for estimator, variance in (
            (EXACT_MONTE_CARLO, joined.exact_count()),
            (MONTE_CARLO, joined.bernoulli(T_MIN)),
        ):
            entry = {"model": model, "L": L * parts, "estimator": estimator, "variance": ratio(variance.total)}
            for source in ("level", "count", "masks"):
                entry[source] = ratio(getattr(variance, source), variance.total)
            found.append(entry)
    return found


def groups(truth: Moments, parts: int) -> Tensor:
    """int64 `[X, G]`: which sequences make up each completion; each alone, or drawn at random."""
    B = len(truth.mean_BL)
    if parts == 1:
        return torch.arange(B)[:, None]
    return torch.randint(B, (GROUPS, parts), generator=torch.Generator().manual_seed(parts))


def comparisons(model: str, truth: Moments) -> list[dict[str, Any]]:
    """Squared error of quadrature over Monte Carlo's at equal budgets by length, in closed form."""
    found = []
    for parts in PARTS:
        joined = truth.joined(groups(truth, parts))
        one_of = {MONTE_CARLO: joined.bernoulli(T_MIN), EXACT_MONTE_CARLO: joined.exact_count()}
        for nodes, counted in itertools.product((2, 3, 4), (False, True)):
            mean_B, variance_B = joined.quadrature(nodes, counted=counted)
            for budget in (nodes, COMMON_BUDGET):
                ours_B = (mean_B - joined.elbo_B) ** 2 + variance_B * nodes / budget
                others = {name: (one.mean - joined.elbo_B) ** 2 + one.total / budget for name, one in one_of.items()}
                for other, theirs_B in {**others, STRATIFIED: joined.stratified(budget)}.items():
                    entry = {"model": model, "L": L * parts, "budget": budget, "estimator": quadrature_name(nodes, counted)}
                    found.append({**entry, "over": other, "mse_ratio": ratio(ours_B, theirs_B)})
    return found


def quadrature_name(nodes: int, counted: bool) -> str:
    return f"quadrature {nodes}, L/count" if counted else f"quadrature {nodes} (GDPO)"


def summary(shares: Sequence[Mapping[str, Any]], against: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    for model in dict.fromkeys(entry["model"] for entry in shares):
        level = {e["estimator"]: e["level"]["value"] for e in shares if e["model"] == model and e["L"] == L}
        ratio = {
            e["over"]: e["mse_ratio"]["value"]
            for e in against
            if (e["model"], e["L"], e["estimator"], e["budget"]) == (model, L, *TIGHT)
        }
        parts.append(
            f"{model}: level's share of the variance {level[MONTE_CARLO]:.0%} (t) and {level[EXACT_MONTE_CARLO]:.0%} (count); "
            + f"{TIGHT[0]} at {TIGHT[1]} passes, squared error over that of "
            + ", ".join(f"{name} {value:.2g}" for name, value in ratio.items())
        )
    return "; ".join(parts)


def listing(settings: Settings) -> list[str]:
    names = ", ".join(estimator.name for estimator in ESTIMATORS)
    return [f"{name} {','.join(f'{k}={v}' for k, v in SIZES.of(settings).items())}: {names}" for name, _ in models(settings)]


# --- the tables of docs/estimators.md -----------------------------------------------------------------------

PASSES = (1, 2, 3, 4, 8, 12)
TOLD_LENGTHS = (16, 256)


def _shares(entry: Mapping[str, Any]) -> str:
    names = {"exact, independent": "count", "double Monte Carlo": "t"}
    return markdown(
        [
            "model",
            "tokens",
            "estimator",
            "variance of one pass",
            "its level",
            "from the level",
            "from the count given t",
            "from masks",
        ],
        [
            [
                x["model"],
                str(x["L"]),
                x["estimator"],
                interval(x["variance"]),
                names[x["estimator"]],
                percent(x["level"]),
                percent(x["count"]) if names[x["estimator"]] == "t" else "",
                percent(x["masks"]),
            ]
            for x in entry["shares_of_variance"]
        ],
    )


def _squared_errors(entry: Mapping[str, Any]) -> str:
    found = {(r["model"], r["contestant"], r["sizes"].get("K")): r["figures"] for r in entry["rows"] if r["status"] == "ok"}
    pairs = dict.fromkeys((model, name) for model, name, _ in found)
    return markdown(
        ["model", "estimator", *(f"{n} pass{'es' * (n > 1)}" for n in PASSES)],
        [
            [model, name, *(interval(found[model, name, n]["mse"]) if (model, name, n) in found else "" for n in PASSES)]
            for model, name in pairs
        ],
    )


def _at_twelve(entry: Mapping[str, Any]) -> str:
    return markdown(
        ["model", "estimator", "bias", "variance", "squared error"],
        [
            [r["model"], r["contestant"], *(interval(r["figures"][key]) for key in ("bias", "variance", "mse"))]
            for r in entry["rows"]
            if r["status"] == "ok" and r["sizes"]["K"] == 12
        ],
    )


def _ratios(entry: Mapping[str, Any]) -> str:
    found = {
        (x["model"], x["estimator"], x["L"], x["budget"], x["over"]): x["mse_ratio"] for x in entry["quadrature_over_monte_carlo"]
    }
    lines = []
    for model, name in dict.fromkeys((model, name) for model, name, *_ in found):
        nodes = int(name.split()[1].rstrip(","))
        tight = [
            (L, nodes, over) for L in TOLD_LENGTHS for over in ("double Monte Carlo", "exact, independent", "exact, stratified")
        ]
        cells = [
            interval(found[(model, name, *key)]) for key in [*tight[:3], (TOLD_LENGTHS[0], 12, "exact, stratified"), *tight[3:]]
        ]
        lines.append([model, name, *cells])
    columns = ["double MC", "exact indep.", "exact strat."]
    head = [f"{L} tokens, n passes: over {c}" for L in TOLD_LENGTHS for c in columns]
    return markdown(["model", "estimator", *head[:3], "16 tokens, 12 passes: over exact strat.", *head[3:]], lines)


TABLES = {"shares": _shares, "squared errors": _squared_errors, "twelve passes": _at_twelve, "ratios": _ratios}


def blocks(entry: Mapping[str, Any]) -> dict[str, str]:
    """By the name of their markers, from the study's entry of a result file."""
    return {name: table(entry) for name, table in TABLES.items()}


def _on_screen(key: str) -> Callable[[Row], str]:
    return lambda row: "{value:.2g} [{low:.2g}, {high:.2g}]".format(**row["figures"][key]) if row["figures"] else "-"


SUITES = {
    "variance": Study(
        name="variance",
        title=TITLE,
        check=check,
        measure=measure,
        listing=listing,
        label=lambda row: row["model"],
        columns={
            "passes": lambda row: str(row["sizes"].get("K", "")),
            "bias": _on_screen("bias"),
            "variance": _on_screen("variance"),
            "squared error": _on_screen("mse"),
        },
        shape_keys=tuple(USUAL),
        plot=plots.squared_errors,
    )
}
