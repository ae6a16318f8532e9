"""The real `openai` client: several at once, those that leave, and every error as the class it is for them."""

import asyncio
import json
import threading
from collections.abc import Callable
from typing import Any

import openai
import pytest
import torch
from server_clients import eventually

from griffin_offload import GriffinModel
from griffin_offload.serving.queue import Job

PROMPT = "the cat sat on the mat and thought of another river"
MESSAGES: list[Any] = [{"role": "user", "content": "the cat"}]
BODY: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": 24}
CHAT: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "temperature": 0, "max_tokens": 12}
KEY = "sk-a-secret"


def disconnected(one: Any, endpoint: str) -> Callable[[], bool]:
    return lambda: one.metric("requests_total", endpoint=endpoint, outcome="disconnected") == 1


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_a_stream_that_is_closed_in_the_middle(chatty, serve_one, gate, jobs, endpoint: str):
    with serve_one(chatty) as one, one.client() as client:
        gate.release(3)
        if endpoint == "chat":
            stream: Any = client.chat.completions.create(**CHAT | {"max_tokens": 100}, stream=True)
        else:
            stream = client.completions.create(**BODY, stream=True)
        next(stream)
        eventually(lambda: len(jobs) == 4)  # the fourth has no permit
        stream.close()
        eventually(disconnected(one, endpoint))
        eventually(lambda: one.metric("sessions") == 1)  # the worker is done with it
        assert len(jobs) == 4
        gate.release(1000)
        assert client.completions.create(**BODY).choices[0].text


def test_a_client_that_loses_patience(chatty, serve_one, gate, jobs):
    with serve_one(chatty) as one, one.client() as client:
        gate.release(2)
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=3.0).chat.completions.create(**CHAT)
        eventually(disconnected(one, "chat"))
        eventually(lambda: one.metric("sessions") == 1)
        assert len(jobs) == 3
        gate.release(1000)
        assert client.chat.completions.create(**CHAT).choices[0].message.content


def test_async_clients_at_once_and_one_of_them_cancelled(chatty, serve_one, gate, jobs, model: GriffinModel):
    ids = model.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    output = model.generate(ids, max_new_tokens=20, do_sample=False)
    expected = model.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)

    async def text(client: openai.AsyncOpenAI) -> str:
        stream = await client.completions.create(**BODY | {"max_tokens": 20}, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def talk(one: Any, url: str) -> list[str]:
        async with (
            openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0, timeout=300) as first,
            openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0, timeout=300) as second,
        ):
            leaving = asyncio.create_task(text(first))
            while not jobs:
                await asyncio.sleep(0.01)
            staying = [asyncio.create_task(text(client)) for client in (first, second)]
            leaving.cancel()
            while not disconnected(one, "completions")():
                await asyncio.sleep(0.01)
            gate.release(1000)
            return await asyncio.gather(*staying)

    with serve_one(chatty) as one:
        assert asyncio.run(talk(one, one.url)) == [expected] * 2
        assert (len({*jobs}), jobs.count(jobs[0])) == (3, 1)


def test_several_answers_in_one_stream(client: openai.OpenAI):
    options = CHAT | {"temperature": 1, "seed": 5, "n": 3, "logprobs": True, "top_logprobs": 1}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert len({choice.message.content for choice in whole.choices}) == 3
    assert [(chunk.choices[0].index, chunk.choices[0].delta.role) for chunk in chunks[:3]] == [
        (index, "assistant") for index in range(3)
    ]
    for choice in whole.choices:
        own = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == choice.index]
        assert "".join(part.delta.content or "" for part in own) == choice.message.content
        assert [part.finish_reason for part in own][-1] == choice.finish_reason
        found = [entry for part in own if part.logprobs for entry in part.logprobs.content]
        assert found == choice.logprobs.content
    assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage.model_copy(update=dict(chunks[-1].usage)))
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_stop_strings_over_the_borders_of_tokens(client: openai.OpenAI, model: GriffinModel, script):
    """Held back as long as they may still come, and shown when they do not."""
    words = ["the", " cat", " sat", " on", " the", " mat"]
    tokens = [token for word in words for token in model.tokenizer(word)["input_ids"]]
    text = "".join(words)
    script([*tokens, model.model.generation_config.eos_token_id])
    assert len(tokens) < len(text)
    for stop, shown, reason in (
        ("at s", "the c", "stop"),
        ("t on the m", "the cat sa", "stop"),
        ("mats", text, "stop"),
    ):
        whole = client.chat.completions.create(**CHAT | {"max_tokens": 50}, stop=stop).choices[0]
        assert (whole.message.content, whole.finish_reason) == (shown, reason)
        pieces = [
            chunk.choices[0].delta.content or ""
            for chunk in client.chat.completions.create(**CHAT | {"max_tokens": 50}, stop=[stop], stream=True)
        ]
        assert "".join(pieces) == shown


def test_logprobs_of_what_is_sampled_are_those_before_temperature(client: openai.OpenAI, model: GriffinModel):
    """Against the logits that `generate` returns for the same seed."""
    ids = model.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    sampling: dict[str, Any] = {"temperature": 0.7, "top_p": 0.9}
    torch.manual_seed(3)
    output = model.generate(
        ids, max_new_tokens=8, do_sample=True, top_k=0, return_dict_in_generate=True, output_logits=True, **sampling
    )
    found = client.completions.create(**BODY | sampling | {"max_tokens": 8, "seed": 3, "logprobs": 2}).choices[0]
    tokens = output.sequences[0, ids.shape[1] :].tolist()
    assert found.text == model.tokenizer.decode(tokens)
    expected = [logits[0].double().log_softmax(-1) for logits in output.logits]
    assert found.logprobs.token_logprobs == pytest.approx(
        [float(logprobs[token]) for logprobs, token in zip(expected, tokens, strict=True)], abs=1e-5
    )
    for top, logprobs in zip(found.logprobs.top_logprobs, expected, strict=True):
        assert sorted(top.values())[-2:] == pytest.approx(logprobs.topk(2).values.flip(0).tolist(), abs=1e-5)


def test_logprobs_of_exact_answers_are_the_full_models(client: openai.OpenAI, chatty):
    """Of every token, those of drafts that were accepted included."""
    options = BODY | {"max_tokens": 12, "logprobs": 1}
    with GriffinModel.from_pretrained(chatty, device="cpu", max_gpu_mem="1GB", density=1.0, ctx_size=200) as full:
        ids = full.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
        output = full.generate(
            ids, max_new_tokens=12, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    found = client.completions.create(**options, extra_body={"exact": True}).choices[0].logprobs
    expected = [float(logits[0].double().log_softmax(-1).max()) for logits in output.logits]
    assert found.token_logprobs == pytest.approx(expected, abs=1e-4)


def test_every_refusal_is_its_class(chatty, serve_one, gate):
    with serve_one(chatty, api_key=KEY, max_body="100kB", request_timeout_s=0.5) as one:
        with one.client("wrong-key") as client:
            with pytest.raises(openai.AuthenticationError):
                client.models.list()
            with pytest.raises(openai.AuthenticationError):
                client.chat.completions.create(**CHAT, stream=True)
        with one.client(KEY) as client:
            elsewhere = client.with_options(default_headers={"host": "evil.example"})
            with pytest.raises(openai.PermissionDeniedError, match="--allow-host"):
                elsewhere.chat.completions.create(**CHAT)
            with pytest.raises(openai.NotFoundError):
                client.embeddings.create(model="tiny", input="x")
            with pytest.raises(openai.APIStatusError) as large:
                client.completions.create(model="tiny", prompt="x" * 200_000)
            assert (large.value.status_code, large.value.code) == (413, "body_too_large")
            with pytest.raises(openai.APIStatusError) as late:
                client.completions.create(**BODY)  # its tokens have no permit
            assert (late.value.status_code, late.value.code) == (408, "timeout")
            gate.release(1)
            with pytest.raises(openai.APIError, match=r"within 0\.5 s"):
                list(client.completions.create(**BODY, stream=True))
            one.server.worker.close(0)
            with pytest.raises(openai.InternalServerError) as closing:
                client.completions.create(**BODY)
            assert (closing.value.status_code, closing.value.code) == (503, "shutting_down")


def test_bugs_of_ours_are_errors_for_the_client_too(client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patched:
        patched.setattr(Job, "token", lambda _: 1 / 0)
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError) as caught:
                client.chat.completions.create(**CHAT, stream=stream)
            assert (caught.value.status_code, caught.value.code) == (500, "internal_error")
            assert "division" not in str(caught.value)
    assert client.chat.completions.create(**CHAT).choices[0].message.content


def test_a_client_that_tries_again_when_it_is_told_gets_its_answer(chatty, serve_one, gate, jobs):
    with serve_one(chatty, queue_size=1) as one:
        found: list[str] = []

        def ask(retries: int) -> None:
            with openai.OpenAI(base_url=f"{one.url}/v1", api_key="x", max_retries=retries) as client:
                found.append(client.completions.create(**BODY).choices[0].text)

        threads = [threading.Thread(target=ask, args=(10,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        eventually(lambda: one.metric("requests_total", endpoint="completions", outcome="queue_full") >= 2)
        gate.release(10_000)
        for thread in threads:
            thread.join()
        assert len(found) == 4
        assert len(set(found)) == 1


def test_raw_answers_and_what_is_in_them(client: openai.OpenAI):
    answer = client.chat.completions.with_raw_response.create(**CHAT)
    assert answer.headers["content-type"] == "application/json"
    body = json.loads(answer.text)
    assert set(body) == {"id", "object", "created", "model", "choices", "usage", "griffin"}
    assert body["griffin"]["streamed_bytes"] >= 0
    with client.completions.with_streaming_response.create(**BODY | {"max_tokens": 2}, stream=True) as streamed:
        lines = [line for line in streamed.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert all(line.startswith("data: ") for line in lines)


def test_parts_of_messages_are_read_as_their_text(client: openai.OpenAI):
    parts: list[Any] = [{"role": "user", "content": [{"type": "text", "text": "the cat"}]}]
    one, other = (client.chat.completions.create(**CHAT | {"messages": m}) for m in (parts, MESSAGES))
    assert one.choices[0].message.content == other.choices[0].message.content
    limited = {name: value for name, value in CHAT.items() if name != "max_tokens"}
    short = client.chat.completions.create(**limited, max_completion_tokens=3)
    assert short.usage.completion_tokens == 3
