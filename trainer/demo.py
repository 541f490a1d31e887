"""The run behind `dllm-train demo`, `sft` and `rl`: data, SFT, evaluation, BGPO, evaluation, report; resumable anywhere."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dllm_kernels.objectives import RECIPES
from trainer.config import OptimizerConfig, RolloutConfig, RunConfig
from trainer.environment import environment, peak_memory_mb
from trainer.errors import Stopped
from trainer.evaluation import Figures, decodings, evaluate, paired_gain
from trainer.models import build_model, load_checkpoint, parameter_count
from trainer.plots import draw_curves
from trainer.progress import bar
from trainer.report import result_table, write_report
from trainer.rl import rl_updates
from trainer.run_dir import PHASES, RunDir, State
from trainer.sft import sft_steps
from trainer.sudoku import Puzzles, SudokuTask, make_task
from trainer.tokenizer import Codec, make_tokenizer
from trainer.training import make_optimizer

_SHOWN = {"sft": ("loss", "elbo", "grad_norm"), "rl": ("reward", "valid", "elbo", "grad_norm")}


class StopRequest:
    """Ctrl-C asks the run to stop at its next consistent moment; a second one stops it at once."""

    def __init__(self) -> None:
        self.wanted = False

    def __enter__(self) -> StopRequest:
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._previous = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._main:
            signal.signal(signal.SIGINT, self._previous)

    def _note(self, _signal: int, _frame: FrameType | None) -> None:
        self.wanted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def check(self) -> None:
        if self.wanted:
            raise Stopped


def is_finished(folder: RunDir, config: RunConfig) -> bool:
    """Whether nothing is left to do: the last step's state and the report, which is written last, are there."""
    last = State("rl", config.rl.updates) if config.rl.updates else State("sft", config.sft.steps)
    saved = folder.saved_state() if (folder.path / "report.md").is_file() else None
    return saved is not None and (saved[0].phase, saved[0].step) == (last.phase, last.step)


class Run:
    """One run and its folder. `model` and `tokenizer` start it from a checkpoint; then it begins with RL."""

    def __init__(
        self,
        folder: RunDir,
        config: RunConfig,
        console: Console,
        start: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None,
    ):
        self.folder, self.config, self.console = folder, config, console
        torch.set_num_threads(config.threads)
        folder.write_text("config.yaml", config.to_yaml())
        self._optimizer_file: Path | None = None
        saved = folder.saved_state()
        if saved is not None:
            self.state, source = saved
            self.model, self.tokenizer = load_checkpoint(source)
            self._optimizer_file = source / "optimizer.pt"
        elif start is not None:
            self.state = State("sft", config.sft.steps)
            self.model, self.tokenizer = start
            folder.save_state(self.state, self.model, self.tokenizer, make_optimizer(self.model, config.sft))
        else:
            self.state = State()
            self.tokenizer = make_tokenizer()
            self.model = build_model(config.model, self.tokenizer, seed=config.seed)
        folder.rewind(self.state)

    def execute(self) -> None:
        """Everything that is not done yet. Raises Stopped at Ctrl-C, with the state saved."""
        folder, config = self.folder, self.config
        with StopRequest() as self.stop:
            folder.write_json("environment.json", environment())
            started = time.perf_counter()
            self.task: SudokuTask = make_task(config.task, seed=config.seed)
            self.codec = Codec(self.tokenizer)
            self._spend("data", started)
            tests = " and ".join(f"{len(test)} {test.name.replace('_', ' ')}" for test in self.task.tests)
            self._say(
                f"{parameter_count(self.model):,} parameters; {len(self.task.train):,} training puzzles; "
                f"tests: {tests}; files: {folder.path}"
            )
            self.stop.check()
            self._train("sft")
            if not (folder.path / "checkpoint_sft").exists():
                folder.save_model("checkpoint_sft", self.model, self.tokenizer)
            self._evaluate("eval_before.json", "after SFT")
            if config.rl.updates:
                self._train("rl")
                self._evaluate("eval_after.json", "after RL")
            folder.save_model("checkpoint", self.model, self.tokenizer)
            self._finish()

    def where(self) -> str:
        total = {"sft": self.config.sft.steps, "rl": self.config.rl.updates}[self.state.phase]
        return f"{self.state.phase} step {self.state.step} of {total}"

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

    def _spend(self, part: str, started: float) -> None:
        self.state.seconds[part] = self.state.seconds.get(part, 0.0) + time.perf_counter() - started

    def _steps(self, phase: str, optimizer: torch.optim.Optimizer) -> Iterator[dict[str, float]]:
        config, data, start = self.config, self.task.train, self.state.step
        if phase == "sft":
            return sft_steps(self.model, optimizer, data, self.codec, config.sft, seed=config.seed, start=start)
        reference = None
        if RECIPES[config.rl.algorithm].needs_reference:  # the policy with which RL began, after a resume too
            reference = load_checkpoint(self.folder.path / "checkpoint_sft")[0].requires_grad_(False)
        arguments = self.model, optimizer, data, self.codec, config.rl, config.rollout
        return rl_updates(*arguments, seed=config.seed, start=start, reference=reference)

    def _train(self, phase: str) -> None:
        if PHASES.index(self.state.phase) > PHASES.index(phase):
            return
        config, state = self.config, self.state
        section: OptimizerConfig = config.sft if phase == "sft" else config.rl
        total = config.sft.steps if phase == "sft" else config.rl.updates
        probe_every = config.evaluation.probe_every_sft if phase == "sft" else config.evaluation.probe_every_rl
        optimizer = make_optimizer(self.model, section)
        if state.phase != phase:
            state.phase, state.step = phase, 0
        elif self._optimizer_file is not None:
            self.folder.load_optimizer(optimizer, self._optimizer_file)
        name = {"sft": "supervised", "rl": "reinforcement"}[phase]
        with bar(self.console, name, total, done=state.step) as shown:
            for figures in self._steps(phase, optimizer):
                state.step += 1
                state.tokens += int(figures["tokens"])
                for key in ("seconds_rollout", "seconds_gradient") if phase == "rl" else ("seconds",):
                    part = f"{phase}{key.removeprefix('seconds')}"
                    state.seconds[part] = state.seconds.get(part, 0.0) + figures[key]
                if probe_every and state.step % probe_every == 0:
                    figures |= self._probe()
                self.folder.log({"phase": phase, "step": state.step, **figures})
                shown.advance(1, {key: figures[key] for key in _SHOWN[phase] if key in figures})
                stopping = self.stop.wanted  # read once: what stops here is saved here
                if state.step % section.save_every == 0 or state.step == total or stopping:
                    self.folder.save_state(state, self.model, self.tokenizer, optimizer)
                if stopping:
                    raise Stopped

    def _probe(self) -> dict[str, float]:
        """Accuracy on a few unseen puzzles, to be looked at only: nothing is chosen by it."""
        started = time.perf_counter()
        puzzles = self.task.unseen_puzzles.head(self.config.evaluation.probe_puzzles)
        figures = {
            f"probe_{name}": self._solve(puzzles, decoding)["valid"] for name, decoding in decodings(self.config.rollout).items()
        }
        self._spend("probes", started)
        return figures

    def _solve(self, puzzles: Puzzles, decoding: RolloutConfig, between: Callable[[int], None] | None = None) -> Figures:
        seed, batch = self.config.seed, self.config.evaluation.batch
        return evaluate(self.model, puzzles, self.codec, decoding, seed=seed, batch=batch, between=between)

    def _evaluate(self, name: str, label: str) -> None:
        if (self.folder.path / name).exists():
            return
        started = time.perf_counter()
        ways = decodings(self.config.rollout)
        with bar(self.console, f"evaluation {label}", len(ways) * sum(len(test) for test in self.task.tests)) as shown:

            def between(done: int) -> None:
                shown.advance(done)
                self.stop.check()

            sets = {
                test.name: {way: self._solve(test, decoding, between) for way, decoding in ways.items()}
                for test in self.task.tests
            }
        result = {"model": label, "at": self.where(), "seed": self.config.seed, "sets": sets, "environment": environment()}
        if name == "eval_after.json":
            before = self.folder.read_json("eval_before.json")["sets"]
            result["gain_in_valid"] = {
                test: {way: paired_gain(before[test][way], after) for way, after in by_way.items()}
                for test, by_way in sets.items()
            }
        self._spend("evaluation", started)
        self.folder.write_json(name, result)

    def _finish(self) -> None:
        folder = self.folder
        started = time.perf_counter()
        evaluations = [folder.read_json(n) for n in ("eval_before.json", "eval_after.json") if (folder.path / n).exists()]
        draw_curves(folder.metrics(), evaluations, folder.path / "curves.png")
        self._spend("report", started)
        write_report(folder, self.config, self.state, evaluations, parameters=parameter_count(self.model))
        folder.close()
        self.console.print(result_table(folder.path, self.state, evaluations, peak_mb=peak_memory_mb()))
