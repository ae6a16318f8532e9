"""The routes: an ASGI application, and one client's request on its way through it."""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from griffin_offload.config import ServeConfig
from griffin_offload.serving.api_errors import ApiError, broken, out_of_time, slow_body, too_many_connections
from griffin_offload.serving.auth import AccessGuard
from griffin_offload.serving.messages_api import MessagesForm, chat_of_messages
from griffin_offload.serving.metrics import Metrics
from griffin_offload.serving.page import page_and_headers
from griffin_offload.serving.queue import Done, Event, Failed, Job, Progress
from griffin_offload.serving.requests import (
    ENDPOINTS,
    Caps,
    Endpoint,
    Request,
    check_served,
    output_tokens,
    parse_request,
)
from griffin_offload.serving.responses import Response, encode, server_sent
from griffin_offload.serving.responses_api import ResponsesForm, chat_of_responses
from griffin_offload.serving.tokenization import Encoder
from griffin_offload.serving.validation import parse_object
from griffin_offload.units import parse_size

# One client's request: its body as it comes in, its answer as it goes out, and the end of its patience.


# How long a client may take to read that it got no answer.
_LAST_WORDS_S = 5.0
# How long a body may take.
BODY_S = 60.0
# So much of a body that is too large is still read, for the client to see the refusal and not a broken pipe.
_DISCARDED_BODIES = 8


class Disconnected(Exception):
    """The client is gone."""


class HttpExchange:
    """`receive` and `send` of one request, each bounded by its deadline."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, timeout_s: float) -> None:
        self.scope, self._receive, self._send, self._timeout_s = scope, receive, send, timeout_s
        self._loop = asyncio.get_running_loop()
        self._began = self._loop.time()
        self._deadline = self._began + timeout_s
        self._events: asyncio.Queue[Event | Exception] = asyncio.Queue()
        self._watcher: asyncio.Task[None] | None = None
        self.started = False
        """Whether headers have been sent."""
        self.status = 0
        self.headers: dict[str, str] = {}
        """Of every response."""

    @property
    def seconds(self) -> float:
        """Since the request's first byte."""
        return self._loop.time() - self._began

    async def within_time(self, awaitable: Any) -> Any:
        """Its result; ApiError 408 at the deadline."""
        try:
            return await asyncio.wait_for(awaitable, self._deadline - self._loop.time())
        except (TimeoutError, asyncio.TimeoutError):
            raise out_of_time(self._timeout_s) from None

    async def body(self, most_bytes: int) -> bytes:
        """The body; ApiError 413 if it is larger, whatever its headers say, 408 if it takes too long."""
        patience_s = min(BODY_S, self._timeout_s)
        try:
            return await asyncio.wait_for(self._whole_body(most_bytes), patience_s)
        except (TimeoutError, asyncio.TimeoutError):
            raise slow_body(patience_s) from None

    async def _whole_body(self, most_bytes: int) -> bytes:
        found, total, more = bytearray(), 0, True
        while more and total <= most_bytes * _DISCARDED_BODIES:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise Disconnected
            piece = message.get("body", b"")
            total += len(piece)
            if total <= most_bytes:
                found += piece
            else:
                found.clear()
            more = message.get("more_body", False)
        if total > most_bytes:
            raise ApiError(413, f"the body is larger than {most_bytes} bytes", code="body_too_large")
        return bytes(found)

    def deliver(self, event: Event) -> None:
        """Pass an event on to `next`; called on any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def next(self) -> Event:
        """The next event; Disconnected if the client leaves before, ApiError 408 at the deadline."""
        if self._watcher is None:
            self._watcher = asyncio.create_task(self._watch())
        event = await self.within_time(self._events.get())
        if isinstance(event, Exception):
            raise event
        found: Event = event
        return found

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._events.put_nowait(Disconnected())

    async def close(self) -> None:
        """Stop watching the client."""
        if self._watcher is not None:
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watcher

    async def start(self, status: int, headers: dict[str, str]) -> None:
        raw = [(name.encode(), value.encode("latin-1")) for name, value in (headers | self.headers).items()]
        self.started, self.status = True, status
        await self._sent({"type": "http.response.start", "status": status, "headers": raw})

    async def write(self, body: bytes, *, more: bool) -> None:
        await self._sent({"type": "http.response.body", "body": body, "more_body": more})

    async def _sent(self, message: Any) -> None:
        """A client that does not read holds its connection until its time is over, and not longer."""
        await self.within_time(self._send(message))

    async def fail(self, failure: ApiError) -> None:
        """Say that there is no answer: as a response, or in a stream that has begun as its last event."""
        self._deadline = max(self._deadline, self._loop.time() + _LAST_WORDS_S)
        if self.started:
            await self.write(server_sent(failure.to_json()), more=False)
        else:
            await self.answer(failure.status, encode(failure.to_json()), failure.headers)

    async def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        """A whole response."""
        sizes = {"content-type": "application/json", "content-length": str(len(body))}
        await self.start(status, sizes | (headers or {}))
        await self.write(body, more=False)


log = logging.getLogger(__name__)

_MODELS = "/v1/models"
_PAGE = "/"
_READING = {"/health": "health", "/metrics": "metrics", _MODELS: "models", _PAGE: "page"}
_TOKENIZE = "/tokenize"
_COUNT = "/v1/messages/count_tokens"


@dataclass(frozen=True)
class Api:
    """A route of another interface: how its bodies become a chat's, and the form of its answers."""

    chat_of: Callable[[dict[str, Any]], dict[str, Any]]
    form: type[Response]


APIS = {
    "/v1/responses": Api(chat_of_responses, ResponsesForm),
    "/v1/messages": Api(chat_of_messages, MessagesForm),
}
_POSTED = {*ENDPOINTS, *APIS, _TOKENIZE, _COUNT}
_NOT_SERVED = {"/v1/embeddings": "this server writes text, and computes no embeddings"}
_STREAM_HEADERS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
_OUTCOMES = {408: "timeout", 429: "queue_full"}


class JobQueue(Protocol):
    """What the routes ask of the worker."""

    @property
    def waiting(self) -> int: ...
    @property
    def loaded(self) -> bool: ...
    @property
    def unusable(self) -> bool: ...
    @property
    def closing(self) -> bool: ...
    def check_room(self) -> None: ...
    def submit(self, job: Job) -> None: ...
    def cancel(self, job: Job) -> None: ...


@dataclass(frozen=True)
class Service:
    """What the routes need."""

    worker: JobQueue
    encoder: Encoder
    metrics: Metrics
    config: ServeConfig
    caps: Caps
    served: str
    """The model's name."""
    created: int


class App:
    """Every answer, and every refusal, is in OpenAI's form."""

    def __init__(self, service: Service) -> None:
        self._service, self._guard = service, AccessGuard(service.config)
        self._max_body = parse_size(service.config.max_body)
        self._page = page_and_headers() if service.config.page else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        exchange = HttpExchange(scope, receive, send, self._service.config.request_timeout_s)
        outcome = "cancelled"
        try:
            outcome = await self._outcome(exchange, Headers(scope=scope))
        finally:
            await exchange.close()
            kind = _kind(scope["path"])
            self._service.metrics.requests.labels(kind, outcome).inc()
            log.info("%s %d %s in %.2f s", kind, exchange.status, outcome, exchange.seconds)
            log.debug("%s %s", scope["method"], scope["raw_path"].decode("latin-1"))  # as sent: no line ends

    async def _outcome(self, exchange: HttpExchange, headers: Headers) -> str:
        """Answer, and say in one word what became of it."""
        try:
            try:
                await self._route(exchange, headers)
            except ApiError as failure:
                await exchange.fail(failure)
                return _OUTCOMES.get(failure.status, "refused" if failure.status < 500 else "failed")
            except Disconnected:
                raise
            except Exception as error:  # a bug of ours, told without its details
                log.critical("%s", type(error).__name__, exc_info=log.isEnabledFor(logging.DEBUG))
                await exchange.fail(broken())
                return "failed"
            return "ok"
        except (Disconnected, ApiError, OSError):  # gone, or never read what it was told
            return "disconnected"

    async def _route(self, exchange: HttpExchange, headers: Headers) -> None:
        method, path = exchange.scope["method"], exchange.scope["path"]
        if exchange.scope["state"]["crowded"]:
            raise too_many_connections()
        self._guard.check(method, path, headers)
        exchange.headers = self._guard.cors_headers(headers)
        if path in _NOT_SERVED:
            raise ApiError(404, f"{path} is not served: {_NOT_SERVED[path]}", code="not_found")
        nothing = path not in _POSTED and path not in _READING and not path.startswith(f"{_MODELS}/")
        if nothing or (path == _PAGE and self._page is None):
            raise ApiError(404, "there is nothing at this path", code="not_found")
        if self._guard.is_preflight(method, headers):
            exchange.headers = self._guard.preflight_headers(headers)
            await exchange.answer(204, b"")
            return
        allowed = ("POST",) if path in _POSTED else ("GET", "HEAD")
        if method not in allowed:
            allow = {"allow": ", ".join(allowed)}
            raise ApiError(405, f"{method[:20]} is not answered here: use {allowed[0]}", code="method", headers=allow)
        if path in (_TOKENIZE, _COUNT):
            await self._tokenize(exchange, headers, path)
        elif path in _POSTED:
            await self._ask(exchange, headers, path)
        else:
            await self._read(exchange, path)

    async def _read(self, exchange: HttpExchange, path: str) -> None:
        service = self._service
        if path == "/metrics":
            await exchange.answer(200, service.metrics.text(), {"content-type": CONTENT_TYPE_LATEST})
        elif path == _PAGE:
            assert self._page is not None, "the path is answered"
            await exchange.answer(200, *self._page)
        elif path == "/health":
            worker = service.worker
            status = "closing" if worker.closing else "model_unavailable" if worker.unusable else "ok"
            state = {"status": status, "loaded": worker.loaded, "waiting": worker.waiting}
            await exchange.answer(200 if status == "ok" else 503, encode(state))
        else:
            model = {"id": service.served, "object": "model", "created": service.created, "owned_by": "griffin-offload"}
            if path != _MODELS:
                check_served(path.removeprefix(f"{_MODELS}/"), service.served)
                await exchange.answer(200, encode(model | {"griffin": self._figures()}))
            else:
                await exchange.answer(200, encode({"object": "list", "data": [model]}))

    def _figures(self) -> dict[str, Any]:
        """What is known of the model at this moment."""
        service, caps = self._service, self._service.caps
        most = {"prompt_tokens": caps.prompt, "output_tokens": caps.output, "context_tokens": caps.context}
        state = {"loaded": service.worker.loaded, "waiting": service.worker.waiting}
        return state | {"limits": most, **service.metrics.model}

    async def _tokenize(self, exchange: HttpExchange, headers: Headers, path: str) -> None:
        """The prompt that a body makes, as token ids: vLLM's and llama-server's route; Anthropic's has their count."""
        service = self._service
        body = await exchange.body(self._max_body)
        _check_content(headers)
        values = {"model": service.served, **parse_object(body)}
        if path == _COUNT:
            values = chat_of_messages({"max_tokens": 1, **values})
        endpoint: Endpoint = "chat" if "messages" in values else "completions"
        request = parse_request(endpoint, values, service.served, service.config)
        prompts = await exchange.within_time(service.encoder.encode(request))
        if len(prompts) != 1:
            raise ApiError(400, f"prompt holds {len(prompts)}: one at a time", param="prompt", code="invalid_value")
        tokens = prompts[0]
        whole = {"tokens": tokens, "count": len(tokens), "max_model_len": service.caps.context}
        await exchange.answer(200, encode({"input_tokens": len(tokens)} if path == _COUNT else whole))

    async def _ask(self, exchange: HttpExchange, headers: Headers, path: str) -> None:
        service = self._service
        body = await exchange.body(self._max_body)
        _check_content(headers)
        values, api = parse_object(body), APIS.get(path)
        if api is not None:
            values = api.chat_of(values)
        request = parse_request(ENDPOINTS.get(path, "chat"), values, service.served, service.config)
        service.worker.check_room()
        prompts = await exchange.within_time(service.encoder.encode(request))
        max_tokens = [output_tokens(request, prompt, service.caps) for prompt in prompts]
        job = Job(request, prompts, max_tokens, exchange.deliver)
        form = Response if api is None else api.form
        response = form(request, service.served, len(prompts) * request.n)
        service.worker.submit(job)
        try:
            await (_stream if request.stream else _whole)(exchange, request, response)
        finally:
            service.worker.cancel(job)


async def _whole(exchange: HttpExchange, _: Request, response: Response) -> None:
    while True:
        event = await exchange.next()
        if isinstance(event, Failed):
            raise event.failure
        if isinstance(event, Done):
            await exchange.answer(200, encode(response.whole(event.figures)))
            return
        response.take(event)


async def _stream(exchange: HttpExchange, request: Request, response: Response) -> None:
    """Headers go out with the first token: what is refused before it still has a status of its own."""
    while True:
        event = await exchange.next()
        if isinstance(event, Failed):
            raise event.failure
        if not exchange.started:
            await exchange.start(200, _STREAM_HEADERS)
            await exchange.write(response.sent_opening(), more=True)
        if isinstance(event, Done):
            await exchange.write(response.sent_end(event.figures), more=False)
            return
        found = response.sent_progress(event) if isinstance(event, Progress) else response.sent(event)
        if found:
            await exchange.write(found, more=True)


def _check_content(headers: Headers) -> None:
    """ApiError 415 unless the body is said to be plain JSON: what else a page can send, no browser asks us about."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "the body has to be sent as Content-Type: application/json", code="content_type")
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "compressed bodies are not read", code="content_encoding")


def _kind(path: str) -> str:
    """A name for figures and logs, from a fixed list: paths are the client's words."""
    return (
        ENDPOINTS.get(path)
        or (path.rpartition("/")[2] if path in _POSTED else "")
        or _READING.get(path)
        or ("models" if path.startswith(f"{_MODELS}/") else "other")
    )
