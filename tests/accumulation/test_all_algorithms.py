"""`accumulate` gives every algorithm's exact gradient, in as many passes as its coupling predicts."""

import pytest
import torch

from dllm_kernels import generate, make_mask_plan
from dllm_kernels.objectives import Batch, dmpo, effective_sample_size, egspo_objective, wdce_baseline, wdce_weights
from tests import algorithms
from tests.accumulation.runs import full_graph, run
from tests.algorithms import RECIPES, VARIANTS
from tests.tiny import eurobert, worst_gradient_error

F64 = torch.float64


def predicted(objective, plan, batch, samples_per_pass, sequences_per_pass):
    """(passes, cuts that hold a scored token)."""
    K, B, _ = plan.shape
    coupling = objective.on_policy_coupling if objective.is_on_policy(batch) else objective.coupling
    whole = {"sequence": samples_per_pass >= K, "batch": samples_per_pass >= K and sequences_per_pass >= B}
    two = not whole.get(coupling, True)
    cuts = sum(
        bool(plan.counts[k : k + samples_per_pass, b : b + sequences_per_pass].any())
        for k in range(0, K, samples_per_pass)
        for b in range(0, B, sequences_per_pass)
    )
    return 1 + two, cuts


def check(variant, samples, on_policy, cuts):
    model = eurobert(layers=1)
    K = algorithms.nearest_samples(variant, samples)
    objective, plan, batch = algorithms.small(variant, model, K, on_policy=on_policy)
    want_loss, want = full_graph(model, plan, objective, batch, algorithms.denominator_of(objective, plan))
    assert any(float(g.norm()) > 1e-6 for g in want.values()), "nothing to compare"
    for per_pass, sequences in cuts(K):
        options = {"samples_per_pass": per_pass, "sequences_per_pass": sequences}
        passes, count = predicted(objective, plan, batch, per_pass, sequences)
        report, got = run(model, plan, objective, batch, **options)
        assert worst_gradient_error(got, want) < 1e-10, options
        assert float(report.loss) == pytest.approx(want_loss, rel=1e-9, abs=1e-11), options
        assert report.passes == passes
        assert (passes - 1) * count < report.forwards <= passes * count, options
        assert 0 < report.backwards <= count, options
        assert report.rows <= passes * len(plan.rows)
    # another order of sequences and samples: the same masks, the same gradient
    sequences, order = torch.tensor([2, 0, 3, 1]), torch.randperm(K, generator=torch.Generator().manual_seed(1))
    shuffled = Batch(
        {name: tensor[sequences] for name, tensor in batch.per_sequence.items()},
        {name: tensor[sequences][:, order] for name, tensor in batch.per_sample.items()},
    )
    report, got = run(model, plan.cut(samples=order, sequences=sequences), objective, shuffled, sequences_per_pass=3)
    assert worst_gradient_error(got, want) < 1e-10
    assert float(report.loss) == pytest.approx(want_loss, rel=1e-9, abs=1e-11)


@pytest.mark.parametrize("on_policy", [True, False], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize(
    "variant",
    [pytest.param(name, marks=[pytest.mark.slow] if "," in name and name != "dmpo, unbias" else []) for name in VARIANTS],
)
def test_the_accumulated_gradient_is_the_full_graph_s(variant, samples, on_policy):
    if on_policy and algorithms.objective_of(variant).old_scores is None:
        pytest.skip("it has no old policy")
    check(variant, samples, on_policy, lambda K: [(1, 4), (K, 4), (K - 1, 3)] if K > 1 else [(1, 3)])


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_accumulated_gradient_is_the_full_graph_s_for_64_samples(variant):
    check(variant, 64, False, lambda K: [(1, 4), (16, 3), (K, 4)])


@pytest.mark.parametrize("variant", ["diffu_grpo", "gdpo", "rspo", "trace_rl"])
def test_a_shifted_head_too(variant):
    model = eurobert(layers=1)
    objective, plan, batch = algorithms.small(variant, model, algorithms.nearest_samples(variant, 3), shift=1)
    want_loss, want = full_graph(model, plan, objective, batch, algorithms.denominator_of(objective, plan))
    report, got = run(model, plan, objective, batch)
    assert worst_gradient_error(got, want) < 1e-10
    assert float(report.loss) == pytest.approx(want_loss, rel=1e-9)


def test_the_couplings_are_those_of_the_design():
    found = {variant: algorithms.objective_of(variant) for variant in VARIANTS}
    couplings = {variant: (objective.coupling, objective.on_policy_coupling) for variant, objective in found.items()}
    assert couplings == {
        "bgpo": ("sample", "none"),
        "cj_grpo": ("token", "token"),
        "on_policy_distillation": ("token", "token"),
        "coupled_grpo": ("sequence", "sequence"),
        "coupled_grpo, no KL": ("sequence", "none"),
        "d2": ("token", "token"),
        "d2, no KL": ("token", "none"),
        "diffu_grpo": ("token", "token"),
        "diffu_grpo, no KL": ("token", "none"),
        "dmpo": ("none", "none"),
        "dmpo, no baseline": ("none", "none"),
        "dmpo, unbias": ("batch", "batch"),
        "ebpo": ("sequence", "none"),
        "egspo": ("sample", "sample"),
        "egspo, no KL": ("sample", "none"),
        "egspo_sa": ("sample", "sample"),
        "espo": ("sequence", "sequence"),
        "espo, no KL": ("sequence", "none"),
        "gdpo": ("sequence", "none"),
        "gdpo, KL": ("sequence", "sequence"),
        "gdpo, code": ("sequence", "none"),
        "gdsd": ("sequence", "sequence"),
        "justgrpo": ("token", "none"),
        "mdpo": ("token", "token"),
        "mdpo, KL": ("token", "token"),
        "rldf": ("sample", "sample"),
        "rspo": ("batch", "batch"),
        "spg": ("sequence", "sequence"),
        "trace_rl": ("token", "none"),
        "trace_rl, sdar": ("token", "none"),
        "unigrpo": ("sample", "sample"),
        "vrpo": ("batch", "batch"),
        "vrpo, paper": ("batch", "batch"),
        "wd1": ("none", "none"),
    }
    assert set(map(algorithms.algorithm, VARIANTS)) == set(RECIPES)


# --- DMPO: what the baseline is for -------------------------------------------------------------------------


def gradient_moments(baseline, group):
    """(expectation, total variance) of DMPO's gradient over all groups that a categorical policy of 5 answers
    can draw.
    """
    logits = torch.tensor([0.5, 0.0, -0.3, 0.2, -1.0], dtype=F64, requires_grad=True)
    rewards = torch.tensor([0.1, 0.0, 0.02, 0.0, 0.05], dtype=F64)
    draws = torch.cartesian_prod(*[torch.arange(5)] * group)
    probability = logits.detach().log_softmax(0)[draws].sum(1).exp()
    found = []
    for draw in draws:
        logp = logits.log_softmax(0)[draw]
        elbo, ids = logp.detach(), torch.zeros(group, dtype=torch.int64)
        weights = wdce_weights(rewards[draw], elbo, elbo, ids)
        options = {"current_elbo": elbo} if baseline == "unbias" else {}
        loss = dmpo(logp[:, None], weights, wdce_baseline(baseline, rewards[draw], elbo, elbo, ids, **options))
        found.append(torch.autograd.grad(loss, logits)[0])
        assert (
            (effective_sample_size(weights, ids) > 1 / group - 1e-12) & (effective_sample_size(weights, ids) <= 1 + 1e-12)
        ).all()
    g = torch.stack(found)
    mean = (probability[:, None] * g).sum(0)
    return mean, float((probability[:, None] * (g - mean).square()).sum())


@pytest.mark.parametrize("group", [2, 4])
def test_dmpo_s_baselines_reduce_the_gradient_s_variance_in_small_groups(group):
    """Measured, by enumeration: with 2 answers a group the weights alone have many times the variance."""
    plain_mean, plain = gradient_moments("none", group)
    for baseline in ("mean", "unbias"):
        mean, variance = gradient_moments(baseline, group)
        # on-policy both subtract 1 / G, which has no expectation: E[grad log p] = 0
        torch.testing.assert_close(mean, plain_mean, rtol=1e-9, atol=1e-12)
        assert variance < 0.6 * plain, (baseline, variance, plain)


# --- EGSPO: which steps to spend the budget on --------------------------------------------------------------


def half_random_model(length=8):
    """A model that learnt sequences whose second half repeats the first: half the steps are sure, half are
    open.
    """
    model = eurobert(vocab=12, hidden=32, layers=2, dtype=torch.float32).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        half = torch.randint(3, 9, (64, length // 2), generator=generator)
        clean = torch.cat([torch.full((64, 1), 10), half, half], dim=1)
        masked = torch.rand(64, length + 1, generator=generator) < torch.rand(64, 1, generator=generator).clamp(min=0.1)
        masked[:, 0] = False
        logits = model(torch.where(masked, 11, clean)).logits
        torch.nn.functional.cross_entropy(logits[masked], clean[masked]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval().to(F64)


def squared_errors(length=8, budget=4, sequences=32):
    """Relative squared errors `[B]` of each sequence's gradient of `budget` steps, against all steps, by how
    they are chosen.
    """
    model = half_random_model(length)
    ids = torch.arange(sequences)
    rollout = generate(
        model,
        torch.full((sequences, 1), 10),
        length=length,
        steps=length,
        block_length=length,
        temperature=1.0,
        remasking="random",
        mask_id=11,
        seed=0,
        sequence_ids=ids,
    )
    entropy = torch.zeros(sequences, length, dtype=F64).scatter_(1, rollout.commit_step_BL, rollout.commit_entropy_BL.double())
    step_map = torch.cat([torch.full((sequences, 1), -1), rollout.commit_step_BL], dim=1)
    options = {"law": "trace", "samples": None, "seed": 0, "sequence_ids": ids, "mask_id": 11, "step_map_BS": step_map}
    plan = make_mask_plan(rollout.ids_BS, step_map >= 0, **options)
    objective = egspo_objective(beta=0.0, tokens_per_step=1)
    found = []
    for b in range(sequences):
        for k in range(length):
            step = plan.cut(sequences=slice(b, b + 1), samples=slice(k, k + 1))
            _, got = run(model, step, objective, Batch({"advantages": torch.ones(1, dtype=F64)}), denominator=1.0)
            found.append(torch.cat([g.flatten() for _, g in sorted(got.items())]))
    gradient_BTP = torch.stack(found).view(sequences, length, -1)

    def errors(steps_BJ):
        left_out = torch.ones(sequences, length, dtype=torch.bool).scatter_(1, steps_BJ, False)
        missing = (gradient_BTP * left_out[:, :, None]).sum(1).square().sum(-1)
        return missing / gradient_BTP.sum(1).square().sum(-1)

    spaced = torch.linspace(0, length - 1, budget).round().long().expand(sequences, -1)
    by_entropy = entropy.argsort(dim=1, descending=True)
    return {"entropy": errors(by_entropy[:, :budget]), "uniform": errors(spaced), "least": errors(by_entropy[:, budget:])}


@pytest.mark.slow
def test_entropy_guided_steps_have_a_smaller_gradient_error_than_uniform_ones_at_equal_budget():
    """Measured, 4 of 8 steps: median 0.0004 against 0.48 (mean 0.24 of all squared norms against 0.39).

    Few draws dominate the mean: an improbable token of a low-entropy step has a huge gradient, which
    selection by entropy misses.
    """
    errors = squared_errors()
    assert float(errors["entropy"].median()) < 0.05
    assert float(errors["uniform"].median()) > 0.2
    assert float(errors["least"].median()) > 0.7
    assert float((errors["entropy"] < errors["uniform"]).double().mean()) > 0.8
