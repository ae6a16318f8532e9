"""Residents on their way: filled in the background, layer by layer, while the first prompt already passes.

Loading reads gigabytes and the first streamed pass computes for seconds: neither has to wait for the other. A layer's
first forward, whoever calls it, waits until that layer's residents are there.
"""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from griffin_offload.errors import GriffinError, memory_refused, one_line
from griffin_offload.runtime.threads import Worker

Job = Callable[[], None]
"""Fills tensors of one layer that are allocated and installed already."""

_THREADS = 4  # most of the time goes into page faults and requests to the disk, which overlap


class Arrival:
    """The jobs of all layers, in their order, done by a few threads from `start` on.

    A failure of a job is raised by whoever waits. `finished` is called when no thread will touch a tensor any more.
    """

    def __init__(self, decoder: nn.ModuleList, jobs: Sequence[Sequence[Job]], check: Job, finished: Job) -> None:
        """`jobs[i]` are those of `decoder[i]`; `check` raises if what one has read was not right."""
        self._check, self._finished = check, finished
        self._queue: queue.SimpleQueue[tuple[int, Job]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._left = [len(of_layer) for of_layer in jobs]
        self._ready = [threading.Event() for _ in jobs]
        for layer, of_layer in enumerate(jobs):
            for job in of_layer:
                self._queue.put((layer, job))
            if not of_layer:
                self._ready[layer].set()
        self._failure: BaseException | None = None
        self._stop = False
        self.wait_s = 0.0
        """Seconds that forwards have waited for residents."""
        self._hooks = [
            layer.register_forward_pre_hook(partial(self._first_forward, index)) if jobs[index] else None
            for index, layer in enumerate(decoder)
        ]
        self._workers = [Worker(self._work, f"griffin-offload-resident-{i}") for i in range(_THREADS)]
        self._working = len(self._workers)

    def start(self) -> None:
        for worker in self._workers:
            worker.start()

    def wait(self, last: int | None = None) -> None:
        """Wait until the residents of layers up to `last` are there; of all layers without."""
        start = time.perf_counter()
        for layer in range(len(self._ready) if last is None else last + 1):
            self._ready[layer].wait()
            self._raise_failure()
            self._remove_hook(layer)
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
        for layer, ready in enumerate(self._ready):
            if not ready.is_set():
                self._failure = self._failure or GriffinError("this model is closed")
                ready.set()
            self._remove_hook(layer)

    def _join(self) -> None:
        for worker in self._workers:
            worker.join()

    def _first_forward(self, index: int, *_: Any) -> None:
        self.wait(index)

    def _remove_hook(self, layer: int) -> None:
        hook, self._hooks[layer] = self._hooks[layer], None
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
                    self._do(*self._queue.get_nowait())
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

    def _do(self, layer: int, job: Job) -> None:
        job()
        self._check()
        with self._lock:
            self._left[layer] -= 1
            if self._left[layer] == 0:
                self._ready[layer].set()
