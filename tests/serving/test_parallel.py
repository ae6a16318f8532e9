"""Several requests at once: joined and left between tokens, in their order, within the budget."""

import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from server_clients import BODY, Asking, Leaving, eventually

from griffin_offload.engine.prompt_passes import PromptPasses
from griffin_offload.engine.scheduler import SequenceScheduler

WHOLE = {"density": 1.0}
PROMPTS = [f"the boats of {word}" for word in ("rivers", "cats", "nothing", "another", "mats")]


def body(prompt: str, **more: Any) -> dict[str, Any]:
    return BODY | {"prompt": prompt, "max_tokens": 20} | more


def all_asked(one: Any, count: int) -> None:
    """Wait until so many are in the row or the queue: no token passes the gate before."""
    eventually(lambda: one.metric("running_requests") + one.server.worker.waiting == count)


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many sequences each step computed."""
    counts: list[int] = []
    step = SequenceScheduler.step

    def counted(scheduler: SequenceScheduler) -> Any:
        counts.append(len(scheduler.running))
        return step(scheduler)

    monkeypatch.setattr(SequenceScheduler, "step", counted)
    return counts


@pytest.fixture(scope="module")
def one_at_a_time(chatty, serve_one) -> Iterator[Any]:
    with serve_one(chatty, WHOLE, parallel=1) as one:
        yield one


@pytest.fixture
def alone(one_at_a_time, gate) -> Callable[[dict[str, Any]], Any]:
    """The answer of a server that answers one request at a time; no token passes the gate afterwards."""

    def choices(asked: dict[str, Any]) -> Any:
        gate.release(1000)
        answer = one_at_a_time.post(asked)
        shut(gate)
        return answer.json()["choices"]

    return choices


def shut(gate: threading.Semaphore) -> None:
    while gate.acquire(blocking=False):
        pass


def test_requests_that_come_together_are_answered_together(chatty, serve_one, gate, together, alone):
    """Each as if it were alone: greedy and drawn ones, streams and texts; also with a later one among them."""
    asked = [body(prompt, temperature=index % 2, seed=index) for index, prompt in enumerate(PROMPTS)]
    expected = [alone(one) for one in asked]
    with serve_one(chatty, WHOLE, parallel=4) as one:
        asking = [Asking(one, request) for request in asked]
        all_asked(one, 5)
        gate.release(10_000)
        assert [answer.wait().json()["choices"] for answer in asking] == expected
        assert max(together) == 4
        eventually(lambda: one.metric("running_requests") == 0)
        eventually(lambda: one.metric("requests_total", endpoint="completions", outcome="ok") == 5)
        assert one.metric("device_peak_bytes") <= one.metric("device_budget_bytes")
        assert one.metric("sessions") == 5  # what was said is kept, for whoever goes on


def test_what_an_answer_uses_is_nobody_elses_meanwhile(chatty, serve_one, gate):
    """The same prompt is computed once more beside it, and not behind it; if most of what is kept is that prompt."""
    asked = body(" ".join(PROMPTS), max_tokens=4)

    def cached(answer: Any) -> int:
        return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])

    with serve_one(chatty, WHOLE, parallel=2) as one:
        asking = [Asking(one, asked)]
        all_asked(one, 1)
        asking.append(Asking(one, asked))
        all_asked(one, 2)
        gate.release(10_000)
        assert [cached(answer.wait()) for answer in asking] == [0, 0]
        assert cached(one.post(asked)) > 0


def test_several_answers_to_one_request_are_its_own(chatty, serve_one, alone, gate):
    """One after the other, drawn as if alone, beside another request's."""
    asked = {"prompt": PROMPTS[:2], "n": 2, "temperature": 1, "seed": 3, "max_tokens": 10, "model": "tiny"}
    expected, other = alone(asked), alone(body(PROMPTS[2]))
    with serve_one(chatty, WHOLE, parallel=2) as one:
        asking = [Asking(one, asked), Asking(one, body(PROMPTS[2]))]
        all_asked(one, 2)
        gate.release(10_000)
        assert [answer.wait().json()["choices"] for answer in asking] == [expected, other]


def test_log_probabilities_beside_others(chatty, serve_one, alone, gate):
    asked = body(PROMPTS[0], logprobs=3)
    expected = alone(asked)[0]["logprobs"]
    with serve_one(chatty, WHOLE, parallel=2) as one:
        asking = [Asking(one, asked), Asking(one, body(PROMPTS[1]))]
        all_asked(one, 2)
        gate.release(10_000)
        found = asking[0].wait().json()["choices"][0]["logprobs"]
        asking[1].wait()
    assert found["tokens"] == expected["tokens"]
    assert found["token_logprobs"] == pytest.approx(expected["token_logprobs"], abs=1e-4)


def test_a_client_that_leaves_makes_room_within_a_token(chatty, serve_one, gate, alone):
    """For the one that waits; the others go on."""
    expected = [alone(body(prompt)) for prompt in PROMPTS[:3]]
    with serve_one(chatty, WHOLE, parallel=2) as one:
        leaving = Leaving(one, body(PROMPTS[3], stream=True))
        all_asked(one, 1)
        first = Asking(one, body(PROMPTS[0]))
        all_asked(one, 2)
        others = [Asking(one, body(prompt)) for prompt in PROMPTS[1:3]]
        all_asked(one, 4)
        gate.release(4)
        eventually(lambda: one.metric("running_requests") == 2)
        leaving.leave()
        eventually(lambda: one.metric("requests_total", endpoint="completions", outcome="disconnected") == 1)
        gate.release(3)
        eventually(lambda: one.server.worker.waiting == 1)
        gate.release(10_000)
        assert [answer.wait().json()["choices"] for answer in (first, *others)] == expected


def test_a_client_that_leaves_while_its_prompt_streams_beside_others(chatty, serve_one, gate, jobs, monkeypatch):
    """With half of the neurons: those of the one that is being answered come back."""
    prefill = PromptPasses.prefill
    begun, go = threading.Event(), threading.Event()

    def slow(passes: PromptPasses, mask: Any, context: Any, *args: Any) -> Any:
        ask = passes.progress

        def progress(done: int, of: int) -> None:
            if not begun.is_set() and args[-1] and done == 1:
                begun.set()
                assert go.wait(60)
            ask(done, of)

        passes.progress = progress
        return prefill(passes, mask, context, *args)

    with serve_one(chatty, parallel=2) as one:
        gate.release(1000)
        expected = one.post(body(PROMPTS[0])).json()["choices"]
        shut(gate)
        one.server.worker.manager.held.sessions.drop_all()
        monkeypatch.setattr(PromptPasses, "prefill", slow)
        jobs.clear()
        first = Asking(one, body(PROMPTS[0]))
        eventually(lambda: jobs)  # its own prompt has passed
        leaving = Leaving(one, body(PROMPTS[1]))
        eventually(lambda: one.server.worker.waiting == 1)
        gate.release(2)
        assert begun.wait(60)
        leaving.leave()
        eventually(lambda: one.metric("requests_total", endpoint="completions", outcome="disconnected") == 1)
        go.set()
        gate.release(10_000)
        assert first.wait().json()["choices"] == expected


@pytest.fixture
def held_pass(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Passes of several prompts: how many each took, layers that passed, and two events: one has passed, and it may go
    on."""
    together = PromptPasses.prefill_together

    held = SimpleNamespace(counts=[], layers=[], begun=threading.Event(), go=threading.Event())

    def prefill_together(passes: PromptPasses, contexts: Any, *args: Any) -> Any:
        ask = passes.progress
        held.counts.append(len(contexts))

        def progress(done: int, of: int) -> None:
            held.layers.append(done)
            if done == 1:
                held.begun.set()
                assert held.go.wait(60)
            ask(done, of)

        passes.progress = progress
        return together(passes, contexts, *args)

    monkeypatch.setattr(PromptPasses, "prefill_together", prefill_together)
    return held


def noted(one: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Jobs that nobody waits for any more, as the server learns of them."""
    jobs: list[Any] = []
    cancel = one.server.worker.cancel

    def cancelled(job: Any) -> None:
        cancel(job)
        jobs.append(job)

    monkeypatch.setattr(one.server.worker, "cancel", cancelled)
    return jobs


def test_prompts_that_wait_pass_together(chatty, serve_one, gate, jobs, held_pass, alone, monkeypatch):
    """Beside one that is being answered; whoever leaves in the middle makes room, and the others are answered."""
    expected = [alone(body(prompt)) for prompt in PROMPTS]
    with serve_one(chatty, WHOLE, parallel=4) as one:
        jobs.clear()
        first = Asking(one, body(PROMPTS[0]))
        eventually(lambda: jobs)  # its own prompt has passed
        leaving = Leaving(one, body(PROMPTS[3], stream=True))
        all_asked(one, 2)
        others = [Asking(one, body(prompt)) for prompt in PROMPTS[1:3]]
        all_asked(one, 4)
        cancelled = noted(one, monkeypatch)
        gate.release(2)
        assert held_pass.begun.wait(60)
        last = Asking(one, body(PROMPTS[4]))
        eventually(lambda: one.server.worker.waiting == 1)
        leaving.leave()
        eventually(lambda: len(cancelled) == 1)
        held_pass.go.set()
        eventually(lambda: one.metric("requests_total", endpoint="completions", outcome="disconnected") == 1)
        gate.release(10_000)
        assert [answer.wait().json()["choices"] for answer in (first, *others, last)] == [*expected[:3], expected[4]]
        assert held_pass.counts == [3]


def test_a_pass_ends_when_nobody_waits_for_it(chatty, serve_one, gate, jobs, held_pass, alone, monkeypatch):
    expected = [alone(body(prompt)) for prompt in PROMPTS[:1]]
    with serve_one(chatty, WHOLE, parallel=3) as one:
        jobs.clear()
        first = Asking(one, body(PROMPTS[0]))
        eventually(lambda: jobs)  # its own prompt has passed
        leaving = [Leaving(one, body(prompt, stream=True)) for prompt in PROMPTS[1:3]]
        all_asked(one, 3)
        cancelled = noted(one, monkeypatch)
        gate.release(2)
        assert held_pass.begun.wait(60)
        for client in leaving:
            client.leave()
        eventually(lambda: len(cancelled) == 2)
        held_pass.go.set()
        eventually(lambda: one.metric("requests_total", endpoint="completions", outcome="disconnected") == 2)
        assert held_pass.layers == [1]
        gate.release(10_000)
        assert [first.wait().json()["choices"]] == expected


def test_exact_answers_have_the_model_alone(chatty, serve_one, gate, together):
    """In their turn: nobody overtakes."""
    ends: list[str] = []
    with serve_one(chatty, {"quantize": "none"}, parallel=3) as one:

        def ask(name: str, **more: Any) -> threading.Thread:
            def run() -> None:
                assert Asking(one, body(PROMPTS[0], **more)).wait().status_code == 200
                ends.append(name)

            thread = threading.Thread(target=run)
            thread.start()
            return thread

        threads = [ask("first", max_tokens=30)]
        all_asked(one, 1)
        threads.append(ask("exact", exact=True))
        eventually(lambda: one.server.worker.waiting == 1)
        threads.append(ask("last", max_tokens=2))
        eventually(lambda: one.server.worker.waiting == 2)
        gate.release(10_000)
        for thread in threads:
            thread.join()
    assert ends == ["first", "exact", "last"]
    assert max(together) == 1


def test_the_budget_lets_in_what_has_room(chatty, serve_one, smallest_budget, gate, together, monkeypatch):
    """One long request at a time where no more fit; the next one waits for its end and is answered."""
    options = {"max_gpu_mem": smallest_budget, "quantize": "none", "kv_bits": 16}
    with serve_one(chatty, options) as one:
        monkeypatch.setattr(one.server.worker, "most_together", lambda _: 3)  # of the budget without --parallel
        asking = [Asking(one, BODY | {"prompt": [number] * 150, "max_tokens": 10}) for number in (6, 7, 8)]
        all_asked(one, 3)
        gate.release(10_000)
        assert [answer.wait().status_code for answer in asking] == [200] * 3
        assert max(together) == 1
        assert one.metric("device_peak_bytes") <= one.metric("device_budget_bytes")


def test_memory_for_so_many_is_planned(chatty, serve_one):
    with serve_one(chatty, WHOLE, parallel=1) as one:
        alone = one.server.worker.manager.held.model.plan.decode_parts["kv_cache"]
    with serve_one(chatty, WHOLE, parallel=3) as one:
        assert one.server.worker.manager.held.model.plan.decode_parts["kv_cache"] == 3 * alone


def test_a_pruned_model_shares_its_neurons_only_if_it_is_told_to(chatty, serve_one, gate, together):
    with serve_one(chatty) as one:
        asking = [Asking(one, body(prompt)) for prompt in PROMPTS[:2]]
        all_asked(one, 2)
        gate.release(10_000)
        for answer in asking:
            assert answer.wait().status_code == 200
    assert together == []
    with serve_one(chatty, parallel=2) as one:
        shut(gate)
        asking = [Asking(one, body(prompt)) for prompt in PROMPTS[:2]]
        all_asked(one, 2)
        gate.release(10_000)
        for answer in asking:
            assert answer.wait().status_code == 200
    assert max(together) == 2


def test_a_step_that_fails_is_told_to_all(chatty, serve_one, gate, monkeypatch):
    """And the next request is answered."""
    with serve_one(chatty, WHOLE, parallel=2) as one:
        asking = [Asking(one, body(prompt)) for prompt in PROMPTS[:2]]
        all_asked(one, 2)
        engine = one.server.worker.manager.held.model.engine
        monkeypatch.setattr(engine, "joint", Refusing(engine.joint))
        gate.release(10_000)
        assert {answer.wait().json()["error"]["code"] for answer in asking} == {"out_of_memory"}
        assert one.post(body(PROMPTS[0])).status_code == 200


class Refusing:
    """Stands for a joint step, where there is no memory for several."""

    why_prompts_alone = "there is no memory"

    def __init__(self, joint: Any) -> None:
        self._joint = joint

    def __getattr__(self, name: str) -> Any:
        return getattr(self._joint, name)

    def __call__(self, *_: Any, **__: Any) -> None:
        raise MemoryError


def test_the_end_of_the_server_ends_them_all(chatty, serve_one, gate):
    with serve_one(chatty, WHOLE, parallel=2, shutdown_grace_s=0.2) as one:
        asking = [Asking(one, body(prompt)) for prompt in PROMPTS[:3]]
        all_asked(one, 3)
        gate.release(4)
        eventually(lambda: one.metric("running_requests") == 2)
        one.server.stop()
        eventually(lambda: time.monotonic() > one.server.worker.stop_at)
        gate.release(10_000)
        assert {answer.wait().status_code for answer in asking} == {503}


def test_structured_answers_beside_others(chatty, serve_one, alone, gate):
    asked = [body(PROMPTS[0], regex="(cat|mat)( on a (cat|mat))*"), body(PROMPTS[1])]
    expected = [alone(one) for one in asked]
    with serve_one(chatty, WHOLE, parallel=2) as one:
        asking = [Asking(one, request) for request in asked]
        all_asked(one, 2)
        gate.release(10_000)
        assert [answer.wait().json()["choices"] for answer in asking] == expected
    assert expected[0][0]["text"][:3] in ("cat", "mat")
