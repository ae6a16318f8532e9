"""What is no business of a client library: raw requests, refusals, other clients."""

import contextlib
import json
import shutil
import socket
import subprocess
import threading
import time
from pathlib import Path

import httpx
import pytest
import torch

BODY = {"model": "tiny", "prompt": "the cat", "max_tokens": 4, "temperature": 0}
JSON = {"content-type": "application/json"}
KEY = "sk-a-secret"


def error_of(answer: httpx.Response, status: int) -> dict:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert set(answer.json()) == {"error"}
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


def test_paths_and_methods(tiny):
    for path in ("/v1", "/v1/models/", "/v1/chat/completions/", "/v1/embeddings", "/docs", "/../etc/passwd"):
        assert error_of(tiny.http.get(path), 404)["code"] in ("not_found", "model_not_found")
    for path in ("/v1/chat/completions", "/v1/completions"):
        for method in ("GET", "PUT", "DELETE", "OPTIONS"):
            answer = tiny.http.request(method, path)
            assert error_of(answer, 405)["type"] == "invalid_request_error"
            assert answer.headers["allow"] == "POST"
    assert tiny.http.post("/v1/models").headers["allow"] == "GET, HEAD"
    head = tiny.http.head("/health")
    assert (head.status_code, head.text) == (200, "")


def test_health_and_metrics(tiny):
    assert tiny.http.get("/health").json() == {"status": "ok", "loaded": True, "waiting": 0}
    tiny.post(BODY)
    answer = tiny.http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    for name in ("requests_total", "queue_depth", "time_to_first_token_seconds_bucket", "streamed_bytes_total"):
        assert f"\ngriffin_offload_{name}" in answer.text
    assert 0 < tiny.metric("device_peak_bytes") <= tiny.metric("device_budget_bytes")
    assert tiny.metric("session_bytes") > 0
    assert tiny.metric("host_bytes") > 0
    assert tiny.metric("host_budget_bytes") == tiny.metric("device_budget_bytes")


def test_growth_since_the_load_is_told(serve_one, chatty: Path):
    # The server is in this process: what a test gives back meanwhile would hide how little a tiny model adds.
    with serve_one(chatty) as started:
        held = torch.ones(2**28, dtype=torch.uint8)
        started.post(BODY)
        del held
        assert started.metric("host_growth_bytes") > 2**27


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'{"model": NaN}', b"[" * 50_000, b"\xff\xfe"], ids=repr)
def test_bodies_that_are_no_json(tiny, body: bytes):
    for path in ("/v1/chat/completions", "/v1/completions"):
        assert error_of(tiny.http.post(path, content=body, headers=JSON), 400)["code"] == "invalid_json"


def test_other_content_is_refused(tiny):
    """A web page may send text/plain anywhere without being asked."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        answer = tiny.http.post("/v1/completions", content=json.dumps(BODY), headers={"content-type": kind})
        assert error_of(answer, 415)["code"] == "content_type"
    packed = {**JSON, "content-encoding": "gzip"}
    assert error_of(tiny.http.post("/v1/completions", content=b"x", headers=packed), 415)
    answer = tiny.http.post("/v1/completions", json=BODY, headers={"content-type": "Application/JSON; charset=utf-8"})
    assert answer.status_code == 200


def test_large_bodies_are_refused_however_they_come(tiny):
    large = b'{"model": "' + b"x" * 2_000_000 + b'"}'
    whole = tiny.http.post("/v1/completions", content=large, headers=JSON)
    assert error_of(whole, 413)["code"] == "body_too_large"
    pieces = (large[i : i + 50_000] for i in range(0, len(large), 50_000))
    assert error_of(tiny.http.post("/v1/completions", content=pieces, headers=JSON), 413)
    assert tiny.post(BODY).status_code == 200


def test_a_body_without_an_end_is_not_kept(tiny):
    """Ten gigabytes are announced; the answer comes long before."""
    with socket.create_connection(tiny.server.address) as raw:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        raw.sendall(f"{head}Content-Length: 10000000000\r\n\r\n".encode())
        received = b""
        raw.settimeout(30)
        while b"\r\n\r\n" not in received:
            try:
                raw.sendall(b"x" * 100_000)
            except OSError:
                break
            raw.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                received += raw.recv(1000)
            raw.settimeout(30)
        assert b"413" in received.split(b"\r\n")[0]


def test_a_chat_without_template_is_told_where_to_go(checkpoints, serve_one):
    with serve_one(checkpoints("llama2")) as plain:
        chat = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}
        assert "/v1/completions" in error_of(plain.post(chat, "/v1/chat/completions"), 400)["message"]
        assert plain.post(BODY).status_code == 200


def test_key_host_and_origin(chatty, serve_one):
    page = "https://chat.example"
    with serve_one(chatty, api_key=KEY, cors_origin=(page,), allow_host=("box.lan",)) as guarded:
        right = {"authorization": f"Bearer {KEY}"}
        for path in ("/v1/models", "/metrics"):
            answer = guarded.http.get(path)
            assert error_of(answer, 401)["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
            assert guarded.http.get(path, headers=right).status_code == 200
        assert error_of(guarded.post(BODY), 401)["type"] == "authentication_error"
        for key, status in ((KEY, 200), ("sk-another", 401)):  # as Anthropic's clients give it
            assert guarded.http.get("/v1/models", headers={"x-api-key": key}).status_code == status
        assert guarded.http.get("/health").status_code == 200
        assert guarded.post(BODY, headers=right | {"host": "box.lan:80"}).status_code == 200
        assert error_of(guarded.post(BODY, headers=right | {"host": "evil.example"}), 403)["code"] == "host_not_allowed"
        evil = guarded.post(BODY, headers=right | {"origin": "https://evil.example"})
        assert error_of(evil, 403)["code"] == "origin_not_allowed"
        assert "access-control-allow-origin" not in evil.headers
        for headers in (right, {}):  # a page may read why it was refused, too
            answer = guarded.post(BODY, headers=headers | {"origin": page})
            assert answer.status_code == (200 if headers else 401)
            assert answer.headers.get("access-control-allow-origin") == (page if headers else None)
        asks = {"origin": page, "access-control-request-method": "POST", "access-control-request-headers": "x-a"}
        preflight = guarded.http.options("/v1/completions", headers=asks)
        assert (preflight.status_code, preflight.headers["access-control-allow-headers"]) == (204, "x-a")
        assert preflight.headers["access-control-allow-origin"] == page


def test_caps_of_tokens(chatty, serve_one):
    with serve_one(chatty, max_prompt_tokens=60, max_output_tokens=5, max_choices=2) as capped:
        assert "61 tokens, 60 are allowed" in error_of(capped.post(BODY | {"prompt": [5] * 61}), 400)["message"]
        assert "max_tokens is 6, 5 are allowed" in error_of(capped.post(BODY | {"max_tokens": 6}), 400)["message"]
        assert error_of(capped.post(BODY | {"n": 3}), 400)["param"] == "n"
        chat = {"model": "tiny", "messages": [{"role": "user", "content": "cat"}], "temperature": 0}
        answer = capped.post(chat, "/v1/chat/completions").json()
        assert answer["usage"]["completion_tokens"] <= 5


def test_what_the_planner_refuses(chatty, serve_one, smallest_budget):
    """The smallest budget for half of the neurons holds no more of them, and one session."""
    with serve_one(chatty, {"max_gpu_mem": smallest_budget, "quantize": "none", "kv_bits": 16}) as tight:
        error = error_of(tight.post(BODY | {"density": 0.95}), 400)
        assert (error["code"], error["param"]) == ("does_not_fit", "density")
        assert "budget" in error["message"]
        assert tight.metric("model_loads") == 1
        assert tight.metric("session_limit_bytes") == 0
        exact = error_of(tight.post(BODY | {"exact": True, "prompt": [5] * 196}), 400)
        assert (exact["code"], exact["param"]) == ("does_not_fit", None)
        for prompt in ("the cat", "a boat", "the mat", "the cat"):
            assert tight.post(BODY | {"prompt": prompt}).status_code == 200
            assert tight.metric("sessions") == 1
        assert tight.metric("device_peak_bytes") <= smallest_budget


def test_logs_say_nothing_of_what_was_said(tiny, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    tiny.post(BODY | {"prompt": "the secret river"}, headers={"authorization": "Bearer hidden-token"})
    tiny.http.get("/v1/hidden/path?query=hidden")
    tiny.post(BODY | {"temperature": "hidden"})
    end = time.monotonic() + 60  # a line is written behind its answer
    while len(ours := [r.getMessage() for r in caplog.records if r.name.startswith("griffin_offload")]) < 3:
        assert time.monotonic() < end, ours
        time.sleep(0.01)
    assert [line.rpartition(" in ")[0] for line in ours] == [
        "completions 200 ok",
        "other 404 refused",
        "completions 400 refused",
    ]


def test_paths_make_no_lines_of_their_own_in_a_verbose_log(tiny, caplog: pytest.LogCaptureFixture):
    caplog.set_level("DEBUG")
    tiny.http.get("/v1/a%0Agriffin-offload:%20forged%1b[2J")
    end = time.monotonic() + 60
    found: list[str] = []
    while not found:
        assert time.monotonic() < end
        ours = [r.getMessage() for r in caplog.records if r.name.startswith("griffin_offload")]
        found = [line for line in ours if "forged" in line]
    assert found[0].isprintable()


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_curl(tiny):
    def curl(*arguments: str) -> str:
        done = subprocess.run(["curl", "-sS", "--max-time", "30", *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert json.loads(curl(f"{tiny.url}/health"))["status"] == "ok"
    send = [f"{tiny.url}/v1/completions", "-H", "Content-Type: application/json", "-d"]
    whole = json.loads(curl(*send, json.dumps(BODY)))
    lines = curl("-N", *send, json.dumps(BODY | {"stream": True})).split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]
    assert "-H 'Content-Type" not in curl(*send[:1], "-d", json.dumps(BODY), "-o", "/dev/null", "-w", "%{http_code}")


def test_answers_in_the_middle_of_a_stream_that_fail_are_told(tiny, monkeypatch: pytest.MonkeyPatch):
    """A bug of ours after the first token: an event of the stream says so, without details, and the next one works."""
    from griffin_offload.serving.queue import Job

    def token(job: Job, before: list[int] = []) -> None:  # noqa: B006
        before.append(1)
        if len(before) == 3:
            raise ZeroDivisionError("secret")

    monkeypatch.setattr(Job, "token", token)
    answer = tiny.post(BODY | {"stream": True, "max_tokens": 8})
    events = answer.text.strip().split("\n\n")
    assert answer.status_code == 200
    assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "internal_error"
    assert "secret" not in answer.text
    monkeypatch.undo()
    assert tiny.post(BODY).status_code == 200
    assert threading.active_count() < 20
