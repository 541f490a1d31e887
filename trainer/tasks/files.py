"""Rows of data files or of the hub, and the task made of any of them that has prompts and answers.

A source is the path of a .jsonl, .parquet or .csv file, or `hub:NAME:CONFIG:SPLIT` (`hub:NAME:SPLIT`) for
`datasets`.
"""

from __future__ import annotations

import csv
import importlib
import io
import json
import math
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from ..errors import UserError, first_line
from .config import FileConfig
from .from_scratch import reading
from .rewards import choose, exact_match
from .task import Example, Task

Row = Mapping[str, Any]


def make(config: FileConfig, *, seed: int) -> Task:
    def examples(source: str, rows: int | None) -> list[Example]:
        found: list[Example] = []
        for where, row in first_rows(source, rows):
            answer = "" if config.answer_column is None else text_of(row, config.answer_column, where)
            name = id_of(row, config.id_column, where, len(found))
            facts = {"answer": answer, **{key: value for key, value in row.items() if key != "answer"}}
            suffix = "" if config.suffix_column is None else text_of(row, config.suffix_column, where)
            found.append(Example(name, text_of(row, config.prompt_column, where), answer, facts, suffix))
        return distinct(found, source)

    rewards = {"exact_match": exact_match} if config.answer_column is not None else {}
    train = examples(config.train, config.train_rows)
    tests = {name: examples(source, config.test_rows) for name, source in config.tests.items()}
    return Task(
        name="file",
        train=train,
        tests=tests,
        rewards=rewards,
        correct=choose(config.correct, rewards, timeout=config.timeout),
        metrics={},
        completion_length=config.completion_length,
        system=config.system,
        **reading(config.style, (*train, *chain(*tests.values())), config.vocabulary, [config.system]),
    )


def first_rows(source: str, rows: int | None) -> list[tuple[str, Row]]:
    """The first `rows` rows of a source (None: all) with their places. UserError if there are too few."""
    found: list[tuple[str, Row]] = []
    for item in read_rows(source):
        if rows is not None and len(found) == rows:
            break
        found.append(item)
    if rows is not None and len(found) < rows:
        raise UserError(f"{source}: {rows} rows are asked for and it holds {len(found)}")
    return found


def read_rows(source: str | Path) -> Iterator[tuple[str, Row]]:
    """Every row of a source with its place (`file:line`, or the number of the row), in order.

    Raises UserError at a malformed row, and for a source without rows.
    """
    name = str(source)
    reader = _hub if name.startswith("hub:") else _READERS.get(Path(name).suffix)
    if reader is None:
        allowed = ", ".join(_READERS)
        raise UserError(f"{name}: a data source is a file that ends in {allowed}, or hub:NAME:SPLIT, and this is neither")
    empty = True
    for item in reader(name):
        empty = False
        yield item
    if empty:
        raise UserError(f"{name}: there is no row in it")


def text_of(row: Row, column: str, where: str) -> str:
    """The text in a column; numbers are converted."""
    if column not in row:
        raise UserError(f"{where}: there is no column {column!r}; there are {', '.join(map(repr, row)) or 'none'}")
    value = row[column]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f"{where}: column {column!r} must be a text, got {type(value).__name__}")
    if isinstance(value, float) and not math.isfinite(value):  # as a column of numbers with gaps has in parquet
        raise UserError(f"{where}: column {column!r} must be a text or a finite number, got {value}")
    text = str(value)
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"{where}: column {column!r} holds half of a character (a lone surrogate)")
    return text


def id_of(row: Row, column: str | None, where: str, index: int) -> str:
    return str(index) if column is None else text_of(row, column, where)


def distinct(examples: list[Example], source: str) -> list[Example]:
    """The examples; raises UserError for equal ids, which would share their noise."""
    seen: dict[str, int] = {}
    for index, example in enumerate(examples):
        if example.id in seen:
            raise UserError(f"{source}: id {example.id!r} of row {index + 1} is also that of row {seen[example.id] + 1}")
        seen[example.id] = index
    return examples


def _bytes(name: str) -> bytes:
    try:
        if Path(name).exists() and not Path(name).is_file():
            raise UserError(f"{name}: a data source must be a regular file, not a folder, pipe or device")
        return Path(name).read_bytes()
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror})") from error


def _lines(name: str) -> Iterator[tuple[str, str]]:
    """Lines with their places; only newlines end lines, as JSON strings may hold other Unicode separators."""
    for number, line in enumerate(_bytes(name).split(b"\n"), start=1):
        where = f"{name}:{number}"
        try:
            yield where, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: not UTF-8 text (byte {error.start + 1} is 0x{line[error.start]:02x})") from error


def _jsonl(name: str) -> Iterator[tuple[str, Row]]:
    for where, line in _lines(name):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError: an integer of thousands of digits
            what = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else "nested too deeply"
            what = str(error) if type(error) is ValueError else what
            raise UserError(f"{where}: not JSON ({what})") from error
        if not isinstance(row, dict):
            raise UserError(f"{where}: a line must hold a JSON object, got {type(row).__name__}")
        yield where, row


def _csv(name: str) -> Iterator[tuple[str, Row]]:
    text = "\n".join(line for _, line in _lines(name))
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = reader.fieldnames or ()
        if twice := [column for place, column in enumerate(columns) if column in columns[:place]]:
            raise UserError(f"{name}:1: column {twice[0]!r} is there twice")
        for row in reader:
            where = f"{name}:{reader.line_num}"
            if None in row or None in row.values():
                raise UserError(f"{where}: a row must have the {len(reader.fieldnames or ())} fields of the first line")
            yield where, row
    except csv.Error as error:
        raise UserError(f"{name}:{reader.line_num}: not CSV ({error})") from error


def _parquet(name: str) -> Iterator[tuple[str, Row]]:
    parquet = _library("pyarrow.parquet", name)
    _bytes(name)
    try:
        rows = parquet.read_table(name).to_pylist()
    except Exception as error:  # pyarrow raises all kinds of errors for damaged files
        raise UserError(f"{name}: not a parquet file ({first_line(error)})") from error
    yield from ((f"{name} row {number}", row) for number, row in enumerate(rows, start=1))


def _hub(name: str) -> Iterator[tuple[str, Row]]:
    parts = name.split(":")[1:]
    if len(parts) not in (2, 3) or not all(parts):
        raise UserError(f"{name}: a data set of the hub is written hub:NAME:SPLIT or hub:NAME:CONFIG:SPLIT")
    library = _library("datasets", name)
    try:
        rows = library.load_dataset(*parts[:-1], split=parts[-1])
    except Exception as error:  # no network, no such data set: many kinds of errors
        raise UserError(f"{name}: `datasets` cannot load it ({first_line(error)}); a file needs no network") from error
    yield from ((f"{name} row {number}", row) for number, row in enumerate(rows, start=1))


def _library(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UserError(f"{name}: reading it needs the package {package}: pip install {package}") from error


_READERS = {".jsonl": _jsonl, ".parquet": _parquet, ".csv": _csv}
