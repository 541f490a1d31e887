"""Any task of files trains a model from scratch, by characters or by BPE; `dllm-kernels task` shows it beforehand."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from dllm_trainer.cli import app
from dllm_trainer.commands.planned_calls import prompt_tokens
from dllm_trainer.config import load_config
from dllm_trainer.distributed import Ranks
from dllm_trainer.errors import ConfigError, UserError
from dllm_trainer.models.loading import tokenizer_of
from dllm_trainer.models.tokenizer import train_tokenizer
from dllm_trainer.records.run_dir import RunDir
from dllm_trainer.tasks import Example, make_task
from dllm_trainer.train.run import Run, prepare
from dllm_trainer.train.setup import Setup
from pyarrow import Table, parquet
from rich.console import Console
from typer.testing import CliRunner

ROWS = [{"prompt": f"What is {a} plus {b}? Grüße", "answer": str(a + b)} for a in range(5) for b in range(4)]
TINY = ["threads=1", "tensorboard=false", "model.hidden_size=16", "model.layers=1", "model.heads=2", "model.intermediate_size=32"]
TINY += ["sft.steps=2", "sft.batch=4", "sft.warmup=1", "rl.updates=1", "rl.prompts=2", "rl.group=2", "rl.samples=2"]
TINY += ["rl.warmup=1", "rl.reward=exact_match", "rollout.steps=4", "rollout.block_length=4", "evaluation.probe_every_sft=0"]
TINY += ["evaluation.probe_every_rl=0", "task.completion_length=4"]


def written(folder: Path, kind: str) -> list[str]:
    """Keys of a task of files; only the test file has a letter that no training text has."""
    rows = {"train": ROWS, "test": [{"prompt": "What is 9 plus 9? ß", "answer": "18"}]}
    for name, own in rows.items():
        if kind == "parquet":
            parquet.write_table(Table.from_pylist(own), folder / f"{name}.parquet")
        else:
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    return ["task.kind=file", f"task.train={folder / 'train'}.{kind}", f"task.tests.held={folder / 'test'}.{kind}"]


@pytest.mark.parametrize(("kind", "style"), [("jsonl", "characters"), ("parquet", "bpe")])
def test_a_file_goes_from_rows_to_a_report(kind: str, style: str, tmp_path: Path) -> None:
    keys = [*written(tmp_path, kind), f"task.style={style}", "task.vocabulary=320"]
    config = load_config(overrides=[*TINY, *keys, f"out={tmp_path / 'run'}"])
    Run(RunDir.create(Path(config.out)), config, Console(quiet=True)).execute()
    report = (tmp_path / "run" / "report.md").read_text()
    assert "What is 9 plus 9? ß" in report
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").open()]
    assert [(sample["phase"], sample["step"]) for sample in samples] == [("sft", 2), ("rl", 1)]
    for sample in samples:
        assert (sample["set"], sample["prompt"], sample["answer"]) == ("held", "What is 9 plus 9? ß", "18")
        assert sample["correct"] == (sample["completion"].strip() == "18")
        assert sample["reward"] == (float(sample["correct"]) if sample["phase"] == "rl" else None), "asked for from RL on"
        assert len(sample["tokens"]) == len(sample["steps"]) == 4
        assert sorted(sample["steps"]) == [0, 1, 2, 3], "one token a step"
    generated = CliRunner().invoke(app, ["generate", "--checkpoint", str(tmp_path / "run" / "checkpoint")])
    assert generated.exit_code == 0, generated.output
    assert "What is 9 plus 9?" in generated.output, "without a prompt one of the task's tests is taken"


def test_bpe_reads_numbers_digit_by_digit_and_every_text() -> None:
    tokenizer = train_tokenizer(["the sum of 123 and 456 is 579"] * 20, 300)
    assert tokenizer.tokenize("123") == ["1", "2", "3"]
    assert len(tokenizer("the sum")["input_ids"]) < len("the sum")
    for text in ("the sum of 123", "Grüße ✓", " a\n b"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
        assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]
    assert len(tokenizer) <= 300


def test_the_same_texts_give_the_same_tokenizer(tmp_path: Path) -> None:
    config = load_config(overrides=[*written(tmp_path, "jsonl"), "task.style=bpe"]).task
    one, two = (tokenizer_of(make_task(config, seed=seed)).get_vocab() for seed in (0, 1))
    assert one == two


def test_task_shows_prompts_and_the_rewards_of_a_right_and_a_wrong_answer() -> None:
    done = CliRunner().invoke(app, ["task", "--config", "countdown", "task.train_problems=20", "task.test_problems=4"])
    assert done.exit_code == 0, done.output
    assert done.output.count("right answer: correct 1, exact 1, partial 1") == 3
    assert done.output.count("wrong answer: correct 0, exact 0") == 3
    assert len(re.findall(r"^  \d\d \d\d \d\d>\d+=$", done.output, re.MULTILINE)) == 3, "the prompts, as ids decode to them"


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        (["task.style=letters"], "task.style must be 'words', 'characters' or 'bpe', got 'letters'"),
        (["task.style=bpe", "task.vocabulary=299"], "task.vocabulary must be greater than or equal to 300"),
    ],
)
def test_wrong_styles_are_named(keys: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load_config(overrides=["task.kind=file", "task.train=x.jsonl", *keys])


def test_completions_fill_the_middle_from_rows_to_rl(tmp_path: Path) -> None:
    """What follows a gap is given: SFT is shown it, rollouts see it, and rewards are of the middle alone."""
    rows = [{"prompt": f"{a}+", "answer": f"{b}", "rest": f"={a + b:02d}!"} for a in range(10) for b in range(10)]
    for name, own in {"train": rows[:90], "test": rows[90:]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    keys = ["task.kind=file", f"task.train={tmp_path / 'train.jsonl'}", f"task.tests.held={tmp_path / 'test.jsonl'}"]
    keys += ["task.style=characters", "task.suffix_column=rest", f"out={tmp_path / 'run'}"]
    config = load_config(overrides=[*TINY, *keys, "task.completion_length=1", "rollout.steps=1", "rollout.block_length=1"])
    seen: list[list[int]] = []
    run = Run(RunDir.create(Path(config.out)), config, Console(quiet=True))
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: seen.append(args[0].flatten().tolist()) if isinstance(module, torch.nn.Embedding) else None
    )
    run.execute()
    hook.remove()
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    rl = [record for record in records if record.get("phase") == "rl" and "reward" in record]
    assert len(rl) == 1
    assert rl[0]["on_policy_gap"] < 1e-4
    alphabet = "".join(sorted(set("".join(row[key] for row in rows for key in row))))
    mask = max(max(ids) for ids in seen if ids)
    texts = {"".join(alphabet[i] if i < len(alphabet) else "?" for i in ids[:7]) for ids in seen if len(ids) >= 7}
    assert mask >= len(alphabet)
    assert any(re.fullmatch(r"\d\+\?=\d\d!", text) for text in texts), f"a gap between what is given, got {sorted(texts)[:5]}"
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").open()]
    assert {len(sample["tokens"]) for sample in samples} == {1}


def setup_of(*keys: str) -> Setup:
    config = load_config(overrides=[*TINY, *keys])
    return prepare(config, make_task(config.task, seed=0), Ranks())


def test_what_follows_counts_where_texts_are_looked_at_beforehand(tmp_path: Path) -> None:
    """Beside eight longer prompts; and a question is its prompt with what follows."""
    rows = [{"prompt": f"12{n}+", "answer": "2", "rest": "=3"} for n in range(8)]
    rows.append({"prompt": "1+", "answer": "2", "rest": "=" + "3" * 70})
    for name, own in {"train": rows, "test": [*rows[:1], {**rows[1], "rest": "=4"}]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    keys = ["task.kind=file", f"task.train={tmp_path / 'train.jsonl'}", f"task.tests.held={tmp_path / 'test.jsonl'}"]
    keys += ["task.style=characters", "task.suffix_column=rest", "task.completion_length=1", "rollout.steps=1"]
    keys.append("rollout.block_length=1")
    setup, longer = (setup_of(*keys, f"model.context={context}") for context in (64, 128))
    with pytest.raises(UserError, match="example 8 has 73 tokens, with a completion of 1 more than the model's context of 64"):
        setup.codec.look_ahead(setup.task, shown=False)
    (note,) = setup.task.notes()
    assert "1 of 9 training examples ask a question of the test set held" in note
    longer.codec.look_ahead(longer.task, shown=False)
    assert prompt_tokens(longer, []) == 73, "what `plan` plans with"
    empty = replace(longer.task, train=[*longer.task.train, Example("9", "", "2")])
    with pytest.raises(UserError, match="the prompt of example 9 is empty"):
        longer.codec.look_ahead(empty, shown=False)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        (["rollout.stop_at_eos=true"], "rollout.stop_at_eos and rollout.cache must be false for a task with suffixes"),
        (["rollout.cache=dual"], "rollout.stop_at_eos and rollout.cache must be false for a task with suffixes"),
        (["rollout.sampler=sdar"], "a sampler that see what follows a block"),
        (["task.suffix_column=end"], "there is no column 'end'"),
    ],
)
def test_what_does_not_go_with_a_middle_is_said_before_anything_is_trained(
    tmp_path: Path, keys: list[str], sentence: str
) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "1+", "answer": "2", "rest": "=3"}) + "\n")
    common = ["task.kind=file", f"task.train={tmp_path / 'train.jsonl'}", "task.style=characters", "task.suffix_column=rest"]
    config = load_config(overrides=[*TINY, *common, f"out={tmp_path / 'run'}", *keys])
    with pytest.raises(UserError, match=sentence):
        Run(RunDir.create(Path(config.out)), config, Console(quiet=True)).execute()
