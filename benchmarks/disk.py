"""Cold disk reads: drop the page cache, prove that it is gone, and time ways of reading a file.

    python benchmarks/disk.py FILE --max-bytes 6e9

Every method ends with the bytes in one small private buffer, because that is what a gather or a copy to a
device needs; only then are their processor times comparable.
"""

import argparse
import ctypes
import json
import mmap
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy

BLOCK_BYTES = 8 * 1024 * 1024
MADV_POPULATE_READ = 22  # Linux 5.14; not named by Python's mmap
DROP_CACHES = Path("/proc/sys/vm/drop_caches")


@dataclass(frozen=True)
class ReadFigure:
    """`cpu_s` is this process's user + system time; work of kernel threads is not in it."""

    method: str
    read_bytes: int
    wall_s: float
    cpu_s: float

    @property
    def bytes_per_s(self) -> float:
        return self.read_bytes / self.wall_s


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


def _pread(path: Path, total_bytes: int, flags: int = 0, threads: int = 1) -> None:
    descriptor = os.open(path, os.O_RDONLY | flags)
    buffers = [mmap.mmap(-1, BLOCK_BYTES) for _ in range(threads)]  # page aligned, as O_DIRECT asks

    def read_share(share: int) -> None:
        for offset in range(share * BLOCK_BYTES, total_bytes, threads * BLOCK_BYTES):
            os.preadv(descriptor, [buffers[share]], offset)

    try:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(read_share, range(threads)))
    finally:
        os.close(descriptor)


def _mapped(path: Path, total_bytes: int, ahead_advice: int | None, here_advice: int | None) -> None:
    """Copy out of a mapping; `ahead_advice` is given one block early, `here_advice` just before the copy."""
    target = numpy.empty(BLOCK_BYTES, dtype=numpy.uint8)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
        source = numpy.frombuffer(view, dtype=numpy.uint8)
        for offset in range(0, total_bytes, BLOCK_BYTES):
            if ahead_advice is not None and offset + BLOCK_BYTES < len(view):
                view.madvise(ahead_advice, offset + BLOCK_BYTES, BLOCK_BYTES)
            if here_advice is not None:
                view.madvise(here_advice, offset, BLOCK_BYTES)
            block = source[offset : offset + BLOCK_BYTES]
            numpy.copyto(target[: len(block)], block)
            view.madvise(mmap.MADV_DONTNEED, offset, BLOCK_BYTES)  # as a streaming reader would
        del source, block


METHODS: dict[str, Callable[[Path, int], None]] = {
    "pread": lambda path, size: _pread(path, size),
    "pread, 2 threads": lambda path, size: _pread(path, size, threads=2),
    "pread, O_DIRECT": lambda path, size: _pread(path, size, os.O_DIRECT),
    "pread, O_DIRECT, 2 threads": lambda path, size: _pread(path, size, os.O_DIRECT, threads=2),
    "mmap": lambda path, size: _mapped(path, size, None, None),
    "mmap, WILLNEED": lambda path, size: _mapped(path, size, mmap.MADV_WILLNEED, None),
    "mmap, POPULATE_READ": lambda path, size: _mapped(path, size, None, MADV_POPULATE_READ),
    "mmap, WILLNEED + POPULATE_READ": lambda path, size: _mapped(path, size, mmap.MADV_WILLNEED, MADV_POPULATE_READ),
}


def measure_read(path: Path, method: str = "pread", max_bytes: int = int(4e9)) -> ReadFigure:
    """Time one cold sequential read; the caller drops the cache first."""
    size = path.stat().st_size
    if size > max_bytes:
        size = -(-max_bytes // BLOCK_BYTES) * BLOCK_BYTES  # whole blocks, except at the end of the file
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    METHODS[method](path, size)
    return ReadFigure(method, size, time.perf_counter() - wall_s, time.process_time() - cpu_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--max-bytes", type=lambda text: int(float(text)), default=int(4e9))
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()
    figures = []
    print("| method | GB | s | GB/s | cpu s | cpu s/GB |\n|---|---|---|---|---|---|")
    for method in list(METHODS) * args.repeats:  # the repeats apart, so that a passing load hits all alike
        drop_page_cache([args.file])
        figure = measure_read(args.file, method, args.max_bytes)
        figures.append(asdict(figure))
        gigabytes = figure.read_bytes / 1e9
        print(
            f"| {method} | {gigabytes:.1f} | {figure.wall_s:.2f} | {gigabytes / figure.wall_s:.2f} "
            f"| {figure.cpu_s:.2f} | {figure.cpu_s / gigabytes:.2f} |",
            flush=True,
        )
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
