"""Tokenizer and model: what is saved loads with transformers alone, and nothing touches the global random state."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

from tests.trainer.conftest import global_random_states
from trainer import sudoku
from trainer.config import load_config
from trainer.errors import UserError
from trainer.models import build_model, load_checkpoint, parameter_count
from trainer.tokenizer import Codec, make_tokenizer

TEXT = "0103020400103000=4123341223411234"


def test_the_tokenizer_survives_saving_and_reads_its_own_writing(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for one in (tokenizer, loaded):
        ids = one(TEXT)["input_ids"]
        assert len(ids) == len(TEXT)
        assert one.decode(ids) == TEXT
        assert one("01[MASK][MASK]")["input_ids"][2:] == [one.mask_token_id] * 2
        assert one("9")["input_ids"] == [one.unk_token_id]
        assert len({one.mask_token_id, one.pad_token_id, one.eos_token_id, one.unk_token_id}) == 4
    assert loaded.get_vocab() == tokenizer.get_vocab()


def test_the_codec_agrees_with_the_tokenizer() -> None:
    tokenizer = make_tokenizer()
    codec, grids = Codec(tokenizer), sudoku.all_grids()[:20]
    puzzles = grids * (torch.arange(16) % 3 > 0)
    texts = ["".join(map(str, p)) + "=" + "".join(map(str, g)) for p, g in zip(puzzles.tolist(), grids.tolist(), strict=True)]
    ids = torch.cat([codec.prompt_ids(puzzles), codec.answer_ids(grids)], dim=1)
    assert ids.tolist() == tokenizer(texts)["input_ids"]
    assert torch.equal(codec.digits(codec.answer_ids(grids)), grids)
    assert codec.digits(torch.tensor([codec.mask_id, tokenizer.pad_token_id])).tolist() == [-1, -1]


def test_a_tokenizer_without_the_digits_is_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.convert_tokens_to_ids = lambda tokens: [None] * len(tokens)
    with pytest.raises(ValueError, match="tokenizer must know 0, 1, 2, 3, 4, ="):
        Codec(tokenizer)


def test_the_model_is_a_function_of_the_seed_and_small() -> None:
    config, tokenizer = load_config().model, make_tokenizer()
    before = global_random_states()
    one, same, other = (build_model(config, tokenizer, seed=seed) for seed in (1, 1, 2))
    assert global_random_states() == before
    assert parameter_count(one) < 1_000_000
    weights = [model.state_dict() for model in (one, same, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["lm_head.weight"], weights[2]["lm_head.weight"])


def test_a_checkpoint_gives_the_same_logits(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    model = build_model(load_config().model, tokenizer, seed=0)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    before = global_random_states()
    loaded, _ = load_checkpoint(tmp_path)
    assert global_random_states() == before
    ids = torch.tensor([make_tokenizer()(TEXT)["input_ids"]])
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(loaded(ids).logits, expected)
        assert torch.equal(AutoModelForMaskedLM.from_pretrained(tmp_path).eval()(ids).logits, expected)


def test_a_folder_without_a_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"checkpoint: .* holds no config\.json"):
        load_checkpoint(tmp_path)
