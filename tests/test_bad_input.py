"""What users get wrong by hand: one sentence that names the argument, never a silently wrong number."""

import math

import pytest
import torch

from dllm_kernels import bgpo_loss, elbo_loss, generate, head_backward, headless, sample_tokens, score_tokens
from dllm_kernels.noise import Stream, row_bits
from dllm_kernels.objectives import group_advantages
from dllm_kernels.rows import Rows
from tests.tiny import eurobert

H, V, L = 8, 11, 6


def tensors():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, L, H, generator=generator, requires_grad=True)
    target = torch.randint(0, V - 1, (2, L), generator=generator)
    return hidden, torch.randn(V, H, generator=generator), target, torch.ones(2, L, dtype=torch.bool)


@pytest.mark.parametrize("target", [torch.zeros(2, 1, dtype=torch.int64), torch.tensor(3)], ids=["last-dim-1", "0-d"])
def test_one_target_id_is_not_repeated_over_all_positions(target):
    hidden, weight, _, masked = tensors()
    with pytest.raises(ValueError, match=r"target must be broadcastable"):
        elbo_loss(hidden, weight, target, masked, torch.tensor(0.5))


def test_an_unbatched_sequence_with_its_length_works():
    hidden, weight, target, masked = tensors()
    one = elbo_loss(hidden[0], weight, target[0], masked[0], torch.tensor(0.5), lengths=torch.tensor(4))
    both = elbo_loss(hidden[:1], weight, target[:1], masked[:1], torch.tensor(0.5), lengths=torch.tensor([4]))
    torch.testing.assert_close(one, both)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_are_named(bad):
    hidden, weight, target, masked = tensors()
    one, zero, spoilt = torch.ones(2), torch.zeros(2), torch.tensor([1.0, bad])
    with pytest.raises(ValueError, match="advantages must be finite"):
        bgpo_loss(hidden, weight, target, masked, torch.tensor(2.0), None, spoilt, 4)
    with pytest.raises(ValueError, match="old_elbo must be finite"):
        bgpo_loss(hidden, weight, target, masked, torch.tensor(2.0), spoilt, one, 4)
    with pytest.raises(ValueError, match="token_weight must be above 0 and finite"):
        bgpo_loss(hidden, weight, target, masked, torch.tensor(bad), zero, one, 4)
    coef = torch.full((2 * L,), bad)
    for name in ("coef", "entropy_coef"):
        with pytest.raises(ValueError, match=f"{name} must be finite"):
            score_tokens(hidden, weight, target.flatten(), **{name: coef})
    rows = Rows(torch.arange(2 * L), target.flatten(), torch.zeros(2 * L), torch.zeros(2 * L), coef)
    with pytest.raises(ValueError, match="coef must be finite"):
        head_backward(hidden, weight, rows, coef)
    with pytest.raises(TypeError, match=r"coef must be a torch.Tensor, got NoneType"):
        head_backward(hidden, weight, rows, None)


@pytest.mark.parametrize("temperature", [math.inf, math.nan, -1.0, "1", True])
def test_a_sampling_temperature_is_a_finite_number_of_at_least_0(temperature):
    hidden, weight, _, _ = tensors()
    with pytest.raises((ValueError, TypeError), match="temperature must be"):
        sample_tokens(hidden, weight, torch.arange(2 * L), temperature=temperature, suppress=(V - 1,))
    with pytest.raises((ValueError, TypeError), match="temperature must be"):
        generate(
            eurobert(),
            torch.ones(1, 2, dtype=torch.int64),
            length=2,
            steps=2,
            block_length=2,
            mask_id=10,
            temperature=temperature,
        )


def test_a_tiny_temperature_is_the_argmax_and_a_huge_one_never_draws_a_suppressed_id():
    hidden, weight, _, _ = tensors()
    key = row_bits(0, Stream.TOKEN, torch.arange(2 * L), torch.tensor(0), torch.tensor(0))
    greedy = sample_tokens(hidden, weight, key, temperature=0.0).token
    assert torch.equal(sample_tokens(hidden, weight, key, temperature=1e-38).token, greedy)
    drawn = [sample_tokens(hidden, weight, key, step=step, temperature=1e38, suppress=(3,)).token for step in range(50)]
    assert 3 not in torch.cat(drawn).tolist()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"suppress": 3}, "suppress must be a sequence of ids, got int"),
        ({"suppress": ("a",)}, "suppress must hold ints"),
        ({"softcap": "3"}, "softcap must be a number"),
        ({"softcap": math.inf}, "softcap must be finite"),
        ({"temperature": math.inf}, "temperature must be finite"),
        ({"valid_vocab": 3.5}, "valid_vocab must be an int"),
    ],
)
def test_options_of_the_wrong_kind_are_named(options, words):
    hidden, weight, target, _ = tensors()
    with pytest.raises((ValueError, TypeError), match=words):
        score_tokens(hidden, weight, target.flatten(), **options)


def test_ids_that_no_model_takes_and_models_that_are_wrapped():
    model = eurobert()
    with headless(model) as body:
        for ids in (
            torch.ones(0, 4, dtype=torch.int64),
            torch.tensor(1),
            torch.ones(1, 4),
            [1],
            torch.ones(1, 4).long().to("meta"),
        ):
            with pytest.raises((ValueError, TypeError), match="input_ids"):
                body(ids)
    with pytest.raises(ValueError, match="context, which has ended"):
        body(torch.ones(1, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"use DistributedDataParallel"), headless(torch.nn.DataParallel(model)):
        pass


def test_group_advantages_under_autocast_are_as_exact_as_without_and_need_a_reward():
    rewards, groups = torch.linspace(0, 100, 16), torch.arange(16) // 8
    with torch.autocast("cpu", torch.bfloat16):
        got = group_advantages(rewards, groups, kind="std")
    assert torch.equal(got, group_advantages(rewards, groups, kind="std"))
    with pytest.raises(ValueError, match="rewards must hold at least one"):
        group_advantages(torch.zeros(0), torch.zeros(0, dtype=torch.int64))


def test_elbo_loss_takes_the_head_s_logit_scale():
    hidden, weight, target, masked = tensors()
    got = elbo_loss(hidden, weight, target, masked, torch.tensor(1.0), temperature=8.0)
    logits = hidden @ weight.t() / 8
    torch.testing.assert_close(got, torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten()))
