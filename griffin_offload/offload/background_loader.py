"""Residents on their way: filled in the background, stage by stage, while the first prompt already passes.

Loading reads gigabytes and the first streamed pass computes for seconds: neither has to wait for the other. A stage is
a module, a layer mostly: its first forward, whoever calls it, waits until its residents are there.
"""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from griffin_offload.devices.threads import BackgroundThread
from griffin_offload.errors import GriffinError, memory_refused, one_line

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
