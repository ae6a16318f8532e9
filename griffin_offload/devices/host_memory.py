"""Host memory for large tensors: huge pages, addresses that direct reads can write to, touched on first use."""

import ctypes
import math
import mmap
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK_BYTES = 4096
"""What offsets, sizes and addresses of direct reads are multiples of; a page."""
_libc = ctypes.CDLL(None) if sys.platform != "win32" else ctypes.CDLL("msvcrt")  # called on Linux alone
_MADV_HUGEPAGE, _MADV_POPULATE_WRITE = 14, 23
_HUGE_BYTES = 2 * 2**20


def in_huge_pages(tensor: Tensor) -> Tensor:
    """`tensor`, just allocated in host memory and not touched yet, in huge pages where the system gives them: one page
    fault instead of 512, and fewer address translations when its rows are multiplied."""
    if tensor.device.type == "cpu" and tensor.nbytes >= 2 * _HUGE_BYTES and sys.platform.startswith("linux"):
        begin = -(-tensor.data_ptr() // _HUGE_BYTES) * _HUGE_BYTES
        nbytes = (tensor.data_ptr() + tensor.nbytes - begin) // _HUGE_BYTES * _HUGE_BYTES
        _libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(nbytes), _MADV_HUGEPAGE)
    return tensor


def block_buffer(nbytes: int) -> Tensor:
    """uint8 zeros [nbytes, rounded up to blocks] at an address that direct reads can write to. Not touched: its pages
    come with the first use."""
    size = max(-(-nbytes // BLOCK_BYTES), 1) * BLOCK_BYTES
    # Private: Python's default is shared memory, which has no huge pages.
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    return in_huge_pages(torch.frombuffer(mmap.mmap(-1, size, **private), dtype=torch.uint8))


def untouched_zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As torch.zeros, but in host memory no page is touched before its first use."""
    nbytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or nbytes < _HUGE_BYTES:
        return torch.zeros(shape, dtype=dtype, device=device)
    return block_buffer(nbytes)[:nbytes].view(dtype).view(shape)


def touch(tensor: Tensor) -> None:
    """Make the pages of `untouched_zeros` real now, and not one by one when they are first written to."""
    if tensor.device.type == "cpu" and tensor.nbytes >= _HUGE_BYTES and sys.platform.startswith("linux"):
        nbytes = tensor.nbytes // BLOCK_BYTES * BLOCK_BYTES
        _libc.madvise(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(nbytes), _MADV_POPULATE_WRITE)
