"""The Triton backend without a GPU: the head suite in the interpreter, and every kernel compiled for GPUs that are not here."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is made for Linux alone")

# one of each kernel, option and plan, in the dtypes that reach them; test-full runs the whole suite
QUICK = (
    "test_error_is_that_of_fp32_statistics_and_no_more_than_eager_pytorch[triton-unit-everything-torch.bfloat16]",
    "test_error_is_that_of_fp32_statistics_and_no_more_than_eager_pytorch[triton-keep-plain-torch.float16]",
    "test_error_is_that_of_fp32_statistics_and_no_more_than_eager_pytorch[triton-recompute-everything-torch.bfloat16]",
    "test_error_is_that_of_fp32_statistics_and_no_more_than_eager_pytorch[triton-coef-plain-torch.float32]",
    "test_head_backward_equals_autograd_and_adds_into_its_buffers[triton-torch.bfloat16]",
    "test_one_allowed_id_among_many_has_probability_one[triton-coef]",
    "test_a_vocabulary_of_one_has_logp_0_entropy_0_and_no_gradient[triton-torch.float32-keep]",
    "test_the_layout_of_the_weight_does_not_matter[triton-torch.bfloat16-coef-every_other_column]",
    "test_pitfall_phantom_columns_of_a_vocabulary_that_is_no_multiple_of_anything[triton-129]",
    "test_pitfall_softcap_must_not_revive_suppressed_columns[triton-torch.bfloat16]",
    "test_pitfall_running_max_starts_at_minus_infinity[triton--1000.0]",
    "test_pitfall_minus_infinity_logits_add_exactly_0_to_entropy_and_gradients[triton-torch.float32-unit]",
    "test_pitfall_the_true_class_gradient_survives_p_near_1[triton-torch.bfloat16-coef]",
    "test_the_gradient_of_an_id_keeps_its_digits_where_its_probability_is_nearly_1[triton-torch.float32]",
    "test_pitfall_a_common_offset_of_2_to_24_costs_no_digits[triton]",
    "test_pitfall_row_offsets_beyond_2_to_31[triton]",
    "test_a_non_finite_hidden_state_is_reported_with_its_row[triton-nan]",
    "test_a_constant_added_to_all_logits_changes_nothing_but_lse[triton-torch.float32]",
    "test_divergences_and_their_gradients_are_those_of_full_logits[triton-mean-jsd]",
    "test_divergences_and_their_gradients_are_those_of_full_logits[triton-none-reverse_kl]",
    "test_divergences_of_low_precision_have_the_errors_of_their_inputs[triton-torch.bfloat16-forward_kl]",
    "test_logits_in_the_hundreds_and_rising_from_slab_to_slab_lose_no_digits[triton]",
)


def interpreted(*arguments: str, timeout: int) -> str:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=timeout, env=environment
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def test_kernels_agree_with_the_float64_reference_in_the_interpreter():
    from tests.backends.triton import interpreted as checks

    said = interpreted("-m", "tests.backends.triton.interpreted", timeout=800)
    assert [line for line in said.splitlines() if line] == [check.__name__ for check in checks.CHECKS]


def test_the_head_suite_passes_in_the_interpreter():
    said = interpreted(
        "-m", "pytest", "-p", "no:cacheprovider", *(f"tests/head/test_head.py::{name}" for name in QUICK), timeout=800
    )
    assert f"{len(QUICK)} passed" in said


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_kernel_touches_what_lies_beside_its_tensors():
    assert "13 kernels" in interpreted("-m", "tests.backends.triton.guarded", "whole", timeout=1800)


@pytest.mark.slow
def test_a_kernel_that_does_touch_it_dies():
    with pytest.raises(AssertionError):
        interpreted("-m", "tests.backends.triton.guarded", "beyond", timeout=800)


def test_every_launch_says_whether_sums_and_products_are_fused():
    """Triton's own default changed in 3.10."""
    for path in (ROOT / "dllm_kernels" / "backends" / "triton").glob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Subscript) and "kernel" in ast.unparse(call.func.value):
                assert "**ARITHMETIC" in ast.unparse(call), f"{path.name}:{call.lineno}"
    from dllm_kernels.backends.triton.configs import ARITHMETIC

    assert ARITHMETIC == {"enable_fp_fusion": False}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_all_of_the_head_suite_passes_in_the_interpreter():
    said = interpreted(
        "-m", "pytest", "-p", "no:cacheprovider", "--timeout=900", "tests/head/test_head.py", "-k", "triton", timeout=3600
    )
    assert "passed" in said
    assert "skipped" not in said


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_representative_kernels_compile_without_spills_and_with_matrix_instructions(target):
    from dllm_kernels.backends.triton import gate

    chosen = [v for v in gate.variants(target) if v.quick and (target == "sm_90" or v.matrix)]
    assert any(variant.matrix for variant in chosen)
    for variant in chosen:
        made = gate.compile_variant(variant, gate.TARGETS[target])
        assert made.faults == (), variant.name
        assert made.registers > 0
        assert 0 < made.occupancy <= 1
        assert made.matrix or not variant.matrix


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_kernel_and_configuration_compiles_without_spills(target):
    from dllm_kernels.backends.triton import gate

    assert gate.main(["--target", target]) == 0


def test_the_gate_refuses_spills_too_much_shared_memory_and_missing_matrix_instructions(monkeypatch):
    """It can fail: the same kernel against a device with less shared memory and other instructions, and one that spills."""
    from dllm_kernels.backends.triton import gate

    variant = next(v for v in gate.variants("gfx942") if v.matrix)
    small = gate.Target(gate.TARGETS["gfx942"].gpu, 1024, "wgmma", shared_in_all=1 << 20)
    faults = " ".join(gate.compile_variant(variant, small).faults)
    assert "bytes of shared memory, the device has 1024" in faults
    assert "no wgmma" in faults
    made = gate.compile_variant(variant, gate.TARGETS["gfx942"])
    monkeypatch.setattr(gate, "_number", lambda pattern, text: 40)
    assert "40 bytes of registers or arrays in local memory" in " ".join(
        gate.compile_variant(variant, gate.TARGETS["gfx942"]).faults
    )
    assert made.faults == ()


def test_importing_the_library_and_calling_it_on_the_cpu_imports_no_triton():
    code = (
        "import sys, torch, dllm_kernels\n"
        "dllm_kernels.score_tokens(torch.ones(1, 2), torch.ones(3, 2), torch.zeros(1, dtype=torch.int64))\n"
        "dllm_kernels.explain(rows=1, hidden_size=2, vocabulary=3).on('H100')\n"
        "assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=800, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_forced_without_a_gpu_it_says_what_it_takes_and_cuda_tensors_select_it(monkeypatch):
    from dllm_kernels import backends

    monkeypatch.delenv("DLLM_KERNELS_BACKEND", raising=False)
    assert backends.for_device(torch.device("cuda")).NAME == "triton"
    assert backends.for_device(torch.device("cpu")).NAME != "triton"
    monkeypatch.setenv("DLLM_KERNELS_BACKEND", "triton")
    assert backends.for_device(torch.device("cuda")).NAME == "triton"
    with pytest.raises(ValueError, match="DLLM_KERNELS_BACKEND=triton cannot run here: the tensors are on cpu"):
        backends.for_device(torch.device("cpu"))


def test_chunks_follow_from_the_budget_and_the_vocabulary_alone():
    from dllm_kernels.backends.triton.configs import chunk_rows, spans

    assert [chunk_rows(V, 4, "cuda") for V in (126464, 152064, 262144, 1000, 2_000_000)] == [1024, 768, 512, 1024, 256]
    assert chunk_rows(126464, 6, "cuda") == 512
    assert spans(2100, 1024) == [(0, 1024, 1024), (1024, 1024, 1024), (2048, 52, 256)]
    for total in (0, 1, 256, 257, 1023, 1024, 5000):
        cuts = spans(total, 768)
        assert sum(count for _, count, _ in cuts) == total
        assert {padded for *_, padded in cuts} <= {256, 768}
