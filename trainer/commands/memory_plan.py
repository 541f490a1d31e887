"""`dllm-kernels plan`: what a run will hold in memory, term by term, before any weight is loaded.

The framework is this process, with the task's texts; what each call of the model holds is `planned_calls`'.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import torch

from dllm_kernels.objectives import RECIPES

from ..config import RunConfig
from ..errors import UserError, first_line
from ..models import compat
from ..models.loading import parameter_count
from ..records.environment import resident_bytes
from ..train.run import Run  # what a run imports counts as its framework
from .planned_calls import idle_parameters, planned_task, prompt_tokens, skeleton, works_of

__all__ = ["Run", "describe_plan"]

_GPU_BASE = 600 << 20  # CUDA's context and libraries; an estimate


def describe_plan(config: RunConfig, *, ranks: int = 1) -> str:
    """The run's memory per rank, as text. Raises UserError, with the figures, for a run that the device cannot hold."""
    torch.set_num_threads(config.threads)
    if config.tensorboard:
        importlib.import_module("torch.utils.tensorboard")
    task, assumed = planned_task(config)
    resident = resident_bytes() or 0
    setup, known = skeleton(config, task, ranks)
    assumed += known
    tokens = prompt_tokens(setup, assumed)
    model: Any = setup.trained
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = _GPU_BASE if device == "cuda" else resident
    trained = [p for p in model.parameters() if p.requires_grad]
    idle = idle_parameters(config) * model.dtype.itemsize
    learning = _bytes(trained) + (0 if config.model.lora.rank else idle)
    terms = {
        "framework and data": base,
        "weights": (_bytes(model.parameters()) + idle) // ranks,
        "gradients": learning // ranks,
        "optimiser": 2 * learning // ranks,
        "reference policy": 0,
    }
    if config.rl.updates and RECIPES[config.rl.algorithm].wants_reference(config.rl.options):
        if config.rl.teacher is not None:
            terms["reference policy"] = _stored(config.rl.teacher) // ranks
        elif not config.model.lora.rank:
            terms["reference policy"] = terms["weights"]
    works = works_of(setup, ranks, tokens)
    worst = max(works, key=lambda work: work.peak)
    if device == "cpu":  # the optimiser's states are made in what the first step's activations left, which then need new pages
        terms["heap fragmentation"] = min(terms["optimiser"], worst.activations)
    if ranks > 1:
        terms["gathered layers"] = _gathered(model, config)
    total = sum(terms.values()) + worst.peak
    capacity = _capacity(device)
    lines = [
        f"{parameter_count(model) + idle_parameters(config):,} parameters, {learning // model.dtype.itemsize:,} trained; "
        f"{device}, {ranks} rank(s)",
        "",
        *(f"{name:<22}{_mb(value)}" for name, value in terms.items() if value),
        f"{'activations and head':<22}{_mb(worst.peak)}   {worst.name}: {worst.sequences} x {worst.tokens} tokens",
        f"{'predicted peak':<22}{_mb(total)}   of {_mb(capacity).strip()}",
        "",
        f"{'call of the model':<22}{'sequences':>10}{'tokens':>8}{'rows':>9}{'activations':>14}{'head':>14}{'full logits':>14}",
    ]
    for work in works:
        figures = "".join(f"{_mb(value):>14}" for value in (work.activations, work.head, work.logits))
        lines.append(f"{work.name:<22}{work.sequences:>10}{work.tokens:>8}{work.rows:>9}{figures}")
    full = sum(terms.values()) + max(work.peak_with_logits for work in works)
    lines += ["", f"with full logits in place of our kernels: {_mb(full).strip()}", *assumed]
    if total > capacity:
        largest = max([*terms.items(), ("activations and head", worst.peak)], key=lambda item: item[1])
        raise UserError(
            f"this run needs {_mb(total).strip()} on each of {ranks} rank(s) and the {device} has {_mb(capacity).strip()}; "
            f"most of it, {_mb(largest[1]).strip()}, are {largest[0]}: lora.rank, gradient_checkpointing, micro_batch and "
            "more ranks take less"
        )
    return "\n".join(lines)


def is_out_of_memory(error: BaseException) -> bool:
    lacking = ("can't allocate memory", "out of memory", "not enough memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(text in str(error) for text in lacking)


def memory_hint(config: RunConfig, ranks: int) -> str:
    """What `plan` predicts and which keys help, for a run that ran out of memory."""
    try:
        lines = describe_plan(config, ranks=ranks).splitlines()
        peak = next(line for line in lines if line.startswith("predicted peak"))
        told = f"plan predicts a peak of {' '.join(peak.split()[2:])}"
    except Exception as error:  # the prediction must not hide what happened
        told = str(error) if isinstance(error, UserError) else first_line(error)
    return f"{told}; a smaller micro_batch of sft, rl and rollout takes less, and so does model.gradient_checkpointing"


def _bytes(parameters: Any) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def _stored(teacher: str) -> int:
    """Bytes of a checkpoint's weights as they lie in its folder."""
    files = list(Path(teacher).glob("*.safetensors"))
    if not files:
        raise UserError(f"rl.teacher: the plan needs a folder with safetensors, got {teacher}")
    return sum(file.stat().st_size for file in files)


def _gathered(model: Any, config: RunConfig) -> int:
    """FSDP: two layers at a time, whole, the head, and the head's whole gradient in fp32."""
    _, blocks = compat.find_blocks(model)
    head = model.get_output_embeddings().weight
    item = 2 if config.parallel.dtype == "bfloat16" else head.element_size()
    layer = max(sum(p.numel() for p in block.parameters()) for block in blocks)
    whole = 2 * layer if config.parallel.reshard_after_forward else sum(p.numel() for p in blocks.parameters())
    return (whole + head.numel()) * item + 4 * head.numel() * head.requires_grad


def _capacity(device: str) -> int:
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _mb(count: float) -> str:
    return f"{count / 2**20:>10,.1f} MiB"
