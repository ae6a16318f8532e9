"""Clients of a server under load: good requests of random lengths, continued ones, aborts and bad bodies."""

import json
import random
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

WORDS = "the little cat and a big dog went to the garden with mother who was happy because it had a red boat"
KINDS = {"good": 60, "continued": 15, "aborted": 13, "bad": 12}
BAD_BODIES: list[tuple[bytes, int]] = [
    (b"{", 400),
    (b"[" * 10_000, 400),
    (b'{"model": "demo", "prompt": NaN}', 400),
    (b'{"model": "demo", "prompt": "a", "temperature": -1}', 400),
    (b'{"model": "demo", "prompt": "a", "max_tokens": 1e9}', 400),
    (b'{"model": "demo", "prompt": "a", "max_tokens": 100000}', 400),
    (b'{"model": "demo", "prompt": "a", "tools": []}', 400),
    (b'{"model": "other", "prompt": "a"}', 404),
    (b'{"model": "demo", "prompt": "' + b"a cat " * 5000 + b'"}', 400),
    (b'{"model": "demo", "prompt": "' + b"a" * 3_000_000 + b'"}', 413),
]
LONGEST_S = 120


@dataclass
class Tally:
    """What became of all requests."""

    asked: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    failures: list[str] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    cached_tokens: int = 0
    prompt_tokens: int = 0
    disagreements: int = 0
    answers: dict[str, str] = field(default_factory=dict)
    """Greedy answers by body: the same question has the same answer."""
    lock: threading.Lock = field(default_factory=threading.Lock)


class Client:
    """One of them: asks until `more` says no."""

    def __init__(self, url: str, tally: Tally, seed: int) -> None:
        self._http = httpx.Client(base_url=url, timeout=LONGEST_S)
        self._tally, self._random = tally, random.Random(seed)
        self._last: tuple[str, str] | None = None

    def ask_one(self) -> None:
        kind = self._random.choices(list(KINDS), KINDS.values())[0]
        with self._tally.lock:
            self._tally.asked[kind] += 1
        try:
            getattr(self, kind)()
        except Exception as error:  # counted, not raised: the others go on
            self._fail(f"{kind}: {type(error).__name__} {str(error)[:200]}")

    def close(self) -> None:
        self._http.close()

    def _fail(self, what: str) -> None:
        with self._tally.lock:
            self._tally.failures.append(what)

    def _body(self, prompt: str) -> dict[str, Any]:
        greedy = self._random.random() < 0.5
        body = {"model": "demo", "prompt": prompt, "max_tokens": self._random.randint(1, 60)}
        return body | ({"temperature": 0} if greedy else {"temperature": 0.8, "top_p": 0.9})

    def _prompt(self) -> str:
        if self._random.random() < 0.3:  # some of a few, so that answers can be compared
            return f"Once upon a time, number {self._random.randint(1, 8)} of the animals"
        return " ".join(self._random.choices(WORDS.split(), k=self._random.randint(1, 90)))

    def good(self) -> None:
        body = self._body(self._prompt())
        text = self._answer(body)
        self._last = (body["prompt"], text)

    def continued(self) -> None:
        if self._last is None:
            self.good()
            return
        prompt = f"{self._last[0]}{self._last[1]} And then"
        self._answer(self._body(" ".join(prompt.split(" ")[-110:])))

    def _answer(self, body: dict[str, Any]) -> str:
        start = time.monotonic()
        usage: dict[str, Any]
        if self._random.random() < 0.5:
            text, usage, first_s = self._streamed(body)
            with self._tally.lock:
                self._tally.first_token_s.append(first_s)
        else:
            answer = self._http.post("/v1/completions", json=body)
            if answer.status_code != 200:
                raise RuntimeError(f"{answer.status_code} {answer.text[:200]}")
            text, usage = answer.json()["choices"][0]["text"], answer.json()["usage"]
        with self._tally.lock:
            self._count(body, text, usage, time.monotonic() - start)
        return text

    def _count(self, body: dict[str, Any], text: str, usage: dict[str, Any], seconds: float) -> None:
        tally = self._tally
        tally.seconds.append(seconds)
        tally.tokens += usage["completion_tokens"]
        tally.prompt_tokens += usage["prompt_tokens"]
        tally.cached_tokens += usage["prompt_tokens_details"]["cached_tokens"]
        if body["temperature"] == 0 and body["prompt"].startswith("Once upon a time, number"):
            # A shorter answer is the start of a longer one.
            known = tally.answers.setdefault(body["prompt"], text)
            shorter, longer = sorted((known, text), key=len)
            tally.disagreements += not longer.startswith(shorter)
            tally.answers[body["prompt"]] = longer

    def _streamed(self, body: dict[str, Any]) -> tuple[str, dict[str, Any], float]:
        body = body | {"stream": True, "stream_options": {"include_usage": True}}
        start, first_s, text, usage, done = time.monotonic(), 0.0, "", None, False
        with self._http.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                raise RuntimeError(f"{answer.status_code} {answer.read()[:200]!r}")
            for line in answer.iter_lines():
                first_s = first_s or time.monotonic() - start
                if line == "data: [DONE]":
                    done = True
                elif line:
                    chunk = json.loads(line.removeprefix("data: "))
                    text += "".join(choice["text"] for choice in chunk["choices"])
                    usage = chunk["usage"] or usage
        if not done or usage is None:
            raise RuntimeError("the stream ended early")
        return text, usage, first_s

    def aborted(self) -> None:
        """Gone before the answer, at the first token, or later."""
        body = self._body(self._prompt()) | {"stream": True, "max_tokens": 100}
        if self._random.random() < 0.3:
            try:
                self._http.post("/v1/completions", json=body, timeout=self._random.choice((0.001, 0.02, 0.1)))
            except httpx.TimeoutException:
                return
        with self._http.stream("POST", "/v1/completions", json=body) as answer:
            for _ in zip(answer.iter_lines(), range(self._random.randint(0, 20)), strict=False):
                pass

    def bad(self) -> None:
        body, status = self._random.choice(BAD_BODIES)
        answer = self._http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
        if answer.status_code != status or "message" not in answer.json()["error"]:
            self._fail(f"bad: {answer.status_code} in place of {status} for {body[:60]!r}")
