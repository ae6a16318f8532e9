"""The one thread that owns the model, the queue in front of it, and the row of jobs whose answers are decoded."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial

from griffin_offload.config import MOST_TOGETHER, ServeConfig
from griffin_offload.engine.decoding import DecodingSequence, HasToWait, NextPass
from griffin_offload.engine.scheduler import SequenceScheduler
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
from griffin_offload.serving.generation import Interrupted, JobBeside, answer_all, pass_prompts, why_not_beside
from griffin_offload.serving.metrics import Metrics
from griffin_offload.serving.model_manager import LoadedModel, ModelManager
from griffin_offload.serving.queue import Done, Event, Failed, Job

log = logging.getLogger(__name__)

_LONGEST_RETRY_S = 60


class Worker:
    """Answers jobs in the order of their arrival, as many at once as there is room for. All methods but `_work`'s may
    be called from any thread."""

    def __init__(self, manager: ModelManager, config: ServeConfig, metrics: Metrics) -> None:
        self.manager, self._config, self._metrics = manager, config, metrics
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self.stop_at: float | None = None
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
        """ApiError 429 or 503 if a job would not be taken."""
        if self._closing:
            raise shutting_down()
        if len(self._waiting) >= self._config.queue_size:
            seconds = min(max(round(self._seconds_per_job * len(self._waiting)), 1), _LONGEST_RETRY_S)
            message = f"{self.waiting} requests are waiting already: try again in {seconds} s"
            raise ApiError(429, message, code="queue_full", headers={"retry-after": str(seconds)})

    def submit(self, job: Job) -> None:
        """Put `job` in the queue; ApiError 429 or 503 if it is not taken."""
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
            self.stop_at = min(time.monotonic() + grace_s, self.stop_at or float("inf"))
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
            # Nothing of the model is held here once others are told that it is there, and may unload it.
            self._metrics.loaded(self.manager.first(), self.manager.loads)
        except BaseException as error:  # raised where the model was asked for
            self._load_error = error
            return
        finally:
            self._loaded.set()
        try:
            while self._serve_next():
                pass
        finally:
            self.close(0)  # also when a bug ended the loop: nobody shall wait for nothing
            self.manager.unload()

    def _serve_next(self) -> bool:
        """One job, with those that may be answered beside it, or one idle unload; False at the end."""
        with self._changed:
            timeout = self._config.idle_unload_s if self.manager.held is not None else None
            self._changed.wait_for(lambda: self._waiting or self._closing, timeout)
            if self._closing:
                return False
            job = self._popped() if self._waiting else None
        if job is None:
            self.manager.unload()
            self._metrics.unloaded()
            log.info("idle: the model's memory was given back")
            return True
        row = [_Asked(job)]
        self._metrics.running.set(1)
        try:
            self._serve(row)
        except BaseException:  # the thread ends with it, but not without a word
            for asked in row:
                asked.job.deliver(Failed(broken()))
            raise
        if self.manager.held is not None and self.manager.held.model.engine.broken:
            self.manager.unload()  # the next request loads it again
        return True

    def _popped(self) -> Job:
        job = self._waiting.popleft()
        self._metrics.queue_depth.set(len(self._waiting))
        return job

    def _serve(self, row: list["_Asked"]) -> None:
        """Answer the one job in `row`, and beside it those that come meanwhile, which are put there; none is left."""
        job = row[0].job
        try:
            if job.cancelled:
                self._leave(row, row[0], None)
                return
            held = self.manager.get(job.request.density)
            if self.most_together(held) > 1 and why_not_beside(held, job) is None:
                self._serve_together(held, row)
            else:
                answer_all(held, job, lambda: self._interrupted(job))
                self._leave(row, row[0], Done(job.figures))
        except Exception as error:
            for asked in list(row):
                self._leave(row, asked, self._failure(asked.job, error))

    def most_together(self, held: LoadedModel) -> int:
        """Jobs that are answered at once at most."""
        if self._config.parallel != "auto":
            return self._config.parallel
        return 1 if held.model.shares_neurons else MOST_TOGETHER

    def _serve_together(self, held: LoadedModel, row: list["_Asked"]) -> None:
        """The jobs in `row`, and from the queue as many as have room. An error that is raised concerns them all."""
        scheduler = held.model.scheduler(self.most_together(held))
        has_to_wait = False
        try:
            with scheduler.working():
                while row:
                    self._let_go(row)
                    has_to_wait = has_to_wait or self._begin(held, row, scheduler)
                    for sequence in scheduler.step():
                        has_to_wait = False
                        self._ended(row, next(asked for asked in row if asked.decodes_as(sequence)))
        finally:
            scheduler.abandon()
            for asked in row:
                asked.close()

    def _let_go(self, row: list["_Asked"]) -> None:
        """Those leave that wait for nobody."""
        for asked in [asked for asked in row if not asked.decodes and (asked.job.cancelled or self._closing)]:
            self._leave(row, asked, None if asked.job.cancelled else Failed(shutting_down()))

    def _begin(self, held: LoadedModel, row: list["_Asked"], scheduler: SequenceScheduler) -> bool:
        """Let the prompts of those that wait pass, as many as pass together; whether the next one has to wait for the
        end of others."""
        prepared, has_to_wait = [], False
        while (asked := self._next(held, row, scheduler)) is not None:
            try:
                asked.prepare(held, scheduler, partial(self._interrupted, asked.job))
            except NextPass:
                break
            except HasToWait:
                has_to_wait = True
                break
            except Exception as error:
                self._leave(row, asked, self._failure(asked.job, error))
                continue
            prepared.append(asked)
        try:
            if prepared:
                pass_prompts(held.model, scheduler, [asked.beside for asked in prepared])
        except CheckpointChanged:
            raise
        except Exception as error:
            for asked in prepared:
                self._leave(row, asked, self._failure(asked.job, error))
            return has_to_wait
        for asked in prepared:
            sequence = asked.beside.sequence
            if sequence is not None and sequence.error is not None:
                self._leave(row, asked, self._failure(asked.job, sequence.error))
        return has_to_wait

    def _next(self, held: LoadedModel, row: list["_Asked"], scheduler: SequenceScheduler) -> "_Asked | None":
        """Who begins next if there is room: the first in `row` that waits, else the next job of the queue, which goes
        there if it may be answered beside the others."""
        waiting = next((asked for asked in row if not asked.decodes), None)
        if waiting is not None:
            return waiting if scheduler.has_room else None
        if len(row) >= scheduler.most or not self._waiting or not scheduler.has_room:
            return None
        with self._changed:
            job = self._waiting[0] if self._waiting else None
            if job is None or why_not_beside(held, job) is not None or not self.manager.is_held(job.request.density):
                return None  # its turn is when these have ended
            row.append(_Asked(self._popped()))
            self._metrics.running.set(len(row))
        return row[-1]

    def _ended(self, row: list["_Asked"], asked: "_Asked") -> None:
        """A sequence has ended: deliver, and leave if it was the last one."""
        try:
            if asked.ended():
                self._leave(row, asked, Done(asked.job.figures))
        except Exception as error:
            self._leave(row, asked, self._failure(asked.job, error))

    def _leave(self, row: list["_Asked"], asked: "_Asked", outcome: Event | None) -> None:
        """A job leaves the model, whatever became of it."""
        asked.close()
        row.remove(asked)
        self._metrics.running.set(len(row))
        self._seconds_per_job += (asked.seconds / (len(row) + 1) - self._seconds_per_job) / 4
        self._metrics.finished(asked.job, self.manager.held, self.manager.loads)
        if outcome is not None:
            asked.job.deliver(outcome)

    def _interrupted(self, job: Job) -> bool:
        return job.cancelled or (self.stop_at is not None and time.monotonic() >= self.stop_at)

    def _failure(self, job: Job, error: Exception) -> Event | None:
        """What `job` is told of what ended it, None if nobody listens."""
        try:
            raise error
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


class _Asked:
    """A job that has left the queue, and its answers where they are decoded beside others'."""

    def __init__(self, job: Job) -> None:
        self.job, self._start = job, time.monotonic()
        self._beside: JobBeside | None = None

    @property
    def seconds(self) -> float:
        """Since it left the queue."""
        return time.monotonic() - self._start

    @property
    def decodes(self) -> bool:
        """Whether an answer of it is being decoded, or prepared for that."""
        return self._beside is not None and self._beside.sequence is not None

    def decodes_as(self, sequence: DecodingSequence) -> bool:
        return self._beside is not None and self._beside.sequence is sequence

    def prepare(self, held: LoadedModel, scheduler: SequenceScheduler, interrupted: Callable[[], bool]) -> None:
        """Prepare its next answer; what `JobBeside.prepare_next` raises."""
        if self._beside is None:
            self._beside = JobBeside(held, self.job, scheduler, interrupted)
        self._beside.prepare_next()

    @property
    def beside(self) -> JobBeside:
        assert self._beside is not None, "it was prepared"
        return self._beside

    def ended(self) -> bool:
        return self.beside.ended()

    def close(self) -> None:
        if self._beside is not None:
            self._beside.close()
