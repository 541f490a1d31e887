"""The trainer under attack: tried and survived, by kind of fault.

python benchmarks/attack.py [--seconds 600] [--seed 0] [--kinds kills,damage] [--long 12000] [--out FILE]

Survived means: a sentence and the right status, nothing lost that was logged, and a run that goes on to the weights and metrics
of one in peace, bit for bit. Cases are drawn by (kind, seed, number); those that `--out` holds already are not tried again, so a
campaign may be stopped and gone on with. Kinds take turns until the time is over. Runs are forked from this process, which has
imported everything: a case costs a second or two.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import random
import shutil
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from dllm_trainer.cli import app  # noqa: E402
from dllm_trainer.records.checkpoints import Checkpoints, latest  # noqa: E402
from dllm_trainer.records.environment import environment  # noqa: E402
from dllm_trainer.records.lock import Lock  # noqa: E402
from dllm_trainer.tasks import make_task  # noqa: E402
from dllm_trainer.tasks.config import CountdownConfig, SudokuConfig  # noqa: E402
from dllm_trainer.train.run import Run  # noqa: E402, F401 - what the command imports when it is called
from transformers import EuroBertConfig, EuroBertForMaskedLM  # noqa: E402

TINY = [
    *("threads=1", "tensorboard=false", "task.train_puzzles=100", "task.test_puzzles=2", "model.hidden_size=16"),
    *("model.layers=1", "model.heads=2", "model.intermediate_size=32", "sft.steps=3", "sft.batch=8"),
    *("sft.save_every=1", "rl.updates=3", "rl.prompts=2", "rl.group=4", "rl.samples=4", "rl.reward=rules"),
    *("rl.save_every=1", "rollout.steps=4", "evaluation.probe_every_sft=0", "evaluation.probe_every_rl=0"),
    *("checkpoints.keep_last=2",),
]
CLOCK = ("seconds", "tokens_per_second", "peak_memory_mb")
LONGEST = 120.0  # seconds of a case


class Fault(Exception):  # noqa: N818 - what a case found
    """The trainer did not survive."""


# --- runs -------------------------------------------------------------------------------------------------------------


class Child:
    """`dllm-kernels` with these arguments in a forked process, or in one for each of `world` ranks; what it prints goes to
    `log`."""

    def __init__(self, arguments: list[str], log: Path, world: int = 1) -> None:
        self.log, self.codes = log, dict[int, int | None]()
        self.started = time.monotonic()
        sys.stdout.flush()
        port = _free_port() if world > 1 else 0
        for rank in range(world):
            pid = os.fork()
            if pid == 0:
                if world > 1:
                    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
                    os.environ.update({name: str(value) for name, value in launched.items()})
                    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
                self._run(arguments)
            self.codes[pid] = None

    def _run(self, arguments: list[str]) -> None:
        code = 1
        try:
            os.setsid()
            handle = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for descriptor in (1, 2):
                os.dup2(handle, descriptor)
            app(arguments)
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    @property
    def code(self) -> int | None:
        """Of the rank that failed, else 0; None while one of them runs."""
        if None in self.codes.values():
            return None
        return next((code for code in self.codes.values() if code), 0)

    def poll(self) -> bool:
        for pid, code in self.codes.items():
            if code is None:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
        return self.code is not None

    def wait(self, until: Callable[[], bool] = lambda: False) -> int | None:
        while not self.poll() and not until():
            if time.monotonic() - self.started > LONGEST:
                self.send(signal.SIGKILL)
                raise Fault(f"no end after {LONGEST:.0f} s")
            time.sleep(0.005)
        return self.code

    def send(self, number: int) -> None:
        self.poll()
        for pid, code in self.codes.items():
            if code is None:
                os.kill(pid, number)

    def told(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def checked(child: Child, codes: tuple[int, ...]) -> None:
    """Raises Fault for another status, a traceback, or status 2 without one sentence."""
    text = child.told()
    if child.code not in codes:
        raise Fault(f"status {child.code}: {text[-300:]}")
    if "Traceback (most recent call last)" in text:
        raise Fault(f"a traceback: {text[-300:]}")
    if child.code == 2 and sum(line.startswith("dllm-kernels: ") for line in text.splitlines()) < 1:
        raise Fault(f"no sentence: {text[-300:]}")


def metrics(run: Path) -> list[dict[str, Any]]:
    try:
        text = (run / "metrics.jsonl").read_text(errors="replace")
    except FileNotFoundError:  # not yet, or a run that was refused has taken its folder away
        text = ""
    found = []
    for line in text.split("\n")[:-1]:
        try:
            found.append({key: value for key, value in json.loads(line).items() if not key.startswith(CLOCK)})
        except ValueError:
            continue
    return found


class Peace:
    """A run that nobody disturbed: what every other must end as. And a copy of it half way."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run, self.half = folder / "peace", folder / "half"
        child = Child(["demo", *TINY, "--out", str(self.run)], folder / "peace.log")
        if child.wait() != 0:
            raise SystemExit(f"the run in peace failed: {child.told()}")
        self.seconds = time.monotonic() - child.started
        self.metrics = metrics(self.run)
        self.weights = (self.run / "checkpoint" / "model.safetensors").read_bytes()
        child = Child(["demo", *TINY, "--out", str(self.half)], folder / "half.log")
        child.wait(lambda: len(metrics(self.half)) >= 5)
        child.send(signal.SIGKILL)
        child.wait()

    def finish(self, run: Path, log: Path) -> None:
        """Go on with a run to its last weights. Raises Fault where they are others."""
        child = Child(["demo", *TINY, "--out", str(run), "--resume", "auto"], log)
        child.wait(lambda: (run / "checkpoint" / "manifest.json").exists())
        if child.poll():
            checked(child, (0,))
        child.send(signal.SIGKILL)
        child.wait()
        self.compare(run)

    @functools.cached_property
    def of_two(self) -> tuple[list[dict[str, Any]], bytes]:
        """Metrics and weights of one on two ranks."""
        run = self.folder / "peace-of-two"
        child = Child(["demo", *TINY, "--out", str(run)], self.folder / "peace-of-two.log", 2)
        if child.wait() != 0:
            raise SystemExit(f"the run of two ranks in peace failed: {child.told()}")
        return metrics(run), (run / "checkpoint" / "model.safetensors").read_bytes()

    def compare(self, run: Path) -> None:
        if metrics(run) != self.metrics:
            raise Fault("the metrics are not those of the run in peace")
        if (run / "checkpoint" / "model.safetensors").read_bytes() != self.weights:
            raise Fault("the weights are not those of the run in peace")


# --- kinds of attack: case(peace, folder, draw) raises Fault -----------------------------------------------------------


def kills(peace: Peace, folder: Path, draw: random.Random) -> None:
    """kill -9 one to three times at any moment from start to end."""
    run = folder / "run"
    for number in range(draw.randint(1, 3)):
        child = Child(["demo", *TINY, "--out", str(run), "--resume", "auto"], folder / f"{number}.log")
        end = time.monotonic() + draw.uniform(0, peace.seconds)
        child.wait(lambda end=end: time.monotonic() > end)  # type: ignore[misc]
        child.send(signal.SIGKILL)
        child.wait()
        if child.code not in (0, -signal.SIGKILL):
            raise Fault(f"status {child.code}: {child.told()[-300:]}")
    peace.finish(run, folder / "end.log")


def signals(peace: Peace, folder: Path, draw: random.Random) -> None:
    """A signal at any moment; its state is saved and nothing that was logged is lost."""
    number = draw.choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGQUIT])
    run = folder / "run"
    child = Child(["demo", *TINY, "--out", str(run)], folder / "1.log")
    wanted = draw.randint(0, len(peace.metrics))
    child.wait(lambda: len(metrics(run)) >= wanted and (run / "environment.json").exists())
    time.sleep(draw.uniform(0, 0.1))
    child.send(number)
    child.wait()
    checked(child, (0, 130 if number == signal.SIGINT else 75))
    found = latest(run / "checkpoints")
    if len(metrics(run)) != (0 if found is None else found.step):
        raise Fault(f"{len(metrics(run))} steps are logged, {found and found.step} are saved")
    peace.finish(run, folder / "end.log")


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "missing": lambda file, draw: file.unlink(),
    "empty": lambda file, draw: file.write_bytes(b""),
    "cut": lambda file, draw: file.write_bytes(file.read_bytes()[: draw.randrange(max(1, file.stat().st_size))]),
    "flip": lambda file, draw: file.write_bytes(_flipped(file.read_bytes(), draw)),
    "garbage": lambda file, draw: file.write_bytes(draw.randbytes(file.stat().st_size)),
    "other JSON": lambda file, draw: file.write_text(
        draw.choice(["[]", "{}", "null", '{"files": {}}', '{"step": "x"}', "1e999"])
    ),
}


def _flipped(data: bytes, draw: random.Random) -> bytes:
    if not data:
        return b"\x00"
    place = draw.randrange(len(data))
    return data[:place] + bytes([data[place] ^ (1 << draw.randrange(8))]) + data[place + 1 :]


def damage(peace: Peace, folder: Path, draw: random.Random) -> None:
    """A file of a run half way is damaged: the run ends as in peace, or says what is wrong and leaves the rest alone."""
    run = folder / "run"
    shutil.copytree(peace.half, run)
    file = draw.choice(sorted(path for path in run.rglob("*") if path.is_file() and path.name != ".lock"))
    way = draw.choice(list(DAMAGES))
    DAMAGES[way](file, draw)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    child = Child(["demo", "--resume", str(run)], folder / "1.log")
    child.wait(lambda: (run / "checkpoint" / "manifest.json").exists())
    what = f"{file.relative_to(run)} {way}"
    try:
        if child.poll() and child.code != 0:
            checked(child, (2,))
            for path, content in before.items():
                if "events" not in path.name and path.name not in ("environment.json", "config.yaml", "history.jsonl"):
                    now = path.read_bytes() if path.exists() else b""
                    if now != content and len(metrics(run)) < len([r for r in peace.metrics if r in metrics(run)]):
                        raise Fault(f"{path.name} changed")
            return
        child.send(signal.SIGKILL)
        child.wait()
        if file.name == "metrics.jsonl":  # what was logged is damaged itself; the steps from here on are those of peace
            if (run / "checkpoint" / "model.safetensors").read_bytes() != peace.weights:
                raise Fault("the weights are not those of the run in peace")
            if "lacks" not in child.told() and "unreadable" not in child.told() and metrics(run) != peace.metrics:
                raise Fault("lost lines are not told")
            return
        peace.compare(run)
    except Fault as fault:
        raise Fault(f"{what}: {fault}") from fault


def two(peace: Peace, folder: Path, draw: random.Random) -> None:
    """A second process in the folder of a run."""
    run = folder / "run"
    first = Child(["demo", *TINY, "--out", str(run)], folder / "1.log")
    wanted = draw.randint(1, 4)
    first.wait(lambda: len(metrics(run)) >= wanted)
    second = Child(["demo", *TINY, "--out", str(run), "--resume", "auto"], folder / "2.log")
    second.wait()
    finished = first.poll()
    checked(second, (0, 2) if finished else (2,))
    first.wait(lambda: (run / "checkpoint" / "manifest.json").exists())
    first.send(signal.SIGKILL)
    first.wait()
    peace.compare(run)
    Lock(run).release()  # the lock of the first is gone with it


VALUES = (
    "-1",
    "0",
    "1e999",
    "nan",
    "x",
    "[]",
    "[x]",
    "{}",
    "null",
    "true",
    "''",
    "9" * 5000,
    "1.5",
    "\\u0000",
    "${seed}",
    "${oc.env:NONE}",
)


def inputs(peace: Peace, folder: Path, draw: random.Random) -> None:
    """Any value for any key, and data files of any content: refused in a sentence before a step, or a run."""
    from dllm_trainer.config import allowed_keys

    if draw.random() < 0.6:
        key = draw.choice([key for key in allowed_keys() if not key.endswith("*") and key != "out"])
        keys = [f"{key}={draw.choice(VALUES)}"]
    else:
        good = b'{"prompt": "1", "answer": "2"}\n'
        bad = draw.choice(
            [b"", b"{", b"[1]", b"\x00", b"\xff", b"[" * 9999, b'{"prompt": 1}', b'{"prompt": "\\ud800", "answer": "1"}']
        )
        name = f"d{draw.choice(['.jsonl', '.csv', '.parquet', '.txt'])}"
        (folder / name).write_bytes(_flipped(good * 3 + bad, draw) if draw.random() < 0.5 else good + bad)
        keys = ["task.kind=file", f"task.train={folder / name}", "model.checkpoint=/nowhere"]
    tiny = [key for key in TINY if not key.startswith("task.")] if "task.kind=file" in keys else TINY
    run = folder / "run"
    child = Child(["demo", *tiny, *keys, "--out", str(run)], folder / "1.log")
    child.wait(lambda: len(metrics(run)) >= 4)
    if child.poll():
        try:
            checked(child, (0, 2))
        except Fault as fault:
            raise Fault(f"{keys[-1][:80]}: {fault}") from fault
    child.send(signal.SIGKILL)
    child.wait()


PIECES = (
    *("<answer>", "</answer>", "<reasoning>\n", "\n</reasoning>\n", "(", ")", "1", "0", "+", "*", "/", "**", "=", "\n", " "),
    *("\\boxed{", "}", "\\frac", "\x1b[2J", "\ud800", "\x00", "9" * 5000, "é", "[MASK]", "1e309", "-", "_", ".", ",", "'", '"'),
)
_TASKS: list[Any] = []


def answers(peace: Peace, folder: Path, draw: random.Random) -> None:
    """A hundred hostile completions for every reward of the tasks: finite numbers, in time."""
    if not _TASKS:
        _TASKS.extend(
            make_task(config, seed=0)
            for config in (
                SudokuConfig(train_puzzles=20, test_puzzles=2),
                SudokuConfig(style="words", train_puzzles=20, test_puzzles=2),
                CountdownConfig(train_problems=20, test_problems=2),
                CountdownConfig(style="words", train_problems=20, test_problems=2),
            )
        )
    task = draw.choice(_TASKS)
    examples = [draw.choice(task.train) for _ in range(100)]
    texts = ["".join(draw.choice(PIECES) for _ in range(draw.randint(0, 30))) for _ in range(99)]
    texts.append(draw.choice(PIECES) * 100_000)
    for name, reward in (*task.rewards.items(), ("correct", task.correct), *task.metrics.items()):
        started = time.process_time()  # others share the machine
        try:
            reward(examples, texts)
        except Exception as error:
            raise Fault(f"{task.name} {name}: {type(error).__name__} {str(error)[:200]}") from error
        if (seconds := time.process_time() - started) > 10:
            raise Fault(f"{task.name} {name}: {seconds:.1f} s")


def resumes(peace: Peace, folder: Path, draw: random.Random) -> None:
    """An algorithm in a dtype, with adapters or without, on one or two ranks, in peace and stopped once: the same metrics and
    weights."""
    algorithm = draw.choice(["bgpo", "espo", "diffu_grpo", "wd1", "gdpo", "dmpo", "vrpo", "spg"])
    keys = [
        f"rl.algorithm={algorithm}",
        f"model.dtype={draw.choice(['float32', 'bfloat16'])}",
        "rl.gap_bound=100.0",
        "rl.samples=12",
    ]
    if draw.random() < 0.4:
        keys += ["rl.inner_iterations=2"] if draw.random() < 0.5 else ["sft.micro_batch=3"]
    if draw.random() < 0.5:
        keys += ["model.lora.rank=2"]
    world = draw.choice([1, 2])
    ends = []
    for name in ("whole", "cut"):
        run = folder / name
        child = Child(["demo", *TINY, *keys, "--out", str(run)], folder / f"{name}.log", world)
        if name == "cut":
            wanted = draw.randint(1, 5)
            child.wait(lambda wanted=wanted, run=run: len(metrics(run)) >= wanted)  # type: ignore[misc]
            child.send(draw.choice([signal.SIGTERM, signal.SIGKILL]))
            child.wait()
            child = Child(["demo", "--resume", str(run)], folder / "again.log", world)
        child.wait(lambda run=run: (run / "checkpoint" / "manifest.json").exists())  # type: ignore[misc]
        if child.poll():
            checked(child, (0,))
        child.send(signal.SIGKILL)
        child.wait()
        weights = {file.name: file.read_bytes() for file in sorted((run / "checkpoint").glob("*.safetensors"))}
        ends.append((metrics(run), weights))
    if ends[0] != ends[1] or not weights:
        raise Fault(f"{' '.join(keys)} on {world} ranks: not bit-equal")


def ranks(peace: Peace, folder: Path, draw: random.Random) -> None:
    """One of two ranks is killed, or stands still, at any moment: the other says so and ends, and both go on to the same end."""
    run, victim, number = folder / "run", draw.randrange(2), draw.choice([signal.SIGKILL, signal.SIGSTOP])
    child = Child(["demo", *TINY, "parallel.patience=5", "--out", str(run)], folder / "1.log", 2)
    wanted = draw.randint(1, len(peace.metrics) - 1)
    child.wait(lambda: len(metrics(run)) >= wanted)
    time.sleep(draw.uniform(0, 0.1))
    pids = list(child.codes)
    if not child.poll() and child.codes[pids[victim]] is None:
        os.kill(pids[victim], number)
        hit = time.monotonic()
        child.wait(lambda: child.codes[pids[1 - victim]] is not None)
        seconds, other = time.monotonic() - hit, child.codes[pids[1 - victim]]
        if seconds > 30:
            raise Fault(f"the other rank ended after {seconds:.0f} s")
        names = (
            [f"rank {victim} has not", "whoever keeps the ranks' store, has not"]
            if number == signal.SIGSTOP
            else ["another rank has"]
        )
        if other != 0 and not any(name in child.told() for name in names):
            raise Fault(f"no sentence: {child.told()[-300:]}")
        if "Traceback (most recent call last)" in child.told():
            raise Fault(f"a traceback: {child.told()[-300:]}")
    child.send(signal.SIGKILL)
    child.wait()
    child = Child(["demo", "--resume", str(run)], folder / "2.log", 2)
    child.wait(lambda: (run / "checkpoint" / "manifest.json").exists())
    if child.poll():
        checked(child, (0,))
    child.send(signal.SIGKILL)
    child.wait()
    if (metrics(run), (run / "checkpoint" / "model.safetensors").read_bytes()) != peace.of_two:
        raise Fault(f"{number.name} of rank {victim}: not bit-equal")


def long_run(folder: Path, updates: int) -> dict[str, Any]:
    """Memory and open files of a run of so many updates, at every tenth of it, as the kernel counts them."""
    run = folder / "long"
    keys = [f"rl.updates={updates}", "rl.save_every=500"]
    child = Child(["demo", *TINY, *keys, "--out", str(run)], folder / "long.log")
    process, marks = Path("/proc") / str(next(iter(child.codes))), list[dict[str, float]]()
    while not child.poll() and len(marks) < 11:
        seen = _last_update(run / "metrics.jsonl")
        if seen >= len(marks) * updates / 10 and seen >= min(100, updates / 20):
            resident = int((process / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
            marks.append({"update": seen, "resident_mib": resident, "handles": len(list((process / "fd").iterdir()))})
            print(marks[-1], flush=True)
        time.sleep(0.05)
    child.send(signal.SIGKILL)
    child.started = time.monotonic()
    child.wait()
    if len(marks) < 11:
        raise Fault(f"the long run ended after update {_last_update(run / 'metrics.jsonl')}: {child.told()[-300:]}")
    return {"updates": updates, "marks": marks}


def _last_update(file: Path) -> int:
    if not file.exists():
        return 0
    with file.open("rb") as lines:
        lines.seek(max(0, file.stat().st_size - 65536))
        whole = lines.read().split(b"\n")[:-1]
    last = json.loads(whole[-1]) if whole else {}
    return int(last["step"]) if last.get("phase") == "rl" else 0


def stall(folder: Path, saves: int = 5) -> dict[str, Any]:
    """Seconds that a run waits for a save of 29 million fp32 parameters and AdamW's two moments, and until it is on the disk."""
    sizes = {"vocab_size": 8192, "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 1024}
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id"), 0)
    model = EuroBertForMaskedLM(EuroBertConfig(**sizes, **ids))
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    found: dict[str, Any] = {"parameters": sum(parameter.numel() for parameter in model.parameters())}
    for background in (False, True):
        keeper = Checkpoints(folder / f"{background}", keep_last=2, background=background)
        waited, until_written = [], []
        for step in range(saves):
            started = time.monotonic()
            keeper.save(step, model, None, optimizer)
            waited.append(time.monotonic() - started)
            keeper.finish()
            until_written.append(time.monotonic() - started)
        name = "background" if background else "foreground"
        found[name] = {"stall_seconds": sorted(waited), "written_seconds": sorted(until_written)}
        print(f"{name}: waits {statistics.median(waited):.2f} s of {statistics.median(until_written):.2f} s", flush=True)
    return found


KINDS = {case.__name__: case for case in (kills, signals, damage, two, ranks, inputs, answers, resumes)}
EACH = {"answers": 100}  # of what is counted, in one case


# --- the campaign -----------------------------------------------------------------------------------------------------


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


@contextmanager
def scratch() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="attack-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "attack-cpu.json")
    parser.add_argument("--long", type=int, metavar="UPDATES", help="first one run of so many updates, and the stall of saving")
    options = parser.parse_args()
    chosen = options.kinds.split(",")
    if unknown := sorted(set(chosen) - set(KINDS)):
        parser.error(f"--kinds: {', '.join(unknown)} is unknown; there are {', '.join(KINDS)}")
    result: dict[str, Any] = {"seed": options.seed, "kinds": {}, "faults": []}
    if options.out.is_file():
        result = json.loads(options.out.read_text())
        if result["seed"] != options.seed:
            parser.error(f"--seed: {options.out} is of seed {result['seed']}, got {options.seed}; give another --out")
    end = time.monotonic() + options.seconds
    with scratch() as folder:
        peace = Peace(folder)
        if options.long:
            result["stall"] = stall(folder)
            result["long"] = long_run(folder, options.long)
            options.out.write_text(json.dumps(result, indent=1) + "\n")
        for kind in itertools.cycle(chosen):
            if time.monotonic() > end:
                break
            count = result["kinds"].setdefault(kind, {"tried": 0, "survived": 0})
            number = count["tried"] // EACH.get(kind, 1)
            case = folder / f"{kind}-{number}"
            case.mkdir()
            count["tried"] += EACH.get(kind, 1)
            try:
                KINDS[kind](peace, case, random.Random(f"{kind}/{options.seed}/{number}"))
                count["survived"] += EACH.get(kind, 1)
            except Fault as fault:
                result["faults"].append({"kind": kind, "number": number, "what": str(fault)})
                print(f"{kind} {number}: {fault}", flush=True)
            shutil.rmtree(case, ignore_errors=True)
            result["environment"] = environment()
            options.out.write_text(json.dumps(result, indent=1) + "\n")
    for kind, count in result["kinds"].items():
        print(f"{kind:<10} {count['tried']:>7,} tried {count['survived']:>7,} survived")
    sys.exit(1 if result["faults"] else 0)


if __name__ == "__main__":
    main()
