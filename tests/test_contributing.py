"""CONTRIBUTING.md is true: each how-to is followed to the letter, with the files and commands that stand there."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from dllm_trainer.facts import facts_of
from dllm_trainer.models import loading
from dllm_trainer.records.run_dir import RunDir
from transformers import EuroBertConfig

from tests.tiny import checkpoint

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text()


def how_to(title: str) -> str:
    (section,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", TEXT, flags=re.DOTALL | re.MULTILINE)
    return section


def block(section: str, language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", section, flags=re.DOTALL | re.MULTILINE)
    return found


# --- a model ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The how-to's package, installed: its module and its entry point are on sys.path."""
    section = how_to("Add a model")
    (group, entry) = re.findall(r'^\[project\.entry-points\."(.*)"\]\n(.*)$', block(section, "toml"), flags=re.MULTILINE)[0]
    source = block(section, "python")
    (tmp_path / source.splitlines()[0].removeprefix("# ")).write_text(source)
    info = tmp_path / "my_models-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-models\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{entry.replace(chr(34), '')}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("my_models", None)


def test_a_model_of_the_how_to_is_loaded_by_its_row(package: None, tmp_path: Path) -> None:
    loaded = loading.load(checkpoint(tmp_path / "My-Diffusion", alphabet="0123456789"))
    assert (loaded.facts.family, loaded.facts.mask_id, loaded.facts.eos_id, loaded.facts.pad_id) == ("my-diffusion", 11, 13, 12)
    assert loaded.suppressed == (10,)
    assert loaded.tokenizer.convert_tokens_to_ids("[MASK]") == 11, "the row is true of this checkpoint"
    other = loading.load(checkpoint(tmp_path / "another", alphabet="0123456789"))
    assert other.facts.family == "eurobert"


def test_keys_of_the_command_line_replace_a_row(tmp_path: Path) -> None:
    (command,) = re.findall(r"^dllm-kernels rl .*model\.facts.*$", how_to("Add a model"), flags=re.MULTILINE)
    keys = dict(re.findall(r"model\.facts\.(\w+)=(\d+)", command))
    assert list(keys) == ["mask_id", "shift"]
    found = facts_of(EuroBertConfig(), None, "x", {name: int(value) for name, value in keys.items()})
    assert (found.mask_id, found.shift) == (11, 1)


# --- a backend --------------------------------------------------------------------------------------------------------


def test_a_backend_of_the_how_to_passes_the_suite_of_claims(tmp_path: Path) -> None:
    """In a copy of the library with the how-to's file and its lines of `backends/__init__.py`."""
    section = how_to("Add a backend")
    for folder in ("dllm_kernels", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    source = block(section, "python")
    (tmp_path / source.splitlines()[0].removeprefix("# ")).write_text(source)
    selection = tmp_path / "dllm_kernels" / "backends" / "__init__.py"
    code = selection.read_text()
    edits = re.findall(r"((?:^-.*\n)+)((?:^\+.*\n)+)", block(section, "diff"), flags=re.MULTILINE)
    assert len(edits) == 4
    for edit in edits:
        old, new = ("".join(f"{line[1:]}\n" for line in side.splitlines()) for side in edit)
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    selection.write_text(code)

    (command,) = re.findall(r"^pytest (\S+ -k \S+)$", section, flags=re.MULTILINE)
    suite, _, name = command.partition(" -k ")
    some = f"{name} and (in_float64 or head_backward or bits or operands)"  # all of it takes a minute
    done = subprocess.run(
        [sys.executable, "-m", "pytest", suite, "-k", some, "-p", "no:cacheprovider", "-m", "not slow"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert done.stdout.count(".") > 50, "claims were selected"


# --- a task -----------------------------------------------------------------------------------------------------------


def test_a_task_of_the_how_to_is_trained_for_two_updates(tmp_path: Path) -> None:
    section = how_to("Add a task")
    for name, language in (("sums.jsonl", "json"), ("sums.py", "python"), ("sums.yaml", "yaml")):
        assert f"`{name}`" in section
        (tmp_path / name).write_text(block(section, language))
    (command,) = re.findall(r"^dllm-kernels rl .*$", section, flags=re.MULTILINE)
    model = str(checkpoint(tmp_path / "model"))
    program, *arguments = [model if word == "CHECKPOINT" else word for word in shlex.split(command)]
    done = subprocess.run(
        [Path(sys.executable).with_name(program), *arguments, "threads=1"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    updates = [line for line in RunDir.reopen(tmp_path / "runs" / "sums").metrics() if line["phase"] == "rl"]
    assert len(updates) == 2
    assert all(-1.0 <= line["reward"] < 1.0 for line in updates)
