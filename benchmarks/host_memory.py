"""A virtual machine's free memory, kept real while something is timed.

A hypervisor takes pages that a guest has freed, within seconds, and gives them back one by one, at 9 microseconds a
page where this was seen (0.45 GB/s; 20 GB/s for pages that it has not taken yet). That is a figure of the host and
falls on whoever touches memory first, so every side of a comparison runs inside `memory_at_hand`, which makes the
machine behave like one that is not virtual.
"""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

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
            if not holder.stdout.readline():
                raise RuntimeError("free memory cannot be held")
            yield
        finally:
            holder.kill()
