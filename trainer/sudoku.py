"""The tensors of 4x4 Sudoku, which live with the task; the demo's run loop finds them here."""

from trainer.tasks.sudoku_grids import (
    REWARDS,
    Puzzles,
    SudokuTask,
    agrees,
    all_grids,
    careless_answers,
    draw_puzzles,
    has_one_solution,
    keeps_clues,
    latin_squares,
    make_task,
    reference_cells,
    satisfied_units,
    valid,
)

__all__ = [
    "REWARDS",
    "Puzzles",
    "SudokuTask",
    "agrees",
    "all_grids",
    "careless_answers",
    "draw_puzzles",
    "has_one_solution",
    "keeps_clues",
    "latin_squares",
    "make_task",
    "reference_cells",
    "satisfied_units",
    "valid",
]
