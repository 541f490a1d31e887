"""The fourth part of the head suite, for every backend: several ids of a row, its likeliest ones, a differentiable lse."""

from __future__ import annotations

import math

import pytest
import torch

from dllm_kernels import score_tokens
from tests import oracle
from tests.head_suite import F64, VARIANTS, make_case
from tests.tiny import relative_error

DTYPES = pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16], ids=str)
WANT = ("logp", "entropy", "lse", "top_logp", "top_id")
K = 3


def several_case(dtype, backend, *, M=4, seed=0, **options):
    """A case, `[N, M]` ids of which two of a row are equal, and upstream gradients of all that is differentiable."""
    case = make_case(dtype, backend.device, seed=seed, **options)
    g = torch.Generator().manual_seed(seed + 1)
    limit = case.options["valid_vocab"] or len(case.weight)
    allowed = torch.tensor([v for v in range(limit) if v not in case.options["suppress"]])
    N = len(case.target)
    ids = allowed[torch.randint(len(allowed), (N, M), generator=g)]
    if M > 1:
        ids[:, -1] = ids[:, 0]
    if N and M:
        ids[0, 0] = case.target[0]
    sizes = {"logp": (N,), "ids_logp": (N, M), "best_logp": (N, K), "lse": (N,), "entropy": (N,)}
    wide = F64 if dtype == F64 else torch.float32
    upstream = {name: torch.randn(size, generator=g).to(backend.device, wide) for name, size in sizes.items()}
    return case, ids.to(backend.device), upstream


def wanted(case, ids, upstream, best_id=None):
    """Values by the formulas in float64, and the gradients of their products with `upstream`."""
    exact = case.fresh(F64)
    z = oracle.logits(exact.hidden, exact.weight, exact.rows, **exact.options)
    logp = z.log_softmax(-1)
    found = oracle.head(exact.hidden, exact.weight, exact.target, exact.rows, **exact.options)
    found["ids_logp"] = logp.gather(1, ids)
    if best_id is not None:
        found["best_logp"] = logp.gather(1, best_id)
    total = sum((found[name] * upstream[name].to(F64)).sum() for name in upstream if name in found)
    total.backward()
    return {name: value.detach() for name, value in found.items()}, exact.grads


def compare(backend, dtype, scores, grads, values, want):
    limit = {F64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-5}[dtype]
    for name, value in values.items():
        got = getattr(scores, name)
        if got is not None and name != "top_id":
            assert ((got.detach().double() - value).abs() <= limit * (1 + value.abs())).all(), name
    assert torch.equal(scores.top_id, values["top_id"])
    for name, gradient in want.items():
        rounding = 0.0 if dtype != torch.bfloat16 else 1.5 * 2**-8
        assert grads[name].dtype == dtype
        assert relative_error(grads[name], gradient) <= (1e-11 if dtype == F64 else 3e-6) + rounding, name


@pytest.mark.parametrize("plan", ["keep", "recompute", "coef", "want_top"])
@DTYPES
def test_log_probs_of_ids_and_lse_have_the_gradients_of_plain_autograd(backend, plan, dtype):
    for frozen in (False, True):
        for name in VARIANTS if not frozen and dtype != torch.bfloat16 else ("plain", "everything"):
            case, ids, upstream = several_case(dtype, backend, trainable_head=not frozen, **VARIANTS[name])
            ours = case.fresh()
            if plan == "coef":
                coef = torch.cat((upstream["logp"][:, None], upstream["ids_logp"]), 1)
                scores = ours.score(want=WANT, ids=ids, coef=coef, entropy_coef=upstream["entropy"])
                scores.weighted_sum.backward()
                upstream = {name: upstream[name] for name in ("logp", "ids_logp", "entropy")}
            else:
                top = plan == "want_top"
                scores = ours.score(None if top else plan, want=WANT, ids=ids, want_top=K if top else 0)
                assert scores.plan == ("recompute" if top else plan)
                vectors = [n for n in upstream if getattr(scores, n) is not None]
                torch.autograd.backward([getattr(scores, n) for n in vectors], [upstream[n] for n in vectors])
            compare(backend, dtype, scores, ours.grads, *wanted(case, ids, upstream, scores.best_id))


@DTYPES
def test_the_gradient_of_an_id_keeps_its_digits_where_its_probability_is_nearly_1(backend, dtype):
    """1 - p is what the others have, and p - 1 has lost it: some 1e-8 here."""
    case, ids, _ = several_case(dtype, backend, rows=None, shape=(5,), H=16, V=40)
    case.hidden = (case.weight[ids[:, 1]] * 2.2).to(dtype)
    best = oracle.logits(case.hidden.double(), case.weight.double()).argmax(-1)
    ids[:, 1] = best
    for plan in ("keep", "recompute"):
        ours, exact = case.fresh(), case.fresh(F64)
        ours.score(plan, want=(), ids=ids).ids_logp[:, 1].sum().backward()
        logits = oracle.logits(exact.hidden, exact.weight)
        logits.log_softmax(-1).gather(1, ids)[:, 1].sum().backward()
        assert (1 - logits.softmax(-1).amax(-1)).min() < 1e-6
        for row, want in zip(ours.hidden.grad.double(), exact.hidden.grad):
            assert relative_error(row, want) < (1e-4 if dtype != torch.bfloat16 else 2e-2)


@pytest.mark.parametrize("plan", ["keep", "recompute"])
def test_z_loss_is_that_of_plain_autograd_in_16_bit_where_all_probabilities_are_small(backend, plan):
    """The gradient of lse is then a small sum of large terms: it is not the difference of two vectors in 16 bits."""
    case = make_case(torch.bfloat16, backend.device, shape=(50,), H=64, V=301, rows=None, scale=0.05)
    ours, exact, eager = case.fresh(), case.fresh(F64), case.fresh()
    for one in (ours, exact, eager):
        if one is ours:
            lse = score_tokens(one.hidden, one.weight, one.target, want=("logp", "lse"), plan=plan).lse
        else:
            lse = (one.hidden @ one.weight.t()).float().logsumexp(-1) if one is eager else oracle.head(*exact_of(one))["lse"]
        (lse.square().mean()).backward()
    for name, want in exact.grads.items():
        baseline = relative_error(eager.grads[name], want)
        assert relative_error(ours.grads[name], want) <= 1.5 * baseline, name


def exact_of(case):
    return case.hidden, case.weight, case.target


@DTYPES
def test_the_likeliest_ids_come_best_first_and_ties_go_to_the_smaller_id(backend, dtype):
    case = make_case(dtype, backend.device, V=700, H=16, suppress=(3,))
    case.weight[100:200] = case.weight[200:300]  # pairs of equal logits
    case.weight[650:690] = case.weight[2]
    z = oracle.logits(case.hidden.double(), case.weight.double(), case.rows, suppress=(3,))
    order = z.sort(dim=-1, descending=True, stable=True).indices
    for k in (1, 2, 65, 699):
        with torch.no_grad():
            scores = case.score(want=("top_id",), want_top=k)
        assert torch.equal(scores.best_id[:, 0], scores.top_id)
        assert scores.best_id.shape == (11, k)
        close = (z.gather(1, scores.best_id) - z.gather(1, order[:, :k])).abs() < 1e-4
        assert close.all()
        clear = scores.best_id == order[:, :k]
        assert clear.double().mean() > 0.98, "but for logits that rounding brings together"
        torch.testing.assert_close(scores.best_logp.double(), z.log_softmax(-1).gather(1, scores.best_id), rtol=2e-5, atol=2e-5)
        same = scores.best_logp[:, 1:] == scores.best_logp[:, :-1]
        assert (scores.best_id[:, 1:] > scores.best_id[:, :-1])[same].all()
    flat = score_tokens(torch.zeros_like(case.hidden), case.weight, case.target, rows=case.rows, want_top=5)
    assert torch.equal(flat.best_id, torch.arange(5, device=backend.device).expand(11, 5))


def test_ids_of_probability_0_are_legal_and_infinite(backend):
    case, ids, _ = several_case(torch.float32, backend, bias=True, M=3)
    case.options["bias"][5] = -math.inf
    ids[2, 0] = 5
    ours = case.fresh()
    scores = ours.score("keep", want=("entropy",), ids=ids)
    assert scores.ids_logp[2, 0] == -math.inf
    upstream = torch.ones_like(scores.ids_logp)
    upstream[2, 0] = 0.0
    torch.autograd.backward([scores.ids_logp, scores.entropy], [upstream, torch.ones_like(scores.entropy)])
    assert all(gradient.isfinite().all() for gradient in ours.grads.values())
    with torch.no_grad():  # more than there are of finite logits: excluded ones never, those at -inf by their ids
        best = case.score(want_top=13).best_id
    assert torch.equal(best.sort(1).values, torch.arange(13, device=backend.device).expand(11, 13))
    assert (best[:, -1] == 5).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_bits_of_ids_and_likeliest_ids_depend_on_no_other_row_and_no_other_id(backend, dtype):
    case, ids, _ = several_case(dtype, backend, shape=(300,), rows=None, H=40, V=131)
    whole = score_tokens(case.hidden, case.weight, case.target, ids=ids, want=("logp", "lse"), want_top=K)
    for chosen in ([7], list(range(0, 300, 2)), [299, 0, 150]):
        rows = torch.tensor(chosen, device=backend.device)
        more = {"ids": ids[rows], "rows": rows, "want": ("logp", "lse"), "want_top": K}
        part = score_tokens(case.hidden, case.weight, case.target[rows], **more)
        for name in ("logp", "lse", "ids_logp", "best_logp", "best_id"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[rows]), name


def test_what_is_returned_follows_what_is_asked_for(backend):
    case, ids, _ = several_case(torch.float32, backend)
    ours = case.fresh()
    one = score_tokens(ours.hidden, ours.weight, rows=ours.rows, want_top=2)
    assert one.logp is one.ids_logp is one.lse is None
    assert one.best_logp.requires_grad
    assert not one.best_id.requires_grad
    no_target = score_tokens(ours.hidden, ours.weight, ids=ids, rows=ours.rows)
    both = ours.score(want=("logp", "lse"), ids=ids)
    assert no_target.logp is None
    torch.testing.assert_close(no_target.ids_logp, both.ids_logp, rtol=1e-6, atol=1e-6)
    plain = ours.score(want=("logp", "lse"))
    assert plain.plan == "keep"
    torch.testing.assert_close(plain.logp, both.logp, rtol=1e-6, atol=1e-6)
    assert plain.lse.requires_grad
    assert make_case(torch.float32, backend.device, trainable_head=False).fresh().score(want=("logp", "lse")).plan == "keep"
    known = ours.score(want=("logp", "lse"), ids=ids, coef=torch.ones(11, 5, device=backend.device), want_top=2)
    assert known.weighted_sum.requires_grad
    assert not any(x.requires_grad for x in (known.logp, known.ids_logp, known.lse, known.best_logp))
    empty = score_tokens(ours.hidden, ours.weight, ids=ids[:0], rows=ours.rows[:0], want=("lse",), want_top=2)
    assert empty.ids_logp.shape == (0, 4)
    (empty.ids_logp.sum() + empty.lse.sum() + empty.best_logp.sum()).backward()
    assert not ours.weight.grad.any()


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"target": None}, TypeError, "score_tokens needs target, ids or want_top, got none of them"),
        ({"target": None, "want_top": 1, "coef": torch.ones(4)}, TypeError, "needs target or ids where coef is given"),
        ({"ids": torch.zeros(4, 2)}, TypeError, "ids must be of dtype torch.int64"),
        ({"ids": torch.zeros(3, 2, dtype=torch.int64)}, ValueError, r"ids must have shape \[4, any\]"),
        ({"ids": torch.zeros(4, dtype=torch.int64)}, ValueError, r"ids must have shape \[4, any\], got \[4\]"),
        ({"ids": torch.full((4, 2), 5)}, ValueError, r"target or ids must hold ids in 0\.\.4, got 5"),
        ({"ids": torch.full((4, 2), 2)}, ValueError, "target or ids must not hold a suppressed id"),
        ({"ids": torch.zeros(4, 2, dtype=torch.int64), "coef": torch.ones(4)}, ValueError, r"coef must have shape \[4, 3\]"),
        ({"want_top": 5}, ValueError, r"want_top must be in 0\.\.4"),
        ({"want_top": True}, TypeError, "want_top must be an int"),
        ({"want_top": 1, "plan": "unit"}, ValueError, "plan='unit' has one gradient vector a row"),
        ({"want_top": 1, "plan": "keep"}, ValueError, "plan='keep' stores what has no place yet"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_mistake_with_ids_is_refused_by_name(changes, error, words):
    arguments = {
        "hidden": torch.ones(4, 3, requires_grad=True),
        "weight": torch.ones(5, 3),
        "target": torch.zeros(4, dtype=torch.int64),
        "suppress": (2,),
    } | changes
    with pytest.raises(error, match=words):
        score_tokens(**arguments)
