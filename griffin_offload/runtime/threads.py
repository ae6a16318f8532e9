"""How many threads compute on the CPU: chosen by a short timed trial, kept for the time of a run.

More threads than free cores are worse than one: OpenMP's threads spin while they wait for a descheduled one. And a
matrix of a small model is done before a second thread has woken up.
"""

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator

import torch

_TRIAL_BYTES = 32 * 2**20
_REPEATS = 7
# Fewer threads are kept unless more are clearly faster: they leave room for the reader thread and for others.
_WORTH_IT = 0.9


def choose_threads(inputs: int, outputs: int, dtype: torch.dtype) -> int:
    """Threads for matrices of [outputs, inputs]: 1, half or all of torch's own number, whichever is fastest.

    OMP_NUM_THREADS, when set, decides instead. The trial multiplies one row by a part of such a matrix, as decoding
    does.
    """
    most = torch.get_num_threads()
    if "OMP_NUM_THREADS" in os.environ or most == 1:
        return most
    rows = max(1, min(outputs, _TRIAL_BYTES // (inputs * dtype.itemsize)))
    weight, row = torch.ones(rows, inputs, dtype=dtype), torch.ones(inputs, dtype=dtype)
    best, best_s = 1, _median_s(1, lambda: torch.mv(weight, row))
    for count in sorted({max(most // 2, 1), most} - {1}):
        seconds = _median_s(count, lambda: torch.mv(weight, row))
        if seconds < _WORTH_IT * best_s:
            best, best_s = count, seconds
    return best


def _median_s(threads: int, multiply: Callable[[], object]) -> float:
    seconds = []
    with limited_threads(threads):
        multiply()
        for _ in range(_REPEATS):
            start = time.perf_counter()
            multiply()
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


@contextlib.contextmanager
def limited_threads(count: int | None) -> Iterator[None]:
    """torch computes with `count` threads inside; None changes nothing."""
    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
