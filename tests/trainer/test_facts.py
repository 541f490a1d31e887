"""The table of facts: which row a checkpoint gets, and who is believed about what."""

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from dllm_trainer.errors import UserError
from dllm_trainer.facts import Facts, facts_of, family_of
from transformers import EuroBertConfig, ModernBertConfig, PretrainedConfig

NO_TOKENS = SimpleNamespace(mask_token_id=None, eos_token_id=None, pad_token_id=None)


def config(model_type: str, **values: Any) -> PretrainedConfig:
    made = PretrainedConfig()
    made.model_type = model_type
    for name, value in values.items():
        setattr(made, name, value)
    return made


LLADA = {"mask_id": 126336, "eos_id": 126081, "pad_id": 126081, "shift": 0, "topology": "bidirectional", "attention_mask": "bias"}
DREAM = {"mask_id": 151666, "eos_id": 151643, "pad_id": 151643, "shift": 1, "topology": "bidirectional", "attention_mask": "bool"}
LLADA2 = {"mask_id": 156895, "eos_id": 156892, "pad_id": 156892, "shift": 0}
SDAR = {"mask_id": 151669, "eos_id": 151643, "shift": 0, "topology": "block_causal", "block_length": 4}

# Configurations as far as they are published: MODELS.md 1.3. name, configuration, tokenizer, facts
PUBLISHED: list[tuple[str, PretrainedConfig, dict[str, int], dict[str, Any]]] = [
    ("GSAI-ML/LLaDA-8B-Base", config("llada", architectures=["LLaDAModelLM"]), {}, LLADA | {"family": "llada"}),
    ("GSAI-ML/LLaDA-8B-Instruct", config("llada", vocab_size=126464, mask_token_id=126336), {}, LLADA),
    ("GSAI-ML/LLaDA-1.5", config("llada", vocab_size=126464), {}, LLADA),
    ("GSAI-ML/iLLaDA-8B", config("llada", vocab_size=155136), {}, {"family": "illada", "mask_id": 5, "eos_id": 2, "pad_id": 1}),
    (
        "inclusionAI/LLaDA-MoE-7B-A1B-Instruct",
        config("llada", architectures=["LLaDAMoEModelLM"], num_experts=64),
        {},
        LLADA2 | {"family": "llada-moe", "topology": "bidirectional", "attention_mask": "int"},
    ),
    (
        "inclusionAI/LLaDA2.1-mini",
        config("llada2_moe", num_experts=256, pad_token_id=156892),
        {"mask_token_id": 156895, "eos_token_id": 156892},
        LLADA2 | {"family": "llada2", "topology": "block_causal", "block_length": 32, "attention_mask": "float"},
    ),
    ("inclusionAI/LLaDA2.0-flash", config("llada2_moe"), {}, LLADA2 | {"block_length": 32}),
    ("Dream-org/Dream-v0-Instruct-7B", config("Dream", mask_token_id=151666), {}, DREAM | {"family": "dream"}),
    ("Dream-org/Dream-Coder-v0-Instruct-7B", config("Dream"), {}, DREAM | {"family": "dream-coder"}),
    (
        "apple/DiffuCoder-7B-cpGRPO",
        config("Dream", pad_token_id=151643),
        {"pad_token_id": 151667},
        DREAM | {"family": "diffucoder", "pad_id": 151667},
    ),
    ("JetLM/SDAR-1.7B-Chat", config("sdar", block_size=4, mask_token_id=151669, eos_token_id=151643), {}, SDAR),
    ("JetLM/SDAR-8B-Chat-b16", config("sdar", block_size=16), {}, SDAR | {"block_length": 16}),
    ("JetLM/SDAR-30B-A3B-Chat", config("sdar_moe", num_experts=128), {}, SDAR | {"attention_mask": "bool"}),
    ("Gen-Verse/MMaDA-8B-Base", config("mmada", llm_vocab_size=126464), {}, LLADA | {"family": "mmada", "valid_vocab": 126464}),
    (
        "Efficient-Large-Model/Fast_dLLM_v2_7B",
        config("Fast_dLLM_Qwen", bd_size=32),
        {},
        {"mask_id": 151665, "shift": 1, "topology": "block_causal", "block_length": 32, "attention_mask": "none"},
    ),
    (
        "dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1",
        config("a2d-qwen3"),
        {"mask_token_id": 151669, "eos_token_id": 151645},
        {"family": "a2d", "mask_id": 151669, "eos_id": 151645, "shift": 0, "topology": "bidirectional"},
    ),
    (
        "dllm-hub/Qwen3-0.6B-diffusion-bd3lm-v0.1",
        config("a2d-qwen3"),
        {"mask_token_id": 151669},
        {"family": "a2d-bd3lm", "topology": "block_causal", "block_length": 32},
    ),
    ("answerdotai/ModernBERT-large", ModernBertConfig(), {}, {"mask_id": 50284, "eos_id": 50282, "pad_id": 50283}),
    ("dllm-hub/ModernBERT-large-chat", ModernBertConfig(), {"mask_token_id": 50290}, {"mask_id": 50290}),
    ("EuroBERT/EuroBERT-210m", EuroBertConfig(), {}, {"mask_id": 128002, "eos_id": 128001, "pad_id": 128001}),
    (
        "kuleshov-group/mdlm-owt",
        config("mdlm", vocab_size=50258),
        {"eos_token_id": 50256},
        {"mask_id": 50257, "attention_mask": "none", "head": "backbone.output_layer.linear"},
    ),
]


@pytest.mark.parametrize(("name", "published", "tokens", "want"), PUBLISHED, ids=[row[0] for row in PUBLISHED])
def test_published_checkpoints_get_their_facts(
    name: str, published: PretrainedConfig, tokens: dict[str, int], want: dict[str, Any]
) -> None:
    tokenizer = SimpleNamespace(**{**vars(NO_TOKENS), **tokens})
    facts = dataclasses.asdict(facts_of(published, tokenizer, name))
    assert {key: facts[key] for key in want} == want


def test_the_checkpoint_is_believed_before_the_table_and_the_config_before_both() -> None:
    tokenizer = SimpleNamespace(mask_token_id=40, eos_token_id=41, pad_token_id=42)
    assert facts_of(config("llada"), tokenizer, "x").mask_id == 40
    stated = config("llada", mask_token_id=50, eos_token_id=[51, 52])
    found = facts_of(stated, tokenizer, "x")
    assert (found.mask_id, found.eos_id, found.pad_id) == (50, 51, 42)
    given = facts_of(stated, tokenizer, "x", {"mask_id": 60, "shift": 1, "suppress": [3, 4]})
    assert (given.mask_id, given.eos_id, given.shift, given.suppress) == (60, 51, 1, (3, 4))


def test_the_facts_of_a_run_are_overrides_that_need_no_table() -> None:
    first = facts_of(config("Dream"), SimpleNamespace(mask_token_id=9, eos_token_id=1, pad_token_id=151667), "DiffuCoder-7B")
    assert facts_of(config("Dream"), NO_TOKENS, "checkpoint", dataclasses.asdict(first)) == first


def test_a_block_causal_model_may_be_declared_bidirectional_and_back() -> None:
    assert facts_of(config("sdar"), NO_TOKENS, "x", {"topology": "bidirectional"}).block_length is None
    declared = facts_of(
        config("llada"), NO_TOKENS, "x", {"topology": "block_causal", "block_length": 8, "attention_mask": "bool"}
    )
    assert declared.block_length == 8
    with pytest.raises(UserError, match=r"model\.facts\.block_length must be the 16 that the configuration of x states, got 8"):
        facts_of(config("sdar", block_size=16), NO_TOKENS, "x", {"block_length": 8})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"mask": 3}, r"unknown config key model\.facts\.mask: the nearest is mask_id; allowed: family, mask_id, "),
        ({"shift": 2}, r"model\.facts\.shift must be 0 or 1, got 2"),
        ({"shift": True}, r"model\.facts\.shift must be an integer of at least 0, got True"),
        ({"mask_id": -1}, r"model\.facts\.mask_id must be an integer of at least 0, got -1"),
        ({"topology": "causal"}, r"model\.facts\.topology must be one of bidirectional, block_causal, got 'causal'"),
        ({"topology": "block_causal"}, r"model\.facts\.block_length must be given for block_causal, and only for it, got None"),
        ({"block_length": 4}, r"model\.facts\.block_length must be given for block_causal, and only for it, got 4"),
        ({"attention_mask": "yes"}, r"model\.facts\.attention_mask must be one of none, int, bool, float, bias, got 'yes'"),
        ({"suppress": ["x"]}, r"model\.facts\.suppress must be an integer of at least 0, got 'x'"),
    ],
)
def test_a_wrong_override_is_told_by_its_config_key(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        facts_of(config("llada"), NO_TOKENS, "x", overrides)


def test_a_model_without_a_mask_id_names_the_key_to_set() -> None:
    with pytest.raises(UserError, match=r"model my/qwen states no mask token: set model\.facts\.mask_id to the id that stands"):
        facts_of(config("qwen3"), NO_TOKENS, "my/qwen")
    unknown = facts_of(config("qwen3"), NO_TOKENS, "my/qwen", {"mask_id": 5})
    assert unknown == Facts(family="unknown", mask_id=5)
    with pytest.raises(UserError, match="trained on uniform noise and has none"):
        facts_of(config("diffusion_gemma"), NO_TOKENS, "google/diffusiongemma")


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A distribution on sys.path that has an entry point."""

    def fake(code: str) -> None:
        (tmp_path / "fake_adapter.py").write_text(code)
        info = tmp_path / "fake_adapter-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-adapter\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[dllm_kernels.adapters]\nnew = fake_adapter:row\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "fake_adapter", raising=False)

    return fake


def test_an_installed_package_adds_a_family_that_comes_first(install: Any) -> None:
    assert family_of(config("llada", vocab_size=99), "x").name == "llada"
    install(
        "from trainer.facts import Family\n"
        "row = Family('mine', lambda config, name: config.vocab_size == 99, {'mask_id': 7, 'shift': 1}, stated={})\n"
    )
    found = facts_of(config("llada", vocab_size=99, mask_token_id=3), NO_TOKENS, "x")
    assert (found.family, found.mask_id, found.shift) == ("mine", 7, 1)
    assert family_of(config("llada", vocab_size=98), "x").name == "llada"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("row = 3\n", r"entry point new of dllm_kernels\.adapters must be a dllm_trainer\.facts\.Family, got int"),
        (
            "raise RuntimeError('broken')\n",
            r"entry point new of dllm_kernels\.adapters cannot be loaded \(RuntimeError: broken\)",
        ),
    ],
)
def test_a_broken_package_is_told_by_name(install: Any, code: str, message: str) -> None:
    install(code)
    with pytest.raises(UserError, match=message):
        family_of(config("llada"), "x")
