"""Cold files: drop the page cache, and prove that it is gone."""

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

import numpy

DROP_CACHES = Path("/proc/sys/vm/drop_caches")


def checkpoint_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".gguf"))


def cached_bytes(path: Path) -> int:
    """Bytes of the file now in the page cache, asked of mincore(2)."""
    size = path.stat().st_size
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as view:
        anchor = ctypes.c_char.from_buffer(view)
        pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        failed = ctypes.CDLL(None, use_errno=True).mincore(
            ctypes.c_void_p(ctypes.addressof(anchor)), ctypes.c_size_t(size), pages
        )
        del anchor  # the mapping cannot close while it is exported
    if failed:
        raise OSError(ctypes.get_errno(), "mincore failed")
    return int((numpy.frombuffer(pages, dtype=numpy.uint8) & 1).sum()) * mmap.PAGESIZE


def drop_page_cache(paths: Iterable[Path], whole_machine: bool = True) -> int:
    """Drop the files' clean pages; returns how many of their bytes are still cached (mapped by someone)."""
    paths = list(paths)
    os.sync()  # dirty pages cannot be dropped
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    if whole_machine and os.access(DROP_CACHES, os.W_OK):
        DROP_CACHES.write_text("1\n")
    return sum(map(cached_bytes, paths))
