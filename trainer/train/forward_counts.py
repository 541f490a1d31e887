"""What goes through a model: sequences, tokens and operations, of all forwards and of those that a backward follows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Calls:
    """Counts while it is entered; one sequence through a model, whatever model, is one forward.

    FLOPs by formula: 2 x parameters x tokens of a forward; as much again in backward for the hidden states, and 2 x trained
    parameters x tokens for the weights. Parameters are those of products: embeddings that are only looked up are left out,
    and the head counts at every token, though ours runs at fewer. Attention's products of tokens with tokens are left out.
    """

    def __init__(self, *models: nn.Module) -> None:
        self._models = models
        self._hooks: list[Any] = []
        self.reset()

    def reset(self) -> None:
        self.forwards = self.backwards = self.flops = 0

    def __enter__(self) -> Calls:
        self._hooks = [
            model.register_forward_pre_hook(_Count(self, model), with_kwargs=True)  # keywords: the ids come as one
            for model in self._models
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()


class _Count:
    def __init__(self, calls: Calls, model: nn.Module) -> None:
        head: Any = getattr(model, "get_output_embeddings", lambda: None)()
        own = None if head is None else head.weight
        looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding) and m.weight is not own}
        multiplied = [p for p in model.parameters() if id(p) not in looked_up]
        self._calls = calls
        self._parameters = sum(p.numel() for p in multiplied)
        self._trained = sum(p.numel() for p in multiplied if p.requires_grad)

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids: Tensor = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        calls, backward = self._calls, torch.is_grad_enabled() and self._trained > 0
        calls.forwards += len(ids)
        calls.backwards += backward * len(ids)
        calls.flops += 2 * ids.numel() * (self._parameters + backward * (self._parameters + self._trained))
