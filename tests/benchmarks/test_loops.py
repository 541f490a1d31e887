"""Other loops' losses beside ours: both sides are the same number, and a file's methods run without its imports."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import documents, loops

SCRIPT = Path(loops.__file__)
# one of a kind of TRL's: its model sees the text that it scores, ours sees it hidden
SAME_LOSS = [loop for loop in loops.LOOPS if not loop.startswith("TRL")]


@pytest.mark.parametrize("loop", SAME_LOSS)
def test_what_was_measured_is_the_same_loss(loop):
    (row,) = (row for row in documents.result_of("loops-cpu")["rows"] if row["loop"] == loop)
    assert row["own"]
    for own, ours in zip(row["own"], row["ours"], strict=True):
        assert ours["loss"] == pytest.approx(own["loss"], rel=1e-5)


def test_methods_run_without_the_imports_of_their_file(tmp_path):
    file = tmp_path / "theirs.py"
    file.write_text("import nowhere\n\n@nowhere.decorated\nclass A(nowhere.B):\n    def f(self):\n        return torch.ones(2)\n")
    made = loops.methods_of(file, "A", ["f"], {"torch": loops.torch})()
    assert made.f().tolist() == [1, 1]
    with pytest.raises(ValueError, match=r"theirs\.py must define f, g in A"):
        loops.methods_of(file, "A", ["f", "g"], {})


@pytest.mark.slow
@pytest.mark.timeout(1000)  # minutes where others use the cores
def test_a_loop_is_measured_by_the_command(tmp_path):
    sizes = ["--vocabulary=600", "--hidden=32", "--length=48", "--rounds=1"]
    command = [sys.executable, str(SCRIPT), *sizes, "--only=transformers Trainer", f"--out={tmp_path / 'found.json'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert loops.table(found) in done.stdout
    ((own,), (ours,)) = (found["rows"][0][side] for side in ("own", "ours"))
    assert ours["loss"] == pytest.approx(own["loss"], rel=1e-5)
    assert min(own["seconds"], ours["seconds"]) > 0
