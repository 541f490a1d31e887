"""4x4 Sudoku: the 288 grids, puzzles with one solution, demonstrations of a given quality, rewards.

A grid is 16 digits, row by row; 0 is an empty cell. All draws are pure functions of the seed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dllm_kernels import noise
from dllm_kernels.noise import Stream

from ..errors import ConfigError

if TYPE_CHECKING:
    from .config import SudokuConfig

CELLS = 16
_ROWS = torch.arange(CELLS).view(4, 4)
_COLUMNS = _ROWS.t()
_BOXES = _ROWS.view(2, 2, 2, 2).transpose(1, 2).reshape(4, 4)
_UNITS = torch.cat([_ROWS, _COLUMNS, _BOXES])
_CHUNK = 8192
_DIGITS = range(1, 5)


def satisfied_units(grids_N16: Tensor) -> Tensor:
    """bool `[N, 12]`: the rows, columns and boxes that hold each of 1-4 once."""
    units_NU4 = grids_N16[:, _UNITS]
    return torch.stack([(units_NU4 == digit).any(-1) for digit in _DIGITS]).all(0)


@cache
def latin_squares() -> Tensor:
    """int64 `[576, 16]`: grids with valid rows and columns, boxes ignored; lexicographic."""
    rows = torch.tensor(list(itertools.permutations(_DIGITS)))
    index = torch.cartesian_prod(*[torch.arange(24)] * 4)
    grids = rows[index].flatten(1)
    columns = grids[:, _COLUMNS]
    return grids[torch.stack([(columns == digit).any(-1).all(-1) for digit in _DIGITS]).all(0)]


@cache
def all_grids() -> Tensor:
    """int64 `[288, 16]`: every solved grid, lexicographic."""
    return latin_squares()[satisfied_units(latin_squares()).all(-1)]


@cache
def _careless_options(forget: str) -> Tensor:
    """A demonstrator that forgets a rule: it fills independent parts of `width` cells."""
    if forget == "boxes":
        return latin_squares()
    rows = torch.tensor(list(itertools.permutations(_DIGITS)))
    if forget == "columns_and_boxes":
        return rows
    bands = rows[torch.cartesian_prod(torch.arange(24), torch.arange(24))].flatten(1)
    boxes = bands[:, _BOXES[:2]]
    return bands[torch.stack([(boxes == digit).any(-1).all(-1) for digit in _DIGITS]).all(0)]


def _code(cells_NC: Tensor) -> Tensor:
    """One bit per (cell, digit), int64 `[N]`; none for empty cells, so `p & g == p` iff g keeps p's clues."""
    bit = 1 << (4 * torch.arange(cells_NC.shape[1]) + cells_NC - 1).clamp(min=0)
    return torch.where(cells_NC > 0, bit, 0).sum(-1)


def agrees(clues_NC: Tensor, filled_MC: Tensor) -> Tensor:
    """bool `[N, M]`: whether filling m keeps every clue of n."""
    clues_N1 = _code(clues_NC)[:, None]
    return (clues_N1 & _code(filled_MC)) == clues_N1


def has_one_solution(puzzles_N16: Tensor) -> Tensor:
    """bool `[N]`: whether exactly one of the 288 grids keeps the clues."""
    return agrees(puzzles_N16, all_grids()).sum(-1) == 1


@dataclass(frozen=True)
class Puzzles:
    """int64 `[N, 16]` each; `answers` are the demonstrations: solutions or careless fillings."""

    name: str
    puzzles: Tensor
    solutions: Tensor
    answers: Tensor

    def __len__(self) -> int:
        return len(self.puzzles)

    def head(self, count: int) -> Puzzles:
        return Puzzles(self.name, self.puzzles[:count], self.solutions[:count], self.answers[:count])


@dataclass(frozen=True)
class SudokuTask:
    train: Puzzles
    unseen_puzzles: Puzzles  # the training grids with other clues: what papers report
    unseen_grids: Puzzles  # solution grids of no training puzzle

    @property
    def tests(self) -> tuple[Puzzles, ...]:
        return (self.unseen_puzzles, self.unseen_grids)


def _bits(seed: int, name: str, sample: Tensor, draws: int) -> Tensor:
    sequence = torch.tensor(noise.sequence_id(f"sudoku/{name}"))
    return noise.row_bits(seed, Stream.DATA, sequence, sample[:, None], torch.arange(draws))


def draw_puzzles(
    name: str, count: int, grids_G16: Tensor, *, clues: tuple[int, int], seed: int, exclude: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`count` distinct puzzles with a unique solution among `grids`, and the solutions; none of `exclude`.

    Grid, clue count and clue cells are uniform; repeats and candidates without a unique solution are skipped.
    """
    seen = set() if exclude is None else set(_code(exclude).tolist())
    puzzles: list[Tensor] = []
    solutions: list[Tensor] = []
    found, last_gain, first = 0, 0, 0
    while found < count:
        if first - last_gain >= 32 * _CHUNK:
            raise ConfigError(
                f"task: only {found} of {count} puzzles for {name} found with {clues[0]} to {clues[1]} clues and "
                f"{len(grids_G16)} grids; ask for fewer puzzles or a wider clue range"
            )
        bits = _bits(seed, name, torch.arange(first, first + _CHUNK), 2 + CELLS)
        solution = grids_G16[noise.below(bits[:, 0], torch.tensor(len(grids_G16)))]
        clue_count = clues[0] + noise.below(bits[:, 1], torch.tensor(clues[1] - clues[0] + 1))
        rank = bits[:, 2:].argsort(-1).argsort(-1)
        puzzle = solution * (rank < clue_count[:, None])
        unique = has_one_solution(puzzle).nonzero()[:, 0]
        new: list[int] = []
        for index, code in zip(unique.tolist(), _code(puzzle[unique]).tolist(), strict=True):
            if code not in seen and found + len(new) < count:
                seen.add(code)
                new.append(index)
        puzzles.append(puzzle[new])
        solutions.append(solution[new])
        found, first = found + len(new), first + _CHUNK
        last_gain = first if new else last_gain
    return torch.cat(puzzles), torch.cat(solutions)


def careless_answers(puzzles_N16: Tensor, *, forget: str, pick: str, seed: int) -> Tensor:
    """Fillings int64 `[N, 16]` that keep the clues but ignore a rule; some are right by luck.

    `forget`: "boxes", "columns" or "columns_and_boxes"; `pick`: "first" in lexicographic order, as by
        backtracking, or "random" among all that agree with the clues.
    """
    options = _careless_options(forget)
    filled: list[Tensor] = []
    for start in range(0, len(puzzles_N16), _CHUNK):
        chunk = puzzles_N16[start : start + _CHUNK]
        parts = chunk.split(options.shape[1], dim=1)
        bits = _bits(seed, "careless", torch.arange(start, start + len(chunk)), len(parts))
        choices = []
        for part, draw in zip(parts, bits.unbind(1), strict=True):
            fits = agrees(part, options)
            wanted = noise.below(draw, fits.sum(-1)) if pick == "random" else torch.zeros_like(draw)
            choices.append(options[(fits & (fits.cumsum(-1) == wanted[:, None] + 1)).int().argmax(-1)])
        filled.append(torch.cat(choices, dim=1))
    return torch.cat(filled)


def demonstrations(puzzles_N16: Tensor, solutions_N16: Tensor, config: SudokuConfig, *, seed: int) -> Tensor:
    """Demonstrations, int64 `[N, 16]`: solutions, and the given share of careless fillings."""
    if config.careless_share == 0:
        return solutions_N16
    careless = careless_answers(puzzles_N16, forget=config.careless_forget, pick=config.careless_pick, seed=seed)
    draw = noise.uniform(_bits(seed, "quality", torch.arange(len(puzzles_N16)), 1))
    return torch.where(draw < config.careless_share, careless, solutions_N16)


def make_task(config: SudokuConfig, *, seed: int) -> SudokuTask:
    """Training and test puzzles of a run; a function of config and seed on every machine."""
    grids = all_grids()[noise.permutation(seed, len(all_grids()))]
    held_out, training = grids[: config.held_out_grids], grids[config.held_out_grids :]
    clues = (config.clues_min, config.clues_max)
    puzzles, solutions = draw_puzzles("train", config.train_puzzles, training, clues=clues, seed=seed)
    answers = demonstrations(puzzles, solutions, config, seed=seed)
    tests = {}
    for name, source, exclude in (("unseen_puzzles", training, puzzles), ("unseen_grids", held_out, None)):
        drawn = draw_puzzles(name, config.test_puzzles, source, clues=clues, seed=seed, exclude=exclude)
        tests[name] = Puzzles(name, drawn[0], drawn[1], drawn[1])
    return SudokuTask(Puzzles("train", puzzles, solutions, answers), **tests)


def keeps_clues(puzzles_N16: Tensor, filled_N16: Tensor) -> Tensor:
    """bool `[N, 16]`: cells that are empty in the puzzle or unchanged in the answer."""
    return (puzzles_N16 == 0) | (puzzles_N16 == filled_N16)


def valid(puzzles_N16: Tensor, filled_N16: Tensor) -> Tensor:
    """bool `[N]`: solved by the rules, with every given cell kept. Digits outside 1-4 are wrong."""
    return satisfied_units(filled_N16).all(-1) & keeps_clues(puzzles_N16, filled_N16).all(-1)


def reference_cells(puzzles_N16: Tensor, filled_N16: Tensor, solutions_N16: Tensor) -> Tensor:
    """fp32 `[N]`: share of empty cells equal to the solution; d1's Sudoku accuracy."""
    empty = puzzles_N16 == 0
    return ((filled_N16 == solutions_N16) & empty).sum(-1) / empty.sum(-1).clamp(min=1)


def _satisfied_rules(puzzles_N16: Tensor, filled_N16: Tensor) -> Tensor:
    rules = torch.cat([satisfied_units(filled_N16), keeps_clues(puzzles_N16, filled_N16)], dim=1)
    return rules.float().mean(-1)


# name -> reward of (puzzles, filled, solutions), fp32 [N] in 0..1
REWARDS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "valid": lambda puzzles, filled, solutions: valid(puzzles, filled).float(),
    "rules": lambda puzzles, filled, solutions: 0.5 * valid(puzzles, filled).float() + 0.5 * _satisfied_rules(puzzles, filled),
    "reference_cells": reference_cells,
}
