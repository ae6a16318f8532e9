"""A virtual machine's free memory: kept real while something is timed, and how fast it becomes so.

A hypervisor takes pages that a guest has freed, within seconds, and gives them back one by one, at 9 microseconds a
page where this was seen (0.45 GB/s; 20 GB/s for pages that it has not taken yet). That is a figure of the host and
falls on whoever touches memory first, so every side of a comparison runs inside `memory_at_hand`, which makes the
machine behave like one that is not virtual. `fresh_bytes_per_s` is what it costs otherwise.
"""

import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from griffin_offload.weights.direct import block_buffer, touch

_TAKEN_AFTER_S = 6.0
_LEFT_FREE_BYTES = 10**9  # less than this is free: give some up. It is used, and given, much faster than it is taken

# Not with psutil and in plain steps: it shares the processor with what is timed.
_HOLDER = """
import mmap, re, sys, time
from pathlib import Path

def meminfo(name):
    return 1024 * int(re.search(name + r": +(\\d+)", Path("/proc/meminfo").read_text())[1])

Path("/proc/self/oom_score_adj").write_text("1000")  # too slow for once: better this than what is timed
left_free, step, held = int(sys.argv[1]), 1 << 26, []
while meminfo("MemFree") > left_free + step:
    held.append(mmap.mmap(-1, step, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    held[-1].madvise(mmap.MADV_HUGEPAGE)
    for page in range(0, step, mmap.PAGESIZE):
        held[-1][page] = 1
for part in held:
    part.madvise(mmap.MADV_FREE)
print(flush=True)
while held:
    while held and meminfo("MemFree") < left_free:
        held.pop().close()
    time.sleep(0.005)
"""


@contextmanager
def memory_at_hand() -> Iterator[None]:
    """All free memory is held by a process that has touched it, and that gives it up as others take theirs."""
    command = [sys.executable, "-c", _HOLDER, str(_LEFT_FREE_BYTES)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None
            holder.stdout.readline()
            yield
        finally:
            holder.kill()


def fresh_bytes_per_s(nbytes: int, threads: int) -> float:
    """At which so much memory that nobody has used for a while becomes real, in huge pages; freed again."""
    time.sleep(_TAKEN_AFTER_S)
    parts = [block_buffer(nbytes // threads) for _ in range(threads)]
    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(touch, parts))
    return nbytes / (time.perf_counter() - start)
