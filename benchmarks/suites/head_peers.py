"""Other people's fused heads, on the inputs of the `head` suite. One that is not installed, or cannot do a case, says so."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.registry import Contestant, Result, Runner

TORCH_CHUNK = 64  # rows; the default of F.linear_cross_entropy is 8 at H = 512, V = 32768: 15 to 20 times slower than eager
VOCAB_CHUNK = 4096  # Liger's own default, and a good one for TRL

Leaves = Callable[[], tuple[Tensor, Tensor]]
Chosen = Callable[[Tensor], Tensor]
LogProb = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden, weight, target -> logp
Loader = Callable[[int, float | None], tuple[LogProb | None, str]]  # rows, softcap -> the function and a note


def contestants(
    plan: str, leaves: Leaves, chosen: Chosen, target_N: Tensor, coef_N: Tensor, softcap: float | None = None
) -> list[Contestant]:
    """`leaves` makes hidden states of all positions and the weight; `chosen` picks the rows, which is part of their work."""
    peers: list[tuple[str, Loader]] = [("torch linear_ce", _torch), ("Liger chunked", _liger), ("TRL chunked", _trl)]
    if target_N.is_cuda:
        peers += [("Liger FLCE", _liger_flce), ("CCE", _cce), ("QuACK", _quack)]
    found = []
    for name, load in peers:
        if plan == "sample":
            found.append(Contestant(name, "peer", absent="it does not sample"))
            continue
        if softcap is not None and load not in (_liger_flce, _cce):
            found.append(Contestant(name, "peer", absent="it has no softcap"))
            continue
        try:
            logp, note = load(len(target_N), softcap)
        except Exception as error:  # an installed peer whose insides have moved
            logp, note = None, f"{type(error).__name__}: {error}"
        if logp is None:
            found.append(Contestant(name, "peer", absent=note))
        else:
            make = functools.partial(_runner, logp, plan, leaves, chosen, target_N, coef_N)
            found.append(Contestant(name, "peer", make, note=note))
    return found


def _runner(logp: LogProb, plan: str, leaves: Leaves, chosen: Chosen, target_N: Tensor, coef_N: Tensor) -> Runner:
    hidden, weight = leaves()

    def run() -> Result:
        hidden.grad = weight.grad = None
        with torch.set_grad_enabled(plan != "forward"):
            logp_N = logp(chosen(hidden), weight, target_N)
        if plan != "forward":
            logp_N.backward(coef_N)
        found = {"logp": logp_N.detach(), "dhidden": hidden.grad, "dweight": weight.grad}
        return {name: value for name, value in found.items() if value is not None}

    return run


def _torch(rows: int, _: float | None) -> tuple[LogProb | None, str]:
    if not hasattr(F, "linear_cross_entropy") or not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return None, f"torch {torch.__version__} has no chunked F.linear_cross_entropy"
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=min(TORCH_CHUNK, rows))

    def logp(hidden: Tensor, weight: Tensor, target_N: Tensor) -> Tensor:
        # "none": the scalar reductions cannot weigh rows
        return -F.linear_cross_entropy(hidden, weight, target_N, reduction="none", options=options)

    return logp, f"{TORCH_CHUNK}-row chunks, logp only"


def _liger(rows: int, _: float | None) -> tuple[LogProb | None, str]:
    if importlib.util.find_spec("liger_kernel") is None:
        return None, "not installed: pip install --no-deps liger-kernel"
    module = importlib.import_module("liger_kernel.chunked_loss.fused_linear_ppo")
    function = module._ChunkedSelectiveLogProbFunction

    def logp(hidden: Tensor, weight: Tensor, target_N: Tensor) -> Tensor:
        return function.apply(hidden, weight, target_N, None, 1.0, VOCAB_CHUNK)

    return logp, f"{importlib.metadata.version('liger-kernel')}, pure PyTorch, logp only"


def _trl(rows: int, _: float | None) -> tuple[LogProb | None, str]:
    if importlib.util.find_spec("trl") is None:
        return None, "not installed: pip install trl"
    function = importlib.import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction

    def logp(hidden: Tensor, weight: Tensor, target_N: Tensor) -> Tensor:
        return function.apply(hidden, weight, None, target_N, 1.0, VOCAB_CHUNK, None, 1.0, ())[0]

    return logp, f"{importlib.metadata.version('trl')}, torch ops, logp only"


def _liger_flce(rows: int, softcap: float | None) -> tuple[LogProb | None, str]:
    if importlib.util.find_spec("liger_kernel") is None:
        return None, "not installed: pip install --no-deps liger-kernel"
    loss = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss(
        reduction="none", softcap=softcap
    )

    def logp(hidden: Tensor, weight: Tensor, target_N: Tensor) -> Tensor:
        return -loss(weight, hidden, target_N)

    return logp, f"{importlib.metadata.version('liger-kernel')}, Triton, reduction none, logp only"


def _cce(rows: int, softcap: float | None) -> tuple[LogProb | None, str]:
    if importlib.util.find_spec("cut_cross_entropy") is None:
        return None, "not installed: pip install --no-deps cut-cross-entropy"
    function = importlib.import_module("cut_cross_entropy").linear_cross_entropy

    def logp(hidden: Tensor, weight: Tensor, target_N: Tensor) -> Tensor:
        # without its filter, which drops small probabilities from the gradient
        return -function(hidden, weight, target_N, softcap=softcap, reduction="none", filter_eps=None)

    return logp, f"{importlib.metadata.version('cut-cross-entropy')}, exact (no filter), logp only"


def _quack(rows: int, _: float | None) -> tuple[LogProb | None, str]:
    if importlib.util.find_spec("quack") is None:
        return None, "not installed: pip install quack-kernels"
    function = importlib.import_module("quack.linear_cross_entropy").linear_cross_entropy_func

    def logp(hidden: Tensor, weight: Tensor, target_N: Tensor) -> Tensor:
        return -function(hidden, weight, None, target_N, reduction="none").float()

    return logp, f"{importlib.metadata.version('quack-kernels')}, full logits: its chunked path takes no coefficients"
