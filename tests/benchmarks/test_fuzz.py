"""The fuzzer finds nothing in the head as it is, and every defect that the head once had when it is put back."""

from __future__ import annotations

import ctypes
import faulthandler
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import fuzz
from benchmarks.fuzzing import problems
from benchmarks.fuzzing.guards import Guarded
from benchmarks.fuzzing.truth import Truth
from dllm_kernels.backends import cpu
from dllm_kernels.backends.expectation import engine, walk
from tests import oracle
from tests.tiny import relative_error

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not cpu.available(), reason="the C++ engine is what the fuzzer looks at")


@pytest.fixture(autouse=True)
def _restore():
    threads, isa = torch.get_num_threads(), cpu.isa()
    yield
    torch.set_num_threads(threads)
    cpu._C.poison_workspace(None)
    cpu._C.set_isa(isa)


def test_nothing_is_wrong_with_the_first_problems_of_a_seed():
    cases = 0
    for number in range(40):
        found = fuzz.judged(5, number, cpu._C.supported_isas())
        assert not found["wrong"]
        cases += sum(found["by_engine"].values())
    assert cases >= 40


def test_a_problem_depends_on_seed_and_number_alone():
    a, b = problems.draw(3, 17), problems.draw(3, 17)
    assert (a.call, a.options.keys()) == (b.call, b.options.keys())
    assert torch.equal(a.hidden, b.hidden)
    assert not torch.equal(problems.draw(3, 17).weight[:1, :1], problems.draw(4, 17).weight[:1, :1])


def test_the_truth_is_that_of_plain_autograd():
    compared = several = 0
    for number in range(60):
        p = problems.draw(9, number)
        if p.bad or p.call not in ("coef", "keep", "recompute") or not len(p.target):
            continue
        truth = Truth(p)
        leaves = [p.hidden.double().requires_grad_(), p.weight.double().requires_grad_()]
        options = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in p.options.items()}
        if "low_rank" in options:
            down, up, scale = options["low_rank"]
            options["low_rank"] = down.double(), up.double(), scale
        want = oracle.head(*leaves, p.target, p.index, **options)
        if not want["logp"].isfinite().all():
            continue
        for name in ("logp", "lse", "entropy", "top_logp"):
            torch.testing.assert_close(truth.statistics[name].exact, want[name].detach(), rtol=1e-9, atol=1e-9)
        terms = [(p.coef, want["logp"]), (p.entropy_coef, want["entropy"]), (p.more["lse_coef"], want["lse"])]
        ids = ()
        if "ids" in p.more:
            logits = oracle.logits(*leaves, p.index, **options)
            terms.append((p.more["ids_coef"], logits.log_softmax(-1).gather(1, p.more["ids"])))
            ids = ((p.more["ids"], p.more["ids_coef"]),)
            several += p.more["ids"].shape[1] > 1
        sum((c.double() * value).sum() for c, value in terms if c is not None).backward()
        exact = truth.gradients(p.coef, p.entropy_coef, ids, p.more["lse_coef"])
        flat = leaves[0].grad.reshape(-1, truth.H)[p.index]
        assert relative_error(exact["hidden"].exact, flat) < 1e-9
        assert relative_error(exact["weight"].exact, leaves[1].grad) < 1e-9
        compared += 1
    assert compared > 10
    assert several


DEFECTS = {
    "what was added up before a larger logit counts as much as after": (
        engine,
        "soften",
        lambda right: lambda *given: torch.ones_like(right(*given)),
        "value",
    ),
    "the mean is not subtracted": (
        engine,
        "pull",
        lambda right: (
            lambda z, pull, top, inverse, of_rows, *out: right(
                z, pull, top, inverse, of_rows and of_rows._replace(mean_N=0 * of_rows.mean_N), *out
            )
        ),
        "dhidden",
    ),
    "ids without probability are multiplied": (
        walk._Walker,
        "_excluded",
        lambda right: lambda walker, span: False,
        "value",
    ),
}


def test_nothing_is_wrong_with_soft_embeddings_and_defects_in_them_are_found(monkeypatch):
    best = cpu._C.supported_isas()[:1]
    wrong = [fuzz.judged(5, number, best, "expectation")["wrong"] for number in range(60)]
    assert not any(wrong)
    for where, name, change, word in DEFECTS.values():
        with monkeypatch.context() as patch:
            patch.setattr(where, name, change(getattr(where, name)))
            wrong = [fuzz.judged(5, number, best, "expectation")["wrong"] for number in range(60)]
        assert word in str(wrong)


def _touch(at_end: bool, beside: bool) -> None:
    faulthandler.disable()  # it would tell the terminal of what is expected
    guarded = Guarded()
    guarded.at_end = at_end
    x = guarded.copy(torch.arange(5.0))
    place = x.data_ptr() + (x.nbytes if at_end else -4) if beside else x.data_ptr()
    assert ctypes.c_float.from_address(place).value >= 0


def test_a_read_beside_a_guarded_tensor_kills_the_process():
    for at_end in (True, False):
        for beside in (False, True):
            process = multiprocessing.get_context("fork").Process(target=_touch, args=(at_end, beside))
            process.start()
            process.join()
            assert (process.exitcode != 0) == beside


@pytest.mark.slow
def test_a_run_goes_on_where_it_was_cut_off(tmp_path):
    isas = cpu._C.supported_isas()
    whole = fuzz.fuzz(300, 2, isas, tmp_path / "whole.json")
    fuzz.fuzz(100, 2, isas, tmp_path / "parts.json")
    parts = fuzz.fuzz(300, 2, isas, tmp_path / "parts.json")
    assert whole["sources"] == parts["sources"]
    assert whole["cases"] == parts["cases"] >= 300
    assert whole["wrong_cases"] == 0
    with pytest.raises(SystemExit, match="is of seed 2"):
        fuzz.fuzz(300, 3, isas, tmp_path / "parts.json")


# what was wrong once: file, text, what it was, and a word of the complaint that finds it
MUTANTS = {
    "dead lanes keep what the workspace held": (
        "csrc/head.inc",
        "if (p_.target) clear_dead_lanes(r.target_held, rows);",
        "",
        "dweight",
    ),
    "a strided buffer is taken for a dense one": (
        "dllm_kernels/head/forward_backward.py",
        "return buffer, dense and not any(other is not None and checks.may_overlap(buffer, other) for other in others)",
        "return buffer, True",
        "",
    ),
    "an id that stands twice in a row is counted twice": (
        "csrc/head.inc",
        "if (l >= rows || among(ids, m, ids[m])) z[l] = -kInf;",
        "if (l >= rows) z[l] = -kInf;",
        "logp",
    ),
    "the coefficients of an id that stands twice are not added": (
        "dllm_kernels/backends/targets.py",
        "    if M < 2:\n        return coef_NM\n",
        "    return coef_NM\n",
        "dhidden",
    ),
    "rows changed before backward go unnoticed": (
        "dllm_kernels/head/autograd.py",
        "*problem.of_rows(), *operands)",
        "*[None if x is None else x.data for x in problem.of_rows()], *operands)",
        "was not refused",
    ),
    "0 times minus infinity": ("dllm_kernels/head/forward_backward.py", ".masked_fill(coef_N == 0, 0.0)", "", "sum"),
    "a tangent is lost": ("dllm_kernels/head/options.py", "dual = forward_ad._current_level >= 0", "dual = False", "tangent"),
    "the last row of a panel is read beside": (
        "csrc/gemm.inc",
        "const __mmask16 there = first_lanes(count - j), wanted = first_lanes(width - j);",
        "const __mmask16 there = first_lanes(16), wanted = first_lanes(width - j);",
        "the process died",
    ),
}


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("name", MUTANTS)
def test_a_defect_that_is_put_back_is_found(name, tmp_path):
    file, right, wrong, word = MUTANTS[name]
    for part in ("dllm_kernels", "benchmarks", "csrc", "setup.py", "pyproject.toml", "README.md", "LICENSE", "trainer"):
        (shutil.copytree if (ROOT / part).is_dir() else shutil.copy)(ROOT / part, tmp_path / part)
    text = (tmp_path / file).read_text()
    assert text.count(right) == 1, "the place of the defect has moved"
    (tmp_path / file).write_text(text.replace(right, wrong))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    if file.startswith("csrc"):
        for built in tmp_path.glob("dllm_kernels/*.so"):
            built.unlink()
        build = [sys.executable, "setup.py", "build_ext", "--inplace"]
        subprocess.run(build, cwd=tmp_path, env=environment, check=True, capture_output=True)
    state = tmp_path / "state.json"
    command = [sys.executable, "benchmarks/fuzz.py", "--cases", "20000", "--seed", "0", "--stop", "--state", str(state)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr[-2000:]
    found = json.loads(state.read_text())
    assert found["wrong_cases"] > 0
    assert word in str(found["wrong"])
