"""EGSPO and EGSPO-SA (arXiv 2603.12554): train at the steps of highest entropy; stepwise advantages.

Source: the public code, of the paper the abstract and notes. Measured on the model's own rollouts, one token
a step:

    steps     the gradient of every single step, by `accumulate` on `trajectory_rows`. From their inner
              products follows the squared error of any choice of J steps against all T, for a sequence and
              for a group under its advantages. Entropy's error over that of uniform and of random steps
              decides; half the cells are clues, merely copied, so random steps among the open cells are the
              opponent to beat; the J largest gradients show what is possible.
    bound     the paper bounds that error by a constant times the sum of the entropies left out. The constant
              is not known, so what is tested is that the two rank alike, over random choices of steps.
    stepwise  groups drawn again and again for the same prompts: variance of a group's gradient with lambda =
              0.5 over that with lambda = 0, and whether the expectation changes. The reward of the greedy
              completion before a step depends on the state alone, so it is a baseline; a better signal is
              less variance at the same expectation. Under the demo's reward, a right grid or none, and, at
              the large sizes, under a graded one, the share of open cells that are right.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.studies import common, statistics
from benchmarks.studies.common import Claim, Column, Figures, Group, Settings, Subject, Tiers
from dllm_kernels import select_steps, step_entropy, trajectory_rows
from dllm_kernels.accumulation.objective import Batch
from dllm_kernels.objectives import egspo_objective, egspo_sa_objective, group_advantages, stepwise_returns

BUDGETS = (2, 4, 8)
RANDOM_DRAWS = 16
HOWS = ("entropy", "uniform", "random", "random, open cells", "largest gradient")
ONE_STEP = egspo_objective(beta=0.0, tokens_per_step=1.0)
STEPWISE = egspo_sa_objective(beta=0.0, tokens_per_step=1.0)
LAMBDA = 0.5
RANK_ALIKE = 0.5


@dataclass(frozen=True)
class Steps:
    """One group: inner products of the gradients of all its (sequence, step), and their entropies."""

    group: Group
    gram_NN: Tensor  # float64, N = G * T, a sequence's steps together
    entropy_TB: Tensor


steps_sizes = Tiers(tiny={"prompts": 3, "group": 2}, usual={"prompts": 32, "group": 8})


@functools.lru_cache(maxsize=1)
def measured(settings: Settings) -> list[Steps]:
    sizes, subject = steps_sizes(settings), common.load(settings)
    found = []
    for group in subject.groups(sizes["prompts"], sizes["group"]):
        rollout = group.rollout
        entropy_TB = step_entropy(rollout.commit_entropy_BL, rollout.commit_step_BL)
        plan = trajectory_rows(rollout)
        one = Batch({"advantages": torch.ones(1)})
        gradient_NP = torch.stack(
            [
                common.gradient(
                    subject.model, plan.cut(sequences=slice(b, b + 1), samples=slice(k, k + 1)), ONE_STEP, one, **opts
                )[0]
                for opts in [subject.rollout_options()]
                for b in range(plan.shape[1])
                for k in range(plan.shape[0])
            ]
        )
        found.append(Steps(group, (gradient_NP @ gradient_NP.t()).double(), entropy_TB))
    return found


def left_out(steps: Steps, how: str, J: int, seed: int) -> Tensor:
    """bool `[B, T]`: the steps that a choice of J leaves out."""
    T, B = steps.entropy_TB.shape
    if how == "largest gradient":
        chosen_BJ = steps.gram_NN.diagonal().view(B, T).topk(J, dim=1).indices
    elif how == "random, open cells":
        step_BL = steps.group.rollout.commit_step_BL.long()
        open_BT = torch.zeros(B, T).scatter_(1, step_BL, steps.group.empty_L.float().expand(B, -1))
        draw_BT = torch.rand(B, T, generator=torch.Generator().manual_seed(seed))
        chosen_BJ = (open_BT + draw_BT).topk(J, dim=1).indices  # steps that copy a clue come last
    else:
        ids = steps.group.rollout.sequence_ids_B
        chosen_BJ = select_steps(steps.entropy_TB, J, how, seed=seed, sequence_ids=ids)
    return torch.ones(B, T, dtype=torch.bool).scatter_(1, chosen_BJ, False)


def form(gram_NN: Tensor, weight_BT: Tensor, *, within: bool) -> Tensor:
    """Squared norm of the weighted sum of step gradients: of the group, or `[B]` of each sequence."""
    B, T = weight_BT.shape
    if not within:
        flat_N = weight_BT.double().reshape(-1)
        return flat_N @ gram_NN @ flat_N
    gram_BTT = torch.stack([gram_NN[b * T : (b + 1) * T, b * T : (b + 1) * T] for b in range(B)])
    return torch.einsum("bs,bst,bt->b", weight_BT.double(), gram_BTT, weight_BT.double())


def steps(settings: Settings) -> Figures:
    found = measured(settings)
    rows = []
    for J in BUDGETS:
        error: dict[str, dict[str, Tensor]] = {"sequence": {}, "group": {}}
        relative: dict[str, Tensor] = {}
        norm: dict[str, list[Tensor]] = {"sequence": [], "group": []}
        for how in HOWS:
            by_sequence, by_group, by_median = [], [], []
            norm = {"sequence": [], "group": []}
            for s in found:
                advantages_B = group_advantages(s.group.rewards_B, s.group.group_ids_B, kind="mean")
                draws = [left_out(s, how, J, seed) for seed in range(RANDOM_DRAWS if "random" in how else 1)]
                all_BT = torch.ones_like(draws[0])
                missing_RB = torch.stack([form(s.gram_NN, m_BT, within=True) for m_BT in draws])
                whole_B = form(s.gram_NN, all_BT, within=True)
                by_sequence.append(missing_RB.mean())
                by_median.append((missing_RB / whole_B).mean(0))
                weighed = [form(s.gram_NN, m_BT * advantages_B[:, None], within=False) for m_BT in draws]
                by_group.append(torch.stack(weighed).mean())
                norm["sequence"].append(whole_B.mean())
                norm["group"].append(form(s.gram_NN, all_BT * advantages_B[:, None], within=False))
            error["sequence"][how], error["group"][how] = torch.stack(by_sequence), torch.stack(by_group)
            relative[how] = torch.stack(by_median)
        for how in HOWS:
            row: Figures = {"J": J, "how": how, "median": _median(relative[how])}
            for unit in ("sequence", "group"):
                row[unit] = statistics.ratio(error[unit][how], torch.stack(norm[unit]))
                row[f"{unit}, entropy over it"] = statistics.ratio(error[unit]["entropy"], error[unit][how])
            rows.append(row)
    return {"T": len(found[0].entropy_TB), "groups": len(found), "rows": rows}


def _median(relative_GB: Tensor) -> Figures:
    generator = torch.Generator().manual_seed(0)
    index_XG = torch.randint(len(relative_GB), (500, len(relative_GB)), generator=generator)
    return statistics.spread(float(relative_GB.flatten().median()), relative_GB[index_XG].flatten(1).median(1).values)


def steps_verdict(figures: Figures) -> str:
    found = [
        row[f"{unit}, entropy over it"]
        for row in figures["rows"]
        if row["how"] in ("uniform", "random", "random, open cells")
        for unit in ("sequence", "group")
    ]
    return common.decide(all(x["high"] < 1 for x in found), all(x["low"] > 1 for x in found))


def steps_table(figures: Figures) -> str:
    def over(unit: str) -> Column:
        return lambda row: "" if row["how"] == "entropy" else common.shown(row[f"{unit}, entropy over it"])

    return common.lines_of(
        figures["rows"],
        {
            f"steps of {figures['T']}": "J",
            "choice": "how",
            "sequence: median error": "median",
            "sequence: summed error": "sequence",
            "entropy's over it": over("sequence"),
            "group with advantages: summed error": "group",
            "entropy's over it ": over("group"),
        },
    )


def bound(settings: Settings) -> Figures:
    """Random choices of each sequence's steps: the error's norm beside the entropies left out."""
    found = measured(settings)
    errors, entropies = [], []
    for s in found:
        draws = [left_out(s, "random", J, seed) for J in BUDGETS for seed in range(RANDOM_DRAWS)]
        errors.append(torch.cat([form(s.gram_NN, m_BT, within=True).clamp(min=0).sqrt() for m_BT in draws]))
        entropies.append(torch.cat([(s.entropy_TB.t() * m_BT).sum(1) for m_BT in draws]).double())
    error_GN, entropy_GN = torch.stack(errors), torch.stack(entropies)
    generator = torch.Generator().manual_seed(0)
    index_XG = torch.randint(len(found), (500, len(found)), generator=generator)
    by_resample = torch.stack([rank_correlation(entropy_GN[i].flatten(), error_GN[i].flatten()) for i in index_XG])
    constant_N = (error_GN / entropy_GN).flatten()
    quantiles = torch.quantile(constant_N[torch.randperm(len(constant_N), generator=generator)[:100000]], _tail())
    return {
        "choices": error_GN.numel(),
        "correlation": statistics.spread(float(rank_correlation(entropy_GN.flatten(), error_GN.flatten())), by_resample),
        "constant": dict(zip(("median", "95 %", "largest"), [*quantiles.tolist(), float(constant_N.max())], strict=True)),
    }


def _tail() -> Tensor:
    return torch.tensor([0.5, 0.95], dtype=torch.float64)


def rank_correlation(x_N: Tensor, y_N: Tensor) -> Tensor:
    """Spearman's; ties are few among real numbers."""
    ranks = [v_N.argsort().argsort().double() for v_N in (x_N, y_N)]
    a_N, b_N = (r_N - r_N.mean() for r_N in ranks)
    return (a_N @ b_N) / (a_N.norm() * b_N.norm())


def bound_verdict(figures: Figures) -> str:
    found = figures["correlation"]
    return common.decide(found["low"] > RANK_ALIKE, found["high"] < RANK_ALIKE)


def bound_table(figures: Figures) -> str:
    def constant(key: str) -> Column:
        return lambda row: f"{row['constant'][key]:.3g}"

    return common.lines_of(
        [figures],
        {
            "random choices of steps": "choices",
            "rank correlation of error and left-out entropy": "correlation",
            "error / entropy: median": constant("median"),
            "95 %": constant("95 %"),
            "largest": constant("largest"),
        },
    )


stepwise_sizes = Tiers(
    tiny={"prompts": 2, "groups": 3, "group": 2, "steps": 4, "rewards": 2},
    usual={"prompts": 24, "groups": 16, "group": 8, "steps": 8},
    large={"prompts": 48, "groups": 16, "group": 8, "steps": 8, "rewards": 2},
)
GRADED = "reference_cells"


def stepwise(settings: Settings) -> Figures:
    sizes = stepwise_sizes(settings)
    rewards = {"right grid or none": settings.reward, "share of right cells": GRADED}
    rewards = dict(list(rewards.items())[: sizes.get("rewards", 1)])
    choices = {f"{sizes['steps']} of highest entropy": sizes["steps"], "all": None}

    @functools.lru_cache(maxsize=1)
    def subject() -> Subject:
        return common.load(settings)

    @functools.lru_cache(maxsize=1)
    def completions(prompt: int) -> Group:
        example = subject().examples(prompt + 1)[prompt]
        return subject().group(example, sizes["group"] * sizes["groups"], greedy=True)

    def found_at(prompt: int, reward: str, J: int | None) -> dict[str, float] | None:
        pool = subject().judged(completions(prompt), subject().examples(prompt + 1)[prompt], reward)
        return _pool(subject(), pool, sizes["group"], sizes["groups"], J) if pool.has_signal else None

    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    of_a_prompt = {"group": sizes["group"], "groups": sizes["groups"]}
    for prompt in range(sizes["prompts"]):
        for reward, key in rewards.items():
            for name, J in choices.items():
                make = functools.partial(found_at, prompt, key, J)
                values = settings.part("egspo-stepwise", make, prompt=prompt, reward=key, steps=J, **of_a_prompt)
                if values is not None:
                    found.setdefault((reward, name), []).append(values)
    if not found:
        raise ValueError(
            f"--checkpoint must be a model that solves some puzzles and not all, {sizes['prompts']} prompts had no signal"
        )
    rows = []
    for reward, name in sorted(found, key=lambda pair: (list(rewards).index(pair[0]), list(choices).index(pair[1]))):
        pools = found[reward, name]
        column = {key: torch.tensor([values[key] for values in pools], dtype=torch.float64) for key in pools[0]}
        rows.append(
            {
                "reward": reward,
                "prompts": len(pools),
                "steps": name,
                "variance": statistics.ratio(column["variance, stepwise"], column["variance, plain"]),
                "change of the expectation": statistics.ratio(column["change"], column["norm, plain"]),
                "signal, plain": statistics.ratio(column["norm, plain"], column["variance, plain"]),
                "signal, stepwise": statistics.ratio(column["norm, stepwise"], column["variance, stepwise"]),
                "signal": _double_ratio(column),
            }
        )
    return {"groups": sizes["groups"], "lambda": LAMBDA, "rows": rows}


def _double_ratio(column: dict[str, Tensor]) -> Figures:
    """Squared norm of the expectation over variance: stepwise over plain."""
    weight_XU = statistics.resampled(len(column["norm, plain"]))
    summed = {key: torch.cat([values_U.sum()[None], weight_XU @ values_U]) for key, values_U in column.items()}
    signal = {way: summed[f"norm, {way}"] / summed[f"variance, {way}"] for way in ("stepwise", "plain")}
    found_X = signal["stepwise"] / signal["plain"]
    return statistics.spread(float(found_X[0]), found_X[1:])


def _pool(subject: Subject, pool: Group, G: int, R: int, J: int | None) -> dict[str, float]:
    """Moments of R groups' gradients on the same rollouts, with and without stepwise advantages."""
    assert pool.greedy_rewards_BT is not None
    plain_RP: list[Tensor] = []
    stepwise_RP: list[Tensor] = []
    for r in range(R):
        here = torch.arange(r * G, (r + 1) * G)
        rollout, rewards_B = pool.rollout.kept(here), pool.rewards_B[here]
        entropy_TB = step_entropy(rollout.commit_entropy_BL, rollout.commit_step_BL)
        steps_BJ = select_steps(entropy_TB, len(entropy_TB) if J is None else J)
        if J is None:  # columns are then steps, which is what a group's mean at one rank is taken over
            steps_BJ = steps_BJ.sort(1).values
        plan = trajectory_rows(rollout, steps_BJ)
        seen_BJ = pool.greedy_rewards_BT[here].gather(1, steps_BJ)
        for lam, into in ((0.0, plain_RP), (LAMBDA, stepwise_RP)):
            returns_BJ = stepwise_returns(rewards_B, seen_BJ, lam=lam)
            advantages_BJ = group_advantages(returns_BJ, torch.zeros(G, dtype=torch.int64), kind="mean")
            batch = Batch({}, {"step_advantages": advantages_BJ})
            into.append(common.gradient(subject.model, plan, STEPWISE, batch, G, **subject.rollout_options())[0])
    plain, stepped = torch.stack(plain_RP), torch.stack(stepwise_RP)
    found = {}
    for way, draws_RP in (("plain", plain), ("stepwise", stepped)):
        found[f"variance, {way}"], found[f"norm, {way}"] = statistics.moments(draws_RP)
    return {**found, "change": statistics.moments(stepped - plain)[1]}


def stepwise_verdict(figures: Figures) -> str:
    found = [row["variance"] for row in figures["rows"]]
    signal = [row["signal"] for row in figures["rows"]]
    better = all(x["high"] < 1 for x in found) and all(x["low"] > 1 for x in signal)
    return common.decide(better, all(x["low"] > 1 for x in found) or all(x["high"] < 1 for x in signal))


stepwise_table = common.table(
    {
        "reward": lambda row: row.get("reward", "right grid or none"),
        "steps": "steps",
        "variance, over that of lambda = 0": "variance",
        "change of the expectation, squared, relative": "change of the expectation",
        "signal over noise, lambda = 0": "signal, plain",
        "signal over noise, stepwise": "signal, stepwise",
        "stepwise over lambda = 0": "signal",
    }
)


CLAIMS = (
    Claim(
        "egspo-steps",
        "EGSPO",
        "the steps of highest entropy give the gradient of all steps better than uniform or random ones",
        "confirmed if entropy's squared error over uniform's and over both random ones' lies below 1 with its interval, at every "
        "J, for sequences and for groups; refuted if always above",
        steps_sizes,
        steps,
        steps_verdict,
        steps_table,
    ),
    Claim(
        "egspo-bound",
        "EGSPO",
        "the gradient's error is governed by the sum of the entropies of the steps left out",
        "confirmed if the rank correlation lies above 0.5 with its interval, refuted if below",
        steps_sizes,
        bound,
        bound_verdict,
        bound_table,
        caveat="as a rank correlation, not as a bound: the paper's constant is not known",
    ),
    Claim(
        "egspo-stepwise",
        "EGSPO-SA",
        "stepwise advantages from intermediate rewards give a better gradient than one advantage per sequence",
        "confirmed if the variance over that of lambda = 0 lies below 1 and signal over noise above 1 with their intervals, for "
        "chosen and for all steps and under every reward measured; refuted if one of them is on the other side for all",
        stepwise_sizes,
        stepwise,
        stepwise_verdict,
        stepwise_table,
    ),
)
