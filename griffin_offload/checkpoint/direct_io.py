"""Files read past the page cache (O_DIRECT), into memory that is used again for every layer.

A model that does not fit the page cache gains nothing from passing through it: every layer would take fresh pages, and
a page fault each costs more than the disk. What happens to lie in the page cache already is copied from there.
"""

import ctypes
import errno
import mmap
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from griffin_offload.devices.memory import BLOCK_BYTES, block_buffer
from griffin_offload.errors import GriffinError

PIECE_BYTES = 2 * 2**20
_READERS = 4  # a network disk wants several requests at a time (benchmarks/NOTES.md)
LIBC = ctypes.CDLL(None) if sys.platform != "win32" else ctypes.CDLL("msvcrt")  # called on Linux alone
_MADV_DONTNEED, _MADV_POPULATE_READ = 4, 22
_CACHESTAT = 451  # the system call's number, on every architecture; Linux 6.5


@dataclass(frozen=True)
class Extent:
    """Bytes of a file."""

    path: str
    offset: int
    nbytes: int


class SlotLayout:
    """Where the tensors of one layer lie in a buffer that its extents are read into, whole blocks of each."""

    def __init__(self, tensors: Sequence[Tensor], extents: Sequence[Extent]) -> None:
        """`extents` are those of `tensors`, in the same order."""
        self._tensors, self.reads = tensors, list[tuple[Extent, int]]()
        self._places = [0] * len(tensors)
        end = 0
        for index in sorted(range(len(tensors)), key=lambda i: (extents[i].path, extents[i].offset)):
            extent = extents[index]
            first = extent.offset // BLOCK_BYTES * BLOCK_BYTES
            last = -(-(extent.offset + extent.nbytes) // BLOCK_BYTES) * BLOCK_BYTES
            self.reads.append((Extent(extent.path, first, last - first), end))
            self._places[index] = end + extent.offset - first
            end += last - first
        self.nbytes = end

    def views(self, buffer: Tensor) -> list[Tensor]:
        """The tensors inside `buffer`, uint8 of at least `nbytes`."""
        return [
            buffer[place : place + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for tensor, place in zip(self._tensors, self._places, strict=True)
        ]


class CachedPages:
    """What the page cache holds of a file, taken through a mapping: pread(2) would go on to read ahead, behind what is
    asked for and whatever was advised, so that the cache filled with what is read past it anyway."""

    def __init__(self, descriptor: int) -> None:
        """OSError if there is nothing to map."""
        try:
            self._mapping = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        except ValueError as error:
            raise OSError(errno.ENODATA, str(error)) from error
        self._mapping.madvise(mmap.MADV_RANDOM)
        self._address = np.frombuffer(self._mapping, dtype=np.uint8).ctypes.data

    def copy(self, offset: int, target: Tensor) -> bool:
        """Copy bytes from `offset`, a multiple of blocks, to `target`, and keep no page mapped. False if they are not
        all there, or pages are larger than blocks."""
        source, nbytes = ctypes.c_void_p(self._address + offset), ctypes.c_size_t(target.numel())
        if LIBC.madvise(source, nbytes, _MADV_POPULATE_READ):
            return False
        # By ctypes, without the interpreter's lock: the handler of bus errors takes it, should the file be cut now.
        ctypes.memmove(target.data_ptr(), source, target.numel())
        LIBC.madvise(source, nbytes, _MADV_DONTNEED)
        return True

    def close(self) -> None:
        self._mapping.close()


@dataclass(frozen=True)
class _File:
    cached: int
    """A descriptor that somebody else closes."""
    direct: int
    pages: CachedPages
    nbytes: int

    def close(self) -> None:
        os.close(self.direct)
        self.pages.close()


class DirectReader:
    """Open files, and threads that read from them."""

    def __init__(self, files: Mapping[str, int]) -> None:
        """`files` are descriptors by path, open for reading until `close`. Raises OSError where a file, or its file
        system, cannot be read directly."""
        self._files: dict[str, _File] = {}
        self._bounce = threading.local()
        self._pool = ThreadPoolExecutor(_READERS, "griffin-offload-direct")
        try:
            for path, cached in files.items():
                pages = CachedPages(cached)
                direct = os.open(path, os.O_RDONLY | os.O_DIRECT)
                self._files[path] = _File(cached, direct, pages, os.fstat(cached).st_size)
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Close what was opened here; nothing may be reading. Threads end by themselves (see `ReadQueue.close`)."""
        self._pool.shutdown(wait=False)
        while self._files:
            self._files.popitem()[1].close()

    def read(self, placement: SlotLayout, buffer: Tensor) -> list[Tensor]:
        """Read a layer's extents into `buffer`, of `block_buffer`; blocks."""
        pieces = [
            (extent.path, extent.offset + at, buffer[place + at : place + at + min(PIECE_BYTES, extent.nbytes - at)])
            for extent, place in placement.reads
            for at in range(0, extent.nbytes, PIECE_BYTES)
        ]
        for _ in self._pool.map(lambda piece: self._read(*piece), pieces):
            pass
        return placement.views(buffer)

    def copy(self, extent: Extent, target: Tensor) -> None:
        """Read `extent` into `target`, a contiguous uint8 tensor in host memory at any address; by this thread. Whole
        blocks of the file that are whole ones in memory, too, are read without a copy."""
        first = -(-extent.offset // BLOCK_BYTES) * BLOCK_BYTES
        last = (extent.offset + extent.nbytes) // BLOCK_BYTES * BLOCK_BYTES
        if (target.data_ptr() - extent.offset) % BLOCK_BYTES or first >= last:
            self.copy_by_bounce(extent, target)
            return
        for at in range(first, last, PIECE_BYTES):
            upto = min(at + PIECE_BYTES, last)
            self._read(extent.path, at, target[at - extent.offset : upto - extent.offset])
        for begin, end in ((extent.offset, first), (last, extent.offset + extent.nbytes)):
            if begin < end:
                place = target[begin - extent.offset : end - extent.offset]
                self.copy_by_bounce(Extent(extent.path, begin, end - begin), place)

    def copy_by_bounce(self, extent: Extent, target: Tensor) -> None:
        """The same through blocks of this thread's own."""
        if not hasattr(self._bounce, "buffer"):
            self._bounce.buffer = block_buffer(PIECE_BYTES)
        bounce, numbers = self._bounce.buffer, target.numpy()  # numpy copies by this thread alone
        end, at = extent.offset + extent.nbytes, extent.offset
        while at < end:
            first = at // BLOCK_BYTES * BLOCK_BYTES
            wanted = min(PIECE_BYTES, -(-(end - first) // BLOCK_BYTES) * BLOCK_BYTES)
            self._read(extent.path, first, bounce[:wanted])
            upto = min(first + wanted, end)
            numbers[at - extent.offset : upto - extent.offset] = bounce[at - first : upto - first].numpy()
            at = upto

    def _read(self, path: str, offset: int, target: Tensor) -> None:
        file = self._files[path]
        expected = min(target.numel(), file.nbytes - offset)
        cached = cached_bytes(file.cached, offset, target.numel()) >= target.numel()
        if cached and file.pages.copy(offset, target[:expected]):
            found = os.fstat(file.cached).st_size - offset
        else:
            view = memoryview(target.numpy())  # type: ignore[arg-type]  # numpy's stubs know no buffers
            found = os.preadv(file.direct, [view], offset)
        if found < expected:
            raise GriffinError(f"{path} cannot be read any more: it was changed, or its disk fails")


class _Range(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint64), ("nbytes", ctypes.c_uint64))


class _CacheStatistics(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("cached", "dirty", "writeback", "evicted", "recent"))


def cached_bytes(descriptor: int, offset: int, nbytes: int) -> int:
    """How many of these bytes are in the page cache, in whole pages, by cachestat(2); 0 where the kernel cannot say."""
    asked, found = _Range(offset, nbytes), _CacheStatistics()
    failed = LIBC.syscall(_CACHESTAT, descriptor, ctypes.byref(asked), ctypes.byref(found), 0)
    return 0 if failed else found.cached * mmap.PAGESIZE
