"""RSPO (arXiv 2605.10218): residual weights stay stable under noisy likelihoods, where ratios do not.

Source: the abstract, a digest and one third-party port; the paper's equations were not read, so what is
tested is that port's form (`dllm_kernels/objectives/rspo.py`). Two measurements, with the same masks for all
contestants:

    gradient  a policy that has moved away from the one that drew the completions; each sequence's ELBO and
              its gradient under single masks. From them follow a group's gradients with K masks under every
              objective, whose coefficients are those of the library's loss. Squared error against the same
              objective with many masks: RSPO's coefficients are linear in the noisy ELBO difference, those of
              GDPO and ESPO exponentiate it. Fixed coefficients (lambda = 0) show the noise that no weight
              removes.
    training  updates by the trainer with one mask and several inner iterations, from one checkpoint, over
              seeds: change of accuracy on unseen puzzles. Intervals are Student's over the seeds.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from dllm_trainer.errors import GuardError
from dllm_trainer.train.evaluation import evaluate
from dllm_trainer.train.optimization import make_optimizer
from dllm_trainer.train.rl import rl_updates
from torch import Tensor, nn

from benchmarks.report import two_digits
from benchmarks.studies import common, statistics
from benchmarks.studies.common import Claim, Column, Figures, Group, Settings, Subject, Tiers
from dllm_kernels.accumulation.objective import Batch
from dllm_kernels.accumulation.scores import score_samples
from dllm_kernels.objectives import BGPO, espo, gdpo, group_advantages, rspo

# of ELBO, old and reference ELBO, advantages, lengths
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
OBJECTIVES: dict[str, Loss] = {
    "RSPO": lambda elbo, old, adv, length: rspo(elbo, old, adv, length),
    "fixed coefficients": lambda elbo, old, adv, length: rspo(elbo, old, adv, length, lam=0.0),
    "GDPO, paper": lambda elbo, old, adv, length: gdpo(elbo, old, adv, length, mode="paper"),
    "GDPO, code": lambda elbo, old, adv, length: gdpo(elbo, old, adv, length, mode="code"),
    "ESPO": lambda elbo, old, adv, length: espo(elbo, old, old, adv, length),
}
RAW, PER_TOKEN = ("GDPO, paper",), ("GDPO, code", "ESPO")  # ratios of ELBOs, and of ELBOs over the length
COUNTS = (1, 2, 4, 16)  # K
LAW = {"law": "exact", "pairing": "independent"}  # so that K masks are any K of them
COLLAPSE = -0.1  # of accuracy
STUDENT = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 8: 2.365, 16: 2.131}  # 97.5 % quantile by number of seeds


gradient_sizes = Tiers(
    tiny={"prompts": 2, "group": 3, "masks": 4, "reference": 8, "near": 1, "far": 2},
    usual={"prompts": 24, "group": 8, "masks": 32, "reference": 256, "near": 4, "far": 40},
)


@functools.lru_cache(maxsize=1)  # for both claims
def gradients(settings: Settings) -> Figures:
    sizes, subject = gradient_sizes(settings), common.load(settings)
    groups = subject.with_signal(sizes["prompts"], sizes["group"])
    rows: list[Figures] = []
    for updates, policy in common.moved(settings, (sizes["near"], sizes["far"])):
        errors: dict[tuple[str, int], list[float]] = {}
        norms: dict[str, list[float]] = {name: [] for name in OBJECTIVES}
        distance: list[float] = []
        silent: dict[str, list[float]] = {name: [] for name in OBJECTIVES}
        for group in groups:
            scored = _scores(subject, group, policy, sizes)
            B, M = scored["elbo"].shape
            # all that is wanted are norms of weighted sums of these gradients
            every_NP = torch.cat([scored["gradient"].flatten(0, 1), scored["true gradient"]])
            gram_NN = (every_NP @ every_NP.t()).double()
            distance.append(float((scored["true elbo"] - scored["true old"]).abs().mean()))
            for name in OBJECTIVES:
                truth_B = coefficients(name, group, scored["true elbo"], scored["true old"])
                norms[name].append(float(truth_B @ gram_NN[B * M :, B * M :] @ truth_B))
                silent[name].append(float((truth_B == 0).float().mean()))
                for K in (k for k in COUNTS if k <= M // 2):
                    found = []
                    for first in range(0, M - K + 1, K):
                        block = slice(first, first + K)
                        got_B = coefficients(name, group, *(scored[key][:, block].mean(1) for key in ("elbo", "old")))
                        weight_BM = torch.zeros(B, M, dtype=torch.float64)
                        weight_BM[:, block] = got_B[:, None] / K
                        weight_N = torch.cat([weight_BM.flatten(), -truth_B])
                        found.append(weight_N @ gram_NN @ weight_N)
                    errors.setdefault((name, K), []).append(float(torch.stack(found).mean()))
        rows += _rows(updates, distance, errors, norms, silent)
    return {"groups": len(groups), "rows": rows}


def _rows(updates: int, distance: list[float], errors: dict, norms: dict, silent: dict) -> list[Figures]:
    rows = []
    for (name, K), error in errors.items():
        error_G, norm_G = torch.tensor(error), torch.tensor(norms[name])
        ours_G, our_norm_G = torch.tensor(errors["RSPO", K]), torch.tensor(norms["RSPO"])
        rows.append(
            {
                "updates": updates,
                "distance": statistics.ratio(torch.tensor(distance)),
                "objective": name,
                "K": K,
                "error": statistics.ratio(error_G, norm_G),
                # each relative to the objective's own scale over all groups
                "over RSPO": statistics.ratio(error_G / norm_G.sum(), ours_G / our_norm_G.sum()),
                "clipped": statistics.ratio(torch.tensor(silent[name])),
            }
        )
    return rows


def _scores(subject: Subject, group: Group, policy: nn.Module, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Per single mask ELBO `[B, M]`, the old policy's, gradient `[B, M, P]`; and the same from many masks."""
    one = Batch({"advantages": -torch.ones(1)})  # on-policy BGPO with A = -1 is the ELBO itself
    plan = subject.plan(group.rollout, sizes["masks"], 3, **LAW)
    many = subject.plan(group.rollout, sizes["reference"], 4)
    together: dict[str, Any] = {"samples_per_pass": 16}
    found: dict[str, list[Tensor]] = {"elbo": [], "gradient": [], "true elbo": [], "true gradient": []}
    for b in range(len(group.rewards_B)):
        flat, elbo = [], []
        for k in range(sizes["masks"]):
            got_P, report = common.gradient(policy, plan.cut(sequences=slice(b, b + 1), samples=slice(k, k + 1)), BGPO, one)
            flat.append(got_P * sizes["masks"])  # a cut's share of the plan's samples
            elbo.append(report.sample_elbo_BK[0])
        found["elbo"].append(torch.cat(elbo))
        found["gradient"].append(torch.stack(flat))
        got_P, report = common.gradient(policy, many.cut(sequences=slice(b, b + 1)), BGPO, one, **together)
        found["true elbo"].append(report.sample_elbo_BK[0].mean())
        found["true gradient"].append(got_P)
    scores = {key: torch.stack(values) for key, values in found.items()}
    scores["old"] = score_samples(subject.model, plan, **together)
    scores["true old"] = score_samples(subject.model, many, **together).mean(1)
    return scores


def coefficients(name: str, group: Group, elbo_B: Tensor, old_B: Tensor) -> Tensor:
    """`d loss / d ELBO_b` of a group's loss, float64; 0 where the clip silences a sequence."""
    advantages_B = group_advantages(group.rewards_B, group.group_ids_B, kind="std")
    lengths_B = torch.full((len(elbo_B),), group.rollout.commit_step_BL.shape[1])
    leaf_B = elbo_B.clone().requires_grad_()
    return torch.autograd.grad(OBJECTIVES[name](leaf_B, old_B, advantages_B, lengths_B), leaf_B)[0].double()


def gradient_verdict(ratios: tuple[str, ...]) -> Callable[[Figures], str]:
    def verdict(figures: Figures) -> str:
        far = max(row["updates"] for row in figures["rows"])
        found = [r["over RSPO"] for r in figures["rows"] if r["updates"] == far and r["K"] == 1 and r["objective"] in ratios]
        return common.decide(all(x["low"] > 1 for x in found), all(x["high"] < 1 for x in found))

    return verdict


def gradient_table(figures: Figures) -> str:
    at = {(r["updates"], r["objective"], r["K"]): r for r in figures["rows"]}

    def error(count: int) -> Column:
        return lambda row: common.shown(at[row["updates"], row["objective"], count]["error"])

    return common.lines_of(
        [row for row in figures["rows"] if row["K"] == 1],
        {
            "updates": "updates",
            "mean abs. ELBO difference (nats)": "distance",
            "objective": "objective",
            "share clipped": "clipped",
            **{f"error, K = {count}": error(count) for count in sorted({r["K"] for r in figures["rows"]})},
            "K = 1: error over RSPO's": lambda row: "" if row["objective"] == "RSPO" else common.shown(row["over RSPO"]),
        },
    )


training_sizes = Tiers(
    tiny={"seeds": 2, "updates": 1, "prompts": 2, "inner": 2, "puzzles": 8},
    usual={"seeds": 4, "updates": 25, "prompts": 8, "inner": 4, "puzzles": 512},
    large={"seeds": 16, "updates": 25, "prompts": 8, "inner": 4, "puzzles": 512},
)
CONTESTANTS: dict[str, dict[str, Any]] = {  # options of the objective that a name begins with
    "RSPO": {},
    "GDPO, paper": {"mode": "paper"},
    "GDPO, code": {"mode": "code"},
    "ESPO": {},
    "ESPO, beta = 0": {"beta": 0.0},
}


def training(settings: Settings) -> Figures:
    sizes = training_sizes(settings)
    runs: dict[str, list[Figures]] = {name: [] for name in CONTESTANTS}
    of_a_run = {key: value for key, value in sizes.items() if key != "seeds"}
    for seed in range(sizes["seeds"]):  # a stopped experiment has few seeds of all rather than many of some
        for name, mode in CONTESTANTS.items():
            options = [f"rl.options.{key}={value}" for key, value in mode.items()]

            def run(name: str = name, options: list[str] = options, seed: int = seed) -> Figures:
                return _run(settings, sizes, name.split(",")[0].lower(), seed, options)

            runs[name].append(settings.part("rspo-training", run, objective=name, run=seed, **of_a_run))
    ours = torch.tensor([run["gain"] for run in runs["RSPO"]], dtype=torch.float64)
    rows = []
    for name, found in runs.items():
        gain_R = torch.tensor([run["gain"] for run in found], dtype=torch.float64)
        rows.append(
            {
                "objective": name,
                "before": sum(run["before"] for run in found) / len(found),
                "gains": gain_R.tolist(),
                "gain": _student(gain_R),
                "collapsed": sum(run["gain"] < COLLAPSE or run["stopped"] != "" for run in found),
                "RSPO minus it": _student(ours - gain_R),
                "largest ratio": max(run["largest ratio"] for run in found),
                "clipped": sum(run["clipped"] for run in found) / len(found),
            }
        )
    return {"rows": rows}


def _run(settings: Settings, sizes: Mapping[str, int], algorithm: str, seed: int, options: list[str]) -> Figures:
    """Accuracy on unseen puzzles before and after; puzzles, noise and data order depend on the seed alone."""
    subject = common.load(
        settings,
        f"rl.algorithm={algorithm}",
        "rl.law=exact",
        "rl.samples=1",
        f"rl.inner_iterations={sizes['inner']}",
        f"rl.updates={sizes['updates']}",
        f"rl.prompts={sizes['prompts']}",
        "rl.advantage=std",
        f"rl.reward={settings.reward}",
        "data_seed=0",  # another data seed would have tests among what the checkpoint was trained on
        f"seed={settings.seed + seed}",
        *options,
    )
    setup = subject.setup
    setup.reference = copy.deepcopy(setup.trained).requires_grad_(False)

    def accuracy() -> float:
        unseen = subject.examples(sizes["puzzles"])
        return float(evaluate(setup, "unseen_puzzles", unseen, setup.config.rollout)["correct"])

    # all contestants start there
    before = settings.part("rspo-training", accuracy, before=setup.config.seed, puzzles=sizes["puzzles"])
    stopped = ""
    figures: list[dict[str, float]] = []
    try:
        figures = list(rl_updates(setup, make_optimizer(setup.trained, setup.config.rl)))
    except GuardError as error:
        stopped = str(error)
    after = accuracy()
    ratios = [f["largest_ratio"] for f in figures if "largest_ratio" in f]
    clipped = [f["clip_fraction"] for f in figures if "clip_fraction" in f]
    return {
        "before": before,
        "gain": after - before,
        "stopped": stopped,
        "largest ratio": max(ratios, default=1.0),
        "clipped": sum(clipped) / max(1, len(clipped)),
    }


def _student(values_R: Tensor) -> Figures:
    mean = float(values_R.mean())
    half = STUDENT[len(values_R)] * float(values_R.std()) / math.sqrt(len(values_R))
    return {"value": mean, "low": mean - half, "high": mean + half}


def training_verdict(figures: Figures) -> str:
    ours, others = figures["rows"][0], figures["rows"][1:]
    seeds = len(ours["gains"])
    better = all(row["RSPO minus it"]["low"] > 0 for row in others)
    worse = all(row["RSPO minus it"]["high"] < 0 for row in others)
    return common.decide(better and not ours["collapsed"], worse or 2 * ours["collapsed"] > seeds)


def _points(x: Figures) -> str:
    return f"{100 * x['value']:+.1f} [{100 * x['low']:+.1f}, {100 * x['high']:+.1f}]"


training_table = common.table(
    {
        "objective": "objective",
        "accuracy before, %": lambda row: f"{100 * row['before']:.1f}",
        "change, points": lambda row: _points(row["gain"]),
        "by seed": lambda row: ", ".join(f"{100 * gain:+.1f}" for gain in row["gains"]),
        "collapsed runs": lambda row: f"{row['collapsed']} of {len(row['gains'])}",
        "RSPO minus it, points": lambda row: "" if row["objective"] == "RSPO" else _points(row["RSPO minus it"]),
        "largest ratio": lambda row: "" if row["objective"] == "RSPO" else two_digits(row["largest ratio"]),
    }
)


NOT_READ = "of a third party's form: the paper's equations were not read"


def gradient_claim(name: str, form: str, ratios: tuple[str, ...]) -> Claim:
    return Claim(
        name,
        "RSPO",
        f"residual weights make a less noisy gradient than the exponential of {form}, when ELBOs come from few masks",
        "confirmed if with one mask and the policy farthest away the relative squared error of "
        f"{' and '.join(ratios)}, over RSPO's, lies above 1 with its interval; refuted if below 1",
        gradient_sizes,
        gradients,
        gradient_verdict(ratios),
        gradient_table,
        caveat=NOT_READ,
    )


CLAIMS = (
    gradient_claim("rspo-gradient-raw", "ELBO differences", RAW),
    gradient_claim("rspo-gradient", "ELBO differences per token", PER_TOKEN),
    Claim(
        "rspo-training",
        "RSPO",
        "training with noisy estimates is stable, where ratio objectives are not",
        "confirmed if no run of RSPO loses more than 10 points and it beats each ratio objective with its interval; refuted if "
        "more than half of its runs do, or all beat it",
        training_sizes,
        training,
        training_verdict,
        training_table,
        caveat=NOT_READ,
    ),
)
