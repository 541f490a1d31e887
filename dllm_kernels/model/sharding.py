"""Models whose parameters are sharded over ranks (FSDP2, or any DTensors): the head in one piece, and ranks
in step.

A forward under FSDP2 is a chain of collectives, so ranks must call the model equally often, and in the same
order of calls with and without a gradient. The head is gathered once while `headless` lasts, and its gradient
is added up at full size and reduced once, when `headless` ends. All gradients are summed over ranks, never
averaged: the engine divides by the denominator of the whole optimizer step.
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
    """Whether it is a DTensor; `torch.distributed.tensor` takes long to import, and is there if one exists."""
    return "torch.distributed.tensor" in sys.modules and isinstance(tensor, sys.modules["torch.distributed.tensor"].DTensor)


def find_shards(model: nn.Module) -> Shards | None:
    """None for a model of plain tensors."""
    modules = []
    if "torch.distributed.fsdp" in sys.modules:
        kind = getattr(sys.modules["torch.distributed.fsdp"], "FSDPModule", ())
        modules = [module for module in model.modules() if isinstance(module, kind)]
    for module in modules:
        module.reshard()  # after a forward without backward the root's parameters are still whole
    sharded = next((p for p in model.parameters() if is_sharded(p)), None)
    if sharded is None:
        return None
    return Shards(modules, sharded.device_mesh)  # type: ignore[attr-defined]


class Shards:
    """Who holds the parts of a model, and when its gradients are reduced."""

    def __init__(self, modules: list[Any], mesh: Any) -> None:
        self.modules, self.mesh = modules, mesh  # FSDP modules, parents first
        self.unreduced = False  # whether whole gradients wait for a backward that reduces them
        self._reduces = True

    @property
    def group(self) -> dist.ProcessGroup:
        """All ranks that hold a part. Raises ValueError where no single process group is known to have them."""
        if self.mesh.ndim == 1:
            return self.mesh.get_group()  # type: ignore[no-any-return]
        world = dist.group.WORLD
        if world is None or self.mesh.size() != dist.get_world_size():
            raise ValueError(f"group must be given for a model that is sharded over {self.mesh}")
        return world

    def most(self, count: int) -> int:
        """The largest of all ranks' counts: one small collective."""
        value = torch.tensor(count, dtype=torch.int64, device=self.mesh.device_type)
        for dimension in range(self.mesh.ndim):
            dist.all_reduce(value, dist.ReduceOp.MAX, group=self.mesh.get_group(dimension))
        return int(value)

    def reshard(self) -> None:
        for module in self.modules:
            module.reshard()

    def sum_gradients(self) -> None:
        """FSDP averages over ranks by default; from here on it sums."""
        for module in self.modules:
            name = "set_gradient_divide_factor"
            getattr(module, name if hasattr(module, name) else "set_reduce_scatter_divide_factor")(1.0)  # until torch 2.7
            if hasattr(module, "set_force_sum_reduction_for_comms"):  # gloo knows no other way
                module.set_force_sum_reduction_for_comms(True)

    def reduce_gradients(self, now: bool) -> None:
        """Whether the next backwards reduce-scatter their gradients, or keep them whole and add them up."""
        for module in self.modules:
            module.set_requires_gradient_sync(now, recurse=False)
        self._reduces = now

    def before_call(self, *, backward: bool, reduce: bool) -> None:
        """reduce: the gradients that were kept whole so far are reduced by the backward of the call that
        comes.
        """
        if reduce:
            self.reduce_gradients(now=True)
        if backward:
            self.unreduced = not self._reduces


class WholeHead:
    """A head's weight and bias in one piece, and what they got of gradients so far. Plain tensors are passed
    on as they are.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.parameters = {"weight": weight, "bias": bias}
        self._whole: dict[str, Tensor] = {}
        self._buffers: dict[str, Tensor] = {}
        self._versions: dict[str, tuple[int, int]] = {}

    def get(self, name: str, dtype: torch.dtype | None = None) -> Tensor | None:
        """The parameter, gathered anew where it was updated since or is wanted in another dtype: a
        collective.

        dtype: of the copy; None for the one that is there, else the parameter's.
        """
        parameter = self.parameters[name]
        if parameter is None or not is_sharded(parameter):
            return parameter
        version = parameter._version, _local(parameter)._version  # of updates as a whole, and of the part alone
        known = self._whole.get(name)
        if known is not None and self._versions[name] == version and dtype in (None, known.dtype):
            return known
        dtype = dtype or (parameter.dtype if known is None else known.dtype)
        self._collect(name)
        whole = parameter.detach().to(dtype).full_tensor().detach()  # type: ignore[attr-defined]  # of one rank, its own part
        if parameter.requires_grad:
            whole.requires_grad_(True)
            if dtype not in _WIDE:  # what comes another way must not be added up in 16 bits
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
        """Takes what autograd accumulated in the copy."""
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
