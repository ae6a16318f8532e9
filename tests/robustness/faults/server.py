"""A server whose model's files are harmed, and one that is killed."""

import contextlib
import http.client
import json
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from processes import TIMEOUT_S, Process
from robustness.faults.world import HARMS, SHARD, World, nothing

PROMPTS = ("One day, a dog", "Once there was a big red bird", "The cat and the mouse were friends", "Sue had a box")
_TOKENS = 12


class Server:
    """One on a free port, and questions to it."""

    def __init__(self, model: Path, place: Path, prepare: Callable[[], None] = nothing) -> None:
        flags = ["--port", "0", "--json", "-q", "--served-name", "demo", "--device", "cpu", "--max-mem", "20MB"]
        self.process = Process(["serve", *flags, "--density", 0.5, "-m", model], place, prepare=prepare)
        if not self.process.wait_until(lambda: "\n" in self.process.printed):
            raise SystemExit(f"the server did not start: {self.process.outcome(1)}")
        self._address = urlsplit(json.loads(self.process.printed)["url"]).netloc

    def begin(self, prompt: str, *, stream: bool = False, tokens: int = _TOKENS) -> http.client.HTTPConnection:
        """Ask, and do not wait."""
        body = {"model": "demo", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": stream}
        connection = http.client.HTTPConnection(self._address, timeout=TIMEOUT_S)
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        return connection

    def ask(self, prompt: str) -> tuple[int, str]:
        """(status, text)."""
        return read(self.begin(prompt))

    def health(self) -> int:
        connection = http.client.HTTPConnection(self._address, timeout=TIMEOUT_S)
        connection.request("GET", "/health")
        with contextlib.closing(connection):
            return connection.getresponse().status

    def stop(self) -> str | None:
        """What is wrong with its end."""
        self.process.signal(signal.SIGTERM)
        found = self.process.outcome()
        if found.code != 0:
            return f"exit code {found.code} after SIGTERM: {found.err[-500:]}"
        return f"a traceback: {found.err[-2000:]}" if "Traceback" in found.err else None


def read(connection: http.client.HTTPConnection) -> tuple[int, str]:
    with contextlib.closing(connection):
        response = connection.getresponse()
        found: dict[str, Any] = json.loads(response.read())
    if response.status != 200:
        return response.status, str(found["error"]["message"])
    return 200, str(found["choices"][0]["text"])


def read_stream(connection: http.client.HTTPConnection) -> str:
    """The text as far as it came."""
    text = ""
    with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
        for line in connection.getresponse():
            if line.startswith(b"data: {"):
                text += "".join(choice["text"] for choice in json.loads(line[6:])["choices"])
    return text


def served(world: World, place: Path) -> dict[str, list[str]]:
    """What an undisturbed server answers to `prompts`, old and new version of the model; asked once."""
    if "old" not in world.served:
        for version in ("old", "new"):
            server = Server(world.pristine("stock", version), place)
            world.served[version] = [server.ask(prompt)[1] for prompt in PROMPTS]
            server.stop()
    return world.served


def harmed_server(name: str) -> Callable[[World, random.Random, Path], tuple[str, str | None]]:
    """A shard is harmed while the server is idle or answers: it answers rightly or says 503, and when the file is
    whole again it answers as before."""

    def case(world: World, rng: random.Random, place: Path) -> tuple[str, str | None]:
        right = served(world, place)
        model = world.copy("stock", place)
        server = Server(model, place)
        problems = list(_questions(server, model, right, world, rng, name))
        statuses = "/".join(str(status) for status, _ in problems)
        problem = next((text for _, text in problems if text is not None), None)
        return f"answers {statuses}", problem or server.stop()

    return case


def _questions(
    server: Server, model: Path, right: dict[str, list[str]], world: World, rng: random.Random, name: str
) -> Iterator[tuple[int, str | None]]:
    """Status and problem of each answer."""

    def judged(answer: tuple[int, str], number: int, versions: tuple[str, ...], statuses: tuple[int, ...]) -> Any:
        status, text = answer
        if status not in statuses:
            return status, f"status {status}: {text}"
        wrong = status == 200 and text not in [right[version][number] for version in versions]
        return status, f"another answer: {text!r}" if wrong else None

    yield judged(server.ask(PROMPTS[0]), 0, ("old",), (200,))
    connection = server.begin(PROMPTS[1])
    server.process.sleep(rng.uniform(0, 0.2))
    HARMS[name](model / SHARD, world.pristine("stock", "new") / SHARD, rng)
    yield judged(read(connection), 1, ("old", "new"), (200, 503))
    for number in (2, 3):
        yield judged(server.ask(PROMPTS[number]), number, ("old", "new"), (200, 503))
    HARMS["replace"](model / SHARD, world.pristine("stock") / SHARD, rng)
    first = judged(server.ask(PROMPTS[0]), 0, ("old", "new"), (200, 503))  # may be the first that notices
    yield first
    yield judged(server.ask(PROMPTS[1]), 1, ("old",), (200,))
    if server.health() != 200:
        yield 503, "the server is unhealthy after the repair"
