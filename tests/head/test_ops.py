"""The head as `torch.library` ops: opcheck, torch.compile, FLOP counts, and what else looks at a call from outside."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dllm_kernels import explain, head_backward, sample_tokens, score_tokens
from dllm_kernels.head import expectation_ops, low_rank, ops, plans
from dllm_kernels.head.options import HeadOptions
from dllm_kernels.head.unit_vectors import unit_vectors
from dllm_kernels.noise import Stream, row_bits
from tests.head_suite import PLANS, as_rows, make_case

GEMM = 2 * 11 * 6 * 13  # FLOPs of one product at make_case's sizes
BOTH = ("logp", "entropy")


def loss_of(plan, coef, entropy_coef):
    """`score_tokens` through a plan, as a function of tensors alone."""

    def loss(hidden, weight, bias, target, rows):
        common = {"rows": rows, "bias": bias, "softcap": 4.0, "suppress": (2,), "plan": plan, "want": BOTH}
        if plan == "coef":
            return score_tokens(hidden, weight, target, coef=coef, entropy_coef=entropy_coef, **common).weighted_sum
        scores = score_tokens(hidden, weight, target, **common)
        return (scores.logp * coef).sum() + (scores.entropy * entropy_coef).sum()

    return loss


def prepared(plan, dtype=torch.float32, backend="cpu"):
    case = make_case(dtype, bias=True, softcap=4.0, suppress=(2,), trainable_head=plan != "unit")
    case.coef, case.entropy_coef = case.coef.to(torch.float32), case.entropy_coef.to(torch.float32)
    return case


def value_and_gradients(function, case):
    fresh = case.fresh()
    value = function(fresh.hidden, fresh.weight, fresh.options["bias"], fresh.target, fresh.rows)
    value.backward()
    return {"value": value.detach()} | fresh.grads


# --- torch.library ----------------------------------------------------------------------------------------------------


def score_arguments(plan, dtype=torch.float32, trainable_head=True, outputs="logp,lse,entropy,top_id", rows=True, pair=None):
    case = make_case(dtype, bias=True, trainable_head=trainable_head, rows=11 if rows else None).fresh()
    coef = case.coef.to(torch.float32) if plan == "coef" else None
    grad = plan != "forward"
    if not grad:
        case.hidden.requires_grad_(False)
        case.weight.requires_grad_(False)
        case.options["bias"].requires_grad_(False)
    needs = (grad, *[grad and trainable_head] * 2, pair is not None, pair is not None and pair[1].requires_grad)
    return (
        case.hidden,
        case.weight,
        case.target,
        case.rows,
        case.options["bias"],
        *(pair or (None, None)),
        None,
        0.7,
        None,
        3.0,
        [],
        None,
        coef,
        None,
        0,
        outputs,
        plan,
        *needs,
    )


@pytest.mark.parametrize("plan", ["forward", *PLANS])
def test_opcheck_of_score(backend, plan):
    torch.library.opcheck(ops.score, score_arguments(plan, trainable_head=plan not in ("forward", "unit")))


@pytest.mark.parametrize("outputs", ["lse,entropy", "logp,lse"])
def test_opcheck_of_score_with_other_outputs_and_a_per_row_temperature(backend, outputs):
    arguments = list(score_arguments("keep", torch.bfloat16, outputs=outputs, rows=False))
    arguments[7] = torch.rand(21) + 0.5
    torch.library.opcheck(ops.score, tuple(arguments))


def test_opcheck_of_several_targets(backend):
    for plan, best in (("keep", 0), ("recompute", 3), ("coef", 2)):
        outputs = "logp,lse,entropy,top_id" + ",best_logp,best_id" * (best > 0)
        arguments = list(score_arguments(plan, outputs=outputs))
        arguments[2] = torch.randint(13, (11, 4))
        arguments[13] = None if arguments[13] is None else torch.randn(11, 4)
        arguments[15] = best
        torch.library.opcheck(ops.score, tuple(arguments))


def test_a_compiled_call_with_several_targets_gives_the_bits_of_an_eager_one_and_costs_what_explain_says(backend):
    torch._dynamo.reset()
    case = make_case(torch.float32)
    ids = torch.randint(13, (11, 4))
    more = {"want": ("logp", "lse"), "rows": case.rows}

    def loss(hidden, weight, plan, k):
        scores = score_tokens(hidden, weight, case.target, ids=ids, want_top=k, plan=plan, **more)
        total = (scores.ids_logp * torch.arange(4)).sum() + scores.logp.sum() + scores.lse.square().mean()
        return total if not k else total + (scores.best_logp * torch.arange(k)).sum()

    for plan, k, products in (("keep", 0, 3), ("recompute", 0, 4), (None, 2, 4)):

        def run(function, plan=plan, k=k):
            fresh = case.fresh()
            value = function(fresh.hidden, fresh.weight, plan, k)
            value.backward()
            return {"value": value.detach()} | fresh.grads

        got = run(torch.compile(loss, fullgraph=True, backend="aot_eager"))
        with FlopCounterMode(display=False) as counter:
            wanted = run(loss)
        for name, want in wanted.items():
            assert torch.equal(got[name], want), name
        assert counter.get_total_flops() == products * GEMM
        fresh = case.fresh()
        cost = explain(fresh.hidden, fresh.weight, case.target, ids=ids, want_top=k, plan=plan, **more)
        assert cost.flops == products * GEMM
        assert cost.plan == (plan or "recompute")


def test_opcheck_of_the_other_ops(backend):
    case = make_case(torch.float32)
    key = row_bits(0, Stream.TOKEN, torch.arange(11), torch.tensor(0), torch.tensor(0))
    options = (None, None, None, None, 1.0, None, None, [3], 12)
    torch.library.opcheck(ops.sample, (case.hidden, case.weight, key, case.rows, *options, 4, None, 1.0))
    own = torch.rand(11)
    torch.library.opcheck(ops.sample, (case.hidden, case.weight, key, case.rows, *options, 4, own, 1.0, None, None, 0.1))
    dweight, dbias = torch.zeros(13, 6), torch.zeros(13)
    more = (None, 1.0, None, None, [], None, case.coef.float(), None)
    arguments = (case.hidden, case.weight, case.target, case.rows, None, None, None, *more)
    torch.library.opcheck(ops.add_gradient, (*arguments, dweight, dbias, None))
    torch.library.opcheck(ops.add_gradient, (*arguments, None, None, None))
    every = (case.hidden, case.weight, torch.arange(21) % 13, None, None, None, None, *more[:6], torch.ones(21), None)
    torch.library.opcheck(ops.add_gradient, (*every, None, None, None))
    pair = torch.randn(3, 7, 2), torch.randn(13, 2)
    arguments = (case.hidden, case.weight, case.target, case.rows, None, *pair, *more)
    torch.library.opcheck(ops.add_gradient, (*arguments, dweight, dbias, torch.zeros(13, 2)))
    head = (case.hidden, case.weight, torch.empty(11), case.rows, None, None, None, None, 1.0, None, None, [], None)
    torch.library.opcheck(expectation_ops.expect_op, (*head, None, *[False] * 6), test_utils="test_faketensor")


@pytest.mark.parametrize("plan", PLANS)
def test_opcheck_of_a_head_with_an_adapter(backend, plan):
    pair = torch.randn(3, 7, 2, requires_grad=True), torch.randn(13, 2, requires_grad=plan != "unit")
    torch.library.opcheck(ops.score, score_arguments(plan, trainable_head=plan != "unit", pair=pair))
    down = torch.randn(2, 6, requires_grad=True)
    torch.library.opcheck(low_rank.project, (torch.randn(3, 7, 6, dtype=torch.bfloat16, requires_grad=True), down, 0.5))


@pytest.mark.parametrize("plan", PLANS)
def test_what_backward_does_not_want_comes_empty_in_a_graph_too(backend, plan):
    """Sizes and dtypes are those that the compiler is told, whichever gradients are wanted."""
    pair = torch.randn(3, 7, 2), torch.randn(13, 2)
    arguments = list(score_arguments(plan, torch.bfloat16, pair=pair))
    needs = [True, *[plan != "unit"] * 2, True, plan != "unit"]
    with torch.no_grad():
        stored = ops.score(*arguments[:-5], *needs)[1 + len(ops._VECTORS) :]
    arrived = [torch.ones(()), None] if plan == "coef" else [None, torch.ones(11)]
    for wanted in [needs] if plan == "coef" else [needs, *([n == one for n in range(5)] for one in range(5) if needs[one])]:
        call = (*(x.detach() if isinstance(x, torch.Tensor) else x for x in arguments[:13]), *arrived, None, None, None)
        call = (*call, list(stored), 0, plan, [3, 7, 6], *wanted)
        torch.library.opcheck(ops.score_backward, call, test_utils="test_faketensor")


@pytest.mark.parametrize("plan", PLANS)
def test_an_adapter_costs_its_own_products_and_a_compiled_call_gives_the_bits_of_an_eager_one(backend, plan):
    torch._dynamo.reset()
    case = make_case(torch.float32, low_rank=2, trainable_head=plan != "unit")

    def loss(hidden, weight, down, up):
        common = {"rows": case.rows, "low_rank": (down, up, 0.5)}
        if plan == "coef":
            return score_tokens(hidden, weight, case.target, coef=case.coef.float(), **common).weighted_sum
        return (score_tokens(hidden, weight, case.target, plan=plan, **common).logp * case.coef.float()).sum()

    def value_and_gradients(function):
        fresh = case.fresh()
        down, up, _ = fresh.options["low_rank"]
        value = function(fresh.hidden, fresh.weight, down, up)
        value.backward()
        return {"value": value.detach()} | fresh.grads

    got = value_and_gradients(torch.compile(loss, fullgraph=True, backend="aot_eager"))
    for name, want in value_and_gradients(loss).items():
        assert torch.equal(got[name], want), name
    with FlopCounterMode(display=False) as counter:
        value_and_gradients(loss)
    products = 2 + (plan == "recompute") + (plan != "unit")
    assert counter.get_total_flops() == products * 2 * 11 * (6 + 2) * 13 + 3 * 2 * 21 * 6 * 2
    fresh = case.fresh()
    coef = {"coef": case.coef} if plan == "coef" else {}
    cost = explain(fresh.hidden, fresh.weight, case.target, rows=case.rows, plan=plan, **coef, **fresh.options)
    assert cost.flops == counter.get_total_flops()


def test_an_op_checks_values_too(backend):
    arguments = list(score_arguments("keep"))
    arguments[2] = torch.full((11,), 13)
    with pytest.raises(ValueError, match="target must hold ids in"):
        ops.score(*arguments)


# --- torch.compile ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_compiled_call_gives_the_bits_of_an_eager_one(backend, plan, dtype):
    torch._dynamo.reset()
    case = prepared(plan, dtype)
    function = loss_of(plan, case.coef, case.entropy_coef)
    got = value_and_gradients(torch.compile(function, fullgraph=True, backend="aot_eager"), case)
    for name, want in value_and_gradients(function, case).items():
        assert torch.equal(got[name], want), name


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_inductor_gives_the_bits_of_an_eager_call(backend, plan):
    torch._dynamo.reset()
    case = prepared(plan)

    def vectors(hidden, weight, bias, target, rows):
        more = {"coef": case.coef} if plan == "coef" else {}
        scores = score_tokens(hidden, weight, target, rows=rows, bias=bias, plan=plan, want=BOTH, **more)
        return scores.weighted_sum if plan == "coef" else torch.cat([scores.logp, scores.entropy])

    def run(function):
        fresh = case.fresh()
        out = function(fresh.hidden, fresh.weight, fresh.options["bias"], fresh.target, fresh.rows)
        out.backward(torch.linspace(-1, 1, out.numel()).view(out.shape))
        return {"value": out.detach()} | fresh.grads

    got = run(torch.compile(vectors, fullgraph=True))
    for name, want in run(vectors).items():
        assert torch.equal(got[name], want), name


def test_compiled_scoring_without_a_gradient_and_sampling_give_the_same_bits(backend):
    torch._dynamo.reset()
    case = make_case(torch.float32)
    key = row_bits(0, Stream.TOKEN, torch.arange(11), torch.tensor(0), torch.tensor(0))

    def function(hidden, weight, target, rows, key):
        scores = score_tokens(hidden, weight, target, rows=rows, want=("logp", "entropy", "lse", "top_logp", "top_id"))
        drawn = sample_tokens(hidden, weight, key, rows=rows, suppress=[3], valid_vocab=12)
        return scores.logp, scores.entropy, scores.lse, scores.top_logp, scores.top_id, drawn.token, drawn.confidence

    with torch.no_grad():
        arguments = (case.hidden, case.weight, case.target, case.rows, key)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for got, want in zip(compiled(*arguments), function(*arguments), strict=True):
            assert torch.equal(got, want)


def test_a_compiled_call_reports_bad_values(backend):
    torch._dynamo.reset()
    case = make_case(torch.float32)
    function = torch.compile(
        lambda target: score_tokens(case.hidden, case.weight, target, rows=case.rows).logp, fullgraph=True, backend="aot_eager"
    )
    function(case.target)
    with pytest.raises(ValueError, match="target must hold ids in"):
        function(torch.full((11,), 13))


def test_shapes_may_vary_under_compile(backend):
    torch._dynamo.reset()
    case = make_case(torch.float32, shape=(40,), rows=None)

    def function(hidden, target):
        return score_tokens(hidden, case.weight, target).logp

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (5, 9, 40):
        assert torch.equal(compiled(case.hidden[:n], case.target[:n]), function(case.hidden[:n], case.target[:n]))


def test_sampling_takes_shapes_and_temperatures_that_vary_under_compile(backend):
    torch._dynamo.reset()
    case = make_case(torch.float32, shape=(40,), rows=None)
    key = row_bits(0, Stream.TOKEN, torch.arange(40), torch.tensor(0), torch.tensor(0))

    def function(hidden, key, temperature):
        return sample_tokens(hidden, case.weight, key, temperature=temperature, logit_temperature=2 * temperature).token

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in range(12):  # more than the compiler's limit of recompilations
        arguments = case.hidden[: 5 + n], key[: 5 + n], 0.5 + n / 10
        assert torch.equal(compiled(*arguments), function(*arguments))


@pytest.mark.parametrize("plan", ["recompute", "coef"])
def test_temperature_and_softcap_may_change_at_every_compiled_call(backend, plan):
    torch._dynamo.reset()
    case = make_case(torch.float32).fresh()
    coef = case.coef.float()

    def function(temperature, softcap):
        more = {"temperature": temperature, "softcap": softcap, "plan": plan, "rows": case.rows}
        if plan == "coef":
            return score_tokens(case.hidden, case.weight, case.target, coef=coef, **more).weighted_sum
        return (score_tokens(case.hidden, case.weight, case.target, **more).logp * coef).sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for n in range(12):
        got, want = (torch.autograd.grad(f(0.5 + n / 10, 3.0 + n), case.hidden)[0] for f in (compiled, function))
        assert torch.equal(got, want), n


# --- FLOPs ------------------------------------------------------------------------------------------------------------


def counted(case, plan, want=BOTH, zero=0):
    """FLOPs that a counter sees in forward and in backward; `zero` rows get no coefficient."""
    more = {"coef": case.coef} if plan == "coef" else {}
    with FlopCounterMode(display=False) as forward:
        scores = case.score(plan, want=want, **more)
    if plan == "forward":
        return forward.get_total_flops(), 0
    coef = torch.ones(11)
    coef[:zero] = 0.0
    with FlopCounterMode(display=False) as backward:
        if plan == "coef":
            scores.weighted_sum.backward()
        else:
            torch.autograd.backward([getattr(scores, name) for name in want], [coef] * len(want))
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize(
    ("plan", "want", "trainable", "formula"),
    [
        ("forward", BOTH, False, (1, 0)),
        ("unit", ("logp",), False, (2, 0)),
        ("unit", BOTH, False, (3, 0)),
        ("coef", BOTH, False, (2, 0)),
        ("coef", BOTH, True, (3, 0)),
        ("keep", BOTH, True, (1, 2)),
        ("keep", ("logp",), False, (1, 1)),
        ("recompute", BOTH, True, (1, 3)),
        ("recompute", ("entropy",), False, (1, 2)),
    ],
)
def test_a_counter_sees_the_products_that_a_plan_executes(backend, plan, want, trainable, formula):
    case = make_case(torch.float32, trainable_head=trainable)
    case = case if plan == "forward" else case.fresh()
    case.coef = case.coef.float()
    assert counted(case, plan, want) == tuple(GEMM * products for products in formula)


def test_rows_without_a_coefficient_are_neither_recomputed_nor_counted(backend):
    case = make_case(torch.float32).fresh()
    assert counted(case, "recompute", ("logp",), zero=4) == (GEMM, 3 * GEMM * 7 // 11)


def test_a_counter_over_backward_alone_sees_it_too(backend):
    case = make_case(torch.float32).fresh()
    logp = case.score("keep", want=("logp",)).logp
    with FlopCounterMode(display=False) as counter:
        logp.sum().backward()
    assert counter.get_total_flops() == 2 * GEMM
    every = make_case(torch.float32, rows=None).fresh()  # of 21 positions
    logp = every.score("keep", want=("logp",)).logp
    with FlopCounterMode(display=False) as counter:
        logp.sum().backward()
    assert counter.get_total_flops() == 2 * GEMM * 21 / 11


def test_sampling_and_head_backward_are_counted(backend):
    case = make_case(torch.float32)
    key = row_bits(0, Stream.TOKEN, torch.arange(11), torch.tensor(0), torch.tensor(0))
    with FlopCounterMode(display=False) as counter:
        sample_tokens(case.hidden, case.weight, key, rows=case.rows)
    assert counter.get_total_flops() == GEMM
    for dweight, products in ((None, 2), (torch.zeros(13, 6), 3)):
        with FlopCounterMode(display=False) as counter:
            head_backward(case.hidden, case.weight, as_rows(case), case.coef, dweight_out=dweight)
        assert counter.get_total_flops() == products * GEMM
    arguments = case.hidden, case.weight, case.target, case.rows, HeadOptions()
    with FlopCounterMode(display=False) as counter:
        found = unit_vectors(*arguments)
    assert counter.get_total_flops() == 2 * GEMM
    assert all(map(torch.equal, found, unit_vectors(*arguments)))


def test_a_counted_call_gives_the_bits_of_a_plain_one(backend):
    for plan in PLANS:
        case = prepared(plan)
        function = loss_of(plan, case.coef, case.entropy_coef)
        with FlopCounterMode(display=False):
            got = value_and_gradients(function, case)
        for name, want in value_and_gradients(function, case).items():
            assert torch.equal(got[name], want), (plan, name)


def test_fake_and_meta_tensors_give_shapes_without_work(backend):
    case = make_case(torch.bfloat16)
    meta = [tensor.to("meta") for tensor in (case.hidden, case.weight, case.target)]
    scores = score_tokens(*meta, rows=case.rows.to("meta"), want=BOTH)
    assert scores.logp.shape == (11,)
    assert scores.logp.dtype == torch.float32
    assert scores.logp.is_meta


def test_products_are_those_of_the_design():
    """DESIGN.md's table, in units of 2 N H V."""
    assert plans.gemms("forward", need_dhidden=False, need_dweight=False) == (1, 0)
    for vectors, need_dweight in itertools.product((1, 2), (False, True)):
        assert sum(plans.gemms("coef", need_dhidden=True, need_dweight=need_dweight, vectors=vectors)) == 2 + need_dweight
        assert sum(plans.gemms("keep", need_dhidden=True, need_dweight=need_dweight, vectors=vectors)) == 2 + need_dweight
        assert sum(plans.gemms("recompute", need_dhidden=True, need_dweight=need_dweight, vectors=vectors)) == 3 + need_dweight
    assert sum(plans.gemms("unit", need_dhidden=True, need_dweight=False, vectors=2)) == 3
