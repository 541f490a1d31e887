"""Tokenizer and model: what is saved loads with transformers alone, and what cannot be loaded is told in a
sentence.
"""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dllm_trainer.config import load_config
from dllm_trainer.errors import UserError
from dllm_trainer.facts import Facts
from dllm_trainer.models import compat
from dllm_trainer.models.loading import Loaded, _add_mask_token, build_model, from_scratch, load, parameter_count
from dllm_trainer.models.tokenizer import make_tokenizer
from dllm_trainer.tasks import make_task
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM, AutoTokenizer

from tests.tiny import eurobert
from tests.trainer.conftest import global_random_states
from tests.trainer.models.tiny_checkpoints import MASK, PAD, VOCABULARY, write
from tests.trainer.models.tiny_checkpoints import make_tokenizer as tiny_tokenizer

ALPHABET = "01234="
TEXT = "0103020400103000=4123341223411234"


def test_a_transformers_without_eurobert_is_told_when_a_model_from_scratch_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "transformers", SimpleNamespace(__version__="4.57.6"))
    with pytest.raises(UserError, match=r"model\.checkpoint .*4\.57\.6.*'transformers>=5\.3'"):
        build_model(load_config("demo", []).model, make_tokenizer(ALPHABET), seed=0)


def test_the_tokenizer_survives_saving_and_reads_its_own_writing(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(ALPHABET)
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


def test_ids_are_places_in_the_alphabet_whatever_its_characters() -> None:
    """Also those that mean something in a regular expression, and the white space of a longer text."""
    alphabet = "0123456789+-*/()=., \n[\\"
    tokenizer = make_tokenizer(alphabet)
    assert tokenizer(alphabet)["input_ids"] == list(range(len(alphabet)))
    assert tokenizer.decode(range(len(alphabet))) == alphabet
    assert tokenizer.mask_token_id >= len(alphabet)


def test_a_task_without_an_alphabet_needs_a_checkpoint() -> None:
    config = load_config(overrides=["task.style=words", "task.train_puzzles=2", "task.test_puzzles=2"])
    with pytest.raises(UserError, match=r"model\.checkpoint must be given for this task"):
        from_scratch(config.model, make_task(config.task, seed=0), seed=0)


def test_the_model_is_a_function_of_the_seed_and_small() -> None:
    config, tokenizer = load_config().model, make_tokenizer(ALPHABET)
    before = global_random_states()
    one, same, other = (build_model(config, tokenizer, seed=seed) for seed in (1, 1, 2))
    assert global_random_states() == before
    assert parameter_count(one) < 1_000_000
    weights = [model.state_dict() for model in (one, same, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["lm_head.weight"], weights[2]["lm_head.weight"])


def test_a_checkpoint_gives_the_same_logits(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(ALPHABET)
    model = build_model(load_config().model, tokenizer, seed=0)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    before = global_random_states()
    loaded = load(tmp_path).model
    assert global_random_states() == before
    ids = torch.tensor([make_tokenizer(ALPHABET)(TEXT)["input_ids"]])
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(loaded(ids).logits, expected)
        assert torch.equal(AutoModelForMaskedLM.from_pretrained(tmp_path).eval()(ids).logits, expected)


def test_a_folder_without_a_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model: .* cannot be loaded \("):
        load(tmp_path)


def test_the_demo_s_own_checkpoint_loads_as_any_other(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(ALPHABET)
    model = build_model(load_config().model, tokenizer, seed=0)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert (loaded.facts.family, loaded.facts.mask_id) == ("eurobert", tokenizer.mask_token_id)
    assert all(torch.equal(p, q) for p, q in zip(loaded.model.parameters(), model.parameters(), strict=True))


def test_weights_come_in_the_dtype_asked_for_and_frequencies_in_fp32(tmp_path: Path) -> None:
    write("dream", tmp_path)
    model = load(tmp_path, dtype=torch.bfloat16, trust_remote_code=True).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def edit(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def test_code_that_is_not_trusted_is_not_run(tmp_path: Path) -> None:
    write("llada", tmp_path / "llada")
    (tmp_path / "llada" / "configuration_llada.py").write_text("raise SystemExit('this ran')")
    with pytest.raises(
        UserError, match=r"llada brings modelling code of its own; read it, then set model\.trust_remote_code=true"
    ):
        load(tmp_path / "llada")
    write("eurobert", tmp_path / "native")  # a configuration that transformers knows, and a model class that it does not
    (tmp_path / "native" / "evil.py").write_text("raise SystemExit('this ran')")
    edit(tmp_path / "native", auto_map={"AutoModel": "evil.Evil"}, architectures=["Evil"])
    with pytest.raises(UserError, match=r"native brings modelling code of its own"):
        load(tmp_path / "native")


def test_what_cannot_be_loaded_is_told_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model: there is no folder .*nowhere; a checkpoint is"):
        load(tmp_path / "nowhere")
    write("eurobert", tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"model: .*cut cannot be loaded \(SafetensorError: "):
        load(tmp_path / "cut")
    write("eurobert", tmp_path / "headless")
    edit(tmp_path / "headless", architectures=["NoSuchModel"])
    with pytest.raises(UserError, match=r"names no class that transformers knows \(architectures: NoSuchModel\)"):
        load(tmp_path / "headless")
    write("eurobert", tmp_path / "wrong")
    with pytest.raises(UserError, match=r"unknown config key model\.facts\.maskid: the nearest is mask_id"):
        load(tmp_path / "wrong", facts={"maskid": 3})


def test_a_name_that_may_be_a_folder_or_an_id_is_told_as_both(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **options: Any) -> Any:
        raise OSError("no network")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", unreachable)
    with pytest.raises(UserError, match=r"runs/sft is no folder here, and as an id of the hub cannot be loaded \(OSError: no"):
        load("runs/sft")


@pytest.mark.parametrize("foreign", [False, True])
def test_weights_that_no_file_holds_are_not_drawn_at_random_in_silence(foreign: bool, tmp_path: Path) -> None:
    write("eurobert", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = sorted(weights)[-1]
    kept = {"some.other": torch.zeros(2)} if foreign else {key: value for key, value in weights.items() if key != lost}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    more = f" and {len(weights) - 1} more weights" if foreign else ""
    with pytest.raises(UserError, match=rf"cannot be loaded \(its files lack [\w.]+{more}\)"):
        load(tmp_path)


def test_the_mask_goes_to_the_model_in_its_own_dtype() -> None:
    mask = torch.tensor([[0, 1, 1]])

    def kwargs(kind: str) -> dict[str, torch.Tensor]:
        facts = Facts(family="x", mask_id=1, attention_mask=kind)
        return Loaded(eurobert(), make_tokenizer(ALPHABET), facts).call_kwargs(mask)

    assert kwargs("none") == {}
    assert kwargs("int")["attention_mask"].dtype == torch.int64
    assert kwargs("bool")["attention_mask"].dtype == torch.bool
    assert kwargs("float")["attention_mask"].shape == mask.shape
    assert Loaded(eurobert(), make_tokenizer(ALPHABET), Facts(family="x", mask_id=1)).call_kwargs(None) == {}


def test_ids_beyond_the_text_are_suppressed() -> None:
    facts = Facts(family="mmada", mask_id=5, valid_vocab=8, suppress=(2,))
    loaded = Loaded(eurobert(vocab=11), make_tokenizer(ALPHABET), facts)
    assert loaded.suppressed == (2, 8, 9, 10)
    assert dataclasses.replace(loaded, facts=Facts(family="x", mask_id=5)).suppressed == ()


def test_the_mask_token_is_added_where_the_tokenizer_has_room_for_it() -> None:
    known = tiny_tokenizer(mask=False)
    assert known.mask_token_id is None
    _add_mask_token(known, MASK)
    assert (known.mask_token, known.mask_token_id, len(known)) == ("<|mdm_mask|>", MASK, MASK + 1)
    following = tiny_tokenizer(mask=False)
    _add_mask_token(following, MASK + 1)
    assert (following.mask_token_id, len(following)) == (MASK + 1, MASK + 2)
    far = tiny_tokenizer(mask=False)
    _add_mask_token(far, VOCABULARY - 1)
    assert (far.mask_token_id, len(far)) == (None, MASK + 1)
    assert far.decode([1, VOCABULARY - 1, PAD], skip_special_tokens=True) == "1"
