"""4x4 Sudoku: counts of MODELS.md section 4, sets that do not overlap, rules that keep the clues."""

import itertools

import pytest
import torch
from dllm_trainer.errors import ConfigError
from dllm_trainer.tasks import sudoku_grids as sudoku
from dllm_trainer.tasks.config import SudokuConfig

from dllm_kernels import noise


def task_config(**changes: object) -> SudokuConfig:
    return SudokuConfig.model_validate({"train_puzzles": 300, "test_puzzles": 100} | changes)


def rows(tensor: torch.Tensor) -> set[tuple[int, ...]]:
    return set(map(tuple, tensor.tolist()))


def test_there_are_288_grids_among_576_latin_squares() -> None:
    assert len(rows(sudoku.latin_squares())) == 576
    assert len(rows(sudoku.all_grids())) == 288
    assert sudoku.satisfied_units(sudoku.all_grids()).all()
    assert (sudoku.satisfied_units(sudoku.latin_squares()).all(-1)).sum() == 288


@pytest.mark.parametrize(("clues", "count"), [(4, 25_728), (14, 34_560), (15, 4_608)])
def test_number_of_puzzles_with_one_solution(clues: int, count: int) -> None:
    grids = sudoku.all_grids()
    found = 0
    for cells in itertools.combinations(range(16), clues):
        kept = torch.zeros(16, dtype=torch.bool)
        kept[list(cells)] = True
        # grids that no other grid equals on these cells
        found += int((torch.unique((grids * kept), dim=0, return_counts=True)[1] == 1).sum())
    assert found == count


def test_has_one_solution_agrees_with_counting_by_hand() -> None:
    puzzles = sudoku.all_grids()[:40] * (
        noise.row_bits(0, noise.Stream.DATA, torch.tensor(5), torch.arange(40)[:, None], torch.arange(16)) > 0
    )
    by_hand = [sum(bool(((puzzle == 0) | (puzzle == grid)).all()) for grid in sudoku.all_grids()) == 1 for puzzle in puzzles]
    assert sudoku.has_one_solution(puzzles).tolist() == by_hand
    assert 0 < sum(by_hand) < 40


def test_every_puzzle_is_unique_within_the_clue_range_and_its_solution_is_given() -> None:
    task = sudoku.make_task(task_config(clues_min=5, clues_max=7), seed=3)
    for puzzles in (task.train, *task.tests):
        clues = (puzzles.puzzles > 0).sum(-1)
        assert clues.min() == 5
        assert clues.max() == 7
        assert sudoku.has_one_solution(puzzles.puzzles).all()
        assert sudoku.valid(puzzles.puzzles, puzzles.solutions).all()


def test_the_sets_do_not_overlap() -> None:
    task = sudoku.make_task(task_config(train_puzzles=3000, test_puzzles=500), seed=0)
    train, unseen, grids = task.train, task.unseen_puzzles, task.unseen_grids
    for puzzles in (train, unseen, grids):
        assert len(rows(puzzles.puzzles)) == len(puzzles)
    assert not rows(train.puzzles) & rows(unseen.puzzles)
    assert not (rows(train.solutions) | rows(unseen.solutions)) & rows(grids.solutions)
    assert len(rows(grids.solutions)) == 32


def test_the_task_is_a_function_of_the_seed() -> None:
    one, same, other = (sudoku.make_task(task_config(), seed=seed) for seed in (7, 7, 8))
    for first, second in zip((one.train, *one.tests), (same.train, *same.tests), strict=True):
        assert torch.equal(first.puzzles, second.puzzles)
        assert torch.equal(first.answers, second.answers)
    assert not torch.equal(one.train.puzzles, other.train.puzzles)
    longer = sudoku.make_task(task_config(train_puzzles=400), seed=7)
    assert torch.equal(longer.train.puzzles[:300], one.train.puzzles), "asking for more puzzles changed the first ones"


@pytest.mark.parametrize("forget", ["boxes", "columns", "columns_and_boxes"])
@pytest.mark.parametrize("pick", ["first", "random"])
def test_a_careless_answer_breaks_only_the_forgotten_rules(forget: str, pick: str) -> None:
    task = sudoku.make_task(task_config(clues_min=6, clues_max=8), seed=1)
    answers = sudoku.careless_answers(task.train.puzzles, forget=forget, pick=pick, seed=1)
    row, column, box = sudoku.satisfied_units(answers).split(4, dim=1)
    kept = {"boxes": [row, column], "columns": [row, box], "columns_and_boxes": [row]}[forget]
    assert all(units.all() for units in kept)
    assert sudoku.keeps_clues(task.train.puzzles, answers).all()
    right = sudoku.valid(task.train.puzzles, answers).float().mean()
    assert 0 < right < 1


def test_the_first_careless_answer_is_the_one_that_backtracking_finds() -> None:
    puzzles = sudoku.make_task(task_config(), seed=2).train.puzzles[:5]
    answers = sudoku.careless_answers(puzzles, forget="columns", pick="first", seed=0)

    def fits(cells: list[int], at: int) -> bool:
        peers = [i for i in range(16) if i != at and (i // 4 == at // 4 or (i // 8, i % 4 // 2) == (at // 8, at % 4 // 2))]
        return all(cells[i] != cells[at] for i in peers)

    def solve(cells: list[int]) -> bool:
        if 0 not in cells:
            return True
        at = cells.index(0)
        for digit in range(1, 5):
            cells[at] = digit
            if fits(cells, at) and solve(cells):
                return True
        cells[at] = 0
        return False

    for puzzle, answer in zip(puzzles.tolist(), answers.tolist(), strict=True):
        assert solve(puzzle)
        assert puzzle == answer


def test_the_share_of_careless_demonstrations_is_as_asked() -> None:
    none = sudoku.make_task(task_config(careless_share=0.0), seed=0).train
    assert torch.equal(none.answers, none.solutions)
    every = sudoku.make_task(task_config(careless_share=1.0, train_puzzles=2000), seed=0).train
    half = sudoku.make_task(task_config(careless_share=0.5, train_puzzles=2000), seed=0).train
    wrong = [(data.answers != data.solutions).any(-1).float().mean().item() for data in (half, every)]
    assert wrong[0] == pytest.approx(wrong[1] / 2, abs=0.03)


def test_an_answer_counts_only_if_the_clues_are_kept() -> None:
    grid, other = sudoku.all_grids()[:1], sudoku.all_grids()[100:101]
    puzzle = grid.clone()
    puzzle[:, 3:] = 0
    assert sudoku.valid(puzzle, grid).all()
    assert sudoku.satisfied_units(other).all()
    assert not sudoku.valid(puzzle, other).any(), "a solved grid that changed the clues was accepted"
    spoiled = grid.clone()
    spoiled[0, 15] = spoiled[0, 14]
    assert not sudoku.valid(puzzle, spoiled).any()
    assert not sudoku.valid(puzzle, torch.full_like(grid, -1)).any()
    assert not sudoku.valid(puzzle, torch.zeros_like(grid)).any()


def test_rewards_are_one_for_the_solution_and_less_for_anything_else() -> None:
    grid = sudoku.all_grids()[:1]
    puzzle = grid.clone()
    puzzle[:, 8:] = 0
    spoiled = grid.clone()
    spoiled[0, 12:] = spoiled[0, 12:].flip(0)
    expected = {"valid": 0.0, "reference_cells": 4 / 8}
    for name, reward in sudoku.REWARDS.items():
        assert reward(puzzle, grid, grid).item() == 1.0
        got = reward(puzzle, spoiled, grid).item()
        assert got < 1.0
        if name in expected:
            assert got == expected[name]


def test_too_few_puzzles_is_said() -> None:
    with pytest.raises(ConfigError, match="only 16 of 20 puzzles for unseen_grids"):
        sudoku.make_task(task_config(clues_min=15, clues_max=15, held_out_grids=1, train_puzzles=20, test_puzzles=20), seed=0)
