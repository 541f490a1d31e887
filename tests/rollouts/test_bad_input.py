"""Everything `generate` refuses, and that it says which argument, what came and what is allowed."""

from __future__ import annotations

import math

import pytest
import torch

from dllm_kernels import generate
from tests.rollouts.compare import IDS, MASK
from tests.tiny import eurobert

PROMPT = torch.tensor([[3, 9, 4, 7], [5, 6, 3, 3], [8, 3, 3, 6]])
LIST = list(PROMPT)
SDAR = {"sampler": "sdar", "block_length": 4, "steps": 2}
DREAM = {"sampler": "dream", "block_length": None, "steps": 3, "alg": "entropy"}
FAST = {"sampler": "fast_dllm", "steps": None}
REMDM = {"sampler": "remdm", "block_length": None, "steps": 3, "sequence_ids": IDS}
BOUND = {"sampler": "entropy_bound", "steps": None}


@pytest.fixture(scope="module")
def short_model():
    return eurobert(layers=1, hidden=16, max_position_embeddings=48)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        # blocks and steps
        ({"block_length": 4}, ValueError, ["block_length", "4", "6"]),
        ({"block_length": None}, ValueError, ["block_length", "llada", "None"]),
        ({"block_length": 0}, ValueError, ["block_length", "0"]),
        ({"block_length": 2.0}, TypeError, ["block_length", "float"]),
        ({"steps": 3, "block_length": 3}, ValueError, ["steps", "3", "2"]),
        ({"steps": 1, "block_length": 2}, ValueError, ["steps", "1", "3"]),
        ({"steps": 7, "block_length": 6}, ValueError, ["steps", "7", "6"]),
        ({"steps": 0}, ValueError, ["steps", "0"]),
        ({"steps": None}, ValueError, ["steps", "llada", "None"]),
        ({"length": 0}, ValueError, ["length", "0"]),
        ({**SDAR, "steps": 5}, ValueError, ["steps", "5", "block_length=4"]),
        ({**SDAR, "steps": None}, ValueError, ["steps", "sdar"]),
        ({**FAST, "steps": 3}, ValueError, ["steps", "fast_dllm", "3"]),
        ({**FAST, "block_length": 4}, ValueError, ["block_length", "4", "6"]),
        ({**BOUND, "steps": 3}, ValueError, ["steps", "entropy_bound", "3"]),
        ({**DREAM, "block_length": 6}, ValueError, ["block_length", "dream", "6"]),
        ({**DREAM, "steps": None}, ValueError, ["steps", "dream"]),
        # samplers and their options
        ({"sampler": "lada"}, ValueError, ["sampler", "lada", "entropy_bound"]),
        ({"threshold": 0.5}, ValueError, ["threshold", "llada", "remasking"]),
        ({"remaskin": "random"}, ValueError, ["remaskin", "did you mean 'remasking'"]),
        ({**FAST, "alg": "entropy"}, ValueError, ["alg", "fast_dllm", "threshold"]),
        ({"remasking": "entropy"}, ValueError, ["remasking", "entropy", "random"]),
        ({**SDAR, "remasking": "random"}, ValueError, ["remasking", "random", "sequential"]),
        ({**SDAR, "threshold": 1.5}, ValueError, ["threshold", "1.5"]),
        ({**FAST, "threshold": -0.1}, ValueError, ["threshold", "-0.1"]),
        ({**FAST, "threshold": math.nan}, ValueError, ["threshold", "nan"]),
        ({**BOUND, "bound": -1.0}, ValueError, ["bound", "-1"]),
        ({**DREAM, "alg": "margin"}, ValueError, ["alg", "margin", "topk_margin"]),
        ({**DREAM, "eps": 0.0}, ValueError, ["eps", "0"]),
        ({**DREAM, "eps": 1.0}, ValueError, ["eps", "1"]),
        ({**DREAM, "alg_temp": -1.0}, ValueError, ["alg_temp", "-1"]),
        ({**DREAM, "alg": "origin", "alg_temp": 0.5}, ValueError, ["alg_temp", "origin", "0.5"]),
        # draws
        ({"temperature": -1.0}, ValueError, ["temperature", "-1"]),
        ({"temperature": math.nan}, ValueError, ["temperature", "nan"]),
        ({"temperature": 1.0}, ValueError, ["sequence_ids"]),
        ({"remasking": "random"}, ValueError, ["sequence_ids"]),
        ({**DREAM, "alg": "origin"}, ValueError, ["sequence_ids"]),
        ({**DREAM, "alg_temp": 0.5}, ValueError, ["sequence_ids"]),
        ({"temperature": 1.0, "sequence_ids": IDS[:2]}, ValueError, ["sequence_ids", "2", "3"]),
        ({"temperature": 1.0, "sequence_ids": torch.tensor([1, 2, 2])}, ValueError, ["sequence_ids", "distinct"]),
        ({"temperature": 1.0, "sequence_ids": torch.ones(3)}, TypeError, ["sequence_ids", "float32"]),
        ({"top_k": 0}, ValueError, ["top_k", "0"]),
        ({"top_p": 0.0}, ValueError, ["top_p", "0"]),
        ({"top_p": 1.5}, ValueError, ["top_p", "1.5"]),
        ({"seed": -1}, ValueError, ["seed", "-1"]),
        ({"seed": 2**32}, ValueError, ["seed", str(2**32)]),
        ({"suppress": (11,)}, ValueError, ["suppress", "11"]),
        ({"suppress": tuple(range(11))}, ValueError, ["suppress"]),
        ({"commit_last": (3,), "remasking": "random", "sequence_ids": IDS}, ValueError, ["commit_last", "random"]),
        ({"commit_last": (3,), **SDAR, "remasking": "sequential"}, ValueError, ["commit_last", "sequential"]),
        ({"commit_last": (3,), **DREAM, "alg": "origin", "sequence_ids": IDS}, ValueError, ["commit_last", "origin"]),
        ({"commit_last": (11,)}, ValueError, ["commit_last", "11"]),
        ({"guidance": -0.5}, ValueError, ["guidance", "-0.5"]),
        # prompts
        ({"prompt_ids": PROMPT[:0]}, ValueError, ["prompt_ids", "empty"]),
        ({"prompt_ids": []}, ValueError, ["prompt_ids", "empty"]),
        ({"prompt_ids": PROMPT.float()}, TypeError, ["prompt_ids", "float32"]),
        ({"prompt_ids": PROMPT[0]}, ValueError, ["prompt_ids", "4"]),
        ({"prompt_ids": "text"}, TypeError, ["prompt_ids", "str"]),
        ({"prompt_ids": [LIST[0], PROMPT]}, ValueError, ["prompt_ids[1]"]),
        ({"prompt_ids": [LIST[0], LIST[1].int()]}, TypeError, ["prompt_ids[1]", "int32"]),
        ({"prompt_ids": [[1, 2], [3]]}, TypeError, ["prompt_ids[0]", "list"]),
        ({"prompt_ids": PROMPT + 2, "mask_id": 0}, ValueError, ["11"]),
        ({"prompt_ids": PROMPT - 5}, ValueError, ["-2"]),
        ({"attention_mask": torch.ones(3, 5)}, ValueError, ["attention_mask", "5", "4"]),
        ({"prompt_ids": LIST, "attention_mask": torch.ones(3, 4)}, ValueError, ["attention_mask", "None"]),
        ({"prompt_ids": LIST, "width": 3}, ValueError, ["width", "3", "4"]),
        ({"width": 8}, ValueError, ["width", "None", "8"]),
        ({"mask_id": 11}, ValueError, ["mask_id", "11", "10"]),
        ({"mask_id": -1}, ValueError, ["mask_id", "-1"]),
        ({"mask_id": 3}, ValueError, ["prompt_ids", "mask_id=3"]),
        ({"prompt_ids": LIST, "mask_id": 9}, ValueError, ["prompt_ids", "mask_id=9"]),
        ({"eos_id": 11}, ValueError, ["eos_id", "11", "10"]),
        ({**REMDM, "eos_id": 3}, ValueError, ["eos_id", "remdm", "3"]),
        ({**REMDM, "strategy": "loop", "t_off": 0.55}, ValueError, ["t_off", "below t_on=0.55", "got 0.55"]),
        ({"shift": 5}, ValueError, ["prompt_ids", "shift=5"]),
        ({"shift": -1}, ValueError, ["shift", "-1"]),
        ({"length": 60, "block_length": 60}, ValueError, ["length", "48", "64"]),
        ({"prompt_ids": LIST, "width": 43}, ValueError, ["length", "48", "49"]),
        # forms that do not go together
        ({"micro_batch": 0}, ValueError, ["micro_batch", "0"]),
        ({"packed": True}, ValueError, ["packed", "sequence"]),
        ({"prompt_ids": LIST, "packed": True, "deterministic": True}, ValueError, ["packed", "deterministic"]),
        ({"prompt_ids": LIST, "packed": True, "guidance": 1.0}, ValueError, ["packed", "guidance"]),
        ({"cache": True}, ValueError, ["cache", "sdar"]),
        ({**SDAR, "cache": True, "greedy": True}, ValueError, ["cache", "greedy"]),
        ({**SDAR, "cache": True}, ValueError, ["cache", "EuroBert", "past_key_values"]),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_an_error_names_the_argument_and_what_came(short_model, changes, error, words):
    model = short_model
    options = {"prompt_ids": PROMPT, "length": 6, "steps": 2, "block_length": 6, "mask_id": MASK} | changes
    with pytest.raises(error) as caught:
        generate(model, **options)
    for word in words:
        assert word in str(caught.value)
    assert "forward" not in model.get_output_embeddings().__dict__, "the model is as it was"


def test_a_left_padded_prompt_may_hold_the_mask_id_as_padding():
    attention_mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [0, 1, 1, 1]])
    padded = PROMPT.masked_fill(attention_mask == 0, MASK)
    rollout = generate(
        eurobert(layers=1, hidden=16), padded, attention_mask=attention_mask, length=4, steps=2, block_length=4, mask_id=MASK
    )
    assert not rollout.failed_B.any()


def test_a_model_in_training_mode_with_dropout_is_refused_since_its_rollout_could_not_be_repeated():
    model = eurobert(layers=1, hidden=16, attention_dropout=0.5).train()
    with pytest.raises(ValueError, match=r"model.*dropout"):
        generate(model, PROMPT, length=6, steps=2, block_length=6, mask_id=MASK)


def test_guidance_is_refused_where_logits_are_capped_since_it_mixes_hidden_states():
    model = eurobert(layers=1, hidden=16)
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match=r"guidance.*softcap=30"):
        generate(model, PROMPT, length=6, steps=2, block_length=6, mask_id=MASK, guidance=1.0)
