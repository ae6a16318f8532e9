"""Clients of a server in threads of this process: some that wait for their answers, and some that leave."""

import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx

LONGEST_S = 300  # how busy the machine may be
BODY = {"model": "tiny", "prompt": "the cat sat on the mat", "max_tokens": 24, "temperature": 0}


def eventually(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + LONGEST_S
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


class Asking:
    """A request on a thread of its own."""

    def __init__(self, server: Any, body: dict[str, Any]) -> None:
        self.answer: httpx.Response | None = None
        self._thread = threading.Thread(target=self._ask, args=(server, body))
        self._thread.start()

    def _ask(self, server: Any, body: dict[str, Any]) -> None:
        with httpx.Client(base_url=server.url, timeout=LONGEST_S, verify=False) as client:  # no certificates to read
            self.answer = client.post("/v1/completions", json=body)

    def wait(self) -> httpx.Response:
        self._thread.join(LONGEST_S)
        assert self.answer is not None
        return self.answer


class Leaving:
    """A client that asks and does not wait for the end."""

    def __init__(self, server: Any, body: dict[str, Any]) -> None:
        address, content = httpx.URL(server.url), json.dumps(body)
        self._socket = socket.create_connection((address.host, address.port))
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {address.host}\r\nContent-Type: application/json\r\n"
        self._socket.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n{content}".encode())

    def leave(self) -> None:
        self._socket.close()
