"""Every algorithm with its recipe's law on given data: what the tests of the engine, of its memory and of the docs share."""

from __future__ import annotations

import torch

from dllm_kernels import make_mask_plan
from dllm_kernels.objectives import RECIPES, Batch
from tests import oracle

F64 = torch.float64

# name: options over the recipe's own; the algorithm is what comes before the comma
VARIANTS = {
    **{name: {} for name in RECIPES},
    "coupled_grpo, no KL": {"beta": 0.0},
    "d2, no KL": {"beta": 0.0},
    "diffu_grpo, no KL": {"beta": 0.0},
    "dmpo, no baseline": {"baseline": "none"},
    "dmpo, unbias": {"baseline": "unbias"},
    "egspo, no KL": {"beta": 0.0},
    "espo, no KL": {"beta": 0.0},
    "gdpo, KL": {"beta": 0.1},
    "mdpo, KL": {"beta": 0.1},
    "gdpo, code": {"mode": "code"},
    "trace_rl, sdar": {"mode": "sdar", "window": 7},
    "vrpo, paper": {"normalize": False},
}


def algorithm(variant):
    return variant.partition(",")[0]


def objective_of(variant):
    recipe = RECIPES[algorithm(variant)]
    return recipe.make(recipe.choose(VARIANTS[variant]))


def nearest_samples(variant, samples):
    """The number of samples that the recipe's law takes, from `samples` on."""
    law = RECIPES[algorithm(variant)].law
    if law == "coupled":
        return max(3, samples + 1 - samples % 2)
    return samples + samples % 2 if law == "antithetic" else samples


def plan_of(variant, samples, *, ids, completion, seed=3, mask_id, shift=0):
    """K samples (or states) of the recipe's law; block and node sizes, and the given step maps, fit small data."""
    recipe = RECIPES[algorithm(variant)]
    options = dict(recipe.law_options)
    if recipe.law == "block":
        options["block_length"] = 3
    if recipe.law == "quadrature":
        options["nodes"] = next(n for n in (3, 4, 1) if samples % n == 0)
    if recipe.needs_trajectory:
        generator = torch.Generator().manual_seed(seed)
        step_map = torch.randint(0, samples, ids.shape, generator=generator)
        step_map[:, -1] = samples - 1  # the last state is there
        options["step_map_BS"] = torch.where(completion, step_map, -1)
        options |= {"segments": samples, "total_steps": samples} if recipe.law == "segments" else {"shrink": 1}
    return make_mask_plan(
        ids,
        completion,
        law=recipe.law,
        samples=samples,
        seed=seed,
        sequence_ids=torch.arange(len(ids)) + 10,
        mask_id=mask_id,
        shift=shift,
        **options,
    )


def batch_of(objective, plan, logp_N, *, on_policy=False, spread=0.1):
    """Entries of the names that the objective declares; old and reference scores lie `spread` around the policy's."""
    K, B, S = plan.shape
    generator = torch.Generator().manual_seed(7)
    kind = logp_N.dtype

    def noise(*sizes):
        return torch.randn(*sizes, generator=generator, dtype=F64).to(kind)

    dense = logp_N.new_zeros(K, B, S).masked_scatter(plan.scored, logp_N).transpose(0, 1)
    made = {
        "advantages": lambda: noise(B).add(torch.linspace(-1, 1, B)),
        "step_advantages": lambda: noise(B, K),
        "step_weights": lambda: (noise(B, K) > 0).to(kind) / 2,
        "weights": lambda: noise(B),
        "baseline": lambda: noise(B),
        "group_ids": lambda: torch.arange(B) // 2,
        "chosen": lambda: torch.arange(B) % 2 == 0,
    }
    scores = {"elbo": plan.score(logp_N), "sample_elbo": plan.elbo(logp_N), "logp": dense}

    def entry(name):
        if name in made:
            return made[name]()
        value = scores[name.removeprefix("old_").removeprefix("ref_")]
        return value + spread * noise(*value.shape)

    left_out = objective.old_scores if on_policy else None
    per_sequence = {name: entry(name) for name in objective.per_sequence if name != left_out}
    per_sample = {name: entry(name) for name in (*objective.per_sample, *objective.per_token) if name != left_out}
    if objective.denominator == "groups":
        per_sequence["group_ids"] = made["group_ids"]()
    return Batch(per_sequence, per_sample)


def denominator_of(objective, plan):
    """Counted in plain Python from the plan of four sequences in two groups or pairs."""
    if objective.denominator in ("groups", "pairs"):
        return len(plan.input_ids_BS) / 2
    if objective.denominator == "tokens":
        return sum(row.count(True) for row in plan.completion_mask_BS.tolist())
    if objective.denominator == "sequences":
        return len(plan.input_ids_BS)
    return sum(any(row) for sample in plan.scored.tolist() for row in sample)


def small(variant, model, samples, *, on_policy=False, shift=0):
    """(objective, plan, batch) on four ragged sequences for a tiny model of 11 tokens."""
    ids = torch.randint(3, 10, (4, 10), generator=torch.Generator().manual_seed(0))
    completion = torch.arange(10) >= torch.tensor([3, 3, 6, 5])[:, None]
    plan = plan_of(variant, samples, ids=ids, completion=completion, mask_id=10, shift=shift)
    objective = objective_of(variant)
    logp_N = oracle.plan_logps(model, plan).detach()
    return objective, plan, batch_of(objective, plan, logp_N, on_policy=on_policy)
