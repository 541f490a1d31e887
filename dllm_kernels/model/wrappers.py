"""What wraps a model and reduces its gradients over ranks: nothing, DDP or DeepSpeed here, FSDP2 in `sharding`.

`headless` finds it once. Everyone else asks the description: what to call, whose output must carry the hidden
states, over which ranks gradients are reduced, and how `accumulate` takes that over for a while.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn


class HandedOut(NamedTuple):
    """The output of a wrapped module within `headless`: reducers find in it what backward will reach."""

    hidden: Tensor
    column: Any
    used: tuple[Tensor, ...]  # empty slices of the head's parameters, which are used after the forward


class Wrapper:
    """A model that nothing wraps; the other kinds override what differs."""

    carrier: nn.Module | None = None  # the module whose output must be a `HandedOut`

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The ranks of an optimizer step, where the wrapper knows them."""
        return None

    def callee(self, model: nn.Module) -> nn.Module:
        """What is called for a forward."""
        return model

    def reshard(self) -> None:
        """Free what a forward gathered."""

    def stand_in(self, parameter: Tensor) -> Tensor:
        """What is used for a parameter of the head outside the forward of its module."""
        return parameter

    def watch(self, hidden: Tensor) -> None:
        """Look at the backward of the hidden states that a call returned."""

    @contextmanager
    def accumulating(self, *, reduce_last: bool) -> Iterator[None]:
        """Within the context, backwards add to gradients that are summed over ranks, once; then all is as before."""
        yield

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Within the context, forwards with a gradient but without a backward go past what waits for one."""
        yield


class Replicas(Wrapper):
    """DistributedDataParallel: a copy on every rank; each backward after a forward through it averages gradients."""

    def __init__(self, ddp: nn.parallel.DistributedDataParallel) -> None:
        if getattr(ddp, "mixed_precision", None) is not None:
            raise ValueError("model must not be in a DistributedDataParallel with mixed_precision: use torch.autocast with it")
        self.ddp, self.carrier = ddp, ddp.module
        self._direct = False

    @property
    def group(self) -> dist.ProcessGroup:
        return self.ddp.process_group  # type: ignore[no-any-return]

    def callee(self, model: nn.Module) -> nn.Module:
        # DDP may send buffers in any forward; without a gradient ranks need not call it equally often
        return model if torch.is_grad_enabled() and not self._direct else self.ddp.module

    @contextmanager
    def accumulating(self, *, reduce_last: bool) -> Iterator[None]:
        """Calls go to the module itself, whose backwards DDP does not see; what they add is summed once.

        Gradients from before are kept apart meanwhile: some may be local to this rank, some equal on all.
        """
        ignored = getattr(self.ddp, "parameters_to_ignore", ())
        parameters = [p for name, p in self.ddp.module.named_parameters() if p.requires_grad and name not in ignored]
        before = [p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        if hasattr(self.ddp.reducer, "_reset_state"):  # after a forward without a backward it waits for one
            self.ddp.reducer._reset_state()
        self._direct = True
        try:
            yield
            self._sum(parameters)
        except BaseException:
            for parameter in parameters:
                parameter.grad = None
            raise
        finally:
            self._direct = False
            for parameter, earlier in zip(parameters, before):
                if earlier is not None:
                    parameter.grad = earlier if parameter.grad is None else earlier.add_(parameter.grad)

    @contextmanager
    def aside(self) -> Iterator[None]:
        before, self._direct = self._direct, True
        try:
            yield
        finally:
            self._direct = before

    def _sum(self, parameters: list[nn.Parameter]) -> None:
        device = next(iter(parameters)).device
        used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=device)
        dist.all_reduce(used, dist.ReduceOp.MAX, group=self.group)
        waiting = []
        for parameter, anywhere in zip(parameters, used.tolist()):
            if anywhere:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                waiting.append(dist.all_reduce(parameter.grad, group=self.group, async_op=True))
        for work in waiting:
            work.wait()


class Engine(Wrapper):
    """DeepSpeed's engine with whole parameters (ZeRO 0 to 2): hooks on them reduce what `engine.backward(loss)` adds."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.carrier = engine, engine.module
        self._views: dict[int, Tensor] = {}

    @property
    def group(self) -> dist.ProcessGroup:
        return self.engine.data_parallel_group  # type: ignore[no-any-return]

    def stand_in(self, parameter: Tensor) -> Tensor:
        """A view from before the forward: backward reaches it after the hidden states, whose hook prepares the reduction."""
        if not parameter.requires_grad:
            return parameter
        view = self._views.get(id(parameter))
        if view is None or view.data_ptr() != parameter.data_ptr():
            with torch.enable_grad():
                view = self._views[id(parameter)] = parameter.view_as(parameter)
        return view

    def watch(self, hidden: Tensor) -> None:
        """`loss.backward()` would divide the gradient of hidden states by the steps of accumulation, not that of the head."""
        if hidden.requires_grad and hasattr(self.engine, "_running_engine_backward"):  # else it refuses by itself
            hidden.register_hook(self._check_backward)

    def _check_backward(self, _gradient: Tensor) -> None:
        if not self.engine._running_engine_backward:
            raise ValueError("model is in a DeepSpeedEngine: backward must be engine.backward(loss), which scales all gradients")

    @contextmanager
    def accumulating(self, *, reduce_last: bool) -> Iterator[None]:
        raise ValueError(
            "model must not be in a DeepSpeedEngine for accumulate: the engine divides and reduces in its own backward; use "
            "headless with engine.backward(loss), or DistributedDataParallel or fully_shard (FSDP2)"
        )
        yield


class Composed(Wrapper):
    """`torch.distributed._composable.replicate`: DDP in the hooks of a module; a forward through it is all they need."""

    @contextmanager
    def accumulating(self, *, reduce_last: bool) -> Iterator[None]:
        raise ValueError(
            "model must not be under torch's composable replicate for accumulate, whose every backward averages over ranks: "
            "use DistributedDataParallel or fully_shard (FSDP2)"
        )
        yield


_REFUSED = {
    "FullyShardedDataParallel": "FSDP1 keeps the head in a flat shard outside its own forward: use fully_shard (FSDP2; in "
    "accelerate fsdp_version=2) or DistributedDataParallel",
    "PipelineEngine": "its stages run their own forward and backward: use another DeepSpeed engine",
    "DataParallel": "torch.nn.DataParallel copies the model in every forward: use DistributedDataParallel",
}
_BESIDE = ("DistributedDataParallel", "FullyShardedDataParallel", "DataParallel", "DeepSpeedEngine")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside wrappers and `torch.compile`, as Hugging Face made it."""
    while not callable(getattr(model, "get_output_embeddings", None)):
        inner = model._modules.get("_orig_mod", model._modules.get("module"))
        if inner is None:
            break
        model = inner
    return model


def find_outer(model: nn.Module) -> Wrapper:
    """The wrapper around a model, one of this module. Raises ValueError for one that cannot be right."""
    layer: nn.Module | None = model
    while layer is not None:
        kinds = {kind.__name__ for kind in type(layer).__mro__}
        for name, reason in _REFUSED.items():
            if name in kinds:
                raise ValueError(f"model must not be in {name}: {reason}")
        if isinstance(layer, nn.parallel.DistributedDataParallel):
            return Replicas(layer)
        if "DeepSpeedEngine" in kinds:
            return Engine(layer)
        if _composed(layer):
            return Composed()
        layer = layer._modules.get("_orig_mod", layer._modules.get("module"))
    return Wrapper()


def _composed(module: nn.Module) -> bool:
    replicate = sys.modules.get("torch.distributed._composable.replicate")
    return replicate is not None and isinstance(module, replicate.DDP)


def check_head(head: nn.Module) -> None:
    """Raise ValueError where the head's weight is a shard that nothing here can gather."""
    if hasattr(head.weight, "ds_id"):
        raise ValueError(
            "model must not be under ZeRO stage 3, where only the head's own forward gathers it: use stage 1 or 2, or "
            "fully_shard (FSDP2)"
        )
    if getattr(head.weight, "_fsdp_flattened", False):
        raise ValueError(f"model must not be in FullyShardedDataParallel: {_REFUSED['FullyShardedDataParallel']}")


def check_alone(head: nn.Module) -> None:
    """Raise ValueError where a wrapper of several ranks holds the head, but was not passed to `headless`.

    It would not see the forward and leave the gradients of its ranks unreduced, without a word. Wrappers leave
    no trace on what they wrap, so all live objects are searched. In a DDP's own forward, it sees what comes out.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    running = nn.parallel.DistributedDataParallel._active_ddp_module
    if running is not None and any(module is head for module in running.modules()):
        return
    if _holders(head):
        gc.collect()  # it may be garbage
        if holders := _holders(head):
            raise ValueError(
                f"model must be passed to headless inside its {holders[0]}, not beside it: gradients would not be reduced "
                f"over ranks (with torch.no_grad() it may be called by itself)"
            )


def _holders(head: nn.Module) -> list[str]:
    kinds: dict[type, str | None] = {}
    found = []
    for thing in gc.get_objects():
        kind = type(thing)
        if kind not in kinds:
            kinds[kind] = next((base.__name__ for base in kind.__mro__ if base.__name__ in _BESIDE), None)
        if (name := kinds[kind]) is not None and any(module is head for module in thing.modules()):
            found.append(name)
    return found
