"""Connections: how many, how slow, and answers that come although nobody reads the body."""

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from griffin_offload.serving import app, server

BODY = {"model": "tiny", "prompt": "the cat", "max_tokens": 4, "temperature": 0}
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
KEY = "sk-a-secret"


@contextlib.contextmanager
def raw(running: Any) -> Iterator[socket.socket]:
    with socket.create_connection(running.server.address) as found:
        found.settimeout(30)
        yield found


def until_closed(found: socket.socket, drip: bytes = b"") -> bytes:
    """What comes until the server closes, while `drip` is sent byte by byte."""
    received, end = b"", time.monotonic() + 30
    found.settimeout(0.05)
    while time.monotonic() < end:
        try:
            piece = found.recv(10_000)
            if not piece:
                return received
            received += piece
        except TimeoutError:
            with contextlib.suppress(OSError):
                found.sendall(drip)
        except OSError:
            return received
    pytest.fail("it stayed open")


@pytest.mark.parametrize("limit", [1, 3])
def test_so_many_connections_are_answered_and_the_next_is_told(chatty, serve_one, limit: int):
    with serve_one(chatty, max_connections=limit) as one, contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(httpx.Client(base_url=one.url, timeout=300, verify=False)) for _ in range(limit + 1)
        ]
        answers = [client.get("/health") for client in clients]
        assert [answer.status_code for answer in answers] == [200] * limit + [503]
        assert answers[-1].json()["error"]["code"] == "too_many_connections"
        assert (answers[-1].headers["retry-after"], answers[-1].headers["connection"]) == ("1", "close")
        clients[0].close()
        # A client that tries again as it is told gets its answer.
        with openai.OpenAI(base_url=f"{one.url}/v1", api_key="unused", max_retries=5) as again:
            assert again.completions.create(**BODY).choices[0].text


def test_far_too_many_connections_are_closed(chatty, serve_one):
    with serve_one(chatty, max_connections=1) as one, contextlib.ExitStack() as stack:
        found = [stack.enter_context(raw(one)) for _ in range(3)]
        assert until_closed(found[2]) == b""
        found[0].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert found[0].recv(1000).startswith(b"HTTP/1.1 200")


def test_a_head_that_never_ends_is_given_up(chatty, serve_one, monkeypatch: pytest.MonkeyPatch):
    """Also when it grows all the time, and behind a request that was answered."""
    monkeypatch.setattr(server, "UNANSWERED_S", 0.3)
    with serve_one(chatty) as one:
        with raw(one) as silent:
            assert until_closed(silent) == b""
        with raw(one) as slow:
            slow.sendall(b"GET /health HTTP/1.1\r\nX-A: ")
            assert until_closed(slow, b"a") == b""
        with raw(one) as second:
            second.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = b""
            while not answer.endswith(b"}"):
                answer += second.recv(1000)
            assert answer.startswith(b"HTTP/1.1 200")
            second.sendall(b"GET /health HTTP/1.1\r\nX-A: ")
            assert until_closed(second, b"a") == b""


def test_a_long_answer_is_not_cut_off(chatty, serve_one, gate, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(server, "UNANSWERED_S", 0.1)
    with serve_one(chatty) as one, one.http.stream("POST", "/v1/completions", json=BODY | {"stream": True}) as answer:
        gate.release(1)
        lines = answer.iter_lines()
        next(lines)
        time.sleep(0.4)
        gate.release(100)
        assert list(lines)[-2:] == ["data: [DONE]", ""]


def test_a_body_that_drips_is_given_up_and_so_is_its_connection(chatty, serve_one, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(server, "UNANSWERED_S", 0.3)
    monkeypatch.setattr(app, "BODY_S", 0.3)
    with serve_one(chatty) as one, raw(one) as slow:
        slow.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        answer = until_closed(slow, b"1\r\n{\r\n")
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"the body did not come within 0.3 s" in answer


def test_who_has_no_key_is_told_before_the_body_is_read(chatty, serve_one, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(server, "UNANSWERED_S", 0.3)
    with serve_one(chatty, api_key=KEY) as one, raw(one) as found:
        found.sendall(HEAD + b"Content-Length: 2000000\r\n\r\n{")
        assert until_closed(found, b"x").startswith(b"HTTP/1.1 401")
        with raw(one) as polite:
            polite.sendall(HEAD + b"Expect: 100-continue\r\nContent-Length: 2000000\r\n\r\n")
            assert polite.recv(1000).startswith(b"HTTP/1.1 401")
        # A client that sends it all the same sees why it was in vain, and goes on.
        large = BODY | {"prompt": "x" * 1_900_000}
        for _ in range(3):
            assert one.post(large).status_code == 401
        assert one.post(BODY, headers={"authorization": f"Bearer {KEY}"}).status_code == 200


def test_names_that_are_no_text_are_refused_like_others(tiny):
    """Half a surrogate pair cannot be written in UTF-8, so not in the answer either."""
    for body in ('{"\\ud800": 1}', '{"model": "tiny", "messages": [{"role": "user", "content": "x", "\\udfff": 1}]}'):
        answer = tiny.http.post(
            "/v1/chat/completions", content=body.encode(), headers={"content-type": "application/json"}
        )
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")


def test_events_survive_clients_that_take_more_for_the_end_of_a_line(tiny, model, script):
    """U+2028 and U+0085 are letters of JSON, and ends of lines for Python's splitlines, which clients use."""
    text = "one\u2028two\u2029three\x85four"
    script([*model.tokenizer(text)["input_ids"], model.model.generation_config.eos_token_id])
    answer = tiny.post(BODY | {"stream": True, "max_tokens": 100})
    events = [
        json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line.startswith("data: {")
    ]
    assert "".join(event["choices"][0]["text"] for event in events) == text
    assert tiny.post(BODY | {"max_tokens": 100}).json()["choices"][0]["text"] == text
