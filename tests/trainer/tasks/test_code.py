"""Programs that a model wrote are judged by their tests, and reach nothing else of this machine."""

import json
import os
import secrets
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from dllm_trainer.config import load_config
from dllm_trainer.errors import ConfigError, UserError
from dllm_trainer.tasks import judge as judging
from dllm_trainer.tasks import make_task
from dllm_trainer.tasks.code import SHIPPED, program, read
from dllm_trainer.tasks.config import CodeConfig
from dllm_trainer.tasks.judge import Job, Judge
from dllm_trainer.tasks.sandbox import _ENVIRONMENT, _SYSTEM, Limits, Sandbox, _working, _wrapped, python

from tests.trainer.tasks.hostile import HOSTILE

LIMITS = Limits(seconds=60.0, memory_mib=128, processes=8)  # what ends by itself has all the time that a busy machine takes
SHORT = replace(LIMITS, seconds=2.0)


def _mechanisms() -> Iterator[str]:
    """Those that work here; the one that `auto` takes must be among them."""
    for name in ("bubblewrap", "unshare"):
        try:
            _working(name)  # type: ignore[arg-type]
        except UserError:
            continue
        yield name


MECHANISMS = tuple(_mechanisms())


@pytest.fixture(scope="module", params=MECHANISMS)
def judge(request: pytest.FixtureRequest) -> Judge:
    return Judge(request.param, LIMITS)


def run(judge: Judge, text: str, *tests: str) -> list[bool]:
    return judge([Job(text, tests)])[0]


def test_a_sandbox_works_on_this_machine() -> None:
    assert MECHANISMS, "neither bubblewrap nor unshare works here"


def test_plain_values_changes_in_place_and_exceptions_cross_the_wall(judge: Judge) -> None:
    text = (
        "def same(*args, **options):\n    return [args, options]\n"
        "def push(items, table, kinds):\n    items.append(3); table['k'] = (1, {2}); kinds.add(b'x')\n"
        "def fail(kind):\n    raise kind_of(kind)\n"
        "def kind_of(name):\n    return {'value': ValueError, 'own': type('Own', (Exception,), {})}[name]('no')\n"
    )
    tests = (
        "assert same(1, 2.5, float('inf'), 'é', None, True, (1, [2]), {3: {4}}, b'\\0', 1j, key=frozenset({5})) == "
        "[(1, 2.5, float('inf'), 'é', None, True, (1, [2]), {3: {4}}, b'\\0', 1j), {'key': frozenset({5})}]",
        "items, table, kinds = [1], {}, set()\npush(items, table, kinds)\n"
        "assert (items, table, kinds) == ([1, 3], {'k': (1, {2})}, {b'x'})",
        "try:\n    fail('value')\nexcept ValueError:\n    pass\nelse:\n    raise AssertionError",
        "try:\n    fail('own')\nexcept RuntimeError as error:\n    assert 'Own' in str(error)\nelse:\n    raise AssertionError",
        "try:\n    missing()\nexcept NameError:\n    pass\nelse:\n    raise AssertionError",
        "import math\nassert math.isclose(sorted([same(2)[0][0], same(1)[0][0]])[1], 2)",
        "assert same(lambda: 0)",  # no plain value
        "assert same(10**5000, -(2**64))[0] == (10**5000, -(2**64))",  # of more digits than Python writes by default
        "assert same(2**64) == [(2**64 + 1,), {}]",
    )
    assert run(judge, text, *tests) == [True] * 6 + [False, True, False]


def test_a_program_runs_on_the_library_of_the_interpreter_that_trains(judge: Judge) -> None:
    assert run(judge, "import os\ndef f():\n    return os.__file__", f"assert f() == {os.path.realpath(os.__file__)!r}") == [True]


def test_what_starting_a_sandbox_takes_is_no_verdict(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job("def f():\n    return 1", ("assert f() == 1",))
    slow = judging._SOURCE.replace("import ast\n", "import ast, time\ntime.sleep(2)\n", 1)
    with monkeypatch.context() as patch:
        patch.setattr(judging, "_SOURCE", slow)
        assert Judge(judge._sandbox.mechanism, Limits(seconds=1.5))([job]) == [[True]]
        patch.setattr(judging, "_START_SECONDS", 0.2)
        with pytest.raises(UserError, match=r"the sandbox of a program did not start \(in 0\.2 s\)"):
            Judge(judge._sandbox.mechanism)([job])
        patch.setattr(judging, "_START_SECONDS", 60.0)
        patch.setattr(judging, "python", lambda: ["/no-interpreter"])
        with pytest.raises(UserError, match=r"did not start \(.*/no-interpreter.*No such file"):
            Judge(judge._sandbox.mechanism)([job])


@pytest.mark.skipif(os.geteuid() != 0, reason="the other tests run as such a user")
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_a_user_without_rights_gets_sandboxes_too(mechanism: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 65534)
    monkeypatch.setattr("dllm_trainer.tasks.sandbox._places", lambda: tuple(filter(os.path.lexists, _SYSTEM)))
    ask = "for place in / /dev /dev/shm /usr; do touch $place/x 2>/dev/null && echo $place; done; touch /tmp/x && id -u"
    with tempfile.TemporaryDirectory() as root:
        os.chmod(root, 0o755)
        command = _wrapped(mechanism, ["sh", "-c", ask], root, 0)  # type: ignore[arg-type]
        nobody = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "--"]
        done = subprocess.run([*nobody, *command], capture_output=True, env=_ENVIRONMENT, timeout=60, check=False)
    if b"setting up uid map" in done.stderr or b"unshare failed" in done.stderr:
        pytest.skip("this kernel gives users no namespaces")
    assert (done.stdout.strip(), done.returncode) == (b"0" if mechanism == "unshare" else b"65534", 0), done.stderr


def test_results_come_in_order_whatever_ends_when(judge: Judge) -> None:
    jobs = [
        Job(
            f"import time\ntime.sleep({0.3 if i % 3 == 0 else 0})\ndef f():\n    return {i}",
            (f"assert f() == {i}", f"assert f() == {i + i % 2}"),
        )
        for i in range(9)
    ]
    assert judge(jobs) == [[True, i % 2 == 0] for i in range(9)]


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What the hostile programs are after: a secret file and variable, a listening port, and this process."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "a-secret-file").write_text("secret")
    os.environ["SECRET_TOKEN"] = "a-secret-token"
    abstract = f"dllm-test-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        local.bind(f"\0{abstract}")
        local.listen()
        server.setblocking(False)
        local.setblocking(False)
        yield {
            "HOME": str(folder),
            "SECRET": str(folder / "a-secret-file"),
            "MARKER": str(folder / "marker"),
            "PORT": server.getsockname()[1],
            "ABSTRACT": abstract,
            "TRAINER": os.getpid(),
            "sockets": (server, local),
        }
    del os.environ["SECRET_TOKEN"]


def _processes_of_sandboxes(mark: str) -> list[str]:
    """What still runs of cells with this mark in their code, which every one of them has in its command line."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = place.read_bytes()
        except OSError:  # it ended meanwhile
            continue
        if mark.encode() in text:
            found.append(place.parent.name)
    return found


def test_hostile_programs_reach_nothing_and_the_pool_goes_on(
    judge: Judge, machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = f"# {secrets.token_hex()}"
    monkeypatch.setattr(judging, "_SOURCE", f"{judging._SOURCE}{mark}\n")
    facts = "".join(f"{name} = {value!r}\n" for name, value in machine.items() if name.isupper())
    assert len(HOSTILE) >= 40
    wrong = {}
    for endless in (False, True):
        hostile = {name: one for name, one in HOSTILE.items() if one.endless == endless}
        started = time.monotonic()
        judged = Judge(judge._mechanism, SHORT) if endless else judge
        verdicts = judged([Job(facts + one.program, one.tests) for one in hostile.values()])
        seconds = time.monotonic() - started
        wrong |= {name: got for (name, one), got in zip(hostile.items(), verdicts, strict=True) if got != one.verdicts}
    assert not wrong
    assert seconds < len(HOSTILE) * (SHORT.seconds + 2), "endless programs are ended"
    assert os.listdir(machine["HOME"]) == ["a-secret-file"]  # no marker
    for server in machine["sockets"]:
        with pytest.raises(BlockingIOError):
            server.accept()  # nobody came
    deadline = time.monotonic() + 60
    while left := _processes_of_sandboxes(mark):  # the kernel ends a namespace a moment after its first process
        assert time.monotonic() < deadline, f"processes {left} are left"
        time.sleep(0.01)
    assert run(judge, "def f():\n    return 1", "assert f() == 1") == [True]


def test_ranks_of_a_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(12))
    for ranks, workers in {"": 12, "1": 12, "5": 2, "64": 1}.items():
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert Judge()._workers == workers


def test_programs_of_two_trainers_do_not_take_each_other_s_processes(judge: Judge) -> None:
    """As root a sandbox has a user, whose processes the kernel counts over all of this machine."""
    greedy = (
        "import os, resource, signal\nresource.setrlimit(resource.RLIMIT_NPROC, (8, 8))\n"
        "try:\n    while os.fork():\n        pass\nexcept OSError:\n    os.write(1, b'full')\nsignal.pause()"
    )
    sandbox, (read, write) = Sandbox(judge._mechanism), os.pipe()
    other = sandbox.start([*python(), greedy], slot=0, stdin=read, stdout=write)
    try:
        os.close(write)
        assert os.read(read, 4) == b"full"
        forks = "import os\nif os.fork() == 0:\n    os._exit(0)\ndef f():\n    return 1"
        assert run(Judge(judge._mechanism, LIMITS, workers=1), forks, "assert f() == 1") == [True]
    finally:
        other.end()
        os.close(read)


def test_the_same_programs_reach_this_machine_without_a_sandbox(machine: dict[str, Any]) -> None:
    """The control: what is denied above is there to be had."""
    bare = Judge("none", LIMITS)
    facts = "".join(f"{name} = {value!r}\n" for name, value in machine.items() if name.isupper())
    for name in (
        "reads a file by its path",
        "reads the home directory",
        "connects to this machine",
        "writes outside",
        "makes namespaces of its own",
    ):
        assert run(bare, facts + HOSTILE[name].program, *HOSTILE[name].tests) == [False]
    memory = HOSTILE["takes memory that no limit counts"]
    assert False in run(bare, memory.program, *memory.tests)
    assert (Path(machine["MARKER"])).read_text() == "x"
    Path(machine["MARKER"]).unlink()
    for server in machine["sockets"][:1]:
        server.accept()[0].close()
    for place in ("/marker", "/usr/marker", "/usr/lib/marker", "/dev/marker", "/dev/shm/marker"):
        Path(place).unlink(missing_ok=True)


def test_the_shipped_programs_pass_their_tests_and_their_mutants_do_not() -> None:
    task = make_task(CodeConfig(timeout=60.0), seed=0)
    answers = [example.answer for example in task.train]
    assert task.correct(task.train, answers) == [1.0] * len(answers)
    returning = [example for example in task.train if "return " in example.answer]
    assert len(returning) >= len(answers) - 1
    broken = [example.answer.replace("return ", "return None and ") for example in returning]
    assert max(task.rewards["tests"](returning, broken)) < 1.0
    assert task.rewards["tests_and_format"](task.train[:2], [answers[0], "no block"]) == [pytest.approx(1.1), 0.0]


def test_a_completion_is_a_program_in_every_form_that_models_write() -> None:
    example = next(iter(read(str(SHIPPED), 1)))
    assert program(example, "Here:\n```python\na = 1\n```\nor\n```py\nb = 2\n```") == "b = 2\n"
    assert program(example, "a = 1") == "a = 1"
    assert program(example, "a = 1\n```\nand so on") == "a = 1\n"


def test_human_evals_form_is_read_and_judged(tmp_path: Path) -> None:
    row = {
        "task_id": "HumanEval/0",
        "prompt": "from typing import List\ndef nothing(x):\n    return x\n\ndef add(a, b):\n    '''The sum.'''\n",
        "entry_point": "add",
        "canonical_solution": "    return a + b\n",
        "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert add(2, 2) == 4\n",
    }
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(row) + "\n")
    task = make_task(CodeConfig(train=str(path), timeout=60.0), seed=0)
    (example,) = task.train
    bodies = [
        example.answer,
        "    return a + b",
        "```python\n    return b + a\n```",
        "    return a - b",
        "def add(a, b):\n    return a + b",
        "    return helper(a, b)\n\ndef helper(a, b):\n    return a + b",
        "from math import sqrt\ndef add(a: List, b: List):\n    return nothing(a) + b",  # the prompt's own import and helper
    ]
    assert task.correct([example] * 7, bodies) == [1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0]


def test_a_function_that_is_asked_for_may_have_the_name_of_pythons_own(tmp_path: Path) -> None:
    """As `sum` of one of MBPP's problems."""
    path = tmp_path / "data.jsonl"
    of_mbpp = {"text": "Sum.", "code": "def sum(a, b):\n    return a + b", "test_list": ["assert sum(1, 2) == 3"]}
    path.write_text(json.dumps(of_mbpp) + "\n")
    task = make_task(CodeConfig(train=str(path), timeout=60.0), seed=0)
    others = "def sum(a, b):\n    return a - b\ndef len(x):\n    return 0"
    assert task.correct([*task.train] * 2, [task.train[0].answer, others]) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "x", "code": "y"}, "tests are columns test_list (as MBPP's) or test and entry_point (as HumanEval's)"),
        ({"prompt": "x", "test_list": "assert f()"}, "column 'test_list' must be a list of texts, got 'assert f()'"),
        ({"prompt": "x", "test_list": []}, "column 'test_list' must be a list of texts, got []"),
        ({"prompt": "x", "test_list": ["assert 1"], "test_imports": [1]}, "column 'test_imports' must be a list of texts"),
        ({"test_list": ["assert 1"]}, "there is no column 'text'"),
        ({"prompt": "x", "test_list": ["assert f() = 1"]}, "a test is no Python (SyntaxError: "),
        ({"prompt": "x", "entry_point": "f", "test": "def check(f)\n    assert f()"}, "a test is no Python (SyntaxError: "),
    ],
)
def test_what_is_wrong_with_a_row_is_said_with_its_place(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=r"data\.jsonl:1") as caught:
        make_task(CodeConfig(train=str(path), timeout=60.0), seed=0)
    assert said in str(caught.value)


def test_the_toy_takes_no_data_that_it_would_pass_over() -> None:
    with pytest.raises(ConfigError, match=r"task: train must not be given with style characters, .* got mine\.jsonl"):
        load_config(overrides=["task.kind=code", "task.style=characters", "task.train=mine.jsonl"])


def test_without_a_sandbox_programs_are_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    _working.cache_clear()
    task = make_task(CodeConfig(timeout=60.0), seed=0)  # nothing runs before it must
    with pytest.raises(UserError, match="bwrap is not installed; unshare is not installed; install bubblewrap"):
        task.correct(task.train[:1], [task.train[0].answer])
    _working.cache_clear()


def test_the_toy_holds_out_values_and_its_expressions_are_right() -> None:
    task = make_task(CodeConfig(style="characters", careless_share=0.0, train_problems=200, timeout=60.0), seed=0)
    assert not {e.prompt for e in task.train} & {e.prompt for e in task.tests["unseen"]}
    some = task.train[:10]
    assert task.correct(some, [e.answer for e in some]) == [1.0] * 10
    assert task.rewards["tests"](some[:2], ["", "x("]) == [0.0, 0.0]
    careless = make_task(CodeConfig(style="characters", careless_share=1.0, train_problems=200), seed=0).train
    for right, wrong in zip(task.train, careless, strict=True):
        assert right.prompt == wrong.prompt
        values, others = ([eval(e.answer, {"x": x}) for x in range(6)] for e in (right, wrong))
        assert right.facts["tests"] == [f"assert f({x}) == {value}" for x, value in enumerate(values)]
        assert values != others, "parentheses matter in every problem"
    assert all(
        len(e.answer) <= task.completion_length and set(e.prompt + e.answer) <= set(task.alphabet or "") for e in task.train
    )
