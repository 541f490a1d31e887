"""What `accumulate` leaves out, divides by and reports; several ranks; references without a second copy of
the weights.
"""

import contextlib
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, addmm_flop

from dllm_kernels import accumulate
from dllm_kernels.accumulation.micro_batches import in_step, make_cuts
from dllm_kernels.accumulation.ranks import denominator
from dllm_kernels.accumulation.scores import adapters_off, score_samples
from dllm_kernels.head import plans
from dllm_kernels.objectives import (
    BGPO,
    Batch,
    diffu_grpo_objective,
    egspo_objective,
    egspo_sa_objective,
    gdpo_objective,
    rspo_objective,
    spg_objective,
    trace_rl_objective,
    vrpo_objective,
    wd1_objective,
)
from tests import oracle
from tests.accumulation import ranked_accumulation
from tests.accumulation.runs import full_graph, run
from tests.plans import plan_of
from tests.tiny import eurobert, gradients, worst_gradient_error

F64 = torch.float64
LENGTHS = [5, 4, 0, 7]
SOME = torch.tensor([1.0, 0.0, 2.0, -0.5], dtype=F64)  # the second has no advantage, the third no token


def model_of(**options):
    return eurobert(vocab=100, **options)


CASES = {
    "bgpo, on-policy": (BGPO, "exact", {}, 4),
    "bgpo, off-policy": (BGPO, "exact", {"old_sample_elbo": "sample"}, 4),
    "token": (diffu_grpo_objective(beta=0.0), "full", {"old_logp": "token"}, 4),
    "sequence": (gdpo_objective(), "exact", {"old_elbo": "sequence"}, 4),
    "sequence, one pass": (spg_objective(), "block", {}, 2),
    "weights": (wd1_objective(), "full", {}, 4),
}


def case(name, model):
    objective, law, wanted, samples = CASES[name]
    plan = plan_of(LENGTHS, law=law, samples=samples)
    dense = score_samples(model, plan, per_token=True) - 0.1
    scores = {"token": dense, "sample": score_samples(model, plan) - 0.1}
    scores["sequence"] = plan.score(oracle.plan_logps(model, plan).detach()) - 0.1
    per_sequence = {objective.scale: SOME} | {k: scores[v] for k, v in wanted.items() if v == "sequence"}
    per_sample = {k: scores[v] for k, v in wanted.items() if v != "sequence"}
    return objective, plan, Batch(per_sequence, per_sample)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("cut", [{}, {"samples_per_pass": 4}, {"sequences_per_pass": 1}], ids=str)
def test_what_has_no_weight_is_not_run_and_changes_neither_loss_nor_gradient(name, cut):
    model = model_of()
    objective, plan, batch = case(name, model)
    want_loss, want = full_graph(model, plan, objective, batch, 3.0)
    seen = []
    handle = model.register_forward_pre_hook(lambda _m, _a, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True)
    report, got = run(model, plan, objective, batch, denominator=3.0, **cut)
    handle.remove()
    assert worst_gradient_error(got, want) < 1e-10
    assert float(report.loss) == pytest.approx(want_loss, rel=1e-10)
    K = plan.shape[0]
    assert sum(seen) == 2 * K * report.passes, "only the first and the last sequence have weight and tokens"
    assert report.rows == report.passes * int(plan.counts[:, [0, 3]].sum())
    assert report.sample_elbo_BK[1].isnan().all()
    assert not report.sample_elbo_BK[[0, 2, 3]].isnan().any()
    assert (report.sample_elbo_BK[2] == 0).all()
    torch.testing.assert_close(report.sample_elbo_BK[[0, 3]], score_samples(model, plan)[[0, 3]], rtol=1e-10, atol=1e-10)


def test_a_step_without_any_weight_runs_nothing():
    model, plan = model_of(), plan_of(LENGTHS)
    report, got = run(model, plan, BGPO, Batch({"advantages": torch.zeros(4, dtype=F64)}))
    assert (report.forwards, report.backwards, report.rows, float(report.loss), got) == (0, 0, 0, 0.0, {})


def test_what_the_first_pass_finds_to_be_clipped_does_not_run_again():
    model, plan = model_of(), plan_of([5, 4, 6, 7])
    old = plan.score(oracle.plan_logps(model, plan).detach())
    old[:2] -= 9.0  # ratios far above 1 + epsilon
    batch = Batch({"advantages": torch.tensor([1.0, 1.0, -1.0, 2.0], dtype=F64), "old_elbo": old})
    want_loss, want = full_graph(model, plan, gdpo_objective(), batch, 4)
    report, got = run(model, plan, gdpo_objective(), batch)
    assert worst_gradient_error(got, want) < 1e-10
    assert float(report.loss) == pytest.approx(want_loss, rel=1e-10)
    assert report.rows == len(plan.rows) + int(plan.counts[:, 2:].sum()) < 2 * len(plan.rows)
    torch.testing.assert_close(report.sample_elbo_BK, score_samples(model, plan))


def test_steps_without_an_advantage_are_dropped_one_by_one():
    model, plan = model_of(), plan_of([5, 4, 6], law="trace", samples=None)
    K = plan.shape[0]
    advantages = torch.randn(3, K, generator=torch.Generator().manual_seed(0), dtype=F64)
    advantages[0, 1:] = 0.0
    advantages[1] = 0.0
    old = score_samples(model, plan) - 0.1
    batch = Batch({}, {"step_advantages": advantages, "old_sample_elbo": old})
    objective = egspo_sa_objective(beta=0.0, tokens_per_step=1)
    want_loss, want = full_graph(model, plan, objective, batch, float((plan.counts > 0).sum()))
    report, got = run(model, plan, objective, batch)
    assert worst_gradient_error(got, want) < 1e-10
    assert float(report.loss) == pytest.approx(want_loss, rel=1e-10)
    assert report.rows == int(plan.counts[0, 0] + plan.counts[:, 2].sum())


@pytest.mark.parametrize("shift", [0, 1])
def test_rows_of_a_part_of_a_cut_are_the_rows_of_that_part(shift):
    """Pairs with few tokens and with none, in one cut: each row stays with its sequence, shifted or not."""
    model, plan = model_of(), plan_of(LENGTHS, law="bernoulli", t=0.2, samples=6, shift=shift)
    assert (plan.counts == 0).any()
    assert (plan.counts > 0).any()
    batch = Batch({"advantages": SOME})
    want_loss, want = full_graph(model, plan, BGPO, batch, 4)
    for cut in ({"samples_per_pass": 6}, {}, {"samples_per_pass": 4, "sequences_per_pass": 3}):
        report, got = run(model, plan, BGPO, batch, **cut)
        assert worst_gradient_error(got, want) < 1e-10
        assert float(report.loss) == pytest.approx(want_loss, rel=1e-10)


# --- denominators -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "law", "entries", "want"),
    [
        (BGPO, "exact", {"advantages": SOME}, 4),
        (diffu_grpo_objective(beta=0.0), "full", {"advantages": SOME}, 16),
        (wd1_objective(), "full", {"weights": SOME, "group_ids": torch.tensor([3, 3, 9, 5])}, 3),
        (egspo_objective(beta=0.0, tokens_per_step=1), "trace", {"advantages": SOME}, 5 + 4 + 5),
        (trace_rl_objective(), "trace", {"advantages": SOME}, 5 + 4 + 5),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_the_default_denominator_is_counted_from_the_plan_and_the_batch(objective, law, entries, want):
    model, plan = model_of(), plan_of(LENGTHS, law=law, samples=None if law == "trace" else 2)
    report, got = run(model, plan, objective, Batch(entries))
    given, expected = run(model, plan, objective, Batch(entries), denominator=float(want))
    assert float(report.loss) == float(given.loss)
    assert worst_gradient_error(got, expected) == 0.0


def test_pairs_are_half_the_sequences():
    model, plan = model_of(), plan_of([5, 4, 6, 7])
    entries = {"ref_elbo": SOME, "group_ids": torch.tensor([3, 3, 9, 9]), "chosen": torch.tensor([True, False, False, True])}
    objective = vrpo_objective(beta=0.1)
    report, _ = run(model, plan, objective, Batch(entries))
    given, _ = run(model, plan, objective, Batch(entries), denominator=2.0)
    assert float(report.loss) == float(given.loss)
    assert denominator(objective, plan_of([5, 4]), Batch(entries), None) == 1.0


def test_one_unit_is_divided_by_one_and_none_too():
    for lengths, want in (([5], 5.0), ([1], 1.0), ([0], 1.0)):
        plan = plan_of(lengths, law="full", samples=1)
        assert denominator(diffu_grpo_objective(), plan, Batch(), None) == want, "tokens"
        assert denominator(BGPO, plan, Batch(), None) == 1.0, "sequences"


def test_groups_that_cannot_be_counted_need_a_denominator():
    with pytest.raises(ValueError, match=r"denominator.*wd1.*group_ids"):
        accumulate(model_of(), plan_of(LENGTHS), wd1_objective(), Batch({"weights": SOME}))


# --- reports ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True])
def test_flops_by_formula_are_those_that_torch_counts_but_for_attention(frozen, monkeypatch):
    # 512 rows, since the head pads to blocks; a vocabulary against which attention, which the formula leaves
    # out, is small
    model, plan = eurobert(vocab=4000, hidden=64, layers=1), plan_of([64] * 8, law="full", samples=2)
    advantages = torch.linspace(-1, 2, 8, dtype=F64)
    model.get_output_embeddings().weight.requires_grad_(not frozen)
    old = score_samples(model, plan)
    sequence = Batch({"advantages": advantages, "old_elbo": old.mean(1)})
    sample = Batch({"advantages": advantages}, {"old_sample_elbo": old})
    keep = plans.KEEP_BYTES
    cases = [(gdpo_objective(), sequence, keep), (BGPO, sample, keep), (BGPO, Batch({"advantages": advantages}), keep)]
    cases += [] if frozen else [(BGPO, sample, 0)]  # nothing may be kept: backward recomputes
    for objective, batch, keep_bytes in cases:
        monkeypatch.setattr(plans, "KEEP_BYTES", keep_bytes)
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_flop}) as counter:
            report, _ = run(model, plan, objective, batch)
        assert counter.get_total_flops() == pytest.approx(report.flops, rel=0.15), (objective.name, keep_bytes)
        assert report.flops == run(model, plan, objective, batch)[0].flops


# --- old and reference policies -----------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [{}, {"samples_per_pass": 3, "sequences_per_pass": 3}], ids=str)
def test_scores_per_token_stand_at_their_tokens(cut):
    model, plan = model_of(), plan_of(LENGTHS, law="bernoulli", t=0.3, samples=4)
    dense = score_samples(model, plan, per_token=True, **cut)
    assert list(dense.shape) == [4, 4, plan.shape[2]]
    assert not dense.requires_grad
    torch.testing.assert_close(dense.transpose(0, 1)[plan.scored], oracle.plan_logps(model, plan).detach())
    assert (dense.transpose(0, 1)[~plan.scored] == 0).all()
    torch.testing.assert_close(
        (dense.sum(-1) * plan.weight_KB.t()).double(), score_samples(model, plan, **cut), rtol=1e-6, atol=1e-6
    )


class LowRank(torch.nn.Module):
    """A LoRA-like adapter over a linear layer, and peft's `disable_adapter` on the model that has it."""

    def __init__(self, base):
        super().__init__()
        self.base, self.on = base.requires_grad_(False), True
        self.down = torch.nn.Parameter(torch.randn(2, base.in_features, dtype=F64) / 4)
        self.up = torch.nn.Parameter(torch.randn(base.out_features, 2, dtype=F64) / 4)

    def forward(self, x):
        return self.base(x) + (x @ self.down.t() @ self.up.t() if self.on else 0.0)


def with_adapters(model):
    model.requires_grad_(False)
    adapters = []
    for layer in model.model.layers:
        layer.self_attn.q_proj = LowRank(layer.self_attn.q_proj)
        adapters.append(layer.self_attn.q_proj)

    @contextlib.contextmanager
    def disable_adapter():
        for adapter in adapters:
            adapter.on = False
        try:
            yield
        finally:
            for adapter in adapters:
                adapter.on = True

    model.disable_adapter = disable_adapter
    return model


def test_a_model_with_adapters_is_its_own_reference_with_them_off():
    torch.manual_seed(0)
    plan, base = plan_of(LENGTHS), model_of()
    want = score_samples(base, plan)
    model = with_adapters(model_of())
    before = score_samples(model, plan)
    with adapters_off(model):
        reference = score_samples(model, plan)
    assert torch.equal(reference, want)
    assert not torch.allclose(before[[0, 1, 3]], want[[0, 1, 3]], rtol=1e-3)
    assert torch.equal(score_samples(model, plan), before), "the adapters are on again"
    batch = Batch({"advantages": SOME, "ref_elbo": reference.mean(1)})
    report, got = run(model, plan, rspo_objective(), batch)
    assert report.passes == 2
    assert {name.rpartition(".")[2] for name in got} == {"down", "up"}
    want_loss = rspo_objective().contributions(oracle.plan_logps(model, plan), plan, batch) / 4
    model.zero_grad()
    want_loss.backward()
    assert worst_gradient_error(got, gradients(model)) < 1e-10


def test_a_model_without_adapters_says_so():
    with pytest.raises(ValueError, match=r"model.*disable_adapter"), adapters_off(model_of()):
        pass


def test_peft_s_adapters_are_switched_off():
    peft = pytest.importorskip("peft")
    plan, base = plan_of(LENGTHS), model_of()
    want = score_samples(base, plan)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    with adapters_off(model):
        torch.testing.assert_close(score_samples(model, plan), want)
    assert not torch.allclose(score_samples(model, plan)[0], want[0])


# --- ranks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [3, 5])
def test_a_rank_with_fewer_cuts_makes_idle_calls_and_the_last_of_all_reduces(most):
    told = []
    shards = SimpleNamespace(most=lambda count: max(count, most), before_call=lambda **call: told.append(call))
    idle = SimpleNamespace(shards=shards, idle=lambda tokens, kwargs, *, backward: told.append((tokens, kwargs, backward)))
    plan = plan_of(LENGTHS, samples=4)
    cuts = make_cuts(plan, Batch(), None, 1, None)
    seen = list(in_step(cuts, idle, lambda cut: cut.samples.start != 1, backward=True, last=True))
    assert [cut.samples.start for cut in seen] == [0, 1, 2, 3], "a cut that does not run is handed on without a call"
    calls = [call for call in told if isinstance(call, dict)]
    assert calls == [{"backward": True, "reduce": n == most - 1} for n in range(most)]
    assert [call for call in told if isinstance(call, tuple)] == [(plan.shape[2], {}, True)] * (most - 3)
    told.clear()
    list(in_step(cuts, idle, lambda cut: True))
    assert [call for call in told if isinstance(call, dict)] == [{"backward": False, "reduce": False}] * max(4, most)


def test_two_ranks_couple_their_batches_as_one_call_does(tmp_path):
    command = [sys.executable, "-m", "tests.accumulation.ranked_accumulation", str(tmp_path / "store"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "out")
    assert set(found) == set(ranked_accumulation.cases())
    for name, (loss, summed) in found.items():
        objective, plan, batch = ranked_accumulation.cases()[name]
        model = ranked_accumulation.model()
        report, want = run(model, plan, objective, batch)
        assert worst_gradient_error(summed, want) < 1e-10, name
        assert loss == pytest.approx(float(report.loss), rel=1e-10), name
