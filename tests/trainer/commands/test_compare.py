"""`dllm-kernels compare`: equal forwards, rates chosen without the table's examples, nothing done twice, failures told."""

import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dllm_trainer.commands import compare, compare_cells
from dllm_trainer.commands.compare import Configure, compare_algorithms
from dllm_trainer.commands.compare_cells import Cell, CellFile, cell_of, overrides, run_cell, split, updates
from dllm_trainer.commands.compare_report import chosen, describe, improves, missing, rows
from dllm_trainer.config import RunConfig, load_config
from dllm_trainer.distributed import Ranks
from dllm_trainer.errors import GuardError, UserError
from dllm_trainer.models.loading import build_model
from dllm_trainer.models.tokenizer import make_tokenizer
from dllm_trainer.tasks import Example, make_task
from dllm_trainer.train.forward_counts import Calls
from dllm_trainer.train.optimization import learning_rates
from dllm_trainer.train.run import prepare
from dllm_trainer.train.setup import Setup
from rich.console import Console

from benchmarks import documents
from tests.trainer.conftest import TINY

QUIET = Console(quiet=True)
RATES = "0.001,0.01"
_OF_THE_SITTING = {"created", "seconds", "peak_memory_mb", "git_commit"}


def configurer(finished: Path, *more: str) -> Configure:
    keys = [*TINY, "tensorboard=false", "sft.steps=0", f"model.checkpoint={finished / 'checkpoint_sft'}"]

    def configure(overrides: list[str]) -> RunConfig:
        return load_config(overrides=[*keys, "rl.updates=4", "rl.warmup=0", "evaluation.probe_examples=6", *overrides, *more])

    return configure


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[Cell]:
    """Cells run here, one after the other, which is faster; returns those that ran."""
    ran: list[Cell] = []

    def run_here(config: RunConfig, cell: Cell, budget: int, _: object) -> dict[str, Any]:
        ran.append(cell)
        return run_cell(config, cell, budget)

    monkeypatch.setattr(compare, "_run_alone", run_here)
    return ran


def findings(result: dict[str, Any]) -> dict[Cell, dict[str, Any]]:
    """Entries by cell, without what a clock or a machine says."""
    return {cell_of(e): {key: e[key] for key in e.keys() - _OF_THE_SITTING} for e in result["cells"]}


def test_forwards_and_backwards_are_counted_by_sequences() -> None:
    model = build_model(load_config().model, make_tokenizer("0123456789="), seed=0)
    ids = torch.zeros(3, 5, dtype=torch.int64)
    calls = Calls(model)
    with calls:
        model(input_ids=ids)
        with torch.no_grad():
            model(input_ids=ids[:2])
    model(input_ids=ids)
    assert (calls.forwards, calls.backwards) == (5, 3)
    embedding = model.get_input_embeddings().weight
    multiplied = sum(p.numel() for p in model.parameters() if p is not embedding)
    assert calls.flops == 2 * multiplied * (15 + 10) + 4 * multiplied * 15


@pytest.fixture(scope="module")
def whole(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one comparison, in processes, never interrupted."""
    out = tmp_path_factory.mktemp("comparison") / "compare"
    compare_algorithms(configurer(finished), "bgpo, dmpo", 2, 400, out, QUIET, rates=RATES, jobs=2)
    return out


def test_a_comparison_has_equal_forwards_tables_a_plot_and_all_its_curves(whole: Path) -> None:
    result = json.loads((whole / "compare.json").read_text())
    assert missing(result) == []
    assert len(result["cells"]) == 4 + 2 + 4
    for entry in result["cells"]:
        if entry["phase"] == "checkpoint":
            assert entry["updates"] == 0
            continue
        budget = 100 if entry["phase"] == "sweep" else 400
        curve = entry["curve"]
        assert sum(curve["forwards"]) == entry["forwards"]
        assert len(curve["forwards"]) == len(curve["reward"]) == len(curve["correct"]) == entry["updates"]
        assert entry["updates"] == 1 or abs(entry["forwards"] - budget) < max(curve["forwards"]), "equal, to an update"
        assert entry["backwards"] > 0
        assert entry["right"]["rollout"]["examples"] == (6 if entry["phase"] == "sweep" else 10)
    for row in rows(result):
        assert row["rate"] in result["rates"]
        assert len(row["rollout"]["gain"]) == len(row["greedy"]["gain"]) == 2
        assert min(row["peak_memory_mb"]) > 0
    ours = [cell for cell in findings(result) if cell.phase == "final" and cell.algorithm == "bgpo"]
    assert findings(result)[ours[0]]["curve"] != findings(result)[ours[1]]["curve"], "seeds are different runs"
    text = (whole / "compare.md").read_text()
    assert text.count("| bgpo |") == text.count("| dmpo |") == 2
    assert "Not complete" not in text
    assert (whole / "rewards.png").read_bytes().startswith(b"\x89PNG")
    collected = documents.collect_comparison(whole, "dllm-kernels compare", whole / "sudoku.json")
    page = documents.comparison(collected)
    assert page.count("| bgpo |") == 2
    assert "400 forwards a run, 2 seeds" in page
    assert "Right answers of 6 validation examples, in %, after 100 forwards" in page
    assert (whole / "sudoku.png").is_file()
    part = {**collected, "cells": collected["cells"][:3]}
    assert "**Not complete: missing are " in documents.comparison(part)
    assert "no seeds" in documents.comparison({**collected, "cells": []})


def test_an_interrupted_comparison_ends_as_an_uninterrupted_one(
    whole: Path, finished: Path, tmp_path: Path, in_this_process: list[Cell]
) -> None:
    """Some cells are kept, one was cut off while its line was written; here the rest also run in another order and process."""
    lines = (whole / "cells.jsonl").read_text().splitlines(keepends=True)
    kept = [json.loads(line) for line in lines[1:4]]
    for name in ("settings.json", "cells.jsonl"):
        shutil.copy(whole / name, tmp_path / name)
    (tmp_path / "cells.jsonl").write_text("".join(lines[1:4]) + lines[4][:40])
    result = compare_algorithms(configurer(finished), "bgpo,dmpo", 2, 400, tmp_path, QUIET, rates=RATES)
    assert not {cell_of(entry) for entry in kept} & set(in_this_process)
    assert len(in_this_process) == len(lines) - 3
    assert findings(result) == findings(json.loads((whole / "compare.json").read_text()))
    in_this_process.clear()
    again = compare_algorithms(configurer(finished), "bgpo,dmpo", 2, 400, tmp_path, QUIET, rates=RATES)
    assert (in_this_process, again["cells"]) == ([], result["cells"]), "a finished cell was repeated"


def test_cells_of_other_settings_do_not_meet_in_one_table(whole: Path, finished: Path) -> None:
    with pytest.raises(UserError, match="another budget: 400, now 600"):
        compare_algorithms(configurer(finished), "bgpo", 1, 600, whole, QUIET)
    with pytest.raises(UserError, match="another config; give another --out"):
        compare_algorithms(configurer(finished, "rl.group=8"), "bgpo", 1, 400, whole, QUIET)


def test_a_rate_is_chosen_on_examples_that_neither_the_table_nor_training_has(
    finished: Path, tmp_path: Path, in_this_process: list[Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, set[str]] = {"sweep": set(), "table": set()}

    def evaluate(setup: Any, name: str, examples: Sequence[Example], how: Any) -> dict[str, Any]:
        asked["sweep" if in_this_process[-1].of_sweep else "table"] |= {e.prompt for e in examples}
        return compare_cells_evaluate(setup, name, examples, how)

    compare_cells_evaluate = compare_cells.evaluate
    monkeypatch.setattr(compare_cells, "evaluate", evaluate)
    configure = configurer(finished)
    compare_algorithms(configure, "wd1", 1, 64, tmp_path, QUIET, rates=RATES)
    task = make_task(configure([]).task, seed=0)
    assert (len(asked["sweep"]), len(asked["table"])) == (6, 10)
    assert not asked["sweep"] & asked["table"]
    assert not (asked["sweep"] | asked["table"]) & {e.prompt for e in task.train}


def test_an_example_that_stands_on_both_sides_is_the_validation_s_alone() -> None:
    task = make_task(load_config(overrides=[*TINY, "task.test_puzzles=3"]).task, seed=0)
    one, two, three = task.tests["unseen_puzzles"]
    doubled = replace(task, tests={"t": [one, two, replace(one, id="2"), three]})
    assert split(doubled, 2) == ("t", [one, two], [three])


def test_a_countdown_problem_with_its_numbers_in_another_order_is_the_same_problem() -> None:
    task = make_task(load_config(Path("countdown"), ["task.test_problems=300"]).task, seed=0)
    _, validation, table = split(task, 100)
    chosen_by, left = ({(*sorted(e.facts["numbers"]), e.facts["target"]) for e in part} for part in (validation, table))
    assert left
    assert not chosen_by & left
    assert len(table) < 200, "in no order came a problem twice, so nothing was tested"


def entry(rate: float, correct: float, *, phase: str = "sweep", failed: str | None = None) -> dict[str, Any]:
    right = {way: {"correct": correct, "examples": 4, "solved": "1100"} for way in ("rollout", "greedy")}
    return {"phase": phase, "algorithm": "a", "rate": rate, "seed": 0, "failed": failed, "right": right}


@pytest.mark.parametrize(
    ("sweep", "want"),
    [
        ([entry(0.1, 0.5), entry(0.2, 0.7), entry(0.3, 0.6)], 0.2),
        ([entry(0.3, 0.7), entry(0.2, 0.7), entry(0.1, 0.5)], 0.2),  # of equal ones the lowest, in whatever order they ended
        ([entry(0.1, 0.5), entry(0.2, 0.6), entry(0.3, 0.9, failed="a guard")], 0.2),
        ([entry(rate, 0.9, failed="a guard") for rate in (0.1, 0.2, 0.3)], None),
        ([entry(0.1, 0.5), entry(0.2, 0.7)], None),  # not yet
        ([entry(0.1, 0.5), entry(0.2, 0.4), entry(0.3, 0.4), entry(0.4, 0.9)], 0.1),  # a rate of an earlier grid
        ([entry(0.1, 0.5), entry(0.2, 0.4), entry(0.3, 0.4), entry(0.2, 0.9, phase="final")], 0.1),  # the table's never
    ],
)
def test_the_rate_with_most_right_answers_is_taken(sweep: list[dict[str, Any]], want: float | None) -> None:
    assert chosen(sweep, "a", [0.1, 0.2, 0.3]) == want


def test_the_learning_rate_follows_the_share_of_forwards_that_is_spent(finished: Path) -> None:
    configure = configurer(finished, "rl.updates=10", "rl.warmup=2", "rl.schedule=linear", "rl.schedule_options={}")
    config = configure(overrides(Cell("final", "bgpo", 0.01, 1), 0))
    setup = prepare(config, make_task(config.task, seed=config.task_seed), Ranks())
    schedule, spent, lower = learning_rates("rl", config.rl, 10), 0.0, []
    for made in updates(setup, 700):
        if "lr" in made:  # else no group had a signal
            assert made["lr"] == pytest.approx(schedule(10 * spent / 700))
            lower.append(made["lr"])
        spent += made["forwards"]
    assert max(lower) > 0.008
    assert lower[-1] < 0.002, "the schedule ends with the budget"


def test_an_algorithm_that_fails_is_told_and_not_averaged(
    finished: Path, tmp_path: Path, in_this_process: list[Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    real_updates = compare_cells.rl_updates

    def break_down(setup: Setup, *arguments: Any, **more: Any) -> Iterator[dict[str, float]]:
        yield from itertools.islice(real_updates(setup, *arguments, **more), 1)
        if setup.config.rl.lr == 0.99 or setup.config.seed == 2:
            raise GuardError("the loss became nan")
        yield from itertools.islice(real_updates(setup, *arguments, **more), 1, None)

    monkeypatch.setattr(compare_cells, "rl_updates", break_down)
    result = compare_algorithms(configurer(finished), "wd1", 2, 800, tmp_path, QUIET, rates="0.001,0.99")
    (row,) = rows(result)
    assert row["rate"] == 0.001, "a rate that a guard stopped is no choice"
    assert len(row["rollout"]["gain"]) == 1
    assert row["failed"] == ["seed 2, after 1 updates: the loss became nan"]
    assert not row["improves"]
    text = describe(result)
    assert "| wd1 | 0.001 | failed: 1 of 2 seeds |" in text
    assert "Failed: wd1." in text
    failures = [
        f"wd1, {run}, after 1 updates: the loss became nan" for run in ("sweep, rate 0.99, seed 0", "final, rate 0.001, seed 2")
    ]
    assert f"Failed, and in no mean: {'; '.join(failures)}." in text
    assert "failed" in text.split("## Learning rates")[1]
    assert missing(result) == [], "a failed cell is not made again"


def test_a_process_that_is_killed_costs_its_own_cell_alone(
    finished: Path, tmp_path: Path, in_this_process: list[Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_here: Callable[..., dict[str, Any]] = compare._run_alone
    killed = Cell("final", "wd1", 0.01, 1)

    def run(config: RunConfig, cell: Cell, budget: int, context: Any) -> dict[str, Any]:
        if cell == killed:
            raise BrokenProcessPool
        return run_here(config, cell, budget, context)

    monkeypatch.setattr(compare, "_run_alone", run)
    arguments: dict[str, Any] = {"rates": "0.01"}
    with pytest.raises(UserError, match=r"1 cells ended without a result, wd1, final, rate 0\.01, seed 1 first"):
        compare_algorithms(configurer(finished), "wd1", 2, 64, tmp_path, QUIET, **arguments)
    text = (tmp_path / "compare.md").read_text()
    assert "**Not complete: missing are 1 final ones of algorithms whose rate is chosen.**" in text
    monkeypatch.setattr(compare, "_run_alone", run_here)
    in_this_process.clear()
    compare_algorithms(configurer(finished), "wd1", 2, 64, tmp_path, QUIET, **arguments)
    assert in_this_process == [killed]
    assert "Not complete" not in (tmp_path / "compare.md").read_text()


def test_a_line_that_is_no_entry_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "cells.jsonl").write_text('{"phase": "sweep"}\n')
    with pytest.raises(UserError, match="line 1, is no entry of a comparison; remove that line"):
        CellFile(tmp_path)


@pytest.mark.parametrize(
    ("algorithms", "forwards", "rates", "sentence"),
    [
        ("bgpo,bpgo", None, None, "bpgo is unknown"),
        (" ,", None, None, "at least one algorithm"),
        ("bgpo", 0, None, "--forwards must be at least 1"),
        ("bgpo", 1, "0.1,x", "--rates must be numbers"),
        ("bgpo", 1, "0.1,1.5", "--rates must lie between 0 and 1"),
    ],
)
def test_mistakes_are_sentences(
    finished: Path, tmp_path: Path, algorithms: str, forwards: int | None, rates: str | None, sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        compare_algorithms(configurer(finished), algorithms, 1, forwards, tmp_path, QUIET, rates=rates)
    assert list(tmp_path.iterdir()) == []


def test_a_table_needs_examples_beyond_those_of_the_choice(finished: Path, tmp_path: Path) -> None:
    configure = configurer(finished, "evaluation.probe_examples=16")
    with pytest.raises(
        UserError, match=r"the test set unseen_puzzles must have more examples than evaluation\.probe_examples=16"
    ):
        compare_algorithms(configure, "bgpo", 1, 64, tmp_path, QUIET)


def test_an_algorithm_improves_only_where_the_spread_allows_it() -> None:
    assert improves([0.05, 0.06, 0.07], [])
    assert not improves([0.30, -0.20, 0.05], [])
    assert not improves([-0.05, -0.06, -0.07], [])
    assert improves([0.05], [{"gain": 0.05, "low": 0.01, "high": 0.09}])
    assert not improves([0.05], [{"gain": 0.05, "low": -0.01, "high": 0.11}])


def test_a_server_that_samples_is_refused_as_its_forwards_are_not_counted(tmp_path: Path) -> None:
    own = [key for key in TINY if not key.startswith("rollout.")]

    def configure(more: list[str]) -> RunConfig:
        return load_config(overrides=[*own, "rollout.engine=sglang", "rollout.url=http://x", *more])

    with pytest.raises(UserError, match=r"rollout\.engine must be ours for a comparison, .* got sglang"):
        compare_algorithms(configure, "bgpo", 1, 8, tmp_path, QUIET)


def test_the_grid_holds_the_own_rate_as_it_is() -> None:
    assert compare._rates(None, 1.25e-4) == [4.2e-5, 1.25e-4, 3.8e-4]
