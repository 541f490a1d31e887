"""The second half of the head suite, for every backend: relations between calls, and drawn layouts, infinities and bad ids."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from dllm_kernels import score_tokens
from dllm_kernels.backends import for_device
from dllm_kernels.head.scoring import head_backward
from tests.head_suite import ALL, F64, LATE_PLANS, PLANS, WEIGHT_LAYOUTS, as_rows, cases, make_case
from tests.tiny import relative_error

HIDDEN_LAYOUTS = {
    "contiguous": lambda h: h,
    "transposed": lambda h: h.transpose(0, 1).contiguous().transpose(0, 1),
    "padded": lambda h: torch.cat([h, h], -1)[..., : h.shape[-1]],
    "every_other_row": lambda h: h.repeat_interleave(2, -2)[..., ::2, :],
    "every_other_column": lambda h: h.repeat_interleave(2, -1)[..., ::2],
}


# --- metamorphic relations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cuts", [(5, 8), (1, 12), (4, 4, 5)], ids=str)
def test_a_split_vocabulary_merges_to_the_whole(backend, dtype, cuts):
    """lse merges by logaddexp, entropy by the chain rule of parts: what a sharded head relies on."""
    case = make_case(dtype, backend.device, bias=True)
    whole = case.score(want=ALL)
    parts, start = [], 0
    for size in cuts:
        span = slice(start, start + size)
        inside = (case.target >= start) & (case.target < start + size)
        target = torch.where(inside, case.target - start, 0)
        weight, bias = case.weight[span], case.options["bias"][span]
        parts.append((start, inside, score_tokens(case.hidden, weight, target, rows=case.rows, bias=bias, want=ALL)))
        start += size
    lse = torch.stack([part.lse.double() for _, _, part in parts])
    merged = lse.logsumexp(0)
    share = (lse - merged).exp()
    entropy = (share * (torch.stack([part.entropy.double() for _, _, part in parts]) - (lse - merged))).sum(0)
    logp = sum(torch.where(inside, part.logp.double() + part.lse.double() - merged, 0.0) for _, inside, part in parts)
    tops = torch.stack([part.top_logp.double() + part.lse.double() for _, _, part in parts])
    limit = {"rtol": 1e-12, "atol": 1e-12} if dtype == F64 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(whole.lse.double(), merged, **limit)
    torch.testing.assert_close(whole.logp.double(), logp, **limit)
    torch.testing.assert_close(whole.entropy.double(), entropy, **limit)
    torch.testing.assert_close(whole.top_logp.double(), tops.amax(0) - merged, **limit)
    ids = torch.stack([part.top_id + start for start, _, part in parts])
    assert torch.equal(whole.top_id, ids.gather(0, tops.argmax(0)[None])[0])


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
def test_the_gradients_of_a_batch_are_the_sums_of_those_of_its_parts(backend, plan, dtype):
    """Nothing is divided by N, and so however a batch is cut the step is the same (a gradient norm was 100 x too large)."""
    case = make_case(dtype, backend.device, bias=True, trainable_head=plan != "unit")
    _, whole = case.run(plan)
    total = {name: torch.zeros_like(gradient) for name, gradient in whole.items()}
    for pick in (slice(0, 4), slice(4, 5), slice(5, 11)):
        part = make_case(dtype, backend.device, bias=True, trainable_head=plan != "unit")
        part.rows, part.target = case.rows[pick], case.target[pick]
        part.coef, part.entropy_coef = case.coef[pick], case.entropy_coef[pick]
        for name, gradient in part.run(plan)[1].items():
            total[name] += gradient
    for name, gradient in whole.items():
        assert relative_error(total[name], gradient) < (1e-12 if dtype == F64 else 1e-5), name


@pytest.mark.parametrize("plan", LATE_PLANS)
def test_a_row_of_coefficient_0_gets_exactly_no_gradient(backend, plan):
    case = make_case(torch.float32, backend.device, trainable_head=plan != "unit")
    case.coef[::2], case.entropy_coef[::2] = 0.0, 0.0
    _, grads = case.run(plan)
    flat = grads["hidden"].view(-1, 6)
    assert (flat[case.rows[::2]] == 0).all()
    assert (flat[case.rows[1::2]].abs().amax(-1) > 0).all()


@pytest.mark.parametrize("plan", ["keep", "recompute"])
def test_a_row_with_one_coefficient_of_three_has_its_gradient(backend, plan):
    case = make_case(F64, backend.device)
    ours, want = case.fresh(), case.fresh()
    share = torch.eye(3, dtype=F64, device=backend.device).repeat(4, 1)[: len(case.target)].unbind(1)
    scores, exact = ours.score(plan, want=("logp", "entropy", "lse")), want.oracle()
    for found, case in ((vars(scores), ours), (exact, want)):
        sum((found[name] * part).sum() for name, part in zip(("logp", "entropy", "lse"), share)).backward()
        assert (case.grads["hidden"].view(-1, 6)[case.rows].abs().amax(-1) > 0).all()
    torch.testing.assert_close(ours.grads, want.grads, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("plan", PLANS)
def test_a_late_coefficient_and_a_known_one_give_the_same_gradient(backend, plan):
    case = make_case(F64, backend.device, bias=True, trainable_head=plan != "unit")
    _, late = case.run(plan)
    _, known = case.run("coef")
    for name in known:
        torch.testing.assert_close(late[name], known[name], rtol=1e-11, atol=1e-11)


# --- what broke in others ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", ["keep", "recompute", "coef"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pitfall_small_probabilities_are_not_filtered_out_of_the_gradient(backend, plan, dtype):
    """A kernel that skips blocks where p < 2^-12 changes the gradient of nearly every row of a large vocabulary."""
    case = make_case(dtype, backend.device, shape=(24,), rows=None, V=9000, H=8, scale=0.01)
    case.coef, case.entropy_coef = case.coef.float(), torch.zeros(24, device=backend.device)
    _, grads = case.run(plan)
    _, want = case.run_oracle()
    others = torch.ones(9000, dtype=torch.bool, device=backend.device)
    others[case.target] = False  # rows of ids that are nobody's target: all they get is -p
    assert (case.score(want=("top_logp",)).top_logp < math.log(2**-12)).all()
    assert (grads["weight"][others].abs().amax(-1) > 0).all()
    assert relative_error(grads["weight"][others], want["weight"][others]) < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("known", [True, False], ids=["coef", "late"])
def test_pitfall_a_frozen_head_pays_for_no_weight_gradient(backend, known, monkeypatch):
    case = make_case(torch.float32, backend.device, trainable_head=False).fresh()
    module = for_device(backend.device)
    buffers = []
    run = module.run

    def watched(problem, outputs, **more):
        buffers.extend(more.get(name) for name in ("dweight_VH", "dbias_V"))
        return run(problem, outputs, **more)

    monkeypatch.setattr(module, "run", watched)
    if known:
        case.score(coef=case.coef).weighted_sum.backward()
    else:
        case.score().logp.sum().backward()
    assert buffers
    assert all(buffer is None for buffer in buffers)


# --- hypothesis: layouts, infinities, bad ids -------------------------------------------------------------------------


@given(
    options=cases(),
    plan=st.sampled_from(PLANS),
    dtype=st.sampled_from([F64, torch.float32, torch.bfloat16, torch.float16]),
    weight_layout=st.sampled_from(sorted(WEIGHT_LAYOUTS)),
    hidden_layout=st.sampled_from(sorted(HIDDEN_LAYOUTS)),
)
def test_any_layout_of_hidden_states_and_weight_gives_the_gradients_of_the_dense_one(
    backend, options, plan, dtype, weight_layout, hidden_layout
):
    options = {**options, "scale": min(options["scale"], 1.0), "temperature": None}
    dense = make_case(dtype, backend.device, trainable_head=plan != "unit", **options)
    dense.coef, dense.entropy_coef = dense.coef.float(), dense.entropy_coef.float()
    _, want = dense.run(plan)
    strided = dense.fresh()
    strided.weight = WEIGHT_LAYOUTS[weight_layout](strided.weight)
    strided.hidden = HIDDEN_LAYOUTS[hidden_layout](strided.hidden)
    assert torch.equal(strided.hidden, dense.hidden)
    if plan == "coef":
        strided.score("coef", coef=dense.coef, entropy_coef=dense.entropy_coef).weighted_sum.backward()
    else:
        scores = strided.score(plan)
        strided.loss(scores.logp, scores.entropy).backward()
    for name, gradient in want.items():
        got = strided.grads[name]
        got = torch.zeros_like(gradient) if got is None else got
        size = gradient.double().abs().max() + 1e-6
        assert (got.double() - gradient.double()).abs().max() <= 8 * max(
            torch.finfo(dtype).eps, 1e-6 if dtype != F64 else 0
        ) * size


@given(options=cases(), plan=st.sampled_from(PLANS), dtype=st.sampled_from([F64, torch.float32, torch.bfloat16]), data=st.data())
def test_any_bias_of_minus_infinity_is_as_good_as_a_suppressed_id(backend, options, plan, dtype, data):
    options = {**options, "bias": True, "softcap": None}  # a softcap would make -inf finite
    case = make_case(dtype, backend.device, trainable_head=plan != "unit", **options)
    allowed = [v for v in range(options["valid_vocab"] or options["V"]) if v not in options["suppress"]]
    spare = sorted(set(allowed) - set(case.target.tolist()))
    gone = data.draw(st.lists(st.sampled_from(spare), unique=True) if spare else st.just([]))
    if len(gone) == len(allowed):
        gone = gone[1:]
    suppressed = make_case(dtype, backend.device, trainable_head=plan != "unit", **options)
    suppressed.options["suppress"] = (*options["suppress"], *gone)
    case.options["bias"][gone] = -math.inf
    a, b = case.score(want=ALL), suppressed.score(want=ALL)
    for name in ALL:
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    got, want = case.run(plan)[1], suppressed.run(plan)[1]
    for name, gradient in want.items():
        assert torch.equal(got[name], gradient), name


@given(options=cases(), seed=st.integers(0, 99))
@example(options={"shape": (1, 1), "H": 1, "V": 2, "rows": 1, "suppress": (1,)}, seed=0)
def test_any_suppressed_target_is_an_error_that_names_it(backend, options, seed):
    case = make_case(torch.float32, backend.device, **options)
    limit = options.get("valid_vocab") or options["V"]
    forbidden = sorted(set(options["suppress"]) | set(range(limit, options["V"])))
    if not forbidden or len(case.target) == 0:
        return
    offender = forbidden[seed % len(forbidden)]
    case.target[seed % len(case.target)] = offender
    with pytest.raises(ValueError, match=rf"target must not hold .* id {offender} has probability 0"):
        case.score()


@given(V=st.integers(1, 40), data=st.data())
def test_any_vocabulary_without_an_id_left_is_an_error(backend, V, data):
    limit = data.draw(st.integers(1, V))
    case = make_case(torch.float32, backend.device, V=V)
    order = data.draw(st.permutations(range(limit)))
    with pytest.raises(ValueError, match="must leave at least one id, got all of them excluded"):
        score_tokens(case.hidden, case.weight, case.target, rows=case.rows, suppress=tuple(order), valid_vocab=limit)


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16], ids=str)
def test_rows_whose_logits_are_all_minus_infinity_are_an_error(backend, dtype):
    case = make_case(dtype, backend.device, bias=True, suppress=(3,))
    case.options["bias"][:] = -math.inf
    for call in (
        case.score,
        lambda: case.score("coef", coef=case.coef),
        lambda: head_backward(case.hidden, case.weight, as_rows(case), case.coef, **case.options),
    ):
        with pytest.raises(ValueError, match=r"must give finite logits \(or -inf\), got logsumexp (nan|-inf) at row"):
            call()


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16], ids=str)
def test_a_target_of_minus_infinity_has_logp_minus_infinity_and_spoils_no_gradient(backend, plan, dtype):
    """The id is not suppressed by name, so it is legal: probability 0, and every gradient stays finite."""
    case = make_case(dtype, backend.device, bias=True, trainable_head=plan != "unit")
    case.options["bias"][5] = -math.inf
    case.target[2] = 5
    logp = case.score().logp
    assert logp[2] == -math.inf
    assert torch.isfinite(logp[torch.arange(11) != 2]).all()
    for name, gradient in case.run(plan)[1].items():
        assert torch.isfinite(gradient).all(), name
