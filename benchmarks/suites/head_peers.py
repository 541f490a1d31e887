"""Other people's fused heads on the inputs of the suite `head`; one that cannot run a case says why."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from importlib.metadata import version
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.registry import Contestant, Result, Work
from benchmarks.suites.head_inputs import Inputs

# rows; the default of F.linear_cross_entropy is 8 at H = 512, V = 32768: 15 to 20 times slower than eager
TORCH_CHUNK = 64
VOCAB_CHUNK = 4096  # Liger's own default, and a good one for TRL

LogProb = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden, weight, target -> logp
Loader = Callable[[int, float | None], tuple[LogProb, str]]  # rows, softcap -> the function and a note


class AbsentError(Exception):
    """Why a peer is not here."""


def _module(name: str, install: str) -> ModuleType:
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        raise AbsentError(f"not installed: pip install {install}")
    return importlib.import_module(name)


def _torch(rows: int, _: float | None) -> tuple[LogProb, str]:
    if not hasattr(F, "linear_cross_entropy") or not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise AbsentError(f"torch {torch.__version__} has no chunked F.linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=min(TORCH_CHUNK, rows))

    def logp(hidden: Tensor, weight: Tensor, target_N: Tensor) -> Tensor:
        # "none": the scalar reductions cannot weigh rows
        return -F.linear_cross_entropy(hidden, weight, target_N, reduction="none", options=options)

    return logp, f"{TORCH_CHUNK}-row chunks, logp only"


def _liger(rows: int, _: float | None) -> tuple[LogProb, str]:
    module = _module("liger_kernel.chunked_loss.fused_linear_ppo", "--no-deps liger-kernel")
    function = module._ChunkedSelectiveLogProbFunction

    def logp(hidden: Tensor, weight: Tensor, target_N: Tensor) -> Tensor:
        return function.apply(hidden, weight, target_N, None, 1.0, VOCAB_CHUNK)

    return logp, f"{version('liger-kernel')}, pure PyTorch, logp only"


def _trl(rows: int, _: float | None) -> tuple[LogProb, str]:
    function = _module("trl.kernels.chunked_logprob", "trl").ChunkedLogProbFunction

    def logp(hidden: Tensor, weight: Tensor, target_N: Tensor) -> Tensor:
        return function.apply(hidden, weight, None, target_N, 1.0, VOCAB_CHUNK, None, 1.0, ())[0]

    return logp, f"{version('trl')}, torch ops, logp only"


def _liger_flce(rows: int, softcap: float | None) -> tuple[LogProb, str]:
    module = _module("liger_kernel.transformers", "--no-deps liger-kernel")
    loss = module.LigerFusedLinearCrossEntropyLoss(reduction="none", softcap=softcap)

    def logp(hidden: Tensor, weight: Tensor, target_N: Tensor) -> Tensor:
        return -loss(weight, hidden, target_N)

    return logp, f"{version('liger-kernel')}, Triton, reduction none, logp only"


def _cce(rows: int, softcap: float | None) -> tuple[LogProb, str]:
    function = _module("cut_cross_entropy", "--no-deps cut-cross-entropy").linear_cross_entropy

    def logp(hidden: Tensor, weight: Tensor, target_N: Tensor) -> Tensor:
        # without its filter, which drops small probabilities from the gradient
        return -function(hidden, weight, target_N, softcap=softcap, reduction="none", filter_eps=None)

    return logp, f"{version('cut-cross-entropy')}, exact (no filter), logp only"


def _quack(rows: int, _: float | None) -> tuple[LogProb, str]:
    function = _module("quack.linear_cross_entropy", "quack-kernels").linear_cross_entropy_func

    def logp(hidden: Tensor, weight: Tensor, target_N: Tensor) -> Tensor:
        return -function(hidden, weight, None, target_N, reduction="none").float()

    return logp, f"{version('quack-kernels')}, full logits: its chunked path takes no coefficients"


def _setup(x: Inputs, load: Loader) -> Work:
    logp, note = load(len(x.target_N), x.softcap)
    hidden, weight = x.leaves()

    def run() -> Result:
        hidden.grad = weight.grad = None
        with torch.set_grad_enabled(x.plan != "forward"):
            logp_N = logp(x.chosen(hidden), weight, x.target_N)
        if x.plan != "forward":
            logp_N.backward(x.coef_N)
        return x.result(logp_N, hidden, weight)

    return Work(run, note=note)


def _applies(x: Inputs, load: Loader, softcap: bool) -> str:
    if x.plan == "sample":
        return "it does not sample"
    if x.softcap is not None and not softcap:
        return "it has no softcap"
    return absent(x, load)


def absent(x: Inputs, load: Loader) -> str:
    """Why a peer cannot run; nothing where it can."""
    try:
        load(len(x.target_N), x.softcap)
    except AbsentError as reason:
        return str(reason)
    except Exception as error:  # an installed peer whose insides have moved
        return f"{type(error).__name__}: {error}"
    return ""


def _peer(name: str, load: Loader, softcap: bool = False) -> Contestant:
    applies = functools.partial(_applies, load=load, softcap=softcap)
    return Contestant(name, "peer", functools.partial(_setup, load=load), applies)


CHUNKED: dict[str, Loader] = {"torch linear_ce": _torch, "Liger chunked": _liger, "TRL chunked": _trl}
PEERS = tuple(_peer(name, load) for name, load in CHUNKED.items())
GPU_PEERS = (_peer("Liger FLCE", _liger_flce, softcap=True), _peer("CCE", _cce, softcap=True), _peer("QuACK", _quack))
