"""The real `openai` client against a running server; answers against the model's own."""

import threading
from typing import Any

import openai
import pytest
import torch

from griffin_offload import GriffinModel

PROMPT = "the cat sat on the mat and thought of another river"
MESSAGES: list[Any] = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "the cat"}]


def chat_ids(model: GriffinModel, messages: list[Any]) -> torch.Tensor:
    return model.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )["input_ids"]


def text_ids(model: GriffinModel, text: str = PROMPT) -> torch.Tensor:
    return model.tokenizer(text, return_tensors="pt")["input_ids"]


def greedy(model: GriffinModel, ids: torch.Tensor, tokens: int, **options: Any) -> str:
    output = model.generate(ids, max_new_tokens=tokens, do_sample=False, **options)
    return model.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def test_models(client: openai.OpenAI):
    (listed,) = client.models.list().data
    assert (listed.id, listed.object) == ("tiny", "model")
    found = client.models.retrieve("tiny")
    figures = (found.model_extra or {}).pop("griffin")  # of this one alone
    assert found == listed
    assert figures["loaded"] is True
    with pytest.raises(openai.NotFoundError, match="'tiny' is served here"):
        client.models.retrieve("a/b")


def test_greedy_chat_is_generate(client: openai.OpenAI, model: GriffinModel):
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0, max_tokens=12)
    ids = chat_ids(model, MESSAGES)
    assert answer.object == "chat.completion"
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", greedy(model, ids, 12))
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (ids.shape[1], 12)
    assert answer.usage.total_tokens == ids.shape[1] + 12
    assert answer.model_extra is not None
    assert answer.model_extra["griffin"]["density"] == 0.5


def test_greedy_completions_are_generate(client: openai.OpenAI, model: GriffinModel):
    ids = text_ids(model).tolist()[0]
    prompts = [PROMPT, [PROMPT, "a boat"], ids, [ids, ids]]
    for prompt, texts in zip(prompts, ([PROMPT], [PROMPT, "a boat"], [PROMPT], [PROMPT] * 2), strict=True):
        answer = client.completions.create(model="tiny", prompt=prompt, temperature=0, max_tokens=8)
        assert [c.text for c in answer.choices] == [greedy(model, text_ids(model, text), 8) for text in texts]
        assert [c.index for c in answer.choices] == list(range(len(texts)))
    assert client.completions.create(model="tiny", prompt=PROMPT).usage.completion_tokens <= 16


def test_streams_are_the_whole_answer_in_pieces(client: openai.OpenAI):
    options: Any = {"model": "tiny", "temperature": 0, "max_tokens": 12}
    whole = client.chat.completions.create(messages=MESSAGES, **options)
    chunks = list(client.chat.completions.create(messages=MESSAGES, stream=True, **options))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.usage is None and len(chunk.choices) == 1 for chunk in chunks)
    assert {(c.id, c.model, c.object, c.created) for c in chunks} == {
        (chunks[0].id, "tiny", "chat.completion.chunk", chunks[0].created)
    }
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["length"]
    usage = {"stream_options": {"include_usage": True}}
    texts = list(client.completions.create(prompt=PROMPT, stream=True, **usage, **options))
    assert texts[-1].choices == []
    assert (texts[-1].usage.completion_tokens, texts[-2].choices[0].finish_reason) == (12, "length")
    whole_text = client.completions.create(prompt=PROMPT, **options).choices[0].text
    assert "".join(c.choices[0].text for c in texts[:-1]) == whole_text


def test_pieces_come_one_by_one(tiny, client: openai.OpenAI, gate: threading.Semaphore):
    stream = client.completions.create(model="tiny", prompt=PROMPT, temperature=0, max_tokens=50, stream=True)
    gate.release(30)
    first = next(stream)
    assert first.choices[0].finish_reason is None  # and the last token has no permit yet
    gate.release(30)
    assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"


@pytest.mark.slow
def test_sampling_by_seed(client: openai.OpenAI):
    def ask(**options: Any) -> list[str]:
        answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_completion_tokens=10, **options)
        return [choice.message.content or "" for choice in answer.choices]

    assert ask(seed=7) == ask(seed=7) == ask(seed=7, temperature=1, top_p=1)
    assert ask(seed=7) != ask(seed=8)
    assert ask() != ask()
    several = ask(seed=7, n=3)
    assert len(set(several)) == 3
    assert several[0] == ask(seed=7)[0]
    cold = ask(temperature=0)
    assert ask(temperature=0, n=2) == cold * 2
    assert ask(temperature=2, top_p=0, seed=1) == ask(temperature=1e-9, seed=2) == cold


def test_sampling_is_that_of_generate(client: openai.OpenAI, model: GriffinModel):
    ids = text_ids(model)
    torch.manual_seed(11)
    output = model.generate(ids, max_new_tokens=10, do_sample=True, temperature=0.7, top_p=0.9, top_k=0)
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=10, seed=11, temperature=0.7, top_p=0.9)
    assert answer.choices[0].text == model.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def test_stop_strings_are_cut_off(client: openai.OpenAI):
    options: Any = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": 40}
    text = client.completions.create(**options).choices[0].text
    for stop in (text[10:12], text[5], ["zzzz", text[20:26], text[21:23]]):
        ends = [text.index(s) for s in ([stop] if isinstance(stop, str) else stop) if s in text]
        cut = client.completions.create(**options, stop=stop)
        assert (cut.choices[0].text, cut.choices[0].finish_reason) == (text[: min(ends)], "stop")
        assert cut.usage.completion_tokens < 40
        chunks = client.completions.create(**options, stop=stop, stream=True)
        assert "".join(chunk.choices[0].text for chunk in chunks) == text[: min(ends)]


def test_logprobs_are_those_of_the_model(client: openai.OpenAI, model: GriffinModel):
    """Whatever the temperature; against log_softmax of the scores that `generate` returns, in float64."""
    ids = chat_ids(model, MESSAGES)
    output = model.generate(ids, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True)
    expected = [logits[0].double().log_softmax(-1) for logits in output.logits]
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=6, temperature=1e-9, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content
    tokens = output.sequences[0, ids.shape[1] :].tolist()
    assert len(content) == len(expected) == 6
    for entry, token, logprobs in zip(content, tokens, expected, strict=True):
        assert entry.token == model.tokenizer.decode([token])
        assert entry.logprob == pytest.approx(float(logprobs[token]), abs=1e-5)
        best = logprobs.topk(3)
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-5)
        assert [top.token for top in entry.top_logprobs] == [model.tokenizer.decode([i]) for i in best.indices]
        assert entry.top_logprobs[0].bytes == entry.bytes
    assert b"".join(bytes(entry.bytes) for entry in content).decode(errors="replace") == model.tokenizer.decode(tokens)
    stream = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=6, temperature=0, logprobs=True, top_logprobs=3, stream=True
    )
    streamed = [entry for c in stream if c.choices[0].logprobs for entry in c.choices[0].logprobs.content]
    assert streamed == content


def test_logprobs_of_completions(client: openai.OpenAI):
    options: Any = {"model": "tiny", "prompt": PROMPT, "max_tokens": 30, "temperature": 0, "logprobs": 2}
    (choice,) = client.completions.create(**options).choices
    found = choice.logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset) == 30
    for token, logprob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert top[token] == logprob == max(top.values())
        assert len(top) == 2
    for token, start in zip(found.tokens, found.text_offset, strict=True):
        # Behind half a letter a token begins where that did.
        assert token.startswith("bytes:") or choice.text[start:].lstrip("\ufffd").startswith(token)
    streamed = list(client.completions.create(**options, stream=True))
    parts = [c.choices[0].logprobs for c in streamed if c.choices[0].logprobs]
    assert [token for part in parts for token in part.tokens] == found.tokens
    assert [offset for part in parts for offset in part.text_offset] == found.text_offset
    # Of an answer that is cut, only the tokens that begin in what is shown of it.
    cut = client.completions.create(**options, stop=choice.text[12:15]).choices[0]
    shown = sum(start < len(cut.text) for start in found.text_offset)
    assert 0 < shown < 30
    assert cut.logprobs.tokens == found.tokens[:shown]


def test_a_conversation_goes_on_from_what_is_kept(client: openai.OpenAI, tiny, model: GriffinModel):
    """Only new tokens are computed, and the answers are those of a context of one's own."""
    messages: list[Any] = [{"role": "user", "content": "the mat, the river and the boats of another"}]
    context = model.new_context()
    known = 0
    for turn in range(3):
        kept = tiny.metric("prompt_tokens_total", source="kept") if turn else 0
        answer = client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=8)
        ids = chat_ids(model, messages)
        assert answer.choices[0].message.content == greedy(model, ids, 8, context=context)
        cached = answer.usage.prompt_tokens_details.cached_tokens
        assert cached == model.last_report.cached_prompt_tokens
        assert cached >= known
        if turn:
            assert tiny.metric("prompt_tokens_total", source="kept") - kept == cached
        known = ids.shape[1]
        messages += [answer.choices[0].message, {"role": "user", "content": f"and then {turn}"}]
        messages = [m if isinstance(m, dict) else m.model_dump() for m in messages]


def test_exact_answers_are_those_of_all_neurons(client: openai.OpenAI, chatty):
    with GriffinModel.from_pretrained(chatty, device="cpu", max_gpu_mem="1GB", density=1.0, ctx_size=200) as full:
        expected = greedy(full, text_ids(full), 16)
    options: Any = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": 16}
    answer = client.completions.create(**options, extra_body={"exact": True})
    assert answer.choices[0].text == expected
    assert answer.model_extra["griffin"]["exact"] is True
    assert client.completions.create(**options, extra_body={"exact": False}).choices[0].text != expected


def test_another_density_is_loaded_for_a_request(client: openai.OpenAI, tiny, chatty):
    options: Any = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": 16}
    usual, loads = client.completions.create(**options), tiny.metric("model_loads")
    same = client.completions.create(**options, extra_body={"density": 0.5})
    assert (same.choices[0].text, tiny.metric("model_loads")) == (usual.choices[0].text, loads)
    with GriffinModel.from_pretrained(chatty, device="cpu", max_gpu_mem="1GB", density=0.75, ctx_size=200) as other:
        expected = greedy(other, text_ids(other), 16)
    answer = client.completions.create(**options, extra_body={"density": 0.75})
    assert (answer.choices[0].text, answer.model_extra["griffin"]["density"]) == (expected, 0.75)
    again = client.completions.create(**options)
    assert again.choices[0].text == usual.choices[0].text
    assert tiny.metric("model_loads") == loads + 2


def test_unicode_over_several_tokens(client: openai.OpenAI, model: GriffinModel, script):
    text = "naïve ✓ 😀漢字 e\u0301 👨‍👩‍👧"
    tokens = model.tokenizer(text)["input_ids"]
    assert len(tokens) > len(text)
    script([*tokens, model.model.generation_config.eos_token_id])
    stream = list(client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True))
    shown = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(shown) == text
    assert not any("\ufffd" in piece for piece in shown)
    assert stream[-1].choices[0].finish_reason == "stop"
    cut = client.chat.completions.create(model="tiny", messages=MESSAGES, stop=["漢字 "], stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in cut) == "naïve ✓ 😀"
    script([*tokens[:-1]])  # half of the last letter
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=len(tokens) - 1)
    assert answer.choices[0].message.content.startswith(text[:-1])
    assert answer.choices[0].finish_reason == "length"


def test_two_clients_at_once(tiny, model: GriffinModel):
    prompts = [f"the boats of {word}" for word in ("rivers", "cats", "nothing", "another")]
    expected = [greedy(model, text_ids(model, prompt), 20) for prompt in prompts]
    found: dict[str, str] = {}

    def ask(prompt: str) -> None:
        with tiny.client() as own:
            chunks = own.completions.create(model="tiny", prompt=prompt, max_tokens=20, temperature=0, stream=True)
            found[prompt] = "".join(chunk.choices[0].text for chunk in chunks)

    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[prompt] for prompt in prompts] == expected


def test_errors_are_the_clients_own(client: openai.OpenAI):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=3)
    assert (caught.value.param, caught.value.type, caught.value.code) == (
        "temperature",
        "invalid_request_error",
        "invalid_value",
    )
    with pytest.raises(openai.BadRequestError, match="functions alone are called"):
        client.chat.completions.create(model="tiny", messages=MESSAGES, tools=[{"type": "web_search"}])
    image: Any = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}
    with pytest.raises(openai.BadRequestError, match="the model reads text parts alone"):
        client.chat.completions.create(model="tiny", messages=[image])
    with pytest.raises(openai.NotFoundError, match="'tiny' is served here"):
        client.chat.completions.create(model="gpt-4", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError, match="an answer comes first"):
        client.chat.completions.create(model="tiny", messages=[{"role": "assistant", "content": "x"}], stream=True)


def test_what_does_not_fit_is_refused_with_the_numbers(client: openai.OpenAI, tiny):
    streamed = tiny.metric("streamed_bytes_total", phase="prefill")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt=[5] * 150, max_tokens=51)
    assert "150 tokens and 51 new ones are 201, the context is 200" in caught.value.message
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")
    with pytest.raises(openai.BadRequestError, match="the prompt has 200 tokens, 199 are allowed"):
        client.completions.create(model="tiny", prompt=[5] * 200)
    with pytest.raises(openai.BadRequestError, match="token id 320: they go up to 319"):
        client.completions.create(model="tiny", prompt=[320])
    assert tiny.metric("streamed_bytes_total", phase="prefill") == streamed
    answer = client.completions.create(model="tiny", prompt=[5] * 150, max_tokens=50, temperature=0)
    assert answer.usage.total_tokens <= 200
    longest = client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0)
    assert longest.usage.total_tokens == 200 or longest.choices[0].finish_reason == "stop"
