"""DMPO: weights, baselines and loss against loops over groups, effective sample size, the edges, and the engine's cuts."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllm_kernels.accumulation.objective import Batch
from dllm_kernels.objectives.dmpo import RECIPE, dmpo, dmpo_objective, effective_sample_size, wdce_baseline, wdce_weights
from tests.objectives import loops
from tests.objectives.plans_and_batches import COMPLETIONS, GROUPS, plan_of

F64 = torch.float64
KINDS = ("none", "neg", "mean", "unbias")


def softmax(logits, groups):
    out = []
    for logit, group in zip(logits, groups, strict=True):
        members = [x for x, g in zip(logits, groups, strict=True) if g == group]
        out.append(1 / math.fsum(math.exp(x - logit) if x - logit < 700 else math.inf for x in members))
    return out


def weights_by_loops(rewards, elbo, ref, groups, alpha, kappa, sign=1.0):
    if alpha == -1:
        return [sign * r for r in rewards]
    if alpha == 0:
        return softmax([sign * kappa * r for r in rewards], groups)
    return softmax([kappa * (q - e + sign * r / alpha) for r, e, q in zip(rewards, elbo, ref, strict=True)], groups)


def baseline_by_loops(kind, rewards, elbo, ref, groups, alpha, kappa, current):
    if kind == "none":
        return [0.0] * len(elbo)
    if kind == "neg":
        return weights_by_loops(rewards, elbo, ref, groups, alpha, kappa, -1.0)
    if kind == "unbias":
        return softmax([c - e for c, e in zip(current, elbo, strict=True)], groups)
    weights = weights_by_loops(rewards, elbo, ref, groups, alpha, kappa)
    members = [[w for w, h in zip(weights, groups, strict=True) if h == g] for g in groups]
    return [math.fsum(m) / len(m) for m in members]


rollout = st.tuples(
    st.sampled_from([0.0, 0.1, 1.0, 2.0]), st.floats(-20, 0), st.floats(-3, 3), st.floats(-3, 3), st.integers(-1, 1)
)


@given(
    st.lists(rollout, min_size=1, max_size=9),
    st.sampled_from([0.04, 1.0, 0.0, -1]),
    st.sampled_from([1.0, 0.2]),
    st.sampled_from(KINDS),
)
def test_weights_and_baselines_equal_loops_over_groups(rows, alpha, kappa, kind):
    rewards, elbo, off, moved, groups = (list(column) for column in zip(*rows, strict=True))
    ref, current = [e + x for e, x in zip(elbo, off, strict=True)], [e + x for e, x in zip(elbo, moved, strict=True)]
    tensors = *(torch.tensor(x, dtype=F64) for x in (rewards, elbo, ref)), torch.tensor(groups)
    options = {"alpha": alpha, "kappa": kappa}
    weights = wdce_weights(*tensors, **options)
    want = weights_by_loops(rewards, elbo, ref, groups, alpha, kappa)
    torch.testing.assert_close(weights, torch.tensor(want, dtype=F64), rtol=1e-9, atol=1e-15)
    baseline = wdce_baseline(kind, *tensors, **options, current_elbo=torch.tensor(current, dtype=F64))
    want = baseline_by_loops(kind, rewards, elbo, ref, groups, alpha, kappa, current)
    torch.testing.assert_close(baseline, torch.tensor(want, dtype=F64), rtol=1e-9, atol=1e-15)
    if alpha != -1:
        for group in set(groups):
            members = torch.tensor([g == group for g in groups])
            assert float(weights[members].sum()) == pytest.approx(1.0, rel=1e-12)
            assert kind == "none" or float(baseline[members].sum()) == pytest.approx(1.0, rel=1e-12)


def test_equal_rewards_of_an_unmoved_policy_weigh_the_same_and_a_group_of_one_has_all():
    elbo = torch.tensor([-3.0, -90.0, -1.0, -5.0])
    groups = torch.tensor([1, 1, 1, 2])
    weights = wdce_weights(torch.full((4,), 0.7), elbo, elbo, groups)
    torch.testing.assert_close(weights, torch.tensor([1 / 3, 1 / 3, 1 / 3, 1.0]))
    for kind in ("neg", "mean", "unbias"):
        baseline = wdce_baseline(kind, torch.full((4,), 0.7), elbo, elbo, groups, current_elbo=elbo)
        assert torch.equal(weights, baseline)  # coefficients of exactly 0, which the engine may drop


def test_weights_far_apart_do_not_overflow():
    elbo = torch.tensor([-9000.0, -10.0, -10.0])
    weights = wdce_weights(torch.tensor([2.0, 0.0, 2.0]), elbo, torch.zeros(3), torch.tensor([0, 0, 1]))
    assert weights.tolist() == [1.0, 0.0, 1.0]


@given(st.lists(st.tuples(st.floats(-5, 5), st.integers(0, 2)), min_size=1, max_size=9))
def test_effective_sample_size_is_its_definition_and_between_1_over_n_and_1(pairs):
    logits, groups = [p[0] for p in pairs], [p[1] for p in pairs]
    weights = softmax(logits, groups)
    got = effective_sample_size(torch.tensor(weights, dtype=F64), torch.tensor(groups))
    for i, group in enumerate(groups):
        members = [w for w, g in zip(weights, groups, strict=True) if g == group]
        assert float(got[i]) == pytest.approx(1 / len(members) / math.fsum(w * w for w in members), rel=1e-12)
        assert 1 / len(members) - 1e-12 <= float(got[i]) <= 1 + 1e-12


def test_effective_sample_size_at_its_ends():
    weights, groups = torch.tensor([0.25, 0.25, 0.25, 0.25, 1.0, 0.0]), torch.tensor([1, 1, 1, 1, 2, 2])
    torch.testing.assert_close(effective_sample_size(weights, groups), torch.tensor([1.0, 1.0, 1.0, 1.0, 0.5, 0.5]))


def fixture(R=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    logp = -3 * torch.rand(6, R, generator=g, dtype=F64)
    logp[1] = 0.0  # nothing masked
    weights, baseline = torch.rand(6, generator=g, dtype=F64), torch.rand(6, generator=g, dtype=F64)
    weights[3] = baseline[3]
    return logp.requires_grad_(), weights, baseline


@pytest.mark.parametrize("R", [1, 4])
@pytest.mark.parametrize("strength", [0.0, 1.0, 0.3])
def test_the_loss_equals_loops_over_the_formula(R, strength):
    logp, weights, baseline = fixture(R)
    total, gradient = 0.0, []
    for w, b, row in zip(weights.tolist(), baseline.tolist(), logp.tolist(), strict=True):
        total += math.fsum((w - strength * b) * -x for x in row) / R
        gradient.append([-(w - strength * b) / R] * R)
    loops.check(dmpo(logp, weights, baseline, strength=strength), logp, total, gradient)


def test_finite_differences_and_a_sum_over_sequences():
    logp, weights, baseline = fixture()
    assert torch.autograd.gradcheck(lambda x: dmpo(x, weights, baseline), logp)
    parts = dmpo(logp[:2], weights[:2], baseline[:2]) + dmpo(logp[2:], weights[2:], baseline[2:])
    torch.testing.assert_close(parts, dmpo(logp, weights, baseline))


def test_everything_but_the_policy_is_detached():
    logp, weights, baseline = fixture()
    weights.requires_grad_()
    baseline.requires_grad_()
    dmpo(logp, weights, baseline).backward()
    assert weights.grad is None
    assert baseline.grad is None
    assert logp.grad is not None
    elbo = torch.zeros(2, requires_grad=True)
    groups = torch.zeros(2, dtype=torch.int64)
    assert not wdce_weights(torch.ones(2), elbo, elbo, groups).requires_grad
    for kind in KINDS:
        assert not wdce_baseline(kind, torch.ones(2), elbo, elbo, groups, current_elbo=elbo).requires_grad


@pytest.mark.parametrize(
    ("function", "changes", "words"),
    [
        (dmpo, {"mean_logp_BR": torch.zeros(2)}, ["mean_logp_BR"]),
        (dmpo, {"mean_logp_BR": torch.zeros(2, 0)}, ["mean_logp_BR", "0"]),
        (dmpo, {"weights_B": torch.zeros(3)}, ["weights_B", "3"]),
        (dmpo, {"baseline_B": torch.tensor([0.0, math.nan])}, ["baseline_B", "nan"]),
        (dmpo, {"strength": math.inf}, ["strength", "inf"]),
        (wdce_weights, {"elbo_B": torch.tensor([0.0, math.nan])}, ["elbo_B", "nan"]),
        (wdce_weights, {"rewards_B": torch.zeros(3)}, ["rewards_B", "3"]),
        (wdce_weights, {"ref_elbo_B": torch.zeros(3)}, ["ref_elbo_B", "3"]),
        (wdce_weights, {"group_ids_B": torch.zeros(2)}, ["group_ids_B", "float32"]),
        (wdce_weights, {"alpha": -0.5}, ["alpha", "-0.5"]),
        (wdce_weights, {"kappa": 0.0}, ["kappa", "0"]),
        (wdce_baseline, {"kind": "median"}, ["kind", "median", "unbias"]),
        (wdce_baseline, {"kind": "unbias"}, ["current_elbo", "None"]),
        (wdce_baseline, {"kind": "unbias", "current_elbo": torch.zeros(3)}, ["current_elbo", "3"]),
        (effective_sample_size, {"group_ids_B": torch.zeros(3, dtype=torch.int64)}, ["group_ids_B", "3"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else getattr(value, "__name__", ""),
)
def test_an_error_names_the_argument(function, changes, words):
    zeros, groups = torch.zeros(2), torch.zeros(2, dtype=torch.int64)
    rollout = {"rewards_B": zeros, "elbo_B": zeros, "ref_elbo_B": zeros, "group_ids_B": groups}
    arguments = {
        dmpo: {"mean_logp_BR": torch.zeros(2, 4), "weights_B": zeros, "baseline_B": zeros},
        wdce_weights: rollout,
        wdce_baseline: {"kind": "neg", **rollout},
        effective_sample_size: {"weights_B": zeros, "group_ids_B": groups},
    }[function]
    loops.refuses(function, arguments, changes, words)


# --- the engine's form ---------------------------------------------------------------------------------------------------


def mean_logp_of(plan, logp):
    """`[B, R]` means over the masked tokens, 0 without any."""
    total = torch.zeros(6, plan.shape[0], dtype=F64).index_put((plan.rows.sequence, plan.rows.sample), logp, accumulate=True)
    count = torch.zeros_like(total).index_put((plan.rows.sequence, plan.rows.sample), torch.ones_like(logp), accumulate=True)
    return total / count.clamp(min=1)


def rollout_of(seed=0):
    g = torch.Generator().manual_seed(seed)
    elbo = -9 * torch.rand(6, generator=g, dtype=F64)
    ref = elbo + torch.randn(6, generator=g, dtype=F64)
    return torch.tensor([1.0, 0.0, 0.1, 0.1, 1.0, 0.0], dtype=F64), elbo, ref, torch.tensor(GROUPS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("law", ["dmpo", "exact"])
def test_contributions_of_any_cut_sum_to_the_function(kind, law):
    """Whatever the weights of the plan's law: the replicates' means are this loss's own."""
    plan = plan_of("antithetic", 4, weight="dmpo", shift=1) if law == "dmpo" else plan_of("exact", 4)
    logp = loops.row_logps(plan)
    rewards, elbo, ref, groups = rollout_of()
    mean_logp = mean_logp_of(plan, logp)
    current = mean_logp.detach().mean(1) * torch.tensor(COMPLETIONS)
    weights = wdce_weights(rewards, elbo, ref, groups, kappa=0.1)
    baseline = wdce_baseline(kind, rewards, elbo, ref, groups, kappa=0.1, current_elbo=current)
    want = dmpo(mean_logp, weights, baseline, strength=0.8)
    entries = {"weights": weights}
    if kind == "unbias":
        entries |= {"old_elbo": elbo, "group_ids": groups}
    elif kind != "none":
        entries["baseline"] = baseline
    objective, batch = dmpo_objective(baseline=kind, strength=0.8), Batch(entries)
    objective.check(batch, plan)
    assert objective.coupling == objective.on_policy_coupling == ("batch" if kind == "unbias" else "none")
    assert objective.denominator == "groups"
    loops.same(objective.contributions(logp, plan, batch), want, logp)
    if kind != "unbias":
        for samples, sequences in ((1, 1), (3, 4), (None, 2)):
            got = loops.summed_over_cuts(objective, logp, plan, batch, samples=samples, sequences=sequences)
            loops.same(got, want, logp)


def test_the_scores_of_its_law_are_the_elbo_that_the_weights_want():
    plan = plan_of("antithetic", 4, weight="dmpo")
    logp = loops.row_logps(plan).detach()
    want = mean_logp_of(plan, logp).mean(1) * torch.tensor(COMPLETIONS)
    torch.testing.assert_close(plan.score(logp), want, rtol=1e-6, atol=1e-6)  # the plan's weights are fp32


@pytest.mark.parametrize("kind", ["neg", "unbias"])
def test_a_baseline_lowers_the_variance_of_the_gradient_of_a_small_batch(kind):
    """Completions of a softmax policy over 6 answers, its weights exact: the noise of the sampled gradient with and without."""
    g = torch.Generator().manual_seed(0)
    policy = torch.tensor([0.3, 0.25, 0.2, 0.1, 0.1, 0.05], dtype=F64)
    rewards = torch.tensor([0.0, 0.1, 0.0, 1.0, 0.1, 1.0], dtype=F64)

    def gradients(kind):
        out = []
        for _ in range(200):
            draws = torch.multinomial(policy, 4, replacement=True, generator=g)
            logits = policy.log().requires_grad_()
            logp = logits.log_softmax(-1)[draws]
            arguments = rewards[draws], policy.log()[draws], policy.log()[draws], torch.zeros(4, dtype=torch.int64)
            options = {"alpha": 1.0}
            weights = wdce_weights(*arguments, **options)
            baseline = wdce_baseline(kind, *arguments, **options, current_elbo=policy.log()[draws])
            out.append(torch.autograd.grad(dmpo(logp[:, None], weights, baseline), logits)[0])
        return torch.stack(out)

    assert gradients(kind).var(0).sum() < 0.5 * gradients("none").var(0).sum()


def test_recipe():
    assert dmpo_objective(**RECIPE.defaults).name == RECIPE.name
    assert plan_of(RECIPE.law, RECIPE.samples, **RECIPE.law_options).shape[0] == 4
    with pytest.raises(ValueError, match="baseline"):
        dmpo_objective(baseline="negative")
