"""The tests of a room lie in the folder of tests that has the room's name."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "dllm_kernels"


def folders_with(pattern: str, root: Path) -> set[str]:
    return {path.parent.relative_to(root).as_posix() for path in root.rglob(pattern)} - {"."}


def test_every_folder_of_tests_has_its_room():
    for folder in folders_with("test_*.py", ROOT / "tests") - {"house"}:
        assert (LIBRARY / folder).is_dir() or (ROOT / folder).is_dir(), f"tests/{folder} is named after no folder"


def test_every_room_has_its_folder_of_tests():
    tested = folders_with("test_*.py", ROOT / "tests")
    rooms = folders_with("*.py", LIBRARY) | {f"trainer/{room}" for room in folders_with("*.py", ROOT / "trainer")}
    assert not rooms - tested, "rooms without tests of their own"
