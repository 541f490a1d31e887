"""What users get wrong in configs, data, rewards and checkpoints: one sentence with the place, status 2, nothing lost."""

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from dllm_trainer.cli import app
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from tests.trainer.conftest import TINY

ANY_TASK = [key for key in TINY if not key.startswith("task.")]
FILE = ["task.kind=file", "task.train=d.jsonl", "model.checkpoint=nobody/nothing"]  # data come first
GOOD = '{"prompt": "1", "answer": "2"}\n'


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def assert_told(result: Result, words: str) -> None:
    assert result.exit_code == 2, (result.output, result.exception)
    told = [line for line in result.output.splitlines() if line.startswith("dllm-kernels: ")]
    assert len(told) == 1, result.output
    assert words in told[0]
    assert "Traceback" not in result.output


def refused(folder: Path, keys: Sequence[str], words: str) -> None:
    """`demo` with these keys tells of the mistake before any step, and the name of the run stays free."""
    before = sorted(folder.rglob("*"))
    tiny = ANY_TASK if any(key.startswith("task.kind=") for key in keys) else TINY
    assert_told(call("demo", *tiny, *keys, "--out", folder / "runs" / "demo"), words)
    assert not (folder / "runs" / "demo").exists()
    assert [path for path in sorted(folder.rglob("*")) if path != folder / "runs"] == before


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["seed=-1"], "seed must be greater than or equal to 0, got -1"),
        (["sft.lr=fast"], "sft.lr must be a valid number, got 'fast'"),
        (["sft.law=trace"], "sft.law must be 'exact' or 'bernoulli', got 'trace'"),
        (["sft.batch=201"], "sft.batch must be at most the 200 training examples, got 201"),
        (["rl.prompts=201"], "rl.prompts must be at most the 200 training examples, got 201"),
        (["rl.reward=luck"], "reward luck is unknown: this task has valid, rules, reference_cells"),
        (["rl.options.epsilonn=0.1"], "rl.options of bgpo: "),
        (["rl.algorithm=espo", "rl.options.beta=-1"], "rl.options of espo: beta must be"),
        (["rl.law=quadrature", "rl.samples=4"], "rl: samples must be a multiple of nodes=3"),
        (["rollout.steps=3", "rollout.length=4", "rollout.block_length=2"], "rollout: steps must be a multiple of the 2 blocks"),
        (
            ["model.facts.mask_id=3"],
            "model: facts are those of a checkpoint, a model built from scratch has its own; got mask_id",
        ),
        (["prompt.few_shot=201"], "prompt.few_shot must be at most the 200 training examples, got 201"),
        (["prompt.max_length=16"], " has 17 tokens, more than 16; nothing is ever cut"),
        (["model.context=32"], "more than the model's context of 32; nothing is ever cut"),
        (["rollout.length=8", "rollout.block_length=8"], " has 16 tokens, more than the completion's 8"),
        (["task.kind=math", "task.train=nowhere.jsonl"], "nowhere.jsonl: cannot be read"),
        (["task.kind=countdown", "task.numbers=[7]"], "task.numbers.0 must be less than or equal to 6, got 7"),
        (["model.checkpoint=/nowhere"], "model: there is no folder /nowhere; a checkpoint is"),
        (["model.lora.rank=4", "model.lora.targets=[nothing]"], "lora.targets: there is no nothing in the model's blocks"),
    ],
)
def test_a_config_that_cannot_be_run(keys: list[str], words: str, tmp_path: Path) -> None:
    refused(tmp_path, keys, words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "d.jsonl: cannot be read (No such file or directory)"),
        ("", "d.jsonl: there is no row in it"),
        (GOOD + "{", "d.jsonl:2: not JSON ("),
        (GOOD + "[1]", "d.jsonl:2: a line must hold a JSON object, got list"),
        (GOOD + '{"prompt": "1"}', "d.jsonl:2: there is no column 'answer'; there are 'prompt'"),
        (GOOD + '{"prompt": 1, "answer": null}', "d.jsonl:2: column 'answer' must be a text, got NoneType"),
        (GOOD + '{"prompt": ["1"], "answer": "2"}', "d.jsonl:2: column 'prompt' must be a text, got list"),
        (GOOD + "\x00" * 4, "d.jsonl:2: not JSON ("),
        ("[" * 100000, "d.jsonl:1: not JSON (nested too deeply)"),
    ],
)
def test_a_jsonl_file_that_is_wrong(content: str | None, words: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "d.jsonl").write_text(content)
    refused(tmp_path, FILE, words)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "1=", "answer": "1" * 1000}, "the answer of example 500 has 1000 tokens, more than the completion's 4"),
        (
            {"prompt": "1" * 1000, "answer": "1"},
            "the prompt of example 500 has 1000 tokens, with a completion of 4 more than",
        ),
        ({"prompt": "1=", "answer": ""}, "example 500 has no answer to be shown in supervised training"),
    ],
)
def test_a_row_that_a_run_would_reach_hours_later_is_told_at_once(row: dict[str, str], words: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"{n % 10}=", "answer": "2"} for n in range(500)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(one) + "\n" for one in (*rows, row)))
    keys = ["task.kind=file", "task.style=characters", "task.train=d.jsonl", "task.completion_length=4", "rl.reward=exact_match"]
    refused(tmp_path, [*keys, "rollout.steps=4", "rollout.block_length=4"], words)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["task.train_rows=5"], "d.jsonl: 5 rows are asked for and it holds 1"),
        (["task.train=d.txt"], "d.txt: a data source is a file that ends in .jsonl, .parquet, .csv"),
        (["task.correct=luck"], "reward luck is unknown: this task has exact_match"),
        (["task.tests.held=nowhere.jsonl"], "nowhere.jsonl: cannot be read"),
        (["task.prompt_column=question"], "d.jsonl:1: there is no column 'question'"),
        (["model.checkpoint=null"], "model.checkpoint must be given for this task"),
    ],
)
def test_keys_that_do_not_fit_the_file(keys: list[str], words: str, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(GOOD)
    refused(tmp_path, [*FILE, *keys], words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"Puzzle,Answer\n1,2\n", "p.csv:2: there is no column 'Solution'; there are 'Puzzle', 'Answer'"),
        (b"Puzzle,Solution\n1,2\n", "p.csv:2: Puzzle must be 16 digits out of 01234, got '1'"),
        (b'Puzzle,Solution\n"1,2\n', "p.csv:"),
        (b"Puzzle,Solution\n1,2,3\n", "p.csv:2: a row must have the 2 fields of the first line"),
        (b"Puzzle,Solution\n\xff\n", "p.csv:2: not UTF-8 text (byte 1 is 0xff)"),
        (b"Puzzle,Solution\n", "p.csv: there is no row in it"),
    ],
)
def test_a_csv_file_that_is_wrong(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_bytes(content)
    refused(tmp_path, ["task.test_file=p.csv"], words)


REWARDS = """
import time
def raises(examples, completions): return [1 / 0]
def nan(examples, completions): return [float("nan") for _ in completions]
def short(examples, completions): return [1.0]
def text(examples, completions): return "good"
def slow(examples, completions): time.sleep(60)
def leaves(examples, completions): raise SystemExit(3)
"""


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("raises", "reward mine:raises raised ZeroDivisionError: division by zero (mine.py, line 3)"),
        ("nan", "reward mine:nan must return finite numbers, got nan for example "),
        ("short", "reward mine:short must return one number per completion (16), got 1"),
        ("text", "reward mine:text must return one number per completion, got str"),
        ("slow", "reward mine:slow had not scored 16 completions after 0.5 s; its process was ended"),
        ("leaves", "reward mine:leaves: its process ended before it had scored 16 completions"),
    ],
)
def test_a_reward_that_fails_ends_the_run_which_goes_on_when_it_is_mended(
    name: str, words: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(REWARDS)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    keys = [f"rl.reward=mine:{name}", f"rl.reward_timeout={0.5 if name == 'slow' else 60}", "rl.updates=1", "task.test_puzzles=2"]
    started = call("rl", "--checkpoint", finished / "checkpoint_sft", "--out", tmp_path / "run", *keys)
    assert_told(started, words)
    kept = (tmp_path / "run" / "eval_before.json").read_bytes()
    if name == "nan":
        (tmp_path / "mine.py").write_text("def nan(examples, completions): return [float(len(set(t))) for t in completions]\n")
        result = call("rl", "--resume", tmp_path / "run")
        assert result.exit_code == 0, result.output
        assert (tmp_path / "run" / "report.md").is_file()
        assert (tmp_path / "run" / "eval_before.json").read_bytes() == kept


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        ("nowhere:f", "reward nowhere:f cannot be loaded: there is no module nowhere"),
        ("mine:missing", "reward mine:missing cannot be loaded: module mine has no missing"),
        ("mine:f:g", "a reward is written module:function, got 'mine:f:g'"),
    ],
)
def test_a_reward_that_is_not_there_is_told_before_supervised_training(
    reward: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(REWARDS)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    refused(tmp_path, [f"rl.reward={reward}"], words)


def foreign_weights(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()  # as of any checkpoint that another program wrote
    save_file({"some.other": torch.zeros(2)}, checkpoint / "model.safetensors", metadata={"format": "pt"})


def other_sizes(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()
    weights = load_file(checkpoint / "model.safetensors")
    weights["lm_head.weight"] = torch.zeros(3, 3)
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})


def no_mask(checkpoint: Path) -> None:
    for name in ("config.json", "tokenizer_config.json"):
        values = json.loads((checkpoint / name).read_text())
        (checkpoint / name).write_text(json.dumps({key: value for key, value in values.items() if "mask_token" not in key}))


def no_tokenizer(checkpoint: Path) -> None:
    for file in checkpoint.glob("tokenizer*"):
        file.unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (foreign_weights, "cannot be loaded (its files lack lm_head.weight and "),
        (other_sizes, "cannot be loaded ("),
        (no_mask, "mask_id"),
        (no_tokenizer, "cannot be loaded ("),
        (shutil.rmtree, "there is no folder"),
    ],
)
def test_a_checkpoint_that_is_no_model_of_ours(damage: object, words: str, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "checkpoint", tmp_path / "checkpoint")
    damage(tmp_path / "checkpoint")  # type: ignore[operator]
    assert_told(call("rl", "--checkpoint", tmp_path / "checkpoint", *TINY, "--out", tmp_path / "rl"), words)
    assert not (tmp_path / "rl").exists()


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("model.facts.mask=3", "unknown config key model.facts.mask: the nearest is mask_id"),
        ("model.facts.mask_id=-3", "mask_id must be an integer of at least 0, got -3"),
        ("model.facts.mask_id=3", "model.facts.mask_id must be a special token, but 3 is '3'"),
        ("model.facts.mask_id=99", "model.facts.mask_id must be in the embedding's 0..9, got 99"),
        ("model.facts.shift=2", "shift must be 0 or 1, got 2"),
        ("task.kind=countdown rl.reward=exact rollout.block_length=7 rollout.steps=7", "has what the tokenizer does not know: '"),
    ],
)
def test_keys_that_do_not_fit_the_checkpoint(key: str, words: str, finished: Path, tmp_path: Path) -> None:
    keys = [*(ANY_TASK if "task" in key else TINY), *key.split(), "--out", tmp_path / "rl"]
    assert_told(call("rl", "--checkpoint", finished / "checkpoint", *keys), words)
