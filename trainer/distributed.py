"""Many processes, one run: division of work, exchange between ranks, and sharding of models by FSDP2.

Launched by `torchrun --nproc-per-node N`; without it there is a single rank and no overhead. Rollouts, masks
and noise are functions of sequence ids, so results for a sequence do not depend on the number of ranks.
"""

from __future__ import annotations

import gc
import inspect
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dllm_kernels.model.sharding import find_shards, is_sharded

from .errors import UserError, first_line, visible


class OtherRankError(UserError, RuntimeError):
    """Another rank failed and reported it."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    launched: bool = False  # by torchrun, even with one rank: torch.distributed is initialised

    @property
    def group(self) -> dist.ProcessGroup | None:
        """All ranks; None without torch.distributed.

        Looked up anew each time: a group kept beyond its destruction may abort the interpreter at exit.
        """
        return dist.group.WORLD if self.launched else None

    @property
    def is_first(self) -> bool:
        """Whether this rank writes the logs and files of the run."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """This rank's part of `count` items of a global batch: contiguous, in the order of ranks, sizes
        within 1.

        The first ranks have more; with fewer items than ranks, the last have none.
        """
        least, more = divmod(count, self.size)
        start = self.rank * least + min(self.rank, more)
        return slice(start, start + least + (self.rank < more))

    def gather(self, values: Tensor) -> tuple[Tensor, slice]:
        """The values `[n, ...]` of all ranks, where n may differ, and the slice of this rank's. For small
        tensors.
        """
        if not self.launched:
            return values, slice(0, len(values))
        parts = self.tell(values.detach().cpu())
        start = sum(len(part) for part in parts[: self.rank])
        return torch.cat(parts).to(values.device), slice(start, start + len(values))

    def tell(self, value: Any) -> list[Any]:
        """The values of all ranks in order; for small picklable objects."""
        if not self.launched:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def total(self, value: float) -> float:
        """Sum over the ranks, added in order: the same bits on all."""
        return float(sum(self.tell(float(value))))

    def wait(self) -> None:
        """Wait for all ranks."""
        if self.launched:
            dist.barrier(group=self.group)

    @contextmanager
    def together(self) -> Iterator[None]:
        """For work that ranks do separately, such as rewards or reading files: if one fails, all raise.

        The rank that failed raises its own error, the others an `OtherRankError` with its message; of several
        that failed with a `UserError`, as all may that ask one server, the first tells it. There must be no
        collectives inside.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            error = raised
        told = self.tell(None if error is None else str(error) if isinstance(error, UserError) else first_line(error))
        failed = [rank for rank, sentence in enumerate(told) if sentence is not None]
        if error is not None and (self.rank == failed[0] or not isinstance(error, UserError)):
            raise error
        if failed:
            raise OtherRankError(f"rank {failed[0]}: {told[failed[0]]}") from error


def start() -> Ranks:
    """Join the ranks that torchrun started (NCCL on GPUs, gloo on CPUs); without torchrun, a single rank.

    Raises UserError where the ranks cannot meet.
    """
    gpu = torch.cuda.is_available()
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return Ranks(device=torch.device("cuda" if gpu else "cpu"))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
    try:
        store = _store_of_restart()
        if store is None:
            dist.init_process_group(backend)
        else:
            rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    except (RuntimeError, ValueError, KeyError) as error:  # no such address, or a rank that ended before all had met
        where = ":".join(os.environ.get(name, f"${name}") for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise UserError(f"rank {os.environ['RANK']} cannot meet the others at {where}: {first_line(error)}") from error
    return Ranks(dist.get_rank(), dist.get_world_size(), device, launched=True)


def _store_of_restart() -> dist.Store | None:
    """Where ranks that torchrun started anew meet; None for those of the first start.

    torchrun keeps its store, in which the addresses of the dead ranks stand, so that the new ones would call those.
    """
    restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0)
    if not restart or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    client = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    return dist.PrefixStore(f"restart-{restart}", client)


@contextmanager
def one_fails_all_stop(ranks: Ranks) -> Iterator[None]:
    """Around the whole run of a rank: exit at once on failure, without waiting in collectives.

    torchrun then ends the other ranks. Exit status 2 and one sentence for a user error, that of a stop, else 1: with a
    sentence where another rank went away, and a traceback for everything else.
    """
    try:
        yield
    except BaseException as error:
        if not ranks.launched:
            raise
        code = getattr(error, "code", None)  # of SystemExit and of a stop
        if isinstance(error, UserError):
            code = 2
            if ranks.is_first or not isinstance(error, OtherRankError):
                print(f"dllm-kernels: {visible(error)}", file=sys.stderr, flush=True)
        elif _is_loss_of_a_rank(error):
            print(f"dllm-kernels: rank {ranks.rank} ends, as another rank has ended or cannot be reached", file=sys.stderr)
        elif not isinstance(error, SystemExit | KeyboardInterrupt):
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)
    if ranks.launched:
        dist.destroy_process_group()
        gc.collect()


def _is_loss_of_a_rank(error: BaseException) -> bool:
    lost = tuple(getattr(dist, name) for name in ("DistNetworkError", "DistBackendError") if hasattr(dist, name))
    return isinstance(error, lost) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The transformer blocks and their path: of the outermost module lists, the one with most parameters.

    Raises UserError for a model without a module list.
    """
    lists = _outermost_lists(model)
    path = max(lists, key=lambda path: sum(parameter.numel() for parameter in lists[path].parameters()))
    return path, lists[path]


def layers(model: nn.Module) -> list[nn.Module]:
    """What is sharded one by one: the members, with parameters, of every outermost module list."""
    members = [member for blocks in _outermost_lists(model).values() for member in blocks]
    return [member for member in members if any(True for _ in member.parameters())]


def _outermost_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The module lists that lie in no other, by path, those first that come first."""
    found: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and not any(path.startswith(f"{outer}.") for outer in found):
            found[path] = module
    if not found:
        raise UserError(f"model must keep its transformer blocks in a torch.nn.ModuleList, {type(model).__name__} has none")
    return found


def shard(
    model: nn.Module,
    ranks: Ranks,
    *,
    replicas: int = 1,
    dtype: torch.dtype | None = None,
    reshard_after_forward: bool = True,
) -> nn.Module:
    """Shard the parameters in place, layer by layer, with FSDP2; gradients are summed over ranks.

    Args:
        model: whole, and equal on all ranks; without torchrun it is only moved to the device. An untied
            output embedding is left to `dllm_kernels.headless`, which gathers it once per optimizer step; the
            model can no longer compute logits by itself.
        replicas: HSDP; the number of copies of the model, each on `ranks.size / replicas` ranks.
        dtype: of parameters in forward and backward, such as torch.bfloat16; shards keep theirs, and
            gradients are reduced in fp32. None: that of the parameters.
        reshard_after_forward: free each layer's parameters after its forward: less memory, one more gather.
    """
    model.to(ranks.device)
    if not ranks.launched:
        return model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if not 1 <= replicas <= ranks.size or ranks.size % replicas:
        raise UserError(f"replicas must divide the {ranks.size} ranks, got {replicas}")
    sizes = {"shard": ranks.size} if replicas == 1 else {"replicate": replicas, "shard": ranks.size // replicas}
    mesh = init_device_mesh(ranks.device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    policy = MixedPrecisionPolicy() if dtype is None else MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": policy}
    for layer in layers(model):
        fully_shard(layer, reshard_after_forward=reshard_after_forward, **options)
    # from torch 2.7; before, the root gathers the head in every forward
    if "ignored_params" in inspect.signature(fully_shard).parameters:
        options["ignored_params"] = _shard_head(model, mesh)
    fully_shard(model, **options)
    shards = find_shards(model)
    assert shards is not None
    shards.sum_gradients()
    return model


def _shard_head(model: nn.Module, mesh: Any) -> set[nn.Parameter]:
    """Shard an untied output embedding like FSDP would, but not under its management; its parameters."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None:
        return set()
    elsewhere = {id(p) for module in model.modules() if module is not head for p in module.parameters(recurse=False)}
    own = dict(head.named_parameters(recurse=False))
    if any(id(p) in elsewhere for p in own.values()):
        return set()
    placements = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
    for name, whole in own.items():
        part = nn.Parameter(distribute_tensor(whole.detach(), mesh, placements), requires_grad=whole.requires_grad)
        setattr(head, name, part)
    return set(head.parameters(recurse=False))


def clip_gradients(model: nn.Module, max_norm: float) -> float:
    """Clip by the norm over all shards; returns the norm before clipping."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    return float(norm.full_tensor() if is_sharded(norm) else norm)  # type: ignore[attr-defined, operator]
