"""Make a virtual machine's free memory real before something is timed.

A hypervisor takes pages that a guest has freed and gives them back one by one, at 9 microseconds a page where this was
seen (0.45 GB/s; 7 GB/s for pages that it has not taken yet). That is a figure of the host, and falls on whoever comes
first, so every side of a comparison starts behind this.
"""

import subprocess
import sys

_TOUCH = """
import mmap, sys
import numpy
memory = mmap.mmap(-1, int(sys.argv[1]), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
numpy.frombuffer(memory, dtype=numpy.uint8)[:: mmap.PAGESIZE] = 1
"""


def touch_free_memory(nbytes: int) -> None:
    """Write to every page of so much free memory, and free it again."""
    subprocess.run([sys.executable, "-c", _TOUCH, str(nbytes)], check=True)
