"""A virtual machine's free memory: made real before something is timed, and how fast it becomes so.

A hypervisor takes pages that a guest has freed, within seconds, and gives them back one by one, at 9 microseconds a
page where this was seen (0.45 GB/s; 7 GB/s for pages that it has not taken yet). That is a figure of the host, and
falls on whoever comes first, so every side of a comparison starts behind `touch_free_memory`. What the host has taken
again before a side has loaded costs every side the same, and `fresh_bytes_per_s` is the ceiling.
"""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from griffin_offload.weights.direct import block_buffer, touch

_TAKEN_AFTER_S = 6.0

_TOUCH = """
import mmap, sys
import numpy
memory = mmap.mmap(-1, int(sys.argv[1]), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
numpy.frombuffer(memory, dtype=numpy.uint8)[:: mmap.PAGESIZE] = 1
"""


def touch_free_memory(nbytes: int) -> None:
    """Write to every page of so much free memory, and free it again."""
    subprocess.run([sys.executable, "-c", _TOUCH, str(nbytes)], check=True)


def fresh_bytes_per_s(nbytes: int, threads: int) -> float:
    """At which so much memory that nobody has used for a while becomes real, in huge pages; freed again."""
    time.sleep(_TAKEN_AFTER_S)
    parts = [block_buffer(nbytes // threads) for _ in range(threads)]
    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(touch, parts))
    return nbytes / (time.perf_counter() - start)
