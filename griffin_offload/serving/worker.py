"""The one thread that owns the model, and the queue in front of it."""

import logging
import threading
import time
from collections import deque

from griffin_offload.config import ServeConfig
from griffin_offload.errors import (
    CheckpointChanged,
    DoesNotFit,
    GriffinError,
    LimitReached,
    NotFinite,
    OutOfMemory,
    UsageError,
    memory_refused,
)
from griffin_offload.serving.api_errors import (
    ApiError,
    broken,
    changed,
    invalid,
    limit,
    not_finite,
    out_of_memory,
    shutting_down,
)
from griffin_offload.serving.generation import Interrupted, answer_all
from griffin_offload.serving.metrics import Metrics
from griffin_offload.serving.model_manager import LoadedModel, ModelManager
from griffin_offload.serving.queue import Done, Event, Failed, Job

log = logging.getLogger(__name__)

_LONGEST_RETRY_S = 60


class Worker:
    """Answers jobs in the order of their arrival. All methods but `_work`'s may be called from any thread."""

    def __init__(self, manager: ModelManager, config: ServeConfig, metrics: Metrics) -> None:
        self.manager, self._config, self._metrics = manager, config, metrics
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._stop_at: float | None = None
        self._seconds_per_job = 1.0
        self._loaded = threading.Event()
        self._load_error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="griffin-offload-worker", daemon=True)

    def start(self) -> LoadedModel:
        """Load the model; raises what loading raises."""
        self._thread.start()
        self._loaded.wait()
        if self._load_error is not None:
            raise self._load_error
        assert self.manager.held is not None, "loaded"
        return self.manager.held

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def loaded(self) -> bool:
        return self.manager.held is not None

    @property
    def unusable(self) -> bool:
        """Whether the model could not be loaded when it was needed last."""
        return self.manager.unusable

    @property
    def closing(self) -> bool:
        return self._closing

    def check_room(self) -> None:
        """Failure 429 or 503 if a job would not be taken."""
        if self._closing:
            raise shutting_down()
        if len(self._waiting) >= self._config.queue_size:
            seconds = min(max(round(self._seconds_per_job * len(self._waiting)), 1), _LONGEST_RETRY_S)
            message = f"{self.waiting} requests are waiting already: try again in {seconds} s"
            raise ApiError(429, message, code="queue_full", headers={"retry-after": str(seconds)})

    def submit(self, job: Job) -> None:
        """Put `job` in the queue; Failure 429 or 503 if it is not taken."""
        with self._changed:
            self.check_room()
            self._waiting.append(job)
            self._metrics.queue_depth.set(len(self._waiting))
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Nobody waits for `job` any more: it leaves the queue, or ends with its next token."""
        job.cancelled = True
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
                self._metrics.queue_depth.set(len(self._waiting))

    def close(self, grace_s: float) -> None:
        """Take no job any more, refuse those that wait, and end the running one after `grace_s` seconds."""
        with self._changed:
            self._closing = True
            self._stop_at = min(time.monotonic() + grace_s, self._stop_at or float("inf"))
            refused = list(self._waiting)
            self._waiting.clear()
            self._metrics.queue_depth.set(0)
            self._changed.notify()
        for job in refused:
            job.deliver(Failed(shutting_down()))

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread's end after `close`; whether it came."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        try:
            held = self.manager.first()
        except BaseException as error:  # raised where the model was asked for
            self._load_error = error
            return
        finally:
            self._loaded.set()
        self._metrics.loaded(held, self.manager.loads)
        del held
        try:
            while self._serve_next():
                pass
        finally:
            self.close(0)  # also when a bug ended the loop: nobody shall wait for nothing
            self.manager.unload()

    def _serve_next(self) -> bool:
        """One job, or one idle unload; False at the end."""
        with self._changed:
            timeout = self._config.idle_unload_s if self.manager.held is not None else None
            self._changed.wait_for(lambda: self._waiting or self._closing, timeout)
            if self._closing:
                return False
            job = self._waiting.popleft() if self._waiting else None
            self._metrics.queue_depth.set(len(self._waiting))
        if job is None:
            self.manager.unload()
            self._metrics.unloaded()
            log.info("idle: the model's memory was given back")
            return True
        start = time.monotonic()
        try:
            outcome = self._outcome(job)
        except BaseException:  # the thread ends with it, but not without a word
            job.deliver(Failed(broken()))
            raise
        if self.manager.held is not None and self.manager.held.model.engine.broken:
            self.manager.unload()  # the next request loads it again
        self._seconds_per_job += (time.monotonic() - start - self._seconds_per_job) / 4
        self._metrics.finished(job, self.manager.held, self.manager.loads)
        if outcome is not None:
            job.deliver(outcome)
        return True

    def _interrupted(self, job: Job) -> bool:
        return job.cancelled or (self._stop_at is not None and time.monotonic() >= self._stop_at)

    def _outcome(self, job: Job) -> Event | None:
        """Answer `job`; what it is told in the end, None if nobody listens."""
        if job.cancelled:
            return None
        try:
            answer_all(self.manager.get(job.request.density), job, lambda: self._interrupted(job))
        except Interrupted:
            return None if job.cancelled else Failed(shutting_down())
        except ApiError as failure:
            log.debug("refused", exc_info=True)
            return Failed(failure)
        except UsageError as error:
            return Failed(invalid(str(error)))
        except CheckpointChanged:
            log.error("a file of the model was changed: the next request loads it again")
            log.debug("what changed", exc_info=True)
            self.manager.unload()  # the next request loads what is there now, or is told that it cannot be used
            return Failed(changed())
        except OutOfMemory as error:
            log.error("%s", error)
            return Failed(out_of_memory())
        except DoesNotFit as error:
            return Failed(ApiError(400, str(error), code="does_not_fit"))
        except NotFinite as error:
            log.error("%s", error)
            return Failed(not_finite(str(error)))
        except LimitReached as error:
            log.error("%s", error)
            return Failed(limit(str(error)))
        except Exception as error:  # whatever it is, the next request gets its answer
            if memory_refused(error):
                log.error("out of memory: %s", type(error).__name__)
                return Failed(out_of_memory())
            level = logging.ERROR if isinstance(error, GriffinError) else logging.CRITICAL
            log.log(level, "a request failed: %s", type(error).__name__, exc_info=log.isEnabledFor(logging.DEBUG))
            return Failed(broken())
        return Done(job.figures)
