"""Memory that the machine or the device refuses: one error with the numbers, and nothing of the attempt kept alive."""

import re
import traceback
from collections.abc import Callable
from types import TracebackType

import torch

from griffin_offload.errors import LimitReached, OutOfMemory, limit_reached, memory_refused, one_line
from griffin_offload.runtime.memory import device_bytes
from griffin_offload.units import format_bytes

_CPU = torch.device("cpu")
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_ASKED = re.compile(r"(?:allocate|mmap) ([\d.]+) (bytes|KiB|MiB|GiB)")


class RefusalsNamed:
    """A context manager: OutOfMemory for every way in which Python, torch and the kernel say that there is no memory,
    LimitReached for those in which they say that there are no more files or threads.

    No generator: contextlib's frames would keep the failed ones, and with them their tensors, for as long as somebody
    keeps the error.
    """

    def __init__(
        self,
        doing: str,
        remedy: str,
        device: torch.device = _CPU,
        budget_bytes: int | None = None,
        give_back: Callable[[], object] = lambda: None,
    ) -> None:
        """`budget_bytes` is told, where there is one; `give_back` is called when memory was refused."""
        self._doing, self._remedy, self._device, self._budget_bytes = doing, remedy, device, budget_bytes
        self._give_back = give_back

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, LimitReached):
            return
        limit = limit_reached(error)
        if limit is None and not memory_refused(error):
            return
        message = self._message(error) if limit is None else f"while {self._doing}: {limit}"
        traceback.clear_frames(trace)
        error.__traceback__ = None
        del kind, error, trace
        self._give_back()
        raise OutOfMemory(message) if limit is None else LimitReached(message)

    def _message(self, error: BaseException) -> str:
        budget = f"; the budget is {format_bytes(self._budget_bytes)}" if self._budget_bytes is not None else ""
        return f"out of memory while {self._doing}: {_described(error, self._device)}{budget}: {self._remedy}"


def _described(error: BaseException, device: torch.device) -> str:
    kind = "device" if isinstance(error, torch.OutOfMemoryError) else "machine"
    asked = _ASKED.search(str(error))
    if asked is None:
        return f"the {kind} refused ({one_line(error)[:120]})"
    free, _ = device_bytes(device if kind == "device" else _CPU)
    nbytes = int(float(asked[1]) * _UNITS[asked[2]])
    return f"the {kind} refused {format_bytes(nbytes)}, {format_bytes(free)} are free"
