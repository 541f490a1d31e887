"""`dllm-kernels`: see `dllm-kernels --help`. Mistakes are told in one sentence (exit status 2); Ctrl-C exits with 130."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from .config import RunConfig, load_config, shipped_configs
from .errors import STOPPED_BY_CTRL_C, Stopped, StoppedAtOnce, UserError, first_line, telling_of_algorithms, visible
from .rights import FUNCTIONS

if TYPE_CHECKING:
    from .distributed import Ranks
    from .records.run_dir import RunDir
    from .train.setup import Setup

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
console = Console()

Overrides = Annotated[list[str] | None, typer.Argument(help="Config keys to change, such as rl.updates=10 seed=3.")]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="YAML file over the demo's defaults, or the name of one that comes along.")
]
Out = Annotated[Path | None, typer.Option("--out", help="Folder for the run; the next free name if it is taken.")]
Checkpoint = Annotated[str, typer.Option("--checkpoint", help="Folder or hub id of a model and its tokenizer.")]
MaybeCheckpoint = Annotated[str | None, typer.Option("--checkpoint", help="Folder or hub id; default: the config's.")]
Resume = Annotated[
    str | None, typer.Option("--resume", help="Folder of a stopped run to go on with; `auto`: the config's own, if there is one.")
]


def main() -> None:
    from .records.terminal import forgive_closed_streams

    forgive_closed_streams()
    app()


@contextmanager
def _sentences() -> Iterator[None]:
    """What users can mend becomes a sentence instead of a traceback."""
    try:
        yield
    except UserError as error:
        print(f"dllm-kernels: {visible(error)}", file=sys.stderr)
        raise typer.Exit(2) from error
    except KeyboardInterrupt as error:
        print("dllm-kernels: stopped", file=sys.stderr)
        raise typer.Exit(_code(error)) from error


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    if version:
        from dllm_kernels.version import __version__

        print(f"dllm-kernels {__version__}")
        raise typer.Exit


@app.command()
def demo(overrides: Overrides = None, out: Out = None, config: ConfigFile = None, resume: Resume = None) -> None:
    """Supervised fine-tuning, then RL, by default BGPO on generated 4x4 Sudoku: about 5 minutes on one core, offline."""
    with _sentences():
        _run(overrides, out, config, resume)


@app.command()
def sft(overrides: Overrides = None, out: Out = None, config: ConfigFile = None, resume: Resume = None) -> None:
    """Supervised fine-tuning alone (folder runs/sft); go on with `rl --checkpoint`."""
    with _sentences():
        for override in overrides or ():
            key, _, value = override.partition("=")
            if key == "rl.updates" and value != "0":
                raise UserError(f"sft makes no reinforcement updates, got {override}; leave it out, or use demo or rl")
        _run(overrides, out, config, resume, first=["out=runs/sft"], last=["rl.updates=0"])


@app.command()
def rl(
    checkpoint: MaybeCheckpoint = None,
    overrides: Overrides = None,
    out: Out = None,
    config: ConfigFile = None,
    algorithm: Annotated[
        str | None, typer.Option("--algorithm", help="One of `dllm-kernels algorithms`; the same as rl.algorithm=NAME.")
    ] = None,
    resume: Resume = None,
) -> None:
    """RL alone, from a checkpoint (folder runs/rl); the config of the run that made it is the default.

    An algorithm's recipe sets its mask law, samples and advantages; config keys override them. One that needs a reference
    policy keeps a frozen copy of the checkpoint's weights.
    """
    with _sentences():
        first = ["out=runs/rl", *([f"rl.algorithm={algorithm}"] if algorithm else [])]
        last = ["sft.steps=0"]
        if checkpoint is not None:
            last.append(f"model.checkpoint={json.dumps(checkpoint)}")
            beside = Path(checkpoint).parent / "config.yaml"
            if (
                config is None
                and beside.is_file()
                and _configure([*first, *(overrides or ()), *last], None, None, beside=checkpoint).rl.updates == 0
            ):
                first.append(f"rl.updates={load_config().rl.updates}")  # the config of `sft`, which makes none
        if checkpoint is None and resume is None and config is None and "model.checkpoint" not in " ".join(overrides or ()):
            raise UserError("rl needs a model: give --checkpoint, or a --config with model.checkpoint")
        _run(overrides, out, config, resume, first=first, last=last, beside=checkpoint)


@app.command("eval")
def evaluate_checkpoint(checkpoint: Checkpoint, overrides: Overrides = None, config: ConfigFile = None) -> None:
    """Accuracy of a checkpoint on its task's test sets, greedily and at the rollout's temperature, as JSON."""
    with _sentences(), _ranks() as ranks:
        from .records.environment import environment
        from .train.evaluation import decodings, evaluate

        setup = _setup(checkpoint, overrides, config, ranks)
        sets = {
            name: {way: evaluate(setup, name, test, how) for way, how in decodings(setup.config.rollout).items()}
            for name, test in setup.task.tests.items()
        }
        if ranks.is_first:
            result = {"checkpoint": checkpoint, "seed": setup.config.seed, "sets": sets, "environment": environment()}
            print(json.dumps(result, indent=1))


@app.command()
def task(
    overrides: Overrides = None,
    config: ConfigFile = None,
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", help="Whose tokenizer reads the prompts; default: the config's.")
    ] = None,
) -> None:
    """Three examples of a task: the prompt as the model sees it, and the rewards of a right and a wrong answer."""
    with _sentences():
        from .commands.show_task import describe_task
        from .train.foreign_code import announce_code

        given = [*(overrides or ()), *([f"model.checkpoint={json.dumps(checkpoint)}"] if checkpoint else [])]
        resolved = _configure(given, config, None)
        announce_code(resolved)
        print(describe_task(resolved))


@app.command()
def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="What to complete; may be given several times.")] = None,
    suffix: Annotated[
        list[str] | None, typer.Option("--suffix", help="What follows the completion: of the first --prompt, of the second ...")
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--input", help='JSONL with a "prompt" in each line, and a "suffix" where one follows.')
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="JSONL to write: prompt, completion, steps, log-probs.")] = None,
    overrides: Overrides = None,
    config: ConfigFile = None,
) -> None:
    """Complete prompts, greedily unless rollout.temperature is given; on a terminal the text is shown as it is unmasked.

    Without a prompt one of the task's own is taken: the first of its tests, or of its training examples.
    """
    with _sentences(), _ranks() as ranks:
        from .commands.generate import read_prompts, write_completions

        if len(suffix or ()) > len(prompt or ()):
            raise UserError(f"--suffix must come after the --prompt that it belongs to, got {len(suffix or ())} of them")
        given = zip_longest(prompt or (), suffix or (), fillvalue="")
        prompts = [*given, *(read_prompts(file) if file is not None else ())]
        setup = _setup(checkpoint, ["rollout.temperature=0", "rl.updates=0", *(overrides or ())], config, ranks)
        if not prompts:
            example = next((test[0] for test in setup.task.tests.values() if test), setup.task.train[0])
            prompts = [(example.prompt, example.suffix)]
            if ranks.is_first:
                print(f"no prompt is given; one of the task:\n{visible(example.prompt)}", file=sys.stderr)
        write_completions(setup, prompts, out, console)


@app.command()
def plan(
    overrides: Overrides = None,
    config: ConfigFile = None,
    ranks: Annotated[int, typer.Option(min=1)] = 1,
    on: Annotated[
        str | None, typer.Option(help="Time too: of this machine (here), or by a datasheet (A100, H100, H200).")
    ] = None,
) -> None:
    """Parameters and predicted peak memory, term by term, with and without our kernels; refuses what will not fit.

    With --on, the time of each phase as well.
    """
    with _sentences():
        from .commands.memory_plan import describe_plan
        from .commands.time_plan import describe_time

        resolved = _configure(overrides, config, None)
        if on in (None, "here"):
            print(describe_plan(resolved, ranks=ranks))
        if on is not None:
            print(describe_time(resolved, on=on, ranks=ranks))


@app.command()
def plot(run: Annotated[Path, typer.Argument(help="Folder of a run.")]) -> None:
    """Draw a run's curves again, into its curves.png."""
    with _sentences():
        from .records.plots import draw_curves
        from .records.run_dir import RunDir

        folder = RunDir.reopen(run, argument="plot")
        names = ("eval_before.json", "eval_after.json")
        draw_curves(folder.metrics(), [folder.read_json(n) for n in names if (run / n).exists()], run / "curves.png")
        print(run / "curves.png")


@app.command()
def compare(
    checkpoint: Checkpoint,
    algorithms: Annotated[str, typer.Option("--algorithms", help="Names, comma-separated, or `all`.")] = "all",
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Final runs of each algorithm.")] = 5,
    forwards: Annotated[
        int | None, typer.Option("--forwards", help="Model calls of training that each final run may make.")
    ] = None,
    rates: Annotated[
        str | None, typer.Option("--rates", help="Learning rates to choose from, comma-separated; one: no choice.")
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Runs at once, each a process of its own.")] = 1,
    overrides: Overrides = None,
    out: Out = None,
    config: ConfigFile = None,
) -> None:
    """Several algorithms from one checkpoint, each at a learning rate chosen for it, over several seeds: tables and a plot.

    The same command goes on where it was stopped; every finished run is kept.
    """
    with _sentences():
        from .commands.compare import compare_algorithms

        keys = ["sft.steps=0", f"model.checkpoint={json.dumps(checkpoint)}"]

        def configure(more: list[str]) -> RunConfig:
            return _configure([*(overrides or ()), *more, *keys], config, None, beside=checkpoint)

        compare_algorithms(configure, algorithms, seeds, forwards, out or Path("runs/compare"), console, rates=rates, jobs=jobs)


@app.command("config")
def show_config(overrides: Overrides = None, config: ConfigFile = None) -> None:
    """Print the resolved configuration."""
    with _sentences():
        print(load_config(config, overrides or ()).to_yaml())


@app.command("config-schema")
def show_schema() -> None:
    """The JSON schema of every config key, with what each is for."""
    from .descriptions import schema

    print(json.dumps(schema(), indent=1))


@app.command("configs")
def show_configs() -> None:
    """The configs that come along, for --config."""
    for name, file in shipped_configs().items():
        print(f"{name:<24} {file.read_text().splitlines()[0].removeprefix('# ')}")


@app.command()
def algorithms() -> None:
    """Every algorithm: paper, how surely it is that, mask law, samples, and what it needs."""
    from rich.table import Table

    from dllm_kernels.objectives import RECIPES

    with _sentences(), telling_of_algorithms():
        recipes = list(RECIPES.values())
    table = Table("name", "paper", "arXiv", "status", "law", "samples", "needs")
    for recipe in recipes:
        wanted = {"old": recipe.needs_old, "reference": recipe.needs_reference, "trajectory": recipe.needs_trajectory}
        needs = ", ".join(name for name, needed in wanted.items() if needed) or "-"
        samples = "-" if recipe.samples is None else str(recipe.samples)
        table.add_row(recipe.name, recipe.title, recipe.arxiv, recipe.status, recipe.law, samples, needs)
    Console(width=max(console.width, 140)).print(table)


@app.command("env")
def show_environment() -> None:
    """Versions, machine, and which code runs the LM head and why."""
    from dllm_kernels.env import show

    from .records.environment import environment

    show(environment())


def _configure(
    overrides: list[str] | None,
    file: Path | None,
    out: Path | None,
    *,
    beside: str | None = None,
    calls: Sequence[str] = FUNCTIONS,
) -> RunConfig:
    """Defaults, or the config of the run that a checkpoint lies in; then the file; then overrides and --out.

    What lies beside a checkpoint grants no rights; `calls`: the keys that name functions which will be called.
    """
    base, found = None, Path(beside or "").parent / "config.yaml"
    if beside is not None and found.is_file():
        try:
            base = found.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{found} cannot be read ({first_line(error)})") from error
    given = [*(overrides or ()), *([f"out={json.dumps(str(out))}"] if out else [])]
    return load_config(file, given, base=base, base_name=str(found), base_calls=None if base is None else calls)


@contextmanager
def _ranks() -> Iterator[Ranks]:
    from . import distributed

    ranks = distributed.start()
    with distributed.one_fails_all_stop(ranks):
        yield ranks


def _setup(checkpoint: str, overrides: list[str] | None, config: Path | None, ranks: Ranks) -> Setup:
    from .models.loading import check_place
    from .tasks import make_task
    from .train.foreign_code import announce_code
    from .train.run import prepare

    check_place(checkpoint)
    keys = [*(overrides or ()), f"model.checkpoint={json.dumps(checkpoint)}"]
    resolved = _configure(keys, config, None, beside=checkpoint, calls=["task.correct"])
    resolved = resolved.model_copy(update={"rl": resolved.rl.model_copy(update={"updates": 0})})
    if resolved.rollout.engine != "ours":
        raise UserError("rollout.engine must be ours, as a checkpoint is looked at in this process, got sglang")
    if ranks.is_first:
        announce_code(resolved)
    return prepare(resolved, make_task(resolved.task, seed=resolved.task_seed), ranks)


def _run(
    overrides: list[str] | None,
    out: Path | None,
    config: Path | None,
    resume: str | None,
    *,
    first: list[str] | None = None,
    last: list[str] | None = None,
    beside: str | None = None,
) -> None:
    """A new run, or one that goes on. `first` comes before the overrides, `last` after them."""
    from .records.resume import restarted, resumed_config
    from .records.run_dir import RunDir
    from .train.run import is_finished
    from .train.stop import StopRequest

    with StopRequest(nothing_to_lose=True), _ranks() as ranks:
        known, wanted = None if resume in (None, "auto") else Path(str(resume)), None
        if known is not None and (out or config):
            raise UserError("--resume goes on with the run's own config.yaml and folder; leave out --out and --config")
        if known is None:
            wanted = _configure([*(first or ()), *(overrides or ()), *(last or ())], config, out, beside=beside)
            own = restarted(Path(wanted.out)) or (Path(wanted.out) if resume == "auto" else None)
            known = own if own is not None and (own / "config.yaml").is_file() else None
        folder, resolved = RunDir(known or Path()), wanted
        changed: dict[str, list[Any]] = {}
        with ranks.together():
            if ranks.is_first and known is not None:
                folder = RunDir.reopen(known, alone=True)
                resolved, changed = resumed_config(folder.path, overrides or ())
            elif ranks.is_first and wanted is not None:
                folder = RunDir.create(Path(wanted.out))
                folder.lock()
        path, resolved = ranks.tell((folder.path, resolved))[0]
        folder = folder if ranks.is_first else RunDir(path)
        try:
            if known is not None and is_finished(folder, resolved):
                _say(ranks, f"this run is finished already; its report: {path / 'report.md'}")
                return
            if wanted is not None and known is None and path != Path(wanted.out):
                _say(ranks, f"{wanted.out} already holds files; this run goes to {path}")
            _execute(folder, resolved.model_copy(update={"out": str(path)}), ranks, new=known is None, changed=changed)
        finally:
            folder.close()


def _say(ranks: Ranks, text: str) -> None:
    if ranks.is_first:
        console.print(text, highlight=False, soft_wrap=True, markup=False)


def _execute(folder: RunDir, config: RunConfig, ranks: Ranks, *, new: bool, changed: dict[str, list[Any]]) -> None:
    from .commands.memory_plan import is_out_of_memory, memory_hint
    from .records.resume import note
    from .train.run import Run

    go_on = f"go on with: dllm-kernels demo --resume {folder.path}"
    try:
        run = Run(folder, config, console, ranks)
        if ranks.is_first:
            note(folder, run.where(), ranks.size, changed)
        run.execute()
    except Stopped as error:
        _say(ranks, f"stopped at {run.where()}, state saved; {go_on}")
        raise SystemExit(error.code) from error
    except UserError:
        if new and ranks.is_first:
            folder.drop_if_empty()
        raise
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"{first_line(error)}; {memory_hint(config, ranks.size)}; {go_on}") from error
    except OSError as error:
        raise UserError(
            f"a file of {folder.path} could not be written or read ({error}); what was written is kept; {go_on}"
        ) from error
    except KeyboardInterrupt as error:
        _say(ranks, f"stopped at once; the last saved state is kept; {go_on}")
        raise SystemExit(_code(error)) from error


def _code(error: KeyboardInterrupt) -> int:
    return error.code if isinstance(error, StoppedAtOnce) else STOPPED_BY_CTRL_C
