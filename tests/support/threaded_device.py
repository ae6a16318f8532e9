"""A device made of CPU tensors that copies as a GPU does: threads copy while the test computes, and nothing is there
before its event. It has its own slots, full of NaN at first, counts what it is asked for, and refuses what a GPU's
driver would refuse."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from griffin_offload.devices.base import Device

LATE_S = 0.002  # a copy is never done before whoever queued it goes on


class QueuedEvent:
    """Done when the queue has come to it."""

    def __init__(self, done: Future[None]) -> None:
        self.done, self.waited = done, 0

    def synchronize(self) -> None:
        self.waited += 1
        self.done.result()


class ThreadStream:
    """One thread that copies, in order."""

    def __init__(self, counts: Counts) -> None:
        self._counts, self._queue = counts, ThreadPoolExecutor(1, "copies")

    def copy(self, target: Tensor, source: Tensor) -> None:
        assert source.data_ptr() in self._counts.pinned, "an asynchronous copy of memory that is not pinned"

        def work() -> None:
            time.sleep(LATE_S)
            target.copy_(source)

        self._counts.copied_bytes += source.nbytes
        self._counts.copies.append(self._queue.submit(work))

    def record(self) -> QueuedEvent:
        event = QueuedEvent(self._queue.submit(lambda: None))
        self._counts.events.append(event)
        return event

    def wait(self, event: QueuedEvent) -> None:
        self._queue.submit(event.synchronize)


@dataclass
class Counts:
    """What one device was asked for."""

    slot_bytes: list[int] = field(default_factory=list)
    copied_bytes: int = 0
    copies: list[Future[None]] = field(default_factory=list)
    events: list[QueuedEvent] = field(default_factory=list)
    freed: list[QueuedEvent] = field(default_factory=list)
    """Recorded by the computation: an event when the slots are there, then one when a slot is used up."""
    pinned: set[int] = field(default_factory=set)
    """Addresses."""
    registered: dict[int, int] = field(default_factory=dict)
    """Bytes by address."""
    readers: set[str] = field(default_factory=set)
    """Threads that made it theirs."""
    capped: list[int | None] = field(default_factory=list)
    peaks_reset: int = 0


class ThreadedDevice(Device):
    """`counts` are those of the class: a test registers a subclass of its own."""

    name, torch_type = "threaded", "cpu"
    asynchronous_copies = True
    assumed_overhead_bytes = 1_000
    memory = (2 * 10**9, 4 * 10**9)
    counts = Counts()

    @classmethod
    def available(cls) -> bool:
        return True

    def memory_bytes(self) -> tuple[int, int]:
        return self.memory

    def cap(self, nbytes: int) -> None:
        self.counts.capped.append(nbytes)

    def uncap(self) -> None:
        self.counts.capped.append(None)

    def reset_peak(self) -> None:
        self.counts.peaks_reset += 1

    def make_current(self) -> None:
        self.counts.readers.add(threading.current_thread().name)

    def synchronize(self) -> None:
        for copy in list(self.counts.copies):
            copy.result()

    def slot(self, nbytes: int) -> Tensor:
        self.counts.slot_bytes.append(nbytes)
        return torch.full((-(-nbytes // 4),), torch.nan).view(torch.uint8)

    def record(self) -> QueuedEvent:
        done: Future[None] = Future()
        done.set_result(None)
        self.counts.freed.append(QueuedEvent(done))
        return self.counts.freed[-1]

    def wait(self, event: QueuedEvent) -> None:
        event.synchronize()

    def copy_stream(self) -> ThreadStream:
        return ThreadStream(self.counts)

    def pinned(self, nbytes: int) -> Tensor:
        buffer = torch.empty(nbytes, dtype=torch.uint8)
        self.counts.pinned.add(buffer.data_ptr())
        return buffer

    def register(self, buffer: Tensor) -> None:
        assert buffer.data_ptr() not in self.counts.registered, "registered twice"
        self.counts.registered[buffer.data_ptr()] = buffer.nbytes
        self.counts.pinned.add(buffer.data_ptr())

    def unregister(self, buffer: Tensor) -> None:
        del self.counts.registered[buffer.data_ptr()]
        self.counts.pinned.remove(buffer.data_ptr())
