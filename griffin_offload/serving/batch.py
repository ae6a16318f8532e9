"""OpenAI's batch files: requests as lines of one file, answers as lines of another.

Every line that gets an answer, or a refusal that would come again, is written at once; the same command goes on behind
the lines that are there. Requests are asked in the order of their tokens, so that prompts with a common beginning
follow each other and reuse it.
"""

import contextlib
import itertools
import json
import math
import os
import queue
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from griffin_offload.checkpoint.files import one_writer
from griffin_offload.config import ServeConfig
from griffin_offload.errors import GriffinError, UsageError, unwritable
from griffin_offload.evaluation.samples import json_lines
from griffin_offload.serving.api_errors import ApiError
from griffin_offload.serving.metrics import Metrics
from griffin_offload.serving.model_manager import ModelManager
from griffin_offload.serving.queue import Done, Event, Failed, Figures, Job
from griffin_offload.serving.requests import ENDPOINTS, Endpoint, Request, caps_of, output_tokens, parse_request
from griffin_offload.serving.responses import Response
from griffin_offload.serving.tokenization import Encoder
from griffin_offload.serving.worker import Worker
from griffin_offload.transformers_api import Tokenizer

_MOST_ID_LETTERS = 1000
# Of the moment, not of the request: asked again, it may be answered. Where the model is gone, no other request is, too.
_TRANSIENT = 503
_GONE = ("model_unavailable", "shutting_down")
_LAST_TOKEN_S = 5.0


@dataclass(frozen=True)
class Line:
    """One request of the file; its body is not checked yet."""

    custom_id: str
    endpoint: Endpoint
    body: dict[str, Any]


def read_lines(path: Path) -> list[Line]:
    """All requests of a batch file. UsageError, with the line, for a file that is none."""
    lines: dict[str, Line] = {}
    for number, found in enumerate(json_lines(path), start=1):
        try:
            line = _line(found)
        except ValueError as error:
            raise UsageError(f"{path}, request {number} {error}") from None
        if line.custom_id in lines:
            raise UsageError(f"{path}, request {number} has the custom_id {line.custom_id!r} of an earlier one")
        lines[line.custom_id] = line
    if not lines:
        raise UsageError(f"{path} holds no request")
    return list(lines.values())


def _line(found: object) -> Line:
    """The request; ValueError says what it lacks."""
    if not isinstance(found, dict):
        raise ValueError("is no object")
    custom_id, method, url, body = (found.get(name) for name in ("custom_id", "method", "url", "body"))
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= _MOST_ID_LETTERS:
        raise ValueError(f"needs a custom_id, a string of 1 to {_MOST_ID_LETTERS} letters")
    if method != "POST":
        raise ValueError(f"has the method {method!r}: POST is answered")
    if not isinstance(url, str) or url not in ENDPOINTS:
        raise ValueError(f"asks for {url!r}: {' and '.join(ENDPOINTS)} are answered")
    if not isinstance(body, dict):
        raise ValueError("needs a body, an object")
    return Line(custom_id, ENDPOINTS[url], body)


def check_model(lines: Sequence[Line], served: str) -> None:
    """UsageError if no request names the model that would answer: all would be refused, and those refusals kept as
    their answers. Where some do, the others are refused each by itself, as every request with a mistake is."""
    if any(line.body.get("model") == served for line in lines):
        return
    asked = lines[0].body.get("model")
    remedy = "give its name by --served-name" if isinstance(asked, str) else "name it in the body"
    raise UsageError(
        f"none of {len(lines)} requests asks for the model {served!r}, the first, {lines[0].custom_id!r}, asks for "
        f"{asked!r}: {remedy}"
    )


class Answers(ABC):
    """Where answers go."""

    @abstractmethod
    def add(self, custom_id: str, status: int, body: dict[str, object]) -> None:
        """Keep one more."""

    def refuse(self, line: Line, failure: ApiError) -> None:
        """Keep that there is no answer, unless another moment may bring one."""
        if failure.status != _TRANSIENT:
            self.add(line.custom_id, failure.status, failure.to_json())


class AnswerFile(Answers):
    """The lines that are answered: a context manager that keeps other writers out."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answered: set[str] = set()
        """Their custom_ids."""
        self.failed = 0
        """Refusals among them."""
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "AnswerFile":
        with contextlib.ExitStack() as stack:
            try:
                self._file = stack.enter_context(self.path.open("a+b"))
                stack.enter_context(one_writer(self.path, "batch"))
                self._read()
            except OSError as error:
                raise UsageError(unwritable(self.path, error)) from error
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # of a line that could not be written, which `add` has said
            self._stack.close()

    def _read(self) -> None:
        """Know what is answered, and cut off a line that was not finished."""
        self._file.seek(0)
        whole = 0
        for number, raw in enumerate(self._file, start=1):
            if not raw.endswith(b"\n"):
                break
            try:
                found = json.loads(raw)
                custom_id, status = found["custom_id"], int(found["response"]["status_code"])
            except (ValueError, TypeError, KeyError):
                raise UsageError(f"{self.path}, line {number} is no answer of a batch: give another OUTPUT") from None
            self.answered.add(custom_id)
            self.failed += status >= 400
            whole += len(raw)
        self._file.truncate(whole)

    def add(self, custom_id: str, status: int, body: dict[str, object]) -> None:
        """Write one more. GriffinError where it cannot be written."""
        response = {"status_code": status, "request_id": f"req_{secrets.token_hex(12)}", "body": body}
        line = {"id": f"batch_req_{secrets.token_hex(12)}", "custom_id": custom_id, "response": response, "error": None}
        try:
            self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise GriffinError(
                f"{unwritable(self.path, error)}; what is there is kept, run the same command again"
            ) from error
        self.answered.add(custom_id)
        self.failed += status >= 400


@dataclass(frozen=True)
class Work:
    """A request that passed every check, and its prompts' tokens."""

    line: Line
    request: Request
    prompts: list[list[int]]


def prepare(
    lines: Sequence[Line], encoder: Encoder, served: str, config: ServeConfig
) -> tuple[list[Work], list[tuple[Line, ApiError]]]:
    """Those that can be asked, in the order of their tokens, and those that are refused."""
    works, refused = [], []
    for line in lines:
        try:
            request = parse_request(line.endpoint, line.body, served, config)
            if request.stream:
                raise ApiError(400, "a batch does not stream: leave stream out", param="stream", code="invalid_value")
            works.append(Work(line, request, encoder.prompts_of(request)))
        except ApiError as failure:
            refused.append((line, failure))
    works.sort(key=lambda work: work.prompts)
    return works, refused


def longest(works: Sequence[Work]) -> tuple[int, int | None]:
    """Tokens of the longest prompt, and of the longest context that is asked for; None where an answer has no limit."""
    prompt = max(len(ids) for work in works for ids in work.prompts)
    limits = [work.request.max_tokens for work in works]
    if None in limits:
        return prompt, None
    return prompt, max(len(ids) + (work.request.max_tokens or 0) for work in works for ids in work.prompts)


def in_turns(works: Sequence[Work], together: int) -> list[Work]:
    """Works in the order of their tokens, so that of `together` that are asked at once each goes on from what the one
    before in its own part left: the same beginning, asked by two at once, is computed twice."""
    each = max(1, math.ceil(len(works) / together))
    return [work for first in range(each) for work in works[first::each]]


Progress = Callable[[Figures], None]
"""Called with what a request took after each that was answered."""


class Batch:
    """A loaded model, and a worker that asks it: a context manager that gives it back. `tokenizer` is the model's where
    somebody has loaded it."""

    def __init__(
        self,
        directory: Path,
        options: Mapping[str, object],
        served: str,
        config: ServeConfig,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self._served, self._most_waiting = served, config.queue_size
        manager = ModelManager(directory, options, config.max_sessions, tokenizer)
        self._worker = Worker(manager, config, Metrics())
        self._events: _Events = queue.SimpleQueue()
        try:
            held = self._worker.start()
        except BaseException:
            self._close()
            raise
        plan = held.model.plan
        self._together = self._worker.most_together(held)
        self._caps = caps_of(config, plan.context_tokens, plan.prompt_tokens)

    def __enter__(self) -> "Batch":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        self._worker.close(0)
        self._worker.join(_LAST_TOKEN_S)

    def run(self, works: Sequence[Work], answers: Answers, progress: Progress) -> None:
        """Ask for all of `works`; each is kept when it is answered. GriffinError where the model is gone."""
        asked: list[_Asked] = []
        waiting = self._asked(in_turns(works, self._together), answers)
        try:
            while True:
                asked += itertools.islice(waiting, self._most_waiting - len(asked))
                if not asked:
                    return
                one, event = self._events.get()
                if self._take(one, event, answers, progress):
                    asked.remove(one)
        finally:
            for one in asked:
                self._worker.cancel(one.job)

    def _asked(self, works: Sequence[Work], answers: Answers) -> Iterator["_Asked"]:
        """Submit one after the other, as they are taken from here."""
        for work in works:
            try:
                most = [output_tokens(work.request, prompt, self._caps) for prompt in work.prompts]
            except ApiError as failure:
                answers.refuse(work.line, failure)
                continue
            one = _Asked(work, self._served, most, self._events)
            self._worker.submit(one.job)
            yield one

    def _take(self, one: "_Asked", event: Event, answers: Answers, progress: Progress) -> bool:
        """Whether this was the last of the request."""
        if isinstance(event, Failed):
            if event.failure.code in _GONE:
                raise GriffinError(f"{event.failure.message}; what is answered is kept, run the same command again")
            answers.refuse(one.work.line, event.failure)
            return True
        if isinstance(event, Done):
            answers.add(one.work.line.custom_id, 200, one.response.whole(event.figures))
            progress(event.figures)
            return True
        one.response.take(event)
        return False


class _Asked:
    """A request on its way, and what has come of it."""

    def __init__(self, work: Work, served: str, most: list[int], events: "_Events") -> None:
        self.work, self.response = work, Response(work.request, served, len(work.prompts) * work.request.n)
        self.job = Job(work.request, work.prompts, most, lambda event: events.put((self, event)))


_Events = queue.SimpleQueue[tuple[_Asked, Event]]
