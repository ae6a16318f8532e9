"""The stream: every layer's full FF on the device, in order, fetched once, one layer ahead of the computation.

A reader thread fetches; `slots` layers exist at a time. On the CPU, where the precision is the stored one, nothing is
copied: the mapped pages themselves are the slots, or, where the page cache is too small for the model, the disk is
read straight into them. Elsewhere a slot is a flat buffer on the device; with CUDA it is filled through pinned staging
buffers on a side stream.
"""

import errno
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor

from griffin_offload.checkpoint.direct_io import SlotLayout
from griffin_offload.devices.host_memory import block_buffer
from griffin_offload.devices.threads import BackgroundThread
from griffin_offload.errors import GriffinError, one_line
from griffin_offload.formats.translated import TranslatedTensor, in_memory, stored_bytes
from griffin_offload.offload.weight_store import FlatLayout, HostStore, MmapStore, Source, stream_dtype

_STAGING_BYTES = 32 * 2**20
_STAGING_BUFFERS = 3


@dataclass(frozen=True)
class StreamConfig:
    """Where the bytes go."""

    device: torch.device
    dtype: torch.dtype
    slots: int


@dataclass
class _LoadedLayer:
    layer: int
    tensors: list[Tensor]
    event: torch.cuda.Event | None


class _DeviceSlots:
    """Flat device buffers, filled in turn."""

    def __init__(self, source: Source, layers: Sequence[int], config: StreamConfig, direct: MmapStore | None) -> None:
        self._source, self._config, self._direct = source, config, direct
        largest = max(self._layout(layer).nbytes for layer in layers)
        self._buffers = [self._buffer(largest) for _ in range(min(config.slots, len(layers)))]
        self._cuda = _CudaCopies(config) if config.device.type == "cuda" else None

    def _buffer(self, nbytes: int) -> Tensor:
        if self._config.device.type == "cpu":
            return block_buffer(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8, device=self._config.device)

    def _layout(self, layer: int) -> FlatLayout | SlotLayout:
        if self._direct is not None:
            return self._direct.placements[layer]
        return FlatLayout(self._source.tensors(layer), self._config.dtype)

    def fill(self, position: int, layer: int) -> _LoadedLayer:
        """Copy the layer into the next slot; the caller has made sure that it is free."""
        buffer = self._buffers[position % len(self._buffers)]
        if self._direct is not None:
            return _LoadedLayer(layer, self._direct.read(layer, buffer), None)
        self._source.fetch(layer)
        layout = self._layout(layer)
        views = layout.views(buffer)
        if self._cuda is None:
            for view, tensor in zip(views, self._source.tensors(layer), strict=True):
                view.copy_(tensor)
            return _LoadedLayer(layer, views, None)
        if isinstance(self._source, HostStore):
            # One copy a layer: the host's flat buffer is laid out like the slot.
            flat = self._source.flat[layer]
            return _LoadedLayer(layer, views, self._cuda.copy_pinned(buffer[: flat.nbytes], flat))
        pairs = list(zip(views, self._source.tensors(layer), strict=True))
        return _LoadedLayer(layer, views, self._cuda.copy_staged(pairs))

    def freed(self) -> None:
        """The computation has used a slot: later copies have to wait for it."""
        if self._cuda is not None:
            self._cuda.mark_free()

    def wait_free(self) -> None:
        if self._cuda is not None:
            self._cuda.wait_free()


class _CudaCopies:
    """Asynchronous copies to the device on a side stream, through pinned staging buffers where needed."""

    def __init__(self, config: StreamConfig) -> None:
        self._stream = torch.cuda.Stream(config.device)
        self._free: queue.SimpleQueue[torch.cuda.Event] = queue.SimpleQueue()
        self._staging: list[tuple[Tensor, torch.cuda.Event]] = []
        self._turn = 0
        # Slots were allocated on the computing stream: nothing may be written before that has happened.
        self._stream.wait_stream(torch.cuda.current_stream(config.device))

    def mark_free(self) -> None:
        event = torch.cuda.Event()
        event.record()
        self._free.put(event)

    def wait_free(self) -> None:
        while not self._free.empty():
            self._stream.wait_event(self._free.get())

    def copy_pinned(self, slot: Tensor, flat: Tensor) -> torch.cuda.Event:
        with torch.cuda.stream(self._stream):
            slot.copy_(flat, non_blocking=True)
            return self._recorded()

    def copy_staged(self, pairs: list[tuple[Tensor, Tensor]]) -> torch.cuda.Event:
        """Host copy (and change of precision) into a staging buffer, then its copy to the device, in turn."""
        if not self._staging:
            for _ in range(_STAGING_BUFFERS):
                buffer = torch.empty(_STAGING_BYTES, dtype=torch.uint8, device="cpu", pin_memory=True)
                self._staging.append((buffer, torch.cuda.Event()))
        with torch.cuda.stream(self._stream):
            for view, tensor in pairs:
                step = _STAGING_BYTES // view.element_size()
                for target, source in zip(
                    view.flatten().split(step), in_memory(tensor).detach().flatten().split(step), strict=True
                ):
                    self._copy_chunk(target, source)
            return self._recorded()

    def _copy_chunk(self, target: Tensor, source: Tensor) -> None:
        staging, copied = self._staging[self._turn % _STAGING_BUFFERS]
        self._turn += 1
        copied.synchronize()  # returns at once for an event that was never recorded
        staged = staging[: target.nbytes].view(target.dtype)
        staged.copy_(source)
        target.copy_(staged, non_blocking=True)
        copied.record()

    def _recorded(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record()
        return event


def _as_streamed(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether it can be used as it is stored."""
    return tensor.dtype == stream_dtype(tensor, dtype) and not isinstance(tensor, TranslatedTensor)


class LayerStream:
    """A context manager that hands out the FF tensors of `layers`, each once, in order.

    `acquire` and `release` belong to the computing thread and alternate. A failure of the reader is raised by
    `acquire`, CheckpointChanged by entering and both of them. Leaving the context stops and joins the reader, whatever
    happened.
    """

    def __init__(self, source: Source, layers: Sequence[int], config: StreamConfig) -> None:
        self._source, self._layers, self._config = source, list(layers), config
        first = source.tensors(self._layers[0])
        stored = config.device.type == "cpu" and all(_as_streamed(t, config.dtype) for t in first)
        direct = source if stored and isinstance(source, MmapStore) and source.placements else None
        self._direct = direct
        in_place = stored and direct is None
        self._slots = None if in_place else _DeviceSlots(source, self._layers, config, direct)
        self._free = threading.Semaphore(config.slots)
        self._arrivals: queue.SimpleQueue[_LoadedLayer | BaseException] = queue.SimpleQueue()
        self._stop = False
        self._held: int | None = None
        self._in_flight: dict[int, int] = {}
        self.peak_in_flight_bytes = 0
        self.wait_s = 0.0
        self._reader = BackgroundThread(self._read, "griffin-offload-reader")

    def __enter__(self) -> "LayerStream":
        self._source.check_files()
        self._reader.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop = True
        self._free.release()
        self._reader.join()
        for layer in list(self._in_flight):
            self._source.drop(layer)
        if self._slots is not None and self._config.device.type == "cuda":
            torch.cuda.synchronize(self._config.device)  # a copy may still be under way into a slot

    def acquire(self, layer: int) -> list[Tensor]:
        """The full FF tensors of `layer` on the device, valid until `release`."""
        start = time.perf_counter()
        arrival = self._arrivals.get()
        self.wait_s += time.perf_counter() - start
        if isinstance(arrival, Exception):
            self._source.check(layer)  # first: it may be the reason
        if isinstance(arrival, OSError) and arrival.errno != errno.ENOMEM:
            raise GriffinError(f"layer {layer} cannot be read: {one_line(arrival)}") from arrival
        if isinstance(arrival, BaseException):
            raise arrival
        assert arrival.layer == layer, f"layer {layer} asked for, {arrival.layer} is next"
        if arrival.event is not None:
            torch.cuda.current_stream(self._config.device).wait_event(arrival.event)
        self._held = layer
        return arrival.tensors

    def release(self) -> None:
        """The layer acquired last is used up: its slot may be filled again."""
        assert self._held is not None, "release without acquire"
        self._source.check(self._held)
        if self._slots is not None:
            self._slots.freed()
        else:
            self._source.drop(self._held)
        del self._in_flight[self._held]
        self._held = None
        self._free.release()

    def _read(self) -> None:
        try:
            if self._config.device.type == "cuda":
                torch.cuda.set_device(self._config.device)
            for position, layer in enumerate(self._layers):
                self._free.acquire()
                if self._stop:
                    return
                self._arrivals.put(self._fetch(position, layer))
            self._arrivals.put(AssertionError("more layers asked for than are streamed"))
        except BaseException as error:
            self._arrivals.put(error)

    def _slot_bytes(self, layer: int, tensors: list[Tensor]) -> int:
        """Device bytes of a layer on its way; on the CPU the pages it is copied from count, too."""
        if self._slots is None and isinstance(self._source, HostStore):
            return 0  # used where it rests
        stored = sum(stored_bytes(tensor) for tensor in tensors)
        if self._slots is None:
            return stored
        if self._direct is not None:
            return self._direct.placements[layer].nbytes
        copied = sum(tensor.numel() * stream_dtype(tensor, self._config.dtype).itemsize for tensor in tensors)
        return copied + (stored if self._config.device.type == "cpu" else 0)

    def _fetch(self, position: int, layer: int) -> _LoadedLayer:
        tensors = self._source.tensors(layer)
        self._in_flight[layer] = self._slot_bytes(layer, tensors)
        self.peak_in_flight_bytes = max(self.peak_in_flight_bytes, sum(list(self._in_flight.values())))
        if self._slots is None:
            return _LoadedLayer(layer, self._source.fetch(layer), None)
        self._slots.wait_free()
        arrival = self._slots.fill(position, layer)
        if self._direct is not None:
            return arrival
        self._source.drop(layer)
        if self._config.device.type == "cpu":
            self._in_flight[layer] -= sum(stored_bytes(tensor) for tensor in tensors)
        return arrival
