"""lm-eval's own command, with our model among its own: its numbers are the library's, its results hold every setting."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dllm_kernels import estimate_elbo, generate
from dllm_kernels.noise import sequence_ids
from tests.tiny import checkpoint

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'dllm-kernels[integrations]'")
pytestmark = pytest.mark.slow  # the harness takes ten seconds to start

ROOT = Path(__file__).resolve().parents[2]
CHOICE = """
task: toy_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/data.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
target_delimiter: ""
metric_list: [{metric: acc}]
"""
WRITE = """
task: toy_write
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/data.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["="], do_sample: false, max_gen_toks: 8}
metric_list: [{metric: exact_match}]
"""
DATA = [
    {"question": "1+2=", "choices": ["3", "44", "15"], "gold": 0, "answer": "3"},
    {"question": "10+11=", "choices": ["21", "9"], "gold": 0, "answer": "21"},
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """(results, samples by task, model folder, the file of errors) of one run of the command, offline."""
    folder = tmp_path_factory.mktemp("harness")
    model = checkpoint(folder / "model")
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in DATA))
    for name, task in (("choice", CHOICE), ("write", WRITE)):
        (folder / f"{name}.yaml").write_text(task.replace("FOLDER", str(folder)))
    settings = f"pretrained={model},samples=8,block_length=4,steps=4,errors={folder}/errors.jsonl"
    command = ["-m", "dllm_kernels.integrations.lm_eval", "run", "--model", "dllm-kernels", "--model_args", settings]
    command += ["--tasks", "toy_choice,toy_write", "--include_path", str(folder), "--batch_size", "2"]
    command += ["--output_path", str(folder / "out"), "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=os.environ | offline, capture_output=True, text=True, timeout=800
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = (folder / "out").rglob("results_*.json")
    samples = {
        task: [json.loads(line) for path in (folder / "out").rglob(f"samples_{task}_*.jsonl") for line in path.open()]
        for task in ("toy_choice", "toy_write")
    }
    errors = [json.loads(line) for line in (folder / "errors.jsonl").open()]
    return json.loads(found.read_text()), samples, model, errors


def load(folder):
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    return AutoModelForMaskedLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def ids(tokenizer, text):
    return torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])


def test_log_likelihoods_are_the_library_s_estimates(results):
    _, samples, folder, errors = results
    model, tokenizer = load(folder)
    mask = tokenizer.mask_token_id
    asked = [(row["question"], choice) for row in DATA for choice in row["choices"]]
    told = {(row["context"].replace(" ", ""), row["continuation"].replace(" ", "")): row for row in errors}
    assert set(told) == set(asked)
    answers = [answer for row in samples["toy_choice"] for answer in row["resps"]]
    for (question, choice), answer in zip(asked, answers, strict=True):
        whole = ids(tokenizer, question + choice)
        scored = torch.arange(whole.shape[1])[None] >= ids(tokenizer, question).shape[1]
        want = estimate_elbo(model, whole, scored, samples=8, mask_id=mask, suppress=(mask,))
        value, likeliest = answer[0]
        assert float(value) == pytest.approx(float(want.elbo_B), abs=1e-4)
        row = told[question, choice]
        assert row["elbo"] == pytest.approx(float(want.elbo_B), abs=1e-4)
        assert row["standard_error"] == pytest.approx(float(want.standard_error_B), abs=1e-4)
        rollout = generate(
            model,
            ids(tokenizer, question),
            length=len(choice),
            steps=len(choice),
            block_length=len(choice),
            mask_id=mask,
        )
        assert str(likeliest) == str(tokenizer.decode(rollout.completion_BL[0]).replace(" ", "") == choice)


def test_completions_are_the_library_s_up_to_the_ending(results):
    _, samples, folder, _ = results
    model, tokenizer = load(folder)
    for row, sample in zip(DATA, samples["toy_write"], strict=True):
        rollout = generate(
            model,
            ids(tokenizer, row["question"]),
            length=8,
            steps=4,
            block_length=4,
            mask_id=tokenizer.mask_token_id,
            sequence_ids=sequence_ids([row["question"]]),
        )
        tokens = rollout.completion_BL[0].tolist()
        end = tokenizer.eos_token_id
        text = tokenizer.decode(tokens[: tokens.index(end)] if end in tokens else tokens, skip_special_tokens=True)
        assert sample["resps"][0][0] == text.split("=")[0]


def test_the_results_hold_every_setting(results):
    config = results[0]["config"]
    assert config["elbo"]["law"] == "exact"
    assert config["elbo"]["samples"] == 8
    assert 0 < config["elbo"]["standard_error"]["mean"] <= config["elbo"]["standard_error"]["largest"]
    (decoding,) = config["decoding"]
    assert {"sampler": "llada", "length": 8, "steps": 4, "block_length": 4, "temperature": 0.0}.items() <= decoding.items()
    assert {"remasking", "top_k", "top_p", "seed", "suppress", "guidance", "eos_id"} <= decoding.keys()
    assert config["mask_id"] == load(results[2])[1].mask_token_id


def test_a_rolling_text_is_the_sum_of_its_windows_and_mistakes_are_told(results):
    from dllm_kernels.integrations.lm_eval import DiffusionLM

    model, tokenizer = load(results[2])
    lm = DiffusionLM(model, tokenizer=tokenizer, samples=4)

    class Request:
        args = ("1+2=3" * 20,)  # 100 tokens, the context is 64

    (total,) = lm.loglikelihood_rolling([Request()])
    text = ids(tokenizer, Request.args[0])
    first = torch.cat([torch.tensor([[lm.eot_token_id]]), text[:, :63]], dim=1)
    second = text[:, 36:]
    mask = tokenizer.mask_token_id
    want = 0.0
    for whole, prefix in ((first, 1), (second, 27)):
        scored = torch.arange(whole.shape[1])[None] >= prefix
        want += float(estimate_elbo(model, whole, scored, samples=4, mask_id=mask, suppress=(mask,)).elbo_B)
    assert total == pytest.approx(want, abs=1e-3)
    with pytest.raises(ValueError, match=r"must fit the model's context of 64; nothing is ever cut"):
        lm._loglikelihood_tokens([("", [1] * 60, [2] * 9)])
    with pytest.raises(ValueError, match=r"^law must be one of"):
        DiffusionLM(model, tokenizer=tokenizer, law="uniform")
    with pytest.raises(TypeError, match=r"^batch_size must be an int, got str"):
        DiffusionLM(model, tokenizer=tokenizer, batch_size="auto")
    with pytest.raises(ValueError, match=r"^tokenizer must be given where pretrained is a model"):
        DiffusionLM(model)


def test_an_empty_continuation_is_certain_and_equal_requests_share_an_estimate(results):
    from dllm_kernels.integrations.lm_eval import DiffusionLM

    model, tokenizer = load(results[2])
    lm = DiffusionLM(model, tokenizer=tokenizer, samples=4, batch_size=3)
    asked = [("", [1, 2], [3]), ("", [1, 2], []), ("", [1, 2], [3])]
    found = lm._loglikelihood_tokens(asked)
    assert found[1] == (0.0, True)
    assert found[0] == found[2]
    assert lm.get_model_info()["elbo"]["estimates"] == 2


def test_sampling_without_a_temperature_is_at_temperature_1(results):
    from dllm_kernels.integrations.lm_eval import DiffusionLM

    model, tokenizer = load(results[2])

    class Request:
        args = ("1+2=", {"until": ["="], "do_sample": True, "max_gen_toks": 8})

    for given, used in (({}, 1.0), ({"temperature": 0.5}, 0.5)):
        lm = DiffusionLM(model, tokenizer=tokenizer, block_length=4, steps=4, **given)
        found = lm.generate_until([Request()] * 6)
        assert lm.get_model_info()["decoding"][0]["temperature"] == used
        assert len(set(found)) > 1


def test_a_block_causal_model_decodes_its_blocks(results):
    from dllm_kernels.integrations.lm_eval import DiffusionLM
    from tests.rollouts.test_layouts import causal

    model, (_, tokenizer) = causal("Qwen3", torch.float32), load(results[2])
    lm = DiffusionLM(model, tokenizer=tokenizer, samples=2, causal_block=4, mask_id=10, steps=4)

    class Request:
        args = ("101", {"until": [], "max_gen_toks": 8})

    (text,) = lm.generate_until([Request()])
    context = ids(tokenizer, "101")
    blocks = {"sampler": "sdar", "block_length": 4, "steps": 4, "cache": True, "mask_id": 10}
    assert text == tokenizer.decode(generate(model, [context[0]], length=8, **blocks).completion_BL[0])
    surest = {**blocks, "remasking": "low_confidence_static"}
    likeliest = generate(model, [context[0]], length=3, **surest).completion_BL[0].tolist()
    asked = [("", context[0].tolist(), tokens) for tokens in (likeliest, [likeliest[0], likeliest[1], 3 + likeliest[2] % 4])]
    assert [greedy for _, greedy in lm._loglikelihood_tokens(asked)] == [True, False]
