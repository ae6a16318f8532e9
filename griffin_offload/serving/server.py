"""A running server: socket, worker and uvicorn, from start to a clean end."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from griffin_offload.config import ServeConfig
from griffin_offload.errors import UsageError
from griffin_offload.planner.plan import Plan
from griffin_offload.serving.app import App, Service
from griffin_offload.serving.auth import check_bind
from griffin_offload.serving.metrics import Metrics
from griffin_offload.serving.model_manager import ModelManager
from griffin_offload.serving.requests import caps_of
from griffin_offload.serving.tokenization import Encoder
from griffin_offload.serving.worker import Worker

# One connection of a client: what may keep it open, and what is told when there are too many.


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


log = logging.getLogger(__name__)

# What stays after a running answer was told to end: its last token or layer, and what its client still reads.
_LAST_TOKEN_S = 5.0


class Server:
    """`griffin-offload serve`, without its command line. `options` are `LoadConfig`'s."""

    def __init__(self, model: str | Path, options: Mapping[str, object], config: ServeConfig) -> None:
        check_bind(config)
        self._config = config
        self._name = config.served_name or served_name(str(model))
        self.metrics = Metrics()
        planned = dict(options) | ({} if config.parallel == "auto" else {"sequences": config.parallel})
        self.worker = Worker(ModelManager(model, planned, config.max_sessions), config, self.metrics)
        self._socket = _bound(config.host, config.port)
        self._uvicorn: _Uvicorn | None = None
        self._signal: int | None = None

    @property
    def name(self) -> str:
        """What clients call the model."""
        return self._name

    @property
    def address(self) -> tuple[Any, ...]:
        """Of the socket: host, port and, with IPv6, two numbers more."""
        found: tuple[Any, ...] = self._socket.getsockname()
        return found

    @property
    def url(self) -> str:
        host, port = self.address[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def load(self) -> Plan:
        """Load the model; any GriffinError of that. The model stays the worker's alone, which may unload it."""
        try:
            model = self.worker.start().model
            plan = model.plan
            encoder = Encoder(model.tokenizer, model.engine.shape.vocab_size)
        except BaseException:
            self.close()
            raise
        alone = model.why_alone if model.keeps_contexts else "its layers keep a state"
        if self._config.parallel not in ("auto", 1) and alone is not None:
            log.warning("requests are answered one after the other: %s", alone)
        caps = caps_of(self._config, plan.context_tokens, plan.prompt_tokens)
        service = Service(self.worker, encoder, self.metrics, self._config, caps, self._name, int(time.time()))
        self._encoder = encoder
        self._uvicorn = _Uvicorn(
            uvicorn.Config(
                App(service),
                http=Connection,
                ws="none",
                loop="asyncio",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                limit_concurrency=self._config.max_connections,
                timeout_graceful_shutdown=int(self._config.shutdown_grace_s + _LAST_TOKEN_S) + 1,
            )
        )
        return plan

    def run(self, ready: Callable[[], None] = lambda: None) -> int | None:
        """Answer until `stop`, SIGTERM or Ctrl-C, calling `ready` once connections are taken; the signal's number."""
        assert self._uvicorn is not None, "loaded before"
        self._uvicorn.ready = ready
        with self._signals():
            asyncio.run(self._uvicorn.serve([self._socket]))
        return self._signal

    def stop(self, grace_s: float | None = None) -> None:
        """End `run`: no new request is taken, the running answer has `grace_s` seconds left. From any thread."""
        self.worker.close(self._config.shutdown_grace_s if grace_s is None else grace_s)
        if self._uvicorn is not None:
            self._uvicorn.should_exit = True

    def close(self) -> bool:
        """Give everything back; False if the worker's thread does not end in time, and only the process's end helps."""
        self.worker.close(0)
        self._socket.close()
        if self._uvicorn is not None:
            self._encoder.close()
        return self.worker.join(_LAST_TOKEN_S)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT end `run`; again, and the running answer ends at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        kinds = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(kind, self._on_signal) for kind in kinds]
        try:
            yield
        finally:
            for kind, handler in zip(kinds, before, strict=True):
                signal.signal(kind, handler)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        again, self._signal = self._signal is not None, number
        # Not here: a handler may interrupt this very thread while it holds the worker's lock.
        threading.Thread(target=self.stop, args=(0.0 if again else None,), daemon=True).start()


class _Uvicorn(uvicorn.Server):
    """Leaves signals to us, and says when it listens."""

    ready: Callable[[], None] = staticmethod(lambda: None)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready()


def _bound(host: str, port: int) -> socket.socket:
    """A socket bound to an address, not listening yet; UsageError if it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        try:
            if os.name == "posix":
                found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
        except BaseException:
            found.close()
            raise
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot listen on {host} port {port}: {reason}; choose another --host or --port") from error
    return found


def served_name(model: str) -> str:
    """A name that says no path: of a directory its last part, of a hub id the model's."""
    return Path(model).resolve().name if Path(model).exists() else model.rstrip("/").rpartition("/")[2]
