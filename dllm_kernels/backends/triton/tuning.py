"""Which form a call takes. Static by default; with DLLM_KERNELS_AUTOTUNE=1 measured once per head and remembered in a file.

The answer depends on the device, the dtype and the head alone, never on N: a row's bits stay its own. The file is
DLLM_KERNELS_CACHE, or ~/.cache/dllm_kernels/triton.json; it holds the milliseconds of every candidate.
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dllm_kernels.backends.contract import HeadProblem
from dllm_kernels.backends.triton import fused, products, rows
from dllm_kernels.backends.triton.configs import USES, Config, config_for

CHUNKS = "chunks"  # the candidate without a fused kernel
MEASURED_ROWS = dict(zip(USES, (4096, 64, 4096)))


def choose(problem: HeadProblem, use: str) -> Config | None:
    """The fused kernel's configuration for one of USES, or None for chunks of logits."""
    p = problem
    adapter = p.low_rank is not None  # which is not measured: the fused kernel alone makes no logits of it
    static = config_for(p.hidden_MH.device, use, interpreted=rows.interpreted())
    if os.environ.get("DLLM_KERNELS_AUTOTUNE") != "1" or rows.interpreted() or adapter:
        return static
    return _tuned(p.hidden_MH.device, p.hidden_MH.dtype, *p.weight_VH.shape, use, static)


def _cache() -> Path:
    return Path(os.environ.get("DLLM_KERNELS_CACHE") or Path.home() / ".cache" / "dllm_kernels" / "triton.json")


def _load() -> dict[str, Any]:
    try:
        found = json.loads(_cache().read_text())
    except (OSError, json.JSONDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def candidates(static: Config) -> dict[str, Config | None]:
    """A handful around the static choice, by name."""
    found: dict[str, Config | None] = {CHUNKS: None, "static": static}
    for stages in {2, 3, static.stages} - {static.stages}:
        found[f"{stages} stages"] = replace(static, stages=stages)
    if static.BN == 256:
        found["128 columns"] = replace(static, BN=128)
    if static.descriptors:
        found["plain loads"] = replace(static, descriptors=False, stages=3)
    return found


@functools.cache
def _tuned(device: torch.device, dtype: torch.dtype, vocabulary: int, width: int, use: str, static: Config) -> Config | None:
    key = f"{torch.cuda.get_device_name(device)}, {dtype}, V={vocabulary}, H={width}, {use}"
    known, options = _load(), candidates(static)
    if key not in known or known[key]["best"] not in options:
        times = {name: _milliseconds(config, device, dtype, vocabulary, width, use) for name, config in options.items()}
        best = min(times, key=lambda name: times[name])
        known[key] = {"best": best, "milliseconds": times, "static": asdict(static)}
        _cache().parent.mkdir(parents=True, exist_ok=True)
        _cache().write_text(json.dumps(known, indent=1) + "\n")
    return options[known[key]["best"]]


def _milliseconds(
    config: Config | None, device: torch.device, dtype: torch.dtype, vocabulary: int, width: int, use: str
) -> float:
    """Median of a few calls on random data; infinity where the configuration does not run."""
    count, draw = MEASURED_ROWS[use], use != "statistics"
    # spread like activations, and no draw from a global random state
    hidden_NH = torch.arange(count * width, device=device, dtype=torch.float32).sin_().view(count, width).to(dtype)
    weight_VH = (
        torch.arange(vocabulary * width, device=device, dtype=torch.float32).cos_().view(vocabulary, width) * width**-0.5
    ).to(dtype)
    p = HeadProblem(hidden_NH, weight_VH, torch.zeros(count, dtype=torch.int64, device=device))
    names = ("token", "logp", "entropy", "lse") if draw else ("logp", "lse")
    result = {name: torch.empty(count, dtype=torch.int64 if name == "token" else torch.float32, device=device) for name in names}

    def call() -> None:
        if config is not None:
            fused.fused(p, result, config, key_N=p.target_N, temperature=1.0)
            return
        for start in range(0, count, 1024):
            span = slice(start, start + 1024)
            logits_CV = torch.empty(len(hidden_NH[span]), vocabulary, device=device)
            products.logits_(logits_CV, hidden_NH[span], weight_VH)
            part = {name: vector[span] for name, vector in result.items()}
            more: dict[str, Any] = (
                {"key_N": p.target_N[span], "noise_temperature": 1.0} if draw else {"target_N": p.target_N[span]}
            )
            rows.row_statistics(logits_CV, p.options, part, **more)

    try:
        return _median(call)
    except Exception:  # a configuration that this card or compiler refuses is no candidate
        return float("inf")


def _median(call: Any) -> float:
    call()
    times: list[float] = []
    for _ in range(7):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return float(Tensor(times).median())
