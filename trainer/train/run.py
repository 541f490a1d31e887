"""The run behind `dllm-kernels demo`, `sft` and `rl`: data, SFT, evaluation, RL, evaluation, report; resumable anywhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from torch import nn

from dllm_kernels.objectives import RECIPES

from .. import distributed
from ..config import OptimizerConfig, RolloutConfig, RunConfig
from ..distributed import Ranks
from ..errors import ConfigError, Stopped, UserError, visible
from ..models import compat, lora
from ..models.codec import Codec, joined
from ..models.loading import Loaded, check_place, from_scratch, load, parameter_count
from ..models.self_tests import check_mask_id, check_positions, check_rollout, shift_self_test
from ..records import samples
from ..records.checkpoints import Checkpoint, Checkpoints
from ..records.environment import environment, peak_memory_mb
from ..records.manifest import DamagedCheckpoint, verify
from ..records.plots import draw_curves, draw_unmasking
from ..records.progress import bar
from ..records.report import result_table, write_report
from ..records.resume import check_config
from ..records.run_dir import PHASES, RunDir, State
from ..records.samples import Sample
from ..records.states import load_state
from ..records.weights import save_model, verify_weights
from ..tasks import Example, Task, make_task
from ..watch import watching
from .evaluation import Figures, decodings, evaluate, is_whole, paired_gain
from .foreign_code import announce_code
from .guards import NoSignal
from .optimization import make_optimizer
from .preferences import pair_updates
from .rl import prepare_rl, rl_updates
from .served import Served
from .setup import Setup
from .sft import sft_steps
from .stop import Moments, StopRequest

_SHOWN = {"sft": ("loss", "elbo", "grad_norm"), "rl": ("reward", "correct", "elbo", "grad_norm")}
_SELF_TEST_EXAMPLES = 32
REFERENCE = "checkpoint_sft"  # the policy with which RL began


def is_finished(folder: RunDir, config: RunConfig) -> bool:
    """Whether nothing is left to do: the last step's checkpoint and the report, which is written last, are there."""
    saved = Checkpoints(folder.path / "checkpoints").latest() if (folder.path / "report.md").is_file() else None
    last = ("rl", config.rl.updates) if config.rl.updates else ("sft", config.sft.steps)
    return saved is not None and (saved.state["phase"], saved.state["step"]) == last


def prepare(config: RunConfig, task: Task, ranks: Ranks, saved: Checkpoint | None = None) -> Setup:
    """The model that a run starts with, or the one it had saved, with adapters, gradient checkpointing and sharding."""
    model_config, options = config.model, config.model.lora
    served = Served(config, ranks) if config.rollout.engine == "sglang" else None  # one that is not there is told at once
    # adapters lie beside the weights they are of
    source = model_config.checkpoint if saved is None or options.rank else str(saved.path)
    loaded: Loaded
    if source is None:
        loaded = from_scratch(model_config, task, seed=config.seed)
    else:
        if saved is None or options.rank:
            verify_weights(source)
        loaded = load(
            source,
            dtype=getattr(torch, model_config.dtype),
            trust_remote_code=model_config.trust_remote_code,
            revision=model_config.revision,
            facts=model_config.facts if saved is None else {**saved.state["facts"], **model_config.facts},
            four_bit=model_config.four_bit,
        )
    check_mask_id(loaded)
    check_positions(loaded)
    codec = Codec(loaded, task, config.prompt, config.rollout.length)
    check_rollout(config.rollout, loaded, codec.length, infills=codec.infills)
    if model_config.gradient_checkpointing:
        compat.checkpoint_blocks(loaded.model)
    trained: nn.Module = loaded.model
    if options.rank and saved is not None:
        trained = lora.load_lora(loaded.model, saved.path, trainable=True)
    elif options.rank:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)  # the same adapters on every rank
            trained = lora.add_lora(
                loaded.model, rank=options.rank, alpha=options.alpha, dropout=options.dropout, targets=options.targets
            )
    dtype = None if config.parallel.dtype is None else getattr(torch, config.parallel.dtype)
    if ranks.group is None:
        trained.to(ranks.device)
    else:
        again = config.parallel.reshard_after_forward
        distributed.shard(trained, ranks, replicas=config.parallel.replicas, dtype=dtype, reshard_after_forward=again)
    return Setup(config, loaded, task, codec, ranks, trained, served=served)


def self_test(setup: Setup) -> str:
    """The shift self-test on demonstrations, as a sentence; "" where there are none to test on."""
    examples = [example for example in setup.task.train[:_SELF_TEST_EXAMPLES] if example.answer]
    if not examples or setup.ranks.group is not None:
        return ""
    codec = setup.codec
    ids, _, real = joined(codec.prompts(examples), codec.answers(examples), setup.facts.pad_id or 0, codec.suffixes(examples))
    device = setup.ranks.device
    mask = None if real is None else real.to(device)
    return str(shift_self_test(setup.loaded, ids.to(device), seed=setup.config.seed, attention_mask_BS=mask))


def has_reference(config: RunConfig) -> bool:
    """Whether the reference policy is a model of its own: not where adapters are switched off for it."""
    rl = config.rl
    wanted = RECIPES[rl.algorithm].wants_reference(rl.options)
    return wanted and (rl.teacher is not None or not config.model.lora.rank)


def reference_model(setup: Setup, beginning: Callable[[], nn.Module]) -> nn.Module | None:
    """The teacher, or what `beginning` returns, the policy with which RL began; None where it is no model of its own."""
    config = setup.config
    teacher = config.rl.teacher
    if RECIPES[config.rl.algorithm].teacher and teacher is None:
        raise ConfigError(f"rl.teacher must name the checkpoint that {config.rl.algorithm} learns from, got null")
    if not has_reference(config):
        return None
    if teacher is None:
        model = beginning()
    else:
        own = config.model
        loaded = load(teacher, dtype=getattr(torch, own.dtype), trust_remote_code=own.trust_remote_code, facts=None)
        _check_teacher(setup, teacher, loaded)
        model = loaded.model
    model.requires_grad_(False)
    if setup.ranks.group is None:
        return model.to(setup.ranks.device)
    return distributed.shard(model, setup.ranks, replicas=config.parallel.replicas)


def _check_teacher(setup: Setup, name: str, teacher: Loaded) -> None:
    """Its scores are of the student's states: ids, mask and alignment must be the same. Raises ConfigError."""
    own, others = setup.facts, teacher.facts
    same = {
        "vocabulary": setup.loaded.tokenizer.get_vocab() == teacher.tokenizer.get_vocab(),
        "mask id": own.mask_id == others.mask_id,
        "alignment": own.shift == others.shift,
    }
    if wrong := [what for what, equal in same.items() if not equal]:
        raise ConfigError(f"rl.teacher must have the {wrong[0]} of the model that is trained, got {name}")


def autocast(setup: Setup) -> torch.autocast:
    """bf16 products over fp32 weights where one process trains; FSDP casts the parameters itself."""
    wanted = setup.config.parallel.dtype == "bfloat16" and setup.ranks.group is None
    return torch.autocast(setup.ranks.device.type, dtype=torch.bfloat16, enabled=wanted)


class Run:
    """One run and its folder. With `model.checkpoint` and no SFT steps it begins with RL."""

    def __init__(self, folder: RunDir, config: RunConfig, console: Console, ranks: Ranks | None = None):
        self.folder, self.config, self.console = folder, config, console
        self.ranks = ranks or Ranks()
        folder.tensorboard, folder.wandb = config.tensorboard, config.wandb
        torch.set_num_threads(config.threads)
        keep = config.checkpoints
        self.checkpoints = Checkpoints(
            folder.path / "checkpoints",
            self.ranks,
            keep.keep_last,
            keep.keep_best,
            keep.metric if keep.keep_best else None,
            background=keep.background,
        )
        self.moments = Moments(keep.every_minutes)
        self._saved = self.checkpoints.latest()
        self.state = State("sft", 0)
        if self._saved is not None:
            check_config(config, self._saved)
            self.state = State.read(self._saved)
        total = self._total(self.state.phase)
        if self.state.step > total:
            raise UserError(f"this run has made {self.state.step} steps of {self.state.phase} already, asked for are {total}")
        with self.ranks.together():
            if self.ranks.is_first:
                self.checkpoints.sweep()
                folder.write_text("config.yaml", config.to_yaml())
                folder.rewind(self.state, sft_steps=config.sft.steps)

    def execute(self) -> None:
        """Everything that is not done yet. Raises Stopped where a signal asks for it, with the state saved."""
        folder, config, ranks = self.folder, self.config, self.ranks
        with StopRequest(nothing_to_lose=True) as self.stop, watching(ranks, config.parallel.patience) as self._watch:
            if ranks.is_first:
                folder.write_json("environment.json", environment())
            started = time.perf_counter()
            with ranks.together():
                if ranks.is_first:
                    announce_code(config)
                if config.model.checkpoint is not None and self._saved is None:
                    check_place(config.model.checkpoint)
                if ranks.is_first and self.in_rl:
                    self._check_beginning()
            with ranks.together():
                task = make_task(config.task, seed=config.task_seed)
            with ranks.together():
                self.setup = prepare(config, task, ranks, self._saved)
                self.setup.codec.look_ahead(task, shown=config.sft.steps > 0)
            with ranks.together():
                self.setup.curriculum = self.state.curriculum
                self.setup.passes = self.state.passes
                if config.rl.updates:
                    prepare_rl(self.setup)
            self._spend("data", started)
            tests = " and ".join(f"{len(test)} {name.replace('_', ' ')}" for name, test in task.tests.items())
            self._say(
                f"{parameter_count(self.setup.trained):,} parameters; {len(task.train):,} training examples; "
                f"tests: {tests or 'none'}; files: {folder.path}"
            )
            for note in task.notes():
                self._say(note)
            if config.guard.shift_test and config.model.checkpoint is not None and (verdict := self_test(self.setup)):
                self._say(f"shift self-test: {verdict}")
            self.stop.nothing_to_lose = False
            self._train("sft")
            if not self.in_rl:  # else the weights are later ones, whatever is missing
                self._save_model(REFERENCE, again=False)
                self._evaluate("eval_before.json", "after SFT")
            if config.rl.updates:
                self._train("rl")
                self._evaluate("eval_after.json", "after RL")
            self._save_model("checkpoint", again=True)
            if self.setup.served is not None:
                self.setup.served.forget()
            self._finish()

    def where(self) -> str:
        return f"{self.state.phase} step {self.state.step} of {self._total(self.state.phase)}"

    def _total(self, phase: str) -> int:
        return self.config.sft.steps if phase == "sft" else self.config.rl.updates

    @property
    def in_rl(self) -> bool:
        """Whether the weights are no longer those with which RL began."""
        return self.state.phase == "rl" and self.state.step > 0

    def _check_beginning(self) -> None:
        """That what RL began with is as it was. Raises UserError where the reference policy is not."""
        config, folder = self.config, self.folder
        if has_reference(config) and config.rl.teacher is None:
            try:
                verify(folder.path / REFERENCE)
            except DamagedCheckpoint as error:
                raise UserError(
                    f"{error}; it is the reference policy of this run, which cannot go on without: put it back or start anew"
                ) from error
        if self.state.before is None:
            raise UserError(f"{folder.path}: its checkpoint does not hold the evaluation before RL, which cannot be made again")
        try:
            known = folder.read_json("eval_before.json")
        except UserError:
            known = None
        if known != self.state.before:
            folder.write_json("eval_before.json", self.state.before)
            self._say("eval_before.json was missing or had changed; it is restored from the checkpoint")

    def _say(self, text: str) -> None:
        if self.ranks.is_first:
            self.console.print(visible(text), highlight=False, soft_wrap=True, markup=False)

    def _spend(self, part: str, started: float) -> None:
        self.state.seconds[part] = self.state.seconds.get(part, 0.0) + time.perf_counter() - started

    def _save_model(self, name: str, *, again: bool) -> None:
        if again or not self.ranks.tell((self.folder.path / name).exists())[0]:
            save_model(self.folder.path / name, self.setup.trained, self.setup.loaded.tokenizer, self.ranks)

    def _save(self, optimizer: torch.optim.Optimizer, figures: dict[str, float]) -> None:
        number = self.state.step + (self.config.sft.steps if self.state.phase == "rl" else 0)
        state = {**asdict(self.state), "facts": asdict(self.setup.facts), "config": self.config.written()}
        numbers = {key: value for key, value in figures.items() if isinstance(value, (int, float))}
        setup = self.setup
        started = time.monotonic()
        self.checkpoints.save(number, setup.trained, setup.loaded.tokenizer, optimizer, state=state, metrics=numbers)
        self.moments.saved(time.monotonic() - started)

    def _beginning(self) -> nn.Module:
        """The policy with which RL began, after a resume too."""
        config, setup = self.config.model, self.setup
        return load(
            self.folder.path / REFERENCE,
            dtype=getattr(torch, config.dtype),
            trust_remote_code=config.trust_remote_code,
            facts=asdict(setup.facts),
        ).model

    def _steps(self, phase: str, optimizer: torch.optim.Optimizer) -> Iterator[dict[str, float]]:
        if phase == "sft":
            return sft_steps(self.setup, optimizer, start=self.state.step)
        self.setup.reference = reference_model(self.setup, self._beginning)
        updates = pair_updates if self.config.task.kind == "pairs" else rl_updates
        return updates(self.setup, optimizer, start=self.state.step)

    def _train(self, phase: str) -> None:
        if PHASES.index(self.state.phase) > PHASES.index(phase):
            return
        config, state, ranks = self.config, self.state, self.ranks
        section: OptimizerConfig = config.sft if phase == "sft" else config.rl
        total = self._total(phase)
        probe_every = config.evaluation.probe_every_sft if phase == "sft" else config.evaluation.probe_every_rl
        optimizer = make_optimizer(self.setup.trained, section)
        if state.phase != phase:
            state.phase, state.step = phase, 0
            if phase == "rl" and ranks.is_first:
                state.before = self.folder.read_json("eval_before.json")
        elif self._saved is not None:
            load_state(self._saved.path / "state", self.setup.trained, optimizer, ranks)
        name = {"sft": "supervised", "rl": "reinforcement"}[phase]
        steps = self._steps(phase, optimizer)
        saved_at = state.step
        signal = NoSignal(config.guard)
        with bar(self.console, name, total, done=state.step, shown=ranks.is_first) as shown:
            while state.step < total:
                try:
                    with autocast(self.setup):
                        figures = next(steps)
                    warning = signal.seen(figures) if phase == "rl" else ""
                except UserError:  # a guard, before the weights were touched; all ranks are told, and come here
                    if state.step != saved_at and (phase == "sft" or config.rl.inner_iterations == 1):
                        self._save(optimizer, {})
                    self.checkpoints.finish()
                    raise
                state.step += 1
                state.tokens += int(figures["tokens"])
                for key in ("seconds_rollout", "seconds_gradient") if phase == "rl" else ("seconds",):
                    part = f"{phase}{key.removeprefix('seconds')}"
                    state.seconds[part] = state.seconds.get(part, 0.0) + figures[key]
                if probe_every and state.step % probe_every == 0:
                    figures |= self._probe()
                figures["peak_memory_mb"] = peak_memory_mb()
                self._check_metric(phase, figures)
                if ranks.is_first:
                    self.folder.log({"phase": phase, "step": state.step, **figures})
                shown.advance(1, {key: figures[key] for key in _SHOWN[phase] if key in figures})
                told = ranks.tell((self.stop.code, self.moments.is_due()))  # read once: what stops here is saved here
                stopping, is_due = max(code for code, _ in told), told[0][1]
                if state.step % section.save_every == 0 or state.step == total or stopping or is_due:
                    self._save(optimizer, figures)
                    saved_at = state.step
                if stopping:
                    self.checkpoints.finish()
                    raise Stopped(stopping)
                if self._watch is not None:
                    self._watch.step_made(figures["seconds"])
                for told_once in (warning, self.moments.warning(figures["seconds"])):
                    if told_once:
                        self._say(told_once)
        self.checkpoints.finish()

    def _check_metric(self, phase: str, figures: dict[str, float]) -> None:
        """Raises UserError where the figure by which the best checkpoints are kept is none."""
        name, is_last = self.config.checkpoints.metric, phase == "rl" or not self.config.rl.updates
        probes = ("probe_greedy", "probe_rollout")  # not of every step
        if self.config.checkpoints.keep_best and is_last and "loss" in figures and name not in (*figures, *probes):
            raise UserError(f"checkpoints.metric {name} is no figure of a step; there are {', '.join((*figures, *probes))}")

    def _probe(self) -> dict[str, float]:
        """Accuracy on a few unseen examples, to be looked at only: nothing is chosen by it but the best checkpoints."""
        started = time.perf_counter()
        figures = {}
        for name, test in list(self.setup.task.tests.items())[:1]:
            examples = test[: self.config.evaluation.probe_examples]
            for way, decoding in decodings(self.config.rollout).items():
                found = self._solve(name, examples, decoding, keep=self.config.evaluation.samples * (way == "greedy"))
                self._keep(found.pop("samples", []))
                figures[f"probe_{way}"] = found["correct"]
        self._spend("probes", started)
        return figures

    def _keep(self, samples: Sequence[Sample]) -> None:
        """Answers to fixed examples, for samples.jsonl."""
        if samples and self.ranks.is_first:
            self.folder.keep([{"phase": self.state.phase, "step": self.state.step, **sample} for sample in samples])

    def _solve(
        self,
        name: str,
        examples: Sequence[Example],
        decoding: RolloutConfig,
        between: Callable[[int], None] | None = None,
        keep: int = 0,
    ) -> Figures:
        with autocast(self.setup):
            # before RL a reward is not asked: one that fails must not take away what SFT has made
            return evaluate(self.setup, name, examples, decoding, between=between, keep=keep, rewarded=self.in_rl)

    def _evaluate(self, name: str, label: str) -> None:
        if self.ranks.tell(self._has(name))[0]:
            return
        started = time.perf_counter()
        ways, tests = decodings(self.config.rollout), self.setup.task.tests
        total = len(ways) * sum(len(test) for test in tests.values())
        with bar(self.console, f"evaluation {label}", total, shown=self.ranks.is_first) as shown:

            def between(done: int) -> None:
                shown.advance(done)
                if stopping := max(self.ranks.tell(self.stop.code)):
                    raise Stopped(stopping)

            keep = self.config.evaluation.samples
            sets = {
                test: {
                    way: self._solve(test, examples, decoding, between, keep=keep * (way == "greedy"))
                    for way, decoding in ways.items()
                }
                for test, examples in tests.items()
            }
        for by_way in sets.values():
            self._keep(by_way["greedy"].pop("samples", []))
        result: dict[str, Any] = {
            "model": label,
            "at": self.where(),
            "seed": self.config.seed,
            "sets": sets,
            "environment": environment(),
        }
        if name == "eval_after.json":
            before = self.folder.read_json("eval_before.json")["sets"]
            result["gain"] = {
                test: {way: paired_gain(before[test][way], after) for way, after in by_way.items()}
                for test, by_way in sets.items()
            }
        self._spend("evaluation", started)
        if self.ranks.is_first:
            self.folder.write_json(name, result)
        self.ranks.wait()

    def _has(self, name: str) -> bool:
        """Whether this evaluation was made and is whole; one after RL is made again where there were more updates since."""
        if not (self.folder.path / name).exists():
            return False
        found, tests = self.folder.read_json(name), self.setup.task.tests
        if name == "eval_after.json":
            return is_whole(found, tests) and found.get("at") == self.where()
        if not is_whole(found, tests):
            raise UserError(
                f"{self.folder.path / name} is damaged: it lacks figures of {', '.join(tests)}; put it back or start anew"
            )
        return True

    def _finish(self) -> None:
        folder = self.folder
        if not self.ranks.is_first:
            return
        started = time.perf_counter()
        evaluations = [folder.read_json(n) for n in ("eval_before.json", "eval_after.json") if (folder.path / n).exists()]
        draw_curves(folder.metrics(), evaluations, folder.path / "curves.png")
        kept = samples.chosen(read) if (read := samples.read(folder.path / samples.NAME)) else []
        if kept:
            draw_unmasking(kept, folder.path / "unmasking.png")
        self._spend("report", started)
        write_report(folder, self.config, self.state, evaluations, parameters=parameter_count(self.setup.trained))
        folder.close()
        self.console.print(result_table(folder.path, self.state, evaluations, peak_mb=peak_memory_mb()))
