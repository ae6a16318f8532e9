"""The stream: every layer's full FF on the device, in order, fetched once, one layer ahead of the computation.

A reader thread fetches; `slots` layers exist at a time. On the CPU, where the precision is the stored one, nothing is
copied: the mapped pages themselves are the slots, or, where the page cache is too small for the model, the disk is
read straight into them. Elsewhere a slot is a flat buffer on the device, filled through pinned staging buffers on a
side stream where the device has such.

Beside it residents are on their way (`BackgroundLoader`), stage by stage, while a first prompt passes: loading
reads gigabytes and the first streamed pass computes for seconds, and neither has to wait for the other. A stage is a
module, a layer mostly: its first forward, whoever calls it, waits until its residents are there.
"""

import contextlib
import errno
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from griffin_offload.checkpoint.direct_io import SlotLayout
from griffin_offload.devices.base import Device, Event
from griffin_offload.devices.threads import BackgroundThread
from griffin_offload.errors import GriffinError, memory_refused, one_line
from griffin_offload.formats.translated import TranslatedTensor, in_memory, stored_bytes
from griffin_offload.offload.weight_store import FlatLayout, HostStore, MmapStore, Source, stream_dtype

_STAGING_BUFFERS = 3


@dataclass(frozen=True)
class StreamConfig:
    """Where the bytes go."""

    device: Device
    dtype: torch.dtype
    slots: int
    staging_bytes: int = 32 * 2**20
    """Of each pinned buffer, where the device copies asynchronously."""
    keeps_pages: bool = False
    """Whether a layer's pages stay until it is released, as what is gathered of it looks there, too (grids)."""


@dataclass
class _LoadedLayer:
    layer: int
    tensors: list[Tensor]
    event: Event | None


class _DeviceSlots:
    """Flat device buffers, filled in turn."""

    def __init__(self, source: Source, layers: Sequence[int], config: StreamConfig, direct: MmapStore | None) -> None:
        self._source, self._config, self._direct = source, config, direct
        largest = max(self._layout(layer).nbytes for layer in layers)
        self._buffers = [config.device.slot(largest) for _ in range(min(config.slots, len(layers)))]
        self._copies = _AsyncCopies(config) if config.device.asynchronous_copies else None

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
        if self._copies is None:
            for view, tensor in zip(views, self._source.tensors(layer), strict=True):
                view.copy_(tensor)
            return _LoadedLayer(layer, views, None)
        if isinstance(self._source, HostStore):
            # One copy a layer: the host's flat buffer is laid out like the slot.
            flat = self._source.flat[layer]
            return _LoadedLayer(layer, views, self._copies.copy_pinned(buffer[: flat.nbytes], flat))
        pairs = list(zip(views, self._source.tensors(layer), strict=True))
        return _LoadedLayer(layer, views, self._copies.copy_staged(pairs))

    def freed(self) -> None:
        """The computation has used a slot: later copies have to wait for it."""
        if self._copies is not None:
            self._copies.mark_free()

    def wait_free(self) -> None:
        if self._copies is not None:
            self._copies.wait_free()


class _AsyncCopies:
    """Copies to the device on a stream of their own, through pinned staging buffers where needed.

    The computing thread makes it and calls `mark_free`, the reader calls the rest.
    """

    def __init__(self, config: StreamConfig) -> None:
        self._device, self._stream = config.device, config.device.copy_stream()
        self._staging_bytes = config.staging_bytes
        self._free: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._staging: list[tuple[Tensor, Event]] = []
        # Slots were allocated by the computing thread: nothing may be written before that has happened.
        self._stream.wait(self._device.record())

    def mark_free(self) -> None:
        self._free.put(self._device.record())

    def wait_free(self) -> None:
        while not self._free.empty():
            self._stream.wait(self._free.get())

    def copy_pinned(self, slot: Tensor, flat: Tensor) -> Event:
        self._stream.copy(slot, flat)
        return self._stream.record()

    def copy_staged(self, pairs: list[tuple[Tensor, Tensor]]) -> Event:
        """Host copy (and change of precision) into a staging buffer, then its copy to the device, in turn."""
        for view, tensor in pairs:
            step = self._staging_bytes // view.element_size()
            whole = in_memory(tensor).detach().flatten()
            for target, source in zip(view.flatten().split(step), whole.split(step), strict=True):
                self._copy_chunk(target, source)
        return self._stream.record()

    def _copy_chunk(self, target: Tensor, source: Tensor) -> None:
        staging = self._free_staging()
        staged = staging[: target.nbytes].view(target.dtype)
        staged.copy_(source)
        self._stream.copy(target, staged)
        self._staging.append((staging, self._stream.record()))

    def _free_staging(self) -> Tensor:
        """The buffer that was copied from longest ago, or a new one."""
        if len(self._staging) < _STAGING_BUFFERS:
            return self._device.pinned(self._staging_bytes)
        staging, copied = self._staging.pop(0)
        copied.synchronize()
        return staging


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
        stored = config.device.shares_host_memory and all(_as_streamed(t, config.dtype) for t in first)
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
        if self._slots is not None:
            self._config.device.synchronize()  # a copy may still be under way into a slot

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
            self._config.device.wait(arrival.event)
        self._held = layer
        return arrival.tensors

    def release(self) -> None:
        """The layer acquired last is used up: its slot may be filled again."""
        assert self._held is not None, "release without acquire"
        self._source.check(self._held)
        if self._slots is not None:
            self._slots.freed()
        if self._slots is None or (self._config.keeps_pages and self._direct is None):
            self._source.drop(self._held)
        del self._in_flight[self._held]
        self._held = None
        self._free.release()

    def _read(self) -> None:
        try:
            self._config.device.make_current()
            for position, layer in enumerate(self._layers):
                self._free.acquire()
                if self._stop:
                    return
                self._arrivals.put(self._fetch(position, layer))
            self._arrivals.put(AssertionError("more layers asked for than are streamed"))
        except BaseException as error:
            self._arrivals.put(error)

    def _slot_bytes(self, layer: int, tensors: list[Tensor]) -> int:
        """Device bytes of a layer on its way; in host memory the pages it is copied from count, too."""
        if self._slots is None and isinstance(self._source, HostStore):
            return 0  # used where it rests
        stored = sum(stored_bytes(tensor) for tensor in tensors)
        if self._slots is None:
            return stored
        if self._direct is not None:
            return self._direct.placements[layer].nbytes
        copied = sum(tensor.numel() * stream_dtype(tensor, self._config.dtype).itemsize for tensor in tensors)
        return copied + (stored if self._config.device.shares_host_memory else 0)

    def _fetch(self, position: int, layer: int) -> _LoadedLayer:
        tensors = self._source.tensors(layer)
        self._in_flight[layer] = self._slot_bytes(layer, tensors)
        self.peak_in_flight_bytes = max(self.peak_in_flight_bytes, sum(list(self._in_flight.values())))
        if self._slots is None:
            return _LoadedLayer(layer, self._source.fetch(layer), None)
        self._slots.wait_free()
        arrival = self._slots.fill(position, layer)
        if self._direct is not None or self._config.keeps_pages:
            return arrival
        self._source.drop(layer)
        if self._config.device.shares_host_memory:
            self._in_flight[layer] -= sum(stored_bytes(tensor) for tensor in tensors)
        return arrival


Job = Callable[[], None]
"""Fills tensors of one stage that are allocated and installed already."""

_THREADS = 4  # most of the time goes into page faults and requests to the disk, which overlap


class BackgroundLoader:
    """The jobs of all stages, in their order, done by a few threads from `start` on.

    A failure of a job is raised by whoever waits. `finished` is called when no thread will touch a tensor any more.
    """

    def __init__(self, stages: Sequence[nn.Module], jobs: Sequence[Sequence[Job]], check: Job, finished: Job) -> None:
        """`jobs[i]` are those of `stages[i]`; `check` raises if what one has read was not right."""
        self._check, self._finished = check, finished
        self._queue: queue.SimpleQueue[tuple[int, Job]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._left = [len(of_stage) for of_stage in jobs]
        self._ready = [threading.Event() for _ in jobs]
        for stage, of_stage in enumerate(jobs):
            for job in of_stage:
                self._queue.put((stage, job))
            if not of_stage:
                self._ready[stage].set()
        self._failure: BaseException | None = None
        self._stop = False
        self.wait_s = 0.0
        """Seconds that forwards have waited for residents."""
        self._hooks = [
            module.register_forward_pre_hook(partial(self._first_forward, stage)) if jobs[stage] else None
            for stage, module in enumerate(stages)
        ]
        self._workers = [BackgroundThread(self._work, f"griffin-offload-resident-{i}") for i in range(_THREADS)]
        self._working = len(self._workers)

    def start(self) -> None:
        for worker in self._workers:
            worker.start()

    def wait(self, last: int | None = None) -> None:
        """Wait until the residents of stages up to `last` are there; of all without."""
        start = time.perf_counter()
        for stage in range(len(self._ready) if last is None else last + 1):
            self._ready[stage].wait()
            self._raise_failure()
            self._remove_hook(stage)
        if not any(self._hooks):  # all are there: no thread is left when this returns
            self._join()
        self.wait_s += time.perf_counter() - start

    @property
    def failed(self) -> bool:
        """Whether some residents will never be there: the model has to be loaded again."""
        return self._failure is not None

    def close(self) -> None:
        """End the threads, done or not."""
        self._stop = True
        self._join()
        with contextlib.suppress(queue.Empty):  # jobs that nobody will do hold the tensors of a closed model
            while True:
                self._queue.get_nowait()
        for stage, ready in enumerate(self._ready):
            if not ready.is_set():
                self._failure = self._failure or GriffinError("this model is closed")
                ready.set()
            self._remove_hook(stage)

    def _join(self) -> None:
        for worker in self._workers:
            worker.join()

    def _first_forward(self, stage: int, *_: Any) -> None:
        self.wait(stage)

    def _remove_hook(self, stage: int) -> None:
        hook, self._hooks[stage] = self._hooks[stage], None
        if hook is not None:
            hook.remove()

    def _raise_failure(self) -> None:
        if isinstance(self._failure, OSError) and not memory_refused(self._failure):
            raise GriffinError(f"the weights cannot be read: {one_line(self._failure)}") from self._failure
        if self._failure is not None:
            raise self._failure

    def _work(self) -> None:
        try:
            with contextlib.suppress(queue.Empty):
                while not self._stop:
                    self.do(*self._queue.get_nowait())
        except BaseException as error:  # raised by whoever waits
            self._failure, self._stop = error, True
            for ready in self._ready:
                ready.set()
        finally:
            with self._lock:
                self._working -= 1
                last = self._working == 0
            if last:
                self._finished()

    def do(self, stage: int, job: Job) -> None:
        job()
        self._check()
        with self._lock:
            self._left[stage] -= 1
            if self._left[stage] == 0:
                self._ready[stage].set()
