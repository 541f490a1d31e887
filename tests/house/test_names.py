"""The trainer's two names, `dllm_trainer` (installed) and `trainer` (checkout), are one package a process."""

import itertools
import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from dllm_kernels.version import __version__

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("dllm_trainer", "trainer")
BOTH_WAYS = [NAMES, NAMES[::-1]]

# prepended to the code of a process: `check` fails if a module is loaded twice
ONE_OF_EACH = """
import sys

def check():
    for name, module in list(sys.modules.items()):
        top, dot, rest = name.partition(".")
        if top in ("dllm_trainer", "trainer"):
            for other in ("dllm_trainer", "trainer"):
                assert sys.modules.get(other + dot + rest, module) is module, name
    files = [m.__file__ for m in set(sys.modules.values()) if (getattr(m, "__file__", None) or "").startswith(TRAINER)]
    assert len(files) == len(set(files)) > 0, sorted(files)
"""


class Place:
    """A Python and what is on its path."""

    def __init__(self, python: Path | str, *path: Path | str, cwd: Path = ROOT) -> None:
        self.python, self.path, self.cwd = str(python), [str(entry) for entry in path], cwd

    def run(self, code: str, *arguments: str, first: Path | None = None) -> str:
        """What `code` prints, its first line aside; `first`: a folder before all others on the path."""
        preamble = f"TRAINER = {str(ROOT / 'trainer')!r}\n{ONE_OF_EACH}\n"
        return self.start(["-c", preamble + code, *arguments], first=first)

    def start(self, command: list[str], *, first: Path | None = None, cwd: Path | None = None) -> str:
        path = os.pathsep.join([*([str(first)] if first else []), *self.path])
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1" if first else ""}
        done = subprocess.run(
            [self.python, *command], capture_output=True, text=True, cwd=cwd or self.cwd, env=environment, timeout=800
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout.strip()


@pytest.fixture(scope="module")
def installed() -> Place:
    """As the tests run: the package is installed, and the checkout is on the path."""
    return Place(sys.executable, ROOT)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """An uninstalled checkout: a fresh environment with our site-packages on PYTHONPATH, so without .pth
    files.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    packages = [entry for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))]
    return Place(folder / "bin" / "python", ROOT, *packages)


@pytest.fixture(params=["installed", "checkout"])
def place(request: pytest.FixtureRequest) -> Place:
    return request.getfixturevalue(request.param)


def test_without_the_installation_there_is_no_dllm_trainer(checkout: Place) -> None:
    code = "import importlib.util\nprint([importlib.util.find_spec(name) is None for name in ('dllm_trainer', 'trainer')])"
    assert checkout.start(["-c", code]) == "[True, False]"


IMPORTS = (
    "import {a}; import {b}",
    "import {a}.errors; import {b}.errors",
    "import {a}; import {b}.tasks.task; import {a}.tasks.task",
    "from {a} import errors; from {b}.tasks import Example; from {a}.tasks import config",
    "import {a}.__main__; import {b}.__main__",
    "import {a}, importlib; importlib.import_module('{b}.tasks.rewards'); importlib.import_module('.errors', '{a}')",
)


@pytest.mark.parametrize(("real", "other"), BOTH_WAYS)
def test_whichever_name_comes_first_the_other_leads_to_the_same_modules(place: Place, real: str, other: str) -> None:
    if real == "dllm_trainer" and place.python != sys.executable:
        pytest.skip("it is not installed there")
    for line in IMPORTS:
        code = f"{line.format(a=real, b=other)}\ncheck()\nimport {real} as a, {other} as b\nassert a is b\nprint(a.__spec__.name)"
        assert place.run(code) == real, line


def test_what_one_name_raises_the_other_catches(place: Place) -> None:
    code = """
import trainer.errors, dllm_trainer.errors
try:
    raise trainer.errors.ConfigError("x")
except dllm_trainer.errors.UserError:
    print("caught")
"""
    assert place.run(code) == "caught"


def test_a_module_that_is_not_there_is_missed_by_the_name_that_was_asked_for(place: Place) -> None:
    code = """
import trainer
for name in ("dllm_trainer.nothing", "trainer.nothing", "dllm_trainer.tasks.nothing"):
    try:
        __import__(name)
    except ModuleNotFoundError as error:
        assert error.name == name, error
check()
"""
    place.run(code)


@pytest.mark.parametrize("name", NAMES)
def test_python_m_runs_either_name(installed: Place, name: str) -> None:
    assert installed.start(["-m", name, "--version"]) == f"dllm-kernels {__version__}"


@pytest.mark.parametrize(("first", "run"), BOTH_WAYS)
def test_a_module_may_be_run_by_the_name_that_is_not_the_first(installed: Place, first: str, run: str) -> None:
    """As `python -m` does it, where something imported the package under the other name before."""
    code = f"""
import {first}, runpy
sys.modules["typer"] = None  # the command then ends before it imports much
try:
    runpy.run_module("{run}", run_name="__main__", alter_sys=True)
except SystemExit as end:
    print(end.code)
check()
"""
    assert installed.run(code) == "2"


REWARD = """
import sys
from dllm_trainer.tasks import Example
from dllm_trainer.errors import UserError

def reward(examples, completions):
    twice = {name.partition(".")[2] for name in sys.modules if name.startswith("trainer.")}
    twice &= {name.partition(".")[2] for name in sys.modules if name.startswith("dllm_trainer.")}
    assert all(sys.modules[f"trainer.{name}"] is sys.modules[f"dllm_trainer.{name}"] for name in twice)
    assert all(isinstance(example, Example) for example in examples)
    return [float(len(text)) for text in completions]
"""


@pytest.mark.parametrize("name", NAMES)
def test_a_reward_in_its_own_process_gets_examples_of_the_class_that_it_imports(place: Place, name: str, tmp_path: Path) -> None:
    if name == "dllm_trainer" and place.python != sys.executable:
        pytest.skip("it is not installed there")
    (tmp_path / "my_reward.py").write_text(REWARD)
    code = f"""
from {name}.tasks import Example
from {name}.tasks.rewards import load_reward
print(load_reward("my_reward:reward", timeout=60.0)([Example("a", "1"), Example("b", "2")], ["x", "yyy"]))
check()
"""
    elsewhere = Place(place.python, tmp_path, *place.path)
    assert elsewhere.run(code) == "[1.0, 3.0]"


@pytest.mark.slow
def test_a_run_by_python_m_trainer_is_rewarded_by_a_module_that_imports_dllm_trainer(place: Place, tmp_path: Path) -> None:
    (tmp_path / "my_reward.py").write_text(REWARD)
    small = ["sft.steps=1", "rl.updates=1", "task.train_puzzles=600", "task.test_puzzles=2", "evaluation.probe_examples=2"]
    command = ["-m", "trainer", "demo", *small, "rl.reward=my_reward:reward", f"out={tmp_path / 'run'}"]
    Place(place.python, tmp_path, *place.path).start(command)
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["phase"] == "rl"
    assert last["reward"] > 0


@pytest.mark.parametrize(("real", "other"), BOTH_WAYS)
def test_an_entry_point_s_object_is_of_the_same_classes(place: Place, real: str, other: str, tmp_path: Path) -> None:
    if real == "dllm_trainer" and place.python != sys.executable:
        pytest.skip("it is not installed there")
    (tmp_path / "plugin.py").write_text(f"from {other}.tasks.task import Example\nthing = Example('a', 'b')\n")
    (tmp_path / "plugin-1.dist-info").mkdir()
    (tmp_path / "plugin-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1\n")
    (tmp_path / "plugin-1.dist-info" / "entry_points.txt").write_text("[dllm_kernels.adapters]\nthing = plugin:thing\n")
    code = f"""
from importlib.metadata import entry_points
from {real}.tasks import Example
(point,) = entry_points(group="dllm_kernels.adapters", name="thing")
print(isinstance(point.load(), Example))
check()
"""
    assert Place(place.python, tmp_path, *place.path).run(code) == "True"


@pytest.mark.parametrize(("sender", "receiver"), list(itertools.product(NAMES, NAMES)))
def test_pickles_travel_between_processes_of_either_name(installed: Place, sender: str, receiver: str, tmp_path: Path) -> None:
    file = tmp_path / "pickle"
    installed.run(
        f"import pickle\nfrom {sender}.tasks import Example\n"
        f"open({str(file)!r}, 'wb').write(pickle.dumps([Example('a', 'b'), Example]))"
    )
    code = f"""
import pickle
from {receiver}.tasks import Example
one, cls = pickle.loads(open({str(file)!r}, "rb").read())
print(cls is Example and isinstance(one, Example))
check()
"""
    assert installed.run(code) == "True"


def test_spawned_processes_take_functions_of_the_other_name(place: Place, tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text("""
import multiprocessing
import trainer.errors
from dllm_trainer.errors import first_line

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.apply(first_line, (trainer.errors.UserError("x"),)))
""")
    assert Place(place.python, *place.path).start([str(tmp_path / "job.py")]) == "UserError: x"


@pytest.mark.parametrize("order", BOTH_WAYS)
def test_another_package_called_trainer_is_left_alone(installed: Place, order: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "__init__.py").write_text("foreign = True\n")
    (tmp_path / "trainer" / "errors.py").write_text("foreign = True\n")
    (tmp_path / "trainer" / "logging.py").write_text("foreign = True\n")
    code = f"""
import {order[0]}, {order[1]}
import trainer.errors, trainer.logging, dllm_trainer.errors
assert trainer.foreign and trainer.errors.foreign and trainer.logging.foreign
assert dllm_trainer.errors.UserError and dllm_trainer is not trainer
from dllm_trainer.tasks import Example, rewards
assert rewards.load_reward("my_reward:reward", timeout=60.0)([Example("a", "1")], ["xy"]) == [2.0]
print(dllm_trainer.__file__)
"""
    (tmp_path / "my_reward.py").write_text(
        "import trainer.errors\nfrom dllm_trainer.tasks import Example\n"
        "def reward(examples, completions):\n"
        "    assert trainer.foreign and all(isinstance(e, Example) for e in examples)\n"
        "    return [2.0 for _ in completions]\n"
    )
    assert installed.run(code, first=tmp_path) == str(ROOT / "trainer" / "__init__.py")


def test_another_package_called_trainer_as_one_file_or_as_a_bare_folder_is_left_alone(installed: Place, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "trainer.py").write_text("foreign = True\n")
    assert installed.run("import dllm_trainer, trainer\nprint(trainer.foreign)", first=tmp_path / "a") == "True"


def test_without_a_checkout_on_the_path_there_is_no_trainer(tmp_path: Path) -> None:
    code = "import dllm_trainer\ntry:\n    import trainer\nexcept ModuleNotFoundError as error:\n    print(error.name)"
    assert Place(sys.executable, cwd=tmp_path).start(["-c", code]) == "trainer"


def test_a_copy_of_the_checkout_runs_its_own_code_though_another_is_installed(tmp_path: Path) -> None:
    (tmp_path / "trainer").mkdir()
    for name in ("__init__.py", "names.py", "errors.py"):
        (tmp_path / "trainer" / name).write_text((ROOT / "trainer" / name).read_text())
    code = "import trainer.errors, dllm_trainer.errors as e\nassert e is trainer.errors\nprint(e.__file__)"
    assert Place(sys.executable, cwd=tmp_path).start(["-c", code]) == str(tmp_path / "trainer" / "errors.py")
