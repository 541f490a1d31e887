"""`accumulate` gives the full graph's gradient for every coupling, however the work is cut."""

import gc
import math

import pytest
import torch

from dllm_kernels import Rows, accumulate, head_backward, headless, make_mask_plan
from dllm_kernels.accumulation.scores import score_samples
from dllm_kernels.head import plans
from dllm_kernels.objectives import BGPO, Batch, Objective, bgpo, gdpo, gdpo_objective
from tests import oracle
from tests.accumulation.runs import run
from tests.tiny import eurobert, gradients, worst_gradient_error

F64 = torch.float64
B, S, PROMPT = 3, 8, 3
ADVANTAGES = torch.tensor([1.0, -2.0, 0.5], dtype=F64)


def plan_of(samples, *, law="exact", seed=1, empty=(), shift=0, **options):
    ids = torch.randint(3, 10, (B, S), generator=torch.Generator().manual_seed(0))
    completion = torch.zeros(B, S, dtype=torch.bool)
    completion[:, PROMPT:] = True
    completion[2, S - 2 :] = False  # ragged
    for b in empty:
        completion[b] = False
    return make_mask_plan(
        ids, completion, law=law, samples=samples, seed=seed, sequence_ids=torch.arange(B), mask_id=10, shift=shift, **options
    )


def old_scores(model, plan, spread=0.4):
    noise = torch.randn(B, plan.shape[0], generator=torch.Generator().manual_seed(4), dtype=F64)
    with torch.no_grad():
        return plan.elbo(oracle.plan_logps(model, plan)) + spread * noise


def full_graph(model, loss_of_logp, plan):
    model.zero_grad()
    loss = loss_of_logp(oracle.plan_logps(model, plan))
    loss.backward()
    return loss.detach(), gradients(model)


CUTS = [{}, {"samples_per_pass": 3}, {"sequences_per_pass": 1}, {"samples_per_pass": 100, "sequences_per_pass": 2}]


@pytest.mark.parametrize("samples", [1, 4, 16])
@pytest.mark.parametrize("policy", ["on", "off"])
def test_bgpo_accumulated_equals_the_full_graph(samples, policy):
    model, plan = eurobert(), plan_of(samples)
    old = old_scores(model, plan)
    entries = {"old_sample_elbo": old} if policy == "off" else {}

    def loss_of_logp(logp):
        elbo = plan.elbo(logp)
        return oracle.bgpo(elbo, old if policy == "off" else elbo, ADVANTAGES)

    want_loss, want = full_graph(model, loss_of_logp, plan)
    for cut in CUTS:
        report, got = run(model, plan, BGPO, Batch({"advantages": ADVANTAGES}, entries), **cut)
        assert worst_gradient_error(got, want) < 1e-10, cut
        assert float(report.loss) == pytest.approx(float(want_loss), rel=1e-10)
        torch.testing.assert_close(report.sample_elbo_BK, old_scores(model, plan, 0.0), rtol=1e-10, atol=1e-10)
        assert report.passes == 1


def test_the_head_s_plan_does_not_change_the_gradient(monkeypatch):
    model, plan = eurobert(), plan_of(4)
    batch = Batch({"advantages": ADVANTAGES}, {"old_sample_elbo": old_scores(model, plan)})
    kept, want = run(model, plan, BGPO, batch)
    monkeypatch.setattr(plans, "KEEP_BYTES", 0)
    recomputed, got = run(model, plan, BGPO, batch)
    assert recomputed.flops > kept.flops
    assert worst_gradient_error(got, want) < 1e-12


def test_a_frozen_head_trains_the_body_alone():
    model, plan = eurobert(), plan_of(4)
    batch = Batch({"advantages": ADVANTAGES}, {"old_sample_elbo": old_scores(model, plan)})
    _, want = run(model, plan, BGPO, batch)
    head = model.get_output_embeddings().weight
    head.requires_grad_(False)
    head.grad = None
    report, got = run(model, plan, BGPO, batch)
    name = next(n for n, p in model.named_parameters() if p is head)
    assert name not in got
    assert worst_gradient_error(got, {n: g for n, g in want.items() if n != name}) < 1e-12
    assert report.rows == len(plan.rows)


def test_a_tied_head_gets_both_gradients():
    model, plan = eurobert(tie_word_embeddings=True), plan_of(4)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    old = old_scores(model, plan)
    _, want = full_graph(model, lambda logp: bgpo(plan.elbo(logp), old, ADVANTAGES), plan)
    _, got = run(model, plan, BGPO, Batch({"advantages": ADVANTAGES}, {"old_sample_elbo": old}))
    assert worst_gradient_error(got, want) < 1e-10


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("law", ["exact", "bernoulli"])
def test_laws_shift_and_suppressed_ids(law, shift):
    model, plan = eurobert(), plan_of(5, law=law, shift=shift)
    old = old_scores(model, plan)

    def logps():
        K = plan.shape[0]
        z = model(plan.noisy_ids.reshape(K * B, S)).logits.reshape(K * B * S, -1)
        z = torch.cat([z[:, :10], torch.full_like(z[:, 10:], -math.inf)], dim=1)  # mask id 10 suppressed
        return z.log_softmax(-1)[plan.rows.index].gather(1, plan.rows.target[:, None])[:, 0]

    model.zero_grad()
    bgpo(plan.elbo(logps()), old, ADVANTAGES).backward()
    want = gradients(model)
    _, got = run(model, plan, BGPO, Batch({"advantages": ADVANTAGES}, {"old_sample_elbo": old}), suppress=(10,))
    assert worst_gradient_error(got, want) < 1e-10


# --- objectives of every coupling, made up for this test ----------------------------------------------------


def ratio_contributions(logp, plan, batch):
    """PPO on the ratio of K-sample ELBOs: one nonlinear function of all samples of a sequence."""
    elbo = plan.elbo(logp).sum(1) / plan.samples
    old = batch.per_sequence.get("old_elbo", elbo).detach()
    ratio, a = torch.exp((elbo - old) / S), batch.per_sequence["advantages"]
    return -torch.minimum(ratio * a, ratio.clamp(0.97, 1.03) * a).sum()


def centred_contributions(logp, plan, batch):
    """Every sequence's coefficient depends on all sequences of the batch."""
    elbo = plan.elbo(logp).mean(1)
    return ((elbo - elbo.mean()) * batch.per_sequence["advantages"]).sum() + 0.1 * torch.logsumexp(elbo, 0)


def token_contributions(logp, plan, batch):
    """Coefficients of each token's own log-prob."""
    return -(batch.per_sequence["advantages"][plan.rows.sequence] * plan.rows.weight * torch.exp(logp)).sum()


def data_contributions(logp, plan, batch):
    """Coefficients from data alone."""
    return -(batch.per_sequence["advantages"] * plan.elbo(logp).sum(1)).sum() / plan.samples


RATIO = Objective("ratio", ratio_contributions, "sequence", "none", "sequences", "old_elbo", ("advantages", "old_elbo"))
CENTRED = Objective("centred", centred_contributions, "batch", "batch", "groups", None, ("advantages",))
TOKEN = Objective("token", token_contributions, "token", "token", "tokens", None, ("advantages",))
DATA = Objective("data", data_contributions, "none", "none", "sequences", None, ("advantages",))


def batch_of(objective, model, plan):
    entries = {"advantages": ADVANTAGES}
    if objective is RATIO:
        entries["old_elbo"] = old_scores(model, plan).mean(1)
    return Batch(entries)


@pytest.mark.parametrize("objective", [RATIO, CENTRED, TOKEN, DATA], ids=lambda o: o.name)
@pytest.mark.parametrize("samples", [1, 4])
def test_any_coupling_equals_the_full_graph_however_the_work_is_cut(objective, samples):
    model, plan = eurobert(), plan_of(samples)
    batch = batch_of(objective, model, plan)
    want_loss, want = full_graph(model, lambda logp: objective.contributions(logp, plan, batch) / 7.0, plan)
    for per_pass, sequences in ((1, 3), (3, 2), (4, 1), (4, 3)):
        options = {"samples_per_pass": per_pass, "sequences_per_pass": sequences}
        report, got = run(model, plan, objective, batch, denominator=7.0, **options)
        assert worst_gradient_error(got, want) < 1e-10, options
        assert float(report.loss) == pytest.approx(float(want_loss), rel=1e-10)
        cuts = math.ceil(samples / per_pass) * math.ceil(B / sequences)
        parts = per_pass < samples
        two = (objective is RATIO and parts) or (objective is CENTRED and (parts or sequences < B))
        assert report.passes == 1 + two
        assert report.backwards == cuts
        assert report.forwards == cuts * report.passes
        assert report.rows == len(plan.rows) * report.passes
        torch.testing.assert_close(report.sample_elbo_BK, old_scores(model, plan, 0.0), rtol=1e-10, atol=1e-10)


def test_a_ratio_objective_on_policy_needs_one_pass_and_has_the_full_graph_s_gradient():
    model, plan = eurobert(), plan_of(4)
    batch = Batch({"advantages": ADVANTAGES})
    want_loss, want = full_graph(model, lambda logp: ratio_contributions(logp, plan, batch) / B, plan)
    report, got = run(model, plan, RATIO, batch)
    assert (report.passes, report.forwards, report.backwards) == (1, 4, 4)
    assert worst_gradient_error(got, want) < 1e-10
    # one sample at a time the ratio of the K-sample ELBO is never seen whole, and yet the loss is that of the
    # objective
    assert float(report.loss) == pytest.approx(float(want_loss), rel=1e-12)


def test_the_model_really_ran_as_often_as_the_report_says():
    model, plan = eurobert(), plan_of(4)
    calls = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    report, _ = run(model, plan, RATIO, batch_of(RATIO, model, plan))
    handle.remove()
    calls = calls[1:]  # the oracle's own call for the old scores
    assert calls == [False] * 4 + [True] * 4
    assert (report.forwards, report.backwards) == (8, 4)


# --- denominators and cuts ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "policy"), [(BGPO, "on"), (BGPO, "off"), (TOKEN, "on")], ids=lambda o: getattr(o, "name", o)
)
def test_two_calls_with_the_step_s_denominator_equal_one(objective, policy):
    model, plan = eurobert(), plan_of(4)
    entries = {"old_sample_elbo": old_scores(model, plan)} if policy == "off" else {}
    batch = Batch({"advantages": ADVANTAGES}, entries)
    report, want = run(model, plan, objective, batch, denominator=3.0)
    model.zero_grad()
    total = 0.0
    for span in (slice(0, 1), slice(1, 3)):
        part = accumulate(model, plan.cut(sequences=span), objective, batch.cut(sequences=span), denominator=3.0)
        total += float(part.loss)
    assert worst_gradient_error(gradients(model), want) < 1e-12
    assert total == pytest.approx(float(report.loss), rel=1e-12)


@pytest.mark.parametrize("policy", ["on", "off"])
@pytest.mark.parametrize("law", ["exact", "bernoulli"])
def test_sequences_without_masked_tokens_add_the_same_loss_whatever_the_cut(policy, law):
    """BGPO's term of a sequence without masked tokens is -A / K: no gradient, but part of the loss."""
    model = eurobert()
    plan = plan_of(4, law=law, empty=(1,), **({"t": 0.3} if law == "bernoulli" else {}))
    entries = {"old_sample_elbo": old_scores(model, plan)} if policy == "off" else {}
    batch = Batch({"advantages": ADVANTAGES}, entries)
    want, want_grads = run(model, plan, BGPO, batch, samples_per_pass=4)
    for cut in ({}, {"sequences_per_pass": 1}, {"sequences_per_pass": 2, "samples_per_pass": 3}):
        report, got = run(model, plan, BGPO, batch, **cut)
        assert worst_gradient_error(got, want_grads) < 1e-12
        assert float(report.loss) == pytest.approx(float(want.loss), rel=1e-12), cut
        torch.testing.assert_close(report.sample_elbo_BK, want.sample_elbo_BK)


@pytest.mark.parametrize("objective", [BGPO, RATIO, CENTRED, TOKEN], ids=lambda o: o.name)
def test_a_batch_without_a_single_masked_token_leaves_the_gradients_alone(objective):
    model, plan = eurobert(), plan_of(2, empty=(0, 1, 2))
    report, got = run(model, plan, objective, batch_of(objective, model, plan), denominator=3.0)
    assert report.backwards == 0
    assert torch.isfinite(report.loss)
    assert (report.sample_elbo_BK == 0).all()
    assert all((g == 0).all() for g in got.values())


def test_cuts_without_masked_tokens_are_not_run():
    model, plan = eurobert(), plan_of(4, empty=(0, 2))
    report, _ = run(model, plan, BGPO, Batch({"advantages": ADVANTAGES}), sequences_per_pass=1)
    assert report.backwards == report.forwards == 4


def test_gradients_are_added_to_what_is_there():
    model, plan = eurobert(), plan_of(2)
    batch = Batch({"advantages": ADVANTAGES})
    _, once = run(model, plan, BGPO, batch)
    accumulate(model, plan, BGPO, batch)
    assert worst_gradient_error(gradients(model), {n: 2 * g for n, g in once.items()}) < 1e-12


def test_the_same_call_gives_the_same_bits():
    model, plan = eurobert(dtype=torch.float32), plan_of(4)
    batch = Batch({"advantages": ADVANTAGES.float()}, {"old_sample_elbo": torch.zeros(B, 4)})
    _, first = run(model, plan, BGPO, batch)
    _, second = run(model, plan, BGPO, batch)
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_scores_without_gradients_equal_those_of_the_training_pass_bit_for_bit():
    """A ratio that should be 1 on-policy must be exactly 1."""
    model, plan = eurobert(dtype=torch.float32), plan_of(4)
    old = score_samples(model, plan)
    assert not old.requires_grad
    report, _ = run(model, plan, BGPO, Batch({"advantages": ADVANTAGES.float()}, {"old_sample_elbo": old}))
    assert torch.equal(report.sample_elbo_BK, old)
    # sums in float64 of a float32 body's figures, whose last bits depend on the sizes of its products
    torch.testing.assert_close(score_samples(model, plan, samples_per_pass=3, sequences_per_pass=2), old, rtol=2e-6, atol=0)


def test_it_works_under_headless_and_restores_the_model():
    model, plan = eurobert(), plan_of(2)
    batch = Batch({"advantages": ADVANTAGES})
    _, want = run(model, plan, BGPO, batch)
    with headless(model):
        _, got = run(model, plan, BGPO, batch)
    assert worst_gradient_error(got, want) < 1e-14
    assert model(plan.input_ids_BS).logits.shape == (B, S, 11)


def test_an_attention_mask_is_cut_along_with_the_sequences():
    model, plan = eurobert(), plan_of(3)
    attention = torch.ones(B, S, dtype=torch.int64)
    attention[1, :2] = 0
    with torch.no_grad():
        logits = model(plan.noisy_ids.reshape(3 * B, S), attention_mask=attention[None].expand(3, B, S).reshape(3 * B, S)).logits
        logp = logits.reshape(-1, 11).log_softmax(-1)[plan.rows.index].gather(1, plan.rows.target[:, None])[:, 0]
    want = plan.elbo(logp)
    for cut in CUTS:
        report, _ = run(model, plan, BGPO, Batch({"advantages": ADVANTAGES}), model_kwargs={"attention_mask": attention}, **cut)
        torch.testing.assert_close(report.sample_elbo_BK, want)
        torch.testing.assert_close(score_samples(model, plan, model_kwargs={"attention_mask": attention}, **cut), want)


def test_a_removed_tail_must_be_out_of_the_attention_mask():
    """With the mask, scores are those of the sequences cut at their EOS; without it they would be others."""
    model, ids = eurobert(), torch.tensor([[3, 4, 5, 9, 6, 7], [3, 4, 5, 6, 7, 9]])
    completion, tail = torch.arange(6).expand(2, 6) >= 2, torch.tensor([[False] * 4 + [True] * 2, [False] * 6])
    given = {"law": "exact", "samples": 3, "seed": 0, "sequence_ids": torch.arange(2), "mask_id": 10, "eos_id": 9}
    plan, shown = (make_mask_plan(ids, completion, tail=tail, **given) for tail in ("removed", "shown"))
    short = make_mask_plan(ids[:1, :4], completion[:1, :4], **{**given, "sequence_ids": torch.arange(1)})
    cut_B, shown_B = score_samples(model, short)[0], score_samples(model, shown)[0]
    assert not torch.allclose(cut_B, shown_B, rtol=1e-3)
    sees = (~tail)[:, None, None].expand(2, 1, 6, 6)
    additive = torch.zeros(2, 1, 6, 6, dtype=F64).masked_fill(~sees, torch.finfo(F64).min)
    for mask in ((~tail).long(), ~tail, sees, additive):
        torch.testing.assert_close(score_samples(model, plan, model_kwargs={"attention_mask": mask})[0], cut_B)
    batch, call = Batch({"advantages": torch.ones(2, dtype=F64)}), {"samples_per_pass": 2}
    for mask in (None, torch.ones(2, 6), torch.ones(2, 1, 6, 6, dtype=torch.bool), torch.zeros_like(additive)):
        kwargs = {} if mask is None else {"model_kwargs": {"attention_mask": mask}}
        with pytest.raises(ValueError, match=r"attention_mask must leave out .* that shows 2 token\(s\)"):
            run(model, plan, BGPO, batch, **kwargs, **call)
        with pytest.raises(ValueError, match="attention_mask must leave out"):
            score_samples(model, plan, **kwargs)
    score_samples(model, plan.cut(sequences=slice(1, 2)))  # has no tail
    with pytest.raises(ValueError, match=r"attention_mask must have shape \[2, 6\]"):
        score_samples(model, plan, model_kwargs={"attention_mask": torch.ones(2, 6, 6, 6, 6)})


# --- bad input ----------------------------------------------------------------------------------------------


def test_dropout_is_refused_where_two_passes_must_agree_and_allowed_where_one_is_made():
    model, plan = eurobert(attention_dropout=0.1).train(), plan_of(4)
    for objective in (RATIO, CENTRED):
        with pytest.raises(ValueError, match=r"model.*dropout"):
            accumulate(model, plan, objective, batch_of(objective, eurobert(), plan), denominator=3.0)
    assert accumulate(model, plan, BGPO, Batch({"advantages": ADVANTAGES})).passes == 1
    with pytest.raises(ValueError, match=r"model.*dropout"):  # the old scores are another pass
        accumulate(model, plan, RATIO, batch_of(RATIO, eurobert(), plan), samples_per_pass=4)
    with pytest.raises(ValueError, match=r"model.*dropout"):
        score_samples(model, plan)
    model.eval()
    assert accumulate(model, plan, RATIO, batch_of(RATIO, eurobert(), plan), samples_per_pass=4).passes == 1
    assert accumulate(model, plan, RATIO, batch_of(RATIO, model, plan)).passes == 2


def test_an_error_names_the_argument():
    model, plan = eurobert(), plan_of(2)
    good = Batch({"advantages": ADVANTAGES})
    with pytest.raises(ValueError, match=r"denominator.*groups"):
        accumulate(model, plan, CENTRED, good)
    for denominator in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="denominator"):
            accumulate(model, plan, BGPO, good, denominator=denominator)
    with pytest.raises(ValueError, match="advantages"):
        accumulate(model, plan, BGPO, Batch({"advantages": ADVANTAGES[:2]}))
    with pytest.raises(ValueError, match=r"old_sample_elbo.*\[3, 2\].*\[2, 3\]"):
        accumulate(model, plan, BGPO, Batch({"advantages": ADVANTAGES}, {"old_sample_elbo": torch.zeros(2, 3)}))
    old = torch.zeros(B, 2)
    for batch, words in (
        (Batch(), r"per_sequence must hold 'advantages'"),
        (Batch({"advantages": ADVANTAGES[:, None]}), r"advantages must have 1 dimension"),
        (Batch({"advantages": ADVANTAGES}, {"old_sample_elbo": old[..., None]}), r"old_sample_elbo must have 2 dimension"),
        (Batch({"advantages": ADVANTAGES}, {"old_sample_elbos": old}), r"per_sample holds 'old_sample_elbos'"),
        (Batch({"advantages": ADVANTAGES, "old_sample_elbo": old}), r"per_sequence holds 'old_sample_elbo'"),
        (Batch({"advantages": ADVANTAGES, "group_ids": torch.arange(B)}), r"per_sequence holds 'group_ids'"),
        (Batch({"advantages": ADVANTAGES * math.nan}), r"advantages must be finite"),
        (Batch({"advantages": ADVANTAGES.to("meta")}), r"advantages must be on the device"),
    ):
        with pytest.raises(ValueError, match=words):
            accumulate(model, plan, BGPO, batch)
    with pytest.raises(ValueError, match="samples_per_pass"):
        accumulate(model, plan, BGPO, good, samples_per_pass=0)
    with pytest.raises(ValueError, match=r"sequences_per_pass.*-1"):
        score_samples(model, plan, sequences_per_pass=-1)
    in_backward = eurobert()
    in_backward.model.norm.weight.register_post_accumulate_grad_hook(lambda parameter: None)
    with pytest.raises(ValueError, match=r"model.*optimizer in backward"):
        accumulate(in_backward, plan, BGPO, good)
    with pytest.raises(ValueError, match="no_grad"), torch.no_grad():
        accumulate(model, plan, BGPO, good)
    with pytest.raises(ValueError, match="K=2, B=0"):
        accumulate(model, plan.cut(sequences=slice(0, 0)), BGPO, Batch({"advantages": ADVANTAGES[:0]}), denominator=4)
    with pytest.raises(TypeError, match=r"samples must be a slice"):
        plan.cut(samples=1)
    with pytest.raises(ValueError, match="sequences_per_pass"):
        accumulate(model, plan, BGPO, good, sequences_per_pass=0)
    with pytest.raises(ValueError, match="attention_mask"):
        accumulate(model, plan, BGPO, good, model_kwargs={"attention_mask": torch.ones(2, S)})
    with pytest.raises(ValueError, match=r"model.*output embedding"):
        accumulate(model.model, plan, BGPO, good)
    assert all(p.grad is None for p in model.parameters())
    assert "forward" not in model.get_output_embeddings().__dict__


@pytest.mark.parametrize("samples_per_pass", [1, 3])
def test_scores_of_thousands_of_nats_are_summed_in_float64(samples_per_pass):
    """GDPO's raw ratio: what fp32 log-probs say of it, to the last digits of the coefficients that they are given."""
    model, other = (eurobert(vocab=64, hidden=16, layers=1, dtype=torch.float32) for _ in range(2))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 1e-4 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    ids, given = torch.randint(3, 60, (2, 384), generator=torch.Generator().manual_seed(0)), {"seed": 0, "mask_id": 60}
    plan = make_mask_plan(
        ids, torch.arange(384).expand(2, 384) >= 4, law="quadrature", samples=3, sequence_ids=torch.arange(2), **given
    )
    score_N, old_N = (score_samples(m, plan, per_token=True).transpose(0, 1)[plan.scored].double() for m in (model, other))
    share_N = plan.rows.weight.double() * plan.share_K[plan.rows.sample]

    def elbo(logp_N):
        return torch.zeros(2, dtype=F64).index_add(0, plan.rows.sequence, logp_N * share_N)

    advantages, leaf_N = torch.tensor([1.0, -1.0], dtype=F64), score_N.requires_grad_(True)
    want_loss = gdpo(elbo(leaf_N), elbo(old_N), advantages, plan.lengths_B, mode="paper")
    (coef_N,) = torch.autograd.grad(want_loss, leaf_N)
    coef_KBS = torch.zeros(plan.shape, dtype=F64).masked_scatter(plan.scored, coef_N)

    def weighed(logp_N, cut, _):
        return (coef_KBS[cut.sample_K][:, cut.sequence_ids_B][cut.scored] * logp_N).sum()

    known = Objective("known", weighed, "none", "none", "sequences", None)
    cut = {"denominator": 1.0, "samples_per_pass": samples_per_pass}
    _, want = run(model, plan, known, Batch(), **cut)
    old_B = (score_samples(other, plan) * plan.share_K).sum(-1)
    batch = Batch({"advantages": advantages / 2, "old_elbo": old_B})
    report, got = run(model, plan, gdpo_objective(mode="paper"), batch, **cut)
    assert float(elbo(score_N)[0]) < -1000
    assert worst_gradient_error(got, want) < 1e-6
    assert float(report.loss) == pytest.approx(float(want_loss.detach()), rel=1e-12)
    assert report.sample_elbo_BK.dtype == old_B.dtype == F64


@pytest.mark.parametrize("coupling", ["sequence", "batch"])
def test_a_sample_without_weight_still_counts_for_those_it_is_coupled_with(coupling):
    model, plan = eurobert(), plan_of(4)
    weight_BK = torch.ones(B, 4, dtype=F64)
    weight_BK[0, 1] = weight_BK[2, 3] = 0.0

    def contributions(logp_N, plan, batch):
        elbo_BK = plan.elbo(logp_N)
        mean = elbo_BK.mean() if coupling == "batch" else elbo_BK.mean(1, keepdim=True)
        return (batch.per_sample["weight"] * (elbo_BK - mean) ** 2).sum()

    objective = Objective("spread", contributions, coupling, coupling, "sequences", None, per_sample=("weight",), scale="weight")
    batch = Batch({}, {"weight": weight_BK})
    want_loss, want = full_graph(model, lambda logp: contributions(logp, plan, batch) / B, plan)
    for samples in (1, 4):
        report, got = run(model, plan, objective, batch, samples_per_pass=samples)
        assert float(report.loss) == pytest.approx(float(want_loss), rel=1e-10)
        assert worst_gradient_error(got, want) < 1e-10


# --- where the head's gradient is added up ----------------------------------------------------------------------------


def float_sums(model, plan):
    """dW of BGPO on-policy, from the same hidden states, added up in fp32 by `head_backward`, sample by sample."""
    model.zero_grad()
    sums, K = torch.zeros_like(model.lm_head.weight, dtype=torch.float32), len(plan.sample_K)
    coefficients = (ADVANTAGES / K / len(ADVANTAGES)).float()
    with torch.no_grad(), headless(model) as body:
        for k in range(K):
            cut = plan.cut(samples=slice(k, k + 1))
            hidden, rows = body(cut.noisy_ids), cut.rows
            coef_N = -coefficients[rows.sequence] * rows.weight
            head_backward(hidden, body.weight, Rows(rows.index, rows.target), coef_N, dweight_out=sums)
    return sums


def test_the_gradient_of_a_16_bit_head_is_rounded_once_for_64_samples():
    model, plan = eurobert(dtype=torch.bfloat16), plan_of(64)
    _, got = run(model, plan, BGPO, Batch({"advantages": ADVANTAGES}))
    want = float_sums(model, plan)
    error = (got["lm_head.weight"].float() - want).norm() / want.norm()
    assert error < 2**-9, "64 roundings instead of one"


def test_hooks_on_the_head_s_weight_see_what_autograd_delivers():
    model, plan = eurobert(), plan_of(4)
    batch, seen = Batch({"advantages": ADVANTAGES}), []
    _, want = run(model, plan, BGPO, batch)
    handle = model.lm_head.weight.register_hook(lambda gradient: seen.append(gradient.clone()))
    _, got = run(model, plan, BGPO, batch)
    handle.remove()
    assert len(seen) == 4
    assert worst_gradient_error({"w": sum(seen)}, {"w": want["lm_head.weight"]}) < 1e-12
    assert worst_gradient_error(got, want) < 1e-12


def test_no_second_gradient_of_the_head_is_made():
    """What lives at the end of each backward: one `[V, H]` beside the weight."""
    model, plan = eurobert(vocab=977, dtype=torch.float32), plan_of(3)
    most = 0

    def count(*_):
        nonlocal most
        shape = model.lm_head.weight.shape
        alive = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter) and x.shape == shape]
        most = max(most, len({x.untyped_storage().data_ptr() for x in alive}))

    handle = model.model.layers[0].register_full_backward_hook(count)
    run(model, plan, BGPO, Batch({"advantages": ADVANTAGES}))
    handle.remove()
    assert most == 3, "weight, its gradient, and the input embedding, which has its shape"


@pytest.mark.parametrize("objective", [RATIO, CENTRED], ids=lambda o: o.name)
def test_a_frozen_head_s_vectors_are_kept_between_two_passes(objective, monkeypatch):
    """The second pass then has no product of the head; without room for them it has two."""
    model, plan = eurobert(), plan_of(4)
    head = model.lm_head.weight.requires_grad_(False)
    batch = batch_of(objective, model, plan)
    kept, got = run(model, plan, objective, batch, denominator=3.0)
    monkeypatch.setattr(plans, "KEEP_BYTES", 0)
    made_again, want = run(model, plan, objective, batch, denominator=3.0)
    assert kept.passes == made_again.passes == 2
    assert worst_gradient_error(got, want) < 1e-12
    assert kept.rows == len(plan.rows)
    late = made_again.rows - kept.rows  # with a coefficient
    assert late == len(plan.rows) or objective is RATIO
    assert made_again.flops - kept.flops == 2 * (2 * late - kept.rows) * head.numel()


@pytest.mark.parametrize("keep_bytes", [0, plans.KEEP_BYTES], ids=["made again", "kept"])
def test_coefficients_that_are_not_finite_are_refused_between_two_passes(keep_bytes, monkeypatch):
    """A ratio far out of range must not become a gradient, whether a frozen head's vectors are kept or made again."""
    monkeypatch.setattr(plans, "KEEP_BYTES", keep_bytes)
    model, plan = eurobert(dtype=torch.float32), plan_of(4)
    model.lm_head.weight.requires_grad_(False)
    old = torch.full((B,), -1e4, dtype=F64)
    batch = Batch({"advantages": ADVANTAGES, "old_elbo": old})
    with pytest.raises(ValueError, match=r"coef must be finite, got -?inf"):
        accumulate(model, plan, gdpo_objective(), batch)
    assert all(p.grad is None for p in model.parameters())
