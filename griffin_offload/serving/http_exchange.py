"""One client's request: its body as it comes in, its answer as it goes out, and the end of its patience."""

import asyncio
import contextlib
from typing import Any

from starlette.types import Receive, Scope, Send

from griffin_offload.serving.api_errors import ApiError, out_of_time, slow_body
from griffin_offload.serving.queue import Event
from griffin_offload.serving.responses import encode, server_sent

# How long a client may take to read that it got no answer.
_LAST_WORDS_S = 5.0
# How long a body may take.
_BODY_S = 60.0
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
        """Its result; Failure 408 at the deadline."""
        try:
            return await asyncio.wait_for(awaitable, self._deadline - self._loop.time())
        except (TimeoutError, asyncio.TimeoutError):
            raise out_of_time(self._timeout_s) from None

    async def body(self, most_bytes: int) -> bytes:
        """The body; Failure 413 if it is larger, whatever its headers say, 408 if it takes too long."""
        patience_s = min(_BODY_S, self._timeout_s)
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
        """The next event; Disconnected if the client leaves before, Failure 408 at the deadline."""
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
