"""The package as users get it: its names, its imports, its wheel."""

import importlib.util
import inspect
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import dllm_kernels
from dllm_kernels import backends, score_tokens

ROOT = Path(dllm_kernels.__file__).parent.parent
PACKAGES = {"dllm_kernels": "dllm_kernels", "dllm_trainer": "trainer"}  # as they install, and their folders


def python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_library_imports_neither_transformers_nor_triton_nor_the_trainer():
    loaded = python(
        "import torch, numpy, sys; before = set(sys.modules)\n"
        "import dllm_kernels\n"
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    assert "dllm_kernels" in loaded.split()
    assert not {"transformers", "triton", "trainer", "pydantic", "matplotlib", "scipy"} & set(loaded.split())


def test_public_names_exist_and_are_documented():
    assert len(set(dllm_kernels.__all__)) == len(dllm_kernels.__all__)
    for name in dllm_kernels.__all__:
        value = getattr(dllm_kernels, name)
        if name != "__version__":
            assert inspect.getdoc(value), name
        if inspect.isfunction(value):
            assert ">>>" in inspect.getdoc(value), f"{name} has no example"
    for name in (
        "score_tokens",
        "sample_tokens",
        "head_backward",
        "elbo_loss",
        "bgpo_loss",
        "make_mask_plan",
        "estimate_elbo",
        "generate",
        "Rollout",
        "step_entropy",
        "select_steps",
        "trajectory_rows",
        "trajectory_logp",
        "explain",
        "accumulate",
    ):
        assert name in dllm_kernels.__all__


def test_public_functions_have_complete_type_hints_and_the_package_says_so():
    assert (Path(dllm_kernels.__file__).parent / "py.typed").is_file()
    for name in dllm_kernels.__all__:
        value = getattr(dllm_kernels, name)
        if inspect.isfunction(value):
            hints = inspect.get_annotations(value)
            assert hints.keys() == inspect.signature(value).parameters.keys() | {"return"}, name


def test_the_version_is_one_of_pep_440_and_needs_no_torch():
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.?(a|b|rc|dev|post)\d+)?", dllm_kernels.__version__)
    spec = importlib.util.spec_from_file_location("version", ROOT / "dllm_kernels" / "version.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.__version__ == dllm_kernels.__version__


def test_every_folder_of_modules_is_installed():
    rooms = {
        ".".join([package, *path.parent.relative_to(ROOT / folder).parts])
        for package, folder in PACKAGES.items()
        for path in (ROOT / folder).glob("**/__init__.py")
    }
    listed = re.search(r"^packages = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), flags=re.DOTALL | re.MULTILINE)
    assert rooms == set(re.findall(r'"(.*)"', listed.group(1)))


def test_the_citation_names_this_version():
    assert f"\nversion: {dllm_kernels.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_one_list_of_python_versions():
    """What pip accepts, the classifiers, the jobs, the wheels and the linters speak of the same interpreters."""
    project, jobs = (ROOT / "pyproject.toml").read_text(), (ROOT / ".github" / "workflows" / "tests.yml").read_text()
    versions = re.findall(r"Python :: (3\.\d+)", project)
    assert re.search(r'requires-python = ">=(.*)"', project).group(1) == versions[0]
    assert re.findall(r"cp3(\d+)-", project) == [version.removeprefix("3.") for version in versions]
    assert re.search(r"python: \[(.*)\]", jobs).group(1) == ", ".join(f'"{version}"' for version in versions)
    assert f'target-version = "py{versions[0].replace(".", "")}"' in project
    assert f'python_version = "{versions[0]}"' in project
    assert f"Python {versions[0]} to {versions[-1]}" in (ROOT / "README.md").read_text()


def score():
    return score_tokens(torch.ones(2, 3), torch.ones(4, 3), torch.tensor([0, 1])).logp


def test_an_unknown_backend_is_an_error_that_names_those_there_are(monkeypatch):
    monkeypatch.setenv("DLLM_KERNELS_BACKEND", "cuda")
    with pytest.raises(ValueError, match=r"DLLM_KERNELS_BACKEND.*reference.*cpu.*'cuda'"):
        score()


def test_a_backend_that_can_run_runs_when_asked_for(monkeypatch):
    assert backends.names()[0] == "reference"
    for name in backends.names():
        monkeypatch.setenv("DLLM_KERNELS_BACKEND", name)
        problem = backends.HeadProblem(torch.ones(1, 3), torch.ones(4, 3), torch.tensor([0]))
        assert name == backends.select(problem).NAME
        torch.testing.assert_close(score(), torch.full((2,), -torch.log(torch.tensor(4.0)).item()))


def test_the_library_works_where_the_extension_was_not_built():
    """An install without a compiler falls back to PyTorch; asking for the C++ kernel then says why it cannot run."""
    said = python(
        "import sys; sys.modules['dllm_kernels._C'] = None\n"  # importing it now raises ImportError
        "import os, torch\n"
        "from dllm_kernels import backends, score_tokens\n"
        "assert backends.names() == ('reference',), backends.names()\n"
        "arguments = torch.ones(2, 3), torch.ones(4, 3), torch.tensor([0, 1])\n"
        "print(float(score_tokens(*arguments).logp[0]))\n"
        "os.environ['DLLM_KERNELS_BACKEND'] = 'cpu'\n"
        "try: score_tokens(*arguments)\n"
        "except ValueError as error: print(error)\n"
    )
    assert said.startswith("-1.386")
    assert "DLLM_KERNELS_BACKEND=cpu cannot run here" in said
    assert "compiler" in said


@pytest.mark.slow
def test_a_wheel_holds_every_module_and_works_where_it_is_unpacked(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(
        ROOT,
        source,
        ignore=shutil.ignore_patterns(".git", ".venv", "build", "dist", "runs", "*.so", "*.egg-info", "__pycache__", ".*_cache"),
    )
    if all(importlib.util.find_spec(name) for name in ("setuptools", "pybind11")):
        command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    else:
        command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "unpacked")
    wanted = {
        f"{package}/{path.relative_to(ROOT / folder)}"
        for package, folder in PACKAGES.items()
        for pattern in ("**/*.py", "**/py.typed", "**/*.yaml")
        for path in (ROOT / folder).glob(pattern)
    }
    assert {"dllm_kernels/backends/cpu.py", "dllm_kernels/objectives/bgpo.py", "dllm_kernels/py.typed"} <= wanted
    assert any(name.startswith("dllm_trainer/configs/") for name in wanted)
    assert wanted <= names
    assert not [name for name in names if not name.startswith(("dllm_kernels", "dllm_trainer"))]
    if shutil.which("c++"):
        assert [name for name in names if re.fullmatch(r"dllm_kernels/_C\..*\.so", name)], "the C++ engine is inside"
    assert any(name.endswith("entry_points.txt") for name in names)
    assert any("LICENSE" in name for name in names)
    said = subprocess.run(
        [sys.executable, "-c", "import dllm_kernels; print(dllm_kernels.__file__, dllm_kernels.__version__)"],
        cwd=tmp_path / "unpacked",
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "unpacked")},
    )
    assert str(tmp_path / "unpacked") in said.stdout, said.stderr


def test_the_command_line_without_its_extra_says_what_to_install():
    code = "import sys; sys.modules['typer'] = None\nfrom trainer.__main__ import main\nmain()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 2
    assert done.stderr.strip() == "dllm-kernels: typer is missing; pip install 'dllm-kernels[train]' brings it"
