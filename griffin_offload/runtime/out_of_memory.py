"""Memory that the machine or the device refuses: one error with the numbers, and nothing of the attempt kept alive."""

import contextlib
import re
import traceback
from collections.abc import Iterator

import torch

from griffin_offload.errors import OutOfMemory, memory_refused, one_line
from griffin_offload.runtime.memory import device_bytes
from griffin_offload.units import format_bytes

_CPU = torch.device("cpu")
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_ASKED = re.compile(r"(?:allocate|mmap) ([\d.]+) (bytes|KiB|MiB|GiB)")


@contextlib.contextmanager
def refusals_named(
    doing: str, remedy: str, device: torch.device = _CPU, budget_bytes: int | None = None
) -> Iterator[None]:
    """OutOfMemory for every way in which Python, torch and the kernel say that there is no memory. `budget_bytes` is
    told, where there is one."""
    try:
        yield
    except Exception as error:
        if not memory_refused(error):
            raise
        # Whoever keeps the new error must not keep the tensors of the frames that failed.
        traceback.clear_frames(error.__traceback__)
        reason = _described(error, device)
    else:
        return
    budget = f"; the budget is {format_bytes(budget_bytes)}" if budget_bytes is not None else ""
    raise OutOfMemory(f"out of memory while {doing}: {reason}{budget}: {remedy}")


def _described(error: BaseException, device: torch.device) -> str:
    kind = "device" if isinstance(error, torch.OutOfMemoryError) else "machine"
    asked = _ASKED.search(str(error))
    if asked is None:
        return f"the {kind} refused ({one_line(error)[:120]})"
    free, _ = device_bytes(device if kind == "device" else _CPU)
    nbytes = int(float(asked[1]) * _UNITS[asked[2]])
    return f"the {kind} refused {format_bytes(nbytes)}, {format_bytes(free)} are free"
