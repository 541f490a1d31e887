"""4x4 Sudoku as text: the 16 cells of a puzzle row by row, 0 for empty, then "=" and those of the answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from . import d1_compat, sudoku_grids
from .config import SudokuConfig
from .files import read_rows, text_of
from .sudoku_grids import CELLS, Puzzles, keeps_clues
from .tags import TAGS, final_answer
from .task import Example, Reward, Task

_SENTENCE = (
    "Solve this 4x4 Sudoku. Every row, every column and every 2x2 box must hold 1, 2, 3 and 4 once; given cells stay as they "
    "are. The grid is written row by row, 0 is an empty cell. Answer with the 16 digits of the solved grid.\n{}"
)


def make(config: SudokuConfig, *, seed: int) -> Task:
    drawn = sudoku_grids.make_task(config, seed=seed)
    train = drawn.train
    tests = {test.name: test for test in drawn.tests}
    if config.train_file is not None:
        puzzles, solutions = read_csv(config.train_file)
        shown = sudoku_grids.demonstrations(puzzles, solutions, config, seed=seed)
        train = Puzzles("train", puzzles, solutions, shown)
    if config.test_file is not None:
        puzzles, solutions = read_csv(config.test_file)
        tests = {"file": Puzzles("file", puzzles, solutions, solutions)}
    rewards = {name: _reward(rule) for name, rule in sudoku_grids.REWARDS.items()}
    return Task(
        name="sudoku",
        train=examples(train, config.style),
        tests={name: examples(test, config.style) for name, test in tests.items()},
        rewards=rewards if config.style == "characters" else {**rewards, "d1": d1_compat.sudoku},
        correct=_reward(sudoku_grids.REWARDS["valid"]),
        metrics={
            "reference_cells": _reward(sudoku_grids.reference_cells),
            "clues_kept": _reward(lambda puzzles, filled, _: keeps_clues(puzzles, filled).all(-1).float()),
        },
        completion_length=CELLS if config.style == "characters" else 256,
        alphabet="01234=" if config.style == "characters" else None,
        system="" if config.style == "characters" else TAGS,
    )


def examples(data: Puzzles, style: str) -> list[Example]:
    """The puzzles as texts in order; ids are indices."""
    made = []
    grids = zip(_texts(data.puzzles), _texts(data.solutions), _texts(data.answers), strict=True)
    for index, (puzzle, solution, answer) in enumerate(grids):
        prompt = f"{puzzle}=" if style == "characters" else _SENTENCE.format(puzzle)
        shown = answer if style == "characters" else f"<answer>\n{answer}\n</answer>"
        made.append(Example(str(index), prompt, shown, {"puzzle": puzzle, "solution": solution}))
    return made


def read_csv(path: str | Path) -> tuple[Tensor, Tensor]:
    """Puzzles and solutions, int64 `[N, 16]`, of a CSV file with columns Puzzle and Solution, as d1's."""
    puzzles, solutions = [], []
    for where, row in read_rows(path):
        puzzle, solution = text_of(row, "Puzzle", where), text_of(row, "Solution", where)
        for column, text, allowed in (("Puzzle", puzzle, "01234"), ("Solution", solution, "1234")):
            if len(text) != CELLS or not set(text) <= set(allowed):
                raise UserError(f"{where}: {column} must be 16 digits out of {allowed}, got {text!r}")
        puzzles.append(cells(puzzle))
        solutions.append(cells(solution))
        if any(given not in ("0", solved) for given, solved in zip(puzzle, solution, strict=True)):
            raise UserError(f"{where}: Solution {solution} changes a given cell of Puzzle {puzzle}")
    return torch.tensor(puzzles), torch.tensor(solutions)


def cells(text: str) -> list[int]:
    """The 16 cells of a completion or of its `<answer>`; -1, which breaks every rule, where there is no
    digit.

    An answer of more than 16 characters is no grid: all cells are -1.
    """
    tagged = final_answer(text)
    answer = "".join((text if tagged is None else tagged).split())
    if len(answer) > CELLS:
        return [-1] * CELLS
    return ["01234".find(character) for character in answer] + [-1] * (CELLS - len(answer))


def _texts(grids_N16: Tensor) -> list[str]:
    return ["".join(map(str, grid)) for grid in grids_N16.tolist()]


def _reward(rule: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Reward:
    def reward(examples: Sequence[Example], completions: Sequence[str]) -> list[float]:
        puzzles = torch.tensor([cells(example.facts["puzzle"]) for example in examples])
        solutions = torch.tensor([cells(example.facts["solution"]) for example in examples])
        return rule(puzzles, torch.tensor([cells(text) for text in completions]), solutions).tolist()

    return reward
