"""Sanitizers look at the C++ engine: memory that is read before it is written, touched beside an array, undefined arithmetic."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from dllm_kernels.backends import cpu

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
FLAGS = ("-std=c++17", "-g1", "-O1", "-fno-fast-math", "-ffp-contract=off", "-fno-math-errno", "-pthread")
ADDRESS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
# engines without torch and pybind11; the pair engine with its instruction written out, which sanitizers know
ENGINES = ("head_baseline", "head_avx2", "head_avx512", "head_avx512bf16_emulated", "team")


def compiler(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is missing, so this sanitizer has not looked: apt-get install {name.replace('+', '')}")
    return found


def run(command: list[str], **more) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **more)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


@pytest.mark.parametrize(("name", "flags"), [("clang++", ("-fsanitize=memory",)), ("g++", ADDRESS)], ids=["memory", "address"])
def test_a_caller_with_exact_arrays_is_told_of_nothing(name, flags, tmp_path):
    """Neither workspace nor results are written before a call, and each is an allocation of its own."""
    sources = [f"csrc/{engine}.cpp" for engine in ENGINES]
    caller = tmp_path / "caller"
    run([compiler(name), *FLAGS, *flags, "-Icsrc", *sources, "tests/backends/engine_driver.cpp", "-ldl", "-o", str(caller)])
    assert int(run([str(caller)]).split()[0]) > 1000


def test_memory_that_is_read_before_it_is_written_would_be_found(tmp_path):
    """The defect that this looks for, put back: dead lanes keep what the workspace held."""
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    engine = tmp_path / "csrc" / "head.inc"
    text = engine.read_text()
    line = "if (p_.target) clear_dead_lanes(r.target_held, rows);"
    assert text.count(line) == 1
    engine.write_text(text.replace(line, ""))
    (tmp_path / "one.cpp").write_text((ROOT / "tests" / "backends" / "engine_driver.cpp").read_text())
    sources = [str(tmp_path / "csrc" / f"{name}.cpp") for name in ENGINES]
    caller, include = tmp_path / "caller", f"-I{tmp_path / 'csrc'}"
    run(
        [
            compiler("clang++"),
            *FLAGS,
            "-fsanitize=memory",
            include,
            *sources,
            str(tmp_path / "one.cpp"),
            "-ldl",
            "-o",
            str(caller),
        ]
    )
    done = subprocess.run([str(caller)], capture_output=True, text=True)
    assert done.returncode != 0
    assert "use-of-uninitialized-value" in done.stderr


@pytest.mark.skipif(not cpu.available(), reason="the extension was not built")
def test_the_extension_under_the_address_sanitizer_passes_its_tests(tmp_path):
    import pybind11

    gcc = compiler("g++")
    runtime = subprocess.run([gcc, "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(runtime).is_absolute():
        pytest.skip("this g++ has no libasan, so the address sanitizer has not looked at the extension")
    built = tmp_path / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    include = [f"-I{path}" for path in ("csrc", pybind11.get_include(), sysconfig.get_path("include"))]
    sources = sorted(str(path) for path in (ROOT / "csrc").glob("*.cpp"))
    run([gcc, *FLAGS, *ADDRESS, "-fPIC", "-shared", "-fvisibility=hidden", *include, *sources, "-o", str(built)])
    (tmp_path / "sitecustomize.py").write_text(f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("dllm_kernels._C", {str(built)!r})
sys.modules["dllm_kernels._C"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
""")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]),
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "HYPOTHESIS_PROFILE": "few",
    }
    part = "earlier_call or every_output or extreme or any_shape or no_other_row or 16_bit_pattern"
    suite = ["-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "tests/backends/test_cpu_engine.py", "-k", part]
    assert " passed" in run([sys.executable, *suite, "-o", "addopts=--import-mode=importlib"], env=environment)
