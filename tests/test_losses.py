"""`elbo_loss` and `bgpo_loss` against the published lines written with full logits."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllm_kernels import bgpo_loss, elbo_loss
from tests import oracle

F64 = torch.float64


def problem(leading=(3,), L=6, H=5, V=9, *, shift=0, seed=0, dtype=F64):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*leading, L, H, generator=g, dtype=F64).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=g, dtype=F64).to(dtype).requires_grad_()
    bias = torch.randn(V, generator=g, dtype=F64).to(dtype).requires_grad_()
    target = torch.randint(V, (*leading, L), generator=g)
    masked = torch.rand(*leading, L, generator=g) < 0.6
    masked[..., 1] = True
    masked[..., :shift] = False
    p_mask = torch.rand(*leading, 1, generator=g, dtype=F64).clamp(min=0.05).expand(*leading, L)
    return hidden, weight, bias, target, masked, p_mask


def logits_of(hidden, weight, bias=None, softcap=None, suppress=(), shift=0):
    """The model's logits `[..., L, V]`, moved so that row i predicts position i."""
    z = oracle.logits(hidden, weight, bias=bias, softcap=softcap, suppress=suppress)
    z = z.reshape(*hidden.shape[:-1], -1)
    return torch.cat([z[..., :1, :], z[..., :-shift, :]], dim=-2) if shift == 1 else z


def grads(loss, leaves):
    return torch.autograd.grad(loss, leaves)


def same_value_and_gradients(ours, want, leaves, **limits):
    limits = limits or {"rtol": 1e-11, "atol": 1e-12}
    torch.testing.assert_close(ours, want, **limits)
    for a, b in zip(grads(ours, leaves), grads(want, leaves), strict=True):
        torch.testing.assert_close(a, b, **limits)


def test_it_equals_llada_s_pre_training_loss():
    hidden, weight, _, target, masked, p_mask = problem()
    ours = elbo_loss(hidden, weight, target, masked, p_mask)
    same_value_and_gradients(
        ours, oracle.llada_pretraining_loss(logits_of(hidden, weight), target, masked, p_mask), (hidden, weight)
    )


def test_it_equals_llada_s_sft_loss():
    hidden, weight, _, target, masked, p_mask = problem()
    lengths = torch.tensor([6, 2, 4])
    ours = elbo_loss(hidden, weight, target, masked, p_mask, lengths=lengths)
    want = oracle.llada_sft_loss(logits_of(hidden, weight), target, masked, p_mask, lengths[:, None].expand(3, 6))
    same_value_and_gradients(ours, want, (hidden, weight))


@pytest.mark.parametrize("shift", [0, 1])
def test_options_of_the_head_and_the_shift_are_applied(shift):
    hidden, weight, bias, target, masked, p_mask = problem(shift=shift)
    target = target.clamp(max=7)
    options = {"bias": bias, "softcap": 2.0, "suppress": (8,)}
    ours = elbo_loss(hidden, weight, target, masked, p_mask, shift=shift, **options)
    want = oracle.llada_pretraining_loss(logits_of(hidden, weight, shift=shift, **options), target, masked, p_mask)
    same_value_and_gradients(ours, want, (hidden, weight, bias))


@pytest.mark.parametrize("leading", [(), (3,), (4, 3), (2, 2, 2)])
@pytest.mark.parametrize("shift", [0, 1])
def test_sequence_is_the_plain_sum_of_each_sequence(leading, shift):
    hidden, weight, _, target, masked, p_mask = problem(leading, shift=shift)
    ours = elbo_loss(hidden, weight, target, masked, p_mask, reduction="sequence", shift=shift)
    logp = logits_of(hidden, weight, shift=shift).log_softmax(-1).gather(-1, target[..., None])[..., 0]
    want = (torch.where(masked, -logp, 0.0) / p_mask).sum(-1)
    assert ours.shape == leading
    upstream = torch.arange(1.0, 1 + want.numel(), dtype=F64).reshape(leading)
    same_value_and_gradients((ours * upstream).sum(), (want * upstream).sum(), (hidden, weight))


def test_mean_divides_by_all_leading_dimensions_and_targets_broadcast_over_samples():
    hidden, weight, _, _, masked, p_mask = problem((4, 3))
    target = torch.randint(9, (3, 6), generator=torch.Generator().manual_seed(5))
    ours = elbo_loss(hidden, weight, target, masked, p_mask[:, :, :1])
    want = oracle.llada_pretraining_loss(
        logits_of(hidden, weight).reshape(12, 6, -1),
        target.expand(4, 3, 6).reshape(12, 6),
        masked.reshape(12, 6),
        p_mask.reshape(12, 6),
    )
    same_value_and_gradients(ours, want, (hidden, weight))


@pytest.mark.parametrize("shape", [(), (1,), (6,), (3, 1), (3, 6)])
def test_p_mask_broadcasts(shape):
    hidden, weight, _, target, masked, _ = problem()
    p_mask = torch.full(shape, 0.25)
    want = oracle.llada_pretraining_loss(logits_of(hidden, weight), target, masked, torch.full((3, 6), 0.25, dtype=F64))
    ours = elbo_loss(hidden, weight, target, masked, p_mask)
    same_value_and_gradients(ours, want, (hidden, weight), rtol=1e-6, atol=1e-7)  # 1 / (p B L) is in p_mask's float32


def test_bfloat16_gives_a_float32_loss_close_to_the_exact_one():
    hidden, weight, _, target, masked, p_mask = problem(dtype=torch.bfloat16, L=32, H=32)
    ours = elbo_loss(hidden, weight, target, masked, p_mask.float())
    want = oracle.llada_pretraining_loss(logits_of(hidden.double(), weight.double()), target, masked, p_mask)
    assert ours.dtype == torch.float32
    assert float(ours.detach()) == pytest.approx(float(want.detach()), rel=1e-5)
    ours.backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16


def test_only_hidden_states_of_masked_rows_get_a_gradient():
    hidden, weight, _, target, masked, p_mask = problem()
    elbo_loss(hidden, weight, target, masked, p_mask).backward()
    assert torch.equal(hidden.grad.abs().amax(-1) > 0, masked)


@pytest.mark.parametrize("reduction", ["mean", "sequence"])
def test_nothing_masked_is_a_loss_of_0_with_zero_gradients(reduction):
    hidden, weight, bias, target, _, p_mask = problem()
    loss = elbo_loss(hidden, weight, target, torch.zeros(3, 6, dtype=torch.bool), p_mask, bias=bias, reduction=reduction)
    assert (loss == 0).all()
    for gradient in grads(loss.sum(), (hidden, weight, bias)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("reduction", ["mean", "sequence"])
def test_a_sequence_with_nothing_masked_adds_0_and_still_counts(reduction):
    hidden, weight, _, target, masked, p_mask = problem()
    masked[1] = False
    ours = elbo_loss(hidden, weight, target, masked, p_mask, reduction=reduction)
    if reduction == "sequence":
        assert ours[1] == 0
        assert (ours[[0, 2]] > 0).all()
    else:
        want = oracle.llada_pretraining_loss(logits_of(hidden, weight), target, masked, p_mask)
        same_value_and_gradients(ours, want, (hidden, weight))


def test_the_sum_over_micro_batches_of_weighted_means_is_the_mean_of_the_batch():
    hidden, weight, _, target, masked, p_mask = problem((4,))
    whole = elbo_loss(hidden, weight, target, masked, p_mask)
    parts = [elbo_loss(hidden[b : b + 1], weight, target[b : b + 1], masked[b : b + 1], p_mask[b : b + 1]) / 4 for b in range(4)]
    same_value_and_gradients(sum(parts), whole, (hidden, weight))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"p_mask": torch.tensor(0.0)}, ValueError, ["p_mask", "0", "1"]),
        ({"p_mask": torch.tensor(1.5)}, ValueError, ["p_mask", "1.5"]),
        ({"p_mask": torch.tensor(-0.5)}, ValueError, ["p_mask", "-0.5"]),
        ({"p_mask": torch.tensor([0.5, math.nan, 0.5, 0.5, 0.5, 0.5])}, ValueError, ["p_mask", "nan"]),
        ({"p_mask": torch.full((2, 1), 0.5)}, ValueError, ["p_mask", "[3, 6]", "[2, 1]"]),
        ({"p_mask": "0.5"}, TypeError, ["p_mask", "str"]),
        ({"p_mask": 1.5}, ValueError, ["p_mask", "1.5"]),
        ({"masked": torch.ones(3, 6)}, TypeError, ["masked", "bool", "float32"]),
        ({"masked": torch.ones(3, 5, dtype=torch.bool)}, ValueError, ["masked", "5", "6"]),
        ({"target": torch.zeros(3, 5, dtype=torch.int64)}, ValueError, ["target", "[3, 6]", "[3, 5]"]),
        ({"target": torch.full((3, 6), 9)}, ValueError, ["target", "9", "8"]),
        ({"target": torch.zeros(3, 6)}, TypeError, ["target", "float32"]),
        ({"hidden": torch.zeros(3, 6, 4, dtype=F64)}, ValueError, ["hidden", "4", "5"]),
        ({"hidden": torch.zeros(5, dtype=F64)}, ValueError, ["hidden", "L, H"]),
        ({"lengths": torch.tensor([6, 0, 3])}, ValueError, ["lengths", "0"]),
        ({"lengths": torch.tensor([6, 3])}, ValueError, ["lengths", "2", "3"]),
        ({"lengths": torch.tensor([6, 3, 2]), "reduction": "sequence"}, ValueError, ["lengths", "sequence"]),
        ({"reduction": "batch"}, ValueError, ["reduction", "batch", "mean"]),
        ({"shift": 1}, ValueError, ["masked", "shift=1"]),
        ({"shift": -1}, ValueError, ["shift", "-1"]),
        ({"suppress": (1, 99)}, ValueError, ["suppress", "99"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_an_error_names_the_argument_and_what_came(changes, error, words):
    hidden, weight, _, target, masked, p_mask = problem()
    masked[:, 0] = True
    arguments = {"hidden": hidden, "weight": weight, "target": target, "masked": masked, "p_mask": p_mask} | changes
    with pytest.raises(error) as caught:
        elbo_loss(**arguments)
    for word in words:
        assert word in str(caught.value)


def test_an_empty_batch_and_a_nan_in_hidden_states_are_errors():
    hidden, weight, _, target, masked, p_mask = problem()
    with pytest.raises(ValueError, match="masked"):
        elbo_loss(hidden[:0], weight, target[:0], masked[:0], p_mask[:0])
    broken = hidden.detach().clone()
    broken[2, 1, 0] = math.nan
    with pytest.raises(ValueError, match="hidden"):
        elbo_loss(broken, weight, target, masked, p_mask)


# --- bgpo_loss --------------------------------------------------------------------------------------------------------

ADVANTAGES = torch.tensor([1.5, -2.0, 0.0], dtype=F64)


def mc_samples(K, shift=0):
    """K samples of three sequences: hidden states per sample, one head, the full-logits ELBOs `[B, K]`."""
    parts, elbos = [], []
    _, weight, bias, target, *_ = problem(shift=shift)
    for k in range(K):
        hidden, _, _, _, masked, p_mask = problem(seed=k + 1, shift=shift)
        token_weight = 1.0 / p_mask
        logp = logits_of(hidden, weight, bias, shift=shift).log_softmax(-1).gather(-1, target[..., None])[..., 0]
        elbos.append((torch.where(masked, logp, 0.0) * token_weight).sum(-1))
        parts.append((hidden, masked, token_weight))
    return parts, weight, bias, target, torch.stack(elbos, 1)


@pytest.mark.parametrize("K", [1, 4])
@pytest.mark.parametrize("shift", [0, 1])
def test_backward_on_each_sample_in_turn_sums_to_the_full_gradient(K, shift):
    parts, weight, bias, target, elbo_BK = mc_samples(K, shift)
    old_BK = elbo_BK.detach() + 0.3 * torch.randn(3, K, generator=torch.Generator().manual_seed(7), dtype=F64)
    want = oracle.bgpo(elbo_BK, old_BK, ADVANTAGES)
    leaves = [*(p[0] for p in parts), weight, bias]
    want_grads = grads(want, leaves)
    total = 0.0
    for k, (hidden, masked, token_weight) in enumerate(parts):
        loss = bgpo_loss(hidden, weight, target, masked, token_weight, old_BK[:, k], ADVANTAGES, K, bias=bias, shift=shift)
        loss.backward()
        total += float(loss.detach())
    assert total == pytest.approx(float(want.detach()), rel=1e-12)
    for leaf, gradient in zip(leaves, want_grads, strict=True):
        torch.testing.assert_close(leaf.grad, gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("trainable_head", [True, False])
def test_old_elbo_none_is_old_equal_to_the_current_policy(trainable_head):
    ((hidden, masked, token_weight),), weight, bias, target, elbo_BK = mc_samples(1)
    weight = weight.detach().requires_grad_(trainable_head)
    bias = bias.detach()
    leaves = (hidden, weight) if trainable_head else (hidden,)
    arguments = hidden, weight, target, masked, token_weight
    short = bgpo_loss(*arguments, None, ADVANTAGES, 8, bias=bias)
    full = bgpo_loss(*arguments, elbo_BK[:, 0].detach(), ADVANTAGES, 8, bias=bias)
    assert float(full.detach()) == pytest.approx(0.5 / 24)  # -(sum of A) / (samples x B)
    same_value_and_gradients(short, full, leaves)


def test_sequences_is_the_denominator_so_that_a_batch_may_be_cut():
    ((hidden, masked, token_weight),), weight, _, target, elbo_BK = mc_samples(1)
    old = elbo_BK[:, 0].detach() + 0.1
    for old_elbo in (old, None):
        whole = bgpo_loss(hidden, weight, target, masked, token_weight, old_elbo, ADVANTAGES, 4)
        parts = sum(
            bgpo_loss(
                hidden[b : b + 1],
                weight,
                target[b : b + 1],
                masked[b : b + 1],
                token_weight[b : b + 1],
                None if old_elbo is None else old_elbo[b : b + 1],
                ADVANTAGES[b : b + 1],
                4,
                sequences=3,
            )
            for b in range(3)
        )
        same_value_and_gradients(parts, whole, (hidden, weight))


def test_old_elbo_and_advantages_get_no_gradient():
    ((hidden, masked, token_weight),), weight, _, target, elbo_BK = mc_samples(1)
    old, advantages = elbo_BK[:, 0].detach().requires_grad_(), ADVANTAGES.clone().requires_grad_()
    for old_elbo in (old, None):
        bgpo_loss(hidden, weight, target, masked, token_weight, old_elbo, advantages, 4).backward()
    assert old.grad is None
    assert advantages.grad is None


@pytest.mark.parametrize("on_policy", [True, False])
def test_a_sample_without_masked_tokens_is_finite(on_policy):
    hidden, weight, _, target, _, _ = problem()
    masked = torch.zeros(3, 6, dtype=torch.bool)
    old = None if on_policy else torch.zeros(3, dtype=F64)
    loss = bgpo_loss(hidden, weight, target, masked, torch.tensor(2.0), old, ADVANTAGES, 4)
    assert float(loss.detach()) == pytest.approx(0.5 / 12)
    for gradient in grads(loss, (hidden, weight)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_a_policy_far_from_the_old_one_gives_finite_gradients_where_a_is_positive():
    ((hidden, masked, token_weight),), weight, _, target, elbo_BK = mc_samples(1)
    for distance in (-2000.0, 2000.0):
        loss = bgpo_loss(
            hidden, weight, target, masked, token_weight, elbo_BK[:, 0].detach() + distance, torch.ones(3, dtype=F64), 4
        )
        for gradient in grads(loss, (hidden, weight)):
            assert torch.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"samples": 0}, ["samples", "0"]),
        ({"sequences": 0}, ["sequences", "0"]),
        ({"token_weight": torch.tensor(0.0)}, ["token_weight", "0"]),
        ({"token_weight": torch.tensor(-1.0)}, ["token_weight", "-1"]),
        ({"token_weight": torch.tensor(math.nan)}, ["token_weight", "nan"]),
        ({"old_elbo": torch.zeros(2)}, ["old_elbo", "2", "3"]),
        ({"advantages": torch.zeros(3, 1)}, ["advantages", "3, 1"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_bgpo_error_names_the_argument(changes, words):
    hidden, weight, _, target, masked, p_mask = problem()
    arguments = {
        "token_weight": 1 / p_mask,
        "old_elbo": torch.zeros(3, dtype=F64),
        "advantages": ADVANTAGES,
        "samples": 4,
    } | changes
    with pytest.raises(ValueError, match=words[0]) as caught:
        bgpo_loss(hidden, weight, target, masked, **arguments)
    for word in words:
        assert word in str(caught.value)


@given(
    leading=st.lists(st.integers(1, 3), max_size=2).map(tuple),
    L=st.integers(1, 6),
    V=st.integers(1, 7),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 1000),
)
def test_any_shape_equals_the_plain_sum(leading, L, V, share, seed):
    hidden, weight, _, target, masked, p_mask = problem(leading, max(L, 2), 3, V, seed=seed)
    masked = torch.rand(masked.shape, generator=torch.Generator().manual_seed(seed)) < share
    ours = elbo_loss(hidden, weight, target, masked, p_mask)
    logp = logits_of(hidden, weight).log_softmax(-1).gather(-1, target[..., None])[..., 0]
    want = (torch.where(masked, -logp, 0.0) / p_mask).sum() / masked.numel()
    same_value_and_gradients(ours, want, (hidden, weight), rtol=1e-9, atol=1e-10)


def test_the_shape_of_every_argument_survives_non_contiguous_inputs():
    hidden, weight, _, target, masked, p_mask = problem((4, 3))
    want = elbo_loss(hidden, weight, target, masked, p_mask)
    moved = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (hidden, target, masked, p_mask)]
    assert not any(t.is_contiguous() for t in moved)
    same_value_and_gradients(elbo_loss(moved[0], weight, *moved[1:]), want, (hidden, weight))


COMPILED = {
    "mean": lambda h, w, t, m: elbo_loss(h, w, t, m, 0.5),
    "sft, shifted": lambda h, w, t, m: elbo_loss(h, w, t, m, torch.tensor(0.5), lengths=torch.tensor([3, 4]), shift=1),
    "sequence": lambda h, w, t, m: elbo_loss(h, w, t, m, 0.5, reduction="sequence").sum(),
    "bgpo": lambda h, w, t, m: bgpo_loss(h, w, t, m, 2.0, None, torch.tensor([1.0, -2.0]), 4),
    "bgpo, off-policy": lambda h, w, t, m: bgpo_loss(h, w, t, m, 2.0, torch.tensor([-9.0, -8.0]), torch.tensor([1.0, -2.0]), 4),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "sequence")) for name in COMPILED])
def test_a_loss_compiles_in_one_graph_whatever_number_of_tokens_is_masked(name):
    torch._dynamo.reset()
    g = torch.Generator().manual_seed(0)
    function = COMPILED[name]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    target = torch.randint(13, (2, 20), generator=g)
    for share in (0.5, 0.2, 0.9):
        masked = torch.rand(2, 20, generator=g) < share
        masked[:, 0] = False
        hidden, weight = torch.randn(2, 20, 8, generator=g).requires_grad_(), torch.randn(13, 8, generator=g).requires_grad_()
        results = []
        for loss in (compiled, function):
            value = loss(hidden, weight, target, masked)
            results.append((value.detach(), *torch.autograd.grad(value, (hidden, weight))))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    if "shifted" in name:
        masked[:, 0] = True
        with pytest.raises(ValueError, match="masked must be False at the first 1 position"):
            compiled(hidden, weight, target, masked)


def test_a_compiled_loss_checks_values_too():
    torch._dynamo.reset()
    hidden, weight, _, target, masked, _ = problem()
    masked[0, 0] = True
    compiled = torch.compile(
        lambda p_mask: elbo_loss(hidden, weight, target, masked, p_mask), fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(ValueError, match=r"p_mask must be in \(0, 1\], got values from"):
        compiled(torch.zeros(3, 6))


def test_what_p_mask_says_of_other_tokens_is_not_read():
    """Forward processes leave 0, or NaN from 0 / 0, where nothing is masked."""
    hidden, weight, _, target, masked, p_mask = problem()
    want = elbo_loss(hidden, weight, target, masked, p_mask)
    for other in (0.0, math.nan, -1.0):
        assert torch.equal(elbo_loss(hidden, weight, target, masked, torch.where(masked, p_mask, other)), want)
    assert torch.equal(
        elbo_loss(hidden, weight, target, masked, 0.25),
        elbo_loss(hidden, weight, target, masked, torch.tensor(0.25, dtype=torch.float64)),
    )


def adapter(H=5, V=9, R=2):
    g = torch.Generator().manual_seed(5)
    return [torch.randn(*size, generator=g, dtype=F64).requires_grad_() for size in ((R, H), (V, R))]


def test_an_adapter_on_the_head_is_the_weight_that_it_makes_with_gradients_for_both_factors():
    hidden, weight, _, target, masked, p_mask = problem()
    down, up = adapter()

    def same(loss):
        ours, want = loss(weight, low_rank=(down, up, 0.5)), loss(weight + 0.5 * up @ down)
        same_value_and_gradients(ours.sum(), want.sum(), (hidden, weight, down, up))

    for reduction in ("mean", "sequence"):
        same(lambda w, how=reduction, **low: elbo_loss(hidden, w, target, masked, p_mask, reduction=how, **low))
    advantages = torch.tensor([1.0, -1.0, 0.5], dtype=F64)
    for old_elbo in (None, torch.zeros(3, dtype=F64)):
        same(lambda w, old=old_elbo, **low: bgpo_loss(hidden, w, target, masked, 2.0, old, advantages, 2, **low))


def test_ids_from_valid_vocab_on_have_no_share_in_a_loss():
    hidden, weight, bias, target, masked, p_mask = problem()
    target = target.clamp(max=6)
    ours = elbo_loss(hidden, weight, target, masked, p_mask, bias=bias, valid_vocab=7)
    want = elbo_loss(hidden, weight[:7], target, masked, p_mask, bias=bias[:7])
    same_value_and_gradients(ours, want, (hidden, weight, bias))


@pytest.mark.parametrize("shift", [0, 1])
def test_reductions_are_parts_of_each_other(shift):
    hidden, weight, bias, target, masked, p_mask = problem((2, 3), shift=shift)
    each = elbo_loss(hidden, weight, target, masked, p_mask, bias=bias, shift=shift, reduction="none")
    assert each.shape == masked.shape
    assert (each[~masked] == 0).all()
    logp = logits_of(hidden, weight, bias, shift=shift).log_softmax(-1).gather(-1, target[..., None])[..., 0]
    leaves = (hidden, weight, bias)
    ramp = torch.linspace(-1, 2, each.numel(), dtype=F64).view(each.shape)
    same_value_and_gradients((each * ramp).sum(), (ramp * -logp / p_mask)[masked].sum(), leaves)
    for reduction, of in (("sequence", lambda x: x.sum(-1)), ("sum", lambda x: x.sum()), ("mean", lambda x: x.sum() / 36)):
        got = elbo_loss(hidden, weight, target, masked, p_mask, bias=bias, shift=shift, reduction=reduction)
        torch.testing.assert_close(got, of(each.detach()))


@pytest.mark.parametrize("reduction", ["mean", "sum", "sequence", "none"])
def test_an_ignored_target_is_as_one_that_is_not_masked(reduction):
    hidden, weight, _, target, masked, p_mask = problem()
    ignored = torch.rand(target.shape, generator=torch.Generator().manual_seed(3)) < 0.4
    ignored[0] = False
    assert bool((ignored & masked).any())
    got = elbo_loss(hidden, weight, target.masked_fill(ignored, -100), masked, p_mask, reduction=reduction, ignore_index=-100)
    want = elbo_loss(hidden, weight, target, masked & ~ignored, p_mask, reduction=reduction)
    same_value_and_gradients(got.sum(), want.sum(), (hidden, weight))
    with pytest.raises(ValueError, match="target must hold ids in"):
        elbo_loss(hidden, weight, target.masked_fill(ignored, -100), masked, p_mask)


@pytest.mark.parametrize("reduction", ["mean", "sum", "sequence", "none"])
@pytest.mark.parametrize("restricted", [False, True])
def test_label_smoothing_is_that_of_cross_entropy_over_the_ids_that_are_there(reduction, restricted):
    hidden, weight, bias, target, masked, p_mask = problem()
    down, up = adapter()
    target = target.clamp(max=5)
    options = {"suppress": (6, 8), "valid_vocab": 8} if restricted else {}
    kept = [v for v in range(9) if v not in (6, 8) and v < 8] if restricted else list(range(9))
    ours = elbo_loss(
        hidden,
        weight,
        target,
        masked,
        p_mask,
        bias=bias,
        temperature=0.7,
        low_rank=(down, up, 0.5),
        label_smoothing=0.15,
        reduction=reduction,
        **options,
    )
    z = (hidden @ (weight + 0.5 * up @ down).t() + bias)[..., kept] / 0.7
    token = torch.nn.functional.cross_entropy(z[masked], target[masked], label_smoothing=0.15, reduction="none")
    each = torch.zeros_like(p_mask).masked_scatter(masked, token / p_mask[masked])
    want = {"mean": each.sum() / 18, "sum": each.sum(), "sequence": each.sum(-1), "none": each}[reduction]
    torch.testing.assert_close(ours, want)
    same_value_and_gradients(ours.sum(), want.sum(), (hidden, weight, bias, down, up))


def test_label_smoothing_refuses_what_it_cannot_do():
    hidden, weight, _, target, masked, p_mask = problem()
    with pytest.raises(ValueError, match="label_smoothing takes no softcap"):
        elbo_loss(hidden, weight, target, masked, p_mask, softcap=3.0, label_smoothing=0.1)
    for value, error in ((1.0, ValueError), (-0.1, ValueError), ("x", TypeError)):
        with pytest.raises(error, match="label_smoothing"):
            elbo_loss(hidden, weight, target, masked, p_mask, label_smoothing=value)
    with pytest.raises(TypeError, match="ignore_index must be an int, got float"):
        elbo_loss(hidden, weight, target, masked, p_mask, ignore_index=1.0)
    with pytest.raises(ValueError, match="lengths divides only under reduction='mean', got reduction='sum'"):
        elbo_loss(hidden, weight, target, masked, p_mask, lengths=3, reduction="sum")
