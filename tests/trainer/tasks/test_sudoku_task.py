"""Sudoku in texts: the ids, the order and the rewards of the demo's tensors."""

from pathlib import Path

import pytest
import torch
from dllm_trainer.errors import UserError
from dllm_trainer.models.tokenizer import make_tokenizer
from dllm_trainer.tasks import Task, make_task
from dllm_trainer.tasks import sudoku_grids as sudoku
from dllm_trainer.tasks.config import SudokuConfig
from dllm_trainer.tasks.sudoku import cells

SMALL = {"train_puzzles": 300, "test_puzzles": 60}


@pytest.fixture(scope="module")
def task() -> Task:
    return make_task(SudokuConfig(**SMALL), seed=3)


@pytest.fixture(scope="module")
def tensors() -> sudoku.SudokuTask:
    return sudoku.make_task(SudokuConfig(**SMALL), seed=3)


def test_prompts_and_answers_have_the_ids_of_the_tensors_in_their_order(task: Task, tensors: sudoku.SudokuTask) -> None:
    assert task.alphabet is not None
    tokenizer = make_tokenizer(task.alphabet)
    sets = {"train": task.train, **task.tests}
    assert list(sets) == ["train", "unseen_puzzles", "unseen_grids"]
    for data in (tensors.train, *tensors.tests):
        examples = sets[data.name]
        assert [example.id for example in examples] == [str(index) for index in range(len(data))]
        prompts = tokenizer([example.prompt for example in examples], add_special_tokens=False)["input_ids"]
        answers = tokenizer([example.answer for example in examples], add_special_tokens=False)["input_ids"]
        assert prompts == [[*puzzle, 5] for puzzle in data.puzzles.tolist()]
        assert answers == data.answers.tolist()
    assert (tensors.train.answers != tensors.train.solutions).any(), "no careless demonstration was compared"


def test_rewards_of_texts_are_those_of_the_tensors(task: Task, tensors: sudoku.SudokuTask) -> None:
    assert task.alphabet is not None
    tokenizer, data = make_tokenizer(task.alphabet), tensors.train
    ids = data.answers
    noisy = torch.where(torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.1, (ids + 1) % 6, ids)
    for completions in (ids, data.solutions, noisy):
        texts, filled = tokenizer.batch_decode(completions), torch.where(completions < 5, completions, -1)
        for name, reward in sudoku.REWARDS.items():
            expected = reward(data.puzzles, filled, data.solutions).tolist()
            assert task.rewards[name](task.train, texts) == expected
        assert task.correct(task.train, texts) == sudoku.valid(data.puzzles, filled).float().tolist()
        assert task.metrics["reference_cells"](task.train, texts) == task.rewards["reference_cells"](task.train, texts)
    assert 0 < sum(task.correct(task.train, tokenizer.batch_decode(noisy))) < len(data)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1234341221434321", "1234341221434321"),
        ("<reasoning>\n12\n</reasoning>\n<answer>\n1234 3412\n2143 4321\n</answer>", "1234341221434321"),
        ("1234", "1234............"),
        ("12343412214343211", "................"),
        ("", "................"),
        ("1x34", "1.34............"),
        ("<answer>1</answer><answer>4</answer>", "4..............."),
    ],
)
def test_cells_of_a_completion(text: str, expected: str) -> None:
    assert cells(text) == [-1 if character == "." else int(character) for character in expected]


def test_d1s_files_are_read(tmp_path: Path) -> None:
    file = tmp_path / "puzzles.csv"
    file.write_text("Puzzle,Solution\n3102200002100320,3142243142131324\n0140432014020000,2143432114323214\n")
    read = make_task(SudokuConfig(**SMALL, train_file=str(file), test_file=str(file), careless_share=0.0), seed=0)
    assert [example.prompt for example in read.train] == ["3102200002100320=", "0140432014020000="]
    assert [example.answer for example in read.tests["file"]] == ["3142243142131324", "2143432114323214"]
    assert read.correct(read.train, [example.answer for example in read.train]) == [1.0, 1.0]
    careless = make_task(SudokuConfig(**SMALL, train_file=str(file), careless_share=1.0), seed=0)
    assert set(careless.tests) == {"unseen_puzzles", "unseen_grids"}
    assert [example.answer for example in careless.train] != [example.answer for example in read.train]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("310220000210032,3142243142131324", "Puzzle must be 16 digits out of 01234, got '310220000210032'"),
        ("3102200002100320,3142243142131320", "Solution must be 16 digits out of 1234, got '3142243142131320'"),
        ("3102200002100320,1342243142131324", "changes a given cell"),
        ("3102200002100320", "a row must have the 2 fields"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, row: str, said: str) -> None:
    file = tmp_path / "puzzles.csv"
    file.write_text(f"Puzzle,Solution\n0140432014020000,2143432114323214\n{row}\n")
    with pytest.raises(UserError, match=rf"puzzles.csv:3: .*{said}"):
        make_task(SudokuConfig(**SMALL, test_file=str(file)), seed=0)


def test_a_chat_model_is_asked_in_words() -> None:
    task = make_task(SudokuConfig(**SMALL, style="words", careless_share=0.0), seed=0)
    example = task.train[0]
    assert example.facts["puzzle"] in example.prompt
    assert "<answer>" in task.system
    assert task.correct(task.train, [e.answer for e in task.train]) == [1.0] * len(task.train)
    assert task.rewards["d1"](task.train, [e.answer for e in task.train]) == [1.0] * len(task.train)
