"""`dllm-kernels compare`: algorithms from one checkpoint at equal model forwards, over seeds; a table and a plot of rewards.

A forward is one sequence through a model once: rollouts, old and reference scores and gradients all count (`forward_counts.py`).
The budget is given, or is what the first algorithm's configured updates cost. What an update of each algorithm costs is
measured on its first two, from the checkpoint; its number of updates is the budget over that, at least 1. Later updates may
drop more or fewer rollouts than these: where that takes an algorithm off the budget by more than 3 %, its runs are made once more
with as many updates as their true cost allows. The table tells the forwards that were really made.

Every run is a process of its own, so that its peak memory is its own, and `jobs` of them go at once. A run that a guard stops
(a collapsed policy, a loss that is not finite) is a row like any other: it is evaluated with the weights it had then.
"""

from __future__ import annotations

import copy
import json
import math
import multiprocessing
import shutil
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

from rich.console import Console

from dllm_kernels.objectives import RECIPES

from ..config import RunConfig, load_config
from ..distributed import Ranks
from ..errors import GuardError, Stopped, UserError, telling_of_algorithms
from ..records.environment import environment
from ..records.plots import draw_rewards
from ..records.report import markdown_table
from ..records.run_dir import RunDir
from ..tasks import make_task
from ..train.optimization import make_optimizer
from ..train.rl import rl_updates
from ..train.run import Run, is_finished, prepare

Configure = Callable[[list[str]], RunConfig]

PILOT = 2  # updates that tell what one costs
OFF_BUDGET = 0.03
COUNTS = ("forwards", "backwards", "flops")
STOPPED = "stopped.json"  # of a run that a guard ended
_HEADINGS = ("algorithm", "updates", "SFT (%)", "+ RL (%)", "gain", "forwards", "backwards", "TFLOP", "seconds", "peak MB")


def compare_algorithms(
    configure: Configure, algorithms: str, seeds: int, forwards: int | None, out: Path, console: Console, *, jobs: int = 1
) -> list[dict[str, Any]]:
    """Runs what is missing of `out/ALGORITHM/seed-N`, then writes compare.json, compare.md and rewards.png into `out`.

    Args:
        configure: a config of RL from the checkpoint, with further overrides. algorithms: names, comma-separated, or "all".
        seeds: runs of each algorithm, with seeds 0, 1, ... forwards: the budget of a run. jobs: runs at once.

    Returns the rows of the table. A run that was stopped goes on where it was; one that is finished is not repeated. Raises
    UserError for unknown names, and where `out` holds a comparison under another config.
    """
    names = _names(algorithms)
    if forwards is not None and forwards < 1:
        raise UserError(f"--forwards must be at least 1, got {forwards}")
    configs = {name: configure([f"rl.algorithm={name}"]) for name in names}
    if not all(config.rl.updates for config in configs.values()):
        raise UserError("rl.updates must be at least 1 for a comparison, got 0: the checkpoint's run made none; set rl.updates")
    base = configs[names[0]]
    if not make_task(base.task, seed=base.task_seed).tests:
        raise UserError("compare needs a task with a test set: held-out accuracy is what it compares")
    out.mkdir(parents=True, exist_ok=True)
    budget, costs = _plan(configs, forwards, out, console)
    while True:
        updates = {name: max(1, round(budget / costs[name])) for name in names}
        runs: dict[str, list[RunConfig]] = {name: [] for name in names}
        for name in names:
            for seed in range(seeds):
                # other data would have tests among what the checkpoint was trained on
                keys = [f"rl.algorithm={name}", f"seed={seed}", f"data_seed={base.task_seed}", f"rl.updates={updates[name]}"]
                runs[name].append(configure([*keys, f"out={json.dumps(str(out / name / f'seed-{seed}'))}"]))
        first, *others = names
        _run_all(runs[first], jobs, console)
        for config, known in [(own, runs[first][seed]) for name in others for seed, own in enumerate(runs[name])]:
            _share_baseline(known, config)
        _run_all([config for name in others for config in runs[name]], jobs, console)
        if not _correct_costs(runs, costs, out, console):
            break
    rows = [_row(name, updates[name], [out / name / f"seed-{seed}" for seed in range(seeds)]) for name in names]
    files = RunDir(out)
    result = {
        "budget": budget,
        "jobs": jobs,
        "task": base.task.kind,
        "checkpoint": base.model.checkpoint,
        "temperature": base.rollout.temperature,
        "algorithms": rows,
        "environment": environment(),
        "config": base.to_yaml(),
    }
    files.write_json("compare.json", result)
    text = describe(result)
    files.write_text("compare.md", text)
    records = {name: [RunDir(out / name / f"seed-{seed}").metrics() for seed in range(seeds)] for name in names}
    draw_rewards(records, out / "rewards.png")
    console.print(text, highlight=False, soft_wrap=True, markup=False)
    return rows


@telling_of_algorithms()
def _names(algorithms: str) -> list[str]:
    everyone = [name for name, recipe in RECIPES.items() if not recipe.teacher]  # what learns from rewards alone
    names = everyone if algorithms == "all" else list(dict.fromkeys(n.strip() for n in algorithms.split(",") if n.strip()))
    for name in names:
        if name not in RECIPES:
            raise UserError(f"--algorithms: {name} is unknown; there are {', '.join(RECIPES)}")
    if not names:
        raise UserError("--algorithms must name at least one algorithm, got none")
    return names


def _plan(configs: dict[str, RunConfig], forwards: int | None, out: Path, console: Console) -> tuple[int, dict[str, float]]:
    """The budget and what an update of each algorithm costs, measured once and kept in plan.json."""
    folder, kept = RunDir(out), {}
    first = next(iter(configs))
    if (out / "plan.json").is_file():
        kept = folder.read_json("plan.json")
    costs = dict(kept.get("forwards_per_update", {}))
    for name, config in configs.items():
        if name not in costs:
            costs[name] = forwards_per_update(config)
            console.print(f"{name}: {costs[name]:,.0f} forwards an update", highlight=False, soft_wrap=True)
            folder.write_json("plan.json", {**kept, "forwards_per_update": costs})
    budget = forwards or kept.get("budget") or round(costs[first] * configs[first].rl.updates)
    if kept.get("budget", budget) != budget:
        raise UserError(f"{out} holds a comparison of {kept['budget']:,} forwards, asked for are {budget:,}; give another --out")
    folder.write_json("plan.json", {**kept, "budget": budget, "forwards_per_update": costs})
    return budget, costs


def _correct_costs(runs: dict[str, list[RunConfig]], costs: dict[str, float], out: Path, console: Console) -> bool:
    """Costs of those that ended off the budget, from all their updates, once for each; their runs are thrown away.

    Whether there were such.
    """
    folder = RunDir(out)
    plan = folder.read_json("plan.json")
    corrected = plan.setdefault("corrected", [])
    before = len(corrected)
    for name, configs in runs.items():
        whole = [Path(config.out) for config in configs if not (Path(config.out) / STOPPED).is_file()]
        made = [r["forwards"] for path in whole for r in RunDir(path).metrics() if r["phase"] == "rl"]
        updates = configs[0].rl.updates
        if name in corrected or not made or abs(updates * statistics.fmean(made) / plan["budget"] - 1) <= OFF_BUDGET:
            continue
        costs[name] = statistics.fmean(made)
        if max(1, round(plan["budget"] / costs[name])) != updates:
            console.print(f"{name}: {costs[name]:,.0f} forwards an update in truth; once more", highlight=False, soft_wrap=True)
            corrected.append(name)
            shutil.rmtree(out / name)
    if len(corrected) == before:
        return False
    folder.write_json("plan.json", {**plan, "forwards_per_update": costs, "corrected": corrected})
    return True


def forwards_per_update(config: RunConfig) -> float:
    """Mean over the first updates from the checkpoint, which are made and thrown away."""
    setup = prepare(config, make_task(config.task, seed=config.task_seed), Ranks())
    if RECIPES[config.rl.algorithm].wants_reference(config.rl.options) and not config.model.lora.rank:
        setup.reference = copy.deepcopy(setup.trained).requires_grad_(False)
    figures = rl_updates(setup, make_optimizer(setup.trained, config.rl))
    counts = [next(figures)["forwards"] for _ in range(min(PILOT, config.rl.updates))]
    return statistics.fmean(counts)


def _run_all(configs: Iterable[RunConfig], jobs: int, console: Console) -> None:
    """Those that are not finished, `jobs` at once, each in a process that has computed nothing before."""
    pending = [config for config in configs if not _is_done(config)]
    if not pending:
        return
    method = "spawn" if sys.platform == "win32" else "forkserver"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload([Run.__module__])
    with ThreadPoolExecutor(jobs) as pool:
        asked = {pool.submit(_run_alone, config, context): config for config in pending}
        try:
            for future in as_completed(asked):
                config, ending = asked[future], future.result()
                console.print(f"{config.rl.algorithm}, seed {config.seed}: {ending}", highlight=False, soft_wrap=True)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _run_alone(config: RunConfig, context: BaseContext) -> str:
    """`_run` in a process of its own; Python 3.10's executors cannot be told to start one for every task."""
    with ProcessPoolExecutor(1, mp_context=context) as process:
        return process.submit(_run, config).result()


def _is_done(config: RunConfig) -> bool:
    """Raises UserError where the folder holds a run under another config."""
    path = Path(config.out)
    if not (path / "config.yaml").is_file():
        return False
    if load_config(path / "config.yaml") != config:
        raise UserError(f"{path} holds a run under another config; give another --out")
    return (path / STOPPED).is_file() or is_finished(RunDir.reopen(path), config)


def _run(config: RunConfig) -> str:
    """A run from its start, or from where it was stopped; how it ended, in a few words."""
    path = Path(config.out)
    if (path / "config.yaml").is_file():
        folder = RunDir.reopen(path, alone=True)
    else:
        path.mkdir(parents=True, exist_ok=True)
        folder = RunDir(path)
        folder.lock()
    run = Run(folder, config, Console(quiet=True))
    try:
        run.execute()
    except GuardError as error:
        run.evaluate_as_it_is()
        folder.write_json(STOPPED, {"at": run.where(), "reason": str(error)})
        return f"stopped by a guard at {run.where()}: {error}"
    except Stopped as error:  # Ctrl-C reached all processes, and the state is saved
        raise UserError(f"stopped at {run.where()}; the same command goes on") from error
    finally:
        folder.close()
    return f"{config.rl.updates} updates"


def _share_baseline(known: RunConfig, config: RunConfig) -> None:
    """What the checkpoint itself answers depends on the seed and the decoding alone: it is not asked again."""
    path, found = Path(config.out), Path(known.out) / "eval_before.json"
    same = (known.rollout, known.evaluation, known.prompt) == (config.rollout, config.evaluation, config.prompt)
    if same and not (path / "config.yaml").is_file():
        shutil.rmtree(path, ignore_errors=True)  # a folder without a config.yaml holds nothing yet
        path.mkdir(parents=True)
        shutil.copy(found, path / found.name)


def _row(name: str, updates: int, folders: Sequence[Path]) -> dict[str, Any]:
    """Of one algorithm: lists have an entry per seed, accuracies are of the first test set at the rollout's temperature."""
    runs = [RunDir(folder) for folder in folders]
    before, after = ([run.read_json(f"eval_{when}.json") for run in runs] for when in ("before", "after"))
    test = next(iter(before[0]["sets"]))
    row: dict[str, Any] = {"algorithm": name, "updates": updates, "test": test}
    for way in ("rollout", "greedy"):
        sft = [e["sets"][test][way]["correct"] for e in before]
        rl = [e["sets"][test][way]["correct"] for e in after]
        row[way] = {"sft": sft, "rl": rl, "gain": [b - a for a, b in zip(sft, rl, strict=True)]}
    records = [[record for record in run.metrics() if record["phase"] == "rl"] for run in runs]
    for key in COUNTS:
        row[key] = [int(sum(record[key] for record in own)) for own in records]
    row["seconds"] = [sum(record["seconds"] for record in own) for own in records]
    row["peak_memory_mb"] = [max(record["peak_memory_mb"] for record in own) for own in records]
    stops = [run.read_json(STOPPED) if (run.path / STOPPED).is_file() else None for run in runs]
    row["stopped"] = [None if stop is None else f"{stop['at']}: {stop['reason']}" for stop in stops]
    row["improves"] = improves(row["rollout"]["gain"], [e["gain"][test]["rollout"] for e in after])
    return row


def improves(gains: Sequence[float], paired: Sequence[dict[str, float]]) -> bool:
    """Whether the mean gain over SFT is above 0 by a one-sided 95 % test over seeds; of one seed, by its paired interval."""
    mean = statistics.fmean(gains)
    if len(gains) == 1:
        return paired[0]["low"] > 0
    return mean > 0 and mean > _STUDENT.get(len(gains), 1.645) * statistics.stdev(gains) / math.sqrt(len(gains))


_STUDENT = {2: 6.314, 3: 2.920, 4: 2.353, 5: 2.132, 6: 2.015, 7: 1.943, 8: 1.895, 9: 1.860, 10: 1.833}  # 95 %, by seeds


def table(result: dict[str, Any]) -> str:
    """Markdown: a line per algorithm of a compare.json, in the order of their recipes."""
    return "\n".join(markdown_table(_HEADINGS, [_cells(row) for row in result["algorithms"]]))


def verdict(result: dict[str, Any]) -> str:
    worse = [row["algorithm"] for row in result["algorithms"] if not row["improves"]]
    return f"Not shown to improve over SFT: {', '.join(worse)}." if worse else "All improve over SFT."


def describe(result: dict[str, Any]) -> str:
    """compare.md: the table, who does not improve, and how to read it."""
    rows = result["algorithms"]
    stopped = [f"{row['algorithm']}, seed {n}: {why}" for row in rows for n, why in enumerate(row["stopped"]) if why is not None]
    seeds = len(rows[0]["forwards"])
    notes = (
        f"Right answers on `{rows[0]['test']}` at temperature {result['temperature']:g}, mean and deviation over "
        f"{seeds} seed(s) of noise and order; the data are the same. An algorithm improves where a one-sided 95 % test over the "
        "seeds tells it (with one seed: the paired interval over the examples). A forward is one sequence through a model once; "
        "updates are the budget over their cost. TFLOP by formula: 2 x parameters x tokens of a forward, as much again in "
        "backward, and 2 x trained parameters x tokens; attention's products of tokens with tokens are left out. Seconds are of "
        f"rollouts and gradients alone, {result['jobs']} run(s) at once. Peak memory is the largest of the seeds, each a process "
        "of its own."
    )
    title = f"# {result['task']} from {result['checkpoint']}: {result['budget']:,} forwards a run"
    ends = [f"Stopped by a guard, and evaluated as it was: {'; '.join(stopped)}.", ""] if stopped else []
    return "\n".join([title, "", table(result), "", verdict(result), "", *ends, notes, ""])


def _cells(row: dict[str, Any]) -> list[str]:
    way = row["rollout"]
    gain = f"{_spread(way['gain'], 100, '+.1f')}{'' if row['improves'] else ' (not shown)'}"
    counts = [f"{statistics.fmean(row[key]):,.0f}" for key in ("forwards", "backwards")]
    tera = f"{statistics.fmean(row['flops']) / 1e12:.3g}"
    seconds, peak = f"{statistics.fmean(row['seconds']):.1f}", f"{max(row['peak_memory_mb']):.0f}"
    accuracies = [_spread(way[when], 100, ".1f") for when in ("sft", "rl")]
    return [row["algorithm"], str(row["updates"]), *accuracies, gain, *counts, tera, seconds, peak]


def _spread(values: Sequence[float], scale: float, form: str) -> str:
    mean = format(scale * statistics.fmean(values), form)
    return mean if len(values) == 1 else f"{mean} ± {scale * statistics.stdev(values):.1f}"
