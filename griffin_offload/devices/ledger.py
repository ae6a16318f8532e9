"""The ledger that a budget is held against, and refused memory as one error."""

import contextlib
import re
import threading
import traceback
from collections.abc import Callable, Iterator
from types import TracebackType

from griffin_offload.devices.base import Device
from griffin_offload.devices.host_memory import anonymous_bytes, host_bytes
from griffin_offload.devices.threads import BackgroundThread
from griffin_offload.errors import LimitReached, OutOfMemory, limit_reached, memory_refused, one_line
from griffin_offload.units import format_bytes

_SAMPLE_S = 0.01


class Ledger:
    """Bytes the runtime holds on the device, by part, and the largest sum they ever had.

    On the CPU this is the measure a budget is held against: pages in flight count as slots, activations as the
    plan counts them for the shapes that really passed. A device with an allocator of its own is asked instead.
    """

    def __init__(self, device: Device, overhead_bytes: int) -> None:
        self._device = device
        self._overhead_bytes = overhead_bytes
        self._parts: dict[str, int] = {}
        self._peak = 0
        self._anonymous_start = anonymous_bytes()
        self._anonymous_peak = self._anonymous_start

    def hold(self, **parts: int) -> None:
        """Set the bytes of the named parts."""
        self._parts.update(parts)
        self._peak = max(self._peak, sum(self._parts.values()))

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """Measure peaks inside: of the parts, and of the process's anonymous memory, sampled by a thread."""
        self.hold(kv_cache=0, states=0, workspace=0, logits=0, slots=0)
        self._peak = sum(self._parts.values())
        self._device.reset_peak()
        stop = threading.Event()
        sampler = BackgroundThread(lambda: self._sample(stop), "griffin-offload-sampler")

        def finish() -> None:
            stop.set()
            sampler.join()
            self.hold(kv_cache=0, states=0, workspace=0, logits=0, slots=0)

        try:
            sampler.start()
            yield
        finally:
            try:
                finish()
            except KeyboardInterrupt:  # a second Ctrl-C must not leave the sampler running
                finish()
                raise

    def _sample(self, stop: threading.Event) -> None:
        ended = False
        while not ended:  # at the start and at the end too: a short run is over before the first wait is
            self._anonymous_peak = max(self._anonymous_peak, anonymous_bytes())
            ended = stop.wait(_SAMPLE_S)
        self._anonymous_peak = max(self._anonymous_peak, anonymous_bytes())

    @property
    def peak_bytes(self) -> int:
        """Peak of the run: asked from the device's allocator, with the runtime's overhead, or as it was counted."""
        asked = self._device.peak_bytes()
        return self._peak if asked is None else asked + self._overhead_bytes

    @property
    def host_growth_bytes(self) -> int:
        """Growth of anonymous memory since loading began, at its sampled peak."""
        return max(self._anonymous_peak - self._anonymous_start, 0)


# Memory that the machine or the device refuses: one error with the numbers, and nothing of the attempt kept alive.


_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_ASKED = re.compile(r"(?:allocate|mmap) ([\d.]+) (bytes|KiB|MiB|GiB)")


class OutOfMemoryAsError:
    """A context manager: OutOfMemory for every way in which Python, torch and the kernel say that there is no memory,
    LimitReached for those in which they say that there are no more files or threads.

    No generator: contextlib's frames would keep the failed ones, and with them their tensors, for as long as somebody
    keeps the error.
    """

    def __init__(
        self,
        doing: str,
        remedy: str,
        device: Device | None = None,
        budget_bytes: int | None = None,
        give_back: Callable[[], object] = lambda: None,
    ) -> None:
        """`device`: that of the computation, None for work of the host alone. `budget_bytes` is told, where there is
        one; `give_back` is called when memory was refused."""
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


def _described(error: BaseException, device: Device | None) -> str:
    refused = device if device is not None and device.refused(error) else None
    kind = "machine" if refused is None else "device"
    asked = _ASKED.search(str(error))
    if asked is None:
        return f"the {kind} refused ({one_line(error)[:120]})"
    free, _ = host_bytes() if refused is None else refused.memory_bytes()
    nbytes = int(float(asked[1]) * _UNITS[asked[2]])
    return f"the {kind} refused {format_bytes(nbytes)}, {format_bytes(free)} are free"
