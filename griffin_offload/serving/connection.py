"""One connection of a client: what may keep it open, and what is told when there are too many."""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

# A client may send so long what gets no answer: half a head, or the rest of a body that was refused.
UNANSWERED_S = 10.0
# Beyond so many times the limit of connections they are closed without a word.
_MUST_CLOSE = 2


class Connection(H11Protocol):
    """uvicorn's, which waits for ever for the end of a head, and says in words of its own that it is full."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.limit_concurrency = None  # not uvicorn's way: the app refuses, in OpenAI's form
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        limit = self.config.limit_concurrency
        assert limit is not None, "given by the server"
        if len(self.connections) > _MUST_CLOSE * limit:
            transport.abort()
        self.app_state = {**self.app_state, "crowded": len(self.connections) > limit}
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_timer()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """The time runs while no answer is owed, however often a byte comes; silence after an answer is uvicorn's."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._forget_timer()
        elif self._timer is None:
            self._timer = self.loop.call_later(UNANSWERED_S, self.transport.abort)

    def _forget_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
