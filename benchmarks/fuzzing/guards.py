"""Tensors that end, or begin, at a page which nobody may touch: a read or write beside one kills the process."""

from __future__ import annotations

import ctypes
import mmap
from collections import defaultdict

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def _region(bytes_: int) -> int:
    """Address of readable and writable pages between two forbidden ones."""
    whole = bytes_ + 2 * PAGE
    address = _LIBC.mmap(None, whole, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        raise MemoryError(f"mmap of {whole} bytes failed: errno {ctypes.get_errno()}")
    for guard in (address, address + PAGE + bytes_):
        if _LIBC.mprotect(guard, PAGE, 0):
            raise OSError(ctypes.get_errno(), "mprotect failed")
    return int(address) + PAGE


class Guarded:
    """Regions, used again from case to case: `release` takes back what was handed out."""

    def __init__(self) -> None:
        self._free: defaultdict[int, list[torch.UntypedStorage]] = defaultdict(list)
        self._used: list[torch.UntypedStorage] = []
        self.at_end = True  # where in its region a tensor lies: its last element before a forbidden page, or its first after

    def release(self) -> None:
        for storage in self._used:
            self._free[storage.nbytes()].append(storage)
        self._used.clear()

    def empty_like(self, like: Tensor, fill: float | None = None) -> Tensor:
        """Shape, strides and dtype of `like`; what lies between its elements holds `fill`, where given."""
        if not like.numel():
            return torch.empty_like(like)
        shape, strides = like.shape, like.stride()
        count = 1
        for length, stride in zip(shape, strides):
            count += (length - 1) * stride
        bytes_ = count * like.itemsize
        size = PAGE
        while size < bytes_:
            size *= 2
        storage = self._free[size].pop() if self._free[size] else _storage(size)
        self._used.append(storage)
        start = (size - bytes_) // like.itemsize if self.at_end else 0
        # not a view of anything, so changes in place are counted for it alone
        found = torch.empty(0, dtype=like.dtype).set_(storage, start, shape, strides)
        if fill is not None:
            whole = found if found.is_contiguous() else torch.empty(0, dtype=like.dtype).set_(storage, start, (count,), (1,))
            whole.fill_(fill)
        return found

    def copy(self, tensor: Tensor) -> Tensor:
        """The same values between forbidden pages; NaN between the elements of a strided tensor."""
        strided = tensor.is_floating_point() and not tensor.is_contiguous()
        return self.empty_like(tensor, float("nan") if strided else None).copy_(tensor.detach())


def _storage(bytes_: int) -> torch.UntypedStorage:
    whole = torch.frombuffer((ctypes.c_char * bytes_).from_address(_region(bytes_)), dtype=torch.uint8)
    return whole.untyped_storage()
