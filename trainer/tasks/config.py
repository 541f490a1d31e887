"""The config sections of the tasks, distinguished by `kind`; Sudoku by default."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from ..sections import Positive, Section, Share, Text

Style = Literal["words", "characters", "bpe"]  # for a checkpoint and its tokenizer; for a model from scratch, which gets one
Vocabulary = Annotated[int, Field(ge=300)]  # tokens, of which bytes and special ones are 260
Rows = Annotated[int, Field(ge=1)] | None  # None: all


class SudokuConfig(Section):
    kind: Literal["sudoku"] = "sudoku"  # of the task
    style: Literal["characters", "words"] = "characters"  # for a model from scratch, or for a chat model
    clues_min: Annotated[int, Field(ge=4, le=15)] = 6  # given cells of a puzzle, drawn from clues_min to clues_max
    clues_max: Annotated[int, Field(ge=4, le=15)] = 9  # see clues_min
    held_out_grids: Annotated[int, Field(ge=1, le=287)] = 32  # of the 288; no training puzzle has one of them as its solution
    train_puzzles: Positive = 40000  # drawn for training
    test_puzzles: Annotated[int, Field(ge=2)] = 512  # in each of the two test sets
    careless_share: Share = 0.55  # share of demonstrations by a solver who forgets a rule
    careless_forget: Literal["boxes", "columns", "columns_and_boxes"] = "columns"  # the rule that is forgotten
    careless_pick: Literal["first", "random"] = "first"  # first filling that fits, or a random one
    # CSV with columns Puzzle and Solution instead of drawn puzzles; careless_share applies
    train_file: Text | None = None
    test_file: Text | None = None  # the same, for tests

    @model_validator(mode="after")
    def _check(self) -> SudokuConfig:
        if self.clues_min > self.clues_max:
            raise ValueError(f"clues_min must not exceed clues_max={self.clues_max}, got {self.clues_min}")
        return self


class CountdownConfig(Section):
    kind: Literal["countdown"] = "countdown"  # of the task
    style: Literal["characters", "words"] = "characters"  # for a model from scratch, or for a chat model
    numbers: list[Annotated[int, Field(ge=2, le=6)]] = Field([3], min_length=1)  # how many, one of these
    number_max: Annotated[int, Field(ge=2, le=1000)] = 9  # the largest number
    target_max: Annotated[int, Field(ge=2, le=10000)] = 50  # the largest target
    operations: Annotated[str, Field(pattern=r"^[-+*/]{1,4}$")] = "+-*"  # that may be used
    train_problems: Positive = 5000  # drawn for training
    test_problems: Annotated[int, Field(ge=2)] = 256  # drawn for tests
    held_out_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1  # of all problems, for tests
    careless_share: Share = 0.5  # share of demonstrations without parentheses
    # a further test set: JSONL in d1's format, {"input": "30,100,93", "output": "23"}
    test_file: Text | None = None


class Gsm8kConfig(Section):
    kind: Literal["gsm8k"] = "gsm8k"  # of the task
    style: Style = "words"  # words: for a checkpoint and its tokenizer; characters, bpe: for a model from scratch
    vocabulary: Vocabulary = 512  # of style bpe
    train: Text = "hub:openai/gsm8k:main:train"  # or a path: .jsonl, .parquet
    test: Text = "hub:openai/gsm8k:main:test"  # the same, for tests
    train_rows: Rows = None  # the first rows of the training data; null: all
    test_rows: Rows = None  # the same, of each test set
    completion_length: Positive = 256  # tokens of a completion


class MathConfig(Section):
    kind: Literal["math"] = "math"  # of the task
    style: Style = "words"  # words: for a checkpoint and its tokenizer; characters, bpe: for a model from scratch
    vocabulary: Vocabulary = 512  # of style bpe
    train: Text = "hub:ankner/math-500:train"  # a path, or hub:NAME:SPLIT
    test: Text = "hub:ankner/math-500:test"  # the same, for tests
    train_rows: Rows = None  # the first rows of the training data; null: all
    test_rows: Rows = None  # the same, of each test set
    completion_length: Positive = 256  # tokens of a completion
    timeout: Annotated[float, Field(gt=0.0)] = 600.0  # seconds that comparing the answers of one batch may take


class FileConfig(Section):
    kind: Literal["file"] = "file"  # of the task
    style: Style = "words"  # words: for a checkpoint and its tokenizer; characters, bpe: for a model from scratch
    vocabulary: Vocabulary = 512  # of style bpe
    train: Text  # a path (.jsonl, .parquet, .csv), or hub:NAME:SPLIT
    tests: dict[str, Text] = Field({})  # name of the test set -> path
    prompt_column: Text = "prompt"  # column of the prompts
    answer_column: Text | None = "answer"  # None: no demonstrations, RL only
    suffix_column: Text | None = None  # of what follows each completion, which then fills the middle; None: nothing does
    id_column: Text | None = None  # None: the row's number
    train_rows: Rows = None  # the first rows of the training data; null: all
    test_rows: Rows = None  # the same, of each test set
    correct: Text = "exact_match"  # or "module:function" of truth values; counted by evaluation
    timeout: Annotated[float, Field(gt=0.0)] = 60.0  # seconds that `module:function` may take for one batch
    system: str = ""  # instructions before every prompt
    completion_length: Positive = 256  # tokens of a completion


class CodeConfig(Section):
    kind: Literal["code"] = "code"  # of the task
    style: Literal["words", "characters"] = "words"  # characters: a toy for a model from scratch
    train: Text | None = None  # JSONL in MBPP's or HumanEval's form; None: a small set that ships
    tests: dict[str, Text] = Field({})  # name of the test set -> path
    train_rows: Rows = None  # the first rows of the training data; null: all
    test_rows: Rows = None  # the same, of each test set
    train_problems: Positive = 4000  # of the toy
    test_problems: Positive = 32  # of the toy, held out
    careless_share: Share = 0.5  # share of the toy's demonstrations without parentheses
    completion_length: Positive = 256  # tokens of a completion
    # where programs run: bubblewrap or, where it is missing, unshare; none: with all your rights
    sandbox: Literal["auto", "bubblewrap", "unshare", "none"] = "auto"
    timeout: Annotated[float, Field(gt=0.0, le=3600.0)] = 5.0  # seconds for all tests of one program
    memory_mib: Annotated[int, Field(ge=64)] = 256  # of each process
    processes: Annotated[int, Field(ge=1, le=256)] = 8  # that a program may start
    workers: Positive | None = None  # programs at once; None: a rank's share of the cores

    @model_validator(mode="after")
    def _check(self) -> CodeConfig:
        if self.style == "characters" and (self.train is not None or self.tests):
            key = "tests" if self.train is None else "train"
            raise ValueError(
                f"{key} must not be given with style characters, a toy with problems of its own, got {getattr(self, key)}"
            )
        return self


class MiddleConfig(Section):
    kind: Literal["middle"] = "middle"  # of the task
    train_problems: Positive = 5000  # drawn for training
    test_problems: Positive = 256  # held out
    careless_share: Share = 0.6  # share of demonstrations that forget to borrow


class GymDataset(Section):
    weight: Annotated[float, Field(gt=0.0)] = 1.0  # of its share in the mixture
    options: dict[str, Any] = Field({})  # the data set's own


class ReasoningGymConfig(Section):
    kind: Literal["reasoning_gym"] = "reasoning_gym"  # of the task
    style: Style = "words"  # words: for a checkpoint and its tokenizer; characters, bpe: for a model from scratch
    datasets: dict[str, GymDataset] = Field(min_length=1)  # name of reasoning-gym's -> weight and options
    question: Literal["whole", "short"] = "whole"  # short: without the words that all questions of a data set share at the ends
    train_problems: Positive = 5000  # of each level
    test_problems: Positive = 256  # of each level; the same for every seed, and none of them is trained on
    demonstrations: Positive | None = None  # training examples whose answers SFT is shown; None: all
    levels: Positive = 1  # of the package's curriculum; RL begins with the first
    rise_at: Annotated[float, Field(gt=0.0, le=1.0)] = 0.7  # share of right rollouts, from where the next level comes
    rise_after: Positive = 4  # updates over which that share is counted
    completion_length: Positive | None = None  # None: 256 for style words, else the longest answer's
    vocabulary: Vocabulary = 512  # of style bpe
    timeout: Annotated[float, Field(gt=0.0)] = 300.0  # seconds that scoring one batch may take


class PairsConfig(Section):
    kind: Literal["pairs"] = "pairs"  # of the task
    style: Style = "words"  # words: for a checkpoint and its tokenizer; characters, bpe: for a model from scratch
    vocabulary: Vocabulary = 512  # of style bpe
    train: Text  # a path (.jsonl, .parquet, .csv), or hub:NAME:SPLIT
    tests: dict[str, Text] = Field({})  # name of the test set -> path
    prompt_column: Text = "prompt"  # column of the prompts
    chosen_column: Text = "chosen"  # column of the preferred completions
    rejected_column: Text = "rejected"  # column of the others
    id_column: Text | None = None  # None: the row's number
    train_rows: Rows = None  # the first rows of the training data; null: all
    test_rows: Rows = None  # the same, of each test set
    system: str = ""  # instructions before every prompt
    completion_length: Positive = 256  # tokens of a completion


def _kind(value: Any) -> Any:
    return value.get("kind", "sudoku") if isinstance(value, dict) else getattr(value, "kind", None)


AnyTaskConfig = Annotated[
    Annotated[SudokuConfig, Tag("sudoku")]
    | Annotated[CountdownConfig, Tag("countdown")]
    | Annotated[Gsm8kConfig, Tag("gsm8k")]
    | Annotated[MathConfig, Tag("math")]
    | Annotated[FileConfig, Tag("file")]
    | Annotated[CodeConfig, Tag("code")]
    | Annotated[MiddleConfig, Tag("middle")]
    | Annotated[ReasoningGymConfig, Tag("reasoning_gym")]
    | Annotated[PairsConfig, Tag("pairs")],
    Discriminator(_kind),
]
