"""The package as users get it: its names, its imports, its wheel."""

import importlib.util
import inspect
import os
import re
import shutil
import subprocess
import sys
import tarfile
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
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}, timeout=800
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


def test_the_library_works_where_the_extension_was_not_built_and_says_so_once():
    """An install without a compiler falls back to PyTorch; asking for the C++ kernel then says why it cannot run."""
    said = python(
        "import sys; sys.modules['dllm_kernels._C'] = None\n"  # importing it now raises ImportError
        "import os, torch, warnings\n"
        "from dllm_kernels import backends, score_tokens\n"
        "assert backends.names() == ('reference',), backends.names()\n"
        "arguments = torch.ones(2, 3), torch.ones(4, 3), torch.tensor([0, 1])\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    os.environ['DLLM_KERNELS_BACKEND'] = 'reference'; score_tokens(*arguments)\n"
        "    assert not caught, 'asked for'\n"
        "    del os.environ['DLLM_KERNELS_BACKEND']; score_tokens(*arguments)\n"
        "    print(float(score_tokens(*arguments).logp[0]), *(one.message for one in caught), sep='\\n')\n"
        "os.environ['DLLM_KERNELS_BACKEND'] = 'cpu'\n"
        "try: score_tokens(*arguments)\n"
        "except ValueError as error: print(error)\n"
        "import runpy; runpy.run_module('dllm_kernels.env', run_name='__main__')\n"
    ).splitlines()
    assert said[0].startswith("-1.386")
    assert said[1].startswith("dllm_kernels runs the LM head on the CPU in plain PyTorch"), "one warning"
    assert "compiler" in said[1]
    assert said[2].startswith("DLLM_KERNELS_BACKEND=cpu cannot run here")
    assert "compiler" in said[2]
    assert said[3].startswith("dllm_kernels ")
    assert any(re.match(r"head +pure PyTorch \(the extension dllm_kernels._C is not there", line) for line in said)


def test_a_core_install_shows_its_environment():
    """Without transformers, triton and the trainer's packages."""
    code = (
        "import sys\n"
        "for name in ('transformers', 'triton', 'typer', 'pydantic', 'dllm_trainer'): sys.modules[name] = None\n"
        "import runpy; runpy.run_module('dllm_kernels.env', run_name='__main__')"
    )
    shown = dict(line.split(maxsplit=1) for line in python(code).splitlines())
    assert {"dllm_kernels", "python", "torch", "cpu", "threads", "head"} <= shown.keys()
    assert shown["head"].startswith(("C++ engine (", "pure PyTorch ("))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The source distribution as the workflow makes it, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    hidden = (".git", ".venv*", "build", "dist", "runs", "*.so", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis")
    shutil.copytree(ROOT, folder / "checkout", ignore=shutil.ignore_patterns(*hidden))
    build(folder / "checkout", "--sdist", GITHUB_REPOSITORY="owner/name", GITHUB_SHA="1234567")
    (archive,) = (folder / "checkout" / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return unpacked


def build(folder: Path, kind: str, **environment: str) -> str:
    here = all(importlib.util.find_spec(name) for name in ("setuptools", "pybind11"))
    command = [sys.executable, "-m", "build", kind, *(["--no-isolation"] if here else [])]
    environment = {**os.environ, "GITHUB_REPOSITORY": "", **environment}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1700, env=environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    return done.stdout + done.stderr


@pytest.mark.slow
def test_a_source_distribution_is_the_whole_tree_with_addresses(source):
    listed = {path.relative_to(ROOT) for folder in ("csrc", "docs", "examples", "tests") for path in (ROOT / folder).rglob("*.*")}
    assert not [path for path in listed if path.suffix != ".pyc" and not (source / path).exists()]
    said = (source / "PKG-INFO").read_text()
    assert "\nProject-URL: Homepage, https://github.com/owner/name\n" in said
    links = re.findall(r"\]\(([^)]*)\)", said)
    assert "https://github.com/owner/name/raw/1234567/benchmarks/results/cpu-readme.png" in links
    assert "https://github.com/owner/name/blob/1234567/docs/limits.md" in links
    assert not [link for link in links if not link.startswith("https://")]


@pytest.mark.slow
@pytest.mark.timeout(2500)
def test_a_wheel_from_it_holds_every_module_and_its_tests_run(source, tmp_path):
    said = build(source, "--wheel")
    assert "warning: " not in "\n".join(line for line in said.splitlines() if "csrc/" in line), said
    (wheel,) = (source / "dist").glob("*.whl")
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
    engine = [name for name in names if re.fullmatch(r"dllm_kernels/_C\..*\.so", name)]
    if shutil.which("c++"):
        assert engine, "the C++ engine is inside"
    assert any(name.endswith("entry_points.txt") for name in names)
    assert any("LICENSE" in name for name in names)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "unpacked")}
    code = "import dllm_kernels; print(dllm_kernels.__file__, dllm_kernels.__version__)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, env=environment)
    assert str(tmp_path / "unpacked") in done.stdout, done.stderr
    for name in engine:
        shutil.copy(tmp_path / "unpacked" / name, source / name)
    command = [sys.executable, "-m", "pytest", "tests/test_package.py", "tests/test_noise.py", "-m", "not slow", "-p", "no:xdist"]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout[-4000:]
    assert re.search(r"\d\d passed", done.stdout), done.stdout[-400:]


def test_the_command_line_without_its_extra_says_what_to_install():
    code = "import sys; sys.modules['typer'] = None\nfrom trainer.__main__ import main\nmain()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=800)
    assert done.returncode == 2
    assert done.stderr.strip() == "dllm-kernels: typer is missing; pip install 'dllm-kernels[train]' brings it"
