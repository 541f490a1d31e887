"""`explain`: the plan it names is the plan that runs, and the memory it predicts is the memory that is measured."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from dllm_kernels import backends, explain, score_tokens
from dllm_kernels.backends import reference
from dllm_kernels.backends.contract import Low
from dllm_kernels.backends.divergence import walk
from dllm_kernels.head import plans
from tests.head_suite import LATE_PLANS, PLANS, make_case

MB = 2**20
V, H, N = 32768, 256, 1024

# Prints the growth of the peak resident set over the resident set before the call, which a tiny call has warmed up.
PROBE = """
import sys
import torch
from dllm_kernels import score_tokens
plan, dtype, V, H, N, rows, M, k, R = sys.argv[1], getattr(torch, sys.argv[2]), *map(int, sys.argv[3:10])
torch.set_num_threads(1)

def resident(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))

def inputs(V, H, N):
    trains = plan in ("coef", "keep", "recompute")
    hidden = torch.randn(2 * N if rows else N, H).to(dtype).requires_grad_(plan != "forward")
    weight = torch.randn(V, H).to(dtype).requires_grad_(trains)
    low = [torch.randn(*size).to(dtype).requires_grad_(trains) for size in ((R, H), (V, R))] if R else []
    return hidden, weight, torch.randint(V, (N,)), torch.arange(N) * 2 if rows else None, *low

def call(hidden, weight, target, index, *low):
    more = {"coef": torch.ones(len(target))} if plan == "coef" else {"plan": plan}
    ids = torch.randint(len(weight), (len(target), M)) if M else None
    if low:
        more["low_rank"] = *low, 0.5
    want = ("logp", "entropy")
    scores = score_tokens(hidden, weight, target, ids=ids, want_top=min(k, 3 * len(weight) // 4), rows=index, want=want, **more)
    if plan == "coef":
        scores.weighted_sum.backward()
    elif plan != "forward":
        total = scores.logp.sum() + scores.entropy.sum()
        (total + sum(x.sum() for x in (scores.ids_logp, scores.best_logp) if x is not None)).backward()
    return scores

call(*inputs(64, 32, 300))
big = inputs(V, H, N)
before = resident("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # sets the peak back
keep = call(*big)
print(resident("VmHWM") - before)
"""


def measured(backend, plan, dtype, rows, V=V, H=H, N=N, M=0, k=0, R=0):
    environment = {**os.environ, "DLLM_KERNELS_BACKEND": backend, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    arguments = [plan, str(dtype).removeprefix("torch."), V, H, N, int(rows), M, k, R]
    command = [sys.executable, "-c", PROBE, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, env=environment)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def predicted(plan, dtype, rows, M=0, k=0, R=0):
    trains, grad = plan in ("coef", "keep", "recompute"), plan != "forward"
    hidden = torch.empty(2 * N if rows else N, H, dtype=dtype, device="meta", requires_grad=grad)
    weight = torch.empty(V, H, dtype=dtype, device="meta", requires_grad=trains)
    index = torch.empty(N, dtype=torch.int64, device="meta") if rows else None
    coef = torch.empty(N, device="meta") if plan == "coef" else None
    target = torch.empty(N, dtype=torch.int64, device="meta")
    more = {"ids": torch.empty(N, M, dtype=torch.int64, device="meta") if M else None, "want_top": k}
    if R:
        low = [torch.empty(*size, dtype=dtype, device="meta", requires_grad=trains) for size in ((R, H), (V, R))]
        more["low_rank"] = *low, 0.5
    return explain(hidden, weight, target, rows=index, coef=coef, want=("logp", "entropy"), plan=plan, **more).peak_bytes


@pytest.mark.skipif(sys.platform != "linux", reason="/proc holds the peak on Linux alone")
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("plan", ["forward", *PLANS])
def test_the_predicted_peak_is_the_measured_one(plan, dtype, monkeypatch):
    """Within a fiftieth or 5 MiB, whichever is more; the C++ engine, in a fresh process."""
    if "cpu" not in backends.names():
        pytest.skip("the extension is not built")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    rows = plan in ("recompute", "unit")  # some with an index, whose gradient is scattered
    want, got = predicted(plan, dtype, rows), measured("cpu", plan, dtype, rows)
    assert abs(got - want) <= max(5 * MB, want / 50), f"{got / MB:.1f} MiB, predicted {want / MB:.1f}"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc holds the peak on Linux alone")
@pytest.mark.parametrize("plan", ["forward", "coef", "recompute"])
def test_the_peak_is_flat_in_the_number_of_rows_and_within_the_budget(plan):
    """LLaDA's vocabulary, 512 and 16384 rows: beyond results, 256 MiB of workspace and 32 MiB of everything else."""
    if "cpu" not in backends.names():
        pytest.skip("the extension is not built")
    V, H = 126464, 32
    beyond = {}
    for N in (512, 16384):
        results = 4 * N * 4 + (0 if plan == "forward" else 4 * (2 * N * H + V * H))  # vectors; dH, upstream; dW
        beyond[N] = measured("cpu", plan, torch.float32, False, V, H, N) - results
        assert beyond[N] <= (256 + 32) * MB, f"N={N}: {beyond[N] / MB:.0f} MiB"
    assert beyond[16384] - beyond[512] <= 8 * MB, {N: f"{size / MB:.0f} MiB" for N, size in beyond.items()}


@pytest.mark.skipif(sys.platform != "linux", reason="/proc holds the peak on Linux alone")
@pytest.mark.parametrize(
    ("plan", "M", "k"), [("recompute", 8, 64), pytest.param("keep", 8, 0, marks=pytest.mark.slow), ("forward", 0, 64)]
)
def test_the_predicted_peak_of_several_ids_is_the_measured_one(plan, M, k, monkeypatch):
    if "cpu" not in backends.names():
        pytest.skip("the extension is not built")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    want = predicted(plan, torch.bfloat16, False, M, k)
    got = measured("cpu", plan, torch.bfloat16, False, M=M, k=k)
    assert abs(got - want) <= max(8 * MB, want / 20), f"{got / MB:.1f} MiB, predicted {want / MB:.1f}"


@pytest.mark.skipif(sys.platform != "linux", reason="/proc holds the peak on Linux alone")
@pytest.mark.parametrize("plan", ["coef", *(pytest.param(p, marks=pytest.mark.slow) for p in ("forward", *LATE_PLANS))])
def test_the_predicted_peak_of_a_head_with_an_adapter_is_the_measured_one(plan, monkeypatch):
    if "cpu" not in backends.names():
        pytest.skip("the extension is not built")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    rows = plan in ("recompute", "unit")
    want, got = predicted(plan, torch.bfloat16, rows, R=64), measured("cpu", plan, torch.bfloat16, rows, R=64)
    assert abs(got - want) <= max(8 * MB, want / 20), f"{got / MB:.1f} MiB, predicted {want / MB:.1f}"


@pytest.mark.skipif(sys.platform != "linux", reason="/proc holds the peak on Linux alone")
def test_an_adapter_makes_neither_logits_nor_a_merged_weight():
    """LLaDA's vocabulary, statistics alone: a chunk of logits has 123 MiB, B in fp32 8."""
    if "cpu" not in backends.names():
        pytest.skip("the extension is not built")
    assert measured("cpu", "forward", torch.bfloat16, False, V=126464, H=32, N=512, R=16) <= 6 * MB


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc holds the peak on Linux alone")
@pytest.mark.parametrize("plan", ["forward", *PLANS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_reference_with_an_adapter_stays_below_its_prediction(plan, dtype, monkeypatch):
    monkeypatch.setenv("DLLM_KERNELS_BACKEND", "reference")
    want, got = predicted(plan, dtype, False, R=64), measured("reference", plan, dtype, False, R=64)
    assert want / 2 - 16 * MB <= got <= want + 16 * MB, f"{got / MB:.1f} MiB, predicted {want / MB:.1f}"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc holds the peak on Linux alone")
@pytest.mark.parametrize("plan", ["forward", *PLANS])
def test_the_reference_stays_below_its_prediction(plan, monkeypatch):
    """It is an estimate there: how many copies of a chunk PyTorch's temporaries make depends on what is asked for."""
    monkeypatch.setenv("DLLM_KERNELS_BACKEND", "reference")
    want, got = predicted(plan, torch.float32, False), measured("reference", plan, torch.float32, False)
    assert want / 2 - 16 * MB <= got <= want + 16 * MB, f"{got / MB:.1f} MiB, predicted {want / MB:.1f}"


# --- the plan, in both forms ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("want", [("logp",), ("logp", "entropy"), ("lse", "top_id")])
def test_the_plan_explained_is_the_plan_that_runs_whichever_way_it_is_asked(backend, trains, grad, known, want):
    case = make_case(torch.float32, backend.device)
    hidden, weight = case.hidden.requires_grad_(grad), case.weight.requires_grad_(grad and trains)
    coef = {"coef": case.coef} if known else {}
    ran = score_tokens(hidden, weight, case.target, rows=case.rows, want=want, **coef).plan
    by_tensors = explain(hidden, weight, case.target, rows=case.rows, want=want, **coef)
    numbers = {"rows": 11, "hidden_size": 6, "vocabulary": 13, "device": backend.device}
    by_numbers = explain(**numbers, want=want, wants_gradient=grad, trainable_head=trains, coef_known=known)
    assert ran == by_tensors.plan == by_numbers.plan
    assert by_tensors.backend == backend.name
    for name in ("forward_gemms", "backward_gemms", "flops", "passes", "output_bytes", "workspace_bytes"):
        assert getattr(by_tensors, name) == getattr(by_numbers, name), name


def test_a_large_trainable_head_is_recomputed_and_a_16_bit_one_stores_twice_as_many_rows():
    sizes = {"hidden_size": 64, "vocabulary": 126464, "trainable_head": True}
    for dtype, rows in ((torch.float32, 530), (torch.bfloat16, 1061)):
        assert explain(rows=rows, dtype=dtype, **sizes).plan == "keep"
        assert explain(rows=rows + 1, dtype=dtype, **sizes).plan == "recompute"


def test_flops_are_those_of_the_design():
    sizes = {"rows": 512, "hidden_size": 1024, "vocabulary": 126464}
    product = 2 * 512 * 1024 * 126464
    for more, products in (
        ({"wants_gradient": False}, 1),
        ({}, 2),
        ({"want": ("logp", "entropy")}, 3),
        ({"coef_known": True}, 2),
        ({"coef_known": True, "trainable_head": True}, 3),
        ({"plan": "keep", "trainable_head": True}, 3),
        ({"plan": "recompute", "trainable_head": True}, 4),
        ({"ids": 8, "plan": "keep"}, 2),
        ({"ids": 8, "plan": "recompute"}, 3),
        ({"want": ("logp", "lse"), "trainable_head": True}, 3),
        ({"want_top": 8, "trainable_head": True}, 4),
        ({"ids": 8, "coef_known": True}, 2),
    ):
        assert explain(**sizes, **more).flops == products * product, more


def test_the_reference_s_workspace_is_its_chunk_and_what_16_bits_are_widened_to():
    sizes = {"dhidden": True, "second": False, "dweight": True, "several": None, "best": 0}
    row = 5 * 100 + 8 + 2 * 2  # five copies of its logits, its hidden state, the adapter's operand and its gradient
    for low, widened in ((Low(2, torch.bfloat16, True), 100 * 2), (Low(2, torch.float32, True), 0)):
        got = reference.workspace_bytes(512, 8, 100, torch.bfloat16, gradient=True, low=low, **sizes)
        assert got == 4 * (512 * row + widened + 100 * 8)
    assert explain(rows=7, hidden_size=8, vocabulary=100, want=("logp", "entropy")).stored_bytes == 2 * 7 * 8 * 4


# --- distillation, from its parts -------------------------------------------------------------------------------------

ROWS, ONE_LOGIT = 7 * 8 * 90, 7 * 90  # multiplications of one product with a head of 8; logits of the rows that are scored
STUDENT, TEACHER = (7 + 90) * 8 * 2, (7 + 90) * 16 * 2  # bytes that a product reads
OUTPUTS = (1 + 7) * 4 + 12 * 2 * 4  # the sum and the rows' divergences; A's product with all positions
BY_POSITION = 12 * 8 * 2 + 12 * 2 * 4  # gradients of the hidden states and of A's product
BY_ROW = 7 * (8 + 2) * 4  # the same of the rows alone, in fp32
OPERANDS = 90 * 16 * 4 + 7 * (8 + 16 + 2) * 4  # in fp32: a slab of the widest weight, and rows


def distilled(reduction, kind="jsd", head=True, grad=True, weight=True, R=2):
    """7 of 12 positions, students of 8 and a teacher of 16 columns in 16 bits, an adapter of rank R, 90 of 100 ids."""

    def make(*sizes, dtype=torch.bfloat16, wants=True):
        return torch.empty(sizes, dtype=dtype, device="meta", requires_grad=grad and wants)

    return explain(
        make(3, 4, 8),
        make(100, 8, wants=head and weight),
        rows=torch.empty(7, dtype=torch.int64, device="meta"),
        bias=make(100, dtype=torch.float32, wants=head and weight),
        low_rank=(make(R, 8), make(100, R, wants=head), 0.5),
        teacher_hidden=make(3, 4, 16, wants=False),
        teacher_weight=make(100, 16, wants=False),
        valid_vocab=90,
        kind=kind,
        reduction=reduction,
    )


def test_a_distillation_with_known_coefficients_costs_the_sum_of_its_parts():
    cost = distilled("mean")
    head = 100 * 8 * 2 + 100 * 2 * 2 + 100 * 4
    space = ONE_LOGIT * 4 + 2 * ONE_LOGIT * 4 + OPERANDS  # the gradient operand, logits of both heads
    assert (cost.plan, cost.forward_gemms, cost.backward_gemms, cost.passes) == ("coef", 4, 0, 3)
    assert cost.flops == 2 * 7 * 90 * (8 + 2 + 16 + 2 * (8 + 2)) + 2 * 3 * 12 * 8 * 2
    assert cost.output_bytes == OUTPUTS
    assert cost.stored_bytes == BY_ROW + head
    assert cost.gradient_bytes == head + BY_POSITION
    assert cost.workspace_bytes == space
    assert cost.peak_bytes == OUTPUTS + space + BY_ROW + head + BY_POSITION
    assert cost.traffic_bytes == 3 * STUDENT + TEACHER + OUTPUTS + head + BY_POSITION
    assert [(phase.name, phase.flops, phase.traffic) for phase in cost.phases] == [
        ("logits of the student", 2 * ROWS, STUDENT + 4 * ONE_LOGIT),
        ("logits of the teacher", 4 * ROWS, TEACHER + 4 * ONE_LOGIT),
        ("statistics", 0, 8 * ONE_LOGIT),
        ("mixture", 0, 8 * ONE_LOGIT),
        ("operand", 0, 8 * ONE_LOGIT + 2 * ONE_LOGIT),
        ("dH", 2 * ROWS, 2 * ONE_LOGIT + 90 * 8 * 2 + 7 * 8 * 8),
        ("dW", 2 * ROWS, 2 * ONE_LOGIT + 7 * 8 * 2 + 90 * 8 * 2),
    ]
    assert "mixture" not in {phase.name for phase in distilled("mean", "forward_kl").phases}


def test_a_distillation_of_a_frozen_head_or_of_nothing_costs_the_sum_of_its_parts():
    unit, nothing = distilled("none", head=False), distilled("none", grad=False)
    waiting = 2 * ONE_LOGIT * 4
    assert (unit.plan, unit.stored_bytes, unit.gradient_bytes) == ("unit", BY_ROW, BY_POSITION)
    assert unit.workspace_bytes == ONE_LOGIT * 4 + waiting + OPERANDS
    assert unit.peak_bytes == OUTPUTS + unit.workspace_bytes + BY_ROW + BY_POSITION
    assert (nothing.plan, nothing.stored_bytes, nothing.gradient_bytes) == ("forward", 0, 0)
    assert nothing.workspace_bytes == waiting + OPERANDS
    assert nothing.peak_bytes == OUTPUTS + nothing.workspace_bytes
    assert nothing.traffic_bytes == STUDENT + TEACHER + OUTPUTS
    assert [phase.name for phase in nothing.phases] == ["logits of the student", "logits of the teacher", "statistics", "mixture"]


def test_a_distillation_with_late_coefficients_makes_the_logits_again():
    cost = distilled("none")
    head = 100 * 8 * 2 + 100 * 2 * 2 + 100 * 4
    space = 3 * ONE_LOGIT * 4 + 2 * ONE_LOGIT * 4 + OPERANDS  # two slabs of logits and the operand; those that wait for jsd
    assert (cost.plan, cost.forward_gemms, cost.backward_gemms, cost.passes) == ("recompute", 2, 4, 3)
    assert cost.flops == 2 * 7 * 90 * (2 * (8 + 2 + 16) + 2 * (8 + 2)) + 2 * 3 * 12 * 8 * 2
    assert (cost.stored_bytes, cost.workspace_bytes) == (3 * 7 * 4, space)
    assert cost.peak_bytes == OUTPUTS + space + BY_ROW + head + BY_POSITION
    assert cost.traffic_bytes == 2 * (STUDENT + TEACHER) + 2 * STUDENT + OUTPUTS + head + BY_POSITION
    assert [phase.name for phase in cost.phases[4:6]] == ["logits of the student", "logits of the teacher"]


def test_logits_wait_in_the_widest_gradient_that_an_id_has(monkeypatch):
    """That of B alone, 16 bf16 columns: for four of the seven rows' two fp32 logits; those of three are made on each walk."""
    monkeypatch.setattr(walk, "SMALL_BYTES", 0)
    cost = distilled("mean", weight=False, R=16)
    assert cost.flops == 2 * 90 * ((7 + 2 * 3) * (8 + 16 + 16) + 7 * (8 + 2 * 16)) + 2 * 3 * 12 * 8 * 16
    assert cost.forward_gemms == 2 + 2 * 2 + 2
    assert cost.workspace_bytes == 3 * ONE_LOGIT * 4 + 90 * 16 * 4 + 7 * (8 + 16 + 16) * 4


# --- an expectation, from its parts: the teacher's width is that of the embedding ---------------------------------------

EXPECTATION = 7 * 16 * 2 + 12 * 2 * 4  # bytes of the result; A's product with all positions
WIDENED = 90 * (8 + 16 + 2) * 4 + 7 * (8 + 2) * 4  # in fp32: slabs of all weights, and rows


def expected(head=True, table=True):
    def make(*sizes, dtype=torch.bfloat16, wants=head):
        return torch.empty(sizes, dtype=dtype, device="meta", requires_grad=wants)

    return explain(
        make(3, 4, 8),
        make(100, 8),
        rows=torch.empty(7, dtype=torch.int64, device="meta"),
        bias=make(100, dtype=torch.float32),
        low_rank=(make(2, 8), make(100, 2), 0.5),
        embedding=make(100, 16, wants=table),
        valid_vocab=90,
    )


def test_an_expectation_whose_all_operands_train_costs_the_sum_of_its_parts():
    cost = expected()
    head, stored = 100 * 8 * 2 + 100 * 2 * 2 + 100 * 4 + 100 * 16 * 2, (16 + 2) * 7 * 4
    space = 2 * ONE_LOGIT * 4 + WIDENED + 90 * (8 + 16) * 4 + 3 * 7 * 16 * 4  # both gradients' slabs; the upstream thrice
    assert (cost.plan, cost.forward_gemms, cost.backward_gemms, cost.passes) == ("recompute", 2, 5, 2)
    assert cost.flops == 2 * 7 * 90 * (8 + 2 + 16 + (8 + 2) + 2 * (8 + 2) + 2 * 16) + 2 * 3 * 12 * 8 * 2
    assert (cost.output_bytes, cost.stored_bytes, cost.gradient_bytes) == (EXPECTATION, stored, head + BY_POSITION)
    assert cost.workspace_bytes == space
    assert cost.peak_bytes == EXPECTATION + stored + 7 * 16 * 2 + space + BY_ROW + BY_POSITION + head
    assert cost.traffic_bytes == 4 * STUDENT + 3 * TEACHER + EXPECTATION + head + BY_POSITION
    assert [(phase.name, phase.flops, phase.traffic) for phase in cost.phases] == [
        ("logits", 2 * ROWS, STUDENT + 4 * ONE_LOGIT),
        ("exponentials", 0, (8 + 2) * ONE_LOGIT),
        ("expectation", 4 * ROWS, 2 * ONE_LOGIT + 90 * 16 * 2 + 7 * 16 * 8),
        ("logits", 2 * ROWS, STUDENT + 4 * ONE_LOGIT),
        ("upstream by id", 4 * ROWS, TEACHER + 4 * ONE_LOGIT),
        ("operand", 0, (4 + 4 + 2 + 2) * ONE_LOGIT),
        ("dH", 2 * ROWS, 2 * ONE_LOGIT + 90 * 8 * 2 + 7 * 8 * 8),
        ("dW", 2 * ROWS, 2 * ONE_LOGIT + 7 * 8 * 2 + 90 * 8 * 2),
        ("dE", 4 * ROWS, 2 * ONE_LOGIT + 7 * 16 * 2 + 90 * 16 * 2),
    ]


def test_an_expectation_of_which_the_embedding_trains_or_nothing_costs_the_sum_of_its_parts():
    table, nothing = expected(head=False), expected(head=False, table=False)
    stored, space = (16 + 2) * 7 * 4, ONE_LOGIT * 4 + WIDENED
    assert (table.plan, table.backward_gemms, table.stored_bytes, table.gradient_bytes) == ("recompute", 2, stored, 100 * 16 * 2)
    assert table.workspace_bytes == space + 90 * 16 * 4 + 2 * 7 * 16 * 4
    assert table.peak_bytes == EXPECTATION + stored + 7 * 16 * 2 + table.workspace_bytes + 100 * 16 * 2
    assert table.traffic_bytes == 2 * STUDENT + 2 * TEACHER + EXPECTATION + 100 * 16 * 2
    assert [phase.name for phase in table.phases[3:]] == ["logits", "operand", "dE"]
    assert table.phases[4].traffic == (4 + 2) * ONE_LOGIT
    assert (nothing.plan, nothing.backward_gemms, nothing.stored_bytes, nothing.gradient_bytes) == ("forward", 0, 0, 0)
    assert (nothing.workspace_bytes, nothing.peak_bytes) == (space, EXPECTATION + 7 * 16 * 4 + space)
    assert nothing.traffic_bytes == STUDENT + TEACHER + EXPECTATION


def test_memory_is_flat_in_the_number_of_rows_where_the_design_says_so():
    sizes = {"hidden_size": 1024, "vocabulary": 126464, "dtype": torch.bfloat16}
    for more in (
        {"wants_gradient": False},
        {"coef_known": True, "trainable_head": True},
        {"plan": "recompute", "trainable_head": True},
    ):
        few, many = (explain(rows=rows, **sizes, **more) for rows in (1024, 16384))
        own = 15 * 1024 * (3 * 2 * 1024 + 4 * 1024 + 64)  # hidden-sized rows: gradients, and a packed copy
        assert many.peak_bytes - few.peak_bytes <= own, more


def test_the_words_and_the_roofline():
    cost = explain(rows=4096, hidden_size=1024, vocabulary=126464, trainable_head=True, coef_known=True)
    said = str(cost)
    for word in ("'coef'", "known beforehand", "N=4096", "V=126464", "GFLOP", "peak", "workspace", "gradients"):
        assert word in said, word
    assert cost.seconds(100.0) == pytest.approx(cost.flops / 1e11)
    assert cost.seconds(1e9, 10.0) == pytest.approx(cost.traffic_bytes / 1e10)
    assert "forced" in str(explain(rows=8, hidden_size=8, vocabulary=8, plan="unit"))
    with pytest.raises(ValueError, match="gflops must be finite and above 0"):
        cost.seconds(0)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({}, TypeError, "rows must be an int"),
        ({"rows": 4, "ids": 2.0, "hidden_size": 4, "vocabulary": 3}, TypeError, "ids must be an int"),
        ({"rows": 4, "hidden_size": 4, "vocabulary": 3, "want_top": 4}, ValueError, "want_top must be in 0..3"),
        ({"rows": 4, "hidden_size": 4, "vocabulary": 3, "ids": 2, "plan": "unit"}, ValueError, "plan='unit'"),
        ({"rows": 4, "hidden_size": 4}, TypeError, "vocabulary must be an int"),
        ({"rows": 4, "hidden_size": 0, "vocabulary": 3}, ValueError, "hidden_size must be at least 1"),
        ({"rows": 4, "hidden_size": 4, "vocabulary": 3, "dtype": torch.int8}, ValueError, "dtype must be one of"),
        ({"hidden": torch.ones(2, 3)}, TypeError, "together"),
        ({"rows": 4, "hidden_size": 4, "vocabulary": 3, "plan": "coef"}, ValueError, "plan='coef'"),
        ({"rows": 4, "hidden_size": 4, "vocabulary": 3, "want": ("logits",)}, ValueError, "want"),
    ],
)
def test_what_cannot_be_explained_is_named(arguments, error, words):
    with pytest.raises(error, match=words):
        explain(**arguments)


def test_a_second_pass_takes_the_rows_that_have_any_coefficient_however_they_add_up():
    logp, entropy = torch.tensor([0.0, 1.0, 0.0, 0.0, -2.0]), torch.tensor([0.0, -1.0, 3.0, 0.0, 2.0])
    of_ids = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [1.0, -1.0], [0.0, 0.0]])
    assert plans.live_rows(logp).tolist() == [1, 4]
    assert plans.live_rows(logp, entropy).tolist() == [1, 2, 4]
    assert plans.live_rows(of_ids).tolist() == [3]
    assert plans.live_rows(None, entropy, of_ids).tolist() == [1, 2, 3, 4]
    assert plans.live_rows(logp, torch.ones(5)) is None


def test_a_16_bit_weight_is_upcast_a_slab_at_a_time_and_gives_the_same_result(monkeypatch):
    monkeypatch.setenv("DLLM_KERNELS_BACKEND", "reference")
    case = make_case(torch.bfloat16, shape=(40,), H=24, V=67, rows=None)
    whole, whole_grads = case.run("coef")
    monkeypatch.setattr(reference, "SLAB_BYTES", 7 * 24 * 4 + 3)
    slabs = reference._slabs(case.weight, torch.float32)
    assert [span.stop - span.start for span, _ in slabs] == [len(slab) for _, slab in slabs] == [7] * 9 + [4]
    assert reference._slabs(case.weight, torch.bfloat16)[0][1] is case.weight, "no copy where none is needed"
    parts, parts_grads = case.run("coef")
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)
    for name, gradient in whole_grads.items():
        torch.testing.assert_close(parts_grads[name], gradient, rtol=2**-7, atol=1e-3)
