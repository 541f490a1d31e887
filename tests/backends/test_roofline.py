"""The roofline against numbers worked out by hand."""

from pathlib import Path

import pytest
import torch

from dllm_kernels import explain
from dllm_kernels.backends.triton.roofline import DEVICES

LLADA = {"rows": 1024, "hidden_size": 4096, "vocabulary": 126464, "dtype": torch.bfloat16}
GEMM = 2 * 1024 * 4096 * 126464  # 1.0609e12 operations
HEAD, HIDDEN, LOGITS = 126464 * 4096, 1024 * 4096, 1024 * 126464


def test_forward_is_bound_by_one_product_and_reads_the_head_once():
    cost = explain(**LLADA, wants_gradient=False)
    found = cost.on("H100")
    assert found.arithmetic == pytest.approx(1.0609e12 / 989.4e12, rel=1e-4)
    parts = 247 * 28 * 1024  # 247 segments of 512 columns, 28 bytes each, written and read
    assert found.traffic == pytest.approx((2 * (HEAD + HIDDEN) + 2 * parts) / 3350e9)
    assert found.seconds == pytest.approx(GEMM / 989.4e12 + parts / 3350e9)  # 1.0744 ms
    assert found.seconds == pytest.approx(1.0744e-3, rel=1e-4)


def test_a_frozen_head_is_two_products_and_ten_bytes_per_logit_between_them():
    """One chunk of 1024 rows: the row kernel reads fp32 twice and writes 16 bits."""
    found = explain(**LLADA).on("H200")
    assert found.arithmetic == pytest.approx(2 * GEMM / 989.4e12)
    assert found.seconds == pytest.approx(2 * GEMM / 989.4e12 + 10 * LOGITS / 4800e9)  # 2.1445 + 0.2698 ms
    assert found.seconds == pytest.approx(2.4143e-3, rel=1e-4)
    logits, dhidden = 2 * (HEAD + HIDDEN) + 4 * LOGITS, 2 * (LOGITS + HEAD) + 4 * HIDDEN
    assert found.traffic == pytest.approx((logits + 10 * LOGITS + dhidden) / 4800e9)


def test_decoding_32_rows_is_bound_by_reading_the_head():
    found = explain(**{**LLADA, "rows": 32}, wants_gradient=False).on("A100")
    assert found.traffic > 4.5 * found.arithmetic
    assert found.seconds == pytest.approx(2 * HEAD / 2039e9, rel=0.01)  # 0.508 ms


def test_a_trainable_head_adds_a_product_and_its_fp32_buffer():
    known = explain(**LLADA, trainable_head=True, coef_known=True).on("MI300")
    frozen = explain(**LLADA, coef_known=True).on("MI300")
    assert known.arithmetic - frozen.arithmetic == pytest.approx(GEMM / 1307.4e12)
    assert known.traffic - frozen.traffic == pytest.approx((2 * (LOGITS + HIDDEN) + 4 * HEAD) / 5300e9)


def test_an_adapter_on_a_frozen_head_is_a_pass_over_each_chunk_and_none_where_logits_are_not_made(monkeypatch):
    """One chunk of 1024 rows: its fp32 logits are read and written, its 16-bit operand is read for dH and for dB."""
    monkeypatch.delenv("DLLM_KERNELS_BACKEND", raising=False)
    N, H, V = LLADA["rows"], LLADA["hidden_size"], LLADA["vocabulary"]
    on = {"dtype": torch.bfloat16, "device": "meta"}
    hidden, weight, target = torch.empty(N, H, **on), torch.empty(V, H, **on), torch.empty(N, dtype=torch.int64, device="meta")
    low = torch.empty(16, H, **on).requires_grad_(), torch.empty(V, 16, **on).requires_grad_(), 1.0
    more = {"coef": torch.empty(N, device="meta"), "low_rank": low, "device": "cuda"}
    cost = explain(hidden.requires_grad_(), weight, target, **more)
    without = explain(hidden, weight, target, coef=more["coef"], device="cuda")
    assert cost.on("H200").traffic - without.on("H200").traffic == pytest.approx((8 + 2 + 2) * LOGITS / 4800e9)
    assert cost.on("H200").arithmetic - without.on("H200").arithmetic == pytest.approx(3 * 2 * 16 * LOGITS / 989.4e12)
    assert "one more pass" in cost.why
    with torch.no_grad():
        fused = explain(hidden, weight, target, low_rank=low, device="cuda")
    assert "one more pass" not in fused.why
    assert fused.on("H200").seconds < 1.02 * explain(**LLADA, wants_gradient=False).on("H200").seconds


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "more",
    [
        {"wants_gradient": False},
        {},
        {"coef_known": True},
        {"plan": "keep", "trainable_head": True},
        {"plan": "recompute", "trainable_head": True},
        {"want": ("logp", "entropy")},
        {"dtype": torch.float32},
    ],
    ids=str,
)
def test_every_plan_s_arithmetic_is_its_products_and_the_whole_lies_between_the_bounds(device, more):
    cost = explain(**{**LLADA, "rows": 4096, **more})
    found = cost.on(device)
    rate = DEVICES[device].tflops_fp32 if cost.dtype == torch.float32 else DEVICES[device].tflops_16bit
    assert found.arithmetic == pytest.approx(cost.flops / rate / 1e12)
    assert max(found.arithmetic, found.traffic) <= found.seconds <= found.arithmetic + found.traffic


def test_unknown_devices_and_float64_are_refused():
    with pytest.raises(ValueError, match="device must be one of 'A100', 'H100', 'H200', 'MI300', got 'TPU'"):
        explain(**LLADA).on("TPU")
    with pytest.raises(ValueError, match="float64"):
        explain(**{**LLADA, "dtype": torch.float64}).on("H100")


def test_the_predictions_in_the_documentation_are_those_of_explain():
    text = (Path(__file__).resolve().parents[2] / "docs" / "triton_engine.md").read_text()
    lines = [
        line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ") and " x " in line.split(" | ")[0]
    ]
    assert len(lines) == 5
    for head, *cells in lines:
        _, hidden_size, _, vocabulary = head.split()
        sizes = {"rows": 4096, "hidden_size": int(hidden_size), "vocabulary": int(vocabulary), "dtype": torch.bfloat16}
        plans = (
            {"wants_gradient": False},
            {},
            {"coef_known": True, "trainable_head": True},
            {"plan": "recompute", "trainable_head": True},
        )
        for more, cell in zip(plans, cells, strict=True):
            found = explain(**sizes, **more).on("H200")
            assert cell == f"{1e3 * found.seconds:.2f} ({1e3 * found.arithmetic:.2f})"
