"""`Device`: all that the package asks of what computes. CUDA and XPU have a file beside this one, the CPU and
MPS a few lines in `registry`.

Outside this room nobody asks for a device's type or calls torch.cuda: whoever needs to know more adds a question here.
"""

# ruff: noqa: B027  (to do nothing is the right answer of a device that has nothing of the kind)

import abc
from collections.abc import Callable
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from griffin_offload.devices.threads import choose_threads
from griffin_offload.errors import UsageError


class Event(Protocol):
    """A point in a queue of the device."""

    def synchronize(self) -> None:
        """Wait until the device has come to it."""


class CopyStream(Protocol):
    """A queue of copies to the device, beside that of the computation."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Queue the copy of `source`, in host memory, to `target`, on the device; both stay as they are meanwhile."""

    def record(self) -> Event:
        """The end of what has been queued so far."""

    def wait(self, event: Event) -> None:
        """What is queued from now on comes after `event`; nobody waits here."""


class Recorder(Protocol):
    """Makes something that does again what a function did on the device."""

    def warm_up(self, function: Callable[[], None]) -> None:
        """Run it for the first time: libraries set themselves up."""

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """What replays it; nothing has been computed yet. RuntimeError if it cannot be captured."""


class Device(abc.ABC):
    """One device. What its class says is known of one that is not here, too; methods ask it."""

    name: ClassVar[str]
    """As users write it."""
    torch_type: ClassVar[str] = ""
    """As torch writes it, where that is another name."""
    shares_host_memory: ClassVar[bool] = False
    """Whether its memory is the host's: mapped pages are computed with where they lie, and its budget covers what the
    host holds of the full weights."""
    queues_work: ClassVar[bool] = True
    """Whether it computes while Python goes on, so that reading a number waits."""
    asynchronous_copies: ClassVar[bool] = False
    """Whether it copies while it computes: `copy_stream` and `pinned` are there."""
    captures: ClassVar[bool] = False
    """Whether decoding can be captured: `recorder` is there."""
    assumed_overhead_bytes: ClassVar[int] = 0
    """What its runtime holds beside tensors, where it cannot be measured."""

    def __init__(self, torch_device: torch.device) -> None:
        """Asks nothing of the device: it may be another machine's."""
        self.torch_device = torch_device

    @classmethod
    @abc.abstractmethod
    def available(cls) -> bool:
        """Whether this machine has one."""

    @classmethod
    def current(cls) -> "Device":
        """The one that torch computes on."""
        return cls(torch.device(cls.torch_type or cls.name))

    @classmethod
    def absent(cls) -> "Device":
        """One of another machine: nothing may be asked of it."""
        return cls(torch.device(cls.torch_type or cls.name))

    @classmethod
    def check_index(cls, device: torch.device) -> None:
        """UsageError unless `device` is the one that torch computes on."""
        if device.index not in (None, 0):
            raise UsageError(f"device is {device}: there is one {device.type}, write {device.type!r}")

    @property
    def computes_on_cpu(self) -> bool:
        """Whether its tensors are the CPU's: threads multiply them, and kernels in C."""
        return self.torch_device.type == "cpu"

    # Memory.

    @abc.abstractmethod
    def memory_bytes(self) -> tuple[int, int]:
        """(free, total)."""

    def overhead_bytes(self) -> int:
        """What its runtime holds beside tensors; starts it."""
        return self.assumed_overhead_bytes

    def cap(self, nbytes: int) -> None:
        """Let this process's tensors take `nbytes` at most, where the allocator can be told: a backstop."""

    def uncap(self) -> None:
        """The cap is the process's, and goes when the model goes."""

    def empty_cache(self) -> None:
        """Give back what its allocator keeps of freed memory."""

    def reset_peak(self) -> None:
        """`peak_bytes` counts from now on."""

    def peak_bytes(self) -> int | None:
        """The most that its allocator has held; None where it is not asked, and the ledger counts."""
        return None

    def refused(self, error: BaseException) -> bool:
        """Whether it was this device that refused memory, and not the host."""
        return isinstance(error, torch.OutOfMemoryError)

    # Streams.

    def make_current(self) -> None:
        """Work of this thread goes to this device."""

    def synchronize(self) -> None:
        """Wait until all that was queued is done."""

    def slot(self, nbytes: int) -> Tensor:
        """uint8 [at least nbytes] on the device, for a streamed layer."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.torch_device)

    def record(self) -> Event:
        """The end of what this thread's computation has queued so far."""
        raise AssertionError(f"{self.name} has no asynchronous copies")

    def wait(self, event: Event) -> None:
        """What this thread computes from now on comes after `event`."""
        raise AssertionError(f"{self.name} has no asynchronous copies")

    def copy_stream(self) -> CopyStream:
        """A new one."""
        raise AssertionError(f"{self.name} has no asynchronous copies")

    def pinned(self, nbytes: int) -> Tensor:
        """uint8 [nbytes] in host memory that is copied from asynchronously."""
        raise AssertionError(f"{self.name} has no asynchronous copies")

    def register(self, buffer: Tensor) -> None:
        """Pin `buffer`, which lies in host memory already. GriffinError where that is refused."""

    def unregister(self, buffer: Tensor) -> None:
        """Undo `register`."""

    # Computation.

    def recorder(self) -> Recorder:
        """What captures decode steps; a new one."""
        raise AssertionError(f"{self.name} captures nothing")

    def choose_threads(self, inputs: int, outputs: int, dtype: torch.dtype) -> int | None:
        """Threads that multiply matrices [outputs, inputs] fastest, by a trial; None where threads do not multiply."""
        return choose_threads(inputs, outputs, dtype) if self.computes_on_cpu else None

    def gemm_dtypes(self, dtype: torch.dtype) -> set[torch.dtype]:
        """Types in which many rows of `dtype` may be multiplied: `dtype` and what may be faster."""
        return {dtype}

    def give_processes_their_own(self, processes: int, rank: int) -> bool:
        """Whether each of `processes` on this machine has a device to itself, and number `rank`, this one, takes its
        own now; otherwise they share one. UsageError if there are too few."""
        return False
