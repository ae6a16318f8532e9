"""NVIDIA's GPUs: memory apart, copies on a side stream from pinned host memory, captured decode steps."""

from collections.abc import Callable

import torch
from torch import Tensor

from griffin_offload.devices.base import CopyStream, Device, Event, Recorder
from griffin_offload.errors import GriffinError, UsageError

# A CUDA context with its kernels, where it cannot be measured (several processes on one device).
CUDA_CONTEXT_BYTES = 700_000_000
_LARGEST_PLAUSIBLE_CONTEXT_BYTES = 1_500_000_000
# Kernels that are loaded after the context was measured, and the caching allocator's rounding of blocks.
_MARGIN_BYTES = 400_000_000


class CudaDevice(Device):
    """One GPU."""

    name = "cuda"
    asynchronous_copies = True
    captures = True
    assumed_overhead_bytes = CUDA_CONTEXT_BYTES + _MARGIN_BYTES

    @classmethod
    def available(cls) -> bool:
        return torch.cuda.is_available()

    @classmethod
    def current(cls) -> "CudaDevice":
        # With its index: torch's memory settings and the reader thread ask for one.
        return cls(torch.device("cuda", torch.cuda.current_device()))

    @classmethod
    def check_index(cls, device: torch.device) -> None:
        current = torch.cuda.current_device() if torch.cuda.is_available() else 0
        if device.index not in (None, current):
            raise UsageError(
                f"device is {device}, and the current one is {device.type}:{current}: call torch.cuda.set_device("
                f"{device.index}) first, or set CUDA_VISIBLE_DEVICES"
            )

    def memory_bytes(self) -> tuple[int, int]:
        free, total = torch.cuda.mem_get_info(self.torch_device)
        return int(free), int(total)

    def overhead_bytes(self) -> int:
        """The CUDA context, with a margin."""
        torch.zeros(1, dtype=torch.uint8, device=self.torch_device)  # makes the context
        free, total = self.memory_bytes()
        measured = total - free - torch.cuda.memory_reserved(self.torch_device)
        plausible = 0 < measured <= _LARGEST_PLAUSIBLE_CONTEXT_BYTES
        return measured + _MARGIN_BYTES if plausible else self.assumed_overhead_bytes

    def cap(self, nbytes: int) -> None:
        # It covers the caching allocator alone: the context is no part of it.
        _, total = self.memory_bytes()
        torch.cuda.set_per_process_memory_fraction(min(max(nbytes / total, 0.0), 1.0), self.torch_device)

    def uncap(self) -> None:
        torch.cuda.set_per_process_memory_fraction(1.0, self.torch_device)

    def empty_cache(self) -> None:
        torch.cuda.empty_cache()

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.torch_device)

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_reserved(self.torch_device)

    def make_current(self) -> None:
        torch.cuda.set_device(self.torch_device)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch_device)

    def record(self) -> Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.torch_device))
        return event

    def wait(self, event: Event) -> None:
        assert isinstance(event, torch.cuda.Event), "of this device"
        torch.cuda.current_stream(self.torch_device).wait_event(event)

    def copy_stream(self) -> CopyStream:
        return _SideStream(self.torch_device)

    def pinned(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def register(self, buffer: Tensor) -> None:
        # Registered, not allocated pinned: torch's pinned allocator rounds up to powers of two.
        status = torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0)
        if int(status) != 0:
            raise GriffinError(f"cudaHostRegister refused {buffer.nbytes} bytes (status {int(status)})")

    def unregister(self, buffer: Tensor) -> None:
        torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())

    def recorder(self) -> Recorder:
        return CudaRecorder(self.torch_device)

    def give_processes_their_own(self, processes: int, rank: int) -> bool:
        found = torch.cuda.device_count()
        if processes > found:
            raise UsageError(f"{processes} processes and {found} GPUs: start as many processes, or --device cpu")
        torch.cuda.set_device(rank)
        return True


class _SideStream:
    """Copies beside the computation."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def copy(self, target: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def record(self) -> Event:
        event = torch.cuda.Event()
        event.record(self._stream)
        return event

    def wait(self, event: Event) -> None:
        assert isinstance(event, torch.cuda.Event), "of this device"
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
