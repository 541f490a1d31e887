"""Other people's fused heads, on the inputs of the `head` suite. One that is not installed, or cannot do a case, says so."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.registry import Contestant, Result, Runner

TORCH_CHUNK = 64  # rows; the default of F.linear_cross_entropy is 8 at H = 512, V = 32768: 15 to 20 times slower than eager
VOCAB_CHUNK = 4096  # Liger's own default, and a good one for TRL

Leaves = Callable[[], tuple[Tensor, Tensor]]
LogProb = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden, weight, target -> logp


def contestants(plan: str, leaves: Leaves, target_N: Tensor, coef_N: Tensor) -> list[Contestant]:
    peers: Sequence[tuple[str, Callable[[int], tuple[LogProb | None, str]]]] = (
        ("torch linear_ce", _torch),
        ("Liger chunked", _liger),
        ("TRL chunked", _trl),
    )
    found = []
    for name, load in peers:
        if plan == "sample":
            found.append(Contestant(name, "peer", absent="it does not sample"))
            continue
        try:
            logp, note = load(len(target_N))
        except Exception as error:  # an installed peer whose insides have moved
            logp, note = None, f"{type(error).__name__}: {error}"
        if logp is None:
            found.append(Contestant(name, "peer", absent=note))
        else:
            make = functools.partial(_runner, logp, plan, leaves, target_N, coef_N)
            found.append(Contestant(name, "peer", make, note=note))
    return found


def _runner(logp: LogProb, plan: str, leaves: Leaves, target_N: Tensor, coef_N: Tensor) -> Runner:
    hidden, weight = leaves()

    def run() -> Result:
        hidden.grad = weight.grad = None
        with torch.set_grad_enabled(plan != "forward"):
            logp_N = logp(hidden, weight, target_N)
        if plan != "forward":
            logp_N.backward(coef_N)
        found = {"logp": logp_N.detach(), "dhidden": hidden.grad, "dweight": weight.grad}
        return {name: value for name, value in found.items() if value is not None}

    return run


def _torch(rows: int) -> tuple[LogProb | None, str]:
    if not hasattr(F, "linear_cross_entropy") or not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return None, f"torch {torch.__version__} has no chunked F.linear_cross_entropy"
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=min(TORCH_CHUNK, rows))

    def logp(hidden: Tensor, weight: Tensor, target_N: Tensor) -> Tensor:
        # "none": the scalar reductions cannot weigh rows
        return -F.linear_cross_entropy(hidden, weight, target_N, reduction="none", options=options)

    return logp, f"{TORCH_CHUNK}-row chunks, logp only"


def _liger(rows: int) -> tuple[LogProb | None, str]:
    if importlib.util.find_spec("liger_kernel") is None:
        return None, "not installed: pip install --no-deps liger-kernel"
    module = importlib.import_module("liger_kernel.chunked_loss.fused_linear_ppo")
    function = module._ChunkedSelectiveLogProbFunction

    def logp(hidden: Tensor, weight: Tensor, target_N: Tensor) -> Tensor:
        return function.apply(hidden, weight, target_N, None, 1.0, VOCAB_CHUNK)

    return logp, f"{importlib.metadata.version('liger-kernel')}, pure PyTorch, logp only"


def _trl(rows: int) -> tuple[LogProb | None, str]:
    if importlib.util.find_spec("trl") is None:
        return None, "not installed: pip install trl"
    function = importlib.import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction

    def logp(hidden: Tensor, weight: Tensor, target_N: Tensor) -> Tensor:
        return function.apply(hidden, weight, None, target_N, 1.0, VOCAB_CHUNK, None, 1.0, ())[0]

    return logp, f"{importlib.metadata.version('trl')}, torch ops, logp only"
