"""A head split over ranks by rows of its weight: where a rank's ids lie, what ranks agree on, and what they exchange."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from dllm_kernels import checks
from dllm_kernels.backends.contract import HeadOptions

_SIZES = WeakTensorKeyDictionary()  # of weights met before: their group and its ranks' numbers of rows
_KINDS = (ValueError, TypeError, RuntimeError)  # of errors that are told to other ranks
_SENTENCE_BYTES = 4096
# what ranks say of themselves, after the number of their weight's rows and whether they raise
_ALIKE = (
    "hidden must have the same number of rows on every rank of vocab_group, got {}",
    "hidden must have the same number of targets or keys on every rank of vocab_group, got {}",
    "hidden must have the same width on every rank of vocab_group, got {}",
    "hidden must have the same dtype on every rank of vocab_group, got different ones",
    "hidden must be equal on all ranks of vocab_group, got different first rows: the batch is not split over it",
    "suppress and valid_vocab must be equal on all ranks of vocab_group, in ids of the whole head, got different ones",
)


@dataclass(frozen=True)
class Shard:
    """The ids `first .. first + count - 1` of a head of `vocabulary` ids, which this rank holds."""

    group: Any  # dist.ProcessGroup
    first: int
    count: int
    vocabulary: int
    options: HeadOptions  # in ids of this rank
    whole: HeadOptions  # in ids of the whole head
    some_id: int | None  # the smallest of its ids that is not excluded; None where all are
    allowed: int  # how many of its ids are not excluded
    allowed_whole: int

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    def holds(self, ids: Tensor) -> Tensor:
        return (ids >= self.first) & (ids < self.first + self.count)

    def own(self, ids: Tensor) -> Tensor:
        """Ids as this rank counts them, those of others replaced by one of its own."""
        assert self.some_id is not None
        return torch.where(self.holds(ids), ids - self.first, self.some_id)

    def check_ids(self, name: str, ids: Tensor) -> None:
        """Raise ValueError for ids that the whole head does not have, or excludes."""
        checks.in_range(name, ids, 0, self.vocabulary)
        if not ids.numel() or not checks.may_read(ids):
            return
        excluded_V = self.whole.excluded(self.vocabulary, ids.device)
        out = None if excluded_V is None else ids[excluded_V[ids]]
        if out is not None and out.numel():
            raise ValueError(
                f"{name} must not hold a suppressed id or one beyond valid_vocab: id {int(out.flatten()[0])} has probability 0"
            )


def attempt(function: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """What a function returns, or what it raises: for `agree` to tell the other ranks."""
    try:
        return function(), None
    except Exception as error:
        return None, error


def agree(error: Exception | None, like: Tensor, group: Any) -> None:
    """Raise on every rank what the first rank that raised has to say. A collective of one number.

    It reads that number, so on a GPU ranks agree under DLLM_KERNELS_VALIDATE=1 alone: elsewhere a rank raises by itself.
    """
    if not checks.may_read(like):
        if error is not None:
            raise error
        return
    status = torch.tensor([_status(error, group)], device=like.device)
    dist.all_reduce(status, dist.ReduceOp.MAX, group=group)
    _raise_together(int(status), error, status.device, group)


def _status(error: Exception | None, group: Any) -> int:
    """0, or a number that is the larger the smaller the rank, and tells rank and kind of the error."""
    if error is None:
        return 0
    kind = next((place for place, each in enumerate(_KINDS) if isinstance(error, each)), len(_KINDS) - 1)
    return (dist.get_world_size(group) - dist.get_rank(group)) * len(_KINDS) + kind


def _raise_together(status: int, error: Exception | None, device: torch.device, group: Any) -> None:
    if status == 0:
        return
    place, kind = divmod(status, len(_KINDS))
    rank = dist.get_world_size(group) - place
    sentence = torch.zeros(_SENTENCE_BYTES, dtype=torch.uint8)
    if error is not None and rank == dist.get_rank(group):
        text = str(error) if isinstance(error, _KINDS) else f"{type(error).__name__}: {error}"
        said = text.encode()[:_SENTENCE_BYTES]
        sentence[: len(said)] = torch.frombuffer(bytearray(said), dtype=torch.uint8) if said else 0
    sentence = sentence.to(device)
    dist.broadcast(sentence, dist.get_global_rank(group, rank), group=group)
    told = bytes(sentence.tolist()).rstrip(b"\0").decode(errors="replace")
    raise _KINDS[kind](f"{told} (rank {rank} of vocab_group)") from error


def local_weight(weight: Tensor, group: Any) -> Tensor:
    """The rows of this rank as a plain tensor, differentiable. Raises TypeError or ValueError for what is split otherwise."""
    if type(weight).__name__ != "DTensor":
        checks.require_tensor("weight", weight)
        return weight
    mesh, placements = weight.device_mesh, weight.placements  # type: ignore[attr-defined]
    if mesh.ndim != 1 or not placements[0].is_shard(0) or mesh.get_group() is not group:
        raise ValueError(
            "weight must be a plain tensor, this rank's rows, or a DTensor of placement Shard(0) on the one-dimensional mesh of "
            f"vocab_group, got {list(placements)} on {mesh}: on a mesh of more dimensions pass the local rows, "
            "whose gradient your data-parallel dimension reduces"
        )
    return weight.to_local()  # type: ignore[attr-defined, no-any-return]


def locate(weight: Tensor, hidden: Tensor, count: Callable[[], int], options: HeadOptions, group: Any) -> tuple[Tensor, Shard]:
    """This rank's rows of the weight, where its ids lie, and the options in its own ids. A collective.

    `count` checks what this rank alone was given, and returns the number of targets or keys. What it raises on one rank, every
    rank raises. The sizes of a weight are exchanged at its first call; that ranks agree, in shapes, options and the first row
    of hidden states, is checked where values may be read.
    """
    if torch.compiler.is_compiling():
        raise ValueError("vocab_group must be None under torch.compile: its collectives are not traced")
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"vocab_group must be a torch.distributed.ProcessGroup, got {type(group).__name__}")

    def looked_at() -> tuple[Tensor, int]:
        local = local_weight(weight, group)
        checks.shape("weight", local, [None, None])
        checks.dtype("hidden", hidden, checks.FLOATS)
        if hidden.dim() == 0 or not local.shape[1] or hidden.shape[-1] != local.shape[1]:
            raise ValueError(f"hidden must have shape [..., {local.shape[1]}] to match weight, got {list(hidden.shape)}")
        return local, count()

    found, error = attempt(looked_at)
    sizes = _sizes(weight, found, error, hidden, options, group)
    own, vocabulary = found[0], sum(sizes)
    first, size = sum(sizes[: dist.get_rank(group)]), len(own)
    limit = vocabulary if options.valid_vocab is None else checks.count("valid_vocab", options.valid_vocab)
    if limit > vocabulary:
        raise ValueError(f"valid_vocab must be in 1..{vocabulary}, got {options.valid_vocab}")
    for token in options.suppress:
        if not 0 <= token < vocabulary:
            raise ValueError(f"suppress must hold ids in 0..{vocabulary - 1}, got {token}")
    out = {token for token in options.suppress if token < limit}
    if len(out) == limit:
        raise ValueError("suppress and valid_vocab must leave at least one id, got all of them excluded")
    mine = tuple(token - first for token in options.suppress if first <= token < first + size)
    valid = min(max(limit - first, 0), size)
    gone = {token for token in mine if token < valid}
    some_id = next((token for token in range(valid) if token not in gone), None)
    of_shard = replace(options, suppress=mine, valid_vocab=valid if 0 < valid < size else None)
    return own, Shard(group, first, size, vocabulary, of_shard, options, some_id, valid - len(gone), limit - len(out))


def _sizes(
    weight: Any, found: tuple[Tensor, int] | None, error: Exception | None, hidden: Any, options: HeadOptions, group: Any
) -> list[int]:
    """Rows of the weight on each rank in the order of ranks; `found` holds this rank's rows and the number of targets."""
    like = next((x for x in (hidden, weight) if isinstance(x, Tensor)), torch.empty(0))
    known, read = _SIZES.get(weight) if isinstance(weight, Tensor) else None, checks.may_read(like)
    if known is not None and known[0] is group and not read:
        if error is not None:
            raise error
        return list(known[1])
    said = torch.zeros(2 + len(_ALIKE), dtype=torch.int64, device=like.device)
    said[1] = _status(error, group)
    if found is not None:
        own, rows = found
        flat = hidden.detach().reshape(-1, hidden.shape[-1])
        excluded = zlib.crc32(repr((tuple(options.suppress), options.valid_vocab)).encode())
        mine = [len(own), 0, len(flat), rows, hidden.shape[-1], checks.FLOATS.index(hidden.dtype), 0, excluded]
        said = torch.tensor(mine, dtype=torch.int64, device=like.device)
        if read:
            bits = flat[:1].to(torch.float64).view(torch.int64)
            said[6] = (bits * (torch.arange(1, bits.shape[1] + 1, device=bits.device) * 2 + 1)).sum()
    heard = [torch.empty_like(said) for _ in range(dist.get_world_size(group))]
    dist.all_gather(heard, said, group=group)
    table = torch.stack(heard).tolist()
    _raise_together(max(row[1] for row in table), error, said.device, group)
    for place, sentence in enumerate(_ALIKE, 2):
        values = [row[place] for row in table]
        if len(set(values)) > 1:
            raise ValueError(sentence.format(values))
    sizes = [row[0] for row in table]
    _SIZES[weight] = (group, sizes)
    return sizes


# --- exchanges ----------------------------------------------------------------------------------------------------------


class _Enter(torch.autograd.Function):
    """The tensors themselves, whose gradients are summed over the group, always in this order."""

    @staticmethod
    def forward(ctx: Any, group: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        wanted = zip(gradients, ctx.needs_input_grad[1:])
        return None, *[summed(gradient, ctx.group) if needed else None for gradient, needed in wanted]


def enter(group: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors that all ranks hold alike, on their way into what each computes with its own ids."""
    entered: tuple[Tensor, ...] = _Enter.apply(group, *tensors)
    return entered


class _Leave(torch.autograd.Function):
    """The sum over the ranks, whose gradient arrives alike on all of them."""

    @staticmethod
    def forward(ctx: Any, group: Any, part: Tensor) -> Tensor:
        return summed(part, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        return None, gradient


def leave(group: Any, part: Tensor) -> Tensor:
    """The sum of what each rank computed, differentiable in this rank's share."""
    total: Tensor = _Leave.apply(group, part)
    return total


def summed(gradient: Tensor, group: Any) -> Tensor:
    """Over the ranks; 16-bit gradients are added in fp32."""
    dtype = torch.float32 if gradient.dtype in (torch.bfloat16, torch.float16) else gradient.dtype
    # by rows on every rank: memory is what is added, and a gradient may lie in it transposed on some of them
    wide = gradient.to(dtype, copy=True, memory_format=torch.contiguous_format)
    dist.all_reduce(wide, group=group)
    return wide.to(gradient.dtype)


def gathered(own: Tensor, group: Any) -> Tensor:
    """`[R, ...]`, the tensors of all ranks, of one shape, in their order."""
    tensors = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    dist.all_gather(tensors, own.contiguous(), group=group)
    return torch.stack(tensors)


def largest(shard: Shard, z_NK: Tensor, id_NK: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of the candidates of all ranks, logits and ids in their own counting, the `count` largest; of equal ones the smaller ids.

    `[N, count]` each: the logits, falling; ids of the whole head; whether this rank holds them; their columns here. A collective.
    """
    missing = count - z_NK.shape[1]
    z_NK = torch.nn.functional.pad(z_NK, (0, missing), value=-torch.inf)
    id_NK = torch.nn.functional.pad(id_NK + shard.first, (0, missing), value=shard.vocabulary)
    z_NC, id_NC = (gathered(x, shard.group).movedim(0, 1).flatten(1) for x in (z_NK, id_NK))
    order_NC = id_NC.argsort(stable=True, dim=1)  # by id, then stably by logit
    order_NC = order_NC.gather(1, z_NC.gather(1, order_NC).argsort(stable=True, dim=1, descending=True))[:, :count]
    held_NK = order_NC // count == shard.rank
    return z_NC.gather(1, order_NC), id_NC.gather(1, order_NC), held_NK, torch.where(held_NK, order_NC % count, 0)
