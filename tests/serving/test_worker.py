"""The queue, clients that leave, time, idleness and the end."""

import gc
import os
import shutil
import socket
import threading
import time
import weakref
from typing import Any

import openai
import pytest
import torch
from server_clients import BODY, LONGEST_S, Asking, Leaving, eventually

from griffin_offload.blocks.base import ChunkedForward
from griffin_offload.engine.prompt_passes import PromptPasses
from griffin_offload.offload.layer_stream import BackgroundLoader
from griffin_offload.serving.queue import Job

TIMEOUT_S = 2.0  # of a request whose tokens never come


def test_a_full_queue_says_when_to_come_again(chatty, serve_one, gate, jobs):
    with serve_one(chatty, queue_size=2) as one:
        first = Asking(one, BODY)
        eventually(lambda: jobs)
        others = [Asking(one, BODY), Asking(one, BODY)]
        eventually(lambda: one.server.worker.waiting == 2)
        assert one.metric("queue_depth") == 2
        refused = one.post(BODY)
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert refused.json()["error"]["code"] == "queue_full"
        with one.client() as client, pytest.raises(openai.RateLimitError):
            client.completions.create(**BODY)
        assert one.http.get("/health").json()["waiting"] == 2
        gate.release(1000)
        assert {asking.wait().status_code for asking in (first, *others)} == {200}
        assert len({asking.wait().json()["choices"][0]["text"] for asking in (first, *others)}) == 1
        eventually(lambda: one.metric("requests_total", endpoint="completions", outcome="ok") == 3)
        assert one.metric("requests_total", endpoint="completions", outcome="queue_full") == 2


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_the_worker_within_a_token(chatty, serve_one, gate, jobs, stream: bool):
    with serve_one(chatty) as one:
        gate.release(3)
        leaving = Leaving(one, BODY | {"stream": stream})
        eventually(lambda: len(jobs) == 4)
        leaving.leave()
        eventually(lambda: one.metric("requests_total", endpoint="completions", outcome="disconnected") == 1)
        eventually(lambda: one.metric("sessions") == 1)  # what was said is kept
        assert len(jobs) == 4
        gate.release(1000)
        assert one.post(BODY).status_code == 200


def test_a_client_that_leaves_while_the_prompt_streams(chatty, serve_one, monkeypatch: pytest.MonkeyPatch):
    """After the layer that is being computed; hooks and weights are as before."""
    layers: list[int] = []
    begun, go = threading.Event(), threading.Event()
    prefill = PromptPasses.prefill

    def slow(passes: PromptPasses, *args: Any) -> Any:
        ask = passes.progress

        def progress(done: int, of: int) -> None:
            layers.append(done)
            if done == 1:
                begun.set()
                assert go.wait(LONGEST_S)
            ask(done, of)

        passes.progress = progress
        return prefill(passes, *args)

    with serve_one(chatty) as one:
        expected = one.post(BODY | {"prompt": "a boat"}).json()["choices"][0]["text"]
        monkeypatch.setattr(PromptPasses, "prefill", slow)
        leaving = Leaving(one, BODY)
        assert begun.wait(LONGEST_S)
        leaving.leave()
        eventually(lambda: one.metric("requests_total", endpoint="completions", outcome="disconnected") == 1)
        go.set()
        monkeypatch.undo()
        again = one.post(BODY | {"prompt": "a boat"})
        assert layers == [1]
        assert again.json()["choices"][0]["text"] == expected


def test_a_client_that_leaves_the_queue(chatty, serve_one, gate, jobs):
    with serve_one(chatty) as one:
        first = Asking(one, BODY)
        eventually(lambda: jobs)
        leaving = Leaving(one, BODY)
        eventually(lambda: one.server.worker.waiting == 1)
        leaving.leave()
        eventually(lambda: one.server.worker.waiting == 0)
        gate.release(1000)
        assert first.wait().status_code == 200
        assert len(set(jobs)) == 1


@pytest.mark.parametrize("stream", [True, False])
def test_time_is_up(chatty, serve_one, gate, jobs, stream: bool):
    with serve_one(chatty, request_timeout_s=TIMEOUT_S) as one:
        gate.release(3)
        answer = one.post(BODY | {"stream": stream})
        if stream:
            assert answer.status_code == 200
            assert '"code":"timeout"' in answer.text.strip().split("\n\n")[-1]
        else:
            assert answer.status_code == 408
            assert answer.headers["x-should-retry"] == "false"
            assert f"within {TIMEOUT_S:g} s" in answer.json()["error"]["message"]
        gate.release(1000)
        # The next one is answered; a busy machine may need several attempts within the same time.
        eventually(lambda: one.post(BODY | {"max_tokens": 2}).status_code == 200)


def test_a_body_that_never_ends_is_given_up(chatty, serve_one):

    with (
        serve_one(chatty, request_timeout_s=0.5) as one,
        socket.create_connection(one.server.address) as raw,
    ):
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        raw.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        raw.settimeout(LONGEST_S)
        assert raw.recv(100).startswith(b"HTTP/1.1 408")
        raw.close()


def test_idle_memory_is_given_back_and_the_next_request_loads_again(chatty, serve_one):
    with serve_one(chatty, idle_unload_s=0.3) as one:
        loaded = weakref.ref(one.server.worker.manager.held.model)
        first = one.post(BODY).json()["choices"][0]["text"]
        eventually(lambda: one.metric("model_loaded") == 0)
        assert loaded() is None
        assert one.http.get("/health").json()["loaded"] is False
        assert (one.metric("sessions"), one.metric("session_bytes")) == (0, 0)
        loads = one.metric("model_loads")  # a busy machine may have been idle before the first answer, too
        again = one.post(BODY)
        assert again.json()["choices"][0]["text"] == first
        assert one.metric("model_loads") == loads + 1


def test_what_is_kept_goes_for_a_request_that_has_no_room_beside_it(chatty, serve_one, smallest_budget):
    """As exact mode may, in a budget that was planned without it; here because too much is let stay."""
    with serve_one(chatty, {"max_gpu_mem": smallest_budget, "quantize": "none", "kv_bits": 16}) as one:
        one.server.worker.manager.held.sessions.limit_bytes = 10**9
        for first, kept in ((6, 1), (7, 1), (8, 1)):
            long = BODY | {"prompt": [first] * 190, "max_tokens": 10}
            assert one.post(long).status_code == 200
            assert one.metric("sessions") == kept
        assert one.metric("device_peak_bytes") <= one.metric("device_budget_bytes")


def test_a_checkpoint_that_is_gone_is_no_path_for_clients(chatty, serve_one, tmp_path):
    copy = shutil.copytree(chatty, tmp_path / "hidden-path")
    with serve_one(copy, idle_unload_s=0.2) as one:
        eventually(lambda: one.metric("model_loaded") == 0)
        shutil.move(copy, tmp_path / "elsewhere")
        answer = one.post(BODY)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_unavailable")
        assert "hidden-path" not in answer.text
        shutil.move(tmp_path / "elsewhere", copy)
        assert one.post(BODY).status_code == 200


def test_files_that_change_are_told_and_loaded_again(chatty, serve_one, tmp_path):
    """Never an answer from a mixture: 503, then the model that is there now; without one it is said to be unwell."""
    directory = shutil.copytree(chatty, tmp_path / "model")
    shard = max(directory.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    whole = shard.read_bytes()
    other = BODY | {"prompt": "a dog and a cat sat", "max_tokens": 4}
    with serve_one(directory) as server:
        expected = server.post(BODY).json()["choices"][0]["text"]
        shard.write_bytes(whole)  # the same numbers, which the clock alone tells
        os.utime(shard, ns=(0, 1))
        refused = server.post(other)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "model_unavailable")
        assert str(tmp_path) not in refused.text
        assert server.http.get("/health").json() == {"status": "ok", "loaded": False, "waiting": 0}
        assert server.post(BODY).json()["choices"][0]["text"] == expected
        assert server.metric("model_loads") == 2
        os.truncate(shard, 100)
        assert [server.post(other | {"seed": n}).status_code for n in range(2)] == [503, 503]
        unwell = server.http.get("/health")
        assert (unwell.status_code, unwell.json()["status"]) == (503, "model_unavailable")
        shard.write_bytes(whole)
        assert server.post(BODY).json()["choices"][0]["text"] == expected
        assert server.http.get("/health").status_code == 200


def test_refused_memory_is_told_and_the_next_answer_is_right(chatty, serve_one, monkeypatch: pytest.MonkeyPatch):
    """In a pass the model stays; residents that could not be read are loaded again."""
    with serve_one(chatty) as server:
        expected = server.post(BODY).json()["choices"][0]["text"]
        with monkeypatch.context() as patch:
            patch.setattr(ChunkedForward, "in_chunks", out_of_memory)
            refused = server.post(BODY | {"prompt": "a dog"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "out_of_memory")
        assert server.post(BODY).json()["choices"][0]["text"] == expected
        assert server.metric("model_loads") == 1
    with monkeypatch.context() as patch:
        patch.setattr(BackgroundLoader, "do", out_of_memory)
        started = serve_one(chatty)
        server = started.__enter__()
        assert server.post(BODY).status_code == 503
    assert server.post(BODY).json()["choices"][0]["text"] == expected
    assert server.metric("model_loads") == 2
    started.__exit__(None, None, None)


def out_of_memory(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


def test_the_end_lets_the_running_answer_finish(chatty, serve_one, gate, jobs):
    with serve_one(chatty) as one:
        first = Asking(one, BODY)
        eventually(lambda: jobs)
        waiting = Asking(one, BODY)
        eventually(lambda: one.server.worker.waiting == 1)
        one.server.stop(20)
        assert waiting.wait().status_code == 503
        assert waiting.wait().json()["error"]["code"] == "shutting_down"
        gate.release(1000)
        assert first.wait().status_code == 200


def test_the_end_does_not_wait_for_ever(chatty, serve_one, gate, jobs):
    with serve_one(chatty) as one:
        first = Asking(one, BODY)
        eventually(lambda: jobs)
        one.server.stop(0.2)
        time.sleep(0.3)
        gate.release(1)
        assert first.wait().status_code == 503


def test_nothing_is_left_behind(chatty, serve_one):
    def traces() -> tuple[list[str], int]:
        gc.collect()
        return sorted(thread.name for thread in threading.enumerate()), len(os.listdir("/proc/self/fd"))

    before = traces()
    with serve_one(chatty) as one:
        one.post(BODY)
        one.post(BODY | {"stream": True})
    eventually(lambda: traces() == before)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_a_thread_that_is_gone(chatty, serve_one, gate, jobs, monkeypatch: pytest.MonkeyPatch):
    class Worse(BaseException):
        """Than any Exception."""

    with serve_one(chatty) as one:
        first = Asking(one, BODY)
        eventually(lambda: jobs)
        second = Asking(one, BODY)
        eventually(lambda: one.server.worker.waiting == 1)

        def fail(job: Job) -> None:
            raise Worse

        monkeypatch.setattr(Job, "token", fail)
        gate.release(1)
        assert first.wait().status_code == 500
        assert second.wait().json()["error"]["code"] == "shutting_down"
        health = one.http.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "closing")
