"""BGPO (arXiv 2510.11683): a bound that is tight on-policy, constant memory, less error with more samples.

Source: the paper's text. Measured on completions that the model drew for unseen puzzles:

    bound    per-sample ELBO differences d of the policy, moved by BGPO's own updates, against the policy that
             drew; value of the bound and of the ELBO ratio objective `A exp(mean d)` for A = 1 and A = -1, in
             float64. A violation on any sequence, or on-policy a difference in value or gradient, would
             refute it; how wide the gap grows is the news.
    memory   peak memory by n_t, from two committed results of other benchmarks: the engine must stay flat
             where the graph of all samples grows by the same amount per sample.
    samples  the gradient of a group's loss on-policy with few samples against that with many: squared error
             over squared norm. That it falls is what a larger n_t is for.
"""

from __future__ import annotations

import copy
import itertools
import json
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import two_digits
from benchmarks.studies import common, statistics
from benchmarks.studies.common import RESULTS, Claim, Figures, Group, Settings, Tiers
from dllm_kernels import MaskPlan
from dllm_kernels.accumulation.objective import Batch, Objective
from dllm_kernels.accumulation.scores import score_samples
from dllm_kernels.objectives import BGPO, bgpo, group_advantages

SNAPSHOTS = (0, 1, 4, 16, 40)  # updates
COUNTS = (1, 2, 4, 8, 16)  # n_t
EXACTLY = 1e-9  # of values of order 1, in float64


bound_sizes = Tiers(
    tiny={"prompts": 3, "group": 4, "samples": 4, "snapshots": 2},
    usual={"prompts": 32, "group": 8, "samples": 16, "snapshots": len(SNAPSHOTS)},
)


def _ratio_contributions(logp_N: Tensor, plan: MaskPlan, batch: Batch) -> Tensor:
    delta_B = plan.score(logp_N) - batch.per_sequence["old_elbo"]
    return -(batch.per_sequence["advantages"] * delta_B.exp()).sum()


ELBO_RATIO = Objective(
    name="elbo_ratio",
    contributions=_ratio_contributions,
    coupling="sequence",
    on_policy_coupling="sequence",
    denominator="sequences",
    old_scores="old_elbo",
    per_sequence=("advantages", "old_elbo"),
    scale="advantages",
)


def bound(settings: Settings) -> Figures:
    sizes, subject = bound_sizes(settings), common.load(settings)
    groups = subject.groups(sizes["prompts"], sizes["group"])
    if not any(group.has_signal for group in groups):
        raise ValueError("--checkpoint must be a model that solves some puzzles and not all")
    plans = [subject.plan(group.rollout, sizes["samples"], subject.seed) for group in groups]
    # copies in float64: the identities are exact
    together: dict[str, Any] = {"samples_per_pass": sizes["samples"]}
    start = copy.deepcopy(subject.model).double()
    old_GBK = torch.stack([score_samples(start, plan, **together) for plan in plans])
    rows = []
    for updates, policy in common.moved(settings, SNAPSHOTS[: sizes["snapshots"]]):
        policy = policy.double()
        new_GBK = torch.stack([score_samples(policy, plan, **together) for plan in plans])
        delta_GB = (new_GBK - old_GBK).mean(-1)
        row: Figures = {"updates": updates, "distance": statistics.ratio(delta_GB.abs().mean(1)), "violations": 0}
        for sign in (1.0, -1.0):
            objective_GB = sign * delta_GB.exp()
            bound_GB = torch.stack(
                [
                    torch.stack([-bgpo(new_BK[b : b + 1], old_BK[b : b + 1], torch.tensor([sign])) for b in range(len(new_BK))])
                    for new_BK, old_BK in zip(new_GBK, old_GBK, strict=True)
                ]
            )
            gap_GB = objective_GB - bound_GB
            row["violations"] += int((gap_GB < -EXACTLY * (1 + objective_GB.abs())).sum())
            row[f"gap {sign:+.0f}"] = statistics.ratio(gap_GB.mean(1))
            row[f"value differs {sign:+.0f}"] = float(gap_GB.abs().max())
        ours_GP, ratio_GP = [], []
        for group, plan, old_BK in zip(groups, plans, old_GBK, strict=True):
            if not group.has_signal:
                continue
            advantages_B = group_advantages(group.rewards_B.double(), group.group_ids_B, kind="std")
            per_sample = {"old_sample_elbo": old_BK}
            ours_GP.append(common.gradient(policy, plan, BGPO, Batch({"advantages": advantages_B}, per_sample))[0])
            batch = Batch({"advantages": advantages_B, "old_elbo": old_BK.mean(-1)})
            ratio_GP.append(common.gradient(policy, plan, ELBO_RATIO, batch)[0])
        row |= _alignment(torch.stack(ours_GP), torch.stack(ratio_GP))
        rows.append(row)
    return {"sequences": sizes["prompts"] * sizes["group"], "rows": rows}


def _alignment(ours_GP: Tensor, ratio_GP: Tensor) -> Figures:
    """Cosine of the two gradients of a batch of all groups, and the largest difference within one."""
    products = {"cross": ours_GP @ ratio_GP.t(), "ours": ours_GP @ ours_GP.t(), "ratio": ratio_GP @ ratio_GP.t()}
    weight_XG = torch.cat([torch.ones(1, len(ours_GP), dtype=torch.float64), statistics.resampled(len(ours_GP))])
    form = {name: ((weight_XG @ gram_GG) * weight_XG).sum(-1) for name, gram_GG in products.items()}
    cosine_X = form["cross"] / (form["ours"] * form["ratio"]).sqrt()
    differs = (ours_GP - ratio_GP).norm(dim=1) / ratio_GP.norm(dim=1)
    return {"cosine": statistics.spread(float(cosine_X[0]), cosine_X[1:]), "gradient differs": float(differs.max())}


def bound_verdict(figures: Figures) -> str:
    violated = any(row["violations"] for row in figures["rows"])
    start = next(row for row in figures["rows"] if row["updates"] == 0)
    differs = max(start[key] for key in ("value differs +1", "value differs -1", "gradient differs"))
    return common.decide(not violated and differs < EXACTLY, violated or differs >= EXACTLY)


def bound_table(figures: Figures) -> str:
    return common.lines_of(
        figures["rows"],
        {
            "updates since the rollout": "updates",
            "mean abs. ELBO difference (nats)": "distance",
            "violations": lambda row: f"{row['violations']} of {2 * figures['sequences']}",
            "gap, A = 1": "gap +1",
            "gap, A = -1": "gap -1",
            "cosine of the batch's gradients": "cosine",
        },
    )


def memory(_: Settings) -> Figures:
    algorithms = json.loads((RESULTS / "memory-of-algorithms.json").read_text())["rows"]
    ours = next(row for row in algorithms if row["algorithm"] == "bgpo")
    rows = json.loads((RESULTS / "cpu.json").read_text())["suites"]["bgpo"]["rows"]
    by_samples = {
        who: {
            str(row["sizes"]["K"]): row["memory_mib"]
            for row in rows
            if row["contestant"] == who and row["case"].startswith("n_t=")
        }
        for who in ("ours", "full graph")
    }
    return {
        "sources": ["memory-of-algorithms.json", "cpu.json"],
        "growth from 2 to 64": {
            who: {"baseline": ours[f"{key}, baseline MiB"], "growth": ours[f"{key}, growth MiB"]}
            for who, key in (("ours", "engine"), ("full graph", "full graph"))
        },
        "peak MiB": by_samples,
    }


def slopes(figures: Figures, who: str) -> list[float]:
    """MiB per sample between consecutive n_t from 2 on."""
    points = sorted((int(k), mib) for k, mib in figures["peak MiB"][who].items() if int(k) >= 2)
    return [(b - a) / (m - n) for (n, a), (m, b) in itertools.pairwise(points)]


def memory_verdict(figures: Figures) -> str:
    growth = {who: x["growth"] / x["baseline"] for who, x in figures["growth from 2 to 64"].items()}
    ours, full = figures["peak MiB"]["ours"], slopes(figures, "full graph")
    growth["ours, again"] = ours["32"] / ours["2"] - 1
    flat = growth["ours"] <= 0.05 and growth["ours, again"] <= 0.05
    linear = min(full) > 0 and max(full) <= 1.25 * min(full) and growth["full graph"] > 10 * max(growth["ours"], 0.01)
    return common.decide(flat and linear, growth["ours"] > 0.05 or growth["ours, again"] > 0.05)


def memory_table(figures: Figures) -> str:
    rows = [{"who": who, "step": slopes(figures, who), **points} for who, points in figures["peak MiB"].items()]

    def growth(row: Figures) -> str:
        found = figures["growth from 2 to 64"][row["who"]]
        return f"{two_digits(found['baseline'])} + {two_digits(found['growth'])}"

    return common.lines_of(
        rows,
        {
            "peak memory, MiB": lambda row: "engine" if row["who"] == "ours" else row["who"],
            "2 samples + growth to 64": growth,
            **{f"n_t = {k}": lambda row, k=k: two_digits(row[str(k)]) for k in (2, 4, 8, 16, 32)},  # type: ignore[misc]
            "MiB per sample": lambda row: f"{min(row['step']):.1f} to {max(row['step']):.1f}",
        },
    )


samples_sizes = Tiers(
    tiny={"prompts": 3, "group": 4, "replicates": 2, "reference": 16},
    usual={"prompts": 48, "group": 8, "replicates": 8, "reference": 256},
)


def samples(settings: Settings) -> Figures:
    sizes, subject = samples_sizes(settings), common.load(settings)
    groups = subject.with_signal(sizes["prompts"], sizes["group"])
    counts = COUNTS[:2] if settings.tiny else COUNTS
    error_NG: dict[int, list[float]] = {n: [] for n in counts}
    spread_NG: dict[int, list[float]] = {n: [] for n in counts}
    truth_GP = []
    for group in groups:
        advantages_B = group_advantages(group.rewards_B, group.group_ids_B, kind="std")

        def drawn(n: int, seed: int, group: Group = group, advantages_B: Tensor = advantages_B) -> Tensor:
            plan = subject.plan(group.rollout, n, seed)
            batch = Batch({"advantages": advantages_B})
            return common.gradient(subject.model, plan, BGPO, batch, len(advantages_B), samples_per_pass=16)[0].double()

        truth_P = drawn(sizes["reference"], 1000)
        truth_GP.append(truth_P)
        for n in counts:
            draws_RP = torch.stack([drawn(n, 1 + r) for r in range(sizes["replicates"])])
            error_NG[n].append(float((draws_RP - truth_P).square().sum(-1).mean()))
            spread_NG[n].append(statistics.moments(draws_RP)[0])
    norm_G = torch.stack(truth_GP).square().sum(-1)
    between = statistics.moments(torch.stack(truth_GP))[0]
    rows = [
        {
            "n_t": n,
            "error": statistics.ratio(torch.tensor(error_NG[n]), norm_G),
            "over n_t = 1": statistics.ratio(torch.tensor(error_NG[n]), torch.tensor(error_NG[counts[0]])),
            # of the gradient of a batch of prompts: the masks' part beside that of prompts and completions
            "share of the batch": statistics.ratio(torch.tensor(spread_NG[n]), torch.tensor(spread_NG[n]) + between),
        }
        for n in counts
    ]
    return {"groups": len(groups), "rows": rows}


def samples_verdict(figures: Figures) -> str:
    """Each doubling counts, by the paired ratio of the largest n_t to one sample."""
    last, values = figures["rows"][-1]["over n_t = 1"], [row["error"]["value"] for row in figures["rows"]]
    falls = all(b < a for a, b in itertools.pairwise(values))
    return common.decide(last["high"] < 1 and falls, last["low"] > 1)


samples_table = common.table(
    {
        "n_t": "n_t",
        "squared error over squared norm, one group": "error",
        "over that of n_t = 1": "over n_t = 1",
        "masks' share of the variance among groups": "share of the batch",
    }
)


CLAIMS = (
    Claim(
        "bgpo-bound",
        "BGPO",
        "its objective is a lower bound of the ELBO ratio's for both signs of A, equal in value and gradient on-policy",
        "confirmed if no sequence violates the bound and on-policy values and gradients agree to 1e-9; else refuted",
        bound_sizes,
        bound,
        bound_verdict,
        bound_table,
    ),
    Claim(
        "bgpo-memory",
        "BGPO",
        "memory is constant in n_t from 2 on, where the graph of all samples grows linearly",
        "confirmed if the engine's peak grows by 5 % at most and the graph's by the same amount per sample, within a quarter",
        lambda _: {},
        memory,
        memory_verdict,
        memory_table,
    ),
    Claim(
        "bgpo-samples",
        "BGPO",
        "a larger n_t lowers the gradient's error",
        "confirmed if the error falls at every doubling and at the largest n_t lies below that of 1 with its interval",
        samples_sizes,
        samples,
        samples_verdict,
        samples_table,
    ),
)
