"""Bodies: what is taken, and what is refused by name."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from griffin_offload.config import ServeConfig
from griffin_offload.serving.api_errors import ApiError
from griffin_offload.serving.requests import Request, parse_request
from griffin_offload.serving.validation import parse_object

USER = {"role": "user", "content": "hello"}
CHAT = {"model": "m", "messages": [USER]}
TEXT = {"model": "m", "prompt": "hello"}


def parse(endpoint: str, **values: object) -> Request:
    return parse_request(endpoint, (CHAT if endpoint == "chat" else TEXT) | values, "m", ServeConfig())


def refused(endpoint: str, **values: object) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(endpoint, **values)
    return caught.value


def test_everything_that_is_served():
    common = {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0.5, "top_p": 1, "seed": -3}
    common |= {"stop": ["a", "b"], "n": 2, "density": 0.25, "exact": False, "user": "somebody"}
    common |= {"min_p": 0.05, "repetition_penalty": 1.1, "presence_penalty": -1, "frequency_penalty": 2}
    both = {"stream": True, "include_usage": True, "temperature": 0.5, "top_p": 1.0, "seed": -3, "stops": ("a", "b")}
    both |= {"n": 2, "density": 0.25, "exact": False, "min_p": 0.05, "repetition_penalty": 1.1}
    both |= {"presence_penalty": -1.0, "frequency_penalty": 2.0}
    found = parse("chat", **common, max_completion_tokens=7, logprobs=True, top_logprobs=3)
    assert found == Request("chat", messages=(USER,), max_tokens=7, top_logprobs=3, **both)
    found = parse("completions", **common, max_tokens=7, logprobs=3, prompt=["a", [1, 2]])
    assert found == Request("completions", prompts=("a", [1, 2]), max_tokens=7, top_logprobs=3, **both)


def test_what_is_left_out_or_null():
    names = ["stream", "stop", "n", "logprobs", "temperature", "max_tokens", "tools", "seed", "density", "logit_bias"]
    for endpoint, length in (("chat", None), ("completions", 16)):
        nulls = {name: None for name in names if endpoint == "chat" or name != "tools"}
        assert parse(endpoint) == parse(endpoint, **nulls)
        assert parse(endpoint).max_tokens == length
    assert parse("chat", logprobs=False).top_logprobs is None
    assert parse("chat", logprobs=True).top_logprobs == 0
    assert parse("completions", logprobs=0).top_logprobs == 0
    assert parse("completions", prompt=[1, 2]).prompts == ([1, 2],)


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", value) for value in (-0.1, 2.1, "1", True, [1], 10**400, 1e999, float("nan"))]
    + [("top_p", value) for value in (-1, 1.5, "x", False)]
    + [("min_p", value) for value in (-0.1, 1.1, "x", True)]
    + [("repetition_penalty", value) for value in (0, -1, 101, "x", True)]
    + [(f"{name}_penalty", value) for name in ("presence", "frequency") for value in (-2.1, 2.1, "x", False)]
    + [("n", value) for value in (0, 9, 1.0, "2", True, 10**30)]
    + [("max_tokens", value) for value in (0, -1, 1.5, "5", True, 10**400)]
    + [("seed", value) for value in (1.5, "1", 2**63, True)]
    + [("stream", value) for value in (1, "true", [])]
    + [("stop", value) for value in ("", ["a"] * 5, [1], {}, ["a", ""], "x" * 1001, "\ud800")]
    + [("density", value) for value in (-0.5, 1.5, "auto", True)]
    + [("exact", value) for value in (1, "yes")]
    + [("model", value) for value in (None, 1, ["m"])]
    + [("stream_options", value) for value in ([], True, {"include_usage": 1}, {"other": True})],
    ids=str,
)
def test_values_that_cannot_be(endpoint: str, name: str, value: object):
    stream = {"stream": True} if name == "stream_options" else {}
    failure = refused(endpoint, **{name: value}, **stream)
    assert failure.status == 400
    assert failure.param is not None
    assert failure.param.startswith(name)
    assert name in failure.message


@pytest.mark.parametrize(
    ("endpoint", "name", "value"),
    [
        ("chat", "store", True),
        ("chat", "store", 0),
        ("chat", "modalities", ["audio"]),
        ("completions", "best_of", 2),
        ("completions", "suffix", "x"),
    ],
)
def test_fields_of_openai_that_are_not_served(endpoint: str, name: str, value: object):
    failure = refused(endpoint, **{name: value})
    assert (failure.status, failure.param, failure.code) == (400, name, "unsupported_parameter")


def test_values_that_ask_for_nothing():
    neutral = {"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "presence_penalty": 0.0}
    assert parse("chat", **neutral, logit_bias={}, store=False, metadata={"a": "b"}) == parse("chat")
    assert parse("completions", echo=False, best_of=1, suffix=None) == parse("completions")


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_unknown_fields_are_refused_by_name(endpoint: str):
    for name in ("temprature", "messages" if endpoint == "completions" else "prompt", "top_a", ""):
        failure = refused(endpoint, **{name: None})
        assert (failure.status, failure.param, failure.code) == (400, name, "unknown_parameter")


def test_fields_that_contradict_or_need_each_other():
    assert parse("chat", max_tokens=5, max_completion_tokens=5).max_tokens == 5
    assert refused("chat", max_tokens=5, max_completion_tokens=6).param == "max_tokens"
    assert refused("completions", max_completion_tokens=6).param == "max_completion_tokens"
    assert refused("chat", top_logprobs=2).param == "top_logprobs"
    assert refused("chat", logprobs=True, top_logprobs=21).param == "top_logprobs"
    assert refused("completions", logprobs=6).param == "logprobs"
    assert refused("completions", logprobs=True).param == "logprobs"
    assert refused("chat", stream_options={"include_usage": True}).param == "stream_options"
    assert refused("completions", n=4, prompt=["a", "b", "c"]).param == "prompt"


def test_another_model_is_not_found():
    failure = refused("chat", model="gpt-4")
    assert (failure.status, failure.code, failure.param) == (404, "model_not_found", "model")


def test_messages():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    answer = {"role": "assistant", "content": "yes", "refusal": None, "tool_calls": None, "annotations": []}
    found = parse("chat", messages=[{"role": "system", "content": ""}, {"role": "user", "content": parts}, answer])
    assert [message["content"] for message in found.messages] == ["", "one\ntwo", "yes"]
    assert all(set(message) == {"role", "content"} for message in found.messages)


_SYSTEM = {"role": "system", "content": "be brief"}


@pytest.mark.parametrize(
    "said",
    [
        [{"role": "developer", "content": [{"type": "text", "text": "be brief"}]}, USER],
        [USER, {"role": "developer", "content": "be brief"}],
        [{"role": "developer", "content": "be brief"}, {"role": "system", "content": "be brief"}, USER],
        [{"role": "developer", "content": "be brief", "name": None}, USER],
    ],
    ids=["in parts", "behind a question", "beside the system", "with a name that is null"],
)
def test_instructions_are_the_systems_whoever_gives_them(said: list[dict[str, object]]):
    found = parse("chat", messages=said).messages
    assert list(found) == [USER if message is USER else _SYSTEM for message in said]


IMAGE = {"type": "image_url", "image_url": {"url": "x"}}


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (None, "messages"),
        ([], "messages"),
        ("hello", "messages"),
        ([USER, "x"], "messages[1]"),
        ([{"role": "function", "content": "x"}], "messages[0].role"),
        ([USER | {"tool_call_id": "x"}], "messages[0].tool_call_id"),
        ([{"role": "king", "content": "x"}], "messages[0].role"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": ["user"], "content": "x"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": []}], "messages[0].content"),
        ([{"role": "user", "content": "\udfff"}], "messages[0].content"),
        ([USER, {"role": "user", "content": [IMAGE]}], "messages[1].content[0].type"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": [{"type": "text", "text": "x", "y": 1}]}], "messages[0].content[0].y"),
        ([USER | {"name": "Bob"}], "messages[0].name"),
        ([USER | {"weight": 1}], "messages[0].weight"),
        ([{"role": "assistant", "content": None, "tool_calls": [{}]}], "messages[0].tool_calls[0]"),
    ],
)
def test_messages_that_cannot_be_used(messages: object, param: str):
    failure = refused("chat", messages=messages)
    assert (failure.status, failure.param) == (400, param)


@pytest.mark.parametrize("prompt", [None, 5, [], [[]], ["a", 5], [1, "a"], [-1], [True], [[1.5]], {"a": 1}, "\ud800"])
def test_prompts_that_cannot_be_used(prompt: object):
    assert refused("completions", prompt=prompt).param == "prompt"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"5",
        b"null",
        b"\xff",
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": 1, "a": 2}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}",
    ],
    ids=lambda body: repr(body[:12]),
)
def test_bodies_that_are_no_json_object(body: bytes):
    with pytest.raises(ApiError) as caught:
        parse_object(body)
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")
    assert len(caught.value.message) < 300


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NAMES = "model messages prompt stream stream_options max_tokens max_completion_tokens temperature top_p stop seed n"
NAMES += " logprobs top_logprobs density exact user tools response_format other"


@pytest.mark.slow
@given(st.sampled_from(["chat", "completions"]), st.dictionaries(st.sampled_from(NAMES.split()), values, max_size=8))
@example("chat", {"messages": [{"role": {}, "content": [[]]}]})
def test_whatever_comes_is_a_request_or_a_failure(endpoint: str, body: dict[str, object]):
    base = CHAT if endpoint == "chat" else TEXT
    failure = None
    try:
        parse_request(endpoint, base | body, "m", ServeConfig())
    except ApiError as caught:
        failure = caught
    if failure is not None:
        assert failure.status in (400, 404)
        json.dumps(failure.to_json(), allow_nan=False)
