"""Data files that are wrong in a named place, pairs, and prompts whose ids are never cut."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from dllm_trainer.errors import UserError
from dllm_trainer.models import codec
from dllm_trainer.models.tokenizer import make_tokenizer
from dllm_trainer.tasks import Example, files, make_task
from dllm_trainer.tasks.config import AnyTaskConfig, CountdownConfig, FileConfig, PairsConfig, SudokuConfig
from dllm_trainer.tasks.pairs import split
from pydantic import TypeAdapter, ValidationError
from transformers import PreTrainedTokenizerBase

GOOD = {"prompt": "1", "answer": "2"}
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return make_tokenizer("01234=")


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
def test_the_same_rows_come_out_of_every_kind_of_file(tmp_path: Path, suffix: str) -> None:
    rows = [{"q": "1", "a": "line\u2028separator"}, {"q": "3", "a": 'quoted "4", and\nmore'}]
    path = tmp_path / f"data{suffix}"
    if suffix == ".jsonl":
        path.write_text("\ufeff" + "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    elif suffix == ".parquet":
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.Table.from_pylist(rows), path)
    else:
        path.write_text('q,a\n1,line\u2028separator\n3,"quoted ""4"", and\nmore"\n', encoding="utf-8")
    config = FileConfig(train=str(path), tests={"same": str(path)}, prompt_column="q", answer_column="a", test_rows=1)
    task = make_task(config, seed=0)
    assert [(e.id, e.prompt, e.answer) for e in task.train] == [("0", "1", rows[0]["a"]), ("1", "3", rows[1]["a"])]
    assert len(task.tests["same"]) == 1
    assert task.correct(task.train, [rows[0]["a"], "wrong"]) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"prompt": "1", "answer": "2"}\n{"prompt": ', ":2: not JSON (Expecting value at column 12)"),
        (b'{"prompt": "1", "answer": "2"}\n\n[1]\n', ":3: a line must hold a JSON object, got list"),
        (b'{"prompt": "1"}\n', ":1: there is no column 'answer'; there are 'prompt'"),
        (b'{"prompt": null, "answer": "2"}\n', ":1: column 'prompt' must be a text, got NoneType"),
        (b'{"prompt": "1", "answer": ["2"]}\n', ":1: column 'answer' must be a text, got list"),
        (b'{"prompt": "1", "answer": NaN}\n', ":1: column 'answer' must be a text or a finite number, got nan"),
        (b'{"prompt": "1", "answer": "2"}\n{"prompt": "\xff"}\n', ":2: not UTF-8 text (byte 13 is 0xff)"),
        (b"[" * 100_000, ":1: not JSON (nested too deeply)"),
        (b"", ": there is no row in it"),
        (b"\n\n", ": there is no row in it"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_place(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        make_task(FileConfig(train=str(path)), seed=0)
    assert f"{path}{said}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("missing.jsonl", "cannot be read (No such file or directory)"),
        ("data.txt", "a data source is a file that ends in .jsonl, .parquet, .csv, or hub:NAME:SPLIT"),
        ("hub:name", "a data set of the hub is written hub:NAME:SPLIT or hub:NAME:CONFIG:SPLIT"),
        ("bad.csv", ":2: a row must have the 2 fields of the first line"),
        (".", "a data source is a file"),
    ],
)
def test_a_source_that_cannot_be_read_is_said(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "bad.csv").write_text("prompt,answer\n1,2,3\n")
    source = name if name.startswith("hub:") else str(tmp_path / name)
    with pytest.raises(UserError) as caught:
        make_task(FileConfig(train=source), seed=0)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_column_that_is_there_twice_is_said(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("prompt,answer,answer\n1,2,3\n")
    with pytest.raises(UserError, match=r"data\.csv:1: column 'answer' is there twice"):
        make_task(FileConfig(train=str(path)), seed=0)


def test_a_damaged_parquet_file_is_said(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    path = tmp_path / "bad.parquet"
    with pytest.raises(UserError, match=r"bad\.parquet: cannot be read \(No such file or directory\)"):
        make_task(FileConfig(train=str(path)), seed=0)
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"bad\.parquet: not a parquet file \("):
        make_task(FileConfig(train=str(path)), seed=0)


@pytest.mark.parametrize(("source", "module"), [("hub:openai/gsm8k:main:test", "datasets"), ("x.parquet", "pyarrow.parquet")])
def test_a_library_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, source: str, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"reading it needs the package {module.split('.')[0]}: pip install"):
        list(files.read_rows(source))


def test_a_set_of_the_hub_is_read_by_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        @staticmethod
        def load_dataset(*names: str, split: str) -> list[dict[str, str]]:
            if names[0] == "no/network":
                raise ConnectionError("cannot reach the hub\nand more")
            return [{"prompt": f"{names}", "answer": split}]

    monkeypatch.setitem(sys.modules, "datasets", Library)
    assert list(files.read_rows("hub:a/b:main:test")) == [
        ("hub:a/b:main:test row 1", {"prompt": "('a/b', 'main')", "answer": "test"})
    ]
    with pytest.raises(UserError, match=r"`datasets` cannot load it \(ConnectionError: cannot reach the hub\); a file needs no"):
        list(files.read_rows("hub:no/network:test"))


def test_ids_must_differ_and_enough_rows_be_there(tmp_path: Path) -> None:
    source = write(tmp_path / "d.jsonl", {**GOOD, "key": "a"}, {**GOOD, "key": 7}, {**GOOD, "key": "a"})
    with pytest.raises(UserError, match=r"d\.jsonl: id 'a' of row 3 is also that of row 1"):
        make_task(FileConfig(train=source, id_column="key"), seed=0)
    task = make_task(FileConfig(train=source, id_column="key", train_rows=2), seed=0)
    assert [example.id for example in task.train] == ["a", "7"]
    with pytest.raises(UserError, match=r"d\.jsonl: 4 rows are asked for and it holds 3"):
        make_task(FileConfig(train=source, train_rows=4), seed=0)


def test_a_reward_of_the_users_own_decides_what_is_correct(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lengths.py").write_text(
        "def right(examples, completions):\n    return [len(t) == e.facts['size'] for e, t in zip(examples, completions)]\n"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    source = write(tmp_path / "d.jsonl", {"prompt": "1", "size": 2}, {"prompt": "2", "size": 2})
    task = make_task(FileConfig(train=source, answer_column=None, correct="lengths:right"), seed=0)
    assert task.correct(task.train, ["ab", "abc"]) == [1.0, 0.0]
    assert not task.rewards
    with pytest.raises(UserError, match="reward exact_match is unknown: this task has none"):
        make_task(FileConfig(train=source, answer_column=None), seed=0)


def test_pairs_have_two_sides_with_one_id(tmp_path: Path) -> None:
    row = {"prompt": "p", "chosen": "good", "rejected": "bad"}
    task = make_task(PairsConfig(train=write(tmp_path / "d.jsonl", row, {**row, "chosen": "fine"})), seed=0)
    chosen, rejected = split(task.train)
    assert [e.answer for e in chosen] == ["good", "fine"]
    assert [e.answer for e in rejected] == ["bad", "bad"]
    assert [e.id for e in chosen] == [e.id for e in rejected] == ["0", "1"]
    assert [e.prompt for e in rejected] == ["p", "p"]
    with pytest.raises(UserError, match=r"e\.jsonl:1: chosen and rejected are the same text"):
        make_task(PairsConfig(train=write(tmp_path / "e.jsonl", {**row, "chosen": "bad"})), seed=0)
    with pytest.raises(UserError, match="there is no column 'rejected'; there are 'prompt', 'chosen'"):
        make_task(PairsConfig(train=write(tmp_path / "f.jsonl", {"prompt": "p", "chosen": "c"})), seed=0)


def test_the_kind_chooses_the_section_and_sudoku_needs_none() -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(AnyTaskConfig)
    assert adapter.validate_python({"clues_min": 7}) == SudokuConfig(clues_min=7)
    assert adapter.validate_python({"kind": "countdown", "numbers": [3, 4]}) == CountdownConfig(numbers=[3, 4])
    assert adapter.validate_python(CountdownConfig()) == CountdownConfig()
    for wrong in (
        {"kind": "chess"},
        {"kind": "countdown", "clues_min": 7},
        {"kind": "file"},
        {"kind": "countdown", "operations": "^"},
    ):
        with pytest.raises(ValidationError):
            adapter.validate_python(wrong)


def test_prompts_without_a_chat_template_are_plain_text(tokenizer: PreTrainedTokenizerBase) -> None:
    examples = [Example("0", "1203=", "4"), Example("1", "0=", "1")]
    encoded = codec.encode(tokenizer, examples)
    assert encoded == [[1, 2, 0, 3, 5], [0, 5]]


def test_with_a_chat_template_prompt_and_answer_join_to_the_whole_chat(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = TEMPLATE
    written: list[str] = []

    class Recorder:
        """The texts that would be tokenised."""

        chat_template, unk_token_id, eos_token_id = TEMPLATE, None, 9
        apply_chat_template = tokenizer.apply_chat_template

        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            assert not add_special_tokens
            written.append(text)
            return {"input_ids": [0]}

    example, shot = Example("0", "2+2", "4"), Example("s", "1+1", "2")
    recorder: Any = Recorder()
    codec.encode(recorder, [example], system="Be brief.", shots=[shot])
    codec.encode_answers(recorder, [example], length=3)
    assert written[0] == "<user>Be brief.\n\n1+1</user>\n<assistant>2</assistant>\n<user>2+2</user>\n<assistant>"
    assert written[1] == "4</assistant>"


def test_plain_few_shot_prompts_have_the_examples_before_them(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match=r"the prompt of example 0 has what the tokenizer does not know: '\\n'"):
        codec.encode(tokenizer, [Example("0", "12=")], system="0", shots=[Example("s", "1=", "2")])


def test_answers_are_filled_with_eos_and_never_cut(tokenizer: PreTrainedTokenizerBase) -> None:
    eos = tokenizer.eos_token_id
    examples = [Example("0", "", "12"), Example("1", "", "1234")]
    assert codec.encode_answers(tokenizer, examples, length=4) == [[1, 2, eos, eos], [1, 2, 3, 4]]
    assert codec.encode_answers(tokenizer, examples[:1], length=3, eos_id=0) == [[1, 2, 0]]
    with pytest.raises(UserError, match="the answer of example 1 has 4 tokens, more than the completion's 3"):
        codec.encode_answers(tokenizer, examples, length=3)
    with pytest.raises(UserError, match="the prompt of example 1 has 4 tokens, more than 3; nothing is ever cut"):
        codec.encode(tokenizer, [Example("1", "1234")], longest=3)
    with pytest.raises(UserError, match="example 2 has no answer to be shown"):
        codec.encode_answers(tokenizer, [Example("2", "1")], length=3)
    with pytest.raises(UserError, match="the answer of example 3 has what the tokenizer does not know: 'x'"):
        codec.encode_answers(tokenizer, [Example("3", "1", "1x")], length=3)
    assert codec.encode_answers(tokenizer, [Example("4", "1", "1[EOS]")], length=3) == [[1, eos, eos]]
    with pytest.raises(UserError, match=rf"the answer of example 5 goes on after the token that ends a text \({eos}\)"):
        codec.encode_answers(tokenizer, [Example("5", "1", "1[EOS]2")], length=3)


def test_completions_are_read_up_to_the_first_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    eos, pad, unknown = tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id
    completions = torch.tensor([[1, 2, eos, 3], [1, pad, 2, 3], [eos, 1, 1, 1], [1, unknown, 3, 4]])
    assert codec.decode(tokenizer, completions) == ["12", "123", "", "134"]
    answers = codec.encode_answers(tokenizer, [Example("0", "", "12")], length=4)
    assert codec.decode(tokenizer, torch.tensor(answers)) == ["12"]
