"""`dllm-train`: see `dllm-train --help`. Mistakes are told in one sentence (exit status 2); Ctrl-C exits with 130."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from trainer.config import RunConfig, load_config
from trainer.errors import Stopped, UserError, first_line

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
console = Console()

Overrides = Annotated[list[str] | None, typer.Argument(help="Config keys to change, such as rl.updates=10 seed=3.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file over the demo's defaults.")]
Out = Annotated[Path | None, typer.Option("--out", help="Folder for the run; the next free name if it is taken.")]
Checkpoint = Annotated[Path, typer.Option("--checkpoint", help="Folder of a saved model and tokenizer.")]


def main() -> None:
    app()


@contextmanager
def _sentences() -> Iterator[None]:
    """What users can mend becomes a sentence instead of a traceback."""
    try:
        yield
    except UserError as error:
        print(f"dllm-train: {error}", file=sys.stderr)
        raise typer.Exit(2) from error
    except KeyboardInterrupt as error:
        print("dllm-train: stopped", file=sys.stderr)
        raise typer.Exit(130) from error


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    if version:
        from dllm_kernels.version import __version__

        print(f"dllm-kernels {__version__}")
        raise typer.Exit


@app.command()
def demo(
    overrides: Overrides = None,
    out: Out = None,
    config: ConfigFile = None,
    resume: Annotated[Path | None, typer.Option("--resume", help="Folder of a stopped run to go on with.")] = None,
) -> None:
    """Supervised fine-tuning, then BGPO, on generated 4x4 Sudoku; about 5 minutes on one core, offline."""
    with _sentences():
        if resume is not None and (overrides or out or config):
            raise UserError("--resume goes on with the run's own config.yaml and folder; leave out overrides, --out and --config")
        if resume is not None:
            _reopen(resume)
        else:
            _start(_configure(overrides, config, out))


@app.command()
def sft(overrides: Overrides = None, out: Out = None, config: ConfigFile = None) -> None:
    """The supervised half of the demo alone (folder runs/sft); go on with `rl --checkpoint`."""
    with _sentences():
        for override in overrides or ():
            key, _, value = override.partition("=")
            if key == "rl.updates" and value != "0":
                raise UserError(f"sft makes no reinforcement updates, got {override}; leave it out, or use demo or rl")
        _start(_configure(["out=runs/sft", *(overrides or ()), "rl.updates=0"], config, out))


@app.command()
def rl(
    checkpoint: Checkpoint,
    overrides: Overrides = None,
    out: Out = None,
    config: ConfigFile = None,
    algorithm: Annotated[
        str | None, typer.Option("--algorithm", help="One of `dllm-train algorithms`; the same as rl.algorithm=NAME.")
    ] = None,
) -> None:
    """BGPO, or --algorithm, from a checkpoint (folder runs/rl); the config of the run that made it is the default.

    An algorithm's recipe sets its mask law, samples and advantages; config keys override them. One that needs a reference
    policy keeps a frozen copy of the checkpoint's weights.
    """
    with _sentences():
        keys = ["out=runs/rl", *([f"rl.algorithm={algorithm}"] if algorithm else []), *(overrides or ())]
        resolved = _configure(keys, config, out, beside=checkpoint)
        if resolved.rl.updates == 0:  # the config of `sft`, which makes none
            updates = f"rl.updates={load_config().rl.updates}"
            resolved = _configure([updates, *keys], config, out, beside=checkpoint)
        _start(resolved, checkpoint=checkpoint)


@app.command("eval")
def evaluate_checkpoint(checkpoint: Checkpoint, overrides: Overrides = None, config: ConfigFile = None) -> None:
    """Accuracy of a checkpoint on both test sets, greedily and at the rollout's temperature, as JSON."""
    with _sentences():
        resolved = _configure(overrides, config, None, beside=checkpoint)
        from trainer.evaluation import decodings, evaluate
        from trainer.models import load_checkpoint
        from trainer.sudoku import make_task
        from trainer.tokenizer import Codec

        model, tokenizer = load_checkpoint(checkpoint)
        task, codec = make_task(resolved.task, seed=resolved.seed), Codec(tokenizer)
        options: dict[str, Any] = {"seed": resolved.seed, "batch": resolved.evaluation.batch}
        result = {
            test.name: {way: evaluate(model, test, codec, how, **options) for way, how in decodings(resolved.rollout).items()}
            for test in task.tests
        }
        print(json.dumps(result, indent=1))


@app.command()
def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[str, typer.Option("--prompt", help="16 digits, row by row, 0 for an empty cell.")],
    overrides: Overrides = None,
    config: ConfigFile = None,
) -> None:
    """Let a checkpoint solve one puzzle, greedily unless rollout.temperature is given."""
    with _sentences():
        if len(prompt) != 16 or not set(prompt) <= set("01234"):
            raise UserError(f"--prompt must be 16 digits in 0-4 (0 is an empty cell), got {prompt!r}")
        resolved = _configure(["rollout.temperature=0", "rl.updates=0", *(overrides or ())], config, None, beside=checkpoint)
        import torch

        import dllm_kernels
        from dllm_kernels import noise
        from trainer.models import load_checkpoint
        from trainer.sudoku import valid
        from trainer.tokenizer import Codec

        model, tokenizer = load_checkpoint(checkpoint)
        codec = Codec(tokenizer)
        puzzle = torch.tensor([[int(digit) for digit in prompt]])
        sampled = dllm_kernels.generate(
            model,
            codec.prompt_ids(puzzle),
            length=puzzle.shape[1],
            mask_id=codec.mask_id,
            seed=resolved.seed,
            sequence_ids=noise.sequence_ids([prompt]),
            **resolved.rollout.model_dump(),
        )
        print(tokenizer.decode(sampled.completion_BL[0]))
        print("solved" if bool(valid(puzzle, codec.digits(sampled.completion_BL))[0]) else "not solved", file=sys.stderr)


@app.command("config")
def show_config(
    overrides: Overrides = None,
    config: ConfigFile = None,
    schema: Annotated[bool, typer.Option("--schema", help="The JSON schema of every key instead.")] = False,
) -> None:
    """Print the resolved configuration."""
    with _sentences():
        print(json.dumps(RunConfig.model_json_schema(), indent=1) if schema else load_config(config, overrides or ()).to_yaml())


@app.command()
def algorithms() -> None:
    """Every algorithm: paper, how surely it is that, mask law, samples, and what it needs."""
    from rich.table import Table

    from dllm_kernels.objectives import RECIPES

    table = Table("name", "paper", "arXiv", "status", "law", "samples", "needs")
    for recipe in RECIPES.values():
        wanted = {"old": recipe.needs_old, "reference": recipe.needs_reference, "trajectory": recipe.needs_trajectory}
        needs = ", ".join(name for name, needed in wanted.items() if needed) or "-"
        samples = "-" if recipe.samples is None else str(recipe.samples)
        table.add_row(recipe.name, recipe.title, recipe.arxiv, recipe.status, recipe.law, samples, needs)
    Console(width=max(console.width, 140)).print(table)


@app.command("env")
def show_environment() -> None:
    """Versions, machine, and which code runs the LM head and why."""
    from trainer.environment import environment

    for name, value in environment().items():
        print(f"{name:<15} {value if value is not None else 'none'}")


def _configure(overrides: list[str] | None, file: Path | None, out: Path | None, *, beside: Path | None = None) -> RunConfig:
    """Defaults, or the config of the run that a checkpoint lies in; then the file; then overrides and --out."""
    base = None
    if beside is not None and (beside.parent / "config.yaml").is_file():
        try:
            base = (beside.parent / "config.yaml").read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{beside.parent / 'config.yaml'} cannot be read ({first_line(error)})") from error
    return load_config(file, [*(overrides or ()), *([f"out={json.dumps(str(out))}"] if out else [])], base=base)


def _start(config: RunConfig, *, checkpoint: Path | None = None) -> None:
    from trainer.models import load_checkpoint
    from trainer.run_dir import RunDir

    start = None if checkpoint is None else load_checkpoint(checkpoint)
    folder = RunDir.create(Path(config.out))
    if folder.path != Path(config.out):
        console.print(f"{config.out} already holds files; this run goes to {folder.path}", highlight=False, soft_wrap=True)
    _execute(folder, config.model_copy(update={"out": str(folder.path)}), start)


def _reopen(path: Path) -> None:
    from trainer.demo import is_finished
    from trainer.run_dir import RunDir

    folder = RunDir.reopen(path)
    config = load_config(path / "config.yaml")
    if is_finished(folder, config):
        console.print(f"this run is finished already; its report: {path / 'report.md'}", highlight=False, soft_wrap=True)
        return
    _execute(folder, config, None)


def _execute(folder: Any, config: RunConfig, start: Any) -> None:
    from trainer.demo import Run

    go_on = f"go on with: dllm-train demo --resume {folder.path}"
    try:
        run = Run(folder, config, console, start)
        run.execute()
    except Stopped as error:
        console.print(f"stopped at {run.where()}, state saved; {go_on}", highlight=False, soft_wrap=True)
        raise typer.Exit(130) from error
    except OSError as error:
        raise UserError(
            f"a file of {folder.path} could not be written or read ({error}); what was written is kept; {go_on}"
        ) from error
    except KeyboardInterrupt as error:  # before training began, or the second Ctrl-C
        console.print(f"stopped at once; the last saved state is kept; {go_on}", highlight=False, soft_wrap=True)
        raise typer.Exit(130) from error
    finally:
        folder.close()
