"""How every side of a comparison is timed: the clock and the process's own disk reads at each token.

The standard library alone: peers run in environments of their own, some without torch.
"""

import os
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from capped_run import process_status_bytes

Mark = tuple[float, int]


def disk_read_bytes() -> int:
    """Bytes this process made the disk deliver, threads included; page-cache hits do not count."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


def since_start_s() -> float:
    """Since this process began, with all that it imported."""
    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def mark() -> Mark:
    """(seconds, bytes read so far)"""
    return time.perf_counter(), disk_read_bytes()


def phase(start: Mark, end: Mark) -> dict[str, float]:
    return {"s": end[0] - start[0], "read_bytes": end[1] - start[1]}


def figures(
    before: Mark, loaded: Mark, tokens: list[Mark], new_tokens: list[int], pauses: Sequence[float] = ()
) -> dict[str, Any]:
    """What a worker reports of a run: `tokens` has one mark for each of `new_tokens`, `pauses` what was not the side's
    time behind each of them, in seconds."""
    if len(tokens) != len(new_tokens):
        raise RuntimeError(f"{len(new_tokens)} tokens, but {len(tokens)} marks")
    pauses = list(pauses) or [0.0] * len(tokens)
    return {
        "imports_s": since_start_s() - (time.perf_counter() - before[0]),
        "load": phase(before, loaded),
        "prefill": phase(loaded, tokens[0]),
        "decode": phase(tokens[0], tokens[-1]),
        "token_s": [
            later[0] - earlier[0] - pause for (earlier, later), pause in zip(pairwise(tokens), pauses, strict=False)
        ],
        "tokens": new_tokens,
        "rss_anon_bytes": process_status_bytes("self", "RssAnon"),
        "rss_peak_bytes": process_status_bytes("self", "VmHWM"),
    }
