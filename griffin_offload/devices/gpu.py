"""GPUs whose memory is their own and whose work torch queues on streams: NVIDIA's and Intel's. Copies run on a side
stream from pinned host memory; on NVIDIA's, decode steps are captured."""

from collections.abc import Callable
from types import ModuleType
from typing import ClassVar

import torch
from torch import Tensor

from griffin_offload.devices.base import CopyStream, Device, Event, Recorder
from griffin_offload.errors import GriffinError, UsageError, one_line

# A context with its kernels, where it cannot be measured (several processes on one device).
CONTEXT_BYTES = 700_000_000
_LARGEST_PLAUSIBLE_CONTEXT_BYTES = 1_500_000_000
# Kernels that are loaded after the context was measured, and the caching allocator's rounding of blocks.
_MARGIN_BYTES = 400_000_000


class GpuDevice(Device):
    """One GPU. What torch has for one maker's it has for the other's by the same names, in a module of its own."""

    api: ClassVar[ModuleType]
    chosen_by: ClassVar[str]
    """The environment's variable that says which of several a process sees."""
    asynchronous_copies = True
    assumed_overhead_bytes = CONTEXT_BYTES + _MARGIN_BYTES

    @classmethod
    def available(cls) -> bool:
        found: bool = cls.api.is_available()
        return found

    @classmethod
    def current(cls) -> "GpuDevice":
        # With its index: torch's memory settings and the reader thread ask for one.
        return cls(torch.device(cls.name, cls.api.current_device()))

    @classmethod
    def check_index(cls, device: torch.device) -> None:
        current = cls.api.current_device() if cls.available() else 0
        if device.index not in (None, current):
            raise UsageError(
                f"device is {device}, and the current one is {device.type}:{current}: call torch.{cls.name}.set_device("
                f"{device.index}) first, or set {cls.chosen_by}"
            )

    def memory_bytes(self) -> tuple[int, int]:
        free, total = self.api.mem_get_info(self.torch_device)
        return int(free), int(total)

    def overhead_bytes(self) -> int:
        """The context, with a margin."""
        torch.zeros(1, dtype=torch.uint8, device=self.torch_device)  # makes the context
        free, total = self.memory_bytes()
        measured = total - free - int(self.api.memory_reserved(self.torch_device))
        plausible = 0 < measured <= _LARGEST_PLAUSIBLE_CONTEXT_BYTES
        return measured + _MARGIN_BYTES if plausible else self.assumed_overhead_bytes

    def cap(self, nbytes: int) -> None:
        # It covers the caching allocator alone: the context is no part of it.
        _, total = self.memory_bytes()
        self._let_take(min(max(nbytes / total, 0.0), 1.0))

    def uncap(self) -> None:
        self._let_take(1.0)

    def _let_take(self, share: float) -> None:
        self.api.set_per_process_memory_fraction(share, self.torch_device)

    def empty_cache(self) -> None:
        self.api.empty_cache()

    def reset_peak(self) -> None:
        self.api.reset_peak_memory_stats(self.torch_device)

    def peak_bytes(self) -> int:
        return int(self.api.max_memory_reserved(self.torch_device))

    def make_current(self) -> None:
        self.api.set_device(self.torch_device)

    def synchronize(self) -> None:
        self.api.synchronize(self.torch_device)

    def record(self) -> Event:
        return _recorded(self.api, self.api.current_stream(self.torch_device))

    def wait(self, event: Event) -> None:
        self.api.current_stream(self.torch_device).wait_event(event)

    def copy_stream(self) -> CopyStream:
        return _SideStream(self.api, self.torch_device)

    def pinned(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def give_processes_their_own(self, processes: int, rank: int) -> bool:
        found = self.api.device_count()
        if processes > found:
            raise UsageError(f"{processes} processes and {found} GPUs: start as many processes, or --device cpu")
        self.api.set_device(rank)
        return True


class CudaDevice(GpuDevice):
    """NVIDIA's."""

    name = "cuda"
    api: ClassVar[ModuleType] = torch.cuda
    chosen_by = "CUDA_VISIBLE_DEVICES"
    captures = True

    def register(self, buffer: Tensor) -> None:
        # Registered, not allocated pinned: torch's pinned allocator rounds up to powers of two.
        status = torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0)
        if int(status) != 0:
            raise GriffinError(f"cudaHostRegister refused {buffer.nbytes} bytes (status {int(status)})")

    def unregister(self, buffer: Tensor) -> None:
        torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())

    def recorder(self) -> Recorder:
        return CudaRecorder(self.torch_device)


class XpuDevice(GpuDevice):
    """Intel's. Host memory that exists already is not pinned, so weights in RAM are copied by way of the driver's own
    buffers; nothing is captured."""

    name = "xpu"
    api: ClassVar[ModuleType] = torch.xpu
    chosen_by = "ZE_AFFINITY_MASK"

    def memory_bytes(self) -> tuple[int, int]:
        try:
            return super().memory_bytes()
        except RuntimeError as error:  # integrated ones do not know what is free of the host's memory
            raise UsageError(f"device xpu cannot be used here: {one_line(error)}; choose --device cpu") from error

    def _let_take(self, share: float) -> None:
        if hasattr(self.api, "set_per_process_memory_fraction"):  # torch 2.10
            super()._let_take(share)


def _recorded(api: ModuleType, stream: torch.Stream) -> Event:
    event = api.Event()
    event.record(stream)
    found: Event = event
    return found


class _SideStream:
    """Copies beside the computation."""

    def __init__(self, api: ModuleType, device: torch.device) -> None:
        self._api, self._stream = api, api.Stream(device)

    def copy(self, target: Tensor, source: Tensor) -> None:
        with self._api.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def record(self) -> Event:
        return _recorded(self._api, self._stream)

    def wait(self, event: Event) -> None:
        self._stream.wait_event(event)


class CudaRecorder:
    """Captures CUDA graphs, all on one side stream and with one memory pool: they are replayed one at a time, and
    leave nothing in the pool that is read later."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, function: Callable[[], None]) -> None:
        # On the capturing stream: cuBLAS keeps a handle and a workspace for each.
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            function()
        current.wait_stream(self._stream)

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # Other threads (a server's) may touch the device meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            function()
        replay: Callable[[], None] = graph.replay
        return replay
