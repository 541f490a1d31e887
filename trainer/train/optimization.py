"""What both training phases share: optimizer, learning rate, data order, the guarded step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import get_scheduler

from dllm_kernels import noise
from dllm_kernels.noise import Stream

from ..config import OptimizerConfig
from ..distributed import clip_gradients
from ..errors import ConfigError, GuardError


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over what is trained; its state has the dtype of the weights, fp32 unless `model.dtype` says otherwise.

    Weight decay is for matrices: neither norms and biases nor embeddings, a head tied to them among these, are decayed.
    """
    beta1, beta2 = config.betas
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    groups: dict[float, list[nn.Parameter]] = {config.weight_decay: [], 0.0: []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            decayed = parameter.ndim >= 2 and id(parameter) not in embeddings
            groups[config.weight_decay if decayed else 0.0].append(parameter)
    of_groups = [{"params": own, "weight_decay": decay} for decay, own in groups.items() if own]
    return torch.optim.AdamW(of_groups, lr=config.lr, betas=(beta1, beta2), fused=True)


def learning_rates(phase: Literal["sft", "rl"], config: OptimizerConfig, total: int) -> Callable[[float], float]:
    """step (0 to total - 1; fractions too) -> learning rate, by `transformers.get_scheduler`.

    Raises ConfigError where the phases of a schedule do not fit into `total`, and where no step has a rate above 0.

    Example:
        >>> from dllm_trainer.config import load_config
        >>> keys = ["sft.lr=0.1", "sft.warmup=2", "sft.schedule=linear"]
        >>> rate = learning_rates("sft", load_config(overrides=keys).sft, 6)
        >>> [round(rate(step), 4) for step in range(6)]
        [0.0, 0.05, 0.1, 0.075, 0.05, 0.025]
    """
    name, options = config.schedule, dict(config.schedule_options)
    steps = f"{phase}.{'steps' if phase == 'sft' else 'updates'}"
    parts = config.warmup + options.get("num_decay_steps", 0) + (options.get("num_stable_steps") or 0)
    if name == "warmup_stable_decay" and parts > total:
        raise ConfigError(
            f"{phase}.warmup, num_stable_steps and num_decay_steps must be at most {steps}={total} together, got {parts}"
        )
    known_as = "constant_with_warmup" if name == "constant" else name  # transformers' own `constant` passes over a warm-up
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=config.lr)
    scheduler = get_scheduler(known_as, optimizer, config.warmup, total, options)
    factor: Callable[[float], float] = scheduler.lr_lambdas[0]
    if total and all(factor(step) == 0 for step in range(total)):
        raise ConfigError(f"{phase}.warmup must be 0 for {steps}={total}, as {name} begins at a rate of 0, got {config.warmup}")
    return lambda step: config.lr * float(factor(step))


def batch_indices(name: str, seed: int, size: int, batch: int, step: int) -> tuple[Tensor, int]:
    """Which of `size` examples step `step` takes, and in which epoch: a new order each epoch, its short rest left out."""
    if batch > size:
        key = {"sft": "sft.batch", "rl": "rl.prompts"}.get(name, name)
        raise ConfigError(f"{key} must be at most the {size} training examples, got {batch}")
    epoch, position = divmod(step, size // batch)
    order = torch.tensor(noise.sequence_id(f"order/{name}", epoch=epoch))
    bits = noise.row_bits(seed, Stream.DATA, order, torch.tensor(0), torch.arange(size))
    return torch.argsort(bits, stable=True)[position * batch : (position + 1) * batch], epoch


def guarded_step(model: nn.Module, optimizer: torch.optim.Optimizer, loss: float, config: OptimizerConfig, lr: float) -> float:
    """Clip and step; returns the gradient norm before clipping. What is not finite never reaches the weights."""
    if not math.isfinite(loss):
        raise GuardError(f"the loss became {loss}; a smaller learning rate than {lr:.2g} usually helps")
    norm = clip_gradients(model, config.max_grad_norm)
    if not math.isfinite(norm):
        raise GuardError(f"the gradient norm became {norm} at loss {loss:.4g}; the weights were left as they were")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return norm
