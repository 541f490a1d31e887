"""Models sharded over ranks (FSDP2, or any DTensors): gathering the head and keeping ranks in step.

A forward under FSDP2 is a sequence of collectives, so ranks must make the same calls, with and without a
gradient, in the same order. The head is gathered once per `headless` context; its gradient is accumulated
unsharded and reduced once when the context ends: averaged, or divided by what the user set, as FSDP does with
the body's. Within `accumulate` all gradients are summed: it divides by the denominator of the whole step.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dllm_kernels.backends.contract import WeightGradient
from dllm_kernels.model.wrappers import Wrapper

_WIDE = (torch.float32, torch.float64)
OLD_GLOO = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 9)
# of FSDP's parameter groups, by the versions of torch that have them
_SETTINGS = (
    "gradient_divide_factor",
    "force_sum_reduction_for_comms",
    "reduce_scatter_reduce_op",
    "reduce_grads",
    "all_reduce_grads",
)
_SUMS: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()  # the operation by which a group was made to sum


def is_sharded(tensor: object) -> bool:
    """Whether it is a DTensor; avoids the slow import of `torch.distributed.tensor`, loaded if any exists."""
    return "torch.distributed.tensor" in sys.modules and isinstance(tensor, sys.modules["torch.distributed.tensor"].DTensor)


def accumulation_hooks(parameter: Tensor) -> list[Callable[[Tensor], None]]:
    """What the user registered by `register_post_accumulate_grad_hook`: an optimizer in backward, as a rule."""
    return list((getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values())


def find_shards(model: nn.Module) -> Shards | None:
    """None for a model of plain tensors."""
    modules = []
    if "torch.distributed.fsdp" in sys.modules:
        kind = getattr(sys.modules["torch.distributed.fsdp"], "FSDPModule", ())
        modules = [module for module in model.modules() if isinstance(module, kind)]
    if modules and _state(modules[0])._is_root is False:
        raise ValueError("model must be the module at the root of fully_shard, not one inside it: the root gathers for all")
    for module in modules:
        module.reshard()  # after a forward without backward the root is still unsharded
    sharded = next((p for p in model.parameters() if is_sharded(p)), None)
    if sharded is None:
        return None
    return Shards(modules, sharded.device_mesh)  # type: ignore[attr-defined]


class Shards(Wrapper):
    """The ranks that hold the shards of a model, and when and how its gradients are reduced."""

    def __init__(self, modules: list[Any], mesh: Any) -> None:
        self.modules, self.mesh = modules, mesh  # FSDP modules, parents first
        self.carrier = modules[0] if modules else None  # FSDP's root must output hidden states to notice their backward
        self._units = [unit for module in modules for unit in _units(module)]
        self._versions: list[tuple[int, int]] | None = None  # of all parameters at the last call
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

    def refresh(self) -> bool:
        """Whether an optimizer stepped since the last call; what that left gathered is freed: FSDP would use it as it is."""
        versions = [_version(held.sharded_param) for unit in self._units for held in unit.fsdp_params]
        stepped = self._versions is not None and versions != self._versions
        if stepped:
            self.reshard()
        self._versions = versions
        return stepped

    def trains(self, parameter: Tensor) -> bool:
        """Whether a gradient is wanted. While FSDP has a parameter gathered, the flag that users set is that of the copy."""
        for unit in self._units:
            for held in unit.fsdp_params:
                if held.sharded_param is parameter and held.sharded_state.name == "UNSHARDED":
                    return bool(held._unsharded_param.requires_grad)
        return parameter.requires_grad

    def check_head(self, parameters: Iterable[Tensor | None]) -> None:
        """Raise ValueError where the head is split by something other than FSDP: its forward and gradient are another's then."""
        if not self._units and any(is_sharded(parameter) for parameter in parameters):
            raise ValueError(
                "model must be under fully_shard (FSDP2) where its head is sharded, but no FSDP holds that: in tensor "
                "parallelism keep the head whole, or call what is below it and score this rank's rows with vocab_group="
            )

    def divisor(self, parameter: Tensor) -> float:
        """What the sum of a parameter's gradients over ranks is divided by at present. Raises ValueError if unknown."""
        own = [unit for unit in self._units if any(p.sharded_param is parameter for p in unit.fsdp_params)]
        unit: Any = (own or self._units)[0]  # one that FSDP was told to ignore follows the others
        ranks = unit.mesh_info.mesh.size()
        if parameter.device_mesh.size() != ranks:  # type: ignore[attr-defined]
            raise ValueError(f"model must be sharded by FSDP2 alone, but its head is on {parameter.device_mesh}")  # type: ignore[attr-defined]
        if hasattr(unit, "gradient_divide_factor"):
            factor = float(unit.gradient_divide_factor or ranks)
            averages = factor == ranks and not unit.force_sum_reduction_for_comms
        else:
            operation = unit.reduce_scatter_reduce_op  # all that torch up to 2.7 keeps of the factor
            if operation is not None and _SUMS.get(unit) is not operation:
                raise ValueError("model must have FSDP2's own divide factor: torch up to 2.7 does not tell which one was set")
            factor, averages = float(ranks if operation is None else 1), operation is None
        if averages and _averages_in_transit(unit) and _gloo_sums(self.mesh):  # the body's gradients are sums over the shards
            return factor / getattr(unit.mesh_info, "shard_mesh_size", 1)
        return factor

    def sum_gradients(self) -> None:
        """From now on sum gradients over ranks; FSDP averages by default. Raises ValueError where it cannot."""
        if not all(hasattr(unit, "gradient_divide_factor") or _averages_in_transit(unit) for unit in self._units):
            raise ValueError(
                "model must reduce gradients in float32 or bfloat16 (MixedPrecisionPolicy's reduce_dtype): "
                "FSDP2 of torch up to 2.7 always divides those of other dtypes"
            )
        for module in self.modules:
            name = "set_gradient_divide_factor"
            # the second name is that of torch up to 2.7
            getattr(module, name if hasattr(module, name) else "set_reduce_scatter_divide_factor")(1.0)
            if hasattr(module, "set_force_sum_reduction_for_comms"):  # gloo needs it
                module.set_force_sum_reduction_for_comms(True)
        for unit in self._units:
            _SUMS[unit] = getattr(unit, "reduce_scatter_reduce_op", None)

    @contextmanager
    def accumulating(self, *, reduce_last: bool) -> Iterator[None]:
        """Within the context FSDP sums; its factors and flags are put back, and what an error left is thrown away.

        reduce_last: only the backwards that `before_call` names reduce.
        """
        if any(_waits(unit) for unit in self._units):
            raise ValueError(
                "model must not hold gradients that FSDP has not reduced yet (set_requires_gradient_sync(False)): "
                "accumulate sums, what waits is to be averaged; end that step first"
            )
        meshes = [(p.sharded_param.device_mesh, unit.mesh_info.mesh) for unit in self._units for p in unit.fsdp_params]
        if not meshes or any(mesh.size() != of_data.size() for mesh, of_data in meshes):
            raise ValueError(
                "model must be sharded by fully_shard (FSDP2) alone for accumulate, which sums over all ranks: those of tensor "
                "parallelism hold the same data; use headless and a loss of your own"
            )
        before = [(unit, {name: getattr(unit, name) for name in _SETTINGS if hasattr(unit, name)}) for unit in self._units]
        self.sum_gradients()
        self.reduce_gradients(now=not reduce_last)
        try:
            yield
        except BaseException:
            self._recover()
            raise
        finally:
            self._reduces, self.unreduced = True, False
            for unit, settings in before:
                for name, value in settings.items():
                    setattr(unit, name, value)

    def _recover(self) -> None:
        for unit in self._units:
            for parameter in unit.fsdp_params:
                parameter.unsharded_accumulated_grad = None
                if hasattr(parameter, "_unsharded_param"):
                    parameter._unsharded_param.grad = None
        root: Any = self.carrier
        if root is not None and _state(root)._is_root and hasattr(root, "reset_iter_state"):
            root.reset_iter_state()

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

    def __init__(self, weight: Tensor, bias: Tensor | None, wrapper: Wrapper) -> None:
        self.parameters = {"weight": weight, "bias": bias}
        self._wrapper, self._closed = wrapper, False
        self._shards = wrapper if isinstance(wrapper, Shards) else None
        self._whole: dict[str, Tensor] = {}
        self._buffers: dict[str, Tensor] = {}
        self._versions: dict[str, tuple[int, int]] = {}
        self._trained: set[str] = set()  # by this context; the same names on all ranks

    def _trains(self, parameter: Tensor) -> bool:
        return parameter.requires_grad if self._shards is None else self._shards.trains(parameter)

    def get(self, name: str, dtype: torch.dtype | None = None) -> Tensor | None:
        """The parameter; a sharded one is gathered again after an update or for another dtype. A collective.

        dtype: of the copy; None takes the existing copy's, else the parameter's.
        """
        parameter = self.parameters[name]
        if parameter is None:
            return None
        if not is_sharded(parameter):
            return self._wrapper.stand_in(parameter)
        version = _version(parameter)
        known = self._whole.get(name)
        if known is not None and self._versions[name] == version and dtype in (None, known.dtype):
            whole = known
        else:
            dtype = dtype or (parameter.dtype if known is None else known.dtype)
            # detached again, as with one rank it is a view of the shard
            whole = parameter.detach().to(dtype).full_tensor().detach()  # type: ignore[attr-defined]
            self._whole[name], self._versions[name] = whole, version
        trains = self._trains(parameter)
        if trains == whole.requires_grad:
            return whole
        if not trains:  # peft freezes an adapter while it is switched off
            return whole.detach()
        self._trained.add(name)
        whole.requires_grad_(True)
        whole.register_hook(self._check_open)
        whole.register_post_accumulate_grad_hook(functools.partial(self._move, name))
        return whole

    def copy_of(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        """The gathered copy of one of the head's sharded parameters, the one that `get` gives. A collective."""
        name = next(name for name, known in self.parameters.items() if known is parameter)
        whole = self.get(name, dtype)
        assert whole is not None
        return whole

    def taker(self, name: str) -> WeightGradient | None:
        """What takes the gradient of a gathered parameter, in fp32 whatever its own dtype is; None for a plain tensor."""
        parameter = self.parameters[name]
        if parameter is None or not is_sharded(parameter) or not self._trains(parameter):
            return None
        self._trained.add(name)
        return functools.partial(self._take, name)

    def _take(self, name: str, gradient: Tensor) -> None:
        self._check_open(gradient)
        self._add(name, gradient)

    def _check_open(self, _gradient: Tensor) -> None:
        if self._closed:
            raise ValueError("model is sharded: backward must run inside the headless context, which reduces the head's gradient")

    def _add(self, name: str, gradient: Tensor) -> None:
        parameter = self.parameters[name]
        assert self._shards is not None
        assert parameter is not None
        gradient = gradient if gradient.dtype in _WIDE else gradient.float()
        if (divisor := self._shards.divisor(parameter)) != 1.0:
            gradient = gradient / divisor
        if name in self._buffers:
            self._buffers[name] += gradient
        else:
            self._buffers[name] = gradient

    def check_step(self) -> None:
        """Raise ValueError where an optimizer has stepped without the head's gradient."""
        if self._buffers:
            raise ValueError(
                "model is sharded: no optimizer may step between a backward and the end of the outermost headless context, "
                "when the head's gradient is reduced; open one for each step"
            )

    def close(self) -> None:
        self._closed = True

    def _move(self, name: str, whole: Tensor) -> None:
        """From a copy into the buffer, in fp32 and divided by what FSDP divides by at present."""
        if whole.grad is not None:  # None where `taker` took it
            self._add(name, whole.grad)
            whole.grad = None

    def reduce(self) -> None:
        """Adds the sum of all ranks' gradients to the `.grad` of the sharded parameters. A collective."""
        shards = self._shards
        if shards is None:
            return
        from torch.distributed.tensor import DTensor, Partial

        for name, parameter in self.parameters.items():
            if parameter is None or name not in self._trained:
                continue
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
            for hook in accumulation_hooks(parameter):  # as FSDP does for what it reduces
                hook(parameter)


def _state(module: Any) -> Any:
    return module._get_fsdp_state()


def _units(module: Any) -> list[Any]:
    """FSDP's parameter groups of a module: what it gathers and reduces together."""
    state = _state(module)
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def _gloo_sums(mesh: Any) -> bool:
    """Whether a reduce-scatter takes an average for a sum, as gloo's does in torch up to 2.8."""
    return OLD_GLOO and (mesh.device_type == "cpu" or dist.get_backend(mesh.get_group(mesh.ndim - 1)) == "gloo")


def _averages_in_transit(unit: Any) -> bool:
    """Whether FSDP divides by an operation of the collective, not before and after it, where it is not told to sum."""
    policy = unit.mp_policy
    dtype = policy.reduce_dtype or policy.param_dtype or unit.fsdp_params[0].sharded_param.dtype
    return dtype in (torch.float32, torch.bfloat16)


def _waits(unit: Any) -> bool:
    """Whether gradients wait for a reducing backward."""
    unsharded = [getattr(parameter, "_unsharded_param", None) for parameter in unit.fsdp_params]
    return (
        getattr(unit, "_partial_reduce_output", None) is not None
        or any(parameter.unsharded_accumulated_grad is not None for parameter in unit.fsdp_params)
        or any(parameter is not None and parameter.grad is not None for parameter in unsharded)
    )


def _version(parameter: Tensor) -> tuple[int, int]:
    """Of the DTensor and of its shard."""
    return parameter._version, parameter.detach().to_local()._version  # type: ignore[attr-defined]
