"""DMPO (arXiv 2510.08233): a baseline on the target weights is what makes small batches work.

Source: the public code, whose four baselines are "none", "neg" (its default), "mean" and "unbias". Two
measurements:

    exact   softmax policies over 5 answers with random logits and rewards, all groups enumerated (as
            multisets): the total variance of DMPO's gradient and its expectation without sampling error.
            Intervals are over the policies.
    model   many completions of each prompt, cut into groups of G; each completion's gradient by `accumulate`
            with the published masks, weights and baselines by the library. Once with the policy at its
            reference, once after updates that moved it away. R masks estimate an ELBO, 4 as published; the
            large sizes also take 16 and 64, with fewer prompts: "unbias" subtracts a softmax of the noise of
            two such estimates, and whether it helps hangs on that noise.

"mean" and "unbias" subtract 1 / G from each weight, or nearly so. In a policy whose log-probs are exact that
has no expectation, since E[grad log p] = 0; whether it has none in a model whose completions come from a
sampler and whose loss is a mean over masked tokens is the last claim. Where an expectation changes, variance
over its square is told as well.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.studies import common, statistics
from benchmarks.studies.common import Claim, Column, Figures, Group, Settings, Subject, Tiers
from dllm_kernels.accumulation.objective import Batch
from dllm_kernels.accumulation.scores import score_samples
from dllm_kernels.objectives import RECIPES, dmpo, dmpo_objective, wdce_baseline, wdce_weights

F64 = torch.float64
KINDS = ("none", "neg", "mean", "unbias")
CENTRED = ("mean", "unbias")  # which subtract 1 / G from each weight, or nearly so
EXACT = "5 answers, exact"
ANSWERS = 5
SMALL = (2, 4)  # groups that decide
SAME = 0.05  # squared change of the expectation, relative
BLOCK = 64  # groups weighed in one call: memberships are dense
SINGLE = dmpo_objective(baseline="none")


sizes_of = Tiers(
    tiny={"policies": 2, "prompts": 3, "pool": 8, "updates": 1, "largest_group": 4},
    usual={"policies": 32, "prompts": 32, "pool": 64, "updates": 10, "largest_group": 8},
    large={"policies": 32, "prompts": 128, "pool": 64, "updates": 10, "largest_group": 8, "swept_prompts": 32},
)
PUBLISHED, SWEPT = 4, (16, 64)  # R, masks of an ELBO


def sweep(sizes: Mapping[str, int]) -> dict[int, int]:
    """Prompts by R."""
    swept = dict.fromkeys(SWEPT, sizes["swept_prompts"]) if "swept_prompts" in sizes else {}
    return {PUBLISHED: sizes["prompts"], **swept}


def multisets(group: int) -> tuple[Tensor, Tensor]:
    """(answers `[M, G]`, log of the number of orders `[M]`) of all groups that differ by more than order."""
    draws = torch.tensor(list(itertools.combinations_with_replacement(range(ANSWERS), group)))
    counts = torch.nn.functional.one_hot(draws, ANSWERS).sum(1).double()
    return draws, math.lgamma(group + 1) - torch.lgamma(counts + 1).sum(1)


def exact_moments(logits: Tensor, rewards: Tensor, kind: str, group: int) -> tuple[Tensor, float]:
    """(expectation, total variance) of the gradient in the logits over all groups of that size, on-policy."""
    draws_MG, orders_M = multisets(group)
    logp = logits.log_softmax(0)
    probability_M = (logp[draws_MG].sum(1) + orders_M).exp()
    # d loss / d logits = sum_i (d loss / d logp_i) (onehot(y_i) - p)
    jacobian = torch.eye(ANSWERS, dtype=F64) - logp.exp()
    found = []
    for part_MG in draws_MG.split(BLOCK):
        coefficient_MG = _coefficients(logp[part_MG.flatten()], rewards[part_MG.flatten()], kind, group).view(-1, group)
        found.append(torch.einsum("mg,mga->ma", coefficient_MG, jacobian[part_MG]))
    gradient_MA = torch.cat(found)
    mean_A = (probability_M[:, None] * gradient_MA).sum(0)
    return mean_A, float((probability_M[:, None] * (gradient_MA - mean_A).square()).sum())


def _coefficients(elbo_B: Tensor, rewards_B: Tensor, kind: str, group: int) -> Tensor:
    """`d loss / d logp_b` of consecutive groups, by the library's own loss."""
    ids = torch.arange(len(elbo_B)) // group
    baseline = wdce_baseline(kind, rewards_B, elbo_B, elbo_B, ids, current_elbo=elbo_B)
    logp = elbo_B.clone().requires_grad_()
    loss = dmpo(logp[:, None], wdce_weights(rewards_B, elbo_B, elbo_B, ids), baseline)
    return torch.autograd.grad(loss, logp)[0]


def exact_rows(sizes: Mapping[str, int]) -> list[Figures]:
    generator = torch.Generator().manual_seed(0)
    policies = [
        (torch.randn(ANSWERS, generator=generator, dtype=F64), 0.1 * torch.rand(ANSWERS, generator=generator, dtype=F64))
        for _ in range(sizes["policies"])
    ]

    def columns(kind: str, group: int) -> dict[str, Tensor]:
        found = [exact_moments(*policy, kind, group) for policy in policies]
        plain = [exact_moments(*policy, "none", group) for policy in policies]
        return {
            "variance": torch.tensor([variance for _, variance in found]),
            "norm": torch.stack([mean.square().sum() for mean, _ in found]),
            "change": torch.stack([(mean - other).square().sum() for (mean, _), (other, _) in zip(found, plain, strict=True)]),
        }

    return _rows(EXACT, None, sizes, columns)


def _groups(sizes: Mapping[str, int]) -> list[int]:
    return [g for g in (2, 4, 8) if g <= sizes["largest_group"]]


def _rows(
    where: str, masks: int | None, sizes: Mapping[str, int], columns: Callable[[str, int], dict[str, Tensor]]
) -> list[Figures]:
    rows = []
    for group in _groups(sizes):
        plain = columns("none", group)
        for kind in KINDS[1:]:
            found = columns(kind, group)
            rows.append(
                {
                    "where": where,
                    "R": masks,
                    "group": group,
                    "baseline": kind,
                    "variance": statistics.ratio(found["variance"], plain["variance"]),
                    "noise": _noise(found, plain),
                    "change": statistics.ratio(found["change"], plain["norm"]),
                }
            )
    return rows


def _noise(found: dict[str, Tensor], plain: dict[str, Tensor]) -> Figures:
    """Variance over the squared norm of the expectation, over the same without a baseline."""
    weight_XU = statistics.resampled(len(plain["norm"]))

    def relative(column: dict[str, Tensor]) -> Tensor:
        top, bottom = (
            torch.cat([c_U.double().sum()[None], weight_XU @ c_U.double()]) for c_U in (column["variance"], column["norm"])
        )
        # an expectation that cannot be told from 0 says nothing
        return torch.where(bottom > 0, top / bottom, torch.nan)

    found_X = relative(found) / relative(plain)
    return statistics.spread(float(found_X[0]), found_X[1:])


Policies = tuple[Subject, nn.Module, nn.Module]  # and the reference


def model_rows(
    where: str, settings: Settings, sizes: Mapping[str, int], masks: int, prompts: int, policies: Callable[[], Policies]
) -> list[Figures]:
    """Of that many prompts, each a part of its own; `policies` is called where one is not known yet."""

    def found_at(prompt: int) -> list[list[float]]:
        subject, policy, reference = policies()
        example = subject.examples(prompt + 1)[prompt]
        pool = _scores(subject, subject.group(example, sizes["pool"], model=policy), policy, reference, masks)
        return [_figures(pool, kind, group) for group in _groups(sizes) for kind in KINDS]

    key = {"where": where, "R": masks, "pool": sizes["pool"], "groups": _groups(sizes)}
    by_prompt = [settings.part("dmpo", functools.partial(found_at, i), prompt=i, **key) for i in range(prompts)]
    figures = torch.tensor(by_prompt, dtype=F64).view(prompts, len(_groups(sizes)), len(KINDS), 3)

    def columns(kind: str, group: int) -> dict[str, Tensor]:
        own = figures[:, _groups(sizes).index(group), KINDS.index(kind)]
        return dict(zip(("variance", "norm", "change"), own.unbind(-1), strict=True))

    return _rows(where, masks, sizes, columns)


def _figures(pool: _Pool, kind: str, group: int) -> list[float]:
    """Variance, squared norm of the expectation, and its squared change by the baseline, over groups of one prompt."""
    ours_RB, plain_RB = (pool.weights(k, group) for k in (kind, "none"))
    variance, norm = statistics.moments_of_sums(ours_RB, pool.gram_BB)
    return [variance, norm, statistics.moments_of_sums(ours_RB - plain_RB, pool.gram_BB)[1]]


class _Pool:
    """One prompt's completions: what weights need, and inner products of the gradients of -mean log-prob."""

    def __init__(self, rewards_B: Tensor, elbo_B: Tensor, ref_B: Tensor, current_B: Tensor, gradient_BP: Tensor) -> None:
        self.rewards_B, self.elbo_B, self.ref_B, self.current_B = rewards_B, elbo_B, ref_B, current_B
        self.gram_BB = (gradient_BP @ gradient_BP.t()).double()

    def weights(self, kind: str, group: int) -> Tensor:
        """float64 `[R, B]`: each completion's coefficient in each of R groups."""
        B = len(self.rewards_B) // group * group
        ids = torch.arange(B) // group
        arguments = self.rewards_B[:B], self.elbo_B[:B], self.ref_B[:B], ids
        coefficient_B = wdce_weights(*arguments) - wdce_baseline(kind, *arguments, current_elbo=self.current_B[:B])
        weight_RB = torch.zeros(B // group, len(self.rewards_B), dtype=F64)
        return weight_RB.scatter_(0, ids[None], coefficient_B[None].double())


def _scores(subject: Subject, pool: Group, policy: nn.Module, reference: nn.Module, masks: int = PUBLISHED) -> _Pool:
    recipe = RECIPES["dmpo"]
    at_rollout, in_loss = (subject.plan(pool.rollout, masks, seed, recipe.law, **recipe.law_options) for seed in (1, 2))
    together: dict[str, Any] = {"samples_per_pass": at_rollout.shape[0]}
    elbo_B, ref_B = ((score_samples(model, at_rollout, **together) * at_rollout.share_K).sum(-1) for model in (policy, reference))
    gradients, current = [], []
    for b in range(len(pool.rewards_B)):
        plan = in_loss.cut(sequences=slice(b, b + 1))
        flat_P, report = common.gradient(policy, plan, SINGLE, Batch({"weights": torch.ones(1)}))
        gradients.append(flat_P)
        current.append((report.sample_elbo_BK * plan.share_K).sum(-1))
    return _Pool(pool.rewards_B, elbo_B, ref_B, torch.cat(current), torch.stack(gradients))


@functools.lru_cache(maxsize=1)  # for all claims
def measure(settings: Settings) -> Figures:
    sizes = sizes_of(settings)

    @functools.lru_cache(maxsize=1)
    def subject() -> Subject:
        return common.load(settings)

    @functools.lru_cache(maxsize=1)
    def moved() -> nn.Module:
        ((_, policy),) = common.moved(settings, (sizes["updates"],))
        return policy

    rows = exact_rows(sizes)
    for masks, prompts in sweep(sizes).items():
        at_reference, on = "model, at its reference", f"model, {sizes['updates']} updates on"
        rows += model_rows(at_reference, settings, sizes, masks, prompts, lambda: (subject(), subject().model, subject().model))
        rows += model_rows(on, settings, sizes, masks, prompts, lambda: (subject(), moved(), subject().model))
    return {"rows": rows}


def masks_of(row: Figures) -> int | None:
    """R; None of the exact policies. Rows of earlier results say nothing and are as published."""
    return None if row["where"] == EXACT else row.get("R", PUBLISHED)


def rows_at(figures: Figures, *, most: bool) -> list[Figures]:
    """The rows of the exact policies, and those of the model with the published R, or with the largest."""
    largest = max((R for row in figures["rows"] if (R := masks_of(row)) is not None), default=PUBLISHED)
    return [row for row in figures["rows"] if masks_of(row) in (None, largest if most else PUBLISHED)]


def lowers(kind: str, *, most: bool) -> Callable[[Figures], str]:
    def verdict(figures: Figures) -> str:
        found = [r["variance"] for r in rows_at(figures, most=most) if r["baseline"] == kind and r["group"] in SMALL]
        return common.decide(all(x["high"] < 1 for x in found), all(x["low"] > 1 for x in found))

    return verdict


def expectation_verdict(figures: Figures) -> str:
    rows = [r for r in rows_at(figures, most=False) if r["baseline"] in CENTRED]
    on_model = [r["change"] for r in rows if r["where"] != EXACT]
    return common.decide(all(r["change"]["high"] < SAME for r in rows), all(x["low"] > SAME for x in on_model))


def table_of(kinds: tuple[str, ...], *keys: str) -> Callable[[Figures], str]:
    columns: dict[str, Column] = {
        "where": "where",
        "R": lambda row: masks_of(row) or "",
        "group": "group",
        "baseline": "baseline",
    }
    columns |= {COLUMNS[key]: key for key in keys}
    return lambda figures: common.lines_of([r for r in figures["rows"] if r["baseline"] in kinds], columns)


COLUMNS = {
    "variance": "variance over that without",
    "change": "change of the expectation, squared, relative",
    "noise": "variance over squared expectation, over that without",
}
RULE = (
    "confirmed if in groups of 2 and 4 the variance over that without a baseline lies below 1 with its interval, wherever "
    "measured; refuted if above 1 everywhere"
)


def claim(name: str, says: str, kind: str) -> Claim:
    """The one whose noise hangs on R is decided by the largest R that was measured, the others by the published one."""
    most = kind == "unbias"
    rule = f"{RULE}, with the {'largest' if most else 'published'} R"
    return Claim(name, "DMPO", says, rule, sizes_of, measure, lowers(kind, most=most), table_of((kind,), "variance", "noise"))


CLAIMS = (
    claim("dmpo-mean", 'the baseline "mean" lowers the gradient\'s variance at small batch', "mean"),
    claim("dmpo-unbias", 'the baseline "unbias" lowers the gradient\'s variance at small batch', "unbias"),
    claim("dmpo-neg", "the baseline \"neg\", the code's default, lowers the gradient's variance at small batch", "neg"),
    Claim(
        "dmpo-expectation",
        "DMPO",
        '"mean" and "unbias" leave the expectation of the gradient as it is',
        "confirmed if the squared change of the expectation stays below 5 % of its square with its interval, wherever measured; "
        "refuted if on the model it is above everywhere",
        sizes_of,
        measure,
        expectation_verdict,
        table_of(("mean", "unbias", "neg"), "change"),
    ),
)
