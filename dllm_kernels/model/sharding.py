"""Models sharded over ranks (FSDP2, or any DTensors): gathering the head and keeping ranks in step.

A forward under FSDP2 is a sequence of collectives, so ranks must make the same calls, with and without a
gradient, in the same order. The head is gathered once per `headless` context; its gradient is accumulated
unsharded and reduced once when the context ends. All gradients are summed over ranks, not averaged:
`accumulate` divides by the denominator of the whole optimizer step.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dllm_kernels.backends.contract import WeightGradient

_WIDE = (torch.float32, torch.float64)


def is_sharded(tensor: object) -> bool:
    """Whether it is a DTensor; avoids the slow import of `torch.distributed.tensor`, loaded if any exists."""
    return "torch.distributed.tensor" in sys.modules and isinstance(tensor, sys.modules["torch.distributed.tensor"].DTensor)


def find_shards(model: nn.Module) -> Shards | None:
    """None for a model of plain tensors."""
    modules = []
    if "torch.distributed.fsdp" in sys.modules:
        kind = getattr(sys.modules["torch.distributed.fsdp"], "FSDPModule", ())
        modules = [module for module in model.modules() if isinstance(module, kind)]
    for module in modules:
        module.reshard()  # after a forward without backward the root is still unsharded
    sharded = next((p for p in model.parameters() if is_sharded(p)), None)
    if sharded is None:
        return None
    return Shards(modules, sharded.device_mesh)  # type: ignore[attr-defined]


class Shards:
    """The ranks that hold the shards of a model, and when its gradients are reduced."""

    def __init__(self, modules: list[Any], mesh: Any) -> None:
        self.modules, self.mesh = modules, mesh  # FSDP modules, parents first
        self.unreduced = False  # whether unsharded gradients wait for a reducing backward
        self._reduces = True

    @property
    def group(self) -> dist.ProcessGroup:
        """All ranks that hold a shard. Raises ValueError where no known process group consists of them."""
        if self.mesh.ndim == 1:
            return self.mesh.get_group()  # type: ignore[no-any-return]
        world = dist.group.WORLD
        if world is None or self.mesh.size() != dist.get_world_size():
            raise ValueError(f"group must be given for a model that is sharded over {self.mesh}")
        return world

    def most(self, count: int) -> int:
        """The maximum over ranks: one small collective."""
        value = torch.tensor(count, dtype=torch.int64, device=self.mesh.device_type)
        for dimension in range(self.mesh.ndim):
            dist.all_reduce(value, dist.ReduceOp.MAX, group=self.mesh.get_group(dimension))
        return int(value)

    def reshard(self) -> None:
        for module in self.modules:
            module.reshard()

    def sum_gradients(self) -> None:
        """From now on sum gradients over ranks; FSDP averages by default."""
        for module in self.modules:
            name = "set_gradient_divide_factor"
            # the second name is that of torch up to 2.7
            getattr(module, name if hasattr(module, name) else "set_reduce_scatter_divide_factor")(1.0)
            if hasattr(module, "set_force_sum_reduction_for_comms"):  # gloo needs it
                module.set_force_sum_reduction_for_comms(True)

    def reduce_gradients(self, now: bool) -> None:
        """Whether the next backwards reduce-scatter gradients or accumulate them unsharded."""
        for module in self.modules:
            module.set_requires_gradient_sync(now, recurse=False)
        self._reduces = now

    def before_call(self, *, backward: bool, reduce: bool) -> None:
        """reduce: the backward of the next call also reduces the gradients kept unsharded so far."""
        if reduce:
            self.reduce_gradients(now=True)
        if backward:
            self.unreduced = not self._reduces


class WholeHead:
    """A head's gathered weight and bias, and their gradients so far. Plain tensors are passed through."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.parameters = {"weight": weight, "bias": bias}
        self._whole: dict[str, Tensor] = {}
        self._buffers: dict[str, Tensor] = {}
        self._versions: dict[str, tuple[int, int]] = {}

    def get(self, name: str, dtype: torch.dtype | None = None) -> Tensor | None:
        """The parameter; a sharded one is gathered again after an update or for another dtype. A collective.

        dtype: of the copy; None takes the existing copy's, else the parameter's.
        """
        parameter = self.parameters[name]
        if parameter is None or not is_sharded(parameter):
            return parameter
        version = parameter._version, _local(parameter)._version  # of the DTensor and of its shard
        known = self._whole.get(name)
        if known is not None and self._versions[name] == version and dtype in (None, known.dtype):
            return known
        dtype = dtype or (parameter.dtype if known is None else known.dtype)
        self._collect(name)
        # detached again, as with one rank it is a view of the shard
        whole = parameter.detach().to(dtype).full_tensor().detach()  # type: ignore[attr-defined]
        if parameter.requires_grad:
            whole.requires_grad_(True)
            if dtype not in _WIDE:  # gradients that autograd delivers must not accumulate in 16 bits
                whole.register_post_accumulate_grad_hook(lambda _: self._collect(name))
        self._whole[name], self._versions[name] = whole, version
        return whole

    def taker(self, name: str) -> WeightGradient | None:
        """What takes the gradient of a gathered parameter, in fp32 whatever its own dtype is; None for a plain tensor."""
        parameter = self.parameters[name]
        if parameter is None or not is_sharded(parameter) or not parameter.requires_grad:
            return None
        return functools.partial(self._add, name)

    def _add(self, name: str, gradient: Tensor) -> None:
        if name in self._buffers:
            self._buffers[name] += gradient
        else:
            self._buffers[name] = gradient if gradient.dtype in _WIDE else gradient.float()

    def _collect(self, name: str) -> None:
        """Move what autograd accumulated on the copy into the buffer."""
        whole = self._whole.get(name)
        if whole is not None and whole.grad is not None:
            self._add(name, whole.grad)
            whole.grad = None

    def reduce(self, shards: Shards) -> None:
        """Adds the sum of all ranks' gradients to the `.grad` of the sharded parameters. A collective."""
        from torch.distributed.tensor import DTensor, Partial

        for name, parameter in self.parameters.items():
            if parameter is None or not is_sharded(parameter) or not parameter.requires_grad:
                continue
            self._collect(name)
            buffer = self._buffers.pop(name, None)
            if not shards.most(int(buffer is not None)):
                continue
            if buffer is None:
                wide = parameter.dtype if parameter.dtype in _WIDE else torch.float32
                buffer = torch.zeros(parameter.shape, dtype=wide, device=parameter.device)
            mesh = parameter.device_mesh  # type: ignore[attr-defined]
            partial = DTensor.from_local(buffer, mesh, [Partial()] * mesh.ndim, run_check=False)
            with torch.no_grad():
                gradient = partial.redistribute(placements=parameter.placements).to(parameter.dtype)  # type: ignore[attr-defined]
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


def _local(parameter: Tensor) -> Tensor:
    return parameter.detach().to_local()  # type: ignore[attr-defined, no-any-return]
