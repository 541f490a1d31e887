"""Run by test_kernels.py in a process with TRITON_INTERPRET=1: every kernel on memory whose neighbours nobody may touch.

Each launch gets its tensors between forbidden pages, with their last element before one, then with their first after one.
What reads or writes beside them kills the process. The interpreter does what a mask says: a lane that is off is not read.

    TRITON_INTERPRET=1 python -m tests.backends.triton.guarded [beyond]
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks.fuzzing.guards import Guarded
from dllm_kernels import distillation_loss, expected_embedding, noise
from dllm_kernels.backends.contract import STATISTICS
from dllm_kernels.backends.divergence.problem import KINDS
from dllm_kernels.backends.triton import divergence, expectation, fused, head, rows, tuning
from dllm_kernels.backends.triton import noise as bits
from dllm_kernels.backends.triton.configs import CONFIGS, USES
from tests.backends.triton.interpreted import problem, with_adapter

MODULES = (divergence, expectation, fused, rows, bits)
# N, H, V one below and one above the blocks: 64 rows, 32 of width, 64 ids of a tile, 128 of a segment and of a row's pass
SIZES = ((63, 31, 127), (65, 33, 129), (1, 1, 1), (129, 64, 257), (127, 65, 63))
_launch = InterpretedFunction.run
launched: set[str] = set()
at_end = True


def guarded_launch(self: Any, *arguments: Any, grid: Any, warmup: bool, **constants: Any) -> None:
    """The kernel on copies between forbidden pages, and their content back; arguments that share memory share it there too."""
    launched.add(self.fn.__name__)
    memory = Guarded()
    memory.at_end = at_end
    spans: dict[int, tuple[Tensor, int, int]] = {}
    for tensor in tensors(arguments):
        start = tensor.storage_offset() * tensor.itemsize
        end = start + (1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))) * tensor.itemsize
        known = spans.get(tensor.untyped_storage().data_ptr(), (tensor, start, end))
        spans[tensor.untyped_storage().data_ptr()] = tensor, min(start, known[1]), max(end, known[2])
    copies: dict[int, tuple[Tensor, Tensor, int]] = {}
    for key, (tensor, start, end) in spans.items():
        whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage(), start, (end - start,), (1,))
        copies[key] = whole, memory.copy(whole), start

    def there(value: Any) -> Any:
        if isinstance(value, TensorDescriptor):
            return replace(value, base=there(value.base))
        if not isinstance(value, Tensor) or not value.numel():
            return value
        _, copy, start = copies[value.untyped_storage().data_ptr()]
        place = copy.storage_offset() + value.storage_offset() * value.itemsize - start
        assert place % value.itemsize == 0
        at = place // value.itemsize
        return torch.empty(0, dtype=value.dtype).set_(copy.untyped_storage(), at, value.shape, value.stride())

    _launch(self, *(there(value) for value in arguments), grid=grid, warmup=warmup, **constants)
    for whole, copy, _ in copies.values():
        whole.copy_(copy)


def tensors(arguments: Any) -> Iterator[Tensor]:
    for value in arguments:
        if isinstance(value, TensorDescriptor):
            value = value.base
        if isinstance(value, Tensor) and value.numel():
            yield value


def kernels() -> set[str]:
    """Of the backend: whatever is launched by itself."""
    return {name for module in MODULES for name, value in vars(module).items() if name.endswith("_kernel") and callable(value)}


def calls(size: tuple[int, int, int], dtype: torch.dtype, *, options: bool) -> None:
    """Every plan and draw on one problem, with and without an adapter."""
    p = problem(*size, dtype, options=options)
    coef_N, key_N = torch.linspace(-1, 1, size[0]), noise.row_bits(1, noise.Stream.TOKEN, *torch.arange(size[0]).expand(3, -1))
    for q in (p, with_adapter(p, 3, dtype)) if options else (p,):
        head.run(q, STATISTICS)
        kept = head.run(q, ("logp", "entropy", "lse", "operand", "entropy_operand", "unit"))
        dweight = torch.zeros(size[2], size[1])
        known: dict[str, Any] = {"coef_N": coef_N, "entropy_coef_N": coef_N, "dweight_VH": dweight}
        head.run(q, ("lse", "dhidden"), **known)
        pairs = [(kept["operand"], coef_N), (kept["entropy_operand"], coef_N)]
        head.from_operands(q, pairs, dhidden=True, dweight_VH=dweight)
        head.from_operands(q, pairs[:1], dhidden=True)
        several = replace(q, target_N=torch.stack((q.target_N, q.target_N), 1))
        head.run(several, ("logp", "lse", "entropy", "dhidden"), coef_N=coef_N, own_NM=torch.stack((coef_N, coef_N), 1))
        for temperature in (0.0, 0.8, torch.full((size[0],), 0.8)):
            for few in (64, 0):
                head.FEW_ROWS = few
                head.sample(q, key_N, step=1, temperature=temperature)


def walks(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    """What goes over slabs `[v, N]`: distillation and soft embeddings."""
    N, H, V = size
    hidden, other = (torch.randn(N, H).to(dtype).requires_grad_(True) for _ in range(2))
    weight, teacher = (torch.randn(V, H).to(dtype).requires_grad_(True) for _ in range(2))
    given: dict[str, Any] = {"bias": torch.randn(V), "softcap": 3.0, "temperature": 0.7}
    for kind in KINDS:
        distillation_loss(hidden, weight, other.detach(), teacher.detach(), kind=kind, **given).backward()
    expected_embedding(hidden, weight, teacher, **given).sum().backward()


def random_bits(size: tuple[int, int, int]) -> None:
    key_N = bits.row_bits(1, noise.Stream.TOKEN, *torch.arange(size[0] * 16 + 1).expand(3, -1))
    bits.element_bits(key_N[: size[0]], size[2])


def beyond() -> None:
    """What the guards are for: a kernel without a mask, which must not survive."""

    @triton.jit
    def careless_kernel(x, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        at = x + tl.arange(0, BLOCK)
        tl.store(at, tl.load(at) + 1)

    careless_kernel[(1,)](torch.zeros(127), BLOCK=128)


def main() -> None:
    global at_end
    torch.set_num_threads(1)
    torch.manual_seed(0)
    InterpretedFunction.run = guarded_launch
    os.environ["DLLM_KERNELS_BACKEND"] = "triton"
    if sys.argv[1:] == ["beyond"]:
        beyond()
    whole = "whole" in sys.argv[1:]
    tiles, chosen = rows.row_tile, tuning.choose
    for at_end in (True, False):
        for number, size in enumerate(SIZES if whole else SIZES[:3]):
            for dtype in (torch.bfloat16, torch.float32) if whole else (torch.bfloat16,):
                calls(size, dtype, options=number % 2 == 1)
                walks(size, dtype)
            random_bits(size)
            print(f"{size}, {'end' if at_end else 'start'}", flush=True)
    # the tiles of a GPU, for which the sizes are one off too
    rows.row_tile = lambda count, draw, interpreter: tiles(count, draw=draw, interpreter=False)
    for name in ("sm_90", "gfx942") if whole else ():
        head.choose = lambda p, use, name=name: CONFIGS[name][USES.index(use)]
        for at_end in (True, False):  # noqa: B007 (a global)
            calls((129, 65, 513), torch.bfloat16, options=True)
        print(name, flush=True)
    rows.row_tile, head.choose = tiles, chosen
    assert launched == kernels(), f"never launched: {kernels() - launched}"
    print(f"{len(launched)} kernels", flush=True)


if __name__ == "__main__":
    main()
