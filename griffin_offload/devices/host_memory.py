"""Host memory: what is free of it, what this process takes, and large tensors in it (huge pages, direct reads)."""

import ctypes
import math
import mmap
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor

BLOCK_BYTES = 4096
"""What offsets, sizes and addresses of direct reads are multiples of; a page."""
_libc = ctypes.CDLL(None) if sys.platform != "win32" else ctypes.CDLL("msvcrt")  # called on Linux alone
_MADV_HUGEPAGE, _MADV_POPULATE_WRITE = 14, 23
_HUGE_BYTES = 2 * 2**20
HOST_OVERHEAD_BYTES = 500_000_000
"""On the CPU: allocator caches, thread stacks and Python objects, beside the ledger, for any model over 1 GB."""
_CGROUP, _OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None


def in_host_memory(tensor: Tensor) -> bool:
    """Whether its address is the host's, where direct reads and system calls can use it."""
    return tensor.device.type == "cpu"


def in_huge_pages(tensor: Tensor) -> Tensor:
    """`tensor`, just allocated in host memory and not touched yet, in huge pages where the system gives them: one page
    fault instead of 512, and fewer address translations when its rows are multiplied."""
    if in_host_memory(tensor) and tensor.nbytes >= 2 * _HUGE_BYTES and sys.platform.startswith("linux"):
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
    if in_host_memory(tensor) and tensor.nbytes >= _HUGE_BYTES and sys.platform.startswith("linux"):
        nbytes = tensor.nbytes // BLOCK_BYTES * BLOCK_BYTES
        _libc.madvise(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(nbytes), _MADV_POPULATE_WRITE)


def host_bytes() -> tuple[int, int]:
    """(free, total) bytes of the host: what the process may still take, cgroup limits included."""
    memory = psutil.virtual_memory()
    limit, used = _cgroup_limit()
    if limit is None:
        return int(memory.available), int(memory.total)
    return min(int(memory.available), max(limit - used, 0)), min(int(memory.total), limit)


def _cgroup_limit() -> tuple[int | None, int]:
    """(limit, used) of the tightest memory cgroup we are in, v2 or v1; (None, 0) without one."""
    try:
        groups = dict(line.split(":", 2)[1:] for line in _OWN_CGROUP.read_text().splitlines())
        version = _V1 if "memory" in groups else _V2
        root = _CGROUP / version.root
        group = root / groups[version.controller].lstrip("/")
    except (OSError, KeyError, ValueError):
        return None, 0
    limits = [found for place in (group, *group.parents) if (found := _read_cgroup(place, version)) is not None]
    return min(limits, key=lambda found: found[0] - found[1], default=(None, 0))


@dataclass(frozen=True)
class _CgroupVersion:
    """Where a version of cgroups says what; `droppable` are the lines of memory.stat that the kernel can free at once.

    What is charged and not droppable is used: anonymous memory, and files that no disk backs (tmpfs, shared memory) or
    that are locked, which no page cache gives back; page tables and stacks as well.
    """

    root: str
    controller: str
    limits: tuple[str, ...]
    usage: str
    droppable: tuple[str, ...]


_V1 = _CgroupVersion(
    "memory",
    "memory",
    ("memory.limit_in_bytes",),
    "memory.usage_in_bytes",
    ("total_active_file", "total_inactive_file"),
)
# Above memory.high a process is slowed down until it stands.
_V2 = _CgroupVersion(
    "", "", ("memory.max", "memory.high"), "memory.current", ("active_file", "inactive_file", "slab_reclaimable")
)


def _read_cgroup(group: Path, version: _CgroupVersion) -> tuple[int, int] | None:
    total = psutil.virtual_memory().total
    limits = [int(text) for name in version.limits if (text := _text(group / name)).isdigit() and int(text) < total]
    usage = _text(group / version.usage)
    if not limits or not usage.isdigit():
        return None  # the root has no limit, and above it is no group
    stat = dict(line.split(" ", 1) for line in _text(group / "memory.stat").splitlines() if " " in line)
    droppable = sum(int(stat.get(name, 0)) for name in version.droppable)
    return min(limits), max(int(usage) - droppable, 0)


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def anonymous_bytes() -> int:
    """Memory of this process that no file backs: what it adds to the machine's load."""
    try:
        resident, shared = Path("/proc/self/statm").read_text().split()[1:3]
        return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return int(psutil.Process().memory_info().rss)


def peak_host_bytes() -> int:
    """The largest resident set this process ever had, mapped file pages included."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def give_back_freed() -> None:
    """Give the system what malloc keeps of freed memory, glibc's, which keeps much.

    It finds an aligned block no place in a hole of just its size. So a pass over 512 tokens came to hold 0.6 GB more
    than it ever used at once (13B), and no budget knew of it.
    """
    if _malloc_trim is not None:
        _malloc_trim(0)
