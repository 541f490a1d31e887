"""What a run promises against files, signals and neighbours: nothing runs unasked, nothing is lost, nothing changes in silence.

The long campaigns are `benchmarks/attack.py`; these are one case of each kind.
"""

import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from dllm_trainer.cli import app
from dllm_trainer.config import load_config
from dllm_trainer.errors import GuardError, Stopped, UserError
from dllm_trainer.records.lock import Lock
from dllm_trainer.tasks import Example, d1_compat, shaping
from dllm_trainer.tasks.rewards import checked, load_reward
from dllm_trainer.train.run import Run
from dllm_trainer.train.stop import IN_TIME, Moments
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from tests.trainer.conftest import TINY, lines, new_run, resumed
from tests.trainer.train.test_run import stop_after

ROOT = Path(__file__).parents[2]
FEW = [
    "sft.steps=2",
    "rl.updates=2",
    "evaluation.probe_every_sft=0",
    "evaluation.probe_every_rl=0",
    "tensorboard=false",
    "task.test_puzzles=2",
]


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def told(result: Result, words: str) -> None:
    assert result.exit_code == 2, (result.output, result.exception)
    (sentence,) = (line for line in result.output.splitlines() if line.startswith("dllm-kernels: "))
    assert re.search(words, sentence), sentence


@pytest.fixture(scope="module")
def halfway(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run stopped after its first update of two."""
    out = tmp_path_factory.mktemp("halfway") / "demo"
    run = new_run(out, *FEW)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, run, "rl", 1)
        with pytest.raises(Stopped):
            run.execute()
    run.folder.close()
    return out


@pytest.fixture
def copy(halfway: Path, tmp_path: Path) -> Path:
    shutil.copytree(halfway, tmp_path / "demo")
    return tmp_path / "demo"


# --- nothing runs unasked ---------------------------------------------------------------------------------------------


def rewritten(run: Path, **keys: object) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    for key, value in keys.items():
        section, _, name = key.partition("__")
        config[section][name] = value
    (run / "config.yaml").write_text(yaml.safe_dump(config))


@pytest.fixture
def evil(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint whose folder brings code, and a config beside it that trusts this code; `ran` appears where it is run."""
    run = tmp_path / "evil"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "checkpoints")
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom transformers import EuroBertForMaskedLM\n"
    code += "class Evil(EuroBertForMaskedLM): pass\n"
    (run / "checkpoint" / "modeling_evil.py").write_text(code)
    (tmp_path / "evil_reward.py").write_text(code + "def f(examples, completions): return [1.0 for _ in completions]\n")
    config = json.loads((run / "checkpoint" / "config.json").read_text())
    config |= {"auto_map": {"AutoModelForMaskedLM": "modeling_evil.Evil"}, "architectures": ["Evil"], "model_type": "eurobert"}
    (run / "checkpoint" / "config.json").write_text(json.dumps(config))
    rewritten(run, model__trust_remote_code=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    return run


COMMANDS = (["eval"], ["generate", "--prompt", "1234341221434321="], ["rl", "--out", "rl"], ["compare", "--out", "compare"])


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_checkpoints_folder_cannot_say_that_its_own_code_is_trusted(command: list[str], evil: Path) -> None:
    told(call(command[0], "--checkpoint", evil / "checkpoint", *command[1:]), "brings modelling code of its own; read it")
    assert not (evil.parent / "ran").exists()


@pytest.mark.parametrize(("command", "key"), [("rl", "rl__reward"), ("compare", "rl__reward")])
def test_a_checkpoints_folder_cannot_name_a_function_to_run(command: str, key: str, evil: Path) -> None:
    rewritten(evil, **{key: "evil_reward:f"})
    said = rf"config.yaml says {key.replace('__', '.')}=evil_reward:f, which would run that function; give"
    told(call(command, "--checkpoint", evil / "checkpoint", "--out", "new"), said)
    assert not (evil.parent / "ran").exists()


def test_a_checkpoints_folder_cannot_read_the_environment(evil: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "swordfish")
    rewritten(evil, task__train_file="hub:${oc.env:SECRET}:x")
    result = call("eval", "--checkpoint", evil / "checkpoint")
    told(result, r"says task.train_file=hub:\$\{oc.env:SECRET\}:x, which is to be filled in here")
    assert "swordfish" not in result.output


def test_code_that_the_user_allows_is_named_with_its_digest(evil: Path) -> None:
    keys = ["model.trust_remote_code=true", "task.test_puzzles=2"]
    result = call("eval", "--checkpoint", evil / "checkpoint", *keys)
    assert (evil.parent / "ran").exists(), result.output
    assert re.search(r"this run executes the code that .* brings: .*modeling_evil.py \(sha256 [0-9a-f]{16}\)", result.output)


class Planted:
    """A pickle that leaves a file where it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (str(self.mark), "w")


def reseal(folder: Path) -> None:
    from dllm_trainer.records.manifest import MANIFEST, seal

    (folder / MANIFEST).unlink(missing_ok=True)
    seal(folder)


@pytest.mark.filterwarnings("ignore:.*trying the one before it")
@pytest.mark.parametrize("everywhere", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_pickle_in_any_file_of_a_run_is_never_read_as_one(everywhere: bool, halfway: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    saved, state = "checkpoints/step-00000003", "checkpoints/step-00000003/state"
    names = [f"{saved}/trainer_state.json", f"{state}/rank-00000.safetensors", f"{state}/.metadata", f"{saved}/pytorch_model.bin"]
    if everywhere:
        names += sorted(str(file.relative_to(halfway)) for file in halfway.rglob("*") if file.is_file())
    for number, name in enumerate(names):
        run = tmp_path / str(number)
        shutil.copytree(halfway, run)
        (run / name).write_bytes(pickle.dumps(Planted(mark)))
        for folder in (*run.glob("checkpoints/step-*"), run / "checkpoint_sft"):
            if folder in (run / name).parents and not name.endswith("manifest.json"):
                reseal(folder)
        call("rl", "--resume", run)
        assert not mark.exists(), name
    pickle.loads(pickle.dumps(Planted(mark))).close()
    assert mark.exists(), "the plant works"


# --- one process a folder ---------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.name != ".lock"}


def test_a_second_process_is_told_who_works_here_and_changes_nothing(copy: Path) -> None:
    lock, before = Lock(copy), contents(copy)
    told(call("demo", "--resume", copy), rf"{copy} is in use by process {os.getpid()} on \S+ since \S+; nothing was changed")
    assert contents(copy) == before
    lock.release()
    assert not (copy / ".lock").exists()


def test_the_lock_of_a_process_that_died_holds_nobody(tmp_path: Path) -> None:
    code = "import os, sys, pathlib, dllm_trainer.records.lock as lock; lock.Lock(pathlib.Path(sys.argv[1])); os._exit(9)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=False)
    assert (tmp_path / ".lock").exists()
    lock = Lock(tmp_path)
    with pytest.raises(UserError, match="is in use by process"):
        Lock(tmp_path)
    lock.release()


# --- signals ----------------------------------------------------------------------------------------------------------


OTHERS = [pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGHUP, signal.SIGQUIT)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, *OTHERS])
def test_every_signal_saves_and_exits_with_75(number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dllm_trainer import cli
    from dllm_trainer.distributed import Ranks

    run = new_run(tmp_path / "demo", *FEW, "rl.save_every=100", "checkpoints.background=true")
    log = run.folder.log

    def send(record: dict[str, float]) -> None:
        log(record)
        if (record["phase"], record["step"]) == ("rl", 1):
            os.kill(os.getpid(), number)

    monkeypatch.setattr(run.folder, "log", send)
    monkeypatch.setattr("dllm_trainer.train.run.Run", lambda *_: run)
    monkeypatch.setattr(cli, "console", run.console)
    around = signal.signal(number, signal.SIG_DFL)  # under nohup SIGHUP is ignored, by a run as well
    try:
        with pytest.raises(SystemExit) as stopped:
            cli._execute(run.folder, run.config, Ranks(), new=True, changed={})
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, around)
    assert stopped.value.code == 75
    assert resumed(tmp_path / "demo").where() == "rl step 1 of 2"


@pytest.mark.slow
def test_a_signal_before_the_first_step_ends_the_run_at_once(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "trainer", "demo", *TINY, "task.train_puzzles=40000", "--out", str(tmp_path / "demo")]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "demo" / "environment.json").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 75, errors
    assert "Traceback" not in errors
    assert "go on with: dllm-kernels demo --resume" in output


def test_a_checkpoint_is_due_by_the_clock_too(tmp_path: Path) -> None:
    run = new_run(tmp_path / "demo", *FEW, "rl.updates=0", "sft.save_every=1000", "sft.steps=3")
    run.moments._every = 0.0
    saved: list[int] = []
    save = run.checkpoints.save
    run.checkpoints.save = lambda step, *a, **k: (saved.append(step), save(step, *a, **k))[1]  # type: ignore[method-assign]
    run.execute()
    assert saved == [1, 2, 3]


def test_a_stop_that_may_take_too_long_is_told_once() -> None:
    moments = Moments(None)
    assert moments.warning(IN_TIME) == "", "nothing was saved yet"
    moments.saved(4.0)
    assert "takes up to 24 s here" in moments.warning(3.0), "the longest step and the longest save"
    assert moments.warning(99.0) == ""


# --- resume is exact, or refused --------------------------------------------------------------------------------------


def test_the_weights_have_the_dtype_that_was_asked_for_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = (*FEW, "model.dtype=bfloat16", "rl.algorithm=espo", "rl.gap_bound=100.0", "rl.samples=4")
    whole = new_run(tmp_path / "whole", *options)
    whole.execute()
    assert {p.dtype for p in whole.setup.trained.parameters()} == {torch.bfloat16}
    run: Run = new_run(tmp_path / "cut", *options)
    for phase in ("sft", "rl"):
        stop_after(monkeypatch, run, phase, 1)
        with pytest.raises(Stopped):
            run.execute()
        run = resumed(tmp_path / "cut")
    run.execute()
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    ours, theirs = (load_file(tmp_path / name / "checkpoint" / "model.safetensors") for name in ("cut", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", [shutil.rmtree, lambda folder: flip(folder / "model.safetensors")], ids=["lost", "flipped"])
def test_a_reference_policy_that_is_not_the_one_of_the_start_stops_the_run(
    damage: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run(tmp_path / "demo", *FEW, "rl.algorithm=espo")
    stop_after(monkeypatch, run, "rl", 1)
    with pytest.raises(Stopped):
        run.execute()
    run.folder.close()
    damage(tmp_path / "demo" / "checkpoint_sft")
    told(call("demo", "--resume", tmp_path / "demo"), "it is the reference policy of this run, which cannot go on without")


def test_the_evaluation_before_rl_is_restored_and_never_made_of_later_weights(copy: Path) -> None:
    before = json.loads((copy / "eval_before.json").read_text())
    (copy / "eval_before.json").unlink()
    shutil.rmtree(copy / "checkpoint_sft")
    result = call("demo", "--resume", copy)
    assert result.exit_code == 0, result.output
    assert "eval_before.json was missing or had changed; it is restored from the checkpoint" in result.output
    assert json.loads((copy / "eval_before.json").read_text()) == before
    assert not (copy / "checkpoint_sft").exists(), "later weights under the name of those of the start"


@pytest.mark.slow
def test_lost_lines_of_the_metrics_are_counted(copy: Path) -> None:
    file = copy / "metrics.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[1:]))
    result = call("demo", "--resume", copy)
    assert result.exit_code == 0, result.output
    assert "metrics.jsonl lacks 1 of the 3 steps that were made" in result.output


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["rollout.block_length=5"], r"rollout.block_length must divide length=16, got 5"),
        (["rollout.steps=3", "rollout.block_length=8"], r"rollout.steps must be a multiple of the 2 blocks"),
        (["rollout.block_length=null"], r"rollout.block_length must be given for sampler='llada', got None"),
        (["rollout.cache=true"], r"rollout.cache is for the blocks of samplers sdar and llada2, got llada"),
        (["rollout.sampler=sdar", "rollout.cache=true"], r"rollout.cache must be false for EuroBertForMaskedLM"),
        (["rl.algorithm=[x]"], r"rl.algorithm must be a valid string"),
    ],
)
def test_what_can_be_checked_is_checked_before_training(keys: list[str], words: str, tmp_path: Path) -> None:
    told(call("demo", *TINY, "rollout.steps=16", *keys, "--out", tmp_path / "demo"), words)
    assert not (tmp_path / "demo").exists()


def test_a_metric_that_no_step_has_is_told_at_the_first(tmp_path: Path) -> None:
    keys = ["sft.steps=0", "rl.updates=2", "checkpoints.keep_best=1", "checkpoints.metric=rewards"]
    told(
        call("demo", *TINY, *keys, "--out", tmp_path / "demo"),
        r"checkpoints.metric rewards is no figure of a step; there are .*reward, ",
    )


@pytest.mark.slow
def test_resume_takes_what_may_change_and_notes_it(copy: Path) -> None:
    result = call("demo", "--resume", copy, "rl.updates=3", "rl.lr=1e-4", "checkpoints.keep_last=2")
    assert result.exit_code == 0, result.output
    assert lines(copy)[-1]["step"] == 3
    (entry,) = map(json.loads, (copy / "history.jsonl").read_text().splitlines())
    assert entry["at"] == "rl step 1 of 3"
    assert entry["changed"] == {"rl.updates": [2, 3], "rl.lr": [0.0005, 0.0001], "checkpoints.keep_last": [1, 2]}
    again = call("demo", "--resume", copy, "rl.updates=4")
    assert again.exit_code == 0, again.output
    assert json.loads((copy / "eval_after.json").read_text())["at"] == "rl step 4 of 4", "the evaluation is of the last weights"


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["seed=1"], r"--resume cannot change seed \(0 -> 1\); what may change are sft.steps, rl.updates"),
        (["rl.lr=1e-4", "rl.group=8"], r"--resume cannot change rl.group \(4 -> 8\)"),
        (["sft.steps=5"], r"sft.steps cannot change any more"),
        (["rl.updates=0"], r"has made 1 steps of rl already, asked for are 0"),
    ],
)
def test_resume_refuses_by_name_what_must_not_change(keys: list[str], words: str, copy: Path) -> None:
    before = contents(copy)
    told(call("demo", "--resume", copy, *keys), words)
    assert contents(copy) == before


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda text: text.replace("group: 4", "group: 8"), r"config.yaml differs from the config of .* in rl.group \(4 -> 8\)"),
        (lambda text: text[: text.index("evaluation:")], r"config.yaml .*cannot be used: evaluation is missing"),
        pytest.param(lambda text: text[: text.index("checkpoints:")], None, marks=pytest.mark.slow),
        (lambda text: "", r"config.yaml .*cannot be used: .*seed is missing"),
        (lambda text: "[" * 5000, r"config.yaml .*cannot be used: .*config.yaml is nested too deeply"),
        (lambda text: text + "later: 1\n", r"unknown config key later"),
    ],
)
def test_a_config_that_is_not_that_of_the_checkpoint_is_told_key_by_key(
    damage: Callable[[str], str], words: str | None, copy: Path
) -> None:
    (copy / "config.yaml").write_text(damage((copy / "config.yaml").read_text()))
    if words is None:  # defaults of keys that may change
        assert call("demo", "--resume", copy).exit_code == 0
    else:
        told(call("demo", "--resume", copy), words)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_link_is_neither_followed_where_we_write_nor_deleted(copy: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (newest,) = (copy / "checkpoints").iterdir()
    newest.rename(elsewhere)
    newest.symlink_to(elsewhere)
    (tmp_path / "precious").write_text("mine")
    (copy / ".config.yaml.part").symlink_to(tmp_path / "precious")
    leftover = copy / "checkpoints" / ".step-00000002.part"
    leftover.mkdir()
    result = call("demo", "--resume", copy)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "precious").read_text() == "mine"
    assert (elsewhere / "manifest.json").is_file()
    assert not leftover.exists()


def test_what_is_read_from_the_environment_is_not_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "swordfish")
    config = load_config(overrides=["wandb=${oc.env:SECRET}", f"out={tmp_path}"])
    assert config.wandb == "swordfish"
    assert "swordfish" not in config.to_yaml()
    assert load_config(base=config.to_yaml()) == config


# --- texts ------------------------------------------------------------------------------------------------------------

PIECES = ("<reasoning>", "</reasoning>", "<answer>", "</answer>", "\n", " ", "a", "\n</answer>\n")


def test_layouts_are_what_the_regular_expressions_say_but_in_linear_time() -> None:
    draw = random.Random(0)
    strict = re.compile(r"<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?\n</answer>\s*", re.DOTALL)
    soft = re.compile(r"\s*<reasoning>.*?</reasoning>\s*<answer>.*?</answer>", re.DOTALL)
    of_d1 = re.compile(r"<reasoning>.*?</reasoning>\s*<answer>.*?</answer>")
    tagged = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
    whole = "<reasoning>\na\n</reasoning>\n<answer>\na\n</answer>\n"
    example = Example("0", "")
    for _ in range(4000):
        text = "".join(draw.choice(PIECES) for _ in range(draw.randrange(12)))
        if draw.random() < 0.5:
            place = draw.randrange(len(whole))
            text = whole[:place] + draw.choice(PIECES) + whole[place + draw.randrange(3) :]
        assert shaping._strict(text) == float(strict.fullmatch(text) is not None), text
        assert shaping._soft(text) == float(soft.match(text) is not None), text
        assert d1_compat._soft(example, text) == 0.5 * float(of_d1.match(text) is not None), text
        assert d1_compat._tagged(text) == tagged.findall(text), text
    started = time.process_time()
    for piece in (*PIECES, "</reasoning><answer>", "\n</reasoning>\n<answer>\n"):
        text = ("<reasoning>\n" + piece * (1_000_000 // len(piece)))[:1_000_000]
        shaping.layout([example], [text])
        d1_compat._soft(example, text.replace("\n", " "))
        d1_compat._tagged(text)
    assert time.process_time() - started < 5, "a megabyte takes milliseconds"


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["seed=" + "9" * 5000], "config is not readable: Exceeds the limit"),
        (["rl.options.beta=.inf"], r"rl: options.beta must be finite, got inf"),
        (["model.lora.rank=2", "model.lora.targets=[]"], r"model.lora.targets must have 1 entries"),
        (["model.four_bit=true", "model.lora.rank=2"], r"model: four_bit is for a checkpoint"),
        (["wandb=" + "[" * 3000], r"config is not readable"),
        (['task.train_file="\\0.csv"'], r"task.train_file must match pattern"),
        (["task.train_file=pipe.csv"], r"pipe.csv: a data source must be a regular file"),
        (["task.train_file=/dev/zero"], r"data source is a file that ends in"),
    ],
)
def test_hostile_values_are_told_in_a_sentence(
    keys: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo(tmp_path / "pipe.csv")
    told(call("demo", *TINY, *keys, "--out", tmp_path / "demo"), words)
    assert not (tmp_path / "demo").exists()


def test_control_characters_are_printed_visibly() -> None:
    result = call("eval", "--checkpoint", "\x1b[2J[red]x")
    told(result, r"\\x1b\[2J\[red\]x")
    assert "\x1b" not in result.output


# --- rewards ----------------------------------------------------------------------------------------------------------

REWARD = """
import json, os, subprocess, sys
def forged(examples, completions):
    for number in range(3, 1024):
        try: os.write(number, (b'{"good": true}' if number else b"").rjust(18, b"\\0"))
        except OSError: pass
    return [1.0 for _ in completions]
def secrets(examples, completions): return [float("HF_TOKEN" in os.environ or "MY_SECRET" in os.environ) for _ in completions]
def parent(examples, completions):
    child = subprocess.Popen(["sleep", "300"])
    open(examples[0].facts["file"], "w").write(str(child.pid))
    return [1.0 for _ in completions]
def much(examples, completions): return ["x" * 100_000_000]
"""


@pytest.fixture
def rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "attacking.py").write_text(REWARD)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setenv("HF_TOKEN", "swordfish")
    monkeypatch.setenv("MY_SECRET", "swordfish")
    return tmp_path


def test_a_reward_sees_no_secrets_and_cannot_forge_or_flood_its_answer(rewards: Path) -> None:
    example = Example("0", "", "", {"file": str(rewards / "pid")})
    assert load_reward("attacking:secrets", timeout=30.0)([example], ["a"]) == [0.0]
    for name in ("forged", "much"):
        with pytest.raises(UserError, match=rf"reward attacking:{name}: "):
            load_reward(f"attacking:{name}", timeout=30.0)([example], ["a"])


def lives(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_what_a_reward_started_ends_with_a_trainer_that_is_killed(rewards: Path) -> None:
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(rewards)!r})
from dllm_trainer.tasks import Example
from dllm_trainer.tasks.rewards import load_reward
load_reward("attacking:parent", timeout=60.0)([Example("0", "", "", {{"file": {str(rewards / "pid")!r}}})], ["a"])
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    pid, deadline = int((rewards / "pid").read_text()), time.monotonic() + 240
    while lives(pid):
        assert time.monotonic() < deadline, "an orphan"
        time.sleep(0.05)


def test_what_counts_right_answers_returns_truth_values() -> None:
    """Else the shares before and after would differ by another gain than the one beside them."""
    for value in (2.0, 0.5, -1):
        right = checked(lambda examples, completions, value=value: [value for _ in completions], "correct", truth=True)
        with pytest.raises(UserError, match=rf"reward correct must return truth values, or 0 and 1, got {value:g} for 0"):
            right([Example("0", "")], ["a"])
    both = checked(lambda examples, completions: [True, 0.0], "correct", truth=True)
    assert both([Example("0", ""), Example("1", "")], ["a", "b"]) == [1.0, 0.0]


def test_a_model_with_nan_is_not_one_that_answers_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_run(tmp_path / "demo", *FEW)
    evaluate = run._evaluate

    def broken(name: str, label: str) -> None:
        with torch.no_grad():
            next(run.setup.model.parameters()).fill_(float("nan"))
        evaluate(name, label)

    monkeypatch.setattr(run, "_evaluate", broken)
    with pytest.raises(GuardError, match="hidden states that are not finite"):
        run.execute()


# --- memory and the terminal ------------------------------------------------------------------------------------------


def test_out_of_memory_is_a_sentence_with_the_prediction_and_the_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhaust(self: Run, phase: str) -> None:
        torch.empty(10**16)

    monkeypatch.setattr(Run, "_train", exhaust)
    told(
        call("demo", *TINY, "--out", tmp_path / "demo"),
        r"can't allocate memory.*; plan predicts a peak of .* MiB.*micro_batch",
    )


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("model.hidden_size=4000000", "do not fit this machine's memory"),
        ("model.layers=1000000000000", "do not fit this machine's memory"),
        ("rl.group=1000000000", "rl.prompts x rl.group must be at most 1,000,000 rollouts"),
    ],
)
def test_absurd_sizes_are_refused_before_anything_is_allocated(key: str, words: str, tmp_path: Path) -> None:
    told(call("demo", *TINY, key, "--out", tmp_path / "demo"), words)


def test_a_reader_that_goes_away_does_not_stop_the_writer(tmp_path: Path) -> None:
    code = "import dllm_trainer.records.terminal as t; t.forgive_closed_streams(); [print('x' * 9999) for _ in range(99)]"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.read(10)
    process.stdout.close()
    assert process.wait(timeout=240) == 0
    assert process.stderr is not None
    assert process.stderr.read() == b""
