"""`benchmarks/gpu.sh` as far as a machine without a GPU can tell."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import run as runner
from benchmarks.registry import Settings
from benchmarks.suites import head

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"


def test_the_script_is_bash_and_its_stages_limits_stay_below_ten_minutes():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    limits = [int(seconds) for seconds in re.findall(r"^\s*stage \w+ (\d+) ", SCRIPT.read_text(), re.MULTILINE)]
    assert len(limits) == 5
    assert sum(limits) < 600


def test_the_grid_of_a_gpu_is_that_of_the_models_and_a_cpu_refuses_it(capsys):
    full = Settings(dtype="bfloat16", device="cuda", full=True)
    cases = [case for case in head.cases(full) if case.name in head.PLANS]
    assert {case.sizes["N"] for case in cases} == {256, 1024, 4096, 16384, 65536}
    assert {(case.sizes["H"], case.sizes["V"]) for case in cases} == {(h["H"], h["V"]) for h in head.HEADS.values()}
    assert len(cases) == 5 * 5 * 6
    usual = head.cases(Settings(dtype="bfloat16", device="cuda"))
    assert len([case for case in usual if case.name in head.PLANS]) == 5 * 6
    if not torch.cuda.is_available():
        assert runner.main(["--suite", "head", "--device", "cuda"]) == 2
        assert "needs a GPU" in capsys.readouterr().err


@pytest.mark.parametrize("plan", head.PLANS)
def test_a_softcap_reaches_ours_eager_and_the_oracle(plan):
    settings = Settings(dtype="float32", shape={"N": 9, "H": 8, "V": 40, "cap": 2})
    case = next(case for case in head.cases(settings) if case.name == plan)
    x = case.inputs(case.sizes)
    oracle = case.oracle(x)
    for contestant in head.BESIDE:
        if not contestant.applies(x):
            errors = oracle(contestant.setup(x).run())
            assert all(errors[name] <= case.tolerance[name] for name in errors), contestant.name


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_dry_run_leaves_its_files(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(
        [str(SCRIPT), "--dry-run", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=580, env=environment
    )
    assert done.returncode == 0, done.stdout
    assert {"log.txt", "accuracy.json", "accuracy-accuracy.png", "head.json", "head-head.png", "bench.json"} <= {
        path.name for path in tmp_path.iterdir()
    }
