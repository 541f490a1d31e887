"""What is checked before a run: the alignment by clean text, and the mask id."""

import dataclasses

import pytest
import torch
from dllm_trainer.errors import UserError
from dllm_trainer.facts import Facts
from dllm_trainer.models.loading import Loaded
from dllm_trainer.models.self_tests import check_mask_id, shift_self_test
from torch import nn

from tests.tiny import eurobert
from tests.trainer.models.tiny_checkpoints import EOS, MASK, PAD, UNK, make_tokenizer

FACTS = Facts(family="test", mask_id=MASK, eos_id=EOS, pad_id=PAD)


def text(sequences: int, seed: int) -> torch.Tensor:
    """Each token is the one before plus 7: known from either neighbour."""
    start = torch.randint(0, 50, (sequences, 1), generator=torch.Generator().manual_seed(seed))
    return (start + 7 * torch.arange(16)) % 50


def trained(shift: int) -> Loaded:
    """A model that fills in masked tokens of `text`, position i from row i - shift."""
    model = eurobert(vocab=60, hidden=32, layers=1, dtype=torch.float32)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for step in range(60):
        ids = text(32, step)
        masked = torch.rand(ids.shape, generator=generator) < 0.2
        masked[:, 0] = False
        logits = model(input_ids=ids.masked_fill(masked, MASK)).logits.roll(shift, dims=1)
        loss = nn.functional.cross_entropy(logits[masked], ids[masked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return Loaded(model, make_tokenizer(mask=True), dataclasses.replace(FACTS, shift=shift))


@pytest.fixture(scope="module", params=[0, 1])
def loaded(request: pytest.FixtureRequest) -> Loaded:
    return trained(request.param)


def test_a_trained_model_s_alignment_is_seen_in_clean_text(loaded: Loaded) -> None:
    verdict = shift_self_test(loaded, text(16, 99), seed=0)
    assert verdict.likelier == loaded.facts.shift
    assert verdict.tokens > 20
    right, wrong = verdict.same_logp, verdict.shifted_logp
    if loaded.facts.shift:
        right, wrong = wrong, right
    assert right > wrong + 1.5
    assert f"{right:.2f}" in str(verdict)


def test_a_wrong_alignment_is_an_error_with_the_figures(loaded: Loaded) -> None:
    right = loaded.facts.shift
    wrong = dataclasses.replace(loaded, facts=dataclasses.replace(loaded.facts, shift=1 - right))
    with pytest.raises(
        UserError, match=rf"model\.facts\.shift is {1 - right}, .* nats a token .* set model\.facts\.shift={right}"
    ):
        shift_self_test(wrong, text(16, 99), seed=0)


def test_padding_is_left_out_of_the_test(loaded: Loaded) -> None:
    ids = text(16, 99)
    padded = torch.cat([torch.full((16, 40), PAD), ids], dim=1)
    verdict = shift_self_test(loaded, padded, seed=0, attention_mask_BS=padded != PAD)
    assert verdict.likelier == loaded.facts.shift
    assert verdict.tokens < ids.numel() / 3


def test_an_untrained_model_and_too_little_text_are_undecided_and_no_error() -> None:
    for shift in (0, 1):
        model = Loaded(eurobert(vocab=60), make_tokenizer(mask=True), dataclasses.replace(FACTS, shift=shift))
        assert shift_self_test(model, text(16, 0), seed=0).likelier is None
        few = shift_self_test(model, text(1, 0)[:, :3], seed=0)
        assert few.likelier is None
        assert "undecided" in str(few)


def with_facts(**changes: object) -> Loaded:
    return Loaded(eurobert(vocab=60), make_tokenizer(mask=True), dataclasses.replace(FACTS, **changes))


def test_a_mask_token_passes() -> None:
    check_mask_id(with_facts())
    check_mask_id(dataclasses.replace(with_facts(), tokenizer=make_tokenizer(mask=False)))  # special, though not called the mask


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_id": 60}, r"model\.facts\.mask_id must be in the embedding's 0\.\.59, got 60"),
        ({"mask_id": 7}, r"must be a special token, but 7 is '7', which ordinary text may hold"),
        ({"mask_id": EOS}, r"must differ from the ids of end and padding, got 57"),
        ({"valid_vocab": 50}, r"must be below valid_vocab=50, got 59"),
    ],
)
def test_an_id_that_cannot_stand_for_a_mask_is_told(changes: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_mask_id(with_facts(**changes))


def test_a_row_that_no_token_has_may_be_the_mask() -> None:
    model = Loaded(eurobert(vocab=64), make_tokenizer(mask=True), dataclasses.replace(FACTS, mask_id=62))
    check_mask_id(model)
    assert UNK != 62


def test_text_unlike_what_a_model_was_trained_on_decides_nothing(loaded: Loaded) -> None:
    """Of the demo's checkpoint on another task the test once said: set model.facts.shift=1."""
    foreign = torch.randint(0, 50, (64, 16), generator=torch.Generator().manual_seed(1))
    for shift in (0, 1):
        claimed = dataclasses.replace(loaded, facts=dataclasses.replace(loaded.facts, shift=shift))
        verdict = shift_self_test(claimed, foreign, seed=0)
        assert verdict.likelier is None
        assert verdict.expected_logp > max(verdict.same_logp, verdict.shifted_logp) + 1


def test_the_shift_of_a_family_in_the_table_is_never_doubted(loaded: Loaded) -> None:
    for family, shift in (("llada", 0), ("dream", 1)):
        facts = dataclasses.replace(loaded.facts, family=family, shift=shift)
        assert shift_self_test(dataclasses.replace(loaded, facts=facts), text(16, 99), seed=0).likelier == loaded.facts.shift
    other = dataclasses.replace(loaded.facts, family="llada", shift=1)
    if loaded.facts.shift == 0:
        with pytest.raises(UserError, match=r"set model\.facts\.shift=0"):
            shift_self_test(dataclasses.replace(loaded, facts=other), text(16, 99), seed=0)
