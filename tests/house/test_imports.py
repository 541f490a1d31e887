"""Arrows between modules run down, from floor to floor, and in no circle."""

import re
from pathlib import Path

import pytest

from tests.house.imports import find_circle, find_imports, find_modules

ROOT = Path(__file__).resolve().parents[2]
ALIASES = {"dllm_trainer": "trainer"}

# Rooms, lowest floor first: a module imports from its own room and from the floors below it. A room is a
# module, or a folder with all that is in it; one that has other rooms in it stands for its `__init__` alone.
GROUND = ("dllm_kernels.version", "dllm_kernels.checks", "dllm_kernels.noise", "dllm_kernels.rows")
FLOORS = (
    GROUND,
    ("dllm_kernels.backends",),
    ("dllm_kernels.masks", "dllm_kernels.head"),
    ("dllm_kernels.model",),
    ("dllm_kernels.losses", "dllm_kernels.accumulation", "dllm_kernels.rollouts"),
    ("dllm_kernels.objectives",),
    ("dllm_kernels",),
    ("dllm_kernels.integrations", "dllm_kernels.env"),
    ("trainer.errors", "trainer.sections", "trainer.names"),
    ("trainer.rights", "trainer.launch"),
    ("trainer.tasks", "trainer.distributed"),
    ("trainer.layers",),
    ("trainer.schedules", "trainer.decoding"),
    ("trainer.watch", "trainer.facts", "trainer.config"),
    ("trainer.descriptions",),
    ("trainer.models",),
    ("trainer.records",),
    ("trainer.train",),
    ("trainer.commands",),
    ("trainer.cli",),
    ("trainer", "trainer.__main__"),
    ("benchmarks",),
)
# Rooms that know less than their floor would allow.
KNOWS = {
    "dllm_kernels.masks": GROUND,  # nothing of heads and kernels
    "dllm_kernels.objectives": (  # nothing of vocabularies and models
        *GROUND,
        "dllm_kernels.masks",
        "dllm_kernels.losses",
        "dllm_kernels.accumulation",
        "dllm_kernels.rollouts",
    ),
}

ROOMS = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def room_of(module: str) -> str | None:
    """The room that a module is in; None where none is listed."""
    room = module
    while room:
        if room in ROOMS and (room == module or not any(other.startswith(f"{room}.") for other in ROOMS)):
            return room
        room = room.rpartition(".")[0]
    return None


def broken_rules(root: Path) -> list[str]:
    packages = [name for name in ("dllm_kernels", "trainer", "benchmarks") if (root / name).is_dir()]
    modules = find_modules(root, packages)
    broken = [f"{module} is in no room of FLOORS" for module in modules if room_of(module) is None]
    graph: dict[str, set[str]] = {module: set() for module in modules}
    for arrow in find_imports(root, packages, ALIASES):
        graph[arrow.source].add(arrow.target)
        source, target = room_of(arrow.source), room_of(arrow.target)
        if source is None or target is None or source == target:
            continue
        if ROOMS[target] >= ROOMS[source]:
            broken.append(f"{arrow}, which is not below it")
        elif target not in KNOWS.get(source, ROOMS):
            broken.append(f"{arrow}, of which {source} must know nothing")
    if circle := find_circle(graph):
        broken.append(f"a circle: {' -> '.join(circle)}")
    return broken


def test_arrows_run_down_and_in_no_circle():
    broken = broken_rules(ROOT)
    assert not broken, "\n".join(broken)


def test_every_room_that_is_there_is_named_once():
    assert len(ROOMS) == sum(map(len, FLOORS))
    assert set(KNOWS) | {room for rooms in KNOWS.values() for room in rooms} <= ROOMS.keys()
    missing = [room for room in ROOMS if not (ROOT / room.replace(".", "/")).with_suffix(".py").is_file()]
    assert [room for room in missing if not (ROOT / room.replace(".", "/")).is_dir()] in ([], ["dllm_kernels.integrations"])


def tree(root: Path, files: dict[str, str]) -> Path:
    """A made-up house."""
    for name, source in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        for folder in path.relative_to(root).parents[:-1]:
            (root / folder / "__init__.py").touch()
        path.write_text(source)
    return root


SOUND = {
    "dllm_kernels/checks.py": "",
    "dllm_kernels/rows.py": "",
    "dllm_kernels/backends/cpu.py": "from dllm_kernels import checks",
    "dllm_kernels/masks/laws.py": "from dllm_kernels.rows import Rows",
    "dllm_kernels/head/scoring.py": "import dllm_kernels.backends.cpu",
    "dllm_kernels/accumulation/loop.py": "from dllm_kernels.head.scoring import score",
    "dllm_kernels/objectives/bgpo.py": "from dllm_kernels.accumulation import loop\nfrom dllm_kernels.objectives import wd1",
    "dllm_kernels/objectives/wd1.py": "",
    "trainer/errors.py": "",
    "trainer/records/report.py": "from ..errors import UserError",
    "trainer/train/rl.py": "from dllm_kernels import checks\nfrom ..records import report",
    "benchmarks/run.py": "from dllm_trainer.train import rl",
}

BROKEN = {
    "up": ("dllm_kernels/backends/cpu.py", "from dllm_kernels.accumulation.loop import x", "backends.cpu:1 imports .*, which is"),
    "up, in a function": ("dllm_kernels/checks.py", "def f():\n    import dllm_kernels.head.scoring", "checks:2 imports"),
    "up, for types": (
        "dllm_kernels/rows.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from dllm_kernels.masks.laws import Law",
        "rows:3 imports dllm_kernels.masks.laws, which is not below",
    ),
    "up, relative": ("trainer/errors.py", "from .records import report", "errors:1 imports trainer.records.report, which is"),
    "up, two dots": ("trainer/records/report.py", "from ..train.rl import x", "records.report:1 imports trainer.train.rl"),
    "up, by the installed name": ("trainer/records/report.py", "import dllm_trainer.train.rl", "imports trainer.train.rl"),
    "up, to the face": ("dllm_kernels/head/scoring.py", "from dllm_kernels import score_tokens", "imports dllm_kernels, which"),
    "the library knows the trainer": ("dllm_kernels/objectives/bgpo.py", "import trainer.errors", "imports trainer.errors"),
    "the trainer knows benchmarks": ("trainer/train/rl.py", "import benchmarks.run", "imports benchmarks.run, which"),
    "sideways": ("dllm_kernels/masks/laws.py", "from dllm_kernels.head import scoring", "masks.laws:1 imports .*, which is not"),
    "masks know kernels": ("dllm_kernels/masks/laws.py", "from dllm_kernels import backends", "masks must know nothing"),
    "objectives know heads": (
        "dllm_kernels/objectives/wd1.py",
        "import dllm_kernels.head.scoring",
        "objectives must know nothing",
    ),
    "a circle of files": ("dllm_kernels/objectives/wd1.py", "from . import bgpo", r"a circle: .*bgpo -> .*wd1 -> .*bgpo"),
    "a circle for types": (
        "dllm_kernels/objectives/wd1.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .bgpo import BGPO",
        "a circle",
    ),
    "a room that nobody named": ("dllm_kernels/attic.py", "", "attic is in no room"),
}


def test_a_sound_house_breaks_no_rule(tmp_path):
    assert broken_rules(tree(tmp_path, SOUND)) == []


@pytest.mark.parametrize("name", BROKEN)
def test_each_rule_is_seen_to_fail(tmp_path, name):
    file, source, said = BROKEN[name]
    broken = broken_rules(tree(tmp_path, {**SOUND, file: source}))
    assert broken
    assert re.search(said, broken[0]), broken


def test_a_long_circle_is_found_and_a_diamond_is_none():
    assert find_circle({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": set()}) is None
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"d"}, "d": {"b"}}) == ["b", "c", "d", "b"]
