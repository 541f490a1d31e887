"""What peft put on a head, and whether a head's own forward is the map that its options say. peft is not imported."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Get = Callable[[str], Tensor | None]
LowRank = tuple[Tensor, Tensor, float]

_PEER = "merge it or take it off the head"


def in_use(head: nn.Module) -> nn.Module:
    """The module whose forward runs: of a head in peft's `modules_to_save` the copy of the active adapter.

    Raises ValueError for another wrapper with an adapter switched on.
    """
    wrapper: Any = head
    if not hasattr(wrapper, "original_module"):
        return head
    active = [] if wrapper.disable_adapters else wrapper.active_adapters
    copies = getattr(wrapper, "modules_to_save", {})
    if not active:
        module: nn.Module = wrapper.original_module
    elif len(active) == 1 and active[0] in copies:
        module = copies[active[0]]
    else:
        raise ValueError(f"model's head must not be wrapped by peft's {type(head).__name__} with adapters {', '.join(active)}")
    return module


def parameters(head: nn.Module) -> dict[str, Tensor]:
    """A and B of each LoRA adapter on the head, by the names under which `low_rank` asks for them."""
    layer: Any = head
    if not isinstance(getattr(layer, "lora_A", None), nn.ModuleDict):
        return {}
    return {
        f"{side}.{name}": modules[name].weight
        for side, modules in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B))
        for name in modules
    }


def active_names(head: nn.Module) -> list[str]:
    """The names of those that act apart from the weight."""
    layer: Any = head
    if not hasattr(layer, "base_layer") or layer.disable_adapters or layer.merged:
        return []
    return [f"{side}.{name}" for name in _active(layer) for side in ("lora_A", "lora_B")]


def low_rank(head: nn.Module, get: Get) -> LowRank | None:
    """The active adapters as `(A, B, scale)`, those of several along R; None where none acts apart from the weight.

    Raises ValueError, naming the adapter, for one that is not `s B A` of the head's input: DoRA and other variants, a bias,
    dropout in training, adapters other than LoRA.
    """
    layer: Any = head
    if not hasattr(layer, "base_layer") or layer.disable_adapters or layer.merged:
        return None
    parts: list[LowRank] = []
    for name in _active(layer):
        _check_adapter(layer, name)
        down_RH, up_VR = get(f"lora_A.{name}"), get(f"lora_B.{name}")
        assert down_RH is not None
        assert up_VR is not None
        parts.append((down_RH, up_VR, float(layer.scaling[name])))
    if len(parts) < 2:
        return parts[0] if parts else None
    return torch.cat([down_RH * scale for down_RH, _, scale in parts]), torch.cat([up_VR for _, up_VR, _ in parts], 1), 1.0


def _active(layer: Any) -> Iterator[str]:
    """Active adapters that this layer has, of whatever kind."""
    held = {name for kind in layer.adapter_layer_names for name in getattr(layer, kind, ())}
    return (name for name in layer.active_adapters if name in held)


def _check_adapter(layer: Any, name: str) -> None:
    what = f"model's head must not have the adapter {name!r}"
    if not isinstance(getattr(layer, "lora_A", None), nn.ModuleDict) or name not in layer.lora_A:
        raise ValueError(f"{what} of kind {type(layer).__name__}, which is no LoRA of a linear layer: {_PEER}")
    if name in getattr(layer, "lora_variant", {}) or getattr(layer, "use_dora", {}).get(name):
        variant = getattr(layer, "lora_variant", {}).get(name)
        kind = "DoRA" if variant is None else type(variant).__name__.removesuffix("LinearVariant").removesuffix("Variant")
        raise ValueError(f"{what} with {kind}, whose forward is no s B A: {_PEER}")
    if layer.lora_B[name].bias is not None:
        raise ValueError(f"{what} with lora_bias: {_PEER}")
    dropout = layer.lora_dropout[name]
    if dropout.training and getattr(dropout, "p", 0) > 0:
        raise ValueError(f"{what} with dropout {dropout.p:g} in training: set lora_dropout=0, or call model.eval()")


_checked: weakref.WeakKeyDictionary[nn.Module, set[tuple[Any, ...]]] = weakref.WeakKeyDictionary()


def check_own_output(head: nn.Module, own: Callable[[Tensor], Tensor], whole: Callable[[Tensor], Tensor], hidden: Tensor) -> None:
    """Raise ValueError where the head's own forward is not `h W^T + b` with the active adapters, once for each set of them.

    Compared on one row that no norm maps to itself. Called where the head runs, so that FSDP has its parameters whole; those
    that FSDP was told to ignore are replaced by `whole` of them meanwhile, by all ranks.
    """
    layer: Any = head
    live = [] if getattr(layer, "disable_adapters", True) else list(layer.active_adapters)
    state = type(head), *live, bool(getattr(layer, "merged", False))
    if state in _checked.get(head, ()) or hidden.is_meta or torch.compiler.is_compiling() or not hidden.numel():
        return
    with torch.no_grad(), _gathered(head, whole):
        row_1H = hidden.detach().reshape(-1, hidden.shape[-1])[:1]
        row_1H = row_1H + torch.linspace(-2, 3, row_1H.shape[1], device=row_1H.device).to(row_1H.dtype)
        got = own(row_1H)
        named = parameters(head)
        weight, bias = (_whole(getattr(layer, name, None)) for name in ("weight", "bias"))
        assert weight is not None
        want = nn.functional.linear(row_1H, weight.to(row_1H.dtype), None if bias is None else bias.to(row_1H.dtype))
        adapter = low_rank(head, lambda name: _whole(named[name]))
        if adapter is not None:
            down_RH, up_VR, scale = adapter
            want = want + scale * (row_1H.to(down_RH.dtype) @ down_RH.t() @ up_VR.t())
    eps = torch.finfo(got.dtype).eps
    limit = 1e-7 if got.dtype == torch.float64 else max(2e-3, 4 * eps)  # products in TF32 too
    error, size = float((got.double() - want.double()).abs().max()), float(want.abs().max())
    if got.shape != want.shape or error > limit * max(size, 1e-6):
        raise ValueError(
            f"model's output embedding must compute h W^T + b, got a {type(head).__name__} whose own output differs by "
            f"{error:.3g} on one row, of logits up to {size:.3g}: a norm, a scale or an unknown adapter lies in its forward"
        )
    _checked.setdefault(head, set()).add(state)


@contextmanager
def _gathered(head: nn.Module, whole: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the context the head's DTensors are plain tensors, so that its own forward can run."""
    replaced = []
    for module in head.modules():
        for name, parameter in module._parameters.items():
            if hasattr(parameter, "full_tensor"):
                replaced.append((module._parameters, name, parameter))
    try:
        for parameters_of, name, parameter in replaced:
            parameters_of[name] = whole(parameter)  # type: ignore[assignment, arg-type]
        yield
    finally:
        for parameters_of, name, parameter in replaced:
            parameters_of[name] = parameter


def _whole(parameter: Any) -> Tensor | None:
    if parameter is None:
        return None
    whole: Tensor = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return whole
